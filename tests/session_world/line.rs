//! An agent's connection in memory, which ends when it is told to.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use gleaner::service::{Exchange, Request, Response};

use super::host::Host;

/// Where a connection ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// At this request, counted from 0.
    pub at: usize,
    /// The service does what is asked; its answer is lost.
    pub heard: bool,
    /// The agent's process ends: so does its link to the destination.
    pub dies: bool,
}

pub struct Line {
    host: Arc<Mutex<Host>>,
    connection: u64,
    fault: Option<Fault>,
    asked: usize,
    /// To the destination.
    link: UnixStream,
}

impl Line {
    /// The connection of the next agent.
    pub fn connect(host: &Arc<Mutex<Host>>, fault: Option<Fault>, link: &UnixStream) -> Self {
        Self {
            host: Arc::clone(host),
            connection: host.lock().unwrap().connect().unwrap(),
            fault,
            asked: 0,
            link: link.try_clone().unwrap(),
        }
    }

    fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap()
    }

    fn gone<T>() -> gleaner::Result<T> {
        Err(gleaner::Error::Socket {
            path: "memory".into(),
            source: io::ErrorKind::BrokenPipe.into(),
        })
    }
}

impl Exchange for Line {
    fn ask(&mut self, request: &Request) -> gleaner::Result<(Response, Option<File>)> {
        let fault = self.fault.filter(|fault| fault.at == self.asked);
        self.asked += 1;
        if fault.is_none_or(|fault| fault.heard) {
            let mut host = self.host();
            host.guest_works(self.asked as u64);
            let reply = host.handle(self.connection, request).unwrap();
            drop(host);
            match reply {
                Some(reply) if fault.is_none() => {
                    return Ok((reply.response, reply.fd.map(File::from)));
                }
                _ => {}
            }
        }
        let mut host = self.host();
        host.cut += usize::from(fault.is_some());
        host.hang_up(self.connection).unwrap();
        drop(host);
        if fault.is_some_and(|fault| fault.dies) {
            let _ = self.link.shutdown(Shutdown::Both);
        }
        Self::gone()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // A test that fails says so once.
        if !std::thread::panicking() {
            self.host().hang_up(self.connection).unwrap();
        }
    }
}
