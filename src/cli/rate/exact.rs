//! Of a guest that has a service: every page.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::record::Recording;
use super::{DURATION, LEAST, Live, Screen, TICK};
use crate::rate::{Findings, Measurement};
use crate::service::MeterClient;

/// Between two looks, at most.
const LOOK: Duration = LEAST;

impl Screen<'_> {
    /// Meters exactly.
    pub fn exact(&self, control: &Path) -> Result<ExitCode, String> {
        let client = MeterClient::attach(control, &self.cancel);
        let mut client = client.map_err(|error| error.to_string())?;
        let options = self.options;
        let record = options.record.as_deref();
        let recording = record.map(|path| Recording::create(path, options.downtime_limit));
        let mut recording = recording.transpose()?;
        let (measured, lost) = self.count(&mut client, recording.as_mut())?;
        let kept = recording.is_none_or(|recording| recording.end(measured.duration()));
        let code = options.tell(&measured, client.metered(), lost.as_deref());
        Ok(if kept { code } else { ExitCode::FAILURE })
    }

    /// Looks until it is over, by time or by the user, or because the guest has gone; and why it could not look on, if there
    /// was a look before.
    fn count(
        &self,
        client: &mut MeterClient,
        mut recording: Option<&mut Recording>,
    ) -> Result<(Measurement, Option<String>), String> {
        let began = Instant::now();
        let duration = self.options.time(DURATION).unwrap_or(Duration::MAX);
        let metered = client.metered().clone();
        let mut measured = Measurement::new(self.options.interval);
        let mut live = Live::new();
        let mut due = LOOK.min(duration);
        let lost = loop {
            while began.elapsed() < due && !self.cancel.is_cancelled() {
                std::thread::sleep(TICK.min(due.saturating_sub(began.elapsed())));
            }
            match client.look() {
                Ok(look) => {
                    measured.add(&look).map_err(|e| e.to_string())?;
                    if let Some(recording) = &mut recording {
                        recording.add(&look);
                    }
                }
                // Called off, and no answer for a second: what was found before will do.
                Err(_) if self.cancel.is_cancelled() && measured.duration() > Duration::ZERO => {
                    break None;
                }
                Err(error) if measured.duration() > Duration::ZERO => {
                    break Some(error.to_string());
                }
                Err(error) => return Err(error.to_string()),
            }
            let called_off = self.cancel.is_cancelled();
            let over = measured.migrated_away() || called_off || began.elapsed() >= duration;
            self.show(&mut live, &measured, &metered, over);
            if over {
                break None;
            }
            // A look that came late makes the next one no sooner.
            while due <= began.elapsed() {
                due += LOOK;
            }
            due = due.min(duration);
        };
        Ok((measured, lost))
    }
}
