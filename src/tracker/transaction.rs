//! Transactions: from one layout to the next, all or nothing, and no page lost on the way.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use gleaner_bitmap::mutant::{self, Mutant};
use gleaner_bitmap::{
    BlockId, Extent, Layout, LayoutEditor, PAGE_SIZE, PageRange, RemapPlan, Remapped, Scope, Slot,
    SlotKey,
};
use gleaner_ring::{Kvm, MemslotCall, Region};
use vm_memory::GuestAddress;

use super::{Blackout, Shared, State, TransactionReport, plan::plan};
use crate::gate::Closed;
use crate::{Block, Error, Result};

type Step = Box<dyn FnOnce(&mut LayoutEditor) -> gleaner_bitmap::Result<()> + Send>;

/// A change of the layout in the making. Steps are checked when it is committed, against the layout in force then; what
/// counts is where they lead, not how: KVM gets the fewest calls between the two layouts.
#[must_use = "nothing happens before it is committed"]
pub struct Transaction<'t> {
    shared: &'t Shared,
    steps: Vec<Step>,
    added: Vec<Block>,
}

impl std::fmt::Debug for Transaction<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transaction")
            .field("steps", &self.steps.len())
            .finish_non_exhaustive()
    }
}

impl<'t> Transaction<'t> {
    pub(super) const fn new(shared: &'t Shared) -> Self {
        Self {
            shared,
            steps: Vec::new(),
            added: Vec::new(),
        }
    }

    fn step(
        &mut self,
        step: impl FnOnce(&mut LayoutEditor) -> gleaner_bitmap::Result<()> + Send + 'static,
    ) -> &mut Self {
        self.steps.push(Box::new(step));
        self
    }

    /// Adds a RAM block. All its pages are born dirty for consumers that started all-dirty.
    pub fn add_block(&mut self, block: &Block) -> &mut Self {
        self.added.push(block.clone());
        let info = block.info().clone();
        self.step(|e| e.add_block(info))
    }

    /// Removes a RAM block; its dirty pages are retired. Its slots have to be deleted too.
    pub fn remove_block(&mut self, block: BlockId) -> &mut Self {
        self.step(move |e| e.remove_block(block))
    }

    /// Creates a slot that maps an extent at `gpa`.
    pub fn create(
        &mut self,
        key: impl Into<SlotKey>,
        gpa: GuestAddress,
        extent: Extent,
    ) -> &mut Self {
        let slot = Slot {
            key: key.into(),
            gpa: gpa.0,
            block: extent.block,
            range: extent.range,
            readonly: false,
        };
        self.step(move |e| e.create(slot))
    }

    /// Deletes a slot. Its block stays, and so do the block's dirty pages.
    pub fn delete(&mut self, key: impl Into<SlotKey>) -> &mut Self {
        let key = key.into();
        self.step(move |e| e.delete(key).map(|_| ()))
    }

    /// Moves a slot to another guest-physical address.
    pub fn move_to(&mut self, key: impl Into<SlotKey>, gpa: GuestAddress) -> &mut Self {
        let key = key.into();
        self.step(move |e| e.move_to(key, gpa.0))
    }

    /// Makes a slot read-only, or writable again.
    pub fn set_readonly(&mut self, key: impl Into<SlotKey>, readonly: bool) -> &mut Self {
        let key = key.into();
        self.step(move |e| e.set_readonly(key, readonly))
    }

    /// Gives a slot another length in pages.
    pub fn resize(&mut self, key: impl Into<SlotKey>, pages: u64) -> &mut Self {
        let key = key.into();
        self.step(move |e| e.resize(key, pages))
    }

    /// Cuts a slot in two at page `at` of it; the upper part becomes slot `upper`.
    pub fn split(
        &mut self,
        key: impl Into<SlotKey>,
        at: u64,
        upper: impl Into<SlotKey>,
    ) -> &mut Self {
        let (key, upper) = (key.into(), upper.into());
        self.step(move |e| e.split(key, at, upper))
    }

    /// Cuts a hole into a slot, in pages of the slot; what is above becomes slot `upper`.
    pub fn punch(
        &mut self,
        key: impl Into<SlotKey>,
        hole: PageRange,
        upper: impl Into<SlotKey>,
    ) -> &mut Self {
        let (key, upper) = (key.into(), upper.into());
        self.step(move |e| e.punch(key, hole, upper))
    }

    /// Joins two slots that continue each other; the lower id stays.
    pub fn merge(&mut self, lower: impl Into<SlotKey>, upper: impl Into<SlotKey>) -> &mut Self {
        let (lower, upper) = (lower.into(), upper.into());
        self.step(move |e| e.merge(lower, upper))
    }

    /// Makes these the slots, whatever they were.
    pub fn transact_to(&mut self, slots: Vec<Slot>) -> &mut Self {
        self.step(move |e| {
            e.clear_slots();
            slots.into_iter().try_for_each(|s| e.create(s))
        })
    }

    /// Commits: see [`Transaction::commit_with`].
    ///
    /// # Errors
    /// As [`Transaction::commit_with`].
    pub fn commit(self) -> Result<TransactionReport> {
        self.commit_with(|_| ())
    }

    /// Commits. `publish` gets the new layout while every vCPU is out of `KVM_RUN`: the moment to swap the VMM's own memory
    /// map. The VM-wide lock is held meanwhile: it must not call the tracker, nor drop a consumer.
    ///
    /// # Errors
    /// [`Error::Stopped`] while the guest is stopped for a switchover; [`Error::BlockReused`]; [`Error::Bitmap`] when the steps
    /// don't lead to a valid layout, or a source fails; [`Error::TransactionFailed`] when KVM refuses a call: in all these
    /// cases the old layout is in force and no bit is gone. [`Error::RollbackFailed`]: the gate stays closed.
    /// [`Error::Broken`] after that.
    pub fn commit_with(self, publish: impl FnOnce(&Layout)) -> Result<TransactionReport> {
        let shared = self.shared;
        let mut state = shared.lock();
        if state.broken {
            return Err(Error::Broken);
        }
        if state.frozen {
            return Err(Error::Stopped);
        }
        if let Some(block) = self.added.iter().find(|b| state.retired.contains(&b.id())) {
            return Err(Error::BlockReused {
                block: block.info().name.clone(),
            });
        }
        // 1. Where to, and by which calls. Nothing is touched yet.
        let old = Arc::clone(&state.layout);
        let mut editor = old.edit();
        for step in self.steps {
            step(&mut editor)?;
        }
        let new = Arc::new(editor.finish()?);
        if !shared.capabilities.readonly
            && let Some(slot) = old
                .slot_changes(&new)
                .find_map(|(_, is)| is.filter(|s| s.readonly))
        {
            return Err(Error::NoReadonly { slot: slot.key });
        }
        let mut changed_blocks: Vec<BlockId> = self.added.iter().map(Block::id).collect();
        let gone = old.block_changes(&new).filter_map(|(was, _)| was);
        changed_blocks.extend(gone.map(|block| block.id));
        for block in self.added {
            state.blocks.insert(block.id(), block);
        }
        let outcome = shared.change(&mut state, &old, &new, publish);
        // Blocks that the layout in force does not have are let go, whichever layout that is.
        let layout = Arc::clone(&state.layout);
        for block in changed_blocks {
            if layout.block(block).is_none() {
                state.blocks.remove(&block);
            }
        }
        outcome
    }
}

/// A slot as KVM is told of it.
pub(super) fn region(state: &State, slot: &Slot, logging: bool) -> Option<Region> {
    let host = state.blocks.get(&slot.block)?.host();
    Some(Region {
        key: slot.key,
        gpa: slot.gpa,
        host: host.part(slot.range.first * PAGE_SIZE, slot.range.pages * PAGE_SIZE)?,
        log: logging && !slot.readonly,
        readonly: slot.readonly,
    })
}

/// Makes calls in order; when one fails, takes those before it back in reverse.
fn apply(kvm: &dyn Kvm, calls: &[MemslotCall]) -> Result<()> {
    for (at, call) in calls.iter().enumerate() {
        let Err(cause) = call.apply(kvm) else {
            continue;
        };
        for done in calls[..at].iter().rev() {
            if let Err(rollback) = done.inverse().apply(kvm) {
                return Err(Error::RollbackFailed {
                    slot: done.key(),
                    cause,
                    rollback,
                });
            }
        }
        return Err(Error::TransactionFailed {
            at: at + 1,
            of: calls.len(),
            cause,
        });
    }
    Ok(())
}

impl Shared {
    fn change(
        &self,
        state: &mut State,
        old: &Arc<Layout>,
        new: &Arc<Layout>,
        publish: impl FnOnce(&Layout),
    ) -> Result<TransactionReport> {
        let calls = plan(old, new, |slot| {
            region(state, slot, state.logging).unwrap_or_else(|| {
                unreachable!("layouts hold only blocks that the state holds, and slots only pages of their block")
            })
        });
        let mut going: Vec<SlotKey> = calls
            .iter()
            .filter(|c| c.ends_log())
            .map(MemslotCall::key)
            .collect();
        going.sort_unstable();
        let remap = (self.store.consumers() > 0).then(|| RemapPlan::between(old, new));
        let mut report = TransactionReport {
            generation: new.generation(),
            calls: calls.len(),
            list_swaps: calls.iter().map(MemslotCall::list_swaps).sum(),
            ..TransactionReport::default()
        };
        let left_out = mutant::is_planted(Mutant::HarvestLeftOut);
        if state.logging && !going.is_empty() && !left_out {
            report.harvested += self.harvest_ahead(state, Scope::Slots(&going))?.pages;
        }
        // 2. to 5.: the guest stands still.
        let start = Instant::now();
        let closed = if mutant::is_planted(Mutant::GateOpen) {
            self.gate.pretend_closed()
        } else {
            self.gate.close()?
        };
        report.blackout.kick = start.elapsed();
        match self.change_closed(state, new, &calls, &going, &closed, &mut report.blackout) {
            Ok(harvested) => report.harvested += harvested,
            Err(error @ Error::RollbackFailed { .. }) => {
                closed.keep();
                self.last_harvest(state, &calls, &closed);
                return Err(error);
            }
            Err(error) => return Err(error),
        }
        let added = old
            .block_changes(new)
            .filter_map(|(was, is)| was.is_none().then_some(is?));
        for block in added {
            // What the VMM wrote into it before is part of what is born dirty.
            if let Some(added) = state.blocks.get(&block.id) {
                added.write_log().forget();
            }
            state.harvester.add_block(block.id, block.pages);
            self.store.add_block(block.id, block.pages);
        }
        state.layout = Arc::clone(new);
        publish(new);
        let opened = closed.open();
        let blackout = &mut report.blackout;
        blackout.rest = opened
            .duration_since(start)
            .saturating_sub(blackout.kick + blackout.harvest + blackout.calls);
        self.blackouts().add(blackout);
        // 6. The guest runs again: where its dirty pages are now.
        if let Some(remap) = remap {
            let Remapped {
                slots,
                carried,
                unmapped,
                retired,
            } = self.remap(&remap);
            report = TransactionReport {
                slots,
                carried,
                unmapped,
                retired,
                ..report
            };
        }
        let removed = old
            .block_changes(new)
            .filter_map(|(was, is)| is.is_none().then_some(was?));
        for block in removed {
            state.retired.insert(block.id);
            self.store.remove_block(block.id);
            state.harvester.remove_block(block.id);
        }
        self.transactions.fetch_add(1, Ordering::Relaxed);
        Ok(report)
    }

    /// After a failed rollback: takes what KVM's logs have, for whoever reads the memory of a guest that never runs again.
    /// Slots that were to be deleted may be missing. They were harvested inside, and nobody has run since.
    fn last_harvest(&self, state: &mut State, calls: &[MemslotCall], closed: &Closed<'_>) {
        let deleted = |key: SlotKey| {
            calls
                .iter()
                .any(|c| matches!(c, MemslotCall::Delete(_)) && c.key() == key)
        };
        let layout = Arc::clone(&state.layout);
        let keys = layout.slots().map(|s| s.key);
        let standing: Vec<SlotKey> = keys.filter(|key| !deleted(*key)).collect();
        if let Err(error) = self.harvest_closed(state, Scope::Slots(&standing), closed) {
            tracing::error!(%error, "dirty pages that KVM still had are held back");
        }
        state.broken = true;
    }

    /// Harvests what would be lost or misread, and makes the calls. On an error everything is as it was, but for a failed
    /// rollback.
    fn change_closed(
        &self,
        state: &mut State,
        new: &Layout,
        calls: &[MemslotCall],
        going: &[SlotKey],
        closed: &Closed<'_>,
        blackout: &mut Blackout,
    ) -> Result<u64> {
        let mut paused = 0;
        let result = state
            .external
            .iter_mut()
            .try_for_each(|log| {
                paused += 1;
                log.pause().map_err(|reason| Error::ExternalLog {
                    device: log.name(),
                    reason,
                })
            })
            .and_then(|()| self.harvest_and_call(state, new, calls, going, closed, blackout));
        for log in state.external.iter_mut().take(paused) {
            log.resume();
        }
        result
    }

    fn harvest_and_call(
        &self,
        state: &mut State,
        new: &Layout,
        calls: &[MemslotCall],
        going: &[SlotKey],
        closed: &Closed<'_>,
        blackout: &mut Blackout,
    ) -> Result<u64> {
        let start = Instant::now();
        let harvested = if mutant::is_planted(Mutant::HarvestLeftOut) {
            0
        } else {
            self.harvest_closed(state, Scope::Slots(going), closed)?
                .pages
        };
        blackout.harvest = start.elapsed();
        if state.logging && mutant::is_planted(Mutant::LoggingToggled) {
            self.stop_logging(state);
            self.switch_on(state)?;
            state.logging = true;
        }
        let start = Instant::now();
        apply(&*self.kvm, calls)?;
        blackout.calls = start.elapsed();
        let told = state.external.iter_mut().try_for_each(|log| {
            log.layout_changed(new)
                .map_err(|reason| Error::ExternalLog {
                    device: log.name(),
                    reason,
                })
        });
        if let Err(error) = told {
            // Back to the old layout, in KVM and in the logs that were told already.
            for call in calls.iter().rev() {
                if let Err(rollback) = call.inverse().apply(&*self.kvm) {
                    let cause = gleaner_ring::Error::Refused {
                        reason: error.to_string(),
                    };
                    return Err(Error::RollbackFailed {
                        slot: call.key(),
                        cause,
                        rollback,
                    });
                }
            }
            let old = Arc::clone(&state.layout);
            for log in &mut state.external {
                if let Err(reason) = log.layout_changed(&old) {
                    tracing::error!(
                        device = log.name(),
                        reason,
                        "external log could not go back to the old layout"
                    );
                }
            }
            return Err(error);
        }
        Ok(harvested)
    }

    fn remap(&self, plan: &RemapPlan) -> Remapped {
        let dirty = self.store.snapshot(&plan.blocks());
        match &self.pool {
            Some(pool) => pool.install(|| plan.apply(&dirty)),
            None => plan.apply(&dirty),
        }
    }
}
