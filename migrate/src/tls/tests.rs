//! What a stream with TLS does as one without.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use gleaner_bitmap::PageRange;
use vm_memory::VolatileSlice;

use super::*;
use crate::patience::TICK;
use crate::{Address, Connector, Error, Listener, MappedMemory, PageMemory, Stream};

#[path = "../../tests/common/certificates.rs"]
mod certificates;
use certificates::Authority;

fn directory(place: &tempfile::TempDir) -> PathBuf {
    Authority::new("one").directory(place.path().join("tls"))
}

/// Two ends of a connection, and what lies below them.
fn ends() -> ([Stream; 2], [UnixStream; 2]) {
    let place = tempfile::tempdir().unwrap();
    let dir = directory(&place);
    let (near, far) = UnixStream::pair().unwrap();
    let listener = Listener::bind(&Address::Fd(far.as_raw_fd())).unwrap();
    let listener = listener.tls(TlsServer::load(&dir).unwrap()).unwrap();
    let connector = Connector::new(Address::Fd(near.as_raw_fd()))
        .tls(TlsClient::load(&dir).unwrap())
        .unwrap();
    let accepting = thread::spawn(move || listener.accept().unwrap());
    let near_end = connector.connect().unwrap();
    ([near_end, accepting.join().unwrap()], [near, far])
}

fn write_all(stream: &Stream, bytes: &[u8]) {
    let mut done = 0;
    while done < bytes.len() {
        done += stream.write(&bytes[done..], false).unwrap();
    }
}

fn read_exact(stream: &Stream, bytes: &mut [u8]) {
    let mut done = 0;
    while done < bytes.len() {
        let count = stream.read(&mut bytes[done..]).unwrap();
        assert_ne!(count, 0, "the end after {done} bytes");
        done += count;
    }
}

fn text(length: usize, seed: usize) -> Vec<u8> {
    (0..length)
        .map(|n| (n * 7 + n / 251 + seed).to_le_bytes()[0])
        .collect()
}

/// Far more than sockets hold goes both ways at once: every writer meets a full socket, and goes on when the reader at
/// the other end, which shares its ciphers with a writer that waits, has made room.
#[test]
fn both_ends_write_and_read_at_once_however_full_the_sockets_are() {
    const LENGTH: usize = 24 << 20;
    let (ends, _below) = ends();
    thread::scope(|scope| {
        for (number, end) in ends.iter().enumerate() {
            let reader = end.try_clone().unwrap();
            scope.spawn(move || write_all(end, &text(LENGTH, number)));
            scope.spawn(move || {
                let mut got = vec![0; LENGTH];
                read_exact(&reader, &mut got);
                assert!(got == text(LENGTH, 1 - number));
            });
        }
    });
}

#[test]
fn who_waits_for_an_answer_does_not_keep_the_writer_from_writing() {
    let ([near, far], _below) = ends();
    let sent = text(8 << 20, 3);
    thread::scope(|scope| {
        let answers = near.try_clone().unwrap();
        let waiting = scope.spawn(move || {
            let mut answer = [0; 6];
            read_exact(&answers, &mut answer);
            answer
        });
        scope.spawn(|| write_all(&near, &sent));
        let mut got = vec![0; 8 << 20];
        read_exact(&far, &mut got);
        assert!(got == sent);
        // Only now is there an answer.
        write_all(&far, b"answer");
        assert_eq!(&waiting.join().unwrap(), b"answer");
    });
}

/// What was reported as written is not written again, what was not is, through any number of refusals.
#[test]
fn a_write_that_a_full_socket_stops_goes_on_where_it_was() {
    let ([near, far], _below) = ends();
    near.set_timeouts(None, Some(Duration::from_millis(1)))
        .unwrap();
    let sent = text(4 << 20, 5);
    let mut done = 0;
    loop {
        match near.write(&sent[done..], false) {
            Ok(count) => done += count,
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
    }
    assert!(done > 0 && done < sent.len());
    thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut got = vec![0; sent.len()];
            read_exact(&far, &mut got);
            got
        });
        while done < sent.len() {
            match near.write(&sent[done..], false) {
                Ok(count) => done += count,
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
        }
        assert!(reading.join().unwrap() == sent);
    });
}

/// The pieces without their first `count` bytes.
fn behind<'a>(pieces: &[VolatileSlice<'a>], mut count: usize) -> Vec<VolatileSlice<'a>> {
    let mut rest = Vec::new();
    for piece in pieces {
        let skip = count.min(piece.len());
        count -= skip;
        if skip < piece.len() {
            rest.push(piece.offset(skip).unwrap());
        }
    }
    rest
}

#[test]
fn scattered_pages_arrive_in_order() {
    const PAGES: u64 = 1500;
    let ([near, far], _below) = ends();
    let (from, to) = (
        MappedMemory::anonymous(PAGES).unwrap(),
        MappedMemory::anonymous(PAGES).unwrap(),
    );
    let every: Vec<_> = (0..PAGES)
        .rev()
        .map(|page| PageRange::new(page, 1))
        .collect();
    for range in &every {
        let fill = [range.first.to_le_bytes()[0]; 4096];
        from.slice(*range).unwrap().copy_from(&fill);
    }
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut all: Vec<_> = every.iter().map(|r| from.slice(*r).unwrap()).collect();
            while !all.is_empty() {
                all = behind(&all, near.write_pages(&all).unwrap());
            }
        });
        let mut all: Vec<_> = every.iter().map(|r| to.slice(*r).unwrap()).collect();
        while !all.is_empty() {
            let count = far.read_pages(&all).unwrap();
            assert_ne!(count, 0);
            all = behind(&all, count);
        }
    });
    for range in &every {
        let mut page = [0; 4096];
        to.slice(*range).unwrap().copy_to(&mut page);
        assert!(page == [range.first.to_le_bytes()[0]; 4096], "{range:?}");
    }
}

#[test]
fn new_keys_in_the_middle_change_nothing() {
    let ([near, far], _below) = ends();
    let (Stream::Tls(one), Stream::Tls(other)) = (&near, &far) else {
        panic!("without TLS");
    };
    for round in 0..3 {
        one.session().renew_keys();
        write_all(&near, &text(30_000, round));
        let mut got = vec![0; 30_000];
        read_exact(&far, &mut got);
        assert!(got == text(30_000, round));
        other.session().renew_keys();
        write_all(&far, b"answer");
        let mut answer = [0; 6];
        read_exact(&near, &mut answer);
        assert_eq!(&answer, b"answer");
    }
}

#[test]
fn a_stream_ends_by_a_goodbye_or_by_a_cut_and_a_wait_by_its_timeout() {
    for cut in [false, true] {
        let ([near, far], [below, _far]) = ends();
        far.set_timeouts(Some(TICK), Some(TICK)).unwrap();
        let mut bytes = [0; 8];
        let error = far.read(&mut bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        write_all(&near, b"last");
        if cut {
            below.shutdown(Shutdown::Both).unwrap();
        } else {
            near.shutdown(Shutdown::Write);
        }
        assert_eq!(far.read(&mut bytes).unwrap(), 4);
        assert_eq!(far.read(&mut bytes).unwrap(), 0);
        // The other way is still open after a goodbye.
        if !cut {
            write_all(&far, b"heard");
            read_exact(&near, &mut bytes[..5]);
            assert_eq!(&bytes[..5], b"heard");
        }
    }
    let ([near, _far], _below) = ends();
    assert!(near.set_timeouts(Some(Duration::ZERO), None).is_err());
}

#[test]
fn what_somebody_put_between_is_an_error_and_is_said_at_both_ends() {
    let ([near, far], [mut below, mut below_far]) = ends();
    below.write_all(&[23, 3, 3, 0, 32]).unwrap();
    below.write_all(&[7; 32]).unwrap();
    for _ in 0..2 {
        let error = far.read(&mut [0; 8]).unwrap_err();
        assert!(error.to_string().contains("is damaged"), "{error}");
        let error = far.write(b"more", false).unwrap_err();
        assert!(error.to_string().contains("is damaged"), "{error}");
    }
    let error = near.read(&mut [0; 8]).unwrap_err().to_string();
    assert!(
        error.contains("the other end refused") && error.contains("BadRecordMac"),
        "{error}"
    );
    far.shutdown(Shutdown::Both);
    let _ = below_far.read(&mut [0; 8]);
}

#[test]
fn a_writer_that_finds_the_other_end_gone_says_why_it_went() {
    let ([near, far], [mut below, _far]) = ends();
    below.write_all(&[23, 3, 3, 0, 32]).unwrap();
    below.write_all(&[7; 32]).unwrap();
    far.read(&mut [0; 8]).unwrap_err();
    far.shutdown(Shutdown::Both);
    let error = near.write(b"more", false).unwrap_err().to_string();
    assert!(error.contains("the other end refused"), "{error}");
}

#[test]
fn a_file_that_can_not_be_used_is_named_with_what_is_wrong() {
    let place = tempfile::tempdir().unwrap();
    let dir = directory(&place);
    let loaded = || {
        let server = TlsServer::load(&dir).map(drop);
        server.and(TlsClient::load(&dir).map(drop))
    };
    loaded().unwrap();
    let other = Authority::new("two").directory(place.path().join("other"));
    let foreign_key = std::fs::read(other.join("client-key.pem")).unwrap();
    let cert = std::fs::read(dir.join("client-cert.pem")).unwrap();
    let no_cert = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
    for (name, contents, problem) in [
        ("ca-cert.pem", None, "can't be read"),
        ("server-cert.pem", None, "can't be read"),
        (
            "server-key.pem",
            Some(&b"nothing"[..]),
            "holds no private key",
        ),
        ("client-cert.pem", Some(b""), "holds no certificate"),
        (
            "client-cert.pem",
            Some(&cert[..100]),
            "holds no whole certificate",
        ),
        (
            "client-cert.pem",
            Some(no_cert.as_bytes()),
            "holds no usable certificate",
        ),
        (
            "ca-cert.pem",
            Some(no_cert.as_bytes()),
            "holds no usable certificate",
        ),
        ("client-key.pem", Some(&foreign_key), "is not the key of"),
        (
            "ca-cert.pem",
            Some(&[b'x'; 2 << 20]),
            "is over 1048576 bytes",
        ),
    ] {
        let path = dir.join(name);
        let before = std::fs::read(&path).unwrap();
        match contents {
            Some(contents) => std::fs::write(&path, contents).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let error = loaded().unwrap_err();
        assert!(matches!(error, Error::Credentials { .. }), "{error:?}");
        let line = error.to_string();
        assert!(line.starts_with(path.to_str().unwrap()), "{line}");
        assert!(line.contains(problem) && !line.contains('\n'), "{line}");
        std::fs::write(&path, before).unwrap();
    }
    loaded().unwrap();
}
