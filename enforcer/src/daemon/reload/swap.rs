//! What was compiled is put in force, or on trial, and noted.

use std::path::Path;

use super::*;
use crate::{api::types::RefusalCode, dataplane::Dataplane};

impl Reloads {
    /// Swaps the image. On error the one in force stays, and the log and the board say why.
    pub async fn finish(&mut self, done: Done) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        if let Some((proposal, answer)) = running.proposal.take() {
            let result = match done.0 {
                Ok(Output::Proposal(Ok(found))) => {
                    let (loaded, state) = *found;
                    self.decide(&proposal, loaded, state, &running.environment)
                        .await
                }
                Ok(Output::Proposal(Err(refused))) => Err(refused),
                Ok(_) => Err(internal("other work was done")),
                Err(error) => Err(internal(&error)),
            };
            if let Err(refused) = &result {
                self.note_refusal(&proposal, refused).await;
            }
            drop(spawn_blocking(release_memory));
            // The client may have left.
            let _ = answer.send(result);
            return;
        }
        let (tried, result, settings_only) = match done.0 {
            Ok(Output::SameFiles | Output::Proposal(_)) => return,
            Ok(Output::Host(meaning, image)) => {
                let result = match image {
                    Ok(image) => self.swap(running.cause, meaning, image).await,
                    Err(error) => Err(Failure::Rejected(Rejected::Compile(error))),
                };
                self.rest.begin(Instant::now(), running.since.elapsed());
                self.fitted(running.environment, result.map(drop));
                return;
            }
            // The trial that they were for has ended.
            Ok(Output::Both(_)) if self.trial.is_none() => return,
            Ok(Output::Both(images)) => {
                let result = match images {
                    Ok(images) => self.swap_both(images, &running.environment).await,
                    Err(error) => Err(Failure::Rejected(Rejected::Compile(error))),
                };
                self.rest.begin(Instant::now(), running.since.elapsed());
                self.fitted(running.environment, result);
                return;
            }
            Ok(Output::Files {
                tried,
                result,
                settings_only,
            }) => {
                let result = result.map_err(Failure::Rejected);
                (tried, result, settings_only)
            }
            Err(error) => (self.tried.take(), Err(Failure::Crashed(error)), false),
        };
        self.tried = tried;
        let result = self.take_watched(&running, result, settings_only).await;
        let error = result.as_ref().err().map(Failure::summary);
        if let (Some(summary), Err(failure)) = (&error, &result) {
            tracing::error!(
                cause = running.cause,
                error = summary,
                generation = self.shared.live().image.generation(),
                "refused, what was in force before stays"
            );
            failure.log();
            let by = running.asks.first().map(|(by, _)| (**by).clone());
            let mut note = self.note(ChangeKind::Reload, by, self.sources.segments.clone());
            note.cause = Some(running.cause.to_owned()).filter(|_| note.by.is_none());
            note.error = Some(summary.clone());
            self.shared.changes.change(|journal| journal.refuse(note));
        }
        self.shared.note(|board| board.last_error = error);
        self.note_origin();
        // Nobody waits for it.
        drop(spawn_blocking(release_memory));
        let answer = result.map_err(|failure| Refused::rejected(failure.render()));
        for (_, ask) in running.asks {
            // The client may have left.
            let _ = ask.send(answer.clone());
        }
    }

    /// The watched files say something else than before, or somebody wants them again.
    async fn take_watched(
        &mut self,
        running: &Running,
        result: Result<Loaded, Failure>,
        settings_only: bool,
    ) -> Result<Reloaded, Failure> {
        let loaded = result?;
        log_warnings(&loaded.warnings);
        let (kind, path) = if settings_only {
            (self.origin.kind, PathBuf::from(&self.origin.path))
        } else {
            (OriginKind::Watched, self.sources.segments.clone())
        };
        let texts = loaded.texts.clone();
        let (meaning, image) = self.meaning(loaded, path.clone());
        let reloaded = self.swap(running.cause, meaning, image).await?;
        self.now_for(&running.environment);
        if texts != self.texts || kind != self.origin.kind {
            let by = running.asks.first().map(|(by, _)| (**by).clone());
            let mut note = self.note(ChangeKind::Reload, by, path);
            note.cause = Some(running.cause.to_owned()).filter(|_| note.by.is_none());
            note.meaning = Some(self.measure());
            self.took(note, kind, texts, None);
        }
        self.save_image();
        Ok(reloaded)
    }

    fn fitted(&mut self, environment: Environment, result: Result<(), Failure>) {
        match result {
            Ok(()) => {
                self.environment = environment;
                self.save_image();
            }
            Err(failure) => {
                let error = failure.summary();
                tracing::error!(
                    error,
                    "the policy in force cannot follow this host's addresses and interfaces"
                );
                self.unfit = Some((environment, Instant::now(), error));
            }
        }
    }

    /// What somebody asked for was compiled.
    async fn decide(
        &mut self,
        proposal: &Proposal,
        loaded: Loaded,
        state: Option<u64>,
        environment: &Environment,
    ) -> Result<Changed, Refused> {
        let content = Content::of(&loaded.texts).whole();
        if proposal
            .content
            .as_ref()
            .is_some_and(|shown| *shown != content)
        {
            let error = "the files have changed since they were looked at: look again";
            return Err(Refused::conflict(error));
        }
        let path = match (&proposal.what, state) {
            (What::Path(path), _) => path.clone(),
            (What::State(_), state) => self.path_of(state),
        };
        let warnings = loaded.warnings.iter();
        let warnings = warnings.map(|w| format!("{}:{}: {}", w.file, w.line, w.message));
        let mut answer = Changed {
            change: None,
            changed: loaded.image.hash() != self.shared.live().image.hash(),
            generation: self.shared.live().image.generation(),
            path: path.display().to_string(),
            hash: format!("{:016x}", loaded.image.hash()),
            segments: loaded.policy.segments.len(),
            rules: loaded.policy.rules.len(),
            content,
            dry_run: proposal.dry_run,
            trial: None,
            warnings: warnings.collect(),
        };
        if proposal.dry_run {
            return Ok(answer);
        }
        let texts = loaded.texts.clone();
        let (meaning, image) = self.meaning(loaded, path.clone());
        let (kind, origin) = match &proposal.what {
            What::Path(path) if self.is_watched(path) => {
                self.tried = Some(texts.clone());
                (ChangeKind::Apply, OriginKind::Watched)
            }
            What::Path(_) => (ChangeKind::Apply, OriginKind::Applied),
            What::State(_) => (ChangeKind::Rollback, OriginKind::RolledBack),
        };
        let mut note = self.note(kind, Some((*proposal.by).clone()), path);
        note.message.clone_from(&proposal.message);
        let failed = |failure: Failure| Refused {
            code: RefusalCode::Internal,
            error: failure.render(),
        };
        if let Some(within) = proposal.within.filter(|_| answer.changed) {
            let material = (texts, state);
            self.try_out(note, origin, meaning, image, material, within, environment)
                .await?;
            answer.trial = self.trial.as_ref().map(Trial::status);
            answer.change = self.trial.as_ref().map(Trial::change);
        } else {
            self.swap("request", meaning, image).await.map_err(failed)?;
            self.now_for(environment);
            note.meaning = Some(self.measure());
            self.took(note, origin, texts, state);
            self.save_image();
            self.shared.note(|board| board.notice = None);
            answer.change = self.origin.change;
            let unkept = self.shared.changes.persist().await;
            answer.warnings.extend(unkept);
        }
        self.note_origin();
        answer.generation = self.shared.live().image.generation();
        tracing::info!(by = %proposal.by, path = answer.path, "applied as somebody asked");
        Ok(answer)
    }

    /// Notes what is in force for good.
    fn took(&mut self, note: Note, kind: OriginKind, texts: Texts, state: Option<u64>) {
        let watched = self.tried.as_ref().map(Content::of);
        let changes = &self.shared.changes;
        self.origin = changes.keep(&texts, |journal| {
            let material = state.map_or(Material::Texts(&texts), Material::State);
            journal.take(note, kind, material, watched)
        });
        self.texts = texts;
    }

    /// The one in force is what the next start begins with.
    pub(super) fn save_image(&self) {
        if self.trial.is_none() && self.origin.kind != OriginKind::PassAll {
            let live = self.shared.live();
            let changes = &self.shared.changes;
            changes.save_image(&live.image, &self.environment);
        }
    }

    /// A change, before anything is known about it.
    pub(super) fn note(&self, kind: ChangeKind, by: Option<Named>, path: PathBuf) -> Note {
        Note {
            kind,
            by,
            cause: None,
            path: path.display().to_string(),
            message: None,
            error: None,
            meaning: None,
            confirm_within: None,
        }
    }

    /// The policy in force in numbers.
    pub(super) fn measure(&self) -> Measure {
        measure(&self.shared.live())
    }

    pub(super) async fn note_refusal(&self, proposal: &Proposal, refused: &Refused) {
        tracing::warn!(by = %proposal.by, error = refused.error, "refused what somebody asked for");
        if proposal.dry_run {
            return;
        }
        let (kind, path) = match &proposal.what {
            What::Path(path) => (ChangeKind::Apply, path.clone()),
            What::State(_) => (ChangeKind::Rollback, PathBuf::new()),
        };
        let mut note = self.note(kind, Some((*proposal.by).clone()), path);
        note.message.clone_from(&proposal.message);
        note.error = Some(refused.error.trim_end().to_owned());
        note.confirm_within = proposal.within.map(|within| within.as_secs());
        // Those of a trial that could not begin are noted there.
        if refused.code != RefusalCode::Internal || proposal.within.is_none() {
            self.shared.changes.change(|journal| journal.refuse(note));
            self.shared.changes.persist().await;
        }
    }

    fn is_watched(&self, path: &Path) -> bool {
        std::path::absolute(&self.sources.segments).is_ok_and(|watched| watched == path)
    }

    fn path_of(&self, state: Option<u64>) -> PathBuf {
        let kept = |state| {
            self.shared.changes.read(|journal| {
                let kept = journal.states().get(&state);
                kept.map(|kept| PathBuf::from(&kept.path))
            })
        };
        state.and_then(kept).unwrap_or_default()
    }

    fn meaning(&self, loaded: Loaded, path: PathBuf) -> (Meaning, Image) {
        let from_file = loaded.texts.settings.is_some();
        let settings = self.sources.settings.as_ref().filter(|_| from_file);
        let meaning = Meaning {
            path,
            policy: Arc::new(loaded.policy),
            settings: Arc::new(loaded.settings),
            settings_path: settings.map(|settings| settings.path.clone()),
        };
        (meaning, loaded.image)
    }

    /// What is in force was compiled for this host.
    pub(super) fn now_for(&mut self, environment: &Environment) {
        self.environment = Meaning::of(&self.shared.live()).relevant(environment);
    }

    /// Puts on the board where the policy in force came from.
    pub(super) fn note_origin(&self) {
        let mut origin = self.origin.clone();
        origin.differs = self.tried.as_ref().map(|tried| !tried.same(&self.texts));
        let trial = self.trial.as_ref().map(Trial::on_board);
        self.shared.note(|board| {
            board.origin = Some(origin);
            board.trial = trial;
        });
    }

    /// Never 0, and never again, even if this one fails.
    pub(super) fn next_generation(&mut self) -> u32 {
        self.generation = self.generation.wrapping_add(1).max(1);
        self.generation
    }

    /// Asks the kernel something, beside the control task.
    pub(super) async fn kernel<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut dyn Dataplane) -> Result<T, DataplaneError> + Send + 'static,
    ) -> Result<T, Failure> {
        let dataplane = Arc::clone(&self.shared.dataplane);
        let asked = spawn_blocking(move || {
            let mut dataplane = dataplane.lock().unwrap_or_else(PoisonError::into_inner);
            work(&mut **dataplane)
        });
        let asked = asked.await;
        let asked = asked.map_err(|error| Failure::Crashed(error.to_string()))?;
        asked.map_err(Failure::Dataplane)
    }

    async fn swap(
        &mut self,
        cause: &'static str,
        meaning: Meaning,
        image: Image,
    ) -> Result<Reloaded, Failure> {
        let live = self.shared.live();
        if image.hash() == live.image.hash() {
            let generation = live.image.generation();
            tracing::info!(cause, generation, "policy unchanged");
            // Names, lines and descriptions may have changed all the same.
            let policy = Arc::clone(&meaning.policy);
            self.shared.generations.insert(generation, policy);
            let image = live.image.clone();
            self.shared.set_live(meaning.live(image, live.loaded_at));
            return Ok(Reloaded {
                changed: false,
                generation,
            });
        }
        let generation = self.next_generation();
        let image = image.with_generation(generation);
        let generations = Arc::clone(&self.shared.generations);
        // Before the swap: the first denial may come at once.
        generations.insert(generation, Arc::clone(&meaning.policy));
        let applied = self.kernel(move |kernel| kernel.apply(&image).map(|()| image));
        let image = applied
            .await
            .inspect_err(|_| generations.remove(generation))?;
        let live = meaning.live(image, Time::now());
        tracing::info!(
            cause,
            generation,
            segments = live.policy.segments.len(),
            rules = live.policy.rules.len(),
            hash = format!("{:016x}", live.image.hash()),
            "policy in force"
        );
        self.shared.set_live(live);
        Ok(Reloaded {
            changed: true,
            generation,
        })
    }
}

impl Meaning {
    /// With the image that the kernel has.
    pub(super) fn live(self, image: Image, loaded_at: Time) -> Live {
        Live {
            path: self.path,
            policy: self.policy,
            known: true,
            settings: self.settings,
            settings_path: self.settings_path,
            image,
            loaded_at,
        }
    }
}

/// A policy in numbers.
pub fn measure(live: &Live) -> Measure {
    Measure {
        hash: format!("{:016x}", live.image.hash()),
        segments: live.policy.segments.len(),
        rules: live.policy.rules.len(),
        generation: live.image.generation(),
    }
}

/// The texts of an earlier state: of a change, or the one before that in force.
pub(super) fn earlier(shared: &Shared, number: Option<u64>) -> Result<(Texts, u64), Refused> {
    let state = shared.changes.read(|journal| match number {
        Some(number) => journal.state_of(number),
        None => journal.before(),
    });
    let missing = || {
        let error = match number {
            Some(number) => format!(
                "no state of change {number} is kept: `enforcer history` shows those that are"
            ),
            None => "there is no state before the one in force".to_owned(),
        };
        Refused {
            code: RefusalCode::BadRequest,
            error,
        }
    };
    let state = state.ok_or_else(missing)?;
    let texts = shared.changes.texts(state);
    let texts = texts.map_err(|error| Refused {
        code: RefusalCode::Internal,
        error,
    })?;
    Ok((texts, state))
}

fn internal(error: &str) -> Refused {
    Refused {
        code: RefusalCode::Internal,
        error: format!("internal error: {error}"),
    }
}
