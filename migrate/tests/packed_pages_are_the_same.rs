//! Pages that travel packed arrive as if they had travelled as they are.

#![cfg(feature = "compress")]
#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use common::*;
use gleaner_migrate::*;

const CODECS: [Compress; 3] = [Compress::None, Compress::Lz4, Compress::Zstd];
const PAGES: u64 = 6000;
/// From here on contents are random, and before they look like text.
const RANDOM: u64 = 4000;
/// The first pages are hot: a few bytes of them change in each round.
const HOT: u64 = 500;

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn page(number: u64) -> Vec<u8> {
    let mut state = number + 1;
    let mut word = || {
        let random = random(&mut state);
        let text = b"harvest lease round ".repeat(4);
        let at = usize::try_from(random % 40).unwrap();
        match number {
            RANDOM.. => random.to_le_bytes().to_vec(),
            _ => text[at..at + 8].to_vec(),
        }
    };
    (0..512).flat_map(|_| word()).collect()
}

fn filled(script: Script) -> ToySource {
    let source = ToySource::scripted(PAGES, script);
    let mut guest = source.guest();
    let ram = guest.id("ram");
    for number in 0..PAGES {
        guest.fill(ram, number, &page(number));
    }
    drop(guest);
    source
}

/// The guest writes a few bytes of hot pages of both kinds, whole pages elsewhere, and makes some zero and fills them again.
fn busy(guest: &mut Guest, harvest: u32) {
    if harvest > 7 {
        return;
    }
    let ram = guest.id("ram");
    let n = u64::from(harvest);
    let byte = u8::try_from(n).unwrap();
    for number in (0..HOT).chain(RANDOM..RANDOM + HOT) {
        guest.write(ram, number, byte);
    }
    for number in (HOT..RANDOM).step_by(37) {
        guest.fill(ram, number, &page(number * 31 + n));
    }
    for number in (0..HOT).step_by(11) {
        match n % 3 {
            0 => guest.zero(ram, number),
            1 => guest.fill(ram, number, &page(number)),
            _ => {}
        }
    }
    match n {
        3 => drop(guest.add_block("more", 300)),
        4 => {
            let more = guest.id("more");
            (0..300).for_each(|number| guest.fill(more, number, &page(number)));
        }
        5 => guest.remove_block("more"),
        6 => drop(guest.add_block("more", 300)),
        _ => {}
    }
}

/// No switchover before the guest has done what it does in the first rounds.
fn with(compress: Compress, channels: u16) -> SenderOptions {
    let mut rounds = 0;
    let held = move || {
        rounds += 1;
        rounds > 7
    };
    SenderOptions {
        compress,
        channels,
        hold: Some(Box::new(held)),
        ..options()
    }
}

#[test]
fn memory_is_the_same_whatever_packs_it_and_contents_that_shrink_do() {
    let dir = tempfile::tempdir().unwrap();
    let unix = format!("unix:{}", dir.path().join("s").display());
    for compress in CODECS {
        for (address, channels, used) in [
            (unix.as_str(), 1, None),
            (unix.as_str(), 2, Some(0xee)),
            (unix.as_str(), 4, None),
            ("tcp:127.0.0.1:0", 1, Some(0xee)),
            ("tcp:127.0.0.1:0", 2, None),
            ("tcp:127.0.0.1:0", 4, Some(0xee)),
        ] {
            let source = filled(busy);
            let place = used.map_or_else(ToyDestination::default, ToyDestination::used);
            let (report, received) = migrate_to(
                &address.parse().unwrap(),
                &source,
                &place,
                with(compress, channels),
            );
            let case = format!("{compress:?}, {channels} connections, {address}, used: {used:?}");
            assert_eq!(
                report.status,
                Status::Completed,
                "{:?} {case}",
                report.reason
            );
            assert_same(&source, &place);
            assert_eq!(received.pages, report.pages_sent, "{case}");
            // What was left out and what went make what there was, but for headers.
            let contents = report.pages_sent * 4096;
            let went = report.bytes_on_wire + report.bytes_saved;
            assert!(
                (contents..contents + contents / 20).contains(&went),
                "{case}: {report:?}"
            );
            let (saved, deltas) = (report.bytes_saved, report.pages_delta);
            if compress == Compress::None {
                assert_eq!((saved, deltas), (0, 0), "{case}");
                continue;
            }
            // Hot pages that are never zero: whole in the first round and when they come again, then five times as what
            // has changed.
            let hot = 5 * HOT;
            assert!(deltas >= hot, "{case}: {deltas} deltas");
            // Words of eight bytes: text shrinks to less than half.
            let least = (RANDOM - HOT) * 4096 / 2 + hot * 4000;
            assert!(saved >= least, "{case}: {saved} bytes saved");
        }
    }
}

#[test]
fn a_file_holds_packed_pages_too() {
    let dir = tempfile::tempdir().unwrap();
    let address = Address::File(dir.path().join("guest"));
    for compress in CODECS {
        let source = filled(busy);
        let report =
            Sender::new(&mut source.clone(), with(compress, 1)).run(connect(&address).unwrap());
        assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
        let place = ToyDestination::used(0xee);
        let received = Receiver::new(&mut place.clone(), receiver_options())
            .listen(&Listener::bind(&address).unwrap())
            .unwrap();
        assert_eq!(received.status, Status::Completed, "{:?}", received.reason);
        assert_same(&source, &place);
    }
}

/// The line breaks wherever it may. What the first destination was sent is no base for what the second one is.
#[test]
fn a_second_attempt_knows_nothing_of_the_first() {
    const PAGES: u64 = 300;
    let mut completed = false;
    for at in 0.. {
        let source = ToySource::scripted(PAGES, |guest, harvest| {
            let ram = guest.id("ram");
            let byte = u8::try_from(harvest % 250).unwrap();
            (0..PAGES / 2).for_each(|page| guest.write(ram, page, byte));
            if harvest % 3 == 2 {
                (0..PAGES / 2)
                    .step_by(7)
                    .for_each(|page| guest.zero(ram, page));
            }
        });
        let run = |breaks: Option<Break>| {
            let clock = Clock::stopped();
            let mut place = ToyDestination::used(0xee);
            let there = place.clone();
            let receiver = ReceiverOptions {
                clock: clock.clone(),
                ..receiver_options()
            };
            let options = SenderOptions {
                clock,
                ..with(Compress::Lz4, 1)
            };
            let mut wire = MemoryWire::new(&mut place, receiver);
            if let Some(breaks) = breaks {
                wire = wire.break_at(breaks);
            }
            let report = Sender::new(&mut source.clone(), options).run_over(&mut wire);
            let received = wire.end();
            (report, received, there)
        };
        let (first, _, there) = run(Some(Break {
            way: Way::Forth,
            frame: at,
            cut: Cut::Half,
            silent: false,
        }));
        if first.status == Status::Completed {
            assert_same(&source, &there);
            completed = true;
            break;
        }
        if first.status == Status::InDoubt {
            continue;
        }
        source.guest().touch();
        let (second, received, there) = run(None);
        assert_eq!(
            second.status,
            Status::Completed,
            "{at}: {:?}",
            received.reason
        );
        assert!(second.pages_delta > 3 * PAGES / 2, "{at}: {second:?}");
        assert_same(&source, &there);
    }
    assert!(completed);
}

#[test]
fn random_contents_go_as_they_are() {
    let source = ToySource::new(PAGES);
    let mut guest = source.guest();
    let ram = guest.id("ram");
    (0..PAGES).for_each(|number| guest.fill(ram, number, &page(RANDOM + number)));
    drop(guest);
    for compress in [Compress::Lz4, Compress::Zstd] {
        let place = ToyDestination::default();
        let (near, far) = pair();
        let receiver = receiver_options();
        source.guest().touch();
        let (report, _) = migrate(&source, &place, with(compress, 1), receiver, near, far);
        assert_eq!(report.status, Status::Completed);
        assert_same(&source, &place);
        // The page that saving the state dirties may shrink, and no other.
        assert!(report.bytes_saved <= 4096, "{}", report.bytes_saved);
    }
}
