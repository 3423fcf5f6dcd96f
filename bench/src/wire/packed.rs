//! Pages that travel packed: what trying costs where nothing shrinks, and what is won where it does.

use std::cell::Cell;

use gleaner_bitmap::PAGE_SIZE;
use gleaner_migrate::Compress;

use super::line::{Line, migrate};
use super::memory::{filled, same};
use crate::kernels::random;
use crate::row::{Aim, Row};
use crate::sample::{median, ratios, turn_about};
use crate::{Plan, Result};

const CODECS: [(Compress, &str); 2] = [(Compress::Lz4, "lz4"), (Compress::Zstd, "zstd")];
/// Times the first round without.
const AIM_RANDOM: f64 = 1.05;
/// Times the rate without, over a link that takes less than memory gives.
const AIM_TEXT: f64 = 1.5;
/// Bytes a second of that link: 1 Gbit/s.
const LINK: u64 = 125_000_000;

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (codec, name) in CODECS {
        let row = format!("wire/random-{name}");
        if plan.wants(&row) {
            rows.push(incompressible(row, codec, plan)?);
        }
        let row = format!("wire/text-{name}");
        if plan.wants(&row) {
            rows.push(text(row, codec, plan)?);
        }
    }
    Ok(rows)
}

fn incompressible(name: String, codec: Compress, plan: &Plan) -> Result<Row> {
    let pages = plan.pick(1 << 18, 1 << 14) as u64;
    let mut state = 0x5eed;
    let from = filled(pages, || random(&mut state))?;
    let to = filled(pages, || u64::MAX)?;
    let run = |compress| {
        migrate(&from, &to, false, Line::ONE, |options| {
            options.compress = compress
        })
    };
    let pairs = turn_about(
        plan.pick(9, 1),
        || run(codec).map(|(_, took)| took),
        || run(Compress::None).map(|(_, took)| took),
    )?;
    let rate = |seconds: f64| (pages * PAGE_SIZE) as f64 / seconds / 1e9;
    Ok(Row::new(
        name,
        Aim::AtMost(AIM_RANDOM),
        ratios(&pairs),
        "times",
        format!(
            "first round of {} MiB at random, tried in vain, {:.2} GB/s; not tried {:.2} GB/s",
            pages >> 8,
            rate(median(pairs.iter().map(|p| p.0))),
            rate(median(pairs.iter().map(|p| p.1))),
        ),
    ))
}

/// Words of English and numbers, as logs and sources have them.
fn words() -> impl FnMut() -> u64 {
    let words: Vec<&[u8]> = [
        "harvest ", "the ", "dirty ", "page ", "of ", "a ", "slot ", "before ", "lease ", "and ",
        "then ", "round ", "guest ", "memory ", "is ", "at ", "block ", "while ", "it ", "moves\n",
    ]
    .map(str::as_bytes)
    .to_vec();
    let mut state = 0x5eed;
    let mut line = Vec::new();
    move || {
        while line.len() < 8 {
            let random = random(&mut state);
            match random % 12 {
                0 => line.extend(format!("{:x} ", random >> 44).bytes()),
                _ => line.extend_from_slice(words[(random >> 8) as usize % words.len()]),
            }
        }
        let mut word = [0; 8];
        word.copy_from_slice(&line[..8]);
        line.drain(..8);
        u64::from_le_bytes(word)
    }
}

fn text(name: String, codec: Compress, plan: &Plan) -> Result<Row> {
    let pages = plan.pick(1 << 15, 1 << 12) as u64;
    let from = filled(pages, words())?;
    let to = filled(pages, || u64::MAX)?;
    let wire = Cell::new(0);
    let run = |compress| {
        let (report, took) = migrate(&from, &to, false, Line::ONE, |options| {
            options.compress = compress;
            options.tuning.limit_bandwidth(Some(LINK));
        })?;
        if compress != Compress::None {
            wire.set(report.bytes_on_wire);
        }
        Ok::<_, crate::Error>(took)
    };
    let pairs = turn_about(plan.pick(7, 1), || run(Compress::None), || run(codec))?;
    if !same(&from, &to)? {
        return Err(format!("{name}: the memory that arrived differs").into());
    }
    let bytes = (pages * PAGE_SIZE) as f64;
    let rate = |seconds: f64| bytes / seconds / 1e9;
    Ok(Row::new(
        name,
        Aim::AtLeast(AIM_TEXT),
        ratios(&pairs),
        "times",
        format!(
            "first round of {} MiB of text over {:.2} GB/s, packed to 1/{:.1}, {:.2} GB/s; as it is {:.2} GB/s",
            pages >> 8,
            LINK as f64 / 1e9,
            bytes / wire.get() as f64,
            rate(median(pairs.iter().map(|p| p.1))),
            rate(median(pairs.iter().map(|p| p.0))),
        ),
    ))
}
