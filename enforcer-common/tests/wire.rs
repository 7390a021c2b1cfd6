//! What crosses the boundary to the kernel, byte for byte. A change here is a change of
//! `ABI_VERSION`.
#![cfg(target_endian = "little")]
#![allow(missing_docs, clippy::unwrap_used, reason = "tests and their helpers")]

use std::mem::{offset_of, size_of};

use enforcer_common::{
    ABI_VERSION,
    decide::{Decision, verdict_word},
    image::{EMPTY, essential, header},
    verdict::{COUNTERS, Hook, Outcome, Reason, Record, packet_counter, record_counter},
    wire::{
        Control, DENIED_SLOTS, DeniedSlot, Event, FlowEntry, FlowKey, Interface, Process, slot,
    },
};

/// The memory of a wire type. None of them has padding.
fn bytes<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: the value lives as long as the slice, and all its bytes are initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

#[test]
fn abi_version() {
    assert_eq!(ABI_VERSION, 3, "did the bytes below change?");
}

#[test]
fn flow_keys() {
    let key = FlowKey::new(
        [0xfd77_0000, 1, 2, 0x0102_0304],
        [0xfd77_0000, 5, 6, 0x0a0b_0c0d],
        0x1234,
        0x5678,
        6,
        true,
        0x21,
    );
    #[rustfmt::skip]
    let want = [
        0, 0, 0x77, 0xfd, 1, 0, 0, 0, 2, 0, 0, 0, 4, 3, 2, 1,
        0, 0, 0x77, 0xfd, 5, 0, 0, 0, 6, 0, 0, 0, 0x0d, 0x0c, 0x0b, 0x0a,
        0x78, 0x56, 0x34, 0x12, 6, 0x43, 0, 0,
    ];
    assert_eq!(bytes(&key), want);
    assert!(key.is_v6());
    let key = FlowKey::new([0, 0, 0, 1], [0, 0, 0, 2], 3, 4, 17, false, 0);
    #[rustfmt::skip]
    assert_eq!(
        [key.pair4(0), key.pair4(1)],
        [0x2_0000_0001, 0x11_0003_0004]
    );
    assert!(!key.is_v6());
}

#[test]
fn flow_entry_control_interface_process() {
    let entry = FlowEntry {
        last_seen: 0x0102_0304_0506_0708,
        generation: 0x1122_3344,
        rule: 5,
        flags: 6,
        selector: 0x1f90,
        opened: 7,
        checked: 8,
        arrived: [9, 10],
    };
    #[rustfmt::skip]
    assert_eq!(bytes(&entry), [
        8, 7, 6, 5, 4, 3, 2, 1, 0x44, 0x33, 0x22, 0x11, 5, 0, 0, 0, 6, 0, 0, 0, 0x90, 0x1f, 0, 0,
        7, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0, 10, 0, 0, 0,
    ]);
    let control = Control {
        unix_floor: 7,
        boot_unix_ns: 8,
        netns_cookie: 1,
        hz: 250,
        flags: 3,
        generation: 4,
        previous: 5,
        deadline: 6,
    };
    #[rustfmt::skip]
    assert_eq!(bytes(&control), [7, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 250, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(
        bytes(&Interface { flags: 1, slot: 2 }),
        [1, 0, 0, 0, 2, 0, 0, 0]
    );
    let process = Process {
        cgroup: 2,
        pid: 3,
        uid: 4,
        comm: *b"postgres\0\0\0\0\0\0\0\0",
    };
    let want = [
        &[2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0][..],
        b"postgres",
        &[0; 8],
    ];
    assert_eq!(bytes(&process), want.concat());
}

fn event() -> Event {
    Event {
        time: 1,
        total: 2,
        cookie: 3,
        process: Process {
            cgroup: 4,
            pid: 5,
            uid: 6,
            comm: [7; 16],
        },
        source: [0, 0, 0, 0x0a4d_0001],
        destination: [8, 9, 10, 11],
        rule: u32::MAX,
        segment: 12,
        generation: 13,
        ifindex: 14,
        slot: 15,
        cpu: 16,
        epoch: 17,
        source_port: 0x1234,
        destination_port: 0x5678,
        selector: 0x9abc,
        ethertype: 0x0800,
        protocol: 6,
        family: 4,
        hook: Hook::TcEgress as u8,
        outcome: Outcome::WouldDeny as u8,
        reason: Reason::NoFlow as u8,
        tcp_flags: 0x12,
        lasting: 0,
        reserved: [0; 5],
    }
}

#[test]
fn events() {
    let event = event();
    let u32s =
        |numbers: &[u32]| -> Vec<u8> { numbers.iter().flat_map(|n| n.to_le_bytes()).collect() };
    let mut want = Vec::new();
    for number in [1u64, 2, 3, 4] {
        want.extend(number.to_le_bytes());
    }
    want.extend(u32s(&[5, 6]));
    want.extend([7; 16]);
    want.extend(u32s(&[0, 0, 0, 0x0a4d_0001, 8, 9, 10, 11]));
    want.extend(u32s(&[u32::MAX, 12, 13, 14, 15, 16, 17]));
    want.extend([0x34, 0x12, 0x78, 0x56, 0xbc, 0x9a, 0x00, 0x08]);
    want.extend([6, 4, 1, 2, 8, 0x12, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes(&event), want);
    assert_eq!(event.hook(), Some(Hook::TcEgress));
    assert_eq!(event.outcome(), Outcome::WouldDeny);
    assert_eq!(event.reason(), Reason::NoFlow);
    let strange = Event { hook: 9, ..event };
    assert_eq!(strange.hook(), None);
}

#[test]
fn aggregation_slots() {
    let slot = DeniedSlot {
        epoch: 1,
        epoch_end: 2,
        emitted_at: 3,
        pending: 4,
        pending_lost: 5,
        event: event(),
    };
    let mut want = vec![1, 0, 0, 0, 2, 0, 0, 0];
    want.extend([3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0]);
    want.extend(bytes(&event()));
    assert_eq!(bytes(&slot), want);
    assert_eq!(offset_of!(DeniedSlot, event), 24);
    assert_eq!(DENIED_SLOTS, 4096);
    assert_eq!(
        (slot::LIVE, slot::PREVIOUS, slot::SHADOW, slot::COUNT),
        (0, 1, 2, 3)
    );
}

#[test]
fn reasons_and_counters_keep_their_numbers() {
    let names: Vec<&str> = Reason::ALL.iter().map(|r| r.name()).collect();
    assert_eq!(
        names,
        [
            "default_deny",
            "rule_deny",
            "rule_allow",
            "unsegmented",
            "established",
            "related",
            "essential",
            "revoked",
            "no_flow",
            "icmp_unrelated",
            "malformed",
            "fragment",
            "extension_header",
            "vlan_nested",
            "ethertype",
            "no_policy",
            "spoofed",
            "martian",
            "failsafe",
            "expired",
            "vlan_device",
            "deferred",
            "ethertype_listed",
            "source_route",
        ]
    );
    assert_eq!(
        Outcome::ALL.map(Outcome::name),
        ["denied", "allowed", "would_deny", "off"]
    );
    assert_eq!(
        Hook::ALL.map(Hook::name),
        ["tc_ingress", "tc_egress", "connect", "sendmsg"]
    );
    assert_eq!(
        packet_counter(Hook::TcIngress, Outcome::Denied, Reason::DefaultDeny),
        0
    );
    assert_eq!(
        packet_counter(Hook::TcIngress, Outcome::Allowed, Reason::Established),
        36
    );
    assert_eq!(
        packet_counter(Hook::TcEgress, Outcome::Denied, Reason::NoFlow),
        136
    );
    assert_eq!(
        packet_counter(Hook::Sendmsg, Outcome::Off, Reason::NoPolicy),
        495
    );
    assert_eq!(record_counter(Hook::TcIngress, Record::Emitted), 512);
    assert_eq!(record_counter(Hook::TcEgress, Record::Displaced), 524);
    assert_eq!(record_counter(Hook::Sendmsg, Record::FlowInsertFailed), 539);
    assert_eq!(COUNTERS, 544);
}

#[test]
fn verdict_words() {
    for outcome in Outcome::ALL {
        for reason in Reason::ALL.iter().copied() {
            let word = verdict_word(outcome, reason);
            assert_eq!(word, outcome as u32 | (reason as u32) << 8);
            let decision = Decision::unpack(u64::from(word | 1 << 16) | 77 << 32);
            assert_eq!((decision.outcome, decision.reason), (outcome, reason));
            let by_rule = matches!(reason, Reason::RuleAllow | Reason::RuleDeny);
            let want = if by_rule { (77, EMPTY) } else { (EMPTY, 77) };
            assert_eq!((decision.rule, decision.segment), want);
        }
    }
    // Memory that nobody wrote reads as a drop.
    assert_eq!(Decision::unpack(0).outcome, Outcome::Denied);
    assert_eq!(
        (header::WORDS, header::ESSENTIALS, header::ROWS),
        (64, 6, 15)
    );
    assert_eq!(essential::ALL, 0x1ff);
}
