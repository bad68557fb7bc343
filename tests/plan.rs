//! Promise: what a plan prints of a problem is what the call does with it.

mod support;

use flashtile::{Attention, Form, Level, TensorRef};
use support::problems::Sizes;

/// What is printed between "keys" or "rows" and "tasks".
fn printed_tasks(sizes: Sizes, form: Form, level: Level) -> usize {
    // (Only shapes matter: each tensor is one number, repeated.)
    let zeros = |shape| TensorRef::<f32>::with_strides(&[0.0], 0, shape, [0; 4]).unwrap();
    let attention = Attention::new().form(form).level(level);
    let plan = attention.plan(zeros(sizes.q()), zeros(sizes.k()), zeros(sizes.v())).unwrap().to_string();
    let before = plan.split(" tasks").next().unwrap_or_default();
    let number = before.rsplit(' ').next().and_then(|number| number.parse().ok());
    number.unwrap_or_else(|| panic!("no number of tasks in {plan:?}"))
}

/// A task for each batch, key/value head, block of rows and, where that leaves fewer than 64, split of the keys.
#[test]
fn tasks() {
    let sizes = |batch, [heads_q, heads_kv]: [usize; 2], seq_q, seq_kv| Sizes {
        batch,
        heads_q,
        heads_kv,
        ..Sizes::single(seq_q, seq_kv, 64)
    };
    let (few, many) = (Form::FewQueries, Form::ManyQueries);
    for (sizes, form, tasks) in [
        (sizes(1, [1, 1], 1, 512), few, 1),
        (sizes(1, [1, 1], 1, 513), few, 2),
        (sizes(1, [2, 2], 1, 1300), few, 2 * 3),
        (sizes(3, [8, 2], 1, 1025), few, 3 * 2 * 3),
        // Blocks of 24 rows: those of all heads that share keys.
        (sizes(1, [4, 1], 6, 100), few, 1),
        (sizes(1, [4, 1], 7, 100), few, 2),
        (sizes(2, [4, 1], 7, 600), few, 2 * 2 * 2),
        // Tasks enough: keys stay together.
        (sizes(1, [63, 63], 1, 1300), few, 63 * 3),
        (sizes(1, [64, 64], 1, 1300), few, 64),
        (sizes(2, [32, 32], 1, 1300), few, 64),
        (sizes(1, [32, 32], 25, 1300), few, 64),
        // So many splits that their results would need more than 1 GiB.
        (sizes(1, [1, 1], 1, 1 << 40), few, 1),
        // Blocks of 256 rows, shared out evenly.
        (sizes(1, [1, 1], 256, 1300), many, 1),
        (sizes(1, [1, 1], 257, 1300), many, 2),
        (sizes(2, [6, 3], 128, 1300), many, 2 * 3),
        (sizes(2, [6, 3], 129, 1300), many, 2 * 3 * 2),
        (sizes(1, [8, 8], 580, 100), many, 8 * 3),
        // Nothing to do.
        (sizes(0, [2, 2], 3, 600), few, 0),
        (sizes(1, [0, 0], 3, 600), many, 0),
        (sizes(1, [2, 2], 0, 600), few, 0),
        (sizes(1, [2, 2], 0, 600), many, 0),
    ] {
        for level in Level::available() {
            assert_eq!(printed_tasks(sizes, form, level), tasks, "{sizes:?} {form:?} {level}");
        }
    }
}
