//! `enforcer.yaml` on the wire, and what the daemon learns of interfaces and addresses.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    netns::{Netns, Pair},
    traffic,
};
use serde_json::{Value, json};

const POLICY: &str = "\
version: 1
segments:
  here: { members: [{cidr: 10.1.0.0/24}, {cidr: \"fd01::/64\"}] }
rules:
  - { name: echo, from: [here], to: [host], services: [udp/7777] }
";

const ALL_ON: &str = "version: 1\n";

/// Replaces the settings and waits until the status shows what it must.
fn settle(daemon: &Daemon<'_>, settings: &str, shows: impl Fn(&Value) -> bool) {
    daemon.setup.write_settings(settings);
    wait_for("the settings", LONG, || {
        let status = daemon.status();
        assert_eq!(status["policy"]["last_error"], Value::Null);
        shows(&status["settings"]).then_some(())
    });
}

#[test]
fn an_essential_that_is_switched_off_is_denied_and_passes_again_when_it_is_on() {
    for (name, address, reason) in [
        ("arp", "10.1.0.1", "ethertype"),
        ("nd", "fd01::1", "default_deny"),
    ] {
        let pair = Pair::new();
        let off = format!("version: 1\nessentials: {{off: [{name}]}}\n");
        traffic::udp_echo(&pair.host, traffic::any(7777));
        let daemon = Setup::new(&pair.host, "eth0", POLICY)
            .with_settings(&off)
            .start();
        let status = daemon.status();
        assert_eq!(status["settings"]["essentials_off"], json!([name]));
        let to = (address.parse::<std::net::IpAddr>().unwrap(), 7777);
        let forget = || {
            pair.peer.ip("neigh flush dev eth0\n");
            pair.host.ip("neigh flush dev eth0\n");
        };
        forget();
        assert!(!traffic::udp_answers(&pair.peer, None, to), "{name} off");
        assert!(
            daemon.counted("tc_ingress", "denied", reason) > 0,
            "{name}: {}",
            daemon.status()
        );

        settle(&daemon, ALL_ON, |s| s["essentials_off"] == json!([]));
        assert!(traffic::udp_answers_soon(&pair.peer, to), "{name} on");

        let before = daemon.generation();
        daemon.setup.write_settings(&off);
        daemon.wait_swapped(before);
        forget();
        assert!(
            !traffic::udp_answers(&pair.peer, None, to),
            "{name} off again"
        );
    }
}

#[test]
fn interfaces_are_shown_for_what_they_are() {
    let namespace = Netns::new("kinds");
    let other = Netns::new("other");
    for name in ["eth1", "eth2"] {
        namespace.cable(name, &other, name);
    }
    namespace.ip("link add br0 type bridge\nlink set eth1 master br0\nlink set br0 up\n");
    let daemon = Setup::new(&namespace, "br0,eth*", POLICY).start();
    let interface = |status: &Value, name: &str| {
        let all = status["interfaces"].as_array().unwrap();
        all.iter().find(|i| i["name"] == name).cloned()
    };
    let status = daemon.status();
    let of = |name: &str| interface(&status, name).unwrap();
    assert_eq!(of("eth1")["description"], "port of br0");
    assert_eq!(of("br0")["description"], "bridge");
    assert_eq!(of("eth2")["description"], Value::Null);
    let mut slots = ["br0", "eth1", "eth2"].map(|name| of(name)["slot"].as_u64().unwrap());
    slots.sort_unstable();
    assert_eq!(slots, [1, 2, 3]);
    let warnings = status["warnings"].to_string();
    assert!(
        warnings.contains("br0 is enforced together with its ports (eth1)"),
        "{warnings}"
    );

    // One that leaves its bridge, and one that comes.
    namespace.ip("link set eth1 nomaster\n");
    wait_for("no port", LONG, || {
        (interface(&daemon.status(), "eth1")?["description"] == Value::Null).then_some(())
    });
    let slot = of("eth2")["slot"].clone();
    namespace.cable("eth3", &other, "eth3");
    namespace.ip("link set eth2 down\nlink set eth2 name eth9\n");
    wait_for("the other name", LONG, || {
        let status = daemon.status();
        interface(&status, "eth3")?;
        let renamed = interface(&status, "eth9")?;
        assert_eq!(renamed["slot"], slot);
        Some(())
    });
}

#[test]
fn a_tag_is_judged_on_its_device_where_both_are_enforced() {
    let pair = Pair::new();
    let device = |id: &str| {
        [
            "link", "add", "link", "eth0", "name", "guest", "type", "vlan", "id", id,
        ]
        .map(str::to_owned)
    };
    for (namespace, address) in [(&pair.host, "10.1.0.129/25"), (&pair.peer, "10.1.0.130/25")] {
        let arguments = device("20");
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        if let Err(why) = namespace.ask("ip", &arguments) {
            assert!(why.contains("Unknown device type"), "{why}");
            println!("SKIPPED: no VLAN devices on this kernel: {}", why.trim());
            return;
        }
        namespace.ip("link set guest up\n");
        namespace.addresses("guest", &[address]);
    }
    traffic::udp_echo(&pair.host, traffic::any(7777));
    let daemon = Setup::new(&pair.host, "eth0,guest", POLICY).start();
    let status = daemon.status();
    let all = status["interfaces"].as_array().unwrap();
    let guest = all.iter().find(|i| i["name"] == "guest").unwrap();
    assert_eq!(guest["description"], "vlan 20 on eth0");
    let to = (std::net::IpAddr::from([10, 1, 0, 129]), 7777);
    assert!(traffic::udp_answers_soon(&pair.peer, to));
    // The parent leaves what it would have judged to the device.
    assert!(
        daemon.counted("tc_ingress", "", "vlan_device") > 0,
        "{status}"
    );
    let judged = || daemon.counted("tc_ingress", "allowed", "rule_allow");
    let before = judged();
    assert!(traffic::udp_answers(&pair.peer, None, to));
    assert_eq!(judged(), before + 1);
    // Another device of the name: its tag is another one.
    pair.host.ip("link del guest\n");
    pair.host
        .ask("ip", &device("30").each_ref().map(String::as_str))
        .unwrap();
    pair.host.ip("link set guest up\n");
    wait_for("the other VLAN", LONG, || {
        let status = daemon.status();
        let all = status["interfaces"].as_array()?;
        let guest = all.iter().find(|i| i["name"] == "guest")?;
        (guest["description"] == "vlan 30 on eth0" && guest["enforced"] == true).then_some(())
    });
    let left = || daemon.counted("tc_ingress", "", "vlan_device");
    let before = left();
    assert!(!traffic::udp_answers(&pair.peer, None, to));
    assert_eq!(left(), before, "tag 20 is nobody's any more");
}

#[test]
fn an_address_is_own_once_the_network_has_not_refused_it() {
    let pair = Pair::new();
    let daemon = Setup::new(&pair.host, "eth0", POLICY).start();
    let verdict = |address: &str| {
        let output = daemon.ask(
            "explain",
            &[
                "--from",
                "fd01::2",
                "--to",
                address,
                "--service",
                "udp/7777",
                "-o",
                "json",
            ],
        );
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        answer["verdict"].as_str().unwrap().to_owned()
    };
    assert_eq!(verdict("fd01::1"), "ALLOWED");
    // A minute of asking the network whether somebody has it.
    pair.host.sysctl("ipv6/conf/eth0/accept_dad", "1");
    pair.host.sysctl("ipv6/conf/eth0/dad_transmits", "60");
    pair.host.ip("addr add fd01::77/64 dev eth0\n");
    let shown = pair
        .host
        .ask("ip", &["-6", "addr", "show", "dev", "eth0", "tentative"]);
    assert!(shown.unwrap().contains("fd01::77"), "it is tentative");
    // This one is not, and comes later: what it brings has seen the other as well.
    pair.host.ip("addr add fd01::78/64 dev eth0 nodad\n");
    wait_for("the address without question", LONG, || {
        (verdict("fd01::78") == "ALLOWED").then_some(())
    });
    assert_eq!(verdict("fd01::77"), "DENIED");
    pair.host
        .ip("addr del fd01::77/64 dev eth0\naddr add fd01::77/64 dev eth0 nodad\n");
    wait_for("the address", LONG, || {
        (verdict("fd01::77") == "ALLOWED").then_some(())
    });
}
