//! What happened, what is in force, what is on trial, and which states can come back. No I/O.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::format::Content;
use crate::{
    api::{
        changes::{Change, ChangeKind, ChangeOutcome, Origin, OriginKind},
        peer::Named,
        types::Time,
    },
    daemon::files::Texts,
};

/// Lines of the history, and bytes of all of them.
const CHANGES: usize = 500;
const CHANGES_BYTES: usize = 512 << 10;
/// Bytes of an error in the history.
const ERROR: usize = 4 << 10;
/// States that can come back, and bytes of their texts; those in force or on trial in any case.
const STATES: usize = 20;
const STATES_BYTES: u64 = 128 << 20;

/// A state and how it came to be in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Force {
    /// Its number.
    pub state: u64,
    /// Where it came from.
    pub origin: Origin,
    /// What the watched files said then, if they could be read.
    pub watched: Option<Content>,
}

/// A trial that nobody has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// Number of the change.
    pub change: u64,
    /// What is on trial.
    pub force: Force,
    /// Generation of its image.
    pub generation: u32,
    /// When it began.
    pub since: Time,
    /// When it ends, by the clock on the wall; the kernel has one of its own.
    pub deadline: Time,
}

/// Texts that are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// What they say.
    pub content: Content,
    /// How much.
    pub bytes: u64,
    /// Where they were read.
    pub path: String,
}

/// A change to be noted.
#[derive(Clone, Debug)]
pub struct Note {
    /// What was done.
    pub kind: ChangeKind,
    /// Who asked for it.
    pub by: Option<Named>,
    /// Why, where nobody asked.
    pub cause: Option<String>,
    /// Where the policy was read.
    pub path: String,
    /// What somebody had to say.
    pub message: Option<String>,
    /// Why it is not what was asked for.
    pub error: Option<String>,
    /// What its image is.
    pub meaning: Option<Measure>,
    /// Of trials, in seconds.
    pub confirm_within: Option<u64>,
}

/// An image in numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measure {
    /// Content hash, 16 hex digits.
    pub hash: String,
    /// Segments of the policy.
    pub segments: usize,
    /// Rules of the policy.
    pub rules: usize,
    /// Generation of the image.
    pub generation: u32,
}

/// Texts to keep, or a state that is kept already.
pub enum Material<'a> {
    /// These.
    Texts(&'a Texts),
    /// That one.
    State(u64),
}

/// The whole memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// The largest generation that was given to an image.
    pub generation: u32,
    /// The last number given.
    last: u64,
    dropped: u64,
    changes: VecDeque<Change>,
    force: Option<Force>,
    /// States that led to the one in force, which is the last.
    line: Vec<u64>,
    trial: Option<Pending>,
    states: BTreeMap<u64, Kept>,
}

impl Journal {
    /// What is in force, or will be when the trial is over and nobody has confirmed it.
    pub fn force(&self) -> Option<&Force> {
        self.force.as_ref()
    }

    /// What is on trial.
    pub fn trial(&self) -> Option<&Pending> {
        self.trial.as_ref()
    }

    /// States that can come back.
    pub fn states(&self) -> &BTreeMap<u64, Kept> {
        &self.states
    }

    /// The history, oldest first.
    pub fn changes(&self) -> Vec<Change> {
        let mut changes: Vec<_> = self.changes.iter().cloned().collect();
        for change in &mut changes {
            change.kept = change.state.is_some_and(|s| self.states.contains_key(&s));
        }
        changes
    }

    /// Lines that the history has lost.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The state that led to the one in force.
    pub fn before(&self) -> Option<u64> {
        self.line.iter().rev().nth(1).copied()
    }

    /// The state that a change, by its number, has put in force.
    pub fn state_of(&self, number: u64) -> Option<u64> {
        let change = self.changes.iter().find(|c| c.number == number);
        let state = change.map_or(Some(number), |change| change.state)?;
        self.states.contains_key(&state).then_some(state)
    }

    /// Something else is in force for good. Answers with where it comes from, and with the number
    /// of the state if it is new.
    pub fn take(
        &mut self,
        note: Note,
        kind: OriginKind,
        material: Material<'_>,
        watched: Option<Content>,
    ) -> (Origin, Option<u64>) {
        let (force, new) = self.prepare(&note, kind, material, watched);
        let origin = force.origin.clone();
        let state = force.state;
        self.push(note, ChangeOutcome::InForce, Some(state), None);
        self.settle(force);
        (origin, new)
    }

    /// Something is on trial.
    pub fn begin(
        &mut self,
        note: Note,
        kind: OriginKind,
        material: Material<'_>,
        watched: Option<Content>,
        deadline: Time,
    ) -> (Origin, Option<u64>) {
        let (force, new) = self.prepare(&note, kind, material, watched);
        let (origin, state) = (force.origin.clone(), force.state);
        let generation = note.meaning.as_ref().map_or(0, |m| m.generation);
        let change = self.push(note, ChangeOutcome::OnTrial, Some(state), None);
        self.trial = Some(Pending {
            change,
            force,
            generation,
            since: origin.at,
            deadline,
        });
        self.evict();
        (origin, new)
    }

    /// The daemon has begun with what was in force, or on trial, before.
    pub fn go_on(&mut self, note: Note) {
        let (outcome, state) = match (&self.trial, &self.force) {
            (Some(trial), _) => (ChangeOutcome::OnTrial, Some(trial.force.state)),
            (None, force) => (ChangeOutcome::InForce, force.as_ref().map(|f| f.state)),
        };
        self.push(note, outcome, state, None);
    }

    /// What is on trial stays.
    pub fn confirm(&mut self, by: Option<Named>) -> Option<u64> {
        let trial = self.trial.take()?;
        let note = self.end(&trial, ChangeKind::Confirm, ChangeOutcome::Confirmed, by);
        let state = trial.force.state;
        let number = self.push(
            note,
            ChangeOutcome::InForce,
            Some(state),
            Some(trial.change),
        );
        self.settle(trial.force);
        Some(number)
    }

    /// What was in force before the trial is so again.
    pub fn revert(&mut self, by: Option<Named>, cause: Option<String>) -> Option<u64> {
        let trial = self.trial.take()?;
        let mut note = self.end(&trial, ChangeKind::Revert, ChangeOutcome::Reverted, by);
        note.cause = cause;
        note.meaning = None;
        let state = self.force.as_ref().map(|force| force.state);
        note.path = match &self.force {
            Some(force) => force.origin.path.clone(),
            None => super::PASS_ALL.to_owned(),
        };
        let number = self.push(note, ChangeOutcome::InForce, state, Some(trial.change));
        self.evict();
        Some(number)
    }

    /// The image on trial is another one.
    pub fn follow(&mut self, generation: u32) {
        self.generation = self.generation.max(generation);
        if let Some(trial) = &mut self.trial {
            trial.generation = generation;
        }
    }

    /// The trial never began.
    pub fn abandon(&mut self, error: &str) {
        let Some(trial) = self.trial.take() else {
            return;
        };
        if let Some(change) = self.changes.iter_mut().find(|c| c.number == trial.change) {
            change.outcome = ChangeOutcome::Refused;
            change.error = Some(shortened(error));
            change.state = None;
        }
        self.evict();
    }

    /// What was in force stays.
    pub fn refuse(&mut self, note: Note) -> u64 {
        self.push(note, ChangeOutcome::Refused, None, None)
    }

    /// The programs were taken off.
    pub fn detached(&mut self, note: Note) -> u64 {
        self.push(note, ChangeOutcome::NotEnforcing, None, None)
    }

    fn prepare(
        &mut self,
        note: &Note,
        kind: OriginKind,
        material: Material<'_>,
        watched: Option<Content>,
    ) -> (Force, Option<u64>) {
        let (state, new) = match material {
            Material::State(state) => (state, None),
            Material::Texts(texts) => {
                let content = Content::of(texts);
                match self.known(&content, &note.path) {
                    Some(state) => (state, None),
                    None => {
                        let state = self.last + 1;
                        let kept = Kept {
                            content,
                            bytes: size(texts),
                            path: note.path.clone(),
                        };
                        self.states.insert(state, kept);
                        (state, Some(state))
                    }
                }
            }
        };
        let origin = Origin {
            kind,
            path: note.path.clone(),
            change: Some(self.last + 1),
            state: Some(state),
            by: note.by.clone(),
            at: Time::now(),
            differs: None,
        };
        let force = Force {
            state,
            origin,
            watched,
        };
        (force, new)
    }

    /// Whether these texts are what is in force.
    fn known(&self, content: &Content, path: &str) -> Option<u64> {
        let state = self.force.as_ref()?.state;
        let kept = self.states.get(&state)?;
        (kept.content == *content && kept.path == path).then_some(state)
    }

    fn settle(&mut self, force: Force) {
        let known = self.line.iter().position(|state| *state == force.state);
        match known {
            Some(position) => self.line.truncate(position + 1),
            None => self.line.push(force.state),
        }
        self.force = Some(force);
        self.evict();
    }

    fn end(
        &mut self,
        trial: &Pending,
        kind: ChangeKind,
        outcome: ChangeOutcome,
        by: Option<Named>,
    ) -> Note {
        let change = self.changes.iter_mut().find(|c| c.number == trial.change);
        let mut meaning = None;
        if let Some(change) = change {
            change.outcome = outcome;
            meaning = change.hash.clone().map(|hash| Measure {
                hash,
                segments: change.segments.unwrap_or(0),
                rules: change.rules.unwrap_or(0),
                generation: change.generation.unwrap_or(0),
            });
        }
        Note {
            kind,
            by,
            cause: None,
            path: trial.force.origin.path.clone(),
            message: None,
            error: None,
            meaning,
            confirm_within: None,
        }
    }

    fn push(
        &mut self,
        note: Note,
        outcome: ChangeOutcome,
        state: Option<u64>,
        of: Option<u64>,
    ) -> u64 {
        self.last += 1;
        let meaning = note.meaning;
        if let Some(meaning) = &meaning {
            self.generation = self.generation.max(meaning.generation);
        }
        let (segments, rules) = meaning.as_ref().map(|m| (m.segments, m.rules)).unzip();
        self.changes.push_back(Change {
            number: self.last,
            time: Time::now(),
            kind: note.kind,
            by: note.by,
            cause: note.cause,
            outcome,
            path: note.path,
            generation: meaning.as_ref().map(|m| m.generation),
            hash: meaning.map(|m| m.hash),
            segments,
            rules,
            state,
            kept: false,
            confirm_within: note.confirm_within,
            of,
            message: note.message,
            error: note.error.as_deref().map(shortened),
        });
        self.bound();
        self.last
    }

    fn bound(&mut self) {
        let length = |change: &Change| serde_json::to_vec(change).map_or(0, |json| json.len());
        let mut bytes: usize = self.changes.iter().map(length).sum();
        while self.changes.len() > CHANGES || bytes > CHANGES_BYTES {
            let Some(oldest) = self.changes.pop_front() else {
                break;
            };
            bytes -= length(&oldest);
            self.dropped += 1;
        }
    }

    /// Lets the oldest states go when there are too many, but none that may judge.
    fn evict(&mut self) {
        let force = self.force.as_ref().map(|force| force.state);
        let trial = self.trial.as_ref().map(|trial| trial.force.state);
        let mut bytes: u64 = self.states.values().map(|kept| kept.bytes).sum();
        while self.states.len() > STATES || bytes > STATES_BYTES {
            let mut old = self.states.iter();
            let old = old.find(|(state, _)| ![force, trial].contains(&Some(**state)));
            let Some((state, kept)) = old.map(|(state, kept)| (*state, kept.bytes)) else {
                break;
            };
            bytes -= kept;
            self.states.remove(&state);
        }
        let states = &self.states;
        self.line.retain(|state| states.contains_key(state));
    }

    /// Only these states are still there.
    pub(super) fn retain(&mut self, there: impl Fn(u64) -> bool) {
        self.states.retain(|state, _| there(*state));
        let states = &self.states;
        self.line.retain(|state| states.contains_key(state));
        // Without its texts it cannot come back.
        if let Some(force) = &self.force
            && !states.contains_key(&force.state)
        {
            self.force = None;
        }
    }
}

fn size(texts: &Texts) -> u64 {
    let files = texts.settings.iter().chain(&*texts.policy);
    files
        .map(|file| (file.name.len() + file.text.len()) as u64)
        .sum()
}

fn shortened(text: &str) -> String {
    if text.len() <= ERROR {
        return text.to_owned();
    }
    format!("{} …", &text[..text.floor_char_boundary(ERROR)])
}
