//! Scratch memory of the loops over lines.
#![forbid(unsafe_code)]

use crate::simd::LINE;

/// Numbers of a buffer on the stack. A short row is not worth an allocation.
const STACK_NUMBERS: usize = 256;

/// f32 numbers in a cache line.
pub(super) const LINE_NUMBERS: usize = LINE / size_of::<f32>();

/// Memory for tiles and states of a worker, kept between its shares.
#[derive(Clone, Default)]
pub struct Scratch(Vec<f32>);

/// Memory of a kernel that needs little.
#[derive(Default)]
pub(super) struct Small(Option<[f32; STACK_NUMBERS + LINE_NUMBERS]>);

impl Scratch {
    /// `len` numbers, aligned to cache lines, because loads and stores across two cache lines take longer.
    pub(super) fn numbers<'a>(&'a mut self, small: &'a mut Small, len: usize) -> &'a mut [f32] {
        if len == 0 {
            return &mut [];
        }
        let buffer = if len <= STACK_NUMBERS {
            &mut small.0.insert([0.0; STACK_NUMBERS + LINE_NUMBERS])[..]
        } else {
            if self.0.len() < len + LINE_NUMBERS {
                self.0 = vec![0.0; len + LINE_NUMBERS];
            }
            &mut self.0[..]
        };
        let start = buffer.as_ptr().align_offset(LINE).min(LINE_NUMBERS);
        &mut buffer[start..][..len]
    }
}
