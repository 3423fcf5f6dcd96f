//! The service's side of the service protocol: requests of an agent, on a guest that is a toy.
//!
//! An input is a row of steps. A byte below [`HANG_UP`] is the length of a request, whose bytes follow.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gleaner::service::{Reply, Request, Response, Session, SessionSource};
use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation, Layout, PAGE_SIZE};
use gleaner_migrate::{
    Error, Harvested, LeaseId, LeasedPart, MappedMemory, Memory, PageLease, Result, Source,
    Throttle, Throttles,
};

use crate::MAX_INPUT;
use crate::allocations::capped;
use crate::bytes::Bytes;

/// The agent is gone, and the next request is that of another one.
pub const HANG_UP: u8 = 254;
/// The next call of the guest fails.
pub const FAIL: u8 = 255;

/// What decoding a request may allocate: texts and lists within the limit, and what the error says.
const REQUEST_CAP: usize = 4 * Request::LIMIT;
/// What decoding a response may allocate: a text's length is believed up to the limit, a list's up to 1 MiB, of which a
/// layout has two.
pub const RESPONSE_CAP: usize = Response::LIMIT + (2 << 20) + 16 * MAX_INPUT;
/// What a session may allocate for a request: the toy's layout and leases are small.
const SESSION_CAP: usize = 64 << 10;

const BLOCK: BlockId = BlockId(5);
const PAGES: u64 = 16;

/// The guest that an attempt is made on.
#[derive(Debug, Default)]
struct Guest {
    running: bool,
    throttled: bool,
    relinquished: bool,
    complete: bool,
    /// There is an attempt.
    attempt: bool,
    dirty: BTreeSet<u64>,
    leases: BTreeMap<u64, BTreeSet<u64>>,
    next_lease: u64,
    /// The next call fails.
    fail: bool,
    /// Calls so far.
    calls: u64,
}

struct Toy {
    guest: Arc<Mutex<Guest>>,
    memory: Memory,
}

fn lock(guest: &Mutex<Guest>) -> MutexGuard<'_, Guest> {
    // After a panic too: what it was about is still to be told.
    guest.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Toy {
    /// Begins an attempt.
    fn begin(guest: &Arc<Mutex<Guest>>, memory: &Memory) -> gleaner::Result<Self> {
        let mut state = lock(guest);
        state.calls += 1;
        if std::mem::take(&mut state.fail) {
            return Err(gleaner::Error::Broken);
        }
        assert!(!state.attempt && state.running, "two attempts at a time");
        state.attempt = true;
        state.dirty = (0..PAGES).collect();
        drop(state);
        Ok(Self {
            guest: Arc::clone(guest),
            memory: Arc::clone(memory),
        })
    }

    /// A call that needs what `allowed` says of the guest.
    fn call(&self, allowed: impl FnOnce(&Guest) -> bool) -> Result<MutexGuard<'_, Guest>> {
        let mut guest = lock(&self.guest);
        guest.calls += 1;
        assert!(allowed(&guest), "out of order: {guest:?}");
        if std::mem::take(&mut guest.fail) {
            return Err(Error::source("not today"));
        }
        Ok(guest)
    }

    fn end_lease(&self, lease: LeaseId) -> Result<(MutexGuard<'_, Guest>, BTreeSet<u64>)> {
        let mut guest = self.call(|guest| !guest.complete)?;
        match guest.leases.remove(&lease.0) {
            Some(pages) => Ok((guest, pages)),
            None => Err(Error::source("no such lease")),
        }
    }
}

impl Drop for Toy {
    fn drop(&mut self) {
        let mut guest = lock(&self.guest);
        guest.attempt = false;
        guest.throttled = false;
        guest.leases.clear();
        if !guest.relinquished {
            guest.running = true;
        }
    }
}

impl Source for Toy {
    fn layout(&mut self) -> Result<Layout> {
        let _guest = self.call(|guest| !guest.relinquished)?;
        let block = BlockInfo::new(BLOCK, "ram", PAGES * PAGE_SIZE)?;
        Ok(Layout::from_parts(Generation(1), vec![block], vec![])?)
    }

    fn harvest(&mut self) -> Result<Harvested> {
        let guest = self.call(|guest| !guest.relinquished)?;
        Ok(Harvested {
            generation: Generation(1),
            dirty_pages: guest.dirty.len() as u64,
        })
    }

    fn lease(&mut self, max_pages: u64) -> Result<Option<PageLease>> {
        let mut guest = self.call(|guest| !guest.relinquished)?;
        let most = usize::try_from(max_pages).unwrap_or(usize::MAX);
        let pages: BTreeSet<u64> = guest.dirty.iter().copied().take(most).collect();
        if pages.is_empty() {
            return Ok(None);
        }
        guest.dirty.retain(|page| !pages.contains(page));
        let parts = pages
            .iter()
            .map(|page| LeasedPart::new(Extent::new(BLOCK, *page, 1), Arc::clone(&self.memory)))
            .collect();
        let id = guest.next_lease;
        guest.next_lease += 1;
        guest.leases.insert(id, pages);
        Ok(Some(PageLease {
            id: LeaseId(id),
            generation: Generation(1),
            parts,
        }))
    }

    fn ack(&mut self, lease: LeaseId) -> Result<()> {
        self.end_lease(lease).map(drop)
    }

    fn release(&mut self, lease: LeaseId) -> Result<()> {
        let (mut guest, pages) = self.end_lease(lease)?;
        guest.dirty.extend(pages);
        Ok(())
    }

    fn throttles(&mut self) -> Result<Throttles> {
        let _guest = self.call(|guest| !guest.relinquished)?;
        Ok(Throttles::Writers)
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<()> {
        self.call(|guest| guest.running)?.throttled = throttle != Throttle::Off;
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        let mut guest = self.call(|guest| guest.running)?;
        guest.running = false;
        guest.throttled = false;
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>> {
        let _guest = self.call(|guest| !guest.running && !guest.relinquished)?;
        Ok(b"state".to_vec())
    }

    fn hand_over(&mut self, block: BlockId) -> Result<(OwnedFd, u64)> {
        let guest = self.call(|guest| !guest.running && !guest.relinquished)?;
        drop(guest);
        self.share(block).map_err(Error::source)
    }

    fn relinquish(&mut self) -> Result<()> {
        self.call(|guest| !guest.running && !guest.relinquished)?
            .relinquished = true;
        Ok(())
    }

    fn complete(&mut self) -> Result<()> {
        self.call(|guest| guest.relinquished && !guest.complete)?
            .complete = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        let mut guest = self.call(|guest| !guest.complete)?;
        guest.running = true;
        guest.throttled = false;
        guest.relinquished = false;
        Ok(())
    }

    fn transactions(&mut self) -> Result<u64> {
        let _guest = self.call(|_| true)?;
        Ok(3)
    }
}

impl SessionSource for Toy {
    fn share(&self, block: BlockId) -> gleaner::Result<(OwnedFd, u64)> {
        let _guest = self.call(|guest| !guest.relinquished)?;
        if block != BLOCK {
            return Err(gleaner_bitmap::Error::UnknownBlock { block }.into());
        }
        let file = std::fs::File::open("/dev/null").expect("/dev/null");
        Ok((file.into(), 0))
    }
}

/// What an agent was told, as far as guests are concerned.
#[derive(Debug, Default)]
struct Told {
    welcomed: bool,
    /// The guest may run elsewhere.
    away: bool,
    /// It does.
    complete: bool,
}

/// Whatever an agent says: never two guests, a guest that stands still for nobody runs, at full speed, nothing reaches the guest before
/// hello, and every answer reads back.
///
/// # Panics
/// When something else holds.
pub fn run(input: &[u8]) {
    answers(input);
}

/// [`run`], and the answers that were no errors.
///
/// # Panics
/// As [`run`].
pub fn answers(input: &[u8]) -> Vec<Response> {
    let input = &input[..input.len().min(MAX_INPUT)];
    if let Ok(response) = capped(RESPONSE_CAP, || Response::decode(input)) {
        reads_back(&response);
    }
    let guest = Arc::new(Mutex::new(Guest {
        running: true,
        ..Guest::default()
    }));
    let memory: Memory = Arc::new(MappedMemory::anonymous(PAGES).expect("memory"));
    let mut session = Session::new(|| Toy::begin(&guest, &memory));
    let mut told = Told::default();
    let mut answers = Vec::new();
    let mut bytes = Bytes(input);
    while let Some(step) = bytes.byte() {
        if step == FAIL {
            lock(&guest).fail = true;
            continue;
        }
        let request = (step != HANG_UP).then(|| bytes.take(step.into()));
        let decoded = request.map(|bytes| capped(REQUEST_CAP, || Request::decode(bytes)));
        let Some(Ok(request)) = decoded else {
            // What can't be read ends the connection.
            session.hang_up();
            told.welcomed = false;
            let guest = lock(&guest);
            assert!(told.away || guest.running && !guest.attempt && guest.leases.is_empty());
            assert!(!guest.throttled, "slowed for nobody");
            continue;
        };
        let calls = lock(&guest).calls;
        let reply = capped(SESSION_CAP, || session.handle(request.clone()));
        reads_back(&reply.response);
        told.hear(&request, &reply, lock(&guest).calls - calls);
        let guest = lock(&guest);
        assert!(!(guest.running && told.away), "two guests");
        assert_eq!(session.is_stopped(), !guest.running && !told.away);
        drop(guest);
        if !matches!(reply.response, Response::Error(_)) {
            answers.push(reply.response);
        }
    }
    answers
}

impl Told {
    fn hear(&mut self, request: &Request, reply: &Reply, calls: u64) {
        let refused = matches!(reply.response, Response::Error(_));
        assert_eq!(
            reply.fd.is_some(),
            matches!(reply.response, Response::Block { .. })
        );
        let hello = matches!(request, Request::Hello { .. });
        assert!(refused || hello != self.welcomed, "{request:?}");
        assert!(hello || self.welcomed || calls == 0, "{request:?}");
        assert!(!self.complete || refused || *request == Request::Transactions);
        if refused {
            return;
        }
        match request {
            Request::Hello { .. } => self.welcomed = true,
            Request::Relinquish => self.away = true,
            Request::Complete => self.complete = true,
            Request::Resume => {
                self.away = false;
                self.welcomed = false;
            }
            _ => {}
        }
    }
}

fn reads_back(response: &Response) {
    let bytes = response.encode().expect("below the limit");
    assert_eq!(Response::decode(&bytes).ok().as_ref(), Some(response));
}
