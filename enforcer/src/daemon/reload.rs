//! Compiles policies beside the control task, one at a time, and swaps what comes out.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::oneshot,
    task::{JoinHandle, spawn_blocking},
};

use crate::{
    api::types::{Reloaded, Time},
    compile::{CompileError, Image},
    dataplane::{DataplaneError, release_memory},
    policy::{
        Severity,
        model::{Environment, Policy},
    },
    settings::Settings,
};

use super::{
    control::log_warnings,
    files::{self, Sources, Texts},
    load::{self, Loaded, Memory, Rejected},
    progress,
    state::{Live, Shared},
};

/// Longer than this the live image may not know an address of this host before it counts as stale.
const GRACE: Duration = Duration::from_secs(1);
/// After a failure for the host as it is now the next attempt comes so much later.
const RETRY: Duration = Duration::from_secs(10);
const ADDRESSES: &str = "addresses of this host changed";
const INTERFACES: &str = "interfaces of this host changed";

/// A request to reload, and where the answer goes. The error is for a person.
pub type Ask = oneshot::Sender<Result<Reloaded, String>>;

/// What is to be compiled, is being compiled, and was.
pub struct Reloads {
    sources: Sources,
    shared: Arc<Shared>,
    /// What was tried last, good or bad; `None` when reading it failed.
    tried: Option<Texts>,
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
    running: Option<Running>,
}

/// The next look at the files.
struct Wanted {
    cause: &'static str,
    /// Also when the files are those that were tried last.
    always: bool,
    asks: Vec<Ask>,
}

struct Running {
    cause: &'static str,
    asks: Vec<Ask>,
    environment: Environment,
    task: JoinHandle<Output>,
}

enum Output {
    /// The files are those that were tried last: an editor's other files change the directory,
    /// too.
    SameFiles,
    Files(Option<Texts>, Box<Result<Loaded, Rejected>>),
    /// The live policy, for another host.
    Host(Meaning, Result<Image, CompileError>),
}

/// What an image is made of.
#[derive(Clone)]
struct Meaning {
    policy: Arc<Policy>,
    settings: Arc<Settings>,
    /// Whether the settings come from a file.
    from_file: bool,
}

impl Meaning {
    fn of(live: &Live) -> Self {
        Self {
            policy: Arc::clone(&live.policy),
            settings: Arc::clone(&live.settings),
            from_file: live.settings_path.is_some(),
        }
    }

    /// What their image depends on.
    fn relevant(&self, environment: &Environment) -> Environment {
        let mut environment = environment.clone();
        if !names_interfaces(&self.policy, &self.settings) {
            environment.interfaces.clear();
        }
        environment
    }
}

/// Whether an image depends on which interfaces there are: most do not, and need not be made anew
/// for every container that comes or goes.
fn names_interfaces(policy: &Policy, settings: &Settings) -> bool {
    let segments = &policy.segments;
    settings.names_interfaces() || segments.iter().any(|s| !s.interfaces.is_empty())
}

impl Reloads {
    /// `texts` are those of the live policy, compiled for `environment`; `generation` is the largest
    /// that ever judged.
    pub fn new(
        sources: Sources,
        shared: Arc<Shared>,
        texts: Texts,
        memory: Memory,
        generation: u32,
        environment: &Environment,
    ) -> Self {
        let live = shared.live();
        let environment = Meaning::of(&live).relevant(environment);
        Self {
            sources,
            shared,
            tried: Some(texts),
            memory: Arc::new(Mutex::new(memory)),
            generation,
            environment,
            stale: None,
            unfit: None,
            wanted: None,
            running: None,
        }
    }

    /// The files are to be compiled, whether they changed or not. While other work is running
    /// this comes after it: that may have read the files already.
    pub fn want(&mut self, cause: &'static str, ask: Option<Ask>) {
        let wanted = self.wanted.get_or_insert(Wanted {
            cause,
            always: true,
            asks: Vec::new(),
        });
        (wanted.cause, wanted.always) = (cause, true);
        wanted.asks.extend(ask);
    }

    /// The files may have changed.
    pub fn files_changed(&mut self) {
        self.wanted.get_or_insert(Wanted {
            cause: "files changed",
            always: false,
            asks: Vec::new(),
        });
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
        std::iter::once(&self.environment)
            .chain(running)
            .flat_map(|environment| environment.interfaces.keys().copied())
            .collect()
    }

    /// Starts the next work unless some is running. `now` is the host as it is.
    pub fn step(&mut self, now: &Environment) {
        let live = Meaning::of(&self.shared.live());
        let relevant = live.relevant(now);
        if relevant.host_addresses == self.environment.host_addresses {
            self.stale = None;
        } else {
            self.stale.get_or_insert_with(Instant::now);
        }
        if relevant == self.environment {
            self.unfit = None;
        }
        if self.running.is_some() {
            return;
        }
        if let Some(wanted) = self.wanted.take() {
            let sources = self.sources.clone();
            let tried = self.tried.clone().filter(|_| !wanted.always);
            let (environment, memory) = (now.clone(), Arc::clone(&self.memory));
            self.start(wanted.cause, wanted.asks, now, move || {
                from_files(&sources, tried.as_ref(), &environment, &memory)
            });
            return;
        }
        let tried_for = |(environment, at, _): &(Environment, Instant, String)| {
            *environment == relevant && at.elapsed() < RETRY
        };
        // Of a policy that nobody could read there is the image alone.
        if self.shared.live().known
            && relevant != self.environment
            && !self.unfit.as_ref().is_some_and(tried_for)
        {
            let cause = if self.stale.is_some() {
                ADDRESSES
            } else {
                INTERFACES
            };
            // Not the files: they may be broken, or waiting for somebody's word.
            let environment = relevant.clone();
            let memory = Arc::clone(&self.memory);
            self.start(cause, Vec::new(), &relevant, move || {
                let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
                let (policy, settings, known) = (&live.policy, &live.settings, &mut memory.image);
                let image = progress::logged(|progress| {
                    load::image(policy, settings, &environment, known, progress)
                });
                drop(memory);
                Output::Host(live, image)
            });
        }
    }

    fn start(
        &mut self,
        cause: &'static str,
        asks: Vec<Ask>,
        environment: &Environment,
        work: impl FnOnce() -> Output + Send + 'static,
    ) {
        self.running = Some(Running {
            cause,
            asks,
            environment: environment.clone(),
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

    /// Swaps the image. On error the one in force stays, and the log and the board say why.
    pub async fn finish(&mut self, done: Done) {
        let Some(running) = self.running.take() else {
            return;
        };
        let cause = running.cause;
        let result = match done.0 {
            Ok(Output::SameFiles) => return,
            Ok(Output::Host(meaning, image)) => {
                let result = match image {
                    Ok(image) => self.swap(cause, meaning, image).await,
                    Err(error) => Err(Failure::Rejected(Rejected::Compile(error))),
                };
                self.fitted(running.environment, result);
                return;
            }
            Ok(Output::Files(tried, result)) => {
                self.tried = tried;
                match *result {
                    Ok(loaded) => {
                        log_warnings(&loaded.warnings);
                        let meaning = Meaning {
                            policy: Arc::new(loaded.policy),
                            settings: Arc::new(loaded.settings),
                            from_file: loaded.texts.settings.is_some(),
                        };
                        self.swap(cause, meaning, loaded.image).await
                    }
                    Err(rejected) => Err(Failure::Rejected(rejected)),
                }
            }
            Err(error) => Err(Failure::Crashed(error)),
        };
        let error = result.as_ref().err().map(Failure::summary);
        if let (Some(summary), Err(failure)) = (&error, &result) {
            tracing::error!(
                cause,
                error = summary,
                generation = self.shared.live().image.generation(),
                "refused, what was in force before stays"
            );
            failure.log();
        } else {
            let live = Meaning::of(&self.shared.live());
            self.environment = live.relevant(&running.environment);
        }
        self.shared.note(|board| board.last_error = error);
        // Nobody waits for it.
        drop(spawn_blocking(release_memory));
        let answer = result.map_err(|failure| failure.render());
        for ask in running.asks {
            // The client may have left.
            let _ = ask.send(answer.clone());
        }
    }

    fn fitted(&mut self, environment: Environment, result: Result<Reloaded, Failure>) {
        match result {
            Ok(_) => self.environment = environment,
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

    async fn swap(
        &mut self,
        cause: &'static str,
        meaning: Meaning,
        image: Image,
    ) -> Result<Reloaded, Failure> {
        let live = self.shared.live();
        let Meaning {
            policy,
            settings,
            from_file,
        } = meaning;
        let settings_path = self.sources.settings.as_ref();
        let settings_path = settings_path.filter(|_| from_file).map(|s| s.path.clone());
        let generations = &self.shared.generations;
        if image.hash() == live.image.hash() {
            let generation = live.image.generation();
            tracing::info!(cause, generation, "policy unchanged");
            // Names, lines and descriptions may have changed all the same.
            generations.insert(generation, Arc::clone(&policy));
            self.shared.set_live(Live {
                path: live.path.clone(),
                policy,
                known: true,
                settings,
                settings_path,
                image: live.image.clone(),
                loaded_at: live.loaded_at,
            });
            return Ok(Reloaded {
                changed: false,
                generation,
            });
        }
        // Never 0, and never again, even if this one fails.
        self.generation = self.generation.wrapping_add(1).max(1);
        let generation = self.generation;
        let image = image.with_generation(generation);
        // Before the swap: the first denial may come at once.
        generations.insert(generation, Arc::clone(&policy));
        let shared = Arc::clone(&self.shared);
        let apply = move || {
            let mut dataplane = shared
                .dataplane
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            dataplane.apply(&image).map(|()| image)
        };
        let applied = spawn_blocking(apply)
            .await
            .map_err(|error| Failure::Crashed(error.to_string()))?;
        let image = applied.map_err(|error| {
            generations.remove(generation);
            Failure::Dataplane(error)
        })?;
        tracing::info!(
            cause,
            generation,
            segments = policy.segments.len(),
            rules = policy.rules.len(),
            hash = format!("{:016x}", image.hash()),
            "policy in force"
        );
        self.shared.set_live(Live {
            path: live.path.clone(),
            policy,
            known: true,
            settings,
            settings_path,
            image,
            loaded_at: Time::now(),
        });
        Ok(Reloaded {
            changed: true,
            generation,
        })
    }
}

/// What finished work has to say.
pub struct Done(Result<Output, String>);

fn from_files(
    sources: &Sources,
    tried: Option<&Texts>,
    environment: &Environment,
    memory: &Mutex<Memory>,
) -> Output {
    match files::read_all(sources) {
        Ok(texts) if tried.is_some_and(|tried| tried.same(&texts)) => Output::SameFiles,
        Ok(texts) => {
            let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
            let result = progress::logged(|progress| {
                load::compile_again(texts.clone(), environment, &mut memory, progress)
            });
            Output::Files(Some(texts), Box::new(result))
        }
        Err(error) => Output::Files(None, Box::new(Err(Rejected::Files(error)))),
    }
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
