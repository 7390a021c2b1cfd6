//! What `cargo xtask bench` is made of, besides what it measures: statistics, the report, the
//! bounds it is held to, and the raw system calls with an assembler for the programs it compares
//! with. Here and not beside the bench, so that the test runner sees the tests.

pub mod asm;
pub mod bounds;
pub mod bpf;
pub mod markdown;
pub mod report;
pub mod stats;
pub mod svg;
