//! Of any process: a sample of its pages, from outside.

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use gleaner_migrate::Throttles;

use super::{Live, SAMPLED_DURATION, Screen, TICK};
use crate::rate::Metered;
use crate::rate::process::{Process, ProcessError, cpu_time};
use crate::rate::sample::{Goal, Sampled, Sampler};

const PRECISION: f64 = 0.05;
const CPU: f64 = 0.02;

impl Screen<'_> {
    /// Meters a sample.
    pub fn sampled(&self, pid: u32) -> Result<ExitCode, String> {
        let told = |error: ProcessError| error.to_string();
        let mut process = Process::open(pid, &self.options.range).map_err(told)?;
        if self.options.range.is_empty() && !process.has_vm() {
            note!(
                "gleaner: process {pid} has no VM of KVM: its largest memory is taken for a guest's RAM"
            );
        }
        let duration = self.options.time(SAMPLED_DURATION);
        let interval = self.options.interval;
        let goal = Goal {
            duration,
            interval: duration.map_or(interval, |duration| interval.min(duration)),
            precision: self.options.precision.unwrap_or(PRECISION),
            cpu: self.options.cpu.unwrap_or(CPU),
        };
        let found = Sampled::new(goal, process.blocks());
        let per_look = process.time_look().map_err(told)?;
        let mut sampler = Sampler::new(goal, found, cpu_time(), per_look, seed());
        self.watch(&mut process, &mut sampler).map_err(told)?;
        let found = sampler.found();
        Ok(self.options.tell(found, &metered(found), None))
    }

    /// Looks until it is over, by time or by the user.
    fn watch(&self, process: &mut Process, sampler: &mut Sampler) -> Result<(), ProcessError> {
        let began = Instant::now();
        let mut live = Live::new();
        while let Some(due) = sampler.due() {
            if self.cancel.is_cancelled() {
                sampler.finish(began.elapsed());
            }
            let now = began.elapsed();
            if now < due && !self.cancel.is_cancelled() {
                std::thread::sleep(TICK.min(due - now));
            }
            sampler.spend(cpu_time());
            while let Some(task) = sampler.take(began.elapsed()) {
                let at = began.elapsed();
                let sights = process.look(task.pages())?;
                sampler.see(&task, at, &sights);
            }
            let found = sampler.found();
            self.show(&mut live, found, &metered(found), sampler.is_over());
        }
        Ok(())
    }
}

fn metered(found: &Sampled) -> Metered {
    Metered {
        tracking: "sampled".into(),
        data_pages: found.data_pages(),
        throttles: Throttles::Nothing,
    }
}

/// Another one each time: nobody who writes in strides is to be met in step.
fn seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let since: Duration = since.unwrap_or_default();
    since.as_secs() ^ u64::from(since.subsec_nanos()) << 32 ^ u64::from(std::process::id()) << 16
}
