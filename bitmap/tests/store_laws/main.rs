//! Each dirtying is in exactly one place for each consumer: source, held back, store, lease, or acknowledged. A page is
//! given to a consumer when it is owed to it and not on its way, and never otherwise.
//!
//! The oracle gives every dirtying a number and moves the numbers between plain sets, whatever the order of harvests,
//! failures, leases, acks, losses, and blocks and consumers that come and go.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod device;
mod reader;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use device::{Device, Trouble};
use gleaner_bitmap::{
    BlockId, DirtySource, DirtyStore, Harvester, Layout, Lease, PageBitmap, Scope, Start,
};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use reader::Reader;

type Page = (BlockId, u64);
/// Dirtyings by page. The number 0 is the start state's.
type Dirtyings = BTreeMap<Page, BTreeSet<u64>>;

fn merge(into: &mut Dirtyings, from: Dirtyings) {
    for (page, numbers) in from {
        into.entry(page).or_default().extend(numbers);
    }
}

fn drop_block(from: &mut Dirtyings, block: BlockId) {
    from.retain(|page, _| page.0 != block);
}

#[derive(Clone, Debug)]
enum Step {
    Dirty {
        device: usize,
        block: usize,
        page: u64,
    },
    Harvest([Trouble; 2]),
    Discard,
    AddBlock(u64),
    RemoveBlock(usize),
    Arrive(Start),
    Leave(usize),
    Lease {
        reader: usize,
        max: u64,
    },
    Ack {
        reader: usize,
        lease: usize,
    },
    Lose {
        reader: usize,
        lease: usize,
    },
}

#[derive(Default)]
struct World {
    numbers: u64,
    blocks: BTreeMap<BlockId, u64>,
    devices: [Device; 2],
    staged: Dirtyings,
    harvester: Harvester,
    store: Arc<DirtyStore>,
    readers: Vec<Reader>,
    /// Leases that outlived their consumer.
    orphans: Vec<Lease>,
}

fn whole(block: BlockId, pages: u64) -> Dirtyings {
    (0..pages)
        .map(|page| ((block, page), BTreeSet::from([0])))
        .collect()
}

impl World {
    fn add_block(&mut self, pages: u64) {
        self.numbers += 1;
        let block = BlockId(self.numbers);
        self.blocks.insert(block, pages);
        self.devices[1].whole = Some(self.blocks.clone());
        self.harvester.add_block(block, pages);
        self.store.add_block(block, pages);
        for reader in &mut self.readers {
            if reader.start == Start::AllDirty {
                reader.receive(&whole(block, pages));
            }
        }
    }

    fn remove_block(&mut self, block: BlockId) {
        self.blocks.remove(&block);
        self.harvester.remove_block(block);
        self.store.remove_block(block);
        let devices = self.devices.iter_mut().map(|device| &mut device.pending);
        devices.for_each(|pending| drop_block(pending, block));
        drop_block(&mut self.staged, block);
        for reader in &mut self.readers {
            for dirtyings in [&mut reader.owed, &mut reader.store, &mut reader.acked] {
                drop_block(dirtyings, block);
            }
            for (_, leased) in &mut reader.leases {
                drop_block(leased, block);
            }
        }
    }

    fn arrive(&mut self, start: Start) {
        let mut reader = Reader::new(self.store.consumer(start), start);
        if start == Start::AllDirty {
            let blocks = self.blocks.iter();
            blocks.for_each(|(&block, &pages)| reader.receive(&whole(block, pages)));
        }
        self.readers.push(reader);
    }

    fn harvest(&mut self, trouble: [Trouble; 2]) -> Result<(), TestCaseError> {
        for (device, trouble) in self.devices.iter_mut().zip(trouble) {
            device.trouble = Some(trouble);
        }
        let sources = self
            .devices
            .iter_mut()
            .map(|device| device as &mut dyn DirtySource);
        let outcome = self
            .harvester
            .harvest(sources, &Layout::empty(1), Scope::All, &self.store);
        for device in &mut self.devices {
            merge(&mut self.staged, std::mem::take(&mut device.given));
        }
        if trouble
            .iter()
            .all(|trouble| matches!(trouble, Trouble::None))
        {
            let published = std::mem::take(&mut self.staged);
            prop_assert_eq!(outcome.unwrap().pages, published.len() as u64);
            self.readers
                .iter_mut()
                .for_each(|reader| reader.receive(&published));
        } else {
            prop_assert!(outcome.is_err());
        }
        Ok(())
    }

    fn discard(&mut self) {
        for device in &mut self.devices {
            device.trouble = None;
        }
        let sources = self
            .devices
            .iter_mut()
            .map(|device| device as &mut dyn DirtySource);
        self.harvester.discard(sources, &Layout::empty(1)).unwrap();
        self.staged.clear();
        self.devices
            .iter_mut()
            .for_each(|device| device.given.clear());
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        let pick = |n: usize, of: usize| (of > 0).then(|| n % of.max(1));
        match step {
            Step::Dirty {
                device,
                block,
                page,
            } => {
                if let Some(n) = pick(block, self.blocks.len()) {
                    let (&block, &pages) = self.blocks.iter().nth(n).unwrap();
                    self.numbers += 1;
                    let pending = &mut self.devices[device].pending;
                    pending
                        .entry((block, page % pages))
                        .or_default()
                        .insert(self.numbers);
                }
            }
            Step::Harvest(trouble) => self.harvest(trouble)?,
            Step::Discard => self.discard(),
            Step::AddBlock(pages) => self.add_block(pages),
            Step::RemoveBlock(n) => {
                if let Some(n) = pick(n, self.blocks.len()) {
                    self.remove_block(*self.blocks.keys().nth(n).unwrap());
                }
            }
            Step::Arrive(start) => self.arrive(start),
            Step::Leave(n) => {
                if let Some(n) = pick(n, self.readers.len()) {
                    let reader = self.readers.swap_remove(n);
                    self.orphans
                        .extend(reader.leases.into_iter().map(|(lease, _)| lease));
                }
            }
            Step::Lease { reader, max } => {
                if let Some(n) = pick(reader, self.readers.len()) {
                    self.readers[n].lease(max)?;
                }
            }
            Step::Ack { reader, lease } | Step::Lose { reader, lease } => {
                if let Some(n) = pick(reader, self.readers.len()) {
                    let reader = &mut self.readers[n];
                    match (pick(lease, reader.leases.len()), step) {
                        (Some(n), Step::Ack { .. }) => reader.ack(n),
                        (Some(n), _) => reader.lose(n),
                        (None, _) => {}
                    }
                }
            }
        }
        self.check()
    }

    /// What the store says of itself is what the oracle says.
    fn check(&self) -> Result<(), TestCaseError> {
        let mut any: BTreeMap<BlockId, BTreeSet<u64>> = self
            .blocks
            .keys()
            .map(|&block| (block, BTreeSet::new()))
            .collect();
        prop_assert_eq!(self.store.consumers(), self.readers.len());
        for reader in &self.readers {
            prop_assert_eq!(reader.consumer.dirty_pages(), reader.store.len() as u64);
            let leased = reader.leases.iter().flat_map(|(_, leased)| leased.keys());
            for (block, page) in reader.store.keys().chain(leased) {
                any.get_mut(block).unwrap().insert(*page);
            }
        }
        let blocks: Vec<BlockId> = self
            .blocks
            .keys()
            .copied()
            .chain([BlockId(u64::MAX)])
            .collect();
        let snapshot = self.store.snapshot(&blocks);
        let pages = |map: &PageBitmap| map.runs().flat_map(|r| r.first..r.end()).collect();
        let snapshot: BTreeMap<_, _> = snapshot.iter().map(|(&b, map)| (b, pages(map))).collect();
        prop_assert_eq!(snapshot, any);
        Ok(())
    }

    /// The sources are well again, and every consumer takes all it can get.
    fn end(&mut self) -> Result<(), TestCaseError> {
        self.orphans.clear();
        self.harvest([Trouble::None; 2])?;
        for reader in &mut self.readers {
            while !reader.leases.is_empty() {
                reader.lose(0);
            }
            while reader.lease(100)? {
                reader.ack(0);
            }
            prop_assert_eq!(&reader.acked, &reader.owed, "owed and never delivered");
        }
        self.check()
    }
}

fn trouble() -> impl Strategy<Value = Trouble> {
    prop_oneof![
        6 => Just(Trouble::None),
        1 => (0usize..4).prop_map(Trouble::Collect),
        1 => Just(Trouble::Short),
        1 => Just(Trouble::Rearm),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    let start = prop_oneof![Just(Start::AllDirty), Just(Start::Empty)];
    // Words with a tail, and more than what a harvest publishes together.
    let pages = prop_oneof![4 => 1u64..200, 1 => 4090u64..4200];
    let page = prop_oneof![4 => 0u64..70, 1 => 4090u64..4100, 1 => any::<u64>()];
    let max = prop_oneof![4 => 0u64..80, 1 => Just(100_000)];
    prop_oneof![
        12 => (0usize..2, any::<usize>(), page)
            .prop_map(|(device, block, page)| Step::Dirty { device, block, page }),
        6 => [trouble(), trouble()].prop_map(Step::Harvest),
        1 => Just(Step::Discard),
        1 => pages.prop_map(Step::AddBlock),
        1 => any::<usize>().prop_map(Step::RemoveBlock),
        1 => start.prop_map(Step::Arrive),
        1 => any::<usize>().prop_map(Step::Leave),
        6 => (any::<usize>(), max).prop_map(|(reader, max)| Step::Lease { reader, max }),
        4 => (any::<usize>(), any::<usize>()).prop_map(|(reader, lease)| Step::Ack { reader, lease }),
        2 => (any::<usize>(), any::<usize>()).prop_map(|(reader, lease)| Step::Lose { reader, lease }),
    ]
}

proptest! {
    #[test]
    fn each_dirtying_is_in_exactly_one_place_and_ends_up_acknowledged(
        second in prop_oneof![7 => Just(70u64), 1 => Just(4200)],
        steps in proptest::collection::vec(steps(), 1..80),
    ) {
        let mut world = World::default();
        world.add_block(130);
        world.add_block(second);
        world.arrive(Start::AllDirty);
        world.arrive(Start::Empty);
        for step in steps {
            world.step(step)?;
        }
        world.end()?;
    }
}
