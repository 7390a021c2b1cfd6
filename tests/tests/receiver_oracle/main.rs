//! The receiver decides: what a host without enforcer delivers of thousands of odd frames is
//! measured, and with the enforcer exactly the flows that the policy allows are delivered, but for
//! a written list of exceptions. Nothing here says what Linux delivers; that is different from
//! kernel to kernel.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test"
)]

mod exceptions;
mod generate;
mod packet;
mod receiver;

use std::collections::{BTreeMap, BTreeSet};

use enforcer_tests::{daemon::Setup, kernel, netns::Pair};

use crate::{
    exceptions::{EXCEPTIONS, Exception, mended},
    generate::{Case, RECEIVER_MAC, SENDER_MAC, case, ends},
    receiver::{Delivery, Receiver, Sender},
};

const CASES: u32 = 6000;
/// Cases sent before the sockets are emptied.
const BATCH: usize = 100;

const DENY_ALL: &str = r#"
version: 1
segments:
  all: { members: [{cidr: 0.0.0.0/0}, {cidr: "::/0"}] }
"#;

/// A policy that allows some flows, and what those are, in the receiver's terms.
struct Allowed {
    services: &'static str,
    flows: &'static [(u8, &'static [u16])],
}

/// Each flow that is allowed by one is denied by the other.
const POLICIES: [Allowed; 2] = [
    Allowed {
        services: "udp/4444, tcp/8080, sctp/4444, ping, proto/gre, udplite/4444, proto/50, proto/253",
        flows: &[
            (17, &[4444]),
            (6, &[8080]),
            (132, &[4444]),
            (1, &[8 << 8]),
            (58, &[128 << 8]),
            (47, &[0]),
            (136, &[4444]),
            (50, &[0]),
            (253, &[0]),
        ],
    },
    Allowed {
        services: "udp/5555, tcp/9090, sctp/5555, udplite/5555, icmp/timestamp-request, proto/ipip, proto/41, \
                   proto/33, proto/51, proto/59",
        flows: &[
            (17, &[5555]),
            (136, &[5555]),
            (6, &[9090]),
            (132, &[5555]),
            (1, &[13 << 8]),
            (4, &[0]),
            (41, &[0]),
            (33, &[4444, 5555]),
            (51, &[0]),
            (59, &[0]),
        ],
    },
];

impl Allowed {
    fn policy(&self) -> String {
        format!(
            "{DENY_ALL}  sender: {{ members: [{{cidr: 10.1.0.2/32}}, {{cidr: \"fd01::2/128\"}}] }}\n  \
               receiver: {{ members: [{{cidr: 10.1.0.1/32}}, {{cidr: \"fd01::1/128\"}}] }}\n\
             rules:\n  - {{ name: some, from: [sender], to: [receiver], services: [{}] }}\n",
            self.services
        )
    }

    /// Whether a rule allows the flow that the receiver saw.
    fn covers(&self, delivery: &Delivery) -> bool {
        let service = |(protocol, selectors): &(u8, &[u16])| {
            *protocol == delivery.protocol && selectors.contains(&delivery.selector)
        };
        (delivery.source, delivery.destination) == ends(delivery.source.is_ipv6())
            && self.flows.iter().any(service)
    }
}

/// Sender and receiver on one cable.
struct Wire<'a> {
    sender: Sender,
    receiver: Receiver,
    _pair: &'a Pair,
}

impl<'a> Wire<'a> {
    fn new(pair: &'a Pair) -> Self {
        let mac = |bytes: [u8; 6]| bytes.map(|b| format!("{b:02x}")).join(":");
        pair.host
            .ip(&format!("link set eth0 address {}\n", mac(RECEIVER_MAC)));
        // An answer that finds nobody would make the receiver complain to itself, mark and all.
        for address in ["10.1.0.2", "10.1.0.3", "fd01::2", "fd01::3"] {
            let there = mac(SENDER_MAC);
            pair.host.ip(&format!(
                "neigh replace {address} lladdr {there} dev eth0 nud permanent\n"
            ));
        }
        // What is spoofed or source routed must reach the sockets, or nothing is learnt from it.
        for name in ["all", "eth0"] {
            for (sysctl, value) in [("rp_filter", "0"), ("accept_source_route", "1")] {
                pair.host
                    .sysctl(&format!("ipv4/conf/{name}/{sysctl}"), value);
            }
        }
        // Datagrams that never get whole wait for half a minute: the others need room beside them.
        for name in ["ipv4/ipfrag_high_thresh", "ipv6/ip6frag_high_thresh"] {
            pair.host.sysctl(name, "67108864");
        }
        Self {
            sender: Sender::new(&pair.peer, "eth0"),
            receiver: Receiver::new(&pair.host),
            _pair: pair,
        }
    }

    /// Sends all cases; what was delivered.
    fn round(&self, round: u32) -> BTreeSet<Delivery> {
        let fence = [&RECEIVER_MAC[..], &SENDER_MAC, &[0x88, 0xb7], &[0; 46]].concat();
        let mut delivered = BTreeSet::new();
        let numbers: Vec<u32> = (0..CASES).collect();
        for batch in numbers.chunks(BATCH) {
            let frames: Vec<Vec<u8>> = batch.iter().flat_map(|n| case(*n, round).frames).collect();
            for frame in &frames {
                self.sender.send(frame);
            }
            self.sender.send(&fence);
            self.receiver.wait_for_frames(frames.len() + 1);
            self.receiver.deliveries(&mut delivered);
        }
        delivered
    }
}

/// The cases and deliveries in which two sets differ, for a person to read.
fn show(deliveries: &BTreeSet<&Delivery>, cases: &[Case]) -> String {
    let mut by_odds: BTreeMap<String, (usize, String)> = BTreeMap::new();
    for delivery in deliveries {
        let case = &cases[delivery.case as usize];
        let entry = by_odds.entry(format!("{:?}", case.odds)).or_default();
        entry.0 += 1;
        entry.1 = format!("{delivery:?}");
    }
    let lines = by_odds
        .iter()
        .take(60)
        .map(|(odds, (n, last))| format!("\n{n} of {odds}: {last}"));
    format!(
        "{} deliveries:{}",
        deliveries.len(),
        lines.collect::<String>()
    )
}

#[test]
fn the_enforcer_delivers_what_is_allowed_of_what_the_host_delivers() {
    kernel::pin();
    let pair = Pair::new();
    let wire = Wire::new(&pair);
    let cases: Vec<Case> = (0..CASES).map(|number| case(number, 0)).collect();

    let bare = wire.round(0);
    println!(
        "without enforcer: {} deliveries of {CASES} cases",
        bare.len()
    );
    assert!(bare.len() > CASES as usize / 3, "only {}", bare.len());
    let daemon = Setup::new(&pair.host, "eth0", DENY_ALL).start();
    let denied = wire.round(1);
    assert!(
        denied.is_empty(),
        "delivered although all is denied: {}",
        show(&denied.iter().collect(), &cases)
    );

    let mut hits: BTreeMap<&str, usize> = EXCEPTIONS.iter().map(|e| (e.name, 0)).collect();
    for (round, allowed) in (2..).zip(&POLICIES) {
        daemon.swap(&allowed.policy());
        let got = wire.round(round);
        let excepted = |delivery: &Delivery| -> Option<&Exception> {
            let case = &cases[delivery.case as usize];
            EXCEPTIONS.iter().find(|e| (e.applies)(case, delivery))
        };
        let covered: BTreeSet<Delivery> =
            bare.iter().filter(|d| allowed.covers(d)).copied().collect();
        let want: BTreeSet<Delivery> = covered
            .iter()
            .filter(|d| excepted(d).is_none())
            .copied()
            .collect();
        println!(
            "policy {round}: {} deliveries are covered, {} expected, {} came",
            covered.len(),
            want.len(),
            got.len()
        );
        for delivery in covered.difference(&want) {
            let exception = excepted(delivery).unwrap();
            *hits.get_mut(exception.name).unwrap() += 1;
        }
        let leaked: BTreeSet<&Delivery> = got
            .difference(&want)
            .filter(|d| !(allowed.covers(d) && mended(&cases[d.case as usize])))
            .collect();
        println!("{} mended", got.difference(&want).count() - leaked.len());
        assert!(
            leaked.is_empty(),
            "delivered and should not be: {}",
            show(&leaked, &cases)
        );
        let missed: BTreeSet<&Delivery> = want.difference(&got).collect();
        assert!(
            missed.is_empty(),
            "not delivered and should be: {}",
            show(&missed, &cases)
        );
        assert!(want.len() > 500, "the policy allows next to nothing");
    }
    println!("exceptions: {hits:#?}");
    for exception in EXCEPTIONS {
        let hit = hits[exception.name];
        assert!(
            hit > 0,
            "{}: nothing falls under it ({})",
            exception.name,
            exception.reason
        );
    }
}
