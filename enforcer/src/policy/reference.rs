//! The reference interpreter: what a policy means, slow and obvious.
//!
//! The oracle that the compiler and the kernel programs are compared with. It shares nothing with
//! them but the model's types, and prefers the wording of `docs/policy.md` to speed.

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    diag::{Diagnostic, Span},
    model::{
        Action, Endpoints, Environment, Expect, FlowQuery, Mode, Policy, PolicyTest, RuleId,
        SegmentId, Service, TUNNEL_PROTOCOLS, Unsegmented, is_multicast,
    },
};

/// What becomes of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Passes, by a rule or as unsegmented.
    Allowed,
    /// Judged denied with strength `enforce`: dropped and recorded.
    Denied,
    /// Judged denied with strength `observe`: passes and is recorded.
    WouldDeny,
    /// Judged denied with strength `off`: passes, not recorded.
    Off,
}

impl Outcome {
    /// Whether the flow was judged denied, whatever the strength.
    pub fn is_judged_denied(self) -> bool {
        self != Self::Allowed
    }
}

/// Which clause of the decision spoke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// An allow rule.
    RuleAllow,
    /// A deny rule.
    RuleDeny,
    /// No rule, and a segment guards the flow.
    DefaultDeny,
    /// No rule and no guard: `defaults.unsegmented`.
    Unsegmented,
}

/// A judgement and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// What becomes of the flow.
    pub outcome: Outcome,
    /// Which clause spoke.
    pub reason: Reason,
    /// The rule, for [`Reason::RuleAllow`] and [`Reason::RuleDeny`].
    pub rule: Option<RuleId>,
    /// Whether that rule bounds the flow's life (`session`).
    pub session: bool,
    /// The guard that is named, for [`Reason::DefaultDeny`].
    pub guard: Option<SegmentId>,
    /// Every segment of the source.
    pub from: BTreeSet<SegmentId>,
    /// Every segment of the destination.
    pub to: BTreeSet<SegmentId>,
}

/// Judges the flow that `query` opens at `unix` (seconds).
pub fn judge(policy: &Policy, env: &Environment, query: &FlowQuery, unix: u64) -> Judgement {
    let from = policy.segments_of(query.src);
    let to = policy.segments_of(query.dst);
    judge_between(policy, env, query, unix, &from, &to)
}

/// [`judge`] for one who knows the segments of source and destination.
pub fn judge_between(
    policy: &Policy,
    env: &Environment,
    query: &FlowQuery,
    unix: u64,
    from: &BTreeSet<SegmentId>,
    to: &BTreeSet<SegmentId>,
) -> Judgement {
    let verdict = |outcome, reason, rule, guard| Judgement {
        outcome,
        reason,
        rule,
        session: rule
            .and_then(|id| policy.rule(id))
            .is_some_and(|rule| rule.session.is_some()),
        guard,
        from: from.clone(),
        to: to.clone(),
    };

    // The strongest matching deny; of equals the first in file order.
    let mut deny: Option<(Mode, RuleId)> = None;
    // The allow that gives most; of equals the first in file order.
    let mut allow: Option<(u32, RuleId)> = None;
    for (rule, index) in policy.rules.iter().zip(0u32..) {
        let exists = rule.expires.is_none_or(|expires| unix < expires);
        let matches = exists
            && side_matches(env, &rule.from, query.src, from)
            && side_matches(env, &rule.to, query.dst, to)
            && rule
                .services
                .iter()
                .any(|s| service_matches(*s, rule.action, query));
        if !matches {
            continue;
        }
        match rule.action {
            Action::Deny => {
                let through = from
                    .intersection(&rule.from.segments)
                    .chain(to.intersection(&rule.to.segments));
                let strength = strongest(policy, through).unwrap_or(policy.defaults.mode);
                if deny.is_none_or(|(best, _)| strength > best) {
                    deny = Some((strength, RuleId(index)));
                }
            }
            Action::Allow => {
                let limits = if rule.expires.is_some() {
                    2
                } else {
                    u32::from(rule.session.is_some())
                };
                if allow.is_none_or(|(fewest, _)| limits < fewest) {
                    allow = Some((limits, RuleId(index)));
                }
            }
        }
    }

    if let Some((strength, rule)) = deny {
        return verdict(denied(strength), Reason::RuleDeny, Some(rule), None);
    }
    if let Some((_, rule)) = allow {
        return verdict(Outcome::Allowed, Reason::RuleAllow, Some(rule), None);
    }
    if let Some((strength, guard)) = strongest_guard(policy, from, to) {
        return verdict(denied(strength), Reason::DefaultDeny, None, Some(guard));
    }
    match policy.defaults.unsegmented {
        Unsegmented::Allow => verdict(Outcome::Allowed, Reason::Unsegmented, None, None),
        Unsegmented::Deny => verdict(
            denied(policy.defaults.mode),
            Reason::Unsegmented,
            None,
            None,
        ),
    }
}

/// The strength of a denial of form (malformed packet, fragment, unknown ethertype …), and the
/// guard it is owed to. `addresses` are source and destination where both can be read. No built-in
/// set plays a part, so the environment does not either.
pub fn judge_form(
    policy: &Policy,
    _env: &Environment,
    addresses: Option<(IpAddr, IpAddr)>,
) -> (Outcome, Option<SegmentId>) {
    let Some((src, dst)) = addresses else {
        return (denied(policy.defaults.mode), None);
    };
    let guard = strongest_guard(policy, &policy.segments_of(src), &policy.segments_of(dst));
    match (guard, policy.defaults.unsegmented) {
        (Some((strength, guard)), _) => (denied(strength), Some(guard)),
        (None, Unsegmented::Allow) => (Outcome::Off, None),
        (None, Unsegmented::Deny) => (denied(policy.defaults.mode), None),
    }
}

/// Whether a packet with this source may not come in at `interface`: a segment that it is in names
/// other interfaces. One that the enforcer is not at counts as none of them.
pub fn spoofed(policy: &Policy, env: &Environment, source: IpAddr, interface: &str) -> bool {
    let known = env.interfaces.values().any(|name| name == interface);
    policy
        .segments
        .iter()
        .filter(|segment| !segment.interfaces.is_empty())
        .filter(|segment| segment.members.iter().any(|m| m.contains(source)))
        .any(|segment| !known || !segment.interfaces.iter().any(|p| p.matches(interface)))
}

fn denied(strength: Mode) -> Outcome {
    match strength {
        Mode::Enforce => Outcome::Denied,
        Mode::Observe => Outcome::WouldDeny,
        Mode::Off => Outcome::Off,
    }
}

/// Whether one side of a rule speaks of `ip`, which is in exactly `segments`.
fn side_matches(
    env: &Environment,
    side: &Endpoints,
    ip: IpAddr,
    segments: &BTreeSet<SegmentId>,
) -> bool {
    side.any
        || segments
            .iter()
            .any(|segment| side.segments.contains(segment))
        || (side.unsegmented && segments.is_empty())
        || (side.host && env.host_addresses.contains(&ip))
        || (side.multicast && is_multicast(ip))
}

fn service_matches(service: Service, action: Action, query: &FlowQuery) -> bool {
    let icmp = |kind: u8, code: Option<u8>| {
        query.selector >> 8 == u16::from(kind)
            && code.is_none_or(|code| query.selector & 0xff == u16::from(code))
    };
    match service {
        Service::Any => match action {
            Action::Allow => !TUNNEL_PROTOCOLS.contains(&query.protocol),
            Action::Deny => true,
        },
        Service::Ports {
            transport,
            first,
            last,
        } => {
            query.protocol == transport.number()
                && first <= query.selector
                && query.selector <= last
        }
        Service::Icmp { kind, code } => {
            query.protocol == 1 && query.dst.is_ipv4() && icmp(kind, code)
        }
        Service::Icmpv6 { kind, code } => {
            query.protocol == 58 && query.dst.is_ipv6() && icmp(kind, code)
        }
        Service::Protocol(number) => query.protocol == number,
    }
}

/// The strongest mode among segments; `None` of none.
fn strongest<'a>(policy: &Policy, segments: impl Iterator<Item = &'a SegmentId>) -> Option<Mode> {
    segments
        .filter_map(|id| policy.segment(*id))
        .map(|s| s.mode)
        .max()
}

/// The guard a default deny names: the strongest; of equals one of the destination's before one
/// of the source's, then the one written first.
fn strongest_guard(
    policy: &Policy,
    from: &BTreeSet<SegmentId>,
    to: &BTreeSet<SegmentId>,
) -> Option<(Mode, SegmentId)> {
    let mut best: Option<(Mode, SegmentId)> = None;
    // In order of preference, so that only a stronger one replaces what was found.
    let candidates = to
        .iter()
        .map(|id| (id, true))
        .chain(from.iter().map(|id| (id, false)));
    for (id, is_destination) in candidates {
        let Some(segment) = policy.segment(*id) else {
            continue;
        };
        let guards = if is_destination {
            segment.protect.inbound()
        } else {
            segment.protect.outbound()
        };
        if guards && best.is_none_or(|(mode, _)| segment.mode > mode) {
            best = Some((segment.mode, *id));
        }
    }
    best
}

/// Runs the policy's own `tests:`; one error for each that fails, at its line.
pub fn run_tests(policy: &Policy, env: &Environment) -> Vec<Diagnostic> {
    policy
        .tests
        .iter()
        .filter_map(|test| run_test(policy, env, test))
        .collect()
}

fn run_test(policy: &Policy, env: &Environment, test: &PolicyTest) -> Option<Diagnostic> {
    let query = &test.query;
    // Every instant of the language comes after 0: there, nothing has expired.
    let judgement = judge(policy, env, query, test.at.unwrap_or(0));
    let expected = match test.expect {
        Expect::Allow => "allow",
        Expect::Deny => "deny",
    };
    if judgement.outcome.is_judged_denied() == (test.expect == Expect::Deny) {
        return None;
    }
    let verdict = match judgement.outcome {
        Outcome::Allowed => "allowed",
        Outcome::Denied => "denied",
        Outcome::WouldDeny => "judged denied (observe: it passes and is recorded)",
        Outcome::Off => "judged denied (off: it passes)",
    };
    let span = Span {
        line: test.origin.line,
        column: test.origin.column,
        end_column: test.origin.column.saturating_add(1),
    };

    let message = format!(
        "the test expects {expected}, but {} -> {} {} is {verdict}",
        query.src, query.dst, test.service
    );
    let mut found = Diagnostic::error("E0401", &test.origin.file, span, message);
    if let Some(at) = test.at.and_then(|at| i64::try_from(at).ok())
        && let Ok(at) = jiff::Timestamp::from_second(at)
    {
        found = found.note(format!("judged at {at}"));
    }
    Some(found.note(why(policy, &judgement)).note(format!(
        "{} is in {}; {} is in {}",
        query.src,
        names(policy, &judgement.from),
        query.dst,
        names(policy, &judgement.to)
    )))
}

/// The reason in words, with the place that says so.
fn why(policy: &Policy, judgement: &Judgement) -> String {
    let rule = judgement.rule.and_then(|id| policy.rule(id));
    let guard = judgement.guard.and_then(|id| policy.segment(id));
    match (judgement.reason, rule, guard) {
        (Reason::RuleAllow, Some(rule), _) => {
            format!("allowed by rule `{}` ({})", rule.name, rule.origin)
        }
        (Reason::RuleDeny, Some(rule), _) => {
            format!("denied by rule `{}` ({})", rule.name, rule.origin)
        }
        (Reason::DefaultDeny, _, Some(guard)) => {
            format!(
                "no rule allows it, and segment `{}` is protected ({})",
                guard.name, guard.origin
            )
        }
        _ => {
            let word = match policy.defaults.unsegmented {
                Unsegmented::Allow => "allow",
                Unsegmented::Deny => "deny",
            };
            format!("no rule speaks of it and no segment guards it: `unsegmented: {word}`")
        }
    }
}

fn names(policy: &Policy, segments: &BTreeSet<SegmentId>) -> String {
    let names: Vec<&str> = segments
        .iter()
        .filter_map(|id| policy.segment(*id))
        .map(|s| s.name.as_str())
        .collect();
    if names.is_empty() {
        "no segment".to_owned()
    } else {
        names.join(", ")
    }
}

#[cfg(test)]
mod tests;
