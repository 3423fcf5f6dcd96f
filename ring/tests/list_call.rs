//! The list call of the model: all or nothing, and no more than what its changes do one by one.
#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test
#![allow(unsafe_code)] // host memory for slots

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use gleaner_bitmap::PAGE_SIZE;
use gleaner_ring::model::{
    Access, Call, Counts, Failure, Going, ListKvm, ModelConfig, ModelKvm, Point, Schedule, State,
};
use gleaner_ring::{Error, HostRange, Kvm, MemslotCall, Mode, Region};
use memmap2::MmapOptions;
use proptest::prelude::*;

const PAGES: u64 = 64;

fn memory() -> HostRange {
    let bytes = PAGES * PAGE_SIZE;
    let map = MmapOptions::new()
        .len(usize::try_from(bytes).unwrap())
        .map_anon()
        .unwrap();
    let map = memmap2::MmapRaw::from(map);
    // SAFETY: the map goes along, is readable and writable, and nobody makes a reference into it.
    unsafe { HostRange::new(map.as_mut_ptr() as u64, bytes, Arc::new(map)) }
}

fn region(memory: &HostRange, id: u16, at: u64, first: u64, pages: u64) -> Region {
    Region {
        key: id.into(),
        gpa: at * PAGE_SIZE,
        host: memory.part(first * PAGE_SIZE, pages * PAGE_SIZE).unwrap(),
        log: true,
        readonly: false,
    }
}

fn machine(regions: &[Region]) -> ModelKvm {
    let kvm = ModelKvm::new(ModelConfig::default());
    kvm.enable(Mode::Bitmap).unwrap();
    for region in regions {
        kvm.set_region("create", region).unwrap();
    }
    kvm
}

/// What a guest can tell of its memory: where each page is.
fn view(kvm: &ModelKvm) -> Vec<Option<u64>> {
    let state = kvm.state();
    (0..2 * PAGES)
        .map(|page| state.host_at(page * PAGE_SIZE))
        .collect()
}

fn counts(kvm: &ModelKvm) -> Counts {
    kvm.state().counts()
}

fn log(kvm: &ModelKvm, region: &Region) -> Vec<u64> {
    let mut words = vec![0; usize::try_from(region.pages().div_ceil(64)).unwrap()];
    kvm.get_dirty_log(region.key, &mut words).unwrap();
    words
}

fn errno(error: &Error) -> (u16, i32) {
    match error {
        Error::SetRegion { slot, source, .. } => (slot.id, source.raw_os_error().unwrap()),
        other => panic!("{other}"),
    }
}

#[test]
fn a_list_changes_nothing_whichever_of_its_changes_is_refused() {
    let memory = memory();
    let slots = [
        region(&memory, 0, 0, 0, 16),
        region(&memory, 1, 16, 16, 16),
        region(&memory, 2, 40, 40, 8),
    ];
    let good = [
        MemslotCall::Delete(slots[0].clone()),
        MemslotCall::Create(region(&memory, 0, 0, 0, 8)),
        MemslotCall::Create(region(&memory, 3, 8, 8, 8)),
        MemslotCall::Move {
            from: slots[2].clone(),
            to: region(&memory, 2, 60, 40, 8),
        },
        MemslotCall::Flags {
            from: slots[1].clone(),
            to: Region {
                log: false,
                ..slots[1].clone()
            },
        },
    ];
    let resized = region(&memory, 1, 16, 16, 8);
    let bad = [
        (
            MemslotCall::Delete(region(&memory, 9, 0, 0, 1)),
            libc::EINVAL,
        ),
        (MemslotCall::Create(resized.clone()), libc::EINVAL),
        (
            MemslotCall::Create(region(&memory, 9, 20, 0, 1)),
            libc::EEXIST,
        ),
        (
            MemslotCall::Move {
                from: slots[1].clone(),
                to: resized,
            },
            libc::EINVAL,
        ),
    ];
    for going in [Going::AtOnce, Going::InvalidFirst] {
        for at in 0..=good.len() {
            for (call, reason) in &bad {
                let kvm = machine(&slots);
                let vcpu = kvm.step_vcpu().unwrap().index();
                kvm.state().enter(vcpu);
                for page in [3, 20, 41] {
                    kvm.state().touch(vcpu, page * PAGE_SIZE);
                }
                let before = (counts(&kvm), view(&kvm));
                let mut calls = good.to_vec();
                calls.insert(at, call.clone());
                let refused = ListKvm::new(&kvm, going).apply(&calls).unwrap_err();
                assert_eq!(
                    errno(&refused),
                    (call.key().id, *reason),
                    "at {at}: {refused}"
                );
                assert_eq!((counts(&kvm), view(&kvm)), before, "at {at}");
                let logs: Vec<_> = slots.iter().map(|slot| log(&kvm, slot)).collect();
                assert_eq!(logs, [[1 << 3], [1 << 4], [1 << 1]], "at {at}");
            }
        }
        // And without the bad one it is made.
        let kvm = machine(&slots);
        ListKvm::new(&kvm, going).apply(&good).unwrap();
        assert_eq!(
            kvm.state().host_at(60 * PAGE_SIZE),
            Some(slots[2].host.addr())
        );
    }
}

#[test]
fn a_list_that_is_ordered_to_fail_changes_nothing() {
    let memory = memory();
    let slot = region(&memory, 0, 0, 0, 16);
    let kvm = machine(std::slice::from_ref(&slot));
    kvm.state().orders.failure = Some(Failure {
        calls: &[Call::List],
        after: 0,
        times: 1,
        errno: libc::ENOMEM,
    });
    let before = view(&kvm);
    let list = ListKvm::new(&kvm, Going::InvalidFirst);
    let delete = [MemslotCall::Delete(slot)];
    assert_eq!(errno(&list.apply(&delete).unwrap_err()), (0, libc::ENOMEM));
    assert_eq!(view(&kvm), before);
    list.apply(&delete).unwrap();
    assert!(view(&kvm).iter().all(Option::is_none));
}

/// Looks at every page of a range at each moment.
struct Watch {
    pages: u64,
    vcpu: usize,
    missed: Arc<AtomicU64>,
}

impl Schedule for Watch {
    fn at(&mut self, _: Point, state: &mut State) {
        for page in 0..self.pages {
            if state.read(self.vcpu, page * PAGE_SIZE) == Access::Missed {
                self.missed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

#[test]
fn no_vcpu_ever_finds_a_list_half_made_and_the_same_calls_one_by_one_show_it() {
    let memory = memory();
    let whole = region(&memory, 0, 0, 0, PAGES);
    let split = [
        MemslotCall::Delete(whole.clone()),
        MemslotCall::Create(region(&memory, 0, 0, 0, PAGES / 2)),
        MemslotCall::Create(region(&memory, 1, PAGES / 2, PAGES / 2, PAGES / 2)),
    ];
    let missed = |apply: &dyn Fn(&ModelKvm)| {
        let kvm = machine(std::slice::from_ref(&whole));
        let vcpu = kvm.step_vcpu().unwrap().index();
        kvm.state().enter(vcpu);
        let missed = Arc::default();
        kvm.set_schedule(Some(Box::new(Watch {
            pages: PAGES,
            vcpu,
            missed: Arc::clone(&missed),
        })));
        let before = kvm.state().counts().swaps;
        apply(&kvm);
        let swaps = kvm.state().counts().swaps - before;
        (missed.load(Ordering::Relaxed), swaps)
    };
    for (going, swaps) in [(Going::AtOnce, 1), (Going::InvalidFirst, 2)] {
        let list = |kvm: &ModelKvm| drop(ListKvm::new(kvm, going).apply(&split).unwrap());
        assert_eq!(missed(&list), (0, swaps), "{going:?}");
    }
    let (lost, swaps) = missed(&|kvm| split.iter().for_each(|call| call.apply(kvm).unwrap()));
    assert!(lost > 0);
    assert_eq!(swaps, 4);
}

proptest! {
    #[test]
    fn a_list_leads_to_where_its_changes_lead_one_by_one(
        steps in proptest::collection::vec((0u16..4, 0u64..100, 0u64..4, 1u64..3, 0u8..3), 0..16),
        going in prop_oneof![Just(Going::AtOnce), Just(Going::InvalidFirst)],
    ) {
        let memory = memory();
        let (one_by_one, listed) = (machine(&[]), machine(&[]));
        let mut taken = Vec::new();
        let mut there = BTreeSet::new();
        for (id, at, first, length, kind) in steps {
            let to = region(&memory, id, at, first * 8, length * 8);
            let call = match kind {
                0 => MemslotCall::Delete(to),
                1 => MemslotCall::Move { from: to.clone(), to },
                _ => MemslotCall::Create(to),
            };
            // One by one, KVM tells the kind by what is there; a list is told.
            let fits = matches!(call, MemslotCall::Create(_)) != there.contains(&id);
            if fits && call.apply(&one_by_one).is_ok() {
                match call {
                    MemslotCall::Delete(_) => there.remove(&id),
                    _ => there.insert(id),
                };
                taken.push(call);
            } else {
                let with: Vec<_> = taken.iter().cloned().chain([call]).collect();
                prop_assert!(ListKvm::new(&listed, going).apply(&with).is_err());
            }
        }
        // From half of the way on, so that the list meets slots that are there.
        let (before, list) = taken.split_at(taken.len() / 2);
        before.iter().for_each(|call| call.apply(&listed).unwrap());
        ListKvm::new(&listed, going).apply(list).unwrap();
        prop_assert_eq!(view(&listed), view(&one_by_one));
    }
}
