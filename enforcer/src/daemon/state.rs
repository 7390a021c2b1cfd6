//! What the daemon's tasks share, and the status made of it.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Instant,
};

use crate::{
    api::{
        changes::{Origin, TrialStatus},
        types::{
            CounterStatus, EventStatus, ExplainRequest, Explanation, FailsafeStatus,
            FlowTableStatus, InterfaceState, InterfaceStatus, PolicyStatus, RecordStatus,
            SettingsStatus, ShadowStatus, State, Status, Time,
        },
    },
    compile::Image,
    dataplane::{Counters, DataplaneError, SocketHooks},
    events::{Generations, Store, enrich::Local, reader::SharedDataplane},
    policy::model::{Environment, Policy},
    pulse::Pulse,
    settings::{Settings, essentials_off, ethertype_name},
};

use super::{
    expedite::Expedite,
    explain::{explain, now},
    files::Sources,
    load::Memory,
    reload, shadow,
    store::Store as Changes,
};

/// The policy that judges packets.
#[derive(Debug)]
pub struct Live {
    /// Where it was read.
    pub path: PathBuf,
    /// Names and lines.
    pub policy: Arc<Policy>,
    /// Whether `policy` is what the image was made of. Otherwise an earlier daemon made it, and the
    /// files cannot be read now.
    pub known: bool,
    /// What passes before it is asked.
    pub settings: Arc<Settings>,
    /// Where they were read; `None`: they are the defaults.
    pub settings_path: Option<PathBuf>,
    /// What the kernel has.
    pub image: Image,
    /// When the image took effect.
    pub loaded_at: Time,
}

/// What a policy would be compiled for and beside, if it were to take over now.
#[derive(Clone, Debug)]
pub struct Ground {
    /// This host.
    pub environment: Environment,
    /// Where policy and settings are.
    pub sources: Sources,
    /// What is known from what was compiled last.
    pub memory: Arc<Mutex<Memory>>,
}

/// What the control task found out.
#[derive(Clone, Debug, Default)]
pub struct Board {
    /// Why the policy on disk is not the one that runs.
    pub last_error: Option<String>,
    /// Every interface, and those that should be there.
    pub interfaces: Vec<InterfaceStatus>,
    /// What the socket hooks do.
    pub socket_hooks: Option<SocketHooks>,
    /// Why they only observe when they were to refuse.
    pub socket_hooks_reason: Option<String>,
    /// Addresses of this host.
    pub addresses: BTreeSet<IpAddr>,
    /// What somebody should look at.
    pub warnings: Vec<String>,
    /// Unix seconds that the time of rules does not go back behind.
    pub unix_floor: u64,
    /// Other things that are wrong.
    pub problems: Vec<String>,
    /// Tasks that ended before their time.
    pub ended: Vec<String>,
    /// Where the policy in force came from.
    pub origin: Option<Origin>,
    /// What is on trial, and until when.
    pub trial: Option<(TrialStatus, Instant)>,
    /// What came of the last trial.
    pub notice: Option<String>,
    /// What a policy would be compiled for; `None` before the first look at this host.
    pub ground: Option<Arc<Ground>>,
}

/// Shared by the control task, the record reader and the API.
pub struct Shared {
    /// The kernel.
    pub dataplane: SharedDataplane,
    /// Names of recent policies.
    pub generations: Arc<Generations>,
    /// Recent denials.
    pub store: Arc<Store>,
    /// The history, and what can come back.
    pub changes: Arc<Changes>,
    /// A candidate policy that is asked beside the one in force.
    pub shadow: shadow::Desk,
    /// Of the server of the control socket.
    pub serving: Pulse,
    /// Short grace periods.
    pub expedite: Expedite,
    live: RwLock<Arc<Live>>,
    board: Mutex<Board>,
    started_at: Time,
}

impl Shared {
    /// `live` must be applied already.
    pub fn new(
        dataplane: SharedDataplane,
        generations: Arc<Generations>,
        changes: Arc<Changes>,
        live: Live,
    ) -> Self {
        Self {
            dataplane,
            generations,
            store: Arc::default(),
            changes,
            shadow: shadow::Desk::default(),
            serving: Pulse::default(),
            expedite: Expedite::default(),
            live: RwLock::new(Arc::new(live)),
            board: Mutex::default(),
            started_at: Time::now(),
        }
    }

    /// The policy that judges packets.
    pub fn live(&self) -> Arc<Live> {
        Arc::clone(&self.live.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Another policy judges packets now.
    pub fn set_live(&self, live: Live) {
        self.set_live_again(Arc::new(live));
    }

    /// One that did so before judges packets again.
    pub fn set_live_again(&self, live: Arc<Live>) {
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = live;
    }

    /// Changes the board; do not wait inside.
    pub fn note<T>(&self, change: impl FnOnce(&mut Board) -> T) -> T {
        change(&mut self.board.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes every program off.
    ///
    /// # Errors
    /// As [`crate::dataplane::Dataplane::detach_all`].
    pub fn detach_all(&self) -> Result<(), DataplaneError> {
        let _short = self.expedite.begin();
        let mut dataplane = self
            .dataplane
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        dataplane.detach_all()
    }

    /// Asks the live image about a flow.
    ///
    /// # Errors
    /// In words, when the request does not name one flow.
    pub fn explain(&self, request: &ExplainRequest) -> Result<Explanation, String> {
        let live = self.live();
        // As the kernel has it: not behind what rules have seen.
        let unix = now().max(self.note(|board| board.unix_floor));
        let mut explanation = explain(&live.policy, &live.image, request, unix)?;
        explanation.generation = Some(live.image.generation());
        explanation.policy = live.path.display().to_string();
        Ok(explanation)
    }

    /// Everything there is to say. Reads the kernel's counters: blocks for a moment.
    pub fn status(&self) -> Status {
        let (counters, pins) = {
            let dataplane = self.dataplane.lock();
            let dataplane = dataplane.unwrap_or_else(PoisonError::into_inner);
            (dataplane.counters(), dataplane.pins())
        };
        let live = self.live();
        let board = self.note(|board| board.clone());
        let mut problems = problems(&board);
        problems.extend(self.changes.problems());
        let counters = counters.unwrap_or_else(|error| {
            problems.push(format!("the counters cannot be read: {error}"));
            Counters::default()
        });
        let state = if !board.interfaces.iter().any(|i| i.enforced) {
            State::NotEnforcing
        } else if problems.is_empty() {
            State::Enforcing
        } else {
            State::Degraded
        };
        let mut warnings = board.warnings;
        warnings.extend(board.notice);
        let flows = flow_table(&counters);
        warnings.extend(crowded(flows));
        let shadow = self.shadow.in_short();
        if let Some((path, _, Some(problem))) = &shadow {
            warnings.push(format!("the shadow of {}: {problem}", path.display()));
        }
        Status {
            state,
            problems,
            warnings,
            generation: live.image.generation(),
            policy: PolicyStatus {
                path: live.path.display().to_string(),
                segments: live.policy.segments.len(),
                rules: live.policy.rules.len(),
                hash: format!("{:016x}", live.image.hash()),
                loaded_at: live.loaded_at,
                last_error: board.last_error,
                origin: board.origin,
            },
            trial: board.trial.as_ref().map(reload::remaining),
            shadow: shadow.map(|(path, differing, problem)| ShadowStatus {
                path: path.display().to_string(),
                differing,
                problem,
            }),
            settings: settings(&live),
            interfaces: board.interfaces,
            socket_hooks: hooks_name(board.socket_hooks).to_owned(),
            socket_hooks_reason: board.socket_hooks_reason,
            counters: counters.packets.iter().map(counter).collect(),
            events: events(&counters),
            records: counters.records.iter().map(record).collect(),
            flows,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            pins: pins.map(|pins| pins.display().to_string()),
            started_at: self.started_at,
        }
    }
}

impl Local for Shared {
    fn interface_name(&self, ifindex: u32) -> Option<Arc<str>> {
        self.note(|board| {
            let mut interfaces = board.interfaces.iter();
            let interface = interfaces.find(|i| i.ifindex == ifindex)?;
            Some(interface.name.as_str().into())
        })
    }

    fn addresses(&self) -> BTreeSet<IpAddr> {
        self.note(|board| board.addresses.clone())
    }
}

/// As on the command line.
pub fn hooks_name(hooks: Option<SocketHooks>) -> &'static str {
    match hooks {
        Some(SocketHooks::Refuse) => "refuse",
        Some(SocketHooks::Observe) => "observe",
        Some(SocketHooks::Off) | None => "off",
    }
}

/// What is wrong, in words.
pub(super) fn problems(board: &Board) -> Vec<String> {
    let mut problems = Vec::new();
    if let Some(error) = &board.last_error {
        problems.push(format!(
            "what is on disk was refused, what was in force before stays: {error}"
        ));
    }
    if !board.interfaces.iter().any(InterfaceStatus::is_asked_for) {
        problems.push("no interface matches --interface".to_owned());
    }
    let failed = |i: &&InterfaceStatus| i.state == InterfaceState::Failed;
    for interface in board.interfaces.iter().filter(failed) {
        let why = interface.error.as_deref().unwrap_or("no hook is attached");
        problems.push(format!("{} is not enforced: {why}", interface.name));
    }
    problems.extend(board.problems.iter().chain(&board.ended).cloned());
    problems
}

fn settings(live: &Live) -> SettingsStatus {
    let settings = &live.settings;
    let texts = |list: &[ipnet::IpNet]| list.iter().map(ToString::to_string).collect();
    let failsafes = settings.failsafes.iter().map(|failsafe| FailsafeStatus {
        name: failsafe.name.clone(),
        sources: texts(&failsafe.passes.sources),
        ports: failsafe.ports(),
        interfaces: failsafe
            .passes
            .interfaces
            .iter()
            .map(|pattern| pattern.as_str().to_owned())
            .collect(),
    });
    SettingsStatus {
        path: live.settings_path.as_ref().map(|p| p.display().to_string()),
        failsafes: failsafes.collect(),
        essentials_off: essentials_off(settings.essentials)
            .into_iter()
            .map(str::to_owned)
            .collect(),
        ethertypes: settings
            .ethertypes
            .iter()
            .copied()
            .map(ethertype_name)
            .collect(),
    }
}

fn record(count: &crate::dataplane::RecordCount) -> RecordStatus {
    RecordStatus {
        hook: count.hook.name().to_owned(),
        events: EventStatus {
            emitted: count.emitted,
            suppressed: count.suppressed,
            lost: count.lost,
        },
    }
}

fn flow_table(counters: &Counters) -> FlowTableStatus {
    let refused = counters.records.iter().map(|hook| hook.flow_insert_failed);
    FlowTableStatus {
        capacity: counters.flows,
        refused: refused.sum(),
    }
}

/// What to do where flows find no room.
fn crowded(flows: FlowTableStatus) -> Option<String> {
    let FlowTableStatus { capacity, refused } = flows;
    (refused != 0).then(|| {
        format!(
            "packets that found no room for their flow in the flow table (--flows {capacity}): \
             {refused}; answers to them may be denied: start with a larger --flows"
        )
    })
}

fn counter(count: &crate::dataplane::PacketCount) -> CounterStatus {
    CounterStatus {
        hook: count.hook.name().to_owned(),
        outcome: count.outcome.name().to_owned(),
        reason: count.reason.name().to_owned(),
        packets: count.packets,
    }
}

fn events(counters: &Counters) -> EventStatus {
    let mut sum = EventStatus::default();
    for hook in &counters.records {
        sum.emitted += hook.emitted;
        sum.suppressed += hook.suppressed;
        sum.lost += hook.lost;
    }
    sum
}
