//! The ways that all memory takes to a QEMU, and the plain writes beside them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gleaner_migrate::{
    Address, Connector, Format, MigrationId, MultifdSync, QemuOptions, Sender, SenderOptions,
    Status,
};
use serde_json::json;

use super::machine::{Qemu, Ram};
use super::prepared::Prepared;
use crate::Result;
use crate::wire::ends::Still;
use crate::wire::line::{Line, plain};

/// Who sends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Way {
    /// Gleaner.
    Gleaner,
    /// A QEMU.
    Qemu,
    /// Nobody: a prepared stream is written, as fast as the QEMU takes it.
    Receiver,
    /// Nobody: plain writes, to somebody who merely reads.
    Socket,
}

impl Way {
    /// All, in the order of a turn.
    pub const ALL: [Self; 4] = [Self::Gleaner, Self::Qemu, Self::Receiver, Self::Socket];
}

/// How long it took.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// From before the first connection until both ends have said that it is done.
    pub clock: Duration,
    /// By the sending QEMU's own account, to the millisecond: its `total-time`.
    pub told: Option<Duration>,
}

impl Took {
    const fn by_clock(clock: Duration) -> Self {
        Self { clock, told: None }
    }
}

/// Memory at both ends, and room for a prepared stream.
pub struct Ends {
    pub from: Ram,
    pub to: Ram,
    prepared: Prepared,
}

impl Ends {
    pub fn new(pages: u64) -> Result<Self> {
        Ok(Self {
            from: Ram::new(pages)?,
            to: Ram::new(pages)?,
            prepared: Prepared::default(),
        })
    }

    /// Sends all memory.
    pub fn send(&mut self, way: Way, line: Line) -> Result<Took> {
        if way == Way::Socket {
            return plain(&self.from.memory, &self.to.memory, line).map(Took::by_clock);
        }
        let dir = tempfile::tempdir()?;
        let mut there = Qemu::start(&self.to, line, &["-incoming", "defer"])?;
        let address = there.listen(line.kind, dir.path())?;
        match way {
            Way::Gleaner => {
                let sync = there.sync;
                timed(&mut there, || self.gleaner(&address, line, sync))
            }
            Way::Qemu => {
                let mut here = self.source(line)?;
                let took = timed(&mut there, || {
                    let uri = json!({ "uri": address.to_string() });
                    here.execute("migrate", uri)?;
                    here.completed()
                })?;
                let told = here.execute("query-migrate", json!({}))?["total-time"].as_u64();
                Ok(Took {
                    told: told.map(Duration::from_millis),
                    ..took
                })
            }
            Way::Receiver | Way::Socket => {
                let prepared = std::mem::take(&mut self.prepared);
                let (memory, sync) = (&self.from.memory, there.sync);
                self.prepared = prepared.write_over(memory, line.channels, sync)?;
                timed(&mut there, || self.prepared.send(&address))
            }
        }
    }

    fn gleaner(&self, to: &Address, line: Line, sync: MultifdSync) -> Result<()> {
        let mut source = Still::new(Arc::clone(&self.from.memory));
        let mut options = SenderOptions::new(MigrationId::random()?);
        options.channels = line.channels;
        options.format = Format::Qemu(QemuOptions {
            sync,
            ..QemuOptions::default()
        });
        let report = Sender::new(&mut source, options).run_to(&Connector::new(to.clone()));
        if report.status != Status::Completed {
            let reason = report.reason;
            return Err(format!("a migration to a QEMU ended otherwise: {reason:?}").into());
        }
        Ok(())
    }

    /// A QEMU with the same memory, which holds nothing back.
    fn source(&self, line: Line) -> Result<Qemu> {
        let mut here = Qemu::start(&self.from, line, &[])?;
        // 0 bytes a second is no limit. Nothing is written meanwhile, so 10 s of downtime are none.
        let parameters = json!({ "max-bandwidth": 0, "downtime-limit": 10_000 });
        here.execute("migrate-set-parameters", parameters)?;
        Ok(here)
    }
}

/// What `send` returns is kept until `there` has got everything.
fn timed<T>(there: &mut Qemu, send: impl FnOnce() -> Result<T>) -> Result<Took> {
    let begun = Instant::now();
    let kept = send()?;
    there.completed()?;
    let took = Took::by_clock(begun.elapsed());
    drop(kept);
    Ok(took)
}
