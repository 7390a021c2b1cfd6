//! The table of the loaded programs: its counters and its sweep, and what is left of a table that
//! is flooded.

use std::net::{IpAddr, Ipv6Addr};

use aya::maps::Array;
use enforcer::dataplane::Dataplane as _;
use enforcer_common::{
    table::{SLOTS, SOURCE_SHARE, WORDS4},
    verdict::{Hook, Outcome, Reason},
    wire::Control,
};
use enforcer_tests::{
    frame::{self, ACK, FIN, SYN},
    host::image,
    kernel::{FLOWS, Programs},
    netns::Family,
    scale,
    two::policy,
};

pub const INGRESS: Hook = Hook::TcIngress;
const ESTABLISHED: (Outcome, Reason) = (Outcome::Allowed, Reason::Established);
pub const RULES: &str = "  - { name: web, from: [a], to: [b], services: [tcp/8080, udp/7000] }";
/// Protected entries that an opener may have.
const SHARE: u32 = FLOWS / SOURCE_SHARE;
/// Offset of the last byte of an IPv4 source, and of the source port.
const SOURCE: usize = 14 + 15;
const PORT: usize = 14 + 20;

pub fn tcp(from: (IpAddr, u16), to: (IpAddr, u16), flags: u8) -> Vec<u8> {
    frame::frame(from.0, to.0, 6, &frame::tcp(from.1, to.1, flags))
}

/// The sum of the counters of protected entries, and the largest.
fn counted(programs: &mut Programs) -> (u32, u32) {
    let map = programs.dataplane.map_mut("FLOW_SOURCES");
    let sources: Array<_, u32> = map.unwrap().try_into().unwrap();
    let counts: Vec<u32> = sources.iter().map(Result::unwrap).collect();
    (counts.iter().sum(), *counts.iter().max().unwrap())
}

/// Protected entries, which are as many as are counted.
pub fn protected(programs: &mut Programs) -> u32 {
    let flows = programs.dataplane.flows().unwrap();
    let protected = flows.iter().filter(|flow| flow.protected).count() as u32;
    assert_eq!(counted(programs).0, protected, "counted");
    protected
}

fn got(programs: &mut Programs, frame: &[u8]) -> (Outcome, Reason) {
    let verdict = programs.judge(INGRESS, frame);
    (verdict.outcome, verdict.reason)
}

fn server() -> (IpAddr, u16) {
    (Family::V4.address(2, 2), 8080)
}

fn client(host: u8, port: u16) -> (IpAddr, u16) {
    (Family::V4.address(1, host), port)
}

/// Answered flows from one host: a SYN and its answer each.
fn handshakes(programs: &mut Programs, host: u8, ports: std::ops::Range<u16>) {
    let mut syn = tcp(client(host, 0), server(), SYN);
    let mut answer = tcp(server(), client(host, 0), SYN | ACK);
    let count = ports.len();
    for port in ports {
        let port = port.to_be_bytes();
        syn[PORT..PORT + 2].copy_from_slice(&port);
        answer[PORT + 2..PORT + 4].copy_from_slice(&port);
        assert_eq!(programs.run(INGRESS, &syn), -1, "{count}");
        programs.run(INGRESS, &answer);
    }
}

#[test]
fn the_counters_are_the_protected_entries_whatever_becomes_of_them() {
    let mut programs = Programs::shared();
    programs.apply(&image(&policy(RULES)));
    handshakes(&mut programs, 2, 0..50);
    assert_eq!(protected(&mut programs), 50);
    // Closed, opened anew, and swept.
    for port in 0..10 {
        let fin = tcp(client(2, port), server(), ACK | FIN);
        assert_eq!(programs.run(INGRESS, &fin), -1);
    }
    assert_eq!(protected(&mut programs), 40);
    let syn = tcp(client(2, 20), server(), SYN);
    assert_eq!(programs.run(INGRESS, &syn), -1);
    assert_eq!(protected(&mut programs), 39);
    // Eight hours and two minutes ago.
    let map = programs.dataplane.map(".bss.control").unwrap();
    let control: Array<_, Control> = map.try_into().unwrap();
    let hz = control.get(&0, 0).unwrap().hz;
    let map = programs.dataplane.map_mut("FLOWS4").unwrap();
    let mut buckets: Array<_, [u32; (SLOTS * WORDS4) as usize]> = map.try_into().unwrap();
    let mut aged = 0;
    for index in 0..buckets.len() {
        let mut words = buckets.get(&index, 0).unwrap();
        let live = |slot: &[u32]| slot[0] != 0;
        let mut slots = words.chunks_exact_mut(WORDS4 as usize);
        if let Some(slot) = slots.find(|slot| live(slot))
            && aged < 25
        {
            // Its jiffies.
            slot[1] = slot[1].wrapping_sub(hz * (8 * 3600 + 120));
            buckets.set(index, words, 0).unwrap();
            aged += 1;
        }
    }
    programs.dataplane.sweep().unwrap();
    let (v4, _) = programs.flows();
    assert_eq!((aged, v4.len()), (25, 25));
    let left = protected(&mut programs);
    assert!((14..=25).contains(&left), "{left}");
    programs.dataplane.sweep().unwrap();
    assert_eq!(programs.flows().0.len(), 25, "nothing else expired");
    programs.settle();
}

/// Many times what the table holds; not one of the flows that were answered is forgotten.
#[test]
fn a_flood_of_openings_leaves_every_answered_flow() {
    let mut programs = Programs::shared();
    programs.apply(&image(&policy(RULES)));
    // A tenth of the table: no bucket has more of them than it holds.
    let ports = 100u16;
    for host in 2..18 {
        handshakes(&mut programs, host, 0..ports);
    }
    let answered = protected(&mut programs);
    assert_eq!(answered, 16 * u32::from(ports));
    let before: Vec<_> = programs.flows().0.into_keys().collect();
    let count = scale::rounds(8 * FLOWS as usize, 3 * FLOWS as usize);
    let mut syn = tcp(client(100, 0), server(), SYN);
    let passed = programs.flood(INGRESS, &mut syn, count, |frame, number| {
        frame[SOURCE] = 100 + (number >> 14 & 0x3f) as u8;
        let port = (number & 0x3fff) as u16;
        frame[PORT..PORT + 2].copy_from_slice(&port.to_be_bytes());
    });
    assert_eq!(passed, count);
    programs.settle();
    let (after, _) = programs.flows();
    let full = FLOWS as usize * 9 / 10;
    assert!(
        after.len() > full,
        "{} of {FLOWS}: a full table",
        after.len()
    );
    assert!(before.iter().all(|key| after.contains_key(key)));
    assert_eq!(protected(&mut programs), answered);
    for host in 2..18 {
        for port in (0..ports).step_by(20) {
            let frame = tcp(client(host, port), server(), ACK);
            assert_eq!(got(&mut programs, &frame), ESTABLISHED);
            let frame = tcp(server(), client(host, port), ACK);
            assert_eq!(got(&mut programs, &frame), ESTABLISHED);
        }
    }
    programs.forget_flows();
    programs.settle();
}

/// One source completes more handshakes than the table holds; others have room all the time.
#[test]
fn who_completes_handshakes_takes_no_room_from_others() {
    let mut programs = Programs::shared();
    programs.apply(&image(&policy(RULES)));
    let flood = scale::rounds(2 * FLOWS as usize, FLOWS as usize + FLOWS as usize / 4);
    let flood = u16::try_from(flood).unwrap();
    handshakes(&mut programs, 2, 0..flood);
    let taken = protected(&mut programs);
    assert!((SHARE..=SHARE + 8).contains(&taken), "{taken}");
    // And it goes on.
    let others = scale::rounds(400, 100) as u16;
    let mut kept = 0;
    for number in 0..others {
        let port = 50_000 + number;
        let opening = tcp(client(3, port), server(), SYN);
        assert_eq!(programs.run(INGRESS, &opening), -1);
        let first = number.wrapping_mul(16);
        handshakes(&mut programs, 2, first..first.saturating_add(16));
        let answer = tcp(server(), client(3, port), SYN | ACK);
        programs.settle();
        kept += u16::from(got(&mut programs, &answer) == ESTABLISHED);
    }
    assert!(
        u32::from(kept) * 100 >= u32::from(others) * 95,
        "{kept} of {others}"
    );
    // What was answered is there to stay.
    let all = protected(&mut programs);
    assert!(all >= SHARE + u32::from(kept) - 8, "{all}");
    assert_eq!(programs.records(INGRESS).flow_insert_failed, 0);
    programs.forget_flows();
    programs.settle();
}

/// Who has a network of IPv6 addresses has one share, whichever of them it uses.
#[test]
fn an_ipv6_network_has_one_share() {
    let mut programs = Programs::shared();
    programs.apply(&image(&policy(RULES)));
    let to = (Family::V6.address(2, 2), 8080);
    let count = SHARE + SHARE / 4;
    for number in 0..count {
        let address = Ipv6Addr::new(
            0xfd01,
            0,
            0,
            0,
            0,
            0,
            (number >> 8) as u16,
            number as u16 | 1,
        );
        let from = (IpAddr::from(address), (number & 0xffff) as u16);
        assert_eq!(programs.run(INGRESS, &tcp(from, to, SYN)), -1);
        programs.run(INGRESS, &tcp(to, from, SYN | ACK));
    }
    assert_eq!(protected(&mut programs), SHARE);
    assert_eq!(counted(&mut programs), (SHARE, SHARE));
    programs.forget_flows();
    programs.settle();
}
