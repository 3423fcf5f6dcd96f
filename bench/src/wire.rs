//! The stream, beside the socket that carries it.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation, Layout, PAGE_SIZE, PageRange, Slot};
use gleaner_migrate::{
    Destination, Harvested, LeaseId, LeasedPart, MappedMemory, Memory, MigrationId, NewMemory,
    PageLease, PageMemory, Receiver, ReceiverOptions, Report, Sender, SenderOptions, Source,
    Status,
};
use vm_memory::{ReadVolatile, VolatileSlice, WriteVolatile};

use crate::kernels::random;
use crate::row::{Aim, Row};
use crate::sample::{median, ratios, time, turn_about};
use crate::{Plan, Result};

/// Of the rate of plain writes over the same socket.
const AIM_SHARE: f64 = 0.9;
/// Times the time that merely reading the pages takes.
const AIM_ZERO: f64 = 2.0;
/// Bytes of a plain write or read.
const PLAIN: usize = 1 << 20;
/// Of the time that reading the pages takes, when nobody has touched them.
const AIM_HOLES: f64 = 0.1;
const BLOCK: BlockId = BlockId(1);
const GENERATION: Generation = Generation(1);

/// A guest that stands still, with one block.
struct Still {
    memory: Arc<MappedMemory>,
    /// Dirty pages from here on.
    next: u64,
    leases: u64,
}

impl Still {
    const fn new(memory: Arc<MappedMemory>) -> Self {
        Self {
            memory,
            next: 0,
            leases: 0,
        }
    }

    fn left(&self) -> u64 {
        self.memory.pages() - self.next
    }
}

impl Source for Still {
    fn layout(&mut self) -> gleaner_migrate::Result<Layout> {
        let info = BlockInfo::new(BLOCK, "ram", self.memory.pages() * PAGE_SIZE)?;
        let slot = Slot {
            key: 0.into(),
            gpa: 0,
            block: BLOCK,
            range: info.all(),
            readonly: false,
        };
        Ok(Layout::from_parts(GENERATION, vec![info], vec![slot])?)
    }

    fn harvest(&mut self) -> gleaner_migrate::Result<Harvested> {
        Ok(Harvested {
            generation: GENERATION,
            dirty_pages: self.left(),
        })
    }

    fn lease(&mut self, max_pages: u64) -> gleaner_migrate::Result<Option<PageLease>> {
        let range = PageRange::new(self.next, max_pages.min(self.left()));
        if range.pages == 0 {
            return Ok(None);
        }
        self.next = range.end();
        self.leases += 1;
        let extent = Extent {
            block: BLOCK,
            range,
        };
        Ok(Some(PageLease {
            id: LeaseId(self.leases),
            generation: GENERATION,
            parts: vec![LeasedPart::new(extent, Arc::clone(&self.memory) as Memory)],
        }))
    }

    fn ack(&mut self, _: LeaseId) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn release(&mut self, _: LeaseId) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn state(&mut self) -> gleaner_migrate::Result<Vec<u8>> {
        Ok(vec![1])
    }

    fn relinquish(&mut self) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn complete(&mut self) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn resume(&mut self) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn transactions(&mut self) -> gleaner_migrate::Result<u64> {
        Ok(0)
    }
}

/// Memory that waits.
struct Place {
    memory: Arc<MappedMemory>,
    is_zero: bool,
}

impl Destination for Place {
    fn add_block(&mut self, _: &BlockInfo) -> gleaner_migrate::Result<NewMemory> {
        let memory = Arc::clone(&self.memory) as Memory;
        Ok(if self.is_zero {
            NewMemory::zero(memory)
        } else {
            NewMemory::used(memory)
        })
    }

    fn remove_block(&mut self, _: &BlockInfo) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn layout(&mut self, _: &Layout) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn ready(&mut self, _: Vec<u8>) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn run(&mut self) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn abort(&mut self) {}
}

/// Memory whose every page exists, filled by `word`.
pub fn memory(pages: u64, mut word: impl FnMut() -> u64) -> Result<Arc<MappedMemory>> {
    let memory = MappedMemory::anonymous(pages)?;
    let mut bytes = vec![0u8; PLAIN];
    let all = memory.slice(PageRange::new(0, pages))?;
    for at in (0..all.len()).step_by(PLAIN) {
        for part in bytes.chunks_exact_mut(8) {
            part.copy_from_slice(&word().to_le_bytes());
        }
        let len = PLAIN.min(all.len() - at);
        all.subslice(at, len)?.copy_from(&bytes[..len]);
    }
    Ok(Arc::new(memory))
}

/// Migrates to memory that is known to be zero, or not, and returns the report and the time of the first round.
fn migrate(
    from: &Arc<MappedMemory>,
    to: &Arc<MappedMemory>,
    is_zero: bool,
) -> Result<(Report, Duration)> {
    migrate_with(from, to, is_zero, |_| ())
}

/// As `migrate`, with options that differ from the defaults.
pub fn migrate_with(
    from: &Arc<MappedMemory>,
    to: &Arc<MappedMemory>,
    is_zero: bool,
    differ: impl FnOnce(&mut SenderOptions),
) -> Result<(Report, Duration)> {
    let (near, far) = UnixStream::pair()?;
    let report = std::thread::scope(|scope| -> Result<Report> {
        let memory = Arc::clone(to);
        let mut place = Place { memory, is_zero };
        scope.spawn(move || {
            // What it has to say of a failure the sender has heard.
            let _ = Receiver::new(&mut place, ReceiverOptions::default()).run(far.into());
        });
        let mut source = Still::new(Arc::clone(from));
        let mut options = SenderOptions::new(MigrationId::random()?);
        differ(&mut options);
        Ok(Sender::new(&mut source, options).run(near.into()))
    })?;
    if report.status != Status::Completed {
        return Err(format!("a migration ended otherwise: {:?}", report.reason).into());
    }
    let first = report
        .progress
        .first()
        .ok_or("a migration without a round")?;
    let took = Duration::from_secs_f64(first.duration_ms / 1e3);
    Ok((report, took))
}

/// Moves all bytes by plain calls of 1 MiB over a socket of the same kind, until the other end has read the last one.
fn plain(from: &MappedMemory, to: &MappedMemory) -> Result<Duration> {
    let (mut near, mut far) = UnixStream::pair()?;
    let from = whole(from)?;
    let moved = |each: &mut dyn FnMut(&mut VolatileSlice<'_>) -> io::Result<usize>,
                 all: &VolatileSlice<'_>|
     -> io::Result<()> {
        let mut at = 0;
        while at < all.len() {
            let part = all.subslice(at, PLAIN.min(all.len() - at));
            at += each(&mut part.map_err(io::Error::other)?)?;
        }
        Ok(())
    };
    let (took, done) = time(|| {
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut read = |part: &mut VolatileSlice<'_>| {
                    far.read_volatile(part).map_err(io::Error::other)
                };
                moved(&mut read, &whole(to).map_err(io::Error::other)?)
            });
            let mut write =
                |part: &mut VolatileSlice<'_>| near.write_volatile(part).map_err(io::Error::other);
            let written = moved(&mut write, &from);
            drop(near);
            let read = reader.join();
            written.and(read.unwrap_or_else(|_| Err(io::Error::other("the reader panicked"))))
        })
    });
    done?;
    Ok(took)
}

fn whole(memory: &MappedMemory) -> Result<VolatileSlice<'_>> {
    Ok(memory.slice(PageRange::new(0, memory.pages()))?)
}

/// Reads all bytes, and does nothing with them that could cost more than reading: whether one is not zero.
fn read_all(memory: &MappedMemory) -> Result<(Duration, bool)> {
    let all = whole(memory)?;
    let mut page = [0u64; 512];
    let (took, any) = time(|| {
        let mut any = 0;
        for at in (0..all.len()).step_by(4096) {
            if let Ok(part) = all.subslice(at, 4096) {
                part.copy_to(&mut page);
            }
            any |= page.iter().fold(0, |all, word| all | word);
        }
        any
    });
    Ok((took, any != 0))
}

/// Whether both have the same bytes.
pub fn same(a: &MappedMemory, b: &MappedMemory) -> Result<bool> {
    let (a, b) = (whole(a)?, whole(b)?);
    let (mut left, mut right) = (vec![0u8; PLAIN], vec![0u8; PLAIN]);
    for at in (0..a.len()).step_by(PLAIN) {
        let len = PLAIN.min(a.len() - at);
        a.subslice(at, len)?.copy_to(&mut left[..len]);
        b.subslice(at, len)?.copy_to(&mut right[..len]);
        if left[..len] != right[..len] {
            return Ok(false);
        }
    }
    Ok(true)
}

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let pages = plan.pick(1 << 18, 1 << 14) as u64;
    let mut rows = Vec::new();
    if plan.wants("wire/contents") {
        rows.push(contents(pages, plan)?);
    }
    if plan.wants("wire/zeros") {
        rows.push(zeros(pages, plan)?);
    }
    if plan.wants("wire/holes") {
        rows.push(holes(pages, plan)?);
    }
    rows.extend(crate::packed::rows(plan)?);
    Ok(rows)
}

fn contents(pages: u64, plan: &Plan) -> Result<Row> {
    let mut state = 0x5eed;
    let from = memory(pages, || random(&mut state))?;
    let to = memory(pages, || u64::MAX)?;
    let there = memory(pages, || u64::MAX)?;
    let pairs = turn_about(
        plan.pick(7, 1),
        || migrate(&from, &to, false).map(|(_, took)| took),
        || plain(&from, &there),
    )?;
    if !same(&from, &to)? || !same(&from, &there)? {
        return Err("wire/contents: the memory that arrived differs".into());
    }
    let bytes = (pages * PAGE_SIZE) as f64;
    let rate = |seconds: f64| bytes / seconds / 1e9;
    // The share of the plain rate is the plain time over ours.
    let shares: Vec<_> = pairs.iter().map(|(ours, plain)| (*plain, *ours)).collect();
    Ok(Row::new(
        "wire/contents",
        Aim::AtLeast(AIM_SHARE),
        ratios(&shares),
        "of plain",
        format!(
            "first round of {} MiB at random {:.2} GB/s; plain writes of 1 MiB over the same kind of socket {:.2} GB/s",
            pages >> 8,
            rate(median(pairs.iter().map(|p| p.0))),
            rate(median(pairs.iter().map(|p| p.1))),
        ),
    ))
}

fn zeros(pages: u64, plan: &Plan) -> Result<Row> {
    let from = memory(pages, || 0)?;
    let to = memory(pages, || 0)?;
    let pairs = turn_about(
        plan.pick(7, 1),
        || {
            let (report, took) = migrate(&from, &to, true)?;
            if (report.zero_pages, report.pages_sent) != (pages, 0) {
                return Err("wire/zeros: pages of zeros were sent with their contents".into());
            }
            Ok(took)
        },
        || match read_all(&from)? {
            (took, false) => Ok::<_, crate::Error>(took),
            (_, true) => Err("wire/zeros: memory of zeros has other bytes".into()),
        },
    )?;
    let per_page = |seconds: f64| seconds * 1e9 / pages as f64;
    Ok(Row::new(
        "wire/zeros",
        Aim::AtMost(AIM_ZERO),
        ratios(&pairs),
        "times",
        format!(
            "first round {:.0} ns a page of zeros; merely reading them {:.0} ns a page",
            per_page(median(pairs.iter().map(|p| p.0))),
            per_page(median(pairs.iter().map(|p| p.1))),
        ),
    ))
}

/// Memory that was never touched, in a memfd.
fn untouched(pages: u64) -> Result<Arc<MappedMemory>> {
    let block = gleaner::Block::memfd("ram", pages * PAGE_SIZE)?;
    let (file, _) = block.shared_backing()?;
    Ok(Arc::new(MappedMemory::of_file(file.try_clone()?, pages)?))
}

fn holes(pages: u64, plan: &Plan) -> Result<Row> {
    let to = memory(pages, || 0)?;
    let pairs = turn_about(
        plan.pick(7, 1),
        || {
            let (report, took) = migrate(&untouched(pages)?, &to, true)?;
            if (report.zero_pages, report.pages_sent) != (pages, 0) {
                return Err("wire/holes: pages that nobody touched were sent".into());
            }
            Ok(took)
        },
        || {
            let memory = untouched(pages)?;
            Ok::<_, crate::Error>(read_all(&memory)?.0)
        },
    )?;
    let per_page = |seconds: f64| seconds * 1e9 / pages as f64;
    Ok(Row::new(
        "wire/holes",
        Aim::AtMost(AIM_HOLES),
        ratios(&pairs),
        "times",
        format!(
            "first round {:.1} ns a page that nobody touched, in a memfd; reading, which allocates them, {:.0} ns a page",
            per_page(median(pairs.iter().map(|p| p.0))),
            per_page(median(pairs.iter().map(|p| p.1))),
        ),
    ))
}
