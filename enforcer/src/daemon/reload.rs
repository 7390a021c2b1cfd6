//! Compiles policies beside the control task, one at a time, and swaps what comes out.

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::oneshot,
    task::{JoinHandle, spawn_blocking},
};

use crate::{
    api::types::{Reloaded, Time},
    compile::{self, CompileError, Image},
    dataplane::DataplaneError,
    policy::{
        Severity, SourceFile,
        model::{Environment, Policy},
    },
};

use super::{
    control::log_warnings,
    files,
    load::{self, Loaded, Rejected},
    state::{Live, Shared},
};

/// Longer than this the live image may not know an address of this host before it counts as stale.
const GRACE: Duration = Duration::from_secs(1);
/// After a failure for the host's new addresses the next attempt comes so much later.
const RETRY: Duration = Duration::from_secs(10);
const ADDRESSES: &str = "addresses of this host changed";

/// A request to reload, and where the answer goes. The error is for a person.
pub type Ask = oneshot::Sender<Result<Reloaded, String>>;

/// What is to be compiled, is being compiled, and was.
pub struct Reloads {
    segments: PathBuf,
    shared: Arc<Shared>,
    /// What was tried last, good or bad; `None` when reading it failed.
    tried: Option<Vec<SourceFile>>,
    generation: u32,
    /// What the live image was compiled for.
    environment: Environment,
    /// Since when this host is another than that.
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
    Files(Option<Vec<SourceFile>>, Result<Loaded, Rejected>),
    /// The live policy, for other addresses.
    Addresses(Arc<Policy>, Result<Image, CompileError>),
}

impl Reloads {
    /// `files` are those of the live policy, compiled for `environment`.
    pub fn new(
        segments: PathBuf,
        shared: Arc<Shared>,
        files: Vec<SourceFile>,
        environment: Environment,
    ) -> Self {
        let generation = shared.live().image.generation();
        Self {
            segments,
            shared,
            tried: Some(files),
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
            "the policy in force does not know the addresses that this host has now: {error}"
        ))
    }

    /// Starts the next work unless some is running. `now` is the host as it is.
    pub fn step(&mut self, now: &Environment) {
        if *now == self.environment {
            (self.stale, self.unfit) = (None, None);
        } else {
            self.stale.get_or_insert_with(Instant::now);
        }
        if self.running.is_some() {
            return;
        }
        if let Some(wanted) = self.wanted.take() {
            let segments = self.segments.clone();
            let tried = self.tried.clone().filter(|_| !wanted.always);
            let environment = now.clone();
            self.start(wanted.cause, wanted.asks, now, move || {
                from_files(&segments, tried.as_deref(), &environment)
            });
            return;
        }
        let tried_for = |(environment, at, _): &(Environment, Instant, String)| {
            environment == now && at.elapsed() < RETRY
        };
        if self.stale.is_some() && !self.unfit.as_ref().is_some_and(tried_for) {
            // Not the files: they may be broken, or waiting for somebody's word.
            let policy = Arc::clone(&self.shared.live().policy);
            let environment = now.clone();
            self.start(ADDRESSES, Vec::new(), now, move || {
                let options = compile::Options::default();
                let image = compile::compile(&policy, &environment, &options);
                Output::Addresses(policy, image)
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
            Ok(Output::Addresses(policy, image)) => {
                let result = match image {
                    Ok(image) => self.swap(cause, policy, image).await,
                    Err(error) => Err(Failure::Rejected(Rejected::Compile(error))),
                };
                self.fitted(running.environment, result);
                return;
            }
            Ok(Output::Files(tried, result)) => {
                self.tried = tried;
                match result {
                    Ok(loaded) => {
                        log_warnings(&loaded.warnings);
                        let policy = Arc::new(loaded.policy);
                        self.swap(cause, policy, loaded.image).await
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
                "policy refused, the one before it stays in force"
            );
            failure.log();
        } else {
            self.environment = running.environment;
        }
        self.shared.note(|board| board.last_error = error);
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
                    "the policy in force cannot follow this host's addresses"
                );
                self.unfit = Some((environment, Instant::now(), error));
            }
        }
    }

    async fn swap(
        &mut self,
        cause: &'static str,
        policy: Arc<Policy>,
        image: Image,
    ) -> Result<Reloaded, Failure> {
        let live = self.shared.live();
        let generations = &self.shared.generations;
        if image.hash() == live.image.hash() {
            let generation = live.image.generation();
            tracing::info!(cause, generation, "policy unchanged");
            // Names, lines and descriptions may have changed all the same.
            generations.insert(generation, Arc::clone(&policy));
            self.shared.set_live(Live {
                path: live.path.clone(),
                policy,
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
    segments: &std::path::Path,
    tried: Option<&[SourceFile]>,
    environment: &Environment,
) -> Output {
    match files::load(segments) {
        Ok(files) if Some(&*files) == tried => Output::SameFiles,
        Ok(files) => Output::Files(Some(files.clone()), load::compile(files, environment)),
        Err(error) => Output::Files(None, Err(Rejected::Files(error))),
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
        if let Self::Rejected(Rejected::Policy { diagnostics, .. }) = self {
            for d in diagnostics.iter().filter(|d| d.severity == Severity::Error) {
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
