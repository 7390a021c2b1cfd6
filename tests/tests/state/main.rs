//! What the enforcer remembers of flows, and for how long: shapes of TCP and ICMP, interfaces that
//! flows arrive at, sessions and expiry, floods, and the books at the end of all that.
//!
//! One binary, because loading the programs takes seconds where they are emulated.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests and their helpers"
)]

mod arrivals;
mod balance;
mod common;
mod expiry;
mod floods;
mod icmp;
mod load;
mod sessions;
mod tcp_shapes;
mod timed_on_the_wire;
