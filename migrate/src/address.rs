//! Where the other end is.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The address of the other end, written as QEMU and Cloud Hypervisor write it.
///
/// ```
/// use gleaner_migrate::Address;
/// let address: Address = "tcp:[::1]:4444".parse()?;
/// assert_eq!(address.to_string(), "tcp:[::1]:4444");
/// # Ok::<(), gleaner_migrate::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// `tcp:HOST:PORT`; an IPv6 host stands in brackets.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// `unix:PATH`, a stream socket.
    Unix(PathBuf),
    /// `fd:N`, an inherited descriptor: a connected or listening stream socket, or a file.
    Fd(RawFd),
    /// `file:PATH`.
    File(PathBuf),
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |problem| Error::Address {
            text: text.escape_default().take(256).collect(),
            problem,
        };
        let (scheme, rest) = text.split_once(':').ok_or_else(|| bad("no scheme"))?;
        match scheme {
            "tcp" => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(|| bad("no port"))?;
                let host = match host.strip_prefix('[') {
                    Some(inner) => inner
                        .strip_suffix(']')
                        .ok_or_else(|| bad("a bracket is missing"))?,
                    None if host.contains(':') => {
                        return Err(bad("an IPv6 host needs brackets"));
                    }
                    None => host,
                };
                if host.is_empty() {
                    return Err(bad("no host"));
                }
                Ok(Self::Tcp {
                    host: host.to_owned(),
                    port: port
                        .parse()
                        .map_err(|_| bad("the port is not a number from 0 to 65535"))?,
                })
            }
            "unix" | "file" if rest.is_empty() => Err(bad("no path")),
            "unix" => Ok(Self::Unix(rest.into())),
            "file" => Ok(Self::File(rest.into())),
            "fd" => match rest.parse::<RawFd>() {
                Ok(fd) if fd >= 0 => Ok(Self::Fd(fd)),
                _ => Err(bad("the descriptor is not a number from 0 on")),
            },
            _ => Err(bad("unknown scheme")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Fd(fd) => write!(f, "fd:{fd}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_parsed_is_displayed() {
        for text in [
            "tcp:host:1",
            "tcp:127.0.0.1:65535",
            "tcp:[::1]:0",
            "unix:/a/b:c",
            "unix:x",
            "fd:0",
            "file:/tmp/a b",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_bad_address_is_named_with_its_fault() {
        for (text, fault) in [
            ("", "no scheme"),
            ("host", "no scheme"),
            ("tcp:host", "no port"),
            ("tcp::1", "no host"),
            ("tcp:host:65536", "port is not"),
            ("tcp:::1:5", "needs brackets"),
            ("tcp:[::1:5", "bracket is missing"),
            ("unix:", "no path"),
            ("file:", "no path"),
            ("fd:-1", "descriptor is not"),
            ("fd:x", "descriptor is not"),
            ("rdma:host:1", "unknown scheme"),
        ] {
            let message = text.parse::<Address>().unwrap_err().to_string();
            assert!(
                message.contains(fault) && message.contains("tcp:HOST:PORT"),
                "{text}: {message}"
            );
        }
    }
}
