//! Pages that are looked at several times.

use std::ops::Range;
use std::time::Duration;

use super::estimate::Estimate;
use super::strata::{EACH, Sample};

/// What a page holds: a hash of its contents, 0 if they are zeros; `None` where it is not in the process's memory.
pub type Sight = Option<u64>;

/// Strata that are looked at in one go.
const PIECE: usize = 128;

/// When pages are looked at again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Visit {
    /// Since the first look.
    pub after: Duration,
    /// Pages of each stratum.
    pub each: usize,
}

/// A sample, and what was seen of it.
#[derive(Debug)]
pub(super) struct Cohort {
    sample: Sample,
    /// As it was seen last where it was there.
    seen: Vec<Sight>,
    changed: Vec<bool>,
    /// The visits, the first of which changes nothing.
    pub visits: Vec<Visit>,
    /// When each piece was looked at first, and last.
    looked: Vec<(Duration, Duration)>,
}

impl Cohort {
    pub fn new(sample: Sample, mut visits: Vec<Visit>) -> Self {
        let first = Visit {
            after: Duration::ZERO,
            each: EACH,
        };
        visits.insert(0, first);
        Self {
            seen: vec![None; sample.len()],
            changed: vec![false; sample.len()],
            looked: vec![(Duration::ZERO, Duration::ZERO); sample.strata().div_ceil(PIECE)],
            sample,
            visits,
        }
    }

    pub const fn sample(&self) -> &Sample {
        &self.sample
    }

    /// Number of pieces.
    pub fn pieces(&self) -> usize {
        self.looked.len()
    }

    /// When a piece was looked at first.
    pub fn first(&self, piece: usize) -> Duration {
        self.looked[piece].0
    }

    /// When a piece was looked at last.
    pub fn last(&self, piece: usize) -> Duration {
        self.looked[piece].1
    }

    fn strata(&self, piece: usize) -> Range<usize> {
        let first = piece * PIECE;
        first..(first + PIECE).min(self.sample.strata())
    }

    /// Which of the pages drawn are looked at of a piece, in a visit.
    pub fn places(&self, piece: usize, visit: usize) -> impl Iterator<Item = usize> + '_ {
        let (each, all) = (self.visits[visit].each, self.sample.len());
        let of_stratum = move |stratum: usize| {
            let first = stratum * EACH;
            first..(first + each).min(all)
        };
        self.strata(piece).flat_map(of_stratum)
    }

    /// A page, and whether it was there.
    pub fn page(&self, place: usize) -> (u64, bool) {
        (self.sample.drawn()[place], self.seen[place].is_some())
    }

    /// A piece was looked at, and its places seen so.
    pub fn see(&mut self, piece: usize, visit: usize, at: Duration, sights: &[Sight]) {
        let places: Vec<usize> = self.places(piece, visit).collect();
        for (place, sight) in places.into_iter().zip(sights) {
            let before = self.seen[place];
            let changed = match (before, sight) {
                (Some(before), Some(now)) => before != *now,
                // It was a hole, or swapped out. Zeros are what a hole holds.
                (None, Some(now)) => visit > 0 && *now != 0,
                // It may come back as it was.
                (_, None) => false,
            };
            self.changed[place] |= changed;
            self.seen[place] = sight.or(before);
        }
        if visit == 0 {
            self.looked[piece].0 = at;
        }
        self.looked[piece].1 = at;
    }

    /// What part of all pages has changed since the first look, and how long ago that was, if a visit is over.
    pub fn changed(&self, visit: usize) -> (Estimate, Duration) {
        let estimate = Estimate::of(&self.sample, self.visits[visit].each, |place| {
            self.changed[place]
        });
        let times = self.looked.iter().map(|(first, last)| *last - *first);
        let pieces = u32::try_from(self.looked.len()).unwrap_or(u32::MAX);
        (estimate, times.sum::<Duration>() / pieces.max(1))
    }

    /// What part of all pages was there in the first look.
    pub fn there(&self) -> Estimate {
        Estimate::of(&self.sample, EACH, |place| self.seen[place].is_some())
    }

    /// Pages that have changed, and how many each of them stands for.
    pub fn weighed(&self, visit: usize) -> impl Iterator<Item = (u64, f64)> + '_ {
        let each = self.visits[visit].each;
        let drawn = self.sample.drawn().iter().zip(&self.changed).enumerate();
        drawn
            .filter(move |(place, (_, changed))| place % EACH < each && **changed)
            .map(move |(place, (page, _))| {
                let stratum = place / EACH;
                let drawn = self.sample.len() - stratum * EACH;
                let looked_at = each.min(drawn) as f64;
                (*page, self.sample.stratum_pages(stratum) as f64 / looked_at)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::super::random::Random;
    use super::*;

    /// Eight pages, seen in one visit after the other.
    fn seen(visits: &[[Sight; 8]]) -> f64 {
        let visit = Visit {
            after: Duration::from_secs(1),
            each: EACH,
        };
        let sample = Sample::draw(8, 8, &mut Random::new(1));
        let mut cohort = Cohort::new(sample, vec![visit; visits.len() - 1]);
        for (number, sights) in visits.iter().enumerate() {
            let at = Duration::from_secs(number as u64);
            cohort.see(0, number, at, sights);
        }
        let (estimate, after) = cohort.changed(visits.len() - 1);
        assert_eq!(after, Duration::from_secs(visits.len() as u64 - 1));
        let pages: f64 = cohort.weighed(visits.len() - 1).map(|page| page.1).sum();
        assert_eq!(pages, estimate.part * 8.0);
        pages
    }

    #[test]
    fn a_page_has_changed_when_its_contents_have() {
        let same = [Some(1); 8];
        assert_eq!(seen(&[same, same, same]), 0.0);
        let mut other = same;
        other[3] = Some(2);
        assert_eq!(seen(&[same, other]), 1.0);
        // Also where it is again what it was.
        assert_eq!(seen(&[same, other, same]), 1.0);
    }

    #[test]
    fn a_hole_has_changed_when_something_else_than_zeros_is_there() {
        let holes = [None; 8];
        let mut now = holes;
        (now[0], now[1]) = (Some(0), Some(7));
        assert_eq!(seen(&[holes, now]), 1.0);
        assert_eq!(seen(&[holes, now, holes, now]), 1.0);
    }

    #[test]
    fn a_page_that_was_away_has_changed_only_if_it_comes_back_as_something_else() {
        let (there, away) = ([Some(5); 8], [None; 8]);
        assert_eq!(seen(&[there, away]), 0.0);
        assert_eq!(seen(&[there, away, there]), 0.0);
        assert_eq!(seen(&[there, away, [Some(6); 8]]), 8.0);
    }
}
