//! What may happen next: anything in any order, but for claims that nobody can make honestly.

use gleaner::migrate::Throttle;
use gleaner::service::{Request, VERSION};

use super::actors::{Agent, Phase};
use super::host::Told;
use super::world::World;

/// What becomes of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It is answered.
    Answered,
    /// The connection ends before the service hears it.
    Unheard,
    /// The service does it, and the connection ends before the agent hears so.
    Unanswered,
}

/// Which agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    /// The one whose connection is served.
    Attached,
    /// One whose connection is over.
    Stale,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    GuestWrites(u64),
    AgentConnects,
    Asks(Who, Request, Fate),
    /// The pages of a lease reach the destination.
    Sends(usize),
    /// The state reaches the destination, which is ready or refuses.
    SendsState(bool),
    Go(Who),
    /// It will not say GO any more.
    GivesUp,
    /// It hears the destination's answer to GO.
    Hears,
    /// It asks the destination what became of the attempt.
    Queries,
    Dies(Who),
    /// The destination hears GO, and the guest runs or not.
    Runs(bool),
    /// The destination refuses: silence, the end of the link, an error of its own.
    Refuses,
    /// The destination's process ends.
    Ends,
}

impl World {
    /// What may happen next.
    pub fn possible(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let guest = self.host.guest.lock().unwrap();
        if guest.running {
            steps.extend((0..guest.pages()).map(Step::GuestWrites));
        }
        drop(guest);
        if self.attached.is_none() {
            steps.push(Step::AgentConnects);
        }
        if let Some(agent) = &self.attached {
            steps.push(Step::Dies(Who::Attached));
            for request in self.requests(agent) {
                for fate in [Fate::Answered, Fate::Unheard, Fate::Unanswered] {
                    steps.push(Step::Asks(Who::Attached, request.clone(), fate));
                }
            }
            self.with_destination(agent, &mut steps);
        }
        if let Some(agent) = &self.stale {
            steps.push(Step::Dies(Who::Stale));
            // What a sender asks when its attempt has failed, and what it might have been about to ask.
            let mut requests = vec![Request::Ack(0), Request::Stop, Request::Relinquish];
            if agent.sends && !agent.told {
                requests.push(Request::Resume);
            }
            let asks = |request| Step::Asks(Who::Stale, request, Fate::Answered);
            steps.extend(requests.into_iter().map(asks));
            if agent.may_go() && self.link_of(agent).is_some() {
                steps.push(Step::Go(Who::Stale));
            }
        }
        if let Some(destination) = &self.destination
            && !destination.dead
        {
            steps.push(Step::Ends);
            if matches!(destination.phase, Phase::Receiving | Phase::Built) {
                steps.push(Step::Refuses);
            }
            if destination.phase == Phase::Built && destination.told {
                steps.extend([Step::Runs(true), Step::Runs(false)]);
            }
        }
        steps
    }

    /// Anything in any order, but for claims: that the destination runs, or that it never will.
    fn requests(&self, agent: &Agent) -> Vec<Request> {
        let hello = Request::Hello {
            version: VERSION,
            migration: [self.ids + 1; 16],
        };
        let mut requests = vec![
            hello,
            Request::Harvest,
            Request::Lease(1),
            Request::Throttle(Throttle::All { percent: 50 }),
            Request::Stop,
            Request::State,
            Request::Relinquish,
            // No such lease.
            Request::Ack(u64::MAX),
        ];
        for held in &agent.held {
            requests.push(Request::Release(held.id));
            if held.sent {
                requests.push(Request::Ack(held.id));
            }
        }
        let let_go = matches!(self.host.told, Told::LetGo(_));
        if !let_go || agent.runs == Some(true) {
            requests.push(Request::Complete);
        }
        let never_told = agent.gave_up && !agent.told;
        if !let_go || never_told || agent.runs == Some(false) {
            requests.push(Request::Resume);
        }
        requests
    }

    fn with_destination(&self, agent: &Agent, steps: &mut Vec<Step>) {
        if self.destination.as_ref().is_some_and(|d| d.id == agent.id) {
            steps.push(Step::Queries);
        }
        let Some(there) = self.link_of(agent) else {
            return;
        };
        if agent.may_go() {
            steps.push(Step::Go(Who::Attached));
        }
        if agent.let_go && !agent.told {
            steps.push(Step::GivesUp);
        }
        if there.answer {
            steps.push(Step::Hears);
        }
        if there.phase == Phase::Receiving && !there.dead {
            let unsent = agent.held.iter().enumerate().filter(|(_, held)| !held.sent);
            steps.extend(unsent.map(|(n, _)| Step::Sends(n)));
            if agent.swept && !agent.told {
                steps.extend([Step::SendsState(true), Step::SendsState(false)]);
            }
        }
    }

    /// Whether a step is one of a migration that goes well.
    pub fn goes_well(&self, step: &Step) -> bool {
        match step {
            Step::Dies(_) | Step::SendsState(false) | Step::Runs(false) => false,
            Step::Refuses | Step::Ends | Step::GivesUp => false,
            Step::Asks(_, request, fate) => {
                let agent = self.attached.as_ref();
                let may = match request {
                    Request::Resume => false,
                    Request::State => agent.is_some_and(|agent| !agent.saved),
                    Request::Relinquish => agent.is_some_and(|agent| agent.ready && agent.swept),
                    _ => true,
                };
                may && *fate == Fate::Answered
            }
            _ => true,
        }
    }
}
