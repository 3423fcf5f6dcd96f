//! A device with a log of its own, in guest-physical addresses: what it writes is followed through every change of what
//! those addresses mean.

#![allow(clippy::unwrap_used)] // helpers of tests
#![allow(unsafe_code)] // memory shared with a backend

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use common::hand::{Hand, after, gpa, pages, value};
use common::{Copy, MODES, Random, Watchdog, kvm, machine};
use gleaner::vmm::churn::{Kind, Shuffle};
use gleaner::vmm::guest::Workload;
use gleaner::{
    Block, Collected, Error, ExternalLog, Layout, PAGE_SIZE, Slot, Start, VhostBackend, VhostLog,
};
use memmap2::{MmapOptions, MmapRaw};
use vm_memory::GuestAddress;

/// What the VMM and the device both hold.
#[derive(Default)]
struct Wire {
    running: bool,
    log: Option<MmapRaw>,
    sizes: Vec<u64>,
    /// The device's memory table: as long as it is stopped it may change.
    slots: Vec<Slot>,
    refuse_stop: bool,
    refuse_log: bool,
    refuse_layout: bool,
}

/// A vhost device that a test plays: it writes through a mapping of its own, which no log of the VMM's sees, then sets the
/// page's bit.
#[derive(Clone, Default)]
struct Device(Arc<Mutex<Wire>>);

impl Device {
    fn wire(&self) -> MutexGuard<'_, Wire> {
        self.0.lock().unwrap()
    }

    /// Its log, as the tracker takes it.
    fn log(&self, layout: &Layout) -> Box<dyn ExternalLog> {
        let log = VhostLog::new("nic", self.clone(), layout).unwrap();
        let mut wire = self.wire();
        wire.slots = layout.slots().copied().collect();
        wire.running = true;
        drop(wire);
        Box::new(Nic {
            log,
            device: self.clone(),
        })
    }

    fn write(&self, memory: &Memory, at: GuestAddress, value: u64) -> Option<u64> {
        self.wire().write(memory, at, value)
    }
}

impl Wire {
    /// Stores a value at an address, as the device's memory table has it; `None` when nothing is there.
    fn write(&self, memory: &Memory, at: GuestAddress, value: u64) -> Option<u64> {
        assert!(self.running, "a write of a device that is stopped");
        let slot = self
            .slots
            .iter()
            .find(|s| (s.gpa..s.gpa_end()).contains(&at.0) && s.block == memory.block)?;
        let page = slot.range.first + (at.0 - slot.gpa) / PAGE_SIZE;
        memory.store(page, value);
        let bit = usize::try_from(at.0 / PAGE_SIZE).unwrap();
        let log = self.log.as_ref().unwrap();
        assert!(bit / 8 < log.len(), "the log does not reach up to {at:?}");
        // SAFETY: the byte lies in the log, which both sides use atomically.
        let byte = unsafe { AtomicU8::from_ptr(log.as_mut_ptr().add(bit / 8)) };
        byte.fetch_or(1 << (bit % 8), Ordering::AcqRel);
        Some(page)
    }
}

/// A block as the device has it mapped.
struct Memory {
    block: gleaner::BlockId,
    map: MmapRaw,
}

impl Memory {
    fn of(block: &Block) -> Self {
        let map = MmapOptions::new().map_raw(block.shared_backing().unwrap().0);
        Self {
            block: block.id(),
            map: map.unwrap(),
        }
    }

    fn store(&self, page: u64, value: u64) {
        let at = usize::try_from(page * PAGE_SIZE).unwrap();
        assert!(at < self.map.len());
        // SAFETY: the word lies in the map; everybody else reads and writes it as memory of a guest.
        unsafe {
            self.map
                .as_mut_ptr()
                .add(at)
                .cast::<u64>()
                .write_volatile(value)
        };
    }
}

impl VhostBackend for Device {
    fn stop(&mut self) -> Result<(), String> {
        let mut wire = self.wire();
        if wire.refuse_stop {
            return Err("a ring that can't be stopped".into());
        }
        wire.running = false;
        Ok(())
    }

    fn set_log(&mut self, file: &File, bytes: u64) -> Result<(), String> {
        let mut wire = self.wire();
        if wire.refuse_log {
            return Err("no room for a log".into());
        }
        assert!(!wire.running, "another log for a device that runs");
        let map = MmapOptions::new()
            .map_raw(file)
            .map_err(|e| e.to_string())?;
        assert_eq!(map.len() as u64, bytes);
        wire.log = Some(map);
        wire.sizes.push(bytes);
        Ok(())
    }

    fn start(&mut self) {
        self.wire().running = true;
    }
}

/// The device in the VMM: its log, and the memory table that it is told of.
struct Nic {
    log: VhostLog<Device>,
    device: Device,
}

impl ExternalLog for Nic {
    fn name(&self) -> String {
        self.log.name()
    }

    fn pause(&mut self) -> Result<(), String> {
        self.log.pause()
    }

    fn harvest(&mut self, layout: &Layout, into: &mut Collected) -> gleaner_bitmap::Result<()> {
        self.log.harvest(layout, into)
    }

    fn layout_changed(&mut self, layout: &Layout) -> Result<(), String> {
        self.log.layout_changed(layout)?;
        let mut wire = self.device.wire();
        if std::mem::take(&mut wire.refuse_layout) {
            return Err("too many regions".into());
        }
        wire.slots = layout.slots().copied().collect();
        Ok(())
    }

    fn resume(&mut self) {
        self.log.resume();
    }
}

/// A guest by hand with a block of 300 pages and a device.
fn with_device(tracking: gleaner::Tracking) -> (Hand, Block, Device, Memory) {
    let hand = Hand::new(tracking);
    let block = hand.plug("ram", 300, 1, gpa(0));
    let device = Device::default();
    hand.tracker
        .attach(device.log(&hand.tracker.layout()))
        .unwrap();
    let memory = Memory::of(&block);
    (hand, block, device, memory)
}

#[test]
fn what_a_device_writes_is_found_wherever_the_slots_go() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let (hand, block, device, memory) = with_device(tracking);
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        device.write(&memory, gpa(63), 1).unwrap();
        device.write(&memory, gpa(299), 1).unwrap();
        assert_eq!(hand.glean(&consumer), pages(&block, [63, 299]), "{mode}");
        assert_eq!(hand.glean(&consumer), BTreeSet::new(), "{mode}");

        // Swapped halves: the same address is another page afterwards.
        device.write(&memory, gpa(10), 2).unwrap();
        let mut tx = hand.tracker.transaction();
        tx.split(1, 150, 2).move_to(1, gpa(150)).move_to(2, gpa(0));
        tx.commit().unwrap();
        assert_eq!(device.write(&memory, gpa(11), 3), Some(161));
        assert_eq!(hand.glean(&consumer), pages(&block, [10, 161]), "{mode}");

        // A slot that goes, with a write that nobody has harvested.
        device.write(&memory, gpa(150 + 20), 4).unwrap();
        let mut tx = hand.tracker.transaction();
        tx.delete(1);
        assert_eq!(tx.commit().unwrap().unmapped, 1, "{mode}");
        assert_eq!(device.write(&memory, gpa(150 + 20), 5), None);
        assert_eq!(hand.glean(&consumer), pages(&block, [20]), "{mode}");
        assert_eq!(value(&block, 20), 4);

        // The device goes, and leaves what it has written last.
        device.write(&memory, gpa(0), 6).unwrap();
        hand.tracker.detach("nic").unwrap();
        assert_eq!(hand.glean(&consumer), pages(&block, [150]), "{mode}");
    }
}

#[test]
fn the_log_grows_with_the_layout() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let (hand, block, device, memory) = with_device(tracking);
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        let mut expected = BTreeSet::new();
        for (step, place) in (0..).zip([300, 5000, 100_000, 200, 100_100]) {
            let slot = hand.tracker.layout().slot(1.into()).copied().unwrap();
            device.write(&memory, slot.address(), step).unwrap();
            let end = after(slot.address(), 299 - step);
            device.write(&memory, end, step).unwrap();
            expected.extend(pages(&block, [0, 299 - step]));
            let mut tx = hand.tracker.transaction();
            tx.move_to(1, gpa(place));
            tx.commit().unwrap();
            device
                .write(&memory, gpa(place + 100 + step), step)
                .unwrap();
            expected.extend(pages(&block, [100 + step]));
        }
        assert_eq!(hand.glean(&consumer), expected, "{mode}");
        let sizes = device.wire().sizes.clone();
        assert!(sizes.is_sorted() && sizes.len() == 5, "{mode}: {sizes:?}");
    }
}

/// How a device may refuse, and whether that is before or after KVM's calls.
#[test]
fn a_device_that_refuses_takes_the_transaction_back() {
    if !kvm() {
        return;
    }
    let refusals: [fn(&mut Wire, bool); 3] = [
        |wire, on| wire.refuse_stop = on,
        |wire, on| wire.refuse_log = on,
        |wire, on| wire.refuse_layout = on,
    ];
    for (mode, tracking) in MODES {
        for (n, refuse) in refusals.into_iter().enumerate() {
            let what = format!("{mode}, refusal {n}");
            let (mut hand, block, device, memory) = with_device(tracking);
            let consumer = hand.tracker.consumer(Start::Empty).unwrap();
            let before = hand.tracker.layout();
            device.write(&memory, gpa(7), 1).unwrap();
            hand.write(gpa(8), 1, 1);
            refuse(&mut device.wire(), true);
            let mut tx = hand.tracker.transaction();
            tx.split(1, 150, 2)
                .move_to(2, gpa(100_000))
                .move_to(1, gpa(1));
            let error = tx.commit_with(|_| panic!("published")).unwrap_err();
            assert!(
                matches!(&error, Error::ExternalLog { device, .. } if device == "nic"),
                "{what}: {error:?}"
            );
            refuse(&mut device.wire(), false);
            let layout = hand.tracker.layout();
            assert!(layout.slots().eq(before.slots()), "{what}");
            assert_eq!(layout.generation(), before.generation(), "{what}");
            // Everybody goes on under the old layout.
            device.write(&memory, gpa(9), 2).unwrap();
            hand.write(gpa(299), 1, 2);
            assert_eq!(hand.missed, Vec::<u64>::new(), "{what}");
            assert_eq!(
                hand.glean(&consumer),
                pages(&block, [7, 8, 9, 299]),
                "{what}"
            );
            // And the same transaction is possible when nobody refuses.
            let mut tx = hand.tracker.transaction();
            tx.split(1, 150, 2)
                .move_to(2, gpa(100_000))
                .move_to(1, gpa(1));
            tx.commit().unwrap();
            device.write(&memory, gpa(100_000), 3).unwrap();
            hand.write(gpa(1), 1, 3);
            assert_eq!(hand.glean(&consumer), pages(&block, [0, 150]), "{what}");
        }
    }
}

/// A device that was told of a layout which another one then refused is told of the old one again.
#[test]
fn devices_that_had_agreed_follow_back_when_another_refuses() {
    if !kvm() {
        return;
    }
    let (hand, block, first, memory) = with_device(MODES[0].1);
    let second = Device::default();
    hand.tracker
        .attach(second.log(&hand.tracker.layout()))
        .unwrap();
    let consumer = hand.tracker.consumer(Start::Empty).unwrap();
    second.wire().refuse_layout = true;
    let mut tx = hand.tracker.transaction();
    tx.move_to(1, gpa(1000));
    assert!(matches!(tx.commit(), Err(Error::ExternalLog { .. })));
    first.write(&memory, gpa(1), 1).unwrap();
    second.write(&memory, gpa(2), 1).unwrap();
    assert_eq!(first.write(&memory, gpa(1001), 1), None);
    assert_eq!(hand.glean(&consumer), pages(&block, [1, 2]));
    let mut tx = hand.tracker.transaction();
    tx.move_to(1, gpa(1000));
    tx.commit().unwrap();
    first.write(&memory, gpa(1001), 1).unwrap();
    second.write(&memory, gpa(1002), 1).unwrap();
    assert_eq!(hand.glean(&consumer), pages(&block, [1, 2]));
}

/// The device writes all the time, from a thread of its own, while the guest runs and its slots change.
fn busy_device_loses(tracking: gleaner::Tracking, rounds: u64) -> u64 {
    let mut machine = machine(tracking, 8 << 20, Workload::Random, 0xde7);
    let tracker = machine.tracker().clone();
    // A machine that was not started yet is stopped, and keeps its layout.
    machine.start();
    // Only pages that no vCPU and nobody else writes: those of a block of the device's own.
    let block = Block::memfd("nic", 600 * PAGE_SIZE).unwrap();
    let memory = Memory::of(&block);
    let place = GuestAddress(60 << 30);
    let mut tx = tracker.transaction();
    tx.add_block(&block)
        .create(200, place, block.extent(block.info().all()));
    tx.commit().unwrap();
    let device = Device::default();
    tracker.attach(device.log(&tracker.layout())).unwrap();
    let mut shuffle = Shuffle::new(machine.ram().clone(), Kind::ALL[..7].to_vec(), 0xde7);
    let consumer = tracker.consumer(Start::AllDirty).unwrap();
    let (mut copy, mut lost) = (Copy::default(), 0);
    let over = AtomicBool::new(false);
    std::thread::scope(|s| {
        let (device, memory, over) = (&device, &memory, &over);
        s.spawn(move || {
            let mut random = Random(0xde7);
            while !over.load(Ordering::SeqCst) {
                // Some addresses mean nothing at this moment. A device that is stopped waits.
                let at = GuestAddress(place.0 + random.below(1200) * PAGE_SIZE);
                let wire = device.wire();
                if wire.running {
                    wire.write(memory, at, random.0);
                }
                drop(wire);
                std::thread::yield_now();
            }
        });
        for round in 0..rounds {
            tracker.harvest().unwrap();
            copy.drain(&consumer);
            let mut tx = tracker.transaction();
            tx.move_to(200, after(place, round % 2 * 333));
            tx.commit().unwrap();
            shuffle.step(&tracker).unwrap();
            let mut stopping = device.clone();
            let stopped = tracker.stop(move || stopping.stop()).unwrap();
            tracker.harvest().unwrap();
            copy.drain(&consumer);
            lost += copy.differing(&tracker).len() as u64;
            drop(stopped);
            device.wire().running = true;
        }
        over.store(true, Ordering::SeqCst);
    });
    lost
}

#[test]
fn a_device_that_writes_all_the_time_loses_no_page() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("a device that writes");
    for (mode, tracking) in MODES {
        assert_eq!(busy_device_loses(tracking, 60), 0, "{mode}");
    }
}
