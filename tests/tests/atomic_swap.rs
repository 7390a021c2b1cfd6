//! Guarantee 2: under load, every packet is judged wholly by one of two policies that take turns.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
};

use enforcer::{
    dataplane::{Dataplane as _, Interface, LinkType},
    policy::{SourceFile, model::Environment, parse},
};
use enforcer_common::{
    image::SIZE_CLASSES,
    verdict::{Hook, Outcome, Reason},
};
use enforcer_tests::{
    daemon::{LONG, wait_for},
    kernel::{self, Programs},
    netns::{Family, Netns, Routed},
    numbers::{receive, receive_numbers, receiver, send_numbers},
    scale, traffic,
};

const FLIPS: usize = 1000;
/// Where there is time.
const MOST: usize = 5000;
/// Where every instruction is emulated.
const FEWER: usize = 200;

/// Allowed by both policies; by the first; by none.
const BOTH: u16 = 7001;
const FIRST: u16 = 7002;
const NONE: u16 = 7003;

fn policy(ports: &str) -> enforcer::compile::Image {
    let text = format!(
        "version: 1\n\
         segments:\n\
         \x20 a: {{ members: [{{cidr: 10.1.0.0/24}}, {{cidr: \"fd01::/64\"}}] }}\n\
         \x20 b: {{ members: [{{cidr: 10.2.0.0/24}}, {{cidr: \"fd02::/64\"}}] }}\n\
         rules:\n\
         \x20 - {{ name: some, from: [a], to: [b], services: [{ports}] }}\n"
    );
    let name = "swap.yaml".to_owned();
    let policy = parse(&[SourceFile { name, text }]).unwrap();
    kernel::compile(&policy, &Environment::default())
}

fn attach(programs: &mut Programs, namespace: &Netns, names: &[&str]) {
    namespace.enter(|| {
        for name in names {
            let interface = Interface {
                ifindex: nix::net::if_::if_nametoindex(*name).unwrap(),
                name: (*name).to_owned(),
                link: LinkType::Ethernet,
                slot: 0,
            };
            programs.dataplane.attach(&interface).unwrap();
        }
    });
}

fn revoked(programs: &Programs) -> u64 {
    let counters = programs.counters();
    let mut revoked = counters.packets.iter().filter(|count| {
        (count.hook, count.outcome, count.reason)
            == (Hook::TcIngress, Outcome::Denied, Reason::Revoked)
    });
    revoked.next().map_or(0, |count| count.packets)
}

#[test]
fn swap_under_load() {
    let full = if scale::thorough() { MOST } else { FLIPS };
    let flips = scale::rounds(full, FEWER) as u32;
    let net = Routed::new();
    let mut programs = Programs::load(SIZE_CLASSES[0] as usize);
    let images = [
        policy(&format!("udp/{BOTH}, tcp/{BOTH}, udp/{FIRST}")),
        policy(&format!("udp/{BOTH}, tcp/{BOTH}")),
    ];
    programs.apply(&images[0]);
    attach(&mut programs, &net.gateway, &["gw-a", "gw-b"]);
    traffic::tcp_echo(&net.b, BOTH);

    let at = |family: Family, port| SocketAddr::new(family.address(2, 2), port);
    let both: Vec<_> = Family::BOTH.map(|f| receiver(&net.b, at(f, BOTH))).into();
    let none: Vec<_> = Family::BOTH.map(|f| receiver(&net.b, at(f, NONE))).into();
    let first = receiver(&net.b, at(Family::V4, FIRST));
    let mut stream = traffic::tcp(&net.a, at(Family::V6, BOTH));

    let stop = AtomicBool::new(false);
    let ended = AtomicBool::new(false);
    let denied_flows_seen = AtomicU32::new(0);
    thread::scope(|scope| {
        let (net, stop, ended) = (&net, &stop, &ended);
        let send = |to| scope.spawn(move || send_numbers(&net.a, to, stop));
        let sent_both = Family::BOTH.map(|family| send(at(family, BOTH)));
        let sent_none = Family::BOTH.map(|family| send(at(family, NONE)));
        let got_both: Vec<_> = both
            .iter()
            .map(|socket| scope.spawn(move || receive_numbers(socket, ended)))
            .collect();
        let got_none: Vec<_> = none
            .iter()
            .map(|socket| scope.spawn(move || receive_numbers(socket, ended)))
            .collect();
        let talk = scope.spawn(move || {
            let mut rounds: u32 = 0;
            while !stop.load(Ordering::Relaxed) {
                let words = rounds.to_be_bytes().repeat(200);
                stream.write_all(&words).unwrap();
                let mut answer = vec![0; words.len()];
                stream.read_exact(&mut answer).unwrap();
                assert_eq!(answer, words);
                rounds += 1;
            }
            rounds
        });

        // After each flip one packet that only the first policy allows: delivered or revoked,
        // as the policy of the moment says.
        let prober = traffic::udp(&net.a, ([0, 0, 0, 0], 0), LONG);
        prober.connect(at(Family::V4, FIRST)).unwrap();
        let flip = |programs: &mut Programs| {
            for number in 0..flips {
                let allowed = number % 2 == 0;
                let image = images[usize::from(!allowed)].clone();
                programs.apply(&image.with_generation(kernel::generation()));
                let before = revoked(programs);
                prober.send(&number.to_be_bytes()).unwrap();
                if allowed {
                    let got = wait_for("a packet that is allowed", LONG, || receive(&first));
                    assert_eq!(got, number, "an earlier packet passed against its policy");
                } else {
                    wait_for("a packet to be revoked", LONG, || {
                        (revoked(programs) > before).then_some(())
                    });
                }
                while let Some(event) = programs.events.next() {
                    // No record may speak of a flow that both allow.
                    assert_ne!(event.destination_port, BOTH, "{event:?}");
                    assert_ne!(event.source_port, BOTH, "{event:?}");
                    denied_flows_seen.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        let flipped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            flip(&mut programs);
        }));
        // In any case: threads would go on for ever.
        stop.store(true, Ordering::Relaxed);
        let rounds = talk.join();
        let sent = sent_both.map(|thread| thread.join());
        let sent_in_vain = sent_none.map(|thread| thread.join());
        ended.store(true, Ordering::Relaxed);
        if let Err(panic) = flipped {
            std::panic::resume_unwind(panic);
        }
        assert!(rounds.unwrap() > 100, "the TCP session went on");
        for (sent, got) in sent.into_iter().zip(got_both) {
            let (sent, got) = (sent.unwrap(), got.join().unwrap());
            assert!(sent > flips, "{sent} packets are no load");
            let got: BTreeSet<u32> = got.into_iter().collect();
            let lost: Vec<u32> = (0..sent).filter(|n| !got.contains(n)).collect();
            assert!(lost.is_empty(), "of {sent} these were lost: {lost:?}");
        }
        for (sent, got) in sent_in_vain.into_iter().zip(got_none) {
            let (sent, got) = (sent.unwrap(), got.join().unwrap());
            assert!(sent > flips, "{sent} packets are no load");
            assert_eq!(got, [0; 0], "passed, of {sent}");
        }
    });
    assert_eq!(receive(&first), None, "nothing was left over");
    assert!(denied_flows_seen.into_inner() > 0);
    programs.dataplane.detach_all().unwrap();
}
