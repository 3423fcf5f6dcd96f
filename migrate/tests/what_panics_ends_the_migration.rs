//! Code of a VMM that panics, in whichever thread: the migration ends at both ends, and whoever began it gets the panic.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use std::thread;

use common::*;
use gleaner_migrate::*;

/// What both ends have to say of a migration over `channels` connections.
fn ends(
    source: &ToySource,
    place: &ToyDestination,
    channels: u16,
) -> (thread::Result<Report>, thread::Result<Received>) {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let to = format!("tcp:{}", listener.local_addr().unwrap());
    let (mut source, mut place) = (source.clone(), place.clone());
    let there = thread::spawn(move || {
        let received = Receiver::new(&mut place, receiver_options()).listen(&listener);
        received.unwrap()
    });
    let here = thread::spawn(move || {
        let options = SenderOptions {
            channels,
            ..options()
        };
        Sender::new(&mut source, options).run_to(&Connector::new(to.parse().unwrap()))
    });
    (here.join(), there.join())
}

#[test]
fn a_source_that_panics_leaves_nobody_waiting() {
    for channels in [1, 4] {
        for call in ["harvest", "lease", "ack", "memory"] {
            let source = ToySource::new(20_000);
            source.guest().panicking = Some(call);
            let (here, there) = ends(&source, &ToyDestination::default(), channels);
            assert!(here.is_err(), "{call}, {channels} connections");
            let status = there.unwrap().status;
            assert_eq!(status, Status::Failed, "{call}, {channels} connections");
        }
    }
}

#[test]
fn a_destination_that_panics_leaves_nobody_waiting() {
    for channels in [1, 4] {
        for call in ["layout", "memory", "ready"] {
            let place = ToyDestination::default();
            place.place().panicking = Some(call);
            let (here, there) = ends(&ToySource::new(20_000), &place, channels);
            assert!(there.is_err(), "{call}, {channels} connections");
            let status = here.unwrap().status;
            assert_ne!(status, Status::Completed, "{call}, {channels} connections");
        }
    }
}
