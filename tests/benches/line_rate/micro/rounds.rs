//! Lanes that run programs on frames, measured together.

use anyhow::{Context as _, Result};
use enforcer_tests::line_rate::{
    bpf::Program,
    stats::{self, Lane, Series},
};

/// Packets of a window: about a millisecond, within which seldom anything else gets the CPU.
const WINDOW: u32 = 5_000;

/// A program, a frame, and how often.
pub struct Runner<'a> {
    program: &'a Program,
    frame: &'a [u8],
    /// Packets of one measurement, in so many windows.
    packets: u32,
    windows: u32,
    /// Packets before it that do not count, for the caches.
    warm: u32,
    /// Called before each window.
    between: Option<Box<dyn FnMut() + 'a>>,
}

impl<'a> Runner<'a> {
    /// A measurement of `packets` packets, after some that do not count.
    pub fn new(program: &'a Program, frame: &'a [u8], packets: u32) -> Self {
        Self {
            program,
            frame,
            packets,
            windows: (packets / WINDOW).max(1),
            warm: packets / 10,
            between: None,
        }
    }

    /// With so many packets for the caches, instead of a tenth.
    pub fn warm(mut self, packets: u32) -> Self {
        self.warm = packets;
        self
    }

    /// In so many windows, and something that does not count before each.
    pub fn between(mut self, windows: u32, what: impl FnMut() + 'a) -> Self {
        self.windows = windows;
        self.between = Some(Box::new(what));
        self
    }

    /// The median of the windows.
    fn lane(mut self) -> Lane<'a, anyhow::Error> {
        Box::new(move || {
            if self.warm > 0 {
                self.program.run(self.frame, self.warm)?;
            }
            let mut windows = Vec::new();
            for _ in 0..self.windows {
                if let Some(between) = &mut self.between {
                    between();
                }
                let packets = self.packets / self.windows;
                windows.push(self.program.run(self.frame, packets)?.ns);
            }
            Ok(Series::new(windows).median())
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
