//! The gate against vCPU threads: in every order that the memory model allows, no vCPU is inside `KVM_RUN` while the gate
//! is closed or the guest stopped, no kick is lost, and whoever waits is woken. Threads, atomics and locks are loom's; nothing
//! times out there, so a kick or a wake-up that is lost is a deadlock, which ends the test.
//!
//! ```sh
//! RUSTFLAGS="--cfg loom" cargo test --release -p gleaner --lib loom_tests --target-dir target/loom
//! ```
//!
//! A vCPU's thread is in its real [`Seat::run`]; of the kernel there is what matters to a kick: `KVM_RUN` looks at
//! `immediate_exit` once, on its way in, and a signal is gone unless the thread is in `KVM_RUN` when it comes.
//!
//! Bounds: one vCPU and whoever stops it, with up to four preemptions for one transaction (29,239 executions, and 17,188 when
//! the vCPU exits by itself), and up to three for two transactions (8,139), for a stop (1,709) and for a vCPU that ends (935);
//! three threads with one preemption (807 with two vCPUs, 623 with a transaction and a stop).
#![allow(clippy::unwrap_used)] // a test fails by panicking

use loom::thread;

use super::*;
use crate::loom_model::{Memory, explore};
use gleaner_ring::{DirtyRing, Entered, Vcpu, VcpuIdentity};
use std::io;
use std::mem::ManuallyDrop;

mod rests;

const ALL: u32 = CLOSED | STOP | SHUTDOWN;

/// One vCPU's `KVM_RUN`, and the thread that calls it.
#[derive(Debug, Default)]
struct Kernel {
    immediate_exit: AtomicU32,
    thread: Mutex<Thread>,
    signal: Condvar,
}

#[derive(Debug, Default)]
struct Thread {
    in_kernel: bool,
    signalled: bool,
}

impl Kernel {
    fn out(&self) {
        *self.thread.lock().unwrap() = Thread::default();
        self.signal.notify_all();
    }

    /// Waits until the vCPU, which is watched, is out of `KVM_RUN`.
    fn wait_out(&self) {
        let mut thread = self.thread.lock().unwrap();
        while thread.in_kernel {
            thread = self.signal.wait(thread).unwrap();
        }
    }
}

/// What a kick consists of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kicks {
    Both,
    Signal,
}

#[derive(Debug)]
struct Kicker(Arc<Kernel>, Kicks);

impl Kick for Kicker {
    fn set_immediate_exit(&self, on: bool) {
        if self.1 != Kicks::Signal {
            // Loom does not put sequentially consistent stores of two threads in order; it does with swaps.
            self.0.immediate_exit.swap(on.into(), Ordering::Release);
        }
    }

    fn interrupt(&self) {
        let mut thread = self.0.thread.lock().unwrap();
        // In user space the handler runs, and does nothing.
        if thread.in_kernel {
            thread.signalled = true;
            self.0.signal.notify_all();
        }
    }
}

/// A vCPU and its guest, which uses guest memory from when it gets in until it is out again.
struct Guest {
    id: u64,
    kernel: Arc<Kernel>,
    kicks: Kicks,
    memory: Memory,
    /// Whether it leaves by itself, or only when it is kicked.
    exits: bool,
    /// Whether somebody waits for it to be out. For the others nothing but its seat orders what it has read.
    watched: bool,
}

impl Vcpu for Guest {
    type Exit<'a> = ();

    fn identity(&self) -> VcpuIdentity {
        VcpuIdentity(self.id)
    }

    fn kicker(&self, _: i32) -> io::Result<Box<dyn Kick>> {
        Ok(Box::new(Kicker(Arc::clone(&self.kernel), self.kicks)))
    }

    fn ring(&self, _: u64, _: u32) -> gleaner_ring::Result<DirtyRing> {
        unreachable!("the gate looks at no ring")
    }

    fn enter(&mut self) -> Entered<()> {
        self.kernel.thread.lock().unwrap().in_kernel = true;
        let runs = self.kernel.immediate_exit.load(Ordering::Relaxed) == 0;
        if runs {
            self.memory.read();
        }
        let mut thread = self.kernel.thread.lock().unwrap();
        while runs && !self.exits && !thread.signalled {
            thread = self.kernel.signal.wait(thread).unwrap();
        }
        if !self.watched {
            *thread = Thread::default();
        }
        drop(thread);
        if runs {
            self.memory.read();
        }
        if self.watched {
            self.kernel.out();
        }
        if runs && self.exits {
            Entered::Exit(())
        } else {
            Entered::Interrupted
        }
    }
}

/// A VM: its gate, and the memory that its guest uses.
#[derive(Clone)]
struct Vm {
    gate: Arc<Gate>,
    memory: Memory,
}

impl Vm {
    fn new() -> Self {
        Self {
            gate: Arc::default(),
            memory: Memory::new(),
        }
    }

    fn vcpu(&self, id: u64, kicks: Kicks) -> (Seat, Guest) {
        let guest = Guest {
            id,
            kernel: Arc::default(),
            kicks,
            memory: self.memory.clone(),
            exits: false,
            watched: false,
        };
        (Seat::new(&self.gate, &guest, id, None).unwrap(), guest)
    }

    /// A slot transaction.
    fn transact(&self) {
        let closed = self.gate.close().unwrap();
        self.memory.write();
        closed.open();
    }

    /// A switchover that comes to nothing.
    fn stop(&self, vcpus: &[u64]) {
        let stopped = self.gate.stop().unwrap();
        self.memory.write();
        let saved = stopped.save().unwrap();
        assert!(saved.iter().map(|(id, _)| id).eq(vcpus));
        self.memory.write();
    }
}

fn serve(parked: Parked<'_, Guest>) {
    let drained = parked.complete_io(|()| Ok::<_, Error>(())).unwrap();
    drained.serve(|_| Ok(vec![]));
}

/// A vCPU's thread, until it is to end.
fn run(seat: &mut Seat, guest: &mut Guest) {
    loop {
        match seat.run(guest).unwrap() {
            Turn::Exit(()) => (),
            Turn::Stopped(parked) => serve(parked),
            Turn::Shutdown => return,
        }
    }
}

/// How a vCPU's thread passes the gate at first.
type Pass = fn(&mut Seat, &mut Guest);

/// One vCPU that leaves only when it is kicked, against `transactions` transactions and the end.
fn transactions(name: &str, bound: usize, transactions: usize, kicks: Kicks, pass: Pass) {
    explore(name, bound, move || {
        let vm = Vm::new();
        let (seat, mut guest) = vm.vcpu(0, kicks);
        // Where a deadlock ends the test, nothing can be locked any more.
        let mut seat = ManuallyDrop::new(seat);
        let closer = thread::spawn(move || {
            (0..transactions).for_each(|_| vm.transact());
            vm.gate.shutdown();
        });
        pass(&mut seat, &mut guest);
        run(&mut seat, &mut guest);
        closer.join().unwrap();
    });
}

/// At once into [`Seat::run`].
fn as_it_is(_: &mut Seat, _: &mut Guest) {}

#[test]
fn transactions_find_the_vcpu_out_each_time() {
    transactions("one transaction", 4, 1, Kicks::Both, as_it_is);
    transactions("two transactions", 3, 2, Kicks::Both, as_it_is);
}

#[test]
fn a_vcpu_that_waits_gets_in_when_the_gate_opens() {
    explore("two exits, one transaction", 4, || {
        let vm = Vm::new();
        let (mut seat, mut guest) = vm.vcpu(0, Kicks::Both);
        guest.exits = true;
        let closer = thread::spawn(move || vm.transact());
        for _ in 0..2 {
            assert!(matches!(seat.run(&mut guest).unwrap(), Turn::Exit(())));
        }
        closer.join().unwrap();
    });
}

#[test]
fn a_transaction_finds_both_vcpus_out() {
    explore("two vCPUs, one transaction", 1, || {
        let vm = Vm::new();
        let (mut seat, mut guest) = vm.vcpu(0, Kicks::Both);
        let other = vm.clone();
        let other = thread::spawn(move || {
            let (mut seat, mut guest) = other.vcpu(1, Kicks::Both);
            run(&mut seat, &mut guest);
        });
        let closer = thread::spawn(move || {
            vm.transact();
            vm.gate.shutdown();
        });
        run(&mut seat, &mut guest);
        other.join().unwrap();
        closer.join().unwrap();
    });
}

#[test]
fn a_guest_that_is_stopped_is_saved_and_goes_on() {
    explore("one stop", 3, || {
        let vm = Vm::new();
        let (mut seat, mut guest) = vm.vcpu(0, Kicks::Both);
        let stopper = thread::spawn(move || vm.stop(&[0]));
        match seat.run(&mut guest).unwrap() {
            Turn::Stopped(parked) => serve(parked),
            turn => panic!("{turn:?}"),
        }
        guest.exits = true;
        assert!(matches!(seat.run(&mut guest).unwrap(), Turn::Exit(())));
        stopper.join().unwrap();
    });
}

#[test]
fn a_vcpu_that_ends_is_not_waited_for() {
    explore("one stop, one end", 3, || {
        let vm = Vm::new();
        let (mut seat, mut guest) = vm.vcpu(0, Kicks::Both);
        guest.exits = true;
        let stopper = thread::spawn(move || drop(vm.gate.stop().unwrap()));
        if let Turn::Stopped(parked) = seat.run(&mut guest).unwrap() {
            serve(parked);
        }
        drop(seat);
        stopper.join().unwrap();
    });
}

#[test]
fn a_transaction_and_a_stop_at_the_same_time_disturb_neither() {
    explore("one transaction, one stop", 1, || {
        let vm = Vm::new();
        let (mut seat, mut guest) = vm.vcpu(0, Kicks::Both);
        let closer = vm.clone();
        let closer = thread::spawn(move || {
            // Slots, which a stopped guest's last harvest does not touch.
            drop(closer.gate.close().unwrap());
        });
        let stopper = thread::spawn(move || vm.stop(&[0]));
        match seat.run(&mut guest).unwrap() {
            Turn::Stopped(parked) => serve(parked),
            turn => panic!("{turn:?}"),
        }
        guest.exits = true;
        assert!(matches!(seat.run(&mut guest).unwrap(), Turn::Exit(())));
        closer.join().unwrap();
        stopper.join().unwrap();
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn planted_signal_without_immediate_exit() {
    transactions("planted", 2, 1, Kicks::Signal, as_it_is);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn planted_entry_that_is_not_sequentially_consistent() {
    transactions("planted", 2, 1, Kicks::Both, |seat, guest| {
        let (gate, state) = seat.shared();
        guest.exits = true;
        state.state.store(IN, Ordering::Release);
        if gate.word.load(Ordering::Acquire) == 0 {
            guest.enter();
        }
        seat.leave();
        guest.exits = false;
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn planted_immediate_exit_cleared_after_the_word_was_looked_at() {
    transactions("planted", 2, 1, Kicks::Both, |seat, guest| {
        if seat.enter(ALL).is_ok() {
            seat.shared().1.kick.set_immediate_exit(false);
            guest.enter();
            seat.leave();
        }
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn planted_wake_up_between_the_closers_look_and_its_wait() {
    transactions("planted", 2, 1, Kicks::Both, |seat, guest| {
        let (gate, state) = seat.shared();
        if seat.enter(ALL).is_ok() {
            guest.enter();
            state.state.swap(OUT, Ordering::SeqCst);
            gate.changed.notify_all();
            // What comes later would wake the closer again.
            while gate.word.load(Ordering::SeqCst) & SHUTDOWN == 0 {
                let inner = gate.lock();
                if gate.word.load(Ordering::SeqCst) & SHUTDOWN == 0 {
                    drop(gate.wait(inner));
                }
            }
        }
    });
}
