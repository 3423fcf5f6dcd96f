//! A migration on one host: the destination goes on with the source's own memory, of which nothing is sent.
//!
//! ```text
//! source: running   Layout --> <-- Adopted      what the destination can't take is refused now
//!         stopped   Layout (if it changed)
//!                   Memory + descriptor ...     block by block
//!                   State --> <-- READY         as ever from here on
//! ```

use std::os::fd::AsFd;

use crate::Result;
use crate::policy::Verdict;
use crate::rounds::HELD_PAUSE;
use crate::sender::Session;
use crate::wire::{MemoryBody, Message, Payload};

impl Session<'_> {
    /// Sends the layout while the guest runs, until it may be stopped: at once, unless the switchover is held
    /// back. The policy has seen no round, so all that it can say is that the time is over.
    pub(crate) fn await_switchover(&mut self) -> Result<()> {
        loop {
            self.follow_layout()?;
            // The destination hears that this end is alive.
            self.lanes.lead().round_trip()?;
            let decision = self.decide();
            self.obey(&decision)?;
            if decision.verdict == Verdict::SwitchOver || self.goal.held.is_none() {
                return Ok(());
            }
            let link = &mut self.lanes.lead().link;
            link.limits.check()?;
            link.pause(HELD_PAUSE)?;
        }
    }

    /// Sends the layout if it is another one. Nothing is harvested: what is dirty, the destination has as well.
    fn follow_layout(&mut self) -> Result<()> {
        self.supply.look_at_layout()?;
        self.send_layout()
    }

    /// Hands over the memory of every block of the last layout. The guest is stopped.
    pub(crate) fn hand_over(&mut self) -> Result<()> {
        self.follow_layout()?;
        let layout = self.supply.sent();
        for info in layout.iter().flat_map(|layout| layout.blocks()) {
            let (descriptor, offset) = self.supply.source.hand_over(info.id)?;
            let message = Message::Memory(MemoryBody {
                generation: self.supply.sent_generation(),
                block: info.id,
                offset,
            });
            let link = &mut self.lanes.lead().link;
            link.send(&message, &Payload::Descriptor(descriptor.as_fd()))?;
        }
        Ok(())
    }
}
