//! The service: a tracker on a Unix socket, for a migration agent in another process.
//!
//! The socket is only for the user who runs the service (mode 0600, the peer's uid checked), and one agent at a time talks
//! to it. RAM is handed over as read-only file descriptors; page numbers only as leases, whose pages are armed again
//! already. The session is a machine without I/O ([`Session`]), the socket a shell around it. Beside the agent there may be
//! meters ([`MeterClient`]), each a consumer of its own, which hear which pages were written and get no memory.
//!
//! ```text
//!            hello                    stop                    relinquish
//!   Idle ------------> Migrating ------------> Stopped ------------------> Committing ----> Complete
//!    ^                     |        resume        |                           |   |  complete
//!    +---------------------+<---------------------+                           |   |
//!    |  the agent hangs up: leases fall back, the guest runs on               |   | the agent hangs up: in doubt,
//!    +------------------------------------------------------------------------+   | the guest stays stopped
//!              resume, by the agent or by one that asks again                     +--> hello again, with the same id
//! ```

mod client;
mod connections;
mod exchange;
mod message;
mod meter_client;
mod meters;
mod server;
mod session;
mod watch;

pub use client::{Attach, ServiceClient};
pub use exchange::{Exchange, SocketExchange};
pub use message::{LeaseMessage, METER, Request, Response, VERSION};
pub use meter_client::MeterClient;
#[cfg(feature = "qmp")]
pub(crate) use server::stranger;
pub use server::{Service, ServiceSocket};
pub use session::{Reply, Session, SessionSource};
#[cfg(feature = "qmp")]
pub(crate) use watch::HooksMaker;
pub use watch::{GuestState, GuestWatch};
