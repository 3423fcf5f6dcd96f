//! `query-migrate`: what a migration has come to.

use std::sync::Arc;

use gleaner_bitmap::PAGE_SIZE;
use gleaner_migrate::Status;
use serde_json::{Value, json};

use super::commands::none;
use super::migration::{Attempt, Stage};
use super::monitor::{Monitor, lock};
use super::request::Refusal;

pub(super) fn query(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    none(value)?;
    let total: u64 = {
        let layout = monitor.tracker.layout();
        layout.blocks().map(|block| block.pages * PAGE_SIZE).sum()
    };
    let migration = lock(&monitor.migration);
    Ok(migration
        .latest()
        .map_or_else(|| json!({}), |attempt| told(attempt, total)))
}

/// A number of milliseconds or pages, as whole numbers tell it: clients keep them in 64 bits with a sign.
#[allow(clippy::cast_possible_truncation)] // it stops at the largest
fn whole(number: f64) -> i64 {
    number.round() as i64
}

fn told(attempt: &Attempt, total: u64) -> Value {
    let Attempt {
        stage,
        sent,
        report,
        ..
    } = attempt;
    let mut answer = json!({"status": stage});
    if let Some(report) = report
        && report.status != Status::Completed
        && let Some(reason) = &report.reason
    {
        let doubt = match report.status {
            Status::InDoubt => "in doubt, so the guest stays stopped: ",
            _ => "",
        };
        answer["error-desc"] = format!("{doubt}{reason}").into();
    }
    if *stage == Stage::Setup {
        return answer;
    }
    let total_ms = report.as_ref().map_or_else(
        || attempt.began.elapsed().as_secs_f64() * 1e3,
        |r| r.total_ms,
    );
    answer["total-time"] = whole(total_ms).into();
    answer["setup-time"] = whole(attempt.setup_ms).into();
    match report {
        Some(report) => answer["downtime"] = whole(report.downtime_ms).into(),
        None => {
            // 0, as QEMU has it, while none can be told.
            let expected = sent.expected_downtime_ms.filter(|ms| ms.is_finite());
            answer["expected-downtime"] = expected.map_or(0, whole).into();
        }
    }
    if let Some(percent) = sent.throttle_percent {
        answer["cpu-throttle-percentage"] = percent.into();
    }
    let mbps = sent.bytes as f64 * 8.0 / 1e6 / (total_ms / 1e3).max(1e-6);
    answer["ram"] = json!({
        "transferred": sent.bytes,
        "remaining": sent.remaining_pages * PAGE_SIZE,
        "total": total,
        "duplicate": sent.zeros,
        "skipped": 0,
        "normal": sent.pages,
        "normal-bytes": sent.pages * PAGE_SIZE,
        "dirty-pages-rate": whole(sent.dirty_pages_per_second),
        "mbps": mbps,
        "dirty-sync-count": sent.passes,
        "postcopy-requests": 0,
        "page-size": PAGE_SIZE,
        "multifd-bytes": if attempt.multifd { sent.pages * PAGE_SIZE } else { 0 },
        "pages-per-second": whole(sent.pages_per_second),
        "precopy-bytes": sent.bytes.saturating_sub(sent.downtime_bytes),
        "downtime-bytes": sent.downtime_bytes,
        "postcopy-bytes": 0,
        "dirty-sync-missed-zero-copy": 0,
    });
    answer
}
