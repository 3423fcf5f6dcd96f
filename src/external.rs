//! Devices that write guest memory by themselves and keep a log of it.

use gleaner_bitmap::{Collected, Layout};

/// A dirty log outside of KVM: vhost, VFIO, a device process. Its log may be in guest-physical addresses, which mean other
/// pages after a transaction; so it is paused across each one, harvested under the old layout, and told of the new.
pub trait ExternalLog: Send {
    /// The device's name, for messages and for [`Tracker::detach`](crate::Tracker::detach).
    fn name(&self) -> String;

    /// The device finishes what it is writing, marks it, and writes no more.
    ///
    /// # Errors
    /// Why it can't. The transaction is refused then.
    fn pause(&mut self) -> Result<(), String>;

    /// Moves what the log has into `into`. Taking a bit must let the next write to its page set it again.
    ///
    /// # Errors
    /// Why it can't; bits that were not taken must still be in the log.
    fn harvest(&mut self, layout: &Layout, into: &mut Collected) -> gleaner_bitmap::Result<()>;

    /// Another layout is in force; the device is paused.
    ///
    /// # Errors
    /// Why the device can't follow. The transaction is taken back then, and this is called again with the old layout.
    fn layout_changed(&mut self, layout: &Layout) -> Result<(), String>;

    /// The device may write again.
    fn resume(&mut self);
}
