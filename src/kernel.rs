//! Computes one tile of queries and keys. It reads rows at strides and computes in f32. It takes no tensor apart
//! by batch and head, and knows no threads.
//!
//! The driver uses this layer through the trait [`FormKernel`](form::FormKernel): load a task, step over its tiles, finish.
//! There are two forms:
//!
//! * [`Prefill`](prefill::Prefill) is for many query rows. Queries lie in the lanes, and the multipliers bound its speed.
//! * [`Decode`](decode::Decode) is for few query rows. Elements of keys and values lie along the lanes, and memory bandwidth
//!   bounds its speed.
//!
//! Both compute the same thing, in units of log2 (queries carry `scale * log2(e)`):
//!
//! ```text
//! scores    S[j][i]  = sum_e K[j][e] * Q[i][e]
//! mods      S[j][i]  = softcap, bias, ALiBi, users' functions; -inf if hidden      only where there is something to modify
//! softmax   P[j][i]  = 2^(S[j][i] - m[i])                           m: running maximum, an integer; P in units of 2^-8
//!           l[i]    += sum_j P[j][i]
//! values    O[i][d] += sum_j P[j][i] * V[j][d]
//! finish    out[i][d] = O[i][d] / l[i]                               a sink adds 2^(sink - m[i]) to l[i]
//! ```
//!
//! Where the log-sum-exps are known, [`add_probs`](form::FormKernel::add_probs) adds up each key's probabilities instead
//! ([`key_sums`]).
//!
//! Each tile forms every element of S, and every term that it adds to O, by chains of multiply-adds in a fixed order. So the
//! bits of a row don't depend on the rows beside it. Tiles are added to `O` and `l` in the order of the keys.

pub(crate) mod form;
pub(crate) mod task;

pub(crate) mod decode;
pub(crate) mod key_sums;
pub(crate) mod prefill;

mod lane_elements;
mod lanes;
mod open_mods;
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
pub(crate) mod prefetch;
mod product;
pub(crate) mod scratch;
pub(crate) mod shape;
