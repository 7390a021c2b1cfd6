//! Formatting, clippy on both sides, and the rules of [`crate::tidy`].

use std::time::Instant;

use anyhow::Result;

use crate::{build, env, setup, tidy, ui};

/// Runs every check and reports all that failed, not only the first.
pub fn run() -> Result<()> {
    let start = Instant::now();
    // The host side embeds the objects, so clippy cannot look at it without them.
    build::objects()?;
    type Check = fn() -> Result<()>;
    let checks: [(&str, Check); 5] = [
        ("Formatting of the workspace", || {
            ui::run(env::cargo().args(["fmt", "--all", "--check"]))
        }),
        ("Formatting of the kernel side", || {
            ui::run(env::cargo().args([
                "fmt",
                "--check",
                "--manifest-path",
                "enforcer-ebpf/Cargo.toml",
            ]))
        }),
        ("Purity of the deciding modules", tidy::run),
        ("Clippy, host side", || {
            ui::run(
                env::cargo()
                    .args(["clippy", "--workspace", "--all-targets"])
                    .args(DENY),
            )
        }),
        ("Clippy, kernel side", kernel_clippy),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        ui::step(name);
        if let Err(error) = check() {
            ui::note(&format!("{error:#}"));
            failed.push(name);
        }
    }
    if failed.is_empty() {
        ui::step(&format!("Lint: all clean ({})", ui::took(start)));
        return Ok(());
    }
    anyhow::bail!("lint failed: {}", failed.join("; "))
}

const DENY: [&str; 3] = ["--", "-D", "warnings"];

fn kernel_clippy() -> Result<()> {
    let tools = setup::ensure()?;
    let mut cargo = tools.rust.cargo("clippy", &tools.linker);
    // Its own directory: a build and a check of the same crate would undo each other's work.
    cargo
        .arg("--locked")
        .arg("--target-dir")
        .arg(build::objects_dir()?.join("clippy"))
        .args(DENY);
    ui::run(&mut cargo)
}
