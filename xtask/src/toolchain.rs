//! The compiler for the kernel side: which ones there are, and how to call them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::env;

/// The target triple of the kernel side.
pub const TARGET: &str = "bpfel-unknown-none";
/// The bpf-linker that `setup` installs.
pub const LINKER_VERSION: &str = "0.13.0";

/// A Rust toolchain that can compile for [`TARGET`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rust {
    /// Debian's `rustc-web`, which brings `core` for BPF. Lives beside rustup's toolchains.
    Debian,
    /// A rustup nightly with `rust-src`, which builds `core` itself.
    Nightly,
}

impl Rust {
    /// The toolchains that are complete on this machine, the preferred one first.
    pub fn find() -> Option<Self> {
        if debian_is_complete() {
            Some(Self::Debian)
        } else if nightly_is_complete() {
            Some(Self::Nightly)
        } else {
            None
        }
    }

    /// What to call it when talking to people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Debian => "Debian's rustc-web",
            Self::Nightly => "rustup's nightly with rust-src",
        }
    }

    /// The LLVM major version its bitcode is written in; bpf-linker must read it.
    pub fn llvm(self) -> Result<u32> {
        let mut rustc = match self {
            Self::Debian => env::clean("/usr/bin/rustc"),
            Self::Nightly => {
                let mut rustc = env::clean("rustc");
                rustc.arg("+nightly");
                rustc
            }
        };
        let output = rustc.arg("-vV").output().context("cannot run rustc")?;
        llvm_major(&String::from_utf8_lossy(&output.stdout))
            .context("rustc -vV does not name its LLVM version")
    }

    /// `cargo` of this toolchain, set up to compile and link for [`TARGET`].
    pub fn cargo(self, verb: &str, linker: &Path) -> Command {
        let mut cargo = match self {
            Self::Debian => {
                let mut cargo = env::clean("/usr/bin/cargo");
                // Cargo calls `cargo clippy`'s driver by name, and rustup's comes first in PATH.
                cargo
                    .env("RUSTC", "/usr/bin/rustc")
                    .env("RUSTC_BOOTSTRAP", "1");
                cargo.env("PATH", prepend_path("/usr/bin")).arg(verb);
                cargo
            }
            Self::Nightly => {
                let mut cargo = env::clean("cargo");
                cargo.args(["+nightly", verb, "-Zbuild-std=core"]);
                cargo
            }
        };
        let flags = [
            format!("-Clinker={}", linker.display()),
            "-Clink-arg=--btf".into(),
            "-Ctarget-cpu=v3".into(),
            "-Cdebuginfo=2".into(),
        ];
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        cargo.args(["--release", "--target", TARGET]);
        cargo.args(["--manifest-path", "enforcer-ebpf/Cargo.toml"]);
        cargo
    }
}

/// Where `setup` keeps what it fetches or builds: outside the target directory, so that
/// `cargo clean` spares it.
pub fn cache_dir() -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .filter(|dir| Path::new(dir).is_absolute())
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set")?;
    Ok(cache.join("enforcer-toolchain"))
}

/// Where `setup` puts bpf-linker.
pub fn linker_root(llvm: u32) -> Result<PathBuf> {
    Ok(cache_dir()?.join(format!("bpf-linker-{LINKER_VERSION}-llvm{llvm}")))
}

/// The linker to use: the one `setup` installed, else one in `PATH`.
pub fn find_linker(llvm: u32) -> Result<Option<PathBuf>> {
    let own = linker_root(llvm)?.join("bin/bpf-linker");
    // Running it tells whether the LLVM it was linked with is still there.
    let runs = |linker: &PathBuf| {
        env::clean(linker)
            .arg("--version")
            .output()
            .is_ok_and(|output| output.status.success())
    };
    Ok([Some(own), env::find_program("bpf-linker")]
        .into_iter()
        .flatten()
        .find(runs))
}

fn debian_is_complete() -> bool {
    Path::new("/usr/bin/cargo").is_file()
        && Path::new("/usr/bin/clippy-driver").is_file()
        && has_core(env::clean("/usr/bin/rustc").args(["--print", "target-libdir"]))
}

fn has_core(rustc: &mut Command) -> bool {
    let Ok(output) = rustc.args(["--target", TARGET]).output() else {
        return false;
    };
    let dir = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    output.status.success()
        && std::fs::read_dir(dir).is_ok_and(|entries| {
            entries
                .flatten()
                .any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
        })
}

fn nightly_is_complete() -> bool {
    // Without rustup there is no `+nightly`; and rustup must not fetch one by itself here.
    let Some(rustup) = env::find_program("rustup") else {
        return false;
    };
    env::clean(rustup)
        .args(["run", "nightly", "rustc", "--print", "sysroot"])
        .env("RUSTUP_AUTO_INSTALL", "0")
        .output()
        .is_ok_and(|output| {
            let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
            output.status.success()
                && sysroot
                    .join("lib/rustlib/src/rust/library/core/Cargo.toml")
                    .is_file()
        })
}

fn llvm_major(version: &str) -> Option<u32> {
    let line = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?;
    line.split('.').next()?.trim().parse().ok()
}

fn prepend_path(first: &str) -> OsString {
    let mut path = OsString::from(first);
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_version_is_read_from_rustc() {
        let text = "rustc 1.96.0\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(llvm_major(text), Some(22));
        assert_eq!(llvm_major("rustc 1.96.0\n"), None);
    }
}
