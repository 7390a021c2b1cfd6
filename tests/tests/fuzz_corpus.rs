//! What the fuzzers found worth keeping, once more, without a fuzzer: every committed input and
//! every seed of every target.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::panic::catch_unwind;

use enforcer_tests::fuzz::{self, TARGETS};

fn replay(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let kept = fuzz::corpus(name);
    assert!(kept.len() > 20, "the corpus of {name} is gone");
    let mut failed = Vec::new();
    for (path, bytes) in &kept {
        if catch_unwind(|| (target.run)(bytes)).is_err() {
            failed.push(path);
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
    for seed in (target.seeds)() {
        (target.run)(&seed);
    }
}

#[test]
fn packets_of_the_corpus_keep_the_rules() {
    replay("packets");
}

#[test]
fn policies_of_the_corpus_mean_what_they_say() {
    replay("policy");
}

#[test]
fn records_of_the_corpus_reach_their_readers() {
    replay("events");
}
