//! Nanoseconds a packet above an empty program, by BPF_PROG_TEST_RUN on the deployed `tc_ingress`.
//!
//! One frame again and again is one hot flow. Many flows come of a [`prologue`] that rewrites the
//! packet and tail-calls the program; the same prologue in front of an empty program is taken off.
//! Before anything is timed, the program's own counters must say that the packets got the verdict
//! that the figure is about.

mod flows;
mod frames;
mod hot;
pub mod names;
mod policies;
mod prologue;
mod rounds;
mod sizes;
mod subject;
mod units;

use std::time::Instant;

use anyhow::Result;
use enforcer::dataplane::flows::DEFAULT_FLOWS;
use enforcer_common::verdict::Reason;
use enforcer_tests::line_rate::{
    bpf::Program,
    report::Report,
    stats::{Series, Summary},
};

use crate::Options;
use policies::Size;
use subject::Subject;

/// Flows of the table, as a daemon has it that nobody told otherwise, and elements of the LRU hash
/// whose insertions are the unit.
const TABLE: u32 = DEFAULT_FLOWS;

/// The tables of the report.
pub mod group {
    /// One frame, again and again.
    pub const HOT: &str = "One flow";
    /// Established flows in random order.
    pub const FLOWS: &str = "Established flows in random order, by their number";
    /// Ever new ones.
    pub const NEW: &str = "Ever new flows";
    /// By rules.
    pub const RULES: &str = "Rules";
    /// By members.
    pub const MEMBERS: &str = "Member addresses";
}

/// What all of it shares.
struct Bench<'a> {
    options: &'a Options,
    report: &'a mut Report,
    rounds: usize,
    /// Packets of one measurement.
    packets: u32,
    empty: Program,
}

impl Bench<'_> {
    fn pick<T>(&self, quick: T, full: T) -> T {
        if self.options.quick { quick } else { full }
    }

    fn nanoseconds(&mut self, group: &str, name: &str, series: &Series) {
        self.report.measured(group, name, "ns", series.summary());
    }

    fn ratio(&mut self, name: &str, subject: &Series, unit: &Series) {
        let Summary { median, spread } = subject.over(unit).summary();
        self.report.ratio(name, median, spread);
    }

    /// Whether all but a thousandth of the packets of a run get this verdict; a note if not.
    fn holds(
        &mut self,
        what: &str,
        subject: &Subject,
        reason: Reason,
        program: &Program,
        frame: &[u8],
        packets: u32,
    ) -> Result<bool> {
        let share = subject.share(reason, || Ok(program.run(frame, packets).map(drop)?))?;
        let holds = share > 0.999;
        if !holds {
            let (share, reason) = (share * 100.0, reason.name());
            self.report.note(format!(
                "{what}: only {share:.1} % of the packets are {reason}; left out"
            ));
        }
        Ok(holds)
    }
}

/// Whether the rules allow any packet that a program hands to `verdict`.
fn allows(program: &Program, frame: &[u8]) -> Result<()> {
    for _ in 0..100 {
        let action = program.run(frame, 1)?.action;
        anyhow::ensure!(action == -1, "the rules say {action}, not that it passes");
    }
    Ok(())
}

/// Measures all of it.
pub fn run(options: &Options, report: &mut Report) -> Result<()> {
    let mut bench = Bench {
        rounds: if options.quick { 9 } else { 31 },
        packets: if options.quick { 50_000 } else { 100_000 },
        options,
        report,
        empty: units::empty()?,
    };
    let image = subject::image(Size::BASE)?;
    let mut subject = Subject::load(image.words().len(), TABLE)?;
    subject.apply(&image)?;
    timed(group::HOT, || hot::run(&mut bench, &subject))?;
    timed(group::FLOWS, || flows::run(&mut bench, &mut subject))?;
    timed("Sizes", || sizes::run(&mut bench, &mut subject))
}

/// Says how long it took, for those who wait.
fn timed(what: &str, run: impl FnOnce() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    run()?;
    eprintln!("  {what}: {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
