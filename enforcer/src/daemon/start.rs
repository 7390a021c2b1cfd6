//! What the daemon begins with: the watched files, what was applied since, or what was good last.

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{
    api::{
        changes::{ChangeKind, Origin, OriginKind},
        types::Time,
    },
    compile::Image,
    dataplane::{Adopted, Dataplane, DataplaneError},
    events::Generations,
    policy::{Diagnostic, SourceFile, model::Environment},
};

use super::{
    adopt::Before,
    files::{self, Sources, Texts},
    load::{self, Loaded, Memory, Rejected},
    progress::Progress,
    reload::{Begun, Previous, measure},
    state::Live,
    store::{Content, Force, Material, Note, PASS_ALL, Store},
};

/// A policy under which everything passes: what a first trial goes back to.
const OPEN: &str = "version: 1\ndefaults: {unsegmented: allow}\n";
/// Where a policy was read that an earlier daemon has left in the kernel.
const UNKNOWN: &str = "(not known)";
/// Why a trial ended that could not go back.
const LOST: &str = "somebody has unpinned the image before it: the policy was read anew";

/// What to put in force.
pub struct Chosen {
    loaded: Loaded,
    path: PathBuf,
    kind: OriginKind,
    /// Whether the policy is what the image was made of.
    known: bool,
    /// What is in force by the journal, and stays so.
    force: Option<Force>,
    watched: Option<Texts>,
    /// Why it is not what the watched files say.
    error: Option<String>,
    /// What comes back: of a trial that goes on, or of one that begins.
    previous: Option<Box<(Loaded, Option<Force>)>>,
    /// How long.
    trial: Option<OnStart>,
}

impl Chosen {
    /// What was in force stays, whatever it is.
    pub fn unknown(loaded: Loaded, before: &Before) -> Self {
        Self {
            loaded,
            path: PathBuf::from(UNKNOWN),
            kind: OriginKind::LastGood,
            known: false,
            force: None,
            watched: None,
            error: before.refused.as_ref().map(Rejected::summary),
            previous: None,
            trial: None,
        }
    }

    /// The image that is to be in force.
    pub fn image(&self) -> &Image {
        &self.loaded.image
    }

    /// Words that the larger of its images has.
    pub fn words(&self) -> usize {
        let previous = self
            .previous
            .iter()
            .map(|previous| previous.0.image.words().len());
        previous.fold(self.loaded.image.words().len(), usize::max)
    }

    /// What the author of the policy should look at.
    pub fn warnings(&self) -> &[Diagnostic] {
        &self.loaded.warnings
    }
}

#[derive(Clone, Copy)]
enum OnStart {
    Begins(Duration),
    GoesOn(Duration),
}

/// Finds out what became of a trial that the last daemon left behind. Answers with the time that
/// it has left; otherwise it is over, and noted.
///
/// # Errors
/// When the kernel does not answer.
pub fn trial(before: &mut Before, changes: &Store) -> Result<Option<Duration>, DataplaneError> {
    let pending = changes.read(|journal| journal.trial().cloned());
    let on = match &before.dataplane {
        Some(dataplane) => dataplane.on_trial()?,
        None => None,
    };
    let left = on.map(|on| on.remaining).filter(|left| !left.is_zero());
    let known = pending
        .as_ref()
        .is_some_and(|p| changes.texts(p.force.state).is_ok());
    if let (Some(left), true) = (left, known) {
        tracing::warn!(left = left.as_secs(), "a policy is on trial");
        return Ok(Some(left));
    }
    let mut lost = false;
    if on.is_some() {
        // Nobody knows what is on trial, or the deadline has passed.
        lost = revert(before)?;
    }
    let Some(pending) = pending else {
        return Ok(None);
    };
    let (change, live) = (pending.change, before.adopted.live.as_ref());
    if on.is_none() && live.is_some_and(|live| live.generation() == pending.generation) {
        tracing::warn!(change, "the trial was confirmed, and that was not noted");
        changes.change(|journal| journal.confirm(None));
        return Ok(None);
    }
    let cause = match on {
        Some(_) if lost => LOST,
        Some(_) if left.is_none() => "the deadline passed",
        Some(_) => "the texts of what was on trial are gone",
        None => "the kernel knows nothing of it any more",
    };
    tracing::warn!(change, cause, "the trial was taken back");
    changes.change(|journal| journal.revert(None, Some(cause.to_owned())));
    Ok(None)
}

/// Ends a trial that cannot be gone on with.
///
/// # Errors
/// What the kernel says.
pub fn give_up(before: &mut Before, changes: &Store) -> Result<(), DataplaneError> {
    let lost = revert(before)?;
    let cause = match lost {
        true => LOST,
        false => "what is on trial cannot be compiled any more",
    };
    tracing::error!(cause, "the trial was taken back");
    changes.change(|journal| journal.revert(None, Some(cause.to_owned())));
    Ok(())
}

/// What was before the trial is in force again; or else, if the answer is yes, the kernel's own way back
/// is all there is, until the policy has been read and takes over.
fn revert(before: &mut Before) -> Result<bool, DataplaneError> {
    let Some(dataplane) = &mut before.dataplane else {
        return Ok(false);
    };
    match dataplane.revert() {
        Err(error @ DataplaneError::LostPrevious) => {
            tracing::error!(
                %error,
                "the programs judge as they did until the policy is read and takes over"
            );
            // It is not what judges.
            before.adopted.live = None;
            Ok(true)
        }
        reverted => {
            reverted?;
            before.adopted = dataplane.adopted()?.unwrap_or_default();
            Ok(false)
        }
    }
}

/// Reads, chooses and compiles. `left` is what a trial that goes on has left, `within` how long a
/// trial is that begins now.
///
/// # Errors
/// [`Rejected`], when there is nothing good, and never was.
pub fn choose(
    sources: &Sources,
    changes: &Store,
    environment: &Environment,
    left: Option<Duration>,
    within: Option<Duration>,
    progress: &Progress,
) -> Result<Chosen, Rejected> {
    let desk = Desk {
        sources,
        changes,
        environment,
        progress,
    };
    if let Some(left) = left {
        return desk.resume(left);
    }
    let mut chosen = desk.choose()?;
    let good = chosen.error.is_none() && chosen.kind == OriginKind::Watched;
    let new = match changes.read(|journal| journal.force().cloned()) {
        Some(force) => changes.read(|journal| {
            let kept = journal.states().get(&force.state);
            kept.is_none_or(|kept| kept.content != Content::of(&chosen.loaded.texts))
        }),
        None => true,
    };
    if let Some(within) = within.filter(|_| good && new) {
        chosen.previous = Some(desk.before()?);
        chosen.trial = Some(OnStart::Begins(within));
    }
    Ok(chosen)
}

struct Desk<'a> {
    sources: &'a Sources,
    changes: &'a Store,
    environment: &'a Environment,
    progress: &'a Progress,
}

impl Desk<'_> {
    fn compile(&self, texts: Texts) -> Result<Loaded, Rejected> {
        load::compile_again(
            texts,
            self.environment,
            &mut Memory::default(),
            self.progress,
        )
    }

    fn force(&self) -> Option<Force> {
        self.changes.read(|journal| journal.force().cloned())
    }

    fn choose(&self) -> Result<Chosen, Rejected> {
        let watched = match files::read_all(self.sources) {
            Ok(texts) => texts,
            Err(error) => return self.last_good(None, Rejected::Files(error)),
        };
        if let Some(chosen) = self.applied(&watched) {
            return Ok(chosen);
        }
        match self.compile(watched.clone()) {
            Ok(loaded) => Ok(Chosen {
                path: self.sources.segments.clone(),
                kind: OriginKind::Watched,
                known: true,
                force: self.force().filter(|force| self.same(force, &loaded.texts)),
                loaded,
                watched: Some(watched),
                error: None,
                previous: None,
                trial: None,
            }),
            Err(rejected) => self.last_good(Some(watched), rejected),
        }
    }

    /// Whether the journal has this in force already, from the watched files.
    fn same(&self, force: &Force, texts: &Texts) -> bool {
        let kept = self
            .changes
            .read(|journal| journal.states().get(&force.state).cloned());
        force.origin.kind == OriginKind::Watched
            && kept.is_some_and(|kept| {
                let path = self.sources.segments.display().to_string();
                kept.path == path && kept.content == Content::of(texts)
            })
    }

    /// What somebody applied, unless the watched policy was edited since.
    fn applied(&self, watched: &Texts) -> Option<Chosen> {
        let force = self.force()?;
        let seen = force.watched.as_ref()?;
        let now = Content::of(watched);
        let elsewhere = force.origin.kind != OriginKind::Watched;
        if !elsewhere || seen.policy != now.policy {
            return None;
        }
        let kept = self.changes.texts(force.state).inspect_err(|error| {
            tracing::error!(
                error,
                "what was applied is lost, the watched files take its place"
            );
        });
        let kept = kept.ok()?;
        let same_settings = seen.settings == now.settings;
        let texts = Texts {
            policy: kept.policy,
            settings: if same_settings {
                kept.settings
            } else {
                watched.settings.clone()
            },
        };
        let loaded = self.compile(texts).inspect_err(|rejected| {
            tracing::error!(
                error = rejected.summary(),
                "what was applied cannot be used any more, the watched files take its place"
            );
        });
        Some(Chosen {
            loaded: loaded.ok()?,
            path: PathBuf::from(&force.origin.path),
            kind: force.origin.kind,
            known: true,
            force: Some(force).filter(|_| same_settings),
            watched: Some(watched.clone()),
            error: None,
            previous: None,
            trial: None,
        })
    }

    /// What was in force when the watched files were good.
    fn last_good(&self, watched: Option<Texts>, rejected: Rejected) -> Result<Chosen, Rejected> {
        let Some(force) = self.force() else {
            return Err(rejected);
        };
        let texts = match self.changes.texts(force.state) {
            Ok(texts) => texts,
            Err(error) => {
                tracing::error!(error, "the last good policy is lost");
                return Err(rejected);
            }
        };
        let Ok(loaded) = self.compile(texts) else {
            return Err(rejected);
        };
        let error = rejected.summary();
        tracing::error!(
            error,
            of = force.origin.path,
            "the watched files cannot be used: the last good policy is in force"
        );
        Ok(Chosen {
            loaded,
            path: PathBuf::from(&force.origin.path),
            kind: OriginKind::LastGood,
            known: true,
            force: Some(force),
            watched,
            error: Some(error),
            previous: None,
            trial: None,
        })
    }

    /// A trial that the last daemon left behind goes on.
    fn resume(&self, left: Duration) -> Result<Chosen, Rejected> {
        let pending = self.changes.read(|journal| journal.trial().cloned());
        let texts = pending.as_ref().map(|p| self.changes.texts(p.force.state));
        let (Some(pending), Some(Ok(texts))) = (pending, texts) else {
            // Looked at a moment ago.
            return self.choose();
        };
        Ok(Chosen {
            loaded: self.compile(texts)?,
            path: PathBuf::from(&pending.force.origin.path),
            kind: pending.force.origin.kind,
            known: true,
            force: Some(pending.force),
            watched: files::read_all(self.sources).ok(),
            error: None,
            previous: Some(self.before()?),
            trial: Some(OnStart::GoesOn(left)),
        })
    }

    /// What a trial goes back to.
    fn before(&self) -> Result<Box<(Loaded, Option<Force>)>, Rejected> {
        let force = self.force();
        let texts = force.as_ref().map(|force| self.changes.texts(force.state));
        let (texts, force) = match texts {
            Some(Ok(texts)) => (texts, force),
            Some(Err(_)) | None => (open_texts(), None),
        };
        Ok(Box::new((self.compile(texts)?, force)))
    }
}

fn open_texts() -> Texts {
    let file = SourceFile {
        name: "pass-all.yaml".to_owned(),
        text: OPEN.to_owned(),
    };
    Texts {
        policy: vec![file].into(),
        settings: None,
    }
}

/// What is in force now.
pub struct Started {
    /// The policy.
    pub live: Live,
    /// The rest.
    pub begun: Begun,
    /// Why it is not what the watched files say.
    pub error: Option<String>,
}

/// Puts in force what was chosen, unless it is so already, and notes it.
///
/// # Errors
/// [`DataplaneError`]; what was in force stays then.
pub async fn put_in_force(
    dataplane: &mut dyn Dataplane,
    changes: &Store,
    generations: &Generations,
    sources: &Sources,
    environment: Environment,
    chosen: Chosen,
    adopted: &Adopted,
) -> Result<Started, DataplaneError> {
    let last = changes.read(|journal| journal.generation);
    let saved = changes.saved_image();
    let saved = saved.map_or(0, |saved| saved.image.generation());
    let mut generation = last.max(saved).max(adopted.generation);
    let mut next = |image: Image| {
        generation = generation.wrapping_add(1).max(1);
        image.with_generation(generation)
    };
    let live = |loaded: Loaded, path: PathBuf, image: Image| {
        let settings = sources.settings.as_ref();
        let settings = settings.filter(|_| loaded.texts.settings.is_some());
        let live = Live {
            path,
            settings_path: settings.map(|settings| settings.path.clone()),
            policy: Arc::new(loaded.policy),
            known: true,
            settings: Arc::new(loaded.settings),
            image,
            loaded_at: Time::now(),
        };
        (live, loaded.texts, loaded.memory)
    };
    let Chosen {
        loaded,
        path,
        kind,
        known,
        force,
        watched,
        error,
        previous,
        trial,
    } = chosen;
    let previous = previous.map(|previous| {
        let (loaded, force) = *previous;
        let image = next(loaded.image.clone());
        let path = force.as_ref().map_or(PASS_ALL, |force| &force.origin.path);
        let (live, texts, _) = live(loaded, path.into(), image);
        let policy = Arc::clone(&live.policy);
        generations.insert(live.image.generation(), policy);
        let origin = force.map_or_else(pass_all, |force| force.origin);
        (live, texts, origin)
    });
    let in_force = adopted.live.as_ref().filter(|_| trial.is_none());
    let in_force = in_force.filter(|live| live.hash() == loaded.image.hash());
    let image = match in_force {
        Some(image) => image.clone(),
        None => next(loaded.image.clone()),
    };
    let (mut live, texts, memory) = live(loaded, path, image);
    live.known = known;
    if known {
        generations.insert(live.image.generation(), Arc::clone(&live.policy));
    }
    let note = Note {
        kind: ChangeKind::Start,
        by: None,
        cause: None,
        path: live.path.display().to_string(),
        message: None,
        error: error.clone(),
        meaning: Some(measure(&live)),
        confirm_within: None,
    };
    let seen = watched.as_ref().map(Content::of);
    let remaining;
    let origin = match (trial, &previous) {
        (Some(OnStart::Begins(within)), Some((before, ..))) => {
            remaining = within;
            let note = Note {
                confirm_within: Some(within.as_secs()),
                ..note
            };
            let deadline = Time::after(within);
            let origin = changes.keep(&texts, |journal| {
                journal.begin(note, kind, Material::Texts(&texts), seen, deadline)
            });
            // First the memory: a daemon that begins anew must find out what is on trial.
            if let Some(unkept) = changes.persist().await {
                tracing::warn!("{unkept}");
            }
            if let Err(error) = dataplane.trial(&live.image, Some(&before.image), within) {
                changes.change(|journal| journal.abandon(&error.to_string()));
                return Err(error);
            }
            tracing::warn!(%deadline, "on trial: `enforcer confirm` keeps it");
            origin
        }
        (Some(OnStart::GoesOn(left)), Some((before, ..))) => {
            remaining = left;
            dataplane.apply_both(&before.image, &live.image)?;
            let generation = live.image.generation();
            changes.change(|journal| {
                journal.follow(generation);
                journal.go_on(note);
            });
            force.map_or_else(pass_all, |force| force.origin)
        }
        (Some(_) | None, _) => {
            remaining = Duration::ZERO;
            if in_force.is_none() {
                dataplane.apply(&live.image)?;
            }
            let origin = match force {
                None if !known => {
                    changes.change(|journal| journal.refuse(note));
                    Origin {
                        kind,
                        path: UNKNOWN.to_owned(),
                        ..pass_all()
                    }
                }
                Some(force) => {
                    changes.change(|journal| journal.go_on(note));
                    Origin {
                        kind,
                        ..force.origin
                    }
                }
                None => changes.keep(&texts, |journal| {
                    journal.take(note, kind, Material::Texts(&texts), seen)
                }),
            };
            if known {
                changes.save_image(&live.image, &environment);
            }
            origin
        }
    };
    let previous = previous.map(|(live, texts, origin)| Previous {
        live: Arc::new(live),
        texts,
        origin,
        environment: environment.clone(),
        remaining,
    });
    Ok(Started {
        live,
        begun: Begun {
            watched,
            texts,
            origin,
            memory,
            environment,
            generation,
            previous,
        },
        error,
    })
}

fn pass_all() -> Origin {
    Origin {
        kind: OriginKind::PassAll,
        path: PASS_ALL.to_owned(),
        change: None,
        state: None,
        by: None,
        at: Time::now(),
        differs: None,
    }
}
