//! Memory that the guest wrote before logging began may be mapped hugely: such a mapping is protected only by a CLEAR that is made
//! while INITIALLY_SET is on. A tracker that forgets it loses pages, and the simulation finds that.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

use gleaner::Tracking;
use gleaner_bitmap::mutant::{self, Mutant};
use gleaner_sim::migration::migrate_in;
use gleaner_sim::random::Random;
use gleaner_sim::world::Shape;

fn lost(migrations: u64) -> Option<u64> {
    (0..migrations).find(|index| {
        let mut random = Random::new(5, *index);
        let shape = Shape {
            tracking: Tracking::BitmapClear,
            ..Shape::any(&mut random)
        };
        migrate_in(shape, random).unwrap().pages_lost > 0
    })
}

#[test]
fn a_huge_mapping_that_stays_writable_is_found() {
    assert_eq!(lost(200), None, "nothing is planted");
    let _planted = mutant::plant(Mutant::HugeLeftWritable);
    let found = lost(3000);
    println!("{found:?}");
    assert!(found.is_some());
}
