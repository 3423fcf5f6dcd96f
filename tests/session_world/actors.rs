//! Agents and a destination, as little as the protocol lets them be: an agent asks anything in any order, but it says GO
//! only after the service has let go, and claims only what it has heard.

use gleaner::migrate::Outcome;

/// A lease that an agent holds, and whether its pages were sent since.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Held {
    pub id: u64,
    pub pages: Vec<u64>,
    pub sent: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Agent {
    pub connection: u64,
    /// Of its own attempt, or of the one that it found in doubt.
    pub id: [u8; 16],
    /// It has been welcomed, and has a link to the destination of its attempt.
    pub sends: bool,
    pub held: Vec<Held>,
    /// The guest's state has been saved.
    pub saved: bool,
    /// Everything was harvested after that.
    pub harvested: bool,
    /// And everything was leased after that: nothing is left to send.
    pub swept: bool,
    /// The destination is ready.
    pub ready: bool,
    /// The service has said that it lets go.
    pub let_go: bool,
    /// Told the destination to run, or gave up telling it.
    pub told: bool,
    pub gave_up: bool,
    /// Whether the guest runs at the destination, as it has said.
    pub runs: Option<bool>,
}

impl Agent {
    /// Whether it may say GO: all is there, and the service has let go.
    pub fn may_go(&self) -> bool {
        self.ready && self.swept && self.let_go && !self.told && !self.gave_up
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    Receiving,
    Built,
    Running,
    Refused,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Destination {
    pub id: [u8; 16],
    /// The version that it has of each page.
    pub copy: Vec<u64>,
    pub phase: Phase,
    /// Its process has ended: nobody will ever hear of its phase.
    pub dead: bool,
    /// The agent's end of the link is open.
    pub link: bool,
    /// GO is on its way, or has arrived.
    pub told: bool,
    /// Its answer has not been heard.
    pub answer: bool,
}

impl Destination {
    pub fn new(id: [u8; 16], pages: usize) -> Self {
        Self {
            id,
            copy: vec![0; pages],
            phase: Phase::Receiving,
            dead: false,
            link: true,
            told: false,
            answer: false,
        }
    }

    /// Whether the guest may run there, now or later, for all that anybody can prove.
    pub fn may_run(&self) -> bool {
        self.told && self.phase != Phase::Refused
    }

    /// What it says of an attempt.
    pub fn outcome(&self, id: [u8; 16]) -> Outcome {
        match self.phase {
            _ if self.dead || self.id != id => Outcome::Unknown,
            Phase::Running => Outcome::Running,
            Phase::Refused => Outcome::Refused,
            Phase::Receiving | Phase::Built => Outcome::Pending,
        }
    }
}
