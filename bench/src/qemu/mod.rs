//! The sender beside QEMU's own, onto the same stock QEMU.
//!
//! Either may be held up by what carries the bytes or by whoever takes them, so both are measured too: plain writes over as
//! many sockets, and a prepared stream that is written to the QEMU as it is.

mod machine;
mod prepared;
mod ways;

use std::collections::BTreeMap;
use std::time::Duration;

use gleaner_bitmap::PAGE_SIZE;
use gleaner_migrate::PageMemory;

use crate::kernels::random;
use crate::row::{Aim, Row};
use crate::sample::{Spread, median, ratios};
use crate::wire::line::{Kind, Line};
use crate::wire::memory::{clear, fill, same};
use crate::{Plan, Result};
use machine::{QEMU, is_there};
use ways::{Ends, Took, Way};

/// Times the rate of QEMU's best configuration over this kind of socket,
const AIM_TIMES: f64 = 1.3;
/// or so much of the lesser limit.
const AIM_SHARE: f64 = 0.95;
/// Channels of either sender: 1 is without multifd.
const CHANNELS: [u16; 3] = [1, 2, 4];

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let wanted = |kind: &Kind| lines(*kind).any(|line| plan.wants(&name(line)));
    let kinds: Vec<_> = [Kind::Unix, Kind::Tcp].into_iter().filter(wanted).collect();
    if kinds.is_empty() {
        return Ok(Vec::new());
    }
    if !is_there() {
        eprintln!("gleaner-bench: qemu skipped: no {QEMU}");
        return Ok(Vec::new());
    }
    let mut ends = Ends::new(plan.guest_pages())?;
    let mut state = 0x5eed;
    fill(&ends.from.memory, || random(&mut state))?;
    let mut rows = Vec::new();
    for kind in kinds {
        let times = Times::take(&mut ends, kind, plan.pick(5, 1))?;
        let wanted = lines(kind).filter(|line| plan.wants(&name(*line)));
        rows.extend(wanted.map(|line| times.row(line, &ends)));
    }
    Ok(rows)
}

fn lines(kind: Kind) -> impl Iterator<Item = Line> {
    CHANNELS.map(|channels| Line { kind, channels }).into_iter()
}

fn name(line: Line) -> String {
    format!("qemu/{line}")
}

/// Times over one kind of socket, turn by turn.
struct Times(BTreeMap<(Way, u16), Vec<Took>>);

impl Times {
    /// Lets all take turns, so often after one turn of warm-up, in which what arrives is compared with what was sent.
    fn take(ends: &mut Ends, kind: Kind, turns: usize) -> Result<Self> {
        let all = || lines(kind).flat_map(|line| Way::ALL.map(|way| (way, line)));
        for (way, line) in all() {
            clear(&ends.to.memory)?;
            ends.send(way, line)?;
            if !same(&ends.from.memory, &ends.to.memory)? {
                return Err(format!("{}, {way:?}: other memory arrived", name(line)).into());
            }
        }
        let mut times = BTreeMap::<_, Vec<_>>::new();
        for (way, line) in (0..turns).flat_map(|_| all()) {
            let took = ends.send(way, line)?;
            times.entry((way, line.channels)).or_default().push(took);
        }
        Ok(Self(times))
    }

    fn of(&self, way: Way, channels: u16) -> Vec<Duration> {
        let all = self.0.get(&(way, channels)).into_iter().flatten();
        all.map(|took| took.clock).collect()
    }

    fn median(&self, way: Way, channels: u16) -> f64 {
        median(self.of(way, channels).into_iter())
    }

    /// Times the rate of something else, pairwise: its time over ours.
    fn beside(&self, line: Line, other: (Way, u16)) -> Spread {
        let ours = self.of(Way::Gleaner, line.channels);
        let others = self.of(other.0, other.1);
        ratios(&others.into_iter().zip(ours).collect::<Vec<_>>())
    }

    /// Channels that a QEMU is fastest over.
    fn best(&self) -> u16 {
        let time = |channels: &u16| self.median(Way::Qemu, *channels);
        let best = CHANNELS
            .into_iter()
            .min_by(|a, b| time(a).total_cmp(&time(b)));
        best.unwrap_or(1)
    }

    /// What is slower over so many channels: taking or carrying.
    fn limit(&self, channels: u16) -> Way {
        let [receiver, socket] = [Way::Receiver, Way::Socket].map(|way| self.median(way, channels));
        if receiver > socket {
            Way::Receiver
        } else {
            Way::Socket
        }
    }

    fn row(&self, line: Line, ends: &Ends) -> Row {
        let channels = line.channels;
        let (best, limit) = (self.best(), self.limit(channels));
        let bytes = (ends.from.memory.pages() * PAGE_SIZE) as f64;
        let rate = |seconds: f64| format!("{:.2}", bytes / seconds / 1e9);
        let of = |way, channels| rate(self.median(way, channels));
        let told = self.0.get(&(Way::Qemu, best)).into_iter().flatten();
        let compared = format!(
            "{:.0} MiB at random {} GB/s; times of QEMU's best, of {} GB/s over 1, 2, 4 channels ({} by its own account); \
             the lesser limit, of QEMU's receiver {} GB/s and plain writes {} GB/s",
            bytes / f64::from(1 << 20),
            of(Way::Gleaner, channels),
            CHANNELS.map(|channels| of(Way::Qemu, channels)).join(", "),
            rate(median(told.filter_map(|took| took.told))),
            of(Way::Receiver, channels),
            of(Way::Socket, channels),
        );
        let times = self.beside(line, (Way::Qemu, best));
        let share = self.beside(line, (limit, channels));
        let aim = Aim::AtLeast(AIM_TIMES);
        let row = Row::new(name(line), aim, times, "times", compared);
        let aim = Aim::AtLeast(AIM_SHARE);
        row.or(&Row::new("", aim, share, "of the limit", ""))
    }
}
