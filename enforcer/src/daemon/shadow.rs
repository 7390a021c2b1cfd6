//! A candidate policy beside the one in force: begun, kept fit for this host, its counts gathered,
//! ended. It never judges; whatever goes wrong here changes no verdict.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use enforcer_common::shadow::DifferenceKey;
use tokio::task::spawn_blocking;

use super::{
    load::{self, Loaded, Memory},
    plan::{self, PlanError},
    progress,
    reload::relevant,
    state::Shared,
    store::{SavedCounts, SavedShadow},
};
use crate::{
    api::{
        changes::LONGEST_TRIAL,
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
/// So long after a swap nothing is taken for settled that the generation before it has counted.
const SETTLED: Duration = Duration::from_secs(3);
/// A generation that has not judged for so long is not remembered: longer than a trial may take.
const FORGOTTEN: Duration = Duration::from_secs(2 * LONGEST_TRIAL);

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
    policy: Arc<Policy>,
    settings: Arc<Settings>,
    image: Image,
    /// What the image was compiled for, as far as it depends on it.
    environment: Environment,
    /// Why it is not fit for the host as it is now.
    unfit: Option<(Environment, Instant, String)>,
    /// Why its counts cannot be had.
    problem: Option<String>,
    /// Counts that the kernel is not asked for any more, and all examples.
    past: Tally,
    /// Those that it has.
    present: Tally,
    /// Keys of counts in `past` that the kernel has still: until that is on disk.
    moved: Vec<DifferenceKey>,
    /// Number of the write that says so.
    noted: u64,
    /// Generations that judged, and when that was last seen.
    judged: BTreeMap<u32, Instant>,
    /// The one before the last.
    before: u32,
    /// Policies of generations that the kernel has counts of.
    names: BTreeMap<u32, Arc<Policy>>,
    /// When the counts were last written to disk, and how many packets there were.
    kept: (Instant, u64),
}

impl Shadow {
    fn new(saved: &SavedShadow, loaded: Loaded, environment: &Environment, image: Image) -> Self {
        Self {
            path: PathBuf::from(&saved.path),
            by: saved.by.clone(),
            since: saved.since,
            environment: relevant(&loaded.policy, &loaded.settings, environment),
            policy: Arc::new(loaded.policy),
            settings: Arc::new(loaded.settings),
            image,
            unfit: None,
            problem: None,
            past: Tally::default(),
            present: Tally::default(),
            moved: Vec::new(),
            noted: 0,
            judged: BTreeMap::new(),
            before: 0,
            names: BTreeMap::new(),
            kept: (Instant::now(), 0),
        }
    }

    fn counted(&self) -> u64 {
        self.past.differing() + self.present.differing()
    }

    fn problem(&self) -> Option<String> {
        let unfit = self.unfit.as_ref().map(|(_, _, why)| why.clone());
        self.problem.clone().or(unfit)
    }

    fn save(&mut self, shared: &Shared) {
        self.kept = (Instant::now(), self.counted());
        self.noted = shared.changes.save_counts(SavedCounts {
            since: self.since,
            generation: self.image.generation(),
            past: self.past.saved(),
            present: self.present.saved(),
            moved: self.moved.iter().map(DifferenceKey::words).collect(),
        });
    }

    /// Notes what judges now.
    fn judges(&mut self, live: u32, policy: &Arc<Policy>) {
        if !self.judged.contains_key(&live) {
            let newest = self.judged.iter().max_by_key(|(_, at)| **at);
            self.before = newest.map_or(0, |(generation, _)| *generation);
        }
        self.judged.insert(live, Instant::now());
        self.names.insert(live, Arc::clone(policy));
    }

    /// Whether nothing is added to a count any more. During a trial the image before it may judge
    /// again at any moment, and may be one that was never seen to judge.
    fn is_over(&self, key: &DifferenceKey, live: u32, on_trial: bool) -> bool {
        if *key == DifferenceKey::REST {
            return false;
        }
        if key.shadow.generation != self.image.generation() {
            return true;
        }
        let own = key.live.generation;
        let seen = self.judged.get(&own);
        let recently = seen.is_some_and(|at| at.elapsed() < SETTLED);
        let may_return = on_trial && (own == self.before || seen.is_none());
        own != live && own != 0 && !recently && !may_return
    }
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the status: where the candidate comes from, what it has seen, and what is wrong.
    pub fn in_short(&self) -> Option<(PathBuf, u64, Option<String>)> {
        let inside = self.lock();
        let shadow = inside.shadow.as_ref()?;
        Some((shadow.path.clone(), shadow.counted(), shadow.problem()))
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
/// [`PlanError`]; the last candidate, if any, stays, unless the kernel refused half-way.
pub fn begin(shared: &Shared, path: String, by: &Named) -> Result<Shadowing, PlanError> {
    let ground = plan::ground(shared)?;
    let request = PlanRequest { path: Some(path) };
    let sources = plan::sources(&ground, &request)?;
    let loaded = progress::logged(|progress| plan::load(&ground, &sources, progress))?;
    {
        let mut inside = shared.shadow.lock();
        if let Some((_, Some(last))) = shared.changes.take_shadow() {
            inside.generation = last.generation & !GENERATIONS;
        }
        let path = sources.segments.display().to_string();
        let saved = SavedShadow::new(path, by.clone(), Time::now(), &loaded.texts);
        let image = loaded.image.clone().with_generation(next(&mut inside));
        let put = kernel(shared, |kernel| kernel.set_shadow(Some(&image), true));
        if let Err(error) = put {
            gone(shared, &mut inside);
            return Err(error.into());
        }
        let mut shadow = Shadow::new(&saved, loaded, &ground.environment, image);
        shared.changes.save_shadow(Some(saved));
        shadow.save(shared);
        inside.shadow = Some(shadow);
    }
    release_memory();
    report(shared)
}

/// After a refusal: forgets the candidate if the kernel does not have it any more.
fn gone(shared: &Shared, inside: &mut Inside) {
    let asked = kernel(shared, |kernel| kernel.shadow());
    let asked = asked.ok().flatten().map(|image| image.generation());
    let known = inside.shadow.as_ref().map(|s| s.image.generation());
    if known.is_some() && asked != known {
        tracing::error!("the candidate is not asked any more");
        inside.shadow = None;
        shared.changes.save_shadow(None);
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
    let last = report(shared)?;
    let mut inside = shared.shadow.lock();
    kernel(shared, |kernel| kernel.set_shadow(None, false))?;
    inside.shadow = None;
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
    let (mut rehearsal, tally, policy, settings, image) = {
        let inside = shared.shadow.lock();
        let Some(shadow) = &inside.shadow else {
            return Ok(Shadowing::default());
        };
        let tally = shadow.past.clone().with(&shadow.present);
        let (newly_denied, newly_allowed) = tally.turned();
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
            differences: Vec::new(),
            flows: FlowChanges::default(),
            differs: false,
            problem: shadow.problem(),
            summary: String::new(),
        };
        let (policy, settings) = (Arc::clone(&shadow.policy), Arc::clone(&shadow.settings));
        (rehearsal, tally, policy, settings, shadow.image.clone())
    };
    // What takes long waits for nobody, and nobody for it.
    rehearsal.differences = tally.list(&policy);
    let candidate = Version {
        policy: &policy,
        image: &image,
        settings: &settings,
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
    let saved = shared.changes.take_shadow();
    let loaded = saved.as_ref().map(|(saved, _)| {
        let texts = saved.texts();
        progress::logged(|progress| {
            load::compile_again(texts, environment, &mut Memory::default(), progress)
        })
    });
    let mut inside = shared.shadow.lock();
    if inside.shadow.is_some() {
        // Somebody was quicker.
        return;
    }
    let asked = kernel(shared, |kernel| kernel.shadow()).unwrap_or_default();
    let taken = match (saved, loaded) {
        (Some((saved, counts)), Some(Ok(loaded))) => {
            let taken = take_up(
                shared,
                &mut inside,
                &saved,
                counts,
                loaded,
                asked,
                environment,
            );
            taken.map_err(|error| error.to_string())
        }
        (_, Some(Err(rejected))) => Err(rejected.summary()),
        _ if asked.is_some() => Err("nobody knows what it says".to_owned()),
        _ => Ok(()),
    };
    if let Err(error) = taken {
        tracing::error!(error, "the shadow cannot go on");
        if let Err(error) = kernel(shared, |kernel| kernel.set_shadow(None, false)) {
            tracing::error!(%error, "the programs ask it still: they are slower than need be");
        }
        // What is kept of it stays: the next start tries again.
    }
    drop(inside);
    release_memory();
}

fn take_up(
    shared: &Shared,
    inside: &mut Inside,
    saved: &SavedShadow,
    counts: Option<SavedCounts>,
    loaded: Loaded,
    asked: Option<Image>,
    environment: &Environment,
) -> Result<(), DataplaneError> {
    let generation = counts.as_ref().map_or(0, |counts| counts.generation);
    let asked_of = asked.as_ref().map_or(0, Image::generation);
    inside.generation = generation.max(asked_of) & !GENERATIONS;
    let image = loaded.image.clone();
    let same = asked.as_ref().filter(|asked| asked.hash() == image.hash());
    let image = match same {
        Some(asked) => image.with_generation(asked.generation()),
        None => {
            let image = image.with_generation(next(inside));
            kernel(shared, |kernel| {
                kernel.set_shadow(Some(&image), asked.is_none())
            })?;
            image
        }
    };
    let mut shadow = Shadow::new(saved, loaded, environment, image);
    if let Some(counts) = counts {
        shadow.past = Tally::from_saved(counts.past);
        if asked.is_none() {
            // The kernel knows nothing of those.
            shadow.past = shadow.past.with(&Tally::from_saved(counts.present));
        } else {
            let moved = counts.moved.into_iter();
            shadow.moved = moved.map(DifferenceKey::from_words).collect();
        }
    }
    tracing::info!(path = saved.path, "the shadow goes on");
    inside.shadow = Some(shadow);
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
    if let Some(shadow) = &mut inside.shadow {
        let (at, then) = shadow.kept;
        if at.elapsed() >= KEPT && then != shadow.counted() {
            shadow.save(shared);
        }
    }
}

/// Gathers and saves what was counted, before the daemon ends.
pub fn note(shared: &Shared) {
    gather(shared);
    if let Some(shadow) = &mut shared.shadow.lock().shadow {
        shadow.save(shared);
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
        let put = kernel(shared, |kernel| kernel.set_shadow(Some(&image), false));
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

/// Reads the kernel's counts. Those that nothing is added to any more are moved: first into what is
/// kept, then to disk, and only then out of the kernel, so that whoever ends this process, they are
/// counted once.
fn gather(shared: &Shared) {
    let mut inside = shared.shadow.lock();
    let Some(shadow) = &mut inside.shadow else {
        return;
    };
    let live = shared.live();
    let on_trial = shared.note(|board| board.trial.is_some());
    shadow.judges(live.image.generation(), &live.policy);
    if shared.changes.has(shadow.noted) && !shadow.moved.is_empty() {
        match kernel(shared, |kernel| kernel.forget_differences(&shadow.moved)) {
            Ok(()) => shadow.moved.clear(),
            Err(error) => tracing::warn!(%error, "counts stay in the kernel"),
        }
    }
    // Read while this is locked: a count is moved once.
    let counts = kernel(shared, |kernel| kernel.differences());
    let counts = counts.map_err(|error| format!("its counts cannot be read: {error}"));
    let clock = Clock::sample().map_err(|error| format!("the clock cannot be read: {error}"));
    let (counts, clock) = match (counts, clock) {
        (Ok(counts), Ok(clock)) => (counts, clock),
        (Err(error), _) | (_, Err(error)) => {
            shadow.problem = Some(error);
            return;
        }
    };
    shadow.problem = None;
    for key in counts.keys() {
        let generation = key.live.generation;
        if let Some(policy) = shared.generations.get(generation) {
            shadow.names.insert(generation, policy);
        }
    }
    let interface = |ifindex: u32| shared.interface_name(ifindex);
    let names = Names {
        live: &|generation| shadow.names.get(&generation).cloned(),
        candidate: &shadow.policy,
        interface: &interface,
        time: &|boot| clock.wall(boot),
    };
    let (mut past, mut present, mut moved) = (Tally::default(), Tally::default(), Vec::new());
    for (key, count) in &counts {
        if shadow.moved.contains(key) {
            continue;
        }
        if shadow.is_over(key, live.image.generation(), on_trial) {
            past.add(key, count, &names);
            moved.push(*key);
        } else {
            present.add(key, count, &names);
        }
    }
    let counted = |generation: u32| counts.keys().any(|key| key.live.generation == generation);
    shadow.names.retain(|generation, _| counted(*generation));
    shadow.judged.retain(|_, at| at.elapsed() < FORGOTTEN);
    shadow.past = std::mem::take(&mut shadow.past).with(&past);
    shadow.past.see(&present);
    shadow.present = present;
    if !moved.is_empty() {
        shadow.moved.append(&mut moved);
        shadow.save(shared);
    }
}
