//! The rate meter: what a guest writes, page by page, beside whatever else is going on.
//!
//! ```text
//! Meter (here), service::MeterClient --> Look, some 20 a second --> Measurement --> Report, Dirtied --> Verdict
//! ```
//!
//! A [`Meter`] is one more consumer of the dirty store: it shares every harvest with a running migration, takes nothing from
//! it, and stops nobody. What it finds is exact: each page that was written is in the look after it. Two things are added to
//! that. KVM reports a page before its write, so a page a vCPU may come at each edge that is not written yet. With the log
//! switched on, for the first consumer, KVM may map anew what the guest reads, and report that once. And pages of a block
//! that is unplugged count up to the last look before.

mod dirtied;
mod findings;
mod heat;
mod measurement;
mod meter;
#[cfg(feature = "cli")]
pub mod process;
mod report;
pub mod sample;
mod series;
mod stats;
mod tally;
#[cfg(test)]
mod tests;
mod verdict;

pub use dirtied::Dirtied;
pub use findings::{Findings, HeatMap, Window};
pub use measurement::Measurement;
pub use meter::{Look, Meter, Metered};
pub use report::{
    BlackoutsReport, BlockReport, CurvePoint, Harvests, HotRegion, Report, Sampling, VcpuReport,
    WindowsReport, Within,
};
pub use stats::Stats;
#[cfg(feature = "cli")]
pub(crate) use verdict::glance;
pub use verdict::{Link, Needs, Verdict, judge};
