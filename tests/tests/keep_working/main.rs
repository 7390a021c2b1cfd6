//! What must keep working under default deny, and what must not pass for it: the protocols of a
//! link, failsafes, protocols above IP, packets of every size.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking"
)]

mod dhcp;
mod failsafe;
mod interfaces;
mod lab;
mod multicast;
mod neighbours;
mod policies;
mod protocols;
mod sizes;
mod standards;
