//! What the source knows of the destination's memory: where it holds zeros, and what some other pages hold.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use gleaner_bitmap::{BlockId, Extent, Layout};

use crate::pack::Bases;
use crate::written::Written;

/// What the destination holds. Shared by all connections of one migration, and by no other: a page is under way on one of
/// them at most, so what is known of it changes only with what that one sends.
///
/// Invariant: a page that is not in `written` of a block that came to be as zeros holds zeros there. Nothing is assumed
/// of any other page.
#[derive(Default)]
pub(crate) struct There {
    blocks: Mutex<BTreeMap<BlockId, Held>>,
    /// Contents of some pages in `written`, where pages travel as deltas.
    bases: Option<Bases>,
}

#[derive(Default)]
struct Held {
    /// The destination has said that the block held nothing but zeros when it was made.
    zero: bool,
    /// Where contents were sent to since, and not zeros after that. Kept for blocks that were zero, and for all where pages
    /// travel as deltas.
    written: Written,
}

impl There {
    /// Nothing is known. Deltas will be made if `deltas` says so.
    pub(crate) fn new(deltas: bool) -> Self {
        Self {
            blocks: Mutex::default(),
            bases: deltas.then(Bases::default),
        }
    }

    /// A round begins.
    pub(crate) fn round(&self) {
        if let Some(bases) = &self.bases {
            bases.round();
        }
    }

    /// What deltas are made against, if any are.
    pub(crate) const fn bases(&self) -> Option<&Bases> {
        self.bases.as_ref()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<BlockId, Held>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The destination has this layout; of the blocks that are new to it, those in `zero` hold nothing but zeros.
    pub(crate) fn adopt(&self, layout: &Layout, zero: &[BlockId]) {
        let mut blocks = self.lock();
        blocks.retain(|id, _| layout.block(*id).is_some());
        for info in layout.blocks() {
            blocks.entry(info.id).or_insert_with(|| Held {
                zero: zero.contains(&info.id),
                written: Written::default(),
            });
        }
        if let Some(bases) = &self.bases {
            bases.adopt(layout);
        }
    }

    /// Contents are about to be sent to these pages.
    pub(crate) fn contents(&self, extents: &[Extent]) {
        let mut blocks = self.lock();
        for extent in extents {
            if let Some(held) = blocks.get_mut(&extent.block).filter(|held| held.zero) {
                held.written.set(extent.range);
            }
        }
    }

    /// As [`There::contents`], where pages travel as deltas: which of the pages hold contents there that were sent before.
    pub(crate) fn again(&self, extents: &[Extent]) -> Vec<bool> {
        let mut blocks = self.lock();
        let mut again = Vec::new();
        for Extent { block, range } in extents {
            let held = blocks.get_mut(block);
            match held {
                Some(held) => {
                    again
                        .extend((range.first..range.end()).map(|page| held.written.contains(page)));
                    held.written.set(*range);
                }
                None => again.extend((0..range.pages).map(|_| false)),
            }
        }
        again
    }

    /// These pages are zero at the source: those of them that the destination has to be told of.
    pub(crate) fn zeros(&self, extent: Extent) -> Vec<Extent> {
        if let Some(bases) = &self.bases {
            bases.forget(extent);
        }
        let mut blocks = self.lock();
        let Some(held) = blocks.get_mut(&extent.block) else {
            return vec![extent];
        };
        let runs = held.written.take(extent.range);
        if !held.zero {
            return vec![extent];
        }
        let extent = |range| Extent { range, ..extent };
        runs.into_iter().map(extent).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gleaner_bitmap::{BlockInfo, Generation};

    const ZERO: BlockId = BlockId(1);
    const OTHER: BlockId = BlockId(2);

    fn layout(ids: &[BlockId]) -> Layout {
        let info = |id: &BlockId| BlockInfo::new(*id, format!("b{}", id.0), 100 * 4096).unwrap();
        Layout::from_parts(Generation(1), ids.iter().map(info).collect(), vec![]).unwrap()
    }

    #[test]
    fn zeros_are_told_where_anything_else_may_be() {
        let there = There::default();
        there.adopt(&layout(&[ZERO, OTHER]), &[ZERO]);
        let all = |block| Extent::new(block, 0, 100);
        assert_eq!(there.zeros(all(OTHER)), [all(OTHER)]);
        assert_eq!(there.zeros(all(OTHER)), [all(OTHER)]);
        assert_eq!(there.zeros(all(ZERO)), []);
        there.contents(&[Extent::new(ZERO, 7, 2)]);
        assert_eq!(there.zeros(all(ZERO)), [Extent::new(ZERO, 7, 2)]);
        assert_eq!(there.zeros(all(ZERO)), []);
    }

    #[test]
    fn a_block_that_stays_is_not_zero_again() {
        let there = There::default();
        there.adopt(&layout(&[ZERO]), &[ZERO]);
        let page = Extent::new(ZERO, 7, 1);
        there.contents(&[page]);
        there.adopt(&layout(&[ZERO, OTHER]), &[ZERO]);
        assert_eq!(there.zeros(page), [page]);
        // Nor is one zero that is unknown to this end.
        assert_eq!(there.zeros(Extent::new(BlockId(9), 0, 1)).len(), 1);
    }
}
