//! Pages and ranges of pages.

use serde::{Deserialize, Serialize};

use crate::{BlockId, Error, Result};

/// Bytes in a page. KVM logs dirty memory in pages of this size on every host with 4 KiB pages.
pub const PAGE_SIZE: u64 = 4096;
/// `log2` of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// Whole pages in `bytes`.
///
/// # Errors
/// [`Error::Unaligned`] when `bytes` is zero or not a multiple of [`PAGE_SIZE`].
pub fn pages_of(what: &'static str, bytes: u64) -> Result<u64> {
    if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(Error::Unaligned { what, value: bytes });
    }
    Ok(bytes / PAGE_SIZE)
}

/// A range of pages inside a RAM block, counted from the block's start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[repr(C)] // kernels write several at a time
pub struct PageRange {
    /// First page.
    pub first: u64,
    /// Number of pages.
    pub pages: u64,
}

impl PageRange {
    /// The range of `pages` pages from `first` on.
    #[must_use]
    pub const fn new(first: u64, pages: u64) -> Self {
        Self { first, pages }
    }

    /// The page after the last one. Saturates, so that a hostile range compares as too long.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.first.saturating_add(self.pages)
    }

    /// The pages that both ranges have.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        (first < end).then(|| Self::new(first, end - first))
    }

    /// Whether `other` lies wholly inside.
    #[must_use]
    pub const fn contains(&self, other: &Self) -> bool {
        other.first >= self.first && other.end() <= self.end()
    }
}

/// A range of pages of one RAM block: the unit in which pages are leased, sent and written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Extent {
    /// The block.
    pub block: BlockId,
    /// Its pages.
    pub range: PageRange,
}

impl Extent {
    /// The extent of `pages` pages of `block` from `first` on.
    #[must_use]
    pub const fn new(block: BlockId, first: u64, pages: u64) -> Self {
        Self {
            block,
            range: PageRange::new(first, pages),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_are_sets_of_pages(a in 0u64..20, n in 0u64..20, b in 0u64..20, m in 0u64..20) {
            let (x, y) = (PageRange::new(a, n), PageRange::new(b, m));
            let both: Vec<u64> = (a..a + n).filter(|page| (b..b + m).contains(page)).collect();
            let got = x.intersect(&y);
            prop_assert_eq!(got.map_or(vec![], |r| (r.first..r.end()).collect()), both);
            prop_assert!(got.is_none_or(|r| r.pages > 0));
            if m > 0 {
                prop_assert_eq!(x.contains(&y), (b..b + m).all(|page| (a..a + n).contains(&page)));
            }
        }
    }

    #[test]
    fn a_range_that_wraps_is_too_long_for_everything() {
        let hostile = PageRange::new(2, u64::MAX);
        assert_eq!(hostile.end(), u64::MAX);
        assert!(!PageRange::new(0, u64::MAX - 1).contains(&hostile));
    }

    #[test]
    fn only_whole_pages_are_pages() {
        assert_eq!(pages_of("length", 3 * PAGE_SIZE).unwrap(), 3);
        for bytes in [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1] {
            assert!(matches!(
                pages_of("length", bytes),
                Err(Error::Unaligned { what: "length", value }) if value == bytes
            ));
        }
        assert_eq!(1 << PAGE_SHIFT, PAGE_SIZE);
    }
}
