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

use std::collections::{BTreeMap, HashMap};

use enforcer_common::{image::row_of, verdict::Outcome};

use super::{Image, intern::Interner, word};
use crate::policy::model::{Environment, FlowQuery, Policy};

pub use kinds::Kind;
pub use verdicts::Run;

use kinds::{Joint, Kinds};
use verdicts::{Compare, Difference, Services, Verdicts};

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
    /// Kinds of address.
    pub kinds: usize,
    /// Pairs of kinds, or looks at a service: so many times.
    pub effort: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            kinds: 1 << 15,
            effort: 1 << 31,
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
    /// What changes, each other than before.
    pub changes: Vec<Change>,
}

/// The outcome of a comparison.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Kinds of address.
    pub kinds: Vec<Kind>,
    /// What changes between them.
    pub groups: Vec<Group>,
    /// Why this is not all; empty when it is.
    pub cut: Vec<&'static str>,
}

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
        cut.push("there are too many combinations of segments: only some were compared");
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
        differences: Vec::new(),
        numbers: BTreeMap::new(),
        effort: bounds.effort,
    };
    // Destinations under one source, by what differs; lists that many sources have are kept once.
    let mut lists = Interner::default();
    let mut groups: BTreeMap<(u32, Which), Vec<usize>> = BTreeMap::new();
    for (number, source) in found.joints.iter().enumerate() {
        if source.multicast {
            continue;
        }
        let Some(differing) = pairs.from(source, &found.joints) else {
            cut.push("the policies are too large to compare every pair: the last ones are missing");
            break;
        };
        for (which, destinations) in differing {
            let list = lists.intern(&destinations);
            groups.entry((list, which)).or_default().push(number);
        }
    }
    let kinds_of = |joints: &mut dyn Iterator<Item = usize>| {
        let joints = joints.filter_map(|joint| found.joints.get(joint));
        let mut kinds: Vec<usize> = joints.flat_map(|joint| joint.kinds.clone()).collect();
        kinds.sort_unstable();
        kinds
    };
    let mut out = Vec::with_capacity(groups.len());
    for ((list, (difference, families)), sources) in groups {
        let from = kinds_of(&mut sources.into_iter());
        let to = lists.get(list as usize).iter().map(|to| *to as usize);
        let to = kinds_of(&mut to.into_iter());
        let ends = (from.first(), to.first());
        let (Some(one), Some(other)) = ends else {
            continue;
        };
        let ends = (found.kinds.get(*one), found.kinds.get(*other));
        let (Some(one), Some(other)) = ends else {
            continue;
        };
        let difference = pairs.differences.get(difference as usize);
        let changes: Vec<Change> = difference
            .into_iter()
            .flatten()
            .filter_map(|((before, after), numbers)| {
                let services = verdicts::runs(&services, numbers, families);
                let example = example(one, other, &services)?;
                Some(Change {
                    before: *before,
                    after: *after,
                    services,
                    example,
                })
            })
            .collect();
        // Of ICMP of the other family alone.
        if !changes.is_empty() {
            out.push(Group { from, to, changes });
        }
    }
    Reach {
        kinds: found.kinds,
        groups: out,
        cut,
    }
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
    differences: Vec<Difference>,
    numbers: BTreeMap<Vec<(u32, u32, Vec<u32>)>, u32>,
    effort: u64,
}

impl Pairs<'_> {
    /// The destinations to which something differs, ascending. `None`: that is too much to find out.
    fn from(&mut self, source: &Joint, all: &[Joint]) -> Option<BTreeMap<Which, Vec<u32>>> {
        self.effort = self.effort.checked_sub(all.len() as u64)?;
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
                None => {
                    self.effort = self.effort.checked_sub(self.compare.cost())?;
                    let difference = self.compare.rows(rows.0, rows.1);
                    let difference = self.number(difference);
                    self.known.insert(rows, difference);
                    difference
                }
            };
            if difference != 0 {
                let same = differing.entry((difference - 1, families)).or_default();
                same.push(word(number));
            }
        }
        Some(differing)
    }

    /// 0 for none; equal ones have one number.
    fn number(&mut self, difference: Difference) -> u32 {
        if difference.is_empty() {
            return 0;
        }
        let key = difference
            .iter()
            .map(|((one, other), services)| (*one as u32, *other as u32, services.clone()))
            .collect();
        let (numbers, differences) = (&mut self.numbers, &mut self.differences);
        *numbers.entry(key).or_insert_with(|| {
            differences.push(difference);
            word(differences.len())
        })
    }
}
