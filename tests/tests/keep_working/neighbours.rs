//! Hosts find each other, addresses and routers under default deny: ARP, neighbour discovery.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use enforcer_tests::{
    daemon::{LONG, Setup, wait_for},
    frame::{self, Extension},
    link::{self, BROADCAST},
    netns::{Family, Netns},
    seen::moved,
    traffic::{self, QUIET, Tap},
};

use crate::lab::{Lab, NOTHING, STRANGER, allowing};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
const PEER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);

/// What a namespace knows of the link address of a neighbour.
fn neighbour(namespace: &Netns, ip: IpAddr) -> String {
    let ip = ip.to_string();
    namespace.ask("ip", &["neigh", "show", &ip]).unwrap()
}

fn written(link: [u8; 6]) -> String {
    link.map(|byte| format!("{byte:02x}")).join(":")
}

#[test]
fn neighbours_are_found_again_after_both_forget() {
    let lab = Lab::new();
    let policy =
        allowing("ping") + "  - { name: back, from: [host], to: [peer], services: [ping] }\n";
    let daemon = Setup::new(&lab.net.host, "eth0", &policy).start();
    for family in Family::BOTH {
        let (host, peer) = (family.address(1, 1), family.address(1, 2));
        for (from, to) in [(&lab.net.host, peer), (&lab.net.peer, host)] {
            for namespace in [&lab.net.host, &lab.net.peer] {
                namespace.ip("neigh flush dev eth0\n");
            }
            assert!(traffic::pings(from, to, LONG), "{to}");
        }
    }
    assert_eq!(daemon.counted("", "denied", ""), 0, "{}", daemon.status());
}

#[test]
fn arp_of_every_kind_passes_under_a_policy_that_allows_nothing() {
    let lab = Lab::new();
    lab.net.host.sysctl("ipv4/neigh/eth0/locktime", "0");
    let daemon = Setup::new(&lab.net.host, "eth0", NOTHING).start();
    let tap = Tap::new(&lab.net.peer);
    let answered = |operation: u8| {
        wait_for("the host's ARP", LONG, || {
            let frame = tap.next(LONG)?;
            (frame[12..14] == [8, 6] && frame[21] == operation && frame[28..32] == HOST.octets())
                .then_some(())
        });
    };
    let nobody = [0; 6];
    let [passed, denied] = moved(
        &daemon,
        [("", "allowed", "essential"), ("", "denied", "")],
        || {
            // A question, and a probe, which has no address yet.
            for from in [PEER, Ipv4Addr::UNSPECIFIED] {
                let asks = link::arp(1, (lab.peer_link, from), (nobody, HOST), BROADCAST);
                lab.send_frame(&asks);
                answered(2);
            }
            // What nobody asked for, as a question and as an answer, changes what the host knows.
            for (operation, says) in [(1, STRANGER), (2, lab.peer_link)] {
                let about = if operation == 1 { nobody } else { says };
                let told = link::arp(operation, (says, PEER), (about, PEER), BROADCAST);
                lab.send_frame(&told);
                wait_for("the host to learn", LONG, || {
                    let known = neighbour(&lab.net.host, PEER.into());
                    known.contains(&written(says)).then_some(())
                });
            }
            // The host asks, too.
            lab.net.host.ip("neigh flush dev eth0\n");
            let socket = traffic::ping_socket(&lab.net.host, false);
            let _ = traffic::ping_send(&socket, Ipv4Addr::new(10, 1, 0, 9).into());
        },
    );
    assert!(passed >= 6, "{passed}");
    // The ping is what the policy denies; it may not even get as far as the interface.
    assert!(denied <= 1, "{denied}");
}

/// Words of `ip addr show` for addresses of the host in a state.
fn shows(host: &Netns, state: &str, address: &str) -> bool {
    let arguments = ["-6", "addr", "show", "dev", "eth0", state];
    host.ask("ip", &arguments).unwrap().contains(address)
}

#[test]
fn ipv6_addresses_come_to_be_and_duplicates_are_found() {
    let lab = Lab::new();
    let host = &lab.net.host;
    host.sysctl("ipv6/conf/eth0/accept_dad", "1");
    host.sysctl("ipv6/conf/eth0/router_solicitation_delay", "0");
    let daemon = Setup::new(host, "eth0", NOTHING).start();
    let router: Ipv6Addr = "fe80::aa".parse().unwrap();
    let everybody: Ipv6Addr = "ff02::1".parse().unwrap();

    // Duplicate address detection: one address is free, the peer has the other.
    host.ip("addr add fd01::77/64 dev eth0\naddr add fd01::2/64 dev eth0\n");
    wait_for("the duplicate", LONG, || {
        shows(host, "dadfailed", "fd01::2/").then_some(())
    });
    wait_for("the free address", LONG, || {
        (shows(host, "permanent", "fd01::77/") && !shows(host, "tentative", "fd01::77/"))
            .then_some(())
    });

    // A router: a prefix and a default route, but not from a router that is not on the link.
    let advertisement = |prefix: &str| {
        let prefix = prefix.parse().unwrap();
        link::router_advertisement(prefix, lab.peer_link)
    };
    let far = link::icmpv6(router, everybody, 64, &advertisement("fd66::"));
    lab.all(&daemon, &[far], "denied", "default_deny");
    let near = link::icmpv6(router, everybody, 255, &advertisement("fd55::"));
    lab.send(&near);
    wait_for("an address of the router's prefix", LONG, || {
        (shows(host, "dynamic", "fd55:") && !shows(host, "tentative", "fd55:")).then_some(())
    });
    assert!(!shows(host, "dynamic", "fd66:"));
    let routes = host.ask("ip", &["-6", "route"]).unwrap();
    assert!(routes.contains("default via fe80::aa"), "{routes}");

    // The host asks for routers and tells which groups it listens to.
    let tap = Tap::new(&lab.net.peer);
    host.ip("link set eth0 down\nlink set eth0 up\n");
    let (mut solicited, mut listens) = (false, false);
    wait_for("a router solicitation and an MLDv2 report", LONG, || {
        let frame = tap.next(LONG)?;
        if frame[12..14] == [0x86, 0xdd] {
            solicited |= frame[20] == 58 && frame[54] == 133;
            // Behind the router alert.
            listens |= frame[20] == 0 && frame[62] == 143;
        }
        (solicited && listens).then_some(())
    });
    assert_eq!(daemon.counted("tc_egress", "denied", ""), 0);
}

#[test]
fn neighbour_discovery_from_afar_or_in_disguise_is_refused() {
    let lab = Lab::new();
    let daemon = Setup::new(&lab.net.host, "eth0", NOTHING)
        .with(&["--socket-hooks", "off"])
        .start();
    let peer: Ipv6Addr = "fd01::2".parse().unwrap();
    let host: Ipv6Addr = "fd01::1".parse().unwrap();
    let asks = link::neighbour_solicitation(host, lab.peer_link);
    let group: Ipv6Addr = "ff02::1:ff00:1".parse().unwrap();
    let solicitation = |hop_limit| link::icmpv6(peer, group, hop_limit, &asks);

    let tap = Tap::new(&lab.net.peer);
    let answered = |limit| {
        let start = std::time::Instant::now();
        std::iter::from_fn(|| tap.next(std::time::Duration::saturating_sub(limit, start.elapsed())))
            .any(|frame| frame[12..14] == [0x86, 0xdd] && frame[20] == 58 && frame[54] == 136)
    };
    lab.all(&daemon, &[solicitation(64)], "denied", "default_deny");
    lab.all(&daemon, &[solicitation(254)], "denied", "default_deny");

    // The four messages and a redirect, from afar; a redirect is no essential at all.
    let message = |kind: u8| {
        let mut message = asks.clone();
        message[0] = kind;
        message
    };
    let from_afar: Vec<Vec<u8>> = (133..=137)
        .map(|kind| link::icmpv6(peer, host, 254, &message(kind)))
        .collect();
    lab.all(&daemon, &from_afar, "denied", "default_deny");
    let redirect = link::icmpv6(peer, host, 255, &message(137));
    lab.all(&daemon, &[redirect], "denied", "default_deny");

    // Behind extension headers, which Linux would take.
    let plain = solicitation(255);
    let disguises = [
        vec![Extension::Options],
        vec![Extension::HopByHop],
        vec![Extension::Routing(0)],
        vec![Extension::Fragment(0, false)],
        vec![Extension::Options, Extension::Fragment(0, false)],
    ];
    let disguised = disguises.map(|headers| {
        let (next, payload) = frame::extended(&headers, 58, &plain[40..]);
        let mut packet = frame::ip(peer.into(), group.into(), next, &payload);
        packet[7] = 255;
        packet
    });
    lab.all(&daemon, &disguised, "denied", "default_deny");
    assert!(!answered(QUIET));

    lab.all(&daemon, &[plain], "allowed", "essential");
    assert!(answered(LONG));

    // Nobody's address is taken from the host by its own name: its own address does not come in,
    // but in neighbour discovery, where that is how duplicates are found.
    let own = |hop_limit| link::icmpv6(host, group, hop_limit, &asks);
    lab.all(&daemon, &[own(64)], "denied", "spoofed");
    lab.all(&daemon, &[own(255)], "allowed", "essential");
}

/// Neither address family is in the way of the other.
#[test]
fn a_policy_of_ipv4_alone_denies_ipv6_and_leaves_neighbour_discovery() {
    let lab = Lab::new();
    let policy = "version: 1
defaults: { unsegmented: deny }
segments:
  here: { members: [{cidr: 10.1.0.0/24}] }
rules:
  - { name: echo, from: [here], to: [here], services: [udp/7000, ping] }
";
    traffic::udp_echo(&lab.net.host, traffic::any(7000));
    let daemon = Setup::new(&lab.net.host, "eth0", policy)
        .with(&["--socket-hooks", "off"])
        .start();
    assert!(traffic::udp_answers_soon(&lab.net.peer, (HOST, 7000)));
    let v6 = Family::V6.address(1, 1);
    for namespace in [&lab.net.host, &lab.net.peer] {
        namespace.ip("neigh flush dev eth0\n");
    }
    let [denied] = moved(&daemon, [("tc_ingress", "denied", "unsegmented")], || {
        assert!(!traffic::udp_answers(&lab.net.peer, None, (v6, 7000)));
        assert!(!traffic::pings(&lab.net.peer, v6, QUIET));
    });
    assert_eq!(denied, 2, "both reached the host and were judged there");
    let known = neighbour(&lab.net.peer, v6);
    assert!(known.contains(&written(lab.host_link)), "{known}");
    let [denied] = moved(&daemon, [("tc_egress", "denied", "unsegmented")], || {
        assert!(!traffic::pings(
            &lab.net.host,
            Family::V6.address(1, 2),
            QUIET
        ));
    });
    assert_eq!(denied, 1);
}
