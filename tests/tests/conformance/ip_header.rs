//! IPv4: headers that lie, options, source routes.

use std::net::IpAddr;

use enforcer_tests::frame;

use crate::{
    bench::{BAD, Bench, GOOD, bench, port, sealed, udp},
    wire::mark,
};

/// A datagram with IPv4 options.
fn datagram(bench: &mut Bench, options: &[u8], to: u16) -> Vec<u8> {
    let number = bench.next();
    let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
    let data = udp(port(number), to, &mark(number));
    let mut bytes = frame::frame(ip("10.1.0.3"), ip("10.1.0.1"), 17, &data);
    bytes.splice(34..34, options.iter().copied());
    bytes[14] = 0x45 + u8::try_from(options.len() / 4).unwrap();
    let total = u16::try_from(bytes.len() - 14).unwrap();
    bytes[16..18].copy_from_slice(&total.to_be_bytes());
    sealed(&bytes)
}

#[test]
fn headers_that_contradict_the_packet_are_dropped() {
    let mut bench = bench();
    let lie = |frame: &[u8], at: usize, byte: u8| {
        let mut out = frame.to_vec();
        out[at] = byte;
        sealed(&out)
    };
    for to in [GOOD, BAD] {
        // A header of less than 20 bytes, and longer than the packet; no version 4.
        for first in [0x40, 0x41, 0x44, 0x4f, 0x4e, 0x55, 0x65, 0x05, 0xf5] {
            let whole = datagram(&mut bench, &[], to);
            let seen = bench.judge(&[lie(&whole, 14, first)]);
            seen.counts(&[("malformed", 1)])
                .nothing_arrived()
                .harmful(0);
        }
        // A total length of less than the header, than header and UDP header, more than the frame.
        for total in [0, 1, 19, 20, 21, 27, 37, 255] {
            let whole = datagram(&mut bench, &[], to);
            let seen = bench.judge(&[lie(&whole, 17, total)]);
            seen.counts(&[("malformed", 1)]).nothing_arrived();
        }
        for first in [0x46, 0x48] {
            // UDP's header begins in the middle of what it was: the ports are others.
            let whole = datagram(&mut bench, &[], to);
            let seen = bench.judge(&[lie(&whole, 14, first)]);
            assert!(!seen.counts.contains_key("allowed"), "{seen:?}");
            seen.nothing_arrived();
        }
        // IPv6 by the ethertype, IPv4 by itself.
        let mut bytes = datagram(&mut bench, &[], to);
        bytes[12..14].copy_from_slice(&[0x86, 0xdd]);
        bytes.extend([0; 40]);
        bench
            .judge(&[bytes])
            .counts(&[("malformed", 1)])
            .nothing_arrived();
    }
}

#[test]
fn padding_behind_the_packet_is_no_part_of_it() {
    let mut bench = bench();
    // A total length that ends before UDP's own: what is behind it is not looked at.
    let mut bytes = datagram(&mut bench, &[], GOOD);
    bytes.extend([0; 18]);
    bench.judge(&[bytes]).counts(&[("allowed", 1)]).arrived(1);
    let mut bytes = datagram(&mut bench, &[], GOOD);
    let other = datagram(&mut bench, &[], BAD);
    bytes[17] = 20 + 4;
    bytes.extend(&other[14..]);
    bench
        .judge(&[sealed(&bytes)])
        .counts(&[("malformed", 1)])
        .nothing_arrived();
}

#[test]
fn options_do_not_hide_the_ports() {
    let mut bench = bench();
    for words in 1..=10 {
        let options = vec![1; words * 4];
        let bytes = datagram(&mut bench, &options, BAD);
        let seen = bench.judge(&[bytes]);
        seen.counts(&[("default_deny", 1)])
            .nothing_arrived()
            .harmful(1);
        let bytes = datagram(&mut bench, &options, GOOD);
        let seen = bench.judge(std::slice::from_ref(&bytes));
        seen.counts(&[("allowed", 1)]).arrived(1).harmful(1);
        assert_eq!(seen.passed, [bytes], "not a byte is another");
    }
    // Where the ports would be without options: an option that looks like 4444, or 5555.
    for (looks, to, counts) in [
        (GOOD, BAD, [("default_deny", 1)]),
        (BAD, GOOD, [("allowed", 1)]),
    ] {
        let [a, b] = looks.to_be_bytes();
        let options = [0x1e, 4, a, b, 0x1e, 4, a, b];
        let bytes = datagram(&mut bench, &options, to);
        let seen = bench.judge(&[bytes]);
        seen.counts(&counts)
            .harmful(1)
            .arrived(usize::from(to == GOOD));
    }
}

#[test]
fn source_routes_are_dropped() {
    let mut bench = bench();
    // As the host would take them.
    bench.both(|pair| {
        for name in ["all", "eth0"] {
            pair.host
                .sysctl(&format!("ipv4/conf/{name}/accept_source_route"), "1");
        }
    });
    for kind in [131, 137] {
        // Through the host to somebody else; used up, so that this host is the last; in the middle.
        let stops = [
            vec![kind, 7, 4, 10, 1, 0, 4, 0],
            vec![kind, 7, 8, 10, 1, 0, 4, 0],
            vec![1, 1, 1, kind, 7, 8, 10, 1, 0, 4, 0, 0],
        ];
        for options in stops {
            for to in [GOOD, BAD] {
                let bytes = datagram(&mut bench, &options, to);
                let seen = bench.judge(&[bytes]);
                seen.counts(&[("source_route", 1)]).nothing_arrived();
                assert!(seen.passed.is_empty());
            }
        }
    }
}
