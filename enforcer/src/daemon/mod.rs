//! The daemon: policy files, interfaces and addresses in; hooks, denials and a control socket
//! out.
//!
//! Must not know: aya, the command line. The kernel comes in as a [`Dataplane`].

pub mod acts;
pub mod adopt;
pub mod clock;
pub mod control;
pub mod doctor;
pub mod environment;
pub mod expedite;
pub mod explain;
pub mod files;
pub mod guard;
pub mod links;
pub mod load;
pub mod netlink;
pub mod notify;
pub mod plan;
pub mod preflight;
pub mod progress;
pub mod reload;
pub mod rest;
mod rivals;
pub mod routes;
pub mod selection;
pub mod shadow;
pub mod slots;
pub mod start;
pub mod state;
pub mod store;
pub mod tamper;
pub mod topology;
pub mod watch;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use enforcer_common::image::SIZE_CLASSES;
use tokio::{
    sync::{mpsc, watch as signal},
    task::{AbortHandle, spawn_blocking},
};

use crate::{
    api::{
        peer::Authority,
        server,
        socket::{Socket, SocketError},
    },
    compile::Image,
    dataplane::{
        Adopted, Dataplane, DataplaneError, SocketHooks, cgroup::cgroup2_root, release_memory,
        share_heaps,
    },
    events::{
        Generations,
        cgroups::Cgroups,
        enrich::Enricher,
        reader::{Reader, SharedDataplane, Told},
    },
};

use adopt::Before;
use control::Control;
use environment::Host;
use expedite::Expedite;
use files::{SettingsPath, Sources};
use guard::Trust;
use links::{Effort, Links};
use load::Rejected;
use notify::Notify;
use selection::Selection;
use start::{Chosen, Started};
use state::Shared;
use store::{SavedImage, Store};

/// What `enforcer run` is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory or file.
    pub segments: PathBuf,
    /// The daemon's own settings.
    pub settings: Option<SettingsPath>,
    /// What is asked of these files.
    pub trust: Trust,
    /// Where to enforce.
    pub interfaces: Selection,
    /// Where to listen.
    pub socket: PathBuf,
    /// Where to listen for those who only ask.
    pub view_socket: Option<ViewSocket>,
    /// What the socket hooks are to do, as far as the interfaces permit.
    pub socket_hooks: SocketHooks,
    /// Where the history and the last states are kept; `None`: in memory.
    pub state_dir: Option<PathBuf>,
    /// A policy that was not in force before is on trial for so long.
    pub confirm_within: Option<Duration>,
}

/// The socket of those who only ask.
#[derive(Clone, Debug)]
pub struct ViewSocket {
    /// Where.
    pub path: PathBuf,
    /// Somebody named it: no start without.
    pub required: bool,
}

/// Why the daemon ended, if nothing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was told to stop.
    Stopped,
    /// The programs were taken off at somebody's word, and are to stay off.
    Detached,
}

/// Why the daemon did not start, or stopped. Nothing is enforced then.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The policy is no good, or the settings are.
    #[error("{}: {}", .0.headline(), .0.summary())]
    Policy(Rejected),
    /// The control socket cannot be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The kernel said no.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// An interface that was asked for cannot be enforced.
    #[error("cannot enforce {interface}: {error}")]
    Interface {
        /// Which.
        interface: String,
        /// Why.
        error: String,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What the last answer takes to be read.
const ANSWERED: std::time::Duration = std::time::Duration::from_millis(300);

fn system(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::System { what, source }
}

/// Runs until `stop` turns true. What is pinned enforces on after that; the rest is taken off.
/// `reload` asks for a reload (SIGHUP). `open` adopts what an earlier daemon has left, if there is
/// any; with a number, it loads the kernel programs for images of so many words.
///
/// # Errors
/// [`RunError`]; what was enforced before goes on, if anything was.
pub async fn run(
    config: Config,
    mut open: impl FnMut(Option<u32>) -> Result<Option<Box<dyn Dataplane>>, DataplaneError>,
    mut reload: mpsc::Receiver<()>,
    mut stop: signal::Receiver<bool>,
) -> Result<Ended, RunError> {
    let notify = Arc::new(Notify::from_env());
    notify.status("reading the policy");
    share_heaps();
    // Before the kernel is touched: another daemon may be at work.
    let sockets = Arc::new(listen(&config)?);
    let mut before = match open(None)? {
        Some(dataplane) => Before::of(dataplane)?,
        None => Before::default(),
    };
    let mut host = Host::read().map_err(system("cannot list interfaces"))?;
    let changes = Arc::new(Store::open(config.state_dir.as_deref()));
    let expedite = Expedite::of_kernel(changes.path(), &config.socket);
    expedite.mend();
    let links = Links::new(config.interfaces.clone(), config.socket_hooks);
    let mut links = links.expedited(expedite.clone());
    links.adopt(&before.adopted.slots);
    if links.follow_default_route() {
        host.look_at_routes()
            .map_err(system("cannot list default routes"))?;
    }
    let mut left = start::trial(&mut before, &changes)?;
    let mut fresh = before.dataplane.is_none();
    // Nothing is at work: what was in force when the daemon last ran is so before anything is parsed.
    if let Some(saved) = changes.saved_image().filter(|_| fresh) {
        let dataplane = loaded(open(Some(size_class(&saved.image)))?)?;
        before = boot(dataplane, &saved, &mut links, &mut host)?;
    } else {
        host.environment.interfaces = links.name(&host, &BTreeSet::new());
    }
    let sources = Sources {
        segments: config.segments.clone(),
        settings: config.settings.clone(),
        trust: config.trust,
    };
    let chosen = loop {
        let (from, environment) = (sources.clone(), host.environment.clone());
        let (kept, within) = (Arc::clone(&changes), config.confirm_within);
        let loading = spawn_blocking(move || {
            progress::logged(|progress| {
                start::choose(&from, &kept, &environment, left, within, progress)
            })
        });
        let chosen = tokio::select! {
            // A compiler at work does not hold up the end.
            () = control::stopped(&mut stop) => {
                notify.stopping();
                return Ok(Ended::Stopped);
            }
            chosen = loading => chosen,
        };
        match chosen.map_err(|e| system("cannot compile")(io::Error::other(e)))? {
            Ok(chosen) => break chosen,
            // What is on trial means nothing to this daemon: what was before it comes back.
            Err(_) if left.take().is_some() => start::give_up(&mut before, &changes)?,
            Err(rejected) => break Chosen::unknown(before.without(rejected, &host)?, &before),
        }
    };
    control::log_warnings(chosen.warnings());

    notify.status("loading the programs");
    let mut dataplane = match before.dataplane.take() {
        Some(dataplane) => dataplane,
        None => {
            fresh = true;
            loaded(open(Some(size_class(chosen.image())))?)?
        }
    };
    let generations = Arc::new(Generations::default());
    let Started { live, begun, error } = start::put_in_force(
        &mut *dataplane,
        &changes,
        &generations,
        &sources,
        host.environment.clone(),
        chosen,
        &before.adopted,
    )
    .await?;
    changes.forget_saved_image();
    let outlives = dataplane.outlives();
    let told = if fresh {
        Told::default()
    } else {
        Told {
            counts: dataplane.recorded_counts()?,
            counters: dataplane.counters()?,
        }
    };
    let events = dataplane.take_events();
    let dataplane = Arc::new(Mutex::new(dataplane));
    let mut shared = Shared::new(dataplane, Arc::clone(&generations), changes, live);
    shared.expedite = expedite;
    let shared = Arc::new(shared);
    shared.note(|board| board.last_error = error);
    // What was there before this start stays when it fails half-way.
    let mut detach = Detach((fresh || !outlives).then(|| Arc::clone(&shared)));
    // What the parser and the compiler have left behind; nobody waits for it.
    drop(spawn_blocking(release_memory));

    let mut pulse = None;
    let reader = match events {
        Some(source) => {
            let cgroups = Cgroups::new(cgroup2_root().ok());
            let enricher = Enricher::new(generations, Arc::clone(&shared) as _, cgroups);
            let dataplane = Arc::clone(&shared.dataplane);
            let store = Arc::clone(&shared.store);
            let reader = Reader::new(source, dataplane, enricher, store);
            let reader = reader.map_err(system("cannot poll for records"))?;
            let reader = reader.after(told);
            pulse = Some(reader.pulse());
            Some(supervised("the reader of denials", &shared, reader.run()))
        }
        None => None,
    };

    let mut control = Control::new(sources, Arc::clone(&shared), begun, links, host);
    control.adopt_clock(before.adopted.clock);
    control.tell(Arc::clone(&notify), pulse);
    control.start()?;
    if outlives {
        detach.0 = None;
    }
    let live = shared.live();
    tracing::info!(
        policy = %live.path.display(),
        generation = live.image.generation(),
        segments = live.policy.segments.len(),
        rules = live.policy.rules.len(),
        "enforcing"
    );
    let shadow = supervised(
        "the keeper of the shadow",
        &shared,
        shadow::keep(Arc::clone(&shared)),
    );
    let (asked, asks) = mpsc::channel(8);
    let server = server::serve(Arc::clone(&sockets), Arc::clone(&shared), asked)?;
    let server = supervised("the server of the control socket", &shared, server);

    let result = control.run(asks, &mut reload, &mut stop).await;
    let detached = control.is_detached();
    if detached {
        // Whoever asked for it has the answer.
        tokio::time::sleep(ANSWERED).await;
    }
    notify.stopping();
    server.abort();
    shadow.abort();
    // What it has counted since it was last noted.
    let last = Arc::clone(&shared);
    drop(spawn_blocking(move || shadow::note(&last)).await);
    if let Some(reader) = reader {
        reader.abort();
    }
    // The server may hold them for a moment more.
    sockets.iter().for_each(Socket::remove);
    if let Some(unkept) = shared.changes.persist().await {
        tracing::error!("{unkept}");
    }
    if detached {
        tracing::info!("stopping: nothing is enforced");
    } else if outlives {
        tracing::info!("stopping: what is in force stays so; to end it: enforcer detach");
    } else {
        tracing::info!("stopping: taking the programs off");
    }
    detach.now()?;
    result.map_err(system("the daemon cannot go on"))?;
    Ok(if detached {
        Ended::Detached
    } else {
        Ended::Stopped
    })
}

fn loaded(opened: Option<Box<dyn Dataplane>>) -> Result<Box<dyn Dataplane>, RunError> {
    let nothing = || system("cannot load the programs")(io::Error::other("nothing was loaded"));
    opened.ok_or_else(nothing)
}

/// Puts the saved image in force, on the interfaces that it knows and all others that are asked for.
/// What cannot be enforced ends the start a moment later.
fn boot(
    mut dataplane: Box<dyn Dataplane>,
    saved: &SavedImage,
    links: &mut Links,
    host: &mut Host,
) -> Result<Before, RunError> {
    let known = &saved.environment.interfaces;
    links.known(host, known);
    host.environment.interfaces = links.name(host, &known.keys().copied().collect());
    dataplane.apply(&saved.image)?;
    let dataplane: SharedDataplane = Arc::new(Mutex::new(dataplane));
    clock::Clock::default().refresh(&dataplane);
    links.sync(&dataplane, host, Effort::Whole);
    let generation = saved.image.generation();
    tracing::info!(
        generation,
        "the last image is in force until the policy is read"
    );
    let dataplane = Arc::into_inner(dataplane);
    let dataplane = dataplane.map(|d| d.into_inner().unwrap_or_else(PoisonError::into_inner));
    Ok(Before {
        dataplane,
        adopted: Adopted {
            live: Some(saved.image.clone()),
            generation,
            ..Adopted::default()
        },
        refused: None,
    })
}

fn listen(config: &Config) -> Result<Vec<Socket>, SocketError> {
    let mut sockets = vec![Socket::bind(&config.socket, Authority::Change)?];
    if let Some(view) = &config.view_socket {
        match Socket::bind(&view.path, Authority::View) {
            Ok(socket) => sockets.push(socket),
            Err(error) if view.required => return Err(error),
            Err(error) => tracing::warn!(%error, "those who only ask have no socket"),
        }
    }
    Ok(sockets)
}

/// Runs a task that is to end only when it is aborted; any other end shows in the status.
fn supervised(
    what: &'static str,
    shared: &Arc<Shared>,
    work: impl Future<Output = ()> + Send + 'static,
) -> AbortHandle {
    let task = tokio::spawn(work);
    let handle = task.abort_handle();
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let how = match task.await {
            Err(error) if error.is_cancelled() => return,
            Err(error) => error.to_string(),
            Ok(()) => "nobody asked it to".to_owned(),
        };
        tracing::error!("{what} has ended: {how}");
        shared.note(|board| {
            let problem = format!("{what} has ended ({how}): restart the daemon");
            board.ended.push(problem);
        });
    });
    handle
}

/// The size class to load: room for twice the image, so that a policy may grow without a restart.
fn size_class(image: &Image) -> u32 {
    let wanted = image.words().len().saturating_mul(2);
    SIZE_CLASSES
        .into_iter()
        .find(|class| *class as usize >= wanted)
        .unwrap_or_else(|| image.size_class())
}

/// Takes the programs off, also when a start fails half-way.
struct Detach(Option<Arc<Shared>>);

impl Detach {
    fn now(mut self) -> Result<(), DataplaneError> {
        self.0.take().map_or(Ok(()), |shared| shared.detach_all())
    }
}

impl Drop for Detach {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take()
            && let Err(error) = shared.detach_all()
        {
            tracing::error!(%error, "cannot take all programs off");
        }
    }
}
