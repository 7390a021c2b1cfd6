//! What the fuzzers run, one function a target, and what must hold for every input. The fuzzers
//! themselves are in `tests/fuzz`; `fuzz_corpus.rs` runs the same functions over the committed
//! inputs.

use std::{fs, path::PathBuf, sync::LazyLock};

pub mod events;
pub mod oracle;
pub mod packets;
pub mod policy;
pub mod script;
pub mod seeds;

/// A target: what it is called, and what runs an input.
pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    /// Inputs to start from.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// Every target.
pub static TARGETS: [Target; 3] = [
    Target {
        name: "packets",
        run: packets::run,
        seeds: seeds::packets,
    },
    Target {
        name: "policy",
        run: policy::run,
        seeds: seeds::policy,
    },
    Target {
        name: "events",
        run: events::run,
        seeds: seeds::events,
    },
];

/// Where the inputs of all targets are kept.
pub fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}

/// The committed inputs of a target, by path, in order.
pub fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let directory = directory().join(target);
    let entries = fs::read_dir(&directory).unwrap_or_else(|e| panic!("{directory:?}: {e}"));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let read = |path: PathBuf| {
        let bytes = fs::read(&path).unwrap();
        (path, bytes)
    };
    files.into_iter().map(read).collect()
}

/// Before the first input: compiles what all of them share, so that it is none's coverage, and
/// writes the target's seeds to the directory that `ENFORCER_FUZZ_SEEDS` names, if any.
pub fn prepare(target: &Target) {
    LazyLock::force(&script::POLICIES);
    let Some(directory) = std::env::var_os("ENFORCER_FUZZ_SEEDS").map(PathBuf::from) else {
        return;
    };
    for (number, bytes) in (target.seeds)().iter().enumerate() {
        fs::write(directory.join(format!("seed-{number:03}")), bytes).unwrap();
    }
}
