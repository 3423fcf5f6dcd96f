//! The agent as it is, sender and client, against the session as it is, with the connection between them ending at each
//! request: whoever comes next finds out what became of the guest, and it ends up whole in one place.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

mod session_world;

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gleaner::migrate::{
    Destination, Error, MappedMemory, MigrationId, NewMemory, Outcome, Outcomes, Receiver,
    ReceiverOptions, Result, Sender, SenderOptions, Status, ask, resolve, serve_query,
};
use gleaner::service::{Attach, ServiceClient};
use gleaner::{BlockInfo, Layout, PAGE_SIZE, PageRange};
use proptest::collection::vec;
use proptest::prelude::*;
use session_world::guest::Guest;
use session_world::host::{Host, Told};
use session_world::line::{Fault, Line};
use vm_memory::Bytes;

const PAGES: usize = 4;
const PATIENCE: Duration = Duration::from_secs(10);

/// What the destination does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Manner {
    Well,
    /// It can't build the guest.
    NotReady,
    /// It can't run it.
    NotRunning,
    /// The link ends as the guest starts, so nobody hears of it.
    Unheard,
    /// The same, and its process ends later: it does not know of the attempt when it is asked.
    Forgetful,
}

const MANNERS: [Manner; 5] = [
    Manner::Well,
    Manner::NotReady,
    Manner::NotRunning,
    Manner::Unheard,
    Manner::Forgetful,
];

/// A destination that compares the guest's pages as it starts.
struct There {
    manner: Manner,
    guest: Arc<Mutex<Guest>>,
    link: UnixStream,
    memory: Option<Arc<MappedMemory>>,
    /// The guest has started here.
    ran: bool,
}

impl Destination for There {
    fn add_block(&mut self, block: &BlockInfo) -> Result<NewMemory> {
        let memory = Arc::new(MappedMemory::anonymous(block.pages)?);
        self.memory = Some(Arc::clone(&memory));
        Ok(NewMemory::zero(memory))
    }

    fn remove_block(&mut self, _: &BlockInfo) -> Result<()> {
        Ok(())
    }

    fn layout(&mut self, _: &Layout) -> Result<()> {
        Ok(())
    }

    fn ready(&mut self, _: Vec<u8>) -> Result<()> {
        match self.manner {
            Manner::NotReady => Err(Error::destination("no room")),
            _ => Ok(()),
        }
    }

    fn run(&mut self) -> Result<()> {
        if self.manner == Manner::NotRunning {
            return Err(Error::destination("no vCPU"));
        }
        self.ran = true;
        let guest = self.guest.lock().unwrap();
        assert!(!guest.running, "two guests");
        let memory: &dyn gleaner::migrate::PageMemory = &**self.memory.as_ref().unwrap();
        for (page, version) in (0..).zip(&guest.versions) {
            let slice = memory.slice(PageRange::new(page, 1)).unwrap();
            let here: u64 = slice.read_obj(0).unwrap();
            assert_eq!(here, *version, "page {page} lost, of {} bytes", PAGE_SIZE);
        }
        if matches!(self.manner, Manner::Unheard | Manner::Forgetful) {
            let _ = self.link.shutdown(Shutdown::Both);
        }
        Ok(())
    }

    fn abort(&mut self) {
        assert!(!self.ran, "aborted while it runs");
    }
}

/// Everything that outlives an agent.
struct World {
    host: Arc<Mutex<Host>>,
    guest: Arc<Mutex<Guest>>,
    manner: Manner,
    outcomes: Outcomes,
    /// The guest has started at a destination.
    away: bool,
    attempts: u8,
}

impl World {
    fn new(manner: Manner) -> Self {
        let guest = Guest::new(PAGES);
        Self {
            host: Arc::new(Mutex::new(Host::new(Arc::clone(&guest)))),
            guest,
            manner,
            outcomes: Outcomes::default(),
            away: false,
            attempts: 0,
        }
    }

    fn told(&self) -> Told {
        self.host.lock().unwrap().told
    }

    fn runs_here(&self) -> bool {
        self.guest.lock().unwrap().running
    }

    /// One agent, from its first request to its end: migrates, or asks what became of an earlier attempt.
    fn agent(&mut self, fault: Option<Fault>) {
        self.attempts += 1;
        let id = MigrationId([self.attempts; 16]);
        let before = self.told();
        let (near, far) = UnixStream::pair().unwrap();
        match ServiceClient::attach_over(Line::connect(&self.host, fault, &near), id) {
            Ok(Attach::Ready(client)) => {
                assert_eq!(before, Told::Here);
                self.migrates(client, id, near, far);
            }
            Ok(Attach::InDoubt(client, earlier)) => {
                assert_eq!(before, Told::LetGo(earlier.0));
                self.asks_again(client, earlier, fault.is_some());
            }
            Err(gleaner::Error::Socket { .. }) => assert!(fault.is_some() && self.told() == before),
            Err(other) => assert_eq!(before, Told::Away, "{other}"),
        }
        assert!(!(self.away && self.runs_here()), "two guests");
        assert!(self.away || self.told() != Told::Away, "no guest");
        assert_eq!(self.runs_here(), self.told() == Told::Here);
    }

    fn migrates(
        &mut self,
        mut client: ServiceClient<Line>,
        id: MigrationId,
        near: UnixStream,
        far: UnixStream,
    ) {
        let mut there = There {
            manner: self.manner,
            guest: Arc::clone(&self.guest),
            link: far.try_clone().unwrap(),
            memory: None,
            ran: false,
        };
        let options = ReceiverOptions {
            outcomes: self.outcomes.clone(),
            ..ReceiverOptions::default()
        };
        let (report, ran) = std::thread::scope(|scope| {
            let receiving = scope.spawn(move || {
                // What it says of itself is not what is asked here.
                let _ = Receiver::new(&mut there, options).run(far.into());
                there.ran
            });
            let report = Sender::new(&mut client, SenderOptions::new(id)).run(near.into());
            (report, receiving.join().unwrap())
        });
        drop(client);
        self.away |= ran;
        match report.status {
            Status::Completed => assert!(ran, "{report:?}"),
            Status::Failed | Status::Cancelled => {
                assert!(!ran && self.told() == Told::Here, "{report:?}");
            }
            // It may be that the service has taken the guest back already: a new agent hears so.
            Status::InDoubt => assert!(self.told() != Told::Away, "{report:?}"),
        }
    }

    fn asks_again(&self, mut client: ServiceClient<Line>, earlier: MigrationId, faulty: bool) {
        let known = match self.manner {
            Manner::Forgetful => Outcomes::default(),
            _ => self.outcomes.clone(),
        };
        let (near, far) = UnixStream::pair().unwrap();
        let outcome = std::thread::scope(|scope| {
            scope.spawn(move || serve_query(far.into(), &known, PATIENCE).unwrap());
            ask(near.into(), earlier, PATIENCE).unwrap()
        });
        let before = self.told();
        let resolved = resolve(&mut client, outcome);
        drop(client);
        match (outcome, resolved) {
            (Outcome::Running, Ok(status)) => {
                assert_eq!((status, self.told()), (Status::Completed, Told::Away));
            }
            (Outcome::Refused, Ok(status)) => {
                assert_eq!((status, self.told()), (Status::Failed, Told::Here));
            }
            (Outcome::Pending | Outcome::Unknown, status) => {
                assert_eq!((status.unwrap(), self.told()), (Status::InDoubt, before));
            }
            (_, Err(error)) => assert!(faulty, "{error}"),
        }
    }

    /// An agent with a fault, perhaps a second one, and those that settle it. Whether the first one got as far as its fault.
    fn cut_off(manner: Manner, first: Fault, next: Option<Fault>, told: &mut [usize; 3]) -> bool {
        let mut world = Self::new(manner);
        world.agent(Some(first));
        let reached = world.host.lock().unwrap().cut > 0;
        told[match world.told() {
            Told::Here => 0,
            Told::LetGo(_) => 1,
            Told::Away => 2,
        }] += 1;
        if next.is_some() {
            world.agent(next);
        }
        world.settle();
        reached
    }

    /// Agents without a fault come until nothing is left to find out, and the guest is where it is said to be.
    fn settle(&mut self) {
        self.agent(None);
        if self.told() != Told::Away && self.manner != Manner::Forgetful {
            self.manner = Manner::Well;
            self.agent(None);
        }
        match self.told() {
            Told::Away => assert!(self.away),
            told => {
                assert_eq!(self.manner, Manner::Forgetful);
                assert!(matches!(told, Told::LetGo(_)) && !self.runs_here());
            }
        }
    }
}

#[test]
fn wherever_an_agent_is_cut_off_the_next_ones_find_the_guest_whole_in_one_place() {
    let mut told = [0; 3];
    for manner in MANNERS {
        for (heard, dies) in [(false, false), (false, true), (true, false), (true, true)] {
            // The one that comes next may be cut off as it says what it has found out.
            let resolving = [false, true].map(|heard| Fault {
                at: 1,
                heard,
                dies: false,
            });
            for next in [None, Some(resolving[0]), Some(resolving[1])] {
                let mut at = 0;
                while World::cut_off(manner, Fault { at, heard, dies }, next, &mut told) {
                    at += 1;
                }
            }
        }
    }
    println!("after an agent with a fault: {told:?} here, in doubt, away");
    assert!(told.iter().all(|n| *n > 0));
}

fn faults() -> impl Strategy<Value = Vec<Fault>> {
    // One that asks what became of an attempt makes two requests, one that migrates some dozens.
    let at = prop_oneof![0..2usize, 0..40usize];
    let fault = (at, any::<bool>(), any::<bool>());
    vec(
        fault.prop_map(|(at, heard, dies)| Fault { at, heard, dies }),
        1..5,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn however_many_agents_are_cut_off_the_guest_ends_up_whole_in_one_place(
        faults in faults(),
        manner in 0..MANNERS.len(),
    ) {
        let mut world = World::new(MANNERS[manner]);
        for fault in faults {
            world.agent(Some(fault));
        }
        world.settle();
    }
}
