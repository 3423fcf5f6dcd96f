//! A guest that does what a trace says.

use gleaner_bitmap::{PageBitmap, PageRange};

use crate::policy::rehearsal::Leg;
use crate::trace::{Trace, TraceRecord, TraceRuns, scatter};
use crate::{CancelToken, Throttle};

/// Where a guest is in its trace, and what is dirty: at first all of it.
pub(super) struct TracedGuest<'a> {
    trace: &'a Trace,
    /// Microseconds of the guest's own time, passes through the whole trace included.
    now: f64,
    /// Followed pages.
    dirty: PageBitmap,
    count: u64,
    /// The followed page after the last one that was sent.
    next: u64,
    /// Whoever uses it does not want to know any more: what is dirtied is wrong from then on.
    cancel: CancelToken,
}

/// So much of a number, as a whole one.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // of less than all of it
fn share(all: u64, share: f64) -> u64 {
    ((all as f64 * share).round() as u64).min(all)
}

/// No vCPU sleeps more than 99 % of its time.
const SLOWEST: f64 = 100.0;

/// Records before, and after, that have to have a page as well that is taken to be written all the time.
const BESIDE: usize = 2;

/// Runs that are asked for pages in order.
struct InOrder<'a> {
    runs: TraceRuns<'a>,
    run: Option<PageRange>,
}

impl<'a> InOrder<'a> {
    fn new(mut runs: TraceRuns<'a>) -> Self {
        let run = runs.next();
        Self { runs, run }
    }

    fn has(&mut self, page: u64) -> bool {
        while let Some(run) = self.run {
            if page < run.end() {
                return run.first <= page;
            }
            self.run = self.runs.next();
        }
        false
    }
}

/// Part of a record: from one moment of its interval to another, 0 to 1.
struct Piece {
    record: usize,
    from: f64,
    to: f64,
}

impl Piece {
    fn is_whole(&self) -> bool {
        self.from <= 0.0 && self.to >= 1.0
    }
}

impl<'a> TracedGuest<'a> {
    pub(super) fn new(trace: &'a Trace) -> Self {
        Self {
            trace,
            now: 0.0,
            dirty: PageBitmap::all_set(trace.followed_pages()),
            count: trace.followed_pages(),
            next: 0,
            cancel: CancelToken::new(),
        }
    }

    pub(super) fn until(self, cancel: &CancelToken) -> Self {
        Self {
            cancel: cancel.clone(),
            ..self
        }
    }

    /// Lets a round pass, and returns how many pages are dirty after it. Each part of it is sent as it is dirty then.
    pub(super) fn round(&mut self, leg: Leg) -> f64 {
        let (all, parts) = (self.count, leg.parts());
        let mut sent = 0;
        for part in 1..parts {
            let until = share(all, leg.part * f64::from(part) / leg.pages);
            self.send(until - sent);
            sent = until;
            self.pass(leg.part_seconds, leg.throttle);
        }
        self.send(all - sent);
        let rest = leg.to - leg.from - leg.part_seconds * f64::from(parts - 1);
        self.pass(rest, leg.throttle);
        self.pages(self.count)
    }

    fn pass(&mut self, seconds: f64, throttle: Throttle) {
        let until = self.after(seconds, throttle);
        for piece in self.pieces(self.now, until) {
            self.write(&piece, |_| ());
        }
        self.now = until;
    }

    /// All that is dirty is sent, and then so many seconds pass: returns how many pages were dirtied in them.
    #[cfg(test)]
    pub(super) fn dirtied(&mut self, seconds: f64, throttle: Throttle) -> f64 {
        self.send(self.count);
        self.pass(seconds, throttle);
        self.pages(self.count)
    }

    /// The next so many dirty pages are clean.
    fn send(&mut self, mut followed: u64) {
        let end = self.dirty.pages();
        for part in [
            PageRange::new(self.next, end - self.next),
            PageRange::new(0, self.next),
        ] {
            let runs: Vec<_> = self.dirty.runs_in(part).collect();
            for run in runs {
                if followed == 0 {
                    return;
                }
                let sent = PageRange::new(run.first, run.pages.min(followed));
                self.dirty.clear_range(sent);
                self.count -= sent.pages;
                followed -= sent.pages;
                self.next = sent.end();
            }
        }
    }

    /// Pages that so many seconds more would make dirty, beside those that are.
    pub(super) fn more(&mut self, seconds: f64, throttle: Throttle) -> f64 {
        let (before, mut new) = (self.count, Vec::new());
        for piece in self.pieces(self.now, self.after(seconds, throttle)) {
            self.write(&piece, |page| new.push(page));
        }
        let more = self.pages(self.count) - self.pages(before);
        for page in new {
            self.dirty.clear_range(PageRange::new(page, 1));
        }
        self.count = before;
        more
    }

    fn pages(&self, followed: u64) -> f64 {
        let weight = self.trace.followed().weight() as f64;
        (followed as f64 * weight).min(self.trace.total_pages() as f64)
    }

    fn record(&self, index: usize) -> (&'a TraceRecord, f64) {
        let records = self.trace.records();
        let before = index
            .checked_sub(1)
            .map_or(0, |before| records[before].until);
        (&records[index], before as f64)
    }

    /// Where it is in its own time after so many seconds.
    fn after(&self, seconds: f64, throttle: Throttle) -> f64 {
        // To the nanosecond, so that a moment at the end of a record is not a trace of the next one.
        let time = (seconds * 1e9).round() / 1e3;
        match throttle {
            Throttle::Off => self.now + time,
            Throttle::All { percent } => self.now + time * (1.0 - f64::from(percent) / 100.0),
            Throttle::Writers { pages_per_second } => {
                self.after_at_most(time, pages_per_second.get() as f64)
            }
        }
    }

    /// As [`TracedGuest::after`], when no more than `most` pages a second may be dirtied.
    fn after_at_most(&self, time: f64, most: f64) -> f64 {
        let length = self.trace.microseconds() as f64;
        if length == 0.0 {
            return self.now + time;
        }
        let slowed = |index: usize| {
            let (record, start) = self.record(index);
            let width = record.until as f64 - start;
            let rate = self.pages(record.pages) / (width / 1e6);
            (start, width, (rate / most).clamp(1.0, SLOWEST))
        };
        let all = 0..self.trace.records().len();
        let pass: f64 = all
            .map(slowed)
            .map(|(_, width, slower)| width * slower)
            .sum();
        let passes = (time / pass).floor();
        let mut left = time - passes * pass;
        let mut base = self.now - self.now % length + passes * length;
        let mut at = self.now % length;
        // Once from here to the end, and once more: less than a pass is left.
        for _ in 0..2 {
            let first = self
                .trace
                .records()
                .partition_point(|r| r.until as f64 <= at);
            for index in first..self.trace.records().len() {
                let (start, width, slower) = slowed(index);
                let whole = (start + width - at) * slower;
                if whole >= left {
                    return base + at + left / slower;
                }
                left -= whole;
                at = start + width;
            }
            base += length;
            at = 0.0;
        }
        base
    }

    /// What lies between two moments of its own time. No more than the whole trace.
    fn pieces(&self, from: f64, to: f64) -> Vec<Piece> {
        let length = self.trace.microseconds() as f64;
        let mut pieces = Vec::new();
        if length == 0.0 {
            return pieces;
        }
        let (start, time) = (from % length, (to - from).min(length));
        let end = start + time;
        for (from, to) in [(start, end.min(length)), (0.0, end - length)] {
            let first = self
                .trace
                .records()
                .partition_point(|r| r.until as f64 <= from);
            for index in first..self.trace.records().len() {
                let (record, start) = self.record(index);
                if start >= to {
                    break;
                }
                let part = |moment: f64| (moment - start) / (record.until as f64 - start);
                pieces.push(Piece {
                    record: index,
                    from: part(from),
                    to: part(to),
                });
            }
        }
        pieces
    }

    /// Makes dirty what a piece says, and tells `new` of each page that was not.
    fn write(&mut self, piece: &Piece, mut new: impl FnMut(u64)) {
        if self.cancel.is_cancelled() {
            return;
        }
        let (record, _) = self.record(piece.record);
        if piece.is_whole() {
            for run in self.trace.runs(record) {
                if self.dirty.count_range(run) < run.pages {
                    (run.first..run.end()).for_each(|page| self.set(page, &mut new));
                }
            }
            return;
        }
        let mut beside = self.beside(piece.record);
        let salt = scatter(piece.record as u64);
        for page in self.trace.runs(record).flat_map(|run| run.first..run.end()) {
            // 53 bits of chance are a moment.
            let moment = (scatter(page ^ salt) >> 11) as f64 / (1u64 << 53) as f64;
            let then = piece.from <= moment && moment < piece.to;
            let always = beside.iter_mut().all(|runs| runs.has(page));
            if then || (always && !beside.is_empty()) {
                self.set(page, &mut new);
            }
        }
    }

    /// What the two records before and the two after dirtied.
    fn beside(&self, record: usize) -> Vec<InOrder<'a>> {
        let records = self.trace.records();
        let before = record.saturating_sub(BESIDE)..record;
        let after = record + 1..(record + 1 + BESIDE).min(records.len());
        before
            .chain(after)
            .map(|beside| InOrder::new(self.trace.runs(&records[beside])))
            .collect()
    }

    fn set(&mut self, page: u64, new: &mut impl FnMut(u64)) {
        if !self.dirty.get(page) {
            self.dirty.set(page);
            self.count += 1;
            new(page);
        }
    }
}
