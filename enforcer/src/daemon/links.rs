//! Keeps the hooks on the interfaces that are asked for.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::PoisonError,
    time::{Duration, Instant},
};

use crate::{
    api::types::{InterfaceState, InterfaceStatus},
    dataplane::{Dataplane, DataplaneError, SocketHooks},
    events::reader::SharedDataplane,
};

use super::{
    environment::{Host, Link},
    expedite::Expedite,
    selection::{Judgement, Selection},
    slots::Slots,
    topology::{self, Tags},
};

const HOOKS: [&str; 2] = ["tc_ingress", "tc_egress"];

/// New interfaces are attached for so long at a time; then others of the control task's events
/// have their turn.
const SLICE: Duration = Duration::from_millis(50);

/// How thorough a [`Links::sync`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Goes on to the end. At the start, when nothing else is to be done.
    Whole,
    /// A slice of time, over a host that was looked at just now.
    Looked,
    /// A slice of time, over what messages say: what fails may be gone meanwhile.
    Told,
}

/// Why an interface is not enforced.
struct Failure {
    error: String,
    /// The log has it.
    told: bool,
}

/// What a [`Links::sync`] found, and what it left.
#[derive(Debug, Default)]
pub struct Roster {
    /// Of every interface; see [`crate::api::types::Status::interfaces`].
    pub statuses: Vec<InterfaceStatus>,
    /// Interfaces that wait for the next call, to be attached or let go.
    pub waiting: usize,
    /// Something failed that had not failed before. After [`Effort::Told`], look and call again.
    pub failed: bool,
}

/// Which interfaces are wanted, and what has been done about it.
pub struct Links {
    selection: Selection,
    /// Interfaces that a default route led to.
    held: BTreeSet<u32>,
    expedite: Expedite,
    hooks_wanted: SocketHooks,
    hooks_now: Option<SocketHooks>,
    hooks_reason: Option<String>,
    attached: BTreeMap<u32, String>,
    /// Gone, with what the dataplane keeps of them not yet let go: the kernel takes the lock that
    /// births need for each of them.
    leaving: BTreeMap<u32, String>,
    /// Not asked for any more, and their programs cannot be taken off: tried again at each look.
    stuck: BTreeMap<u32, String>,
    failed: BTreeMap<u32, Failure>,
    /// Somebody took the programs off.
    stolen: BTreeSet<u32>,
    /// They have them again.
    restored: Vec<String>,
    slots: Slots,
    /// Tags that the kernel leaves to VLAN devices now.
    tags: Tags,
    tags_error: Option<String>,
}

impl Links {
    /// Nothing is attached yet.
    pub fn new(selection: Selection, hooks_wanted: SocketHooks) -> Self {
        Self {
            selection,
            held: BTreeSet::new(),
            expedite: Expedite::default(),
            hooks_wanted,
            hooks_now: None,
            hooks_reason: None,
            attached: BTreeMap::new(),
            leaving: BTreeMap::new(),
            stuck: BTreeMap::new(),
            failed: BTreeMap::new(),
            stolen: BTreeSet::new(),
            restored: Vec::new(),
            slots: Slots::default(),
            tags: Tags::new(),
            tags_error: None,
        }
    }

    /// Has the kernel's grace periods end soon while programs are attached.
    pub fn expedited(self, expedite: Expedite) -> Self {
        Self { expedite, ..self }
    }

    /// Whether default routes must be known.
    pub fn follow_default_route(&self) -> bool {
        self.selection.follows_default_route()
    }

    /// An earlier daemon has attached these, by ifindex, and given them these slots. Those that nobody
    /// asks for any more lose their programs at the next [`Links::sync`].
    pub fn adopt(&mut self, slots: &BTreeMap<u32, u32>) {
        self.slots.adopt(slots);
        let named = slots
            .keys()
            .map(|ifindex| (*ifindex, format!("ifindex {ifindex}")));
        self.attached.extend(named);
        // They are in the kernel, and are written again whatever they are.
        self.tags_error = Some("VLAN tags are not looked at yet".to_owned());
    }

    /// Gives slots to the interfaces that are asked for; answers with their names by slot, as an
    /// image wants to know them. `taken` are slots that images know already.
    pub fn name(&mut self, host: &Host, taken: &BTreeSet<u32>) -> BTreeMap<u32, String> {
        let wanted: BTreeMap<u32, &str> = host
            .links
            .iter()
            .filter(|link| self.wants(host, link).is_some() && link.interface(0).is_some())
            .map(|link| (link.ifindex, link.name.as_str()))
            .collect();
        self.slots.retain(|ifindex| wanted.contains_key(&ifindex));
        let slots = wanted.into_iter().map(|(ifindex, name)| {
            let slot = self.slots.give(ifindex, taken);
            (slot, name.to_owned())
        });
        slots.filter(|(slot, _)| *slot != 0).collect()
    }

    /// An image of before knows interfaces by these slots: those of the same names get them again,
    /// and no other does.
    pub fn known(&mut self, host: &Host, interfaces: &BTreeMap<u32, String>) {
        for (slot, name) in interfaces {
            let link = host.links.iter().find(|link| link.name == *name);
            if let Some(link) = link.filter(|link| self.wants(host, link).is_some()) {
                self.slots.give_as(link.ifindex, *slot);
            }
        }
    }

    /// What is not wrong, but not as somebody may think.
    pub fn warnings(&self, host: &Host) -> Vec<String> {
        let enforced = |ifindex| self.attached.contains_key(&ifindex);
        let mut warnings = topology::warnings(host, enforced);
        if self.follow_default_route() && host.default_routes.is_empty() {
            warnings.push("there is no default route for `default-route` to follow".to_owned());
        }
        let without = self.attached.keys().filter(|i| self.slots.of(**i) == 0);
        match without.count() {
            0 => {}
            count => warnings.push(format!(
                "{count} of the enforced interfaces are unknown to `interfaces:` in policies and \
                 failsafes, which know 1023"
            )),
        }
        warnings
    }

    /// Why packets may be judged in the wrong place: those with VLAN tags, and where nobody asks for it.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        let stuck = self.stuck.values().map(|name| {
            format!("{name} is still enforced, at least one way: its programs cannot be taken off")
        });
        self.tags_error.clone().into_iter().chain(stuck)
    }

    /// Interfaces that had lost their programs to somebody, and have them again, since the last call.
    pub fn restored(&mut self) -> Vec<String> {
        std::mem::take(&mut self.restored)
    }

    /// What the socket hooks do now.
    pub fn socket_hooks(&self) -> Option<SocketHooks> {
        self.hooks_now
    }

    /// Why they only observe when they were to refuse.
    pub fn hooks_reason(&self) -> Option<String> {
        self.hooks_reason.clone()
    }

    /// What asks for `link`, if anything does.
    fn wants(&self, host: &Host, link: &Link) -> Option<String> {
        match self.selection.judge(host, link, &self.held) {
            Judgement::Enforce(why) => Some(why),
            Judgement::Exempt(_) | Judgement::Open => None,
        }
    }

    /// These interfaces went away, and may have come back without their hooks. The next
    /// [`Links::sync`] lets go what is left of them.
    pub fn removed(&mut self, dataplane: &SharedDataplane, removed: &[u32]) {
        if removed.is_empty() {
            return;
        }
        let mut dataplane = dataplane.lock().unwrap_or_else(PoisonError::into_inner);
        self.take_tags_back(&mut **dataplane, removed);
        for ifindex in removed {
            let known = self.attached.remove(ifindex);
            self.leaving.extend(known.map(|name| (*ifindex, name)));
            // What comes back may be another one.
            self.slots.remove(*ifindex);
            self.held.remove(ifindex);
            self.failed.remove(ifindex);
            self.stolen.remove(ifindex);
        }
    }

    /// Has tags judged on their parents again: before a VLAN device loses its programs.
    fn take_tags_back(&mut self, dataplane: &mut dyn Dataplane, of: &[u32]) {
        let mut tags = self.tags.clone();
        tags.retain(|_, (parent, device)| !of.contains(parent) && !of.contains(device));
        self.set_tags(dataplane, tags);
    }

    fn set_tags(&mut self, dataplane: &mut dyn Dataplane, tags: Tags) {
        if tags == self.tags && self.tags_error.is_none() {
            return;
        }
        match dataplane.set_vlans(&tags.keys().copied().collect()) {
            Ok(()) => self.tags_error = None,
            Err(error) => {
                let error =
                    format!("cannot say which VLAN tags are judged on VLAN devices: {error}");
                if self.tags_error.as_ref() != Some(&error) {
                    tracing::error!("{error}");
                }
                self.tags_error = Some(error);
            }
        }
        self.tags = tags;
    }

    /// Lets go what is left of those that went away, as far as there is time; how many stay.
    fn let_go(&mut self, dataplane: &mut dyn Dataplane, time: impl Fn() -> bool) -> usize {
        while time()
            && let Some((ifindex, name)) = self.leaving.pop_first()
        {
            self.detach(dataplane, ifindex, name);
        }
        self.leaving.len()
    }

    fn detach(&mut self, dataplane: &mut dyn Dataplane, ifindex: u32, name: String) {
        match dataplane.detach(ifindex) {
            Ok(()) => tracing::info!(interface = name, "interface gone, detached"),
            Err(error) => {
                tracing::error!(interface = name, %error, "cannot detach");
                self.stuck.insert(ifindex, name);
            }
        }
    }

    /// Forgets interfaces whose programs the kernel does not have any more; [`Links::sync`]
    /// attaches again.
    ///
    /// # Errors
    /// What the dataplane says.
    pub fn verify(&mut self, dataplane: &SharedDataplane) -> Result<(), DataplaneError> {
        let mut dataplane = dataplane.lock().unwrap_or_else(PoisonError::into_inner);
        // They are not missed.
        self.let_go(&mut **dataplane, || true);
        self.stuck
            .retain(|ifindex, _| dataplane.detach(*ifindex).is_err());
        let missing = dataplane.missing()?;
        self.take_tags_back(&mut **dataplane, &missing);
        for ifindex in missing {
            if let Err(error) = dataplane.detach(ifindex) {
                tracing::debug!(ifindex, %error, "cannot detach what is left");
            }
            if self.attached.remove(&ifindex).is_some() {
                self.stolen.insert(ifindex);
            }
        }
        Ok(())
    }

    /// Brings the hooks in line with `host`. Failures are logged when they are new and tried
    /// again at the next call.
    pub fn sync(&mut self, dataplane: &SharedDataplane, host: &Host, effort: Effort) -> Roster {
        self.hold(host);
        let wanted: BTreeMap<u32, (&Link, String)> = host
            .links
            .iter()
            .filter_map(|link| Some((link.ifindex, (link, self.wants(host, link)?))))
            .collect();
        let mut guard = dataplane.lock().unwrap_or_else(PoisonError::into_inner);
        let gone: Vec<u32> = self
            .attached
            .keys()
            .copied()
            .filter(|ifindex| !wanted.contains_key(ifindex))
            .collect();
        let mut new: Vec<&Link> = wanted
            .values()
            .map(|(link, _)| *link)
            .filter(|link| !self.attached.contains_key(&link.ifindex))
            .collect();
        // Those that packets can come through already go first, those that failed before last.
        let failed = |link: &Link| self.failed.contains_key(&link.ifindex);
        new.sort_by_key(|link| (failed(link), !link.up, link.ifindex));
        let expedite = std::mem::take(&mut self.expedite);
        let busy = !gone.is_empty() || !new.is_empty() || !self.leaving.is_empty();
        let quick = busy.then(|| expedite.begin());

        self.take_tags_back(&mut **guard, &gone);
        let gone: Vec<(u32, String)> = gone
            .into_iter()
            .filter_map(|ifindex| Some((ifindex, self.attached.remove(&ifindex)?)))
            .collect();
        // A VLAN device may have got another parent, and a parent may have joined a bridge.
        let tags = topology::tags(host, |ifindex| self.attached.contains_key(&ifindex));
        self.set_tags(&mut **guard, tags);
        self.stolen.retain(|ifindex| wanted.contains_key(ifindex));
        self.failed
            .retain(|ifindex, _| wanted.contains_key(ifindex));

        let mut errors: BTreeMap<u32, String> = BTreeMap::new();
        for ifindex in self.attached.keys().copied().collect::<Vec<_>>() {
            if let Some((link, _)) = wanted.get(&ifindex)
                && let Err(error) = self.refresh(&mut **guard, link)
            {
                errors.insert(ifindex, error);
            }
        }
        let start = Instant::now();
        let time = || effort == Effort::Whole || start.elapsed() < SLICE;
        let (mut waiting, mut newly_failed) = (0, false);
        for link in new {
            if let Some(name) = self.leaving.remove(&link.ifindex) {
                self.detach(&mut **guard, link.ifindex, name);
            }
            let known = self.failed.get(&link.ifindex).map(|f| f.error.clone());
            let error = if time() {
                let error = self.attach(&mut **guard, link, effort).err();
                newly_failed |= error.is_some() && known.is_none();
                error
            } else if known.is_some() {
                known
            } else {
                waiting += 1;
                Some("it waits for its turn".to_owned())
            };
            errors.extend(error.map(|error| (link.ifindex, error)));
        }
        let tags = topology::tags(host, |ifindex| self.attached.contains_key(&ifindex));
        self.set_tags(&mut **guard, tags);
        // Last: what takes over is enforced before another is let go.
        for (ifindex, name) in gone {
            self.detach(&mut **guard, ifindex, name);
        }
        let leaving = self.let_go(&mut **guard, time);
        drop(guard);
        drop(quick);
        self.expedite = expedite;
        Roster {
            waiting: waiting + leaving,
            failed: newly_failed,
            statuses: self.statuses(host, &wanted, &errors),
        }
    }

    /// Notes who holds a default route.
    fn hold(&mut self, host: &Host) {
        let holds = |link: &&Link| {
            host.default_routes.contains(&link.ifindex) && self.wants(host, link).is_some()
        };
        let holders = host.links.iter().filter(holds).map(|link| link.ifindex);
        let holders: Vec<u32> = holders.collect();
        self.held.extend(holders);
        self.held.retain(|ifindex| host.link(*ifindex).is_some());
    }

    /// Those that are asked for, then those that nobody protects, then the exempt.
    fn statuses(
        &self,
        host: &Host,
        wanted: &BTreeMap<u32, (&Link, String)>,
        errors: &BTreeMap<u32, String>,
    ) -> Vec<InterfaceStatus> {
        let enforced = |ifindex: u32| self.attached.contains_key(&ifindex);
        let status = |link: &Link, state, reason, error| InterfaceStatus {
            slot: self.slots.of(link.ifindex),
            kind: Some(link.device.clone()).filter(|kind| !kind.is_empty()),
            description: topology::describe(host, link),
            ..status(&link.name, link.ifindex, state, reason, error)
        };
        let mut statuses: Vec<_> = wanted
            .values()
            .map(|(link, why)| match errors.get(&link.ifindex) {
                None => status(link, InterfaceState::Enforced, Some(why.clone()), None),
                Some(error) => {
                    let (why, error) = (Some(why.clone()), Some(error.clone()));
                    status(link, InterfaceState::Failed, why, error)
                }
            })
            .collect();
        let names: BTreeSet<&str> = host.links.iter().map(|link| link.name.as_str()).collect();
        for name in self.selection.literals().filter(|n| !names.contains(n)) {
            let error = Some("no such interface; it is enforced when it appears".to_owned());
            let reason = Some(name.to_owned());
            statuses.push(self::status(name, 0, InterfaceState::Failed, reason, error));
        }
        let mut exempt = Vec::new();
        for link in host
            .links
            .iter()
            .filter(|l| !wanted.contains_key(&l.ifindex))
        {
            let reason = match self.selection.judge(host, link, &self.held) {
                Judgement::Exempt(why) => Some(why),
                Judgement::Enforce(_) | Judgement::Open => {
                    topology::judged_elsewhere(host, link, &enforced)
                }
            };
            match reason {
                Some(why) => exempt.push(status(link, InterfaceState::Exempt, Some(why), None)),
                None => {
                    let down = if link.up { "" } else { "; it is down" };
                    let why = format!("no --interface means it{down}");
                    let state = InterfaceState::Unprotected;
                    statuses.push(status(link, state, Some(why), None));
                }
            }
        }
        statuses.append(&mut exempt);
        statuses
    }

    /// Of one that is attached: its name, and its slot, should it have got one by now.
    fn refresh(&mut self, dataplane: &mut dyn Dataplane, link: &Link) -> Result<(), String> {
        if let Some(name) = self.attached.get_mut(&link.ifindex) {
            name.clone_from(&link.name);
        }
        match link.interface(self.slots.of(link.ifindex)) {
            Some(interface) => dataplane.attach(&interface).map_err(|e| e.to_string()),
            None => Ok(()),
        }
    }

    fn attach(
        &mut self,
        dataplane: &mut dyn Dataplane,
        link: &Link,
        effort: Effort,
    ) -> Result<(), String> {
        let result = match link.interface(self.slots.of(link.ifindex)) {
            None => Err(format!(
                "packets of links of type {} cannot be read",
                link.kind
            )),
            Some(interface) => dataplane.attach(&interface).map_err(|e| e.to_string()),
        };
        match result {
            Ok(()) => {
                self.stuck.remove(&link.ifindex);
                if self.stolen.remove(&link.ifindex) {
                    self.restored.push(link.name.clone());
                    tracing::warn!(
                        interface = link.name,
                        "somebody removed the programs from this interface; attached again"
                    );
                } else {
                    tracing::info!(interface = link.name, ifindex = link.ifindex, "attached");
                }
                self.failed.remove(&link.ifindex);
                self.attached.insert(link.ifindex, link.name.clone());
                Ok(())
            }
            Err(error) if effort == Effort::Told => Err(error),
            Err(error) => {
                let before = self.failed.remove(&link.ifindex);
                let before = before.filter(|failure| failure.error == error);
                let told = before.as_ref().is_some_and(|failure| failure.told);
                // It may go at this moment: what is worth telling fails twice.
                let tell = !told && (before.is_some() || effort == Effort::Whole);
                if tell {
                    tracing::error!(interface = link.name, error, "cannot enforce");
                }
                let failure = Failure {
                    error: error.clone(),
                    told: told || tell,
                };
                self.failed.insert(link.ifindex, failure);
                Err(error)
            }
        }
    }

    /// Sets the socket hooks. They may refuse only while every interface that packets could leave
    /// by is enforced, and the image knows this host's addresses (it is not `stale`): what they
    /// refuse, TC must deny as well.
    ///
    /// # Errors
    /// What the dataplane says; tried again at the next call.
    pub fn sync_hooks(
        &mut self,
        dataplane: &SharedDataplane,
        host: &Host,
        stale: bool,
    ) -> Result<(), DataplaneError> {
        let open: Vec<&str> = host
            .links
            .iter()
            .filter(|l| l.up && !l.is_local() && l.carries_ip())
            .filter(|l| !self.attached.contains_key(&l.ifindex))
            .map(|l| l.name.as_str())
            .collect();
        let why = if !open.is_empty() {
            Some(format!(
                "not every interface is enforced: {}",
                open.join(", ")
            ))
        } else if stale {
            Some("the policy in force does not know this host's addresses".to_owned())
        } else {
            None
        }
        .filter(|_| self.hooks_wanted == SocketHooks::Refuse);
        let mode = match &why {
            Some(_) => SocketHooks::Observe,
            None => self.hooks_wanted,
        };
        self.hooks_reason.clone_from(&why);
        if self.hooks_now == Some(mode) {
            return Ok(());
        }
        dataplane
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .socket_hooks(mode)?;
        self.hooks_now = Some(mode);
        match why {
            None => tracing::info!(?mode, "socket hooks"),
            Some(why) => tracing::info!(why, "socket hooks name processes but refuse nothing"),
        }
        Ok(())
    }
}

fn status(
    name: &str,
    ifindex: u32,
    state: InterfaceState,
    reason: Option<String>,
    error: Option<String>,
) -> InterfaceStatus {
    let enforced = state == InterfaceState::Enforced;
    let hooks = if enforced { &HOOKS[..] } else { &[] };
    InterfaceStatus {
        name: name.to_owned(),
        ifindex,
        hooks: hooks.iter().map(|h| (*h).to_owned()).collect(),
        state,
        reason,
        enforced,
        error,
        slot: 0,
        kind: None,
        description: None,
    }
}

#[cfg(test)]
mod tests;
