//! The flow table: what it keeps, what it forgets, and for whom.
//!
//! The same behaviour of a hash map without bounds, of the programs' table in memory of the host,
//! and of the loaded programs; then what is the table's own: who is evicted, the share of an
//! opener, counters that wrap, and readers next to writers.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests and their helpers"
)]

mod any_table;
mod common;
mod eviction;
mod interleavings;
mod loaded;
mod model;
mod moves;
mod operations;
mod packets;
mod races;
mod room;
