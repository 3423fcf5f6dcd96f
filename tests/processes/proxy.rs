//! A line that breaks where it is told to.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// Bytes of a frame's header, and where its kind and its two lengths stand.
const HEADER: usize = 28;
const KIND: usize = 6;
const LENGTHS: usize = 16;

/// Kinds of frames, as they are numbered on the wire.
pub const HELLO: u8 = 1;
pub const LAYOUT: u8 = 2;
pub const PAGES: u8 = 3;
pub const STATE: u8 = 6;
pub const GO: u8 = 7;
pub const WELCOME: u8 = 65;
pub const APPLIED: u8 = 66;
pub const READY: u8 = 67;
pub const RUNNING: u8 = 68;

/// How much of a frame gets through before the line breaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    Nothing,
    Half,
    All,
}

/// The line breaks at the first frame of a kind.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    pub kind: u8,
    pub part: Part,
}

/// Forwards one connection. Joined, it tells whether the cut was reached.
pub fn proxy(at: &Path, to: PathBuf, cut: Cut) -> JoinHandle<bool> {
    let listener = UnixListener::bind(at).unwrap();
    std::thread::spawn(move || {
        let (near, _) = listener.accept().unwrap();
        let far = UnixStream::connect(to).unwrap();
        let ends = [near.try_clone().unwrap(), far.try_clone().unwrap()];
        let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        let back = std::thread::spawn(move || forward(back_from, back_to, cut));
        let reached = forward(near, far, cut);
        let reached = back.join().unwrap() || reached;
        for end in ends {
            let _ = end.shutdown(Shutdown::Both);
        }
        reached
    })
}

/// Copies whole frames; at the cut both directions end.
fn forward(mut from: UnixStream, mut to: UnixStream, cut: Cut) -> bool {
    let reached = frames(&mut from, &mut to, cut).unwrap_or(false);
    if reached {
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    } else {
        let _ = to.shutdown(Shutdown::Write);
    }
    reached
}

/// The next frame, all of it.
fn frame(from: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; HEADER];
    from.read_exact(&mut frame)?;
    let length = |at| u32::from_le_bytes(std::array::from_fn(|n| frame[at + n])) as usize;
    let rest = length(LENGTHS) + length(LENGTHS + 4);
    frame.resize(HEADER + rest, 0);
    from.read_exact(&mut frame[HEADER..])?;
    Ok(frame)
}

fn frames(from: &mut UnixStream, to: &mut UnixStream, cut: Cut) -> io::Result<bool> {
    loop {
        let frame = frame(from)?;
        let here = frame[KIND] == cut.kind;
        let through = match cut.part {
            _ if !here => frame.len(),
            Part::Nothing => 0,
            Part::Half => frame.len() / 2,
            Part::All => frame.len(),
        };
        if here {
            // First, so that no answer to what gets through gets back.
            let _ = from.shutdown(Shutdown::Both);
        }
        to.write_all(&frame[..through])?;
        if here {
            return Ok(true);
        }
    }
}

/// Forwards one connection, and holds the first frame of a kind until it is released by what is received here.
pub fn hold(at: &Path, to: PathBuf, kind: u8) -> Receiver<Sender<()>> {
    let listener = UnixListener::bind(at).unwrap();
    let (says, held) = channel();
    std::thread::spawn(move || {
        let (mut near, _) = listener.accept().unwrap();
        let mut far = UnixStream::connect(to).unwrap();
        let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        std::thread::spawn(move || io::copy(&mut back_from, &mut back_to));
        while let Ok(frame) = frame(&mut near) {
            if frame[KIND] == kind {
                let (release, released) = channel();
                says.send(release).unwrap();
                released.recv().unwrap();
            }
            far.write_all(&frame).unwrap();
        }
    });
    held
}
