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

fn with(compress: Compress, channels: u16) -> SenderOptions {
    SenderOptions {
        compress,
        channels,
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
            // Words of twenty bytes: text shrinks to less than half.
            let least = match compress {
                Compress::None => 0,
                _ => (RANDOM - 300) * 4096 / 2,
            };
            let saved = report.bytes_saved;
            assert!(
                saved >= least && (saved == 0) == (compress == Compress::None),
                "{case}: {saved} bytes saved"
            );
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
