//! The socket around the session.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::Duration;

use gleaner_migrate::{Address, CancelToken, Listener, Stream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;

use super::connections::Connections;
use super::message::{METER, Request, Response, receive_request, send_response};
use super::meters::Meters;
use super::session::Session;
use super::watch::{GuestWatch, HooksMaker};
use crate::{Error, Hooks, LocalSource, Result, Tracker};

/// Between two looks whether an agent that has gone is cleaned up after.
const LOOK: Duration = Duration::from_millis(5);

/// A service's socket, before there is anything to serve. Agents that connect are told so at once; from
/// [`ServiceSocket::arriving`] on they wait. Dropping it removes it, and they hear that it is gone.
#[derive(Debug)]
pub struct ServiceSocket {
    path: PathBuf,
    arriving: CancelToken,
    /// Turns agents away, and gives the listener back.
    door: Option<JoinHandle<Listener>>,
}

impl ServiceSocket {
    /// Binds `path`, with mode 0600.
    ///
    /// # Errors
    /// [`Error::Migrate`] when the path is in use by another service or can't be bound; [`Error::Thread`].
    pub fn bind(path: &Path) -> Result<Self> {
        let listener = Listener::bind(&Address::Unix(path.to_path_buf()))?;
        let arriving = CancelToken::new();
        let until = arriving.clone();
        let door = thread("service-door", move || turn_away(listener, &until))?;
        Ok(Self {
            path: path.to_path_buf(),
            arriving,
            door: Some(door),
        })
    }

    /// To be used when the guest is about to come: agents are not turned away any more, because it may be served before
    /// they hear of that.
    #[must_use]
    pub fn arriving(&self) -> CancelToken {
        self.arriving.clone()
    }

    /// Serves `tracker`; `hooks` are asked for at the start of each attempt.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub fn serve(
        mut self,
        tracker: &Tracker,
        hooks: impl FnMut() -> Box<dyn Hooks> + Send + 'static,
    ) -> Result<Service> {
        match self.close() {
            Some(listener) => {
                Service::start(listener, std::mem::take(&mut self.path), tracker, hooks)
            }
            None => Err(Error::Thread {
                name: "service-door",
                source: io::Error::other("it panicked"),
            }),
        }
    }

    fn close(&mut self) -> Option<Listener> {
        self.arriving.cancel();
        self.door.take()?.join().ok()
    }
}

impl Drop for ServiceSocket {
    fn drop(&mut self) {
        self.close();
    }
}

/// Tells agents that there is no guest, until one is about to come.
fn turn_away(listener: Listener, arriving: &CancelToken) -> Listener {
    const TEXT: &str = "no guest is here yet: this destination still awaits one";
    loop {
        match listener.accept_until(arriving, None) {
            Ok(Some(Stream::Unix(mut stream))) => {
                // As long as an agent may take to say hello; what it says makes no difference.
                let told = stream
                    .set_write_timeout(Some(HELLO_PATIENCE))
                    .and_then(|()| send_response(&mut stream, &Response::Error(TEXT.into()), None));
                if let Err(error) = told {
                    tracing::info!(%error, "agent");
                }
            }
            Ok(_) => {}
            Err(gleaner_migrate::Error::Cancelled) => return listener,
            Err(error) => {
                tracing::warn!(%error, "service socket");
                std::thread::sleep(RETRY);
            }
        }
    }
}

fn thread<T: Send + 'static>(
    name: &'static str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map_err(|source| Error::Thread { name, source })
}

/// A tracker's service on a Unix socket. Dropping it removes the socket and hangs up on the agent and on meters.
#[derive(Debug)]
pub struct Service {
    path: PathBuf,
    tracker: Tracker,
    #[cfg(feature = "qmp")]
    hooks: HooksMaker,
    watch: GuestWatch,
    ended: CancelToken,
    connections: Arc<Connections>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// Serves `tracker` at `path`; `hooks` are asked for at the start of each attempt.
    ///
    /// # Errors
    /// Those of [`ServiceSocket::bind`].
    pub fn serve(
        tracker: &Tracker,
        path: &Path,
        hooks: impl FnMut() -> Box<dyn Hooks> + Send + 'static,
    ) -> Result<Self> {
        let listener = Listener::bind(&Address::Unix(path.to_path_buf()))?;
        Self::start(listener, path.to_path_buf(), tracker, hooks)
    }

    fn start(
        listener: Listener,
        path: PathBuf,
        tracker: &Tracker,
        hooks: impl FnMut() -> Box<dyn Hooks> + Send + 'static,
    ) -> Result<Self> {
        let watch = GuestWatch::default();
        let hooks = HooksMaker::new(hooks, &watch);
        let ended = CancelToken::new();
        let connections = Arc::new(Connections::default());
        let meters = Meters::new(tracker);
        let (source, made) = (tracker.clone(), hooks.clone());
        let session = Session::new(move || Ok(LocalSource::unlogged(&source, made.make())));
        let (stop, open) = (ended.clone(), Arc::clone(&connections));
        let thread = thread("service", move || {
            accept(&listener, session, &meters, &stop, &open);
        })?;
        Ok(Self {
            path,
            tracker: tracker.clone(),
            #[cfg(feature = "qmp")]
            hooks,
            watch,
            ended,
            connections,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tracker that is served.
    #[must_use]
    pub const fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// Where the guest is, as far as agents and QMP stop it or let it go on.
    #[must_use]
    pub const fn watch(&self) -> &GuestWatch {
        &self.watch
    }

    #[cfg(feature = "qmp")]
    pub(crate) const fn hooks(&self) -> &HooksMaker {
        &self.hooks
    }
}

/// How long an agent may be silent while the guest is stopped for it: longer than any destination may be silent.
const STOPPED_PATIENCE: Duration = Duration::from_secs(120);
/// How long an agent may take to say hello.
const HELLO_PATIENCE: Duration = Duration::from_secs(10);
/// Between two tries to accept a connection.
const RETRY: Duration = Duration::from_millis(50);

/// Serves one agent after the other, and any meter meanwhile. Each has a thread of its own; so has another agent, to be told
/// that one is attached.
fn accept<F>(
    listener: &Listener,
    session: Session<LocalSource, F>,
    meters: &Meters,
    ended: &CancelToken,
    connections: &Connections,
) where
    F: FnMut() -> Result<LocalSource> + Send,
{
    let session = Mutex::new(session);
    let current = Mutex::new(None);
    let agents = Agents {
        session: &session,
        current: &current,
        ended,
    };
    std::thread::scope(|scope| {
        while !ended.is_cancelled() {
            let stream = match listener.accept_until(ended, None) {
                Ok(Some(Stream::Unix(stream))) => stream,
                Ok(_) | Err(gleaner_migrate::Error::Cancelled) => continue,
                Err(error) => {
                    // Too many open files, say: an attempt that is in doubt must still be resolvable afterwards.
                    tracing::warn!(%error, "service socket");
                    std::thread::sleep(RETRY);
                    continue;
                }
            };
            let serve = move || {
                if let Err(error) = connection(stream, agents, meters, connections) {
                    tracing::info!(%error, "agent or meter");
                }
            };
            // An agent comes again; a guest that its service has killed does not.
            if let Err(error) = std::thread::Builder::new().spawn_scoped(scope, serve) {
                tracing::warn!(%error, "no thread for an agent");
            }
        }
    });
}

/// Why somebody who has connected is not served, unless he is the user who runs this, or root.
pub(crate) fn stranger(stream: &UnixStream) -> io::Result<Option<String>> {
    let peer = socket_peercred(stream)?;
    let me = rustix::process::geteuid();
    let known = peer.uid == me || peer.uid.is_root();
    Ok((!known).then(|| {
        format!(
            "user {} may not use the service of user {}",
            peer.uid.as_raw(),
            me.as_raw()
        )
    }))
}

/// What agents are served with. Their connections are served one after the other.
struct Agents<'a, F> {
    session: &'a Mutex<Session<LocalSource, F>>,
    /// The connection of the one that is attached.
    current: &'a Mutex<Option<UnixStream>>,
    ended: &'a CancelToken,
}

impl<F> Clone for Agents<'_, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for Agents<'_, F> {}

fn connection<F>(
    mut stream: UnixStream,
    agents: Agents<'_, F>,
    meters: &Meters,
    connections: &Connections,
) -> io::Result<()>
where
    F: FnMut() -> Result<LocalSource>,
{
    let Some(_open) = connections.enter(&stream)? else {
        return Ok(());
    };
    if let Some(refusal) = stranger(&stream)? {
        return send_response(&mut stream, &Response::Error(refusal), None);
    }
    stream.set_read_timeout(Some(HELLO_PATIENCE))?;
    match receive(&mut stream)? {
        None => Ok(()),
        Some(Request::Hello {
            version,
            migration: METER,
        }) => meters.serve(&mut stream, version),
        Some(first) => agents.serve(stream, first),
    }
}

impl<F: FnMut() -> Result<LocalSource>> Agents<'_, F> {
    /// Serves an agent whose first request has come, until it hangs up.
    fn serve(self, mut stream: UnixStream, first: Request) -> io::Result<()> {
        let Some(mut session) = take(self.session, self.ended, self.current) else {
            let text = "another agent is attached: wait until it has finished, or end it".into();
            return send_response(&mut stream, &Response::Error(text), None);
        };
        *lock(self.current) = Some(stream.try_clone()?);
        let attached = Attached {
            session: &mut session,
            current: self.current,
        };
        // Whoever is attached keeps others out, so it has to begin.
        stream.set_read_timeout(Some(HELLO_PATIENCE))?;
        let mut next = Some(first);
        while let Some(request) = next {
            tracing::debug!(?request, "agent");
            let reply = attached.session.handle(request);
            // A guest that stands still waits for nobody who hangs; one that runs has time.
            let patience = attached.session.is_stopped().then_some(STOPPED_PATIENCE);
            stream.set_read_timeout(patience)?;
            stream.set_write_timeout(patience)?;
            send_response(&mut stream, &reply.response, reply.fd.as_ref())?;
            next = receive(&mut stream)?;
        }
        Ok(())
    }
}

/// The next request. Whoever asks what is none is told so.
pub(super) fn receive(stream: &mut UnixStream) -> io::Result<Option<Request>> {
    let request = receive_request(stream);
    if let Err(error) = &request
        && error.kind() == io::ErrorKind::InvalidData
    {
        send_response(stream, &Response::Error(error.to_string()), None)?;
    }
    request
}

/// An agent that is attached. However its connection ends, by a panic of a hook too, the session hears that it is gone.
struct Attached<'a, F: FnMut() -> Result<LocalSource>> {
    session: &'a mut Session<LocalSource, F>,
    current: &'a Mutex<Option<UnixStream>>,
}

impl<F: FnMut() -> Result<LocalSource>> Drop for Attached<'_, F> {
    fn drop(&mut self) {
        self.session.hang_up();
        if let Some(stream) = lock(self.current).take() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// The session, unless another agent has it. One that has hung up is waited for: it is being cleaned up after.
fn take<'s, S>(
    session: &'s Mutex<S>,
    ended: &CancelToken,
    current: &Mutex<Option<UnixStream>>,
) -> Option<MutexGuard<'s, S>> {
    loop {
        match session.try_lock() {
            Ok(session) => return Some(session),
            // The attempt that panicked is over as if its agent had gone.
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {}
        }
        // None: one that is about to come, or about to be done.
        if ended.is_cancelled() || lock(current).as_ref().is_some_and(is_there) {
            return None;
        }
        std::thread::sleep(LOOK);
    }
}

/// Whether an agent has not hung up.
fn is_there(agent: &UnixStream) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(agent, PollFlags::empty())];
    poll(&mut fds, Some(&now)).is_err() || !fds[0].revents().contains(PollFlags::HUP)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Service {
    fn drop(&mut self) {
        self.ended.cancel();
        self.connections.end();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}
