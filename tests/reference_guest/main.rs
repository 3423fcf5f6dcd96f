//! The reference guest on real KVM: it runs, it finds each kind of loss, and it survives what a VMM does to it.

// KVM takes guest memory by address, and XSAVE by a length that only the kernel knows.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used)]
#![cfg(target_arch = "x86_64")]

mod losses;
mod vm;

use std::time::Instant;

use gleaner::vmm::guest::{CheckResult, GuestEvent, LOW_PAGES, MemoryMap, STAMP, Workload};
use gleaner_bitmap::{PAGE_SIZE, PageRange};
use kvm_ioctls::VcpuFd;

use crate::vm::{Exit, PAGE, boot, finish_io, migrate, say};

/// Neither RAM nor home nor the data of a vCPU is a multiple of 64 pages.
const SMALL: u64 = (4 << 20) + 37 * PAGE_SIZE;
const LARGE: u64 = (64 << 20) + 11 * PAGE_SIZE;

#[test]
fn each_workload_writes_what_it_should_without_any_other_exit() {
    const HOT: u64 = 1 << 20;
    for workload in [
        Workload::Sweep,
        Workload::Random,
        Workload::Hot(HOT),
        Workload::Idle,
    ] {
        let Some((vm, mut vcpus)) = boot(LARGE, 1, workload, 4096) else {
            return;
        };
        let (map, vcpu) = (*vm.guest.map(), &mut vcpus[0]);
        let control = map.vcpu(0).unwrap().control;
        let low = || (0..LOW_PAGES).filter(|p| *p != control).map(|p| vm.page(p));
        let loaded: Vec<_> = low().collect();
        let began = Instant::now();
        assert_eq!(vm.batches(vcpu, 1000), 0, "MMIO though all is mapped");
        let seconds = began.elapsed().as_secs_f64();
        assert_eq!(vm.check(vcpu, 0), CheckResult::Ok);
        // The guest goes on after a check.
        assert_eq!(vm.batches(vcpu, 10), 0);
        assert_eq!(vm.check(vcpu, 0), CheckResult::Ok);

        let count = vm.mailbox(0).count().unwrap();
        let table = vm.table(0);
        assert_eq!(table.iter().sum::<u64>(), count);
        let data = map.vcpu(0).unwrap().data;
        for (p, t) in table.iter().enumerate() {
            let page = vm.page(data.first + u64::try_from(p).unwrap());
            let stamp = if *t == 0 {
                0
            } else {
                t * STAMP + u64::try_from(p).unwrap()
            };
            assert_eq!(page[..8], stamp.to_le_bytes());
            assert_eq!(page[PAGE - 8..], stamp.to_le_bytes());
            assert!(page[8..PAGE - 8].iter().all(|b| *b == 0));
        }
        // Not even accessed and dirty bits: they were set beforehand.
        assert!(low().eq(loaded), "the program or the page tables changed");
        let device = map.device_area();
        assert!((device.first..device.end()).all(|p| vm.page(p).iter().all(|b| *b == 0)));

        let written = table.iter().filter(|t| **t > 0).count();
        match workload {
            Workload::Idle => assert_eq!((count, written), (0, 0)),
            Workload::Sweep => {
                assert!(table.iter().max().unwrap() - table.iter().min().unwrap() <= 1);
            }
            Workload::Random => assert_eq!(written, table.len()),
            Workload::Hot(_) => {
                let hot = usize::try_from(HOT / PAGE_SIZE).unwrap();
                assert!(table[..hot].iter().all(|t| *t > 0));
                assert_eq!(written, hot);
            }
        }
        if workload != Workload::Idle {
            assert!(count >= 1010 * 4096);
            let rate = 1000.0 * 4096.0 / seconds / 1e6;
            say(&format!("{workload}: {rate:.1} million writes a second"));
        }
    }
}

#[test]
fn the_guest_dirties_what_it_writes_and_nothing_else() {
    for workload in [Workload::Hot(64 << 10), Workload::Idle] {
        let Some((vm, mut vcpus)) = boot(SMALL, 1, workload, 4096) else {
            return;
        };
        let (map, vcpu) = (*vm.guest.map(), &mut vcpus[0]);
        let v = map.vcpu(0).unwrap();
        vm.log_pages(0, map.low());
        vm.log_pages(1, map.home());
        // What was mapped by reads may be reported once.
        vm.batches(vcpu, 2);
        vm.harvest(0, map.low());
        vm.harvest(1, map.home());
        vm.batches(vcpu, 2);
        let dirty = (vm.harvest(0, map.low()), vm.harvest(1, map.home()));
        let idle = workload == Workload::Idle;
        let mut home = vec![v.table.first];
        home.extend(v.data.first..v.data.first + 16);
        let expected = if idle {
            (vec![], vec![])
        } else {
            (vec![v.control], home)
        };
        assert_eq!(dirty, expected, "{workload}");
    }
}

#[test]
fn a_guest_goes_on_in_a_new_vm_from_wherever_it_was() {
    for workload in [Workload::Sweep, Workload::Random, Workload::Hot(300_000)] {
        let Some((mut vm, mut vcpus)) = boot(SMALL, 1, workload, 700) else {
            return;
        };
        let home = vm.guest.map().home();
        // Stops at each kind of MMIO exit, that is amid writes and batches, and at the ends of batches.
        for stop in 0..24 {
            vm.batches(&mut vcpus[0], 2);
            vm.delete(1);
            let mut left = 5 + stop * 3;
            vm.run(&mut vcpus[0], |exit| {
                left -= 1;
                left <= 0 && (stop % 3 != 0 || matches!(exit, Exit::Event(_)))
            });
            vm.map_pages(1, home);
            (vm, vcpus) = migrate(vm, vcpus);
            let before = vm.mailbox(0).count().unwrap();
            assert_eq!(vm.batches(&mut vcpus[0], 3), 0);
            assert!(vm.mailbox(0).count().unwrap() > before);
            assert_eq!(
                vm.check(&mut vcpus[0], 0),
                CheckResult::Ok,
                "{workload}, stop {stop}"
            );
        }
    }
}

#[test]
fn a_move_repeats_no_exit() {
    let Some((vm, mut vcpus)) = boot(SMALL, 1, Workload::Sweep, 500) else {
        return;
    };
    vm.batches(&mut vcpus[0], 3);
    vm.mailbox(0).request_check().unwrap();
    let (vm, mut vcpus) = migrate(vm, vcpus);
    vm.run(&mut vcpus[0], |exit| {
        assert_eq!(exit, Exit::Event(GuestEvent::Check(CheckResult::Ok)));
        true
    });
}

#[test]
fn finishing_an_exit_brings_the_vcpu_past_its_instruction_and_no_further() {
    let Some((vm, mut vcpus)) = boot(SMALL, 1, Workload::Sweep, 500) else {
        return;
    };
    vm.delete(1);
    vm.run(&mut vcpus[0], |exit| exit == Exit::Read);
    let rip = |vcpu: &VcpuFd| vcpu.get_regs().unwrap().rip;
    let before = rip(&vcpus[0]);
    finish_io(&mut vcpus[0]);
    let after = rip(&vcpus[0]);
    assert!((before + 2..before + 9).contains(&after), "one instruction");
    finish_io(&mut vcpus[0]);
    assert_eq!(rip(&vcpus[0]), after);
}

/// Holes at the edges, in the table, over the border of table and data, of one page, and of all but two.
fn holes(map: &MemoryMap) -> Vec<PageRange> {
    let (home, v) = (map.home(), map.vcpu(0).unwrap());
    vec![
        PageRange::new(home.first + 1, 1),
        PageRange::new(v.data.first - 1, 2),
        PageRange::new(v.data.first + 63, 130),
        PageRange::new(v.data.end() - 1, 3),
        PageRange::new(home.first + 1, home.pages - 2),
    ]
}

#[test]
fn holes_are_invisible_to_a_guest_whose_vmm_emulates() {
    let Some((vm, mut vcpus)) = boot(8 << 20, 1, Workload::Random, 500) else {
        return;
    };
    let (map, vcpu) = (*vm.guest.map(), &mut vcpus[0]);
    assert!(map.vcpu(0).unwrap().table.pages > 1);
    for hole in holes(&map).into_iter().cycle().take(20) {
        vm.delete(1);
        vm.map_pages(1, PageRange::new(LOW_PAGES, hole.first - LOW_PAGES));
        vm.map_pages(2, PageRange::new(hole.end(), map.pages() - hole.end()));
        assert!(vm.batches(vcpu, 4) > 0, "no access met the hole {hole:?}");
        assert_eq!(vm.check(vcpu, 0), CheckResult::Ok, "with the hole {hole:?}");
        vm.map_pages(3, hole);
        assert_eq!(vm.batches(vcpu, 2), 0);
        (1..=3).for_each(|slot| vm.delete(slot));
        vm.map_pages(1, map.home());
        assert_eq!(vm.batches(vcpu, 2), 0);
        assert_eq!(
            vm.check(vcpu, 0),
            CheckResult::Ok,
            "after the hole {hole:?}"
        );
    }
}

#[test]
fn vcpus_on_threads_keep_to_their_pages() {
    const BATCHES: u64 = 1000;
    let Some((vm, mut vcpus)) = boot(LARGE, 2, Workload::Random, 2048) else {
        return;
    };
    let began = Instant::now();
    std::thread::scope(|scope| {
        for (i, vcpu) in vcpus.iter_mut().enumerate() {
            let vm = &vm;
            scope.spawn(move || {
                assert_eq!(vm.batches(vcpu, BATCHES), 0);
                assert_eq!(vm.check(vcpu, i), CheckResult::Ok);
                vm.batches(vcpu, 10);
            });
        }
    });
    let writes = vm.mailbox(0).count().unwrap() + vm.mailbox(1).count().unwrap();
    let rate = f64::from(u32::try_from(writes).unwrap()) / began.elapsed().as_secs_f64() / 1e6;
    say(&format!(
        "random on 2 vCPUs: {rate:.1} million writes a second"
    ));
    assert_ne!(vm.table(0), vm.table(1), "the seeds differ");
    let (vm, mut vcpus) = migrate(vm, vcpus);
    for (i, vcpu) in vcpus.iter_mut().enumerate() {
        vm.batches(vcpu, 10);
        assert_eq!(vm.check(vcpu, i), CheckResult::Ok);
    }
}

#[test]
fn a_request_made_amid_a_batch_is_answered_after_it() {
    let Some((vm, mut vcpus)) = boot(SMALL, 1, Workload::Sweep, 500) else {
        return;
    };
    let mut exits = Vec::new();
    vm.delete(1);
    vm.run(&mut vcpus[0], |exit| exit != Exit::Read);
    vm.map_pages(1, vm.guest.map().home());
    vm.mailbox(0).request_check().unwrap();
    vm.run(&mut vcpus[0], |exit| {
        exits.push(exit);
        exits.len() == 3
    });
    let done = Exit::Event(GuestEvent::BatchDone);
    let checked = Exit::Event(GuestEvent::Check(CheckResult::Ok));
    assert_eq!(exits, [done, checked, done]);
    assert_eq!(vm.mailbox(0).count().unwrap(), 1000);
}
