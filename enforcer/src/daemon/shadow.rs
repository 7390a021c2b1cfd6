//! A candidate policy beside the one in force: begun, kept fit for this host, its counts gathered,
//! ended. It never judges; whatever goes wrong here changes no verdict.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use enforcer_common::shadow::DifferenceKey;
use tokio::task::spawn_blocking;

use super::{
    files::Texts,
    load::{self, Loaded, Memory},
    plan::{self, PlanError},
    progress,
    reload::relevant,
    state::{Ground, Shared},
    store::SavedShadow,
};
use crate::{
    api::{
        peer::Named,
        types::{PlanRequest, Time},
    },
    compile::{Image, Known},
    dataplane::{Dataplane, DataplaneError, release_memory},
    events::{
        enrich::{Clock, Local as _},
        rehearsal::{Names, Rehearsal, Shadowing, Tally, differs, summary},
    },
    plan::{Version, types::FlowChanges},
    policy::model::{Environment, Policy},
    settings::Settings,
};

/// Its generations are none that ever judge.
const GENERATIONS: u32 = 1 << 31;
/// Counts are gathered so often: the kernel keeps the first packet and the latest, so more examples
/// come from looking often.
const OFTEN: Duration = Duration::from_secs(1);
/// And written to disk so often.
const KEPT: Duration = Duration::from_secs(10);
/// After a failure for the host as it is now the next attempt comes so much later.
const RETRY: Duration = Duration::from_secs(10);
/// Looks after which nothing is added to the counts of a generation that was replaced.
const SETTLED: u32 = 2;

/// What is known of the candidate.
#[derive(Default)]
pub struct Desk(Mutex<Inside>);

#[derive(Default)]
struct Inside {
    shadow: Option<Shadow>,
    /// Of the last candidate.
    generation: u32,
}

struct Shadow {
    path: PathBuf,
    by: Named,
    since: Time,
    texts: Texts,
    policy: Arc<Policy>,
    settings: Arc<Settings>,
    image: Image,
    /// What the image was compiled for, as far as it depends on it.
    environment: Environment,
    /// Why it is not fit for the host as it is now.
    unfit: Option<(Environment, Instant, String)>,
    /// Why its counts cannot be had.
    problem: Option<String>,
    /// Counts that the kernel does not have any more, and all examples.
    past: Tally,
    /// Those that it has.
    present: Tally,
    /// The generation that judges, and how often it was seen.
    live: (u32, u32),
    /// When it was last written to disk, and how many packets it had counted.
    kept: Option<(Instant, u64)>,
}

impl Shadow {
    fn saved(&self) -> SavedShadow {
        let path = self.path.display().to_string();
        let generation = self.image.generation();
        let (by, texts) = (self.by.clone(), &self.texts);
        let mut saved = SavedShadow::new(path, by, self.since, texts, generation);
        saved.past = self.past.saved();
        saved.present = self.present.saved();
        saved
    }
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the status: where the candidate comes from and what it has seen.
    pub fn in_short(&self) -> Option<(PathBuf, u64, Option<String>)> {
        let inside = self.lock();
        let shadow = inside.shadow.as_ref()?;
        let unfit = shadow.unfit.as_ref().map(|(_, _, why)| why.clone());
        let problem = shadow.problem.clone().or(unfit);
        let counted = shadow.past.differing() + shadow.present.differing();
        Some((shadow.path.clone(), counted, problem))
    }
}

fn kernel<T>(
    shared: &Shared,
    ask: impl FnOnce(&mut dyn Dataplane) -> Result<T, DataplaneError>,
) -> Result<T, DataplaneError> {
    let dataplane = shared.dataplane.lock();
    ask(&mut **dataplane.unwrap_or_else(PoisonError::into_inner))
}

/// Takes the candidate at a path in the place of the last one; counts begin anew. Takes as long as a
/// plan.
///
/// # Errors
/// [`PlanError`]; the last candidate, if any, stays.
pub fn begin(shared: &Shared, path: String, by: &Named) -> Result<Shadowing, PlanError> {
    let ground = plan::ground(shared)?;
    let request = PlanRequest { path: Some(path) };
    let sources = plan::sources(&ground, &request)?;
    let loaded = progress::logged(|progress| plan::load(&ground, &sources, progress))?;
    {
        let mut inside = shared.shadow.lock();
        if let Some(last) = shared.changes.take_shadow() {
            inside.generation = last.generation & !GENERATIONS;
        }
        let texts = loaded.texts.clone();
        let mut shadow = shadow(
            sources.segments,
            by.clone(),
            texts,
            loaded,
            &ground,
            &mut inside,
        );
        kernel(shared, |kernel| {
            // Between two candidates nothing is counted for either.
            kernel.set_shadow(None)?;
            kernel.set_shadow(Some(&shadow.image))
        })
        .inspect_err(|_| drop(inside.shadow.take()))?;
        shadow.kept = Some((Instant::now(), 0));
        shared.changes.save_shadow(Some(shadow.saved()));
        inside.shadow = Some(shadow);
    }
    release_memory();
    report(shared)
}

fn shadow(
    path: PathBuf,
    by: Named,
    texts: Texts,
    loaded: Loaded,
    ground: &Ground,
    inside: &mut Inside,
) -> Shadow {
    let environment = relevant(&loaded.policy, &loaded.settings, &ground.environment);
    Shadow {
        path,
        by,
        since: Time::now(),
        texts,
        policy: Arc::new(loaded.policy),
        settings: Arc::new(loaded.settings),
        image: loaded.image.with_generation(next(inside)),
        environment,
        unfit: None,
        problem: None,
        past: Tally::default(),
        present: Tally::default(),
        live: (0, 0),
        kept: None,
    }
}

fn next(inside: &mut Inside) -> u32 {
    inside.generation = (inside.generation + 1) % GENERATIONS;
    GENERATIONS | inside.generation
}

/// Ends the rehearsal; answers with what came of it.
///
/// # Errors
/// [`PlanError::Dataplane`]; the candidate stays.
pub fn end(shared: &Shared) -> Result<Shadowing, PlanError> {
    turn(shared);
    let last = report(shared)?;
    kernel(shared, |kernel| kernel.set_shadow(None))?;
    drop(shared.shadow.lock().shadow.take());
    shared.changes.save_shadow(None);
    Ok(last)
}

/// What the candidate has seen, and the live flows that it would cut now.
///
/// # Errors
/// [`PlanError::Dataplane`].
pub fn report(shared: &Shared) -> Result<Shadowing, PlanError> {
    gather(shared);
    let live = shared.live();
    let (mut rehearsal, version) = {
        let inside = shared.shadow.lock();
        let Some(shadow) = &inside.shadow else {
            return Ok(Shadowing::default());
        };
        let tally = shadow.past.clone().with(&shadow.present);
        let (newly_denied, newly_allowed) = tally.turned();
        let unfit = shadow.unfit.as_ref().map(|(_, _, why)| why.clone());
        let rehearsal = Rehearsal {
            path: shadow.path.display().to_string(),
            hash: format!("{:016x}", shadow.image.hash()),
            segments: shadow.policy.segments.len(),
            rules: shadow.policy.rules.len(),
            by: shadow.by.clone(),
            since: shadow.since,
            differing: tally.differing(),
            newly_denied,
            newly_allowed,
            unlisted: tally.unlisted(),
            differences: tally.list(&shadow.policy),
            flows: FlowChanges::default(),
            differs: false,
            problem: shadow.problem.clone().or(unfit),
            summary: String::new(),
        };
        let version = (
            Arc::clone(&shadow.policy),
            Arc::clone(&shadow.settings),
            shadow.image.clone(),
        );
        (rehearsal, version)
    };
    let (policy, settings, image) = &version;
    let candidate = Version {
        policy,
        image,
        settings,
    };
    rehearsal.flows =
        plan::changed_flows(shared, &live, candidate).unwrap_or_else(|error| FlowChanges {
            error: Some(error.to_string()),
            ..FlowChanges::default()
        });
    rehearsal.differs = differs(&rehearsal);
    rehearsal.summary = summary(&rehearsal);
    Ok(Shadowing {
        shadow: Some(rehearsal),
    })
}

/// Goes on with the candidate that the last daemon had, in the kernel if it is there still.
fn resume(shared: &Shared, environment: &Environment) {
    let asked = kernel(shared, |kernel| kernel.shadow()).unwrap_or_default();
    let Some(saved) = shared.changes.take_shadow() else {
        if asked.is_some() {
            // Nobody knows what it says.
            let _ = kernel(shared, |kernel| kernel.set_shadow(None));
        }
        return;
    };
    if let Err(error) = take_up(shared, &saved, asked, environment) {
        tracing::error!(path = saved.path, error, "the shadow cannot go on");
        let _ = kernel(shared, |kernel| kernel.set_shadow(None));
    }
    release_memory();
}

fn take_up(
    shared: &Shared,
    saved: &SavedShadow,
    asked: Option<Image>,
    environment: &Environment,
) -> Result<(), String> {
    let texts = saved.texts();
    let loaded = progress::logged(|progress| {
        load::compile_again(texts.clone(), environment, &mut Memory::default(), progress)
    });
    let loaded = loaded.map_err(|rejected| rejected.summary())?;
    let mut inside = shared.shadow.lock();
    if inside.shadow.is_some() {
        // Somebody was quicker.
        return Ok(());
    }
    inside.generation = saved.generation & !GENERATIONS;
    let mut image = loaded.image.with_generation(saved.generation);
    let kept = asked.as_ref().is_some_and(|asked| {
        (asked.generation(), asked.hash()) == (image.generation(), image.hash())
    });
    let past = Tally::from_saved(saved.past.clone());
    let present = Tally::from_saved(saved.present.clone());
    let past = if asked.is_some() {
        past
    } else {
        past.with(&present)
    };
    if !kept {
        image = image.with_generation(next(&mut inside));
        kernel(shared, |kernel| kernel.set_shadow(Some(&image))).map_err(|e| e.to_string())?;
    }
    inside.shadow = Some(Shadow {
        path: PathBuf::from(&saved.path),
        by: saved.by.clone(),
        since: saved.since,
        texts,
        environment: relevant(&loaded.policy, &loaded.settings, environment),
        policy: Arc::new(loaded.policy),
        settings: Arc::new(loaded.settings),
        image,
        unfit: None,
        problem: None,
        past,
        present: Tally::default(),
        live: (0, 0),
        kept: None,
    });
    tracing::info!(path = saved.path, "the shadow goes on");
    Ok(())
}

/// Keeps the candidate fit for this host and gathers its counts, for ever.
pub async fn keep(shared: Arc<Shared>) {
    let mut often = tokio::time::interval(OFTEN);
    often.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut resumed = false;
    loop {
        often.tick().await;
        let shared = Arc::clone(&shared);
        let turned = if resumed {
            if shared.shadow.lock().shadow.is_none() {
                continue;
            }
            spawn_blocking(move || turn(&shared)).await
        } else {
            // The first look at this host comes first.
            let Some(ground) = shared.note(|board| board.ground.clone()) else {
                continue;
            };
            resumed = true;
            spawn_blocking(move || resume(&shared, &ground.environment)).await
        };
        if let Err(error) = turned {
            tracing::error!(%error, "the shadow's counts were not gathered");
        }
    }
}

fn turn(shared: &Shared) {
    fit(shared);
    gather(shared);
    let mut inside = shared.shadow.lock();
    let Some(shadow) = &mut inside.shadow else {
        return;
    };
    let counted = shadow.past.differing() + shadow.present.differing();
    let due = |(at, then): (Instant, u64)| at.elapsed() >= KEPT && then != counted;
    if shadow.kept.is_none_or(due) {
        shadow.kept = Some((Instant::now(), counted));
        shared.changes.save_shadow(Some(shadow.saved()));
    }
}

/// Gathers and saves what was counted, before the daemon ends.
pub fn note(shared: &Shared) {
    gather(shared);
    let inside = shared.shadow.lock();
    if let Some(shadow) = &inside.shadow {
        shared.changes.save_shadow(Some(shadow.saved()));
    }
}

/// Compiles the candidate for the host as it is, if that is another than it was compiled for.
fn fit(shared: &Shared) {
    let Some(ground) = shared.note(|board| board.ground.clone()) else {
        return;
    };
    let (policy, settings, environment) = {
        let inside = shared.shadow.lock();
        let Some(shadow) = &inside.shadow else {
            return;
        };
        let environment = relevant(&shadow.policy, &shadow.settings, &ground.environment);
        let tried = shadow.unfit.as_ref();
        let tried = tried.is_some_and(|(env, at, _)| *env == environment && at.elapsed() < RETRY);
        if shadow.environment == environment || tried {
            return;
        }
        (
            Arc::clone(&shadow.policy),
            Arc::clone(&shadow.settings),
            environment,
        )
    };
    let image = progress::logged(|progress| {
        load::image(
            &policy,
            &settings,
            &environment,
            &mut Known::default(),
            progress,
        )
    });
    let mut inside = shared.shadow.lock();
    let generation = next(&mut inside);
    let Some(shadow) = &mut inside.shadow else {
        return;
    };
    if !Arc::ptr_eq(&shadow.policy, &policy) {
        return;
    }
    let put = image.map_err(|e| e.to_string()).and_then(|image| {
        let image = image.with_generation(generation);
        let put = kernel(shared, |kernel| kernel.set_shadow(Some(&image)));
        put.map_err(|error| error.to_string())?;
        Ok(image)
    });
    match put {
        Ok(image) => {
            (shadow.image, shadow.environment, shadow.unfit) = (image, environment, None);
        }
        Err(error) => {
            let why = format!("the candidate does not know this host as it is now: {error}");
            shadow.unfit = Some((environment, Instant::now(), why));
        }
    }
}

/// Reads the kernel's counts; what nothing is added to any more is taken out there.
fn gather(shared: &Shared) {
    let counts = kernel(shared, |kernel| kernel.differences());
    let sample = Clock::sample();
    let live = shared.live().image.generation();
    let on_trial = shared.note(|board| board.trial.is_some());
    let mut inside = shared.shadow.lock();
    let Some(shadow) = &mut inside.shadow else {
        return;
    };
    let (counts, sample) = match (counts, sample) {
        (Ok(counts), Ok(sample)) => (counts, sample),
        (Err(error), _) => {
            shadow.problem = Some(format!("its counts cannot be read: {error}"));
            return;
        }
        (_, Err(error)) => {
            shadow.problem = Some(format!("the clock cannot be read: {error}"));
            return;
        }
    };
    shadow.problem = None;
    let seen = if shadow.live.0 == live {
        shadow.live.1 + 1
    } else {
        0
    };
    shadow.live = (live, seen);
    let interface = |ifindex: u32| shared.interface_name(ifindex);
    let names = Names {
        live: &|generation| shared.generations.get(generation),
        candidate: &shadow.policy,
        interface: &interface,
        time: &|boot| sample.wall(boot),
    };
    let own = shadow.image.generation();
    let over = |key: &DifferenceKey| {
        *key != DifferenceKey::REST
            && seen >= SETTLED
            && !on_trial
            && (key.live.generation, key.shadow.generation) != (live, own)
    };
    let (mut past, mut present) = (Tally::default(), Tally::default());
    let mut gone = Vec::new();
    for (key, count) in &counts {
        if over(key) {
            past.add(key, count, &names);
            gone.push(*key);
        } else {
            present.add(key, count, &names);
        }
    }
    if kernel(shared, |kernel| kernel.forget_differences(&gone)).is_ok() {
        shadow.past = std::mem::take(&mut shadow.past).with(&past);
    } else {
        present = present.with(&past);
    }
    shadow.past.see(&present);
    shadow.present = present;
}
