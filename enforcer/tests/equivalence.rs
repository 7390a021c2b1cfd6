//! What runs is what was written: `decide` on the compiled image says what the reference
//! interpreter says of the policy, for every flow.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use enforcer::{
    compile::{Failsafe, Image, Options, compile},
    policy::{
        arbitrary,
        model::{AddrRange, Environment, FlowQuery, Policy, Transport},
        reference,
    },
};
use enforcer_common::{
    decide::{Ask, At, Decision, Query, answer, decide, verdict_at},
    flow::{Change, Clock, FlowSlot, FlowTable},
    image::{
        self, CLASS_FAILSAFE_SHIFT, CLASS_OWN, EMPTY, VERDICT_SESSION, Words, address_class,
        class_info, header, may_arrive, service_class,
    },
    judge::{Scene, judge},
    packet::{Link, Packet},
    verdict::{Outcome, Reason},
    wire::{FlowEntry, FlowKey, FragmentEntry, FragmentKey},
};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{FileFailurePersistence, TestRunner},
};

/// Policies a run, times queries of each: 20 480 pairs.
const POLICIES: u32 = 512;
const QUERIES: usize = 40;

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        // Shrinking compiles anew at each step.
        max_shrink_iters: 2_000,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(
            "tests/equivalence.proptest-regressions",
        ))),
        ..ProptestConfig::default()
    }
}

/// Counts how far a reader goes.
struct Spy<'a> {
    words: &'a [u32],
    farthest: Cell<u32>,
}

impl Words for Spy<'_> {
    fn word(&self, index: u32) -> u32 {
        self.farthest.set(self.farthest.get().max(index));
        self.words.word(index)
    }
}

/// The reference's judgement in the words of the image, and whether its rule bounds sessions.
fn expected(policy: &Policy, env: &Environment, query: &FlowQuery, unix: u64) -> (Decision, bool) {
    let judgement = reference::judge(policy, env, query, unix);
    let decision = Decision {
        outcome: outcome(judgement.outcome),
        reason: match judgement.reason {
            reference::Reason::RuleAllow => Reason::RuleAllow,
            reference::Reason::RuleDeny => Reason::RuleDeny,
            reference::Reason::DefaultDeny => Reason::DefaultDeny,
            reference::Reason::Unsegmented => Reason::Unsegmented,
        },
        rule: judgement.rule.map_or(EMPTY, |rule| rule.0),
        segment: judgement.guard.map_or(EMPTY, |guard| guard.0),
    };
    (decision, judgement.session)
}

fn outcome(outcome: reference::Outcome) -> Outcome {
    match outcome {
        reference::Outcome::Allowed => Outcome::Allowed,
        reference::Outcome::Denied => Outcome::Denied,
        reference::Outcome::WouldDeny => Outcome::WouldDeny,
        reference::Outcome::Off => Outcome::Off,
    }
}

fn decided<W: Words + ?Sized>(image: &W, query: &FlowQuery, unix: u64) -> (Decision, bool) {
    let query = Query {
        source: query.src.into(),
        destination: query.dst.into(),
        protocol: query.protocol,
        selector: query.selector,
    };
    let session = verdict_at(image, &query, unix) as u32 & VERDICT_SESSION != 0;
    (decide(image, &query, unix), session)
}

/// Both answers to one query, and to a denial of form between the same addresses.
fn check(
    policy: &Policy,
    env: &Environment,
    image: &Image,
    query: &FlowQuery,
    unix: u64,
) -> Result<(), TestCaseError> {
    let spy = Spy {
        words: image.words(),
        farthest: Cell::new(0),
    };
    prop_assert_eq!(
        decided(&spy, query, unix),
        expected(policy, env, query, unix),
        "at {}",
        unix
    );

    let ask = Ask::rules(&Query {
        source: query.src.into(),
        destination: query.dst.into(),
        protocol: 0,
        selector: 0,
    });
    let form = answer(&spy, &ask.form(Reason::Malformed), &At(0));
    prop_assert_eq!(Reason::from_bits(form as u32 >> 8), Reason::Malformed);
    let (strength, guard) = reference::judge_form(policy, env, Some((query.src, query.dst)));
    prop_assert_eq!(Outcome::from_bits(form as u32), outcome(strength));
    prop_assert_eq!((form >> 32) as u32, guard.map_or(EMPTY, |guard| guard.0));

    prop_assert!((spy.farthest.get() as usize) < image.words().len());
    Ok(())
}

const SCENE: Scene<At> = Scene {
    link: Link {
        ethernet: true,
        protocol: 0,
        vlan: None,
        ingress: true,
        ifindex: 1,
        slot: 0,
        gso: false,
        looped: false,
    },
    clock: Clock { now: 0, hz: 100 },
    time: At(0),
};

/// A frame that cannot be read.
fn unreadable_frame(image: &Image) -> Decision {
    let form = Err(Reason::Malformed);
    let mut packet = Packet::EMPTY;
    judge(image.words(), &NoFlows, &mut packet, &SCENE, form).decision
}

/// A table that knows nothing.
struct NoFlows;

/// There are none.
struct NoSlot;

impl FlowTable for NoFlows {
    type Slot = NoSlot;

    fn find(&self, _: &FlowKey) -> Option<NoSlot> {
        None
    }

    fn insert(&self, _: &FlowKey, _: &FlowEntry) -> bool {
        false
    }

    fn fragment(&self, _: &FragmentKey) -> Option<FragmentEntry> {
        None
    }

    fn insert_fragment(&self, _: &FragmentKey, _: &FragmentEntry) -> bool {
        false
    }
}

impl FlowSlot for NoSlot {
    fn load(&self) -> FlowEntry {
        unreachable!()
    }

    fn touch(&self, _: u64, _: u32) {}

    fn change(&self, _: &Change) {}
}

fn compiled(policy: &Policy, env: &Environment) -> Image {
    compile(policy, env, &Options::default()).unwrap()
}

/// Up to three failsafes, over the universe of the policies.
fn options() -> impl Strategy<Value = Options> {
    let net = (any::<bool>(), 0u32..1024, 0u8..=10).prop_map(|(v6, at, host_bits)| {
        let text = if v6 {
            format!(
                "{}/{}",
                Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(at)),
                128 - host_bits
            )
        } else {
            format!(
                "{}/{}",
                Ipv4Addr::from_bits(0x0a00_0000 | at),
                32 - host_bits
            )
        };
        text.parse().unwrap()
    });
    let port = prop::sample::select(vec![0u16, 22, 79, 80, 81, 443, 8000, 65_535]);
    let transport = prop::sample::select(vec![Transport::Tcp, Transport::Udp]);
    let ports = (transport, port.clone(), port).prop_map(|(t, a, b)| (t, a.min(b), a.max(b)));
    let failsafe = (
        prop::collection::vec(net, 1..4),
        prop::collection::vec(ports, 1..3),
        arbitrary::interfaces(0.5),
    )
        .prop_map(|(sources, ports, interfaces)| Failsafe {
            sources,
            ports,
            interfaces,
        });
    prop::collection::vec(failsafe, 0..4).prop_map(|failsafes| Options {
        failsafes,
        ..Options::default()
    })
}

/// What a policy is compiled with, and what is asked of it when.
type Case = (Policy, Environment, Options, Vec<(FlowQuery, u64)>);

fn case() -> impl Strategy<Value = Case> {
    let inputs = (arbitrary::policy(), arbitrary::environment(), options());
    inputs.prop_flat_map(|(policy, env, options)| {
        let query = (arbitrary::query(&policy), arbitrary::time());
        let queries = prop::collection::vec(query, QUERIES);
        (Just(policy), Just(env), Just(options), queries)
    })
}

/// What the image says of a source at an interface slot: spoofed, own, failsafes of a service.
fn at_slot(image: &Image, query: &FlowQuery, slot: u32) -> (bool, bool, u32) {
    let words = image.words();
    let (flags, bitmap) = class_info(words, address_class(words, &query.src.into()));
    let of = |table: u32, index: u32| match words.word(table) {
        0 => 0,
        at => words.word(at + index),
    };
    let service = service_class(words, query.dst.is_ipv6(), query.protocol, query.selector);
    let there = match words.word(header::SLOT_FAILSAFES) {
        0 => u32::MAX,
        _ => of(header::SLOT_FAILSAFES, slot),
    };
    let failsafes = flags >> CLASS_FAILSAFE_SHIFT & of(header::SERVICE_FAILSAFES, service) & there;
    (
        !may_arrive(words, bitmap, slot),
        flags & CLASS_OWN != 0,
        failsafes,
    )
}

/// The same from the policy and the options.
fn at_interface(
    (policy, env, options): (&Policy, &Environment, &Options),
    query: &FlowQuery,
    interface: &str,
) -> (bool, bool, u32) {
    let service = (query.protocol, query.selector);
    let failsafes = (0u32..).zip(&options.failsafes);
    let covering = failsafes.filter(|(_, f)| f.covers(env, query.src, service, interface));
    (
        reference::spoofed(policy, env, query.src, interface),
        env.host_addresses.contains(&query.src),
        covering.fold(0, |bits, (number, _)| bits | 1 << number),
    )
}

proptest! {
    #![proptest_config(config(POLICIES))]

    #[test]
    fn the_image_decides_as_the_reference_judges((policy, env, options, queries) in case()) {
        let image = compile(&policy, &env, &options).unwrap();
        for (query, unix) in &queries {
            check(&policy, &env, &image, query, *unix)?;
            // Slot 0: an interface that the image does not know.
            let nowhere = [(0, "nowhere"), (77, "nowhere")];
            let slots = env.interfaces.iter().map(|(slot, name)| (*slot, name.as_str()));
            for (slot, name) in slots.chain(nowhere) {
                let got = at_slot(&image, query, slot);
                let want = at_interface((&policy, &env, &options), query, name);
                prop_assert_eq!(got, want, "{} at {}", query.src, name);
            }
        }
        let sessions = image.words().word(header::SESSIONS);
        prop_assert_eq!(sessions != 0, policy.rules.iter().any(|r| r.session.is_some()));
        for (rule, at) in policy.rules.iter().zip((sessions..).step_by(2)) {
            let bounds = rule.session.map_or([None, None], |s| [s.max, s.idle]);
            let got = [image.words().word(at), image.words().word(at + 1)];
            prop_assert!(sessions == 0 || got == bounds.map(|b| b.unwrap_or(0)));
        }
        let unreadable = unreadable_frame(&image);
        let (strength, guard) = reference::judge_form(&policy, &env, None);
        prop_assert_eq!(unreadable.outcome, outcome(strength));
        prop_assert_eq!((unreadable.segment, guard), (EMPTY, None));
    }
}

/// Every address next to which anything can change, by address class of the image.
fn representatives(policy: &Policy, env: &Environment, image: &Image) -> Vec<Vec<IpAddr>> {
    let mut v4: BTreeSet<u32> = BTreeSet::from([0, 0xe000_0000, 0xefff_ffff, u32::MAX]);
    let mut v6: BTreeSet<u128> = BTreeSet::from([0, 0xff << 120, u128::MAX]);
    let members = policy.segments.iter().flat_map(|s| s.members.iter());
    for range in members.flat_map(|m| m.except.iter().chain([&m.range])) {
        match range {
            AddrRange::V4 { first, last } => v4.extend([first.to_bits(), last.to_bits()]),
            AddrRange::V6 { first, last } => v6.extend([first.to_bits(), last.to_bits()]),
        }
    }
    for ip in &env.host_addresses {
        match ip {
            IpAddr::V4(ip) => drop(v4.insert(ip.to_bits())),
            IpAddr::V6(ip) => drop(v6.insert(ip.to_bits())),
        }
    }
    let around4 = v4
        .iter()
        .flat_map(|a| [a.saturating_sub(1), *a, a.saturating_add(1)]);
    let around6 = v6
        .iter()
        .flat_map(|a| [a.saturating_sub(1), *a, a.saturating_add(1)]);
    let mut classes: BTreeMap<(u32, bool), BTreeSet<IpAddr>> = BTreeMap::new();
    let four = around4.map(|a| IpAddr::V4(Ipv4Addr::from_bits(a)));
    for ip in four.chain(around6.map(|a| IpAddr::V6(Ipv6Addr::from_bits(a)))) {
        let class = address_class(image.words(), &ip.into());
        classes.entry((class, ip.is_ipv6())).or_default().insert(ip);
    }
    let met: BTreeSet<u32> = classes.keys().map(|(class, _)| *class).collect();
    assert_eq!(met.len(), image.stats().classes as usize);
    classes
        .into_values()
        .map(|ips| {
            // The ends of the class's stretches: first, last and one between.
            let ips: Vec<IpAddr> = ips.into_iter().collect();
            let picked = BTreeSet::from([0, ips.len() / 2, ips.len() - 1]);
            picked.into_iter().map(|at| ips[at]).collect()
        })
        .collect()
}

/// One (protocol, selector) of every service class, per family: every point there is, sorted.
fn services(image: &Image, v6: bool) -> Vec<(u8, u16)> {
    let mut found: BTreeMap<(u32, bool), (u8, u16)> = BTreeMap::new();
    for protocol in 0..=u8::MAX {
        let last = match protocol {
            1 | 6 | 17 | 58 | 132 | 136 => u16::MAX,
            _ => 0,
        };
        for selector in 0..=last {
            let class = service_class(image.words(), v6, protocol, selector);
            // Tunnels are tried apart: `any` must not mix them with others.
            let tunnel = enforcer::policy::model::TUNNEL_PROTOCOLS.contains(&protocol);
            found.entry((class, tunnel)).or_insert((protocol, selector));
        }
    }
    found.into_values().collect()
}

#[test]
fn every_class_pair_and_service_class_of_some_policies() {
    let mut runner = TestRunner::deterministic();
    for _ in 0..24 {
        let policy = arbitrary::policy().new_tree(&mut runner).unwrap().current();
        let env = arbitrary::environment();
        let env = env.new_tree(&mut runner).unwrap().current();
        let image = compiled(&policy, &env);
        let addresses = representatives(&policy, &env, &image).concat();
        let points = [services(&image, false), services(&image, true)];
        let mut times = [0, 1_999, 2_000, 2_001, u64::MAX - 1].into_iter().cycle();
        for src in &addresses {
            for dst in addresses.iter().filter(|d| d.is_ipv6() == src.is_ipv6()) {
                for (protocol, selector) in &points[usize::from(src.is_ipv6())] {
                    let query = FlowQuery {
                        src: *src,
                        dst: *dst,
                        protocol: *protocol,
                        selector: *selector,
                    };
                    check(&policy, &env, &image, &query, times.next().unwrap()).unwrap();
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn order_and_repetition_of_members_do_not_matter(
        policy in arbitrary::policy(),
        env in arbitrary::environment(),
        turn in 0usize..4,
    ) {
        let mut other = policy.clone();
        for segment in &mut other.segments {
            segment.interfaces.reverse();
            segment.interfaces.extend(segment.interfaces.first().cloned());
            let mut members = segment.members.to_vec();
            members.reverse();
            let length = members.len();
            members.rotate_left(turn % length);
            let again = members[turn % length].clone();
            members.push(again);
            for member in &mut members {
                member.except.reverse();
                member.except.extend(member.except.first().copied());
            }
            segment.members = members.into();
        }
        other.rules.edit(|rules| {
            for rule in rules {
                rule.services.reverse();
                rule.services.extend(rule.services.first().copied());
            }
        });
        // Not only the same verdicts: the same words.
        prop_assert_eq!(compiled(&policy, &env), compiled(&other, &env));
    }

    /// Who decides may change with the order of the rules; what becomes of a flow does not.
    #[test]
    fn the_order_of_rules_changes_no_outcome(
        (policy, env, options, queries) in case(),
        turn in 0usize..10,
    ) {
        let mut other = policy.clone();
        let length = other.rules.len().max(1);
        other.rules.edit(|rules| {
            rules.reverse();
            rules.rotate_left(turn % length);
        });
        let images = [&policy, &other].map(|p| compile(p, &env, &options).unwrap());
        for (query, unix) in &queries {
            let [one, two] = [0, 1].map(|i| decided(images[i].words(), query, *unix).0);
            prop_assert_eq!((one.outcome, one.reason), (two.outcome, two.reason));
            prop_assert_eq!(one.segment, two.segment);
        }
    }

    #[test]
    fn an_image_reads_back_and_damage_is_noticed(
        policy in arbitrary::policy(),
        env in arbitrary::environment(),
        at in any::<prop::sample::Index>(),
        bit in 0u32..32,
    ) {
        let image = compiled(&policy, &env);
        let mut padded = image.words().to_vec();
        padded.resize(image.size_class() as usize, 0);
        prop_assert_eq!(Image::from_words(padded), Ok(image.clone()));

        let next = image.clone().with_generation(77);
        prop_assert_eq!((next.generation(), next.hash()), (77, image.hash()));
        prop_assert_eq!(Image::from_words(next.words().to_vec()), Ok(next));

        let mut damaged = image.words().to_vec();
        let at = at.index(damaged.len());
        damaged[at] ^= 1u32 << bit;
        if at != image::header::GENERATION as usize {
            prop_assert!(Image::from_words(damaged).is_err());
        }
        let cut = image.words()[..image.words().len() - 1].to_vec();
        prop_assert!(Image::from_words(cut).is_err());
    }
}

#[test]
fn words_that_are_no_image_are_refused() {
    assert!(Image::from_words(Vec::new()).is_err());
    assert!(Image::from_words(vec![image::MAGIC]).is_err());
    assert!(Image::from_words(vec![0; 1 << 18]).is_err());
}
