//! The steps of a migration, what may fail at each, and where the guest has to be then.

use std::collections::BTreeMap;

use crate::proxy::*;
use crate::way::Way;

const PARTS: [Part; 3] = [Part::Nothing, Part::Half, Part::All];

/// How far a migration is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Moment {
    Joining,
    FirstRound,
    BetweenRounds,
    /// From here on the guest stands still.
    LastRound,
    Comparing,
    Handover,
}

/// Where the line stands still.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub moment: Moment,
    pub spot: Spot,
}

/// What happens then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    Cut,
    /// Of this connection alone.
    CutOne(usize),
    KillAgent,
    KillDestination,
    CancelAgent,
    CancelDestination,
}

/// Where the guest has to be then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Guests {
    Here,
    There,
    /// At one of both: whoever is faster decides, and says where.
    HereOrThere,
    /// It moved, and its new process was killed.
    Gone,
    /// Stopped here, and nobody can tell any more.
    InDoubt,
}

impl Step {
    /// All of a way.
    fn all(way: Way) -> Vec<Self> {
        use Moment::*;
        let mut steps = Vec::new();
        let mut add = |moment, kinds: &[u8], connection, after| {
            for kind in kinds {
                for part in PARTS {
                    let point = Point { kind: *kind, part };
                    let spot = Spot {
                        point,
                        connection,
                        after,
                    };
                    steps.push(Self { moment, spot });
                }
            }
        };
        add(Joining, &[HELLO, WELCOME], 0, 0);
        for connection in 1..way.channels {
            add(Joining, &[JOIN, WELCOME], connection, 0);
        }
        add(FirstRound, &[LAYOUT], 0, 0);
        for connection in 0..way.channels {
            add(FirstRound, &[PAGES, SYNC, APPLIED], connection, 0);
        }
        add(BetweenRounds, &[SYNC], 0, 0);
        for connection in 0..way.channels {
            // On the first one an answer between the rounds goes before.
            let before = usize::from(connection == 0);
            add(LastRound, &[PAGES], connection, 0);
            add(LastRound, &[SYNC, APPLIED], connection, before);
            add(Comparing, &[DIGESTS], connection, 0);
        }
        add(Handover, &[STATE, READY, GO, RUNNING, HEARD], 0, 0);
        steps
    }

    /// Options of `send` that bring a migration there.
    pub fn options(self) -> Vec<&'static str> {
        // Slowly enough that each connection gets its share.
        let mut options = vec!["--bandwidth-limit", "64M"];
        if self.moment >= Moment::BetweenRounds {
            // The first round ends before its first page, so the last one has them all.
            options.extend(["--timeout", "1ms", "--on-timeout", "switchover"]);
        }
        if self.moment == Moment::Comparing {
            options.push("--verify");
        }
        options
    }

    fn faults(self, way: Way) -> Vec<Fault> {
        let made = match self.moment {
            Moment::Joining => self.spot.connection + 1,
            _ => way.channels,
        };
        let mut faults = vec![Fault::Cut, Fault::KillAgent, Fault::KillDestination];
        if way.channels > 1 {
            faults.extend((0..made).map(Fault::CutOne));
        }
        if self.spot.point.kind != HEARD {
            faults.push(Fault::CancelAgent);
        }
        if self.way_back() {
            faults.push(Fault::CancelDestination);
        }
        faults
    }

    /// Nothing of the migration has come to the destination.
    pub fn is_before_hello(self) -> bool {
        self.spot.point.kind == HELLO && self.spot.point.part == Part::Nothing
    }

    /// GO has not got through, or not all of it.
    fn way_back(self) -> bool {
        let Point { kind, part } = self.spot.point;
        match kind {
            RUNNING | HEARD => false,
            GO => part != Part::All,
            _ => true,
        }
    }

    /// The source has not let go of its guest.
    pub fn holds(self) -> bool {
        let Point { kind, part } = self.spot.point;
        self.way_back() && kind != GO && (kind, part) != (READY, Part::All)
    }

    /// The source has heard that the guest runs.
    pub fn knows(self) -> bool {
        let Point { kind, part } = self.spot.point;
        kind == HEARD || (kind, part) == (RUNNING, Part::All)
    }

    pub fn guests(self, fault: Fault) -> Guests {
        let Point { kind, part } = self.spot.point;
        match fault {
            Fault::Cut | Fault::CutOne(0) | Fault::KillAgent | Fault::CancelDestination => {
                match self.way_back() {
                    true => Guests::Here,
                    false => Guests::There,
                }
            }
            Fault::CutOne(connection) => match self.moment {
                Moment::Joining | Moment::FirstRound | Moment::BetweenRounds => Guests::Here,
                // What it carried is not known to be applied.
                Moment::LastRound | Moment::Comparing
                    if connection == self.spot.connection
                        && (kind, part) != (APPLIED, Part::All) =>
                {
                    Guests::Here
                }
                Moment::LastRound | Moment::Comparing => Guests::HereOrThere,
                Moment::Handover if kind == STATE => Guests::HereOrThere,
                // All pages are there: it has nothing more to bring.
                Moment::Handover => Guests::There,
            },
            Fault::KillDestination if self.holds() => Guests::Here,
            Fault::KillDestination if self.knows() => Guests::Gone,
            Fault::KillDestination => Guests::InDoubt,
            Fault::CancelAgent if self.holds() => Guests::Here,
            Fault::CancelAgent if kind == READY => Guests::HereOrThere,
            Fault::CancelAgent => Guests::There,
        }
    }
}

/// All failures at all steps.
pub fn every(way: Way) -> Vec<(Step, Fault)> {
    let steps = Step::all(way).into_iter();
    let cells = steps.flat_map(|step| step.faults(way).into_iter().map(move |f| (step, f)));
    cells.collect()
}

/// One for each kind of frame at each moment: its parts, connections and faults take turns. Ends that are asked for are
/// walked in the first round alone: over a line that stands still each waits for the other end.
pub fn some(way: Way, first: usize) -> Vec<(Step, Fault)> {
    let mut steps = BTreeMap::<_, Vec<_>>::new();
    for cell in every(way) {
        let (Step { moment, spot }, fault) = cell;
        let asked_for = matches!(fault, Fault::CancelAgent | Fault::CancelDestination);
        if asked_for && moment != Moment::FirstRound {
            continue;
        }
        steps
            .entry((moment, spot.point.kind))
            .or_default()
            .push(cell);
    }
    let turns = (first..).step_by(7);
    let cells = steps.into_values().zip(turns);
    cells
        .map(|(cells, turn)| cells[turn % cells.len()])
        .collect()
}
