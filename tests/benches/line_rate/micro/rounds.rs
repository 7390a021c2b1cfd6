//! Lanes that run programs on frames, measured together.

use anyhow::{Context as _, Result};
use enforcer_tests::line_rate::{
    bpf::Program,
    stats::{self, Lane, Series},
};

/// A program, a frame, and how often.
pub struct Runner<'a> {
    program: &'a Program,
    frame: &'a [u8],
    /// Packets of one measurement, in so many runs.
    packets: u32,
    runs: u32,
    /// Packets before it that do not count, for the caches.
    warm: u32,
    /// Called between runs.
    between: Option<Box<dyn FnMut() + 'a>>,
}

impl<'a> Runner<'a> {
    /// A measurement of `packets` packets, after some that do not count.
    pub fn new(program: &'a Program, frame: &'a [u8], packets: u32) -> Self {
        Self {
            program,
            frame,
            packets,
            runs: 1,
            warm: packets / 10,
            between: None,
        }
    }

    /// With so many packets for the caches, instead of a tenth.
    pub fn warm(mut self, packets: u32) -> Self {
        self.warm = packets;
        self
    }

    /// In several runs, and something that does not count between them.
    pub fn between(mut self, runs: u32, what: impl FnMut() + 'a) -> Self {
        self.runs = runs;
        self.between = Some(Box::new(what));
        self
    }

    fn lane(mut self) -> Lane<'a, anyhow::Error> {
        Box::new(move || {
            if self.warm > 0 {
                self.program.run(self.frame, self.warm)?;
            }
            let mut sum = 0.0;
            for _ in 0..self.runs {
                if let Some(between) = &mut self.between {
                    between();
                }
                let ran = self.program.run(self.frame, self.packets / self.runs)?;
                sum += ran.ns;
            }
            Ok(sum / f64::from(self.runs))
        })
    }
}

/// Measures all of them in turn; a series for each, in nanoseconds a packet.
pub fn measure<const N: usize>(rounds: usize, runners: [Runner<'_>; N]) -> Result<[Series; N]> {
    let mut lanes = runners.map(Runner::lane);
    let series = stats::interleave(rounds, &mut lanes)?;
    let series: Option<[Series; N]> = series.try_into().ok();
    series.context("a series for each lane")
}
