//! A guest without vCPUs: what is true of it, whatever agents believe.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

use gleaner::migrate::{
    Error, Harvested, LeaseId, LeasedPart, MappedMemory, PageLease, Source, Throttle, Throttles,
};
use gleaner::service::SessionSource;
use gleaner::{BlockId, BlockInfo, Extent, Generation, Layout, PAGE_SIZE, Slot, SlotKey};

/// Its only block.
pub const RAM: BlockId = BlockId(1);

/// The dirty pages of one attempt.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Dirty {
    /// Not harvested.
    pub log: BTreeSet<u64>,
    /// Harvested.
    pub store: BTreeSet<u64>,
    pub leases: BTreeMap<u64, BTreeSet<u64>>,
    next_lease: u64,
}

impl Dirty {
    pub fn holds(&self, page: u64) -> bool {
        let mut leases = self.leases.values();
        self.log.contains(&page)
            || self.store.contains(&page)
            || leases.any(|lease| lease.contains(&page))
    }

    /// The same, its leases numbered from 0 on.
    pub fn renumbered(&self) -> Self {
        Self {
            leases: (0..).zip(self.leases.values().cloned()).collect(),
            next_lease: 0,
            ..self.clone()
        }
    }
}

#[derive(Debug)]
pub struct Guest {
    /// A page's version grows with each write.
    pub versions: Vec<u64>,
    pub running: bool,
    pub throttle: Throttle,
    /// By the number of the source.
    pub attempts: BTreeMap<u64, Dirty>,
    begun: u64,
    /// Versions again, for whoever reads memory; made for the first one that does.
    memory: Option<File>,
}

impl Guest {
    pub fn new(pages: usize) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            versions: vec![1; pages],
            running: true,
            throttle: Throttle::Off,
            attempts: BTreeMap::new(),
            begun: 0,
            memory: None,
        }))
    }

    pub fn pages(&self) -> u64 {
        self.versions.len() as u64
    }

    /// A vCPU's write, or one of the VMM as it saves state.
    pub fn write(&mut self, page: u64) {
        let version = &mut self.versions[usize::try_from(page).unwrap()];
        *version += 1;
        if let Some(memory) = &self.memory {
            let at = page * PAGE_SIZE;
            memory.write_all_at(&version.to_le_bytes(), at).unwrap();
        }
        for dirty in self.attempts.values_mut() {
            dirty.log.insert(page);
        }
    }

    fn memory(&mut self) -> File {
        let Some(memory) = &self.memory else {
            let flags = rustix::fs::MemfdFlags::CLOEXEC;
            let memory = File::from(rustix::fs::memfd_create("guest", flags).unwrap());
            memory.set_len(self.pages() * PAGE_SIZE).unwrap();
            for (page, version) in (0..).zip(&self.versions) {
                let at = page * PAGE_SIZE;
                memory.write_all_at(&version.to_le_bytes(), at).unwrap();
            }
            self.memory = Some(memory.try_clone().unwrap());
            return memory;
        };
        memory.try_clone().unwrap()
    }
}

/// How far an attempt has let go of the guest.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hold {
    Held,
    Relinquished,
}

/// Does to the guest whatever it is told, in any order: that it is told nothing wrong is the session's business.
/// Dropped, it does as `LocalSource` does.
pub struct ToySource {
    guest: Arc<Mutex<Guest>>,
    number: u64,
    hold: Hold,
}

impl ToySource {
    /// Begins an attempt: everything is dirty.
    pub fn begin(guest: &Arc<Mutex<Guest>>) -> Self {
        let mut now = guest.lock().unwrap();
        now.begun += 1;
        let number = now.begun;
        let dirty = Dirty {
            log: (0..now.pages()).collect(),
            ..Dirty::default()
        };
        now.attempts.insert(number, dirty);
        Self {
            guest: Arc::clone(guest),
            number,
            hold: Hold::Held,
        }
    }

    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap()
    }

    fn dirty<T>(&self, work: impl FnOnce(&mut Dirty) -> T) -> Result<T, Error> {
        let mut guest = self.guest();
        let dirty = guest.attempts.get_mut(&self.number);
        dirty
            .map(work)
            .ok_or_else(|| Error::source("the attempt has ended"))
    }
}

impl Drop for ToySource {
    fn drop(&mut self) {
        let mut guest = self.guest.lock().unwrap();
        guest.attempts.remove(&self.number);
        guest.throttle = Throttle::Off;
        if self.hold == Hold::Held {
            guest.running = true;
        }
    }
}

impl SessionSource for ToySource {
    fn share(&self, _: BlockId) -> gleaner::Result<(OwnedFd, u64)> {
        Ok((self.guest().memory().into(), 0))
    }
}

impl Source for ToySource {
    fn layout(&mut self) -> Result<Layout, Error> {
        let pages = self.guest().pages();
        let info = BlockInfo {
            id: RAM,
            name: "ram".into(),
            pages,
        };
        let slot = Slot {
            key: SlotKey::new(0),
            gpa: 0,
            block: RAM,
            range: info.all(),
            readonly: false,
        };
        Ok(Layout::from_parts(Generation(1), vec![info], vec![slot])?)
    }

    fn harvest(&mut self) -> Result<Harvested, Error> {
        self.dirty(|dirty| {
            dirty.store.append(&mut dirty.log);
            Harvested {
                generation: Generation(1),
                dirty_pages: dirty.store.len() as u64,
            }
        })
    }

    fn lease(&mut self, max_pages: u64) -> Result<Option<PageLease>, Error> {
        let Some((id, pages)) = self.dirty(|dirty| {
            let free = |page: &u64| !dirty.leases.values().any(|lease| lease.contains(page));
            let most = usize::try_from(max_pages).unwrap_or(usize::MAX);
            let pages: BTreeSet<u64> = dirty
                .store
                .iter()
                .copied()
                .filter(free)
                .take(most)
                .collect();
            if pages.is_empty() {
                return None;
            }
            dirty.store.retain(|page| !pages.contains(page));
            let id = dirty.next_lease;
            dirty.next_lease += 1;
            dirty.leases.insert(id, pages.clone());
            Some((id, pages))
        })?
        else {
            return Ok(None);
        };
        // Only the extents travel; whoever reads memory does so through the block's file.
        static NOTHING: LazyLock<Arc<MappedMemory>> =
            LazyLock::new(|| Arc::new(MappedMemory::anonymous(1).unwrap()));
        let part = |page| LeasedPart::new(Extent::new(RAM, page, 1), NOTHING.clone());
        Ok(Some(PageLease {
            id: LeaseId(id),
            generation: Generation(1),
            parts: pages.into_iter().map(part).collect(),
        }))
    }

    fn ack(&mut self, lease: LeaseId) -> Result<(), Error> {
        let known = self.dirty(|dirty| dirty.leases.remove(&lease.0).is_some())?;
        known
            .then_some(())
            .ok_or_else(|| Error::source("no such lease"))
    }

    fn release(&mut self, lease: LeaseId) -> Result<(), Error> {
        self.dirty(|dirty| {
            let mut pages = dirty.leases.remove(&lease.0)?;
            dirty.store.append(&mut pages);
            Some(())
        })?
        .ok_or_else(|| Error::source("no such lease"))
    }

    fn throttles(&mut self) -> Result<Throttles, Error> {
        Ok(Throttles::Writers)
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<(), Error> {
        self.guest().throttle = throttle;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Error> {
        let mut guest = self.guest();
        guest.running = false;
        guest.throttle = Throttle::Off;
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>, Error> {
        // Saving state dirties memory.
        self.guest().write(0);
        Ok(b"state".to_vec())
    }

    fn relinquish(&mut self) -> Result<(), Error> {
        self.hold = Hold::Relinquished;
        Ok(())
    }

    fn complete(&mut self) -> Result<(), Error> {
        self.guest().attempts.remove(&self.number);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.hold = Hold::Held;
        let mut guest = self.guest();
        guest.running = true;
        guest.throttle = Throttle::Off;
        Ok(())
    }

    fn transactions(&mut self) -> Result<u64, Error> {
        Ok(0)
    }
}
