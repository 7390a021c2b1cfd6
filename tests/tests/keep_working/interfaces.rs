//! Which interfaces are enforced, and how soon.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use enforcer_tests::{
    daemon::{LONG, Setup, wait_for},
    link::Delivered,
    netns::{Family, Netns, Pair},
    scale,
    traffic::{self, QUIET},
    wire::{self, Packets},
};
use serde_json::Value;

use crate::lab::{NOTHING, allowing};

fn interface(status: &Value, name: &str) -> Option<Value> {
    let all = status["interfaces"].as_array().unwrap();
    all.iter().find(|i| i["name"] == name).cloned()
}

#[test]
fn the_status_names_what_is_enforced_and_what_is_not() {
    let net = Pair::new();
    let other = Netns::new("other");
    let daemon = Setup::new(&net.host, "eth0,lan*", &allowing("ping")).start();
    assert_eq!(daemon.status()["socket_hooks"], "refuse");
    net.host.cable("wild0", &other, "eth1");
    // It is open, so a refusal by the socket hooks could be wrong: the status says so, and which.
    wait_for("the open interface to be named", LONG, || {
        daemon.status().to_string().contains("wild0").then_some(())
    });
    let status = daemon.status();
    assert!(interface(&status, "eth0").is_some_and(|i| i["enforced"] == true));
    assert!(interface(&status, "wild0").is_none_or(|i| i["enforced"] == false));
    assert_ne!(status["socket_hooks"], "refuse", "{status}");
    let text = daemon.ask("status", &[]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("wild0"), "{text}");
    // Through it anything passes.
    let far = IpAddr::from([10, 8, 0, 2]);
    net.host.addresses("wild0", &["10.8.0.1/24"]);
    other.addresses("eth1", &["10.8.0.2/24"]);
    traffic::udp_echo(&other, traffic::any(7000));
    assert!(traffic::udp_answers_soon(&net.host, (far, 7000)));
    // Renamed to what a pattern names, it is enforced like others.
    net.host
        .ip("link set wild0 down\nlink set wild0 name lan9\nlink set lan9 up\n");
    wait_for("the renamed interface", LONG, || {
        let found = interface(&daemon.status(), "lan9")?;
        (found["enforced"] == true).then_some(())
    });
    assert!(!traffic::udp_answers(&net.host, None, (far, 7000)));
    // And one that was named for a while is named no more when it is gone.
    net.host.ip("link del lan9\n");
    wait_for("the interface to be gone", LONG, || {
        (!daemon.status()["interfaces"].to_string().contains("lan9")).then_some(())
    });
}

#[test]
fn a_new_interface_is_enforced_within_a_second() {
    let net = Pair::new();
    let other = Netns::new("other");
    let daemon = Setup::new(&net.host, "eth0,lan*", NOTHING).start();
    net.host.cable("lan1", &other, "eth0");
    let start = Instant::now();
    let delivered = Delivered::new(&net.host, "lan1", 0x0800);
    let from = Packets::new(&other, "eth0", false);
    let links = (
        wire::link_address(&other, "eth0"),
        wire::link_address(&net.host, "lan1"),
    );
    let (a, b) = (Family::V4.address(7, 2), Family::V4.address(7, 1));
    let over = AtomicBool::new(false);
    // Datagrams that say when they were sent.
    let last = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let sent = u64::try_from(start.elapsed().as_micros()).unwrap();
                let packet = wire::udp((a, 4000), (b, 4000), &sent.to_be_bytes());
                let _ = from.try_send(&wire::ethernet(links.0, links.1, &packet));
                thread::sleep(Duration::from_millis(2));
            }
        });
        wait_for("the new interface to be enforced", LONG, || {
            let found = interface(&daemon.status(), "lan1")?;
            (found["enforced"] == true).then_some(())
        });
        // Some more, which must not arrive.
        wait_for("denials at the new interface", LONG, || {
            (daemon.counted("tc_ingress", "denied", "default_deny") > 10).then_some(())
        });
        over.store(true, Ordering::Relaxed);
        let mut last = Duration::ZERO;
        while let Some(frame) = delivered.next(QUIET) {
            let sent = u64::from_be_bytes(frame[42..50].try_into().unwrap());
            last = last.max(Duration::from_micros(sent));
        }
        last
    });
    let limit = scale::within(Duration::from_secs(1));
    assert!(last < limit, "a packet of {last:?} after it came up passed");
}
