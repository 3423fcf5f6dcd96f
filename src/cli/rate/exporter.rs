//! `--serve`: the metrics over HTTP, for Prometheus to come and get.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::rate::Findings;

/// Connections at once; more are hung up on.
const MOST: usize = 16;
/// A request is no longer than that, in bytes.
const LONGEST: usize = 8 << 10;
/// How long one connection may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks for a connection.
const TICK: Duration = Duration::from_millis(20);
/// Between two pages.
const PERIOD: Duration = Duration::from_secs(1);

/// Where to serve. Only a host that is named can be another one than this.
#[derive(Clone, Debug)]
pub struct ServeAddress(String);

impl FromStr for ServeAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("\"{text}\" is no address: write HOST:PORT, or PORT");
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        if port.parse::<u16>().is_err() || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let host = if host.is_empty() { "127.0.0.1" } else { host };
        Ok(Self(format!("{host}:{port}")))
    }
}

/// Serves one page until it is dropped.
pub struct Exporter {
    address: SocketAddr,
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
    published: Mutex<Option<Duration>>,
}

#[derive(Default)]
struct Desk {
    page: Mutex<String>,
    ended: AtomicBool,
    connections: AtomicUsize,
}

impl Desk {
    fn page(&self) -> std::sync::MutexGuard<'_, String> {
        self.page.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Exporter {
    /// Listens.
    pub fn bind(at: &ServeAddress) -> Result<Self, String> {
        let fail = |error: io::Error| format!("can't serve at {}: {error}", at.0);
        let listener = TcpListener::bind(at.0.as_str()).map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        let address = listener.local_addr().map_err(fail)?;
        let desk = Arc::new(Desk::default());
        let serving = Arc::clone(&desk);
        let thread = std::thread::Builder::new()
            .name("exporter".into())
            .spawn(move || accept(&listener, &serving))
            .map_err(fail)?;
        Ok(Self {
            address,
            desk,
            thread: Some(thread),
            published: Mutex::new(None),
        })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether there is to be a new page.
    pub fn is_due(&self, measured: &dyn Findings) -> bool {
        let mut published = self
            .published
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let now = measured.duration();
        let due = published.is_none_or(|then| now.saturating_sub(then) >= PERIOD);
        if due {
            *published = Some(now);
        }
        due
    }

    /// Serves this page from now on.
    pub fn publish(&self, page: String) {
        *self.desk.page() = page;
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.desk.ended.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, desk: &Arc<Desk>) {
    while !desk.ended.load(Ordering::SeqCst) {
        let Ok((stream, _)) = listener.accept() else {
            std::thread::sleep(TICK);
            continue;
        };
        if desk.connections.fetch_add(1, Ordering::SeqCst) >= MOST {
            desk.connections.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let desk = Arc::clone(desk);
        // Nobody waits for it: it ends by itself, or with the process.
        let served = Arc::clone(&desk);
        let serving = std::thread::Builder::new().spawn(move || {
            // Whoever asked may be gone.
            let _ = serve(stream, &served);
            served.connections.fetch_sub(1, Ordering::SeqCst);
        });
        if serving.is_err() {
            desk.connections.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn serve(mut stream: TcpStream, desk: &Desk) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let Some(request) = request(&mut stream)? else {
        return Ok(());
    };
    let (status, kind, body) = answer(&request, || desk.page().clone());
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    if !request.starts_with("HEAD ") {
        stream.write_all(body.as_bytes())?;
    }
    Ok(())
}

/// The first line of a request whose head has come as a whole; `None` if it does not, or not in time.
fn request(stream: &mut TcpStream) -> io::Result<Option<String>> {
    let end = Instant::now() + PATIENCE;
    let (mut head, mut bytes) = (Vec::new(), [0; 1024]);
    while !head.windows(4).any(|four| four == b"\r\n\r\n") {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || head.len() > LONGEST {
            return Ok(None);
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes)? {
            0 => return Ok(None),
            got => head.extend_from_slice(&bytes[..got]),
        }
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    Ok(Some(String::from_utf8_lossy(line).into_owned()))
}

fn answer(request: &str, page: impl Fn() -> String) -> (&'static str, &'static str, String) {
    const PLAIN: &str = "text/plain; charset=utf-8";
    let mut words = request.split(' ');
    let (method, target) = (words.next(), words.next().unwrap_or_default());
    let path = target.split('?').next();
    match (method, path) {
        (Some("GET" | "HEAD"), Some("/metrics")) => {
            ("200 OK", "text/plain; version=0.0.4; charset=utf-8", page())
        }
        (Some("GET" | "HEAD"), _) => ("404 Not Found", PLAIN, "metrics are at /metrics\n".into()),
        _ => (
            "405 Method Not Allowed",
            PLAIN,
            "GET and HEAD alone\n".into(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_one_of_this_host() {
        let parse = |text: &str| text.parse::<ServeAddress>().map(|address| address.0);
        assert_eq!(parse("9187"), Ok("127.0.0.1:9187".into()));
        assert_eq!(parse(":9187"), Ok("127.0.0.1:9187".into()));
        assert_eq!(parse("0.0.0.0:9187"), Ok("0.0.0.0:9187".into()));
        assert_eq!(parse("[::1]:0"), Ok("[::1]:0".into()));
        for bad in ["", "host", "host:", "host:70000", "host:+1", "host:-1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_the_metrics_are_served() {
        let status = |request: &str| answer(request, || "page".into()).0;
        assert_eq!(answer("GET /metrics HTTP/1.1", || "page".into()).2, "page");
        assert_eq!(status("GET /metrics?x=1 HTTP/1.1"), "200 OK");
        assert_eq!(status("GET / HTTP/1.1"), "404 Not Found");
        for bad in ["POST /metrics HTTP/1.1", "", "\u{fffd}\u{fffd}"] {
            assert_eq!(status(bad), "405 Method Not Allowed");
        }
    }
}
