//! Promise: every element is within the bound of `docs/numerics.md` at the boundaries of the code.
//!
//! A boundary is a number at which the code takes another path. Each is tested with one less, the number itself and one more, in
//! both forms, at every level, with and without a causal mask.

mod support;

use flashtile::mask::{BlockSparse, Chunked, Documents, FirstAndLast, KeyStarts, PrefixLm, Tree};
use flashtile::{DType, Form, Level};
use support::any_problem::{Offset, Problem, Tensor};
use support::bound::tile_keys;
use support::check::{Found, check};
use support::layouts::Layout;
use support::open::{OwnedMask, READY_MASKS, ready_mask, three_ready_masks};
use support::{Dims, Rng};

/// A size at which the code takes another path, and which.
struct Boundary {
    at: usize,
    guards: &'static str,
}

const fn boundary(at: usize, guards: &'static str) -> Boundary {
    Boundary { at, guards }
}

const SMALL: Dims = Dims { batch: 1, heads_q: 1, heads_kv: 1, seq_q: 5, seq_kv: 21, head_dim: 10, value_dim: 9 };

#[test]
fn queries() {
    let boundaries = [
        boundary(1, "none, and a single query"),
        boundary(4, "decode: rows that share a load of keys"),
        boundary(8, "one vector of eight lanes"),
        boundary(12, "decode: three groups of rows that share a load"),
        boundary(16, "a panel of two vectors of eight, or of one of sixteen"),
        boundary(24, "decode: rows of a task"),
        boundary(32, "a panel of two vectors of sixteen; two panels of eight"),
        boundary(48, "a panel and a half of sixteen"),
        boundary(256, "a block of panels: another task, packing anew"),
    ];
    check_around(&boundaries, |seq_q| Dims { seq_q, ..SMALL });
    // The same rows made of heads that share a key/value head: positions repeat, rows of one query straddle panels.
    check_around(&boundaries[..8], |seq_q| Dims { seq_q, heads_q: 3, ..SMALL });
}

#[test]
fn keys() {
    check_around(
        &[
            boundary(1, "none, and a single key"),
            boundary(6, "a product's rows of accumulators with sixteen registers and two vectors"),
            boundary(8, "a vector of keys: biases and probs of decode; a product's rows with two vectors of sixteen"),
            boundary(12, "a product's rows with one vector of eight"),
            boundary(16, "a product's rows with one vector of sixteen"),
            boundary(32, "prefill: keys whose values are packed block after block; decode: keys of a block"),
            boundary(240, "prefill: the largest tile"),
            boundary(256, "decode: a tile"),
            boundary(480, "two of the largest tiles"),
            boundary(512, "decode: a split"),
            boundary(1024, "decode: two splits, one merge more"),
        ],
        |seq_kv| Dims { seq_kv, ..SMALL },
    );
}

/// Tiles shrink as heads widen: sizes around the tile of the plan.
#[test]
fn keys_around_the_tile_of_each_width() {
    let mut tiles = Vec::new();
    for (head_dim, value_dim) in [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (576, 512)] {
        let dims = Dims { head_dim, value_dim, seq_q: 3, ..SMALL };
        let mut problem = Problem::plain(dims, || 0.0);
        problem.form = Some(Form::Prefill);
        let tile = tile_keys(&problem.plan(Level::Portable));
        tiles.push(tile);
        let guards = "a tile of the printed size";
        check_around(&[boundary(tile, guards), boundary(2 * tile, guards)], |seq_kv| Dims { seq_kv, ..dims });
    }
    tiles.dedup();
    assert!(tiles.len() >= 4 && tiles.contains(&240) && tiles.contains(&48), "tiles of {tiles:?} keys");
}

const WIDTHS: [Boundary; 9] = [
    boundary(1, "none, and a single element"),
    boundary(2, "the portable level's rows of accumulators"),
    boundary(6, "a product's rows of accumulators: a block of packed values"),
    boundary(8, "a vector of eight; a product's rows of accumulators with thirty-two registers"),
    boundary(12, "two blocks of packed values with sixteen registers"),
    boundary(16, "two vectors; a block of packed values with thirty-two registers, of two products"),
    boundary(32, "two blocks of packed values"),
    boundary(64, "eight vectors: the widest strip of decode"),
    boundary(128, "two strips; a tile of 96 keys and less"),
];

#[test]
fn head_dims() {
    check_around(&WIDTHS, |head_dim| Dims { head_dim, ..SMALL });
    // 576: the widest head in use, where tiles are smallest.
    check_around(&[boundary(576, "the smallest tile")], |head_dim| Dims { head_dim, seq_kv: 50, ..SMALL });
}

#[test]
fn value_dims() {
    check_around(&WIDTHS, |value_dim| Dims { value_dim, ..SMALL });
    check_around(&[boundary(576, "the smallest tile")], |value_dim| Dims { value_dim, seq_kv: 50, ..SMALL });
}

/// Where a causal diagonal enters and leaves tiles and splits: offsets around their edges.
#[test]
fn diagonals() {
    for edge in [48, 64, 240, 512] {
        for offset in [edge - 34, edge - 33, edge - 32, edge - 17, edge - 16, edge - 2, edge - 1, edge] {
            let dims = Dims { seq_q: 33, seq_kv: 530, ..SMALL };
            check_all(dims, "a diagonal that crosses the edge of a tile", |problem| {
                problem.causal = true;
                problem.offset = Offset::At(offset);
            });
            check_all(dims, "a window that starts and ends in a tile", |problem| {
                problem.window = (Some(20), Some(3));
                problem.offset = Offset::At(offset);
            });
        }
    }
}

/// Every ready mask, and three that intersect, at each number of queries.
#[test]
fn masks_at_numbers_of_queries() {
    let dims = |seq_q| Dims { batch: 2, heads_q: 2, seq_q, head_dim: 3, value_dim: 2, ..SMALL };
    for at in [1, 4, 8, 12, 16, 24, 32, 48] {
        check_masks(&[at - 1, at, at + 1], dims);
    }
    check_masks(&[255, 256, 257], |seq_q| Dims { batch: 1, heads_q: 1, ..dims(seq_q) });
}

/// Every ready mask, and three that intersect, at each number of keys.
#[test]
fn masks_at_numbers_of_keys() {
    let dims = |seq_kv| Dims { batch: 2, heads_q: 2, seq_q: 3, seq_kv, head_dim: 3, value_dim: 2, ..SMALL };
    for at in [1, 6, 8, 12, 16, 32, 240, 256, 480, 512, 1024] {
        check_masks(&[at - 1, at, at + 1], dims);
    }
}

/// Masks with an edge at the edge of a vector, a panel, a tile and a split.
#[test]
fn edges_of_masks() {
    for at in [8, 16, 32, 48, 240, 256, 512] {
        for edge in [at - 1, at, at + 1] {
            let dims = Dims { seq_q: 34, seq_kv: edge + 20, head_dim: 3, value_dim: 2, ..SMALL };
            let masks = masks_with_an_edge(edge, dims);
            for mask in &masks {
                check_masked(dims, |problem| problem.masks = vec![mask.clone()]);
            }
            // Queries around the edge, too: causal order and ranges of positions start and end there.
            for (n, mask) in masks.iter().enumerate() {
                check_masked(dims, |problem| {
                    problem.masks = vec![mask.clone(), masks[(n + 1) % masks.len()].clone()];
                    problem.offset = Offset::At(edge as isize - 17);
                });
            }
        }
    }
}

/// Each ready mask, where what a query sees changes at key `edge`.
fn masks_with_an_edge(edge: usize, Dims { seq_q, seq_kv, .. }: Dims) -> Vec<OwnedMask> {
    let document_of = |n: usize| u32::from(n >= edge);
    let keys: Vec<u32> = (0..seq_kv).map(document_of).collect();
    let queries: Vec<u32> = (0..seq_q).map(|i| document_of((seq_kv + i).saturating_sub(seq_q))).collect();
    let blocks = [seq_q.div_ceil(16), seq_kv.div_ceil(edge)];
    let kept: Vec<bool> = (0..blocks[0] * blocks[1]).map(|n| n % 3 != 1).collect();
    // Two branches that grow by turns.
    let parents: Vec<i32> = (0..seq_q as i32).map(|i| (i - 2).max(-1)).collect();
    let starts: &'static [i64] = Box::leak(Box::new([edge as i64])); // a few bytes in each of some problems
    vec![
        OwnedMask::new("documents", Documents::new(&queries, &keys)),
        OwnedMask::new("prefix", PrefixLm::new(&[0..edge, edge + 1..edge + 9]).expect("in order")),
        OwnedMask::new("chunks", Chunked::new(edge)),
        OwnedMask::new("first and last", FirstAndLast::new(edge, 2)),
        OwnedMask::new("first and last", FirstAndLast::new(3, edge)),
        OwnedMask::new("tree", Tree::new(&parents).expect("earlier drafts")),
        OwnedMask::new(
            "blocks",
            BlockSparse::new([16, edge], [1, 1, blocks[0], blocks[1]], &kept).expect("of the shape"),
        ),
        OwnedMask::new("key starts", KeyStarts::new(starts)),
    ]
}

fn check_masks(sizes: &[usize], dims: impl Fn(usize) -> Dims) {
    for dims in sizes.iter().map(|&size| dims(size)) {
        let mut rng = Rng(dims.seq_q as u64 * 2000 + dims.seq_kv as u64);
        for kind in 0..READY_MASKS {
            check_masked(dims, |problem| problem.masks = vec![ready_mask(kind, &mut rng, &dims)]);
        }
        check_masked(dims, |problem| problem.masks = three_ready_masks(&mut rng, &dims));
    }
}

/// Both forms, every level.
fn check_masked(dims: Dims, options: impl FnOnce(&mut Problem)) {
    let mut rng = Rng(7);
    let mut problem = Problem::plain(dims, || rng.normal());
    options(&mut problem);
    for form in [Form::Decode, Form::Prefill] {
        problem.form = Some(form);
        if let Err(error) = check(&problem) {
            panic!("{error}\n{problem}");
        }
    }
}

fn check_around(boundaries: &[Boundary], dims: impl Fn(usize) -> Dims) {
    for Boundary { at, guards } in boundaries {
        for size in at - 1..=at + 1 {
            check_all(dims(size), guards, |_| {});
            check_all(dims(size), guards, |problem| problem.causal = true);
        }
    }
}

/// Both forms, every level, f32 and 16-bit keys and values.
fn check_all(dims: Dims, guards: &str, options: impl Fn(&mut Problem)) {
    let mut found = Found::default();
    for form in [Form::Decode, Form::Prefill] {
        for dtype in [DType::F32, DType::F16] {
            let mut rng = Rng(7);
            let mut problem = Problem::plain(dims, || rng.normal());
            if dtype == DType::F16 {
                let [k, v] = [dims.k(), dims.v()].map(Layout::contiguous);
                problem.k = Tensor::new(dtype, k, |_| rng.normal());
                problem.v = Tensor::new(dtype, v, |_| rng.normal());
            }
            problem.form = Some(form);
            options(&mut problem);
            match check(&problem) {
                Ok(more) => found.add(more),
                Err(error) => panic!("{guards}: {error}\n{problem}"),
            }
        }
    }
    let numbers = dims.heads_q * dims.seq_q * (dims.value_dim + 1);
    assert_eq!(found.elements, 4 * Level::available().count() * numbers, "{guards}: not all was compared");
}
