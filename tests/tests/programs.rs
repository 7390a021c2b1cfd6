//! The loaded programs as such: their cost to the verifier, their size classes, the swap of a
//! policy, link types, and that they leave packets as they are.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests and their helpers"
)]

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use aya::maps::ProgramArray;
use enforcer::{compile::Image, dataplane::Dataplane as _};
use enforcer_common::{
    image::SIZE_CLASSES,
    verdict::{Hook, Outcome, Reason},
    wire::{INTERFACE_L3, step},
};
use enforcer_tests::{
    frame::{self, ACK, Extension, SYN},
    host::image,
    kernel::{Programs, Verdict},
    verifier,
};

const HOOKS: [Hook; 2] = [Hook::TcIngress, Hook::TcEgress];

const ALLOWS: &str = r#"
version: 1
segments:
  a: { members: [{cidr: 10.77.0.1/32}, {cidr: "fd77::1/128"}] }
  b: { members: [{cidr: 10.77.0.2/32}, {cidr: "fd77::2/128"}] }
rules:
  - { name: web, from: [a], to: [b], services: [tcp/8080, udp/4444, ping] }
"#;

const DENIES: &str = r#"
version: 1
segments:
  a: { members: [{cidr: 10.77.0.1/32}, {cidr: "fd77::1/128"}] }
  b: { members: [{cidr: 10.77.0.2/32}, {cidr: "fd77::2/128"}] }
rules:
  - { name: no, from: [a], to: [b], services: [any], action: deny }
"#;

fn between(v6: bool, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let (s, d) = if v6 {
        ("fd77::1", "fd77::2")
    } else {
        ("10.77.0.1", "10.77.0.2")
    };
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    frame::frame(ip(s), ip(d), protocol, payload)
}

/// One frame of each kind that the parser tells apart.
fn frames() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for v6 in [false, true] {
        let tcp = between(v6, 6, &frame::tcp(4000, 8080, SYN));
        let icmp = if v6 { 58 } else { 1 };
        all.push(frame::tagged(&tcp, &[(0x8100, 5)]));
        all.push(frame::tagged(&tcp, &[(0x8100, 0), (0x8100, 0)]));
        // The kernel takes no test frame that is shorter than its IP header.
        all.push(tcp[..tcp.len() - 5].to_vec());
        all.push(between(v6, 6, &frame::tcp(4000, 8080, 0)));
        all.push(between(v6, icmp, &frame::icmp_error(3, 0, &tcp[14..])));
        all.push(between(
            v6,
            icmp,
            &frame::icmp(if v6 { 128 } else { 8 }, 0, 7),
        ));
        all.push(between(v6, 17, &frame::udp(4000, 53)));
        all.push(between(v6, 47, &[0; 40]));
        all.push(tcp);
    }
    let (first, bytes) = frame::extended(
        &[Extension::HopByHop, Extension::Options],
        17,
        &frame::udp(4000, 4444),
    );
    all.push(between(true, first, &bytes));
    all.push(frame::with_options(&all[8].clone(), 10));
    all.push(frame::as_fragment(&all[8].clone(), 5, true));
    let mut arp = frame::ethernet(0x0806);
    arp.extend([0; 46]);
    all.push(arp);
    all
}

/// `docs/verifier-cost.md` has the numbers of each kernel; `cargo xtask vm --record` reads what
/// this prints. The bound is half of what every kernel allows.
#[test]
fn the_verifier_has_room_to_spare() {
    let costs = verifier::costs(enforcer::dataplane::smallest_object());
    assert!(costs.len() >= 7);
    let weak = verifier::costs(enforcer::dataplane::weak_object());
    for cost in &costs {
        println!(
            "verifier: {} {} instructions, {} bytes of stack",
            cost.program, cost.instructions, cost.stack
        );
    }
    for cost in costs.iter().chain(&weak) {
        assert!(cost.instructions <= 500_000, "{cost:?}");
        assert!(cost.stack <= 512, "{cost:?}");
    }
}

#[test]
fn without_a_policy_everything_is_dropped() {
    let mut programs = Programs::load(SIZE_CLASSES[0] as usize);
    for bytes in frames() {
        for hook in HOOKS {
            let verdict = programs.judge(hook, &bytes);
            let want = Verdict {
                passed: false,
                outcome: Outcome::Denied,
                reason: Reason::NoPolicy,
            };
            assert_eq!(verdict, want);
        }
    }
    let records = programs.drain();
    assert!(!records.is_empty());
    assert!(records.iter().all(|r| r.reason() == Reason::NoPolicy));
    programs.records(Hook::TcIngress);
}

#[test]
fn without_the_programs_that_judge_only_what_is_known_passes() {
    let mut programs = Programs::load(SIZE_CLASSES[0] as usize);
    programs.apply(&image(ALLOWS));
    let datagram = |port| between(false, 17, &frame::udp(40_000, port));
    let answer = frame::frame(
        "10.77.0.2".parse().unwrap(),
        "10.77.0.1".parse().unwrap(),
        17,
        &frame::udp(4444, 40_000),
    );
    for hook in HOOKS {
        assert!(programs.judge(hook, &datagram(4444)).passed);
        assert!(programs.judge(hook, &answer).passed);
        assert!(!programs.judge(hook, &datagram(4445)).passed);
    }
    let steps = programs.dataplane.map_mut("STEPS").unwrap();
    let mut steps = ProgramArray::try_from(steps).unwrap();
    for place in 0..step::COUNT {
        steps.clear_index(&place).unwrap();
    }
    for hook in HOOKS {
        assert!(programs.judge(hook, &datagram(4444)).passed, "{hook:?}");
        assert!(programs.judge(hook, &answer).passed, "{hook:?}");
        let before = programs.records(hook);
        for strange in frames() {
            let verdict = programs.judge(hook, &strange);
            let want = Verdict {
                passed: false,
                outcome: Outcome::Denied,
                reason: Reason::NoPolicy,
            };
            assert_eq!(verdict, want, "{hook:?}");
        }
        let lost = programs.records(hook).lost - before.lost;
        assert_eq!(lost, frames().len() as u64, "each is in the books");
    }
}

#[test]
fn size_classes_judge_alike() {
    let mut verdicts = Vec::new();
    for words in SIZE_CLASSES {
        let mut programs = Programs::load(words as usize);
        assert_eq!(programs.dataplane.image_words(), words);
        let mut got = Vec::new();
        // Each policy goes in by one write, over the one before it.
        for text in [ALLOWS, DENIES, ALLOWS] {
            programs.apply(&image(text));
            programs.forget_flows();
            for bytes in frames() {
                for hook in HOOKS {
                    let (_, out) = programs.run_often(hook, &bytes, 1);
                    assert_eq!(out, bytes, "a packet comes out as it went in");
                    programs.settle();
                    got.push(programs.judge(hook, &bytes));
                }
            }
        }
        let third = got.len() / 3;
        assert_eq!(got[..third], got[2 * third..], "the same policy again");
        assert_ne!(got[..third], got[third..2 * third]);
        verdicts.push(got);
    }
    assert_eq!(verdicts[0], verdicts[1]);
    assert_eq!(verdicts[0], verdicts[2]);
}

/// One that the smallest programs cannot take.
fn large() -> Image {
    // 600 kinds of address: 360 000 pairs of them.
    let mut text = "version: 1\ndefaults: { unsegmented: deny }\nsegments:\n".to_owned();
    for i in 0..600 {
        let address = format!("10.9.{}.{}", i / 250, i % 250);
        text += &format!("  s{i}: {{ members: [{{cidr: {address}/32}}] }}\n");
    }
    text += "rules:\n  - { name: x, from: [s0], to: [s1], services: [tcp/1] }\n";
    let large = image(&text);
    assert!(large.words().len() > SIZE_CLASSES[0] as usize);
    large
}

#[test]
fn a_candidate_that_outgrows_the_programs_replaces_them_and_is_asked_before_and_after() {
    let mut programs = Programs::load(SIZE_CLASSES[0] as usize);
    programs.apply(&image("version: 1\ndefaults: { unsegmented: allow }\n"));
    let candidate = |image: Image, number: u32| image.with_generation(1 << 31 | number);
    let deny = image("version: 1\ndefaults: { unsegmented: deny }\n");
    let set = |programs: &mut Programs, image| programs.dataplane.set_shadow(Some(&image), false);
    let syn = |port| between(false, 6, &frame::tcp(port, 8080, SYN));
    let counts = |programs: &Programs| -> Vec<(u32, u64)> {
        let all = programs.dataplane.differences().unwrap().into_iter();
        let all = all.map(|(key, count)| (key.shadow.generation & 0xff, count.packets));
        all.collect()
    };
    set(&mut programs, candidate(deny, 1)).unwrap();
    let verdict = programs.judge(Hook::TcIngress, &syn(4000));
    assert_eq!(verdict.reason, Reason::Unsegmented);
    assert_eq!(counts(&programs), [(0, 0), (1, 1)]);
    // The image in force, its flows and all counts go with it.
    set(&mut programs, candidate(large(), 2)).unwrap();
    assert_eq!(programs.dataplane.image_words(), SIZE_CLASSES[1]);
    assert_eq!(counts(&programs), [(0, 0), (1, 1)]);
    for (port, want) in [(4000, Reason::Unsegmented), (4001, Reason::Unsegmented)] {
        let verdict = programs.judge(Hook::TcIngress, &syn(port));
        assert_eq!((verdict.passed, verdict.reason), (true, want));
    }
    // Two keys, in their order: each candidate's own.
    assert_eq!(counts(&programs), [(0, 0), (1, 1), (2, 2)]);
    programs.dataplane.set_shadow(None, false).unwrap();
    let verdict = programs.judge(Hook::TcIngress, &syn(4002));
    assert_eq!(verdict.reason, Reason::Unsegmented);
    assert_eq!(counts(&programs).last(), Some(&(2, 2)));
}

#[test]
fn a_second_has_as_many_ticks_as_the_programs_are_told() {
    let programs = Programs::load(SIZE_CLASSES[0] as usize);
    let look = || {
        let (ticks, hz) = programs.dataplane.flow_reader().unwrap().jiffies();
        (ticks, hz, Instant::now())
    };
    let (first, hz, begun) = look();
    std::thread::sleep(Duration::from_secs(3));
    let (last, _, ended) = look();
    let told = f64::from(last.wrapping_sub(first)) / f64::from(hz);
    let took = (ended - begun).as_secs_f64();
    // Rates that kernels are built with are 20 % apart.
    assert!(
        (told / took - 1.0).abs() < 0.09,
        "{told} s by {hz} Hz in {took} s"
    );
}

#[test]
fn an_image_that_outgrows_the_programs_replaces_them_and_keeps_flows_and_counts() {
    let mut programs = Programs::load(SIZE_CLASSES[0] as usize);
    programs.apply(&image(ALLOWS));
    let tcp = |flags| between(false, 6, &frame::tcp(4000, 8080, flags));
    let verdict = programs.judge(Hook::TcIngress, &tcp(SYN));
    assert_eq!(verdict.reason, Reason::RuleAllow);
    let large = large();
    let before = (programs.flows(), programs.counters());
    assert_eq!(before.0.0.len(), 1);
    programs.apply(&large);
    assert_eq!(programs.dataplane.image_words(), SIZE_CLASSES[1]);
    assert_eq!((programs.flows(), programs.counters()), before);
    for (last, want) in [(1, Reason::RuleAllow), (2, Reason::DefaultDeny)] {
        let to = IpAddr::from([10, 9, 0, last]);
        let syn = frame::frame([10, 9, 0, 0].into(), to, 6, &frame::tcp(4000, 1, SYN));
        assert_eq!(programs.judge(Hook::TcEgress, &syn).reason, want);
    }
    // And back, by the larger programs.
    programs.apply(&image(ALLOWS));
    for want in [Reason::RuleAllow, Reason::Established] {
        let verdict = programs.judge(Hook::TcIngress, &tcp(ACK));
        assert_eq!(verdict.reason, want);
    }
    assert_eq!(programs.dataplane.image_words(), SIZE_CLASSES[1]);
}

/// Test frames have their network header behind an Ethernet header, whatever the link type. Links
/// without one, as they are, are in `tunnels.rs` and `disguise.rs`.
#[test]
fn a_packet_that_does_not_begin_with_its_network_header_is_denied_where_it_should() {
    let mut programs = Programs::shared();
    programs.apply(&image(ALLOWS));
    let web = between(false, 6, &frame::tcp(4000, 8080, SYN));
    for hook in HOOKS {
        assert_eq!(programs.judge(hook, &web).reason, Reason::RuleAllow);
    }
    // Test frames are on the loopback device.
    programs.set_interface(1, INTERFACE_L3, 0);
    for hook in HOOKS {
        assert_eq!(programs.judge(hook, &web).reason, Reason::Malformed);
    }
}
