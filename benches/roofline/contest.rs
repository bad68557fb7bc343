//! Times a kernel and the roofs above it, in turns.

use crate::support::machine::{multiply_add_flops, multiply_adds, read};
use flashtile::Error;
use std::rc::Rc;
use std::time::Instant;

/// The least time of a sample. Shorter calls are repeated, so that the clock resolves them.
const SAMPLE_SECONDS: f64 = 200e-6;

/// The least and the most steps of multiply-adds in a sample: about 3 and 27 ms. In between, a sample lasts about as long as
/// the kernel, because a shorter sample finds a quiet spell of the machine more easily.
const SPIN_STEPS: [f64; 2] = [(1 << 20) as f64, (1 << 23) as f64];

/// Steps of multiply-adds that take about a second.
const SPIN_STEPS_PER_SECOND: f64 = 3e8;

/// The most bytes of the buffer that is read. A longer one gives the same speed.
const MAX_READ_BYTES: usize = 256 << 20;

/// Work to time, done the given number of times in a row.
pub(crate) type Repeat<'a> = Box<dyn FnMut(usize) -> Result<(), Error> + 'a>;

/// Samples of the time of one call.
pub(crate) struct Probe<'a> {
    run: Repeat<'a>,
    repeats: usize,
    seconds: Vec<f64>,
}

impl<'a> Probe<'a> {
    pub(crate) fn new(repeats: usize, run: Repeat<'a>) -> Self {
        Self { run, repeats, seconds: Vec::new() }
    }

    /// With the repeats that make a sample long enough.
    pub(crate) fn calibrated(mut run: Repeat<'a>) -> Result<Self, Error> {
        run(1)?; // wakes threads and warms caches
        let start = Instant::now();
        run(1)?;
        let repeats = (SAMPLE_SECONDS / start.elapsed().as_secs_f64()).ceil().clamp(1.0, 1e4);
        Ok(Self::new(repeats as usize, run))
    }

    fn sample(&mut self) -> Result<(), Error> {
        let start = Instant::now();
        (self.run)(self.repeats)?;
        self.seconds.push(start.elapsed().as_secs_f64() / self.repeats as f64);
        Ok(())
    }

    fn best(&self) -> f64 {
        self.seconds.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn median(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
    }
}

/// The work: operations of the visible pairs, and bytes of all tensors, each moved once.
#[derive(Clone, Copy)]
pub(crate) struct Work {
    pub(crate) flops: f64,
    pub(crate) bytes: usize,
}

/// A buffer to read, with the bytes of a workload.
pub(crate) fn stream(work: Work) -> Rc<[f32]> {
    vec![1.0; work.bytes.min(MAX_READ_BYTES) / size_of::<f32>()].into()
}

/// The lower bounds of the time.
enum Roofs<'a> {
    Machine {
        work: Work,
        multiply: Rate<'a>,
        read: Rate<'a>,
    },
    /// The time to copy the same bytes, on the same threads.
    Copy(Probe<'a>),
}

/// A probe that does `amount` operations or bytes in each call.
struct Rate<'a> {
    probe: Probe<'a>,
    amount: f64,
}

impl Rate<'_> {
    fn per_second(&self) -> f64 {
        self.amount / self.probe.best()
    }
}

/// A kernel and its roofs, on the same threads.
pub(crate) struct Contest<'a> {
    kernel: Probe<'a>,
    roofs: Roofs<'a>,
}

/// The result, in seconds.
#[derive(Clone, Copy)]
pub(crate) struct Outcome {
    pub(crate) best: f64,
    pub(crate) median: f64,
    pub(crate) roof: f64,
    pub(crate) roof_name: &'static str,
    /// Multiply-adds in registers, operations a second, if they were a roof.
    pub(crate) peak: Option<f64>,
}

impl<'a> Contest<'a> {
    /// Against what `threads` threads can multiply and read. The stream takes turns with the kernel and has memory of its
    /// own: both find their data where the other has left it, or, where calls are so short that they are repeated, where
    /// their own last call did.
    pub(crate) fn with_machine(
        kernel: Repeat<'a>,
        threads: usize,
        work: Work,
        stream: Rc<[f32]>,
    ) -> Result<Self, Error> {
        let start = Instant::now();
        let kernel = Probe::calibrated(kernel)?;
        let call = start.elapsed().as_secs_f64() / 2.0;
        let multiply = multiply(threads, (call * SPIN_STEPS_PER_SECOND).clamp(SPIN_STEPS[0], SPIN_STEPS[1]) as usize);
        let read = Rate { amount: size_of_val(&stream[..]) as f64, probe: reading(threads, kernel.repeats, stream) };
        Ok(Self { kernel, roofs: Roofs::Machine { work, multiply, read } })
    }

    pub(crate) fn with_copy(kernel: Repeat<'a>, copy: Repeat<'a>) -> Result<Self, Error> {
        Ok(Self { kernel: Probe::calibrated(kernel)?, roofs: Roofs::Copy(Probe::calibrated(copy)?) })
    }

    /// Takes a sample of each.
    pub(crate) fn round(&mut self) -> Result<(), Error> {
        self.kernel.sample()?;
        match &mut self.roofs {
            Roofs::Copy(copy) => copy.sample(),
            Roofs::Machine { multiply, read, .. } => {
                multiply.probe.sample()?;
                read.probe.sample()
            }
        }
    }

    pub(crate) fn outcome(&self) -> Outcome {
        let (roof, roof_name, peak) = match &self.roofs {
            Roofs::Copy(copy) => (copy.best(), "copy", None),
            Roofs::Machine { work, multiply, read } => {
                let peak = multiply.per_second();
                let (compute, memory) = (work.flops / peak, work.bytes as f64 / read.per_second());
                if compute > memory { (compute, "compute", Some(peak)) } else { (memory, "memory", Some(peak)) }
            }
        };
        Outcome { best: self.kernel.best(), median: self.kernel.median(), roof, roof_name, peak }
    }
}

fn multiply<'a>(threads: usize, steps: usize) -> Rate<'a> {
    let spin = move |_| {
        on_every_thread(threads, |_| multiply_adds(steps));
        Ok(())
    };
    Rate { probe: Probe::new(1, Box::new(spin)), amount: threads as f64 * multiply_add_flops(steps) }
}

/// Each thread reads a part of its own. Repeats are made by each thread for itself: that threads are woken for every call
/// is the kernel's cost, not the memory's.
fn reading<'a>(threads: usize, repeats: usize, stream: Rc<[f32]>) -> Probe<'a> {
    let share = stream.len().div_ceil(threads).next_multiple_of(64);
    let run = move |repeats| {
        let stream = &stream[..];
        on_every_thread(threads, |thread| {
            let part = stream.chunks(share).nth(thread).unwrap_or_default();
            (0..repeats).for_each(|_| read(part));
        });
        Ok(())
    };
    Probe::new(repeats, Box::new(run))
}

/// Computes `to` from `from` on `threads` threads: each has a part of its own, in whole pages.
pub(crate) fn on_parts(threads: usize, to: &mut [f32], from: &[f32], work: impl Fn(&mut [f32], &[f32]) + Sync) {
    if threads == 1 {
        return work(to, from);
    }
    let share = to.len().div_ceil(threads).next_multiple_of(1024);
    rayon::scope(|scope| {
        for (to, from) in to.chunks_mut(share).zip(from.chunks(share)) {
            scope.spawn(|_| work(to, from));
        }
    });
}

/// On this thread, or on all of the pool that this thread belongs to; returns when the last is done.
fn on_every_thread(threads: usize, work: impl Fn(usize) + Sync) {
    match threads {
        1 => work(0),
        _ => drop(rayon::broadcast(|context| work(context.index()))),
    }
}
