//! One tile of queries and keys: no tensors' shapes to check, no threads, and nothing but f32 past the load.
//!
//! **Queries stand in the lanes.** A *panel* is [`panel_lanes`] query rows held transposed, so that a vector holds the same
//! element of as many queries as it has lanes. For a panel and a tile of keys:
//!
//! ```text
//! scores   S[j][lane]  = sum_e K[j][e] * Q[e][lane]          scores.rs    Q carries scale * log2(e)
//! adjust   S[j][lane]  = softcap, bias, ALiBi; -inf if hidden adjust.rs    only where there is something to adjust
//! weights  P[j][lane]  = 2^(S[j][lane] - m[lane])            weights.rs   m: running maximum, an integer
//!          l[lane]    += sum_j P[j][lane]
//! values   O[d][lane] += sum_j V[j][d] * P[j][lane]          values.rs    the same product as the scores
//! finish   out[lane][d] = O[d][lane] / l[lane]               finish.rs
//! ```
//!
//! Both products broadcast an element of the left operand and multiply it into vectors of queries ([`product`]), so
//! maximum and sum are vertical, no horizontal operation remains, and what one product writes is what the next one reads.
//! Every element of S and O is one chain of multiply-adds in a fixed order in its own lane: its bits don't depend on the
//! lanes beside it. `O` and `l` take one finished sum per tile of keys, in the order of the keys.
//!
//! For few queries the lanes would stay empty; [`few`] lays keys and values along the lanes instead.

pub(crate) mod arithmetic;
pub(crate) mod bf16_pairs;
pub(crate) mod convert;
pub(crate) mod decode;
pub(crate) mod prefetch;
pub(crate) mod prefill;
pub(crate) mod product;
pub(crate) mod score_tensors;
pub(crate) mod shape;
pub(crate) mod state;
pub(crate) mod tile;
pub(crate) mod transpose;
pub(crate) mod widen;
