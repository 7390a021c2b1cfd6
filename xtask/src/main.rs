//! The project's verbs. Run as `cargo xtask VERB`; the same ones serve people and CI.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a developer's tool: its output is what it prints"
)]

mod bench;
mod build;
mod demo;
mod dist;
mod env;
mod fuzz;
mod lint;
mod setup;
mod soak;
mod stamp;
mod test;
mod tidy;
mod toolchain;
mod ui;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "The project's verbs",
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what the kernel side and the guests need and this machine lacks
    Setup,
    /// Build the eBPF objects and the enforcer
    Build {
        /// With optimisations
        #[arg(long)]
        release: bool,
        /// Stop after the eBPF objects
        #[arg(long)]
        objects: bool,
    },
    /// Check formatting, purity and clippy, host and kernel side
    Lint,
    /// Run all tests; kernel and namespace tests as root, and again on stock kernels
    Test {
        /// Only what needs neither root nor the kernel
        #[arg(long)]
        quick: bool,
        /// Only tests whose name contains this
        filter: Option<String>,
    },
    /// Measure the enforcer beside what the kernel has, as root
    Bench(bench::Options),
    /// Fuzz packets, policies and records on this machine
    Fuzz(fuzz::Options),
    /// Reload every second under load for minutes, and see that nothing grows, as root
    Soak(soak::Options),
    /// From a bare machine to a running hospital: enforce, try, deny, revoke
    Demo(demo::Options),
    /// Build the static binary into dist/
    Dist,
    /// Run the kernel tests on Debian's stock kernels, in virtual machines
    Vm(vm::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().verb {
        Verb::Setup => setup::run(),
        Verb::Build { objects: true, .. } => build::objects(),
        Verb::Build { release, .. } => build::binary(release).map(drop),
        Verb::Lint => lint::run(),
        Verb::Test { quick, filter } => test::run(&test::Options { quick, filter }),
        Verb::Bench(options) => bench::run(&options),
        Verb::Fuzz(options) => fuzz::run(&options),
        Verb::Soak(options) => soak::run(&options),
        Verb::Demo(options) => demo::run(&options),
        Verb::Dist => dist::run(),
        Verb::Vm(options) => vm::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{} {error:#}", ui::Paint::stderr().red("error:"));
            ExitCode::FAILURE
        }
    }
}
