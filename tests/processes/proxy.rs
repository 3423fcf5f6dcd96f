//! A line that stands still where it is told to, and goes on or breaks.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Bytes of a frame's header, and where its kind and its two lengths stand.
const HEADER: usize = 28;
const KIND: usize = 6;
const LENGTHS: usize = 16;

/// Kinds of frames, as they are numbered on the wire.
pub const HELLO: u8 = 1;
pub const LAYOUT: u8 = 2;
pub const PAGES: u8 = 3;
pub const SYNC: u8 = 5;
pub const STATE: u8 = 6;
pub const GO: u8 = 7;
pub const MEMORY: u8 = 14;
pub const WELCOME: u8 = 65;
pub const APPLIED: u8 = 66;
pub const READY: u8 = 67;
pub const RUNNING: u8 = 68;

/// How much of a frame gets through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    Nothing,
    Half,
    All,
}

/// Where a line stands still: at the first frame of a kind, when a part of it has got through.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    pub kind: u8,
    pub part: Part,
}

/// A line that stands still, both ways. Dropped, it breaks.
pub struct Held(Sender<()>);

impl Held {
    /// The line goes on as if nothing had been.
    pub fn release(self) {
        self.0.send(()).unwrap();
    }

    /// The line breaks, both ways.
    pub fn cut(self) {}
}

/// Forwards one connection, and holds it at a point, which is told here.
pub fn hold(at: &Path, to: PathBuf, point: Point) -> Receiver<Held> {
    let listener = UnixListener::bind(at).unwrap();
    let (says, held) = channel();
    std::thread::spawn(move || {
        let (near, _) = listener.accept().unwrap();
        let far = UnixStream::connect(to).unwrap();
        // Held while a frame is written, and for as long as the line stands still.
        let moving = Arc::new(Mutex::new(()));
        for (from, to) in [(&near, &far), (&far, &near)] {
            let line = Direction {
                from: from.try_clone().unwrap(),
                to: to.try_clone().unwrap(),
                moving: Arc::clone(&moving),
                point,
                says: says.clone(),
            };
            std::thread::spawn(move || line.carry());
        }
    });
    held
}

/// One direction of a line.
struct Direction {
    from: UnixStream,
    to: UnixStream,
    moving: Arc<Mutex<()>>,
    point: Point,
    says: Sender<Held>,
}

impl Direction {
    /// Copies whole frames until the stream ends or the line breaks.
    fn carry(mut self) {
        while let Ok((frame, mut file)) = frame(&mut self.from) {
            let moving = self.moving.lock().unwrap();
            let mut left = &frame[..];
            if frame[KIND] == self.point.kind {
                let through = match self.point.part {
                    Part::Nothing => 0,
                    Part::Half => frame.len() / 2,
                    Part::All => frame.len(),
                };
                let _ = write(&mut self.to, &frame[..through], &mut file);
                left = &frame[through..];
                let (release, released) = channel();
                // An error: the line stood still before and has been released.
                if self.says.send(Held(release)).is_ok() && released.recv().is_err() {
                    // First, so that nothing gets through any more when the other direction moves.
                    let _ = self.to.shutdown(Shutdown::Both);
                    let _ = self.from.shutdown(Shutdown::Both);
                    return;
                }
            }
            let sent = write(&mut self.to, left, &mut file);
            drop(moving);
            if sent.is_err() {
                break;
            }
        }
        let _ = self.to.shutdown(Shutdown::Write);
    }
}

/// The next frame, all of it, with the descriptor that came along.
fn frame(from: &mut UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut frame = vec![0; HEADER];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut pieces = [IoSliceMut::new(&mut frame)];
    let got = recvmsg(&*from, &mut pieces, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
    if got == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let file = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    from.read_exact(&mut frame[got..])?;
    let length = |at| u32::from_le_bytes(std::array::from_fn(|n| frame[at + n])) as usize;
    let rest = length(LENGTHS) + length(LENGTHS + 4);
    frame.resize(HEADER + rest, 0);
    from.read_exact(&mut frame[HEADER..])?;
    Ok((frame, file))
}

/// Writes bytes of a frame; its descriptor goes along with the first one.
fn write(to: &mut UnixStream, bytes: &[u8], file: &mut Option<OwnedFd>) -> io::Result<()> {
    let mut sent = 0;
    if !bytes.is_empty()
        && let Some(file) = file.take()
    {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        let pieces = [IoSlice::new(bytes)];
        sent = sendmsg(&*to, &pieces, &mut control, SendFlags::NOSIGNAL)?;
    }
    to.write_all(&bytes[sent..])
}
