//! Pages with contents: how much of what the sockets can carry, and what looking for zeros costs among them.

use std::sync::Arc;

use gleaner_bitmap::PAGE_SIZE;
use gleaner_migrate::{MappedMemory, PageMemory};

use super::line::{Line, migrate, plain};
use super::memory::{clear, filled, same};
use crate::kernels::random;
use crate::row::{Aim, Row};
use crate::sample::{Spread, median, ratios, turn_about};
use crate::{Plan, Result};

/// Of the rate of plain writes over the same sockets.
const AIM_SHARE: f64 = 0.97;
/// Per cent that the stream adds to the contents.
const AIM_OVERHEAD: f64 = 0.3;
/// Times the time of pages whose first word is not zero.
const AIM_SEARCH: f64 = 1.02;

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let wanted: Vec<Line> = Line::ALL
        .into_iter()
        .filter(|line| plan.wants(&name(*line)))
        .collect();
    let search = plan.wants("wire/search");
    if wanted.is_empty() && !search {
        return Ok(Vec::new());
    }
    let pages = plan.guest_pages();
    let mut state = 0x5eed;
    let from = filled(pages, || random(&mut state))?;
    let to = filled(pages, || u64::MAX)?;
    let mut rows = Vec::new();
    for line in wanted {
        rows.extend(contents(&from, &to, line, plan)?);
    }
    if search {
        rows.push(longest_search(&from, &to, plan)?);
    }
    Ok(rows)
}

fn name(line: Line) -> String {
    format!("wire/contents-{line}")
}

/// What arrives is what was sent, by either way.
fn check(from: &Arc<MappedMemory>, to: &Arc<MappedMemory>, line: Line) -> Result<()> {
    migrate(from, to, false, line, |_| ())?;
    let migrated = same(from, to)?;
    clear(to)?;
    plain(from, to, line)?;
    if migrated && same(from, to)? {
        return Ok(());
    }
    Err(format!("{}: the memory that arrived differs", name(line)).into())
}

fn contents(
    from: &Arc<MappedMemory>,
    to: &Arc<MappedMemory>,
    line: Line,
    plan: &Plan,
) -> Result<Vec<Row>> {
    let pages = from.pages();
    check(from, to, line)?;
    let mut on_wire = 0;
    let pairs = turn_about(
        plan.pick(7, 1),
        || {
            let (report, took) = migrate(from, to, false, line, |_| ())?;
            on_wire = report.bytes_on_wire;
            Ok(took)
        },
        || plain(from, to, line),
    )?;
    let bytes = (pages * PAGE_SIZE) as f64;
    let rate = |seconds: f64| bytes / seconds / 1e9;
    // The share of the plain rate is the plain time over ours.
    let shares: Vec<_> = pairs.iter().map(|(ours, plain)| (*plain, *ours)).collect();
    let mut rows = vec![Row::new(
        name(line),
        Aim::AtLeast(AIM_SHARE),
        ratios(&shares),
        "of plain",
        format!(
            "first round of {} MiB at random {:.2} GB/s; plain writes of 1 MiB over as many sockets of this kind {:.2} GB/s",
            pages >> 8,
            rate(median(pairs.iter().map(|p| p.0))),
            rate(median(pairs.iter().map(|p| p.1))),
        ),
    )];
    if line == Line::ONE {
        rows.push(Row::new(
            "wire/contents-overhead",
            Aim::AtMost(AIM_OVERHEAD),
            Spread::of(vec![(on_wire as f64 / bytes - 1.0) * 100.0]),
            "%",
            format!(
                "{on_wire} bytes written to the socket for {} MiB of contents",
                pages >> 8
            ),
        ));
    }
    Ok(rows)
}

/// Pages whose last word alone is not zero are searched to their ends before they are sent.
fn longest_search(random: &Arc<MappedMemory>, to: &Arc<MappedMemory>, plan: &Plan) -> Result<Row> {
    let mut at = 0;
    let late = filled(random.pages(), || {
        at += 1;
        u64::from(at % 512 == 0)
    })?;
    let run = |from| migrate(from, to, false, Line::ONE, |_| ()).map(|(_, took)| took);
    run(&late)?;
    if !same(&late, to)? {
        return Err("wire/search: the memory that arrived differs".into());
    }
    let pairs = turn_about(plan.pick(7, 1), || run(&late), || run(random))?;
    let per_page = |seconds: f64| seconds * 1e9 / random.pages() as f64;
    Ok(Row::new(
        "wire/search",
        Aim::AtMost(AIM_SEARCH),
        ratios(&pairs),
        "times",
        format!(
            "first round {:.0} ns a page whose last word alone is not zero, {:.0} ns a page whose first one is not",
            per_page(median(pairs.iter().map(|p| p.0))),
            per_page(median(pairs.iter().map(|p| p.1))),
        ),
    ))
}
