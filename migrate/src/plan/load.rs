//! What a made-up guest does all the time: it writes to a part of its memory.

use gleaner_bitmap::PageRange;
use std::io::Write;

use super::random::Random;
use crate::trace::{Followed, TraceWriter};

/// Writes to a part of memory; times are seconds since the trace began.
pub(super) struct Load {
    pub(super) way: Way,
    /// Where: first and end, as shares of all memory.
    pub(super) place: Box<dyn Fn(f64) -> (f64, f64)>,
    /// Writes a second, each to a page.
    pub(super) writes: Box<dyn Fn(f64) -> f64>,
}

/// Which page comes next.
pub(super) enum Way {
    /// Any.
    Random,
    /// The one after the last one, so far from the start of its place.
    Sweep(f64),
}

impl Load {
    pub(super) fn random(
        place: impl Fn(f64) -> (f64, f64) + 'static,
        writes: impl Fn(f64) -> f64 + 'static,
    ) -> Self {
        Self {
            way: Way::Random,
            place: Box::new(place),
            writes: Box::new(writes),
        }
    }

    pub(super) fn sweep(
        place: impl Fn(f64) -> (f64, f64) + 'static,
        writes: impl Fn(f64) -> f64 + 'static,
    ) -> Self {
        Self {
            way: Way::Sweep(0.0),
            ..Self::random(place, writes)
        }
    }

    /// Writes for `interval` seconds until `now`.
    pub(super) fn run<W: Write>(
        &mut self,
        memory: &mut Memory<'_, W>,
        now: f64,
        interval: f64,
        random: &mut Random,
    ) {
        let place = memory.part((self.place)(now));
        let writes = (self.writes)(now) * interval;
        match &mut self.way {
            Way::Random => memory.hit(place, writes, random),
            Way::Sweep(next) => {
                memory.sweep(place, *next, writes);
                *next = (*next + writes) % place.pages as f64;
            }
        }
    }
}

/// The memory of a made-up guest, and the trace that it leaves.
pub(super) struct Memory<'a, W> {
    pub(super) writer: &'a mut TraceWriter<W>,
    pub(super) block: usize,
    pub(super) followed: Followed,
    pub(super) pages: u64,
}

impl<W: Write> Memory<'_, W> {
    fn part(&self, (first, end): (f64, f64)) -> PageRange {
        let page = |share: f64| whole(share * self.pages as f64).min(self.pages);
        let first = page(first).min(self.pages - 1);
        PageRange::new(first, page(end).saturating_sub(first).max(1))
    }

    /// So many writes, each to any page of a place.
    fn hit(&mut self, place: PageRange, writes: f64, random: &mut Random) {
        let groups = self.followed.among(place, self.pages);
        let chance = 1.0 - (-writes / place.pages as f64).exp();
        for group in random.some(groups.pages, chance) {
            self.writer
                .groups(self.block, PageRange::new(groups.first + group, 1));
        }
    }

    /// So many writes, each to the page after the last one, from `from` of the place on and round it.
    fn sweep(&mut self, place: PageRange, from: f64, writes: f64) {
        let (first, end) = (whole(from), whole(from + writes.min(place.pages as f64)));
        let round = end.saturating_sub(place.pages).min(first);
        let (from, to) = (first.min(place.pages), end.min(place.pages));
        for range in [
            PageRange::new(place.first + from, to - from),
            PageRange::new(place.first, round),
        ] {
            self.writer.dirtied(self.block, range);
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates
fn whole(pages: f64) -> u64 {
    pages as u64
}
