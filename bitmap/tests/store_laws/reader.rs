//! A consumer beside its oracle.

use std::result::Result;

use gleaner_bitmap::{BlockId, Consumer, Extent, Lease, Start};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use crate::{Dirtyings, Page, merge};

/// A consumer and where its dirtyings are.
pub struct Reader {
    pub consumer: Consumer,
    pub start: Start,
    pub owed: Dirtyings,
    pub store: Dirtyings,
    pub leases: Vec<(Lease, Dirtyings)>,
    pub acked: Dirtyings,
    /// The page after the last one leased.
    pub cursor: Page,
}

impl Reader {
    pub fn new(consumer: Consumer, start: Start) -> Self {
        Self {
            consumer,
            start,
            owed: Dirtyings::new(),
            store: Dirtyings::new(),
            leases: Vec::new(),
            acked: Dirtyings::new(),
            cursor: (BlockId(0), 0),
        }
    }

    pub fn receive(&mut self, dirtyings: &Dirtyings) {
        merge(&mut self.owed, dirtyings.clone());
        merge(&mut self.store, dirtyings.clone());
    }

    fn on_lease(&self, page: &Page) -> bool {
        self.leases
            .iter()
            .any(|(_, leased)| leased.contains_key(page))
    }

    /// Leases and compares with what the laws say: dirty, not on lease, in order from the cursor, at most `max`.
    pub fn lease(&mut self, max: u64) -> Result<bool, TestCaseError> {
        let free = |page: &&Page| !self.on_lease(page);
        let behind = self.store.range(self.cursor..).map(|(page, _)| page);
        let before = self.store.range(..self.cursor).map(|(page, _)| page);
        let max = usize::try_from(max).unwrap();
        let want: Vec<Page> = behind
            .chain(before)
            .filter(free)
            .copied()
            .take(max)
            .collect();
        let Some(lease) = self.consumer.lease(max as u64) else {
            prop_assert_eq!(want, [], "pages are free, and none was leased");
            return Ok(false);
        };
        let pages = |e: &Extent| {
            let block = e.block;
            (e.range.first..e.range.end()).map(move |page| (block, page))
        };
        let got: Vec<Page> = lease.extents().iter().flat_map(pages).collect();
        prop_assert_eq!(&got, &want);
        prop_assert_eq!(lease.pages(), want.len() as u64);
        let (block, page) = *want.last().unwrap();
        self.cursor = (block, page + 1);
        let moved = want
            .iter()
            .map(|page| (*page, self.store.remove(page).unwrap()));
        let moved = moved.collect();
        self.leases.push((lease, moved));
        Ok(true)
    }

    pub fn ack(&mut self, n: usize) {
        let (lease, dirtyings) = self.leases.swap_remove(n);
        lease.ack();
        merge(&mut self.acked, dirtyings);
    }

    pub fn lose(&mut self, n: usize) {
        let (lease, dirtyings) = self.leases.swap_remove(n);
        drop(lease);
        merge(&mut self.store, dirtyings);
    }
}
