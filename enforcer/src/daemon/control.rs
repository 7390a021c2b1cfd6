//! The one task that changes anything: policy, interfaces, socket hooks.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot, watch as signal},
    time::{MissedTickBehavior, interval},
};

use crate::{
    api::types::{Reloaded, Time},
    dataplane::DataplaneError,
    policy::{Diagnostic, Severity, SourceFile},
};

use super::{
    Config, RunError,
    environment::Host,
    files,
    links::Links,
    load::{self, Loaded, Rejected},
    netlink::Netlink,
    state::{Live, Shared},
    watch::Watch,
};

/// Interfaces and addresses are looked at this often even if rtnetlink says nothing, and what
/// failed is tried again.
const TICK: Duration = Duration::from_secs(1);

/// A request to reload, and where the answer goes. The error is for a person.
pub type Ask = oneshot::Sender<Result<Reloaded, String>>;

/// The task's state.
pub struct Control {
    segments: PathBuf,
    shared: Arc<Shared>,
    links: Links,
    host: Host,
    /// What was tried last, good or bad; `None` when reading it failed.
    tried: Option<Vec<SourceFile>>,
    generation: u32,
    hooks_error: Option<String>,
}

impl Control {
    /// `files` are those of the live policy, compiled for `host`.
    pub fn new(config: &Config, shared: Arc<Shared>, files: Vec<SourceFile>, host: Host) -> Self {
        let generation = shared.live().image.generation();
        Self {
            segments: config.segments.clone(),
            shared,
            links: Links::new(config.interfaces.clone(), config.socket_hooks),
            host,
            tried: Some(files),
            generation,
            hooks_error: None,
        }
    }

    /// Attaches for the first time.
    ///
    /// # Errors
    /// When an interface that exists cannot be enforced, or the socket hooks cannot be attached:
    /// better no start than half a start that nobody notices.
    pub fn start(&mut self) -> Result<(), RunError> {
        let host = self.host.clone();
        let statuses = self.links.sync(&self.shared.dataplane, &host);
        if let Some(failed) = statuses.iter().find(|s| !s.enforced && s.ifindex != 0) {
            return Err(RunError::Interface {
                interface: failed.name.clone(),
                error: failed.error.clone().unwrap_or_default(),
            });
        }
        for missing in statuses.iter().filter(|s| !s.enforced) {
            tracing::warn!(interface = missing.name, "no such interface yet");
        }
        if statuses.is_empty() {
            tracing::warn!("no interface matches --interface: nothing is enforced yet");
        }
        self.links.sync_hooks(&self.shared.dataplane, &host)?;
        self.shared.note(|board| {
            board.interfaces = statuses;
            board
                .addresses
                .clone_from(&self.host.environment.host_addresses);
            board.socket_hooks = self.links.socket_hooks();
        });
        Ok(())
    }

    /// Runs until `stop` turns true.
    ///
    /// # Errors
    /// When the policy's files or the interfaces cannot be watched at the start.
    pub async fn run(
        &mut self,
        mut asks: mpsc::Receiver<Ask>,
        reload: &mut mpsc::Receiver<()>,
        stop: &mut signal::Receiver<bool>,
    ) -> io::Result<()> {
        let mut watch = Watch::new(&self.segments)?;
        let mut netlink = Netlink::new()?;
        // Loading the programs takes a second, in which nobody was watching.
        self.files_changed().await;
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stopped(stop) => return Ok(()),
                Some(ask) = asks.recv() => {
                    let answer = self.reload("request").await;
                    // The client may have left.
                    let _ = ask.send(answer);
                }
                Some(()) = reload.recv() => {
                    // Logged, and on the board.
                    let _ = self.reload("SIGHUP").await;
                }
                changed = watch.changed() => match changed {
                    Ok(()) => self.files_changed().await,
                    Err(error) => broken("cannot watch the policy's files", &error).await,
                },
                removed = netlink.changed() => match removed {
                    Ok(removed) => {
                        self.links.removed(&self.shared.dataplane, &removed);
                        self.look().await;
                    }
                    Err(error) => broken("cannot listen to rtnetlink", &error).await,
                },
                _ = tick.tick() => {
                    watch.repair();
                    self.look().await;
                }
            }
        }
    }

    /// Looks at interfaces and addresses.
    async fn look(&mut self) {
        let host = match Host::read() {
            Ok(host) => host,
            Err(error) => {
                tracing::error!(%error, "cannot list interfaces");
                return;
            }
        };
        let moved = host.environment != self.host.environment;
        self.host = host;
        let statuses = self.links.sync(&self.shared.dataplane, &self.host);
        let hooks = self.links.sync_hooks(&self.shared.dataplane, &self.host);
        let error = hooks.err().map(|error| error.to_string());
        if error != self.hooks_error {
            if let Some(error) = &error {
                tracing::error!(error, "cannot set the socket hooks");
            }
            self.hooks_error.clone_from(&error);
        }
        self.shared.note(|board| {
            board.interfaces = statuses;
            board
                .addresses
                .clone_from(&self.host.environment.host_addresses);
            board.socket_hooks = self.links.socket_hooks();
            board.problems = error.into_iter().collect();
        });
        if moved {
            let _ = self.reload("addresses of this host changed").await;
        }
    }

    /// Reloads unless the files are those that were tried last: an editor's other files change
    /// the directory, too.
    async fn files_changed(&mut self) {
        let files = files::load(&self.segments).ok();
        if files.is_some() && files == self.tried {
            return;
        }
        let _ = self.reload("files changed").await;
    }

    /// Compiles the files and swaps the image. On error the policy in force stays, and the log
    /// and the board say why.
    async fn reload(&mut self, cause: &'static str) -> Result<Reloaded, String> {
        let result = self.try_reload(cause).await;
        let error = result.as_ref().err().map(Failure::summary);
        if let (Some(summary), Err(failure)) = (&error, &result) {
            tracing::error!(
                cause,
                error = summary,
                generation = self.shared.live().image.generation(),
                "policy refused, the one before it stays in force"
            );
            failure.log();
        }
        self.shared.note(|board| board.last_error = error);
        result.map_err(|failure| failure.render())
    }

    async fn try_reload(&mut self, cause: &'static str) -> Result<Reloaded, Failure> {
        let segments = self.segments.clone();
        let environment = self.host.environment.clone();
        let work = move || {
            let files = match files::load(&segments) {
                Ok(files) => files,
                Err(error) => return (None, Err(Rejected::Files(error))),
            };
            (Some(files.clone()), load::compile(files, &environment))
        };
        let (tried, result) = tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| Failure::Crashed(error.to_string()))?;
        self.tried = tried;
        let loaded = result.map_err(Failure::Rejected)?;
        log_warnings(&loaded.warnings);
        self.swap(cause, loaded).await
    }

    async fn swap(&mut self, cause: &'static str, loaded: Loaded) -> Result<Reloaded, Failure> {
        let live = self.shared.live();
        let policy = Arc::new(loaded.policy);
        let generations = &self.shared.generations;
        if loaded.image.hash() == live.image.hash() {
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
        let image = loaded.image.with_generation(generation);
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
        let applied = tokio::task::spawn_blocking(apply)
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

/// Enforcement goes on without: SIGHUP and the tick do the same, later.
async fn broken(what: &str, error: &io::Error) {
    tracing::error!(%error, "{what}");
    tokio::time::sleep(TICK).await;
}

async fn stopped(stop: &mut signal::Receiver<bool>) {
    // An error means that the sender is gone: no reason to go on either.
    let _ = stop.wait_for(|stop| *stop).await;
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

/// Logs what the author of a policy should look at.
pub fn log_warnings(warnings: &[Diagnostic]) {
    for w in warnings {
        tracing::warn!(
            code = w.code,
            file = &*w.file,
            line = w.line,
            help = w.help.as_deref(),
            "{}",
            w.message
        );
    }
}
