//! VLAN devices, bonds and bridge ports: where a frame is judged, and that it is.

use std::net::IpAddr;

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    frame::tagged,
    netns::{Netns, Pair},
    seen::{denied, moved, skipped},
    traffic::{self, QUIET, Tap},
};
use serde_json::json;

use crate::{
    bench::{sealed, udp},
    wire::{Sender, mark},
};

const POLICY: &str = r#"version: 1
segments:
  peer: { members: [{cidr: 10.8.0.2/32}, {cidr: "fd08::2/128"}] }
  here: { members: [{cidr: 10.8.0.1/32}, {cidr: "fd08::1/128"}] }
rules:
  - { name: some, from: [peer], to: [here], services: [udp/4444] }
"#;
const HERE: [&str; 2] = ["10.8.0.1", "fd08::1"];
const JUDGED: [(&str, &str, &str); 3] = [
    ("tc_ingress", "allowed", "rule_allow"),
    ("tc_ingress", "allowed", "vlan_device"),
    ("tc_ingress", "denied", ""),
];

/// Makes a device on each end; `false` where the kernel has none of its kind.
fn on_both(net: &Pair, device: &str) -> bool {
    for namespace in [&net.host, &net.peer] {
        let arguments: Vec<&str> = ["link", "add"]
            .into_iter()
            .chain(device.split(' '))
            .collect();
        if let Err(complaint) = namespace.ask("ip", &arguments) {
            assert!(
                complaint.contains("Unknown device type") || complaint.contains("not supported"),
                "{device}: {complaint}"
            );
            skipped(&format!("`{device}`: {complaint}"));
            return false;
        }
    }
    true
}

/// Gives the policy's addresses to an interface on each end.
fn addresses(net: &Pair, interface: &str) {
    net.host
        .addresses(interface, &["10.8.0.1/24", "fd08::1/64"]);
    net.peer
        .addresses(interface, &["10.8.0.2/24", "fd08::2/64"]);
    for port in [4444, 5555] {
        traffic::udp_echo(&net.host, traffic::any(port));
    }
}

/// What is allowed is answered, what is not is denied on `interface`; how often a parent left a
/// packet to its VLAN device.
fn holds(daemon: &Daemon<'_>, net: &Pair, interface: &str) -> u64 {
    let mut left = 0;
    for here in HERE {
        let here: IpAddr = here.parse().unwrap();
        assert!(
            traffic::udp_answers_soon(&net.peer, (here, 4444)),
            "{interface} {here}"
        );
        let [_, elsewhere, denials] = moved(daemon, JUDGED, || {
            assert!(
                !traffic::udp_answers(&net.peer, None, (here, 5555)),
                "{interface}"
            );
        });
        assert_eq!(denials, 1, "{interface} {here}");
        left += elsewhere;
        denied(
            daemon,
            &json!({
                "direction": "ingress", "interface": interface, "reason": "default_deny",
                "dst": here.to_string(), "dst_port": 5555,
            }),
        );
    }
    left
}

#[test]
fn a_tagged_frame_is_judged_once_on_its_vlan_device_or_else_on_the_parent() {
    let net = Pair::new();
    if !on_both(&net, "link eth0 name v20 type vlan id 20") {
        return;
    }
    for namespace in [&net.host, &net.peer] {
        namespace.ip("link set v20 up\n");
    }
    addresses(&net, "v20");
    for (enforced, judge, leaves) in [
        ("eth0,v20", "v20", true),
        ("eth0", "eth0", false),
        ("v20", "v20", false),
    ] {
        let daemon = Setup::new(&net.host, enforced, POLICY).start();
        let left = holds(&daemon, &net, judge);
        assert_eq!(left >= 2, leaves, "{enforced}: {left}");
        assert_eq!(left == 0, !leaves, "{enforced}: {left}");
        // Another tag than the device's is nobody's: it is judged where it comes in.
        if enforced.contains("eth0") {
            let bytes = sealed(&enforcer_tests::frame::frame(
                "10.8.0.2".parse().unwrap(),
                "10.8.0.1".parse().unwrap(),
                17,
                &udp(700, 5555, &mark(1)),
            ));
            let out = Sender::new(&net.peer, "eth0");
            let counts = moved(&daemon, JUDGED, || {
                out.send(&tagged(&bytes, &[(0x8100, 21)]))
            });
            // The neighbours' own frames of VLAN 20 come when they like.
            assert_eq!((counts[0], counts[2]), (0, 1));
            // The service tag of the same number is another tag.
            let counts = moved(&daemon, JUDGED, || {
                out.send(&tagged(&bytes, &[(0x88a8, 20)]))
            });
            // The neighbours' own frames of VLAN 20 come when they like.
            assert_eq!((counts[0], counts[2]), (0, 1));
        }
    }
}

#[test]
fn a_frame_with_two_tags_is_judged_on_every_enforced_device_of_the_stack() {
    let net = Pair::new();
    if !on_both(&net, "link eth0 name s30 type vlan proto 802.1ad id 30")
        || !on_both(&net, "link s30 name c7 type vlan id 7")
    {
        return;
    }
    for namespace in [&net.host, &net.peer] {
        namespace.ip("link set s30 up\nlink set c7 up\n");
    }
    addresses(&net, "c7");
    for (enforced, judge) in [
        ("eth0", "eth0"),
        ("s30", "s30"),
        ("c7", "c7"),
        ("eth0,s30", "s30"),
        ("eth0,s30,c7", "c7"),
        // What is between them is not enforced: the first to see it is the one to deny.
        ("eth0,c7", "eth0"),
    ] {
        let daemon = Setup::new(&net.host, enforced, POLICY).start();
        holds(&daemon, &net, judge);
    }
}

#[test]
fn a_tag_on_a_bridge_port_hides_nothing() {
    let bridge = Netns::new("br");
    let (a, b) = (Netns::new("a"), Netns::new("b"));
    bridge.sysctl("ipv6/conf/default/disable_ipv6", "1");
    bridge.ip("link add br0 type bridge mcast_snooping 0\nlink set br0 up\n");
    for (host, port) in [(&a, "p-a"), (&b, "p-b")] {
        bridge.cable(port, host, "eth0");
        bridge.ip(&format!("link set {port} master br0\n"));
    }
    let daemon = Setup::new(&bridge, "p-*", POLICY).start();
    let out = Sender::new(&a, "eth0");
    let tap = Tap::new(&b);
    let mut number = 0;
    for tags in [
        &[(0x8100, 0)][..],
        &[(0x8100, 20)],
        &[(0x88a8, 30), (0x8100, 7)],
    ] {
        for (to, passes) in [(4444, true), (5555, false)] {
            number += 1;
            let data = udp(700 + number, to, &mark(number.into()));
            let bytes = sealed(&enforcer_tests::frame::frame(
                "10.8.0.2".parse().unwrap(),
                "10.8.0.1".parse().unwrap(),
                17,
                &data,
            ));
            let counts = moved(&daemon, JUDGED, || {
                out.send(&tagged(&bytes, tags));
                let limit = if passes { LONG } else { QUIET };
                assert_eq!(tap.sees(&data, limit), passes, "{tags:?}");
            });
            assert_eq!(
                counts,
                [u64::from(passes), 0, u64::from(!passes)],
                "{tags:?}"
            );
        }
    }
    let data = udp(700, 4444, &mark(0));
    let nested = sealed(&enforcer_tests::frame::frame(
        "10.8.0.2".parse().unwrap(),
        "10.8.0.1".parse().unwrap(),
        17,
        &data,
    ));
    out.send(&tagged(&nested, &[(0x8100, 0), (0x8100, 0)]));
    assert!(!tap.sees(&data, QUIET));
    denied(
        &daemon,
        &json!({"direction": "ingress", "interface": "p-a", "reason": "vlan_nested"}),
    );
}

/// A bond of two cables on each end.
fn bonded(net: &Pair, options: &str) -> bool {
    if !on_both(net, &format!("name team0 type bond {options}")) {
        return false;
    }
    for number in [1, 2] {
        let name = format!("leg{number}");
        net.host.cable(&name, &net.peer, &name);
    }
    for namespace in [&net.host, &net.peer] {
        for name in ["leg1", "leg2"] {
            namespace.ip(&format!(
                "link set {name} down\nlink set {name} master team0\n"
            ));
        }
        if options.contains("active-backup") {
            // Or the ends may settle on different cables.
            namespace.ip("link set team0 type bond primary leg1\n");
        }
        namespace.ip("link set leg1 up\nlink set leg2 up\nlink set team0 up\n");
    }
    addresses(net, "team0");
    true
}

/// Whether the other end of the bond is known, by the messages that it sends.
fn has_partner(net: &Pair) -> bool {
    let shown = net
        .host
        .ask("ip", &["-d", "link", "show", "team0"])
        .unwrap();
    let (_, rest) = shown
        .split_once("ad_partner_mac ")
        .expect("LACP is at work");
    !rest.starts_with("00:00:00:00:00:00")
}

#[test]
fn the_slaves_of_a_bond_find_their_partner_where_all_else_is_denied() {
    let net = Pair::new();
    if !bonded(&net, "mode 802.3ad miimon 100 lacp_rate fast") {
        return;
    }
    wait_for("the partner", LONG, || has_partner(&net).then_some(()));
    let daemon = Setup::new(&net.host, "leg*", POLICY)
        .with_settings("version: 1\nessentials: {off: [slow]}\n")
        .start();
    // Three messages missing.
    wait_for("the partner to be lost", LONG, || {
        (!has_partner(&net)).then_some(())
    });
    assert!(daemon.counted("tc_ingress", "denied", "ethertype") > 0);
    let before = daemon.generation();
    daemon.setup.write_settings("version: 1\n");
    daemon.wait_swapped(before);
    wait_for("the partner", LONG, || has_partner(&net).then_some(()));
    assert!(daemon.counted("tc_ingress", "allowed", "essential") > 0);
    let denials = || daemon.counted("tc_ingress", "denied", "default_deny");
    for here in HERE {
        let here: IpAddr = here.parse().unwrap();
        assert!(traffic::udp_answers_soon(&net.peer, (here, 4444)), "{here}");
        let before = denials();
        assert!(
            !traffic::udp_answers(&net.peer, None, (here, 5555)),
            "{here}"
        );
        assert!(denials() > before, "{here}");
    }
}

#[test]
fn a_bond_is_judged_like_any_interface() {
    let net = Pair::new();
    if !bonded(&net, "mode active-backup miimon 100") {
        return;
    }
    let daemon = Setup::new(&net.host, "team0", POLICY).start();
    holds(&daemon, &net, "team0");
    // By the other cable as well.
    for namespace in [&net.host, &net.peer] {
        namespace.ip("link set leg1 down\n");
    }
    holds(&daemon, &net, "team0");
}
