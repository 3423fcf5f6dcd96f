//! Each kind of loss, and what the guest says of it.

use gleaner::vmm::guest::{CheckResult, Workload};
use gleaner_bitmap::PAGE_SIZE;
use kvm_ioctls::VcpuFd;

use crate::SMALL;
use crate::vm::{Exit, PAGE, Vm, boot, finish_io};

/// What happens to a guest between two batches, and what its check must say then.
type Harm = fn(&Vm, &mut VcpuFd, &Old) -> CheckResult;

/// Everything as it was some batches ago.
struct Old {
    pages: Vec<Vec<u8>>,
    regs: kvm_bindings::kvm_regs,
    xsave: kvm_bindings::kvm_xsave,
}

impl Old {
    fn of(vm: &Vm, vcpu: &mut VcpuFd) -> Self {
        finish_io(vcpu);
        Self {
            pages: (0..vm.guest.map().pages()).map(|p| vm.page(p)).collect(),
            regs: vcpu.get_regs().unwrap(),
            xsave: vcpu.get_xsave().unwrap(),
        }
    }

    fn bring_back(&self, vm: &Vm, page: u64) {
        vm.set_page(page, &self.pages[usize::try_from(page).unwrap()]);
    }
}

const HARMS: [(&str, Harm); 9] = [
    ("a data page is old", |vm, _, old| {
        old.bring_back(vm, vm.guest.map().vcpu(0).unwrap().data.first + 77);
        CheckResult::Page { index: 77 }
    }),
    ("a data page is zero", |vm, _, _| {
        let last = vm.guest.map().vcpu(0).unwrap().data;
        vm.set_page(last.end() - 1, &[0; PAGE]);
        CheckResult::Page {
            index: last.pages - 1,
        }
    }),
    ("the first half of a data page is old", |vm, _, old| {
        let page = vm.guest.map().vcpu(0).unwrap().data.first;
        let mut torn = vm.page(page);
        let half = PAGE / 2;
        torn[..half].copy_from_slice(&old.pages[usize::try_from(page).unwrap()][..half]);
        vm.set_page(page, &torn);
        CheckResult::Page { index: 0 }
    }),
    ("a table page is old", |vm, _, old| {
        old.bring_back(vm, vm.guest.map().vcpu(0).unwrap().table.first);
        CheckResult::Page { index: 0 }
    }),
    ("all tables and data pages are old", |vm, _, old| {
        let home = vm.guest.map().home();
        (home.first..home.end()).for_each(|p| old.bring_back(vm, p));
        CheckResult::Sum
    }),
    ("the control page is old", |vm, _, old| {
        old.bring_back(vm, vm.guest.map().vcpu(0).unwrap().control);
        CheckResult::ControlPage
    }),
    ("the registers are old", |_, vcpu, old| {
        vcpu.set_regs(&old.regs).unwrap();
        CheckResult::Sum
    }),
    ("the count register is off by one", |_, vcpu, _| {
        let mut regs = vcpu.get_regs().unwrap();
        regs.r15 += 1;
        vcpu.set_regs(&regs).unwrap();
        CheckResult::Sum
    }),
    ("the FPU state is old", |_, vcpu, old| {
        // SAFETY: the kernel wrote no more than this structure, and reads as much.
        unsafe { vcpu.set_xsave(&old.xsave) }.unwrap();
        CheckResult::Fpu
    }),
];

#[test]
fn each_loss_is_found_at_once_and_after_any_time() {
    for later in [0, 1, 50] {
        for (what, harm) in HARMS {
            // All pages are written again and again before the late check.
            let Some((vm, mut vcpus)) = boot(SMALL, 1, Workload::Sweep, 999) else {
                return;
            };
            let vcpu = &mut vcpus[0];
            vm.batches(vcpu, 5);
            let old = Old::of(&vm, vcpu);
            vm.batches(vcpu, 5);
            finish_io(vcpu);
            let expected = harm(&vm, vcpu, &old);
            if later > 0 {
                vm.batches(vcpu, later);
            }
            let found = vm.check(vcpu, 0);
            // An old table page catches up with the stamps in time, but the sum never does.
            let caught_up = what == "a table page is old" && later > 0 && found == CheckResult::Sum;
            assert!(
                found == expected || caught_up,
                "{what}, checked {later} batches later: {found:?}, expected {expected:?}"
            );
        }
    }
}

#[test]
fn the_end_of_a_data_page_is_checked_too() {
    let Some((vm, mut vcpus)) = boot(SMALL, 1, Workload::Sweep, 999) else {
        return;
    };
    vm.batches(&mut vcpus[0], 5);
    let page = vm.guest.map().vcpu(0).unwrap().data.first + 100;
    let mut torn = vm.page(page);
    torn[PAGE - 1] ^= 1;
    vm.set_page(page, &torn);
    assert_eq!(vm.check(&mut vcpus[0], 0), CheckResult::Page { index: 100 });
}

#[test]
fn a_single_forgotten_mmio_write_is_found() {
    let Some((vm, mut vcpus)) = boot(SMALL, 1, Workload::Sweep, 500) else {
        return;
    };
    vm.batches(&mut vcpus[0], 3);
    let v = vm.guest.map().vcpu(0).unwrap();
    let victim = vm.guest.map().home_gpa(v.data.first + 9);
    vm.delete(1);
    let mut before = Vec::new();
    vm.run(&mut vcpus[0], |exit| {
        if before.is_empty() {
            before = vm.page(v.data.first + 9);
        }
        if exit == Exit::Write(victim + PAGE_SIZE - 8) {
            // Undone here; the start of the page is then written as if nothing had happened.
            vm.set_page(v.data.first + 9, &before);
            return true;
        }
        false
    });
    vm.map_pages(1, vm.guest.map().home());
    // To the end of this batch only: the next visit would stamp the end again.
    assert_eq!(vm.check(&mut vcpus[0], 0), CheckResult::Page { index: 9 });
}
