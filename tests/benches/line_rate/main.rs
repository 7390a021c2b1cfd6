//! The line-rate bench: `cargo xtask bench`. Needs root.
//!
//! Three parts, each a module with one function
//!
//! ```text
//! pub fn run(options: &Options, report: &mut Report) -> anyhow::Result<()>
//! ```
//!
//! - `micro`: nanoseconds a packet, by BPF_PROG_TEST_RUN, beside the kernel's own maps;
//! - `macros`: packets a second in namespaces over veth, beside nothing, an empty program, nftables;
//! - `control`: compiling, swapping, changing members, memory, start.
//!
//! A part asks `options.quick` whether to take fewer rounds and leave the largest sizes out, and
//! tells the [`Report`]:
//!
//! - [`Report::ratio`]`(name, value, spread)`: one of the flat ratios, held to its bound in
//!   `bounds.json` if that has one. The spread is the distance between the quartiles as a share of
//!   the value; above 1 the ratio is called noisy and left out.
//! - [`Report::figure`]`(group, name, unit, value)`: a line of a table; `Report::measured` the same
//!   with a [`stats::Summary`], median and spread. A group is a table in `docs/performance.md`.
//! - [`Report::note`]`(text)`: what could not be measured, and why.
//!
//! [`stats::interleave`] measures subject and baseline in turn, and [`stats::Series`] does the rest.
//! The process is pinned to one CPU before the parts run; a part that wants others says so itself.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench: its output is what it prints"
)]

mod control;
mod machine;
mod macros;
mod micro;
mod record;

use std::{fs, path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use enforcer_tests::line_rate::{
    bounds::{Bounds, COMMITTED},
    report::Report,
};

/// What may be measured alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Nanoseconds a packet.
    Micro,
    /// Packets a second.
    Macro,
    /// Compiling, swapping, memory.
    Control,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Micro => "micro",
            Self::Macro => "macro",
            Self::Control => "control",
        }
    }
}

/// What to measure, and where to write it.
#[derive(Debug, Parser)]
#[command(about = "Measures the enforcer beside what the kernel has; as root")]
pub struct Options {
    /// Fewer rounds, no largest sizes; fails when a ratio is behind its bound
    #[arg(long)]
    pub quick: bool,
    /// Write everything measured to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Measure one part alone
    #[arg(long)]
    pub only: Option<Part>,
    /// Write the tables and plots of docs/performance.md
    #[arg(long, conflicts_with = "only")]
    pub record: bool,
    /// Bounds to hold the ratios to, instead of the committed ones
    #[arg(long, value_name = "FILE")]
    pub bounds: Option<PathBuf>,
    // What cargo says to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

type Run = fn(&Options, &mut Report) -> Result<()>;

const PARTS: [(Part, Run); 3] = [
    (Part::Micro, micro::run),
    (Part::Macro, macros::run),
    (Part::Control, control::run),
];

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all ratios that have a bound are within it.
fn run(options: &Options) -> Result<bool> {
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "this loads programs and makes namespaces: run it as root"
    );
    let bounds = match &options.bounds {
        Some(file) => {
            let text = fs::read_to_string(file);
            Bounds::parse(&text.with_context(|| format!("cannot read {}", file.display()))?)?
        }
        None => Bounds::parse(COMMITTED)?,
    };
    let before = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0))?;
    enforcer_tests::kernel::pin();
    let mut report = Report::default();
    for (part, run) in PARTS {
        if options.only.is_some_and(|only| only != part) {
            continue;
        }
        let start = Instant::now();
        report.section(part.name());
        run(options, &mut report).with_context(|| format!("the {part:?} part"))?;
        eprintln!("{part:?}: {:.0} s", start.elapsed().as_secs_f64());
    }
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &before)?;
    print!("{}", report.text());
    if let Some(file) = &options.json {
        let json = format!("{:#}\n", report.json(&machine::describe()));
        fs::write(file, json).with_context(|| format!("cannot write {}", file.display()))?;
    }
    if options.record {
        record::write(options, &report, &bounds)?;
    }
    let behind = bounds.behind(&report);
    for ratio in &behind {
        println!("BEHIND: {ratio}");
    }
    if options.only.is_none() {
        for name in bounds.unmeasured(&report) {
            println!("note: {name} has a bound and was not measured");
        }
    }
    Ok(behind.is_empty() || !options.quick)
}
