//! What the frames of a [`MemoryWire`](crate::MemoryWire) go over: how long they take, and where it breaks.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::wire::Message;
use crate::{Clock, Error, ReceiverOptions, Result};

/// A direction of a wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// From the source to the destination.
    Forth,
    /// From the destination to the source.
    Back,
}

/// How much of a frame still gets through when the wire breaks at it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut {
    /// Nothing, and who sends it is told so unless the break is silent.
    Before,
    /// Half of its bytes: of its pages the first ones are written, the last of them in part. Who sends it believes that
    /// all went, as after a write into the buffer of a socket.
    Half,
    /// All of it.
    After,
}

/// Where a wire breaks. Nothing that is sent after that gets through, either way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Break {
    /// The direction of the frame.
    pub way: Way,
    /// Its number in that direction, from 0.
    pub frame: u64,
    /// How much of it gets through.
    pub cut: Cut,
    /// Nobody is told: what is sent vanishes, and each end waits until its patience is over, the destination until
    /// [`MemoryWire::end`](crate::MemoryWire::end). Otherwise both ends hear of it at once.
    pub silent: bool,
}

/// Called before each frame.
pub(crate) type Watch<'a> = Box<dyn FnMut(Way, &Message) + 'a>;
/// Asked how long each answer takes beyond the latency.
pub(crate) type Delay<'a> = Box<dyn FnMut(&Message) -> Duration + 'a>;

/// What frames go over.
pub(crate) struct Line<'a> {
    pub(crate) clock: Clock,
    pub(crate) latency: Duration,
    pub(crate) bandwidth: Option<u64>,
    pub(crate) breaks: Option<Break>,
    pub(crate) broken: bool,
    /// It is broken, and nobody was told.
    pub(crate) mute: bool,
    /// How long the destination waits when nobody tells it.
    pub(crate) patience: Duration,
    /// Frames sent, forth and back.
    pub(crate) frames: [u64; 2],
    /// Bytes sent forth.
    pub(crate) bytes: u64,
    /// Answers on their way, with the time when they are there.
    pub(crate) answers: VecDeque<(Instant, Message)>,
    pub(crate) watch: Option<Watch<'a>>,
    pub(crate) delay: Option<Delay<'a>>,
}

impl Line<'_> {
    pub(crate) fn new(options: &ReceiverOptions) -> Self {
        Self {
            clock: options.clock.clone(),
            latency: Duration::ZERO,
            bandwidth: None,
            breaks: None,
            broken: false,
            mute: false,
            patience: options.io_timeout,
            frames: [0; 2],
            bytes: 0,
            answers: VecDeque::new(),
            watch: None,
            delay: None,
        }
    }

    /// How much of the next frame in a direction gets through. An error if its sender is told that nothing does.
    pub(crate) fn next(&mut self, way: Way, message: &Message) -> Result<Share> {
        if let Some(watch) = &mut self.watch {
            watch(way, message);
        }
        let number = &mut self.frames[way as usize];
        let here = |at: &Break| at.way == way && at.frame == *number;
        let cut = match self.breaks.filter(here) {
            _ if self.broken => Some(Cut::Before),
            None => None,
            Some(at) => {
                (self.broken, self.mute) = (true, at.silent);
                Some(at.cut)
            }
        };
        let share = match cut {
            None | Some(Cut::After) => Share::All,
            Some(Cut::Half) => Share::Half,
            Some(Cut::Before) if self.mute => Share::Nothing,
            Some(Cut::Before) => return Err(closed(way)),
        };
        self.frames[way as usize] += 1;
        Ok(share)
    }

    /// What the destination meets when it awaits more.
    pub(crate) fn lost(&self, during: &'static str) -> Error {
        if self.mute {
            let after = self.patience;
            Error::Silent { during, after }
        } else {
            Error::Closed { during }
        }
    }
}

/// How much of a frame gets through.
#[derive(Clone, Copy)]
pub(crate) enum Share {
    Nothing,
    Half,
    All,
}

const fn closed(way: Way) -> Error {
    Error::Closed {
        during: match way {
            Way::Forth => "writing to the stream",
            Way::Back => "answering the source",
        },
    }
}
