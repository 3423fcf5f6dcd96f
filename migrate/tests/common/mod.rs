//! A guest to migrate, a place to migrate it to, and a line that breaks when it is told to.
#![allow(dead_code, missing_docs)] // each test file uses its part of it
#![allow(clippy::unwrap_used)] // a helper that fails fails its test

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use gleaner_bitmap::{
    BlockId, BlockInfo, Extent, Generation, Layout, PAGE_SIZE, PageRange, Slot, SlotKey,
};
use gleaner_migrate::*;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

type Ram = Arc<MappedMemory>;

pub struct Guest {
    pub blocks: BTreeMap<BlockId, (BlockInfo, Ram)>,
    files: BTreeMap<BlockId, File>,
    pub generation: u64,
    log: BTreeSet<(BlockId, u64)>,
    store: BTreeSet<(BlockId, u64)>,
    leases: BTreeMap<u64, BTreeSet<(BlockId, u64)>>,
    next_lease: u64,
    next_block: u64,
    pub running: bool,
    pub throttle: Throttle,
    pub calls: Vec<&'static str>,
    pub harvests: u32,
    /// The call that fails.
    pub failing: Option<&'static str>,
    /// The call that panics; of `memory` every look at it.
    pub panicking: Option<&'static str>,
    /// Nothing is leased while the guest is stopped.
    pub held_back: bool,
    /// Told of each harvest.
    pub harvested: Option<std::sync::mpsc::Sender<()>>,
    /// Called when all of its memory is asked for.
    pub shown: Option<Box<dyn FnMut() + Send>>,
}

/// Shared with whoever writes to the guest.
#[derive(Clone)]
pub struct ToySource(pub Arc<Mutex<Guest>>, pub Script);

/// What happens at each harvest, with its number.
pub type Script = fn(&mut Guest, u32);

impl ToySource {
    /// A guest with one block, every third page of it with contents.
    pub fn new(pages: u64) -> Self {
        Self::scripted(pages, |_, _| ())
    }

    pub fn scripted(pages: u64, script: Script) -> Self {
        let mut guest = Guest {
            blocks: BTreeMap::new(),
            files: BTreeMap::new(),
            generation: 1,
            log: BTreeSet::new(),
            store: BTreeSet::new(),
            leases: BTreeMap::new(),
            next_lease: 0,
            next_block: 0,
            running: true,
            throttle: Throttle::Off,
            calls: Vec::new(),
            harvests: 0,
            failing: None,
            panicking: None,
            held_back: false,
            harvested: None,
            shown: None,
        };
        let ram = guest.add_block("ram", pages);
        for page in (0..pages).step_by(3) {
            guest.write(ram, page, 0x11);
        }
        Self(Arc::new(Mutex::new(guest)), script)
    }

    pub fn guest(&self) -> std::sync::MutexGuard<'_, Guest> {
        self.0.lock().unwrap()
    }

    fn call(&self, name: &'static str) -> Result<std::sync::MutexGuard<'_, Guest>> {
        let mut guest = self.guest();
        guest.calls.push(name);
        let panicking = guest.panicking == Some(name);
        if panicking {
            drop(guest);
            panic!("{name} panics");
        }
        if guest.failing == Some(name) {
            return Err(Error::source(format!("{name} does not work")));
        }
        Ok(guest)
    }
}

/// Memory as it may be handed over.
pub fn memfd(pages: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("ram", flags).unwrap());
    file.set_len(pages * PAGE_SIZE).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    file
}

impl Guest {
    pub fn add_block(&mut self, name: &str, pages: u64) -> BlockId {
        let id = BlockId(self.next_block);
        self.next_block += 1;
        self.generation += 1;
        let info = BlockInfo::new(id, name, pages * PAGE_SIZE).unwrap();
        let file = memfd(pages);
        let ram = MappedMemory::of_file(file.try_clone().unwrap(), pages).unwrap();
        self.blocks.insert(id, (info, Arc::new(ram)));
        self.files.insert(id, file);
        self.log.extend((0..pages).map(|page| (id, page)));
        id
    }

    pub fn remove_block(&mut self, name: &str) {
        let id = self.id(name);
        self.generation += 1;
        self.blocks.remove(&id);
        self.log.retain(|(block, _)| *block != id);
        self.store.retain(|(block, _)| *block != id);
    }

    pub fn id(&self, name: &str) -> BlockId {
        let found = self.blocks.values().find(|(info, _)| info.name == name);
        found.unwrap().0.id
    }

    pub fn write(&mut self, block: BlockId, page: u64, byte: u8) {
        let memory = &self.blocks[&block].1;
        let at = memory.slice(PageRange::new(page, 1)).unwrap();
        at.subslice(usize::from(byte) * 8, 8)
            .unwrap()
            .copy_from(&[byte; 8]);
        self.log.insert((block, page));
    }

    /// Writes a whole page.
    pub fn fill(&mut self, block: BlockId, page: u64, bytes: &[u8]) {
        let memory = &self.blocks[&block].1;
        let at = memory.slice(PageRange::new(page, 1)).unwrap();
        assert_eq!(bytes.len(), at.len());
        at.copy_from(bytes);
        self.log.insert((block, page));
    }

    pub fn zero(&mut self, block: BlockId, page: u64) {
        let memory = &self.blocks[&block].1;
        memory
            .slice(PageRange::new(page, 1))
            .unwrap()
            .copy_from(&[0u8; 4096]);
        self.log.insert((block, page));
    }

    /// All of it is dirty again, as at the start of each attempt.
    pub fn touch(&mut self) {
        for (id, (info, _)) in &self.blocks {
            self.log.extend((0..info.pages).map(|page| (*id, page)));
        }
    }

    /// Whether the next attempt would send the page if nothing else were known of the destination.
    pub fn is_dirty(&self, block: BlockId, page: u64) -> bool {
        self.log.contains(&(block, page)) || self.store.contains(&(block, page))
    }

    pub fn no_leases(&self) -> bool {
        self.leases.is_empty()
    }
}

impl Source for ToySource {
    fn layout(&mut self) -> Result<Layout> {
        let guest = self.call("layout")?;
        let mut gpa = 0;
        let mut slots = Vec::new();
        for (n, (info, _)) in guest.blocks.values().enumerate() {
            slots.push(Slot {
                key: SlotKey::new(n.try_into().unwrap()),
                gpa,
                block: info.id,
                range: info.all(),
                readonly: false,
            });
            gpa += info.pages * PAGE_SIZE;
        }
        let blocks = guest
            .blocks
            .values()
            .map(|(info, _)| info.clone())
            .collect();
        Ok(Layout::from_parts(
            Generation(guest.generation),
            blocks,
            slots,
        )?)
    }

    fn harvest(&mut self) -> Result<Harvested> {
        let script = self.1;
        let mut guest = self.call("harvest")?;
        guest.harvests += 1;
        let number = guest.harvests;
        if let Some(to) = &guest.harvested {
            let _ = to.send(());
        }
        if guest.running {
            script(&mut guest, number);
        }
        let log = std::mem::take(&mut guest.log);
        guest.store.extend(log);
        Ok(Harvested {
            generation: Generation(guest.generation),
            dirty_pages: guest.store.len() as u64,
        })
    }

    fn harvest_early(&mut self) -> Result<Option<Harvested>> {
        drop(self.call("harvest early")?);
        self.harvest().map(Some)
    }

    fn lease(&mut self, max_pages: u64) -> Result<Option<PageLease>> {
        let mut guest = self.call("lease")?;
        let free: BTreeSet<_> = guest
            .store
            .iter()
            .filter(|page| !guest.leases.values().any(|lease| lease.contains(page)))
            .take(usize::try_from(max_pages).unwrap())
            .copied()
            .collect();
        if free.is_empty() || (guest.held_back && !guest.running) {
            return Ok(None);
        }
        guest.store.retain(|page| !free.contains(page));
        let mut extents: Vec<Extent> = Vec::new();
        for (block, page) in &free {
            match extents.last_mut() {
                Some(last) if last.block == *block && last.range.end() == *page => {
                    last.range.pages += 1;
                }
                _ => extents.push(Extent::new(*block, *page, 1)),
            }
        }
        let id = guest.next_lease;
        guest.next_lease += 1;
        guest.leases.insert(id, free);
        let parts = extents
            .iter()
            .map(|extent| {
                let (info, ram) = &guest.blocks[&extent.block];
                let memory: Memory = match guest.panicking {
                    Some("memory") => Arc::new(Panicking(info.pages)),
                    _ => ram.clone(),
                };
                LeasedPart::new(*extent, memory)
            })
            .collect();
        Ok(Some(PageLease {
            id: LeaseId(id),
            generation: Generation(guest.generation),
            parts,
        }))
    }

    fn ack(&mut self, lease: LeaseId) -> Result<()> {
        let mut guest = self.call("ack")?;
        assert!(guest.leases.remove(&lease.0).is_some(), "acked twice");
        Ok(())
    }

    fn release(&mut self, lease: LeaseId) -> Result<()> {
        let mut guest = self.call("release")?;
        let pages = guest.leases.remove(&lease.0).expect("released once");
        guest.store.extend(pages);
        Ok(())
    }

    fn throttles(&mut self) -> Result<Throttles> {
        self.call("throttles").map(|_| Throttles::Writers)
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<()> {
        self.call("throttle")?.throttle = throttle;
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        let mut guest = self.call("stop")?;
        guest.running = false;
        guest.throttle = Throttle::Off;
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>> {
        let mut guest = self.call("state")?;
        // Saving state dirties memory.
        if let Some(block) = guest.blocks.keys().next().copied() {
            guest.write(block, 1, 0x77);
        }
        Ok(b"state of the guest".to_vec())
    }

    fn memory(&mut self, block: BlockId) -> Result<Memory> {
        let mut guest = self.call("memory")?;
        assert!(!guest.running, "shown while it runs");
        if let Some(shown) = &mut guest.shown {
            shown();
        }
        Ok(guest.blocks[&block].1.clone())
    }

    fn hand_over(&mut self, block: BlockId) -> Result<(OwnedFd, u64)> {
        let guest = self.call("hand_over")?;
        assert!(!guest.running, "handed over while it runs");
        Ok((guest.files[&block].try_clone().unwrap().into(), 0))
    }

    fn relinquish(&mut self) -> Result<()> {
        self.call("relinquish").map(drop)
    }

    fn complete(&mut self) -> Result<()> {
        self.call("complete").map(drop)
    }

    fn resume(&mut self) -> Result<()> {
        let mut guest = self.call("resume")?;
        guest.running = true;
        guest.throttle = Throttle::Off;
        Ok(())
    }

    fn transactions(&mut self) -> Result<u64> {
        Ok(self.guest().generation)
    }
}

/// Memory that nobody can look at.
struct Panicking(u64);

impl PageMemory for Panicking {
    fn pages(&self) -> u64 {
        self.0
    }

    fn slice(&self, _: PageRange) -> Result<vm_memory::VolatileSlice<'_>> {
        panic!("memory panics");
    }
}

#[derive(Default)]
pub struct Place {
    pub blocks: BTreeMap<BlockId, (BlockInfo, Ram)>,
    pub layouts: Vec<Layout>,
    pub state: Vec<u8>,
    pub running: bool,
    pub aborted: bool,
    /// The call that fails.
    pub failing: Option<&'static str>,
    /// The call that panics; of `memory` every look at it.
    pub panicking: Option<&'static str>,
    /// Memory was used before: this byte is everywhere.
    pub used: Option<u8>,
}

#[derive(Clone, Default)]
pub struct ToyDestination(pub Arc<Mutex<Place>>);

impl ToyDestination {
    pub fn failing(call: &'static str) -> Self {
        let place = Self::default();
        place.place().failing = Some(call);
        place
    }

    pub fn used(byte: u8) -> Self {
        let place = Self::default();
        place.place().used = Some(byte);
        place
    }

    pub fn place(&self) -> std::sync::MutexGuard<'_, Place> {
        self.0.lock().unwrap()
    }

    fn call(&self, name: &str) -> Result<std::sync::MutexGuard<'_, Place>> {
        let place = self.place();
        let panicking = place.panicking == Some(name);
        if panicking {
            drop(place);
            panic!("{name} panics");
        }
        if place.failing == Some(name) {
            return Err(Error::destination(format!("no {name} on a Sunday")));
        }
        Ok(place)
    }
}

impl Destination for ToyDestination {
    fn add_block(&mut self, block: &BlockInfo) -> Result<NewMemory> {
        if self.place().panicking == Some("memory") {
            return Ok(NewMemory::used(Arc::new(Panicking(block.pages))));
        }
        let mut place = self.call("add_block")?;
        let same = place
            .blocks
            .values()
            .any(|(info, _)| info.name == block.name);
        assert!(!same, "two blocks of one name");
        let ram = Arc::new(MappedMemory::anonymous(block.pages)?);
        place.blocks.insert(block.id, (block.clone(), ram.clone()));
        let Some(byte) = place.used else {
            return Ok(NewMemory::zero(ram));
        };
        for page in 0..block.pages {
            let page = ram.slice(PageRange::new(page, 1))?;
            page.copy_from(&[byte; 4096]);
        }
        Ok(NewMemory::used(ram))
    }

    fn begin_local(&mut self) -> Result<()> {
        self.call("begin_local").map(drop)
    }

    fn adopt_block(&mut self, block: &BlockInfo, file: File, offset: u64) -> Result<()> {
        // A toy's memory starts where its file does.
        let _ = offset;
        let ram = Arc::new(MappedMemory::of_file(file, block.pages)?);
        let mut place = self.call("adopt_block")?;
        let before = place.blocks.insert(block.id, (block.clone(), ram));
        assert!(before.is_none());
        Ok(())
    }

    fn remove_block(&mut self, block: &BlockInfo) -> Result<()> {
        self.call("remove_block")?.blocks.remove(&block.id).unwrap();
        Ok(())
    }

    fn layout(&mut self, layout: &Layout) -> Result<()> {
        let mut place = self.call("layout")?;
        // They were added, or will be adopted.
        let here = |block: &BlockInfo| place.blocks.contains_key(&block.id);
        assert!(place.blocks.is_empty() || layout.blocks().all(here));
        place.layouts.push(layout.clone());
        Ok(())
    }

    fn ready(&mut self, state: Vec<u8>) -> Result<()> {
        self.call("ready")?.state = state;
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        self.call("run")?.running = true;
        Ok(())
    }

    fn abort(&mut self) {
        let mut place = self.place();
        assert!(!place.running && !place.aborted);
        place.aborted = true;
    }
}

pub fn options() -> SenderOptions {
    let mut options = SenderOptions::new(MigrationId::random().unwrap());
    options.io_timeout = Duration::from_secs(10);
    options.name = "toy".into();
    options
}

pub fn receiver_options() -> ReceiverOptions {
    ReceiverOptions {
        io_timeout: Duration::from_secs(10),
        ..ReceiverOptions::default()
    }
}

/// Migrates over `near` and `far`, which are connected somehow.
pub fn migrate(
    source: &ToySource,
    place: &ToyDestination,
    options: SenderOptions,
    receiver: ReceiverOptions,
    near: Stream,
    far: Stream,
) -> (Report, Received) {
    let (mut source, mut place) = (source.clone(), place.clone());
    let there = thread::spawn(move || Receiver::new(&mut place, receiver).run(far));
    let report = Sender::new(&mut source, options).run(near);
    (report, there.join().unwrap())
}

/// Migrates to whoever listens at an address of this kind, over the number of connections that the options say.
pub fn migrate_to(
    address: &Address,
    source: &ToySource,
    place: &ToyDestination,
    options: SenderOptions,
) -> (Report, Received) {
    let listener = Listener::bind(address).unwrap();
    let address = match listener.local_addr() {
        Some(tcp) => format!("tcp:{tcp}").parse().unwrap(),
        None => address.clone(),
    };
    let (mut source, mut place) = (source.clone(), place.clone());
    let there = thread::spawn(move || {
        Receiver::new(&mut place, receiver_options())
            .listen(&listener)
            .unwrap()
    });
    let report = Sender::new(&mut source, options).run_to(&Connector::new(address));
    (report, there.join().unwrap())
}

pub fn pair() -> (Stream, Stream) {
    let (a, b) = UnixStream::pair().unwrap();
    (a.into(), b.into())
}

/// Both ends have the same blocks with the same bytes.
pub fn assert_same(source: &ToySource, place: &ToyDestination) {
    let (guest, place) = (source.guest(), place.place());
    let infos = |blocks: &BTreeMap<BlockId, (BlockInfo, Ram)>| -> Vec<_> {
        blocks.values().map(|(info, _)| info.clone()).collect()
    };
    assert_eq!(infos(&guest.blocks), infos(&place.blocks));
    for (id, (info, ram)) in &guest.blocks {
        for page in 0..info.pages {
            let page = PageRange::new(page, 1);
            let (mut here, mut there) = ([0u8; 4096], [0u8; 4096]);
            ram.slice(page).unwrap().copy_to(&mut here);
            place.blocks[id].1.slice(page).unwrap().copy_to(&mut there);
            assert!(here == there, "page {} of {id} differs", page.first);
        }
    }
}

/// A page whose contents have not arrived is dirty at the source, of blocks that are at both ends.
pub fn assert_what_differs_is_dirty(source: &ToySource, place: &ToyDestination) {
    let (guest, place) = (source.guest(), place.place());
    for (id, (info, ram)) in &guest.blocks {
        let Some((_, there)) = place.blocks.get(id) else {
            continue;
        };
        for page in 0..info.pages {
            let range = PageRange::new(page, 1);
            let [mut left, mut right] = [[0u8; 4096]; 2];
            ram.slice(range).unwrap().copy_to(&mut left);
            there.slice(range).unwrap().copy_to(&mut right);
            assert!(left == right || guest.is_dirty(*id, page), "page {page}");
        }
    }
}

/// What a line does with the bytes of one direction.
#[derive(Clone, Copy, Default, Debug)]
pub struct Fault {
    /// Breaks, both ways, after so many bytes.
    pub cut: Option<u64>,
    /// Is reset, both ways, after so many bytes: what is under way is lost, and neither end sees an end of the stream.
    pub reset: Option<u64>,
    /// Carries nothing more after so many bytes, until its sender gives up.
    pub stall: Option<u64>,
    /// Carries at most so many bytes at a time.
    pub pieces: Option<usize>,
    /// Flips this bit of this byte.
    pub flip: Option<(u64, u8)>,
}

impl Fault {
    /// How many of `len` bytes go through next, when `gone` have.
    fn room(&self, gone: u64, len: usize) -> usize {
        let ends = [self.cut, self.reset, self.stall].into_iter().flatten();
        let left = ends.map(|end| usize::try_from(end - gone).unwrap());
        left.chain(self.pieces).fold(len, usize::min)
    }

    /// Nothing more goes through: what that means.
    fn happen(&self, from: &File, to: &File) {
        if self.reset.is_some() {
            // To the kernel, disconnecting a connected TCP socket is a reset.
            rustix::net::connect_unspec(from).unwrap();
            rustix::net::connect_unspec(to).unwrap();
        } else if self.stall.is_some() {
            let mut end = [PollFd::new(from, PollFlags::RDHUP)];
            while poll(&mut end, None) == Err(Errno::INTR) {}
            let _ = shutdown(to, Shutdown::Write);
        } else {
            let _ = shutdown(from, Shutdown::Both);
            let _ = shutdown(to, Shutdown::Both);
        }
    }

    /// Carries one direction; the bytes that went through.
    fn carry(self, mut from: File, mut to: File) -> u64 {
        let mut gone = 0u64;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let most = self.room(gone, buffer.len());
            if most == 0 {
                self.happen(&from, &to);
                return gone;
            }
            let n = match from.read(&mut buffer[..most]) {
                Ok(0) | Err(_) => break,
                Ok(n) => n,
            };
            let hit = self.flip.and_then(|(at, bit)| {
                let at = usize::try_from(at.checked_sub(gone)?).ok()?;
                Some((buffer[..n].get_mut(at)?, bit))
            });
            if let Some((byte, bit)) = hit {
                *byte ^= 1 << bit;
            }
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
            gone += n as u64;
        }
        let _ = shutdown(&to, Shutdown::Write);
        gone
    }
}

/// A line between two streams. Its threads say how many bytes went through, source to destination first.
pub fn line(faults: [Fault; 2]) -> Line {
    between(
        UnixStream::pair().unwrap(),
        UnixStream::pair().unwrap(),
        faults,
    )
}

/// The same by TCP, which can be reset.
pub fn tcp_line(faults: [Fault; 2]) -> Line {
    let pair = || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        for end in [&near, &far] {
            end.set_nodelay(true).unwrap();
        }
        (near, far)
    };
    between(pair(), pair(), faults)
}

pub type Line = (Stream, Stream, [thread::JoinHandle<u64>; 2]);

/// Carries the bytes between two streams, both ways.
pub fn carry(near: Stream, far: Stream, faults: [Fault; 2]) {
    let file = |stream: &Stream| File::from(stream.as_fd().try_clone_to_owned().unwrap());
    let [a, b] = [(&near, &far, faults[0]), (&far, &near, faults[1])]
        .map(|(from, to, fault)| (file(from), file(to), fault));
    for (from, to, fault) in [a, b] {
        thread::spawn(move || fault.carry(from, to));
    }
}

/// What lies between the first half of `here` and the second of `there`.
fn between<S: Into<Stream> + Into<OwnedFd>>(
    here: (S, S),
    there: (S, S),
    faults: [Fault; 2],
) -> Line {
    let (a, b): (OwnedFd, OwnedFd) = (here.1.into(), there.0.into());
    let carry = |from: &OwnedFd, to: &OwnedFd, fault: Fault| {
        let [from, to] = [from, to].map(|end| File::from(end.try_clone().unwrap()));
        thread::spawn(move || fault.carry(from, to))
    };
    let threads = [carry(&a, &b, faults[0]), carry(&b, &a, faults[1])];
    (here.0.into(), there.1.into(), threads)
}
