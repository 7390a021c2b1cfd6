//! What a reason means for one packet, where names, rule and line do not say it.

use std::net::IpAddr;

use crate::policy::model::{Policy, Rule, RuleId, Segment};

/// In words, after the reason and a colon. `rule` is the record's; `source` the packet's.
pub fn detail(policy: &Policy, reason: &str, rule: u32, source: Option<IpAddr>) -> Option<String> {
    match reason {
        "spoofed" => bound(policy, source?),
        "martian" => Some("no packet from outside can have these addresses".to_owned()),
        "expired" => policy.rule(RuleId(rule)).map(ended),
        _ => None,
    }
}

/// Where the segments of a source may come in.
fn bound(policy: &Policy, source: IpAddr) -> Option<String> {
    let ids = policy.segments_of(source).into_iter();
    let segments: Vec<&Segment> = ids.filter_map(|id| policy.segment(id)).collect();
    let names: Vec<&str> = segments.iter().map(|s| s.name.as_str()).collect();
    match &names[..] {
        [] => None,
        [name] => Some(format!("source belongs to segment {name}")),
        names => Some(format!("source belongs to segments {}", names.join(", "))),
    }
}

/// What ended a flow that a rule had admitted.
fn ended(rule: &Rule) -> String {
    format!("session of rule {} ended", rule.name)
}
