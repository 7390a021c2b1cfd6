//! A policy on trial: the kernel goes back by itself, and the daemon follows.

use tokio::time::sleep_until;

use super::*;
use crate::{
    api::{changes::TrialStatus, types::RefusalCode},
    dataplane::OnTrial,
};

/// After the kernel's deadline the daemon looks so much later, and as often if that fails.
const MARGIN: Duration = Duration::from_millis(50);
const AGAIN: Duration = Duration::from_secs(1);

/// What comes back when nobody confirms.
pub struct Previous {
    /// The policy.
    pub live: Arc<Live>,
    /// Its texts; none of one that is built in.
    pub texts: Texts,
    /// Where it came from.
    pub origin: Origin,
    /// What it was compiled for.
    pub environment: Environment,
    /// Until then.
    pub remaining: Duration,
}

/// A trial in the kernel.
pub(super) struct Trial {
    previous: Previous,
    status: TrialStatus,
    deadline: Instant,
    /// When to look.
    wake: Instant,
    /// It has ended, and only the kernel has not been tidied up yet.
    over: Option<String>,
}

impl Trial {
    /// One that the journal knows.
    pub fn resumed(previous: Previous, reloads: &Reloads) -> Self {
        let pending = reloads
            .shared
            .changes
            .read(|journal| journal.trial().cloned());
        let deadline = Instant::now() + previous.remaining;
        let status = TrialStatus {
            change: pending.as_ref().map_or(0, |pending| pending.change),
            path: reloads.shared.live().path.display().to_string(),
            by: pending.as_ref().and_then(|p| p.force.origin.by.clone()),
            since: pending.as_ref().map_or_else(Time::now, |p| p.since),
            deadline: pending.map_or_else(Time::now, |pending| pending.deadline),
            remaining_ms: 0,
            previous: previous.live.path.display().to_string(),
        };
        Self {
            previous,
            status,
            deadline,
            wake: deadline + MARGIN,
            over: None,
        }
    }

    pub fn environment(&self) -> &Environment {
        &self.previous.environment
    }

    pub fn meaning(&self) -> Meaning {
        Meaning::of(&self.previous.live)
    }

    pub fn names_interfaces(&self) -> bool {
        let live = &self.previous.live;
        names_interfaces(&live.policy, &live.settings)
    }

    /// Whether there is more than an image.
    pub fn is_known(&self) -> bool {
        self.previous.live.known
    }

    pub fn change(&self) -> u64 {
        self.status.change
    }

    pub fn status(&self) -> TrialStatus {
        remaining(&self.on_board())
    }

    pub fn on_board(&self) -> (TrialStatus, Instant) {
        (self.status.clone(), self.deadline)
    }
}

/// A status of now.
pub fn remaining((status, deadline): &(TrialStatus, Instant)) -> TrialStatus {
    let left = deadline.saturating_duration_since(Instant::now());
    TrialStatus {
        remaining_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
        ..status.clone()
    }
}

impl Reloads {
    /// Why nothing else can be put in force now.
    pub(super) fn on_trial_already(&self) -> Option<Refused> {
        let trial = self.trial.as_ref()?.status();
        let by = trial
            .by
            .as_ref()
            .map_or("the daemon".to_owned(), ToString::to_string);
        Some(Refused::conflict(format!(
            "{} is on trial since {} (change {}, by {by}) and ends at {}, in {} s\n  help: \
             `enforcer confirm` keeps it, `enforcer rollback` ends it at once",
            trial.path,
            trial.since,
            trial.change,
            trial.deadline,
            trial.remaining_ms.div_ceil(1000),
        )))
    }

    /// Somebody wants something else in force.
    pub(super) async fn propose(&mut self, proposal: Box<Proposal>, answer: Answer<Changed>) {
        if self.trial.is_none() || proposal.dry_run {
            self.proposals.push_back((proposal, answer));
            return;
        }
        let result = match proposal.what {
            // What was before the trial is the state before the one in force.
            What::State(None) if proposal.within.is_none() => self.take_back(&proposal.by).await,
            What::State(_) | What::Path(_) => {
                // What is on trial may have ended by now.
                let refused = self.on_trial_already();
                Err(refused.unwrap_or_else(|| Refused::conflict("a trial has just ended")))
            }
        };
        if let Err(refused) = &result {
            self.note_refusal(&proposal, refused).await;
        }
        let _ = answer.send(result);
    }

    /// Puts a compiled policy on trial.
    #[expect(clippy::too_many_arguments, reason = "what is to be known about it")]
    pub(super) async fn try_out(
        &mut self,
        mut note: Note,
        kind: OriginKind,
        meaning: Meaning,
        image: Image,
        (texts, state): (Texts, Option<u64>),
        within: Duration,
        environment: &Environment,
    ) -> Result<(), Refused> {
        let previous = Previous {
            live: self.shared.live(),
            texts: self.texts.clone(),
            origin: self.origin.clone(),
            environment: self.environment.clone(),
            remaining: within,
        };
        let generation = self.next_generation();
        let live = meaning.live(image.with_generation(generation), Time::now());
        let policy = Arc::clone(&live.policy);
        self.shared.generations.insert(generation, policy);
        note.meaning = Some(swap::measure(&live));
        note.confirm_within = Some(within.as_secs());
        let watched = self.tried.as_ref().map(Content::of);
        let deadline = Time::after(within);
        let origin = self.shared.changes.keep(&texts, |journal| {
            let material = state.map_or(Material::Texts(&texts), Material::State);
            journal.begin(note, kind, material, watched, deadline)
        });
        // First the memory: a daemon that begins anew must find out what is on trial.
        if let Some(unkept) = self.shared.changes.persist().await {
            tracing::warn!("{unkept}");
        }
        let image = live.image.clone();
        let began = Instant::now();
        if let Err(failure) = self.kernel(move |k| k.trial(&image, None, within)).await {
            self.shared.generations.remove(generation);
            let error = failure.render();
            self.shared
                .changes
                .change(|journal| journal.abandon(&error));
            return Err(Refused {
                code: RefusalCode::Internal,
                error,
            });
        }
        self.shared.set_live(live);
        (self.texts, self.origin) = (texts, origin);
        let mut trial = Trial::resumed(previous, self);
        trial.deadline = began + within;
        trial.wake = trial.deadline + MARGIN;
        tracing::warn!(
            path = trial.status.path,
            generation,
            deadline = %trial.status.deadline,
            "on trial: `enforcer confirm` keeps it"
        );
        self.trial = Some(trial);
        self.refuse_waiting();
        self.now_for(environment);
        self.shared.note(|board| board.notice = None);
        Ok(())
    }

    /// Nobody who has asked for something else waits for the end of the trial.
    fn refuse_waiting(&mut self) {
        let Some(refused) = self.on_trial_already() else {
            return;
        };
        let asks = self
            .wanted
            .iter_mut()
            .flat_map(|wanted| wanted.asks.drain(..));
        for (_, answer) in asks {
            let _ = answer.send(Err(refused.clone()));
        }
        let looks = |(proposal, _): &(Box<Proposal>, _)| proposal.dry_run;
        let (looks, others): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut self.proposals)
            .into_iter()
            .partition(looks);
        self.proposals = looks;
        for (_, answer) in others {
            let _ = answer.send(Err(refused.clone()));
        }
    }

    /// What is on trial stays.
    pub(super) async fn confirm(&mut self, by: &Arc<Named>) -> Result<Changed, Refused> {
        let none = || Refused::conflict("nothing is on trial");
        let trial = self
            .trial
            .as_ref()
            .filter(|t| t.over.is_none())
            .ok_or_else(none)?;
        let what = trial.status.path.clone();
        let until = trial.status.deadline;
        match self.kernel(|kernel| kernel.confirm()).await {
            Ok(()) => {}
            Err(Failure::Dataplane(DataplaneError::Trial(why))) => {
                return Err(Refused::conflict(format!(
                    "cannot be confirmed any more: {why}"
                )));
            }
            Err(failure) => {
                let error = failure.summary();
                return Err(Refused {
                    code: RefusalCode::Internal,
                    error: format!(
                        "was not confirmed: {error}\n  help: {what} stays on trial until {until}: try \
                         again"
                    ),
                });
            }
        }
        self.trial = None;
        let changes = &self.shared.changes;
        let change = changes.change(|journal| journal.confirm(Some((**by).clone())));
        self.save_image();
        tracing::info!(%by, path = what, "confirmed: it stays");
        let unkept = self.shared.changes.persist().await;
        self.after_trial(None);
        Ok(self.now(change, unkept))
    }

    /// Somebody ends the trial: what was before is in force again.
    async fn take_back(&mut self, by: &Arc<Named>) -> Result<Changed, Refused> {
        let changed = self
            .end(Some((**by).clone()), "somebody asked for it")
            .await;
        let unkept = self.shared.changes.persist().await;
        match changed {
            Ok(change) => Ok(self.now(change, unkept)),
            Err(error) => Err(Refused {
                code: RefusalCode::Internal,
                error,
            }),
        }
    }

    /// What is in force, as the answer to a change.
    fn now(&self, change: Option<u64>, unkept: Option<String>) -> Changed {
        let live = self.shared.live();
        Changed {
            change,
            changed: true,
            generation: live.image.generation(),
            path: live.path.display().to_string(),
            hash: format!("{:016x}", live.image.hash()),
            segments: live.policy.segments.len(),
            rules: live.policy.rules.len(),
            content: Content::of(&self.texts).whole(),
            dry_run: false,
            trial: None,
            warnings: unkept.into_iter().collect(),
        }
    }

    /// Waits until a trial is to be looked at; for ever without one.
    pub fn due(&self) -> impl Future<Output = ()> + use<> {
        let wake = self.trial.as_ref().map(|trial| trial.wake);
        async move {
            match wake {
                Some(wake) => sleep_until(wake.into()).await,
                None => std::future::pending().await,
            }
        }
    }

    /// The deadline may have passed.
    pub async fn look_at_trial(&mut self) {
        let ended = self.trial.as_ref().is_none_or(|trial| trial.over.is_some());
        if !ended {
            let on = self.kernel(|kernel| kernel.on_trial()).await;
            let now = Instant::now();
            let Some(trial) = &mut self.trial else {
                return;
            };
            match on {
                Ok(Some(OnTrial { remaining, .. })) if !remaining.is_zero() => {
                    trial.deadline = now + remaining;
                    trial.wake = trial.deadline + MARGIN;
                    return;
                }
                Ok(_) => {}
                Err(failure) => {
                    tracing::error!(error = failure.summary(), "cannot ask for the trial");
                    trial.wake = now + AGAIN;
                    return;
                }
            }
        }
        if let Err(error) = self.end(None, "the deadline passed").await {
            tracing::error!(error, "cannot tidy up after the trial");
        }
    }

    /// Names what judges by now, then tidies up in the kernel.
    async fn end(&mut self, by: Option<Named>, cause: &str) -> Result<Option<u64>, String> {
        let Some(trial) = &self.trial else {
            return Ok(None);
        };
        let previous = &trial.previous;
        // By the kernel's clock it may have judged for a moment already.
        self.shared.set_live_again(Arc::clone(&previous.live));
        self.texts = previous.texts.clone();
        self.origin = previous.origin.clone();
        self.environment = previous.environment.clone();
        let image = previous.live.image.clone();
        let tidied = self.kernel(move |kernel| match kernel.on_trial()? {
            Some(_) => kernel.revert(),
            // Nobody knows what is live.
            None => kernel.apply(&image),
        });
        if let Err(failure) = tidied.await {
            let error = failure.summary();
            if let Some(trial) = &mut self.trial {
                trial.over = Some(error.clone());
                trial.wake = Instant::now() + AGAIN;
            }
            self.note_origin();
            return Err(error);
        }
        let Some(trial) = self.trial.take() else {
            return Ok(None);
        };
        let status = trial.status;
        let cause = Some(cause.to_owned()).filter(|_| by.is_none());
        let who = by.as_ref().map(ToString::to_string);
        let change = self
            .shared
            .changes
            .change(|journal| journal.revert(by, cause));
        self.save_image();
        let how = match who {
            Some(by) => format!("was taken back by {by}"),
            None => "was not confirmed in time".to_owned(),
        };
        let notice = format!(
            "{} (change {}) {how} at {}; {} is in force again",
            status.path,
            status.change,
            Time::now(),
            status.previous
        );
        tracing::warn!("{notice}");
        self.after_trial(Some(notice));
        Ok(change)
    }

    fn after_trial(&mut self, notice: Option<String>) {
        self.shared.note(|board| board.notice = notice);
        self.note_origin();
        // What was edited meanwhile has waited.
        self.files_changed();
    }

    /// What is wrong with a trial, or came of one.
    pub fn trial_problems(&self) -> Vec<String> {
        let over = self.trial.as_ref().and_then(|trial| trial.over.as_ref());
        let mut problems: Vec<_> = over
            .map(|error| format!("the trial is over, but cannot be tidied up: {error}"))
            .into_iter()
            .collect();
        match self.origin.kind {
            OriginKind::PassAll => problems.push(
                "everything passes: the first policy was not confirmed; `enforcer apply` it again"
                    .to_owned(),
            ),
            OriginKind::LastGood => problems.push(format!(
                "the last good policy is in force, of {}: the watched files cannot be used",
                self.origin.path
            )),
            OriginKind::Watched | OriginKind::Applied | OriginKind::RolledBack => {}
        }
        problems
    }

    /// Both images follow the host.
    pub(super) async fn swap_both(
        &mut self,
        [previous, image]: [Image; 2],
        environment: &Environment,
    ) -> Result<(), Failure> {
        let Some(trial) = &self.trial else {
            return Ok(());
        };
        let (before, live) = (Arc::clone(&trial.previous.live), self.shared.live());
        let (one, two) = (self.next_generation(), self.next_generation());
        let (previous, image) = (previous.with_generation(one), image.with_generation(two));
        let generations = Arc::clone(&self.shared.generations);
        generations.insert(one, Arc::clone(&before.policy));
        generations.insert(two, Arc::clone(&live.policy));
        let written = self.kernel(move |kernel| {
            kernel.apply_both(&previous, &image)?;
            Ok((previous, image))
        });
        let (previous, image) = written.await.inspect_err(|_| {
            generations.remove(one);
            generations.remove(two);
        })?;
        let (meaning, loaded_at) = (Meaning::of(&before), before.loaded_at);
        if let Some(trial) = &mut self.trial {
            trial.previous.live = Arc::new(meaning.live(previous, loaded_at));
            trial.previous.environment = environment.clone();
        }
        let loaded_at = live.loaded_at;
        self.shared
            .set_live(Meaning::of(&live).live(image, loaded_at));
        self.shared.changes.change(|journal| journal.follow(two));
        tracing::info!(
            previous = one,
            live = two,
            "both policies of the trial follow this host"
        );
        Ok(())
    }
}
