//! The kernels over bitmaps, beside a loop over single bits.

use std::hint::black_box;

use gleaner_bitmap::{Runs, or_bits};

use crate::row::{Aim, Row};
use crate::sample::{median, ratios, time, turn_about};
use crate::{Plan, Result};

/// Words of the bitmaps: of a guest of 64 GiB, 2 MiB.
const WORDS: usize = 1 << 18;
/// Times faster than a loop over bits that each kernel is to be.
const AIM: f64 = 8.0;

/// Bits set in thousandths.
const DENSITIES: [(&str, u64); 4] = [("0.1%", 1), ("1%", 10), ("10%", 100), ("50%", 500)];

/// xorshift64.
pub fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// A bitmap with single bits set at random.
fn bitmap(words: usize, permille: u64) -> Vec<u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15;
    let mut bit = || u64::from(random(&mut state) >> 32 < (permille << 32) / 1000);
    (0..words)
        .map(|_| (0..64).fold(0, |word, n| word | bit() << n))
        .collect()
}

fn get(words: &[u64], bit: u64) -> bool {
    words[(bit / 64) as usize] >> (bit % 64) & 1 == 1
}

/// OR bit by bit, as it is written without thought.
fn naive_or(dst: &mut [u64], at: u64, src: &[u64], len: u64) {
    for bit in (0..len).filter(|bit| get(src, *bit)) {
        dst[((at + bit) / 64) as usize] |= 1 << ((at + bit) % 64);
    }
}

/// Runs bit by bit.
fn naive_runs(words: &[u64], mut each: impl FnMut(u64, u64)) {
    let mut start = None;
    let end = words.len() as u64 * 64;
    for bit in 0..end {
        match (get(words, bit), start) {
            (true, None) => start = Some(bit),
            (false, Some(first)) => {
                each(first, bit - first);
                start = None;
            }
            _ => {}
        }
    }
    if let Some(first) = start {
        each(first, end - first);
    }
}

/// Some number that depends on every run.
fn fold(sum: u64, first: u64, pages: u64) -> u64 {
    sum.rotate_left(1) ^ first.wrapping_mul(31).wrapping_add(pages)
}

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let words = plan.pick(WORDS, WORDS / 16);
    let rounds = plan.pick(15, 2);
    let mut rows = Vec::new();
    for (label, permille) in DENSITIES {
        let src = bitmap(words, permille);
        rows.extend(or_row(plan, &src, label, rounds)?);
        rows.extend(runs_row(plan, &src, label, rounds)?);
    }
    Ok(rows)
}

fn or_row(plan: &Plan, src: &[u64], label: &str, rounds: usize) -> Result<Option<Row>> {
    let name = format!("kernels/or-shifted/{label}");
    if !plan.wants(&name) {
        return Ok(None);
    }
    // A slot whose first page is not a multiple of 64 pages into its block.
    let (at, len) = (37, src.len() as u64 * 64 - 64);
    let mut ours = vec![0; src.len() + 1];
    let mut plain = vec![0; src.len() + 1];
    let pairs = turn_about::<()>(
        rounds,
        || Ok(time(|| or_bits(black_box(&mut ours), at, src, 0, len)).0),
        || Ok(time(|| naive_or(black_box(&mut plain), at, src, len)).0),
    )
    .map_err(|()| "unreachable")?;
    if ours != plain {
        return Err(format!("{name}: the kernel's bits are not those of the plain loop").into());
    }
    let rate = src.len() as f64 * 8.0 / median(pairs.iter().map(|p| p.0)) / 1e9;
    let times: Vec<_> = pairs.iter().map(|(a, b)| (*b, *a)).collect();
    Ok(Some(Row::new(
        name,
        Aim::AtLeast(AIM),
        ratios(&times),
        "times",
        format!("{rate:.1} GB/s of bitmap; beside a loop over bits, outputs equal"),
    )))
}

fn runs_row(plan: &Plan, src: &[u64], label: &str, rounds: usize) -> Result<Option<Row>> {
    let name = format!("kernels/runs/{label}");
    if !plan.wants(&name) {
        return Ok(None);
    }
    let (mut ours, mut plain, mut count) = (0, 0, 0u64);
    let bits = src.len() as u64 * 64;
    let pairs = turn_about::<()>(
        rounds,
        || {
            let (took, (sum, runs)) = time(|| {
                Runs::new(black_box(src), 0, bits).fold((0, 0), |(sum, n), run| {
                    (fold(sum, run.first, run.pages), n + 1)
                })
            });
            (ours, count) = (sum, runs);
            Ok(took)
        },
        || {
            let (took, sum) = time(|| {
                let mut sum = 0;
                naive_runs(black_box(src), |first, pages| sum = fold(sum, first, pages));
                sum
            });
            plain = sum;
            Ok(took)
        },
    )
    .map_err(|()| "unreachable")?;
    if ours != plain {
        return Err(format!("{name}: the kernel's runs are not those of the plain loop").into());
    }
    let seconds = median(pairs.iter().map(|p| p.0));
    let times: Vec<_> = pairs.iter().map(|(a, b)| (*b, *a)).collect();
    Ok(Some(Row::new(
        name,
        Aim::AtLeast(AIM),
        ratios(&times),
        "times",
        format!(
            "{:.1} GB/s of bitmap, {:.1} ns a run; beside a loop over bits, outputs equal",
            src.len() as f64 * 8.0 / seconds / 1e9,
            seconds * 1e9 / count.max(1) as f64
        ),
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_have_about_the_density_asked_for() {
        for (_, permille) in DENSITIES {
            let set: u64 = bitmap(4096, permille)
                .iter()
                .map(|w| u64::from(w.count_ones()))
                .sum();
            let want = 4096 * 64 * permille / 1000;
            assert!((want * 8 / 10..=want * 12 / 10).contains(&set), "{set}");
        }
    }
}
