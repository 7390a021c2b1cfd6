//! Which flows two images judge differently: over all addresses and services, by their classes.
//!
//! Addresses are told apart by the segments that they are in before and after; services by both
//! images. Each pair of such classes is looked up once in each image, and each pair of rows compared
//! once. The work is bounded, and it is said where a bound was met.
//!
//! Must not know: how rules lead to verdicts (images say), names.

mod kinds;
#[cfg(test)]
mod tests;
mod verdicts;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
};

use enforcer_common::{image::row_of, verdict::Outcome};

use super::{Image, SCRATCH, intern::Interner, word};
use crate::policy::model::{Environment, FlowQuery, Policy};

pub use kinds::Kind;
pub use verdicts::Run;

use kinds::{Joint, Kinds};
use verdicts::{Compare, Services, Verdicts};

/// A policy and its image.
#[derive(Clone, Copy, Debug)]
pub struct Version<'a> {
    /// Whose segments.
    pub policy: &'a Policy,
    /// What it was compiled to.
    pub image: &'a Image,
}

/// How far a comparison goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Kinds of address that are told apart.
    pub kinds: usize,
    /// Looks at a service, or a [`PAIR`]th of those at a pair of kinds.
    pub effort: u64,
    /// Groups that are told of; all are counted.
    pub groups: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            kinds: 1 << 15,
            effort: 1 << 30,
            groups: 300,
        }
    }
}

/// What a look at a pair costs, in looks at a service.
const PAIR: u64 = 16;
/// Pairs of rows whose difference is remembered. Others are compared again, which costs time alone.
const REMEMBERED: usize = 1 << 22;

/// What a change means for who opens such flows. The worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// They pass no more.
    Lost,
    /// They pass from now on.
    Gained,
    /// They pass as before, and are recorded or not.
    Regarded,
}

impl Effect {
    /// Of a change from one outcome to another one.
    pub fn of(before: Outcome, after: Outcome) -> Self {
        match (before.passes(), after.passes()) {
            (true, false) => Self::Lost,
            (false, true) => Self::Gained,
            _ => Self::Regarded,
        }
    }
}

/// Services that change in the same way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// What became of them.
    pub before: Outcome,
    /// What becomes of them.
    pub after: Outcome,
    /// Which, ascending.
    pub services: Vec<Run>,
    /// One flow of them.
    pub example: FlowQuery,
}

/// Pairs of kinds between which the same changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Sources: numbers of kinds.
    pub from: Vec<usize>,
    /// Destinations.
    pub to: Vec<usize>,
    /// What changes, each other than before; the worst first.
    pub changes: Vec<Change>,
}

/// Pairs of kinds, by what happens to some of their flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// [`Effect::Lost`].
    pub lost: u64,
    /// [`Effect::Gained`].
    pub gained: u64,
    /// [`Effect::Regarded`].
    pub regarded: u64,
}

/// The outcome of a comparison.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Kinds of address.
    pub kinds: Vec<Kind>,
    /// All pairs between which something changes.
    pub totals: Totals,
    /// What changes between them, the worst and largest first.
    pub groups: Vec<Group>,
    /// Groups that were left out.
    pub more: usize,
    /// Why this is not all; empty when it is.
    pub cut: Vec<&'static str>,
}

const MANY_KINDS: &str = "there are too many combinations of segments: only some were compared";
const TOO_LARGE: &str =
    "the policies differ in too much to compare every pair: the last are missing";

/// What differs between two pairs of classes, and in which families.
type Which = (u32, u8);

/// Compares two images at `unix` (seconds), for a host as it is.
pub fn compare(
    before: Version<'_>,
    after: Version<'_>,
    env: &Environment,
    unix: u64,
    bounds: Bounds,
) -> Reach {
    let found = Kinds::find(before, after, env, bounds.kinds);
    let mut cut = Vec::new();
    if !found.complete {
        cut.push(MANY_KINDS);
    }
    let services = Services::of(before.image, after.image);
    let verdicts = (
        Verdicts::of(before.image, unix),
        Verdicts::of(after.image, unix),
    );
    let mut pairs = Pairs {
        before: before.image,
        after: after.image,
        compare: Compare::new(&verdicts.0, &verdicts.1, &services),
        known: HashMap::new(),
        differences: Interner::default(),
        effort: bounds.effort,
    };
    // Destinations under one source, by what differs; lists that many sources have are kept once.
    let mut lists = Interner::default();
    let mut groups: BTreeMap<(u32, Which), Vec<u32>> = BTreeMap::new();
    let mut entries = 0;
    for (number, source) in found.joints.iter().enumerate() {
        if source.multicast {
            continue;
        }
        let differing = pairs.from(source, &found.joints);
        let Some(differing) = differing.filter(|_| lists.size().max(entries) < SCRATCH) else {
            cut.push(TOO_LARGE);
            break;
        };
        entries += differing.len();
        for (which, destinations) in differing {
            let list = lists.intern(&destinations);
            groups.entry((list, which)).or_default().push(word(number));
        }
    }
    let mut outcome = Reach {
        cut,
        ..Reach::default()
    };
    let kinds = |joints: &[u32]| -> u64 {
        let joints = joints.iter().filter_map(|j| found.joints.get(*j as usize));
        joints.map(|joint| joint.kinds.len() as u64).sum()
    };
    // What each difference means, in each family.
    let mut effects: BTreeMap<Which, Vec<Effect>> = BTreeMap::new();
    let mut ranked = Vec::with_capacity(groups.len());
    for ((list, which), sources) in &groups {
        let effects = effects
            .entry(*which)
            .or_insert_with(|| pairs.changes(*which).map(|(e, _)| e).collect());
        // Of ICMP of the other family alone.
        let Some(worst) = effects.iter().min() else {
            continue;
        };
        let count = kinds(sources) * kinds(lists.get(*list as usize));
        for (effect, total) in [
            (Effect::Lost, &mut outcome.totals.lost),
            (Effect::Gained, &mut outcome.totals.gained),
            (Effect::Regarded, &mut outcome.totals.regarded),
        ] {
            if effects.contains(&effect) {
                *total += count;
            }
        }
        ranked.push((*worst, Reverse(count), (list, which, sources)));
    }
    ranked.sort_by_key(|(worst, count, _)| (*worst, *count));
    outcome.more = ranked.len().saturating_sub(bounds.groups);
    for (_, _, (list, which, sources)) in ranked.into_iter().take(bounds.groups) {
        let from = found.kinds_of(sources);
        let to = found.kinds_of(lists.get(*list as usize));
        let ends = from.first().zip(to.first());
        let ends = ends.and_then(|(a, b)| found.kinds.get(*a).zip(found.kinds.get(*b)));
        let mut changes: Vec<Change> = pairs
            .changes(*which)
            .filter_map(|(_, (before, after, services))| {
                let (one, other) = ends?;
                let example = example(one, other, &services)?;
                Some(Change {
                    before,
                    after,
                    services,
                    example,
                })
            })
            .collect();
        changes.sort_by_key(|change| Effect::of(change.before, change.after));
        outcome.groups.push(Group { from, to, changes });
    }
    outcome.kinds = found.kinds;
    outcome
}

/// A flow of one of the services between two kinds.
fn example(from: &Kind, to: &Kind, services: &[Run]) -> Option<FlowQuery> {
    let four = from.v4.zip(to.v4).map(|(a, b)| (a.into(), b.into()));
    let six = from.v6.zip(to.v6).map(|(a, b)| (a.into(), b.into()));
    [(four, false), (six, true)]
        .into_iter()
        .find_map(|(ends, v6)| {
            let (src, dst) = ends?;
            let (protocol, selector) = services.iter().find_map(|run| verdicts::point(run, v6))?;
            Some(FlowQuery {
                src,
                dst,
                protocol,
                selector,
            })
        })
}

/// Compares pairs of classes.
struct Pairs<'a> {
    before: &'a Image,
    after: &'a Image,
    compare: Compare<'a>,
    /// By row before and after: the number of their difference; 0 is none.
    known: HashMap<(u32, u32), u32>,
    /// Differences in words: outcome before and after, number of services, services; and again.
    differences: Interner,
    effort: u64,
}

impl Pairs<'_> {
    /// The destinations to which something differs, ascending. `None`: that is too much to find out.
    fn from(&mut self, source: &Joint, all: &[Joint]) -> Option<BTreeMap<Which, Vec<u32>>> {
        self.effort = self.effort.checked_sub(PAIR * all.len() as u64)?;
        let mut differing: BTreeMap<Which, Vec<u32>> = BTreeMap::new();
        for (number, destination) in all.iter().enumerate() {
            let families = source.families & destination.families;
            // What a host says to itself is not judged.
            if families == 0 || source.host && destination.host {
                continue;
            }
            let (from, to) = (source.classes, destination.classes);
            let rows = (
                row_of(self.before.words(), from.0, to.0).0,
                row_of(self.after.words(), from.1, to.1).0,
            );
            let difference = match self.known.get(&rows) {
                Some(known) => *known,
                None => self.look(rows)?,
            };
            if difference != 0 {
                let same = differing.entry((difference - 1, families)).or_default();
                same.push(word(number));
            }
        }
        Some(differing)
    }

    /// The number of a difference, 0 for none; equal ones have one number.
    fn look(&mut self, rows: (u32, u32)) -> Option<u32> {
        self.effort = self.effort.checked_sub(self.compare.cost())?;
        let words = self.compare.rows(rows.0, rows.1);
        let number = if words.is_empty() {
            0
        } else {
            self.differences.intern(&words) + 1
        };
        if self.differences.size() > SCRATCH {
            return None;
        }
        if self.known.len() < REMEMBERED {
            self.known.insert(rows, number);
        }
        Some(number)
    }

    /// What a difference says of services that there are in the families.
    fn changes(
        &self,
        (difference, families): Which,
    ) -> impl Iterator<Item = (Effect, (Outcome, Outcome, Vec<Run>))> {
        let mut rest = self.differences.get(difference as usize);
        let parts = std::iter::from_fn(move || {
            let (head, behind) = rest.split_first_chunk::<3>()?;
            let [before, after, count] = *head;
            let (services, behind) = behind.split_at_checked(count as usize)?;
            rest = behind;
            Some((
                Outcome::from_bits(before),
                Outcome::from_bits(after),
                services,
            ))
        });
        parts.filter_map(move |(before, after, services)| {
            let runs = verdicts::runs(self.compare.services, services, families);
            let effect = Effect::of(before, after);
            (!runs.is_empty()).then_some((effect, (before, after, runs)))
        })
    }
}
