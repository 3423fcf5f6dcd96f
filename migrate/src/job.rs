//! A lease, in shares that different connections send.

use crate::{LeaseId, LeasedPart, PageLease};
use gleaner_bitmap::PageRange;
use gleaner_bitmap::mutant::{self, Mutant};

/// Pages of a lease that one connection sends.
pub(crate) struct Job {
    pub(crate) lease: LeaseId,
    pub(crate) parts: Vec<LeasedPart>,
}

/// Cuts a lease into jobs of `pages` pages, the last one of what is left.
pub(crate) fn split(lease: LeaseId, parts: Vec<LeasedPart>, pages: u64) -> Vec<Job> {
    let pages = pages.max(1);
    let mut jobs = Vec::new();
    let (mut taken, mut room) = (Vec::new(), pages);
    for (number, part) in parts.into_iter().enumerate() {
        let mut rest = part.extent().range;
        if number == 0 && mutant::is_planted(Mutant::PageNotSent) {
            rest = PageRange::new(rest.first + 1, rest.pages - 1);
        }
        while rest.pages > 0 {
            let take = rest.pages.min(room);
            taken.push(part.share(PageRange::new(rest.first, take)));
            rest = PageRange::new(rest.first + take, rest.pages - take);
            room -= take;
            if room == 0 {
                let parts = std::mem::take(&mut taken);
                jobs.push(Job { lease, parts });
                room = pages;
            }
        }
    }
    if !taken.is_empty() {
        let parts = taken;
        jobs.push(Job { lease, parts });
    }
    jobs
}

impl PageLease {
    /// Its pages, all parts together.
    pub(crate) fn pages(&self) -> u64 {
        self.parts
            .iter()
            .map(|part| part.extent().range.pages)
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MappedMemory;
    use gleaner_bitmap::{BlockId, Extent};
    use std::sync::Arc;

    #[test]
    fn jobs_are_the_lease_cut_into_equal_shares() {
        let memory = Arc::new(MappedMemory::anonymous(100).unwrap());
        let part =
            |first, pages| LeasedPart::new(Extent::new(BlockId(0), first, pages), memory.clone());
        let jobs = split(LeaseId(1), vec![part(0, 3), part(10, 1), part(20, 6)], 4);
        let extents: Vec<Vec<_>> = jobs
            .iter()
            .map(|job| {
                let ranges = job.parts.iter().map(|part| part.extent().range);
                ranges.map(|range| (range.first, range.pages)).collect()
            })
            .collect();
        assert_eq!(
            extents,
            [vec![(0, 3), (10, 1)], vec![(20, 4)], vec![(24, 2)]]
        );
        assert!(split(LeaseId(1), vec![], 4).is_empty());
    }
}
