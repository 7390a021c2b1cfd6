//! A flow table that is full of answered flows: what finds no room is counted and told.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::time::Duration;

use enforcer_tests::{
    daemon::{LONG, Setup, wait_for},
    netns::{Family, Pair},
    traffic,
};
use serde_json::{Value, json};

const POLICY: &str = r#"version: 1
segments:
  clients: { members: [{cidr: 10.1.0.96/27}] }
  server: { members: [{cidr: 10.1.0.1/32}] }
rules:
  - { name: names, from: [clients], to: [server], services: [udp/7000] }
"#;

/// The fewest that a table has room for; a host has a sixteenth of them for itself.
const FLOWS: u16 = 2048;
const HOSTS: u8 = 24;

#[test]
fn flows_that_find_no_room_are_told() {
    let net = Pair::new();
    let addresses: Vec<String> = (0..HOSTS)
        .map(|host| format!("10.1.0.{}/24", 100 + host))
        .collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    net.peer.addresses("eth0", &addresses);
    let setup = Setup::new(&net.host, "eth0", POLICY);
    let daemon = setup.with(&["--flows", &FLOWS.to_string()]).start();
    let server = Family::V4.address(1, 1);
    traffic::udp_echo(&net.host, (server, 7000));
    assert_eq!(
        daemon.status()["flows"],
        json!({ "capacity": FLOWS, "refused": 0 })
    );
    let said = || String::from_utf8(daemon.ask("status", &[]).stdout).unwrap();
    assert!(!said().contains("no room"), "{}", said());

    // Each waits for its answer, so that it is protected before the next one comes. More than there is
    // room for: some get none.
    let mut silent = 0;
    'all: for port in 2000.. {
        for host in 0..HOSTS {
            let from = Family::V4.address(1, 100 + host);
            let limit = Duration::from_millis(500);
            let socket = traffic::udp(&net.peer, (from, port), limit);
            socket.send_to(b"who", (server, 7000)).unwrap();
            silent += u32::from(socket.recv(&mut [0; 8]).is_err());
            if silent == 3 {
                break 'all;
            }
        }
        assert!(port < 2000 + FLOWS / u16::from(HOSTS) + 20, "room for all");
    }
    let refused = |status: &Value| status["flows"]["refused"].as_u64().unwrap();
    let status = wait_for("it is counted", LONG, || {
        let status = daemon.status();
        (refused(&status) > 0).then_some(status)
    });
    let warning = status["warnings"][0].as_str().unwrap();
    assert!(
        warning.contains("no room") && warning.contains("--flows 2048"),
        "{warning}"
    );
    assert!(said().contains("no room"), "{}", said());
    assert_eq!(status["state"], "enforcing");
}
