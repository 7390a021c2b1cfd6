//! What a daemon has seen: denials by what they say, counters by how far they moved.

use std::{thread, time::Duration};

use serde_json::Value;

use crate::daemon::{Daemon, LONG, wait_for};

/// As long as nothing moves.
const STILL: Duration = Duration::from_millis(15);

/// Every denial so far, oldest first.
pub fn denials(daemon: &Daemon<'_>) -> Vec<Value> {
    daemon.denials(&["--last", "10000"])
}

/// The denial of which `is` is true, now or soon.
pub fn denial(daemon: &Daemon<'_>, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    wait_for(&format!("the denial of {what}"), LONG, || {
        denials(daemon).into_iter().find(&is)
    })
}

/// Whether a denial has all of these fields.
pub fn has(denial: &Value, fields: &Value) -> bool {
    let mut fields = fields.as_object().unwrap().iter();
    fields.all(|(name, value)| &denial[name] == value)
}

/// The denial with these fields, now or soon.
pub fn denied(daemon: &Daemon<'_>, fields: &Value) -> Value {
    denial(daemon, &fields.to_string(), |denial| has(denial, fields))
}

/// By how much counters move while `work` runs, and until they stand still: hook, outcome, reason
/// of each; an empty word matches all.
pub fn moved<const N: usize>(
    daemon: &Daemon<'_>,
    counters: [(&str, &str, &str); N],
    work: impl FnOnce(),
) -> [u64; N] {
    let read = || {
        let status = daemon.status();
        let all = status["counters"].as_array().unwrap();
        let is = |word: &str, value: &Value| word.is_empty() || value == word;
        counters.map(|(hook, outcome, reason)| {
            all.iter()
                .filter(|c| is(hook, &c["hook"]) && is(outcome, &c["outcome"]))
                .filter(|c| is(reason, &c["reason"]))
                .map(|c| c["packets"].as_u64().unwrap())
                .sum::<u64>()
        })
    };
    let before = read();
    work();
    // What a busy machine has sent may not be judged yet.
    let mut last = read();
    let after = wait_for("the counters to stand still", LONG, || {
        thread::sleep(STILL);
        let now = read();
        (std::mem::replace(&mut last, now) == now).then_some(now)
    });
    std::array::from_fn(|at| after[at] - before[at])
}

/// Says why a test, or a part of one, is not run on this kernel.
#[allow(clippy::print_stdout, reason = "the runner of the tests looks for it")]
pub fn skipped(reason: &str) {
    println!("SKIPPED: {}", reason.trim());
}
