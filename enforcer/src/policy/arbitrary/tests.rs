//! What the strategies draw.

use super::*;
use crate::policy::reference::{Reason, judge};

proptest! {
    #[test]
    fn what_is_drawn_is_valid(p in policy()) {
        for s in &p.segments {
            prop_assert!(!s.members.is_empty());
            for m in s.members.iter() {
                prop_assert!(m.except.iter().all(|e| m.range.contains_range(e)));
            }
        }
        for r in &p.rules {
            prop_assert!(!r.services.is_empty());
            prop_assert!(r.session.is_none() || r.action == Action::Allow);
            prop_assert!(r.session.is_none_or(|s| s.max.is_some() || s.idle.is_some()));
            let ids = r.from.segments.iter().chain(&r.to.segments);
            prop_assert!(ids.into_iter().all(|id| p.segment(*id).is_some()));
        }
    }

    #[test]
    fn a_judgement_is_explained((p, env, q) in policy().prop_flat_map(|p| {
        let query = query(&p);
        (Just(p), environment(), (query, time()))
    })) {
        let (q, unix) = q;
        let j = judge(&p, &env, &q, unix);
        prop_assert_eq!(
            j.rule.is_some(),
            matches!(j.reason, Reason::RuleAllow | Reason::RuleDeny)
        );
        prop_assert_eq!(j.guard.is_some(), j.reason == Reason::DefaultDeny);
    }
}

/// The strategies are worth nothing if they never reach some clause of the decision.
#[test]
fn every_reason_comes_up() {
    use proptest::{strategy::ValueTree, test_runner::TestRunner};
    let mut runner = TestRunner::deterministic();
    let mut seen = std::collections::HashMap::new();
    for _ in 0..400 {
        let p = policy().new_tree(&mut runner).unwrap().current();
        let env = environment().new_tree(&mut runner).unwrap().current();
        let strategy = query(&p);
        for _ in 0..8 {
            let q = strategy.new_tree(&mut runner).unwrap().current();
            let j = judge(&p, &env, &q, 0);
            *seen.entry((j.reason, j.outcome)).or_insert(0) += 1;
        }
    }
    assert_eq!(seen.len(), 11, "{seen:?}");
    assert!(seen.values().all(|n| *n >= 20), "{seen:?}");
}
