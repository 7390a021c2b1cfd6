//! Random packets judged with a map, with the programs' table on the host, and by the loaded
//! programs: the same verdicts, and the same entries left behind.

use std::net::IpAddr;

use enforcer_common::{
    flow::Clock,
    judge::{self, Scene},
    packet::{self, Link, Packet},
    verdict::{Hook, Outcome, Reason},
};
use enforcer_tests::{
    frame::{self, ACK, FIN, RST, SYN},
    host::{HZ, Host, Moment, image},
    kernel::Programs,
    memory::{HostMemory, HostTable},
    scale,
    two::policy,
};
use proptest::prelude::*;

use crate::common::NOW;

const RULES: &str = "  - { name: web, from: [a], to: [b], services: [tcp/8080, udp/7000, ping] }";

#[derive(Clone, Copy, Debug)]
struct Sent {
    from_a: bool,
    v6: bool,
    host: u8,
    port: u16,
    server_port: u16,
    kind: u8,
}

fn sent() -> impl Strategy<Value = Sent> {
    let server_port = prop::sample::select(vec![8080, 7000, 5555]);
    (
        any::<bool>(),
        any::<bool>(),
        2u8..4,
        4000u16..4003,
        server_port,
        0u8..8,
    )
        .prop_map(|(from_a, v6, host, port, server_port, kind)| Sent {
            from_a,
            v6,
            host,
            port,
            server_port,
            kind,
        })
}

fn built(sent: Sent) -> Vec<u8> {
    let family = if sent.v6 {
        enforcer_tests::netns::Family::V6
    } else {
        enforcer_tests::netns::Family::V4
    };
    let a: (IpAddr, u16) = (family.address(1, sent.host), sent.port);
    let b: (IpAddr, u16) = (family.address(2, 2), sent.server_port);
    let (from, to) = if sent.from_a { (a, b) } else { (b, a) };
    let flags = [SYN, SYN | ACK, ACK, ACK | FIN, RST];
    match flags.get(usize::from(sent.kind)) {
        Some(flags) => frame::frame(from.0, to.0, 6, &frame::tcp(from.1, to.1, *flags)),
        None if sent.kind == 7 => {
            let (protocol, request) = if sent.v6 { (58, 128) } else { (1, 8) };
            let reply = if sent.v6 { 129 } else { 0 };
            let message = frame::icmp(if sent.from_a { request } else { reply }, 0, sent.port);
            frame::frame(from.0, to.0, protocol, &message)
        }
        None => frame::frame(from.0, to.0, 17, &frame::udp(from.1, to.1)),
    }
}

/// The long way with the programs' table.
fn see(host: &Host, table: &HostTable<'_>, frame: &[u8]) -> (Outcome, Reason) {
    let link = Link {
        ethernet: true,
        protocol: 0,
        vlan: None,
        ingress: true,
        ifindex: host.ifindex,
        slot: host.slot,
        gso: false,
        looped: false,
    };
    let scene: Scene<Moment> = Scene {
        link,
        clock: Clock {
            now: host.now,
            hz: HZ,
        },
        time: host.time,
    };
    let mut packet = Packet::EMPTY;
    let form = packet::parse(frame, &scene.link, &mut packet);
    let judgement = judge::judge(host.image.words(), table, &mut packet, &scene, form);
    (judgement.decision.outcome, judgement.decision.reason)
}

#[test]
fn packets_get_the_same_from_every_table() {
    let cases = scale::rounds(40, 3) as u32;
    let mut programs = Programs::shared();
    let image = image(&policy(RULES));
    programs.apply(&image);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let programs = std::cell::RefCell::new(programs);
    let all = prop::collection::vec(sent(), 1..60);
    let run = runner.run(&all, |all| {
        let mut programs = programs.borrow_mut();
        programs.forget_flows();
        programs.settle();
        let mut host = Host::new(image.clone());
        host.now = NOW;
        let memory = HostMemory::new(1 << 8, 1 << 8, 11);
        let table = HostTable::new(&memory);
        for sent in all {
            let frame = built(sent);
            let by_map = host.judge(true, &frame);
            let expected = (by_map.outcome, by_map.reason);
            prop_assert_eq!(see(&host, &table, &frame), expected, "{:?}", sent);
            let verdict = programs.judge(Hook::TcIngress, &frame);
            prop_assert_eq!((verdict.outcome, verdict.reason), expected, "{:?}", sent);
        }
        memory.balances();
        let flows = memory.flows();
        let (v4, v6) = programs.flows();
        prop_assert_eq!(v4.len() + v6.len(), flows.len());
        let entries = host.flows.entries.borrow();
        prop_assert_eq!(entries.len(), flows.len());
        for (key, flow) in &flows {
            let in_kernel = v4.get(key).or(v6.get(key)).unwrap();
            let in_map = enforcer_common::flow::FlowSlot::load(&entries[key]);
            for other in [in_map, *in_kernel] {
                prop_assert_eq!(other.flags, flow.entry.flags);
                prop_assert_eq!(other.generation, flow.entry.generation);
                prop_assert_eq!(other.rule, flow.entry.rule);
                prop_assert_eq!(other.selector, flow.entry.selector);
                prop_assert_eq!(other.arrived, flow.entry.arrived);
            }
        }
        Ok(())
    });
    let mut programs = programs.borrow_mut();
    programs.forget_flows();
    programs.settle();
    drop(programs);
    run.unwrap();
}
