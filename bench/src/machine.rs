//! The machine that figures are of, in words.

use std::fs;
use std::process::Command;

/// Date, CPU, memory, kernel and load.
pub fn told() -> String {
    let date = Command::new("date").args(["-u", "+%-d %B %Y"]).output();
    let date = date.map_or_else(
        |_| String::new(),
        |said| String::from_utf8_lossy(&said.stdout).trim().to_owned(),
    );
    let cpus = read("/proc/cpuinfo");
    let model = value(&cpus, "model name").unwrap_or_else(|| "unknown CPU".into());
    let cores = cpus
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let kib: u64 = value(&read("/proc/meminfo"), "MemTotal")
        .and_then(|text| text.split(' ').next()?.parse().ok())
        .unwrap_or(0);
    let sets = value(&cpus, "flags").unwrap_or_default();
    let has = |flag: &str| sets.split(' ').any(|set| set == flag);
    let set = match (has("avx512_vbmi2"), has("avx2")) {
        (true, _) => "AVX-512 VBMI2",
        (false, true) => "AVX2, no AVX-512 VBMI2",
        (false, false) => "no AVX2",
    };
    let release = read("/proc/sys/kernel/osrelease");
    format!(
        "{date}, {cores} cores of an {model} ({set}), {} GiB, Linux {}. Load average in the beginning: {}.",
        kib >> 20,
        release.split(['-', '\n']).next().unwrap_or_default(),
        load()
    )
}

/// The load average of the last minute.
pub fn load() -> String {
    let text = read("/proc/loadavg");
    text.split(' ').next().unwrap_or("unknown").to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// What stands behind a name and a colon.
fn value(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
