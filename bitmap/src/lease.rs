//! Consumers and the pages they have on lease.

use std::sync::Arc;

use crate::{ConsumerId, DirtyStore, Extent};

/// An independent reader of the dirty store. Dropping it ends it; its unfinished leases end without effect then.
#[derive(Debug)]
pub struct Consumer {
    store: Arc<DirtyStore>,
    id: ConsumerId,
}

impl Consumer {
    pub(crate) fn new(store: Arc<DirtyStore>, id: ConsumerId) -> Self {
        Self { store, id }
    }

    /// Pages that are dirty for this consumer and not on lease (a page written again while leased counts).
    #[must_use]
    pub fn dirty_pages(&self) -> u64 {
        self.store.dirty_pages(self.id)
    }

    /// Takes up to `max` dirty pages on lease, in order of block and page from where the last lease ended. `None` when
    /// no page is free: none is dirty, or those that are are still on lease.
    #[must_use]
    pub fn lease(&self, max: u64) -> Option<Lease> {
        let extents = self.store.take(self.id, max);
        (!extents.is_empty()).then(|| Lease {
            store: Arc::clone(&self.store),
            consumer: self.id,
            extents,
            open: true,
        })
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.store.remove_consumer(self.id);
    }
}

/// Pages a consumer took and has not yet acknowledged. The only thing that names pages whose contents may be read: they
/// have been re-armed before they came into the store.
///
/// A dropped lease falls back: its pages are dirty again.
#[derive(Debug)]
#[must_use = "a dropped lease makes its pages dirty again"]
pub struct Lease {
    store: Arc<DirtyStore>,
    consumer: ConsumerId,
    extents: Vec<Extent>,
    open: bool,
}

impl Lease {
    /// The pages, as ranges that do not overlap.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.extents.iter().map(|e| e.range.pages).sum()
    }

    /// The destination has applied the pages. What was written while they were leased stays dirty.
    pub fn ack(mut self) {
        self.open = false;
        self.store.finish(self.consumer, &self.extents, false);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.open {
            self.store.finish(self.consumer, &self.extents, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockId, PageRange, Start};

    fn store() -> Arc<DirtyStore> {
        let store = Arc::new(DirtyStore::default());
        store.add_block(BlockId(0), 100);
        store.add_block(BlockId(1), 70);
        store
    }

    fn publish(store: &DirtyStore, block: u64, page: u64) {
        let page = PageRange::new(page, 1);
        store.publish(BlockId(block), |sets| {
            sets.iter_mut().for_each(|set| set.insert(page))
        });
    }

    #[test]
    fn a_leased_page_is_not_leased_again_until_the_lease_ends() {
        let store = store();
        let consumer = store.consumer(Start::Empty);
        publish(&store, 0, 5);
        let lease = consumer.lease(10).unwrap();
        publish(&store, 0, 5); // written again while leased
        publish(&store, 0, 6);
        let second = consumer.lease(10).unwrap();
        assert_eq!(second.extents(), [Extent::new(BlockId(0), 6, 1)]);
        assert!(consumer.lease(10).is_none());
        lease.ack();
        let again = consumer.lease(10).unwrap();
        assert_eq!(
            again.extents(),
            [Extent::new(BlockId(0), 5, 1)],
            "an ack never touches the store"
        );
    }

    #[test]
    fn a_dropped_lease_falls_back_and_an_acknowledged_one_does_not() {
        let store = store();
        let consumer = store.consumer(Start::AllDirty);
        assert_eq!(consumer.dirty_pages(), 170);
        let lease = consumer.lease(101).unwrap();
        assert_eq!(
            lease.extents(),
            [
                Extent::new(BlockId(0), 0, 100),
                Extent::new(BlockId(1), 0, 1)
            ]
        );
        drop(lease);
        assert_eq!(consumer.dirty_pages(), 170);
        consumer.lease(200).unwrap().ack();
        assert_eq!(consumer.dirty_pages(), 0);
    }

    #[test]
    fn what_is_dirty_in_a_row_is_one_extent_through_all_chunks() {
        let store = Arc::new(DirtyStore::default());
        store.add_block(BlockId(0), 20_000);
        let consumer = store.consumer(Start::AllDirty);
        consumer.lease(5000).unwrap().ack();
        let held = consumer.lease(100).unwrap();
        consumer.lease(20_000).unwrap().ack();
        let all = PageRange::new(0, 20_000);
        store.publish(BlockId(0), |sets| {
            sets.iter_mut().for_each(|set| set.insert(all))
        });
        let lease = consumer.lease(6000).unwrap();
        assert_eq!(
            lease.extents(),
            [
                Extent::new(BlockId(0), 0, 5000),
                Extent::new(BlockId(0), 5100, 1000)
            ]
        );
        held.ack();
    }

    #[test]
    fn leases_go_around_so_that_no_page_starves() {
        let store = store();
        let consumer = store.consumer(Start::Empty);
        publish(&store, 0, 1);
        publish(&store, 1, 69);
        consumer.lease(1).unwrap().ack();
        publish(&store, 0, 1);
        let next = consumer.lease(1).unwrap();
        assert_eq!(next.extents(), [Extent::new(BlockId(1), 69, 1)]);
        next.ack();
        assert_eq!(
            consumer.lease(1).unwrap().extents(),
            [Extent::new(BlockId(0), 1, 1)]
        );
    }

    #[test]
    fn consumers_do_not_see_each_other() {
        let store = store();
        let sender = store.consumer(Start::AllDirty);
        let meter = store.consumer(Start::Empty);
        publish(&store, 1, 3);
        sender.lease(1000).unwrap().ack();
        assert_eq!((sender.dirty_pages(), meter.dirty_pages()), (0, 1));
    }

    #[test]
    fn a_new_block_is_in_each_consumers_start_state_and_a_removed_one_is_gone() {
        let store = store();
        let sender = store.consumer(Start::AllDirty);
        let meter = store.consumer(Start::Empty);
        let lease = sender.lease(1000).unwrap();
        store.add_block(BlockId(2), 10);
        assert_eq!((sender.dirty_pages(), meter.dirty_pages()), (10, 0));
        store.remove_block(BlockId(0));
        drop(lease);
        assert_eq!(sender.dirty_pages(), 80);
    }
}
