//! With TLS a migration is the same, nobody reads it on the way, and nobody takes part in it who can't prove who he is.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

#[path = "common/certificates.rs"]
mod certificates;
mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use certificates::{Authority, expired};
use common::*;
use gleaner_migrate::*;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::util::SubscriberInitExt;

/// After this time a test does not wait any longer.
const LIMIT: Duration = Duration::from_secs(20);

fn bind(address: &Address, dir: &Path) -> Listener {
    let listener = Listener::bind(address).unwrap();
    listener.tls(TlsServer::load(dir).unwrap()).unwrap()
}

fn connector(address: Address, dir: &Path) -> Connector {
    let connector = Connector::new(address);
    connector.tls(TlsClient::load(dir).unwrap()).unwrap()
}

fn any_port() -> Address {
    "tcp:127.0.0.1:0".parse().unwrap()
}

/// Where a listener listens that was bound to `address`.
fn bound(address: &Address, listener: &Listener) -> Address {
    match listener.local_addr() {
        Some(tcp) => format!("tcp:{tcp}").parse().unwrap(),
        None => address.clone(),
    }
}

fn ask(to: &Connector) -> Result<Outcome> {
    query(to, MigrationId::random().unwrap(), LIMIT)
}

fn until(mut good: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !good() {
        assert!(Instant::now() < end, "waited too long");
        thread::sleep(Duration::from_millis(1));
    }
}

/// What a user sees in the log.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn lines(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A destination that answers questions until it is dropped.
struct Answering {
    cancel: CancelToken,
    log: Log,
}

impl Answering {
    fn at(listener: Listener) -> Self {
        let (cancel, log) = (CancelToken::new(), Log::default());
        let (until, to) = (cancel.clone(), log.clone());
        thread::spawn(move || {
            let _logging = tracing_subscriber::fmt()
                .with_max_level(LevelFilter::WARN)
                .with_ansi(false)
                .with_writer(move || to.clone())
                .set_default();
            while let Ok(stream) = listener.accept_until(&until, None) {
                let _ = serve_query(stream.unwrap(), &Outcomes::default(), LIMIT);
            }
        });
        Self { cancel, log }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

#[test]
fn a_guest_arrives_as_it_was_over_one_connection_or_several() {
    let place = tempfile::tempdir().unwrap();
    let dir = Authority::new("one").directory(place.path().join("tls"));
    for address in [Address::Unix(place.path().join("s")), any_port()] {
        for channels in [1, 3] {
            let listener = bind(&address, &dir);
            let to = connector(bound(&address, &listener), &dir);
            let (source, place) = (ToySource::new(5000), ToyDestination::default());
            let mut there = place.clone();
            let receiving = thread::spawn(move || {
                Receiver::new(&mut there, receiver_options()).listen(&listener)
            });
            assert_eq!(ask(&to).unwrap(), Outcome::Unknown);
            let mut options = options();
            options.channels = channels;
            let report = Sender::new(&mut source.clone(), options).run_to(&to);
            assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
            let received = receiving.join().unwrap().unwrap();
            assert_eq!(received.status, Status::Completed, "{:?}", received.reason);
            assert_same(&source, &place);
        }
    }
}

#[test]
fn a_file_has_no_other_end() {
    let place = tempfile::tempdir().unwrap();
    let dir = Authority::new("one").directory(place.path().join("tls"));
    let file = Address::File(place.path().join("guest"));
    let client = TlsClient::load(&dir).unwrap();
    let error = Connector::new(file.clone()).tls(client).unwrap_err();
    assert!(
        error.to_string().contains("which a file has not"),
        "{error}"
    );
    assert!(!place.path().join("guest").exists());
    let server = TlsServer::load(&dir).unwrap();
    std::fs::write(place.path().join("guest"), "a guest").unwrap();
    let error = Listener::bind(&file).unwrap().tls(server).unwrap_err();
    assert!(
        error.to_string().contains("which a file has not"),
        "{error}"
    );
}

/// What is wrong in one end's directory, and what source and destination say of it.
struct Wrong {
    change: fn(&Authority, &Path),
    at_source: bool,
    source_says: &'static str,
    destination_says: &'static str,
}

const NOT_TRUSTED: &str =
    "the other end refused: it does not trust the CA of this end's certificate";
const NOT_SIGNED: &str = "the other end's certificate was not signed by the CA in ca-cert.pem";
const EXPIRED: &str = "the other end's certificate has expired";
const IS_EXPIRED: &str = "the other end refused: this end's certificate has expired";

#[test]
fn a_certificate_that_is_not_good_is_told_at_both_ends_in_one_line() {
    let cases = [
        Wrong {
            change: |_, dir| Authority::new("two").client(dir, |_| ()),
            at_source: true,
            source_says: NOT_TRUSTED,
            destination_says: NOT_SIGNED,
        },
        // By its name, the right one.
        Wrong {
            change: |_, dir| Authority::new("one").client(dir, |_| ()),
            at_source: true,
            source_says: NOT_TRUSTED,
            destination_says: NOT_SIGNED,
        },
        Wrong {
            change: |_, dir| Authority::new("two").server(dir, &["127.0.0.1"], |_| ()),
            at_source: false,
            source_says: NOT_SIGNED,
            destination_says: NOT_TRUSTED,
        },
        Wrong {
            change: |_, dir| Authority::new("two").trusted(dir),
            at_source: true,
            source_says: NOT_SIGNED,
            destination_says: NOT_TRUSTED,
        },
        Wrong {
            change: |ca, dir| ca.client(dir, expired),
            at_source: true,
            source_says: IS_EXPIRED,
            destination_says: EXPIRED,
        },
        Wrong {
            change: |ca, dir| ca.server(dir, &["127.0.0.1"], expired),
            at_source: false,
            source_says: EXPIRED,
            destination_says: IS_EXPIRED,
        },
        Wrong {
            change: |ca, dir| ca.server(dir, &["elsewhere", "127.0.0.2"], |_| ()),
            at_source: false,
            source_says: "the other end's certificate is not made out to 127.0.0.1",
            destination_says: "the other end refused: this end's certificate is damaged, or not made out to the host",
        },
        Wrong {
            change: |_, dir| {
                for what in ["cert", "key"] {
                    let name = |role| dir.join(format!("{role}-{what}.pem"));
                    std::fs::copy(name("server"), name("client")).unwrap();
                }
            },
            at_source: true,
            source_says: "the other end refused: this end's certificate is for the other end",
            destination_says: "the other end's certificate is not for that end",
        },
    ];
    for (number, case) in cases.into_iter().enumerate() {
        let place = tempfile::tempdir().unwrap();
        let ca = Authority::new("one");
        let [good, bad] = ["good", "bad"].map(|name| ca.directory(place.path().join(name)));
        (case.change)(&ca, &bad);
        let (here, there) = if case.at_source {
            (&bad, &good)
        } else {
            (&good, &bad)
        };
        let listener = bind(&any_port(), there);
        let address = bound(&any_port(), &listener);
        let destination = Answering::at(listener);
        let error = ask(&connector(address.clone(), here))
            .unwrap_err()
            .to_string();
        assert!(error.contains(case.source_says), "{number}: {error}");
        assert!(!error.contains('\n'), "{number}: {error}");
        until(|| !destination.log.lines().is_empty());
        if case.at_source {
            // The destination goes on listening.
            ask(&connector(address, &good)).unwrap();
        }
        let lines = destination.log.lines();
        assert_eq!(lines.len(), 1, "{number}: {lines:?}");
        let who = "no TLS connection from 127.0.0.1:";
        assert!(lines[0].contains(who), "{number}: {lines:?}");
        assert!(
            lines[0].contains(case.destination_says),
            "{number}: {lines:?}"
        );
    }
}

#[test]
fn a_client_without_a_certificate_is_turned_away() {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, ServerName};
    let place = tempfile::tempdir().unwrap();
    let dir = Authority::new("one").directory(place.path().join("tls"));
    let listener = bind(&any_port(), &dir);
    let to = listener.local_addr().unwrap();
    let destination = Answering::at(listener);
    let mut roots = rustls::RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(dir.join("ca-cert.pem")).unwrap();
    roots.add(ca).unwrap();
    let provider = rustls::crypto::ring::default_provider();
    let config = rustls::ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut tls = rustls::ClientConnection::new(config.into(), name).unwrap();
    let mut socket = TcpStream::connect(to).unwrap();
    let mut stream = rustls::Stream::new(&mut tls, &mut socket);
    let error = stream.read(&mut [0; 8]).unwrap_err().to_string();
    assert!(error.contains("CertificateRequired"), "{error}");
    until(|| !destination.log.lines().is_empty());
    let lines = destination.log.lines();
    assert!(
        lines[0].contains("the other end showed no certificate"),
        "{lines:?}"
    );
}

#[test]
fn a_source_without_tls_is_told_that_the_destination_has_it() {
    const TOLD: &str = "takes connections with TLS only";
    let place = tempfile::tempdir().unwrap();
    let dir = Authority::new("one").directory(place.path().join("tls"));
    let listener = bind(&any_port(), &dir);
    let to = Connector::new(bound(&any_port(), &listener));
    let destination = Answering::at(listener);
    let error = ask(&to).unwrap_err().to_string();
    assert!(error.contains(TOLD), "{error}");
    let source = ToySource::new(10);
    let report = Sender::new(&mut source.clone(), options()).run_to(&to);
    assert_eq!(report.status, Status::Failed);
    let reason = report.reason.unwrap();
    assert!(reason.contains(TOLD), "{reason}");
    assert!(source.guest().running);
    until(|| destination.log.lines().len() == 2);
    let lines = destination.log.lines();
    let said = |line: &String| line.contains("the other end speaks without TLS");
    assert!(lines.iter().all(said), "{lines:?}");
}

#[test]
fn memory_is_not_handed_over_through_tls() {
    let place = tempfile::tempdir().unwrap();
    let dir = Authority::new("one").directory(place.path().join("tls"));
    let address = Address::Unix(place.path().join("s"));
    let listener = bind(&address, &dir);
    let destination = Answering::at(listener);
    let options = SenderOptions {
        local: true,
        ..options()
    };
    let source = ToySource::new(10);
    let to = connector(address, &dir);
    let report = Sender::new(&mut source.clone(), options).run_to(&to);
    let reason = report.reason.unwrap();
    assert!(reason.contains("without TLS"), "{reason}");
    assert!(source.guest().running && !source.guest().calls.contains(&"stop"));
    drop(destination);
}

#[test]
fn a_source_with_tls_is_told_that_the_destination_has_none() {
    let place = tempfile::tempdir().unwrap();
    let dir = Authority::new("one").directory(place.path().join("tls"));
    let listener = Listener::bind(&any_port()).unwrap();
    let to = connector(bound(&any_port(), &listener), &dir);
    let receiving = thread::spawn(move || {
        let mut place = ToyDestination::default();
        Receiver::new(&mut place, receiver_options()).run(listener.accept().unwrap())
    });
    let error = to.connect().unwrap_err().to_string();
    assert!(
        error.contains("the other end speaks without TLS"),
        "{error}"
    );
    let reason = receiving.join().unwrap().reason.unwrap();
    assert!(
        reason.contains("that is TLS, use it at both ends or at neither"),
        "{reason}"
    );
}

#[test]
fn whoever_says_nothing_keeps_nobody_else_waiting() {
    let place = tempfile::tempdir().unwrap();
    let dir = Authority::new("one").directory(place.path().join("tls"));
    let listener = bind(&any_port(), &dir);
    let to = listener.local_addr().unwrap();
    let good = connector(bound(&any_port(), &listener), &dir);
    // As many as there is room for, but one.
    let mut silent: Vec<_> = (1..32).map(|_| TcpStream::connect(to).unwrap()).collect();
    silent[0].write_all(&[22, 3, 1, 2]).unwrap();
    let destination = Answering::at(listener);
    ask(&good).unwrap();
    assert!(
        destination.log.lines().is_empty(),
        "none of them has had its time"
    );
    // A crowd. Room is made when the first ones have had their time.
    silent.extend((0..10).map(|_| TcpStream::connect(to).unwrap()));
    ask(&good).unwrap();
    assert_eq!(silent[1].read(&mut [0; 1]).unwrap(), 0);
    let lines = destination.log.lines();
    let said = |line: &String| line.contains("was silent for 5 s");
    assert!(!lines.is_empty() && lines.iter().all(said), "{lines:?}");
    // It is called off though others of them are still there.
    destination.cancel.cancel();
    until(|| TcpStream::connect(to).is_err());
}

#[test]
fn a_destination_that_says_nothing_is_no_reason_to_wait_for_ever() {
    let place = tempfile::tempdir().unwrap();
    let dir = Authority::new("one").directory(place.path().join("tls"));
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", silent.local_addr().unwrap());
    let error = connector(address.parse().unwrap(), &dir)
        .connect()
        .unwrap_err();
    let said = "was silent for 10 s in the handshake";
    assert!(error.to_string().contains(said), "{error}");
}

/// A migration over a line with a fault.
struct Cut {
    report: Report,
    source: ToySource,
    there: ToyDestination,
    /// Bytes that went through, each way.
    bytes: [u64; 2],
}

fn over(dir: &Path, faults: [Fault; 2]) -> Cut {
    let (near, far, threads) = line(faults);
    let [near_fd, far_fd] = [&near, &far].map(|end| match end {
        Stream::Unix(unix) => Address::Fd(unix.as_raw_fd()),
        _ => unreachable!("a line is of Unix sockets"),
    });
    let (source, there) = (ToySource::new(300), ToyDestination::default());
    let (listener, to) = (bind(&far_fd, dir), connector(near_fd, dir));
    let mut place = there.clone();
    // An error is a handshake that was cut.
    let receiving =
        thread::spawn(move || Receiver::new(&mut place, receiver_options()).listen(&listener));
    let report = Sender::new(&mut source.clone(), options()).run_to(&to);
    let _ = receiving.join().unwrap();
    drop((near, far));
    let bytes = threads.map(|thread| thread.join().unwrap());
    Cut {
        report,
        source,
        there,
        bytes,
    }
}

#[test]
fn a_cut_at_any_point_is_an_error_and_never_two_guests() {
    let place = tempfile::tempdir().unwrap();
    let dir = Authority::new("one").directory(place.path().join("tls"));
    let whole = over(&dir, [Fault::default(); 2]);
    assert_eq!(whole.report.status, Status::Completed, "{:?}", whole.report);
    assert_same(&whole.source, &whole.there);
    let mut handshakes = 0;
    for way in 0..2 {
        // What comes last can be done without: to say that it was heard, and goodbye.
        let most = whole.bytes[way] - [200, 60][way];
        let early = (0..200).step_by(40);
        let later = (200..most).step_by(usize::try_from(most / 40).unwrap());
        for cut in early.chain(later).chain([most]) {
            let mut faults = [Fault::default(); 2];
            faults[way].cut = Some(cut);
            let Cut {
                report,
                source,
                there,
                ..
            } = over(&dir, faults);
            let case = format!("way {way}, {cut} of {most}: {report:?}");
            let (here, there) = (source.guest().running, there.place().running);
            match report.status {
                Status::Failed => assert!(here && !there, "{case}"),
                Status::InDoubt => assert!(!here, "{case}"),
                _ => panic!("{case}"),
            }
            assert!(report.reason.is_some(), "{case}");
            handshakes += u32::from(matches!(report.error, Some(Error::Handshake { .. })));
        }
    }
    assert!(handshakes > 2);
}

/// Forwards one connection; what went over it, both ways together.
fn recorded(to: SocketAddr) -> (Address, JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let thread = thread::spawn(move || {
        let (near, far) = (
            listener.accept().unwrap().0,
            TcpStream::connect(to).unwrap(),
        );
        let carry = |from: &TcpStream, to: &TcpStream| {
            let [mut from, mut to] = [from, to].map(|end| end.try_clone().unwrap());
            thread::spawn(move || {
                let (mut all, mut bytes) = (Vec::new(), vec![0; 64 << 10]);
                while let Ok(count @ 1..) = from.read(&mut bytes) {
                    all.extend_from_slice(&bytes[..count]);
                    if to.write_all(&bytes[..count]).is_err() {
                        break;
                    }
                }
                let _ = to.shutdown(std::net::Shutdown::Write);
                all
            })
        };
        let both = [carry(&near, &far), carry(&far, &near)];
        both.map(|thread| thread.join().unwrap()).concat()
    });
    (address.parse().unwrap(), thread)
}

/// Of what a guest has: what can be seen on the way.
fn seen(tls: Option<&PathBuf>) -> [bool; 2] {
    let listener = Listener::bind(&any_port()).unwrap();
    let (address, wire) = recorded(listener.local_addr().unwrap());
    let (listener, to) = match tls {
        Some(dir) => (
            listener.tls(TlsServer::load(dir).unwrap()).unwrap(),
            connector(address, dir),
        ),
        None => (listener, Connector::new(address)),
    };
    let (source, place) = (ToySource::new(600), ToyDestination::default());
    let mut there = place.clone();
    let receiving =
        thread::spawn(move || Receiver::new(&mut there, receiver_options()).listen(&listener));
    let report = Sender::new(&mut source.clone(), options()).run_to(&to);
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    receiving.join().unwrap().unwrap();
    assert_same(&source, &place);
    let wire = wire.join().unwrap();
    assert!(wire.len() > 200 * 4096);
    let secrets: [&[u8]; 2] = [&[0x11; 8], b"state of the guest"];
    secrets.map(|secret| wire.windows(secret.len()).any(|bytes| bytes == secret))
}

#[test]
fn nothing_of_the_guest_can_be_read_on_the_way() {
    let place = tempfile::tempdir().unwrap();
    let dir = Authority::new("one").directory(place.path().join("tls"));
    assert_eq!(seen(None), [true; 2], "the test sees nothing");
    assert_eq!(seen(Some(&dir)), [false; 2]);
}
