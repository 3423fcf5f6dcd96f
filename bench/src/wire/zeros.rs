//! Pages of zeros, and pages that nobody ever touched.

use rustix::time::{ClockId, clock_gettime};

use super::line::{Line, migrate};
use super::memory::{filled, read_all, untouched};
use crate::row::{Aim, Row};
use crate::sample::{Spread, median, ns, ratios, turn_about};
use crate::{Plan, Result};

/// Nanoseconds of CPU time a page, both ends together.
const AIM_ZERO: f64 = 190.0;
/// Of the time that reading the pages takes, when nobody has touched them.
const AIM_HOLES: f64 = 0.1;

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let pages = plan.guest_pages();
    let mut rows = Vec::new();
    if plan.wants("wire/zeros") {
        rows.push(zeros(pages, plan)?);
    }
    if plan.wants("wire/holes") {
        rows.push(holes(pages, plan)?);
    }
    Ok(rows)
}

/// CPU time of this process: source, destination, and the kernel for both.
fn cpu() -> std::time::Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    // Neither is negative.
    std::time::Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

fn no_contents(report: &gleaner_migrate::Report, pages: u64, row: &str) -> Result<()> {
    if (report.zero_pages, report.pages_sent) == (pages, 0) {
        return Ok(());
    }
    Err(format!("{row}: pages of zeros were sent with their contents").into())
}

fn zeros(pages: u64, plan: &Plan) -> Result<Row> {
    let from = filled(pages, || 0)?;
    let to = filled(pages, || 0)?;
    let pairs = turn_about(
        plan.pick(7, 1),
        || {
            let before = cpu();
            let (report, _) = migrate(&from, &to, true, Line::ONE, |_| ())?;
            let took = cpu() - before;
            no_contents(&report, pages, "wire/zeros")?;
            Ok(took)
        },
        || {
            let before = cpu();
            match read_all(&from)? {
                (_, false) => Ok::<_, crate::Error>(cpu() - before),
                (_, true) => Err("wire/zeros: memory of zeros has other bytes".into()),
            }
        },
    )?;
    let per_page = |time| ns(time) / pages as f64;
    let reading = median(pairs.iter().map(|p| p.1)) * 1e9 / pages as f64;
    Ok(Row::new(
        "wire/zeros",
        Aim::AtMost(AIM_ZERO),
        Spread::of(pairs.iter().map(|p| per_page(p.0)).collect()),
        "ns CPU",
        format!(
            "a page of zeros, {} MiB of them, both ends together; merely reading them {reading:.0} ns",
            pages >> 8
        ),
    ))
}

fn holes(pages: u64, plan: &Plan) -> Result<Row> {
    let to = filled(pages, || 0)?;
    let pairs = turn_about(
        plan.pick(7, 1),
        || {
            let from = untouched(pages)?;
            let (report, took) = migrate(&from, &to, true, Line::ONE, |_| ())?;
            no_contents(&report, pages, "wire/holes")?;
            Ok(took)
        },
        || {
            let memory = untouched(pages)?;
            Ok::<_, crate::Error>(read_all(&memory)?.0)
        },
    )?;
    let per_page = |seconds: f64| seconds * 1e9 / pages as f64;
    Ok(Row::new(
        "wire/holes",
        Aim::AtMost(AIM_HOLES),
        ratios(&pairs),
        "times",
        format!(
            "first round {:.1} ns a page that nobody touched, in a memfd; reading, which allocates them, {:.0} ns a page",
            per_page(median(pairs.iter().map(|p| p.0))),
            per_page(median(pairs.iter().map(|p| p.1))),
        ),
    ))
}
