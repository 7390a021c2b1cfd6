//! What a policy costs before it judges anything: compiling, swapping, changing it, memory.

mod compiling;
mod daemon;
mod swap;

use anyhow::Result;
use enforcer_tests::{
    big::{self, Shape},
    line_rate::report::Report,
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

use crate::Options;

/// The example of the documentation.
const HOSPITAL: &str = include_str!("../../../../segments/hospital.yaml");

/// Policies that are measured, smallest first.
const SHAPES: [(&str, Shape); 5] = [
    ("10 segments, 20 rules, 100 members", big::SMALL),
    ("100 segments, 10 000 rules, 1 000 members", big::MEDIUM),
    (
        "200 segments, 2 000 rules, 100 000 members",
        Shape {
            segments: 200,
            rules: 2_000,
            members: 100_000,
        },
    ),
    // As much as an image of 16 MiB holds.
    (
        "700 segments, 50 000 rules, 500 000 members",
        Shape {
            segments: 700,
            rules: 50_000,
            members: 500_000,
        },
    ),
    (
        "1 000 segments, 100 000 rules, 1 000 000 members",
        big::LARGE,
    ),
];

/// Those that are measured now.
fn shapes(options: &Options) -> impl Iterator<Item = (&'static str, Shape)> {
    let quick = options.quick;
    SHAPES
        .into_iter()
        .filter(move |(_, shape)| !quick || shape.members <= 1_000)
}

/// Measures all of it, on all processors: that is how the daemon runs.
pub fn run(options: &Options, report: &mut Report) -> Result<()> {
    let pinned = sched_getaffinity(Pid::from_raw(0))?;
    let mut all = CpuSet::new();
    for cpu in
        0..aya::util::nr_cpus().map_err(|(what, error)| anyhow::anyhow!("{what}: {error}"))?
    {
        all.set(cpu)?;
    }
    sched_setaffinity(Pid::from_raw(0), &all)?;
    compiling::run(options, report)?;
    swap::run(options, report)?;
    daemon::run(options, report)?;
    sched_setaffinity(Pid::from_raw(0), &pinned)?;
    Ok(())
}
