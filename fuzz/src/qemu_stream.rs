//! The stream of a stock QEMU, as it comes over one connection or out of a file.

use std::fs::File;
use std::io::{Seek, Write};
use std::sync::Arc;

use gleaner_migrate::{
    CancelToken, Error, Images, MappedMemory, NewMemory, QemuReceived, QemuReceiver, Result,
    Status, Stream,
};

use crate::MAX_INPUT;
use crate::allocations::capped;

/// What a stream may make this end allocate: what is read at a time, a machine's description, and several times the input.
const CAP: usize = (256 << 10) + (1 << 20) + 16 * MAX_INPUT;
/// Longest block that there is room for, in pages.
const ROOM: u64 = 64;

#[derive(Default)]
struct Kept {
    completed: u32,
}

impl Images for Kept {
    fn add_block(&mut self, _: &str, pages: u64) -> Result<NewMemory> {
        if pages > ROOM {
            return Err(Error::destination("no room"));
        }
        Ok(NewMemory::zero(Arc::new(MappedMemory::anonymous(pages)?)))
    }

    fn complete(&mut self, _: &[u8]) -> Result<()> {
        self.completed += 1;
        Ok(())
    }
}

/// Whatever the bytes: a refusal in words, or memory that is complete, never both.
///
/// # Panics
/// When something else holds.
pub fn run(input: &[u8]) {
    receive(input);
}

/// [`run`], and how it ended; `None` where this system has no room for the input.
///
/// # Panics
/// As [`run`].
pub fn receive(input: &[u8]) -> Option<QemuReceived> {
    let input = &input[..input.len().min(MAX_INPUT)];
    let stream = Stream::File(file(input)?);
    let mut kept = Kept::default();
    let received = capped(CAP, || {
        QemuReceiver::new(&mut kept, CancelToken::new()).run(stream)
    });
    let completed = received.status == Status::Completed;
    assert_eq!(kept.completed, u32::from(completed));
    assert_eq!(received.reason.is_some(), !completed);
    Some(received)
}

fn file(bytes: &[u8]) -> Option<File> {
    let mut file = tempfile::tempfile().ok()?;
    file.write_all(bytes).ok()?;
    file.rewind().ok()?;
    Some(file)
}
