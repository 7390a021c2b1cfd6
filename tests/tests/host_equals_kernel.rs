//! The same parser, flow rules and decisions give the same verdict on the host and in the loaded
//! bytecode: over thousands of damaged frames in one order, with one flow table each.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests and their helpers"
)]

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use enforcer_common::{
    image::SIZE_CLASSES,
    verdict::{Hook, Outcome, Reason},
    wire::FlowEntry,
};
use enforcer_tests::{
    frame::{self, ACK, Extension, FIN, RST, SYN},
    host::{Host, image},
    kernel::{Programs, pin},
};

const FRAMES: usize = 8000;
/// Frames judged under one policy.
const TURN: usize = 500;

const POLICIES: [&str; 3] = [
    r#"
version: 1
segments:
  a: { members: [{cidr: 10.77.0.1/32}, {cidr: "fd77::1/128"}] }
  b: { members: [{cidr: 10.77.0.2/32}, {cidr: "fd77::2/128"}] }
rules:
  - { name: web, from: [a], to: [b], services: [tcp/8080, udp/4444, sctp/any, ping, proto/gre] }
  - { name: group, from: [a], to: [multicast], services: [udp/5353] }
"#,
    r#"
version: 1
defaults: { mode: observe }
segments:
  a: { members: [{cidr: 10.77.0.1/32}, {cidr: "fd77::1/128"}], mode: enforce }
  b: { members: [{cidr: 10.77.0.0/29}, {cidr: "fd77::/125"}], protect: inbound }
rules:
  - { name: some, from: [a], to: [b], services: [tcp/8080] }
  - { name: none, from: [b], to: [a], services: [udp/any], action: deny }
"#,
    r#"
version: 1
defaults: { mode: enforce, unsegmented: deny }
segments:
  a: { members: [{cidr: 10.77.0.1/32}, {cidr: "fd77::1/128"}], mode: "off" }
  b: { members: [{cidr: 10.77.0.2/32}, {cidr: "fd77::2/128"}], mode: observe }
rules:
  - { name: back, from: [b], to: [a], services: [any] }
"#,
];

/// xorshift64*: the same frames on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let mixed = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(mixed).unwrap() % limit
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A sound frame between a few addresses and ports, so that flows meet.
fn sound(random: &mut Random) -> Vec<u8> {
    let v6 = random.one_in(2);
    let ends = if v6 {
        ["fd77::1", "fd77::2", "fd77::3", "fe80::1", "ff02::fb"]
    } else {
        [
            "10.77.0.1",
            "10.77.0.2",
            "10.77.0.3",
            "169.254.0.1",
            "224.0.0.251",
        ]
    };
    // Mostly the first two.
    let end = |random: &mut Random| {
        let among = if random.one_in(8) { ends.len() } else { 2 };
        ends[random.below(among)]
    };
    let (source, destination) = (ip(end(random)), ip(end(random)));
    let port = |random: &mut Random| random.pick(&[4000u16, 4001, 8080, 4444, 5353, 67, 68]);
    let (from, to) = (port(random), port(random));
    let flags = random.pick(&[SYN, SYN, SYN | ACK, ACK, ACK, RST, FIN | ACK, FIN, 0, 0xff]);
    let kind = if v6 {
        random.pick(&[128u8, 129, 1, 2, 134, 135, 143, 200])
    } else {
        random.pick(&[8, 0, 13, 14, 3, 5, 11])
    };
    let icmp = if v6 { 58 } else { 1 };
    let (protocol, payload) = match random.below(10) {
        0..=3 => (6, frame::tcp(from, to, flags)),
        4 | 5 => (17, frame::udp(from, to)),
        6 => (icmp, frame::icmp(kind, 0, random.pick(&[7, 8]))),
        7 => {
            let quoted = match random.below(3) {
                0 => (6, frame::tcp(from, to, ACK)),
                1 => (17, frame::udp(from, to)),
                _ => (icmp, frame::icmp(if v6 { 128 } else { 8 }, 0, 7)),
            };
            let (s, d) = (ip(ends[random.below(2)]), ip(ends[random.below(2)]));
            let quoted = frame::ip(s, d, quoted.0, &quoted.1);
            (
                icmp,
                frame::icmp_error(random.pick(&[1, 2, 3, 4, 11]), 0, &quoted),
            )
        }
        8 => (132, [frame::udp(from, to), vec![0; 8]].concat()),
        _ => (random.pick(&[2, 47, 50, 59, 0, 255]), vec![0; 24]),
    };
    if v6 {
        let mut headers = Vec::new();
        if random.one_in(4) {
            for _ in 0..=random.below(7) {
                headers.push(random.pick(&[
                    Extension::Options,
                    Extension::Options,
                    Extension::Routing(0),
                    Extension::Fragment(0, false),
                ]));
            }
            match random.below(6) {
                0 => headers[0] = Extension::HopByHop,
                1 => headers.push(Extension::HopByHop),
                2 => headers.push(Extension::Routing(1)),
                3 => headers.push(Extension::Fragment(0, true)),
                4 => headers.push(Extension::Fragment(random.pick(&[1, 3, 4]), true)),
                _ => {}
            }
        }
        let mut payload = payload;
        if random.one_in(2) {
            payload.resize(payload.len().next_multiple_of(8), 0);
        }
        let (first, bytes) = frame::extended(&headers, protocol, &payload);
        let mut bytes = frame::frame(source, destination, first, &bytes);
        bytes[21] = random.pick(&[255, 255, 1, 64]);
        bytes
    } else {
        // Fragments hold whole units of 8 bytes.
        let part = random.below(12);
        let mut payload = payload;
        if part < 3 {
            payload.resize(payload.len().next_multiple_of(8), 0);
        }
        let mut bytes = frame::frame(source, destination, protocol, &payload);
        if random.one_in(6) {
            bytes = frame::with_options(&bytes, u8::try_from(random.below(11)).unwrap());
            if random.one_in(4) {
                let at = 34 + random.below(8);
                bytes[at] = random.pick(&[131, 137, 130]);
            }
        }
        match part {
            0 => frame::as_fragment(&bytes, 0, true),
            1 => frame::as_fragment(&bytes, random.pick(&[1, 2, 3, 4]), false),
            2 => frame::as_fragment(&bytes, random.pick(&[1, 3, 5]), true),
            _ => bytes,
        }
    }
}

/// A frame, damaged or not.
fn next(random: &mut Random) -> Vec<u8> {
    let mut bytes = sound(random);
    if random.one_in(5) {
        let mut tags = Vec::new();
        for _ in 0..=random.below(3) {
            tags.push((random.pick(&[0x8100, 0x88a8]), random.pick(&[0, 5, 6])));
        }
        bytes = frame::tagged(&bytes, &tags);
    }
    match random.below(8) {
        0 => bytes.truncate(15 + random.below(bytes.len() - 15)),
        1 | 2 => {
            for _ in 0..=random.below(3) {
                // Headers, not the link's addresses.
                let at = 12 + random.below(bytes.len().min(80) - 12);
                bytes[at] = random.below(256).try_into().unwrap();
            }
        }
        3 => {
            // One bit of the IP header or of what follows it.
            let at = 14 + random.below(bytes.len().min(60) - 14);
            bytes[at] ^= 1 << random.below(8);
        }
        4 => bytes.extend(vec![0x5a; random.below(40)]),
        _ => {}
    }
    bytes
}

/// The kernel refuses test frames with less than an IP header behind an IP ethertype.
fn runnable(bytes: &[u8]) -> bool {
    match (bytes[12], bytes[13]) {
        (0x08, 0x00) => bytes.len() >= 34,
        (0x86, 0xdd) => bytes.len() >= 54,
        _ => true,
    }
}

/// An entry without its clock.
fn stamped(entry: &FlowEntry) -> (u32, u32, u32, u32) {
    (entry.generation, entry.rule, entry.flags, entry.selector)
}

/// Reasons that take more than a frame and a policy.
const ELSEWHERE: [Reason; 7] = [
    Reason::NoPolicy,
    Reason::Spoofed,
    Reason::Failsafe,
    Reason::Expired,
    Reason::VlanDevice,
    Reason::Deferred,
    Reason::EthertypeListed,
];

#[test]
fn damaged_frames_get_one_verdict() {
    pin();
    let mut programs = Programs::load(SIZE_CLASSES[0] as usize);
    let mut host = Host::new(image(POLICIES[0]));
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut seen: HashMap<(Outcome, Reason), usize> = HashMap::new();
    let mut judged = 0;
    while judged < FRAMES {
        if judged % TURN == 0 {
            host.image = image(POLICIES[judged / TURN % POLICIES.len()]);
            programs.apply(&host.image);
            // All of it the long way, and all that may by shorter ones.
            programs.short_ways(1, (judged / TURN % 2 == 0).then_some(0));
        }
        let bytes = next(&mut random);
        if !runnable(&bytes) {
            continue;
        }
        let ingress = random.one_in(2);
        let hook = if ingress {
            Hook::TcIngress
        } else {
            Hook::TcEgress
        };
        let want = host.judge(ingress, &bytes);
        let got = programs.judge(hook, &bytes);
        assert_eq!(
            (got.outcome, got.reason),
            (want.outcome, want.reason),
            "frame {judged}: {bytes:02x?}"
        );
        for event in programs.drain() {
            if event.generation != host.image.generation() || event.total > 1 {
                continue; // the count of another flow whose slot was taken
            }
            assert_eq!(event.outcome(), want.outcome, "frame {judged}");
            assert_eq!(event.reason(), want.reason, "frame {judged}");
            assert_eq!(event.rule, want.rule, "frame {judged}");
            assert_eq!(event.segment, want.segment, "frame {judged}");
        }
        *seen.entry((got.outcome, got.reason)).or_default() += 1;
        judged += 1;
        // The next packet like it may go a shorter way, to the same verdict.
        let want = host.judge(ingress, &bytes);
        let got = programs.judge(hook, &bytes);
        assert_eq!(
            (got.outcome, got.reason),
            (want.outcome, want.reason),
            "frame {judged} again: {bytes:02x?}"
        );
        programs.drain();
    }
    let mut seen: Vec<_> = seen.into_iter().collect();
    seen.sort_by_key(|(k, _)| (k.1 as u32, k.0 as u32));
    println!("{seen:?}");
    let reasons: HashSet<Reason> = seen.iter().map(|((_, reason), _)| *reason).collect();
    for reason in Reason::ALL.iter().filter(|r| !ELSEWHERE.contains(*r)) {
        assert!(reasons.contains(reason), "no frame reached {reason:?}");
    }
    for outcome in Outcome::ALL {
        let here = seen.iter().filter(|((o, _), _)| *o == outcome);
        assert!(
            here.map(|(_, n)| n).sum::<usize>() > 100,
            "{outcome:?} is rare"
        );
    }

    // Both tables hold the same flows, in the same state.
    let (v4, v6) = programs.flows();
    let entries = host.flows.entries.borrow();
    assert!(entries.len() > 100);
    assert_eq!(v4.len() + v6.len(), entries.len());
    for (key, entry) in entries.iter() {
        let kernel = if key.is_v6() {
            v6.get(key)
        } else {
            v4.get(key)
        };
        assert_eq!(
            kernel.map(stamped),
            Some(stamped(&entry.0.get())),
            "{key:?}"
        );
    }
    programs.records(Hook::TcIngress);
}
