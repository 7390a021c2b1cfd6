//! Finds the eBPF objects that `cargo xtask build` made, and refuses missing or stale ones.
//!
//! The kernel side needs its own compiler, so cargo cannot build it as a dependency. This script
//! sets `ENFORCER_BPF_1M`, `ENFORCER_BPF_16M`, `ENFORCER_BPF_64M` and `ENFORCER_BPF_1M_WEAK`
//! (absolute paths) for `include_bytes!`.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a build script speaks to cargo by printing"
)]

#[path = "../xtask/src/stamp.rs"]
mod stamp;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

/// Overrides the search for the directory of objects.
const DIR: &str = "ENFORCER_BPF_DIR";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("error: {problem}\n\n  run `cargo xtask build`\n");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("run by cargo only")?);
    let root = package
        .parent()
        .ok_or("the package has no parent directory")?;
    println!("cargo:rerun-if-env-changed={DIR}");
    for source in stamp::SOURCES {
        println!("cargo:rerun-if-changed={}", root.join(source).display());
    }

    // What an object may take for granted of the memory's order is the machine's.
    let arch = env::var("CARGO_CFG_TARGET_ARCH").map_err(|_| "run by cargo only")?;
    let hash = stamp::hash(root, &arch).map_err(|error| format!("kernel-side sources: {error}"))?;
    let dir = find(&hash)?;
    println!(
        "cargo:rerun-if-changed={}",
        dir.join(stamp::STAMP).display()
    );
    for class in stamp::CLASSES {
        let object = dir.join(stamp::object_name(class));
        println!("cargo:rerun-if-changed={}", object.display());
        println!(
            "cargo:rustc-env=ENFORCER_BPF_{}={}",
            class.to_uppercase().replace('-', "_"),
            object.display()
        );
    }
    Ok(())
}

/// The directory of current objects: `ENFORCER_BPF_DIR`, else `bpf` in the target directory.
fn find(hash: &str) -> Result<PathBuf, String> {
    if let Some(dir) = env::var_os(DIR) {
        return judge(PathBuf::from(dir), hash);
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("run by cargo only")?);
    // With --target there is one more level between OUT_DIR and the target directory.
    let dirs = out.ancestors().map(|dir| dir.join("bpf"));
    match dirs
        .into_iter()
        .find(|dir| dir.join(stamp::STAMP).is_file())
    {
        Some(dir) => judge(dir, hash),
        None => {
            // Watch where it will be, so that building the objects is enough to go on.
            if let Some(target) = out.ancestors().nth(4) {
                println!("cargo:rerun-if-changed={}", target.join("bpf").display());
            }
            Err("the eBPF objects have not been built".into())
        }
    }
}

fn judge(dir: PathBuf, hash: &str) -> Result<PathBuf, String> {
    let dir = fs::canonicalize(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    if stamp::is_current(&dir, hash) {
        Ok(dir)
    } else {
        Err(stale(&dir))
    }
}

fn stale(dir: &Path) -> String {
    format!(
        "the eBPF objects in {} are older than their sources, or of another architecture",
        dir.display()
    )
}
