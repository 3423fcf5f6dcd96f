//! What a migration and plain writes go over.

use std::fmt;
use std::fs::File;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gleaner_bitmap::PageRange;
use gleaner_migrate::{
    Address, Connector, Listener, MappedMemory, MigrationId, PageMemory, Receiver, ReceiverOptions,
    Report, Sender, SenderOptions, Status,
};
use vm_memory::{ReadVolatile, VolatileSlice, WriteVolatile};

use super::ends::{Place, Still};
use crate::Result;

/// Bytes of a plain write or read.
const PLAIN: usize = 1 << 20;

/// The sockets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Unix,
    Tcp,
}

/// The sockets and their number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Line {
    pub kind: Kind,
    pub channels: u16,
}

impl Line {
    /// One Unix socket.
    pub const ONE: Self = Self {
        kind: Kind::Unix,
        channels: 1,
    };
    /// All that figures are asked for.
    pub const ALL: [Self; 4] = [
        Self::ONE,
        Self {
            channels: 2,
            ..Self::ONE
        },
        Self {
            kind: Kind::Tcp,
            channels: 1,
        },
        Self {
            kind: Kind::Tcp,
            channels: 2,
        },
    ];
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Unix => "unix",
            Kind::Tcp => "tcp",
        };
        write!(f, "{kind}-{}", self.channels)
    }
}

/// Migrates to memory that is known to be zero, or not, with options that differ from the defaults; the report and the
/// time of the first round.
pub fn migrate(
    from: &Arc<MappedMemory>,
    to: &Arc<MappedMemory>,
    is_zero: bool,
    line: Line,
    differ: impl FnOnce(&mut SenderOptions),
) -> Result<(Report, Duration)> {
    let dir = tempfile::tempdir()?;
    let listener = Listener::bind(&match line.kind {
        Kind::Unix => Address::Unix(dir.path().join("socket")),
        Kind::Tcp => "tcp:127.0.0.1:0".parse()?,
    })?;
    let address = match listener.local_addr() {
        Some(bound) => format!("tcp:{bound}").parse()?,
        None => Address::Unix(dir.path().join("socket")),
    };
    let report = std::thread::scope(|scope| -> Result<Report> {
        let memory = Arc::clone(to);
        let mut place = Place { memory, is_zero };
        scope.spawn(move || {
            // What it has to say of a failure the sender has heard.
            let _ = Receiver::new(&mut place, ReceiverOptions::default()).listen(&listener);
        });
        let mut source = Still::new(Arc::clone(from));
        let mut options = SenderOptions::new(MigrationId::random()?);
        options.channels = line.channels;
        differ(&mut options);
        Ok(Sender::new(&mut source, options).run_to(&Connector::new(address)))
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

/// Moves all bytes by plain calls of 1 MiB, each socket its share of them, until the other ends have read the last ones.
pub fn plain(from: &MappedMemory, to: &MappedMemory, line: Line) -> Result<Duration> {
    let pairs = (0..line.channels).map(|_| pair(line.kind));
    let pairs = pairs.collect::<Result<Vec<_>>>()?;
    let pages = from.pages() / u64::from(line.channels);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let mut ends = Vec::new();
        for (number, (mut writer, mut reader)) in (0..).zip(pairs) {
            let share = PageRange::new(number * pages, pages);
            ends.push(scope.spawn(move || {
                in_steps(&to.slice(share)?, |part| {
                    match reader.read_volatile(part)? {
                        0 => Err("a plain line ended early".into()),
                        count => Ok(count),
                    }
                })
            }));
            ends.push(scope.spawn(move || {
                in_steps(&from.slice(share)?, |part| Ok(writer.write_volatile(part)?))
            }));
        }
        for end in ends {
            end.join()
                .map_err(|_| "an end of a plain line panicked")??;
        }
        Ok(begun.elapsed())
    })
}

/// Both ends of a connection, as files, which are written and read by the same calls.
fn pair(kind: Kind) -> Result<(File, File)> {
    let (near, far): (OwnedFd, OwnedFd) = match kind {
        Kind::Unix => {
            let (near, far) = UnixStream::pair()?;
            (near.into(), far.into())
        }
        Kind::Tcp => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let near = TcpStream::connect(listener.local_addr()?)?;
            near.set_nodelay(true)?;
            (near.into(), listener.accept()?.0.into())
        }
    };
    Ok((near.into(), far.into()))
}

fn in_steps(
    all: &VolatileSlice<'_>,
    mut step: impl FnMut(&mut VolatileSlice<'_>) -> Result<usize>,
) -> Result<()> {
    let mut at = 0;
    while at < all.len() {
        let mut part = all.subslice(at, PLAIN.min(all.len() - at))?;
        at += step(&mut part)?;
    }
    Ok(())
}
