//! Which rules match a pair of behaviours: found from the rules, not by asking each pair, of which
//! most have none.

use crate::policy::model::Mode;

use super::{
    SCRATCH, Stop,
    key::Fact,
    sides::{self, Classes, NO_MODE, Side},
};

/// Where the code of a strength stands in a word, above a number.
pub(super) const CODE: u32 = 30;
/// The number.
pub(super) const NUMBER: u32 = (1 << CODE) - 1;

/// The rules of each destination under one source.
pub(super) struct Matches<'a> {
    facts: &'a [Fact],
    weakest: Mode,
    /// Rules that every source matches, ascending.
    from_any: &'a [u32],
    /// Per rule, whether every destination matches it.
    to_any: Vec<bool>,
    /// Per rule, where its destinations start; one more at the end.
    starts: Vec<u32>,
    /// Destinations that match a rule by name, with the strength that they lend.
    named: Vec<u32>,
    /// The source's rules, with the strength that it lends.
    from: Vec<(u32, u32)>,
    /// Those of them that every destination matches; whether some do so by name as well.
    common: Vec<(u32, bool)>,
    doubled: bool,
    /// Per destination, where its words start; one more at the end.
    ends: Vec<u32>,
    words: Vec<u32>,
    /// Per rule, the last destination that named it.
    seen: Vec<u32>,
}

impl<'a> Matches<'a> {
    pub(super) fn new(
        classes: &'a Classes,
        facts: &'a [Fact],
        weakest: Mode,
    ) -> Result<Self, Stop> {
        let mut to_any = vec![false; facts.len()];
        for rule in &classes.any_destination {
            if let Some(any) = to_any.get_mut(*rule as usize) {
                *any = true;
            }
        }
        // Counted, summed, then filled in: the rule's end becomes its start.
        let mut starts = vec![0; facts.len() + 1];
        let mut total = 0usize;
        for side in classes.destinations() {
            total += side.rules.len();
            for entry in side.rules {
                if let Some(count) = starts.get_mut((entry & NUMBER) as usize) {
                    *count += 1;
                }
            }
        }
        if total > SCRATCH {
            return Err(Stop::Complex);
        }
        let mut sum = 0;
        for start in &mut starts {
            sum += *start;
            *start = sum;
        }
        let mut named = vec![0; total];
        let sides: Vec<Side<'_>> = classes.destinations().collect();
        for (destination, side) in sides.iter().enumerate().rev() {
            for entry in side.rules {
                if let Some(start) = starts.get_mut((entry & NUMBER) as usize) {
                    *start -= 1;
                    if let Some(place) = named.get_mut(*start as usize) {
                        *place = entry & !NUMBER | super::word(destination);
                    }
                }
            }
        }
        Ok(Self {
            facts,
            weakest,
            from_any: &classes.any_source,
            to_any,
            starts,
            named,
            from: Vec::new(),
            common: Vec::new(),
            doubled: false,
            ends: vec![0; classes.width() + 1],
            words: Vec::new(),
            seen: vec![u32::MAX; facts.len()],
        })
    }

    /// Goes on to a source. `Err` when its rules are too many.
    pub(super) fn start(&mut self, source: &Side<'_>) -> Result<(), Stop> {
        self.from.clear();
        let mut any = self.from_any.iter().copied().peekable();
        for entry in source.rules {
            let (code, rule) = (entry >> CODE, entry & NUMBER);
            while let Some(earlier) = any.next_if(|any| *any <= rule) {
                if earlier < rule {
                    self.from.push((earlier, NO_MODE));
                }
            }
            self.from.push((rule, code));
        }
        self.from.extend(any.map(|rule| (rule, NO_MODE)));

        self.ends.fill(0);
        self.common.clear();
        self.doubled = false;
        let mut total = 0;
        for (rule, code) in &self.from {
            let named = of(&self.starts, &self.named, *rule);
            total += named.len();
            for entry in named {
                if let Some(count) = self.ends.get_mut((entry & NUMBER) as usize) {
                    *count += 1;
                }
            }
            if self.to_any.get(*rule as usize) == Some(&true) {
                let doubled = !named.is_empty();
                self.doubled |= doubled;
                let word = kind(self.facts, *rule, *code, self.weakest);
                self.common.push((word, doubled));
            }
        }
        if total > SCRATCH {
            return Err(Stop::Complex);
        }
        let mut sum = 0;
        for end in &mut self.ends {
            sum += *end;
            *end = sum;
        }
        self.words.clear();
        self.words.resize(total, 0);
        for (rule, code) in self.from.iter().rev() {
            for entry in of(&self.starts, &self.named, *rule) {
                let strength = (*code).min(entry >> CODE);
                let word = kind(self.facts, *rule, strength, self.weakest);
                if let Some(end) = self.ends.get_mut((entry & NUMBER) as usize) {
                    *end -= 1;
                    if let Some(place) = self.words.get_mut(*end as usize) {
                        *place = word;
                    }
                }
            }
        }
        Ok(())
    }

    /// Appends the rules that match with a destination, each under its kind, in no order.
    pub(super) fn of(&mut self, destination: u32, out: &mut Vec<u32>) {
        let named = of(&self.ends, &self.words, destination);
        out.extend(named);
        if !self.doubled {
            out.extend(self.common.iter().map(|(word, _)| word));
            return;
        }
        for word in named {
            if let Some(seen) = self.seen.get_mut((word & super::key::RULE) as usize) {
                *seen = destination;
            }
        }
        let seen = &self.seen;
        let common = self.common.iter().filter(|(word, doubled)| {
            !doubled || seen.get((word & super::key::RULE) as usize) != Some(&destination)
        });
        out.extend(common.map(|(word, _)| word));
    }

    /// Before the next source.
    pub(super) fn finish(&mut self) {
        if self.doubled {
            self.seen.fill(u32::MAX);
        }
    }
}

fn of<'a>(starts: &[u32], all: &'a [u32], number: u32) -> &'a [u32] {
    let number = number as usize;
    match starts.get(number..number + 2) {
        Some([start, end]) => all.get(*start as usize..*end as usize).unwrap_or(&[]),
        _ => &[],
    }
}

/// A rule's number under its kind.
fn kind(facts: &[Fact], rule: u32, strength: u32, weakest: Mode) -> u32 {
    let kind = match facts.get(rule as usize) {
        Some(fact) if fact.denies => match strength {
            NO_MODE => sides::code(weakest),
            strength => strength,
        },
        Some(fact) => fact.kind,
        None => 0,
    };
    kind << super::key::KIND | rule
}
