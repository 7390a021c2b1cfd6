//! Everything a packet leaves behind: its counter, its record, its flow. And the books balance:
//! `denied + would_deny = emitted + suppressed + lost`, at each hook, whatever happens to records.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests and their helpers"
)]

use std::{net::IpAddr, sync::MutexGuard, time::Duration};

use enforcer::dataplane::Dataplane as _;
use enforcer_common::{
    flow::{CLOSING, OPENER_IS_LOW, REPLIED},
    verdict::{Hook, Outcome, Reason},
    wire::{Event, FlowEntry, FlowKey},
};
use enforcer_tests::{
    frame::{self, ACK, FIN, RST, SYN},
    host::image,
    kernel::Programs,
};

const POLICY: &str = r#"
version: 1
segments:
  a: { members: [{cidr: 10.77.0.1/32}] }
  b: { members: [{cidr: 10.77.0.2/32}] }
  watched: { members: [{cidr: 10.77.0.3/32}], mode: observe }
rules:
  - { name: other, from: [a], to: [b], services: [tcp/1] }
  - { name: web, from: [a], to: [b], services: [tcp/8080] }
"#;
const NOTHING: &str = r#"
version: 1
segments:
  a: { members: [{cidr: 10.77.0.1/32}] }
  b: { members: [{cidr: 10.77.0.2/32}] }
rules:
  - { name: no, from: [a], to: [b], services: [tcp/8080], action: deny }
"#;
const INGRESS: Hook = Hook::TcIngress;
/// Records of 144 bytes, header included, that the ring of a MiB holds.
const RING: u64 = (1 << 20) / 144;

fn ip(last: u8) -> IpAddr {
    [10, 77, 0, last].into()
}

fn tcp(from: (u8, u16), to: (u8, u16), flags: u8) -> Vec<u8> {
    frame::frame(ip(from.0), ip(to.0), 6, &frame::tcp(from.1, to.1, flags))
}

fn udp(from: (u8, u16), to: (u8, u16)) -> Vec<u8> {
    frame::frame(ip(from.0), ip(to.0), 17, &frame::udp(from.1, to.1))
}

fn load(text: &str) -> MutexGuard<'static, Programs> {
    let mut programs = Programs::shared();
    programs.apply(&image(text));
    programs
}

fn from_port(events: &[Event], port: u16) -> Vec<Event> {
    events
        .iter()
        .filter(|e| e.source_port == port)
        .copied()
        .collect()
}

#[test]
fn one_tcp_flow_step_by_step() {
    let mut programs = load(POLICY);
    let key = FlowKey::new(
        [0, 0, 0, 0x0a4d_0001],
        [0, 0, 0, 0x0a4d_0002],
        4000,
        8080,
        6,
        false,
        0,
    );
    let entry = |programs: &mut Programs| -> Option<FlowEntry> {
        let (v4, v6) = programs.flows();
        assert!(v4.len() <= 1 && v6.is_empty());
        v4.get(&key).copied()
    };
    let there = |flags| tcp((1, 4000), (2, 8080), flags);
    let back = |flags| tcp((2, 8080), (1, 4000), flags);
    let (allowed, denied) = (Outcome::Allowed, Outcome::Denied);
    let opened = Some(OPENER_IS_LOW);
    let replied = Some(OPENER_IS_LOW | REPLIED);
    let closing = Some(OPENER_IS_LOW | REPLIED | CLOSING);
    let mut last_seen = 0;
    // (frame, ingress, outcome, reason, records, flags of the entry)
    for (step, (bytes, ingress, outcome, reason, records, flags)) in [
        (back(SYN), true, denied, Reason::DefaultDeny, 1, None),
        (back(SYN | ACK), true, denied, Reason::NoFlow, 1, None),
        (there(SYN), false, allowed, Reason::RuleAllow, 0, opened),
        (there(SYN), false, allowed, Reason::RuleAllow, 0, opened),
        (
            back(SYN | ACK),
            true,
            allowed,
            Reason::Established,
            0,
            replied,
        ),
        (there(ACK), false, allowed, Reason::Established, 0, replied),
        (back(SYN), false, denied, Reason::DefaultDeny, 1, replied),
        (back(ACK), true, allowed, Reason::Established, 0, replied),
        (
            there(FIN | ACK),
            false,
            allowed,
            Reason::Established,
            0,
            closing,
        ),
        (back(RST), true, allowed, Reason::Established, 0, closing),
    ]
    .into_iter()
    .enumerate()
    {
        let hook = if ingress { INGRESS } else { Hook::TcEgress };
        // `judge` itself checks that one counter moved by one, and that the action agrees.
        let verdict = programs.judge(hook, &bytes);
        assert_eq!(
            (verdict.outcome, verdict.reason),
            (outcome, reason),
            "step {step}"
        );
        let events = programs.drain();
        assert_eq!(events.len(), records, "step {step}");
        for event in events {
            assert_eq!((event.outcome(), event.reason()), (outcome, reason));
            assert_eq!(event.hook(), Some(hook));
            assert_eq!((event.total, event.protocol, event.family), (1, 6, 4));
            assert_eq!((event.source_port, event.destination_port), (8080, 4000));
            assert_eq!(
                (event.selector, event.ethertype, event.ifindex),
                (4000, 0x0800, 1)
            );
            assert_eq!(event.source[3], 0x0a4d_0002);
            assert_eq!((event.rule, event.segment), (u32::MAX, 0), "a guards");
            assert_eq!(event.tcp_flags, bytes[14 + 20 + 13]);
        }
        let now = entry(&mut programs);
        assert_eq!(now.map(|e| e.flags), flags, "step {step}");
        if let Some(entry) = now {
            assert_eq!((entry.rule, entry.selector), (1, 8080), "step {step}");
            assert!(entry.last_seen >= last_seen);
            last_seen = entry.last_seen;
        }
        programs.records(hook);
    }

    programs.apply(&image(NOTHING));
    let before = entry(&mut programs);
    for bytes in [there(ACK), back(ACK)] {
        let verdict = programs.judge(INGRESS, &bytes);
        assert_eq!((verdict.outcome, verdict.reason), (denied, Reason::Revoked));
        let events = programs.drain();
        assert_eq!(events.len(), 1);
        assert_eq!(
            (events[0].rule, events[0].segment),
            (0, u32::MAX),
            "the deny rule"
        );
        assert_eq!(
            entry(&mut programs),
            before,
            "denied packets change no flow"
        );
    }
    let again = image(POLICY);
    programs.apply(&again);
    assert_eq!(
        programs.judge(INGRESS, &back(ACK)).reason,
        Reason::RuleAllow
    );
    let now = entry(&mut programs).unwrap();
    assert_eq!((now.generation, now.rule), (again.generation(), 1));
    assert_eq!(
        programs.judge(INGRESS, &there(ACK)).reason,
        Reason::Established
    );
    assert!(programs.drain().is_empty());
}

#[test]
fn repeats_are_counted_and_recorded_once() {
    let mut programs = load(POLICY);
    let syn = tcp((2, 5000), (1, 22), SYN);
    programs.run_often(INGRESS, &syn, 1000);
    assert_eq!(programs.count(INGRESS, Outcome::Denied), 1000);
    let records = programs.records(INGRESS);
    assert_eq!(
        (records.emitted, records.suppressed, records.lost),
        (1, 999, 0)
    );
    let events = programs.drain();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].total, 1);
    let counts = programs.dataplane.running_counts().unwrap();
    assert_eq!(counts.len(), 1);
    assert_eq!(counts[0].total, 1000);
    let same = |e: &Event| (e.cpu, e.slot, e.epoch);
    assert_eq!(same(&counts[0]), same(&events[0]), "the same series");

    // A second later the next repeat carries the count.
    std::thread::sleep(Duration::from_millis(1100));
    programs.run(INGRESS, &syn);
    let events = programs.drain();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].total, 1001);
    assert!(programs.dataplane.running_counts().unwrap().is_empty());
    let records = programs.records(INGRESS);
    assert_eq!((records.emitted, records.suppressed), (2, 999));

    // The other hook, another outcome, another policy: records of their own, none displaces any.
    programs.run_often(Hook::TcEgress, &syn, 10);
    let watched = udp((3, 5000), (9, 53));
    programs.forget_flows();
    programs.run_often(INGRESS, &watched, 10);
    assert_eq!(
        programs.count(INGRESS, Outcome::WouldDeny),
        1,
        "then it is a flow"
    );
    assert_eq!(programs.drain().len(), 2);
    programs.apply(&image(POLICY));
    programs.run_often(INGRESS, &syn, 10);
    let events = programs.drain();
    assert_eq!(
        events.len(),
        1,
        "a new generation starts a count of its own"
    );
    assert_eq!(events[0].total, 1);
    for hook in [INGRESS, Hook::TcEgress] {
        programs.records(hook);
    }
}

#[test]
fn hooks_do_not_displace_each_other() {
    let mut programs = load(POLICY);
    // Fragments open no flow: observed, each is recorded at both hooks it passes.
    let fragment = frame::as_fragment(&udp((3, 5000), (9, 53)), 5, false);
    for _ in 0..50 {
        for hook in [INGRESS, Hook::TcEgress] {
            programs.run(hook, &fragment);
        }
    }
    for hook in [INGRESS, Hook::TcEgress] {
        assert_eq!(programs.count(hook, Outcome::WouldDeny), 50);
        assert!(programs.records(hook).emitted <= 2);
    }
    assert!(programs.drain().len() <= 4);
}

#[test]
fn a_displaced_count_is_emitted() {
    let mut programs = load(POLICY);
    programs.run_often(INGRESS, &tcp((2, 5000), (1, 22), SYN), 10);
    assert_eq!(programs.drain()[0].total, 1);
    let mut displaced = None;
    for port in 6000..20_000 {
        programs.run(INGRESS, &tcp((2, port), (1, 22), SYN));
        if let Some(event) = from_port(&programs.drain(), 5000).first() {
            displaced = Some(*event);
            break;
        }
    }
    let event = displaced.expect("one of them takes the slot over");
    assert_eq!((event.total, event.destination_port), (10, 22));
    assert_eq!(event.reason(), Reason::DefaultDeny);
    let records = programs.records(INGRESS);
    assert_eq!(
        (records.suppressed, records.lost, records.displaced),
        (9, 0, 0)
    );
}

#[test]
fn a_full_ring_loses_records_and_counts_them() {
    let mut programs = load(POLICY);
    let flow = |n: u16| tcp((2, 5000 + n), (1, 22), SYN);
    let flows = 20_000u16;
    let mut repeats = 0;
    for n in 0..flows {
        programs.run(INGRESS, &flow(n));
        // Shortly before the ring is full, some flows get a count that no record carries yet.
        if (6_500..6_600).contains(&n) {
            programs.run_often(INGRESS, &flow(n), 3);
            repeats += 3;
        }
    }
    let packets = u64::from(flows) + repeats;
    assert_eq!(
        programs.count(INGRESS, Outcome::Denied),
        packets,
        "all of them dropped"
    );
    let full = programs.records(INGRESS);
    assert_eq!(full.emitted + full.suppressed + full.lost, packets);
    assert_eq!(full.suppressed, repeats);
    assert!(full.emitted <= RING && full.emitted > RING - 20, "{full:?}");
    // Most of the hundred lost their slot while the ring was full, and with it their count; the
    // packets that were lost themselves are not counted once more.
    assert!(
        full.displaced > repeats / 2 && full.displaced <= repeats,
        "{full:?}"
    );
    // The last one has its slot still, and its packet in the count.
    let last = from_port(
        &programs.dataplane.running_counts().unwrap(),
        5000 + flows - 1,
    );
    assert_eq!(last.len(), 1);
    assert_eq!(last[0].total, 1);

    // The reader comes back: nothing is lost any more, and the next record makes good.
    let read = programs.drain();
    assert_eq!(read.len() as u64, full.emitted);
    programs.run(INGRESS, &flow(flows - 1));
    let events = programs.drain();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].total, 2, "the lost packet and this one");
    let after = programs.records(INGRESS);
    assert_eq!((after.emitted, after.lost), (full.emitted + 1, full.lost));
}
