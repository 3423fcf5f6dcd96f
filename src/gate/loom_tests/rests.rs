//! Rests: in every order, a vCPU that is ordered to rest comes out and stays out, nobody waits for it, and it gets in again.
//!
//! Bounds: one vCPU and who throttles it, with up to three preemptions for a rest that is seen from outside (5,514 executions),
//! that is woken (2,615), that is over (1,556), and for a transaction and the end without a wake (7,491) or a vCPU that ends
//! (538); with up to two for two rests (547) and a stop (588); three threads with one preemption (74).

use super::*;

/// A rest that no execution waits for.
const LONG: Duration = Duration::from_secs(1 << 20);

impl Vm {
    /// Orders a rest that is over when it is taken back.
    fn rest(&self) {
        self.gate.rest(Instant::now() + LONG, |_| true);
    }

    /// Orders a rest that is over before it begins.
    fn rest_too_late(&self) {
        let past = Instant::now().checked_sub(Duration::from_secs(1));
        self.gate.rest(past.unwrap(), |_| true);
    }
}

/// One vCPU that leaves only when it is kicked, against one rest and the end.
fn rests(name: &str, bound: usize, kicks: Kicks, pass: Pass) {
    explore(name, bound, move || {
        let vm = Vm::new();
        let (seat, mut guest) = vm.vcpu(0, kicks);
        guest.watched = true;
        // Where a deadlock ends the test, nothing can be locked any more.
        let mut seat = ManuallyDrop::new(seat);
        let kernel = Arc::clone(&guest.kernel);
        let throttle = thread::spawn(move || {
            vm.rest();
            kernel.wait_out();
            vm.memory.write();
            vm.gate.wake();
            vm.gate.shutdown();
        });
        pass(&mut seat, &mut guest);
        run(&mut seat, &mut guest);
        throttle.join().unwrap();
    });
}

#[test]
fn a_vcpu_that_is_to_rest_comes_out_and_stays_out() {
    rests("one rest", 3, Kicks::Both, as_it_is);
}

/// Two exits of a vCPU while `throttle` is at work.
fn goes_on(name: &str, bound: usize, throttle: fn(&Vm)) {
    explore(name, bound, move || {
        let vm = Vm::new();
        let (mut seat, mut guest) = vm.vcpu(0, Kicks::Both);
        guest.exits = true;
        let throttle = thread::spawn(move || throttle(&vm));
        for _ in 0..2 {
            assert!(matches!(seat.run(&mut guest).unwrap(), Turn::Exit(())));
        }
        throttle.join().unwrap();
    });
}

#[test]
fn a_vcpu_that_rests_gets_in_when_it_is_woken_or_the_rest_is_over() {
    goes_on("one rest, woken", 3, |vm| {
        vm.rest();
        vm.gate.wake();
    });
    goes_on("one rest, over", 3, Vm::rest_too_late);
    goes_on("two rests, woken", 2, |vm| {
        vm.rest();
        vm.gate.wake();
        vm.rest();
        vm.gate.wake();
    });
}

/// Nobody takes the rest back: a transaction or a shutdown that waited for it would wait for ever.
#[test]
fn a_transaction_and_a_shutdown_wait_for_nobody_who_rests() {
    explore("one rest, one transaction, the end", 3, || {
        let vm = Vm::new();
        let (mut seat, mut guest) = vm.vcpu(0, Kicks::Both);
        let closer = thread::spawn(move || {
            vm.rest();
            vm.transact();
            vm.gate.shutdown();
        });
        run(&mut seat, &mut guest);
        closer.join().unwrap();
    });
}

#[test]
fn a_transaction_and_a_rest_at_the_same_time_disturb_neither() {
    explore("one transaction beside one rest", 1, || {
        let vm = Vm::new();
        let (mut seat, mut guest) = vm.vcpu(0, Kicks::Both);
        guest.exits = true;
        let throttled = vm.clone();
        let throttle = thread::spawn(move || {
            throttled.rest();
            throttled.gate.wake();
        });
        let closer = thread::spawn(move || vm.transact());
        for _ in 0..2 {
            assert!(matches!(seat.run(&mut guest).unwrap(), Turn::Exit(())));
        }
        throttle.join().unwrap();
        closer.join().unwrap();
    });
}

#[test]
fn a_vcpu_that_rests_is_parked_and_rests_on_afterwards() {
    explore("one rest, one stop", 2, || {
        let vm = Vm::new();
        let (mut seat, mut guest) = vm.vcpu(0, Kicks::Both);
        guest.watched = true;
        let kernel = Arc::clone(&guest.kernel);
        let stopper = thread::spawn(move || {
            vm.rest();
            vm.stop(&[0]);
            kernel.wait_out();
            vm.memory.write();
            vm.gate.wake();
        });
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
fn a_vcpu_that_ends_rests_no_more() {
    explore("one rest, one end", 3, || {
        let vm = Vm::new();
        let (mut seat, mut guest) = vm.vcpu(0, Kicks::Both);
        guest.exits = true;
        let gate = Arc::clone(&vm.gate);
        let throttle = thread::spawn(move || vm.rest_too_late());
        assert!(matches!(seat.run(&mut guest).unwrap(), Turn::Exit(())));
        drop(seat);
        throttle.join().unwrap();
        let inner = gate.lock();
        assert!(inner.seats.is_empty() && inner.resting.is_empty());
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn planted_rest_kicked_by_the_signal_alone() {
    rests("planted", 2, Kicks::Signal, as_it_is);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn planted_look_at_the_rest_before_the_vcpu_has_said_that_it_is_in() {
    rests("planted", 2, Kicks::Both, |seat, guest| {
        let (_, state) = seat.shared();
        guest.exits = true;
        let rests = state.rests.load(Ordering::SeqCst);
        state.state.swap(IN, Ordering::SeqCst);
        if rests == 0 {
            guest.enter();
        }
        seat.leave();
        guest.exits = false;
    });
}
