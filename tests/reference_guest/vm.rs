//! A VMM of a few lines: memory, slots, an exit loop.

use std::io::Write;

use gleaner::vmm::guest::{
    CheckResult, Guest, GuestEvent, Mailbox, MemoryMap, VcpuState, Workload, emulate_read,
    emulate_write,
};
use gleaner_bitmap::{PAGE_SIZE, PageRange};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

pub const PAGE: usize = 4096;

/// Far more than any test has.
const MAX_EXITS: u32 = 1_000_000;

/// A line that the test runner does not swallow.
pub fn say(line: &str) {
    let mut err = std::io::stderr().lock();
    writeln!(err, "{line}").unwrap();
}

pub fn open_kvm() -> Option<Kvm> {
    Kvm::new()
        .inspect_err(|e| say(&format!("skipped: /dev/kvm: {e}")))
        .ok()
}

/// A VM, its guest and its RAM.
pub struct Vm {
    pub vm: VmFd,
    pub kvm: Kvm,
    pub guest: Guest,
    pub ram: MmapRegion,
}

impl Vm {
    /// With RAM of zeros, the low region mapped.
    pub fn new(kvm: Kvm, guest: Guest) -> Self {
        let len = usize::try_from(guest.map().pages() * PAGE_SIZE).unwrap();
        let vm = kvm.create_vm().unwrap();
        let ram = MmapRegion::new(len).unwrap();
        let vm = Self {
            vm,
            kvm,
            guest,
            ram,
        };
        vm.map_pages(0, vm.guest.map().low());
        vm
    }

    pub fn map_pages(&self, slot: u32, range: PageRange) {
        self.map_with(0, slot, range);
    }

    /// Turns the log of a slot on.
    pub fn log_pages(&self, slot: u32, range: PageRange) {
        self.map_with(KVM_MEM_LOG_DIRTY_PAGES, slot, range);
    }

    /// The pages of a slot that KVM saw written since the last call.
    pub fn harvest(&self, slot: u32, range: PageRange) -> Vec<u64> {
        let bytes = usize::try_from(range.pages * PAGE_SIZE).unwrap();
        let words = self.vm.get_dirty_log(slot, bytes).unwrap();
        let dirty = |i: &u64| words[usize::try_from(i / 64).unwrap()] >> (i % 64) & 1 == 1;
        (0..range.pages)
            .filter(dirty)
            .map(|i| range.first + i)
            .collect()
    }

    fn map_with(&self, flags: u32, slot: u32, range: PageRange) {
        let start = usize::try_from(range.first * PAGE_SIZE).unwrap();
        let len = usize::try_from(range.pages * PAGE_SIZE).unwrap();
        assert!(start + len <= self.ram.size());
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: self.guest.map().home_gpa(range.first),
            memory_size: range.pages * PAGE_SIZE,
            userspace_addr: self.ram.as_ptr() as u64 + range.first * PAGE_SIZE,
        };
        // SAFETY: the region lies inside `ram`, which is mapped as long as `self` is there, and vCPUs only run in
        // `Vm::run`.
        unsafe { self.vm.set_user_memory_region(region) }.unwrap();
    }

    pub fn delete(&self, slot: u32) {
        let none = kvm_userspace_memory_region {
            slot,
            ..Default::default()
        };
        // SAFETY: a region of no bytes maps nothing.
        unsafe { self.vm.set_user_memory_region(none) }.unwrap();
    }

    pub fn mailbox(&self, vcpu: usize) -> Mailbox<'_, ()> {
        Mailbox::new(&self.ram.as_volatile_slice(), self.guest.map(), vcpu).unwrap()
    }

    pub fn page(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        let at = usize::try_from(page * PAGE_SIZE).unwrap();
        self.ram
            .as_volatile_slice()
            .read_slice(&mut bytes, at)
            .unwrap();
        bytes
    }

    pub fn set_page(&self, page: u64, bytes: &[u8]) {
        let at = usize::try_from(page * PAGE_SIZE).unwrap();
        self.ram.as_volatile_slice().write_slice(bytes, at).unwrap();
    }

    /// The words of a vCPU's table.
    pub fn table(&self, vcpu: usize) -> Vec<u64> {
        let pages = self.guest.map().vcpu(vcpu).unwrap();
        let words = usize::try_from(pages.data.pages).unwrap();
        (pages.table.first..pages.table.end())
            .flat_map(|p| self.page(p))
            .collect::<Vec<u8>>()
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .take(words)
            .collect()
    }

    /// Runs until `done` says so. Any exit that the guest should not make is a failure.
    pub fn run(&self, vcpu: &mut VcpuFd, mut done: impl FnMut(Exit) -> bool) {
        let (ram, map) = (self.ram.as_volatile_slice(), self.guest.map());
        for _ in 0..MAX_EXITS {
            let exit = match vcpu.run().unwrap() {
                VcpuExit::IoOut(port, data) => Exit::Event(GuestEvent::decode(port, data).unwrap()),
                VcpuExit::MmioRead(gpa, data) => {
                    emulate_read(&ram, map, gpa, data).unwrap();
                    Exit::Read
                }
                VcpuExit::MmioWrite(gpa, data) => {
                    emulate_write(&ram, map, gpa, data).unwrap();
                    Exit::Write(gpa)
                }
                other => panic!("unexpected exit: {other:?}"),
            };
            if done(exit) {
                return;
            }
        }
        panic!("the guest does not do what is waited for");
    }

    /// Runs some batches, and tells how many MMIO exits they took.
    pub fn batches(&self, vcpu: &mut VcpuFd, count: u64) -> u64 {
        let (mut left, mut mmio) = (count, 0);
        self.run(vcpu, |exit| {
            match exit {
                Exit::Event(GuestEvent::BatchDone) => left -= 1,
                Exit::Event(check) => panic!("nobody asked: {check:?}"),
                _ => mmio += 1,
            }
            left == 0
        });
        mmio
    }

    /// Asks for a check, and gets its result.
    pub fn check(&self, vcpu: &mut VcpuFd, index: usize) -> CheckResult {
        self.mailbox(index).request_check().unwrap();
        let mut found = None;
        self.run(vcpu, |exit| {
            if let Exit::Event(GuestEvent::Check(result)) = exit {
                found = Some(result);
            }
            found.is_some()
        });
        assert!(!self.mailbox(index).check_pending().unwrap());
        found.unwrap()
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Exit {
    Event(GuestEvent),
    Read,
    Write(u64),
}

/// A VM whose home region is slot 1, with its vCPUs at the start.
pub fn boot(ram: u64, vcpus: usize, workload: Workload, batch: u32) -> Option<(Vm, Vec<VcpuFd>)> {
    let map = MemoryMap::new(ram, vcpus).unwrap();
    let guest = Guest::new(map, workload, batch, 42).unwrap();
    let vm = Vm::new(open_kvm()?, guest);
    vm.map_pages(1, map.home());
    guest.load(&vm.ram.as_volatile_slice()).unwrap();
    let start = |i| {
        let vcpu = vm.vm.create_vcpu(u64::try_from(i).unwrap()).unwrap();
        guest.start(&vcpu, i).unwrap();
        vcpu
    };
    let vcpus = (0..vcpus).map(start).collect();
    Some((vm, vcpus))
}

/// Lets KVM finish the instruction of the last exit, which it does at the next `KVM_RUN` only, without running on: as the
/// gate does for a machine.
pub fn finish_io(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    match vcpu.run() {
        Err(error) => assert_eq!(error.errno(), libc::EINTR),
        Ok(exit) => panic!("another exit follows: {exit:?}"),
    }
    vcpu.set_kvm_immediate_exit(0);
}

/// The same guest in a new VM: registers through bytes, memory by copy.
pub fn migrate(vm: Vm, mut vcpus: Vec<VcpuFd>) -> (Vm, Vec<VcpuFd>) {
    let save = |vcpu: &mut VcpuFd| {
        finish_io(vcpu);
        VcpuState::save(&vm.kvm, vcpu).unwrap().to_bytes().unwrap()
    };
    let states: Vec<Vec<u8>> = vcpus.iter_mut().map(save).collect();
    let new = Vm::new(Kvm::new().unwrap(), vm.guest);
    new.map_pages(1, vm.guest.map().home());
    (0..vm.guest.map().pages()).for_each(|p| new.set_page(p, &vm.page(p)));
    drop((vm, vcpus));
    let restore = |(i, bytes): (usize, &Vec<u8>)| {
        let vcpu = new.vm.create_vcpu(u64::try_from(i).unwrap()).unwrap();
        VcpuState::from_bytes(bytes)
            .unwrap()
            .restore(&vcpu)
            .unwrap();
        vcpu
    };
    let vcpus = states.iter().enumerate().map(restore).collect();
    (new, vcpus)
}
