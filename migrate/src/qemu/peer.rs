//! All connections to a QEMU, shared by the lanes of a migration.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use gleaner_bitmap::{BlockId, BlockInfo, PAGE_SIZE};
use vm_memory::VolatileSlice;

use super::answers::Answers;
use super::in_turn::InTurn;
use super::line::{FIRST_PING, Line};
use super::packet::{self, MAX_PAGES};
use super::record::{self, EOS, MULTIFD_FLUSH, PING, SECTION_END, SECTION_PART};
use super::{MultifdSync, QemuOptions};
use crate::memory::PAGE;
use crate::scan;
use crate::wire::{Extents, LayoutBody, Patience};
use crate::{Error, Result, Stream};

/// Number of the `ram` section.
const SECTION: u32 = 2;
/// Zero pages that are written at once.
const ZEROS: u64 = 1 << 14;

/// The main connection.
struct Main {
    line: Line,
    /// A section is open.
    open: bool,
    /// The block that was named last in it.
    named: Option<BlockId>,
}

/// A QEMU, and what it was told.
pub(crate) struct Peer {
    main: Mutex<Main>,
    /// Multifd's connections. Locked after `main` where both are.
    multifd: Vec<InTurn<Line>>,
    /// What it answers; `None` of a file.
    pub(crate) answers: Option<Arc<Answers>>,
    pub(crate) options: QemuOptions,
    /// The blocks, once it knows them.
    blocks: OnceLock<BTreeMap<BlockId, BlockInfo>>,
    /// The last PING.
    asked: AtomicU32,
    packets: AtomicU64,
    /// Pages are for it: it has taken the blocks.
    pages: AtomicBool,
}

impl Peer {
    pub(crate) fn new(
        main: Line,
        multifd: Vec<Line>,
        answers: Option<Arc<Answers>>,
        options: QemuOptions,
    ) -> Self {
        Self {
            main: Mutex::new(Main {
                line: main,
                open: false,
                named: None,
            }),
            multifd: multifd.into_iter().map(InTurn::new).collect(),
            answers,
            options,
            blocks: OnceLock::new(),
            asked: AtomicU32::new(0),
            packets: AtomicU64::new(0),
            pages: AtomicBool::new(false),
        }
    }

    pub(crate) fn channels(&self) -> usize {
        self.multifd.len()
    }

    /// The last PING that was sent.
    pub(crate) fn asked(&self) -> u32 {
        self.asked.load(Ordering::Acquire)
    }

    /// Says which machine comes, and asks whether somebody takes it.
    pub(crate) fn greet(&self, patience: Patience<'_>) -> Result<u32> {
        let mut main = self.main();
        let mut out = Vec::new();
        record::put_configuration(&mut out, &self.options.machine)?;
        if self.answers.is_some() {
            record::put_command(&mut out, record::OPEN_RETURN_PATH, &[]);
        }
        self.ask(&mut main, out, FIRST_PING, patience)
    }

    /// Names the blocks. Slots are nothing to QEMU, so a further layout is nothing either, if it has the same blocks.
    pub(crate) fn adopt(&self, layout: LayoutBody, patience: Patience<'_>) -> Result<u32> {
        if let Some(blocks) = self.blocks.get() {
            check_same(blocks, &layout.blocks)?;
            return Ok(self.asked());
        }
        let blocks: BTreeMap<_, _> = layout.blocks.into_iter().map(|i| (i.id, i)).collect();
        // Only the lane that leads comes here.
        let blocks = self.blocks.get_or_init(|| blocks);
        let named = blocks
            .values()
            .map(|info| (&*info.name, info.pages * PAGE_SIZE));
        let mut out = Vec::new();
        record::put_ram_start(&mut out, SECTION, named)?;
        let mut main = self.main();
        let ping = self.barrier(&mut out, patience)?;
        self.ask(&mut main, out, ping, patience)
    }

    /// Pages straight out of guest memory, on the main connection. Returns the full sync after which they are known to be
    /// applied.
    pub(crate) fn pages(
        &self,
        pages: &Extents,
        pieces: &[VolatileSlice<'_>],
        patience: Patience<'_>,
    ) -> Result<u32> {
        let mut main = self.main();
        let (mut heads, mut ends) = (Vec::new(), Vec::new());
        for extent in &pages.extents {
            for page in extent.range.first..extent.range.end() {
                self.head(&mut main, &mut heads, extent.block, page, record::PAGE)?;
                ends.push(heads.len());
            }
        }
        let contents = pieces
            .iter()
            .flat_map(|piece| (0..piece.len() / PAGE).map(move |n| piece.subslice(n * PAGE, PAGE)));
        let mut all = Vec::with_capacity(2 * ends.len());
        let (mut rest, mut start) = (&mut *heads, 0);
        for (end, page) in ends.into_iter().zip(contents) {
            let (head, after) = rest.split_at_mut(end - start);
            all.push(VolatileSlice::from(head));
            all.push(page.map_err(unreachable_memory)?);
            (rest, start) = (after, end);
        }
        main.line.put_pieces(&all, patience)?;
        Ok(main.line.synced + 1)
    }

    /// As [`Peer::pages`], of pages that are zero.
    pub(crate) fn zeros(&self, pages: &Extents, patience: Patience<'_>) -> Result<u32> {
        let mut main = self.main();
        let mut out = Vec::new();
        for extent in &pages.extents {
            for page in extent.range.first..extent.range.end() {
                self.head(&mut main, &mut out, extent.block, page, record::ZERO)?;
                out.push(0);
                if page % ZEROS == ZEROS - 1 {
                    main.line.put(&out, patience)?;
                    out.clear();
                }
            }
        }
        main.line.put(&out, patience)?;
        Ok(main.line.synced + 1)
    }

    /// The head of a page record, behind what opens a section if none is open.
    fn head(
        &self,
        main: &mut Main,
        out: &mut Vec<u8>,
        block: BlockId,
        page: u64,
        flags: u64,
    ) -> Result<()> {
        let info = self.block(block)?;
        if !std::mem::replace(&mut main.open, true) {
            record::put_section(out, SECTION_PART, SECTION);
            main.named = None;
        }
        let name = (main.named != Some(block)).then_some(&*info.name);
        main.named = Some(block);
        record::put_page(out, page * PAGE_SIZE, flags, name)
    }

    /// As [`Peer::pages`], as packets on a connection of multifd.
    pub(crate) fn packets(
        &self,
        number: usize,
        pages: &Extents,
        pieces: &[VolatileSlice<'_>],
        patience: Patience<'_>,
    ) -> Result<u32> {
        let mut packet = Packet::default();
        for (extent, piece) in pages.extents.iter().zip(pieces) {
            let mut page = extent.range.first;
            let mut rest = *piece;
            while page < extent.range.end() {
                if packet.block != Some(extent.block) || packet.offsets.len() == MAX_PAGES {
                    self.send_packet(number, &mut packet, patience)?;
                    packet.block = Some(extent.block);
                }
                let room = (MAX_PAGES - packet.offsets.len()) as u64;
                let take = room.min(extent.range.end() - page);
                packet
                    .offsets
                    .extend((page..page + take).map(|page| page * PAGE_SIZE));
                let (taken, after) = rest
                    .split_at(scan::bytes(take)?)
                    .map_err(unreachable_memory)?;
                packet.pieces.push(taken);
                rest = after;
                page += take;
            }
        }
        self.send_packet(number, &mut packet, patience)?;
        // Not earlier than the packets: a full sync that has passed since is one more.
        Ok(self.line(number).synced + 1)
    }

    fn send_packet<'m>(
        &self,
        number: usize,
        packet: &mut Packet<'m>,
        patience: Patience<'_>,
    ) -> Result<()> {
        let Some(block) = packet.block.filter(|_| !packet.offsets.is_empty()) else {
            return Ok(());
        };
        let count = self.packets.fetch_add(1, Ordering::Relaxed);
        let mut head = packet::packet(count, 0, &self.block(block)?.name, &packet.offsets)?;
        let mut all = Vec::with_capacity(1 + packet.pieces.len());
        all.push(VolatileSlice::from(&mut head[..]));
        all.extend(&packet.pieces);
        packet.pieces.clear();
        packet.offsets.clear();
        self.line(number).put_pieces(&all, patience)
    }

    /// A full sync: asks for an answer behind everything that was written, on all connections. Nothing, if PING number
    /// `ping` has been sent meanwhile.
    pub(crate) fn sync(&self, ping: u32, patience: Patience<'_>) -> Result<()> {
        let mut main = self.main();
        if main.line.synced >= ping {
            return Ok(());
        }
        let mut out = Vec::new();
        // A full sync is let go by a mark in a section.
        if !main.open && !self.multifd.is_empty() {
            record::put_section(&mut out, SECTION_PART, SECTION);
            main.open = true;
        }
        if !main.open {
            let ping = self.asked() + 1;
            return self.ask(&mut main, out, ping, patience).map(drop);
        }
        let ping = self.barrier(&mut out, patience)?;
        self.ask(&mut main, out, ping, patience).map(drop)
    }

    /// Lets the guest run there.
    pub(crate) fn end(&self, patience: Patience<'_>) -> Result<()> {
        let mut main = self.main();
        let mut out = Vec::new();
        record::put_section(&mut out, SECTION_END, SECTION);
        self.barrier(&mut out, patience)?;
        record::put_end(&mut out);
        main.line.put(&out, patience)
    }

    /// Ends a section: SYNC on every connection of multifd, then what lets them go on. Returns the PING to follow.
    /// `main` is locked, so no other full sync is under way.
    fn barrier(&self, out: &mut Vec<u8>, patience: Patience<'_>) -> Result<u32> {
        let ping = self.asked() + 1;
        for line in &self.multifd {
            let mut line = line.lock();
            let count = self.packets.fetch_add(1, Ordering::Relaxed);
            line.put(&packet::packet(count, packet::SYNC, "", &[])?, patience)?;
            line.synced = ping;
        }
        if !self.multifd.is_empty() && self.options.sync == MultifdSync::Flush {
            record::put_mark(out, MULTIFD_FLUSH);
        }
        record::put_mark(out, EOS);
        record::put_footer(out, SECTION);
        Ok(ping)
    }

    /// Writes `out`, and a PING behind it.
    fn ask(
        &self,
        main: &mut Main,
        mut out: Vec<u8>,
        ping: u32,
        patience: Patience<'_>,
    ) -> Result<u32> {
        if self.answers.is_some() {
            record::put_command(&mut out, PING, &ping.to_be_bytes());
        }
        main.line.put(&out, patience)?;
        main.open = false;
        main.line.synced = ping;
        self.asked.store(ping, Ordering::Release);
        Ok(ping)
    }

    /// The blocks as QEMU was told of them, for people.
    pub(crate) fn describe_blocks(&self) -> String {
        let blocks = self.blocks.get().into_iter().flat_map(BTreeMap::values);
        let each = blocks.map(|info| format!("{} of {} bytes", info.name, info.pages * PAGE_SIZE));
        each.collect::<Vec<_>>().join(", ")
    }

    /// Bytes written on the main connection.
    pub(crate) fn main_bytes(&self) -> u64 {
        self.main().line.bytes
    }

    /// Bytes written on a connection of multifd.
    pub(crate) fn bytes(&self, number: usize) -> u64 {
        match self.multifd.get(number) {
            Some(_) => self.line(number).bytes,
            None => 0,
        }
    }

    /// Does something to every stream.
    pub(crate) fn each(&self, mut each: impl FnMut(&Stream) -> Result<()>) -> Result<()> {
        each(self.main().line.stream())?;
        (0..self.multifd.len()).try_for_each(|number| each(self.line(number).stream()))
    }

    /// Whether it has got pages, and so has taken the blocks.
    pub(crate) fn has_pages(&self) -> bool {
        self.pages.load(Ordering::Relaxed)
    }

    /// The block that pages are for.
    fn block(&self, id: BlockId) -> Result<&BlockInfo> {
        self.pages.store(true, Ordering::Relaxed);
        let blocks = self.blocks.get();
        blocks
            .and_then(|blocks| blocks.get(&id))
            .ok_or(Error::UnknownBlock { block: id })
    }

    fn main(&self) -> MutexGuard<'_, Main> {
        self.main.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(&self, number: usize) -> MutexGuard<'_, Line> {
        self.multifd[number].lock()
    }
}

/// Pages of one block, on their way into a packet.
#[derive(Default)]
struct Packet<'m> {
    block: Option<BlockId>,
    offsets: Vec<u64>,
    pieces: Vec<VolatileSlice<'m>>,
}

/// QEMU's blocks are those that it was told of first.
fn check_same(known: &BTreeMap<BlockId, BlockInfo>, now: &[BlockInfo]) -> Result<()> {
    let new = now.iter().filter(|info| !known.contains_key(&info.id));
    let came: Vec<_> = new.map(|info| info.name.clone()).collect();
    let stays = |id: &BlockId| now.iter().any(|info| info.id == *id);
    let old = known.values().filter(|info| !stays(&info.id));
    let gone: Vec<_> = old.map(|info| info.name.clone()).collect();
    if came.is_empty() && gone.is_empty() {
        return Ok(());
    }
    Err(Error::Hotplug { came, gone })
}

fn unreachable_memory(error: impl std::fmt::Display) -> Error {
    Error::Memory {
        what: "of a lease can't be reached",
        detail: error.to_string(),
    }
}
