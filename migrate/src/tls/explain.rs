//! What went wrong, in one line for people. Nothing in it comes from the other end but a number's name.

use rustls::{AlertDescription, CertificateError, Error};

pub(super) const NOT_TLS: &str =
    "the other end does not speak TLS: use it at both ends or at neither";
pub(super) const PLAIN: &str =
    "the other end speaks without TLS: use it at both ends or at neither";

const ONE_CA: &str = "use certificates of one CA at both ends";

/// `shaking`: the handshake is not done.
pub(super) fn explain(error: &Error, shaking: bool) -> String {
    match error {
        Error::InvalidCertificate(why) => format!("the other end's certificate {}", fault(why)),
        Error::NoCertificatesPresented => {
            "the other end showed no certificate: it needs client-cert.pem and client-key.pem"
                .into()
        }
        Error::AlertReceived(alert) => {
            format!("the other end refused: {} ({alert:?})", refusal(*alert))
        }
        Error::InvalidMessage(_) if shaking => NOT_TLS.into(),
        Error::PeerIncompatible(why) => {
            format!("the other end's TLS does not fit, 1.3 is needed: {why:?}")
        }
        Error::InvalidMessage(_) | Error::DecryptError | Error::PeerSentOversizedRecord => {
            "a TLS record is damaged, or somebody has changed it".into()
        }
        // Debug of debug: whatever it holds, it stays on one line.
        other => format!("TLS failed: {}", other.to_string().escape_default()),
    }
}

/// What is wrong with a certificate that was shown to us.
fn fault(why: &CertificateError) -> String {
    use CertificateError as E;
    match why {
        E::Expired | E::ExpiredContext { .. } => {
            "has expired: renew it, and check this machine's clock".into()
        }
        E::NotValidYet | E::NotValidYetContext { .. } => {
            "is not valid yet: check the clocks of both machines".into()
        }
        E::UnknownIssuer | E::BadSignature => {
            format!("was not signed by the CA in ca-cert.pem: {ONE_CA}")
        }
        E::NotValidForNameContext { expected, .. } => format!(
            "is not made out to {}: connect by a name that it has, or make it anew",
            expected.to_str()
        ),
        E::NotValidForName => "is not made out to this host".into(),
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
            "is not for that end: look for a server's in a client's place, or the reverse".into()
        }
        other => format!("is not usable: {}", other.to_string().escape_default()),
    }
}

/// What the other end holds against us.
fn refusal(alert: AlertDescription) -> String {
    use AlertDescription as A;
    match alert {
        A::UnknownCA | A::DecryptError => {
            format!("it does not trust the CA of this end's certificate: {ONE_CA}")
        }
        A::CertificateExpired => {
            "this end's certificate has expired, or is not valid yet by its clock".into()
        }
        A::BadCertificate => {
            "this end's certificate is damaged, or not made out to the host that was asked for"
                .into()
        }
        A::UnsupportedCertificate => "this end's certificate is for the other end".into(),
        A::CertificateRequired => "it got no certificate from this end".into(),
        A::ProtocolVersion => "it does not speak TLS 1.3".into(),
        _ => "its own message says why".into(),
    }
}
