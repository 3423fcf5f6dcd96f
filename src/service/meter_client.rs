//! The meter's end: what a guest in another process writes.

use std::path::Path;

use gleaner_migrate::CancelToken;

use super::client::unexpected;
use super::exchange::{Exchange, SocketExchange};
use super::message::{METER, Request, Response, VERSION};
use super::meters::CHUNK;
use crate::rate::{Look, Metered};
use crate::{Error, Result};

/// A meter's end of its connection to a service. Dropped, the service hears that it is gone.
#[derive(Debug)]
pub struct MeterClient {
    exchange: SocketExchange,
    metered: Metered,
}

impl MeterClient {
    /// Attaches to the service at `path`, and begins. Agents and other meters may be attached. When `cancel` is used no
    /// answer is waited for longer than 1 s.
    ///
    /// # Errors
    /// [`Error::Socket`] when nobody serves there; [`Error::Service`] with what the service says.
    pub fn attach(path: &Path, cancel: &CancelToken) -> Result<Self> {
        let mut exchange = SocketExchange::connect(path, cancel)?;
        let hello = Request::Hello {
            version: VERSION,
            migration: METER,
        };
        match ask(&mut exchange, &hello)? {
            Response::Welcome { .. } => {}
            other => return Err(unexpected(&other)),
        }
        match ask(&mut exchange, &Request::Metered)? {
            Response::Metered(metered) => Ok(Self { exchange, metered }),
            other => Err(unexpected(&other)),
        }
    }

    /// What is metered, as it was in the beginning.
    #[must_use]
    pub const fn metered(&self) -> &Metered {
        &self.metered
    }

    /// Takes what was written since the last look.
    ///
    /// # Errors
    /// [`Error::Socket`] when the service has gone; [`Error::Service`] with what it says.
    pub fn look(&mut self) -> Result<Look> {
        let mut look = match ask(&mut self.exchange, &Request::Look)? {
            Response::Look(look) => *look,
            other => return Err(unexpected(&other)),
        };
        let mut chunk = look.written.len();
        while chunk == CHUNK {
            match ask(&mut self.exchange, &Request::Rest)? {
                Response::Rest(more) => {
                    chunk = more.len();
                    look.written.extend(more);
                }
                other => return Err(unexpected(&other)),
            }
        }
        Ok(look)
    }
}

fn ask(exchange: &mut SocketExchange, request: &Request) -> Result<Response> {
    match exchange.ask(request)? {
        (Response::Error(reason), _) => Err(Error::Service { reason }),
        (answer, _) => Ok(answer),
    }
}
