//! The sender's end of a channel: limits, pace, and refusals that come when nobody awaits an answer.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::channel::WAITING;
use crate::patience::{CancelToken, TICK};
use crate::watch::Totals;
use crate::wire::{Message, Payload};
use crate::{Channel, Clock, Error, Result, Tuning};

/// How long a half-written frame may go on after a cancellation: only whole frames leave room for the reason.
const GRACE: Duration = Duration::from_secs(1);

/// What may end a wait early. Shared by all connections of a migration.
pub(crate) struct Limits {
    pub(crate) clock: Clock,
    pub(crate) cancel: CancelToken,
    /// When the migration must be over, and the time that it was allowed.
    pub(crate) deadline: Option<(Instant, Duration)>,
    pub(crate) silence: Duration,
    /// The source has let go of its guest: there is no way back, so nothing but silence ends a wait.
    pub(crate) committed: AtomicBool,
    pub(crate) failure: Failure,
    pub(crate) pace: Pace,
    pub(crate) totals: Totals,
}

/// What ended the work of several connections, or of what supplies them. Whatever else fails fails because of this.
#[derive(Default)]
pub(crate) struct Failure {
    happened: AtomicBool,
    cause: Mutex<Option<Error>>,
}

impl Failure {
    /// Something failed. The first one is kept, but what the destination says of it explains more.
    pub(crate) fn meet(&self, error: Error) {
        let mut cause = self.cause.lock().unwrap_or_else(PoisonError::into_inner);
        if cause.is_none() || matches!(error, Error::Refused { .. }) {
            *cause = Some(error);
        }
        // Only when the cause is known: others take it for the cause of theirs.
        self.happened.store(true, Ordering::Release);
    }

    pub(crate) fn has_happened(&self) -> bool {
        self.happened.load(Ordering::Acquire)
    }

    /// The cause. It can be told once.
    pub(crate) fn take(&self) -> Option<Error> {
        let mut cause = self.cause.lock().unwrap_or_else(PoisonError::into_inner);
        cause.take()
    }
}

/// A bandwidth limit, for all connections together.
pub(crate) struct Pace {
    tuning: Tuning,
    row: Mutex<Row>,
}

/// Who sends in turn, each not before the time of those before him is over.
struct Row {
    /// The limit that their time goes by.
    limit: Option<u64>,
    /// Not before then is the next frame due.
    due: Instant,
}

/// A place in the row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    limit: u64,
    due: Instant,
}

impl Pace {
    pub(crate) fn new(tuning: Tuning, now: Instant) -> Self {
        let limit = tuning.bandwidth_limit();
        Self {
            tuning,
            row: Mutex::new(Row { limit, due: now }),
        }
    }

    /// Takes the next place in the row, for `bytes` bytes. None where there is no limit.
    fn reserve(&self, now: Instant, bytes: u64) -> Option<Place> {
        let holds = self.tuning.bandwidth_limit();
        let mut row = self.row.lock().unwrap_or_else(PoisonError::into_inner);
        if row.limit != holds {
            // Hours of a limit that holds no more are not sat out.
            *row = Row {
                limit: holds,
                due: now,
            };
        }
        let limit = holds?;
        let due = row.due.max(now);
        row.due = due + Duration::from_secs_f64(bytes as f64 / limit as f64);
        Some(Place { limit, due })
    }

    /// Whether the limit that a place goes by is still the limit.
    fn holds(&self, place: Place) -> bool {
        self.tuning.bandwidth_limit() == Some(place.limit)
    }
}

impl Limits {
    /// Fails when the migration was called off.
    pub(crate) fn check(&self) -> Result<()> {
        if self.is_committed() {
            return Ok(());
        }
        if self.failure.has_happened() {
            // Nobody reads this: the cause is what is told.
            return Err(Error::Closed {
                during: "another connection failed",
            });
        }
        match self.deadline {
            _ if self.cancel.is_cancelled() => Err(Error::Cancelled),
            Some((end, limit)) if self.clock.now() >= end => Err(Error::TimedOut { limit }),
            _ => Ok(()),
        }
    }

    pub(crate) fn is_committed(&self) -> bool {
        self.committed.load(Ordering::Relaxed)
    }

    /// Bytes of page contents that a frame may have, so that a bandwidth limit is kept smoothly.
    pub(crate) fn frame_bytes(&self) -> u64 {
        const MOST: u64 = 4 << 20;
        let limit = self.pace.tuning.bandwidth_limit();
        limit.map_or(MOST, |limit| (limit / 20).clamp(4096, MOST))
    }
}

/// One connection of a sender.
pub(crate) struct Link<C: Channel + ?Sized> {
    /// Answers that were taken while looking for a refusal.
    taken: VecDeque<Message>,
    pub(crate) limits: Arc<Limits>,
    channel: C,
}

impl<C: Channel> Link<C> {
    pub(crate) const fn new(channel: C, limits: Arc<Limits>) -> Self {
        Self {
            taken: VecDeque::new(),
            limits,
            channel,
        }
    }
}

/// Of a frame that begins now.
fn patience(limits: &Limits) -> impl Fn(Duration) -> Result<()> {
    let start = limits.clock.now();
    move |stalled| {
        if stalled >= limits.silence {
            return Err(Error::Silent {
                during: "writing to the stream",
                after: stalled,
            });
        }
        if limits.clock.since(start) >= GRACE {
            limits.check()?;
        }
        Ok(())
    }
}

impl<C: Channel + ?Sized> Link<C> {
    /// See [`Channel::most_unanswered`].
    pub(crate) fn most_unanswered(&self) -> usize {
        self.channel.most_unanswered()
    }

    /// See [`Channel::advice`].
    pub(crate) fn advice(&self) -> Option<String> {
        self.channel.advice()
    }

    pub(crate) fn is_answered(&self) -> bool {
        self.channel.is_answered()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.channel.bytes()
    }

    /// Writes a frame when the bandwidth limit lets it, and returns its number.
    pub(crate) fn send(&mut self, message: &Message, payload: &Payload<'_>) -> Result<u64> {
        self.limits.check()?;
        self.look_for_refusal()?;
        self.wait_until_due(payload.bytes())?;
        let sent = self.channel.send(message, payload, &patience(&self.limits));
        match sent {
            Err(error @ (Error::Closed { .. } | Error::Broken { .. } | Error::Io { .. })) => {
                Err(self.last_words().unwrap_or(error))
            }
            sent => sent,
        }
    }

    /// Brings everything written to the disk, where the stream is a file.
    pub(crate) fn sync(&self) -> Result<()> {
        self.channel.sync()
    }

    /// Waits for the next answer.
    pub(crate) fn answer(&mut self, during: &'static str) -> Result<Message> {
        if self.taken.is_empty() {
            self.channel.flush(&patience(&self.limits))?;
        }
        let start = self.limits.clock.now();
        loop {
            self.limits.check()?;
            let answer = match self.taken.pop_front() {
                None => self.hear(TICK)?,
                taken => taken,
            };
            if let Some(answer) = answer {
                return Ok(answer);
            }
            let after = self.limits.clock.since(start);
            if after >= self.limits.silence {
                return Err(Error::Silent { during, after });
            }
        }
    }

    /// Lets `time` pass, unless something ends the migration.
    pub(crate) fn pause(&mut self, time: Duration) -> Result<()> {
        let end = self.limits.clock.now() + time;
        loop {
            self.limits.check()?;
            let left = self.limits.clock.until(end);
            if left.is_zero() {
                return Ok(());
            }
            if !self.is_answered() || self.taken.len() >= WAITING {
                self.limits.clock.sleep(left.min(TICK));
            } else {
                let answer = self.hear(left.min(TICK))?;
                self.taken.extend(answer);
            }
        }
    }

    fn wait_until_due(&mut self, payload: u64) -> Result<()> {
        // What is said besides pages is short, and some of it is urgent.
        if payload == 0 || self.limits.is_committed() {
            return Ok(());
        }
        let reserve = |limits: &Limits| limits.pace.reserve(limits.clock.now(), payload);
        let mut reserved = reserve(&self.limits);
        while let Some(place) = reserved {
            let left = self.limits.clock.until(place.due);
            if left.is_zero() {
                break;
            }
            self.pause(left.min(TICK))?;
            if !self.limits.pace.holds(place) {
                reserved = reserve(&self.limits);
            }
        }
        Ok(())
    }

    /// The next answer that has not been taken, if one comes within `wait`. A refusal is an error.
    fn hear(&mut self, wait: Duration) -> Result<Option<Message>> {
        match self.channel.answer(wait)? {
            Some(Message::Refused(reason)) => Err(Error::Refused { reason }),
            answer => Ok(answer),
        }
    }

    /// A destination that has refused reads no more: better heard before the next frame than after a timeout, and behind
    /// answers that nobody has awaited yet.
    fn look_for_refusal(&mut self) -> Result<()> {
        while self.taken.len() < WAITING
            && let Some(answer) = self.hear(Duration::ZERO)?
        {
            self.taken.push_back(answer);
        }
        Ok(())
    }

    /// After a failed write: the refusal that explains it, if there is one.
    pub(crate) fn last_words(&mut self) -> Option<Error> {
        let end = self.limits.clock.now() + GRACE;
        loop {
            let left = self.limits.clock.until(end);
            match self.channel.answer(left) {
                Ok(Some(Message::Refused(reason))) => return Some(Error::Refused { reason }),
                // One that never ends talking has no last word.
                Ok(Some(_)) if !left.is_zero() => {}
                Ok(_) | Err(_) => return None,
            }
        }
    }

    /// Says something that is not answered and changes nothing if it is lost, if there is still a way to.
    pub(crate) fn say_last(&mut self, message: &Message) {
        if self.channel.is_whole() {
            let patience = |stalled| {
                if stalled >= GRACE {
                    return Err(Error::Cancelled);
                }
                Ok(())
            };
            let _ = self.channel.send(message, &Payload::None, &patience);
        }
    }

    pub(crate) fn close(&mut self) {
        self.channel.close();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // helpers are not known to be tests
    use super::*;
    use crate::wire::Patience;

    /// A destination that has said all this, and reads nothing any more.
    struct Said(VecDeque<Message>);

    impl Channel for Said {
        fn send(&mut self, _: &Message, _: &Payload<'_>, _: Patience<'_>) -> Result<u64> {
            Ok(0)
        }

        fn answer(&mut self, _: Duration) -> Result<Option<Message>> {
            Ok(self.0.pop_front())
        }

        fn is_answered(&self) -> bool {
            true
        }

        fn is_whole(&self) -> bool {
            true
        }

        fn bytes(&self) -> u64 {
            0
        }

        fn sync(&self) -> Result<()> {
            Ok(())
        }

        fn close(&mut self) {}
    }

    fn link(said: &[Message]) -> Link<Said> {
        let (clock, now) = (Clock::real(), Instant::now());
        let limits = Limits {
            clock,
            cancel: CancelToken::new(),
            deadline: None,
            silence: Duration::from_secs(30),
            committed: AtomicBool::new(false),
            failure: Failure::default(),
            pace: Pace::new(Tuning::default(), now),
            totals: Totals::default(),
        };
        Link::new(Said(said.iter().cloned().collect()), Arc::new(limits))
    }

    #[test]
    fn a_refusal_behind_answers_that_nobody_awaits_is_heard() {
        let said = [
            Message::Applied(0),
            Message::Applied(1),
            Message::Refused("no room".into()),
        ];
        let refused = |heard: Result<()>| match heard {
            Err(Error::Refused { reason }) => assert_eq!(reason, "no room"),
            other => panic!("{other:?}"),
        };
        refused(link(&said).send(&Message::Sync, &Payload::None).map(drop));
        refused(link(&said).pause(Duration::from_millis(1)));
        // What was taken on the way is answered with, in its order.
        let mut link = link(&said[..2]);
        link.send(&Message::Sync, &Payload::None).unwrap();
        for n in 0..2 {
            assert!(matches!(link.answer("testing"), Ok(Message::Applied(of)) if of == n));
        }
    }

    #[test]
    fn a_limit_is_kept_whoever_takes_the_next_place() {
        let now = Instant::now();
        let tuning = Tuning::default();
        tuning.limit_bandwidth(Some(1000));
        let pace = Pace::new(tuning, now);
        let due = |now, bytes| pace.reserve(now, bytes).map(|place| place.due);
        let places = [500, 250, 250].map(|bytes| due(now, bytes));
        let after = |ms| Some(now + Duration::from_millis(ms));
        assert_eq!(places, [after(0), after(500), after(750)]);
        // Time in which nothing was sent is not made up for.
        let later = now + Duration::from_secs(9);
        assert_eq!(due(later, 1), Some(later));
    }

    #[test]
    fn what_waits_by_a_limit_that_holds_no_more_is_sent_by_the_one_that_holds() {
        let now = Instant::now();
        let tuning = Tuning::default();
        tuning.limit_bandwidth(Some(1));
        let pace = Pace::new(tuning.clone(), now);
        let place = |bytes| pace.reserve(now, bytes);
        place(1 << 40);
        let waits = place(1000).unwrap();
        assert!(waits.due > now && pace.holds(waits));
        tuning.limit_bandwidth(Some(1000));
        assert!(!pace.holds(waits));
        let due = [1000, 1000].map(|bytes| place(bytes).map(|place| place.due));
        assert_eq!(due, [Some(now), Some(now + Duration::from_secs(1))]);
        tuning.limit_bandwidth(None);
        assert_eq!(place(1), None);
        tuning.limit_bandwidth(Some(1000));
        assert_eq!(place(1).map(|place| place.due), Some(now));
    }
}
