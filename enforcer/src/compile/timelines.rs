//! Verdicts that change with time. Where rules expire, a cell is judged by one rule until it
//! expires, then by the next one that lives longer, and so on: a chain.

use enforcer_common::image::{MAX_TIMELINE, TIMELINE_WORDS, VERDICT_TIMELINE};

use super::{intern::Interner, rows::Verdict};

/// The second at which a rule without `expires` ends.
pub(super) const NEVER: u64 = u64::MAX;

/// Index of the chain of no rule.
pub(super) const NO_RULE: u32 = 0;

/// A chain: another one, and the rule that takes over from it.
#[derive(Clone, Copy)]
struct Link {
    before: u32,
    verdict: Verdict,
    until: u64,
    /// Links that end.
    ends: u32,
    /// The last rule that took over from here, and the chain that this made.
    next: (u32, u32),
}

/// The chains of one row.
#[derive(Default)]
pub(super) struct Chains(Vec<Link>);

impl Chains {
    /// Forgets all but the chain of no rule.
    pub(super) fn clear(&mut self) {
        self.0.clear();
        self.0.push(Link {
            before: NO_RULE,
            verdict: (0, 0),
            until: 0,
            ends: 0,
            next: (u32::MAX, NO_RULE),
        });
    }

    /// Number of chains.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The chain with the rule behind it, if the rule lives longer than those before. Rules come one
    /// after another, never again. `Err`: how many verdicts it would hold, when those are too many.
    pub(super) fn then(
        &mut self,
        chain: u32,
        rule: u32,
        verdict: Verdict,
        until: u64,
    ) -> Result<u32, usize> {
        let number = super::word(self.0.len());
        let Some(link) = self.0.get_mut(chain as usize) else {
            return Ok(chain);
        };
        if link.until >= until {
            return Ok(chain);
        }
        if link.next.0 == rule {
            return Ok(link.next.1);
        }
        let ends = link.ends + u32::from(until != NEVER);
        if ends >= MAX_TIMELINE {
            return Err(ends as usize + 1);
        }
        link.next = (rule, number);
        self.0.push(Link {
            before: chain,
            verdict,
            until,
            ends,
            next: (u32::MAX, NO_RULE),
        });
        Ok(number)
    }

    /// The verdict of a chain whose last rule `unmatched` follows: plain where it never changes,
    /// else words of a timeline, from `out`.
    fn write(&self, chain: u32, unmatched: Verdict, out: &mut Vec<u32>) -> Option<Verdict> {
        out.clear();
        let mut entries = Vec::new();
        let mut at = chain;
        while at != NO_RULE
            && let Some(link) = self.0.get(at as usize)
        {
            entries.push((link.until, link.verdict));
            at = link.before;
        }
        entries.reverse();
        if entries.last().is_none_or(|(until, _)| *until != NEVER) {
            entries.push((NEVER, unmatched));
        }
        if let [(_, verdict)] = entries.as_slice() {
            return Some(*verdict);
        }
        out.push(super::word(entries.len()));
        for (until, (word, subject)) in entries {
            out.extend([until as u32, (until >> 32) as u32, word, subject]);
        }
        None
    }
}

/// The timelines of an image, equal ones once.
#[derive(Default)]
pub(super) struct Timelines {
    known: Interner,
    /// Scratch: the words of one.
    words: Vec<u32>,
}

impl Timelines {
    /// Words that they take.
    pub(super) fn size(&self) -> usize {
        self.known.size()
    }

    /// All of them, to be written at an offset that [`relocate`] is told.
    pub(super) fn words(&self) -> &[u32] {
        self.known.words()
    }

    /// The verdict of a chain; `Err`: the words that its timeline takes, when those are more than
    /// `room`.
    pub(super) fn verdict(
        &mut self,
        chains: &Chains,
        chain: u32,
        unmatched: Verdict,
        room: usize,
    ) -> Result<Verdict, usize> {
        if let Some(plain) = chains.write(chain, unmatched, &mut self.words) {
            return Ok(plain);
        }
        let number = match self.known.find(&self.words) {
            Some(known) => known,
            None if self.words.len() > room => return Err(self.words.len()),
            None => self.known.intern(&self.words),
        };
        Ok((
            VERDICT_TIMELINE,
            super::word(self.known.start(number as usize)),
        ))
    }
}

/// Words that `chains` chains take in timelines, at least: each link is part of a different one.
pub(super) fn least(chains: &Chains) -> usize {
    (chains.len() - 1) * TIMELINE_WORDS as usize
}

/// Turns a verdict's place among the timelines into one in the image.
pub(super) fn relocate(verdict: &mut [u32], base: u32) {
    if let [word, subject] = verdict
        && *word & VERDICT_TIMELINE != 0
    {
        *subject += base;
    }
}
