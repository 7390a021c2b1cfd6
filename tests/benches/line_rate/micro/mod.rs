//! Nanoseconds a packet above an empty program, by BPF_PROG_TEST_RUN.

mod frames;
mod policies;
mod prologue;
mod subject;
mod units;

use anyhow::Result;
use enforcer_common::verdict::Reason;
use enforcer_tests::line_rate::{
    bpf::Program,
    report::Report,
    stats::{Lane, interleave},
};

use crate::Options;
use frames::Family;
use policies::Size;
use subject::Subject;

/// Measures all of it.
pub fn run(options: &Options, report: &mut Report) -> Result<()> {
    let image = subject::image(Size::BASE)?;
    let mut subject = Subject::load(image.words().len())?;
    subject.apply(&image)?;
    let empty = units::empty()?;
    let unit = units::lru_hit(40, 1)?;
    let frame = Family::V4.request();
    let reply = Family::V4.reply();
    subject.program.run(&frame, 1)?;
    subject.program.run(&reply, 1)?;
    let share = subject.share(Reason::Established, || {
        subject.program.run(&frame, 1000)?;
        Ok(())
    })?;
    anyhow::ensure!(share == 1.0, "established: {share}");
    let times = 100_000;
    let rounds = if options.quick { 7 } else { 21 };
    let lane = |program: &'_ Program| -> Lane<'_, anyhow::Error> {
        let program = program.again();
        let frame = &frame;
        Box::new(move || {
            Ok(program
                .as_ref()
                .map_err(|e| std::io::Error::from(e.kind()))?
                .run(frame, times)?
                .ns)
        })
    };
    let mut lanes = [
        lane(&empty),
        lane(&subject.program),
        lane(&unit.baseline),
        lane(&unit.subject),
    ];
    let got = interleave(rounds, &mut lanes)?;
    let established = got[1].minus(&got[0]);
    let hit = got[3].minus(&got[2]);
    report.measured(
        "micro",
        "established, one flow",
        "ns",
        established.summary(),
    );
    report.measured("micro", "LRU hit, one key", "ns", hit.summary());
    let ratio = established.over(&hit).summary();
    report.ratio("established_hot_vs_lru", ratio.median, ratio.spread);
    Ok(())
}
