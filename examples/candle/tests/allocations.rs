//! A call copies no input: it allocates its result, and small lists. (A file of its own, because it counts for the whole
//! process.)

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::attention::AttnMask;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Without the scratch memory of the first call.
fn bytes_of_a_call(mut call: impl FnMut() -> Result<Tensor>) -> Result<usize> {
    call()?;
    let before = BYTES.load(Ordering::Relaxed);
    call()?;
    Ok(BYTES.load(Ordering::Relaxed) - before)
}

#[test]
fn a_call_allocates_its_result() -> Result<()> {
    // Stored [batch, heads, seq, dim], so candle's call would copy all three.
    let tensor = |heads, dtype| Tensor::ones((1, heads, 500, 64), dtype, &Device::Cpu)?.transpose(1, 2);
    let mask = || AttnMask::Mask(Tensor::zeros((500, 500), DType::F32, &Device::Cpu).expect("a tensor"));
    let masks = [AttnMask::None, AttnMask::causal(), mask()];
    for dtype in [DType::F32, DType::F16] {
        let (q, kv) = (tensor(4, DType::F32)?, tensor(2, dtype)?);
        for mask in &masks {
            let call = || flashtile_candle::flash_attn::<f32>(&q, &kv, &kv, 0.125, mask.clone(), None, None);
            let (bytes, result) = (bytes_of_a_call(call)?, 4 * 500 * 64 * 4);
            assert!(
                (result..result + 4096).contains(&bytes),
                "{bytes} bytes for a result of {result}: {dtype:?} {mask:?}"
            );
        }
    }
    Ok(())
}
