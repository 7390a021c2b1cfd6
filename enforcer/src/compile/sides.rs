//! Sets of segments → address classes.
//!
//! Two sets that no rule, guard or strength tells apart are one class. What a set means differs
//! by the side of the flow it stands on, so a class is a pair: its behaviour as source and its
//! behaviour as destination.

use std::collections::HashMap;

use crate::policy::model::{Action, Endpoints, Mode, Policy};

use super::{bits::Bits, intervals};

/// The strongest segment that guards one side of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Guard {
    pub(super) mode: Mode,
    pub(super) segment: u32,
}

/// How an address behaves on one side of a flow.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Side {
    /// Rules that match on this side.
    pub(super) rules: Bits,
    /// Who guards this side.
    pub(super) guard: Option<Guard>,
    /// Deny rules that match through segments, ascending, with the strongest mode among those.
    pub(super) denials: Vec<(usize, Mode)>,
}

impl Side {
    /// The strength that this side lends to a deny rule.
    pub(super) fn strength(&self, rule: usize) -> Option<Mode> {
        let at = self.denials.binary_search_by_key(&rule, |(r, _)| *r).ok()?;
        self.denials.get(at).map(|(_, mode)| *mode)
    }
}

/// The rules by what they name on one side.
struct Index<'a> {
    policy: &'a Policy,
    outbound: bool,
    any: Bits,
    unsegmented: Bits,
    /// By segment number, `host` and `multicast` behind the real ones.
    named: Vec<Bits>,
    /// By segment number: deny rules that name it.
    denials: Vec<Vec<usize>>,
    known: HashMap<Side, u32>,
    sides: Vec<Side>,
}

impl<'a> Index<'a> {
    fn new(policy: &'a Policy, outbound: bool) -> Self {
        let rules = policy.rules.len();
        let segments = policy.segments.len();
        let mut index = Self {
            policy,
            outbound,
            any: Bits::empty(rules),
            unsegmented: Bits::empty(rules),
            named: vec![Bits::empty(rules); segments + 2],
            denials: vec![Vec::new(); segments],
            known: HashMap::new(),
            sides: Vec::new(),
        };
        for (number, rule) in policy.rules.iter().enumerate() {
            let side = if outbound { &rule.from } else { &rule.to };
            index.add(number, side, rule.action);
        }
        index
    }

    fn add(&mut self, rule: usize, side: &Endpoints, action: Action) {
        if side.any {
            self.any.insert(rule);
        }
        if side.unsegmented {
            self.unsegmented.insert(rule);
        }
        for (named, number) in [
            (side.host, intervals::host(self.policy)),
            (side.multicast, intervals::multicast(self.policy)),
        ] {
            if named && let Some(bits) = self.named.get_mut(number as usize) {
                bits.insert(rule);
            }
        }
        for segment in &side.segments {
            if let Some(bits) = self.named.get_mut(segment.0 as usize) {
                bits.insert(rule);
            }
            if action == Action::Deny
                && let Some(denials) = self.denials.get_mut(segment.0 as usize)
            {
                denials.push(rule);
            }
        }
    }

    /// How an address in exactly these segments behaves.
    fn side(&self, set: &[u32]) -> Side {
        let mut rules = self.any.clone();
        let mut guard: Option<Guard> = None;
        let mut denials: Vec<(usize, Mode)> = Vec::new();
        let mut segmented = false;
        for number in set {
            if let Some(named) = self.named.get(*number as usize) {
                rules.unite(named);
            }
            let Some(segment) = self.policy.segments.get(*number as usize) else {
                continue; // a built-in
            };
            segmented = true;
            let guards = if self.outbound {
                segment.protect.outbound()
            } else {
                segment.protect.inbound()
            };
            // Ascending numbers: the first of the strongest stays.
            if guards && guard.is_none_or(|g| segment.mode > g.mode) {
                guard = Some(Guard {
                    mode: segment.mode,
                    segment: *number,
                });
            }
            let named = self.denials.get(*number as usize);
            denials.extend(named.into_iter().flatten().map(|r| (*r, segment.mode)));
        }
        if !segmented {
            rules.unite(&self.unsegmented);
        }
        // Strongest first within a rule, so that it is the one that stays.
        denials.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        denials.dedup_by_key(|(rule, _)| *rule);
        Side {
            rules,
            guard,
            denials,
        }
    }

    fn number(&mut self, set: &[u32]) -> u32 {
        let side = self.side(set);
        if let Some(known) = self.known.get(&side) {
            return *known;
        }
        let number = super::word(self.sides.len());
        self.sides.push(side.clone());
        self.known.insert(side, number);
        number
    }
}

/// Address classes and their behaviours.
pub(super) struct Classes {
    /// Behaviours as source.
    pub(super) sources: Vec<Side>,
    /// Behaviours as destination.
    pub(super) destinations: Vec<Side>,
    /// Per class, its (source, destination) behaviour.
    pub(super) classes: Vec<(u32, u32)>,
}

/// Turns the set numbers of the intervals into class numbers, in place; classes are numbered in
/// the order in which the intervals meet them.
pub(super) fn classify(policy: &Policy, sweep: &mut intervals::Sweep) -> Classes {
    let mut sources = Index::new(policy, true);
    let mut destinations = Index::new(policy, false);
    let mut class_of_set: Vec<Option<u32>> = vec![None; sweep.sets.len()];
    let mut class_of_pair: HashMap<(u32, u32), u32> = HashMap::new();
    let mut classes: Vec<(u32, u32)> = Vec::new();
    for family in [&mut sweep.v4, &mut sweep.v6] {
        let mut merged = intervals::Intervals::new();
        for (start, number) in std::mem::take(family) {
            let set = number as usize;
            let class = match class_of_set[set] {
                Some(class) => class,
                None => {
                    let pair = (
                        sources.number(&sweep.sets[set]),
                        destinations.number(&sweep.sets[set]),
                    );
                    let class = *class_of_pair.entry(pair).or_insert_with(|| {
                        classes.push(pair);
                        super::word(classes.len() - 1)
                    });
                    class_of_set[set] = Some(class);
                    class
                }
            };
            intervals::push(&mut merged, start, class);
        }
        *family = merged;
    }
    Classes {
        sources: sources.sides,
        destinations: destinations.sides,
        classes,
    }
}
