//! Promise: where threads can't be started, a call is serial, has the same result, and does not panic.

#![cfg(all(target_os = "linux", feature = "rayon"))]

mod support;

use flashtile::{Attention, TensorMut, TensorRef, Threads, Workspace};
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use support::Rng;

static REFUSE: AtomicBool = AtomicBool::new(false);
static REFUSED: AtomicUsize = AtomicUsize::new(0);
static STARTED: AtomicUsize = AtomicUsize::new(0);

type Create = unsafe extern "C" fn(*mut c_void, *const c_void, *const c_void, *mut c_void) -> c_int;

/// Replaces the C library's function of this name in this program.
///
/// # Safety
/// As that one.
#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_create(
    thread: *mut c_void,
    attributes: *const c_void,
    start: *const c_void,
    argument: *mut c_void,
) -> c_int {
    if REFUSE.load(Ordering::SeqCst) {
        REFUSED.fetch_add(1, Ordering::SeqCst);
        return libc::EAGAIN;
    }
    STARTED.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the function that comes after this one, which has this type.
    let create = unsafe {
        let next = libc::dlsym(libc::RTLD_NEXT, c"pthread_create".as_ptr());
        std::mem::transmute::<*mut c_void, Create>(next)
    };
    // SAFETY: the caller's promise.
    unsafe { create(thread, attributes, start, argument) }
}

fn attention(threads: Threads) -> Vec<u32> {
    let shape = [1, 4, 256, 64];
    let mut rng = Rng(1);
    let x: Vec<f32> = (0..shape.iter().product()).map(|_| rng.uniform()).collect();
    let mut out = vec![0.0; x.len()];
    let tensor = || TensorRef::from_slice(&x, shape).unwrap();
    let attention = Attention::new().threads(threads);
    let to = TensorMut::from_slice(&mut out, shape).unwrap();
    attention.compute(tensor(), (tensor(), tensor()), to, None, &mut Workspace::new()).unwrap();
    out.into_iter().map(f32::to_bits).collect()
}

/// rayon's global pool, whose number of threads is the number for callers outside, does not start: calls are serial from then on.
/// A pool of the caller is still used.
fn without_the_global_pool(expected: &[u32]) {
    REFUSE.store(true, Ordering::SeqCst);
    let without = attention(Threads::Pool);
    REFUSE.store(false, Ordering::SeqCst);
    assert!(without == expected);
    assert!(REFUSED.load(Ordering::SeqCst) > 0, "this problem is large enough for threads");
    assert!(attention(Threads::Pool) == expected, "the global pool can't be had any more");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    assert!(pool.install(|| attention(Threads::Pool)) == expected);
}

/// The global pool has started, and the threads that help callers outside don't: they are tried again with the next call.
fn without_helpers(expected: &[u32]) {
    rayon::ThreadPoolBuilder::new().num_threads(2).build_global().unwrap();
    REFUSE.store(true, Ordering::SeqCst);
    let without = attention(Threads::Pool);
    REFUSE.store(false, Ordering::SeqCst);
    assert!(without == expected);
    assert!(REFUSED.swap(0, Ordering::SeqCst) > 0, "the global pool has two threads, so there is a helper");
    let started = STARTED.load(Ordering::SeqCst);
    assert!(attention(Threads::Pool) == expected && attention(Threads::Pool) == expected);
    assert_eq!(STARTED.load(Ordering::SeqCst) - started, 1, "one helper, started once");
}

/// This is the only test of the file, because threads belong to the whole program. A child has the other half of it.
#[test]
fn threads_that_do_not_start_make_calls_serial() {
    let expected = attention(Threads::Serial);
    // SAFETY: the child starts threads of its own, and ends without returning.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let passed = std::panic::catch_unwind(|| without_the_global_pool(&expected)).is_ok();
        // SAFETY: nothing of the child is needed any more.
        unsafe { libc::_exit(i32::from(!passed)) }
    }
    let mut status = 1;
    // SAFETY: `status` is written.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "without the global pool");
    without_helpers(&expected);
}
