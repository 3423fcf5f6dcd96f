//! A certificate authority, and what it hands out.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair,
};

pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    /// A directory for both ends on this machine.
    pub fn directory(&self, dir: PathBuf) -> PathBuf {
        std::fs::create_dir(&dir).unwrap();
        self.trusted(&dir);
        self.server(&dir, &["localhost", "127.0.0.1"], |_| ());
        self.client(&dir, |_| ());
        dir
    }

    /// Whoever reads `dir` trusts it.
    pub fn trusted(&self, dir: &Path) {
        std::fs::write(dir.join("ca-cert.pem"), self.0.pem()).unwrap();
    }

    pub fn server(&self, dir: &Path, hosts: &[&str], edit: fn(&mut CertificateParams)) {
        let usage = ExtendedKeyUsagePurpose::ServerAuth;
        self.issue(dir, "server", hosts, usage, edit);
    }

    pub fn client(&self, dir: &Path, edit: fn(&mut CertificateParams)) {
        let usage = ExtendedKeyUsagePurpose::ClientAuth;
        self.issue(dir, "client", &[], usage, edit);
    }

    fn issue(
        &self,
        dir: &Path,
        role: &str,
        hosts: &[&str],
        usage: ExtendedKeyUsagePurpose,
        edit: fn(&mut CertificateParams),
    ) {
        let hosts: Vec<_> = hosts.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.extended_key_usages = vec![usage];
        edit(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let write = |what: &str, text: String| {
            std::fs::write(dir.join(format!("{role}-{what}.pem")), text).unwrap();
        };
        write("cert", certificate.pem());
        write("key", key.serialize_pem());
    }
}

/// An edit: its time is over.
#[allow(dead_code)] // each test file uses its part of it
pub fn expired(params: &mut CertificateParams) {
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
}
