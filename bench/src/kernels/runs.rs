//! From bitmaps to runs.
//!
//! All sides hand every run on in slices, out of memory that stays in a near cache; Cloud Hypervisor's shape makes a table of
//! them first, because that is what it is.

use std::hint::black_box;
use std::time::Duration;

use gleaner_bitmap::{PageRange, Runs};

use super::bitmaps::Shape;
use super::{Clock, GUESTS, Guest, in_turn, least, others};
use crate::row::{Aim, Row};
use crate::sample::Spread;
use crate::{Plan, Result};

const SHAPES: [(&str, Shape); 10] = [
    ("zero", Shape::Words(0)),
    ("0.01%", Shape::Random(100)),
    ("0.1%", Shape::Random(1000)),
    ("1%", Shape::Random(10_000)),
    ("10%", Shape::Random(100_000)),
    ("50%", Shape::Random(500_000)),
    ("8-page-runs", Shape::Runs(8)),
    ("512-page-runs", Shape::Runs(512)),
    ("ones", Shape::Words(u64::MAX)),
    ("alternating", Shape::Words(0x5555_5555_5555_5555)),
];

/// The least that may be reached in any shape, of the better of both other ways.
const WORST: f64 = 0.95;

/// One of the ratios.
type Of = fn(&Ratios) -> &Vec<f64>;

/// Bitmaps of small guests that a pass goes over: one alone is learnt by heart by the processor's branch prediction.
const MANY: usize = 64;

/// A way from a bitmap to its runs, which may use a buffer, and hands slices of them on.
type Way<'a> = &'a dyn Fn(&[u64], &mut Vec<PageRange>, &mut dyn FnMut(&[PageRange]));

/// Times faster than each other way, a figure for each round.
struct Ratios {
    table: Vec<f64>,
    buffered: Vec<f64>,
    bits: Vec<f64>,
}

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut all: Vec<Ratios> = Vec::new();
    let mut worst: Option<(f64, Row)> = None;
    for guest in GUESTS.iter().take(plan.pick(3, 1)) {
        for (name, shape) in SHAPES {
            let name = format!("kernels/runs/{}/{name}", guest.name);
            // What is over all shapes needs all of them.
            let summed = ["kernels/runs/geomean", "kernels/runs/worst"];
            if !plan.wants(&name) && !summed.iter().any(|sum| plan.wants(sum)) {
                continue;
            }
            let (ratios, least, compared) = measure(plan, *guest, shape, &name)?;
            let row = |name: &str| Row::new(name, Aim::AtLeast(WORST), least, "times", &compared);
            if worst.as_ref().is_none_or(|(most, _)| least.median < *most) {
                let row = Row::new(
                    "kernels/runs/worst",
                    Aim::AtLeast(WORST),
                    least,
                    "times",
                    format!("{name}: {compared}"),
                );
                worst = Some((least.median, row));
            }
            rows.extend(plan.wants(&name).then(|| row(&name)));
            all.push(ratios);
        }
    }
    let means: [(&str, f64, Of, &str); 3] = [
        (
            "vs-positions",
            8.0,
            |r| &r.table,
            "positions of set bits, coalesced into a table",
        ),
        (
            "vs-positions-buffered",
            8.0,
            |r| &r.buffered,
            "the same without its table, out of a buffer that is used again",
        ),
        ("vs-bits", 5.0, |r| &r.bits, "a tight loop over all bits"),
    ];
    for (name, aim, of, what) in means {
        let name = format!("kernels/runs/geomean/{name}");
        if !all.is_empty() && plan.wants(&name) {
            let compared = format!("over {} shapes and sizes, beside {what}", all.len());
            let mean = geomean(&all.iter().map(of).collect::<Vec<_>>());
            rows.push(Row::new(name, Aim::AtLeast(aim), mean, "times", compared));
        }
    }
    rows.extend(
        worst
            .map(|(_, row)| row)
            .filter(|_| plan.wants("kernels/runs/worst")),
    );
    Ok(rows)
}

/// The geometric mean over all shapes in each round.
fn geomean(all: &[&Vec<f64>]) -> Spread {
    let rounds = all.iter().map(|ratios| ratios.len()).min().unwrap_or(0);
    let mean = |round: usize| {
        let logs: f64 = all.iter().map(|ratios| ratios[round].ln()).sum();
        (logs / all.len() as f64).exp()
    };
    Spread::of((0..rounds).map(mean).collect())
}

/// Some number that depends on every run and its place, and the number of runs.
#[derive(Default, PartialEq, Debug)]
struct Sum(u64, u64);

impl Sum {
    fn add(&mut self, runs: &[PageRange]) {
        for run in runs {
            self.0 =
                self.0.rotate_left(5) ^ run.first.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ run.pages;
            self.1 += 1;
        }
    }
}

/// Each batch of our runs.
fn ours(words: &[u64], each: &mut dyn FnMut(&[PageRange])) {
    let mut runs = Runs::new(words, 0, words.len() as u64 * 64);
    loop {
        let batch = runs.batch();
        if batch.is_empty() {
            return;
        }
        each(batch);
    }
}

fn measure(
    plan: &Plan,
    guest: Guest,
    shape: Shape,
    name: &str,
) -> Result<(Ratios, Spread, String)> {
    let count = if guest.words < GUESTS[1].words {
        MANY
    } else {
        1
    };
    let bitmaps: Vec<_> = (1..=count as u64)
        .map(|seed| shape.bitmap(guest.words, seed))
        .collect();
    let buffer = &mut Vec::new();

    let mut want = Sum::default();
    let mut sums: [Sum; 4] = Default::default();
    for bitmap in &bitmaps {
        want.add(&others::runs_by_positions(bitmap));
        ours(bitmap, &mut |runs| sums[0].add(runs));
        others::runs_by_positions_buffered(bitmap, buffer, &mut |runs| sums[1].add(runs));
        others::runs_by_bits(bitmap, buffer, &mut |runs| sums[2].add(runs));
        others::runs_by_bitvec(bitmap, buffer, &mut |runs| sums[3].add(runs));
    }
    if let Some(wrong) = sums.iter().find(|sum| **sum != want) {
        return Err(format!("{name}: runs differ: {wrong:?}, not {want:?}").into());
    }

    let hand_on: &mut dyn FnMut(&[PageRange]) = &mut |runs| {
        black_box(runs);
    };
    let cell = std::cell::RefCell::new((buffer, hand_on));
    let pass = |side: Way<'_>| {
        let (buffer, hand_on) = &mut *cell.borrow_mut();
        for bitmap in &bitmaps {
            side(black_box(bitmap), buffer, hand_on);
        }
    };
    let least = least(plan);
    let rounds = in_turn(
        Clock::Cpu,
        plan.pick(5, 1),
        least,
        [
            &mut || pass(&|words, _, each| ours(words, each)),
            &mut || pass(&|words, _, each| each(&others::runs_by_positions(words))),
            &mut || pass(&others::runs_by_positions_buffered),
            &mut || pass(&others::runs_by_bits),
        ],
    );
    let bitvec = in_turn(
        Clock::Cpu,
        1,
        Duration::ZERO,
        [&mut || pass(&others::runs_by_bitvec)],
    );

    let of = |side: usize| {
        rounds
            .iter()
            .map(|round| round[side] / round[0])
            .collect::<Vec<_>>()
    };
    let ratios = Ratios {
        table: of(1),
        buffered: of(2),
        bits: of(3),
    };
    let least = rounds
        .iter()
        .map(|round| round[1].min(round[2]).min(round[3]) / round[0]);
    let least = Spread::of(least.collect());
    let seconds = Spread::of(rounds.iter().map(|round| round[0]).collect()).median;
    let times = |ratios: &[f64]| Spread::of(ratios.to_vec()).median;
    let compared = format!(
        "least of {:.1} times positions into a table, {:.1} into a buffer, {:.1} a loop over bits; bitvec {:.1}; {:.1} GB/s of bitmap, {:.2} ns a run",
        times(&ratios.table),
        times(&ratios.buffered),
        times(&ratios.bits),
        bitvec[0][0] / seconds,
        (count * guest.words * 8) as f64 / seconds / 1e9,
        seconds * 1e9 / want.1.max(1) as f64,
    );
    Ok((ratios, least, compared))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_geometric_mean_is_of_each_round() {
        let all = [vec![2.0, 1.0, 3.0], vec![8.0, 1.0, 27.0]];
        let mean = geomean(&all.iter().collect::<Vec<_>>());
        for (got, want) in [(mean.low, 1.0), (mean.median, 4.0), (mean.high, 4.0)] {
            assert!((got - want).abs() < 1e-9, "{mean:?}");
        }
    }

    #[test]
    fn a_sum_tells_runs_in_another_order_from_these() {
        let (a, b) = (PageRange::new(1, 2), PageRange::new(5, 1));
        let sum = |runs: &[PageRange]| {
            let mut sum = Sum::default();
            sum.add(runs);
            sum
        };
        assert_ne!(sum(&[a, b]), sum(&[b, a]));
        assert_eq!(sum(&[a, b]).1, 2);
    }
}
