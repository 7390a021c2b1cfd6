//! Sets of segments → address classes.
//!
//! Two sets that no rule, guard or strength tells apart are one class. What a set means differs
//! by the side of the flow it stands on, so a class is a pair: its behaviour as source and its
//! behaviour as destination; and its marks, which say what passes before any rule.
//!
//! The sets themselves are never stored: there may be as many as there are members, each as long
//! as there are segments. What is kept follows the sweep, one segment entered or left at a time.

use std::collections::{BTreeSet, HashMap};

use enforcer_common::image::header;

use crate::policy::model::{Action, Environment, Mode, Policy};

use super::{
    SCRATCH, Stop,
    bits::{self, Bits},
    intern::Interner,
    intervals::{self, Follow},
    marks::Marks,
    matches::CODE,
    writer::{Full, Writer},
};

/// The strongest segment that guards one side of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Guard {
    pub(super) mode: Mode,
    pub(super) segment: u32,
}

/// From the strongest to the weakest; a mode's index here is its code.
const MODES: [Mode; 3] = [Mode::Enforce, Mode::Observe, Mode::Off];
/// Code of no mode at all, weaker than any.
pub(super) const NO_MODE: u32 = 3;

/// Smaller is stronger.
pub(super) fn code(mode: Mode) -> u32 {
    match mode {
        Mode::Enforce => 0,
        Mode::Observe => 1,
        Mode::Off => 2,
    }
}

/// The mode of a code.
pub(super) fn mode(code: u32) -> Option<Mode> {
    MODES.get(code as usize).copied()
}

/// How an address behaves on one side of a flow, as words: guard's mode and segment, and the rules
/// that name it on this side.
#[derive(Clone, Copy)]
pub(super) struct Side<'a> {
    /// Code of the guard's mode, or [`NO_MODE`].
    mode: u32,
    segment: u32,
    /// Rules that match on this side, but for those that match everything there; ascending. Each
    /// under the code of the strongest mode through which it matches, where it denies.
    pub(super) rules: &'a [u32],
}

impl<'a> Side<'a> {
    fn of(words: &'a [u32]) -> Self {
        let (head, rules) = words.split_at_checked(2).unwrap_or((&[], &[]));
        Self {
            mode: head.first().copied().unwrap_or(NO_MODE),
            segment: head.get(1).copied().unwrap_or(0),
            rules,
        }
    }

    /// Who guards this side.
    pub(super) fn guard(&self) -> Option<Guard> {
        mode(self.mode).map(|mode| Guard {
            mode,
            segment: self.segment,
        })
    }
}

/// What the current set of segments means on one side.
struct Tracker<'a> {
    policy: &'a Policy,
    outbound: bool,
    /// Rules by the segment that they name, `host` and `multicast` behind the real ones.
    named: Vec<Vec<u32>>,
    /// Rules that name `unsegmented`.
    unsegmented: Vec<u32>,
    /// Rules that name `any`.
    any: Vec<u32>,
    /// Per rule, its number among the deny rules.
    denial: &'a [Option<u32>],
    /// Per rule, how many of its names match the set; `any` does not count.
    matched: Vec<u32>,
    /// Per deny rule, how many segments of each mode it matches through.
    through: Vec<[u32; 3]>,
    /// Guarding segments of each mode.
    guards: [BTreeSet<u32>; 3],
    rules: Bits,
    /// Scratch: the words of a side.
    words: Vec<u32>,
    known: Interner,
}

impl<'a> Tracker<'a> {
    fn new(policy: &'a Policy, outbound: bool, denial: &'a [Option<u32>]) -> Self {
        let denials = denial.iter().flatten().count();
        let mut tracker = Self {
            policy,
            outbound,
            named: vec![Vec::new(); policy.segments.len() + 2],
            unsegmented: Vec::new(),
            any: Vec::new(),
            denial,
            matched: vec![0; policy.rules.len()],
            through: vec![[0; 3]; denials],
            guards: Default::default(),
            rules: Bits::empty(policy.rules.len()),
            words: Vec::new(),
            known: Interner::default(),
        };
        for (number, rule) in (0u32..).zip(&policy.rules) {
            let side = if outbound { &rule.from } else { &rule.to };
            if side.any {
                tracker.any.push(number);
            }
            if side.unsegmented {
                tracker.unsegmented.push(number);
            }
            let host = side.host.then(|| intervals::host(policy));
            let multicast = side.multicast.then(|| intervals::multicast(policy));
            let segments = side.segments.iter().map(|segment| segment.0);
            for segment in segments.chain(host).chain(multicast) {
                if let Some(named) = tracker.named.get_mut(segment as usize)
                    && named.last() != Some(&number)
                {
                    named.push(number);
                }
            }
        }
        tracker.set_unsegmented(true);
        tracker
    }

    /// One more or one fewer of the rule's names matches.
    fn count(&mut self, rule: u32, more: bool) {
        let Some(matched) = self.matched.get_mut(rule as usize) else {
            return;
        };
        if more {
            *matched += 1;
            self.rules.insert(rule as usize);
        } else {
            *matched = matched.saturating_sub(1);
            if *matched == 0 {
                self.rules.remove(rule as usize);
            }
        }
    }

    fn set_unsegmented(&mut self, unsegmented: bool) {
        for rule in std::mem::take(&mut self.unsegmented) {
            self.count(rule, unsegmented);
            self.unsegmented.push(rule);
        }
    }

    /// The set has gained or lost a segment, or a built-in.
    fn toggle(&mut self, number: u32, entered: bool) {
        let named = self.named.get_mut(number as usize).map(std::mem::take);
        let named = named.unwrap_or_default();
        for rule in &named {
            self.count(*rule, entered);
        }
        if let Some(segment) = self.policy.segments.get(number as usize) {
            let mode = code(segment.mode) as usize;
            for rule in &named {
                if let Some(Some(denial)) = self.denial.get(*rule as usize) {
                    self.lend(*denial as usize, mode, entered);
                }
            }
            let guards = if self.outbound {
                segment.protect.outbound()
            } else {
                segment.protect.inbound()
            };
            if guards && let Some(of_mode) = self.guards.get_mut(mode) {
                if entered {
                    of_mode.insert(number);
                } else {
                    of_mode.remove(&number);
                }
            }
        }
        if let Some(place) = self.named.get_mut(number as usize) {
            *place = named;
        }
    }

    /// A deny rule matches through one segment more, or one fewer, of this mode.
    fn lend(&mut self, denial: usize, mode: usize, more: bool) {
        let Some(through) = self.through.get_mut(denial) else {
            return;
        };
        if let Some(count) = through.get_mut(mode) {
            *count = if more {
                *count + 1
            } else {
                count.saturating_sub(1)
            };
        }
    }

    /// Number of the behaviour of the current set.
    fn number(&mut self) -> u32 {
        // Of the strongest, the one that is written first.
        let guard = (0u32..)
            .zip(&self.guards)
            .find_map(|(code, of_mode)| of_mode.first().map(|segment| [code, *segment]));
        self.words.clear();
        self.words.extend(guard.unwrap_or([NO_MODE, 0]));
        let (words, denial, through) = (&mut self.words, self.denial, &self.through);
        bits::each(self.rules.words(), |rule| {
            let through = match denial.get(rule) {
                Some(Some(denial)) => through.get(*denial as usize),
                _ => None,
            };
            let strongest = through.and_then(|through| through.iter().position(|n| *n > 0));
            let code = strongest.map_or(NO_MODE, super::word);
            words.push(code << CODE | super::word(rule));
        });
        self.known.intern(&self.words)
    }
}

/// Address classes and their behaviours.
pub(super) struct Classes {
    sources: Interner,
    destinations: Interner,
    /// Rules that match every source.
    pub(super) any_source: Vec<u32>,
    /// Rules that match every destination.
    pub(super) any_destination: Vec<u32>,
    /// Per class, its (source, destination) behaviour.
    pub(super) classes: Vec<(u32, u32)>,
    /// Per class, the number of its marks.
    marks_of: Vec<u32>,
    marks: Marks,
}

impl Classes {
    /// Behaviours as source.
    pub(super) fn sources(&self) -> impl Iterator<Item = Side<'_>> {
        self.sides(&self.sources)
    }

    /// Behaviours as destination.
    pub(super) fn destinations(&self) -> impl Iterator<Item = Side<'_>> {
        self.sides(&self.destinations)
    }

    /// Writes what there is to say of each class beside the rules.
    pub(super) fn write_marks(&self, writer: &mut Writer) -> Result<(), Full> {
        self.marks.write(&self.marks_of, writer)
    }

    /// Whether the behaviours are the same, under the same numbers.
    pub(super) fn behave_as(&self, other: &Self) -> bool {
        self.sources.same(&other.sources)
            && self.destinations.same(&other.destinations)
            && self.any_source == other.any_source
            && self.any_destination == other.any_destination
    }

    /// Pairs of behaviours.
    pub(super) fn pairs(&self) -> usize {
        self.sources.len() * self.destinations.len()
    }

    /// Number of behaviours as destination.
    pub(super) fn width(&self) -> usize {
        self.destinations.len()
    }

    fn sides<'a>(&self, of: &'a Interner) -> impl Iterator<Item = Side<'a>> {
        (0..of.len()).map(|number| Side::of(of.get(number)))
    }
}

/// Follows a sweep and numbers the classes in the order in which the sweep meets them.
pub(super) struct Classifier<'a> {
    sources: Tracker<'a>,
    destinations: Tracker<'a>,
    /// The set at the current address, ascending.
    current: Vec<u32>,
    /// The set that the trackers were told last.
    told: Vec<u32>,
    /// Short sets met before, and their classes: most addresses are in one of a few.
    sets: Interner,
    class_of_set: Vec<u32>,
    /// Real segments in the set.
    inside: usize,
    policy: &'a Policy,
    marks: Marks,
    of_behaviour: HashMap<(u32, u32, u32), u32>,
    classes: Vec<(u32, u32)>,
    marks_of: Vec<u32>,
    /// Words that an image may have.
    limit: usize,
}

impl<'a> Classifier<'a> {
    /// `denial` says of each rule its number among the deny rules ([`denials`]).
    pub(super) fn new(
        policy: &'a Policy,
        env: &Environment,
        denial: &'a [Option<u32>],
        limit: usize,
    ) -> Self {
        Self {
            sources: Tracker::new(policy, true, denial),
            destinations: Tracker::new(policy, false, denial),
            current: Vec::new(),
            told: Vec::new(),
            sets: Interner::default(),
            class_of_set: Vec::new(),
            inside: 0,
            policy,
            marks: Marks::new(policy, env),
            of_behaviour: HashMap::new(),
            classes: Vec::new(),
            marks_of: Vec::new(),
            limit,
        }
    }

    /// Number of classes so far.
    pub(super) fn count(&self) -> usize {
        self.classes.len()
    }

    /// The classes found. Behaviours are numbered anew, so that the numbers do not depend on which
    /// address comes first: where a member comes or goes, rows are mostly what they were.
    pub(super) fn finish(mut self) -> Classes {
        let (sources, new_source) = self.sources.known.sorted();
        let (destinations, new_destination) = self.destinations.known.sorted();
        let new = |numbers: &[u32], old: u32| numbers.get(old as usize).copied().unwrap_or(0);
        for (source, destination) in &mut self.classes {
            *source = new(&new_source, *source);
            *destination = new(&new_destination, *destination);
        }
        Classes {
            sources,
            destinations,
            any_source: self.sources.any,
            any_destination: self.destinations.any,
            classes: self.classes,
            marks_of: self.marks_of,
            marks: self.marks,
        }
    }
}

/// Segments of a set that is remembered.
const SHORT: usize = 32;
/// Words of sets that are remembered.
const REMEMBERED: usize = 1 << 22;

impl Classifier<'_> {
    /// Tells the trackers what has changed since they were asked last.
    fn tell(&mut self) {
        let told = std::mem::take(&mut self.told);
        let (mut before, mut after) = (told.iter().peekable(), 0);
        while before.peek().is_some() || after < self.current.len() {
            let new = self.current.get(after).copied();
            match (before.peek().map(|old| **old), new) {
                (Some(old), Some(new)) if old == new => {
                    before.next();
                    after += 1;
                }
                (Some(old), new) if new.is_none_or(|new| old < new) => {
                    before.next();
                    self.toggle_one(old, false);
                }
                (_, Some(new)) => {
                    after += 1;
                    self.toggle_one(new, true);
                }
                (_, None) => break,
            }
        }
        self.told = told;
        self.told.clone_from(&self.current);
    }

    fn toggle_one(&mut self, segment: u32, entered: bool) {
        self.sources.toggle(segment, entered);
        self.destinations.toggle(segment, entered);
        self.marks.toggle(segment, entered);
        if (segment as usize) < self.policy.segments.len() {
            let before = self.inside;
            self.inside = if entered {
                before + 1
            } else {
                before.saturating_sub(1)
            };
            if before == 0 || self.inside == 0 {
                self.sources.set_unsegmented(self.inside == 0);
                self.destinations.set_unsegmented(self.inside == 0);
            }
        }
    }

    /// The class of the set that the trackers were told.
    fn class(&mut self) -> Result<u32, Stop> {
        let pair = (self.sources.number(), self.destinations.number());
        let marks = self.marks.number();
        let behaviour = (pair.0, pair.1, marks);
        if let Some(known) = self.of_behaviour.get(&behaviour) {
            return Ok(*known);
        }
        let number = super::word(self.classes.len());
        self.of_behaviour.insert(behaviour, number);
        self.classes.push(pair);
        self.marks_of.push(marks);
        // The matrix of pairs alone.
        let words = self.classes.len() * self.classes.len() + header::WORDS as usize;
        if words > self.limit {
            return Err(Full { words }.into());
        }
        let sides = self.sources.known.size() + self.destinations.known.size();
        if sides + self.marks.size() > SCRATCH {
            return Err(Stop::Complex);
        }
        Ok(number)
    }
}

impl Follow for Classifier<'_> {
    fn toggle(&mut self, segment: u32, entered: bool) {
        match self.current.binary_search(&segment) {
            Ok(at) if !entered => {
                self.current.remove(at);
            }
            Err(at) if entered => self.current.insert(at, segment),
            Ok(_) | Err(_) => {}
        }
    }

    fn number(&mut self) -> Result<u32, Stop> {
        let short = self.current.len() <= SHORT;
        if short
            && let Some(known) = self.sets.find(&self.current)
            && let Some(class) = self.class_of_set.get(known as usize)
        {
            return Ok(*class);
        }
        self.tell();
        let class = self.class()?;
        if short && self.sets.size() + self.sets.len() < REMEMBERED {
            self.sets.intern(&self.current);
            self.class_of_set.push(class);
        }
        Ok(class)
    }
}

/// Per rule, its number among the deny rules.
pub(super) fn denials(policy: &Policy) -> Vec<Option<u32>> {
    let mut next = 0;
    let number = |action| {
        (action == Action::Deny).then(|| {
            next += 1;
            next - 1
        })
    };
    policy
        .rules
        .iter()
        .map(|rule| rule.action)
        .map(number)
        .collect()
}
