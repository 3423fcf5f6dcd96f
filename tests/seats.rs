//! A vCPU has one seat at a time, and its ring is read on where it was left, whoever takes the seat next.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::hand::{Hand, gpa, pages};
use common::{MODES, kvm};
use gleaner::{Error, Start, Tracking};
use std::collections::BTreeSet;

/// The smallest ring: 256 entries, so that a few hundred writes go around it.
const SMALL: Tracking = Tracking::Ring { bytes: 4096 };

#[test]
fn a_second_seat_is_refused_and_changes_nothing() {
    if !kvm() {
        return;
    }
    for tracking in [MODES[0].1, MODES[1].1, SMALL] {
        let mut hand = Hand::new(tracking);
        let block = hand.plug("ram", 300, 1, gpa(0));
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        for round in 0..20 {
            let error = hand.take_a_second_seat().unwrap_err();
            assert!(matches!(error, Error::SeatTaken { vcpu: 0 }), "{error}");
            let first = round * 13;
            hand.write(gpa(first), 50, round);
            assert_eq!(
                hand.glean(&consumer),
                pages(&block, first..first + 50),
                "{tracking:?}"
            );
        }
    }
}

#[test]
fn a_vcpu_that_changes_seats_loses_no_page() {
    if !kvm() {
        return;
    }
    for tracking in [MODES[0].1, MODES[1].1, SMALL] {
        let mut hand = Hand::new(tracking);
        let block = hand.plug("ram", 300, 1, gpa(0));
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        for round in 0..20 {
            let first = round * 13;
            hand.write(gpa(first), 21, round);
            hand.change_seats();
            hand.write(gpa(first + 21), 21, round);
            assert_eq!(
                hand.glean(&consumer),
                pages(&block, first..first + 42),
                "{tracking:?}, round {round}"
            );
        }
        assert_eq!(hand.glean(&consumer), BTreeSet::new());
    }
}
