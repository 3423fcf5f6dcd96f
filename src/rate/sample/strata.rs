//! Which pages are looked at.

use super::random::Random;

/// Pages that are drawn from a stratum.
pub const EACH: usize = 8;

/// A sample of all pages. Memory is divided into strata of equal length, in the order of addresses, and from each as many pages
/// are drawn, none of them twice: neighbours are alike, so what differs from place to place is no error of the sample.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Stratum after stratum, [`EACH`] of each; any first few of a stratum are a sample too.
    drawn: Vec<u64>,
    pages: u64,
}

impl Sample {
    /// Draws about `wanted` of `pages` pages, no fewer than [`EACH`] and no more than all. Of fewer than [`EACH`] pages all.
    #[must_use]
    pub fn draw(pages: u64, wanted: u64, random: &mut Random) -> Self {
        let each = EACH as u64;
        let strata = (wanted.min(pages) / each).max(1);
        let mut drawn = Vec::new();
        for stratum in 0..strata {
            let range = range(pages, strata, stratum);
            let first = drawn.len();
            for last in (range.end - range.start).saturating_sub(each)..range.end - range.start {
                // Floyd's way: each set of pages is as likely as any other.
                let page = range.start + random.below(last + 1);
                let new = !drawn[first..].contains(&page);
                drawn.push(if new { page } else { range.start + last });
            }
            // And each order.
            for at in (first + 1..drawn.len()).rev() {
                let with = first + random.index(at - first + 1);
                drawn.swap(at, with);
            }
        }
        Self { drawn, pages }
    }

    /// Pages that are drawn.
    #[must_use]
    pub fn len(&self) -> usize {
        self.drawn.len()
    }

    /// Whether there is no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.drawn.is_empty()
    }

    /// Pages from which they are drawn.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Number of strata.
    #[must_use]
    pub fn strata(&self) -> usize {
        self.drawn.len().div_ceil(EACH)
    }

    /// Pages that a stratum has, all together.
    #[must_use]
    pub fn stratum_pages(&self, stratum: usize) -> u64 {
        let range = range(self.pages, self.strata() as u64, stratum as u64);
        range.end - range.start
    }

    /// The pages drawn, stratum after stratum.
    #[must_use]
    pub fn drawn(&self) -> &[u64] {
        &self.drawn
    }
}

fn range(pages: u64, strata: u64, stratum: u64) -> std::ops::Range<u64> {
    let at = |stratum: u64| {
        let all = u128::from(pages) * u128::from(stratum) / u128::from(strata.max(1));
        // No more than `pages`.
        u64::try_from(all).unwrap_or(pages)
    };
    at(stratum)..at(stratum + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_page_is_drawn_twice_and_each_comes_from_its_stratum() {
        let mut random = Random::new(1);
        for (pages, wanted) in [
            (1000, 64),
            (262_144, 40_000),
            (4099, 9999),
            (9, 8),
            (3, 8),
            (64, 1),
        ] {
            let sample = Sample::draw(pages, wanted, &mut random);
            let all: BTreeSet<u64> = sample.drawn().iter().copied().collect();
            assert_eq!(all.len(), sample.len(), "{pages}, {wanted}");
            let mut first = 0;
            for (at, drawn) in sample.drawn().chunks(EACH).enumerate() {
                let end = first + sample.stratum_pages(at);
                assert!(drawn.iter().all(|page| (first..end).contains(page)));
                first = end;
            }
            assert_eq!(first, pages);
            let most = wanted.min(pages).max(8.min(pages));
            assert!(sample.len() as u64 <= most, "{pages}, {wanted}");
        }
    }

    #[test]
    fn each_page_is_as_likely_as_any_other_at_each_place() {
        let mut random = Random::new(2);
        // 16 pages, 8 of them drawn: each is there in half of the draws, and the first in one of 16.
        let (mut there, mut first) = ([0u32; 16], [0u32; 16]);
        for _ in 0..16_000 {
            let sample = Sample::draw(16, 8, &mut random);
            for page in sample.drawn() {
                there[usize::try_from(*page).unwrap_or(16)] += 1;
            }
            first[usize::try_from(sample.drawn()[0]).unwrap_or(16)] += 1;
        }
        // Five standard deviations.
        assert!(there.iter().all(|n| n.abs_diff(8000) < 320), "{there:?}");
        assert!(first.iter().all(|n| n.abs_diff(1000) < 155), "{first:?}");
    }
}
