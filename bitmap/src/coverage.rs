//! Which pages of the blocks some slot maps.

use imbl::OrdMap;

use crate::{BlockId, PageRange};

/// How many slots map each page, by the pages where that number changes. Shared with the layout it was made from, as all
/// of a layout is.
///
/// Invariant: no two neighbours of a block have the same number, and the first one of a block is not 0.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Coverage {
    /// Slots that map the pages from this one on.
    from: OrdMap<(BlockId, u64), u32>,
}

impl Coverage {
    /// Slots that map `page`.
    fn at(&self, block: BlockId, page: u64) -> u32 {
        match self.from.get_prev(&(block, page)) {
            Some((&(of, _), &slots)) if of == block => slots,
            _ => 0,
        }
    }

    /// Pages of `range` where the number changes.
    fn edges(&self, block: BlockId, range: PageRange) -> Vec<u64> {
        let edges = self.from.range((block, range.first)..(block, range.end()));
        edges.map(|(&(_, page), _)| page).collect()
    }

    fn change(&mut self, block: BlockId, range: PageRange, change: impl Fn(u32) -> u32) {
        for page in [range.first, range.end()] {
            let slots = self.at(block, page);
            self.from.insert((block, page), slots);
        }
        for page in self.edges(block, range) {
            if let Some(slots) = self.from.get_mut(&(block, page)) {
                *slots = change(*slots);
            }
        }
        for page in [range.first, range.end()] {
            let before = page.checked_sub(1).map_or(0, |page| self.at(block, page));
            if self.at(block, page) == before {
                self.from.remove(&(block, page));
            }
        }
    }

    /// A slot maps `range`.
    pub(crate) fn add(&mut self, block: BlockId, range: PageRange) {
        self.change(block, range, |slots| slots + 1);
    }

    /// A slot that mapped `range` does no more.
    pub(crate) fn remove(&mut self, block: BlockId, range: PageRange) {
        self.change(block, range, |slots| slots - 1);
    }

    /// The pages of `range` that some slot maps, sorted, none twice.
    pub(crate) fn within(&self, block: BlockId, range: PageRange) -> Vec<PageRange> {
        let mut edges = self.edges(block, range);
        if edges.first() != Some(&range.first) {
            edges.insert(0, range.first);
        }
        edges.push(range.end());
        let mut mapped: Vec<PageRange> = Vec::new();
        for pair in edges.windows(2) {
            let part = PageRange::new(pair[0], pair[1] - pair[0]);
            match mapped.last_mut() {
                _ if self.at(block, part.first) == 0 => {}
                Some(last) if last.end() == part.first => last.pages += part.pages,
                _ => mapped.push(part),
            }
        }
        mapped
    }

    /// Whether some slot maps a page of the block.
    pub(crate) fn has(&self, block: BlockId) -> bool {
        let next = self.from.get_next(&(block, 0));
        next.is_some_and(|(&(of, _), _)| of == block)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn coverage_is_what_counting_slots_page_by_page_gives(
            ranges in proptest::collection::vec((0..2u64, 0..40u64, 1..20u64, any::<bool>()), 0..24),
            asked in (0..40u64, 1..30u64),
        ) {
            let asked = PageRange::new(asked.0, asked.1);
            let mut coverage = Coverage::default();
            let mut slots: Vec<(BlockId, PageRange)> = Vec::new();
            for (block, first, pages, add) in ranges {
                let slot = (BlockId(block), PageRange::new(first, pages));
                if add || slots.is_empty() {
                    coverage.add(slot.0, slot.1);
                    slots.push(slot);
                } else {
                    let gone = slots.swap_remove(usize::try_from(first).unwrap_or(0) % slots.len());
                    coverage.remove(gone.0, gone.1);
                }
            }
            for block in [BlockId(0), BlockId(1)] {
                let mapped = |page| slots.iter().any(|(of, range)| *of == block && (range.first..range.end()).contains(&page));
                let got: Vec<u64> = coverage.within(block, asked).iter().flat_map(|r| r.first..r.end()).collect();
                let want: Vec<u64> = (asked.first..asked.end()).filter(|page| mapped(*page)).collect();
                prop_assert_eq!(got, want);
                prop_assert_eq!(coverage.has(block), slots.iter().any(|(of, _)| *of == block));
            }
            // As few edges as there are changes.
            let mut counts: BTreeMap<(BlockId, u64), u32> = BTreeMap::new();
            for (block, range) in &slots {
                (range.first..range.end()).for_each(|page| *counts.entry((*block, page)).or_default() += 1);
            }
            let count = |block, page: Option<u64>| page.and_then(|page| counts.get(&(block, page)).copied()).unwrap_or(0);
            let changes = [BlockId(0), BlockId(1)].into_iter().flat_map(|block| (0..=64u64).map(move |page| (block, page)))
                .filter(|&(block, page)| count(block, Some(page)) != count(block, page.checked_sub(1))).count();
            prop_assert_eq!(coverage.from.len(), changes);
        }
    }
}
