//! After a migration both ends hold the same bytes, whatever happened to memory and layout on the way.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use std::thread;

use common::*;
use gleaner_migrate::*;

#[test]
fn over_a_socket_pair_while_the_guest_writes() {
    let source = ToySource::new(20_000);
    let place = ToyDestination::default();
    let writer = source.clone();
    let (to, harvests) = std::sync::mpsc::channel();
    source.guest().harvested = Some(to);
    // Writes while pages are read and sent, a burst after each harvest.
    let writing = thread::spawn(move || {
        let mut n = 0u64;
        for () in harvests {
            for _ in 0..400 {
                let mut guest = writer.guest();
                if !guest.running {
                    return n;
                }
                let block = guest.id("ram");
                match n % 4 {
                    0 => guest.zero(block, n * 31 % 20_000),
                    _ => guest.write(block, n * 17 % 20_000, u8::try_from(n % 250).unwrap() + 1),
                }
                n += 1;
            }
        }
        n
    });
    let (near, far) = pair();
    let (report, received) = migrate(&source, &place, options(), receiver_options(), near, far);
    assert!(writing.join().unwrap() > 0);
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    assert_eq!(received.status, Status::Completed, "{:?}", received.reason);
    assert_same(&source, &place);
    assert!(source.guest().no_leases());
    assert_eq!(place.place().state, b"state of the guest");
    assert_eq!(received.pages, report.pages_sent);
    // Of pages of zeros only those travel that had contents before.
    assert!(received.zero_pages < report.zero_pages / 10);
    assert!(
        report.rounds >= 2 && report.downtime_ms > 0.0 && report.first_round_bytes_per_second > 0.0
    );
}

#[test]
fn over_tcp() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let source = ToySource::new(3000);
    let place = ToyDestination::default();
    let mut there = place.clone();
    let receiving = thread::spawn(move || {
        Receiver::new(&mut there, receiver_options())
            .listen(&listener)
            .unwrap()
    });
    // A question before the migration is answered and does not take its place.
    let to = Connector::new(address.parse().unwrap());
    let id = MigrationId::random().unwrap();
    let outcome = query(&to, id, std::time::Duration::from_secs(10)).unwrap();
    assert_eq!(outcome, Outcome::Unknown);
    let report = Sender::new(&mut source.clone(), options()).run(to.connect().unwrap());
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    assert_eq!(receiving.join().unwrap().source, "toy");
    assert_same(&source, &place);
}

#[test]
fn over_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let address: Address = format!("file:{}", dir.path().join("stream").display())
        .parse()
        .unwrap();
    let source = ToySource::scripted(3000, blocks_come_and_go);
    let report = Sender::new(&mut source.clone(), options()).run(connect(&address).unwrap());
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    let place = ToyDestination::default();
    let listener = Listener::bind(&address).unwrap();
    let received = Receiver::new(&mut place.clone(), receiver_options())
        .listen(&listener)
        .unwrap();
    assert_eq!(received.status, Status::Completed, "{:?}", received.reason);
    assert_same(&source, &place);
}

fn blocks_come_and_go(guest: &mut Guest, harvest: u32) {
    match harvest {
        2 => {
            let block = guest.add_block("dimm", 700);
            for page in 0..600 {
                guest.write(block, page, 3);
            }
            let old = guest.add_block("fleeting", 50);
            guest.write(old, 7, 5);
        }
        3 => {
            guest.remove_block("dimm");
            guest.remove_block("fleeting");
            // The same name, another block: nothing of the old one may show.
            let block = guest.add_block("dimm", 800);
            guest.write(block, 799, 9);
        }
        _ => {}
    }
}

/// Holds the switchover until so many harvests have happened.
fn after_harvests(source: &ToySource, harvests: u32) -> Option<Hold> {
    let guest = source.clone();
    Some(Box::new(move || guest.guest().harvests >= harvests))
}

#[test]
fn while_blocks_come_and_go() {
    let source = ToySource::scripted(1000, blocks_come_and_go);
    let place = ToyDestination::default();
    let mut options = options();
    options.hold = after_harvests(&source, 4);
    let (near, far) = pair();
    let (report, received) = migrate(&source, &place, options, receiver_options(), near, far);
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    assert_eq!(received.layouts, 3);
    assert_same(&source, &place);
    let layouts = &place.place().layouts;
    assert_eq!(layouts[1].blocks().count(), 3);
    assert_eq!(layouts[2].blocks().count(), 2);
}

/// A block that goes between a lease and the layout which the lease calls for.
#[test]
fn a_block_that_goes_while_it_is_on_lease() {
    struct Racing(ToySource);
    impl Source for Racing {
        fn layout(&mut self) -> Result<gleaner_bitmap::Layout> {
            let mut guest = self.0.guest();
            let racing = guest.blocks.values().any(|(info, _)| info.name == "b");
            if racing && guest.calls.iter().filter(|c| **c == "layout").count() == 1 {
                guest.remove_block("b");
            }
            drop(guest);
            self.0.layout()
        }
        fn harvest(&mut self) -> Result<Harvested> {
            self.0.harvest()
        }
        fn lease(&mut self, max: u64) -> Result<Option<PageLease>> {
            if self.0.guest().harvests == 2 && self.0.guest().generation == 2 {
                let mut guest = self.0.guest();
                let block = guest.add_block("b", 10);
                guest.write(block, 0, 1);
                drop(guest);
                self.0.harvest()?;
            }
            // More than was asked for, so that pages of both blocks are in one lease.
            self.0.lease(max.max(100))
        }
        fn ack(&mut self, lease: LeaseId) -> Result<()> {
            self.0.ack(lease)
        }
        fn release(&mut self, lease: LeaseId) -> Result<()> {
            self.0.release(lease)
        }
        fn throttles(&mut self) -> Result<Throttles> {
            self.0.throttles()
        }
        fn throttle(&mut self, throttle: Throttle) -> Result<()> {
            self.0.throttle(throttle)
        }
        fn stop(&mut self) -> Result<()> {
            self.0.stop()
        }
        fn state(&mut self) -> Result<Vec<u8>> {
            self.0.state()
        }
        fn relinquish(&mut self) -> Result<()> {
            self.0.relinquish()
        }
        fn complete(&mut self) -> Result<()> {
            self.0.complete()
        }
        fn resume(&mut self) -> Result<()> {
            self.0.resume()
        }
        fn transactions(&mut self) -> Result<u64> {
            self.0.transactions()
        }
    }
    let source = ToySource::scripted(100, |guest, harvest| {
        if harvest == 2 {
            let block = guest.id("ram");
            guest.write(block, 5, 5);
        }
    });
    let place = ToyDestination::default();
    let mut options = options();
    options.hold = after_harvests(&source, 4);
    let (near, far) = pair();
    let mut there = place.clone();
    let receiving = thread::spawn(move || Receiver::new(&mut there, receiver_options()).run(far));
    let report = Sender::new(&mut Racing(source.clone()), options).run(near);
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    assert_eq!(receiving.join().unwrap().status, Status::Completed);
    assert!(
        !source
            .guest()
            .blocks
            .values()
            .any(|(info, _)| info.name == "b")
    );
    assert_same(&source, &place);
}
