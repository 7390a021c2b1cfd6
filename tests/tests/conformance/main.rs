//! Odd frames on the wire, kind by kind: what arrives at a host behind the enforcer, what a host
//! without it would have taken, and that every denial is counted by its reason and told.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking"
)]

mod addresses;
mod bench;
mod devices;
mod extension_headers;
mod fragments;
mod ip_header;
mod layer2;
mod wire;
