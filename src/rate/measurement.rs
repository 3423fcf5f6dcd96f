//! What a series of looks adds up to.

use std::collections::BTreeMap;
use std::time::Duration;

use gleaner_bitmap::{BlockId, BlockInfo, PAGE_SIZE};

use super::heat::Columns;
use super::series::Series;
use super::tally::Tally;
use super::{
    BlackoutsReport, BlockReport, CurvePoint, Dirtied, Findings, Harvests, HeatMap, HotRegion,
    Look, Report, Stats, VcpuReport, Window, WindowsReport,
};
use crate::{Blackouts, Error, Result};

/// More pages than any guest has (16 TiB): each takes memory here.
const MOST_PAGES: u64 = 1 << 32;
/// Regions that are told.
const HOTTEST: usize = 10;

/// What was found in the looks so far. The same looks add up to the same, always.
#[derive(Debug)]
pub struct Measurement {
    interval: Duration,
    series: Series,
    columns: Columns,
    tallies: BTreeMap<BlockId, Tally>,
    /// Pages of the blocks.
    pages: u64,
    /// Pages of blocks that are gone.
    unique_gone: u64,
    /// Pages in the window under way of blocks that went meanwhile.
    in_window_gone: u64,
    vcpus: Vec<(u64, u64)>,
    harvests: Harvests,
    blackouts: Blackouts,
    window: Began,
    rate: Stats,
    latest: Option<Window>,
    migrated_away: bool,
}

/// The beginning of the window under way.
#[derive(Debug, Default)]
struct Began {
    look: u32,
    at: Duration,
    /// When it is over: a multiple of the interval, so that looks that come late make no window fewer.
    due: Duration,
    vcpus: Vec<(u64, u64)>,
}

impl Measurement {
    /// Of nothing yet. Windows, of which mean and variance are told, are of `interval`.
    #[must_use]
    pub fn new(interval: Duration) -> Self {
        Self {
            interval,
            series: Series::new(),
            columns: Columns::new(),
            tallies: BTreeMap::new(),
            pages: 0,
            unique_gone: 0,
            in_window_gone: 0,
            vcpus: Vec::new(),
            harvests: Harvests::default(),
            blackouts: Blackouts::default(),
            window: Began {
                due: interval,
                ..Began::default()
            },
            rate: Stats::default(),
            latest: None,
            migrated_away: false,
        }
    }

    /// Takes another look.
    ///
    /// # Errors
    /// [`Error::BadLook`] for one that can't come after those before; what of it came before the fault is taken.
    pub fn add(&mut self, look: &Look) -> Result<()> {
        if look.at < self.series.latest() {
            return Err(bad("it was before the one before"));
        }
        for info in &look.blocks {
            self.meet(info)?;
        }
        let number = self.series.begin(look.at);
        let number = number.ok_or_else(|| bad("there were too many"))?;
        let (column, halve) = self.columns.of(number);
        if halve {
            self.tallies.values_mut().for_each(Tally::halve_heat);
        }
        for extent in &look.written {
            let tally = self.tallies.get_mut(&extent.block);
            let tally =
                tally.ok_or_else(|| bad(format!("block {} was not named", extent.block)))?;
            if !tally.info().all().contains(&extent.range) {
                return Err(bad(format!("{extent:?} is outside of its block")));
            }
            let series = &mut self.series;
            let when = (number, self.window.look, column);
            tally.written(extent.range, when, |before| series.written(before));
            self.harvests.rearmed_pages += extent.range.pages;
        }
        self.series.end();
        self.vcpus.clone_from(&look.vcpus);
        self.blackouts = look.blackouts;
        self.migrated_away |= look.migrated_away;
        let took = look.harvest.as_secs_f64() * 1e3;
        self.harvests.count += 1;
        self.harvests.total_ms += took;
        self.harvests.longest_ms = self.harvests.longest_ms.max(took);
        for id in &look.gone {
            if let Some(tally) = self.tallies.remove(id) {
                self.pages -= tally.info().pages;
                self.unique_gone += tally.unique();
                self.in_window_gone += tally.in_window();
            }
        }
        if look.at >= self.window.due {
            self.end_window(number, look.at);
        }
        Ok(())
    }

    fn meet(&mut self, info: &BlockInfo) -> Result<()> {
        info.check_name()?;
        let pages = self.pages.checked_add(info.pages);
        let pages = pages.filter(|pages| *pages <= MOST_PAGES);
        self.pages =
            pages.ok_or_else(|| bad(format!("a guest of more than {MOST_PAGES} pages")))?;
        if self.tallies.contains_key(&info.id) {
            return Err(bad(format!("block {} came twice", info.id)));
        }
        self.tallies.insert(info.id, Tally::new(info));
        Ok(())
    }

    fn end_window(&mut self, look: u32, at: Duration) {
        let seconds = at.saturating_sub(self.window.at).as_secs_f64();
        let mut pages = std::mem::take(&mut self.in_window_gone);
        let mut blocks = Vec::new();
        for tally in self.tallies.values_mut() {
            let of_block = tally.end_window(seconds);
            pages += of_block;
            blocks.push((tally.info().name.clone(), bytes(of_block) / seconds));
        }
        let bytes_per_second = bytes(pages) / seconds;
        self.rate.add(bytes_per_second);
        let before: BTreeMap<_, _> = self.window.vcpus.iter().copied().collect();
        let vcpus = self.vcpus.iter().map(|(vcpu, pages)| {
            let before = before.get(vcpu).copied().unwrap_or_default();
            (*vcpu, bytes(pages.saturating_sub(before)) / seconds)
        });
        self.latest = Some(Window {
            end: at,
            bytes_per_second,
            blocks,
            vcpus: vcpus.collect(),
        });
        self.window = Began {
            look,
            at,
            due: after(at, self.interval),
            vcpus: self.vcpus.clone(),
        };
    }

    /// The guest has migrated away.
    #[must_use]
    pub const fn migrated_away(&self) -> bool {
        self.migrated_away
    }

    fn curve(&self) -> Vec<CurvePoint> {
        let mut curve = self.series.curve();
        let all = self.duration().as_secs_f64() * 1e3;
        let longest = curve.last().map_or(0.0, |point| point.measured_ms);
        if all > longest * 1.01 {
            let pages = self.unique_pages() as f64;
            curve.push(CurvePoint {
                ms: all,
                measured_ms: all,
                pages,
                deviation: 0.0,
                low: pages,
                high: pages,
                samples: 1,
                interval95: [pages; 2],
            });
        }
        curve
    }

    fn hottest(&self) -> Vec<HotRegion> {
        let mut hot = Vec::new();
        for (id, tally) in &self.tallies {
            hot.extend(tally.hot().map(|region| (region, *id)));
        }
        // In their order where they are alike.
        hot.sort_by_key(|((writes, _), _)| std::cmp::Reverse(*writes));
        hot.truncate(HOTTEST);
        let region = |((_, page), id)| self.tallies[&id].region(page);
        hot.into_iter().map(region).collect()
    }
}

impl Findings for Measurement {
    fn duration(&self) -> Duration {
        self.series.latest()
    }

    fn unique_pages(&self) -> u64 {
        self.unique_gone + self.tallies.values().map(Tally::unique).sum::<u64>()
    }

    fn latest(&self) -> Option<&Window> {
        self.latest.as_ref()
    }

    fn dirtied(&self) -> Dirtied {
        Dirtied::of(&self.curve(), self.duration(), self.pages)
    }

    fn heat(&self) -> (Vec<HeatMap<'_>>, Duration) {
        let maps = self.tallies.values().map(|tally| HeatMap {
            block: tally.info(),
            columns: tally.heat().columns(),
        });
        let looks = f64::from(self.columns.looks());
        let look = self.duration().as_secs_f64() / (self.harvests.count as f64).max(1.0);
        let column = Duration::try_from_secs_f64(look * looks).unwrap_or_default();
        (maps.collect(), column)
    }

    fn report(&self) -> Report {
        let seconds = self.duration().as_secs_f64().max(1e-9);
        let unique_pages = self.unique_pages();
        let mut rate = self.rate;
        if rate.samples == 0 {
            rate.add(bytes(unique_pages) / seconds);
        }
        let blocks = self.tallies.values().map(|tally| BlockReport {
            name: tally.info().name.clone(),
            pages: tally.info().pages,
            unique_pages: tally.unique(),
            dirty_bytes_per_second: match tally.rate() {
                Stats { samples: 0, .. } => bytes(tally.unique()) / seconds,
                rate => rate.mean,
            },
        });
        let vcpus = self.vcpus.iter().map(|(vcpu, pages)| VcpuReport {
            vcpu: *vcpu,
            pages_written: *pages,
            bytes_per_second: bytes(*pages) / seconds,
        });
        let written = self.vcpus.iter().map(|(_, pages)| *pages).sum();
        Report {
            duration_ms: seconds * 1e3,
            unique_pages,
            unique_pages_interval95: [unique_pages; 2],
            pages_written: (!self.vcpus.is_empty()).then_some(written),
            dirty_bytes_per_second: rate.mean,
            dirty_bytes_per_second_interval95: [rate.mean; 2],
            windows: WindowsReport {
                interval_ms: self.interval.as_secs_f64() * 1e3,
                bytes_per_second: rate,
            },
            curve: self.curve(),
            vcpus: vcpus.collect(),
            blocks: blocks.collect(),
            unique_pages_gone: self.unique_gone,
            hottest: self.hottest(),
            guest_pages: self.pages,
            harvests: Some(Harvests {
                mean_ms: self.harvests.total_ms / (self.harvests.count as f64).max(1.0),
                most_stall: self.harvests.total_ms / 1e3 / seconds,
                ..self.harvests
            }),
            blackouts: Some(BlackoutsReport::of(&self.blackouts)),
            sampling: None,
            migrated_away: self.migrated_away,
        }
    }

    fn blackouts(&self) -> Option<&Blackouts> {
        Some(&self.blackouts)
    }
}

/// The first multiple of `interval` after `at`.
fn after(at: Duration, interval: Duration) -> Duration {
    let interval = interval.as_nanos().max(1);
    let due = (at.as_nanos() / interval + 1).saturating_mul(interval);
    Duration::from_nanos(u64::try_from(due).unwrap_or(u64::MAX))
}

fn bytes(pages: u64) -> f64 {
    pages as f64 * PAGE_SIZE as f64
}

fn bad(reason: impl Into<String>) -> Error {
    Error::BadLook {
        reason: reason.into(),
    }
}
