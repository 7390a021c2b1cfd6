//! What a pair of behaviours is judged by: its guard and the rules that match, in their order.

use enforcer_common::{
    decide::verdict_word,
    image::VERDICT_SESSION,
    verdict::{Outcome, Reason},
};

use crate::policy::model::{Action, Rule};

use super::{
    matches::Matches,
    rows::{Verdict, outcome},
    services::Services,
    sides::{self, Guard, NO_MODE},
    timelines::NEVER,
};

/// A rule in short.
pub(super) struct Fact {
    /// A deny rule.
    pub(super) denies: bool,
    /// Of an allow rule.
    pub(super) kind: u32,
    /// First second at which it is not there any more.
    pub(super) until: u64,
    /// Flags of its verdict.
    flags: u32,
}

impl Fact {
    pub(super) fn of(rule: &Rule) -> Self {
        Self {
            denies: rule.action == Action::Deny,
            kind: match (rule.expires, rule.session) {
                (Some(_), _) => ALLOW_EXPIRES,
                (None, Some(_)) => ALLOW_SESSION,
                (None, None) => ALLOW,
            },
            until: rule.expires.unwrap_or(NEVER),
            flags: if rule.session.is_some() {
                VERDICT_SESSION
            } else {
                0
            },
        }
    }
}

/// A pair's guard and matching rules, as they are judged. In words: the guard's mode and segment,
/// then each rule's number under its kind, which is the code of a denial's mode or one of those
/// below. So the order of the words is the order in which rules decide. Allow rules that an earlier
/// one with the same services leaves nothing are left out.
pub(super) struct Key {
    pub(super) words: Vec<u32>,
    /// Per list of services, the last pair in which an allow rule had it, and until when.
    seen: Vec<(u32, u64)>,
    pair: u32,
    /// Some rule expires.
    pub(super) timed: bool,
}

/// Where a rule's kind stands, above its number.
pub(super) const KIND: u32 = 29;
/// An allow rule without limits.
const ALLOW: u32 = 3;
const ALLOW_SESSION: u32 = 4;
const ALLOW_EXPIRES: u32 = 5;
/// A rule's number.
pub(super) const RULE: u32 = (1 << KIND) - 1;

impl Key {
    pub(super) fn new(services: &Services) -> Self {
        Self {
            words: Vec::new(),
            seen: vec![(0, 0); services.lists()],
            pair: 0,
            timed: false,
        }
    }

    pub(super) fn fill(
        &mut self,
        guard: Option<Guard>,
        matches: &mut Matches<'_>,
        destination: u32,
        facts: &[Fact],
        services: &Services,
    ) {
        self.pair += 1;
        self.words.clear();
        self.words.extend(guard.map_or([NO_MODE, 0], |guard| {
            [sides::code(guard.mode), guard.segment]
        }));
        matches.of(destination, &mut self.words);
        if let Some(rules) = self.words.get_mut(2..)
            && !rules.is_sorted()
        {
            rules.sort_unstable();
        }
        let (seen, pair) = (&mut self.seen, self.pair);
        let mut head = 2;
        let mut timed = false;
        self.words.retain(|word| {
            if head > 0 {
                head -= 1;
                return true;
            }
            let rule = (word & RULE) as usize;
            let until = facts.get(rule).map_or(NEVER, |fact| fact.until);
            if word >> KIND >= ALLOW
                && let Some(seen) = services.list(rule).and_then(|list| seen.get_mut(list))
            {
                if seen.0 == pair && seen.1 >= until {
                    return false;
                }
                *seen = (pair, until);
            }
            timed |= until != NEVER;
            true
        });
        self.timed = timed;
    }

    /// Each rule and its verdict, the one that decides first at first.
    pub(super) fn rules<'a>(
        &'a self,
        facts: &'a [Fact],
    ) -> impl Iterator<Item = (usize, Verdict)> + 'a {
        self.words.iter().skip(2).map(|word| {
            let rule = word & RULE;
            let flags = facts.get(rule as usize).map_or(0, |fact| fact.flags);
            let verdict = match sides::mode(word >> KIND) {
                Some(mode) => verdict_word(outcome(mode), Reason::RuleDeny),
                None => verdict_word(Outcome::Allowed, Reason::RuleAllow) | flags,
            };
            (rule as usize, (verdict, rule))
        })
    }
}
