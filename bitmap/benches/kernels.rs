//! Single functions, for regressions: `cargo bench -p gleaner-bitmap`. What they are worth beside other ways, `gleaner-bench`
//! tells.
#![allow(missing_docs)] // made by macros

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gleaner_bitmap::{Runs, count_bits, or_bits};

/// The bitmap of a guest of 16 GiB, which a second-level cache holds.
const WORDS: usize = 1 << 16;
const BITS: u64 = WORDS as u64 * 64;

/// Words in which about one bit of `2^halvings` is set.
fn bitmap(halvings: u32) -> Vec<u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..WORDS)
        .map(|_| (0..halvings).fold(u64::MAX, |word, _| word & random()))
        .collect()
}

fn kernels(c: &mut Criterion) {
    let mut group = c.benchmark_group("kernels");
    group.throughput(Throughput::Bytes(BITS / 8));
    for halvings in [1, 3, 7, 10] {
        let words = bitmap(halvings);
        let id = |name| BenchmarkId::new(name, format!("1 of {}", 1 << halvings));
        group.bench_with_input(id("runs by batches"), &words, |b, words| {
            b.iter(|| Runs::new(words, 0, BITS).fold(0, |sum, run| sum ^ run.first ^ run.pages));
        });
        group.bench_with_input(id("runs one by one"), &words, |b, words| {
            b.iter(|| {
                let mut sum = 0;
                for run in Runs::new(words, 0, BITS) {
                    sum ^= run.first ^ run.pages;
                }
                sum
            });
        });
    }
    let src = bitmap(7);
    let mut dst = bitmap(7);
    for shift in [0, 37] {
        group.bench_function(BenchmarkId::new("or", shift), |b| {
            b.iter(|| or_bits(&mut dst, shift, &src, 0, BITS - 64));
        });
    }
    group.bench_function("count", |b| b.iter(|| count_bits(&src, 0, BITS)));
    group.finish();
}

criterion_group!(benches, kernels);
criterion_main!(benches);
