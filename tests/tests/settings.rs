//! `enforcer.yaml` on the wire, and what the daemon learns of interfaces and addresses.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{net::IpAddr, os::fd::AsRawFd as _};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    frame,
    netns::{Netns, Pair},
    traffic,
};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
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
        let to = (address.parse::<IpAddr>().unwrap(), 7777);
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

const CLOSED: &str = "\
version: 1
segments:
  here: { members: [{cidr: 10.1.0.0/24}, {cidr: \"fd01::/64\"}] }
rules:
  - { name: nothing, from: [any], to: [any], services: [any], action: deny }
";

const WAY_IN: &str = "\
version: 1
failsafe:
  - { name: admin, sources: [10.1.0.2/32, \"fd01::2/128\"], ports: [tcp/2222, udp/7777], interfaces: [eth0] }
";

#[test]
fn no_policy_cuts_a_failsafe_and_it_opens_nothing_else() {
    let pair = Pair::new();
    pair.peer.addresses("eth0", &["10.1.0.9/24"]);
    traffic::udp_echo(&pair.host, traffic::any(7777));
    traffic::udp_echo(&pair.host, traffic::any(7778));
    traffic::udp_echo(&pair.peer, traffic::any(7777));
    traffic::tcp_echo(&pair.host, 2222);
    let daemon = Setup::new(&pair.host, "eth0", CLOSED)
        .with(&["--socket-hooks", "off"])
        .with_settings(WAY_IN)
        .start();
    let status = daemon.status();
    assert_eq!(
        status["settings"]["failsafes"],
        json!([{
            "name": "admin", "sources": ["10.1.0.2/32", "fd01::2/128"],
            "ports": ["tcp/2222", "udp/7777"], "interfaces": ["eth0"],
        }])
    );
    let (v4, v6): (IpAddr, IpAddr) = ("10.1.0.1".parse().unwrap(), "fd01::1".parse().unwrap());
    for host in [v4, v6] {
        assert!(
            traffic::udp_answers_soon(&pair.peer, (host, 7777)),
            "{host}"
        );
        let mut stream = traffic::tcp(&pair.peer, (host, 2222));
        traffic::converse(&mut stream, b"way in").unwrap();
        // Another port, another source, the other direction.
        assert!(!traffic::udp_answers(&pair.peer, None, (host, 7778)));
    }
    let other = "10.1.0.9".parse().ok();
    assert!(!traffic::udp_answers(&pair.peer, other, (v4, 7777)));
    let peer: IpAddr = "10.1.0.2".parse().unwrap();
    assert!(!traffic::udp_answers(&pair.host, None, (peer, 7777)));
    assert!(daemon.counted("tc_ingress", "allowed", "failsafe") >= 4);
    assert!(daemon.counted("tc_ingress", "denied", "rule_deny") >= 3);

    // A session that it let in outlives any policy.
    let mut stream = traffic::tcp(&pair.peer, (v4, 2222));
    daemon.swap(
        &CLOSED
            .replace("nothing", "nothing-at-all")
            .replace("fd01", "fd02"),
    );
    traffic::converse(&mut stream, b"still here").unwrap();

    // At another interface it opens nothing; one that gets the name is meant.
    settle(&daemon, &WAY_IN.replace("[eth0]", "[eth7]"), |s| {
        s["failsafes"][0]["interfaces"] == json!(["eth7"])
    });
    assert!(!traffic::udp_answers(&pair.peer, None, (v4, 7777)));
    settle(&daemon, &WAY_IN.replace("[eth0]", "[\"eth*\"]"), |s| {
        s["failsafes"][0]["interfaces"] == json!(["eth*"])
    });
    assert!(traffic::udp_answers_soon(&pair.peer, (v4, 7777)));
    settle(&daemon, ALL_ON, |s| s["failsafes"] == json!([]));
    assert!(!traffic::udp_answers(&pair.peer, None, (v4, 7777)));
}

/// Sends a frame as it is.
fn send(namespace: &Netns, interface: &str, frame: &[u8]) {
    namespace.enter(|| {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None).unwrap();
        let index = nix::net::if_::if_nametoindex(interface).unwrap();
        // SAFETY: all fields are numbers, and zero is a value of each.
        let mut to: nix::libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = nix::libc::AF_PACKET as u16;
        to.sll_ifindex = index.cast_signed();
        let length = size_of_val(&to) as u32;
        // SAFETY: the address and the frame live through the call, with their lengths.
        let sent = unsafe {
            nix::libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                length,
            )
        };
        assert_eq!(usize::try_from(sent).unwrap(), frame.len());
    });
}

#[test]
fn a_listed_ethertype_passes_and_others_do_not() {
    let pair = Pair::new();
    let frame = |ethertype: u16| [frame::ethernet(ethertype), vec![0; 50]].concat();
    // LLC: a length, and SAPs that nobody uses.
    let llc = [frame::ethernet(46), vec![0xaa; 46]].concat();
    let daemon = Setup::new(&pair.host, "eth0", POLICY)
        .with_settings(ALL_ON)
        .start();
    let counted = |outcome: &str, reason: &str| daemon.counted("tc_ingress", outcome, reason);
    let counts = || {
        (
            counted("denied", "ethertype"),
            counted("allowed", "ethertype_listed"),
        )
    };
    let judge = |frame: &[u8]| {
        let before = counts();
        send(&pair.peer, "eth0", frame);
        wait_for("the frame", LONG, || {
            let after = counts();
            let passed = after.1 > before.1;
            (passed || after.0 > before.0).then_some(passed)
        })
    };
    assert!(!judge(&frame(0x88b5)) && !judge(&frame(0x8847)) && !judge(&llc));
    settle(&daemon, "version: 1\nethertypes: [0x88b5, mpls]\n", |s| {
        s["ethertypes"].as_array().unwrap().len() == 3
    });
    assert!(judge(&frame(0x88b5)) && judge(&frame(0x8847)));
    assert!(!judge(&frame(0x88b6)) && !judge(&llc));
    settle(&daemon, "version: 1\nethertypes: [llc]\n", |s| {
        s["ethertypes"] == json!(["llc"])
    });
    assert!(judge(&llc) && !judge(&frame(0x88b5)));
}

#[test]
fn a_forged_source_says_where_it_belongs_and_follows_the_interface() {
    let pair = Pair::new();
    let policy = "\
version: 1
segments:
  lan: { members: [{cidr: 10.1.0.0/24}], interfaces: [eth5] }
rules:
  - { name: all, from: [lan], to: [lan], services: [any] }
";
    traffic::udp_echo(&pair.host, traffic::any(7777));
    let daemon = Setup::new(&pair.host, "eth*", policy).start();
    let host: IpAddr = "10.1.0.1".parse().unwrap();
    assert!(!traffic::udp_answers(&pair.peer, None, (host, 7777)));
    let denial = wait_for("the denial", LONG, || {
        let denials = daemon.denials(&[]);
        denials.into_iter().find(|d| d["reason"] == "spoofed")
    });
    assert_eq!(
        denial["detail"],
        "source belongs to segment lan, which is bound to eth5"
    );
    let text = daemon.ask("denials", &[]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(
        text.contains("spoofed: source belongs to segment lan, which is bound to eth5"),
        "{text}"
    );
    // The interface gets the name: the image follows.
    let before = daemon.generation();
    pair.host
        .ip("link set eth0 down\nlink set eth0 name eth5\nlink set eth5 up\n");
    daemon.wait_swapped(before);
    assert!(traffic::udp_answers_soon(&pair.peer, (host, 7777)));
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
    let to = (IpAddr::from([10, 1, 0, 129]), 7777);
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
