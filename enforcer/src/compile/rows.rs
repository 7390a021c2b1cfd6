//! Class pairs → rows: the verdicts of every service class between two behaviours.

use std::collections::{BTreeMap, HashMap};

use enforcer_common::{
    decide::verdict_word,
    image::{self, EMPTY, ROW_HAS_EXCEPTIONS},
    verdict::{Outcome, Reason},
};

use crate::policy::model::{Action, Mode, Policy, Unsegmented};

use super::{
    bits::Bits,
    services::Services,
    sides::{Classes, Guard, Side},
    writer::{Full, Writer},
};

/// Both words of a verdict.
type Verdict = (u32, u32);

/// A row as written; equal ones are written once.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Row {
    default: Verdict,
    form: Verdict,
    /// By service class, ascending.
    exceptions: Vec<(u32, Verdict)>,
}

/// All that a row depends on.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    guard: Option<Guard>,
    /// Matching deny rules, the one that decides first.
    denials: Vec<(Mode, usize)>,
    /// Matching allow rules in file order.
    allows: Vec<usize>,
}

/// One word of the exception table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exception {
    pub(super) row: u32,
    pub(super) service: u32,
    pub(super) verdict: Verdict,
}

/// The rows, and which of them belongs to which pair of behaviours.
pub(super) struct Rows {
    /// Four words a row.
    pub(super) words: Vec<u32>,
    pub(super) exceptions: Vec<Exception>,
    /// Source behaviour major.
    of_sides: Vec<u32>,
}

impl Rows {
    pub(super) fn count(&self) -> usize {
        self.words.len() / image::ROW_WORDS as usize
    }
}

struct Builder<'a> {
    policy: &'a Policy,
    services: &'a Services,
    deny_rules: Bits,
    by_key: HashMap<Key, u32>,
    by_content: HashMap<Row, u32>,
    words: Vec<u32>,
    exceptions: Vec<Exception>,
}

/// Builds the row of every pair of behaviours. `room` is what the image can still take.
pub(super) fn build(
    policy: &Policy,
    classes: &Classes,
    services: &Services,
    writer: &Writer,
) -> Result<Rows, Full> {
    let mut deny_rules = Bits::empty(policy.rules.len());
    for (number, rule) in policy.rules.iter().enumerate() {
        if rule.action == Action::Deny {
            deny_rules.insert(number);
        }
    }
    let mut builder = Builder {
        policy,
        services,
        deny_rules,
        by_key: HashMap::new(),
        by_content: HashMap::new(),
        words: Vec::new(),
        exceptions: Vec::new(),
    };
    let mut of_sides = Vec::with_capacity(classes.sources.len() * classes.destinations.len());
    for source in &classes.sources {
        for destination in &classes.destinations {
            of_sides.push(builder.row(source, destination));
            writer.reserve(builder.size())?;
        }
    }
    Ok(Rows {
        words: builder.words,
        exceptions: builder.exceptions,
        of_sides,
    })
}

impl Builder<'_> {
    /// Words that the rows so far take, at least.
    fn size(&self) -> usize {
        self.words.len() + self.exceptions.len() * 4
    }

    fn row(&mut self, source: &Side, destination: &Side) -> u32 {
        // The strongest; the destination's on ties.
        let guard = match (source.guard, destination.guard) {
            (Some(out), Some(into)) if out.mode > into.mode => Some(out),
            (out, into) => into.or(out),
        };
        let matching = source.rules.intersection(&destination.rules);
        let mut denials = Vec::new();
        let mut allows = Vec::new();
        for rule in matching.iter() {
            if self.deny_rules.contains(rule) {
                // `None`, no segment, is the smallest.
                let strength = source.strength(rule).max(destination.strength(rule));
                denials.push((strength.unwrap_or(self.policy.defaults.mode), rule));
            } else {
                allows.push(rule);
            }
        }
        denials.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        let key = Key {
            guard,
            denials,
            allows,
        };
        if let Some(known) = self.by_key.get(&key) {
            return *known;
        }
        let row = self.judge(&key);
        let number = self.number(row);
        self.by_key.insert(key, number);
        number
    }

    fn judge(&self, key: &Key) -> Row {
        let defaults = self.policy.defaults;
        let (unmatched, form) = match (key.guard, defaults.unsegmented) {
            (Some(guard), _) => (
                denial(guard.mode, Reason::DefaultDeny, guard.segment),
                denial(guard.mode, Reason::DefaultDeny, guard.segment),
            ),
            (None, Unsegmented::Allow) => (
                verdict(Outcome::Allowed, Reason::Unsegmented, EMPTY),
                verdict(Outcome::Off, Reason::Unsegmented, EMPTY),
            ),
            (None, Unsegmented::Deny) => (
                denial(defaults.mode, Reason::Unsegmented, EMPTY),
                denial(defaults.mode, Reason::Unsegmented, EMPTY),
            ),
        };
        let denials = key.denials.iter().map(|(mode, rule)| {
            let words = denial(*mode, Reason::RuleDeny, super::word(*rule));
            (*rule, words)
        });
        let allows = key.allows.iter().map(|rule| {
            let words = verdict(Outcome::Allowed, Reason::RuleAllow, super::word(*rule));
            (*rule, words)
        });

        // Each rule takes what those before it left.
        let mut left = Bits::full(self.services.count);
        let mut verdicts: Vec<(u32, Verdict)> = Vec::new();
        let mut counts: BTreeMap<Verdict, usize> = BTreeMap::new();
        for (rule, verdict) in denials.chain(allows) {
            let Some(services) = self.services.of_rule.get(rule) else {
                continue;
            };
            let taken = left.intersection(services);
            if taken.is_empty() {
                continue;
            }
            left.subtract(services);
            verdicts.extend(taken.iter().map(|class| (super::word(class), verdict)));
            *counts.entry(verdict).or_default() += taken.count();
        }
        *counts.entry(unmatched).or_default() += left.count();
        // The verdict of most service classes is the row's default, so that an `any` costs no
        // more than a single port. Of equally frequent ones the unmatched, then the smallest.
        let most = counts.values().max().copied().unwrap_or(0);
        let default = match counts.get(&unmatched) {
            Some(count) if *count == most => unmatched,
            _ => counts
                .iter()
                .find(|(_, count)| **count == most)
                .map_or(unmatched, |(verdict, _)| *verdict),
        };
        verdicts.extend(left.iter().map(|class| (super::word(class), unmatched)));
        verdicts.retain(|(_, verdict)| *verdict != default);
        verdicts.sort_unstable();
        Row {
            default,
            form,
            exceptions: verdicts,
        }
    }

    fn number(&mut self, row: Row) -> u32 {
        if let Some(known) = self.by_content.get(&row) {
            return *known;
        }
        let number = super::word(self.words.len() / image::ROW_WORDS as usize);
        let flag = if row.exceptions.is_empty() {
            0
        } else {
            ROW_HAS_EXCEPTIONS
        };
        let (default, form) = (row.default, row.form);
        self.words
            .extend([default.0 | flag, default.1, form.0, form.1]);
        self.exceptions
            .extend(row.exceptions.iter().map(|(service, verdict)| Exception {
                row: number,
                service: *service,
                verdict: *verdict,
            }));
        self.by_content.insert(row, number);
        number
    }
}

impl Rows {
    /// The matrix of row numbers, by address class, source class major.
    pub(super) fn matrix(&self, classes: &Classes) -> Vec<u32> {
        let width = classes.destinations.len();
        let mut matrix = Vec::with_capacity(classes.classes.len() * classes.classes.len());
        for (source, _) in &classes.classes {
            let rows = self.of_sides.get(*source as usize * width..).unwrap_or(&[]);
            for (_, destination) in &classes.classes {
                matrix.push(rows.get(*destination as usize).copied().unwrap_or(0));
            }
        }
        matrix
    }
}

fn verdict(outcome: Outcome, reason: Reason, subject: u32) -> Verdict {
    (verdict_word(outcome, reason), subject)
}

/// A judged denial of this strength.
fn denial(mode: Mode, reason: Reason, subject: u32) -> Verdict {
    verdict(outcome(mode), reason, subject)
}

/// What a judged denial of this strength does.
pub(super) fn outcome(mode: Mode) -> Outcome {
    match mode {
        Mode::Enforce => Outcome::Denied,
        Mode::Observe => Outcome::WouldDeny,
        Mode::Off => Outcome::Off,
    }
}
