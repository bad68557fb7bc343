//! Promise: a plan says, by its accessors and in print, what the call does.

mod support;

use flashtile::{Attention, Form, Level, Operands, Plan, TensorRef, Threads, bf16};
use support::Dims;
use support::problems::FORMS;

/// A plan of shapes: each tensor is one repeated number.
fn plan_of<T: flashtile::Element>(dims: Dims, attention: Attention<'_>) -> Plan {
    let zero = [T::default()];
    let zeros = |shape| TensorRef::with_strides(&zero, 0, shape, [0; 4]).unwrap();
    attention.plan(zeros(dims.q()), (zeros(dims.k()), zeros(dims.v()))).unwrap()
}

/// The accessors agree with what is printed.
#[test]
fn printed_as_planned() {
    for (form, level) in FORMS.into_iter().flat_map(|form| Level::available().map(move |level| (form, level))) {
        let dims = Dims { heads_q: 8, heads_kv: 2, ..Dims::new(1, 5, 1300, 64) };
        let plan = plan_of::<f32>(dims, Attention::new().form(form).level(level));
        assert_eq!((plan.form(), plan.level(), plan.operands()), (form, level, Operands::F32));
        let text = plan.to_string();
        let tile = match form {
            Form::Prefill => format!("tiles of {} queries x {} keys", plan.tile_rows(), plan.tile_keys()),
            _ => format!("splits of {} keys", plan.split_keys().unwrap()),
        };
        let threads = if plan.is_parallel() { "in the pool" } else { "serial" };
        let tasks = format!("{} tasks, {threads}, {level}", plan.tasks());
        for part in [form.to_string(), tile, tasks] {
            assert!(text.contains(&part), "{text}: {part}");
        }
        assert_eq!(plan.split_keys().is_some(), form == Form::Decode, "{text}");
    }
}

/// A few rows after whole vectors are decoded, unless the form is set or there are few keys.
#[test]
fn tails_are_printed() {
    let plan = |seq_q, seq_kv, attention| plan_of::<f32>(Dims::new(1, seq_q, seq_kv, 64), attention);
    for level in Level::available() {
        let auto = Attention::new().level(level);
        let one = plan(33, 300, auto.clone());
        assert_eq!((one.form(), one.tail_rows()), (Form::Prefill, 1), "{one}");
        assert!(one.to_string().contains("rows and 1 decoded"), "{one}");
        for other in [plan(32, 300, auto.clone()), plan(33, 64, auto.clone()), plan(33, 300, auto.form(Form::Prefill))]
        {
            assert_eq!(other.tail_rows(), 0, "{other}");
            assert!(!other.to_string().contains("decoded"), "{other}");
        }
    }
}

/// Pairs of bf16 are used where both queries and keys are bf16, the level has the instruction, and the scale is ordinary.
#[test]
fn operands_follow_from_types_level_and_scale() {
    let dims = Dims::new(1, 40, 40, 64);
    for level in Level::available() {
        let attention = Attention::new().level(level);
        let expected = if level == Level::Avx512Bf16 { Operands::Bf16Pairs } else { Operands::F32 };
        assert_eq!(plan_of::<bf16>(dims, attention.clone()).operands(), expected, "{level}");
        assert_eq!(plan_of::<bf16>(dims, attention.clone().scale(1e-5)).operands(), Operands::F32, "{level}");
        assert_eq!(plan_of::<f32>(dims, attention).operands(), Operands::F32, "{level}");
    }
}

#[test]
fn serial_calls_and_small_ones_use_one_thread() {
    let large = Dims::new(1, 512, 512, 64);
    assert!(plan_of::<f32>(large, Attention::new()).is_parallel());
    assert!(!plan_of::<f32>(large, Attention::new().threads(Threads::Serial)).is_parallel());
    assert!(!plan_of::<f32>(Dims::new(1, 16, 16, 64), Attention::new()).is_parallel());
}

/// A task for each batch, key/value head, block of rows and, where that leaves fewer than 64, split of the keys.
#[test]
fn tasks() {
    let dims = |batch, [heads_q, heads_kv]: [usize; 2], seq_q, seq_kv| Dims {
        batch,
        heads_q,
        heads_kv,
        ..Dims::new(1, seq_q, seq_kv, 64)
    };
    let (decode, prefill) = (Form::Decode, Form::Prefill);
    for (dims, form, tasks) in [
        (dims(1, [1, 1], 1, 512), decode, 1),
        (dims(1, [1, 1], 1, 513), decode, 2),
        (dims(1, [2, 2], 1, 1300), decode, 2 * 3),
        (dims(3, [8, 2], 1, 1025), decode, 3 * 2 * 3),
        // Blocks of 24 rows: those of all heads that share keys.
        (dims(1, [4, 1], 6, 100), decode, 1),
        (dims(1, [4, 1], 7, 100), decode, 2),
        (dims(2, [4, 1], 7, 600), decode, 2 * 2 * 2),
        // Enough tasks: keys are not split between tasks.
        (dims(1, [63, 63], 1, 1300), decode, 63 * 3),
        (dims(1, [64, 64], 1, 1300), decode, 64),
        (dims(2, [32, 32], 1, 1300), decode, 64),
        (dims(1, [32, 32], 25, 1300), decode, 64),
        // The partial results of all splits would need more than 1 GiB.
        (dims(1, [1, 1], 1, 1 << 40), decode, 1),
        // Blocks of 256 rows, shared out evenly.
        (dims(1, [1, 1], 256, 1300), prefill, 1),
        (dims(1, [1, 1], 257, 1300), prefill, 2),
        (dims(2, [6, 3], 128, 1300), prefill, 2 * 3),
        (dims(2, [6, 3], 129, 1300), prefill, 2 * 3 * 2),
        (dims(1, [8, 8], 580, 100), prefill, 8 * 3),
        // Small heads share a task of some microseconds, while 64 tasks remain.
        (dims(1, [127, 127], 4, 4), decode, 127),
        (dims(1, [128, 128], 4, 4), decode, 64),
        (dims(1000, [12, 12], 4, 4), prefill, 12000usize.div_ceil(128)),
        (dims(1000, [12, 12], 16, 16), prefill, 1500),
        // Nothing to do.
        (dims(0, [2, 2], 3, 600), decode, 0),
        (dims(1, [0, 0], 3, 600), prefill, 0),
        (dims(1, [2, 2], 0, 600), decode, 0),
        (dims(1, [2, 2], 0, 600), prefill, 0),
    ] {
        for level in Level::available() {
            let plan = plan_of::<f32>(dims, Attention::new().form(form).level(level));
            assert_eq!(plan.tasks(), tasks, "{dims:?} {form:?} {level}");
        }
    }
}
