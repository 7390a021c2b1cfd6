//! Memberships in multicast groups are essential; what is sent to a group needs a rule, also the
//! copy of it that the sender's own host hears.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use enforcer_tests::{
    daemon::{LONG, Setup},
    frame,
    netns::Netns,
    seen::moved,
    traffic::{QUIET, Tap},
    wire,
};

use crate::lab::{Lab, NOTHING};

const GROUP4: Ipv4Addr = Ipv4Addr::new(239, 1, 2, 3);
const GROUP6: Ipv6Addr = Ipv6Addr::new(0xff15, 0, 0, 0, 0, 0, 0, 0x1234);
const HOST4: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);

/// Two listeners, one for each family, that have joined a group at eth0.
fn join(namespace: &Netns, port: u16, v4: Ipv4Addr, v6: Ipv6Addr) -> [UdpSocket; 2] {
    namespace.enter(|| {
        let ifindex = nix::net::if_::if_nametoindex("eth0").unwrap();
        let four = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
        four.join_multicast_v4(&v4, &HOST4).unwrap();
        let six = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port + 1)).unwrap();
        six.join_multicast_v6(&v6, ifindex).unwrap();
        [four, six]
    })
}

/// Whether the peer sees a report about the group within `limit`.
fn reported(tap: &Tap, group: IpAddr, limit: Duration) -> bool {
    let start = std::time::Instant::now();
    std::iter::from_fn(|| tap.next(limit.saturating_sub(start.elapsed()))).any(
        |frame| match group {
            IpAddr::V4(group) => {
                frame[12..14] == [8, 0]
                    && frame[23] == 2
                    && frame.windows(4).skip(34).any(|part| part == group.octets())
            }
            // Behind the router alert.
            IpAddr::V6(group) => {
                frame[12..14] == [0x86, 0xdd]
                    && frame[20] == 0
                    && frame[62] == 143
                    && frame
                        .windows(16)
                        .skip(54)
                        .any(|part| part == group.octets())
            }
        },
    )
}

#[test]
fn memberships_pass_by_default_and_follow_the_rules_when_they_are_switched_off() {
    let lab = Lab::new();
    let host = &lab.net.host;
    let daemon = Setup::new(host, "eth0", NOTHING)
        .with_settings("version: 1\n")
        .start();
    let groups = |last: u8| {
        let four = Ipv4Addr::new(239, 1, 2, last);
        (four, Ipv6Addr::new(0xff15, 0, 0, 0, 0, 0, 0, last.into()))
    };
    // A port for each round: the one before may still be bound.
    let round = |last: u8, passes: bool, outcome: &str, reason: &str| {
        let (four, six) = groups(last);
        let tap = Tap::new(&lab.net.peer);
        let mut sockets = None;
        let [counted] = moved(&daemon, [("tc_egress", outcome, reason)], || {
            sockets = Some(join(host, 9000 + 2 * u16::from(last), four, six));
            for group in [IpAddr::V4(four), IpAddr::V6(six)] {
                let limit = if passes { LONG } else { QUIET };
                assert_eq!(reported(&tap, group, limit), passes, "{group} {reason}");
            }
        });
        assert!(counted >= 2, "{outcome} {reason}: {}", daemon.status());
    };
    round(1, true, "allowed", "essential");
    // So are the questions of the network.
    let query4 = {
        let mut packet = frame::ip(
            Ipv4Addr::new(10, 1, 0, 2).into(),
            Ipv4Addr::new(224, 0, 0, 1).into(),
            2,
            &[0x11, 10, 0xee, 0xf5, 0, 0, 0, 0],
        );
        packet[8] = 1;
        packet
    };
    lab.send(&query4);
    assert!(lab.gets(false, &query4, LONG));

    let before = daemon.generation();
    daemon
        .setup
        .write_settings("version: 1\nessentials: {off: [multicast-membership]}\n");
    daemon.wait_swapped(before);
    round(2, false, "denied", "default_deny");
    lab.send(&query4);
    assert!(!lab.gets(false, &query4, QUIET));

    daemon.swap(&format!(
        "{NOTHING}rules:\n  - {{ name: joins, from: [host, unsegmented, all], to: [multicast], \
         services: [proto/igmp, icmpv6/143] }}\n"
    ));
    round(3, true, "allowed", "rule_allow");
}

#[test]
fn routers_and_names_use_multicast_by_rules() {
    let lab = Lab::new();
    let rules = |services: &str| {
        format!(
            "{NOTHING}rules:\n  - {{ name: hellos, from: [all], to: [multicast], \
             services: [{services}] }}\n"
        )
    };
    let daemon = Setup::new(&lab.net.host, "eth0", &rules("udp/1"))
        .with(&["--socket-hooks", "off"])
        .start();
    let (v4, v6): (IpAddr, IpAddr) = ("10.1.0.2".parse().unwrap(), "fe80::2".parse().unwrap());
    let hello = |to: &str, protocol, bytes: &[u8]| {
        let to: IpAddr = to.parse().unwrap();
        let from = if to.is_ipv4() { v4 } else { v6 };
        let mut packet = frame::ip(from, to, protocol, bytes);
        packet[if to.is_ipv4() { 8 } else { 7 }] = 255;
        wire::checksummed(packet)
    };
    let vrrp = [0x21, 1, 100, 1, 0, 1, 0, 0, 10, 1, 0, 9];
    let ospf = [
        2, 1, 0, 24, 10, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let mdns = frame::udp(5353, 5353);
    let all = [
        (112, vrrp.as_slice(), ["224.0.0.18", "ff02::12"]),
        (89, &ospf, ["224.0.0.5", "ff02::5"]),
        (17, &mdns, ["224.0.0.251", "ff02::fb"]),
    ]
    .map(|(protocol, bytes, groups)| groups.map(|group| hello(group, protocol, bytes)));
    let out = |packets: &[Vec<u8>]| -> Vec<Vec<u8>> {
        let from = |packet: &Vec<u8>| {
            let mut packet = packet.clone();
            // Of the host instead of the peer.
            if packet[0] >> 4 == 4 {
                packet[15] = 1;
            } else {
                packet[23] = 1;
            }
            wire::checksummed(packet)
        };
        packets.iter().map(from).collect()
    };
    for packets in &all {
        lab.all(&daemon, packets, "denied", "default_deny");
        lab.all_out(&daemon, &out(packets), "denied", "default_deny");
    }
    for (at, service) in ["proto/vrrp", "proto/ospf", "udp/5353"].iter().enumerate() {
        daemon.swap(&rules(service));
        for (other, packets) in all.iter().enumerate() {
            let (outcome, reason) = if other == at {
                ("allowed", "rule_allow")
            } else {
                ("denied", "default_deny")
            };
            lab.all(&daemon, packets, outcome, reason);
            lab.all_out(&daemon, &out(packets), outcome, reason);
        }
    }
}

#[test]
fn listeners_on_the_same_host_hear_its_own_multicast() {
    let lab = Lab::new();
    let host = &lab.net.host;
    let policy = |services: &str| {
        format!(
            "{NOTHING}rules:\n  - {{ name: own, from: [host], to: [multicast], \
             services: [{services}] }}\n"
        )
    };
    let daemon = Setup::new(host, "eth0", &policy("udp/9300-9302"))
        .with(&["--socket-hooks", "off"])
        .start();
    let listeners = join(host, 9300, GROUP4, GROUP6);
    let everybody = host.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 9302)).unwrap());
    let speakers = host.enter(|| {
        let four = UdpSocket::bind((HOST4, 0)).unwrap();
        four.set_broadcast(true).unwrap();
        [four, UdpSocket::bind("[fd01::1]:0").unwrap()]
    });
    host.ip("route add default via 10.1.0.2\n");
    let says: [(&UdpSocket, SocketAddr, &UdpSocket); 3] = [
        (&speakers[0], (GROUP4, 9300).into(), &listeners[0]),
        (&speakers[1], (GROUP6, 9301).into(), &listeners[1]),
        (&speakers[0], (Ipv4Addr::BROADCAST, 9302).into(), &everybody),
    ];
    for (speaker, group, listener) in says {
        listener.set_read_timeout(Some(LONG)).unwrap();
        let [denied] = moved(&daemon, [("", "denied", "")], || {
            speaker.send_to(b"to all", group).unwrap();
            let mut bytes = [0; 16];
            let Ok((length, _)) = listener.recv_from(&mut bytes) else {
                panic!("{group}: {} {:#?}", daemon.status(), daemon.denials(&[]));
            };
            assert_eq!(bytes[..length], *b"to all", "{group}");
        });
        assert_eq!(denied, 0, "{group}: {:#?}", daemon.denials(&[]));
    }
    // The copy is judged like what goes out.
    daemon.swap(&policy("udp/1"));
    for (speaker, group, listener) in says {
        listener.set_read_timeout(Some(QUIET)).unwrap();
        let _ = speaker.send_to(b"to all", group);
        assert!(listener.recv_from(&mut [0; 16]).is_err(), "{group}");
    }
}

#[test]
fn what_comes_back_as_the_hosts_own_from_outside_is_spoofed() {
    let lab = Lab::new();
    let daemon = Setup::new(
        &lab.net.host,
        "eth0",
        &format!(
            "{NOTHING}rules:\n  - {{ name: own, from: [host], to: [multicast], \
             services: [udp/9300] }}\n"
        ),
    )
    .with(&["--socket-hooks", "off"])
    .start();
    let forged = ["10.1.0.1", "fd01::1"].map(|own| -> Vec<u8> {
        let own: IpAddr = own.parse().unwrap();
        let group: IpAddr = if own.is_ipv4() {
            GROUP4.into()
        } else {
            GROUP6.into()
        };
        wire::udp((own, 4000), (group, 9300), b"forged")
    });
    lab.all(&daemon, &forged, "denied", "spoofed");
}
