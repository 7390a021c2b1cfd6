//! Runs the test that reloads for minutes and looks whether anything grows.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::{build, env, setup, test, ui};

/// What `cargo xtask soak` was asked for.
#[derive(clap::Args)]
pub struct Options {
    /// How long; the first minute is what the others are compared with
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(2..))]
    pub minutes: u64,
    /// With optimisations
    #[arg(long)]
    pub release: bool,
    /// Write what was measured to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Builds and runs it, as root.
pub fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    let binary = build::binary(options.release)?;
    test::mount_bpffs()?;
    ui::step(&format!("{} minutes of reloads", options.minutes));
    let mut cargo = env::cargo();
    cargo.args(["test", "--package", "enforcer-tests", "--test", "soak"]);
    test::as_root(&mut cargo, "the soak", &variables(options, binary)?)?;
    cargo.args(["--", "--include-ignored", "--nocapture"]);
    let status = cargo
        .status()
        .with_context(|| format!("cannot run {}", ui::describe(&cargo)))?;
    if !status.success() {
        bail!("something was lost, passed or grew");
    }
    Ok(())
}

/// What the test is told. Paths are the caller's, and it runs elsewhere.
fn variables(options: &Options, binary: PathBuf) -> Result<Vec<(&'static str, OsString)>> {
    let mut all = vec![
        ("ENFORCER_BIN", binary.into()),
        ("ENFORCER_SOAK_MINUTES", options.minutes.to_string().into()),
    ];
    if let Some(path) = &options.json {
        all.push(("ENFORCER_SOAK_JSON", std::path::absolute(path)?.into()));
    }
    Ok(all)
}
