//! Runs the whole suite: what needs no privilege as we are, the rest as root, and the latter again
//! on Debian's stock kernels.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{build, env, fuzz, setup, ui, vm};

/// What `cargo xtask test` was asked for.
pub struct Options {
    /// Leave out what needs root and the kernel.
    pub quick: bool,
    /// Run only tests whose name contains this.
    pub filter: Option<String>,
}

/// Prepares everything and runs the tests; all parts run even where an earlier one fails.
pub fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    let binary = build::binary(false)?;

    ui::step("Unit, property and documentation tests");
    let start = Instant::now();
    let mut cargo = env::cargo();
    cargo.args([
        "test",
        "--workspace",
        "--exclude",
        "enforcer-tests",
        "--no-fail-fast",
    ]);
    cargo.args(&options.filter).env("ENFORCER_BIN", &binary);
    let (units, mut totals) = counted(&mut cargo)?;
    ui::note(&format!(
        "{} in {}",
        if units { "passed" } else { "FAILED" },
        ui::took(start)
    ));
    if options.quick {
        return verdict(&[("unit, property or documentation tests", units)], &totals);
    }

    ui::step("Kernel and namespace tests");
    mount_bpffs()?;
    let mut cargo = env::cargo();
    cargo.args(["test", "--package", "enforcer-tests", "--no-fail-fast"]);
    cargo.args(&options.filter);
    let told = [("ENFORCER_BIN", binary.into())];
    as_root(&mut cargo, "running the kernel tests", &told)?;
    let (kernel, more) = counted(&mut cargo)?;
    totals.add(&more);

    let went = |result: Result<()>| match result {
        Ok(()) => true,
        Err(error) => {
            ui::note(&format!("{error:#}"));
            false
        }
    };
    let guests = went(vm::run_all(options.filter.clone()));
    // Nobody who asks for one test waits for fuzzers.
    let fuzzed = options.filter.is_some() || went(fuzz::run(&fuzz::Options::of_tests()));
    let parts = [
        ("unit, property or documentation tests", units),
        ("kernel or namespace tests", kernel),
        ("kernel tests on stock kernels", guests),
        ("fuzzing", fuzzed),
    ];
    verdict(&parts, &totals)
}

/// Has the tests of this cargo run as root, with these variables. Cargo itself stays with the user,
/// so nothing in the target directory becomes root's.
pub fn as_root(cargo: &mut Command, why: &str, variables: &[(&str, OsString)]) -> Result<()> {
    cargo.envs(variables.iter().map(|(name, value)| (name, value)));
    let mut sudo = env::root_prefix(why)?;
    if sudo.is_empty() {
        return Ok(());
    }
    for (name, value) in variables {
        let mut pair = OsString::from(name);
        pair.push("=");
        pair.push(value);
        sudo.push(pair);
    }
    let words: Vec<String> = sudo
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let value = toml_array(&words);
    cargo.args(["--config", &format!("target.'cfg(unix)'.runner={value}")]);
    Ok(())
}

/// What the test runners counted.
#[derive(Debug, Default, PartialEq, Eq)]
struct Totals {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Totals {
    fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }

    /// Adds a line like `test result: ok. 4 passed; 0 failed; 1 ignored; …`; others are nothing.
    fn read(&mut self, line: &str) {
        let Some(counts) = line.trim_start().strip_prefix("test result: ") else {
            return;
        };
        for count in counts.split([';', '.']) {
            let mut words = count.split_whitespace();
            let (Some(Ok(number)), Some(what)) =
                (words.next().map(str::parse::<u64>), words.next())
            else {
                continue;
            };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

/// Runs cargo with its output passed on, and counts what the runners say.
fn counted(cargo: &mut Command) -> Result<(bool, Totals)> {
    let mut child = cargo
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", ui::describe(cargo)))?;
    let mut totals = Totals::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let line = line.context("cannot read the output of the tests")?;
            println!("{line}");
            totals.read(&line);
        }
    }
    Ok((child.wait()?.success(), totals))
}

/// Closes the output with the sums over all runners, whose own lines are many and end with those
/// of crates that have no tests.
fn verdict(parts: &[(&str, bool)], totals: &Totals) -> Result<()> {
    println!(
        "\n{} passed, {} failed, {} skipped",
        totals.passed, totals.failed, totals.ignored
    );
    let failed: Vec<_> = parts.iter().filter(|(_, fine)| !fine).collect();
    let names: Vec<_> = failed.iter().map(|(name, _)| *name).collect();
    if !names.is_empty() {
        bail!("failed: {}", names.join("; "));
    }
    if totals.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

/// Mounts bpffs where it is missing: containers and small images have none.
pub fn mount_bpffs() -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")?;
    let mounted = mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some("/sys/fs/bpf") && fields.next() == Some("bpf")
    });
    if mounted {
        return Ok(());
    }
    ui::note("mounting bpffs on /sys/fs/bpf");
    ui::run(env::as_root("mounting bpffs", "mount")?.args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))
}

fn toml_array(words: &[String]) -> String {
    let quoted: Vec<String> = words
        .iter()
        .map(|word| format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\"")))
        .collect();
    format!("[{}]", quoted.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_the_runners() {
        let mut totals = Totals::default();
        totals.read("test result: ok. 85 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out");
        totals.read("test result: FAILED. 9 passed; 2 failed; 0 ignored; 0 measured");
        totals.read("test something::passed ... ok");
        let want = Totals {
            passed: 94,
            failed: 2,
            ignored: 1,
        };
        assert_eq!(totals, want);
    }

    #[test]
    fn words_survive_as_toml() {
        let words = ["sudo".to_owned(), "A=b \"c\\".to_owned()];
        assert_eq!(toml_array(&words), r#"["sudo","A=b \"c\\"]"#);
    }
}
