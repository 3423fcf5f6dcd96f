//! What the gate costs each entry into `KVM_RUN`.

use std::hint::black_box;

use gleaner::Tracking;

use crate::row::{Aim, Row};
use crate::sample::{Spread, ns, time};
use crate::vm::TrackedVm;
use crate::{Plan, Result};

/// Nanoseconds that entering and leaving may cost together.
const AIM_NS: f64 = 5.0;

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    if !plan.wants("gate/pass") {
        return Ok(Vec::new());
    }
    let passes = plan.pick(1_000_000, 10_000);
    let vm = TrackedVm::new(Tracking::Bitmap, 64 << 20, 4 << 20, 1)?;
    let vcpu = vm.parts.vcpu(0)?;
    let seat = vm.tracker.register(&vcpu, 0)?;
    let mut samples = Vec::new();
    for _ in 0..plan.pick(30, 3) {
        let (took, all) = time(|| (0..passes).all(|_| black_box(&seat).pass()));
        if !all {
            return Err("gate/pass: an open gate did not let the seat pass".into());
        }
        samples.push(ns(took) / passes as f64);
    }
    let row = Row::new(
        "gate/pass",
        Aim::AtMost(AIM_NS),
        Spread::of(samples.split_off(1)),
        "ns",
        "enter and leave together, without KVM_RUN, on a real vCPU's seat",
    );
    Ok(vec![row])
}
