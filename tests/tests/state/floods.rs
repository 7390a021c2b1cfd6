//! Floods: of openings, of denials, by one or by many, with or without somebody who reads.

use std::{net::IpAddr, time::Duration};

use enforcer::dataplane::Dataplane as _;
use enforcer_common::{
    verdict::{Outcome, Reason},
    wire::DENIED_SLOTS,
};
use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    frame::{ACK, SYN},
    kernel::Programs,
    netns::{Family, Routed},
    scale,
    traffic::{self, QUIET, Tap},
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::*;

/// Flows of each family that the table holds.
const TABLE: usize = enforcer_tests::kernel::FLOWS as usize;
const RULE: &str = "  - { name: web, from: [a], to: [b], services: [tcp/8080, udp/7000] }";
/// Offset of the source's last two bytes and of the source port, IPv4.
const SOURCE: usize = 14 + 14;
const PORT: usize = 14 + 20;

/// A SYN from another address and port of `a` each time.
fn another(frame: &mut [u8], number: usize) {
    let number = u32::try_from(number).unwrap();
    frame[SOURCE + 1] = 10 + (number >> 14 & 0x7f) as u8;
    let port = 40_000 + (number & 0x3fff) as u16;
    frame[PORT..PORT + 2].copy_from_slice(&port.to_be_bytes());
}

fn packets(programs: &Programs, reason: Reason) -> u64 {
    let counters = programs.counters();
    let mut counters = counters.packets.iter();
    counters
        .find(|c| (c.hook, c.outcome, c.reason) == (INGRESS, Outcome::Allowed, reason))
        .map_or(0, |c| c.packets)
}

#[test]
fn denied_openings_take_no_room() {
    let count = scale::rounds(4 * TABLE, 20_000);
    let mut programs = programs(&policy(RULE));
    let (a, b) = ends(Family::V4);
    establish(&mut programs, (a, 4000), (b, 8080));
    let before = programs.flows();
    let mut syn = tcp((a, 40_000), (b, 5555), SYN);
    assert_eq!(programs.flood(INGRESS, &mut syn, count, another), 0);
    assert_eq!(programs.flows(), before);
    assert_eq!(programs.count(INGRESS, Outcome::Denied), count as u64);
    let records = programs.records(INGRESS);
    let accounted = records.emitted + records.suppressed + records.lost;
    assert_eq!(accounted, count as u64);
    programs.drain();
    programs.settle();
}

/// Four times what the table holds. A flow that talks stays in it; one that was silent goes, and
/// comes back by the policy with its next packet, whichever end sends it.
#[test]
fn a_flood_of_openings_breaks_no_flow() {
    const EACH: usize = 256;
    let rounds = scale::rounds(4 * TABLE, TABLE + TABLE / 4) / EACH;
    let mut programs = programs(&policy(RULE));
    let (a, b) = ends(Family::V4);
    let (busy, silent, other) = (4000, 4001, 4002);
    for port in [busy, silent, other] {
        establish(&mut programs, (a, port), (b, 8080));
    }
    let mut syn = tcp((a, 40_000), (b, 8080), SYN);
    let before = packets(&programs, Reason::Established);
    for round in 0..rounds {
        let passed = programs.flood(INGRESS, &mut syn, EACH, |frame, number| {
            another(frame, round * EACH + number);
        });
        assert_eq!(passed, EACH);
        let frame = if round % 2 == 0 {
            tcp((a, busy), (b, 8080), ACK)
        } else {
            tcp((b, 8080), (a, busy), ACK)
        };
        assert_eq!(programs.run(INGRESS, &frame), -1, "round {round}");
    }
    let from_entry = packets(&programs, Reason::Established) - before;
    assert!(
        from_entry * 100 >= rounds as u64 * 99,
        "{from_entry} of {rounds}"
    );
    programs.settle();
    let (v4, _) = programs.flows();
    assert!(v4.len() <= TABLE && v4.len() > TABLE / 2, "{}", v4.len());
    // And as many that are answered: those the table keeps rather than openings alone.
    let answered = scale::rounds(2 * TABLE, TABLE / 8);
    let mut ack = tcp((a, 40_000), (b, 8080), ACK);
    let passed = programs.flood(INGRESS, &mut ack, 2 * answered, |frame, number| {
        another(frame, (1 << 20) + number / 2);
    });
    assert_eq!(passed, 2 * answered);
    programs.settle();
    // Those that were silent are there still, or judged by the policy and flows again.
    for (port, from_a) in [(silent, true), (other, false)] {
        let (from, to) = if from_a {
            ((a, port), (b, 8080))
        } else {
            ((b, 8080), (a, port))
        };
        let first = programs.judge(INGRESS, &tcp(from, to, ACK));
        assert!([ALLOWED, ESTABLISHED].contains(&got(first)), "{first:?}");
        println!("after the flood: {}", first.reason.name());
        assert_eq!(
            got(programs.judge(INGRESS, &tcp(to, from, ACK))),
            ESTABLISHED
        );
    }
    // What the policy does not allow is not let in by all this.
    let denied = programs.judge(INGRESS, &tcp((b, 5555), (a, busy), ACK));
    assert_eq!(got(denied), DENIED);
    assert_eq!(programs.records(INGRESS).flow_insert_failed, 0);
    programs.forget_flows();
    programs.settle();
}

/// One source with another port each time, between others that are denied now and then.
#[test]
fn denials_of_others_are_seen_through_a_noisy_source() {
    const OTHERS: u8 = 50;
    let each = scale::rounds(2_000, 400);
    let mut programs = programs(&policy(RULE));
    let (_, b) = ends(Family::V4);
    let address = |last: u8| -> IpAddr { [10, 1, 0, last].into() };
    let mut noise = tcp((address(2), 40_000), (b, 5555), SYN);
    let mut seen = std::collections::BTreeMap::<u32, u64>::new();
    let mut records = 0;
    let mut judged = 0;
    for other in 0..OTHERS {
        programs.flood(INGRESS, &mut noise, each, |frame, number| {
            let number = usize::from(other) * each + number;
            let port = 1 + u16::try_from(number % 65_000).unwrap();
            frame[PORT..PORT + 2].copy_from_slice(&port.to_be_bytes());
        });
        let frame = udp((address(100 + other), 4000), (b, 53));
        assert_eq!(programs.run(INGRESS, &frame), 2);
        judged += each as u64 + 1;
        for record in programs.drain() {
            records += 1;
            if record.protocol == 17 {
                *seen.entry(record.source[3] & 0xff).or_default() += record.total;
            }
        }
    }
    let all: Vec<(u32, u64)> = (0..OTHERS).map(|o| (100 + u32::from(o), 1)).collect();
    assert_eq!(
        seen.into_iter().collect::<Vec<_>>(),
        all,
        "each of them, once"
    );
    let fates = programs.records(INGRESS);
    assert_eq!(fates.emitted + fates.suppressed + fates.lost, judged);
    assert_eq!(fates.emitted, records);
    assert_eq!(fates.lost, 0, "somebody read");
    // What is remembered of the noise is bounded by the slots.
    let left = programs.dataplane.running_counts().unwrap().len();
    assert!(left <= DENIED_SLOTS as usize, "{left}");
    programs.settle();
}

/// The sum of a field of the records of a hook, or of all.
fn records(status: &Value, hook: &str, field: &str) -> u64 {
    let all = status["records"].as_array().unwrap();
    let here = all.iter().filter(|r| hook.is_empty() || r["hook"] == hook);
    here.map(|r| r[field].as_u64().unwrap()).sum()
}

/// Packets denied, or that would be, at a hook.
fn denied(status: &Value, hook: &str) -> u64 {
    let all = status["counters"].as_array().unwrap();
    let here = all.iter().filter(|c| {
        c["hook"] == hook && (c["outcome"] == "denied" || c["outcome"] == "would_deny")
    });
    here.map(|c| c["packets"].as_u64().unwrap()).sum()
}

/// What the records on the screen say of packets to these ports, and of gaps.
fn told(daemon: &Daemon<'_>) -> (u64, u64) {
    let denials = daemon.denials(&["--last", "10000"]);
    let (gaps, packets): (Vec<&Value>, Vec<&Value>) =
        denials.iter().partition(|d| d["verdict"] == "LOST");
    let sum = |of: Vec<&Value>, field: &str| -> u64 {
        of.iter().map(|d| d[field].as_u64().unwrap()).sum()
    };
    (sum(packets, "packets"), sum(gaps, "events"))
}

/// The daemon stands still while far more is denied, and would be, than the ring holds.
#[test]
fn a_reader_that_stands_still_loses_no_count() {
    let senders = 4;
    let each = scale::rounds(50_000, 5_000);
    let net = Routed::new();
    let text = policy(RULE).replace(
        "  a: { members",
        "  watched: { members: [{cidr: 10.1.0.3/32}], mode: observe, protect: outbound }\n  a: { members",
    );
    let text = text.replace("10.1.0.0/24}", "10.1.0.2/32}");
    let text = text.replace("10.2.0.0/24}", "10.2.0.2/32}");
    let daemon = Setup::new(&net.gateway, "gw-*", &text).start();
    let (a, b) = ends(Family::V4);
    let watched = Family::V4.address(1, 3);
    let elsewhere = Family::V4.address(2, 3);
    let tap = Tap::new(&net.b);
    let before = daemon.status();
    daemon.signal(Signal::SIGSTOP);
    std::thread::scope(|scope| {
        for sender in 0..senders {
            let net = &net;
            scope.spawn(move || {
                let socket = traffic::udp(&net.a, (a, 0), QUIET);
                for number in 0..each {
                    let port = 1 + u16::try_from(number % 6_000).unwrap();
                    socket
                        .send_to(b"flood", (b, port + sender * 10_000))
                        .unwrap();
                }
            });
        }
        scope.spawn(|| {
            let socket = traffic::udp(&net.a, (watched, 0), QUIET);
            for port in 1..=2_000u16 {
                socket.send_to(b"watch", (elsewhere, port)).unwrap();
            }
        });
    });
    let flood = u64::from(senders) * each as u64;
    // Nothing but a packet on its way can be between the wire and the counters.
    assert!(!tap.sees(b"flood", QUIET), "all of it is dropped");
    daemon.signal(Signal::SIGCONT);
    let status = wait_for("all packets to be counted", LONG, || {
        let status = daemon.status();
        (denied(&status, "tc_ingress") >= denied(&before, "tc_ingress") + flood + 2_000)
            .then_some(status)
    });
    assert!(daemon.counted("tc_ingress", "denied", "default_deny") >= flood);
    assert!(daemon.counted("tc_ingress", "would_deny", "default_deny") >= 2_000);
    for hook in ["tc_ingress", "tc_egress", "connect", "sendmsg"] {
        let fates = ["emitted", "suppressed", "lost"].map(|f| records(&status, hook, f));
        let sum = fates.iter().sum::<u64>();
        assert_eq!(sum, denied(&status, hook), "{hook}: {fates:?}");
    }
    // Whoever looks is told: of each packet, or that records are missing.
    let lost = records(&status, "", "lost");
    wait_for("the rest, or the gap", LONG, || {
        let (packets, gap) = told(&daemon);
        let all = denied(&status, "tc_ingress") + denied(&status, "tc_egress");
        (packets >= all || gap >= lost.max(1)).then_some(())
    });
    // And it is as quick as ever with what comes now.
    let follow = daemon.follow(|| {
        let socket = traffic::udp(&net.a, (a, 0), QUIET);
        socket.send_to(b"now", (b, 65_000)).unwrap();
        std::thread::sleep(Duration::from_millis(10));
    });
    drop(follow);
    // The same policy in words and on the wire.
    traffic::udp_echo(&net.b, (b, 7000));
    assert!(traffic::udp_answers_soon(&net.a, (b, 7000)));
}
