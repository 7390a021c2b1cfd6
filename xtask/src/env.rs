//! Where things are, who runs us, and commands with a clean environment.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::ui;

/// The workspace root: the parent of this package.
pub fn root() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// The workspace's target directory, as cargo sees it.
pub fn target_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty()) {
        // Cargo reads a relative one from where it was started; so do we.
        return Ok(std::path::absolute(PathBuf::from(dir))?);
    }
    let output = cargo()
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata failed");
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let dir = metadata["target_directory"]
        .as_str()
        .context("cargo metadata: no target dir")?;
    Ok(dir.into())
}

/// The cargo that runs us, in the workspace root.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    without_package_env(&mut command);
    command
}

/// A command that sees nothing of the cargo and rustup which started us.
///
/// Both leave variables behind that redirect another toolchain: `cargo run` sets `CARGO` and
/// `LD_LIBRARY_PATH`, rustup's proxies set `RUSTUP_TOOLCHAIN` and `RUSTUP_HOME`.
pub fn clean(program: impl Into<OsString>) -> Command {
    let mut command = Command::new(program.into());
    command.current_dir(root());
    for name in [
        "CARGO",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "CLIPPY_ARGS",
        "LD_LIBRARY_PATH",
        "RUSTC",
        "RUSTC_BOOTSTRAP",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "RUST_RECURSION_COUNT",
    ] {
        command.env_remove(name);
    }
    without_package_env(&mut command);
    command
}

/// Removes what `cargo run` says about xtask itself.
fn without_package_env(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
}

/// True when we run as root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Looks a program up in `PATH`.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Debian keeps `ip` where a user's PATH may not look.
    let extra = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(extra)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// The prefix that makes a command run as root: empty for root itself, `sudo …` for a user.
pub fn root_prefix(why: &str) -> Result<Vec<OsString>> {
    if is_root() {
        return Ok(Vec::new());
    }
    let Some(sudo) = find_program("sudo") else {
        bail!("{why} takes root, and there is no sudo here: run this command as root");
    };
    ui::note(&format!("not root: {why} goes on through sudo"));
    let mut prefix = vec![sudo.into_os_string(), "--".into(), "/usr/bin/env".into()];
    // sudo drops these, or puts its own in their place.
    for name in KEPT {
        if let Some(value) = std::env::var_os(name) {
            let mut pair = OsString::from(name);
            pair.push("=");
            pair.push(value);
            prefix.push(pair);
        }
    }
    Ok(prefix)
}

/// Variables that must reach what runs as root.
const KEPT: [&str; 15] = [
    "CARGO",
    "CARGO_HOME",
    "CARGO_TARGET_DIR",
    "CI",
    "ENFORCER_BIN",
    "ENFORCER_TEST_SCALE",
    "HOME",
    "INSTA_UPDATE",
    "NO_COLOR",
    "PATH",
    "PROPTEST_CASES",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "RUST_BACKTRACE",
    "TERM",
];

/// A command run as root, through sudo where we are a user.
pub fn as_root(why: &str, program: &str) -> Result<Command> {
    let mut words = root_prefix(why)?;
    words.push(program.into());
    let mut words = words.into_iter();
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words).current_dir(root());
    Ok(command)
}
