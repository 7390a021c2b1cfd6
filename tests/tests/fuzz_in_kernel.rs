//! The scripts that the packet fuzzer kept, through the loaded programs: bytecode and host give
//! each packet the same verdict and end with the same flows.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::collections::HashSet;

use enforcer::compile::Image;
use enforcer_common::{
    flow::Clock,
    judge::Scene,
    packet::Link,
    verdict::{Hook, Reason},
    wire::FlowEntry,
};
use enforcer_tests::{
    fuzz::{
        self,
        script::{self, POLICIES, Step},
        seeds,
    },
    host::{self, HZ, HashFlows, Moment},
    kernel::{self, Programs},
};

/// What BPF_PROG_TEST_RUN takes: whole headers behind an IP ethertype, at most a page, and nothing
/// in metadata. Frames without Ethernet header it cannot make at all.
fn runnable(step: &Step<'_>) -> bool {
    let bytes = step.bytes;
    step.link.ethernet
        && step.link.vlan.is_none()
        && !step.link.gso
        && !step.link.looped
        && (15..3000).contains(&bytes.len())
        && match (bytes[12], bytes[13]) {
            (0x08, 0x00) => bytes.len() >= 34,
            (0x86, 0xdd) => bytes.len() >= 54,
            _ => true,
        }
}

/// It stands still: no script takes long enough for the kernel's to matter.
const CLOCK: Clock = Clock {
    now: 1_000_000,
    hz: HZ,
};

/// Reasons that take more than a packet and a policy.
const ELSEWHERE: [Reason; 6] = [
    Reason::NoPolicy,
    Reason::Failsafe,
    Reason::Expired,
    Reason::VlanDevice,
    Reason::Deferred,
    Reason::EthertypeListed,
];

/// An entry without its clock.
fn stamped(entry: &FlowEntry) -> (u32, u32, u32, u32) {
    (entry.generation, entry.rule, entry.flags, entry.selector)
}

/// The policy that is live in the kernel.
struct Live {
    policy: usize,
    image: Image,
}

impl Live {
    fn apply(policy: usize, programs: &mut Programs) -> Self {
        let image = POLICIES[policy].images[0].clone();
        let image = image.with_generation(kernel::generation());
        programs.apply(&image);
        Self { policy, image }
    }
}

#[test]
fn the_kernel_judges_the_corpus_as_the_host_does() {
    let mut scripts: Vec<Vec<u8>> = fuzz::corpus("packets")
        .into_iter()
        .map(|(_, b)| b)
        .collect();
    scripts.extend(seeds::packets());
    // Those that begin under the same policy after each other: swaps wait for the kernel.
    scripts.sort_by_key(|script| {
        script
            .first()
            .map_or(0, |f| usize::from(*f) % POLICIES.len())
    });
    let mut programs = Programs::shared();
    let programs = &mut *programs;
    programs.set_interface(1, 0, 1);
    let mut live = Live::apply(0, programs);
    let (mut judged, mut reasons) = (0, HashSet::new());
    for script in &scripts {
        programs.forget_flows();
        programs.drain();
        let flows = HashFlows::default();
        let mut swaps = None;
        for (number, step) in script::decode(script).iter().enumerate() {
            if !runnable(step) {
                continue;
            }
            let swapped = swaps.is_some_and(|before| before != step.swaps);
            if swapped || live.policy != step.policy {
                live = Live::apply(step.policy, programs);
            }
            swaps = Some(step.swaps);
            let link = Link {
                ifindex: 1,
                slot: 1,
                ..step.link
            };
            let scene = Scene {
                link,
                clock: CLOCK,
                time: Moment { boot: 1, unix: 0 },
            };
            let want = host::see(&live.image, &flows, &scene, step.bytes).decision;
            let hook = if link.ingress {
                Hook::TcIngress
            } else {
                Hook::TcEgress
            };
            let got = programs.judge(hook, step.bytes);
            assert_eq!(
                (got.outcome, got.reason),
                (want.outcome, want.reason),
                "packet {number} of {script:02x?}"
            );
            reasons.insert(got.reason);
            judged += 1;
        }
        let (v4, v6) = programs.flows();
        let entries = flows.entries.borrow();
        assert_eq!(
            v4.len() + v6.len(),
            entries.len(),
            "flows after {script:02x?}"
        );
        for (key, entry) in entries.iter() {
            let kernel = if key.is_v6() {
                v6.get(key)
            } else {
                v4.get(key)
            };
            let host = stamped(&entry.0.get());
            assert_eq!(
                kernel.map(stamped),
                Some(host),
                "{key:?} after {script:02x?}"
            );
        }
    }
    println!("{judged} packets of {} scripts, {reasons:?}", scripts.len());
    assert!(judged > scripts.len(), "only {judged} packets could be run");
    for reason in Reason::ALL.iter().filter(|r| !ELSEWHERE.contains(*r)) {
        assert!(reasons.contains(reason), "no packet reached {reason:?}");
    }
}
