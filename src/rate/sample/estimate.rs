//! What a sample tells of all pages, and how far off that may be.

use gleaner_migrate::policy::Bounds;

use super::strata::{EACH, Sample};

/// So many standard deviations from the mean are 95 % of a normal distribution.
const Z: f64 = Bounds::DEVIATIONS;

/// Which part of all pages is dirty, as one sample or several tell it.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Estimate {
    /// The part, 0 to 1.
    pub part: f64,
    /// Variance of that.
    pub variance: f64,
    /// Third moment over variance: how much more the one grows with the other.
    skew: f64,
    /// Sum of the squares of what its parts bring to the variance, each by what is known of it: how far off the variance is.
    unsure: f64,
    /// The part that a single page of the sample stands for, beyond itself.
    grain: f64,
    /// Pages of the samples.
    pub looked_at: u64,
    /// Those of them that were dirty.
    pub dirty: u64,
}

impl Estimate {
    /// From one sample, of each of whose strata the first `each` pages were looked at: 2 at least, unless it has fewer.
    /// `dirty` says of each page that is drawn whether it was dirty.
    #[must_use]
    pub fn of(sample: &Sample, each: usize, dirty: impl Fn(usize) -> bool) -> Self {
        let pages = sample.pages() as f64;
        let mut found = Self::default();
        // Neighbouring strata together tell of the skew: two pages of each would not.
        let mut group = Group::default();
        let (mut third, mut second) = (0.0, 0.0);
        for (stratum, drawn) in sample.drawn().chunks(EACH).enumerate() {
            let looked_at = each.min(drawn.len());
            let count = (0..looked_at)
                .filter(|at| dirty(stratum * EACH + at))
                .count();
            let (n, of) = (looked_at as f64, sample.stratum_pages(stratum) as f64);
            let part = count as f64 / n;
            let weight = of / pages;
            found.part += weight * part;
            // Of a stratum of a single page all is known.
            let spread = part * (1.0 - part) / (n - 1.0).max(1.0);
            let variance = weight * weight * spread * (1.0 - n / of);
            found.variance += variance;
            found.unsure += variance * variance / (n - 1.0).max(1.0);
            found.looked_at += looked_at as u64;
            found.dirty += count as u64;
            group.add(n, count as f64);
            if group.n >= EACH as f64 {
                let (more_third, more_second) = group.moments();
                third += more_third;
                second += more_second;
                group = Group::default();
            }
        }
        let all = found.looked_at as f64;
        let known = all / pages;
        found.grain = (1.0 - known) / all;
        let skew = if second > 0.0 {
            (third / second).clamp(-1.0, 1.0)
        } else {
            1.0 - 2.0 * found.part
        };
        found.skew = skew * (1.0 - 2.0 * known) / all;
        found
    }

    /// Where the part is with 95 % certainty.
    ///
    /// The score interval: the variance at each end is not that of the estimate, but grows with the part from there as it does
    /// here. For scattered pages it is that of Wilson. It covers 94 to 96 % where the estimate is as uncertain as that of 40
    /// dirty pages or more by themselves, and no less than 93 % elsewhere, as a simulation with 20,000 trials a case has it;
    /// with so few, no rule that knows nothing but a count can do better.
    #[must_use]
    pub fn interval95(&self) -> [f64; 2] {
        let square = Z * Z;
        let (low, high) = if self.variance > 0.0 {
            let centre = self.part + square * self.skew / 2.0;
            let grain = self.skew.abs().max(self.grain);
            let off = self.deviations() * (self.variance + square * grain * grain / 4.0).sqrt();
            (centre - off, centre + off)
        } else {
            // All that was looked at in a stratum was alike, as well it may be with a few pages that are not.
            let off = square * self.grain;
            let low = if self.dirty > 0 { self.part - off } else { 0.0 };
            let all = self.dirty == self.looked_at;
            (low, if all { 1.0 } else { self.part + off })
        };
        [low.clamp(0.0, self.part), high.clamp(self.part, 1.0)]
    }

    /// How many standard deviations are 95 %, with a variance that is not known but estimated: Student's, by twice the degrees of
    /// freedom that Satterthwaite takes it to have, since the skew accounts for a part of what is not known.
    fn deviations(&self) -> f64 {
        let freedom = (2.0 * self.variance * self.variance / self.unsure).max(3.0);
        let first = (Z.powi(3) + Z) / (4.0 * freedom);
        let second = (5.0 * Z.powi(5) + 16.0 * Z.powi(3) + 3.0 * Z) / (96.0 * freedom * freedom);
        Z + first + second
    }

    /// Standard deviation over the part itself; infinite where nothing was dirty.
    #[must_use]
    pub fn relative_error(&self) -> f64 {
        if self.part > 0.0 {
            self.variance.sqrt() / self.part
        } else {
            f64::INFINITY
        }
    }
}

/// Strata whose pages are taken together.
#[derive(Default)]
struct Group {
    n: f64,
    dirty: f64,
}

impl Group {
    fn add(&mut self, n: f64, dirty: f64) {
        self.n += n;
        self.dirty += dirty;
    }

    /// Third and second moment of one page, without bias.
    fn moments(&self) -> (f64, f64) {
        let part = self.dirty / self.n;
        let second = part * (1.0 - part);
        (
            second * (1.0 - 2.0 * part) * self.n / (self.n - 2.0),
            second,
        )
    }
}

/// The mean of estimates that know nothing of each other, each of its own time.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Mean {
    /// Sums; of the skew those by variance.
    sums: Estimate,
    skew_alone: f64,
    number: u32,
}

impl Mean {
    /// Takes another one.
    pub fn add(&mut self, of: &Estimate) {
        let sums = &mut self.sums;
        sums.part += of.part;
        sums.variance += of.variance;
        sums.skew += of.skew * of.variance;
        sums.unsure += of.unsure;
        sums.grain += of.grain;
        sums.looked_at += of.looked_at;
        sums.dirty += of.dirty;
        self.skew_alone += of.skew;
        self.number += 1;
    }

    /// How many there were.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// Of all that were taken; `None` of none.
    #[must_use]
    pub fn estimate(&self) -> Option<Estimate> {
        if self.number == 0 {
            return None;
        }
        let (sums, number) = (&self.sums, f64::from(self.number));
        let skew = if sums.variance > 0.0 {
            sums.skew / sums.variance
        } else {
            self.skew_alone / number
        };
        Some(Estimate {
            part: sums.part / number,
            variance: sums.variance / number.powi(2),
            skew: skew / number,
            unsure: sums.unsure / number.powi(4),
            grain: sums.grain / number.powi(2),
            ..*sums
        })
    }
}
