//! Seeds get to where their names say: a harness that refuses everything would find nothing.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

use gleaner::service::Response;
use gleaner::vmm::guest::VcpuState;
use gleaner_fuzz::{agent, layouts, migration_stream, qemu_stream, seeds, service, trace};
use gleaner_migrate::{Error, Received, Status};

fn seed(target: &str, name: &str) -> Vec<u8> {
    let mut seeds = seeds::of(target).into_iter();
    let found = seeds.find(|(known, _)| known == name);
    found.unwrap_or_else(|| panic!("no {target}/{name}")).1
}

fn received(name: &str) -> Received {
    migration_stream::receive(&seed("migration_stream", name)).unwrap()
}

#[test]
fn whole_streams_complete_and_failing_calls_end_them() {
    for name in ["completes", "completes-by-file", "as-it-is"] {
        let received = received(name);
        assert_eq!(received.status, Status::Completed, "{name}: {received:?}");
    }
    for name in ["packed-lz4", "packed-zstd"] {
        let received = received(name);
        assert_eq!(received.status, Status::Completed, "{name}: {received:?}");
        assert_eq!(received.pages, 5, "{name}");
    }
    let whole = received("completes");
    assert_eq!((whole.pages, whole.zero_pages, whole.layouts), (6, 4, 3));
    for call in migration_stream::CALLS {
        let received = received(&format!("fails-{call}"));
        let reason = received.reason.unwrap();
        assert!(reason.contains(&format!("no {call} here")), "{reason}");
    }
}

#[test]
fn streams_of_a_qemu_come_to_where_their_names_say() {
    let received = |name| qemu_stream::receive(&seed("qemu_stream", name)).unwrap();
    for name in ["completes", "without-devices", "with-marks"] {
        let received = received(name);
        assert_eq!(received.status, Status::Completed, "{name}: {received:?}");
        assert_eq!((received.pages, received.zero_pages), (1, 1), "{name}");
    }
    let refused = |name| received(name).error.unwrap();
    assert!(matches!(
        refused("never-came"),
        Error::NeverCame { page: 1, .. }
    ));
    assert!(matches!(
        refused("delta-of-nothing"),
        Error::QemuStream { .. }
    ));
    assert!(matches!(refused("ends-early"), Error::Truncated { .. }));
    assert!(matches!(refused("claims-much"), Error::Destination { .. }));
}

#[test]
fn spoilt_streams_are_refused_for_what_is_wrong_with_them() {
    let refused = |name| received(name).error.unwrap();
    assert!(matches!(refused("query"), Error::OnlyQuery));
    assert!(matches!(refused("cancels"), Error::CalledOff { .. }));
    assert!(matches!(
        refused("unknown-block"),
        Error::UnknownBlock { .. }
    ));
    for name in ["outside-its-block", "wraps", "digests-outside"] {
        assert!(
            matches!(refused(name), Error::OutsideBlock { .. }),
            "{name}"
        );
    }
    assert!(matches!(refused("stale"), Error::Stale { .. }));
    assert!(matches!(refused("differs"), Error::Differs { page: 4, .. }));
    assert!(matches!(
        refused("digests-of-another-length"),
        Error::PayloadLength { .. }
    ));
    assert!(matches!(refused("block-grows"), Error::BlockChanged { .. }));
    for name in ["overlapping-slots", "unsafe-name"] {
        assert!(matches!(refused(name), Error::Layout { .. }), "{name}");
    }
    assert!(matches!(refused("go-too-early"), Error::OutOfState { .. }));
    assert!(matches!(
        refused("as-it-is-ends-early"),
        Error::Closed { .. }
    ));
    assert!(matches!(
        refused("more-than-there-is"),
        Error::Destination { .. }
    ));
    assert!(matches!(
        refused("packed-no-base"),
        Error::NoBase { page: 5, .. }
    ));
    for name in [
        "packed-past-its-page",
        "packed-other-codec",
        "packed-ends-early",
        "packed-too-few",
    ] {
        assert!(matches!(refused(name), Error::Packed { .. }), "{name}");
    }
    for name in ["local", "local-without-memory"] {
        let error = refused(name);
        assert!(matches!(error, Error::NotShareable { .. }), "{error}");
    }
    assert!(matches!(
        refused("memory-among-pages"),
        Error::OutOfState { .. }
    ));
    // The second extent wins, and the stream goes on.
    assert_eq!(received("twice-the-same-page").pages, 4);
}

#[test]
fn the_service_is_brought_to_every_end() {
    let last = |name| service::answers(&seed("service", name)).pop();
    for name in [
        "completes",
        "in-doubt-then-complete",
        "each-call-fails-once",
    ] {
        let answers = service::answers(&seed("service", name));
        assert_eq!(answers.last(), Some(&Response::Done), "{name}");
        assert!(answers.iter().any(|a| matches!(a, Response::Block { .. })));
        assert!(answers.contains(&Response::State(b"state".to_vec())));
    }
    assert!(matches!(
        last("resumes-and-begins-again"),
        Some(Response::Layout { .. })
    ));
    assert_eq!(last("in-doubt-then-resume"), Some(Response::Done));
    assert_eq!(last("another-version"), None);
}

#[test]
fn the_agent_reads_the_pages_it_is_given_and_no_others() {
    let read = |name| agent::pages_read(&seed("agent", name));
    assert_eq!(read("completes"), 4);
    assert_eq!(read("lease-past-the-block"), 0);
    assert_eq!(read("offset-past-the-file"), 0);
    assert_eq!(read("block-without-descriptor"), 0);
    assert_eq!(read("block-not-in-the-layout"), 0);
}

#[test]
fn histories_change_layouts_and_lease_pages_while_sources_fail() {
    let of = |name| layouts::history(&seed("layouts", name));
    for name in ["split", "hole", "moved", "swapped", "replaced"] {
        let tally = of(name);
        assert_eq!((tally.transactions, tally.failed), (2, 0), "{name}");
        assert!(tally.leased > 66, "{name}: {tally:?}");
    }
    for name in ["split-and-merged", "hole-filled"] {
        assert_eq!(of(name).transactions, 3, "{name}");
    }
    assert_eq!(of("unplugged").transactions, 2);
    for name in ["overlap-refused", "removed-while-mapped"] {
        assert_eq!(of(name).transactions, 1, "{name}");
    }
    let faults = of("faults");
    assert_eq!(
        (faults.transactions, faults.failed, faults.leased),
        (2, 3, 4)
    );
}

#[test]
fn traces_are_read_and_refused_for_what_is_wrong_with_them() {
    let read = |name| trace::read(&seed("trace", name));
    for name in ["whole", "held", "one-of-four", "held-one-of-four"] {
        let trace = read(name).unwrap();
        assert_eq!((trace.records().len(), trace.cut()), (4, None), "{name}");
        assert_eq!(trace.total_pages(), 1064, "{name}");
    }
    assert_eq!(read("held").unwrap().records()[1].pages, 65);
    let cut = read("cut").unwrap();
    assert!(cut.records().len() == 3 && cut.cut().is_some());
    assert!(matches!(
        read("newer"),
        Err(Error::TraceVersion { found: 2, .. })
    ));
    assert!(matches!(read("no-trace"), Err(Error::NotATrace)));
    for (name, problem) in [
        ("damaged", "checksum of a record"),
        ("endless", "impossible length"),
        ("follows-too-few", "too few pages"),
        ("unknown-kind", "unknown kind"),
        ("without-time", "without a time"),
        ("past-the-end", "no block has"),
        ("across-the-end", "no block has"),
        ("after-a-hundred-years", "hundred years"),
        ("too-much-memory", "more memory"),
        ("no-utf-8", "no UTF-8"),
    ] {
        let refused = read(name).unwrap_err();
        assert!(matches!(refused, Error::DamagedTrace { .. }), "{name}");
        assert!(refused.to_string().contains(problem), "{name}: {refused}");
    }
}

#[test]
fn a_state_of_zeros_is_a_state() {
    VcpuState::from_bytes(&seed("vcpu_state", "fresh")).unwrap();
}
