//! A host, its agents and a destination, and what each step does to them.

use std::collections::BTreeMap;

use gleaner::migrate::Throttle;
use gleaner::service::{Request, Response};

use super::actors::{Agent, Destination, Held, Phase};
use super::guest::{Dirty, Guest};
use super::host::{Host, Told};
use super::steps::{Fate, Step, Who};
use super::{Verdict, ensure};

pub struct World {
    pub host: Host,
    pub attached: Option<Agent>,
    pub stale: Option<Agent>,
    pub destination: Option<Destination>,
    pub ids: u8,
}

/// All that tells one state from another. Numbers that only grow are left out.
#[derive(PartialEq, Eq, Hash)]
pub struct State {
    running: bool,
    throttled: bool,
    current_copy: Vec<bool>,
    dirty: Option<Dirty>,
    session: String,
    told: bool,
    away: bool,
    agents: [Option<Agent>; 2],
    destination: Option<Destination>,
}

impl World {
    pub fn new(pages: usize, fenced: bool) -> Self {
        let mut host = Host::new(Guest::new(pages));
        host.fenced = fenced;
        Self {
            host,
            attached: None,
            stale: None,
            destination: None,
            ids: 0,
        }
    }

    fn agent(&mut self, who: Who) -> &mut Option<Agent> {
        match who {
            Who::Attached => &mut self.attached,
            Who::Stale => &mut self.stale,
        }
    }

    pub fn take(&mut self, step: &Step) -> Verdict {
        match step {
            Step::GuestWrites(page) => self.host.guest.lock().unwrap().write(*page),
            Step::AgentConnects => {
                let connection = self.host.connect().ok_or("the service is busy")?;
                self.attached = Some(Agent {
                    connection,
                    ..Agent::default()
                });
            }
            Step::Asks(who, request, fate) => self.ask(*who, request, *fate)?,
            Step::Sends(n) => {
                let (Some(agent), Some(there)) = (&mut self.attached, &mut self.destination) else {
                    return Ok(());
                };
                let guest = self.host.guest.lock().unwrap();
                for page in &agent.held[*n].pages {
                    let page = usize::try_from(*page).unwrap();
                    there.copy[page] = guest.versions[page];
                }
                agent.held[*n].sent = true;
            }
            Step::SendsState(ready) => {
                if let (Some(agent), Some(there)) = (&mut self.attached, &mut self.destination) {
                    agent.ready = *ready;
                    there.phase = if *ready { Phase::Built } else { Phase::Refused };
                }
            }
            Step::Go(who) => {
                if let Some(agent) = self.agent(*who) {
                    agent.told = true;
                }
                if let Some(there) = &mut self.destination {
                    there.told = true;
                }
            }
            Step::GivesUp => {
                if let Some(agent) = &mut self.attached {
                    agent.gave_up = true;
                }
                self.destination.as_mut().unwrap().link = false;
            }
            Step::Hears => {
                let there = self.destination.as_mut().unwrap();
                there.answer = false;
                self.attached.as_mut().unwrap().runs = Some(there.phase == Phase::Running);
            }
            Step::Queries => {
                use gleaner::migrate::Outcome::{Pending, Refused, Running, Unknown};
                let agent = self.attached.as_mut().unwrap();
                match self.destination.as_ref().unwrap().outcome(agent.id) {
                    Running => agent.runs = Some(true),
                    Refused => agent.runs = Some(false),
                    Pending | Unknown => {}
                }
            }
            Step::Dies(who) => self.die(*who)?,
            Step::Runs(runs) => {
                let there = self.destination.as_mut().unwrap();
                there.phase = if *runs {
                    Phase::Running
                } else {
                    Phase::Refused
                };
                there.answer = there.link;
            }
            Step::Refuses => {
                let there = self.destination.as_mut().unwrap();
                there.phase = Phase::Refused;
                there.answer = there.link;
            }
            Step::Ends => {
                let there = self.destination.as_mut().unwrap();
                there.dead = true;
                there.link = false;
                there.answer = false;
            }
        }
        self.check()
    }

    fn ask(&mut self, who: Who, request: &Request, fate: Fate) -> Verdict {
        let connection = self.agent(who).as_ref().unwrap().connection;
        let reply = match fate {
            Fate::Unheard => None,
            Fate::Answered | Fate::Unanswered => self.host.handle(connection, request)?,
        };
        if who == Who::Stale {
            return ensure(reply.is_none() || !self.host.fenced, || {
                format!("a stale agent's {request:?} was heard")
            });
        }
        if fate == Fate::Answered {
            return self.answered(
                request,
                &reply.ok_or("an attached agent is not heard")?.response,
            );
        }
        self.host.hang_up(connection)?;
        if self.stale.is_some() {
            self.die(Who::Stale)?;
        }
        self.stale = self
            .attached
            .take()
            .map(|agent| self.what_is_left_of(agent));
        Ok(())
    }

    /// An agent without its connection: it may still say GO if it has been told that the service lets go, and to the
    /// service it may say whatever it likes.
    fn what_is_left_of(&self, agent: Agent) -> Agent {
        let Agent {
            connection,
            sends,
            told,
            ..
        } = agent;
        if agent.may_go() && self.link_of(&agent).is_some() {
            return Agent {
                held: Vec::new(),
                runs: None,
                ..agent
            };
        }
        Agent {
            connection,
            sends,
            told,
            ..Agent::default()
        }
    }

    /// The destination, while the agent's link to it is open.
    pub fn link_of(&self, agent: &Agent) -> Option<&Destination> {
        let there = self.destination.as_ref()?;
        (agent.sends && there.id == agent.id && there.link).then_some(there)
    }

    /// What an agent makes of an answer.
    fn answered(&mut self, request: &Request, answer: &Response) -> Verdict {
        let away = self.host.told == Told::Away;
        let agent = self.attached.as_mut().unwrap();
        match (request, answer) {
            (Request::Hello { migration, .. }, Response::Welcome { .. }) => {
                let connection = agent.connection;
                *agent = Agent {
                    connection,
                    id: *migration,
                    sends: true,
                    ..Agent::default()
                };
                self.ids += 1;
                let pages = self.host.guest.lock().unwrap().versions.len();
                if let Some(before) = self
                    .destination
                    .replace(Destination::new(*migration, pages))
                {
                    ensure(!before.may_run(), || {
                        format!("a new attempt, and the guest may run at {before:?}")
                    })?;
                }
            }
            (Request::Hello { .. }, Response::InDoubt { migration }) => {
                agent.id = *migration;
                agent.sends = false;
            }
            (Request::Hello { .. }, Response::Error(_)) => {}
            (Request::Harvest, Response::Harvested { .. }) => {
                agent.harvested = agent.saved;
                agent.swept = false;
            }
            (Request::Lease(_), Response::Leased(Some(lease))) => agent.held.push(Held {
                id: lease.id,
                pages: lease.extents.iter().map(|e| e.range.first).collect(),
                sent: false,
            }),
            (Request::Lease(_), Response::Leased(None)) => {
                agent.swept = agent.harvested && agent.held.is_empty();
            }
            (Request::Ack(id), Response::Done) => agent.held.retain(|held| held.id != *id),
            (Request::Release(id), Response::Done) => {
                agent.held.retain(|held| held.id != *id);
                agent.swept = false;
            }
            (Request::Throttle(_) | Request::Stop, Response::Done) => {}
            (Request::State, Response::State(_)) => {
                agent.saved = true;
                agent.harvested = false;
                agent.swept = false;
            }
            (Request::Relinquish, Response::Done) => agent.let_go = true,
            (Request::Complete, Response::Done) => {}
            (Request::Resume, Response::Done) => {
                // The attempt is over; on this connection another one may begin.
                let over = agent.clone();
                *agent = Agent {
                    connection: agent.connection,
                    ..Agent::default()
                };
                self.unlink(&over);
            }
            (_, Response::Error(_)) => {}
            _ => return Err(format!("{request:?} was answered {answer:?}")),
        }
        ensure(
            !away || matches!(answer, Response::Error(_) | Response::Done),
            || format!("the guest is away, and {request:?} was answered {answer:?}"),
        )
    }

    /// An agent's links end with it. What is on its way may still arrive.
    fn unlink(&mut self, agent: &Agent) {
        if let Some(there) = &mut self.destination
            && there.id == agent.id
            && agent.sends
        {
            there.link = false;
            there.answer = false;
        }
    }

    fn die(&mut self, who: Who) -> Verdict {
        let agent = self.agent(who).take().unwrap();
        self.unlink(&agent);
        self.host.hang_up(agent.connection)
    }

    /// What must hold in every state, beside what the host judges of every answer.
    fn check(&self) -> Verdict {
        let guest = self.host.guest.lock().unwrap();
        let Some(there) = &self.destination else {
            return Ok(());
        };
        ensure(!(guest.running && there.may_run()), || {
            format!("two guests: it runs here, and may run at {there:?}")
        })?;
        let mut pages = (0..).zip(guest.versions.iter().zip(&there.copy));
        if there.phase == Phase::Running {
            return ensure(pages.all(|(_, (here, there))| here == there), || {
                format!(
                    "it runs with {:?} instead of {:?}",
                    there.copy, guest.versions
                )
            });
        }
        // Of an attempt that may yet succeed: what the destination lacks is to come.
        let alive = self
            .attached
            .as_ref()
            .filter(|a| a.sends && a.id == there.id);
        if alive.is_none() || self.host.told != Told::Here {
            return Ok(());
        }
        let Some(dirty) = guest.attempts.values().next() else {
            return Ok(());
        };
        let mut lost = pages.filter(|(page, (here, there))| here != there && !dirty.holds(*page));
        ensure(lost.next().is_none(), || {
            format!(
                "page lost: {:?} of {:?}, {dirty:?}",
                there.copy, guest.versions
            )
        })
    }

    pub fn state(&self) -> State {
        let guest = self.host.guest.lock().unwrap();
        let leases: BTreeMap<u64, u64> = guest
            .attempts
            .values()
            .flat_map(|dirty| dirty.leases.keys())
            .copied()
            .zip(0..)
            .collect();
        // Ids are told by whether they are the destination's.
        let there = self.destination.as_ref().map(|d| d.id);
        let renamed = |id: [u8; 16]| [u8::from(Some(id) == there); 16];
        let agent = |agent: &Option<Agent>| {
            let mut agent = agent.clone()?;
            agent.connection = 0;
            agent.id = renamed(agent.id);
            for held in &mut agent.held {
                held.id = leases.get(&held.id).copied().unwrap_or(u64::MAX);
            }
            Some(agent)
        };
        let copy = self.destination.iter().flat_map(|d| &d.copy);
        State {
            running: guest.running,
            throttled: guest.throttle != Throttle::Off,
            current_copy: copy.zip(&guest.versions).map(|(a, b)| a == b).collect(),
            dirty: guest.attempts.values().next().map(Dirty::renumbered),
            session: format!("{:?}", self.host.session),
            told: matches!(self.host.told, Told::LetGo(_)),
            away: self.host.told == Told::Away,
            agents: [agent(&self.attached), agent(&self.stale)],
            destination: self.destination.clone().map(|mut d| {
                d.id = [1; 16];
                d.copy.clear();
                d
            }),
        }
    }
}
