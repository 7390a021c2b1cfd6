//! Below IP: VLAN tags, ethertypes, truncated frames, addresses of the link, packets in pieces.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, TcpListener},
    thread,
};

use enforcer_tests::{
    daemon::{LONG, wait_for},
    frame::{self, ethernet, tagged},
    scale,
    traffic::{self, QUIET, Tap},
};

use crate::{
    bench::{BAD, Bench, GOOD, POLICY, SETTINGS, bench, port, sealed, udp},
    wire::{Sender, mark, receive_offload},
};

/// A frame of a datagram to the receiver that no other is like.
fn datagram(bench: &mut Bench, v6: bool, to: u16) -> Vec<u8> {
    let number = bench.next();
    between(v6, 17, &udp(port(number), to, &mark(number)))
}

fn between(v6: bool, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let (s, d) = if v6 {
        ("fd01::3", "fd01::1")
    } else {
        ("10.1.0.3", "10.1.0.1")
    };
    let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
    sealed(&frame::frame(ip(s), ip(d), protocol, payload))
}

#[test]
fn one_priority_tag_is_judged_by_what_is_inside() {
    let mut bench = bench();
    for v6 in [false, true] {
        for tag in [0x8100, 0x88a8] {
            let mut send = |to| {
                let bytes = tagged(&datagram(&mut bench, v6, to), &[(tag, 0)]);
                bench.judge(&[bytes])
            };
            send(BAD).counts(&[("default_deny", 1)]).nothing_arrived();
            send(GOOD).counts(&[("allowed", 1)]);
            // The host takes off a priority tag of its own kind.
            if tag == 0x8100 {
                send(BAD).nothing_arrived().harmful(1);
                send(GOOD).arrived(1).harmful(1);
            }
        }
    }
}

#[test]
fn two_priority_tags_are_dropped() {
    let mut bench = bench();
    for v6 in [false, true] {
        for outer in [0x8100, 0x88a8] {
            for to in [BAD, GOOD] {
                let bytes = datagram(&mut bench, v6, to);
                let seen = bench.judge(&[tagged(&bytes, &[(outer, 0), (0x8100, 0)])]);
                seen.counts(&[("vlan_nested", 1)]).nothing_arrived();
                seen.harmful(1);
            }
        }
    }
}

#[test]
fn three_tags_are_dropped() {
    let mut bench = bench();
    let stacks: [&[(u16, u16)]; 5] = [
        &[(0x8100, 0), (0x8100, 0), (0x8100, 0)],
        &[(0x88a8, 0), (0x8100, 0), (0x8100, 0)],
        &[(0x88a8, 5), (0x8100, 6), (0x8100, 7)],
        &[(0x88a8, 5), (0x88a8, 6), (0x8100, 0)],
        &[(0x8100, 0), (0x8100, 5), (0x8100, 0), (0x8100, 6)],
    ];
    for v6 in [false, true] {
        for tags in stacks {
            let bytes = datagram(&mut bench, v6, GOOD);
            let seen = bench.judge(&[tagged(&bytes, tags)]);
            seen.counts(&[("vlan_nested", 1)]).nothing_arrived();
        }
    }
}

/// No device takes them, and the host throws them away itself.
#[test]
fn a_tag_that_no_device_takes_is_judged_by_what_is_inside() {
    let mut bench = bench();
    for v6 in [false, true] {
        for tags in [&[(0x8100, 5)][..], &[(0x88a8, 5), (0x8100, 6)]] {
            for (to, count) in [(GOOD, "allowed"), (BAD, "default_deny")] {
                let bytes = datagram(&mut bench, v6, to);
                let seen = bench.judge(&[tagged(&bytes, tags)]);
                seen.counts(&[(count, 1)]).nothing_arrived().harmful(0);
            }
        }
    }
}

/// The kernel takes the outer tag of what comes in into its notes; an inner one, and those of
/// raw sockets on the way out, are in the packet.
#[test]
fn tags_in_notes_and_in_the_packet_are_judged_alike() {
    let mut bench = bench();
    let stacks: [(&[(u16, u16)], &str); 5] = [
        (&[(0x8100, 0)], "default_deny"),
        (&[(0x8100, 5)], "default_deny"),
        (&[(0x88a8, 5), (0x8100, 6)], "default_deny"),
        (&[(0x8100, 0), (0x8100, 0)], "vlan_nested"),
        (&[(0x8100, 5), (0x8100, 6), (0x8100, 7)], "vlan_nested"),
    ];
    for offload in [true, false] {
        receive_offload(&bench.pair.host, "eth0", offload).unwrap();
        for (tags, reason) in stacks {
            let bytes = datagram(&mut bench, false, BAD);
            let seen = bench.judge(&[tagged(&bytes, tags)]);
            seen.counts(&[(reason, 1)]).nothing_arrived();
            if reason == "default_deny" {
                let bytes = datagram(&mut bench, false, GOOD);
                bench
                    .judge(&[tagged(&bytes, tags)])
                    .counts(&[("allowed", 1)]);
            }
        }
    }
    receive_offload(&bench.pair.host, "eth0", true).unwrap();
    // Out of the host: nobody has looked at the frame before.
    let out = Sender::new(&bench.pair.host, "eth0");
    let tap = Tap::new(&bench.pair.peer);
    for (tags, reason) in stacks {
        for (to, passes) in [(BAD, false), (4445, reason == "default_deny")] {
            let number = bench.next();
            let data = udp(port(number), to, &mark(number));
            let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
            let bytes = frame::frame(ip("10.1.0.1"), ip("10.1.0.3"), 17, &data);
            let before = bench.counted("tc_egress");
            assert_eq!(out.try_send(&tagged(&sealed(&bytes), tags)), passes);
            let limit = if passes { LONG } else { QUIET };
            assert_eq!(tap.sees(&data, limit), passes, "{tags:?} to {to}");
            let after = bench.counted("tc_egress");
            let reason = if passes { "allowed" } else { reason };
            let by = after[reason] - before.get(reason).unwrap_or(&0);
            assert_eq!(by, 1, "{tags:?} to {to}: {after:?}");
        }
    }
}

/// A frame that is not IP and carries a mark.
fn other(bench: &mut Bench, ethertype: u16) -> Vec<u8> {
    let number = bench.next();
    let mut bytes = ethernet(ethertype);
    // LLC: a null SAP; MPLS: a label, bottom of the stack; PPPoE: a session with IPv4.
    bytes.extend(match ethertype {
        0x8847 | 0x8848 => vec![0, 1, 0x01, 64],
        0x8864 => vec![0x11, 0, 0, 1, 0, 30, 0, 0x21],
        _ => vec![0, 0, 3, 0],
    });
    bytes.extend(&between(false, 17, &udp(port(number), GOOD, &mark(number)))[14..]);
    bytes
}

#[test]
fn unknown_ethertypes_are_dropped_unless_listed() {
    const MPLS: u16 = 0x8847;
    const PPPOE: u16 = 0x8864;
    const LLC: u16 = 46;
    let mut bench = bench();
    let all = [0x88b5, MPLS, PPPOE, LLC, 0x9100, 0x0600, 0];
    for ethertype in all {
        let bytes = other(&mut bench, ethertype);
        let seen = bench.judge(&[bytes]);
        seen.counts(&[("ethertype", 1)]);
        assert!(seen.passed.is_empty(), "{ethertype:#x}");
    }
    let listed = [
        (0x88b5, "0x88b5"),
        (MPLS, "mpls"),
        (PPPOE, "pppoe"),
        (LLC, "llc"),
    ];
    for (_, name) in listed {
        bench.enforce(POLICY, &format!("version: 1\nethertypes: [{name}]\n"));
        for ethertype in all {
            // A length of 0 is a length.
            let is_listed = listed.iter().any(|(t, n)| *t == ethertype && *n == name)
                || (name == "llc" && ethertype == 0);
            let bytes = other(&mut bench, ethertype);
            // Under a tag as well.
            for frame in [bytes.clone(), tagged(&bytes, &[(0x8100, 0)])] {
                let before = bench.passed_for("ethertype_listed");
                let seen = bench.judge(&[frame]);
                if is_listed {
                    seen.counts(&[("allowed", 1)]);
                    assert_eq!(bench.passed_for("ethertype_listed"), before + 1);
                } else {
                    seen.counts(&[("ethertype", 1)]);
                }
                assert_eq!(
                    seen.passed.len(),
                    usize::from(is_listed),
                    "{ethertype:#x} {name}"
                );
            }
        }
    }
    // What is listed passes, and opens nothing else.
    let bytes = datagram(&mut bench, false, BAD);
    bench
        .judge(&[bytes])
        .counts(&[("default_deny", 1)])
        .nothing_arrived()
        .harmful(1);
}

#[test]
fn what_a_link_needs_passes_and_can_be_switched_off() {
    let mut bench = bench();
    let group = |last: u8| [0x01, 0x80, 0xc2, 0, 0, last];
    let all = [
        ("lldp", 0x88cc, group(0x0e)),
        ("slow", 0x8809, group(0x02)),
        ("eapol", 0x888e, group(0x03)),
        ("ptp", 0x88f7, group(0x0e)),
        ("stp", 38, group(0)),
    ];
    let bytes = |bench: &mut Bench, kind: (&str, u16, [u8; 6])| {
        let mut bytes = ethernet(kind.1);
        bytes[..6].copy_from_slice(&kind.2);
        bytes.extend([0x42, 0x42, 3]);
        let number = bench.next();
        bytes.extend(mark(number));
        bytes.extend([0; 32]);
        bytes
    };
    for kind in all {
        let frame = bytes(&mut bench, kind);
        let before = bench.passed_for("essential");
        let seen = bench.judge(&[frame]).clone();
        seen.counts(&[]);
        assert_eq!(seen.passed.len(), 1, "{}", kind.0);
        assert!(bench.passed_for("essential") > before);
    }
    // Spanning tree is its group and its SAP, not the one or the other.
    let mut to_a_host = bytes(&mut bench, all[4]);
    to_a_host[..6].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    let mut another_sap = bytes(&mut bench, all[4]);
    another_sap[14] = 0xaa;
    let seen = bench.judge(&[to_a_host, another_sap]);
    seen.counts(&[("ethertype", 2)]);
    assert!(seen.passed.is_empty());
    for kind in all {
        bench.enforce(
            POLICY,
            &format!("version: 1\nessentials: {{off: [{}]}}\n", kind.0),
        );
        let frame = bytes(&mut bench, kind);
        let seen = bench.judge(&[frame]);
        seen.counts(&[("ethertype", 1)]);
        assert!(seen.passed.is_empty(), "{}", kind.0);
    }
    bench.enforce(POLICY, SETTINGS);
}

/// 14 bytes are the least that a link carries; shorter ones are the parser's own tests.
#[test]
fn frames_of_every_length_are_denied_until_they_are_whole() {
    let mut bench = bench();
    for v6 in [false, true] {
        let whole = datagram(&mut bench, v6, GOOD);
        let header = if v6 { 40 } else { 20 };
        assert_eq!(whole.len(), 14 + header + 16);
        for length in 14..whole.len() {
            let seen = bench.judge(&[whole[..length].to_vec()]);
            seen.counts(&[("malformed", 1)]).nothing_arrived();
        }
        bench.judge(&[whole]).counts(&[("allowed", 1)]).arrived(1);
        // And with a tag, which is cut as well.
        let whole = tagged(&datagram(&mut bench, v6, GOOD), &[(0x8100, 0)]);
        let cut: Vec<_> = (14..whole.len()).map(|n| whole[..n].to_vec()).collect();
        let seen = bench.judge(&cut);
        seen.nothing_arrived();
        assert!(seen.counts.contains_key("malformed"), "{seen:?}");
        assert!(!seen.counts.contains_key("allowed"), "{seen:?}");
        bench.judge(&[whole]).counts(&[("allowed", 1)]).arrived(1);
    }
}

#[test]
fn broadcast_frames_are_judged_by_their_ip_addresses() {
    let mut bench = bench();
    for to in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        let mut bytes = datagram(&mut bench, false, BAD);
        bytes[..6].copy_from_slice(&to);
        let seen = bench.judge(&[bytes]);
        seen.counts(&[("default_deny", 1)])
            .nothing_arrived()
            .harmful(1);
        let mut bytes = datagram(&mut bench, false, GOOD);
        bytes[..6].copy_from_slice(&to);
        bench.judge(&[bytes]).counts(&[("allowed", 1)]).arrived(1);
    }
}

/// A frame of which only the Ethernet header is in the packet's own memory, the rest in pages.
#[test]
fn packets_in_pieces_are_judged_by_all_of_them() {
    let mut bench = bench();
    bench.both(|pair| {
        for end in [&pair.host, &pair.peer] {
            end.ip("link set eth0 mtu 9000\n");
        }
    });
    let pieces = Sender::new(&bench.pair.peer, "eth0").with_virtio_header();
    for v6 in [false, true] {
        for (to, count) in [(GOOD, "allowed"), (BAD, "default_deny")] {
            let number = bench.next();
            let data = [&mark(number)[..], &[7; 8000]].concat();
            let bytes = between(v6, 17, &udp(port(number), to, &data));
            // `virtio_net_hdr`: nothing to compute, nothing to split, 14 bytes in one piece.
            let mut framed = vec![0, 0, 14, 0, 0, 0, 0, 0, 0, 0];
            framed.extend(&bytes);
            let before = bench.counted("tc_ingress");
            bench.wire.receiver.frames();
            pieces.send(&framed);
            wait_for("the frame to be judged", LONG, || {
                (bench.counted("tc_ingress") != before).then_some(())
            });
            let after = bench.counted("tc_ingress");
            assert_eq!(after[count] - before.get(count).unwrap_or(&0), 1);
            // Whole, as one that lies in one piece.
            let passed = bench.wire.receiver.frames();
            assert_eq!(passed, if to == GOOD { vec![bytes] } else { vec![] });
            let seen = bench.judge(&[]);
            assert_eq!(
                seen.delivered.len() + seen.bare.len(),
                usize::from(to == GOOD)
            );
        }
    }
    bench.both(|pair| {
        for end in [&pair.host, &pair.peer] {
            end.ip("link set eth0 mtu 1500\n");
        }
    });
}

/// Segments that the sender's kernel has not split yet are one packet, and no fragment.
#[test]
fn merged_segments_are_one_packet() {
    let bench = bench();
    let size = scale::rounds(8 << 20, 2 << 20);
    for mtu in ["1500", "9000"] {
        bench.both(|pair| {
            for end in [&pair.host, &pair.peer] {
                end.ip(&format!("link set eth0 mtu {mtu}\n"));
            }
        });
        for address in ["10.1.0.1", "fd01::1"] {
            let address: IpAddr = address.parse().unwrap();
            let before = bench.counted("tc_ingress");
            let listener = bench
                .pair
                .host
                .enter(|| TcpListener::bind((address, 8080)).unwrap());
            let mut stream = traffic::tcp(&bench.pair.peer, (address, 8080));
            let (mut accepted, _) = listener.accept().unwrap();
            let reader = thread::spawn(move || {
                let mut bytes = Vec::new();
                accepted.read_to_end(&mut bytes).unwrap();
                bytes.len()
            });
            stream.write_all(&vec![7; size]).unwrap();
            drop(stream);
            assert_eq!(reader.join().unwrap(), size);
            let after = bench.counted("tc_ingress");
            for reason in after.keys().filter(|r| *r != "allowed") {
                assert_eq!(before.get(reason), after.get(reason), "{reason}");
            }
            let packets = after["allowed"] - before.get("allowed").unwrap_or(&0);
            if mtu == "1500" {
                let segments = size as u64 / 1448;
                assert!(
                    packets < segments / 2,
                    "{packets} packets, {segments} segments"
                );
            }
        }
    }
    bench.both(|pair| {
        for end in [&pair.host, &pair.peer] {
            end.ip("link set eth0 mtu 1500\n");
        }
    });
}
