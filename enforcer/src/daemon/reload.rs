//! Compiles policies beside the control task, one at a time; [`swap`] puts in force what comes out.

mod swap;
mod trial;

use std::{
    collections::{BTreeSet, VecDeque},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::task::{JoinHandle, spawn_blocking};

use crate::{
    api::{
        changes::{ChangeKind, Changed, Detached, Origin, OriginKind},
        peer::Named,
        types::{InterfaceState, RefusalCode, Reloaded, Time},
    },
    compile::{CompileError, Image, Known},
    dataplane::{DataplaneError, release_memory},
    policy::{
        Severity,
        model::{Environment, Policy},
    },
    settings::Settings,
};

use super::{
    acts::{Answer, Ask, Proposal, Refused, What},
    control::log_warnings,
    files::{self, Sources, Texts},
    load::{self, Loaded, Memory, Rejected},
    progress,
    rest::Rest,
    state::{Live, Shared},
    store::{Content, Material, Measure, Note},
};
pub use swap::measure;
use trial::Trial;
pub use trial::{Previous, remaining};

/// Longer than this the live image may not know an address of this host before it counts as stale.
const GRACE: Duration = Duration::from_secs(1);
/// After a failure for the host as it is now the next attempt comes so much later.
const RETRY: Duration = Duration::from_secs(10);
const ADDRESSES: &str = "addresses of this host changed";
const INTERFACES: &str = "interfaces of this host changed";

/// What is to be compiled, is being compiled, and was.
pub struct Reloads {
    sources: Sources,
    shared: Arc<Shared>,
    /// What was tried last, good or bad; `None` when reading it failed.
    tried: Option<Texts>,
    /// What is in force, which somebody may have applied from elsewhere.
    texts: Texts,
    origin: Origin,
    /// What was found out then.
    memory: Arc<Mutex<Memory>>,
    generation: u32,
    /// What the live image was compiled for, as far as it depends on it.
    environment: Environment,
    /// Since when this host has other addresses.
    stale: Option<Instant>,
    /// When the live policy could not be compiled for this host as it is, and why.
    unfit: Option<(Environment, Instant, String)>,
    wanted: Option<Wanted>,
    proposals: VecDeque<(Box<Proposal>, Answer<Changed>)>,
    detached: bool,
    running: Option<Running>,
    trial: Option<Trial>,
    rest: Rest,
}

/// What the daemon begins with.
pub struct Begun {
    /// What the watched files say, if they can be read.
    pub watched: Option<Texts>,
    /// What is in force.
    pub texts: Texts,
    /// Where it came from.
    pub origin: Origin,
    /// What parsing and compiling it has found out.
    pub memory: Memory,
    /// What it was compiled for.
    pub environment: Environment,
    /// The largest generation that ever judged.
    pub generation: u32,
    /// What comes back if nobody confirms it.
    pub previous: Option<Previous>,
}

/// The next look at the files.
struct Wanted {
    cause: &'static str,
    /// Also when the files are those that were tried last.
    always: bool,
    asks: Vec<Reload>,
}

type Reload = (Arc<Named>, Answer<Reloaded>);

struct Running {
    cause: &'static str,
    /// Somebody asked for it.
    asked: bool,
    asks: Vec<Reload>,
    proposal: Option<(Box<Proposal>, Answer<Changed>)>,
    environment: Environment,
    since: Instant,
    task: JoinHandle<Output>,
}

enum Output {
    /// The files are those that were tried last: an editor's other files change the directory,
    /// too.
    SameFiles,
    Files {
        tried: Option<Texts>,
        result: Box<Result<Loaded, Rejected>>,
        /// Only the settings are others: the policy is the one in force, wherever it came from.
        settings_only: bool,
    },
    /// What somebody wants in force, or why not.
    Proposal(Result<Box<(Loaded, Option<u64>)>, Refused>),
    /// The live policy, for another host.
    Host(Meaning, Result<Image, CompileError>),
    /// The one on trial and the one before it, for another host.
    Both(Result<[Image; 2], CompileError>),
}

/// What an image is made of.
#[derive(Clone)]
struct Meaning {
    path: PathBuf,
    policy: Arc<Policy>,
    settings: Arc<Settings>,
    /// Where the settings come from, if from a file.
    settings_path: Option<PathBuf>,
}

impl Meaning {
    fn of(live: &Live) -> Self {
        Self {
            path: live.path.clone(),
            policy: Arc::clone(&live.policy),
            settings: Arc::clone(&live.settings),
            settings_path: live.settings_path.clone(),
        }
    }

    fn image(&self, environment: &Environment, known: &mut Known) -> Result<Image, CompileError> {
        let (policy, settings) = (&self.policy, &self.settings);
        progress::logged(|progress| load::image(policy, settings, environment, known, progress))
    }

    /// What their image depends on.
    fn relevant(&self, environment: &Environment) -> Environment {
        relevant(&self.policy, &self.settings, environment)
    }
}

/// What the image of a policy depends on.
pub fn relevant(policy: &Policy, settings: &Settings, environment: &Environment) -> Environment {
    let mut environment = environment.clone();
    if !names_interfaces(policy, settings) {
        environment.interfaces.clear();
    }
    environment
}

/// Whether an image depends on which interfaces there are: most do not, and need not be made anew
/// for every container that comes or goes.
fn names_interfaces(policy: &Policy, settings: &Settings) -> bool {
    let segments = &policy.segments;
    settings.names_interfaces() || segments.iter().any(|s| !s.interfaces.is_empty())
}

impl Reloads {
    /// The live policy is `begun`.
    pub fn new(sources: Sources, shared: Arc<Shared>, begun: Begun) -> Self {
        let live = shared.live();
        let generation = begun.generation.max(live.image.generation());
        let mut this = Self {
            sources,
            shared,
            tried: begun.watched,
            texts: begun.texts,
            origin: begun.origin,
            memory: Arc::new(Mutex::new(begun.memory)),
            generation,
            environment: Meaning::of(&live).relevant(&begun.environment),
            stale: None,
            unfit: None,
            wanted: None,
            proposals: VecDeque::new(),
            detached: false,
            running: None,
            trial: None,
            rest: Rest::default(),
        };
        this.trial = begun
            .previous
            .map(|previous| Trial::resumed(previous, &this));
        this.note_origin();
        this
    }

    /// Somebody asks for a change.
    pub async fn ask(&mut self, ask: Ask) {
        match ask {
            Ask::Reload { by, answer } => match self.on_trial_already() {
                Some(refused) => {
                    let _ = answer.send(Err(refused));
                }
                None => self.want("request", Some((by, answer))),
            },
            Ask::Propose { proposal, answer } => self.propose(proposal, answer).await,
            Ask::Detach { by, answer } => {
                let _ = answer.send(self.detach(&by).await);
            }
            Ask::Confirm { by, answer } => {
                let result = self.confirm(&by).await;
                let _ = answer.send(result);
            }
        }
    }

    /// Whether the programs were taken off at somebody's word.
    pub fn is_detached(&self) -> bool {
        self.detached
    }

    async fn detach(&mut self, by: &Named) -> Result<Detached, Refused> {
        let interfaces = self.shared.note(|board| {
            let enforced = board.interfaces.iter();
            let enforced = enforced.filter(|i| i.state == InterfaceState::Enforced);
            enforced.map(|i| i.name.clone()).collect()
        });
        let shared = Arc::clone(&self.shared);
        let taken_off = spawn_blocking(move || shared.detach_all());
        let taken_off = taken_off.await.map_err(|error| error.to_string());
        let taken_off = taken_off.and_then(|result| result.map_err(|error| error.to_string()));
        let mut note = self.note(
            ChangeKind::Detach,
            Some(by.clone()),
            self.shared.live().path.clone(),
        );
        match taken_off {
            Ok(()) => {
                tracing::warn!(%by, "the programs were taken off: nothing is enforced any more");
                self.shared.changes.change(|journal| journal.detached(note));
                self.detached = true;
                Ok(Detached { interfaces })
            }
            // What is off comes back with the next look.
            Err(error) => {
                note.error = Some(error.clone());
                self.shared.changes.change(|journal| journal.refuse(note));
                Err(Refused {
                    code: RefusalCode::Internal,
                    error: format!("not everything could be taken off, and comes back: {error}"),
                })
            }
        }
    }

    /// The files are to be compiled, whether they changed or not. While other work is running
    /// this comes after it: that may have read the files already.
    pub fn want(&mut self, cause: &'static str, ask: Option<Reload>) {
        let wanted = self.wanted.get_or_insert(Wanted {
            cause,
            always: true,
            asks: Vec::new(),
        });
        (wanted.cause, wanted.always) = (cause, true);
        wanted.asks.extend(ask);
    }

    /// Whether a reload that somebody asked for is not done yet.
    pub fn is_asked(&self) -> bool {
        // During a trial it waits, and nobody waits for it.
        let wanted = self.wanted.as_ref().filter(|_| self.trial.is_none());
        wanted.is_some_and(|wanted| wanted.always)
            || self.running.as_ref().is_some_and(|running| running.asked)
    }

    /// The files may have changed.
    pub fn files_changed(&mut self) {
        self.wanted.get_or_insert(Wanted {
            cause: "files changed",
            always: false,
            asks: Vec::new(),
        });
    }

    /// What is known from what was compiled last, for who compiles something else; not for long, as
    /// the next reload waits for it.
    pub fn memory(&self) -> Arc<Mutex<Memory>> {
        Arc::clone(&self.memory)
    }

    /// Whether the live image has taken this host for another for too long: what it says about
    /// local addresses is no ground to refuse anything.
    pub fn stale(&self) -> bool {
        self.stale
            .is_some_and(|since| since.elapsed() > GRACE || self.unfit.is_some())
    }

    /// What is wrong.
    pub fn problem(&self) -> Option<String> {
        let (_, _, error) = self.unfit.as_ref()?;
        Some(format!(
            "the policy in force does not know this host's addresses and interfaces as they are \
             now: {error}"
        ))
    }

    /// Slots that the live image, or one that may become it, means.
    pub fn slots(&self) -> BTreeSet<u32> {
        let running = self.running.iter().map(|running| &running.environment);
        let trial = self.trial.iter().map(Trial::environment);
        std::iter::once(&self.environment)
            .chain(running)
            .chain(trial)
            .flat_map(|environment| environment.interfaces.keys().copied())
            .collect()
    }

    /// When [`Reloads::step`] has something to do even if nothing happens.
    pub fn rests_until(&self) -> Option<Instant> {
        let end = self.rest.end().filter(|_| self.rest.awaited);
        end.filter(|_| self.running.is_none())
    }

    /// Starts the next work unless some is running. `now` is the host as it is. During a trial only
    /// the host's changes are followed.
    pub fn step(&mut self, now: &Environment) {
        let live = Meaning::of(&self.shared.live());
        let relevant = match &self.trial {
            Some(trial) if trial.names_interfaces() => now.clone(),
            Some(_) | None => live.relevant(now),
        };
        if relevant.host_addresses == self.environment.host_addresses {
            self.stale = None;
        } else {
            self.stale.get_or_insert_with(Instant::now);
        }
        let fits = relevant == self.environment
            && self
                .trial
                .as_ref()
                .is_none_or(|t| *t.environment() == relevant);
        if fits {
            self.unfit = None;
        }
        if self.running.is_some() {
            return;
        }
        if self.start_wanted(now) {
            return;
        }
        let tried_for = |(environment, at, _): &(Environment, Instant, String)| {
            *environment == relevant && at.elapsed() < RETRY
        };
        // Of a policy that nobody could read there is the image alone.
        let known = self.shared.live().known && self.trial.as_ref().is_none_or(Trial::is_known);
        let wanted = known && !fits && !self.unfit.as_ref().is_some_and(tried_for);
        self.rest.awaited = false;
        if wanted && self.rest.over(Instant::now()) {
            let cause = if self.stale.is_some() {
                ADDRESSES
            } else {
                INTERFACES
            };
            // Not the files: they may be broken, or waiting for somebody's word.
            let environment = relevant.clone();
            let memory = Arc::clone(&self.memory);
            let previous = self.trial.as_ref().map(Trial::meaning);
            self.start(cause, &relevant, move || {
                let previous = previous.map(|p| p.image(&environment, &mut Known::default()));
                let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
                let image = live.image(&environment, &mut memory.image);
                drop(memory);
                match previous {
                    None => Output::Host(live, image),
                    Some(previous) => Output::Both(previous.and_then(|p| Ok([p, image?]))),
                }
            });
        }
    }

    /// Starts what people asked for, or the look at files; whether there was any.
    fn start_wanted(&mut self, now: &Environment) -> bool {
        let (environment, memory) = (now.clone(), Arc::clone(&self.memory));
        if let Some((proposal, answer)) = self.proposals.pop_front() {
            let (shared, settings) = (Arc::clone(&self.shared), self.sources.settings.clone());
            let (what, trust) = (proposal.what.clone(), self.sources.trust);
            self.start("request", now, move || {
                Output::Proposal(proposed(
                    what,
                    settings,
                    trust,
                    &shared,
                    &environment,
                    &memory,
                ))
            });
            if let Some(running) = &mut self.running {
                running.asked = true;
                running.proposal = Some((proposal, answer));
            }
            return true;
        }
        let Some(wanted) = self.wanted.take_if(|_| self.trial.is_none()) else {
            return false;
        };
        let sources = self.sources.clone();
        let tried = self.tried.clone().filter(|_| !wanted.always);
        let elsewhere = self.origin.kind != OriginKind::Watched && !wanted.always;
        let applied = elsewhere.then(|| self.texts.clone());
        self.start(wanted.cause, now, move || {
            from_files(&sources, tried.as_ref(), applied, &environment, &memory)
        });
        if let Some(running) = &mut self.running {
            running.asked = wanted.always;
            running.asks = wanted.asks;
        }
        true
    }

    fn start(
        &mut self,
        cause: &'static str,
        environment: &Environment,
        work: impl FnOnce() -> Output + Send + 'static,
    ) {
        self.running = Some(Running {
            cause,
            asked: false,
            asks: Vec::new(),
            proposal: None,
            environment: environment.clone(),
            since: Instant::now(),
            task: spawn_blocking(work),
        });
    }

    /// Waits for the work to be done, for ever if there is none. Safe to drop and call again;
    /// the work goes on. Call [`Reloads::finish`] with the answer.
    pub async fn done(&mut self) -> Done {
        match &mut self.running {
            Some(running) => Done((&mut running.task).await.map_err(|e| e.to_string())),
            None => std::future::pending().await,
        }
    }
}

/// What finished work has to say.
pub struct Done(Result<Output, String>);

/// `applied` is what is in force, if it is from elsewhere.
fn from_files(
    sources: &Sources,
    tried: Option<&Texts>,
    applied: Option<Texts>,
    environment: &Environment,
    memory: &Mutex<Memory>,
) -> Output {
    let texts = match files::read_all(sources) {
        Ok(texts) if tried.is_some_and(|tried| tried.same(&texts)) => return Output::SameFiles,
        Ok(texts) => texts,
        Err(error) => {
            return Output::Files {
                tried: None,
                result: Box::new(Err(Rejected::Files(error))),
                settings_only: false,
            };
        }
    };
    // What was applied is newer than the watched policy until somebody edits that.
    let same_policy = tried.is_some_and(|tried| tried.policy == texts.policy);
    let applied = applied.filter(|_| same_policy).map(|applied| Texts {
        policy: applied.policy,
        settings: texts.settings.clone(),
    });
    let settings_only = applied.is_some();
    let result = compile(
        applied.unwrap_or_else(|| texts.clone()),
        environment,
        memory,
    );
    Output::Files {
        tried: Some(texts),
        result: Box::new(result),
        settings_only,
    }
}

fn compile(
    texts: Texts,
    environment: &Environment,
    memory: &Mutex<Memory>,
) -> Result<Loaded, Rejected> {
    let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
    progress::logged(|progress| load::compile_again(texts, environment, &mut memory, progress))
}

/// What somebody wants in force, and the state that it is, if it was so before.
fn proposed(
    what: What,
    settings: Option<files::SettingsPath>,
    trust: super::guard::Trust,
    shared: &Shared,
    environment: &Environment,
    memory: &Mutex<Memory>,
) -> Result<Box<(Loaded, Option<u64>)>, Refused> {
    let (texts, state) = match what {
        What::Path(segments) => {
            if let Some(error) = files::no_policy(&segments) {
                return Err(Refused::rejected(format!("error: {error}")));
            }
            let sources = Sources {
                segments,
                settings,
                trust,
            };
            let texts = files::read_all(&sources);
            let texts = texts.map_err(|e| Refused::rejected(format!("error: {e}")))?;
            (texts, None)
        }
        What::State(number) => {
            let (texts, state) = swap::earlier(shared, number)?;
            (texts, Some(state))
        }
    };
    let loaded = compile(texts, environment, memory);
    let loaded = loaded.map_err(|rejected| Refused::rejected(rejected.render(false)))?;
    Ok(Box::new((loaded, state)))
}

/// Why a reload changed nothing.
enum Failure {
    Rejected(Rejected),
    Dataplane(DataplaneError),
    Crashed(String),
}

impl Failure {
    fn summary(&self) -> String {
        match self {
            Self::Rejected(rejected) => rejected.summary(),
            Self::Dataplane(error) => error.to_string(),
            Self::Crashed(error) => format!("internal error: {error}"),
        }
    }

    fn render(&self) -> String {
        match self {
            Self::Rejected(rejected) => rejected.render(false),
            Self::Dataplane(_) | Self::Crashed(_) => self.summary(),
        }
    }

    fn log(&self) {
        if let Self::Rejected(rejected) = self {
            let diagnostics = rejected.diagnostics().iter();
            for d in diagnostics.filter(|d| d.severity == Severity::Error) {
                tracing::error!(
                    code = d.code,
                    file = &*d.file,
                    line = d.line,
                    column = d.column,
                    help = d.help.as_deref(),
                    "{}",
                    d.message
                );
            }
        }
    }
}

#[cfg(test)]
mod tests;
