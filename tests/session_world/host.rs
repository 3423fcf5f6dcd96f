//! What the service's socket is around its session, in memory: agents come one after the other, and what one asks on a
//! connection that is over is not heard. Every request and every hang-up is judged by what the guest does on it.

use std::sync::{Arc, Mutex};

use gleaner::migrate::Throttle;
use gleaner::service::{Reply, Request, Response, Session};

use super::guest::{Guest, ToySource};
use super::{Verdict, ensure};

type Begin = Box<dyn FnMut() -> gleaner::Result<ToySource> + Send>;

/// What the answers so far commit the session to, whether anybody heard them or not.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Told {
    /// The guest is here.
    Here,
    /// It may be elsewhere, by the attempt of this id.
    LetGo([u8; 16]),
    /// It is elsewhere.
    Away,
}

pub struct Host {
    pub session: Session<ToySource, Begin>,
    pub guest: Arc<Mutex<Guest>>,
    pub told: Told,
    /// The connection that is served.
    pub current: Option<u64>,
    connections: u64,
    /// Connections that have ended as they were told to.
    pub cut: usize,
    /// The id of the attempt under way.
    attempt: [u8; 16],
    /// For the counter-test: requests of connections that are over are heard.
    pub fenced: bool,
}

impl Host {
    pub fn new(guest: Arc<Mutex<Guest>>) -> Self {
        let toy = Arc::clone(&guest);
        let begin: Begin = Box::new(move || Ok(ToySource::begin(&toy)));
        Self {
            session: Session::new(begin),
            guest,
            told: Told::Here,
            current: None,
            connections: 0,
            cut: 0,
            attempt: [0; 16],
            fenced: true,
        }
    }

    /// A new connection; `None` while another one is served.
    pub fn connect(&mut self) -> Option<u64> {
        if self.current.is_some() {
            return None;
        }
        self.connections += 1;
        self.current = Some(self.connections);
        self.current
    }

    /// The guest writes a page, if it runs here.
    pub fn guest_works(&self, page: u64) {
        let mut guest = self.guest.lock().unwrap();
        if guest.running {
            let page = page % guest.pages();
            guest.write(page);
        }
    }

    /// `None`: nobody hears it.
    pub fn handle(&mut self, connection: u64, request: &Request) -> Result<Option<Reply>, String> {
        if self.fenced && self.current != Some(connection) {
            return Ok(None);
        }
        let before = self.told;
        let reply = self.session.handle(request.clone());
        self.judge(before, request, &reply.response)
            .map_err(|what| format!("{what}: {request:?} was answered {:?}", reply.response))?;
        Ok(Some(reply))
    }

    fn judge(&mut self, before: Told, request: &Request, answer: &Response) -> Verdict {
        match (request, answer) {
            (Request::Hello { migration, .. }, Response::Welcome { .. }) => {
                ensure(before == Told::Here, || {
                    "a new attempt on a guest let go".into()
                })?;
                self.attempt = *migration;
                self.begins_all_dirty()?;
            }
            (Request::Hello { .. }, Response::InDoubt { migration }) => {
                ensure(before == Told::LetGo(*migration), || {
                    format!("in doubt of the wrong attempt, after {before:?}")
                })?;
            }
            (_, Response::Welcome { .. } | Response::InDoubt { .. }) => {
                return Err("hello was not said".into());
            }
            (Request::Relinquish, Response::Done) => {
                ensure(before == Told::Here, || "let go twice".into())?;
                self.told = Told::LetGo(self.attempt);
            }
            (Request::Complete, Response::Done) => {
                ensure(matches!(before, Told::LetGo(_)), || {
                    format!("completed after {before:?}")
                })?;
                self.told = Told::Away;
            }
            (Request::Resume, Response::Done) => {
                ensure(before != Told::Away, || "resumed when it was away".into())?;
                self.told = Told::Here;
                self.runs_at_full_speed("resumed")?;
            }
            (Request::Transactions, Response::Number(_)) | (_, Response::Error(_)) => {}
            (_, _) => ensure(before == Told::Here, || {
                format!("served, and it is {before:?}")
            })?,
        }
        self.stands_when_let_go()
    }

    fn begins_all_dirty(&self) -> Verdict {
        let guest = self.guest.lock().unwrap();
        let mut attempts = guest.attempts.values();
        let (Some(dirty), None) = (attempts.next(), attempts.next()) else {
            return Err(format!("{} attempts at once", guest.attempts.len()));
        };
        ensure(dirty.leases.is_empty(), || "leases of another agent".into())?;
        let all = (0..guest.pages()).all(|page| dirty.holds(page));
        ensure(all, || format!("the attempt begins with {dirty:?}"))
    }

    fn stands_when_let_go(&self) -> Verdict {
        let guest = self.guest.lock().unwrap();
        ensure(self.told == Told::Here || !guest.running, || {
            format!("the guest runs here, and it is {:?}", self.told)
        })?;
        ensure(guest.running || guest.throttle == Throttle::Off, || {
            "a guest that stands still is slowed".into()
        })
    }

    /// The agent is gone, or its connection.
    pub fn hang_up(&mut self, connection: u64) -> Verdict {
        if self.current != Some(connection) {
            return Ok(());
        }
        self.current = None;
        self.session.hang_up();
        self.rests()
    }

    fn runs_at_full_speed(&self, when: &str) -> Verdict {
        let guest = self.guest.lock().unwrap();
        ensure(guest.running, || format!("{when}, the guest stands still"))?;
        ensure(guest.throttle == Throttle::Off, || {
            format!("{when}, the guest is slowed: {:?}", guest.throttle)
        })
    }

    /// With no agent there, the guest runs at full speed and nothing is on lease; or it was let go of, and stands.
    fn rests(&self) -> Verdict {
        if self.told == Told::Here {
            self.runs_at_full_speed("no agent")?;
        }
        let guest = self.guest.lock().unwrap();
        if self.told == Told::Here {
            ensure(guest.attempts.is_empty(), || {
                format!(
                    "the agent has gone, its attempt has not: {:?}",
                    guest.attempts
                )
            })?;
        }
        drop(guest);
        self.stands_when_let_go()
    }
}
