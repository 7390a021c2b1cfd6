//! Class pairs → rows: the verdicts of every service class between two behaviours.

use enforcer_common::{
    decide::verdict_word,
    image::{self, EMPTY, ROW_HAS_EXCEPTIONS, ROW_WORDS},
    verdict::{Outcome, Reason},
};

use crate::policy::model::{Mode, Policy, Unsegmented};

use super::{
    bits::{self, Bits},
    intern::{Hasher, Interner, Slots},
    key::{Fact, Key},
    matches::Matches,
    services::Services,
    sides::{Classes, Guard, Side},
    timelines::{self, Chains, NEVER, NO_RULE, Timelines},
    writer::{Full, Writer},
};

/// Both words of a verdict.
pub(super) type Verdict = (u32, u32);

/// One entry of the exception table: exactly as large as in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exception {
    pub(super) row: u32,
    pub(super) service: u32,
    pub(super) verdict: Verdict,
}

/// Words of an exception in the image.
const EXCEPTION_WORDS: usize = image::EXCEPTION_WORDS as usize;

/// The rows, and which of them belongs to which pair of behaviours.
#[derive(Default)]
pub(super) struct Rows {
    /// Four words a row.
    words: Vec<u32>,
    exceptions: Vec<Exception>,
    timelines: Timelines,
    /// Source behaviour major.
    of_sides: Vec<u32>,
}

impl Rows {
    pub(super) fn count(&self) -> usize {
        self.words.len() / ROW_WORDS as usize
    }

    /// Writes the timelines; returns where they are, which rows and exceptions need to know.
    pub(super) fn write_timelines(&self, writer: &mut Writer) -> Result<u32, Full> {
        let base = writer.append(self.timelines.words())?;
        if self.timelines.size() > 0 {
            // A look-up reads as far as the longest one would reach, and then leaves that out.
            writer.append(&[0; (image::MAX_TIMELINE * image::TIMELINE_WORDS) as usize])?;
        }
        Ok(base)
    }

    /// Writes the rows, with timelines at `base`.
    pub(super) fn write(&self, base: u32, writer: &mut Writer) -> Result<u32, Full> {
        let words = self.words.chunks(ROW_WORDS as usize).flat_map(|row| {
            let mut words = [0; ROW_WORDS as usize];
            for (word, row) in words.iter_mut().zip(row) {
                *word = *row;
            }
            if let Some(default) = words.get_mut(..2) {
                timelines::relocate(default, base);
            }
            words
        });
        writer.append_each(self.words.len(), words)
    }
}

impl Exception {
    /// Its words, with timelines at `base`.
    pub(super) fn words(&self, base: u32) -> [u32; EXCEPTION_WORDS] {
        let mut verdict = [self.verdict.0, self.verdict.1];
        timelines::relocate(&mut verdict, base);
        [self.row, self.service, verdict[0], verdict[1]]
    }
}

/// Why there are no rows.
pub(super) enum Refused {
    /// They do not fit; how many there were.
    Full(Full, usize),
    /// A timeline would have this many entries, at least.
    Timeline(usize),
    /// Judging all pairs would take too long.
    Effort,
}

/// Why there is no row.
enum Excess {
    /// It would take this many words more.
    Words(usize),
    Timeline(usize),
    Effort,
}

/// Words of keys that are remembered. A key that is not is judged again: that costs time alone.
const REMEMBERED: usize = 1 << 22;

struct Builder<'a> {
    policy: &'a Policy,
    services: &'a Services,
    facts: &'a [Fact],
    /// Words that rows, exceptions and timelines may take.
    room: usize,
    key: Key,
    known: Interner,
    row_of_key: Vec<u32>,
    /// Rows by content.
    known_rows: Slots,
    words: Vec<u32>,
    exceptions: Vec<Exception>,
    timelines: Timelines,
    /// Per row, its first exception.
    starts: Vec<u32>,
    judge: Judge,
}

/// Scratch of a judgement.
struct Judge {
    every: Bits,
    left: Bits,
    verdicts: Vec<Verdict>,
    counts: Vec<usize>,
    /// Per service class, the index of its verdict.
    of_service: Vec<u32>,
    /// Where rules expire, the chain behind each verdict.
    chains: Chains,
    /// Looks at a service class that are left.
    effort: u64,
}

/// Builds the row of every pair of behaviours. Where rules expire, it looks at a service class under
/// a rule `effort` times in all. Where they do not fit beside the words that are `taken`,
/// it stops at the first excess and says how many rows there were.
pub(super) fn build(
    policy: &Policy,
    classes: &Classes,
    services: &Services,
    effort: u64,
    taken: usize,
    limit: usize,
) -> Result<Rows, Refused> {
    let facts: Vec<Fact> = policy.rules.iter().map(Fact::of).collect();
    let mut matches =
        Matches::new(classes, &facts, policy.defaults.mode).map_err(|_| Refused::Effort)?;
    let mut builder = Builder {
        policy,
        services,
        facts: &facts,
        room: limit.saturating_sub(taken),
        key: Key::new(services),
        known: Interner::default(),
        row_of_key: Vec::new(),
        known_rows: Slots::default(),
        words: Vec::new(),
        exceptions: Vec::new(),
        timelines: Timelines::default(),
        starts: Vec::new(),
        judge: Judge {
            every: Bits::full(services.count),
            left: Bits::full(services.count),
            verdicts: Vec::new(),
            counts: Vec::new(),
            of_service: vec![0; services.count],
            chains: Chains::default(),
            effort,
        },
    };
    let mut of_sides = Vec::with_capacity(classes.pairs());
    for source in classes.sources() {
        matches.start(&source).map_err(|_| Refused::Effort)?;
        for (number, destination) in (0u32..).zip(classes.destinations()) {
            let row = builder.row(&source, &destination, &mut matches, number);
            let row = row.map_err(|excess| match excess {
                Excess::Words(more) => {
                    let words = taken + builder.size() + more;
                    Refused::Full(Full { words }, builder.starts.len())
                }
                Excess::Timeline(entries) => Refused::Timeline(entries),
                Excess::Effort => Refused::Effort,
            })?;
            of_sides.push(row);
        }
        matches.finish();
    }
    Ok(Rows {
        words: builder.words,
        exceptions: builder.exceptions,
        timelines: builder.timelines,
        of_sides,
    })
}

impl Builder<'_> {
    /// Words that the rows so far take, at least.
    fn size(&self) -> usize {
        self.words.len() + self.exceptions.len() * EXCEPTION_WORDS + self.timelines.size()
    }

    /// The row of a pair.
    fn row(
        &mut self,
        source: &Side<'_>,
        destination: &Side<'_>,
        matches: &mut Matches<'_>,
        number: u32,
    ) -> Result<u32, Excess> {
        // The strongest; the destination's on ties.
        let guard = match (source.guard(), destination.guard()) {
            (Some(out), Some(into)) if out.mode > into.mode => Some(out),
            (out, into) => into.or(out),
        };
        self.key
            .fill(guard, matches, number, self.facts, self.services);
        if let Some(known) = self.known.find(&self.key.words)
            && let Some(row) = self.row_of_key.get(known as usize)
        {
            return Ok(*row);
        }
        let form = self.form(guard);
        let unmatched = unmatched(self.policy, guard);
        let default = if self.key.timed {
            self.timed(unmatched)?
        } else {
            let rules = self.key.rules(self.facts);
            self.judge.run(self.services, unmatched, rules)
        };
        let row = self.number(default, form).map_err(Excess::Words)?;
        if self.known.size() + self.known.len() < REMEMBERED {
            self.known.intern(&self.key.words);
            self.row_of_key.push(row);
        }
        Ok(row)
    }

    /// Judges where some rule expires; returns the index of the row's default.
    fn timed(&mut self, unmatched: Verdict) -> Result<usize, Excess> {
        let judge = &mut self.judge;
        judge.start();
        judge.chains.clear();
        for (rule, verdict) in self.key.rules(self.facts) {
            let until = self.facts.get(rule).map_or(NEVER, |fact| fact.until);
            if !judge.chain(self.services, rule, verdict, until)? {
                break;
            }
            // Each link is part of a timeline that the image is to have.
            let least = timelines::least(&judge.chains);
            if least > self.room {
                return Err(Excess::Words(least.saturating_sub(self.timelines.size())));
            }
        }
        judge.verdicts.clear();
        judge.counts.clear();
        judge.counts.resize(judge.chains.len(), 0);
        for chain in &judge.of_service {
            if let Some(count) = judge.counts.get_mut(*chain as usize) {
                *count += 1;
            }
        }
        for (chain, count) in (0u32..).zip(&judge.counts) {
            // Rows and exceptions so far; the room for timelines is what they leave.
            let taken = self.words.len() + self.exceptions.len() * EXCEPTION_WORDS;
            let room = self.room.saturating_sub(taken + self.timelines.size());
            judge.verdicts.push(match (chain, count) {
                (NO_RULE, _) => unmatched,
                (_, 0) => (0, 0),
                _ => self
                    .timelines
                    .verdict(&judge.chains, chain, unmatched, room)
                    .map_err(Excess::Words)?,
            });
        }
        Ok(judge.default())
    }

    /// The verdict of denials of form.
    fn form(&self, guard: Option<Guard>) -> Verdict {
        match unmatched(self.policy, guard) {
            (_, subject)
                if guard.is_none() && self.policy.defaults.unsegmented == Unsegmented::Allow =>
            {
                (verdict_word(Outcome::Off, Reason::Unsegmented), subject)
            }
            denial => denial,
        }
    }

    /// Number of the row just judged; equal rows are written once.
    fn number(&mut self, default: usize, form: Verdict) -> Result<u32, usize> {
        let judge = &self.judge;
        let verdict = judge.verdicts.get(default).copied().unwrap_or_default();
        let count = judge
            .counts
            .get(default)
            .map_or(0, |most| self.services.count - most);
        let flag = if count == 0 { 0 } else { ROW_HAS_EXCEPTIONS };
        let words = [verdict.0 | flag, verdict.1, form.0, form.1];
        let mut hasher = Hasher::new();
        words.into_iter().for_each(|word| hasher.feed(word));
        for (service, (word, subject)) in judge.exceptions(default) {
            [service, word, subject]
                .into_iter()
                .for_each(|word| hasher.feed(word));
        }
        let hash = hasher.finish();
        let same = |row: u32| {
            let row = row as usize;
            let at = row * ROW_WORDS as usize;
            let start = self.starts.get(row).map_or(0, |start| *start as usize);
            let end = self.starts.get(row + 1);
            let end = end.map_or(self.exceptions.len(), |end| *end as usize);
            self.words.get(at..at + ROW_WORDS as usize) == Some(&words)
                && self.exceptions.get(start..end).is_some_and(|known| {
                    let known = known.iter().map(|e| (e.service, e.verdict));
                    end - start == count && known.eq(judge.exceptions(default))
                })
        };
        if let Some(known) = self.known_rows.find(hash, same) {
            return Ok(known);
        }
        let more = ROW_WORDS as usize + count * EXCEPTION_WORDS;
        if self.size() + more > self.room {
            return Err(more);
        }
        let row = super::word(self.starts.len());
        self.starts.push(super::word(self.exceptions.len()));
        self.words.extend(words);
        let exceptions = judge.exceptions(default);
        self.exceptions
            .extend(exceptions.map(|(service, verdict)| Exception {
                row,
                service,
                verdict,
            }));
        self.known_rows.insert(hash, row);
        Ok(row)
    }
}

impl Judge {
    /// Gives each service class its verdict, where no rule expires; returns the index of the row's
    /// default.
    fn run(
        &mut self,
        services: &Services,
        unmatched: Verdict,
        rules: impl Iterator<Item = (usize, Verdict)>,
    ) -> usize {
        self.start();
        self.verdicts.clear();
        self.counts.clear();
        self.verdicts.push(unmatched);
        self.counts.push(0);
        // Each rule takes what those before it left.
        let mut left = services.count;
        for (rule, verdict) in rules {
            let Some(matched) = services.of_rule(rule) else {
                continue;
            };
            let index = super::word(self.verdicts.len());
            let mut count = 0;
            self.left.take(matched, |class| {
                count += 1;
                if let Some(of_service) = self.of_service.get_mut(class) {
                    *of_service = index;
                }
            });
            if count == 0 {
                continue;
            }
            self.verdicts.push(verdict);
            self.counts.push(count);
            left -= count;
            if left == 0 {
                break;
            }
        }
        if let Some(unmatched) = self.counts.first_mut() {
            *unmatched = left;
        }
        self.default()
    }

    /// Before the first rule.
    fn start(&mut self) {
        self.left.copy(&self.every);
        self.of_service.fill(NO_RULE);
    }

    /// The rule takes over, where those before it end; `false` when they leave nothing to later ones.
    fn chain(
        &mut self,
        services: &Services,
        rule: usize,
        verdict: Verdict,
        until: u64,
    ) -> Result<bool, Excess> {
        let Some(matched) = services.of_rule(rule) else {
            return Ok(true);
        };
        let mut excess = None;
        let mut looks = 0;
        let (chains, of_service) = (&mut self.chains, &mut self.of_service);
        bits::common(self.left.words(), matched.words(), |class| {
            looks += 1;
            if let Some(chain) = of_service.get_mut(class) {
                match chains.then(*chain, super::word(rule), verdict, until) {
                    Ok(next) => *chain = next,
                    Err(entries) => excess = Some(entries),
                }
            }
        });
        if let Some(entries) = excess {
            return Err(Excess::Timeline(entries));
        }
        self.effort = self.effort.checked_sub(looks).ok_or(Excess::Effort)?;
        if until == NEVER {
            self.left.take(matched, |_| {});
        }
        Ok(self.left.words().iter().any(|word| *word != 0))
    }

    /// The index of the verdict of most service classes.
    fn default(&self) -> usize {
        // The verdict of most service classes is the row's default, so that an `any` costs no
        // more than a single port. Of equally frequent ones the unmatched, then the smallest.
        let most = self.counts.iter().max().copied().unwrap_or(0);
        if self.counts.first() == Some(&most) {
            return 0;
        }
        let frequent = self.verdicts.iter().zip(&self.counts).enumerate();
        let frequent = frequent.filter(|(_, (_, count))| **count == most);
        frequent
            .min_by_key(|(_, (verdict, _))| **verdict)
            .map_or(0, |(index, _)| index)
    }

    /// Service classes with another verdict than the default, ascending.
    fn exceptions(&self, default: usize) -> impl Iterator<Item = (u32, Verdict)> + '_ {
        (0u32..)
            .zip(&self.of_service)
            .filter(move |(_, index)| **index as usize != default)
            .filter_map(|(service, index)| Some((service, *self.verdicts.get(*index as usize)?)))
    }
}

impl Rows {
    /// Where a row does not say what its default does.
    pub(super) fn exceptions(&self) -> &[Exception] {
        &self.exceptions
    }

    /// The matrix of row numbers, by address class, source class major.
    pub(super) fn matrix<'a>(&'a self, classes: &'a Classes) -> impl Iterator<Item = u32> + 'a {
        classes.classes.iter().flat_map(|(source, _)| {
            let rows = self
                .of_sides
                .get(*source as usize * classes.width()..)
                .unwrap_or(&[]);
            classes
                .classes
                .iter()
                .map(move |(_, destination)| rows.get(*destination as usize).copied().unwrap_or(0))
        })
    }
}

/// The verdict where no rule matches.
fn unmatched(policy: &Policy, guard: Option<Guard>) -> Verdict {
    let defaults = policy.defaults;
    match (guard, defaults.unsegmented) {
        (Some(guard), _) => (
            verdict_word(outcome(guard.mode), Reason::DefaultDeny),
            guard.segment,
        ),
        (None, Unsegmented::Allow) => (verdict_word(Outcome::Allowed, Reason::Unsegmented), EMPTY),
        (None, Unsegmented::Deny) => (
            verdict_word(outcome(defaults.mode), Reason::Unsegmented),
            EMPTY,
        ),
    }
}

/// What a judged denial of this strength does.
pub(super) fn outcome(mode: Mode) -> Outcome {
    match mode {
        Mode::Enforce => Outcome::Denied,
        Mode::Observe => Outcome::WouldDeny,
        Mode::Off => Outcome::Off,
    }
}
