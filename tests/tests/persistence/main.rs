//! What is enforced outlives the daemon: killed, restarted, replaced by another build, taken off.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod beside;
mod detaching;
mod readonly;
mod refusals;
mod restarts;
mod tamper;

use enforcer_tests::{
    daemon::Setup,
    netns::Routed,
    numbers::{ALLOWED, FORBIDDEN},
    pins::Pins,
};

/// What the load of these tests may do, and may not.
fn policy(comment: &str) -> String {
    assert_ne!(ALLOWED, FORBIDDEN);
    format!(
        "version: 1\n\
         segments:\n\
         \x20 a: {{ members: [{{cidr: 10.1.0.0/24}}, {{cidr: \"fd01::/64\"}}] }}\n\
         \x20 b: {{ members: [{{cidr: 10.2.0.0/24}}, {{cidr: \"fd02::/64\"}}] }}\n\
         rules:\n\
         \x20 - {{ name: some{comment}, from: [a], to: [b], services: [udp/{ALLOWED}, tcp/{ALLOWED}] }}\n"
    )
}

/// A daemon on both interfaces of the router.
fn gateway<'a>(net: &'a Routed, pins: &Pins) -> Setup<'a> {
    Setup::new(&net.gateway, "gw-*", &policy(""))
        .with(&["--socket-hooks", "off"])
        .pinned(pins.path())
}
