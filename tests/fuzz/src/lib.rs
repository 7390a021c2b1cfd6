//! Coverage-guided fuzzers, one binary a target. What they run and what must hold is in
//! `enforcer_tests::fuzz`; how they are built and started, in `cargo xtask fuzz`.

use enforcer_tests::fuzz::{TARGETS, Target};

/// The target of this name.
///
/// # Panics
/// When there is none.
#[must_use]
#[allow(clippy::panic, reason = "a test program")]
pub fn target(name: &str) -> &'static Target {
    let found = TARGETS.iter().find(|target| target.name == name);
    found.unwrap_or_else(|| panic!("no target {name}"))
}
