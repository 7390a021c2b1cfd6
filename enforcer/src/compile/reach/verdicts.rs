//! What the rows of an image say, and where those of two images differ.

use std::collections::BTreeMap;

use enforcer_common::{
    image::{
        BYTE_NODE_WORDS, EMPTY, EXCEPTION_WORDS, ICMP_OF_OTHER_FAMILY, LEAF, PROTOCOLS, ROW_WORDS,
        VERDICT_TIMELINE, Words as _, at_time, header,
    },
    verdict::Outcome,
};

use super::super::{Image, word};

/// The first and last selector of a stretch, and its number in the table of services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// Protocol number; [`ICMP_OF_OTHER_FAMILY`] for ICMP in IPv6 and ICMPv6 in IPv4.
    pub index: u32,
    /// First selector.
    pub first: u16,
    /// Last selector, included.
    pub last: u16,
}

/// Services that neither image tells apart.
pub(super) struct Services {
    /// Class before and after.
    pub(super) classes: Vec<(u32, u32)>,
    /// Where each is.
    pub(super) runs: Vec<Vec<Run>>,
    /// Whether the classes of both are the same ones under the same numbers.
    same: bool,
    /// Numbers of classes.
    counts: (usize, usize),
}

impl Services {
    pub(super) fn of(before: &Image, after: &Image) -> Self {
        let mut numbers: BTreeMap<(u32, u32), usize> = BTreeMap::new();
        let mut classes = Vec::new();
        let mut runs: Vec<Vec<Run>> = Vec::new();
        for index in 0..PROTOCOLS {
            let mut add = |pair: (u32, u32), first: u32, last: u32| {
                let at = *numbers.entry(pair).or_insert_with(|| {
                    classes.push(pair);
                    runs.push(Vec::new());
                    classes.len() - 1
                });
                let Some(runs) = runs.get_mut(at) else {
                    return;
                };
                let (first, last) = (first as u16, last as u16);
                match runs.last_mut() {
                    Some(run) if run.index == index && run.last.checked_add(1) == Some(first) => {
                        run.last = last;
                    }
                    _ => runs.push(Run { index, first, last }),
                }
            };
            let (one, other) = (entry(before, index), entry(after, index));
            if one & other & LEAF != 0 {
                add((one & !LEAF, other & !LEAF), 0, 0xffff);
                continue;
            }
            for high in 0..BYTE_NODE_WORDS {
                let (one, other) = (child(before, one, high), child(after, other, high));
                if one & other & LEAF != 0 {
                    let pair = (one & !LEAF, other & !LEAF);
                    add(pair, high << 8, high << 8 | 0xff);
                    continue;
                }
                for low in 0..BYTE_NODE_WORDS {
                    let (one, other) = (child(before, one, low), child(after, other, low));
                    let selector = high << 8 | low;
                    add((one & !LEAF, other & !LEAF), selector, selector);
                }
            }
        }
        let count = |image: &Image| image.stats().service_classes as usize;
        let counts = (count(before), count(after));
        let same = counts == (classes.len(), classes.len()) && classes.iter().all(|(a, b)| a == b);
        Self {
            classes,
            runs,
            same,
            counts,
        }
    }
}

fn entry(image: &Image, index: u32) -> u32 {
    let words = image.words();
    words.word(words.word(header::SERVICES).wrapping_add(index))
}

/// The child of a node; of a leaf, the leaf.
fn child(image: &Image, node: u32, index: u32) -> u32 {
    if node & LEAF != 0 {
        return node;
    }
    image.words().word(node.wrapping_add(index))
}

/// Outcomes by row, at one moment.
pub(super) struct Verdicts {
    /// Of most services.
    defaults: Vec<Outcome>,
    /// Per row, where its exceptions start; one more at the end.
    starts: Vec<u32>,
    /// Service class and outcome, another one than the default; ascending.
    exceptions: Vec<(u32, Outcome)>,
}

impl Verdicts {
    pub(super) fn of(image: &Image, unix: u64) -> Self {
        let words = image.words();
        let outcome = |at: u32| {
            let (verdict, subject) = (words.word(at), words.word(at.wrapping_add(1)));
            let verdict = if verdict & VERDICT_TIMELINE != 0 {
                at_time(words, subject, unix).0
            } else {
                verdict
            };
            Outcome::from_bits(verdict)
        };
        let rows = words.word(header::ROWS);
        let count = image.stats().rows;
        let defaults: Vec<Outcome> = (0..count)
            .map(|row| outcome(rows.wrapping_add(row.wrapping_mul(ROW_WORDS))))
            .collect();
        let slots = words.word(header::EXCEPTIONS + 2);
        let mut all: Vec<(u32, u32, Outcome)> = Vec::new();
        for slot in 0..words.word(header::EXCEPTIONS + 3) {
            let at = slots.wrapping_add(slot.wrapping_mul(EXCEPTION_WORDS));
            let row = words.word(at);
            if row == EMPTY {
                continue;
            }
            let said = outcome(at.wrapping_add(2));
            if defaults.get(row as usize).is_some_and(|d| *d != said) {
                all.push((row, words.word(at.wrapping_add(1)), said));
            }
        }
        all.sort_unstable_by_key(|(row, service, _)| (*row, *service));
        let mut starts = vec![0; defaults.len() + 1];
        for (row, _, _) in &all {
            if let Some(start) = starts.get_mut(*row as usize + 1) {
                *start += 1;
            }
        }
        let mut sum = 0;
        for start in &mut starts {
            sum += *start;
            *start = sum;
        }
        Self {
            defaults,
            starts,
            exceptions: all.into_iter().map(|(_, s, o)| (s, o)).collect(),
        }
    }

    fn row(&self, row: u32) -> (Outcome, &[(u32, Outcome)]) {
        let row = row as usize;
        let default = self.defaults.get(row).copied().unwrap_or(Outcome::Denied);
        let exceptions = match self.starts.get(row..row + 2) {
            Some([start, end]) => self.exceptions.get(*start as usize..*end as usize),
            _ => None,
        };
        (default, exceptions.unwrap_or_default())
    }

    /// Writes the outcome of each service class of a row.
    fn spread(&self, row: u32, count: usize, into: &mut Vec<Outcome>) {
        let (default, exceptions) = self.row(row);
        into.clear();
        into.resize(count, default);
        for (service, outcome) in exceptions {
            if let Some(place) = into.get_mut(*service as usize) {
                *place = *outcome;
            }
        }
    }
}

/// Compares rows.
pub(super) struct Compare<'a> {
    pub(super) before: &'a Verdicts,
    pub(super) after: &'a Verdicts,
    pub(super) services: &'a Services,
    scratch: (Vec<Outcome>, Vec<Outcome>),
}

impl<'a> Compare<'a> {
    pub(super) fn new(before: &'a Verdicts, after: &'a Verdicts, services: &'a Services) -> Self {
        Self {
            before,
            after,
            services,
            scratch: (Vec::new(), Vec::new()),
        }
    }

    /// Looks that [`Compare::rows`] takes at most.
    pub(super) fn cost(&self) -> u64 {
        let counts = self.services.counts;
        (self.services.classes.len() + counts.0 + counts.1) as u64
    }

    /// Where two rows differ, in words: outcome before and after, how many services change so, and
    /// which, ascending; and so on.
    pub(super) fn rows(&mut self, one: u32, other: u32) -> Vec<u32> {
        if self.services.same && self.before.row(one) == self.after.row(other) {
            return Vec::new();
        }
        let counts = self.services.counts;
        let (was, is) = &mut self.scratch;
        self.before.spread(one, counts.0, was);
        self.after.spread(other, counts.1, is);
        let mut found: BTreeMap<(u32, u32), Vec<u32>> = BTreeMap::new();
        for (number, (one, other)) in self.services.classes.iter().enumerate() {
            let (one, other) = (was.get(*one as usize), is.get(*other as usize));
            if let (Some(one), Some(other)) = (one, other)
                && one != other
            {
                let change = found.entry((*one as u32, *other as u32)).or_default();
                change.push(word(number));
            }
        }
        let mut words = Vec::new();
        for ((one, other), services) in found {
            words.extend([one, other, word(services.len())]);
            words.extend(services);
        }
        words
    }
}

/// Runs of some services in families (1: IPv4, 2: IPv6), united where they touch.
pub(super) fn runs(services: &Services, numbers: &[u32], families: u8) -> Vec<Run> {
    let named = numbers
        .iter()
        .filter_map(|n| services.runs.get(*n as usize));
    let mut all: Vec<Run> = named
        .flatten()
        .filter(|run| match run.index {
            1 => families & 1 != 0,
            58 => families & 2 != 0,
            _ => true,
        })
        .copied()
        .collect();
    all.sort_unstable();
    let mut united: Vec<Run> = Vec::with_capacity(all.len());
    for run in all {
        match united.last_mut() {
            Some(last)
                if last.index == run.index && last.last.checked_add(1) == Some(run.first) =>
            {
                last.last = run.last;
            }
            _ => united.push(run),
        }
    }
    united
}

/// A packet of a run in a family: protocol and selector.
pub(super) fn point(run: &Run, v6: bool) -> Option<(u8, u16)> {
    let protocol = match (run.index, v6) {
        (ICMP_OF_OTHER_FAMILY, false) => 58,
        (ICMP_OF_OTHER_FAMILY, true) => 1,
        (1, true) | (58, false) => return None,
        (index, _) => u8::try_from(index).ok()?,
    };
    Some((protocol, run.first))
}
