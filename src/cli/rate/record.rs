//! What `--record` keeps of the looks: a [trace](gleaner_migrate::trace) for `gleaner plan`.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io::BufWriter;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gleaner_bitmap::{BlockId, BlockInfo};
use gleaner_migrate::trace::{Followed, TraceWriter};

use crate::rate::Look;

/// Records of a trace within a downtime limit: a plan can't tell apart what lies within one record.
const RECORDS_A_LIMIT: u32 = 4;

/// A trace under way. A failure ends the trace, not the measurement; a file that can't be made is told before.
pub struct Recording {
    path: PathBuf,
    /// Between two records, at least.
    interval: Duration,
    /// None after a failure.
    trace: Option<Written>,
    numbers: BTreeMap<BlockId, (usize, BlockInfo)>,
    recorded: Duration,
}

/// A trace has to know how many pages the guest has before it begins.
enum Written {
    NotBegun(BufWriter<File>),
    Begun(TraceWriter<BufWriter<File>>),
}

impl Recording {
    /// Opens the file, and empties it.
    pub fn create(path: &Path, downtime_limit: Duration) -> Result<Self, String> {
        let file = File::create(path)
            .map_err(|error| format!("can't write the trace {}: {error}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            interval: downtime_limit / RECORDS_A_LIMIT,
            trace: Some(Written::NotBegun(BufWriter::new(file))),
            numbers: BTreeMap::new(),
            recorded: Duration::ZERO,
        })
    }

    /// Takes a look. The first one has the blocks that the guest began with.
    pub fn add(&mut self, look: &Look) {
        let Some(trace) = self.trace.take() else {
            return;
        };
        match self.written(trace, look) {
            Ok(trace) => self.trace = Some(Written::Begun(trace)),
            Err(error) => note!(
                "gleaner: the trace {} ends here: {error}",
                self.path.display()
            ),
        }
    }

    fn written(
        &mut self,
        trace: Written,
        look: &Look,
    ) -> gleaner_migrate::Result<TraceWriter<BufWriter<File>>> {
        let mut trace = match trace {
            Written::Begun(trace) => trace,
            Written::NotBegun(file) => {
                let pages = look.blocks.iter().map(|info| info.pages).sum();
                TraceWriter::new(file, Followed::usual(pages))?
            }
        };
        for info in &look.blocks {
            if let Entry::Vacant(new) = self.numbers.entry(info.id) {
                new.insert((trace.block(&info.name, info.pages)?, info.clone()));
            }
        }
        for extent in &look.written {
            // The measurement has refused what is outside of its block.
            if let Some((number, _)) = self
                .numbers
                .get(&extent.block)
                .filter(|(_, info)| info.all().contains(&extent.range))
            {
                trace.dirtied(*number, extent.range);
            }
        }
        if look.at >= self.recorded + self.interval {
            trace.record(look.at)?;
            self.recorded = look.at;
        }
        Ok(trace)
    }

    /// Writes what the looks after the last record found. Whether all of the trace is there.
    pub fn end(mut self, at: Duration) -> bool {
        let mut trace = match self.trace.take() {
            Some(Written::Begun(trace)) => trace,
            Some(Written::NotBegun(_)) => return true,
            None => return false,
        };
        let ended = if at > self.recorded {
            trace.record(at)
        } else {
            Ok(())
        };
        let ended = ended.map_err(|error| error.to_string()).and_then(|()| {
            trace
                .into_inner()
                .flush()
                .map_err(|error| error.to_string())
        });
        if let Err(error) = &ended {
            note!(
                "gleaner: the trace {} ends early: {error}",
                self.path.display()
            );
        }
        ended.is_ok()
    }
}
