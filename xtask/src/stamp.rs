//! The hash that says whether the embedded eBPF objects match their sources.
//!
//! Compiled twice: into xtask, which writes the stamp, and by `#[path]` into the `enforcer`
//! package's build script, which refuses objects whose stamp is stale. No dependencies.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// What the kernel side is built from, relative to the workspace root.
pub const SOURCES: [&str; 5] = [
    "enforcer-ebpf/src",
    "enforcer-ebpf/Cargo.toml",
    "enforcer-ebpf/Cargo.lock",
    "enforcer-common/src",
    "enforcer-common/Cargo.toml",
];

/// One object file each: the image size classes for this machine, and the smallest for machines
/// whose memory is ordered weakly, which tests load everywhere.
pub const CLASSES: [&str; 4] = ["1m", "16m", "64m", "1m-weak"];

/// The kernel side's cargo features for an object.
#[allow(dead_code, reason = "the build script does not build objects")]
pub fn features(class: &str) -> String {
    match class.strip_suffix("-weak") {
        Some(class) => format!("image-{class}"),
        None if cfg!(target_arch = "x86_64") => format!("image-{class},tso"),
        None => format!("image-{class}"),
    }
}

/// File beside the objects that holds the hash of their sources.
pub const STAMP: &str = "stamp";

/// Counts up when the way of building changes, so that old objects become stale.
const RECIPE: u64 = 2;

/// The object's file name for a size class.
pub fn object_name(class: &str) -> String {
    format!("enforcer-{class}.o")
}

/// FNV-1a (64 bits) over the architecture that the objects are for, and the relative paths and
/// contents of all kernel-side sources, as hex.
///
/// A missing source counts as absent, so that adding or removing one changes the hash.
pub fn hash(root: &Path, arch: &str) -> io::Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(&root.join(source), &mut files)?;
    }
    files.sort();
    let mut state = Fnv(0xcbf2_9ce4_8422_2325);
    state.feed(&RECIPE.to_le_bytes());
    state.feed(arch.as_bytes());
    for file in files {
        let name = file
            .strip_prefix(root)
            .unwrap_or(&file)
            .to_string_lossy()
            .into_owned();
        let contents = fs::read(&file)?;
        // Lengths keep "ab" + "c" apart from "a" + "bc".
        for part in [name.as_bytes(), &contents] {
            state.feed(&(part.len() as u64).to_le_bytes());
            state.feed(part);
        }
    }
    Ok(format!("{:016x}", state.0))
}

/// True when `dir` holds every object and a stamp equal to `hash`.
pub fn is_current(dir: &Path, hash: &str) -> bool {
    CLASSES
        .iter()
        .all(|class| dir.join(object_name(class)).is_file())
        && fs::read_to_string(dir.join(STAMP)).is_ok_and(|stamp| stamp.trim() == hash)
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            collect(&entry?.path(), files)?;
        }
    } else if path.is_file() {
        files.push(path.to_path_buf());
    }
    Ok(())
}

struct Fnv(u64);

impl Fnv {
    fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}
