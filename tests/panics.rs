//! Promise: calls from anywhere in the caller's rayon pool finish and are right, also beside tasks that panic. Their workspaces
//! can be used again.
#![cfg(feature = "rayon")]

mod support;

use flashtile::{Attention, Threads, Workspace};
use rayon::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use support::problems::{FORMS, bits};
use support::watchdog::within;
use support::{Dims, Inputs, Rng};

type Bits = (Vec<u32>, Vec<u32>);

/// Problems worth more than one thread, in either form, with their results.
fn problems() -> Vec<(Inputs<f32>, Attention<'static>, Bits)> {
    let mut rng = Rng(1);
    let dims = [
        Dims { heads_q: 4, heads_kv: 2, ..Dims::new(1, 200, 200, 32) },
        Dims { heads_q: 2, ..Dims::new(1, 2, 6000, 64) },
        Dims::new(1, 5, 9, 3),
    ];
    let problem = |(dims, form)| {
        let inputs = Inputs::random(dims, &mut rng);
        let attention = Attention::new().causal().form(form);
        let expected = inputs.bits(&attention.clone().threads(Threads::Serial));
        (inputs, attention, expected)
    };
    dims.into_iter().flat_map(|dims| FORMS.map(|form| (dims, form))).map(problem).collect()
}

fn pools() -> impl Iterator<Item = rayon::ThreadPool> {
    [1, 2, 3, 8].into_iter().map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap())
}

/// A panic without a message on stderr.
fn quiet_panic() -> ! {
    std::panic::resume_unwind(Box::new("on purpose"))
}

/// Another task of the pool panics before, during or after the call.
#[test]
fn panics_beside_a_call() {
    within(60, "panics beside a call", || {
        let problems = problems();
        for pool in pools() {
            for round in 0..60 {
                let (inputs, attention, expected) = &problems[round % problems.len()];
                let mut workspace = Workspace::new();
                let mut result = None;
                let panicked = catch_unwind(AssertUnwindSafe(|| {
                    pool.install(|| {
                        let call = || result = Some(inputs.compute_with(attention, &mut workspace));
                        let spin = || {
                            (0..round * 200).for_each(|_| std::hint::spin_loop());
                            quiet_panic()
                        };
                        if round % 2 == 0 {
                            rayon::join(call, spin)
                        } else {
                            rayon::join(spin, call)
                        };
                    })
                }));
                assert!(panicked.is_err());
                // The call is right if it began. The workspace can be used in any case.
                if let Some((out, lse)) = result {
                    assert_eq!((bits(&out), bits(&lse)), *expected);
                }
                let (out, lse) = pool.install(|| inputs.compute_with(attention, &mut workspace));
                assert_eq!((bits(&out), bits(&lse)), *expected);
            }
        }
    });
}

/// Calls in `par_iter`, in `scope` and in `join` within `join`, on every thread of a pool.
#[test]
fn calls_within_tasks() {
    within(60, "calls within tasks", || {
        let problems = problems();
        for pool in pools() {
            pool.install(|| {
                (0..48).into_par_iter().for_each(|n| {
                    let (inputs, attention, expected) = &problems[n % problems.len()];
                    assert_eq!(inputs.bits(attention), *expected);
                });
                (0..48).into_par_iter().for_each_init(Workspace::new, |workspace, n| {
                    let (inputs, attention, expected) = &problems[n % problems.len()];
                    let (out, lse) = inputs.compute_with(attention, workspace);
                    assert_eq!((bits(&out), bits(&lse)), *expected);
                });
                rayon::scope(|scope| {
                    for (inputs, attention, expected) in problems.iter().cycle().take(24) {
                        scope.spawn(move |scope| {
                            assert_eq!(inputs.bits(attention), *expected);
                            scope.spawn(move |_| assert_eq!(inputs.bits(attention), *expected));
                        });
                    }
                });
                assert!(halves(&problems, 5));
            });
        }
    });
}

/// A binary tree of joins with a call at every node.
fn halves(problems: &[(Inputs<f32>, Attention<'static>, Bits)], depth: usize) -> bool {
    let (inputs, attention, expected) = &problems[depth % problems.len()];
    let right = inputs.bits(attention) == *expected;
    if depth == 0 {
        return right;
    }
    let (a, b) = rayon::join(|| halves(problems, depth - 1), || halves(problems, depth - 1));
    right && a && b
}

/// Repeated calls all over the pool, among tasks that panic.
#[test]
fn a_pool_full_of_panics() {
    within(60, "a pool full of panics", || {
        let problems = problems();
        for pool in pools() {
            for _ in 0..10 {
                let panicked = catch_unwind(AssertUnwindSafe(|| {
                    pool.install(|| {
                        (0..40).into_par_iter().for_each(|n| {
                            let (inputs, attention, expected) = &problems[n % problems.len()];
                            assert_eq!(inputs.bits(attention), *expected);
                            if n % 7 == 3 {
                                quiet_panic();
                            }
                        });
                    })
                }));
                assert_eq!(panicked.unwrap_err().downcast_ref::<&str>(), Some(&"on purpose"));
            }
            let (inputs, attention, expected) = &problems[0];
            assert_eq!(pool.install(|| inputs.bits(attention)), *expected);
        }
    });
}
