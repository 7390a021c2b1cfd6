//! The deployed program, with a policy.

use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result};
use enforcer::{
    compile::{self, Image, Options},
    dataplane::Dataplane as _,
    policy::model::Environment,
};
use enforcer_common::{
    image::{SIZE_CLASSES, essential},
    verdict::{Hook, Reason},
};
use enforcer_tests::{
    kernel::{Programs, generation},
    line_rate::bpf::Program,
};

use super::policies::{self, Size};

/// Compiles the policy of this size.
///
/// # Errors
/// When the compiler takes no policy of this size.
pub fn image(size: Size) -> Result<Image> {
    let options = Options {
        generation: generation(),
        essentials: essential::ALL,
        ..Options::default()
    };
    let policy = policies::policy(size);
    Ok(compile::compile(
        &policy,
        &Environment::default(),
        &options,
    )?)
}

fn program(programs: &Programs, name: &'static str) -> Result<Program> {
    let program = programs.dataplane.program(name).context(name)?;
    Ok(Program::of(program.fd()?.as_fd().try_clone_to_owned()?))
}

/// The loaded programs, of which `tc_ingress` is measured.
pub struct Subject {
    programs: Programs,
    /// `tc_ingress`.
    pub program: Program,
    /// `verdict`: what the rules say, and nothing else.
    pub verdict: Program,
}

impl Subject {
    /// Loads the size class that has room for `words` words, with a table of `flows`.
    pub fn load(words: usize, flows: u32) -> Result<Self> {
        let programs = Programs::load_for(words, flows);
        let program = program(&programs, "tc_ingress")?;
        let verdict = self::program(&programs, "verdict")?;
        Ok(Self {
            programs,
            program,
            verdict,
        })
    }

    /// Words of the smallest size class that has room for so many.
    pub fn class(words: usize) -> usize {
        let fits = SIZE_CLASSES.iter().map(|class| *class as usize);
        fits.filter(|class| *class >= words).min().unwrap_or(words)
    }

    /// Words of an image that it takes.
    pub fn room(&self) -> usize {
        self.programs.dataplane.image_words() as usize
    }

    /// Swaps the policy.
    pub fn apply(&mut self, image: &Image) -> Result<()> {
        Ok(self.programs.dataplane.apply(image)?)
    }

    /// Reads the records that are there, so that there is room for others.
    pub fn drain(&mut self) -> usize {
        self.programs.drain().len()
    }

    /// Runs something, and returns which share of its packets got this reason at ingress.
    pub fn share(&self, reason: Reason, run: impl FnOnce() -> Result<()>) -> Result<f64> {
        let count = |reason: Option<Reason>| -> u64 {
            let counters = self.programs.counters();
            let here = counters
                .packets
                .iter()
                .filter(|c| c.hook == Hook::TcIngress);
            let of = here.filter(|c| reason.is_none_or(|reason| c.reason == reason));
            of.map(|c| c.packets).sum()
        };
        let before = (count(Some(reason)), count(None));
        run()?;
        let after = (count(Some(reason)), count(None));
        Ok((after.0 - before.0) as f64 / (after.1 - before.1).max(1) as f64)
    }
}
