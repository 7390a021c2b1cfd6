//! Builds and runs the line-rate bench of `tests/benches/line_rate`.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{build, env, setup, test, ui, vm};

/// What `cargo xtask bench` was asked for.
#[derive(clap::Args)]
pub struct Options {
    /// Two minutes instead of twenty; fails when a ratio is behind its bound
    #[arg(long)]
    pub quick: bool,
    /// Write everything measured to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Measure one part alone
    #[arg(long, value_name = "PART", value_parser = ["micro", "macro", "control"])]
    pub only: Option<String>,
    /// Write the tables and plots of docs/performance.md
    #[arg(long)]
    pub record: bool,
    /// Bounds to hold the ratios to, instead of the committed ones
    #[arg(long, value_name = "FILE")]
    pub bounds: Option<PathBuf>,
}

/// A bench and the enforcer beside it.
pub struct Built {
    /// The bench.
    pub bench: PathBuf,
    /// The enforcer that it starts.
    pub enforcer: PathBuf,
}

/// Builds and runs it, as root.
pub fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    let start = Instant::now();
    build::objects()?;
    // In CI the guests' suite has just been built. What most ratios are about is the kernel's code,
    // which is the same whatever the host's was built with.
    let built = if options.quick && vm::is_possible() {
        vm::bench()?
    } else {
        let enforcer = build::binary(true)?;
        ui::step("Building the bench");
        let mut cargo = env::cargo();
        cargo.args(["build", "--release", "--package", "enforcer-tests"]);
        let bench = executable(&mut cargo)?;
        Built { bench, enforcer }
    };
    ui::note(&format!("{} ({})", built.bench.display(), ui::took(start)));
    test::mount_bpffs()?;
    ui::step("Measuring");
    let mut command = command(&built, options)?;
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", ui::describe(&command)))?;
    if !status.success() {
        bail!("the bench failed");
    }
    Ok(())
}

fn command(built: &Built, options: &Options) -> Result<Command> {
    let mut words = env::root_prefix("measuring")?;
    if !words.is_empty() {
        let mut pair = OsString::from("ENFORCER_BIN=");
        pair.push(&built.enforcer);
        words.push(pair);
    }
    words.push(built.bench.clone().into());
    let mut words = words.into_iter();
    let mut command = Command::new(words.next().unwrap_or_default());
    command
        .args(words)
        .args(arguments(options)?)
        .env("ENFORCER_BIN", &built.enforcer)
        .current_dir(env::root());
    Ok(command)
}

/// The bench's own arguments. Paths are the caller's, and the bench runs elsewhere.
fn arguments(options: &Options) -> Result<Vec<OsString>> {
    let mut arguments: Vec<OsString> = Vec::new();
    if options.quick {
        arguments.push("--quick".into());
    }
    if options.record {
        arguments.push("--record".into());
    }
    if let Some(only) = &options.only {
        arguments.extend(["--only".into(), only.into()]);
    }
    for (name, path) in [("--json", &options.json), ("--bounds", &options.bounds)] {
        if let Some(path) = path {
            arguments.extend([name.into(), std::path::absolute(path)?.into()]);
        }
    }
    Ok(arguments)
}

/// Has this cargo build the bench, and says where it left it.
pub fn executable(cargo: &mut Command) -> Result<PathBuf> {
    cargo.args([
        "--bench",
        "line_rate",
        "--message-format=json-render-diagnostics",
    ]);
    let mut child = cargo
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", ui::describe(cargo)))?;
    let stdout = child.stdout.take().context("cargo has no output")?;
    let mut found = None;
    for line in BufReader::new(stdout).lines() {
        found = announced(&line?).or(found);
    }
    if !child.wait()?.success() {
        bail!("{} failed", ui::describe(cargo));
    }
    found.context("cargo built no bench")
}

fn announced(message: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let is_bench = message["reason"] == "compiler-artifact"
        && message["target"]["kind"][0] == "bench"
        && message["target"]["name"] == "line_rate";
    let path = message["executable"].as_str().filter(|_| is_bench)?;
    Some(path.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bench_is_told_from_other_artifacts() {
        let message = |kind: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"name":"line_rate","kind":["{kind}"]}},
                    "executable":"/t/line_rate-1"}}"#
            )
        };
        let want = Some(PathBuf::from("/t/line_rate-1"));
        assert_eq!(announced(&message("bench")), want);
        assert_eq!(announced(&message("test")), None);
        assert_eq!(announced("no JSON"), None);
    }

    #[test]
    fn paths_are_the_callers() {
        let options = Options {
            quick: true,
            json: Some("out.json".into()),
            only: Some("micro".to_owned()),
            record: false,
            bounds: None,
        };
        let here = std::env::current_dir().unwrap().join("out.json");
        let want: [OsString; 5] = [
            "--quick".into(),
            "--only".into(),
            "micro".into(),
            "--json".into(),
            here.into(),
        ];
        assert_eq!(arguments(&options).unwrap(), want);
    }
}
