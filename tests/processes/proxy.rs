//! A line that stands still where it is told to, and goes on or breaks.

use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use crate::ends::{Cipher, End};

/// Where a frame's kind stands in its header.
const KIND: usize = 6;

/// Kinds of frames, as they are numbered on the wire.
pub const HELLO: u8 = 1;
pub const LAYOUT: u8 = 2;
pub const PAGES: u8 = 3;
pub const SYNC: u8 = 5;
pub const STATE: u8 = 6;
pub const GO: u8 = 7;
pub const JOIN: u8 = 10;
pub const HEARD: u8 = 11;
pub const DIGESTS: u8 = 13;
pub const MEMORY: u8 = 14;
pub const WELCOME: u8 = 65;
pub const APPLIED: u8 = 66;
pub const READY: u8 = 67;
pub const RUNNING: u8 = 68;
/// Pages that were packed: they hold the line where pages do.
const PACKED: u8 = 12;

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

/// A point of a line of several connections.
#[derive(Clone, Copy, Debug)]
pub struct Spot {
    pub point: Point,
    /// Connections are numbered as they are made, from 0.
    pub connection: usize,
    /// Frames of that kind that pass on that connection before.
    pub after: usize,
}

/// What becomes of a line that stood still.
enum Fate {
    GoesOn,
    /// One connection breaks, the others go on.
    Loses(usize),
}

/// A line that stands still, both ways, all its connections. Dropped, it breaks.
pub struct Held(Sender<Fate>);

impl Held {
    /// The line goes on as if nothing had been.
    pub fn release(self) {
        self.0.send(Fate::GoesOn).unwrap();
    }

    /// The line breaks, both ways.
    pub fn cut(self) {}

    /// One of its connections breaks.
    pub fn cut_one(self, connection: usize) {
        self.0.send(Fate::Loses(connection)).unwrap();
    }
}

/// Forwards one connection, and holds it at a point, which is told here.
pub fn hold(at: &Path, to: PathBuf, point: Point) -> Receiver<Held> {
    let spot = Spot {
        point,
        connection: 0,
        after: 0,
    };
    hold_all(at, to, 1, Cipher::None, spot)
}

/// Forwards so many connections, and holds all of them when one is at a point, which is told here.
pub fn hold_all(
    at: &Path,
    to: PathBuf,
    connections: usize,
    cipher: Cipher,
    spot: Spot,
) -> Receiver<Held> {
    let listener = UnixListener::bind(at).unwrap();
    let (says, held) = channel();
    std::thread::spawn(move || {
        let line = Arc::new(Mutex::new(Line::default()));
        for number in 0..connections {
            let (near, _) = listener.accept().unwrap();
            // A destination that has been killed takes no more, and either end may be killed in the handshake.
            let far = UnixStream::connect(&to);
            let Ok((near, far)) = far.and_then(|far| cipher.ends(near, far)) else {
                return;
            };
            line.lock().unwrap().ends.push([near.clone(), far.clone()]);
            for (from, to) in [(&near, &far), (&far, &near)] {
                let direction = Direction {
                    number,
                    from: from.clone(),
                    to: to.clone(),
                    line: Arc::clone(&line),
                    spot,
                    says: says.clone(),
                };
                std::thread::spawn(move || direction.carry());
            }
        }
    });
    held
}

/// Locked while a frame is written, and for as long as the line stands still.
#[derive(Default)]
struct Line {
    /// Of each connection.
    ends: Vec<[End; 2]>,
}

impl Line {
    fn cut(&self, connections: impl IntoIterator<Item = usize>) {
        for end in connections
            .into_iter()
            .flat_map(|n| self.ends.get(n))
            .flatten()
        {
            end.shutdown(Shutdown::Both);
        }
    }
}

/// One direction of a connection.
struct Direction {
    number: usize,
    from: End,
    to: End,
    line: Arc<Mutex<Line>>,
    spot: Spot,
    says: Sender<Held>,
}

impl Direction {
    /// Copies whole frames until the stream ends or the line breaks.
    fn carry(self) {
        let Spot { point, after, .. } = self.spot;
        let mut passed = 0;
        while let Ok((frame, mut file)) = self.from.frame() {
            let line = self.line.lock().unwrap();
            let mut left = &frame[..];
            let kind = match frame[KIND] {
                PACKED => PAGES,
                kind => kind,
            };
            if kind == point.kind && self.number == self.spot.connection {
                passed += 1;
            }
            if passed > after {
                let through = match point.part {
                    Part::Nothing => 0,
                    Part::Half => frame.len() / 2,
                    Part::All => frame.len(),
                };
                let _ = self.to.write(&frame[..through], &mut file);
                left = &frame[through..];
                let (fate, told) = channel();
                // An error: the line stood still before, and nobody waits for it to do so again.
                if self.says.send(Held(fate)).is_ok() {
                    // Under the lock, so that nothing gets through any more when the others move.
                    match told.recv() {
                        Ok(Fate::GoesOn) => {}
                        Ok(Fate::Loses(connection)) => line.cut([connection]),
                        Err(_) => line.cut(0..line.ends.len()),
                    }
                }
                passed = 0;
            }
            let sent = self.to.write(left, &mut file);
            drop(line);
            if sent.is_err() {
                break;
            }
        }
        // The end of a stream waits too.
        let _line = self.line.lock().unwrap();
        self.to.shutdown(Shutdown::Write);
    }
}
