//! Plans and lists of live flows, for the control socket. Reads files and the flow table, and
//! changes nothing.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
};

use super::{
    explain::now,
    files::{self, Sources},
    guard::Trust,
    load::{self, Loaded, Rejected},
    progress::{self, Progress, Stage},
    state::{Ground, Live, Shared},
};
use crate::{
    api::types::{Finding, Flows, FlowsRequest, Peer, Plan, PlanRequest, Refusal, RefusalCode},
    clock::Sample,
    compile::Inside,
    dataplane::{DataplaneError, FlowReader, release_memory},
    events::store::UNSEGMENTED,
    plan::{
        self, Version,
        flows::{Changes, Listing, Moment},
        types::FlowChanges,
    },
    policy::{diag, model::Policy},
};

/// Flows of a list, if nobody says how many, and at most.
const LISTED: (usize, usize) = (1_000, 10_000);
/// Mistakes that are listed.
const FINDINGS: usize = 100;

/// Why there is no plan, or no list.
#[derive(Debug)]
pub enum PlanError {
    /// The request names what is not there.
    Bad(String),
    /// The policy cannot be used.
    Rejected(Refusal),
    /// The kernel said no.
    Dataplane(DataplaneError),
}

impl From<Rejected> for PlanError {
    fn from(rejected: Rejected) -> Self {
        let diagnostics = rejected.diagnostics().iter().take(FINDINGS);
        Self::Rejected(Refusal {
            error: rejected.render(false),
            code: RefusalCode::Rejected,
            group: None,
            diagnostics: diagnostics.map(Finding::from).collect(),
        })
    }
}

impl From<DataplaneError> for PlanError {
    fn from(error: DataplaneError) -> Self {
        Self::Dataplane(error)
    }
}

fn version(live: &Live) -> Version<'_> {
    Version {
        policy: &live.policy,
        image: &live.image,
        settings: &live.settings,
    }
}

/// What a client names must be as well guarded as what the daemon was told to read.
pub(super) fn sources(ground: &Ground, request: &PlanRequest) -> Result<Sources, PlanError> {
    let mut sources = ground.sources.clone();
    let Some(path) = &request.path else {
        return Ok(sources);
    };
    if !Path::new(path).is_absolute() {
        let error = format!("{path:?} is not a whole path: it must begin with /");
        return Err(PlanError::Bad(error));
    }
    if let Some(error) = files::no_policy(Path::new(path)) {
        return Err(PlanError::Bad(format!("{path}: {error}")));
    }
    sources.segments = PathBuf::from(path);
    if sources.trust == Trust::Anyone {
        sources.trust = Trust::Owner { links: false };
    }
    Ok(sources)
}

/// Compares the policy at a path with the one in force. Takes as long as a reload.
///
/// # Errors
/// [`PlanError`].
pub fn plan(shared: &Shared, request: &PlanRequest) -> Result<Plan, PlanError> {
    let plan = make(shared, request);
    // What the parser and the compiler have left behind.
    release_memory();
    plan
}

/// What a policy would be compiled for.
pub(super) fn ground(shared: &Shared) -> Result<Arc<Ground>, PlanError> {
    let ground = shared.note(|board| board.ground.clone());
    ground.ok_or_else(|| PlanError::Bad("the daemon is starting".to_owned()))
}

fn make(shared: &Shared, request: &PlanRequest) -> Result<Plan, PlanError> {
    let ground = ground(shared)?;
    let sources = sources(&ground, request)?;
    let environment = &ground.environment;
    let loaded = progress::logged(|progress| load(&ground, &sources, progress))?;
    let live = shared.live();
    let new = Version {
        policy: &loaded.policy,
        image: &loaded.image,
        settings: &loaded.settings,
    };
    let unix = moment_unix(shared);
    let mut plan = if live.known {
        plan::compare(version(&live), new, environment, unix)
    } else {
        plan::unknown(version(&live), new)
    };
    plan.path = sources.segments.display().to_string();
    plan.live_path = live.path.display().to_string();
    let all = loaded.texts.all();
    let warnings = loaded.warnings.iter().take(FINDINGS);
    plan.warnings = warnings
        .map(|warning| diag::render_all(std::slice::from_ref(warning), &all, false))
        .collect();
    if plan.hash != plan.live_hash {
        plan.flows = changed_flows(shared, &live, new).unwrap_or_else(|error| FlowChanges {
            error: Some(error.to_string()),
            ..FlowChanges::default()
        });
    }
    plan.summary = plan::summary(&plan);
    Ok(plan)
}

/// What the policy has in common with the one in force is not done again; what is found out about it
/// is forgotten.
pub(super) fn load(
    ground: &Ground,
    sources: &Sources,
    progress: &Progress,
) -> Result<Loaded, Rejected> {
    progress.enter(Stage::Reading);
    let texts = files::read_all(sources).map_err(Rejected::Files)?;
    let memory = ground.memory.lock();
    let mut memory = memory.unwrap_or_else(PoisonError::into_inner).clone();
    load::compile_again(texts, &ground.environment, &mut memory, progress)
}

fn moment_unix(shared: &Shared) -> u64 {
    // As the kernel has it: not behind what rules have seen.
    now().max(shared.note(|board| board.unix_floor))
}

/// A reader of the flow table, and when it was made.
fn reader(shared: &Shared) -> Result<(Box<dyn FlowReader>, Moment), DataplaneError> {
    let reader = {
        let dataplane = shared.dataplane.lock();
        dataplane
            .unwrap_or_else(PoisonError::into_inner)
            .flow_reader()?
    };
    let sample = Sample::now().map_err(|source| DataplaneError::Syscall {
        call: "read the clock".to_owned(),
        source,
    })?;
    let slots = shared.note(|board| {
        let known = board.interfaces.iter().filter(|i| i.ifindex != 0);
        known.map(|i| (i.ifindex, i.slot)).collect()
    });
    let moment = Moment {
        unix: moment_unix(shared),
        boot: u32::try_from(sample.boottime / 1_000_000_000).unwrap_or(u32::MAX),
        jiffies: reader.jiffies(),
        slots,
    };
    Ok((reader, moment))
}

/// Live flows that a policy would change.
pub(super) fn changed_flows(
    shared: &Shared,
    live: &Live,
    new: Version<'_>,
) -> Result<FlowChanges, DataplaneError> {
    let (mut reader, moment) = reader(shared)?;
    let mut changes = Changes::new(version(live), new, &moment);
    reader.each(&mut |flow| changes.see(flow))?;
    Ok(changes.finish())
}

/// What one end of a flow must be.
enum Wanted {
    Any,
    Address(IpAddr),
    Inside(Inside),
    Unsegmented(Inside),
}

impl Wanted {
    fn named(policy: &Policy, name: &str) -> Result<Self, PlanError> {
        if name == UNSEGMENTED {
            return Ok(Self::Unsegmented(Inside::of(policy.segments.iter())));
        }
        let segment = policy.segments.iter().find(|segment| segment.name == name);
        let segment = segment.ok_or_else(|| {
            let near = policy
                .segments
                .iter()
                .map(|s| (strsim::damerau_levenshtein(&s.name, name), &s.name))
                .filter(|(distance, _)| *distance <= 3)
                .min();
            let hint = near.map(|(_, near)| format!("; did you mean `{near}`?"));
            let hint = hint.unwrap_or_default();
            PlanError::Bad(format!("no segment is named {name:?}{hint}"))
        })?;
        Ok(Self::Inside(Inside::of(std::iter::once(segment))))
    }

    fn peer(policy: &Policy, peer: Option<&Peer>) -> Result<Self, PlanError> {
        match peer {
            None => Ok(Self::Any),
            Some(Peer::Address(ip)) => Ok(Self::Address(*ip)),
            Some(Peer::Segment(name)) => Self::named(policy, name),
        }
    }

    fn is(&self, ip: IpAddr) -> bool {
        match self {
            Self::Any => true,
            Self::Address(wanted) => *wanted == ip,
            Self::Inside(segment) => segment.contains(ip),
            Self::Unsegmented(all) => !all.contains(ip),
        }
    }
}

/// Live flows.
///
/// # Errors
/// [`PlanError`].
pub fn flows(shared: &Shared, request: &FlowsRequest) -> Result<Flows, PlanError> {
    let live = shared.live();
    let from = Wanted::peer(&live.policy, request.from.as_ref())?;
    let to = Wanted::peer(&live.policy, request.to.as_ref())?;
    let either = match &request.segment {
        None => Wanted::Any,
        Some(name) => Wanted::named(&live.policy, name)?,
    };
    let (mut reader, moment) = reader(shared)?;
    let most = request.limit.unwrap_or(LISTED.0).min(LISTED.1);
    let mut listing = Listing::new(version(&live), &moment, most);
    reader.each(&mut |flow| {
        listing.see(flow, |source, destination| {
            from.is(source) && to.is(destination) && (either.is(source) || either.is(destination))
        });
    })?;
    let (total, matched, flows) = listing.finish();
    Ok(Flows {
        generation: live.image.generation(),
        total,
        matched,
        flows,
    })
}
