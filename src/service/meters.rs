//! Meters: consumers in other processes that count, beside the agent and each other.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use gleaner_bitmap::Extent;

use super::message::{Request, Response, VERSION, send_response};
use super::server::receive;
use super::session::refused_version;
use crate::Tracker;
use crate::rate::Meter;

/// Meters at most: each has a set of dirty pages of its own.
const MOST: usize = 8;
/// How long a meter may be silent. As long as it is there the guest's writes are logged, which slows them.
const SILENT: Duration = Duration::from_secs(30);
/// How long a meter may take to read an answer.
const SLOW: Duration = Duration::from_secs(10);
/// Extents in one answer.
pub(super) const CHUNK: usize = 1 << 18;

/// What serves meters.
#[derive(Debug)]
pub(super) struct Meters {
    tracker: Tracker,
    there: AtomicUsize,
    /// [`SILENT`], but for tests.
    silent: Duration,
}

/// One of the meters that are there, until this is dropped.
struct Place<'a>(&'a AtomicUsize);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Meters {
    pub(super) fn new(tracker: &Tracker) -> Self {
        Self {
            tracker: tracker.clone(),
            there: AtomicUsize::new(0),
            silent: SILENT,
        }
    }

    /// Serves a meter that has said hello, until it hangs up.
    pub(super) fn serve(&self, stream: &mut UnixStream, version: u32) -> io::Result<()> {
        stream.set_read_timeout(Some(self.silent))?;
        stream.set_write_timeout(Some(SLOW))?;
        let before = self.there.fetch_add(1, Ordering::SeqCst);
        let _place = Place(&self.there);
        let refused = if version != VERSION {
            Some(refused_version("meter", version))
        } else if before >= MOST {
            let text = format!("{MOST} meters are here already: end one of them");
            Some(Response::Error(text))
        } else {
            None
        };
        if let Some(refused) = refused {
            return send_response(stream, &refused, None);
        }
        let meter = match Meter::new(&self.tracker) {
            Ok(meter) => meter,
            Err(error) => return send_response(stream, &Response::Error(error.to_string()), None),
        };
        let mut session = MeterSession {
            meter,
            rest: Vec::new(),
        };
        send_response(stream, &Response::Welcome { version: VERSION }, None)?;
        loop {
            match receive(stream) {
                Ok(Some(request)) => send_response(stream, &session.handle(&request), None)?,
                Ok(None) => return Ok(()),
                Err(error) => {
                    // It reads that when it goes on, in place of an answer.
                    if is_timeout(&error) {
                        send_response(stream, &let_go(self.silent), None)?;
                    }
                    return Err(error);
                }
            }
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// Told to a meter that was silent for so long.
fn let_go(silent: Duration) -> Response {
    Response::Error(format!(
        "nothing was heard of this meter for {} s, so it was let go: begin again",
        silent.as_secs()
    ))
}

/// One meter's.
struct MeterSession {
    meter: Meter,
    /// Of the last look: what has not been sent.
    rest: Vec<Extent>,
}

impl MeterSession {
    fn handle(&mut self, request: &Request) -> Response {
        match request {
            Request::Metered => Response::Metered(self.meter.metered()),
            Request::Look => match self.meter.look() {
                Ok(mut look) => {
                    self.rest = std::mem::take(&mut look.written);
                    look.written = chunk(&mut self.rest);
                    Response::Look(Box::new(look))
                }
                Err(error) => Response::Error(error.to_string()),
            },
            Request::Rest => Response::Rest(chunk(&mut self.rest)),
            // Neither memory nor anything that changes the guest.
            _ => Response::Error("a meter does nothing but look".into()),
        }
    }
}

/// Takes the next chunk. One that is not whole, which may be empty, is the last.
fn chunk(rest: &mut Vec<Extent>) -> Vec<Extent> {
    let later = rest.split_off(CHUNK.min(rest.len()));
    std::mem::replace(rest, later)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // helpers are not known to be tests
    use std::sync::Arc;

    use super::*;
    use crate::model::{ModelConfig, ModelKvm};
    use crate::service::message::{receive_response, send_request};
    use gleaner_bitmap::BlockId;

    #[test]
    fn a_meter_that_was_silent_for_too_long_is_told_so_when_it_goes_on() {
        let kvm = ModelKvm::new(ModelConfig::default());
        let tracker = Tracker::on(Arc::new(kvm)).build().unwrap();
        let mut meters = Meters::new(&tracker);
        meters.silent = Duration::from_millis(1);
        let (mut meter, mut service) = UnixStream::pair().unwrap();
        // It says nothing, until the service does not wait any longer and has hung up.
        let ended = meters.serve(&mut service, VERSION);
        assert!(is_timeout(&ended.unwrap_err()));
        drop(service);
        let (welcome, _) = receive_response(&mut meter).unwrap();
        assert!(matches!(welcome, Response::Welcome { .. }), "{welcome:?}");
        // What it asks now nobody hears.
        assert!(send_request(&mut meter, &Request::Look).is_err());
        let (told, _) = receive_response(&mut meter).unwrap();
        let Response::Error(reason) = told else {
            panic!("{told:?}");
        };
        assert!(reason.contains("nothing was heard"), "{reason}");
        assert_eq!(meters.there.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn whole_chunks_come_first_and_one_that_is_not_last() {
        for (extents, chunks) in [
            (0, vec![0]),
            (5, vec![5]),
            (CHUNK, vec![CHUNK, 0]),
            (2 * CHUNK + 1, vec![CHUNK, CHUNK, 1]),
        ] {
            let all: Vec<Extent> = (0..extents as u64)
                .map(|n| Extent::new(BlockId(0), 2 * n, 1))
                .collect();
            let (mut rest, mut sizes, mut joined) = (all.clone(), Vec::new(), Vec::new());
            while sizes.last().is_none_or(|last| *last == CHUNK) {
                let next = chunk(&mut rest);
                sizes.push(next.len());
                joined.extend(next);
            }
            assert_eq!(sizes, chunks);
            assert!(joined == all && rest.is_empty());
        }
    }

    #[test]
    fn an_answer_with_the_longest_chunk_is_below_the_limit() {
        let extent = Extent::new(BlockId(u64::MAX), u64::MAX, u64::MAX);
        let longest = Response::Rest(vec![extent; CHUNK]);
        assert!(longest.encode().is_ok());
    }
}
