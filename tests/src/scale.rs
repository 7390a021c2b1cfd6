//! How much and how patiently to test: `ENFORCER_TEST_SCALE=small` where every instruction is
//! emulated. It changes counts and times alone, never what is checked.

use std::{sync::LazyLock, time::Duration};

static SMALL: LazyLock<bool> =
    LazyLock::new(|| std::env::var("ENFORCER_TEST_SCALE").is_ok_and(|scale| scale == "small"));

/// How often to do something: in full, or where that would take minutes.
pub fn rounds(full: usize, small: usize) -> usize {
    if *SMALL { small } else { full }
}

/// The time that something may take which is promised within `limit`: emulation is some ten times
/// slower, but what takes a minute already waits for something else.
pub fn within(limit: Duration) -> Duration {
    if *SMALL {
        (limit * 10).min(limit + Duration::from_secs(60))
    } else {
        limit
    }
}

/// Whether to do also what takes many minutes: `ENFORCER_TEST_SCALE=thorough`.
pub fn thorough() -> bool {
    std::env::var("ENFORCER_TEST_SCALE").is_ok_and(|scale| scale == "thorough")
}
