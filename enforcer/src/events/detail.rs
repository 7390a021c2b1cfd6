//! What a reason means for one packet, where names, rule and line do not say it.

use std::net::IpAddr;

use enforcer_common::verdict::Reason;

use crate::policy::model::{Policy, Rule, RuleId};

/// The packet of a record, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Rule of the record.
    pub rule: u32,
    /// Source of the packet.
    pub source: Option<IpAddr>,
    /// When, in Unix seconds.
    pub unix: i64,
}

/// In words, after the reason and a colon. `own` says whether an address is this host's.
pub fn detail(
    policy: &Policy,
    reason: Reason,
    seen: &Seen,
    own: impl FnOnce(IpAddr) -> bool,
) -> Option<String> {
    // Few reasons need words; the others are told by rule, default and names.
    if reason == Reason::Spoofed {
        let source = seen.source?;
        return bound(policy, source)
            .or_else(|| own(source).then(|| "source is an address of this host".to_owned()));
    }
    if reason == Reason::Martian {
        return Some("no packet on a link has these addresses".to_owned());
    }
    if reason == Reason::Expired {
        return policy
            .rule(RuleId(seen.rule))
            .map(|rule| ended(rule, seen.unix));
    }
    None
}

/// Where the segments of a source may come in.
fn bound(policy: &Policy, source: IpAddr) -> Option<String> {
    let segments = policy.segments_of(source).into_iter();
    let bound: Vec<String> = segments
        .filter_map(|id| policy.segment(id))
        .filter(|segment| !segment.interfaces.is_empty())
        .map(|segment| {
            let names: Vec<&str> = segment.interfaces.iter().map(|i| i.as_str()).collect();
            format!("{}, which is bound to {}", segment.name, names.join(", "))
        })
        .collect();
    match &bound[..] {
        [] => None,
        [one] => Some(format!("source belongs to segment {one}")),
        several => Some(format!("source belongs to segments {}", several.join("; "))),
    }
}

/// What ended a flow that a rule had admitted.
fn ended(rule: &Rule, unix: i64) -> String {
    let expired = rule.expires.and_then(|at| i64::try_from(at).ok());
    let expired = expired.filter(|at| *at <= unix);
    match expired.and_then(|at| jiff::Timestamp::from_second(at).ok()) {
        Some(at) => format!("rule {} ended at {at}", rule.name),
        None => format!("session of rule {} ended", rule.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::enrich::tests::policy;

    fn said(policy: &Policy, reason: Reason, source: &str, unix: i64) -> Option<String> {
        let seen = Seen {
            rule: 0,
            source: source.parse().ok(),
            unix,
        };
        let own: IpAddr = "192.0.2.1".parse().unwrap();
        detail(policy, reason, &seen, |ip| ip == own)
    }

    #[test]
    fn a_forged_source_says_where_it_belongs() {
        let mut policy = policy();
        policy.segments[1].interfaces = vec!["eth0.99".parse().unwrap(), "wl*".parse().unwrap()];
        let spoofed = |policy: &Policy, source| said(policy, Reason::Spoofed, source, 0);
        assert_eq!(
            spoofed(&policy, "10.99.0.1").as_deref(),
            Some("source belongs to segment guest-wifi, which is bound to eth0.99, wl*")
        );
        assert_eq!(spoofed(&policy, "10.10.1.1"), None);
        assert_eq!(
            spoofed(&policy, "192.0.2.1").as_deref(),
            Some("source is an address of this host")
        );
        let martian = said(&policy, Reason::Martian, "127.0.0.1", 0);
        assert!(martian.unwrap().starts_with("no packet"));
        assert_eq!(said(&policy, Reason::DefaultDeny, "10.99.0.1", 0), None);
    }

    #[test]
    fn what_ended_is_the_rule_or_its_session() {
        let mut policy = policy();
        let expired = |policy: &Policy, unix| said(policy, Reason::Expired, "10.99.0.1", unix);
        let session = Some("session of rule guests-out ended".to_owned());
        assert_eq!(expired(&policy, 5), session);
        policy.rules.edit(|rules| rules[0].expires = Some(86_400));
        assert_eq!(expired(&policy, 86_399), session);
        assert_eq!(
            expired(&policy, 86_400).as_deref(),
            Some("rule guests-out ended at 1970-01-02T00:00:00Z")
        );
    }
}
