//! OR of bitmaps at any shift: what remaps slots' bitmaps, and puts them into blocks.

use std::cell::RefCell;
use std::hint::black_box;

use gleaner_bitmap::or_bits;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::bitmaps::Shape;
use super::{Clock, GUESTS, Guest, guest, in_turn, least, others};
use crate::row::{Aim, Row};
use crate::sample::Spread;
use crate::{Plan, Result};

/// Pages into its block at which a slot begins. The first is a whole number of words.
const SHIFTS: [u64; 5] = [0, 1, 31, 37, 63];
/// The shift where one has to do.
const SHIFT: u64 = 37;

/// A pool of so many threads, in which the kernel runs.
fn threads(count: usize) -> Result<ThreadPool> {
    Ok(ThreadPoolBuilder::new().num_threads(count).build()?)
}

/// The kernel in a pool, which puts all of `src` into `dst` from bit `shift` on.
fn or_in(pool: &ThreadPool, dst: &RefCell<Vec<u64>>, shift: u64, src: &[u64]) {
    let dst = &mut *dst.borrow_mut();
    pool.install(|| or_bits(black_box(dst), shift, src, 0, src.len() as u64 * 64));
}

/// Source and destination, with a word of room for a shift.
fn bitmaps(guest: Guest, shape: Shape) -> (Vec<u64>, Vec<u64>) {
    let mut dst = shape.bitmap(guest.words, 2);
    dst.push(0);
    (shape.bitmap(guest.words, 1), dst)
}

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let [small, middle, large] = GUESTS;
    let sized = |guest| if plan.short { small } else { guest };
    let (middle, large, huge) = (sized(middle), sized(large), sized(guest("4T", 4096)));
    let mut rows = Vec::new();
    if plan.wants("kernels/or/256G") || plan.wants("kernels/or/unaligned") {
        rows.extend(shifts(plan, middle)?);
    }
    if plan.wants("kernels/or/memcpy") {
        rows.push(memcpy(plan, large)?);
    }
    for (name, millionths, aim) in [("1%", 10_000, 8.0), ("50%", 500_000, 60.0)] {
        let name = format!("kernels/or/set-bits/{name}");
        if plan.wants(&name) {
            rows.push(set_bits(
                plan,
                middle,
                Shape::Random(millionths),
                &name,
                aim,
            )?);
        }
    }
    for guest in [large, huge] {
        let name = format!("kernels/or/two-cores/{}", guest.name);
        if plan.wants(&name) {
            rows.push(two_cores(plan, guest, &name)?);
        }
    }
    Ok(rows)
}

/// All shifts beside each other, on one core.
fn shifts(plan: &Plan, guest: Guest) -> Result<Vec<Row>> {
    let pool = threads(1)?;
    let (src, dst) = bitmaps(guest, Shape::Random(10_000));
    check(&src, &dst)?;
    let dst = RefCell::new(dst);
    let or = |shift| or_in(&pool, &dst, shift, &src);
    let [a, b, c, d, e] = SHIFTS;
    let rounds = in_turn(
        Clock::Cpu,
        plan.pick(31, 1),
        least(plan),
        [
            &mut || or(a),
            &mut || or(b),
            &mut || or(c),
            &mut || or(d),
            &mut || or(e),
        ],
    );
    // A figure of each shift over all rounds; what counts is the worst shift.
    let of_each = |figure: fn(&[f64; 5], usize) -> f64| -> Vec<Spread> {
        let of = |side| Spread::of(rounds.iter().map(|round| figure(round, side)).collect());
        (0..SHIFTS.len()).map(of).collect()
    };
    let by_median = |a: &Spread, b: &Spread| a.median.total_cmp(&b.median);
    let times = of_each(|round, side| round[side] * 1e3);
    let slowest = times
        .into_iter()
        .max_by(by_median)
        .unwrap_or_else(|| Spread::of(Vec::new()));
    let unaligned = of_each(|round, side| round[0] / round[side]);
    let unaligned = unaligned
        .into_iter()
        .skip(1)
        .min_by(by_median)
        .unwrap_or_else(|| Spread::of(Vec::new()));
    let moved = (guest.words * 24) as f64 / 1e6;
    let compared = format!(
        "the slowest of the shifts {SHIFTS:?}, on one core; {:.1} GB/s read and written",
        moved / slowest.median
    );
    let mut rows = Vec::new();
    if plan.wants("kernels/or/256G") {
        rows.push(Row::new(
            "kernels/or/256G",
            Aim::AtMost(0.7),
            slowest,
            "ms",
            compared,
        ));
    }
    if plan.wants("kernels/or/unaligned") {
        rows.push(Row::new(
            "kernels/or/unaligned",
            Aim::AtLeast(0.9),
            unaligned,
            "of aligned",
            "256 GiB of guest; the slowest shift that is not a whole number of words, beside one that is",
        ));
    }
    Ok(rows)
}

/// At every shift the bits of all ways are the same.
fn check(src: &[u64], dst: &[u64]) -> Result<()> {
    for shift in SHIFTS {
        let mut ours = dst.to_vec();
        or_bits(&mut ours, shift, src, 0, src.len() as u64 * 64);
        let mut set_bits = dst.to_vec();
        others::or_by_set_bits(&mut set_bits, shift, src);
        let mut bitvec = dst.to_vec();
        others::or_by_bitvec(&mut bitvec, shift, src);
        let mut words = dst.to_vec();
        if shift > 0 {
            others::or_by_words(&mut words, shift, src);
        } else {
            words.clone_from(&set_bits);
        }
        if ours != set_bits || ours != bitvec || ours != words {
            return Err(format!("kernels/or: bits differ at a shift of {shift}").into());
        }
    }
    Ok(())
}

/// Beside a copy of as many bytes.
fn memcpy(plan: &Plan, guest: Guest) -> Result<Row> {
    let pool = threads(1)?;
    let (src, dst) = bitmaps(guest, Shape::Random(10_000));
    let dst = RefCell::new(dst);
    let mut to = vec![1; guest.words];
    let rounds = in_turn(
        Clock::Cpu,
        plan.pick(31, 1),
        least(plan),
        [&mut || or_in(&pool, &dst, SHIFT, &src), &mut || {
            black_box(&mut to).copy_from_slice(black_box(&src))
        }],
    );
    let seconds = Spread::of(rounds.iter().map(|round| round[0]).collect()).median;
    let rate = (guest.words * 8) as f64 / seconds / 1e9;
    Ok(Row::new(
        "kernels/or/memcpy",
        Aim::AtLeast(0.8),
        Spread::of(rounds.iter().map(|round| round[1] / round[0]).collect()),
        "of memcpy",
        format!(
            "1 TiB of guest, a shift of {SHIFT}, on one core; {rate:.1} GB/s of bitmap; a copy reads and writes two thirds as much"
        ),
    ))
}

/// Beside a loop over set bits; other ways stand in the text.
fn set_bits(plan: &Plan, guest: Guest, shape: Shape, name: &str, aim: f64) -> Result<Row> {
    let pool = threads(1)?;
    let (src, dst) = bitmaps(guest, shape);
    check(&src, &dst)?;
    let dst = RefCell::new(dst);
    let rounds = in_turn(
        Clock::Cpu,
        plan.pick(7, 1),
        least(plan),
        [
            &mut || or_in(&pool, &dst, SHIFT, &src),
            &mut || others::or_by_set_bits(black_box(&mut dst.borrow_mut()), SHIFT, &src),
            &mut || others::or_by_words(black_box(&mut dst.borrow_mut()), SHIFT, &src),
            &mut || others::or_by_bitvec(black_box(&mut dst.borrow_mut()), SHIFT, &src),
        ],
    );
    let times =
        |side: usize| Spread::of(rounds.iter().map(|round| round[side] / round[0]).collect());
    Ok(Row::new(
        name,
        Aim::AtLeast(aim),
        times(1),
        "times",
        format!(
            "256 GiB of guest, a shift of {SHIFT}, on one core; beside a loop over set bits. {:.2} times a loop that puts each word into two, {:.1} times bitvec",
            times(2).median,
            times(3).median
        ),
    ))
}

/// A copy in a pool, shared out as the kernel's work is.
fn copy_in(pool: &ThreadPool, to: &mut [u64], from: &[u64]) {
    const SHARE: usize = 16 * 1024;
    pool.install(|| {
        black_box(to)
            .par_chunks_mut(SHARE)
            .zip(from.par_chunks(SHARE))
            .for_each(|(to, from)| to.copy_from_slice(from));
    });
}

/// Two threads beside one; a copy tells how much more memory gives to two cores.
fn two_cores(plan: &Plan, guest: Guest, name: &str) -> Result<Row> {
    let (one, two) = (threads(1)?, threads(2)?);
    let (src, dst) = bitmaps(guest, Shape::Random(10_000));
    let dst = RefCell::new(dst);
    let or = |pool: &ThreadPool| or_in(pool, &dst, SHIFT, &src);
    let to = RefCell::new(vec![1; guest.words]);
    let copy = |pool: &ThreadPool| copy_in(pool, &mut to.borrow_mut(), black_box(&src));
    let rounds = in_turn(
        Clock::Wall,
        plan.pick(15, 1),
        least(plan),
        [
            &mut || or(&two),
            &mut || or(&one),
            &mut || copy(&two),
            &mut || copy(&one),
        ],
    );
    let seconds = Spread::of(rounds.iter().map(|round| round[0]).collect()).median;
    let moved = (guest.words * 24) as f64 / seconds / 1e9;
    let times = |side: usize| {
        let of = |round: &[f64; 4]| round[side + 1] / round[side];
        Spread::of(rounds.iter().map(of).collect())
    };
    Ok(Row::new(
        name,
        Aim::AtLeast(1.6),
        times(0),
        "times one",
        format!(
            "a shift of {SHIFT}; two cores read and write {moved:.1} GB/s. A copy: {:.2} times one",
            times(2).median
        ),
    ))
}
