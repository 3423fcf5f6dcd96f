//! Wherever the line breaks and whoever fails: the guest never runs at both ends, and the source's report says where it
//! is.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use std::time::Duration;

use common::*;
use gleaner_migrate::*;

fn small() -> ToySource {
    ToySource::new(12)
}

/// Bytes that a whole migration of [`small`] sends, each way, until it is decided: without the last frame, which says that
/// the source has heard.
fn lengths() -> [u64; 2] {
    let (near, far, line) = line([Fault::default(); 2]);
    let (report, _) = migrate(
        &small(),
        &ToyDestination::default(),
        options(),
        receiver_options(),
        near,
        far,
    );
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    let [forth, back] = line.map(|thread| thread.join().unwrap());
    [forth - wire::HEADER_LEN as u64, back]
}

/// Checks both ends after a migration, and returns the source's status.
fn check(
    source: &ToySource,
    place: &ToyDestination,
    report: &Report,
    outcomes: &Outcomes,
) -> Status {
    let there = place.place().running;
    let guest = source.guest();
    assert!(!(guest.running && there), "two guests: {report:?}");
    let relinquished = guest.calls.contains(&"relinquish");
    match report.status {
        Status::Completed => assert!(there && guest.calls.contains(&"complete")),
        Status::Failed | Status::Cancelled => {
            assert!(guest.running && guest.no_leases() && !there, "{report:?}");
            assert!(report.error.is_some());
        }
        Status::InDoubt => {
            assert!(relinquished && !guest.running, "{report:?}");
            assert!(!guest.calls.contains(&"complete") && !guest.calls.contains(&"resume"));
        }
    }
    assert_eq!(
        place.place().aborted,
        !there && report.status != Status::Completed
    );
    let outcome = outcomes.get(report.migration_id);
    if there {
        assert_eq!(outcome, Outcome::Running);
    } else {
        assert_ne!(outcome, Outcome::Running);
    }
    report.status
}

#[test]
fn the_line_breaks_after_any_number_of_bytes() {
    let lengths = lengths();
    let mut seen = [[0; 2]; 2]; // of failed and in-doubt
    for direction in 0..2 {
        let length = lengths[direction];
        // Every byte of frames without pages, and of pages one here and there.
        let last = length.saturating_sub(300);
        let cuts = (0..last)
            .step_by(if direction == 0 { 97 } else { 1 })
            .chain(last..length);
        for cut in cuts {
            let mut faults = [Fault::default(); 2];
            faults[direction].cut = Some(cut);
            let (near, far, threads) = line(faults);
            let (source, place) = (small(), ToyDestination::default());
            let receiver = receiver_options();
            let outcomes = receiver.outcomes.clone();
            let (report, _) = migrate(&source, &place, options(), receiver, near, far);
            for thread in threads {
                thread.join().unwrap();
            }
            // If nothing of a Hello came through there is nothing to abort but the attempt.
            match check(&source, &place, &report, &outcomes) {
                Status::Failed => seen[direction][0] += 1,
                Status::InDoubt => {
                    seen[direction][1] += 1;
                    // Whoever asks learns the truth.
                    let outcome = outcomes.get(report.migration_id);
                    let status = resolve(&mut source.clone(), outcome).unwrap();
                    let here = source.guest().running;
                    assert_ne!(here, place.place().running);
                    assert_eq!(status == Status::Failed, here);
                }
                status => panic!("{status:?} with the line cut after {cut} of {length}"),
            }
        }
    }
    assert!(seen.iter().flatten().all(|n| *n > 0), "{seen:?}");
}

/// Migrates in one thread over a line that breaks there; also frames, forth and back.
fn over_a_breaking_line(
    breaks: Option<Break>,
) -> (
    ToySource,
    ToyDestination,
    Report,
    Received,
    Outcomes,
    [u64; 2],
) {
    let (source, mut place) = (small(), ToyDestination::default());
    let there = place.clone();
    let (mut options, mut receiver) = (options(), receiver_options());
    options.clock = Clock::stopped();
    receiver.clock = options.clock.clone();
    let outcomes = receiver.outcomes.clone();
    let mut wire = MemoryWire::new(&mut place, receiver).latency(Duration::from_micros(50));
    if let Some(breaks) = breaks {
        wire = wire.break_at(breaks);
    }
    let report = Sender::new(&mut source.clone(), options).run_over(&mut wire);
    let frames = [Way::Forth, Way::Back].map(|way| wire.frames(way));
    if breaks.is_some_and(|at| at.silent) && report.status == Status::InDoubt {
        // The destination still waits: it must not have promised anything yet.
        let running = there.place().running;
        let known = outcomes.get(report.migration_id);
        let expected = [Outcome::Pending, Outcome::Running][usize::from(running)];
        assert_eq!(known, expected);
    }
    let received = wire.end();
    let running = there.place().running;
    assert_eq!(received.status == Status::Completed, running);
    (source, there, report, received, outcomes, frames)
}

/// Asks over a wire of its own.
fn ask_over_memory(outcomes: &Outcomes, id: MigrationId) -> Outcome {
    let mut nowhere = ToyDestination::default();
    let mut receiver = receiver_options();
    receiver.outcomes = outcomes.clone();
    let mut wire = MemoryWire::new(&mut nowhere, receiver);
    let question = wire::Message::Query(id);
    wire.send(&question, &wire::Payload::None, &|_| Ok(()))
        .unwrap();
    let answer = wire.answer(Duration::ZERO).unwrap();
    assert!(matches!(wire.end().error, Some(Error::OnlyQuery)));
    match answer {
        Some(wire::Message::Outcome(outcome)) => outcome,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_line_breaks_before_in_and_after_each_frame_loudly_and_silently() {
    let (source, place, report, received, outcomes, frames) = over_a_breaking_line(None);
    assert!(!received.may_be_asked);
    assert_eq!(
        check(&source, &place, &report, &outcomes),
        Status::Completed
    );
    for silent in [false, true] {
        for (way, frames) in [Way::Forth, Way::Back].into_iter().zip(frames) {
            for (frame, cut) in (0..frames)
                .flat_map(|frame| [Cut::Before, Cut::Half, Cut::After].map(|cut| (frame, cut)))
            {
                let breaks = Break {
                    way,
                    frame,
                    cut,
                    silent,
                };
                let (source, place, report, received, outcomes, _) =
                    over_a_breaking_line(Some(breaks));
                let status = check(&source, &place, &report, &outcomes);
                // GO, its answer, and that it was heard are the last frames. From GO on there is doubt, unless all came:
                // with READY whole GO is lost, with RUNNING whole nothing is that matters to the source.
                let from_the_end = frames - frame;
                let expected = match (way, from_the_end, cut) {
                    (Way::Forth, 1, _) | (Way::Back, 1, Cut::After) => Status::Completed,
                    (Way::Forth, 2, _) | (Way::Back, 1, _) | (Way::Back, 2, Cut::After) => {
                        Status::InDoubt
                    }
                    _ => Status::Failed,
                };
                assert_eq!(status, expected, "{breaks:?}");
                if received.status == Status::Completed {
                    let heard = (way, from_the_end, cut) == (Way::Forth, 1, Cut::After);
                    assert_ne!(received.may_be_asked, heard, "{breaks:?}");
                }
                if status == Status::InDoubt {
                    let outcome = ask_over_memory(&outcomes, report.migration_id);
                    resolve(&mut source.clone(), outcome).unwrap();
                    assert_ne!(source.guest().running, place.place().running);
                }
            }
        }
    }
}

/// Migrates over a faulty line. What became of the guest is what is said, whoever asks learns it, and where the guest runs
/// on it migrates again, whole.
fn survives(line: Line, timeout: Duration) -> Status {
    let (near, far, threads) = line;
    let (source, place) = (small(), ToyDestination::default());
    let (mut options, mut receiver) = (options(), receiver_options());
    options.io_timeout = timeout;
    receiver.io_timeout = timeout;
    let outcomes = receiver.outcomes.clone();
    let (report, _) = migrate(&source, &place, options, receiver, near, far);
    for thread in threads {
        thread.join().unwrap();
    }
    let status = check(&source, &place, &report, &outcomes);
    let ended = match status {
        Status::InDoubt => {
            let outcome = outcomes.get(report.migration_id);
            let resolved = resolve(&mut source.clone(), outcome).unwrap();
            assert_ne!(resolved, Status::InDoubt, "{outcome:?}");
            resolved
        }
        other => other,
    };
    let guest_runs_here = source.guest().running;
    assert_ne!(guest_runs_here, place.place().running);
    assert_eq!(guest_runs_here, ended == Status::Failed);
    if guest_runs_here {
        let again = ToyDestination::default();
        source.guest().touch();
        clean(&source, &again);
        assert_same(&source, &again);
    } else {
        assert_same(&source, &place);
    }
    status
}

/// Over a line without a fault.
fn clean(source: &ToySource, place: &ToyDestination) {
    let (near, far) = pair();
    let (report, _) = migrate(source, place, options(), receiver_options(), near, far);
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
}

/// Of a direction, bytes here and there, and those of the last frame, on which the guest's place depends.
fn points(length: u64) -> impl Iterator<Item = u64> {
    let last = length - 30;
    (0..last)
        .step_by(usize::try_from(length / 20).unwrap())
        .chain((last..length).step_by(5))
}

/// As many at a time: they mostly wait.
const AT_ONCE: usize = 8;

/// A fault in each direction at each point; how many failed, and how many left a doubt.
fn everywhere(
    lines: fn([Fault; 2]) -> Line,
    timeout: Duration,
    fault: impl Fn(u64) -> Fault + Sync,
) -> [usize; 2] {
    let lengths = lengths();
    let cases: Vec<_> = (0..2)
        .flat_map(|direction| points(lengths[direction]).map(move |at| (direction, at)))
        .collect();
    let of = |(direction, at): (usize, u64)| {
        let mut faults = [Fault::default(); 2];
        faults[direction] = fault(at);
        survives(lines(faults), timeout)
    };
    let statuses: Vec<_> = std::thread::scope(|scope| {
        let shares = cases.chunks(cases.len().div_ceil(AT_ONCE));
        let workers: Vec<_> = shares
            .map(|share| scope.spawn(|| share.iter().copied().map(of).collect::<Vec<_>>()))
            .collect();
        workers
            .into_iter()
            .flat_map(|w| w.join().unwrap())
            .collect()
    });
    let count = |status| statuses.iter().filter(|s| **s == status).count();
    let counts = [count(Status::Failed), count(Status::InDoubt)];
    assert_eq!(counts[0] + counts[1], cases.len(), "{statuses:?}");
    counts
}

#[test]
fn the_line_is_reset_anywhere() {
    let long = Duration::from_secs(10);
    let reset = |at| Fault {
        reset: Some(at),
        ..Fault::default()
    };
    let [failed, doubts] = everywhere(tcp_line, long, reset);
    assert!(failed > 0 && doubts > 0, "{failed} {doubts}");
}

#[test]
fn the_line_stalls_anywhere_for_longer_than_either_end_waits() {
    let stall = |at| Fault {
        stall: Some(at),
        ..Fault::default()
    };
    for lines in [line, tcp_line] {
        let [failed, doubts] = everywhere(lines, Duration::from_millis(100), stall);
        assert!(failed > 0 && doubts > 0, "{failed} {doubts}");
    }
}

/// Headers, metadata and pages come in pieces; answers, which are short, byte by byte too.
#[test]
fn the_line_carries_a_few_bytes_at_a_time() {
    for lines in [line, tcp_line] {
        for pieces in [[61, 1], [509, 5], [4095, 27]] {
            let slow = pieces.map(|pieces| Fault {
                pieces: Some(pieces),
                ..Fault::default()
            });
            let status = survives(lines(slow), Duration::from_secs(60));
            assert_eq!(status, Status::Completed);
        }
    }
}

/// More than all buffers on the way take: the sender's own writes stall.
#[test]
fn writes_that_stall_are_given_up() {
    let source = ToySource::new(12_000);
    let stall = Fault {
        stall: Some(100_000),
        ..Fault::default()
    };
    let (near, far, threads) = line([stall, Fault::default()]);
    let (mut options, receiver) = (options(), receiver_options());
    options.io_timeout = Duration::from_millis(100);
    let (place, outcomes) = (ToyDestination::default(), receiver.outcomes.clone());
    let (report, _) = migrate(&source, &place, options, receiver, near, far);
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(check(&source, &place, &report, &outcomes), Status::Failed);
    assert!(
        matches!(report.error, Some(Error::Silent { .. })),
        "{report:?}"
    );
    let again = ToyDestination::default();
    source.guest().touch();
    clean(&source, &again);
    assert_same(&source, &again);
}

#[test]
fn a_doubt_is_resolved_by_asking() {
    let dir = tempfile::tempdir().unwrap();
    let address: Address = format!("unix:{}", dir.path().join("s").display())
        .parse()
        .unwrap();
    let listener = Listener::bind(&address).unwrap();
    let to = Connector::new(address);
    let [forth, back] = lengths();
    // GO gets through and RUNNING does not; GO does not get through.
    for (faults, expected) in [
        ([None, Some(back - 1)], Outcome::Running),
        ([Some(forth - 1), None], Outcome::Refused),
    ] {
        let (near, far, _line) = line(faults.map(|cut| Fault {
            cut,
            ..Fault::default()
        }));
        let (source, place) = (small(), ToyDestination::default());
        let receiver = receiver_options();
        let outcomes = receiver.outcomes.clone();
        let (report, _) = migrate(&source, &place, options(), receiver, near, far);
        assert_eq!(report.status, Status::InDoubt);
        assert!(
            report
                .reason
                .unwrap()
                .contains(&report.migration_id.to_string())
        );
        let limit = Duration::from_secs(10);
        let outcome = std::thread::scope(|scope| {
            let serving =
                scope.spawn(|| serve_query(listener.accept().unwrap(), &outcomes, limit).unwrap());
            let asked = query(&to, report.migration_id, limit).unwrap();
            assert_eq!(serving.join().unwrap(), (report.migration_id, asked));
            asked
        });
        assert_eq!(outcome, expected);
        // What proves nothing changes nothing.
        for unclear in [Outcome::Unknown, Outcome::Pending] {
            assert_eq!(
                resolve(&mut source.clone(), unclear).unwrap(),
                Status::InDoubt
            );
            assert!(!source.guest().running);
        }
        resolve(&mut source.clone(), outcome).unwrap();
        assert_eq!(source.guest().running, expected == Outcome::Refused);
        assert_eq!(place.place().running, expected == Outcome::Running);
    }
}

#[test]
fn the_reason_of_a_refusal_is_what_the_source_reports() {
    for call in ["add_block", "layout", "ready", "run"] {
        let (source, place) = (small(), ToyDestination::failing(call));
        let (near, far) = pair();
        let receiver = receiver_options();
        let outcomes = receiver.outcomes.clone();
        let (report, received) = migrate(&source, &place, options(), receiver, near, far);
        assert_eq!(check(&source, &place, &report, &outcomes), Status::Failed);
        let reason = report.reason.unwrap();
        assert_eq!(reason, format!("destination: no {call} on a Sunday"));
        assert_eq!(Some(reason), received.reason);
        assert_eq!(outcomes.get(report.migration_id), Outcome::Refused);
    }
}

#[test]
fn a_source_that_fails_runs_on() {
    for call in [
        "layout",
        "harvest",
        "lease",
        "ack",
        "stop",
        "state",
        "relinquish",
    ] {
        let (source, place) = (small(), ToyDestination::default());
        source.guest().failing = Some(call);
        let (near, far) = pair();
        let receiver = receiver_options();
        let outcomes = receiver.outcomes.clone();
        let (report, received) = migrate(&source, &place, options(), receiver, near, far);
        assert_eq!(
            check(&source, &place, &report, &outcomes),
            Status::Failed,
            "{call}"
        );
        let reason = report.reason.unwrap();
        assert_eq!(reason, format!("source: {call} does not work"));
        // The destination hears why.
        assert_eq!(received.status, Status::Cancelled);
        assert!(received.reason.unwrap().contains(&reason));
    }
}

/// A page that was not re-armed is not leased. It must not be left behind by a switchover.
#[test]
fn pages_that_are_held_back_hold_back_the_switchover() {
    let (source, place) = (small(), ToyDestination::default());
    source.guest().held_back = true;
    let (near, far) = pair();
    let receiver = receiver_options();
    let outcomes = receiver.outcomes.clone();
    let (report, _) = migrate(&source, &place, options(), receiver, near, far);
    assert_eq!(check(&source, &place, &report, &outcomes), Status::Failed);
    assert!(matches!(
        report.error,
        Some(Error::HeldBack {
            leased: 0,
            dirty: 1
        })
    ));
}

#[test]
fn a_source_that_cannot_resume_is_not_said_to_run() {
    let source = small();
    source.guest().failing = Some("resume");
    let (near, far) = pair();
    let place = ToyDestination::failing("ready");
    let (report, _) = migrate(&source, &place, options(), receiver_options(), near, far);
    assert_eq!(report.status, Status::InDoubt);
    assert!(report.reason.unwrap().contains("could not be resumed"));
}

#[test]
fn a_migration_id_serves_once() {
    let receiver = receiver_options();
    let (near, far) = pair();
    let mut first = options();
    let id = first.id;
    first.hold = None;
    let (report, _) = migrate(
        &small(),
        &ToyDestination::default(),
        first,
        receiver.clone(),
        near,
        far,
    );
    assert_eq!(report.status, Status::Completed);
    let (near, far) = pair();
    let mut again = options();
    again.id = id;
    let outcomes = receiver.outcomes.clone();
    let (report, _) = migrate(
        &small(),
        &ToyDestination::default(),
        again,
        receiver,
        near,
        far,
    );
    assert_eq!(report.status, Status::Failed);
    assert!(report.reason.unwrap().contains("used before"));
    assert_eq!(
        outcomes.get(id),
        Outcome::Running,
        "the answer must not change"
    );
}
