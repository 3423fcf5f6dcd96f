//! One TLS connection over a socket. Nothing here waits: what would is [`io::ErrorKind::WouldBlock`].

use std::io::{self, BufRead, ErrorKind, IoSlice, Write};

use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use rustls::Connection;

use super::explain::{NOT_TLS, PLAIN, explain};
use crate::Stream;

/// The most ciphertext that is taken from the socket at once.
const INTAKE: usize = 256 << 10;

/// How the stream begins without TLS.
const MAGIC: [u8; 4] = *b"GLNR";

/// How far a handshake is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    Done,
    /// Until the other end has said more.
    Reads,
    /// Until the socket takes more.
    Writes,
}

pub(super) struct Session {
    tls: Connection,
    /// Ciphertext that has come; `intake[from..to]` is not deciphered yet.
    intake: Vec<u8>,
    from: usize,
    to: usize,
    /// The very first bytes that came, as many as are in `opened`.
    opening: [u8; 4],
    opened: usize,
    /// Bytes that are enciphered and not yet reported as written: the first ones of what is written next.
    owed: usize,
    /// The socket has ended.
    ended: bool,
    /// Why nothing more can be read or written.
    failure: Option<String>,
}

impl Session {
    pub(super) fn new(mut tls: Connection) -> Self {
        // `owed` bounds what waits to be sent.
        tls.set_buffer_limit(None);
        Self {
            tls,
            intake: vec![0; INTAKE],
            from: 0,
            to: 0,
            opening: [0; 4],
            opened: 0,
            owed: 0,
            ended: false,
            failure: None,
        }
    }

    /// Goes on with the handshake.
    pub(super) fn shake(&mut self, socket: &Stream) -> io::Result<Step> {
        loop {
            self.put_out(socket, false)?;
            if self.tls.wants_write() {
                return Ok(Step::Writes);
            }
            if !self.tls.is_handshaking() {
                return Ok(Step::Done);
            }
            match self.take_in(socket) {
                Ok(()) if self.ended && self.from == self.to => {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(Step::Reads),
                Err(e) => return Err(e),
            }
        }
    }

    /// Why the handshake has failed with `error`.
    pub(super) fn problem(&self, error: &io::Error) -> String {
        if self.is_plain() {
            return PLAIN.into();
        }
        match error.kind() {
            _ if self.failure.is_some() => error.to_string(),
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                "the other end closed the connection in the handshake: its own message says why"
                    .into()
            }
            _ => format!("{NOT_TLS} ({error})"),
        }
    }

    /// The other end speaks the stream itself.
    pub(super) fn is_plain(&self) -> bool {
        self.opening == MAGIC
    }

    /// The other end has not said a word.
    pub(super) const fn is_unopened(&self) -> bool {
        self.opened == 0
    }

    /// Gives `sink` what has come, until it takes nothing more; bytes that it took, 0 at the end of the stream.
    pub(super) fn read(
        &mut self,
        socket: &Stream,
        sink: &mut dyn FnMut(&[u8]) -> usize,
    ) -> io::Result<usize> {
        let mut got = 0;
        loop {
            let mut reader = self.tls.reader();
            match reader.fill_buf() {
                Ok([]) => return Ok(got),
                Ok(some) => {
                    let taken = sink(some);
                    reader.consume(taken);
                    got += taken;
                    if taken == 0 {
                        return Ok(got);
                    }
                    continue;
                }
                // Cut off. Whoever needed more of it takes this for what it is.
                Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(got),
                Err(e) if e.kind() != ErrorKind::WouldBlock => return Err(e),
                Err(_) => {}
            }
            if got > 0 && self.from == self.to {
                return Ok(got);
            }
            match self.take_in(socket) {
                // It comes again at the next call, or the socket has ended then.
                Err(_) if got > 0 => return Ok(got),
                taken => taken?,
            }
        }
    }

    /// Whether bytes are enciphered that the socket has not taken yet: nothing new may be enciphered then.
    pub(super) const fn owes(&self) -> bool {
        self.owed > 0
    }

    /// Enciphers `plain`, for [`Session::write`] to send.
    pub(super) fn encipher(&mut self, plain: &[u8]) -> io::Result<()> {
        self.check()?;
        self.tls.writer().write_all(plain)?;
        self.owed = plain.len();
        Ok(())
    }

    /// Sends what is enciphered; how many bytes of it have gone. `WouldBlock`: none, and the rest waits.
    pub(super) fn write(&mut self, socket: &Stream, more: bool) -> io::Result<usize> {
        self.check()?;
        let moved = self.put_out(socket, more)?;
        if !self.tls.wants_write() {
            return Ok(std::mem::take(&mut self.owed));
        }
        // So that a slow line is no silent one. The last byte goes with the last of the ciphertext: what was reported
        // whole needs nobody to push it on.
        let part = moved.min(self.owed.saturating_sub(1));
        if part == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.owed -= part;
        Ok(part)
    }

    /// Says that nothing more will be said, if the socket takes it at once. If not, the other end does not read.
    pub(super) fn say_goodbye(&mut self, socket: &Stream) {
        self.tls.send_close_notify();
        let _ = self.put_out(socket, false);
    }

    /// As ciphers do by themselves after some hundred GiB.
    #[cfg(test)]
    pub(super) fn renew_keys(&mut self) {
        self.tls.refresh_traffic_keys().unwrap();
    }

    fn check(&self) -> io::Result<()> {
        match &self.failure {
            Some(text) => Err(io::Error::new(ErrorKind::InvalidData, text.clone())),
            None => Ok(()),
        }
    }

    /// Takes a piece of ciphertext, from the socket if none is left, and deciphers it.
    fn take_in(&mut self, socket: &Stream) -> io::Result<()> {
        self.check()?;
        if self.from == self.to {
            let (count, _) = recv(socket, &mut self.intake[..], RecvFlags::DONTWAIT)?;
            (self.from, self.to) = (0, count);
            self.ended = count == 0;
            let news = self.intake[..count].iter().take(4 - self.opened);
            for (to, byte) in self.opening[self.opened..].iter_mut().zip(news) {
                *to = *byte;
                self.opened += 1;
            }
        }
        let mut rest = &self.intake[self.from..self.to];
        match self.tls.read_tls(&mut rest)? {
            // After its goodbye nothing counts.
            0 => self.from = self.to,
            count => self.from += count,
        }
        let shaking = self.tls.is_handshaking();
        let processed = self.tls.process_new_packets();
        if let Err(error) = processed {
            self.failure = Some(explain(&error, shaking));
        }
        // An alert, or an answer to new keys. Without waiting: a reader must not depend on the other end's reading.
        if !self.is_plain() {
            let _ = self.send(socket, SendFlags::empty());
        }
        self.check()
    }

    /// Sends ciphertext as long as the socket takes it; bytes that it took.
    fn put_out(&mut self, socket: &Stream, more: bool) -> io::Result<usize> {
        let more = if more {
            SendFlags::MORE
        } else {
            SendFlags::empty()
        };
        let sent = self.send(socket, more);
        if let Err(e) = &sent
            && matches!(
                e.kind(),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted
            )
        {
            // The other end has gone, and has perhaps said why.
            while !self.ended && self.take_in(socket).is_ok() {}
            self.check()?;
        }
        sent
    }

    fn send(&mut self, socket: &Stream, more: SendFlags) -> io::Result<usize> {
        let mut moved = 0;
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut Out(socket, more)) {
                Ok(count) => moved += count,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(moved)
    }
}

/// The socket, which takes ciphertext without waiting.
struct Out<'a>(&'a Stream, SendFlags);

impl Write for Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL | self.1;
        let mut nothing = SendAncillaryBuffer::default();
        Ok(sendmsg(self.0, pieces, &mut nothing, flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
