//! Part of the bench; see the top of `main.rs`.

use anyhow::Result;
use enforcer_tests::line_rate::report::Report;

use crate::Options;

/// Measures nothing yet.
pub fn run(_options: &Options, _report: &mut Report) -> Result<()> {
    Ok(())
}
