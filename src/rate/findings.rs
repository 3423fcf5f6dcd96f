//! What a meter has found, by whatever way.

use std::time::Duration;

use gleaner_bitmap::BlockInfo;

use super::{Dirtied, Report};
use crate::Blackouts;

/// What was found so far.
pub trait Findings {
    /// How long was metered.
    fn duration(&self) -> Duration;

    /// Pages that were written at least once.
    fn unique_pages(&self) -> u64;

    /// The latest window that is over.
    fn latest(&self) -> Option<&Window>;

    /// What the guest dirties in any time.
    fn dirtied(&self) -> Dirtied;

    /// Pages written by time and place, block by block, and how long a column lasts.
    fn heat(&self) -> (Vec<HeatMap<'_>>, Duration);

    /// How long the guest has stood still for slot transactions since its tracker began, where that is known.
    fn blackouts(&self) -> Option<&Blackouts>;

    /// All of it.
    fn report(&self) -> Report;
}

/// A window that is over.
#[derive(Clone, PartialEq, Debug)]
pub struct Window {
    /// When it was over.
    pub end: Duration,
    /// Bytes of different pages a second.
    pub bytes_per_second: f64,
    /// The same by block, in their order.
    pub blocks: Vec<(String, f64)>,
    /// Bytes a second that each vCPU has dirtied, a page counting again after each harvest.
    pub vcpus: Vec<(u64, f64)>,
}

/// Where and when a block was written.
#[derive(Clone, Copy, Debug)]
pub struct HeatMap<'a> {
    /// The block.
    pub block: &'a BlockInfo,
    /// Pages seen written, by time. Each column has as many bands of the block, from its start to its end; columns at the end
    /// in which nothing was written are left out.
    pub columns: &'a [Vec<u64>],
}
