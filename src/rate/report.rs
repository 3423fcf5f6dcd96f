//! What a meter found, as it is told.

use serde::Serialize;

use super::Stats;
use crate::Blackouts;

/// What a meter found. Pages have 4096 bytes; times end in `_ms`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Report {
    /// How long it was metered.
    pub duration_ms: f64,
    /// Pages that were written at least once in the whole duration.
    pub unique_pages: u64,
    /// Where the number of unique pages is with 95 % certainty, both included: equal where it is counted.
    pub unique_pages_interval95: [u64; 2],
    /// Pages that the vCPUs have dirtied, as KVM's rings have it: a page counts again when it is written after a harvest.
    /// `None` unless it is known who writes.
    pub pages_written: Option<u64>,
    /// Bytes of different pages a second: the mean of the windows.
    pub dirty_bytes_per_second: f64,
    /// Where that mean is with 95 % certainty: equal where it is counted.
    pub dirty_bytes_per_second_interval95: [f64; 2],
    /// The windows, one after the other.
    pub windows: WindowsReport,
    /// How many different pages are written in a time.
    pub curve: Vec<CurvePoint>,
    /// The vCPUs, in order; none unless it is known who writes.
    pub vcpus: Vec<VcpuReport>,
    /// The blocks that are there, in the order in which they came.
    pub blocks: Vec<BlockReport>,
    /// Different pages written of blocks that are gone, up to the last look before each went.
    pub unique_pages_gone: u64,
    /// Where most is written, the hottest first.
    pub hottest: Vec<HotRegion>,
    /// Pages of the blocks that are there.
    pub guest_pages: u64,
    /// What metering cost, where every page is counted.
    pub harvests: Option<Harvests>,
    /// How long the guest has stood still for slot transactions since its tracker began, where that is known.
    pub blackouts: Option<BlackoutsReport>,
    /// How pages were sampled, where they were.
    pub sampling: Option<Sampling>,
    /// The guest has migrated away.
    pub migrated_away: bool,
}

/// Windows, each of which counts a page once, in bytes a second.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct WindowsReport {
    /// Length of a window; its own figures go by the time that it really took.
    pub interval_ms: f64,
    /// The windows that are over, or one that is shorter where none is.
    #[serde(flatten)]
    pub bytes_per_second: Stats,
}

/// A point of the dirty curve.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct CurvePoint {
    /// The time.
    pub ms: f64,
    /// The time that its windows really took, on average.
    pub measured_ms: f64,
    /// Different pages written in it, on average.
    pub pages: f64,
    /// Standard deviation from that.
    pub deviation: f64,
    /// The least.
    pub low: f64,
    /// The most.
    pub high: f64,
    /// Windows, which overlap where each page is counted.
    pub samples: u64,
    /// Where the average is with 95 % certainty: equal where it is counted.
    pub interval95: [f64; 2],
}

/// A vCPU.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct VcpuReport {
    /// Its id.
    pub vcpu: u64,
    /// Pages that it has dirtied; a page counts again when it is written after a harvest.
    pub pages_written: u64,
    /// The same by time.
    pub bytes_per_second: f64,
}

/// A block.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct BlockReport {
    /// Its name.
    pub name: String,
    /// Its length.
    pub pages: u64,
    /// Pages written at least once.
    pub unique_pages: u64,
    /// Bytes of different pages a second: the mean of the windows.
    pub dirty_bytes_per_second: f64,
}

/// A region of a block.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct HotRegion {
    /// The block's name.
    pub block: String,
    /// Its first page in the block.
    pub first_page: u64,
    /// Its length.
    pub pages: u64,
    /// Pages written at least once.
    pub unique_pages: u64,
    /// Pages written, counted again in each look.
    pub pages_seen: u64,
}

/// What metering cost the guest.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Harvests {
    /// Looks, each of which is a harvest.
    pub count: u64,
    /// All of them.
    pub total_ms: f64,
    /// The mean.
    pub mean_ms: f64,
    /// The longest.
    pub longest_ms: f64,
    /// The guest's stall because of them, in parts of its time, is no more than this: a vCPU goes on during a harvest, and
    /// one that meets KVM's lock, or a full ring, waits for its end at most.
    pub most_stall: f64,
    /// Pages that were armed again: the next write to each of them takes one more fault.
    pub rearmed_pages: u64,
}

/// How long the guest stood still for slot transactions: harvests stop nobody, these do.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub struct BlackoutsReport {
    /// Transactions.
    pub count: u64,
    /// All of them.
    pub total_ms: f64,
    /// The longest.
    pub longest_ms: f64,
    /// The time until every vCPU was out of `KVM_RUN`, in all of them.
    pub kick_ms: f64,
    /// The harvests inside.
    pub harvest_ms: f64,
    /// KVM's own calls.
    pub calls_ms: f64,
    /// Everything else.
    pub rest_ms: f64,
    /// How many were how long, up to the longest.
    pub histogram: Vec<Within>,
}

/// A point of a histogram.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Within {
    /// So long at most; `None` in the last point, which has all.
    pub up_to_ms: Option<f64>,
    /// So many were.
    pub count: u64,
}

impl BlackoutsReport {
    pub(super) fn of(blackouts: &Blackouts) -> Self {
        let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        let whole = &blackouts.whole;
        let all = whole.count();
        let below = whole.within().filter(|(_, count)| *count < all).count();
        let some = whole.within().take(if all > 0 { below + 1 } else { 0 });
        Self {
            count: all,
            total_ms: ms(whole.total()),
            longest_ms: ms(whole.longest()),
            kick_ms: ms(blackouts.kick.total()),
            harvest_ms: ms(blackouts.harvest.total()),
            calls_ms: ms(blackouts.calls.total()),
            rest_ms: ms(blackouts.rest.total()),
            histogram: some
                .map(|(up_to, count)| Within {
                    up_to_ms: up_to.map(ms),
                    count,
                })
                .collect(),
        }
    }
}

/// How pages were sampled.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Sampling {
    /// Pages that were drawn, one that was drawn again counting again.
    pub sampled_pages: u64,
    /// Looks at them.
    pub looks: u64,
    /// Standard error of the dirty rate over the rate itself, as it was asked for.
    pub precision_asked: f64,
    /// The same as it was reached; `None` where no page was seen to change.
    pub precision_reached: Option<f64>,
    /// CPU time over time, of one CPU, as it was asked for.
    pub cpu_asked: f64,
    /// The same as it was used, by the whole process.
    pub cpu_used: f64,
}
