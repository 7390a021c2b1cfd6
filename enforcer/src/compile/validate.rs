//! Whether an image says what its policy says: a sample of flows, judged by the reference
//! interpreter and by the functions that the kernel runs. Tests compare the two over everything; this
//! finds what tests cannot, such as a bad memory cell, before it judges packets.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use enforcer_common::{
    decide::{Decision, Query, verdict_at},
    image::{EMPTY, VERDICT_SESSION, mix},
    verdict::{Outcome, Reason},
};

use crate::policy::{
    model::{AddrRange, Endpoints, Environment, FlowQuery, Policy, Rule, SegmentId, Service},
    reference::{self, Judgement},
};

use super::{Changed, CompileError, Image};

/// Rules asked in all, about: the reference interpreter asks each of them about each flow.
const EFFORT: usize = 1 << 19;
/// Flows at least and at most.
const FLOWS: (usize, usize) = (16, 500);
/// Draws for an address of the family wanted.
const DRAWS: usize = 8;
/// Flows around an address that has changed.
const EACH: usize = 8;
/// Rules among which one is looked for that names its segment.
const NEAR: usize = 1 << 12;

/// Compares a sample of verdicts; the same one for the same image.
///
/// # Errors
/// [`CompileError::Disagrees`].
pub fn validate(policy: &Policy, env: &Environment, image: &Image) -> Result<(), CompileError> {
    validate_changes(policy, env, image, &[])
}

/// [`validate`], and as many flows again from and to addresses that have changed.
///
/// # Errors
/// As [`validate`].
pub fn validate_changes(
    policy: &Policy,
    env: &Environment,
    image: &Image,
    changed: &[Changed],
) -> Result<(), CompileError> {
    let mut draw = Draw {
        policy,
        env,
        seed: image.hash(),
        number: 0,
    };
    let count = (EFFORT / (policy.rules.len() + 1)).clamp(FLOWS.0, FLOWS.1);
    let mut flows: Vec<(FlowQuery, u64)> = (0..count).filter_map(|_| draw.flow()).collect();
    // Each of them at least twice where they are few.
    let more = count.min(changed.len().saturating_mul(EACH));
    for number in 0..more {
        let at = if changed.len() * EACH <= count {
            number / EACH
        } else {
            draw.below(changed.len())
        };
        let changed = changed.get(at);
        flows.extend(changed.and_then(|changed| draw.around(changed, number)));
    }
    let ends = flows.iter().flat_map(|(query, _)| [query.src, query.dst]);
    let segments = segments_of(policy, ends);
    let none = BTreeSet::new();
    let of = |ip: &IpAddr| segments.get(ip).unwrap_or(&none);
    for (query, unix) in flows {
        let (from, to) = (of(&query.src), of(&query.dst));
        let written = reference::judge_between(policy, env, &query, unix, from, to);
        let asked = Query {
            source: query.src.into(),
            destination: query.dst.into(),
            protocol: query.protocol,
            selector: query.selector,
        };
        let words = verdict_at(image.words(), &asked, unix);
        let session = words as u32 & VERDICT_SESSION != 0;
        if (Decision::unpack(words), session) != (decision(&written), written.session) {
            return Err(CompileError::Disagrees {
                from: query.src,
                to: query.dst,
                protocol: query.protocol,
                selector: query.selector,
            });
        }
    }
    Ok(())
}

/// A judgement of the reference interpreter in the words of an image.
fn decision(judgement: &Judgement) -> Decision {
    Decision {
        outcome: match judgement.outcome {
            reference::Outcome::Allowed => Outcome::Allowed,
            reference::Outcome::Denied => Outcome::Denied,
            reference::Outcome::WouldDeny => Outcome::WouldDeny,
            reference::Outcome::Off => Outcome::Off,
        },
        reason: match judgement.reason {
            reference::Reason::RuleAllow => Reason::RuleAllow,
            reference::Reason::RuleDeny => Reason::RuleDeny,
            reference::Reason::DefaultDeny => Reason::DefaultDeny,
            reference::Reason::Unsegmented => Reason::Unsegmented,
        },
        rule: judgement.rule.map_or(EMPTY, |rule| rule.0),
        segment: judgement.guard.map_or(EMPTY, |guard| guard.0),
    }
}

/// The segments of some addresses, found in one pass over all members.
pub fn segments_of(
    policy: &Policy,
    addresses: impl Iterator<Item = IpAddr>,
) -> BTreeMap<IpAddr, BTreeSet<SegmentId>> {
    let mut addresses: Vec<(IpAddr, BTreeSet<SegmentId>)> =
        addresses.map(|ip| (ip, BTreeSet::new())).collect();
    addresses.sort_unstable_by_key(|(ip, _)| *ip);
    addresses.dedup_by_key(|(ip, _)| *ip);
    for (id, segment) in (0u32..).zip(&policy.segments) {
        for member in segment.members.iter() {
            let (first, last) = ends(&member.range);
            let from = addresses.partition_point(|(ip, _)| *ip < first);
            let inside = addresses.iter_mut().skip(from);
            for (ip, segments) in inside.take_while(|(ip, _)| *ip <= last) {
                if member.contains(*ip) {
                    segments.insert(SegmentId(id));
                }
            }
        }
    }
    addresses.into_iter().collect()
}

fn ends(range: &AddrRange) -> (IpAddr, IpAddr) {
    match *range {
        AddrRange::V4 { first, last } => (first.into(), last.into()),
        AddrRange::V6 { first, last } => (first.into(), last.into()),
    }
}

/// The first address of a range, its last one, the one before or the one behind.
fn place_of(range: &AddrRange, place: usize) -> IpAddr {
    match *range {
        AddrRange::V4 { first, last } => {
            let (first, last) = (first.to_bits(), last.to_bits());
            let at = [first, last, first.wrapping_sub(1), last.wrapping_add(1)];
            IpAddr::V4(at.get(place).copied().unwrap_or(first).into())
        }
        AddrRange::V6 { first, last } => {
            let (first, last) = (first.to_bits(), last.to_bits());
            let at = [first, last, first.wrapping_sub(1), last.wrapping_add(1)];
            IpAddr::V6(at.get(place).copied().unwrap_or(first).into())
        }
    }
}

/// Draws flows that rules speak of, and some beside them.
struct Draw<'a> {
    policy: &'a Policy,
    env: &'a Environment,
    seed: u64,
    number: u64,
}

impl Draw<'_> {
    fn below(&mut self, bound: usize) -> usize {
        self.number += 1;
        (mix(self.number, self.seed) >> 16) as usize % bound.max(1)
    }

    fn flow(&mut self) -> Option<(FlowQuery, u64)> {
        let policy = self.policy;
        let rule = policy.rules.get(self.below(policy.rules.len()));
        let none = Endpoints::default();
        let (from, to) = rule.map_or((&none, &none), |rule| (&rule.from, &rule.to));
        let src = self.end(from)?;
        let dst = self.other(to, src)?;
        self.between(rule, src, dst)
    }

    /// A flow from an address that has changed, or to one; the first ones at its very ends.
    fn around(&mut self, changed: &Changed, number: usize) -> Option<(FlowQuery, u64)> {
        let outbound = number.is_multiple_of(2);
        let place = if number % EACH < 4 {
            number % EACH / 2
        } else {
            self.below(4)
        };
        let address = place_of(&changed.range, place);
        let rules = &self.policy.rules;
        // One that names its segment, if there is one nearby.
        let first = self.below(rules.len());
        let near = (first..rules.len()).chain(0..first).take(NEAR);
        let side = |rule: &Rule| {
            let side = if outbound { &rule.from } else { &rule.to };
            side.any || side.segments.contains(&changed.segment)
        };
        let mut near = near.filter_map(|number| rules.get(number));
        let rule = near.find(|rule| side(rule)).or_else(|| rules.get(first));
        let none = Endpoints::default();
        let (from, to) = rule.map_or((&none, &none), |rule| (&rule.from, &rule.to));
        let other = self.other(if outbound { to } else { from }, address)?;
        if outbound {
            self.between(rule, address, other)
        } else {
            self.between(rule, other, address)
        }
    }

    /// An address of the same family that one side of a rule speaks of.
    fn other(&mut self, side: &Endpoints, family: IpAddr) -> Option<IpAddr> {
        let same = |ip: &IpAddr| ip.is_ipv4() == family.is_ipv4();
        (0..=DRAWS).find_map(|_| self.end(side).filter(same))
    }

    fn between(
        &mut self,
        rule: Option<&Rule>,
        src: IpAddr,
        dst: IpAddr,
    ) -> Option<(FlowQuery, u64)> {
        let (protocol, selector) = self.service(rule);
        let query = FlowQuery {
            src,
            dst,
            protocol,
            selector,
        };
        let expires = rule.and_then(|rule| rule.expires).unwrap_or(0);
        Some((query, expires.saturating_sub(self.below(2) as u64)))
    }

    /// An address that one side of a rule speaks of, more often than not.
    fn end(&mut self, side: &Endpoints) -> Option<IpAddr> {
        if side.host && self.below(4) == 0 {
            let count = self.env.host_addresses.len();
            let at = self.below(count);
            return self.env.host_addresses.iter().nth(at).copied();
        }
        let at = self.below(side.segments.len());
        let segment = match side.segments.iter().nth(at) {
            Some(named) if self.below(8) != 0 => named.0 as usize,
            _ => self.below(self.policy.segments.len()),
        };
        let members = &self.policy.segments.get(segment)?.members;
        let member = members.get(self.below(members.len()))?;
        Some(place_of(&member.range, self.below(4)))
    }

    fn service(&mut self, rule: Option<&Rule>) -> (u8, u16) {
        let services = rule.map_or(&[][..], |rule| &rule.services);
        let at = self.below(services.len());
        match services.get(at) {
            Some(Service::Ports {
                transport,
                first,
                last,
            }) => {
                let ports = [*first, *last, last.wrapping_add(1)];
                let port = ports.get(self.below(3)).copied().unwrap_or(*first);
                (transport.number(), port)
            }
            Some(Service::Icmp { kind, code }) => {
                (1, u16::from(*kind) << 8 | u16::from(code.unwrap_or(0)))
            }
            Some(Service::Icmpv6 { kind, code }) => {
                (58, u16::from(*kind) << 8 | u16::from(code.unwrap_or(0)))
            }
            Some(Service::Protocol(number)) => (*number, 0),
            Some(Service::Any) | None => {
                let protocol = [6, 17, 1, 58, 47][self.below(5)];
                let selector = if protocol == 47 {
                    0
                } else {
                    self.below(1 << 16)
                };
                (protocol, selector as u16)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        compile::{Options, compile},
        policy::{arbitrary, model::Action},
    };

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn what_was_compiled_is_valid(
            policy in arbitrary::policy(),
            env in arbitrary::environment(),
        ) {
            let image = compile(&policy, &env, &Options::default()).unwrap();
            prop_assert_eq!(validate(&policy, &env, &image), Ok(()));
        }

        #[test]
        fn segments_are_found_as_the_model_finds_them(policy in arbitrary::policy()) {
            let ends = policy.segments.iter().flat_map(|s| s.members.iter());
            let ends: Vec<IpAddr> = ends.map(|m| ends_of(m.range)).collect();
            for (ip, segments) in segments_of(&policy, ends.into_iter()) {
                prop_assert_eq!(segments, policy.segments_of(ip));
            }
        }
    }

    fn ends_of(range: AddrRange) -> IpAddr {
        ends(&range).1
    }

    #[test]
    fn an_image_of_another_policy_is_not() {
        let text = "version: 1\nsegments:\n  a: { members: [{cidr: 10.0.0.0/24}] }\n\
                    rules:\n  - {name: r, from: [a], to: [any], services: [tcp/1-9, proto/gre]}\n";
        let file = crate::policy::SourceFile {
            name: "a.yaml".to_owned(),
            text: text.to_owned(),
        };
        let policy = crate::policy::parse(&[file]).unwrap();
        let env = Environment::default();
        let mut other = policy.clone();
        other.rules.edit(|rules| rules[0].action = Action::Deny);
        let image = compile(&other, &env, &Options::default()).unwrap();
        assert_eq!(validate(&other, &env, &image), Ok(()));
        let refused = validate(&policy, &env, &image).unwrap_err();
        assert!(matches!(refused, CompileError::Disagrees { .. }));
        assert!(refused.to_string().contains("10.0.0."), "{refused}");
    }
}
