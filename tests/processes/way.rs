//! The ways that memory travels, and attempts that stand still on them.

use std::path::PathBuf;

use crate::certificates::Authority;
use crate::ends::Cipher;
use crate::harness::*;
use crate::proxy::*;

/// How memory travels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Way {
    pub channels: usize,
    pub tls: bool,
    pub compress: Option<&'static str>,
}

impl Way {
    pub const PLAIN: Self = Self {
        channels: 1,
        tls: false,
        compress: None,
    };

    pub const CHANNELS: Self = Self {
        channels: 3,
        ..Self::PLAIN
    };
    pub const TLS: Self = Self {
        tls: true,
        ..Self::PLAIN
    };
    pub const PACKED: Self = Self {
        compress: Some("lz4"),
        ..Self::PLAIN
    };
    pub const TOGETHER: Self = Self {
        channels: 3,
        tls: true,
        compress: Some("zstd"),
    };

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        std::iter::once(Self::PLAIN).chain(Self::others())
    }

    /// All but the plain one. Those with TLS only where it is built in.
    pub fn others() -> impl Iterator<Item = Self> {
        let built_in = |way: &Self| !way.tls || cfg!(feature = "tls");
        let all = [Self::CHANNELS, Self::TLS, Self::PACKED, Self::TOGETHER];
        all.into_iter().filter(built_in)
    }

    fn directory(place: &Place) -> PathBuf {
        let dir = place.path("tls");
        if !dir.exists() {
            Authority::new("one").directory(dir.clone());
        }
        dir
    }

    pub fn cipher(self, place: &Place) -> Cipher {
        match self.tls {
            true => Cipher::Tls(Self::directory(place)),
            false => Cipher::None,
        }
    }

    /// Options of `receive`.
    pub fn receive(self, place: &Place) -> Vec<String> {
        match self.tls {
            true => vec![
                "--tls".into(),
                Self::directory(place).to_str().unwrap().into(),
            ],
            false => Vec::new(),
        }
    }

    /// Options of `send`.
    pub fn send(self, place: &Place) -> Vec<String> {
        let mut options = self.receive(place);
        options.extend(["--channels".into(), self.channels.to_string()]);
        if let Some(codec) = self.compress {
            options.extend(["--compress".into(), codec.into()]);
        }
        options
    }
}

/// A destination that would run the guest, and serve it again.
pub fn start_there(place: &Place, name: &str, way: Way) -> Receive {
    let control = place.arg(&format!("{name}.control"));
    let mut options = way.receive(place);
    options.extend(["--resume".into(), "--control".into(), control]);
    Receive::start(place, name, &as_str(&options))
}

pub fn as_str(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

/// A migration that stands still, to a destination that would run the guest.
pub struct Standing {
    pub send: Process,
    pub receive: Receive,
    pub held: Held,
}

impl Standing {
    /// The plain way.
    pub fn at(place: &Place, guest: &Guest, kind: u8, part: Part) -> Self {
        let spot = Spot {
            point: Point { kind, part },
            connection: 0,
            after: 0,
        };
        Self::on(place, guest, Way::PLAIN, spot, &[]).unwrap()
    }

    /// `None` when the migration completed without getting there: other connections had carried all that there was.
    pub fn on(place: &Place, guest: &Guest, way: Way, spot: Spot, more: &[&str]) -> Option<Self> {
        let name = format!("there-{}-{:?}", spot.point.kind, spot.point.part);
        let receive = start_there(place, &name, way);
        let line = place.path(&format!("line-{name}"));
        let socket = place.path(&format!("{name}.socket"));
        let held = hold_all(&line, socket, way.channels, way.cipher(place), spot);
        let mut options = way.send(place);
        options.extend(more.iter().map(ToString::to_string));
        let to = format!("unix:{}", line.display());
        let mut send = guest.send(&to, &as_str(&options));
        let held = until(&format!("{way:?} stands still at {spot:?}"), || {
            let held = held.try_recv().ok();
            (held.is_some() || !send.runs()).then_some(held)
        });
        let Some(held) = held else {
            send.end().status("completed", 0);
            return None;
        };
        Some(Self {
            send,
            receive,
            held,
        })
    }

    pub fn kill_agent(self) -> Receive {
        self.send.kill();
        self.held.cut();
        self.receive
    }

    /// What the agent said of it, and where the destination was.
    pub fn kill_destination(mut self) -> (Ended, String) {
        self.receive.process.take().unwrap().kill();
        self.held.cut();
        (self.send.end(), self.receive.address)
    }
}
