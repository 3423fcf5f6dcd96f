//! A simulation that never finds anything shows nothing: the bugs that kernels had are found.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

use gleaner::Tracking;
use gleaner::model::{Bug, ModelConfig};
use gleaner_sim::migration::migrate_in;
use gleaner_sim::random::Random;
use gleaner_sim::world::Shape;

/// Far more than any of them needs.
const MOST: u64 = 3000;

/// Migrations until a page is lost.
fn found_after(bug: Option<Bug>, tracking: Tracking) -> Option<u64> {
    (0..MOST).find(|index| {
        let mut random = Random::new(5, *index);
        let shape = Shape {
            tracking,
            host: ModelConfig {
                pml: bug == Some(Bug::PmlLeftBehind),
                bug,
                ..ModelConfig::default()
            },
            ..Shape::any(&mut random)
        };
        migrate_in(shape, random).unwrap().pages_lost > 0
    })
}

#[test]
fn of_kernels() {
    for (bug, tracking) in [
        (Bug::ProtectBeforeTake, Tracking::Bitmap),
        (Bug::PmlLeftBehind, Tracking::Bitmap),
        (Bug::PmlLeftBehind, Tracking::Ring { bytes: 1 << 14 }),
        (Bug::ClearWithoutProtect, Tracking::BitmapClear),
    ] {
        let found = found_after(Some(bug), tracking);
        println!("{bug:?} in {tracking:?}: {found:?}");
        assert!(found.is_some(), "{bug:?} in {tracking:?}");
    }
}
