//! Debian's stock kernels in QEMU, and the kernel tests on them.
//!
//! A guest is a kernel and an initramfs with static test binaries; results come out of a serial
//! port. No disk, no network, no root.

mod archive;
mod cost;
mod guest;
mod initramfs;
mod kernels;
mod qemu;
mod queue;
mod suite;
mod workers;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use self::cost::Table;
use self::guest::{Cost, Outcome, Transcript};
use self::kernels::Kernel;
use self::qemu::Accel;
use self::suite::Suite;
pub use self::suite::bench;
use crate::{env, setup, ui};

/// What `cargo xtask vm` was asked for.
#[derive(clap::Args, Default)]
pub struct Options {
    /// The kernel to boot; both, side by side, if not given
    #[arg(long, value_enum)]
    kernel: Option<Kernel>,
    /// Only tests whose `binary::name` contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Of the newer kernel only what depends on the kernel, as `cargo xtask test` has it
    #[arg(long, conflicts_with = "filter")]
    quick: bool,
    /// Write every test's outcome here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Who executes the guests' instructions [default: the processor where that works]
    #[arg(long, value_enum)]
    accel: Option<Accel>,
    /// Write what the verifier went through, here and there, to docs/verifier-cost.md
    #[arg(long)]
    record: bool,
}

/// True where guests can run: their tests are built for x86-64, with this machine's tools.
pub fn is_possible() -> bool {
    std::env::consts::ARCH == "x86_64"
}

/// Installs what is missing: the emulator, the tools in the guests, the kernels. Says nothing when
/// all is there, and asks no network then.
pub fn ensure_installed() -> Result<()> {
    let mut packages = initramfs::missing_packages();
    if env::find_program(qemu::QEMU).is_none() {
        packages.insert("qemu-system-x86");
    }
    if !packages.is_empty() {
        ui::step("Installing QEMU and what its guests need");
        setup::debian_install(&packages.into_iter().collect::<Vec<_>>())?;
    }
    for kernel in Kernel::ALL {
        if kernels::find(kernel)?.is_none() {
            kernels::install(kernel)?;
        }
    }
    Ok(())
}

/// The kernels that are installed, as `setup` lists them.
pub fn installed() -> Result<Vec<String>> {
    let mut releases = Vec::new();
    for kernel in Kernel::ALL {
        releases.extend(kernels::find(kernel)?.map(|found| found.release));
    }
    Ok(releases)
}

/// What came of a kernel, in all of its guests.
struct Run {
    kernel: Kernel,
    accel: Accel,
    transcript: Transcript,
    /// Tests that the host knows of and no guest ran.
    missing: Vec<String>,
    /// From the first guest's start to the last one's end.
    took: Duration,
}

impl Run {
    fn count(&self, word: &str) -> usize {
        let tests = self.transcript.tests.iter();
        tests.filter(|test| test.outcome.word() == word).count()
    }

    fn problems(&self) -> usize {
        let too_costly = cost::excessive(&self.transcript.costs).len();
        self.count("FAILED") + self.transcript.crashes.len() + self.missing.len() + too_costly
    }

    fn json(&self) -> Value {
        let tests = self.transcript.tests.iter().map(|test| {
            let mut line = json!({
                "name": test.name,
                "outcome": test.outcome.word(),
                "seconds": test.seconds,
            });
            match &test.outcome {
                Outcome::Skipped(reason) => line["reason"] = json!(reason),
                Outcome::Failed(output) => line["output"] = json!(output),
                Outcome::Ok | Outcome::Ignored => {}
            }
            line
        });
        let programs = self.transcript.costs.iter().map(|cost| {
            json!({
                "name": cost.program,
                "instructions": cost.instructions,
                "stack": cost.stack,
            })
        });
        json!({
            "kernel": self.kernel.name(),
            "release": self.transcript.release,
            "accel": self.accel.name(),
            "seconds": self.took.as_secs_f64(),
            "tests": tests.collect::<Vec<_>>(),
            "missing": self.missing,
            "crashes": self.transcript.crashes,
            "programs": programs.collect::<Vec<_>>(),
        })
    }

    /// What went wrong, and what was left out.
    fn report(&self) {
        let name = self.kernel.name();
        for test in &self.transcript.tests {
            match &test.outcome {
                Outcome::Failed(_) => println!("{name}: {} FAILED", test.name),
                Outcome::Skipped(reason) => println!("{name}: {} skipped: {reason}", test.name),
                Outcome::Ok | Outcome::Ignored => {}
            }
        }
        for crash in &self.transcript.crashes {
            println!("\n---- {name}: {crash}");
        }
        for missing in &self.missing {
            println!("{name}: {missing} did not run");
        }
        for costly in cost::excessive(&self.transcript.costs) {
            println!("{name}: {costly}");
        }
        println!(
            "{name} ({}, {}): {} passed, {} failed, {} skipped, {} ignored, {} missing, {} crashes, in {:.0} s",
            self.transcript.release.as_deref().unwrap_or("did not boot"),
            self.accel.name(),
            self.count("ok"),
            self.count("FAILED"),
            self.count("skipped"),
            self.count("ignored"),
            self.missing.len(),
            self.transcript.crashes.len(),
            self.took.as_secs_f64(),
        );
    }
}

/// Tests that were to run and are not in the transcript.
fn missing(expected: impl Iterator<Item = String>, transcript: &Transcript) -> Vec<String> {
    let ran: BTreeSet<&str> = transcript.tests.iter().map(|t| t.name.as_str()).collect();
    expected
        .filter(|name| !ran.contains(name.as_str()))
        .collect()
}

/// Runs the suite on every kernel, as a part of all tests: a filter may leave nothing to do.
pub fn run_all(filter: Option<String>) -> Result<()> {
    if !is_possible() {
        ui::note("no stock kernels: their guests are x86-64 machines, and this is none");
        return Ok(());
    }
    ensure_installed()?;
    let suite = suite::build(filter.as_deref())?;
    if suite.count() == 0 {
        return Ok(());
    }
    let options = Options {
        // Who asks for a test wants it everywhere.
        quick: filter.is_none(),
        ..Options::default()
    };
    run_suite(&options, &suite)
}

/// The `vm` verb.
pub fn run(options: &Options) -> Result<()> {
    ensure!(
        is_possible(),
        "the guests are x86-64 machines, and so must this one be"
    );
    ensure_installed()?;
    let suite = suite::build(options.filter.as_deref())?;
    ensure!(suite.count() > 0, "no test of that name");
    run_suite(options, &suite)
}

/// Boots the kernels, some guests at a time, and runs the suite on each.
fn run_suite(options: &Options, suite: &Suite) -> Result<()> {
    let kernels: Vec<Kernel> = match options.kernel {
        Some(kernel) => vec![kernel],
        None => Kernel::ALL.into(),
    };
    let accel = match options.accel {
        Some(accel) => accel,
        None => Accel::best(&kernels::get(kernels[0])?.image),
    };
    let suites: Vec<(Kernel, Suite)> = kernels
        .iter()
        .map(|kernel| (*kernel, suite.on(*kernel, options.quick)))
        .collect();
    let all: Vec<_> = suites
        .iter()
        .map(|(kernel, suite)| format!("{} ({} tests)", kernel.name(), suite.count()))
        .collect();
    ui::step(&format!(
        "Kernel tests on Linux {}, under {}",
        all.join(" and "),
        accel.name()
    ));
    let runs = workers::run(&suites, accel)?;
    for run in &runs {
        run.report();
    }
    if let Some(path) = &options.json {
        let all = runs.iter().map(Run::json).collect::<Vec<_>>();
        fs::write(path, serde_json::to_string_pretty(&all)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    compare_costs(options, &runs, suite)?;
    let problems: usize = runs.iter().map(Run::problems).sum();
    if problems > 0 {
        bail!("{problems} problems on stock kernels");
    }
    Ok(())
}

/// Compares what the verifier did with what is recorded, or records it.
fn compare_costs(options: &Options, runs: &[Run], suite: &Suite) -> Result<()> {
    let mut table = Table::recorded()?;
    if !options.record {
        for run in runs {
            for difference in table.differences(run.kernel.name(), &run.transcript.costs) {
                ui::note(&format!(
                    "{}: {difference} verified instructions (see `cargo xtask vm --record`)",
                    run.kernel.name()
                ));
            }
        }
        return Ok(());
    }
    for run in runs {
        ensure!(
            !run.transcript.costs.is_empty(),
            "no test of {} measured what the verifier did",
            run.kernel.name()
        );
        table.replace(run.kernel.name(), &run.transcript.costs);
    }
    let (release, costs) = costs_here(suite)?;
    table.replace(&release, &costs);
    table.write()?;
    ui::note(&format!("recorded in {}", Table::path().display()));
    Ok(())
}

/// Runs the measuring test on this machine's kernel; its version, and what the test printed.
fn costs_here(suite: &Suite) -> Result<(String, Vec<Cost>)> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let version: Vec<_> = release.split(['.', '-']).take(2).collect();
    let binary = suite
        .binaries
        .iter()
        .find(|binary| binary.name == "programs")
        .context("the filter leaves out the test that measures")?;
    let program = binary.path.to_string_lossy();
    let output = env::as_root("measuring the verifier's work here", &program)?
        .args(["the_verifier", "--nocapture"])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "on this machine:\n{text}");
    Ok((
        version.join("."),
        text.lines().filter_map(guest::cost).collect(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_that_the_guest_did_not_run_is_missing() {
        let mut transcript = Transcript::default();
        transcript.read("@vm run flow");
        transcript.read(r#"{ "type": "test", "event": "started", "name": "a" }"#);
        transcript.read(r#"{ "type": "test", "name": "a", "event": "ok" }"#);
        transcript.read(r#"{ "type": "test", "event": "started", "name": "b" }"#);
        let expected = ["flow::a", "flow::b", "swap::a"].map(str::to_owned);
        let missing = missing(expected.into_iter(), &transcript);
        assert_eq!(missing, ["flow::b", "swap::a"]);
    }
}
