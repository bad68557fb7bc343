//! Lists of integers as the caller has them: key lengths and query offsets of a batch.

#![forbid(unsafe_code)]

/// A borrowed list of integers of any common type: what [`key_lengths`](crate::Attention::key_lengths) and
/// [`QueryOffset::PerBatch`](crate::QueryOffset::PerBatch) take.
///
/// It is made from a slice, an array or a vector of `u32`, `u64`, `usize`, `i32`, `i64` or `isize`. Nothing is copied.
///
/// ```
/// use flashtile::Integers;
///
/// let lengths: Vec<u32> = vec![5, 3];
/// assert_eq!(Integers::from(&lengths), Integers::from(&[5i64, 3]));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Integers<'a>(List<'a>);

macro_rules! integers {
    ($($variant:ident $t:ty),+) => {
        #[derive(Clone, Copy, Debug)]
        enum List<'a> {
            $($variant(&'a [$t])),+
        }

        impl Integers<'_> {
            /// Calls `visit` with the entries of `range`, which are all indices of memory.
            ///
            /// # Panics
            /// If there are no such entries.
            #[inline]
            pub(crate) fn for_each_index(&self, range: std::ops::Range<usize>, mut visit: impl FnMut(usize)) {
                match self.0 {
                    $(List::$variant(list) => list[range].iter().for_each(|&entry| visit(entry as usize))),+
                }
            }

            /// The number of entries from `a` on, `most` at most, that are equal to those from `b` on.
            ///
            /// # Panics
            /// If there are no `most` entries from `a` or from `b` on.
            pub(crate) fn equal_entries(&self, a: usize, b: usize, most: usize) -> usize {
                /// Entries that are compared at once.
                const CHUNK: usize = 32;
                match self.0 {
                    $(List::$variant(list) => {
                        let (a, b) = (&list[a..][..most], &list[b..][..most]);
                        let equal = a.chunks(CHUNK).zip(b.chunks(CHUNK)).take_while(|(a, b)| a == b).count();
                        let first = most.min(equal * CHUNK);
                        first + a[first..].iter().zip(&b[first..]).take_while(|(a, b)| a == b).count()
                    }),+
                }
            }

            /// The number of entries.
            pub(crate) fn len(&self) -> usize {
                match self.0 {
                    $(List::$variant(list) => list.len()),+
                }
            }

            /// The entry at `index`, exactly.
            ///
            /// # Panics
            /// If there is no such entry.
            #[inline]
            pub(crate) fn get(&self, index: usize) -> i128 {
                match self.0 {
                    $(List::$variant(list) => list[index] as i128),+ // (every type fits)
                }
            }
        }

        $(
            impl<'a> From<&'a [$t]> for Integers<'a> {
                fn from(list: &'a [$t]) -> Self {
                    Integers(List::$variant(list))
                }
            }

            impl<'a, const N: usize> From<&'a [$t; N]> for Integers<'a> {
                fn from(list: &'a [$t; N]) -> Self {
                    Integers(List::$variant(list))
                }
            }

            impl<'a> From<&'a Vec<$t>> for Integers<'a> {
                fn from(list: &'a Vec<$t>) -> Self {
                    Integers(List::$variant(list))
                }
            }
        )+
    };
}
integers!(U32 u32, U64 u64, Usize usize, I32 i32, I64 i64, Isize isize);

impl Integers<'_> {
    /// The entries, exactly.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = i128> + '_ {
        (0..self.len()).map(|index| self.get(index))
    }
}

/// Lists are equal if their entries are, whatever the types.
impl PartialEq for Integers<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Integers<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries are compared up to the first that differs, wherever it is.
    #[test]
    fn equal_entries_are_counted() {
        for (len, differs) in (0..100).flat_map(|len| (0..=len).map(move |differs| (len, differs))) {
            let mut list: Vec<u32> = (0..len as u32).cycle().take(2 * len).collect();
            list[len..].iter_mut().skip(differs).take(1).for_each(|entry| *entry += 1);
            assert_eq!(Integers::from(&list).equal_entries(0, len, len), differs);
        }
    }

    #[test]
    fn every_type_is_read_exactly() {
        let vector = vec![7i64, 0];
        let lists: [Integers<'_>; 6] = [
            (&[7u32, 0]).into(),
            (&[7u64, 0]).into(),
            (&[7usize, 0]).into(),
            (&[7i32, 0]).into(),
            (&vector).into(),
            (&[7isize, 0][..]).into(),
        ];
        for list in lists {
            assert_eq!((list.len(), list.get(0), list.get(1), list), (2, 7, 0, lists[0]));
        }
        assert_ne!(lists[0], (&[7u32, 1]).into());
        assert_ne!(lists[0], (&[7u32]).into());
        let ends: [Integers<'_>; 3] = [(&[u64::MAX]).into(), (&[i64::MIN]).into(), (&[i32::MIN]).into()];
        assert_eq!(ends.map(|list| list.get(0)), [u64::MAX as i128, i64::MIN as i128, i32::MIN as i128]);
    }
}
