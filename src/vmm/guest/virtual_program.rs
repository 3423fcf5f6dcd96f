//! The program, for vCPUs of the model: it writes what the real one writes, and finds what the real one finds.
//!
//! Each [`Phase`] is one memory access (or `out`, or pause) of the real program and the arithmetic up to the next one. So
//! any access can miss, be carried out by the VMM, and lead on as if nothing had happened; and between any two of them the
//! registers below are all that a vCPU has.

use gleaner_bitmap::PAGE_SIZE;
use gleaner_ring::model::{Access, ModelExit, Program, State};
use serde::{Deserialize, Serialize};

use super::exits::{
    CODE_CONTROL, CODE_FPU, CODE_OK, CODE_PAGE_WRONG, CODE_SHIFT, CODE_SUM, PORT_BATCH, PORT_CHECK,
};
use super::mailbox::{CHECK, PARAMETERS, Word};
use super::program::STAMP;
use super::{Guest, Result, versioned};

/// Of the format. A change of the registers or phases changes it.
const VERSION: u32 = 1;

/// More than any valid state.
const LIMIT: usize = 1 << 10;

/// Where a page's second stamp is.
const LAST: u64 = PAGE_SIZE - 8;

/// The registers, under the names of what they hold.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct VirtualProgram {
    phase: Phase,
    /// The control page.
    control: u64,
    /// Its words that are read once, in their order; that of the workload moves on.
    parameters: [u64; PARAMETERS],
    /// What is left of the batch.
    left: u64,
    /// Writes so far, and what they were at the end of the last batch.
    count: u64,
    counted: u64,
    /// As `counted`, in a register of its own.
    fpu: u64,
    /// The page at hand, and its word of the table.
    page: u64,
    word: u64,
    /// Of the table's words that were checked.
    sum: u64,
    /// What the check found.
    result: u32,
}

/// What the program is about to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
enum Phase {
    /// Reads a parameter; `page` says which.
    #[default]
    Start,
    // A write.
    LoadWord,
    StoreWord,
    StoreEnd,
    LoadStart,
    StoreStart,
    // The end of a batch.
    LoadCount,
    StoreCount,
    LeaveBatch,
    LoadMailbox,
    // The check.
    ClearMailbox,
    CheckWord,
    CheckStart,
    CheckEnd,
    CheckCount,
    LeaveCheck,
    // A turn of an idle batch.
    Pause,
}

/// What a phase does outside of the registers.
enum Operation {
    Load(u64),
    Store(u64, u64),
    Out(u16, u32),
    Pause,
}

/// Arithmetic wraps, as the CPU's does: what is in the control page, or in a state that came from a peer, may be anything.
impl VirtualProgram {
    /// The program of vCPU `index` at its first instruction.
    ///
    /// # Errors
    /// [`GuestError::NoSuchVcpu`](super::GuestError::NoSuchVcpu).
    pub fn new(guest: &Guest, index: usize) -> Result<Self> {
        let map = guest.map();
        Ok(Self {
            control: map.home_gpa(map.vcpu(index)?.control),
            ..Self::default()
        })
    }

    /// The registers as bytes: a version, then the fields.
    ///
    /// # Errors
    /// [`GuestError::StateMalformed`](super::GuestError::StateMalformed).
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        versioned::encode::<LIMIT>(VERSION, self)
    }

    /// The program that [`VirtualProgram::to_bytes`] made these bytes of. They may come from a peer.
    ///
    /// # Errors
    /// [`GuestError::StateVersion`](super::GuestError::StateVersion),
    /// [`GuestError::StateMalformed`](super::GuestError::StateMalformed).
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        versioned::decode::<LIMIT, _>(VERSION, bytes)
    }

    const fn parameter(&self, word: Word) -> u64 {
        self.parameters[word.offset() / 8]
    }

    const fn control(&self, word: Word) -> u64 {
        self.control.wrapping_add(word.offset() as u64)
    }

    const fn word_at(&self) -> u64 {
        self.parameter(Word::Table)
            .wrapping_add(self.page.wrapping_mul(8))
    }

    const fn page_at(&self) -> u64 {
        self.parameter(Word::Data)
            .wrapping_add(self.page.wrapping_mul(PAGE_SIZE))
    }

    /// What the page holds once its word of the table is `word`.
    const fn stamp(&self, word: u64) -> u64 {
        match word {
            0 => 0,
            word => word.wrapping_mul(STAMP).wrapping_add(self.page),
        }
    }

    const fn operation(&self) -> Operation {
        use Operation::{Load, Out, Store};
        match self.phase {
            Phase::Start => Load(self.control.wrapping_add(self.page.wrapping_mul(8))),
            Phase::LoadWord | Phase::CheckWord => Load(self.word_at()),
            Phase::StoreWord => Store(self.word_at(), self.word),
            Phase::StoreEnd => Store(self.page_at().wrapping_add(LAST), self.stamp(self.word)),
            Phase::LoadStart | Phase::CheckStart => Load(self.page_at()),
            Phase::StoreStart => Store(self.page_at(), self.stamp(self.word)),
            Phase::CheckEnd => Load(self.page_at().wrapping_add(LAST)),
            Phase::LoadCount | Phase::CheckCount => Load(self.control(Word::Count)),
            Phase::StoreCount => Store(self.control(Word::Count), self.count),
            Phase::LoadMailbox => Load(self.control(Word::Mailbox)),
            Phase::ClearMailbox => Store(self.control(Word::Mailbox), 0),
            Phase::LeaveBatch => Out(PORT_BATCH, 0),
            Phase::LeaveCheck => Out(PORT_CHECK, self.result),
            Phase::Pause => Operation::Pause,
        }
    }

    /// The operation is done, `value` is what was loaded: on to the next phase.
    fn done(&mut self, value: u64) {
        self.phase = match self.phase {
            Phase::Start => self.started(value),
            Phase::LoadWord => {
                self.word = value.wrapping_add(1);
                Phase::StoreWord
            }
            Phase::StoreWord => Phase::StoreEnd,
            Phase::StoreEnd => Phase::LoadStart,
            // A page that does not hold its last stamp was lost: leave the evidence.
            Phase::LoadStart if value == self.stamp(self.word.wrapping_sub(1)) => Phase::StoreStart,
            Phase::LoadStart | Phase::StoreStart => self.written(),
            // Both mirrors of the count move on, unless they are not where they were left.
            Phase::LoadCount if value == self.counted => Phase::StoreCount,
            Phase::LoadCount | Phase::StoreCount => {
                if self.fpu == self.counted {
                    self.fpu = self.count;
                }
                self.counted = self.count;
                Phase::LeaveBatch
            }
            Phase::LeaveBatch => Phase::LoadMailbox,
            Phase::LoadMailbox if value == CHECK => Phase::ClearMailbox,
            Phase::LoadMailbox | Phase::LeaveCheck => self.batch(),
            Phase::ClearMailbox => {
                (self.page, self.sum) = (0, 0);
                Phase::CheckWord
            }
            Phase::CheckWord => {
                self.word = value;
                self.sum = self.sum.wrapping_add(value);
                Phase::CheckStart
            }
            Phase::CheckStart | Phase::CheckEnd if value != self.stamp(self.word) => {
                self.report(low_half(self.page) << CODE_SHIFT | CODE_PAGE_WRONG)
            }
            Phase::CheckStart => Phase::CheckEnd,
            Phase::CheckEnd => self.checked(),
            Phase::CheckCount if value != self.count => self.report(CODE_CONTROL),
            Phase::CheckCount if self.fpu != self.count => self.report(CODE_FPU),
            Phase::CheckCount => self.report(CODE_OK),
            Phase::Pause => {
                self.left = self.left.wrapping_sub(1);
                match self.left {
                    0 => Phase::LeaveBatch,
                    _ => Phase::Pause,
                }
            }
        }
    }

    /// A parameter is here.
    fn started(&mut self, value: u64) -> Phase {
        let index = usize::try_from(self.page).unwrap_or(PARAMETERS);
        if let Some(parameter) = self.parameters.get_mut(index) {
            *parameter = value;
            self.page += 1;
        }
        if index < PARAMETERS - 1 {
            Phase::Start
        } else {
            self.batch()
        }
    }

    fn batch(&mut self) -> Phase {
        self.left = self.parameter(Word::Batch);
        if self.left == 0 {
            self.left = self.parameter(Word::IdleTurns);
            return Phase::Pause;
        }
        self.pick()
    }

    /// Picks the next page to write.
    fn pick(&mut self) -> Phase {
        let (span, pages) = (self.parameter(Word::Span), self.parameter(Word::Pages));
        let state = &mut self.parameters[Word::State.offset() / 8];
        self.page = if span == 0 {
            *state = state.wrapping_add(1);
            if *state >= pages {
                *state = 0;
            }
            *state
        } else {
            // xorshift64; the high half of the product with the span is a page below it.
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            high_half(*state, span)
        };
        Phase::LoadWord
    }

    fn written(&mut self) -> Phase {
        self.count = self.count.wrapping_add(1);
        self.left = self.left.wrapping_sub(1);
        match self.left {
            0 => Phase::LoadCount,
            _ => self.pick(),
        }
    }

    /// A page is as it must be.
    fn checked(&mut self) -> Phase {
        self.page = self.page.wrapping_add(1);
        if self.page < self.parameter(Word::Pages) {
            Phase::CheckWord
        } else if self.sum == self.count {
            Phase::CheckCount
        } else {
            self.report(CODE_SUM)
        }
    }

    const fn report(&mut self, code: u32) -> Phase {
        self.result = code;
        Phase::LeaveCheck
    }
}

#[allow(clippy::cast_possible_truncation)] // the high half of 128 bits has 64
const fn high_half(a: u64, b: u64) -> u64 {
    ((a as u128 * b as u128) >> 64) as u64
}

#[allow(clippy::cast_possible_truncation)] // as a register of 32 bits takes it
const fn low_half(page: u64) -> u32 {
    page as u32
}

impl Program for VirtualProgram {
    fn step(&mut self, vcpu: usize, state: &mut State) -> Option<ModelExit> {
        let (access, missed) = match self.operation() {
            Operation::Load(gpa) => (state.read(vcpu, gpa), ModelExit::Load { gpa }),
            Operation::Store(gpa, value) => (
                state.write(vcpu, gpa, value),
                ModelExit::Store { gpa, value },
            ),
            Operation::Out(port, value) => {
                self.done(0);
                return Some(ModelExit::Out { port, value });
            }
            Operation::Pause => {
                self.done(0);
                return None;
            }
        };
        match access {
            Access::Done(value) => {
                self.done(value);
                None
            }
            Access::Missed => {
                // A load is done when its value is here.
                if let ModelExit::Store { .. } = missed {
                    self.done(0);
                }
                Some(missed)
            }
            Access::RingFull | Access::Stalled => None,
        }
    }

    fn loaded(&mut self, value: u64) {
        self.done(value);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::vmm::guest::{GuestError, MemoryMap, Workload};

    /// Memory by words.
    type Memory = BTreeMap<u64, u64>;

    /// A program and its memory, up to the end of its first batch.
    fn after_a_batch() -> (VirtualProgram, Memory) {
        let map = MemoryMap::new(4 << 20, 1).unwrap();
        let guest = Guest::new(map, Workload::Sweep, 700, 1).unwrap();
        let mut bytes = vec![0u8; 4 << 20];
        guest
            .load(&vm_memory::VolatileSlice::from(&mut bytes[..]))
            .unwrap();
        let mut program = VirtualProgram::new(&guest, 0).unwrap();
        let page = usize::try_from(program.control).unwrap();
        let words = bytes[page..page + 8 * PARAMETERS].chunks_exact(8);
        let mut memory: Memory = (0..)
            .map(|n| program.control + n * 8)
            .zip(words.map(|word| u64::from_le_bytes(word.try_into().unwrap())))
            .collect();
        assert_eq!(run(&mut program, &mut memory), (PORT_BATCH, 0));
        (program, memory)
    }

    /// To the next `out`.
    fn run(program: &mut VirtualProgram, memory: &mut Memory) -> (u16, u32) {
        loop {
            let mut value = 0;
            let mut left = None;
            match program.operation() {
                Operation::Load(gpa) => value = memory.get(&gpa).copied().unwrap_or(0),
                Operation::Store(gpa, value) => drop(memory.insert(gpa, value)),
                Operation::Out(port, value) => left = Some((port, value)),
                Operation::Pause => {}
            }
            program.done(value);
            if let Some(left) = left {
                return left;
            }
        }
    }

    type Harm = fn(&mut VirtualProgram, &mut Memory);

    #[test]
    fn a_check_compares_all_that_keeps_the_count() {
        let harms: [(Harm, u32); 5] = [
            (|_, _| (), CODE_OK),
            (|program, _| program.count += 1, CODE_SUM),
            (|program, _| program.fpu -= 1, CODE_FPU),
            (
                |program, memory| *memory.get_mut(&program.control(Word::Count)).unwrap() -= 1,
                CODE_CONTROL,
            ),
            (
                |program, memory| {
                    let first = program.parameter(Word::Data);
                    *memory.get_mut(&(first + PAGE_SIZE)).unwrap() ^= 1;
                },
                1 << CODE_SHIFT | CODE_PAGE_WRONG,
            ),
        ];
        for (harm, code) in harms {
            for later in [0, 3] {
                let (mut program, mut memory) = after_a_batch();
                harm(&mut program, &mut memory);
                for _ in 0..later {
                    assert_eq!(run(&mut program, &mut memory).0, PORT_BATCH);
                }
                memory.insert(program.control(Word::Mailbox), CHECK);
                assert_eq!(run(&mut program, &mut memory), (PORT_CHECK, code));
                assert_eq!(run(&mut program, &mut memory).0, PORT_BATCH);
            }
        }
    }

    #[test]
    fn malformed_bytes_are_refused() {
        let (program, _) = after_a_batch();
        let bytes = program.to_bytes().unwrap();
        assert_eq!(VirtualProgram::from_bytes(&bytes).unwrap(), program);
        for len in 0..bytes.len() {
            assert!(VirtualProgram::from_bytes(&bytes[..len]).is_err(), "{len}");
        }
        let longer = [&bytes[..], &[0]].concat();
        let error = VirtualProgram::from_bytes(&longer).unwrap_err();
        assert!(matches!(error, GuestError::StateMalformed { .. }));
        let mut newer = bytes.clone();
        newer[0] += 1;
        let error = VirtualProgram::from_bytes(&newer).unwrap_err();
        assert!(matches!(error, GuestError::StateVersion { found: 2, .. }));
        // A phase that there is not.
        let mut bent = bytes;
        bent[4] = 17;
        let error = VirtualProgram::from_bytes(&bent).unwrap_err();
        assert!(matches!(error, GuestError::StateMalformed { .. }));
    }
}
