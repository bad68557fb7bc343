//! One tile of queries and keys: rows at strides, nothing but f32 past the load. No tensors, no threads.
//!
//! The door to this layer is the trait [`FormKernel`](form::FormKernel): load a task, step over its tiles, finish. It has two
//! forms:
//!
//! * [`Prefill`](prefill::Prefill), for many rows: queries in the lanes, at the speed of the multipliers.
//! * [`Decode`](decode::Decode), for few rows: keys and values along the lanes, one pass over them at the speed of memory.
//!
//! Both compute the same thing, in units of log2 (queries carry `scale * log2(e)`):
//!
//! ```text
//! scores    S[j][i]  = sum_e K[j][e] * Q[i][e]
//! mods      S[j][i]  = softcap, bias, ALiBi; -inf if hidden          only where there is something to modify
//! softmax   P[j][i]  = 2^(S[j][i] - m[i])                           m: running maximum, an integer
//!           l[i]    += sum_j P[j][i]
//! values    O[i][d] += sum_j P[j][i] * V[j][d]
//! finish    out[i][d] = O[i][d] / l[i]
//! ```
//!
//! Every element of S and O is one chain of multiply-adds in a fixed order: its bits don't depend on the rows beside it. `O` and
//! `l` take one finished sum per tile of keys, in the order of the keys.

pub(crate) mod form;
pub(crate) mod task;

pub(crate) mod decode;
pub(crate) mod prefill;

mod lanes;
mod panel;
pub(crate) mod partial;
mod row_scores;
mod score_tensors;
mod state;
mod tile;

pub(crate) mod bf16_pairs;
mod transpose;
mod widen;

mod arithmetic;
mod convert;
pub(crate) mod output;
mod prefetch;
mod product;
pub(crate) mod scratch;
pub(crate) mod shape;
