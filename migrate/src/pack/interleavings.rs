//! Whatever is sent, answered and forgotten in whatever order: both ends hold the same.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

use std::collections::BTreeMap;

use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation, Layout, PAGE_SIZE};
use proptest::prelude::*;
use vm_memory::VolatileSlice;

use super::delta::{self, Page};
use super::{Applied, Compress, Form, Packer, Unpacker};
use crate::memory::PAGE;
use crate::there::There;
use crate::wire::{Encoding, Extents, PackedBody};

const BLOCK: BlockId = BlockId(2);
const PAGES: u64 = 4;
const LANES: usize = 3;

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    /// A lane sends pages, each changed a little, made another one, or made zero.
    Send(usize, Vec<(u64, Change)>),
    /// The lane's oldest job is answered.
    Answer(usize),
    /// The block goes, and comes again.
    Replace,
}

#[derive(Clone, Copy, Debug)]
enum Change {
    /// This byte, there.
    Byte(usize, u8),
    /// All bytes, at random: nothing shrinks them.
    All(u64),
    Zero,
    /// It was written with what it held.
    Same,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        // Few different ones: a base that is not what is held shows only where a byte is again what it was in it.
        6 => (0..4usize, 1u8..3).prop_map(|(at, byte)| Change::Byte(at, byte)),
        2 => (1u64..).prop_map(Change::All),
        2 => Just(Change::Zero),
        1 => Just(Change::Same),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..LANES, proptest::collection::vec((0..PAGES, change()), 1..3))
            .prop_map(|(lane, pages)| Step::Send(lane, pages)),
        8 => (0..LANES).prop_map(Step::Answer),
        1 => Just(Step::Replace),
    ]
}

/// A migration's two ends, with the frames applied at once: what is not answered may be applied or not, and the source
/// must not make use of it.
struct Ends {
    there: There,
    packers: Vec<Packer>,
    guest: BTreeMap<u64, Page>,
    /// What the destination holds, and whether it has come.
    held: BTreeMap<u64, (Page, bool)>,
    /// Jobs that are not answered: their pages are not leased again.
    open: Vec<Vec<(Applied, Vec<u64>)>>,
    generation: u64,
    deltas: u64,
}

/// Nearly zero, so that what comes after zeros is like what was before.
const FIRST: Page = {
    let mut page = [0; PAGE];
    page[100] = 1;
    page
};
const USED: Page = [0xee; PAGE];

impl Ends {
    fn new(codec: Compress) -> Self {
        let packer = |_| *Packer::new(codec).unwrap().unwrap();
        let mut ends = Self {
            there: There::new(true),
            packers: (0..LANES).map(packer).collect(),
            guest: (0..PAGES).map(|page| (page, FIRST)).collect(),
            held: BTreeMap::new(),
            open: vec![Vec::new(); LANES],
            generation: 0,
            deltas: 0,
        };
        ends.replace();
        ends
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Send(lane, changes) => self.send(*lane, changes),
            Step::Answer(lane) => {
                self.answer(*lane);
            }
            Step::Replace => self.replace(),
        }
    }

    /// Nothing is under way while a layout is.
    fn replace(&mut self) {
        (0..LANES).for_each(|lane| while self.answer(lane) {});
        for blocks in [
            vec![],
            vec![BlockInfo::new(BLOCK, "b", PAGES * PAGE_SIZE).unwrap()],
        ] {
            self.generation += 1;
            let layout = Layout::from_parts(Generation(self.generation), blocks, vec![]).unwrap();
            self.there.adopt(&layout, &[]);
        }
        self.held = (0..PAGES).map(|page| (page, (USED, false))).collect();
    }

    fn answer(&mut self, lane: usize) -> bool {
        if self.open[lane].is_empty() {
            return false;
        }
        self.open[lane].remove(0).0.set();
        true
    }

    fn send(&mut self, lane: usize, changes: &[(u64, Change)]) {
        let applied = Applied::default();
        let mut sent = Vec::new();
        for (page, change) in changes {
            let mut open = self.open.iter().flatten();
            if sent.contains(page) || open.any(|(_, pages)| pages.contains(page)) {
                continue;
            }
            sent.push(*page);
            let content = self.guest.get_mut(page).unwrap();
            match *change {
                Change::Byte(at, byte) => content[at] = byte,
                Change::All(seed) => {
                    let mut random = seed;
                    content.fill_with(|| {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        random.to_le_bytes()[3]
                    });
                }
                Change::Zero => *content = [0; PAGE],
                Change::Same => {}
            }
        }
        let (zeros, contents): (Vec<u64>, _) =
            sent.iter().partition(|page| self.guest[page] == [0; PAGE]);
        for page in zeros {
            let told = self.there.zeros(Extent::new(BLOCK, page, 1));
            assert_eq!(told.len(), 1, "the destination's memory was used before");
            self.held.insert(page, ([0; PAGE], false));
        }
        self.send_contents(lane, &contents, &applied);
        self.open[lane].push((applied, sent));
    }

    fn send_contents(&mut self, lane: usize, pages: &[u64], applied: &Applied) {
        let extents: Vec<_> = pages
            .iter()
            .map(|page| Extent::new(BLOCK, *page, 1))
            .collect();
        let mut memory: Vec<Page> = pages.iter().map(|page| self.guest[page]).collect();
        let pieces: Vec<_> = memory
            .iter_mut()
            .map(|page| VolatileSlice::from(&mut page[..]))
            .collect();
        let packer = &mut self.packers[lane];
        let form = packer
            .pack(&extents, &pieces, &self.there, applied)
            .unwrap();
        let Form::Packed {
            codec,
            encodings,
            deltas,
            payload,
        } = form
        else {
            let copy = matches!(form, Form::Copy(copy) if copy == memory.concat());
            for page in pages {
                let content = self.guest.get_mut(page).unwrap();
                if !copy {
                    // The guest writes while it is sent.
                    content[0] ^= 3;
                }
                self.held.insert(*page, (*content, true));
            }
            return;
        };
        self.deltas += deltas;
        let packed = PackedBody {
            pages: Extents {
                generation: Generation(self.generation),
                extents,
            },
            codec,
            encodings,
        };
        let mut unpacker = Unpacker::default();
        let mut contents = unpacker.contents(&packed, payload).unwrap();
        for (page, encoding) in pages.iter().zip(&packed.encodings) {
            let (bytes, rest) = contents.split_at(encoding.bytes());
            contents = rest;
            let (held, came) = self.held.get_mut(page).unwrap();
            if *encoding == Encoding::Whole {
                held.copy_from_slice(bytes);
            } else {
                assert!(*came, "a delta of page {page}, which has not come");
                delta::apply(bytes, held).unwrap();
            }
            *came = true;
        }
        assert!(contents.is_empty());
        for page in pages {
            assert!(self.held[page].0 == self.guest[page], "page {page}");
        }
    }
}

proptest! {
    #[test]
    fn both_ends_hold_the_same(steps in proptest::collection::vec(step(), 1..150)) {
        for codec in [Compress::Lz4, Compress::Zstd] {
            let mut ends = Ends::new(codec);
            steps.iter().for_each(|step| ends.take(step));
        }
    }
}

/// Each way in which a page comes to be something else at the destination, between deltas: contents that shrink, and
/// contents that do not.
#[test]
fn what_comes_between_deltas() {
    let send = |change| [Step::Send(0, vec![(3, change)]), Step::Answer(0)];
    let byte = |at| send(Change::Byte(at, 1));
    let elsewhere = |change| vec![Step::Send(1, vec![(3, change)]), Step::Answer(1)];
    let between = [
        ("nothing", vec![], 3),
        ("the same", elsewhere(Change::Same), 4),
        // Whole, and whole and kept.
        ("zeros", elsewhere(Change::Zero), 1),
        ("all of it", elsewhere(Change::All(3)), 3),
        ("another block", vec![Step::Replace], 1),
    ];
    for (what, steps, deltas) in between {
        for random in [false, true] {
            let mut all = Vec::new();
            if random {
                all.extend(send(Change::All(1)));
            }
            all.extend([0, 0, 1].into_iter().flat_map(byte));
            all.extend(steps.clone());
            all.extend([3, 0].into_iter().flat_map(byte));
            let mut ends = Ends::new(Compress::Zstd);
            all.iter().for_each(|step| ends.take(step));
            assert_eq!(ends.deltas, deltas + u64::from(random), "{what}, {random}");
        }
    }
}
