//! Conversations of agent and service.

use gleaner::rate::{Look, Metered};
use gleaner::service::{LeaseMessage, Request, Response, VERSION};
use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation, PageRange, Slot};

use gleaner_migrate::{Throttle, Throttles};
use std::num::NonZeroU64;
use std::time::Duration;

use super::Seed;
use crate::agent::{ANY_LENGTH, WITH_FD};
use crate::service::{FAIL, HANG_UP};

const HELLO: Request = Request::Hello {
    version: VERSION,
    migration: [9; 16],
};
const WELCOME: Response = Response::Welcome { version: VERSION };
/// Of the service that the requests go to.
const BLOCK: BlockId = BlockId(5);

fn framed(bytes: &mut Vec<u8>, frame: &[u8]) {
    bytes.push(u8::try_from(frame.len()).expect("a short message"));
    bytes.extend(frame);
}

/// Says these; `before` comes before each.
fn said(before: &[u8], requests: &[Request]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for request in requests {
        bytes.extend(before);
        framed(&mut bytes, &request.encode().expect("a request"));
    }
    bytes
}

/// A row of requests for the service.
pub fn requests() -> Vec<Seed> {
    use Request::{
        Ack, Block, Complete, HandOver, Harvest, Layout, Lease, Release, Relinquish, Resume, State,
        Stop, Throttle as Slow, Throttles as Slows, Transactions,
    };
    let rounds = [
        HELLO,
        Layout,
        Block(BLOCK),
        Harvest,
        Lease(9),
        Ack(0),
        Lease(1 << 40),
        Release(1),
        Slows,
        Slow(Throttle::All { percent: 99 }),
        Slow(Throttle::Writers {
            pages_per_second: NonZeroU64::MIN,
        }),
        Stop,
        State,
        Harvest,
        Lease(100),
        Ack(2),
        HandOver(BLOCK),
        Transactions,
        Relinquish,
    ];
    let with = |after: &[Request]| [&rounds[..], after].concat();
    let whole = with(&[Complete]);
    let again = with(&[Resume, HELLO, Layout]);
    let doubt = |end: &[Request]| {
        let mut bytes = said(&[], &rounds);
        bytes.push(HANG_UP);
        bytes.extend(said(&[], &[HELLO, Layout, Harvest]));
        bytes.extend(said(&[], end));
        bytes
    };
    let mut gone = said(&[], &whole);
    gone.push(HANG_UP);
    gone.extend(said(&[], &[HELLO, Resume]));
    // Each call fails once, then comes off.
    let twice: Vec<Request> = whole.iter().flat_map(|r| [r.clone(), r.clone()]).collect();
    let mut failing = Vec::new();
    for (number, request) in twice.iter().enumerate() {
        let fault: &[u8] = if number % 2 == 0 { &[FAIL] } else { &[] };
        failing.extend(said(fault, std::slice::from_ref(request)));
    }
    let old = Request::Hello {
        version: 9,
        migration: [9; 16],
    };
    let meters = [
        Request::Look,
        HELLO,
        Request::Metered,
        Request::Look,
        Request::Rest,
    ];
    let unknown = [
        HELLO,
        Block(BlockId(77)),
        Ack(7),
        Release(u64::MAX),
        Lease(0),
        HandOver(BLOCK),
        Stop,
        HandOver(BlockId(77)),
    ];
    let mut seeds = vec![
        ("completes", said(&[], &whole)),
        ("resumes-and-begins-again", said(&[], &again)),
        ("in-doubt-then-complete", doubt(&[Complete])),
        ("in-doubt-then-resume", doubt(&[Resume, HELLO, Stop])),
        ("migrated-away", gone),
        ("each-call-fails-once", failing),
        ("hangs-up-after-each", said(&[HANG_UP], &whole)),
        ("hello-before-each", said(&said(&[], &[HELLO]), &whole)),
        (
            "stopped-then-gone",
            [said(&[], &rounds[..13]), vec![HANG_UP], said(&[], &[HELLO])].concat(),
        ),
        (
            "out-of-order",
            said(&[], &[Stop, HELLO, State, Complete, Relinquish, Stop, Stop]),
        ),
        ("another-version", said(&[], &[old, Layout])),
        ("a-meters-questions", said(&[], &meters)),
        ("nothing-of-that-name", said(&[], &unknown)),
        ("no-message", vec![5, 250, 250, 250, 250, 250]),
    ];
    for (name, response) in responses() {
        seeds.push((name, response.encode().expect("a response")));
    }
    seeds
        .into_iter()
        .map(|(name, bytes)| (name.to_owned(), bytes))
        .collect()
}

fn layout() -> Response {
    Response::Layout {
        generation: Generation(3),
        blocks: vec![BlockInfo {
            id: BlockId(2),
            name: "ram".into(),
            pages: 8,
        }],
        slots: vec![Slot {
            key: 1.into(),
            gpa: 1 << 20,
            block: BlockId(2),
            range: PageRange::new(0, 8),
            readonly: false,
        }],
    }
}

fn look() -> Look {
    Look {
        at: Duration::from_millis(50),
        harvest: Duration::from_micros(200),
        blocks: vec![BlockInfo {
            id: BlockId(2),
            name: "ram".into(),
            pages: 8,
        }],
        gone: vec![BlockId(1)],
        written: vec![Extent::new(BlockId(2), 3, 4)],
        vcpus: vec![(0, 3), (1, 1)],
        blackouts: gleaner::Blackouts::default(),
        migrated_away: false,
    }
}

fn leased(extents: &[(u64, u64, u64)]) -> Response {
    let extents = extents
        .iter()
        .map(|(block, first, pages)| Extent::new(BlockId(*block), *first, *pages));
    Response::Leased(Some(LeaseMessage {
        id: 4,
        generation: Generation(3),
        extents: extents.collect(),
    }))
}

fn responses() -> [(&'static str, Response); 9] {
    [
        (
            "response-in-doubt",
            Response::InDoubt { migration: [1; 16] },
        ),
        ("response-layout", layout()),
        ("response-lease", leased(&[(2, 0, 3), (2, 5, 1)])),
        ("response-state", Response::State(vec![1, 2, 3])),
        ("response-number", Response::Number(u64::MAX)),
        ("response-error", Response::Error("no".into())),
        ("response-throttles", Response::Throttles(Throttles::All)),
        ("response-look", Response::Look(Box::new(look()))),
        (
            "response-metered",
            Response::Metered(Metered {
                tracking: "ring".into(),
                data_pages: 8,
                throttles: Throttles::Writers,
            }),
        ),
    ]
}

/// Calls of the agent, and what it hears.
fn heard(calls: &[u8], answers: &[(Response, bool)]) -> Vec<u8> {
    let mut bytes = vec![u8::try_from(calls.len()).expect("few calls")];
    bytes.extend(calls);
    for (answer, with_fd) in answers {
        bytes.extend(with_fd.then_some(WITH_FD));
        framed(&mut bytes, &answer.encode().expect("an answer"));
    }
    bytes
}

/// What a service may answer an agent.
pub fn answers() -> Vec<Seed> {
    const LAYOUT: u8 = 0;
    const HARVEST: u8 = 1;
    const LEASE: u8 = 2;
    let plain = |response| (response, false);
    let block = |offset| (Response::Block { offset }, true);
    let done = || plain(Response::Done);
    let harvested = Response::Harvested {
        generation: Generation(3),
        dirty_pages: 8,
    };
    let lease = |extents: &[_], block| {
        let answers = [
            plain(WELCOME),
            plain(leased(extents)),
            plain(layout()),
            block,
        ];
        heard(&[LEASE], &answers)
    };
    let whole = [
        plain(WELCOME),
        plain(layout()),
        plain(harvested),
        plain(leased(&[(2, 0, 3), (2, 5, 1)])),
        block(0),
        done(),
        plain(Response::Leased(None)),
        done(),
        plain(Response::State(vec![3; 20])),
        plain(Response::Number(7)),
        done(),
        done(),
    ];
    let calls = [LAYOUT, HARVEST, LEASE, 4, LEASE, 6, 7, 11, 8, 9];
    let in_doubt = [plain(Response::InDoubt { migration: [1; 16] }), done()];
    let mut long = heard(&[LAYOUT], &[plain(WELCOME)]);
    long.push(ANY_LENGTH);
    long.extend(u32::MAX.to_le_bytes());
    let mut most = heard(&[LAYOUT], &[plain(WELCOME)]);
    most.push(ANY_LENGTH);
    most.extend((64u32 << 20).to_le_bytes());
    let seeds = [
        ("completes", heard(&calls, &whole)),
        ("in-doubt", heard(&[10], &in_doubt)),
        (
            "refuses",
            heard(&calls, &[plain(Response::Error("not you".into()))]),
        ),
        (
            "answers-something-else",
            heard(&calls, &vec![plain(WELCOME); 11]),
        ),
        (
            "lease-past-the-block",
            lease(&[(2, 7, 2), (2, u64::MAX, 1)], block(0)),
        ),
        ("lease-of-nothing", lease(&[(2, 8, 0)], block(0))),
        ("offset-past-the-file", lease(&[(2, 0, 8)], block(1 << 40))),
        ("offset-within-a-page", lease(&[(2, 0, 8)], block(100))),
        (
            "block-without-descriptor",
            lease(&[(2, 0, 8)], plain(Response::Block { offset: 0 })),
        ),
        ("block-not-in-the-layout", lease(&[(77, 0, 8)], block(4096))),
        ("length-over-the-limit", long),
        ("length-without-bytes", most),
    ];
    seeds
        .into_iter()
        .map(|(name, bytes)| (name.to_owned(), bytes))
        .collect()
}
