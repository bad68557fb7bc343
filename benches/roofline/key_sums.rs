//! Attention and the sums of each key's probabilities: two calls.

use crate::contest::{Contest, Repeat, Work, stream};
use crate::lines::Line;
use crate::support::{Dims, Inputs, Rng, seeded::len};
use crate::workloads::Workload;
use flashtile::{Attention, Element, TensorMut, TensorRef, Threads, Workspace, reference};
use std::error::Error;

pub(crate) fn line<'a, T: Element>(
    workload: &'static Workload,
    dims: Dims,
    causal: bool,
    threads: usize,
) -> Result<Line<'a>, Box<dyn Error>> {
    let use_of_threads = if threads == 1 { Threads::Serial } else { Threads::Pool };
    let attention = Attention::new().threads(use_of_threads);
    let attention = if causal { attention.causal() } else { attention };
    let inputs = Inputs::<T>::random(dims, &mut Rng(1));
    let sums_shape = [dims.batch, dims.heads_q, dims.seq_kv];
    let mut out = vec![T::default(); len(dims.out())];
    let [mut lse, mut sums] = [len(dims.lse()), len(sums_shape)].map(|len| vec![0.0f32; len]);
    let mut workspace = Workspace::new();
    let mut call = move |inputs: &Inputs<T>| {
        let kv = (inputs.k(), inputs.v());
        let into = TensorMut::from_slice(&mut out, dims.out())?;
        attention.compute(inputs.q(), kv, into, TensorMut::from_slice(&mut lse, dims.lse())?, &mut workspace)?;
        let lse = TensorRef::from_slice(&lse, dims.lse())?;
        attention.key_sums(inputs.q(), kv, lse, TensorMut::from_slice(&mut sums, sums_shape)?, &mut workspace)?;
        Ok::<_, flashtile::Error>(sums[..dims.seq_kv].to_vec())
    };
    check(&inputs, causal, &call(&inputs)?)?;
    // Keys are read twice.
    let bytes = (dims.kv_elements() + dims.query_elements()) * size_of::<T>();
    let work = Work { flops: 1.5 * dims.flops(dims.pairs(causal, None)), bytes: bytes * 3 / 2 };
    let repeat: Repeat<'a> = Box::new(move |repeats| (0..repeats).try_for_each(|_| call(&inputs).map(|_| ())));
    let contest = Contest::with_machine(repeat, threads, work, stream(work))?;
    Ok(Line { workload, dtype: T::DTYPE, threads, work, plan: String::new(), contest, serial: None })
}

/// Compares the sums of the first head with the definition.
fn check<T: Element>(inputs: &Inputs<T>, causal: bool, got: &[f32]) -> Result<(), Box<dyn Error>> {
    let attention = if causal { Attention::new().causal() } else { Attention::new() };
    let [q, k, v] = [inputs.q(), inputs.k(), inputs.v()].map(|all| all.narrow(0, ..1).and_then(|b| b.narrow(1, ..1)));
    for (j, (got, expected)) in got.iter().zip(reference::key_sums(&attention, q?, (k?, v?))?).enumerate() {
        if (*got as f64 - expected).abs() > 1e-4 * expected {
            return Err(format!("the sum of key {j} is {got}, not {expected}").into());
        }
    }
    Ok(())
}
