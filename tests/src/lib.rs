//! Shared helpers of the test suite: frames, programs under BPF_PROG_TEST_RUN, namespaces.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test helper that fails is a failed test"
)]

pub mod big;
pub mod calls;
pub mod child;
pub mod daemon;
pub mod frame;
pub mod fuzz;
pub mod host;
pub mod inside;
pub mod kernel;
pub mod line_rate;
pub mod link;
pub mod load;
pub mod memory;
pub mod netns;
pub mod nft;
pub mod numbers;
pub mod pins;
pub mod rival;
pub mod scale;
pub mod seen;
pub mod traffic;
pub mod two;
pub mod user;
pub mod verifier;
pub mod wire;
