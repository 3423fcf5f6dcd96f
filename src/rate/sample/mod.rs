//! A sample of all pages, and what it tells. No I/O.
//!
//! ```text
//! Goal --> Sampler: samples of pages, tasks when they are due --> whoever sees the pages --> Sampler --> Sampled
//! ```
//!
//! Memory is divided into strata, and from each the same number of pages is drawn. Each window of time has a sample of its own,
//! which is looked at in its beginning and its end, and of every other one a quarter at times between; another sample is looked at in the
//! beginning and the end of all, and a quarter of it at times between. A page that holds something else than before was
//! written: one that was written with what it held before is not seen, nor are two writes told from one. How many pages a window
//! takes follows from what the windows before have found, the precision that is asked for, and the CPU time that is left.

mod budget;
mod cohort;
#[cfg(test)]
mod coverage;
mod estimate;
mod random;
mod sampled;
mod sampler;
mod strata;
#[cfg(test)]
mod tests;

pub use budget::Goal;
pub use cohort::Sight;
pub use estimate::{Estimate, Mean};
pub use random::Random;
pub use sampled::Sampled;
pub use sampler::{Sampler, Task};
pub use strata::{EACH, Sample};
