//! The one task that changes anything: policy, interfaces, socket hooks.

use std::{
    io,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, watch as signal},
    time::{MissedTickBehavior, interval},
};

use crate::{
    api::types::{InterfaceState, InterfaceStatus},
    clock::Steps,
    dataplane::WallClock,
    policy::Diagnostic,
    pulse::Pulse,
};

use super::{
    RunError,
    acts::Ask,
    clock::Clock,
    environment::Host,
    files::Sources,
    links::{Effort, Links},
    netlink::{Changes, Netlink},
    notify::Notify,
    reload::{Begun, Reloads},
    state::{Ground, Shared},
    tamper::Watchman,
    watch::Watch,
};

/// Interfaces and addresses are looked at this often even if rtnetlink says nothing, and what
/// failed is tried again.
const TICK: Duration = Duration::from_secs(1);

/// Where addresses change all the time, they are looked at this often.
const ADDRESSES: Duration = Duration::from_millis(50);

/// While interfaces come and go within this time of each other, messages tell of them; looking at all
/// of them, which takes the lock that births need, is put off, but no longer than this.
const BUSY: Duration = Duration::from_millis(200);
const PUT_OFF: Duration = Duration::from_secs(3);

/// Expired flows are taken out of the table this often: long before their ages begin anew, and so
/// that no opener is charged for what has ended.
const SWEEP: Duration = Duration::from_secs(3600);

/// The task's state.
pub struct Control {
    sources: Sources,
    shared: Arc<Shared>,
    links: Links,
    host: Host,
    reloads: Reloads,
    clock: Clock,
    hooks_error: Option<String>,
    verify_error: Option<String>,
    swept: Option<Instant>,
    notify: Arc<Notify>,
    /// Of the reader of denials.
    reader: Option<Arc<Pulse>>,
    /// The start is over.
    serves: bool,
    /// Interfaces wait for their turn to be attached.
    waiting: bool,
    /// When addresses were looked at last, and when they are to be looked at again.
    looked: Instant,
    addresses_due: Option<Instant>,
    /// When interfaces changed last, and when all of them were looked at on a tick.
    changed: Option<Instant>,
    checked: Option<Instant>,
    watchman: Watchman,
}

impl Control {
    /// The live policy is `begun`; `links` has named the interfaces of `host`.
    pub fn new(
        sources: Sources,
        shared: Arc<Shared>,
        begun: Begun,
        links: Links,
        host: Host,
    ) -> Self {
        let reloads = Reloads::new(sources.clone(), Arc::clone(&shared), begun);
        Self {
            sources,
            shared,
            links,
            host,
            reloads,
            clock: Clock::default(),
            hooks_error: None,
            verify_error: None,
            swept: None,
            notify: Arc::default(),
            reader: None,
            serves: false,
            waiting: false,
            looked: Instant::now(),
            addresses_due: None,
            changed: None,
            checked: None,
            watchman: Watchman::default(),
        }
    }

    /// Tells the service manager how things are; that all goes on only while the reader of denials
    /// does, too.
    pub fn tell(&mut self, notify: Arc<Notify>, reader: Option<Arc<Pulse>>) {
        (self.notify, self.reader) = (notify, reader);
    }

    /// An earlier daemon has told the programs the time.
    pub fn adopt_clock(&mut self, told: Option<WallClock>) {
        self.clock = Clock::adopted(told);
    }

    /// Attaches for the first time.
    ///
    /// # Errors
    /// When an interface that exists cannot be enforced, or the socket hooks cannot be attached:
    /// better no start than half a start that nobody notices.
    pub fn start(&mut self) -> Result<(), RunError> {
        // A rule that has expired must not hold for the first packet.
        self.clock.refresh(&self.shared.dataplane);
        let host = self.host.clone();
        let roster = self
            .links
            .sync(&self.shared.dataplane, &host, Effort::Whole);
        let statuses = roster.statuses;
        let failed = |s: &&InterfaceStatus| s.state == InterfaceState::Failed;
        if let Some(failed) = statuses.iter().filter(failed).find(|s| s.ifindex != 0) {
            return Err(RunError::Interface {
                interface: failed.name.clone(),
                error: failed.error.clone().unwrap_or_default(),
            });
        }
        for missing in statuses.iter().filter(failed) {
            tracing::warn!(interface = missing.name, "no such interface yet");
        }
        if !statuses.iter().any(InterfaceStatus::is_asked_for) {
            tracing::warn!("no interface matches --interface: nothing is enforced yet");
        }
        self.links
            .sync_hooks(&self.shared.dataplane, &host, false)?;
        self.shared.note(|board| board.interfaces = statuses);
        self.report();
        Ok(())
    }

    /// Whether the programs were taken off at somebody's word.
    pub fn is_detached(&self) -> bool {
        self.reloads.is_detached()
    }

    /// Runs until `stop` turns true, or the programs are taken off.
    ///
    /// # Errors
    /// When the policy's files or the interfaces cannot be watched at the start.
    pub async fn run(
        &mut self,
        mut asks: mpsc::Receiver<Ask>,
        reload: &mut mpsc::Receiver<()>,
        stop: &mut signal::Receiver<bool>,
    ) -> io::Result<()> {
        let mut watch = Watch::new(&self.sources)?;
        let mut netlink = Netlink::new(self.links.follow_default_route())?;
        // What has changed before somebody listened.
        self.look_at_routes();
        // Without it the tick notices.
        let mut steps = Steps::new()
            .inspect_err(|error| tracing::warn!(%error, "cannot watch the clock"))
            .ok();
        self.serves = true;
        self.report();
        // Loading the programs takes a second, in which nobody was watching.
        self.reloads.files_changed();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.reloads.step(&self.host.environment);
            if !self.reloads.is_asked() {
                let board = self.shared.note(|board| board.clone());
                self.notify.reloaded(&board, &self.shared.live());
            }
            let due = self.due();
            tokio::select! {
                // A compiler at work does not hold up the end: nobody wants its image any more.
                () = stopped(stop) => return Ok(()),
                Some(ask) = asks.recv() => {
                    self.reloads.ask(ask).await;
                    if self.reloads.is_detached() {
                        return Ok(());
                    }
                    if self.reloads.is_asked() {
                        self.notify.reloading();
                    }
                    self.report();
                }
                () = self.reloads.due() => {
                    self.reloads.look_at_trial().await;
                    self.report();
                }
                Some(()) = reload.recv() => {
                    self.reloads.want("SIGHUP", None);
                    if self.reloads.is_asked() {
                        self.notify.reloading();
                    }
                }
                done = self.reloads.done() => {
                    self.reloads.finish(done).await;
                    self.report();
                }
                changed = watch.changed() => match changed {
                    Ok(()) => self.reloads.files_changed(),
                    Err(error) => broken("cannot watch the policy's files", &error).await,
                },
                changes = netlink.changed() => match changes {
                    Ok(changes) => self.follow(&changes),
                    Err(error) => broken("cannot listen to rtnetlink", &error).await,
                },
                () = until(due) => self.catch_up(),
                () = step(&mut steps) => {
                    self.clock.refresh(&self.shared.dataplane);
                    self.report();
                }
                _ = tick.tick() => {
                    self.clock.refresh(&self.shared.dataplane);
                    watch.repair();
                    self.check();
                    self.sweep();
                    self.notify.alive(|within| self.not_well(within));
                }
            }
        }
    }

    /// Takes expired flows out of the table when it is time.
    fn sweep(&mut self) {
        if self.swept.is_some_and(|swept| swept.elapsed() < SWEEP) {
            return;
        }
        self.swept = Some(Instant::now());
        let dataplane = self.shared.dataplane.lock();
        let swept = dataplane.unwrap_or_else(PoisonError::into_inner).sweep();
        if let Err(error) = swept {
            tracing::error!(%error, "cannot take expired flows out of the table");
        }
    }

    /// Why the watchdog is to hear nothing: what does not go on, but for this task, which is here.
    fn not_well(&self, within: Duration) -> Option<String> {
        let ended = self.shared.note(|board| board.ended.first().cloned());
        if ended.is_some() {
            return ended;
        }
        if self.reader.as_ref().is_some_and(|r| !r.is_within(within)) {
            return Some("the reader of denials does not go on".to_owned());
        }
        if !self.shared.serving.is_within(within) {
            return Some("the server of the control socket does not go on".to_owned());
        }
        let dataplane = self.shared.dataplane.lock();
        let counters = dataplane.unwrap_or_else(PoisonError::into_inner).counters();
        counters
            .err()
            .map(|error| format!("the kernel's counters cannot be read: {error}"))
    }

    /// Asks the kernel whether what was attached still is.
    fn verify(&mut self) {
        let error = self.links.verify(&self.shared.dataplane).err();
        let error = error.map(|e| format!("cannot ask for the programs attached: {e}"));
        if let Some(error) = error
            .as_ref()
            .filter(|e| self.verify_error.as_ref() != Some(e))
        {
            tracing::error!("{error}");
        }
        self.verify_error = error;
    }

    /// Sees to it that all is as it is believed to be.
    fn check(&mut self) {
        let within = |moment: Option<Instant>, limit| moment.is_some_and(|m| m.elapsed() < limit);
        if within(self.changed, BUSY) && within(self.checked, PUT_OFF) {
            return;
        }
        self.checked = Some(Instant::now());
        self.verify();
        self.watchman.look(&self.shared, self.links.restored());
        self.look();
    }

    /// Takes over what rtnetlink says: new interfaces get their programs at once.
    fn follow(&mut self, changes: &Changes) {
        self.links.removed(&self.shared.dataplane, &changes.removed);
        if changes.lost {
            tracing::warn!("messages about interfaces were lost: looking at all of them");
            self.look_at_routes();
            self.verify();
            return self.look();
        }
        if changes.routes {
            self.look_at_routes();
        }
        if changes.addresses {
            let due = self.looked + ADDRESSES;
            self.addresses_due.get_or_insert(due);
        }
        if changes.look {
            return self.look();
        }
        self.host.follow(changes);
        if !changes.links.is_empty() || !changes.removed.is_empty() {
            self.changed = Some(Instant::now());
        }
        if changes.routes || !changes.links.is_empty() || !changes.removed.is_empty() {
            self.settle(Effort::Told);
        }
    }

    /// When something is to be done even if nothing happens.
    fn due(&self) -> Option<Instant> {
        let waiting = self.waiting.then(Instant::now);
        let due = [waiting, self.addresses_due, self.reloads.rests_until()];
        due.into_iter().flatten().min()
    }

    /// Does what is due.
    fn catch_up(&mut self) {
        if self.addresses_due.is_some_and(|due| due <= Instant::now()) {
            if let Err(error) = self.host.look_at_addresses() {
                tracing::error!(%error, "cannot list addresses");
            }
            self.looked = Instant::now();
            self.addresses_due = None;
            self.report();
        }
        if self.waiting {
            self.settle(Effort::Told);
        }
    }

    fn look_at_routes(&mut self) {
        if self.links.follow_default_route()
            && let Err(error) = self.host.look_at_routes()
        {
            tracing::error!(%error, "cannot list default routes");
        }
    }

    /// Looks at interfaces and addresses.
    fn look(&mut self) {
        if let Err(error) = self.host.look() {
            tracing::error!(%error, "cannot list interfaces");
            return;
        }
        self.looked = Instant::now();
        self.addresses_due = None;
        self.settle(Effort::Looked);
    }

    /// Brings everything in line with the host as it is known.
    fn settle(&mut self, effort: Effort) {
        let taken = self.reloads.slots();
        self.host.environment.interfaces = self.links.name(&self.host, &taken);
        let roster = self.links.sync(&self.shared.dataplane, &self.host, effort);
        self.waiting = roster.waiting > 0;
        if roster.failed && effort == Effort::Told {
            // Gone again, most likely.
            return self.look();
        }
        let stale = self.reloads.stale();
        let hooks = self
            .links
            .sync_hooks(&self.shared.dataplane, &self.host, stale);
        let error = hooks.err().map(|error| error.to_string());
        if error != self.hooks_error {
            if let Some(error) = &error {
                tracing::error!(error, "cannot set the socket hooks");
            }
            self.hooks_error = error;
        }
        self.shared.note(|board| board.interfaces = roster.statuses);
        self.report();
    }

    /// Puts on the board what is known, but for the interfaces.
    fn report(&self) {
        let mut warnings = self.links.warnings(&self.host);
        warnings.extend(self.clock.warning());
        warnings.extend(self.watchman.warnings());
        let problems = [
            self.hooks_error.clone(),
            self.verify_error.clone(),
            self.reloads.problem(),
            self.clock.problem(),
        ];
        let problems = problems.into_iter().flatten().chain(self.links.problems());
        let trial = self.reloads.trial_problems();
        let problems = problems.chain(self.watchman.problems()).chain(trial);
        let problems: Vec<_> = problems.collect();
        self.shared.note(|board| {
            board
                .addresses
                .clone_from(&self.host.environment.host_addresses);
            board.socket_hooks = self.links.socket_hooks();
            board.socket_hooks_reason = self.links.hooks_reason();
            board.warnings = warnings;
            board.unix_floor = self.clock.floor();
            board.problems = problems;
            let environment = &self.host.environment;
            let known = board.ground.as_ref();
            if known.is_none_or(|ground| ground.environment != *environment) {
                board.ground = Some(Arc::new(Ground {
                    environment: environment.clone(),
                    sources: self.sources.clone(),
                    memory: self.reloads.memory(),
                }));
            }
        });
        let board = self.shared.note(|board| board.clone());
        self.notify.report(&board, &self.shared.live(), self.serves);
    }
}

/// Waits for a moment, for ever if there is none.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

/// Waits until somebody sets the clock.
async fn step(steps: &mut Option<Steps>) {
    let Some(waiting) = steps else {
        return std::future::pending().await;
    };
    if let Err(error) = waiting.step().await {
        tracing::warn!(%error, "cannot watch the clock any more");
        *steps = None;
    }
}

/// Enforcement goes on without: SIGHUP and the tick do the same, later.
async fn broken(what: &str, error: &io::Error) {
    tracing::error!(%error, "{what}");
    tokio::time::sleep(TICK).await;
}

/// Waits for the word to stop.
pub async fn stopped(stop: &mut signal::Receiver<bool>) {
    // An error means that the sender is gone: no reason to go on either.
    let _ = stop.wait_for(|stop| *stop).await;
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
