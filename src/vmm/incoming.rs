//! The destination's side: memory for the blocks that arrive, and the machine that goes on running on it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use gleaner_bitmap::{BlockId, BlockInfo, Layout, PAGE_SIZE};
use gleaner_migrate::{Destination, Error as MigrateError, NewMemory, Result};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use vm_memory::GuestAddress;

use super::backend::Backend;
use super::guest::MemoryMap;
use super::machine::{
    Board, Machine, MachineError, MachineState, Parts, RAM, lock_ram_file, open_vm,
};
use crate::{Block, Tracking};

/// Pages of all blocks together: four times what a reference guest's RAM can have.
const MAX_PAGES: u64 = (64 << 30) / PAGE_SIZE;

/// Called when all memory is here and the source is stopped, before the destination says that it is ready: blocks by name.
pub type OnComplete =
    Box<dyn FnMut(&BTreeMap<String, Block>) -> std::result::Result<(), String> + Send>;

/// A destination that takes the reference VMM's guest, or only its memory.
#[derive(Default)]
pub struct IncomingMachine {
    /// Blocks by the source's ids.
    blocks: BTreeMap<BlockId, Block>,
    layout: Option<Layout>,
    ram_dir: Option<PathBuf>,
    resume: Option<(Backend, Tracking)>,
    on_complete: Option<OnComplete>,
    machine: Option<Machine>,
}

impl std::fmt::Debug for IncomingMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IncomingMachine")
            .field("blocks", &self.blocks.len())
            .field("machine", &self.machine)
            .finish_non_exhaustive()
    }
}

impl IncomingMachine {
    /// A destination that keeps memory in memfds, and runs no guest.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps the memory of each block in `dir/<block>.ram`.
    #[must_use]
    pub fn ram_dir(mut self, dir: PathBuf) -> Self {
        self.ram_dir = Some(dir);
        self
    }

    /// Runs the guest on `backend` when the source has let go of it, tracked in this way.
    #[must_use]
    pub const fn resume(mut self, backend: Backend, tracking: Tracking) -> Self {
        self.resume = Some((backend, tracking));
        self
    }

    /// Calls `check` before saying that everything is ready. An error from it fails the migration; the source runs on.
    #[must_use]
    pub fn on_complete(mut self, check: OnComplete) -> Self {
        self.on_complete = Some(check);
        self
    }

    /// The machine that runs here now, if one does. It has the blocks then: one that is plugged out gives its memory back.
    pub fn take_machine(&mut self) -> Option<Machine> {
        let machine = self.machine.take()?;
        self.blocks.clear();
        Some(machine)
    }

    /// The blocks that arrived, by name, until the machine is taken.
    #[must_use]
    pub fn blocks(&self) -> BTreeMap<String, Block> {
        let named = self
            .blocks
            .values()
            .map(|b| (b.info().name.clone(), b.clone()));
        named.collect()
    }

    /// A block's memory, all zero: a file that exists is emptied, because the source does not send zeros to memory that
    /// was promised to be zero.
    fn allocate(&self, info: &BlockInfo) -> std::result::Result<Block, MachineError> {
        let bytes = info.pages * PAGE_SIZE;
        let Some(dir) = &self.ram_dir else {
            return Ok(Block::memfd(&info.name, bytes)?);
        };
        let path = dir.join(format!("{}.ram", info.name));
        let fail = |source| MachineError::RamFile {
            path: path.clone(),
            source,
        };
        let file = lock_ram_file(&path).map_err(fail)?;
        empty_ram_file(&file, bytes).map_err(fail)?;
        Ok(Block::file(&info.name, file, bytes)?)
    }

    /// The lengths are a peer's, and bookkeeping is allocated by them.
    fn check_room(&self, info: &BlockInfo) -> Result<()> {
        let pages: u64 = self.blocks.values().map(|b| b.info().pages).sum();
        if pages.saturating_add(info.pages) > MAX_PAGES {
            let text = format!(
                "block {} of {} pages would make more than {MAX_PAGES} in all",
                info.name, info.pages
            );
            return Err(MigrateError::destination(text));
        }
        Ok(())
    }

    fn build(
        &self,
        layout: &Layout,
        state: &[u8],
        here: Backend,
        tracking: Tracking,
    ) -> std::result::Result<Machine, MachineError> {
        let state = MachineState::from_bytes(state)?;
        if state.backend != here {
            let guest = state.backend;
            return Err(MachineError::OtherBackend { guest, here });
        }
        let ram = self
            .blocks
            .get(&state.ram.id)
            .filter(|b| b.info().name == RAM)
            .ok_or_else(|| MachineError::State("it names no block \"ram\"".into()))?;
        let map = MemoryMap::new(ram.info().pages * PAGE_SIZE, state.vcpus.len())?;
        let (vm, tracker) = open_vm(here, tracking, |builder| builder)?;
        let mut tx = tracker.transaction();
        for block in self.blocks.values() {
            tx.add_block(block);
        }
        for slot in layout.slots() {
            let block = self.blocks.get(&slot.block).ok_or_else(|| {
                MachineError::State(format!("{} maps a block that did not arrive", slot.key))
            })?;
            tx.create(slot.key, GuestAddress(slot.gpa), block.extent(slot.range));
            if slot.readonly {
                tx.set_readonly(slot.key, true);
            }
        }
        tx.commit()?;
        let parts = Arc::new(Parts {
            vm,
            tracker,
            map,
            ram: ram.clone(),
            board: Board::default(),
            write_rate: state.write_rate,
            idle: state.idle,
            churn: state.churn,
        });
        Machine::assemble(parts, state.device, |vcpu, index| {
            vcpu.restore(&state.vcpus[index])
        })
    }
}

/// An empty file for the memory of a block, which nobody else has, with its room on the disk taken.
pub(crate) fn empty_ram_file(file: &File, bytes: u64) -> io::Result<()> {
    file.set_len(0)?;
    file.set_len(bytes)?;
    reserve(file, bytes)
}

/// Takes the room of a file on its disk now: a guest that has come must not be killed, at the first write to a page that the
/// disk has no room for, when the source has long let go of it.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    loop {
        match fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Err(Errno::INTR) => {}
            // A file system that can't promise room.
            Ok(()) | Err(Errno::OPNOTSUPP) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

impl Destination for IncomingMachine {
    fn add_block(&mut self, info: &BlockInfo) -> Result<NewMemory> {
        self.check_room(info)?;
        let block = self.allocate(info).map_err(MigrateError::destination)?;
        self.blocks.insert(info.id, block.clone());
        Ok(NewMemory::zero(Arc::new(block)))
    }

    fn begin_local(&mut self) -> Result<()> {
        let why = if self.ram_dir.is_some() {
            "it keeps memory in files of its own (--ram-dir)"
        } else if self.resume.is_none() {
            "it does not run the guest (--resume)"
        } else {
            return Ok(());
        };
        let text = format!("it can't take memory over: {why}");
        Err(MigrateError::destination(text))
    }

    fn adopt_block(&mut self, info: &BlockInfo, file: File, offset: u64) -> Result<()> {
        self.check_room(info)?;
        let block = Block::part_of(&info.name, file, offset, info.pages * PAGE_SIZE);
        self.blocks
            .insert(info.id, block.map_err(MigrateError::destination)?);
        Ok(())
    }

    fn remove_block(&mut self, info: &BlockInfo) -> Result<()> {
        self.blocks.remove(&info.id);
        if let Some(dir) = &self.ram_dir {
            // Gone already is as good.
            let _ = std::fs::remove_file(dir.join(format!("{}.ram", info.name)));
        }
        Ok(())
    }

    fn layout(&mut self, layout: &Layout) -> Result<()> {
        self.layout = Some(layout.clone());
        Ok(())
    }

    fn ready(&mut self, state: Vec<u8>) -> Result<()> {
        if let Some(check) = &mut self.on_complete {
            let blocks = self
                .blocks
                .values()
                .map(|b| (b.info().name.clone(), b.clone()))
                .collect();
            check(&blocks).map_err(MigrateError::destination)?;
        }
        if let (Some((backend, tracking)), Some(layout)) = (self.resume, &self.layout) {
            let machine = self
                .build(layout, &state, backend, tracking)
                .map_err(MigrateError::destination)?;
            self.machine = Some(machine);
        }
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        if let Some(machine) = &mut self.machine {
            machine.start();
        }
        Ok(())
    }

    fn abort(&mut self) {
        self.machine = None;
        self.blocks.clear();
    }
}
