//! Which pages a trace follows.

use gleaner_bitmap::PageRange;

/// Which pages a trace follows: one of each 2^shift that lie together, anywhere among them, so that no stride of a guest's
/// writes always meets or always misses it. Followed pages are numbered through all blocks, in order.
///
/// A guest that writes all over its memory dirties a followed page in each group with the chance that it dirties any;
/// one that goes through its memory leaves runs of groups, which take little room in a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Followed {
    shift: u8,
}

/// Pages that are followed unless a writer chooses otherwise: 16 GiB of them.
const USUAL: u64 = 1 << 22;
/// More would leave a single page of the largest guest.
const MOST_SHIFT: u8 = 40;

impl Followed {
    /// Every page.
    pub const ALL: Self = Self { shift: 0 };

    /// One of each 2^`shift` pages; `None` when that is more than 2^40.
    #[must_use]
    pub const fn one_of(shift: u8) -> Option<Self> {
        if shift <= MOST_SHIFT {
            Some(Self { shift })
        } else {
            None
        }
    }

    /// What suits a guest of so many pages: about 4 million of them or all.
    #[must_use]
    pub fn usual(pages: u64) -> Self {
        Self::at_most(pages, USUAL)
    }

    /// As many pages of a guest of `pages` as can be, and no more than `most`, which is at least 1.
    #[must_use]
    pub fn at_most(pages: u64, most: u64) -> Self {
        let shift = (0..MOST_SHIFT).find(|shift| pages.div_ceil(1 << shift) <= most);
        Self {
            shift: shift.unwrap_or(MOST_SHIFT),
        }
    }

    /// log2 of the pages that a followed one stands for.
    #[must_use]
    pub const fn shift(self) -> u8 {
        self.shift
    }

    /// Pages that a followed one stands for.
    #[must_use]
    pub const fn weight(self) -> u64 {
        1 << self.shift
    }

    /// Followed pages of a block.
    #[must_use]
    pub const fn count(self, pages: u64) -> u64 {
        pages.div_ceil(self.weight())
    }

    /// The followed pages among `range` of a block of `pages` pages, as groups of that block. The range lies in the block.
    #[must_use]
    pub fn among(self, range: PageRange, pages: u64) -> PageRange {
        if range.pages == 0 {
            return PageRange::new(0, 0);
        }
        let (mut first, mut end) = (
            range.first >> self.shift,
            ((range.end() - 1) >> self.shift) + 1,
        );
        if self.page(first, pages) < range.first {
            first += 1;
        }
        if end > first && self.page(end - 1, pages) >= range.end() {
            end -= 1;
        }
        PageRange::new(first, end.saturating_sub(first))
    }

    /// The page of a group that is followed.
    fn page(self, group: u64, pages: u64) -> u64 {
        let first = group << self.shift;
        let there = self.weight().min(pages.saturating_sub(first)).max(1);
        first + scatter(group) % there
    }
}

/// A number that looks like chance.
pub(crate) const fn scatter(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_group_has_one_followed_page_and_a_range_has_those_inside(
            shift in 0u8..7, pages in 1u64..2000, a in 0u64..2000, b in 0u64..2000,
        ) {
            let followed = Followed { shift };
            let (first, end) = (a.min(b).min(pages), a.max(b).min(pages));
            let all: Vec<u64> = (0..followed.count(pages)).map(|group| followed.page(group, pages)).collect();
            for (group, page) in (0..).zip(&all) {
                prop_assert!(*page < pages && page >> shift == group);
            }
            let found = followed.among(PageRange::new(first, end - first), pages);
            let wanted: Vec<u64> = (0..).zip(&all).filter(|(_, page)| (first..end).contains(page)).map(|(n, _)| n).collect();
            prop_assert_eq!((found.first..found.end()).collect::<Vec<_>>(), wanted);
        }
    }

    #[test]
    fn a_large_guest_is_followed_by_some_of_its_pages() {
        assert_eq!(Followed::usual(1 << 22), Followed::ALL);
        assert_eq!(Followed::usual((1 << 22) + 1).weight(), 2);
        let tebibyte = Followed::usual(1 << 28);
        assert_eq!((tebibyte.weight(), tebibyte.count(1 << 28)), (64, 1 << 22));
        assert_eq!(Followed::one_of(41), None);
    }
}
