//! Inputs to start from: real frames in scripts, the project's policies, sound records.

use std::{fs, net::IpAddr, path::Path};

use enforcer_common::verdict::Reason;

use super::script::{self, INGRESS, L3, OTHER, SWAP, TEXTS, VLAN, WAIT, encode};
use crate::frame::{self, ACK, Extension, FIN, RST, SYN};

const ENDS: [(&str, &str); 4] = [
    ("10.77.0.1", "10.77.0.2"),
    ("fd77::1", "fd77::2"),
    ("169.254.0.1", "10.77.0.1"),
    ("fe80::1", "fd77::1"),
];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Conversations, each with what it may be damaged into.
pub fn packets() -> Vec<Vec<u8>> {
    let mut scripts = Vec::new();
    let policies = u8::try_from(script::TEXTS.len()).unwrap();
    for (a, b) in ENDS {
        let (a, b) = (ip(a), ip(b));
        let v6 = a.is_ipv6();
        let (icmp, request, reply, unreachable) = if v6 { (58, 128, 129, 1) } else { (1, 8, 0, 3) };
        let there =
            |protocol, payload: Vec<u8>| (INGRESS, 0, frame::frame(a, b, protocol, &payload));
        let back = |protocol, payload: Vec<u8>| (0, 0, frame::frame(b, a, protocol, &payload));
        // Fragments hold whole units of 8 bytes.
        let datagram = [frame::udp(4000, 4444), vec![0; 4]].concat();
        let quoted = frame::ip(a, b, 17, &frame::udp(4000, 4444));
        let mut talks = vec![
            vec![
                there(6, frame::tcp(4000, 8080, SYN)),
                back(6, frame::tcp(8080, 4000, SYN | ACK)),
                there(6, frame::tcp(4000, 8080, ACK)),
                back(6, frame::tcp(8080, 4000, FIN | ACK)),
                there(6, frame::tcp(4000, 8080, RST)),
            ],
            vec![
                there(17, frame::udp(4000, 4444)),
                back(17, frame::udp(4444, 4000)),
                back(icmp, frame::icmp_error(unreachable, 4, &quoted)),
            ],
            vec![
                there(icmp, frame::icmp(request, 0, 7)),
                back(icmp, frame::icmp(reply, 0, 7)),
                back(icmp, frame::icmp(request, 0, 7)),
            ],
            vec![
                there(132, [frame::udp(4000, 4444), vec![0; 8]].concat()),
                there(47, vec![0; 24]),
                back(47, vec![0; 24]),
                there(6, frame::tcp(4000, 8080, SYN | FIN)),
            ],
        ];
        if v6 {
            let behind = |headers: &[Extension]| {
                let (first, bytes) = frame::extended(headers, 17, &datagram);
                (INGRESS, 0, frame::frame(a, b, first, &bytes))
            };
            talks.push(vec![
                behind(&[
                    Extension::HopByHop,
                    Extension::Options,
                    Extension::Routing(0),
                ]),
                behind(&[Extension::Fragment(0, false)]),
                behind(&[Extension::Fragment(0, true)]),
                behind(&[Extension::Fragment(2, false)]),
                behind(&[Extension::Fragment(1, false)]),
                behind(&[Extension::Options; 7]),
            ]);
            let mut solicitation =
                frame::frame(a, b, 58, &[&frame::icmp(135, 0, 0)[..], &[0; 16]].concat());
            solicitation[21] = 255;
            let mut report = frame::frame(a, ip("ff02::16"), 58, &frame::icmp(143, 0, 0));
            report[21] = 1;
            let dhcp = frame::frame(a, ip("ff02::1:2"), 17, &frame::udp(546, 547));
            talks.push(vec![
                (INGRESS, 0, solicitation),
                (0, 0, report),
                (0, 0, dhcp),
            ]);
        } else {
            let udp = frame::frame(a, b, 17, &datagram);
            let mut routed = frame::with_options(&udp, 3);
            routed[34] = 131;
            talks.push(vec![
                (INGRESS, 0, frame::with_options(&udp, 1)),
                (INGRESS, 0, frame::with_options(&udp, 10)),
                (INGRESS, 0, frame::as_fragment(&udp, 0, true)),
                (INGRESS, 0, frame::as_fragment(&udp, 2, false)),
                (INGRESS, 0, frame::as_fragment(&udp, 1, false)),
                (INGRESS, 0, routed),
            ]);
            let lease = frame::frame(
                ip("0.0.0.0"),
                ip("255.255.255.255"),
                17,
                &frame::udp(68, 67),
            );
            let query = frame::frame(a, ip("224.0.0.1"), 2, &[0x11; 8]);
            let mdns = frame::frame(a, ip("224.0.0.251"), 17, &frame::udp(5353, 5353));
            talks.push(vec![(0, 0, lease), (INGRESS, 0, query), (0, 0, mdns)]);
        }
        for (number, talk) in (0..).zip(&talks) {
            scripts.push(encode(2, talk));
            scripts.push(encode(3 + number % (policies - 3), talk));
        }
        // The last of the first talk again: under other policies, later, elsewhere, tagged, bare.
        let mut talk = talks.swap_remove(0);
        let (flags, _, bytes) = talk[2].clone();
        for (more, argument) in [
            (SWAP, 4),
            (SWAP, 0),
            (WAIT, 4),
            (OTHER, 0),
            (VLAN, 5),
            (VLAN, 0),
        ] {
            talk.push((flags | more, argument, bytes.clone()));
        }
        talk.push((flags | L3, 0, bytes[14..].to_vec()));
        for tags in [
            &[(0x8100, 5)][..],
            &[(0x8100, 0), (0x8100, 0)],
            &[(0x88a8, 5), (0x8100, 6)],
        ] {
            talk.push((flags, 0, frame::tagged(&bytes, tags)));
        }
        scripts.push(encode(2, &talk));
    }
    let mut below = Vec::new();
    for ethertype in [0x0806, 0x88cc, 0x888e, 0x8809, 0x88f7, 0x88b5, 38] {
        let mut bytes = frame::ethernet(ethertype);
        if ethertype == 38 {
            bytes[..6].copy_from_slice(&[1, 0x80, 0xc2, 0, 0, 0]);
        }
        bytes.extend([0x42; 46]);
        below.push((INGRESS, 0, bytes));
    }
    scripts.push(encode(0, &below));
    scripts
}

/// Every policy of the tests, the broken ones too, and the example.
pub fn policy() -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut seeds: Vec<Vec<u8>> = TEXTS.iter().map(|text| text.as_bytes().to_vec()).collect();
    for directory in ["segments", "enforcer/tests/diagnostics"] {
        let mut files: Vec<_> = fs::read_dir(root.join(directory))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
            .collect();
        files.sort();
        seeds.extend(files.iter().map(|file| fs::read(file).unwrap()));
    }
    seeds
}

/// Records of each hook, family and reason, as the programs write them.
pub fn events() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for reason in Reason::ALL {
        let mut records = Vec::new();
        for (hook, family, protocol) in [(0, 4, 6), (1, 6, 17), (2, 4, 58), (3, 0, 1)] {
            let number = u8::try_from(*reason as u32).unwrap();
            let mut record = vec![0u8; 136];
            // See `wire::Event`: total, comm, rule, segment, generation, family and what follows.
            record[8] = 1 + hook;
            record[24 + 8] = hook;
            record[40..44].copy_from_slice(b"curl");
            record[88..96].fill(0xff);
            record[96] = number % 8;
            record[104] = number;
            record[124..130].copy_from_slice(&[protocol, family, hook, hook % 3, number, 0x12]);
            records.extend(record);
        }
        seeds.push(records);
    }
    seeds
}
