//! What the samples add up to.

use std::collections::BTreeMap;
use std::time::Duration;

use gleaner_bitmap::{BlockInfo, PAGE_SIZE};

use super::budget::Goal;
use super::estimate::{Estimate, Mean};
use crate::Blackouts;
use crate::rate::heat::{Columns, Heat};
use crate::rate::{
    BlockReport, CurvePoint, Dirtied, Findings, HeatMap, Report, Sampling, Stats, Window,
    WindowsReport,
};

/// What was found in samples so far.
#[derive(Debug)]
pub struct Sampled {
    goal: Goal,
    blocks: Vec<OfBlock>,
    pages: u64,
    /// When something was found last.
    at: Duration,
    times: BTreeMap<Duration, OfTime>,
    windows: OfTime,
    latest: Option<Window>,
    columns: Columns,
    whole: Option<Whole>,
    there: Estimate,
    sampling: Sampling,
}

#[derive(Debug)]
struct OfBlock {
    info: BlockInfo,
    heat: Heat,
    /// Bytes a second by window.
    rate: Stats,
}

/// What changes in a time.
#[derive(Debug, Default)]
struct OfTime {
    mean: Mean,
    parts: Stats,
    seconds: Stats,
}

/// What has changed since the beginning.
#[derive(Debug)]
struct Whole {
    estimate: Estimate,
    time: Duration,
    /// Pages by block.
    blocks: Vec<f64>,
}

impl OfTime {
    fn add(&mut self, took: Duration, estimate: &Estimate) {
        self.mean.add(estimate);
        self.parts.add(estimate.part);
        self.seconds.add(took.as_secs_f64());
    }

    fn point(&self, time: Duration, pages: f64) -> Option<CurvePoint> {
        let estimate = self.mean.estimate()?;
        // What varies beyond what chance does to the samples.
        let chance = estimate.variance * f64::from(self.mean.number());
        Some(CurvePoint {
            ms: time.as_secs_f64() * 1e3,
            measured_ms: self.seconds.mean * 1e3,
            pages: estimate.part * pages,
            deviation: (self.parts.variance - chance).max(0.0).sqrt() * pages,
            low: self.parts.low * pages,
            high: self.parts.high * pages,
            samples: self.parts.samples,
            interval95: estimate.interval95().map(|end| end * pages),
        })
    }
}

impl Sampled {
    /// Of nothing yet. The pages are those of the blocks, one block after the other.
    #[must_use]
    pub fn new(goal: Goal, blocks: Vec<BlockInfo>) -> Self {
        let of = |info: BlockInfo| OfBlock {
            heat: Heat::new(info.pages),
            rate: Stats::default(),
            info,
        };
        Self {
            goal,
            pages: blocks.iter().map(|block| block.pages).sum(),
            blocks: blocks.into_iter().map(of).collect(),
            at: Duration::ZERO,
            times: BTreeMap::new(),
            windows: OfTime::default(),
            latest: None,
            columns: Columns::new(),
            whole: None,
            there: Estimate::default(),
            sampling: Sampling {
                precision_asked: goal.precision,
                cpu_asked: goal.cpu,
                ..Sampling::default()
            },
        }
    }

    /// Pages of the blocks.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages that had contents in the beginning.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a part of the pages
    pub fn data_pages(&self) -> u64 {
        (self.there.part * self.pages as f64).round() as u64
    }

    /// Windows that are over.
    pub(super) const fn windows(&self) -> u64 {
        self.windows.parts.samples
    }

    /// The part dirty in a window, and the sum of the variances of all that are over.
    pub(super) fn so_far(&self) -> (Option<f64>, f64) {
        let mean = self.windows.mean.estimate();
        let number = f64::from(self.windows.mean.number());
        let variance = mean.map_or(0.0, |e| e.variance * number * number);
        (mean.map(|e| e.part), variance)
    }

    pub(super) const fn draw(&mut self, pages: u64) {
        self.sampling.sampled_pages += pages;
    }

    pub(super) fn cost(&mut self, looks: u64, cpu_seconds: f64) {
        self.sampling.looks = looks;
        self.sampling.cpu_used = cpu_seconds / self.at.as_secs_f64().max(1e-3);
    }

    pub(super) const fn there(&mut self, estimate: &Estimate) {
        self.there = *estimate;
    }

    /// So much has changed in a time.
    pub(super) fn time(&mut self, time: Duration, took: Duration, estimate: &Estimate) {
        self.times.entry(time).or_default().add(took, estimate);
    }

    /// Since the beginning.
    pub(super) fn whole(
        &mut self,
        at: Duration,
        took: Duration,
        estimate: &Estimate,
        changed: impl Iterator<Item = (u64, f64)>,
    ) {
        self.at = self.at.max(at);
        let mut blocks = vec![0.0; self.blocks.len()];
        for (page, weight) in changed {
            if let Some((block, _)) = place(&self.blocks, page) {
                blocks[block] += weight;
            }
        }
        self.whole = Some(Whole {
            estimate: *estimate,
            time: took,
            blocks,
        });
    }

    /// A window is over.
    pub(super) fn window(
        &mut self,
        at: Duration,
        took: Duration,
        estimate: &Estimate,
        changed: impl Iterator<Item = (u64, f64)>,
    ) {
        self.at = self.at.max(at);
        self.windows.add(took, estimate);
        let number = u32::try_from(self.windows()).unwrap_or(u32::MAX);
        let (column, halve) = self.columns.of(number);
        if halve {
            self.blocks.iter_mut().for_each(|block| block.heat.halve());
        }
        let mut pages = vec![0.0; self.blocks.len()];
        for (page, weight) in changed {
            if let Some((block, page)) = place(&self.blocks, page) {
                pages[block] += weight;
                let heat = &mut self.blocks[block].heat;
                heat.written_like(column, page, whole(weight));
            }
        }
        let seconds = took.as_secs_f64().max(1e-9);
        let mut blocks = Vec::new();
        for (block, pages) in self.blocks.iter_mut().zip(pages) {
            let rate = bytes(pages) / seconds;
            block.rate.add(rate);
            blocks.push((block.info.name.clone(), rate));
        }
        self.latest = Some(Window {
            end: at,
            bytes_per_second: bytes(estimate.part * self.pages as f64) / seconds,
            blocks,
            vcpus: Vec::new(),
        });
    }

    /// Bytes a second, and where they are.
    fn rate(&self) -> (f64, [f64; 2]) {
        let seconds = self.windows.seconds.mean.max(1e-9);
        let Some(estimate) = self.windows.mean.estimate() else {
            let most = bytes(self.pages as f64) / self.goal.interval.as_secs_f64();
            return (0.0, [0.0, most]);
        };
        let rate = |part: f64| bytes(part * self.pages as f64) / seconds;
        (rate(estimate.part), estimate.interval95().map(rate))
    }

    /// Pages written since the beginning, and where they are.
    fn unique(&self) -> (u64, [u64; 2]) {
        let pages = self.pages as f64;
        let longest = || self.curve().pop().map(|p| (p.pages, p.interval95));
        let found = match &self.whole {
            Some(found) => Some((
                found.estimate.part * pages,
                found.estimate.interval95().map(|end| end * pages),
            )),
            None => longest(),
        };
        let (likely, [low, high]) = found.unwrap_or((0.0, [0.0, pages]));
        (whole(likely), [whole(low.floor()), whole(high.ceil())])
    }

    fn curve(&self) -> Vec<CurvePoint> {
        let pages = self.pages as f64;
        let points = self.times.iter();
        let mut curve: Vec<_> = points.filter_map(|(t, of)| of.point(*t, pages)).collect();
        let window = self.windows.point(self.goal.interval, pages);
        curve.extend(window);
        if let Some(found) = &self.whole {
            let mut of = OfTime::default();
            of.add(found.time, &found.estimate);
            let time = self.goal.duration.unwrap_or(found.time);
            // The whole time may be one window.
            curve.retain(|point| point.measured_ms < found.time.as_secs_f64() * 990.0);
            curve.extend(of.point(time, pages));
        }
        curve.sort_by(|a, b| a.ms.total_cmp(&b.ms));
        curve
    }
}

impl Findings for Sampled {
    fn duration(&self) -> Duration {
        self.at
    }

    fn unique_pages(&self) -> u64 {
        self.unique().0
    }

    fn latest(&self) -> Option<&Window> {
        self.latest.as_ref()
    }

    fn dirtied(&self) -> Dirtied {
        Dirtied::of(&self.curve(), self.at, self.pages)
    }

    fn heat(&self) -> (Vec<HeatMap<'_>>, Duration) {
        let maps = self.blocks.iter().map(|block| HeatMap {
            block: &block.info,
            columns: block.heat.columns(),
        });
        (maps.collect(), self.goal.interval * self.columns.looks())
    }

    fn blackouts(&self) -> Option<&Blackouts> {
        None
    }

    fn report(&self) -> Report {
        let (rate, rate_interval) = self.rate();
        let (unique, unique_interval) = self.unique();
        let mut windows = Stats::default();
        if let Some(estimate) = self.windows.mean.estimate() {
            // The same in bytes a second.
            let each = rate / estimate.part.max(1e-12);
            windows = self.windows.parts;
            for value in [&mut windows.mean, &mut windows.low, &mut windows.high] {
                *value *= each;
            }
            windows.variance *= each * each;
        }
        let blocks = self.blocks.iter().enumerate().map(|(at, block)| {
            let whole_time = self.whole.as_ref().map(|found| whole(found.blocks[at]));
            BlockReport {
                name: block.info.name.clone(),
                pages: block.info.pages,
                unique_pages: whole_time.unwrap_or(0),
                dirty_bytes_per_second: block.rate.mean,
            }
        });
        let reached = self.windows.mean.estimate().map(|e| e.relative_error());
        let watched = match (&self.whole, self.goal.duration) {
            (Some(found), Some(_)) => found.time,
            _ => self.at,
        };
        Report {
            duration_ms: watched.as_secs_f64() * 1e3,
            unique_pages: unique,
            unique_pages_interval95: unique_interval,
            pages_written: None,
            dirty_bytes_per_second: rate,
            dirty_bytes_per_second_interval95: rate_interval,
            windows: WindowsReport {
                interval_ms: self.goal.interval.as_secs_f64() * 1e3,
                bytes_per_second: windows,
            },
            curve: self.curve(),
            vcpus: Vec::new(),
            blocks: blocks.collect(),
            unique_pages_gone: 0,
            hottest: Vec::new(),
            guest_pages: self.pages,
            harvests: None,
            blackouts: None,
            sampling: Some(Sampling {
                precision_reached: reached.filter(|reached| reached.is_finite()),
                ..self.sampling
            }),
            migrated_away: false,
        }
    }
}

/// Where a page is: the block, and its number there.
fn place(blocks: &[OfBlock], mut page: u64) -> Option<(usize, u64)> {
    for (at, block) in blocks.iter().enumerate() {
        if page < block.info.pages {
            return Some((at, page));
        }
        page -= block.info.pages;
    }
    None
}

fn bytes(pages: f64) -> f64 {
    pages * PAGE_SIZE as f64
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates
fn whole(pages: f64) -> u64 {
    pages.round() as u64
}
