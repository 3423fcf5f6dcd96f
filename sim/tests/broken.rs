//! Law 6 where it is hardest: a transaction fails, and so does taking it back. The vCPUs stay out for good, and every dirty
//! page can still be had.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

use gleaner_sim::broken::break_down;
use gleaner_sim::migration::Tally;
use gleaner_sim::random::Random;
use gleaner_sim::world::Shape;

#[test]
fn a_failed_rollback_keeps_vcpus_out_and_every_page_readable() {
    let mut all = Tally::default();
    for index in 0..1000 {
        let mut random = Random::new(11, index);
        let shape = Shape::any(&mut random);
        let tally = break_down(shape, random).unwrap();
        assert!(tally.is_good(), "run {index}: {tally:?}");
        all.add(&tally);
    }
    assert!(all.faults > 300, "rollbacks that failed: {}", all.faults);
}
