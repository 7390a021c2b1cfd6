//! The difference between a policy and the one in force: in what is written, in who reaches whom,
//! and in which live flows go on.
//!
//! Pure, like `compile`: flows and times are arguments. Every list is bounded, every number is of
//! all; where the work itself was cut short, the plan says so.
//!
//! Must not know: where policies and flows come from, how plans are shown.

pub mod flows;
mod reach;
pub(crate) mod services;
mod settings;
#[cfg(test)]
mod tests;
mod text;
pub mod types;

use enforcer_common::{decide::Decision, image::EMPTY, verdict::Reason};

use crate::{
    compile::{
        Image,
        reach::{self as reached, Bounds},
    },
    policy::model::{Environment, Policy, RuleId, SegmentId},
    settings::Settings,
};

pub use types::Plan;
use types::{Because, ReachChanges, Sign};

/// Things of one kind that a plan lists.
const ITEMS: usize = 200;
/// Details of a thing.
const DETAILS: usize = 12;
/// Ends on one side of a group.
const ENDS: usize = 16;
/// Services of a change.
const SERVICES: usize = 24;
/// Services that the summary names.
const NAMED: usize = 3;
/// Live flows of a list.
const FLOWS: usize = 1_000;

/// A policy with all that judges beside it.
#[derive(Clone, Copy, Debug)]
pub struct Version<'a> {
    /// What is written.
    pub policy: &'a Policy,
    /// What it was compiled to.
    pub image: &'a Image,
    /// What passes before it.
    pub settings: &'a Settings,
}

impl<'a> Version<'a> {
    /// What decides who reaches whom.
    fn parts(self) -> reached::Version<'a> {
        reached::Version {
            policy: self.policy,
            image: self.image,
        }
    }
}

/// Compares what is written and who reaches whom; [`flows::Changes`] compares flows. `unix` is the
/// present in seconds.
pub fn compare(live: Version<'_>, new: Version<'_>, env: &Environment, unix: u64) -> Plan {
    let mut text = text::compare(live.policy, new.policy);
    text.settings = settings::compare(live.settings, new.settings);
    let same = live.image.hash() == new.image.hash();
    let mut plan = Plan {
        hash: format!("{:016x}", new.image.hash()),
        live_hash: format!("{:016x}", live.image.hash()),
        generation: live.image.generation(),
        text,
        ..Plan::default()
    };
    if !same {
        plan.reach = reach::changes(live, new, env, unix, Bounds::default());
    }
    let written = [
        &plan.text.policy,
        &plan.text.segments,
        &plan.text.groups,
        &plan.text.rules,
        &plan.text.settings,
    ];
    plan.changed = !same || written.iter().any(|items| !items.is_empty());
    if !same && written.iter().all(|items| items.is_empty()) {
        let why = "it says the same in another order, or this host has other addresses";
        let details = text::Details::one(why.to_owned());
        plan.text.policy.push(Sign::Changed, "image", None, details);
    }
    plan
}

/// Of an image in force whose policy nobody has any more: an earlier daemon made it. It judges live
/// flows, but has no names.
pub fn unknown(live: Version<'_>, new: Version<'_>) -> Plan {
    let mut plan = Plan {
        changed: live.image.hash() != new.image.hash(),
        hash: format!("{:016x}", new.image.hash()),
        live_hash: format!("{:016x}", live.image.hash()),
        generation: live.image.generation(),
        ..Plan::default()
    };
    if plan.changed {
        let why = "the policy in force was compiled by an earlier daemon, and its files cannot be read now: \
                   only live flows are compared";
        plan.reach.cut.push(why.to_owned());
    }
    plan
}

/// Who decided, in names.
pub(crate) fn because(policy: &Policy, decision: &Decision) -> Because {
    let rule = policy.rule(RuleId(decision.rule));
    let rule = rule.filter(|_| decision.rule != EMPTY);
    let segment = policy.segment(SegmentId(decision.segment));
    let segment = segment.filter(|_| decision.segment != EMPTY && rule.is_none());
    let origin = rule.map(|rule| &rule.origin);
    let origin = origin.or(segment.map(|segment| &segment.origin));
    // The kernel calls it so since the flow was admitted before.
    let reason = match (decision.reason == Reason::Revoked, rule, segment) {
        (true, Some(_), _) => Reason::RuleDeny,
        (true, None, Some(_)) => Reason::DefaultDeny,
        _ => decision.reason,
    };
    Because {
        outcome: decision.outcome.into(),
        reason: reason.name().to_owned(),
        rule: rule.map(|rule| rule.name.as_str().into()),
        segment: segment.map(|segment| segment.name.as_str().into()),
        file: origin.map(|origin| origin.file.clone()),
        line: origin.map(|origin| origin.line),
    }
}

/// `1 rule`, `2 rules`.
pub(crate) fn count(number: u64, one: &str, more: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { more })
}

/// The whole plan in one line.
pub fn summary(plan: &Plan) -> String {
    if !plan.changed {
        return "no changes".to_owned();
    }
    let mut parts: Vec<String> = Vec::new();
    for (items, one, more) in [
        (&plan.text.policy, "default", "defaults"),
        (&plan.text.segments, "segment", "segments"),
        (&plan.text.groups, "group", "groups"),
        (&plan.text.rules, "rule", "rules"),
        (&plan.text.settings, "setting", "settings"),
    ] {
        let numbers = [
            (items.added, "added"),
            (items.removed, "removed"),
            (items.changed, "changed"),
        ];
        let mut numbers = numbers.into_iter().filter(|(number, _)| *number > 0);
        if let Some((number, what)) = numbers.next() {
            let mut part = format!("{} {what}", count(number as u64, one, more));
            for (number, what) in numbers {
                part.push_str(&format!(", {number} {what}"));
            }
            parts.push(part);
        }
    }
    reach_summary(&plan.reach, &mut parts);
    let flows = &plan.flows;
    if flows.error.is_some() {
        parts.push("live flows could not be judged".to_owned());
    } else {
        let would = "would be cut";
        let cut = count(flows.cut, "live flow", "live flows");
        parts.push(format!(
            "{} {would}",
            if flows.cut == 0 {
                "no live flow".to_owned()
            } else {
                cut
            }
        ));
        if flows.would_deny > 0 {
            let flows = count(flows.would_deny, "live flow", "live flows");
            parts.push(format!("{flows} would be recorded as WOULD_DENY"));
        }
    }
    parts.join("; ")
}

fn reach_summary(reach: &ReachChanges, parts: &mut Vec<String>) {
    let at_least = if reach.cut.is_empty() {
        ""
    } else {
        "at least "
    };
    for (pairs, one, more, passes) in [
        (reach.lost, "loses", "lose", (true, false)),
        (reach.gained, "gains", "gain", (false, true)),
    ] {
        if pairs == 0 {
            continue;
        }
        // Where all lose the same few, their names.
        let changes = reach.groups.iter().flat_map(|group| &group.changes);
        let mut changes = changes.filter(|c| (c.before.passes(), c.after.passes()) == passes);
        let first = changes.next().map(|change| &change.services);
        let what = match first {
            Some(services)
                if services.len() <= NAMED
                    && reach.more == 0
                    && changes.all(|change| change.services == *services) =>
            {
                services.join(", ")
            }
            _ => "services".to_owned(),
        };
        let verb = if pairs == 1 { one } else { more };
        let pairs = count(pairs, "pair of segments", "pairs of segments");
        parts.push(format!("{at_least}{pairs} {verb} {what}"));
    }
    if reach.regarded > 0 {
        let pairs = count(
            reach.regarded,
            "pair of segments is",
            "pairs of segments are",
        );
        parts.push(format!("{at_least}{pairs} recorded otherwise"));
    }
    if reach.lost + reach.gained + reach.regarded == 0 && reach.cut.is_empty() {
        parts.push("everybody reaches the same as before".to_owned());
    } else if reach.lost + reach.gained + reach.regarded == 0 {
        parts.push("not every pair of segments was compared".to_owned());
    }
}
