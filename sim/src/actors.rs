//! Who writes: virtual vCPUs, inside of calls too, and the VMM itself.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gleaner::model::{Access, ModelKvm, Point, Schedule, State};
use gleaner::{Block, BlockId, Layout, PAGE_SIZE, SlotKey};
use vm_memory::{Bytes, VolatileMemory};

use crate::oracle::{Oracle, Page};
use crate::random::Random;

/// Where the guest believes that memory is.
#[derive(Clone, Copy, Debug)]
struct Aim {
    gpa: u64,
    pages: u64,
    block: BlockId,
    first: u64,
}

/// A vCPU, as the VMM sees it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Vcpu {
    /// It came out by itself, and its seat does not know yet.
    pub left: bool,
}

/// What all that write share.
#[derive(Debug)]
pub struct Stage {
    /// Chance of what happens inside of calls, and of what is written.
    pub random: Random,
    /// What is true.
    pub oracle: Oracle,
    /// The vCPUs.
    pub vcpus: Vec<Vcpu>,
    aims: Vec<Aim>,
    /// Blocks by the host address of their first byte.
    hosts: BTreeMap<u64, Block>,
    /// Each store writes another value.
    value: u64,
    /// Stores that found no memory, and were carried out by the VMM.
    pub missed: u64,
    /// Accesses of vCPUs inside of calls.
    pub inside_calls: u64,
}

/// Words of a page that are written: its first and its last.
const WORDS: [u64; 2] = [0, PAGE_SIZE - 8];

impl Stage {
    /// Nobody has written anything.
    #[must_use]
    pub fn new(random: Random) -> Self {
        Self {
            random,
            oracle: Oracle::default(),
            vcpus: Vec::new(),
            aims: Vec::new(),
            hosts: BTreeMap::new(),
            value: 0,
            missed: 0,
            inside_calls: 0,
        }
    }

    /// The guest learns where its memory is now. What was there before is tried now and then all the same.
    pub fn look(&mut self, layout: &Layout, blocks: &[Block]) {
        let before = self.aims.iter().rev().take(2).copied().collect::<Vec<_>>();
        self.aims = layout
            .slots()
            .filter(|s| s.key.address_space == SlotKey::new(0).address_space)
            .map(|s| Aim {
                gpa: s.gpa,
                pages: s.range.pages,
                block: s.block,
                first: s.range.first,
            })
            .collect();
        self.hosts = blocks
            .iter()
            .map(|b| (b.memory().as_ptr() as u64, b.clone()))
            .collect();
        let there = |aim: &Aim| layout.block(aim.block).is_some();
        self.aims.extend(before.into_iter().filter(there));
    }

    const fn next_value(&mut self) -> u64 {
        self.value += 1;
        self.value
    }

    /// The page at a host address.
    pub fn page_at(&self, host: u64) -> Option<Page> {
        let (base, block) = self.hosts.range(..=host).next_back()?;
        let page = (host - base) / PAGE_SIZE;
        (page < block.info().pages).then(|| (block.id(), page))
    }

    /// The VMM writes a word of a page, and marks it.
    pub fn vmm_writes(&mut self, (id, page): Page) {
        let Some(block) = self.hosts.values().find(|b| b.id() == id) else {
            return;
        };
        let memory = block.memory();
        let word = WORDS[usize::from(self.random.one_in(2))];
        self.value += 1;
        let at = usize::try_from(page * PAGE_SIZE + word).unwrap_or_default();
        if memory.as_volatile_slice().write_obj(self.value, at).is_ok() {
            self.oracle.wrote((id, page), true);
        }
    }

    /// All RAM blocks.
    pub fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.hosts.values()
    }

    /// A page of any block.
    pub fn any_page(&mut self) -> Option<Page> {
        let blocks: Vec<(BlockId, u64)> = self
            .hosts
            .values()
            .map(|b| (b.id(), b.info().pages))
            .collect();
        let (block, pages) = *self.random.pick(&blocks)?;
        Some((block, self.random.below(pages)))
    }

    /// Some accesses of vCPUs that are inside.
    pub fn act(&mut self, state: &mut State, accesses: u64) {
        for _ in 0..accesses {
            let inside: Vec<usize> = (0..self.vcpus.len())
                .filter(|v| state.is_inside(*v))
                .collect();
            let (Some(&vcpu), Some(&aim)) =
                (self.random.pick(&inside), self.random.pick(&self.aims))
            else {
                return;
            };
            let page = self.random.below(aim.pages);
            self.access(state, vcpu, aim, page);
        }
    }

    fn access(&mut self, state: &mut State, vcpu: usize, aim: Aim, page: u64) {
        let word = WORDS[usize::from(self.random.one_in(2))];
        let gpa = aim.gpa + page * PAGE_SIZE + word;
        let found = state.peek(gpa);
        let target = found.and_then(|(host, _)| self.page_at(host));
        let unnoticed = found.is_some_and(|(_, unnoticed)| unnoticed);
        let kind = self.random.below(10);
        let access = match kind {
            0 => state.read(vcpu, gpa),
            1 => state.touch(vcpu, gpa),
            _ => {
                let value = self.next_value();
                state.write(vcpu, gpa, value)
            }
        };
        match (access, target) {
            (Access::Done(_), Some(target)) => {
                if kind > 1 {
                    self.oracle.wrote(target, !unnoticed);
                } else if !unnoticed {
                    self.oracle.noticed(target);
                }
            }
            (Access::RingFull, Some(target)) => {
                self.oracle.noticed(target);
                self.exit(state, vcpu);
            }
            (Access::Missed, _) => {
                // The exit handler carries it out where the guest believes that it is.
                self.exit(state, vcpu);
                if kind > 1 {
                    self.missed += 1;
                    self.vmm_writes((aim.block, aim.first + page));
                }
            }
            (Access::Stalled | Access::Done(_) | Access::RingFull, _) => {}
        }
    }

    fn exit(&mut self, state: &mut State, vcpu: usize) {
        state.leave(vcpu);
        self.vcpus[vcpu].left = true;
    }
}

/// The stage, shared between the world and the model's calls.
#[derive(Clone, Debug)]
pub struct Actors(Arc<Mutex<Stage>>);

impl Actors {
    /// Nobody else has it yet.
    #[must_use]
    pub fn new(stage: Stage) -> Self {
        Self(Arc::new(Mutex::new(stage)))
    }

    /// The stage. Not to be held across calls of the tracker, in which vCPUs act.
    pub fn stage(&self) -> MutexGuard<'_, Stage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Actors {
    /// Something that harvests everything, seen by the oracle.
    ///
    /// # Errors
    /// As `harvest`.
    pub fn harvesting<T, E>(
        &self,
        kvm: &ModelKvm,
        harvest: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let mut pending = kvm.state().pending();
        self.stage().oracle.harvest_begins();
        let outcome = harvest();
        // What was pending may have come into the log too late, or not at all yet.
        pending.extend(kvm.state().pending());
        let mut stage = self.stage();
        let pending: Vec<_> = pending.iter().filter_map(|h| stage.page_at(*h)).collect();
        stage.oracle.harvest_ends(outcome.is_ok(), pending);
        outcome
    }
}

impl Schedule for Actors {
    fn at(&mut self, _point: Point, state: &mut State) {
        let mut stage = self.stage();
        if stage.random.one_in(2) {
            return;
        }
        let accesses = 1 + stage.random.below(4);
        stage.inside_calls += accesses;
        stage.act(state, accesses);
    }
}
