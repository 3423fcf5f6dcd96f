//! A dirty rate that is sampled from outside, beside QEMU's own page sampling: how far off, and at what cost.

mod machine;
#[path = "../../../tests/sampled/scattered.rs"]
mod scattered;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use gleaner::rate::process::{Process, cpu_time};
use gleaner::rate::sample::{Goal, Sampled, Sampler};
use gleaner::rate::{Findings, Report};
use serde_json::json;

use crate::row::{Aim, Row};
use crate::sample::Spread;
use crate::{Plan, Result};
use machine::Qemu;
use scattered::{FIRST, arguments, firmware};

/// Of 1 GiB a page of 100 is written, all the time.
const STRIDE: u32 = 100;
const MEBIBYTES: u64 = 1024;
/// Pages that QEMU looks at of each GiB unless it is told another number.
const QEMU_PAGES: u64 = 512;

/// A guest that writes one page of 100.
struct Guest {
    qemu: Qemu,
    memory: File,
    /// Pages that it writes.
    pages: f64,
}

impl Guest {
    fn start(dir: &Path) -> Result<Self> {
        let image = dir.join("firmware");
        let all = (MEBIBYTES << 8) - (FIRST >> 12);
        let pages = u32::try_from(all / u64::from(STRIDE))?;
        std::fs::write(&image, firmware(pages, STRIDE))?;
        let image = image.to_str().ok_or("a directory whose name is no text")?;
        let qemu = Qemu::start(&arguments(image, MEBIBYTES))?;
        let memory = File::open(memory_of(qemu.pid())?)?;
        let guest = Self {
            qemu,
            memory,
            pages: pages.into(),
        };
        let began = Instant::now();
        while guest.passes()? == 0 {
            if began.elapsed() > Duration::from_secs(30) {
                return Err("the guest does not run".into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(guest)
    }

    /// How often it has written all of its pages.
    fn passes(&self) -> Result<u32> {
        let mut word = [0; 4];
        self.memory.read_exact_at(&mut word, FIRST)?;
        Ok(u32::from_le_bytes(word))
    }

    /// Passes a second meanwhile.
    fn speed(&self, meanwhile: impl FnOnce() -> Result<()>) -> Result<f64> {
        let (before, began) = (self.passes()?, Instant::now());
        meanwhile()?;
        let passes = self.passes()?.wrapping_sub(before);
        Ok(f64::from(passes) / began.elapsed().as_secs_f64())
    }

    /// Looks at it from outside, as the command line does unless it is told otherwise.
    fn sampled(&self, duration: Duration, seed: u64) -> Result<Report> {
        let goal = Goal {
            duration: Some(duration),
            interval: Duration::from_secs(1).min(duration),
            precision: 0.05,
            cpu: 0.02,
        };
        let mut process = Process::open(self.qemu.pid(), &[])?;
        // CPU time from here on: this process has done other things.
        let zero = cpu_time();
        let spent = || cpu_time().saturating_sub(zero);
        let per_look = process.time_look()?;
        let found = Sampled::new(goal, process.blocks());
        let mut sampler = Sampler::new(goal, found, spent(), per_look, seed);
        let began = Instant::now();
        while let Some(due) = sampler.due() {
            std::thread::sleep(due.saturating_sub(began.elapsed()));
            sampler.spend(spent());
            while let Some(task) = sampler.take(began.elapsed()) {
                let at = began.elapsed();
                let sights = process.look(task.pages())?;
                sampler.see(&task, at, &sights);
                sampler.spend(spent());
            }
        }
        Ok(sampler.found().report())
    }

    /// What QEMU tells by its own sampling, in pages, and the CPU time that it took, which is read while the guest is stopped.
    fn by_qemu(&mut self) -> Result<(f64, Duration)> {
        self.qemu.execute("stop", &json!({}))?;
        let before = self.qemu.ended_threads()?;
        self.qemu.execute("cont", &json!({}))?;
        let ask = json!({ "calc-time": 1, "sample-pages": QEMU_PAGES, "mode": "page-sampling" });
        self.qemu.execute("calc-dirty-rate", &ask)?;
        loop {
            std::thread::sleep(Duration::from_millis(50));
            let said = self.qemu.execute("query-dirty-rate", &json!({}))?;
            if said["status"] == "measured" {
                let rate = said["dirty-rate"].as_f64().ok_or("no rate")?;
                // Mebibytes a second, rounded down: half of one more, in the mean.
                self.qemu.execute("stop", &json!({}))?;
                let took = self.qemu.ended_threads()?.saturating_sub(before);
                self.qemu.execute("cont", &json!({}))?;
                return Ok(((rate + 0.5) * 256.0, took));
            }
        }
    }
}

/// Where the guest's memory is.
fn memory_of(pid: u32) -> Result<std::path::PathBuf> {
    let began = Instant::now();
    loop {
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
            let path = entry?.path();
            let to = std::fs::read_link(&path).unwrap_or_default();
            if to.to_string_lossy().starts_with("/memfd:") {
                return Ok(path);
            }
        }
        if began.elapsed() > Duration::from_secs(30) {
            return Err("a QEMU without memory".into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Per cent: the root of the mean square of how far off they are.
fn off(found: &[f64], truth: f64) -> Spread {
    let each: Vec<f64> = found
        .iter()
        .map(|f| (f / truth - 1.0).abs() * 100.0)
        .collect();
    let square = each.iter().map(|e| e * e).sum::<f64>() / each.len().max(1) as f64;
    Spread {
        median: square.sqrt(),
        ..Spread::of(each)
    }
}

/// The rows.
pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    if !Qemu::is_there() {
        eprintln!("gleaner-bench: rate skipped: no {}", scattered::QEMU);
        return Ok(Vec::new());
    }
    let dir = tempfile::tempdir()?;
    let mut guest = Guest::start(dir.path())?;
    let duration = Duration::from_secs(plan.pick(20, 1) as u64);
    let (mut rates, mut uniques, mut cpu, mut held, mut slower) =
        (vec![], vec![], vec![], 0, vec![]);
    let runs = plan.pick(8, 1);
    for seed in 0..runs {
        let alone = guest.speed(|| {
            std::thread::sleep(duration);
            Ok(())
        })?;
        let mut report = None;
        let beside = guest.speed(|| {
            report = Some(guest.sampled(duration, seed as u64 ^ 0x5eed)?);
            Ok(())
        })?;
        let report = report.ok_or("no report")?;
        slower.push((alone / beside - 1.0) * 100.0);
        rates.push(report.dirty_bytes_per_second / 4096.0);
        uniques.push(report.unique_pages as f64);
        cpu.push(report.sampling.map_or(0.0, |s| s.cpu_used) * 100.0);
        let [low, high] = report.unique_pages_interval95.map(|n| n as f64);
        held += usize::from((low..=high).contains(&guest.pages));
        let [low, high] = report.dirty_bytes_per_second_interval95.map(|n| n / 4096.0);
        // A window is a little longer than it should be, and the rate less by as much.
        let pages = guest.pages;
        held += usize::from((low..=high * 1.005).contains(&pages));
    }
    let by_qemu: Result<Vec<_>> = (0..plan.pick(40, 1)).map(|_| guest.by_qemu()).collect();
    let (theirs, took): (Vec<f64>, Vec<Duration>) = by_qemu?.into_iter().unzip();
    let theirs = off(&theirs, guest.pages);
    let took = Spread::of(took.iter().map(|t| t.as_secs_f64() * 1e3).collect());
    let mine = format!(
        "1 GiB of a QEMU, 1 % dirty; QEMU's own sampling of {QEMU_PAGES} pages {:.0} % off in {} calls",
        theirs.median,
        plan.pick(40, 1)
    );
    let cost = format!(
        "of one CPU; QEMU's own sampling {:.1} ms of CPU a call",
        took.median
    );
    let inside = format!(
        "{held} of {} intervals of 95 % hold what the guest writes",
        2 * runs
    );
    let spread = Spread::of(slower);
    Ok(vec![
        Row::new(
            "rate, sampled: off by",
            Aim::AtMost(5.0),
            off(&rates, guest.pages),
            "%",
            mine,
        ),
        Row::new(
            "rate, sampled: unique pages off by",
            Aim::AtMost(5.0),
            off(&uniques, guest.pages),
            "%",
            inside,
        ),
        Row::new(
            "rate, sampled: CPU",
            Aim::AtMost(2.0),
            Spread::of(cpu),
            "%",
            cost,
        ),
        Row::new(
            "rate, sampled: guest slower by",
            Aim::AtMost(1.0),
            spread,
            "%",
            "turn about with no sampling",
        ),
    ])
}
