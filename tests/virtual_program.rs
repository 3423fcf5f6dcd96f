//! The reference guest's program for the model's vCPUs is the real one, access by access.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

mod common;

use std::sync::Arc;

use common::{bytes_of, kvm, pages_apart};
use gleaner::model::{ModelConfig, ModelExit, ModelKvm, ModelVcpu, Program};
use gleaner::vmm::guest::{
    CheckResult, Guest, GuestEvent, HOME, Mailbox, MemoryMap, VirtualProgram, Workload,
    emulate_read, emulate_write,
};
use gleaner::{Block, PAGE_SIZE, SlotKey, Tracker};
use gleaner_ring::{Entered, Vcpu};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, VolatileMemory};

/// Neither RAM nor home nor the data of a vCPU is a multiple of 64 pages.
const RAM: u64 = (4 << 20) + 37 * PAGE_SIZE;
const BATCH: u32 = 777;
/// The guest's home.
const HOME_SLOT: SlotKey = SlotKey::new(1);

/// RAM with a guest in it, mapped.
struct Rig {
    tracker: Tracker,
    guest: Guest,
    ram: Block,
}

impl Rig {
    fn new(tracker: Tracker, workload: Workload) -> Self {
        let map = MemoryMap::new(RAM, 1).unwrap();
        let guest = Guest::new(map, workload, BATCH, 42).unwrap();
        let ram = Block::memfd("ram", RAM).unwrap();
        guest.load(&ram.memory().as_volatile_slice()).unwrap();
        let mut tx = tracker.transaction();
        tx.add_block(&ram)
            .create(0, GuestAddress(0), ram.extent(map.low()));
        tx.commit().unwrap();
        let rig = Self {
            tracker,
            guest,
            ram,
        };
        rig.map_home();
        rig
    }

    fn on_model(workload: Workload) -> (Self, ModelVcpu<VirtualProgram>) {
        let model = ModelKvm::new(ModelConfig::default());
        let tracker = Tracker::on(Arc::new(model.clone())).build().unwrap();
        let rig = Self::new(tracker, workload);
        let program = VirtualProgram::new(&rig.guest, 0).unwrap();
        (rig, model.vcpu(program).unwrap())
    }

    fn map_home(&self) {
        let home = self.ram.extent(self.guest.map().home());
        let mut tx = self.tracker.transaction();
        tx.create(HOME_SLOT, GuestAddress(HOME), home);
        tx.commit().unwrap();
    }

    fn unmap_home(&self) {
        let mut tx = self.tracker.transaction();
        tx.delete(HOME_SLOT);
        tx.commit().unwrap();
    }

    fn mailbox(&self) -> Mailbox<'_, gleaner::WriteLogSlice<'_>> {
        let ram = self.ram.memory().as_volatile_slice();
        Mailbox::new(&ram, self.guest.map(), 0).unwrap()
    }

    /// Runs to the next exit, and carries it out; what the guest says, if it says something.
    fn turn(&self, vcpu: &mut ModelVcpu<VirtualProgram>) -> Option<GuestEvent> {
        let (ram, map) = (self.ram.memory().as_volatile_slice(), self.guest.map());
        match vcpu.enter() {
            Entered::Exit(ModelExit::Out { port, value }) => {
                Some(GuestEvent::decode(port, &value.to_le_bytes()).unwrap())
            }
            Entered::Exit(ModelExit::Load { gpa }) => {
                let mut bytes = [0; 8];
                emulate_read(&ram, map, gpa, &mut bytes).unwrap();
                vcpu.program().loaded(u64::from_le_bytes(bytes));
                None
            }
            Entered::Exit(ModelExit::Store { gpa, value }) => {
                emulate_write(&ram, map, gpa, &value.to_le_bytes()).unwrap();
                None
            }
            other => panic!("no exit of the program's: {other:?}"),
        }
    }

    fn event(&self, vcpu: &mut ModelVcpu<VirtualProgram>) -> GuestEvent {
        std::iter::repeat_with(|| self.turn(vcpu))
            .flatten()
            .next()
            .unwrap()
    }

    fn batches(&self, vcpu: &mut ModelVcpu<VirtualProgram>, count: u32) {
        for _ in 0..count {
            assert_eq!(self.event(vcpu), GuestEvent::BatchDone);
        }
    }

    fn check(&self, vcpu: &mut ModelVcpu<VirtualProgram>) -> CheckResult {
        self.mailbox().request_check().unwrap();
        loop {
            if let GuestEvent::Check(result) = self.event(vcpu) {
                assert!(!self.mailbox().check_pending().unwrap());
                return result;
            }
        }
    }

    fn page(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        let at = usize::try_from(page * PAGE_SIZE).unwrap();
        let ram = self.ram.memory().as_volatile_slice();
        ram.read_slice(&mut bytes, at).unwrap();
        bytes
    }

    fn set_page(&self, page: u64, bytes: &[u8]) {
        let at = usize::try_from(page * PAGE_SIZE).unwrap();
        let ram = self.ram.memory().as_volatile_slice();
        ram.write_slice(bytes, at).unwrap();
    }
}

/// Memory after so many batches, a check, and a batch, of the real program.
fn real(workload: Workload, batches: u32) -> Vec<u8> {
    let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
    let tracker = Tracker::builder(Arc::clone(&vm)).build().unwrap();
    let rig = Rig::new(tracker, workload);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    rig.guest.start(&vcpu, 0).unwrap();
    let mut event = || match vcpu.run().unwrap() {
        VcpuExit::IoOut(port, data) => GuestEvent::decode(port, data).unwrap(),
        other => panic!("no exit of the program's: {other:?}"),
    };
    for _ in 0..batches {
        assert_eq!(event(), GuestEvent::BatchDone);
    }
    rig.mailbox().request_check().unwrap();
    assert_eq!(event(), GuestEvent::Check(CheckResult::Ok));
    assert_eq!(event(), GuestEvent::BatchDone);
    bytes_of(&rig.ram)
}

#[test]
fn it_writes_what_the_real_one_writes() {
    if !kvm() {
        return;
    }
    for workload in [
        Workload::Sweep,
        Workload::Random,
        Workload::Hot(300_000),
        Workload::Idle,
    ] {
        let (rig, mut vcpu) = Rig::on_model(workload);
        rig.batches(&mut vcpu, 20);
        assert_eq!(rig.check(&mut vcpu), CheckResult::Ok);
        rig.batches(&mut vcpu, 1);
        let apart = pages_apart(&real(workload, 20), &bytes_of(&rig.ram));
        assert!(apart.is_empty(), "{workload}: pages {apart:?}");
    }
}

#[test]
fn it_goes_on_from_wherever_it_was_stopped() {
    for workload in [Workload::Sweep, Workload::Random, Workload::Hot(300_000)] {
        let (whole, mut vcpu) = Rig::on_model(workload);
        whole.batches(&mut vcpu, 3);
        // Every access is an exit, and after each the state goes through bytes.
        let (rig, mut vcpu) = Rig::on_model(workload);
        rig.unmap_home();
        let (mut batches, mut exits) = (0, 0);
        while batches < 3 {
            let event = rig.turn(&mut vcpu);
            batches += u32::from(event == Some(GuestEvent::BatchDone));
            exits += 1;
            let state = vcpu.program().to_bytes().unwrap();
            *vcpu.program() = VirtualProgram::default();
            *vcpu.program() = VirtualProgram::from_bytes(&state).unwrap();
        }
        // A write is four accesses at least.
        assert!(exits >= 3 * 4 * BATCH, "{exits} exits");
        let apart = pages_apart(&bytes_of(&whole.ram), &bytes_of(&rig.ram));
        assert!(apart.is_empty(), "{workload}: pages {apart:?}");
        rig.map_home();
        assert_eq!(rig.check(&mut vcpu), CheckResult::Ok, "{workload}");
    }
}

/// What happens to a guest between two batches, and what its check must say then.
type Harm = fn(&Rig, &mut VirtualProgram, &Old) -> CheckResult;

/// Everything as it was some batches ago.
struct Old {
    pages: Vec<Vec<u8>>,
    program: VirtualProgram,
}

impl Old {
    fn bring_back(&self, rig: &Rig, page: u64) {
        rig.set_page(page, &self.pages[usize::try_from(page).unwrap()]);
    }
}

const HARMS: [(&str, Harm); 8] = [
    ("a data page is old", |rig, _, old| {
        let data = rig.guest.map().vcpu(0).unwrap().data;
        old.bring_back(rig, data.first + 77);
        CheckResult::Page { index: 77 }
    }),
    ("a data page is zero", |rig, _, _| {
        let data = rig.guest.map().vcpu(0).unwrap().data;
        rig.set_page(data.end() - 1, &[0; 4096]);
        CheckResult::Page {
            index: data.pages - 1,
        }
    }),
    ("the first half of a data page is old", |rig, _, old| {
        let page = rig.guest.map().vcpu(0).unwrap().data.first;
        let mut torn = rig.page(page);
        torn[..2048].copy_from_slice(&old.pages[usize::try_from(page).unwrap()][..2048]);
        rig.set_page(page, &torn);
        CheckResult::Page { index: 0 }
    }),
    ("the second half of a data page is old", |rig, _, old| {
        let page = rig.guest.map().vcpu(0).unwrap().data.first + 3;
        let mut torn = rig.page(page);
        torn[2048..].copy_from_slice(&old.pages[usize::try_from(page).unwrap()][2048..]);
        rig.set_page(page, &torn);
        CheckResult::Page { index: 3 }
    }),
    ("a table page is old", |rig, _, old| {
        old.bring_back(rig, rig.guest.map().vcpu(0).unwrap().table.first);
        CheckResult::Page { index: 0 }
    }),
    ("all tables and data pages are old", |rig, _, old| {
        let home = rig.guest.map().home();
        (home.first..home.end()).for_each(|p| old.bring_back(rig, p));
        CheckResult::Sum
    }),
    ("the control page is old", |rig, _, old| {
        old.bring_back(rig, rig.guest.map().vcpu(0).unwrap().control);
        CheckResult::ControlPage
    }),
    ("the registers are old", |_, program, old| {
        *program = old.program.clone();
        CheckResult::Sum
    }),
];

#[test]
fn each_loss_is_found_at_once_and_later() {
    for later in [0, 20] {
        for (what, harm) in HARMS {
            let (rig, mut vcpu) = Rig::on_model(Workload::Sweep);
            rig.batches(&mut vcpu, 5);
            let old = Old {
                pages: (0..rig.guest.map().pages()).map(|p| rig.page(p)).collect(),
                program: vcpu.program().clone(),
            };
            rig.batches(&mut vcpu, 5);
            let expected = harm(&rig, vcpu.program(), &old);
            rig.batches(&mut vcpu, later);
            let found = rig.check(&mut vcpu);
            // The next visit stamps the end of a page anew. An old table page catches up with the stamps in time, but the
            // sum never does.
            let healed = match what {
                "the second half of a data page is old" => found == CheckResult::Ok,
                "a table page is old" => found == CheckResult::Sum,
                _ => false,
            };
            assert!(
                found == expected || (later > 0 && healed),
                "{what}, checked {later} batches later: {found:?}, expected {expected:?}"
            );
        }
    }
}
