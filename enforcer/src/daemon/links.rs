//! Keeps the hooks on the interfaces that are asked for.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::PoisonError,
};

use crate::{
    api::types::InterfaceStatus,
    dataplane::{Dataplane, DataplaneError, SocketHooks},
    events::reader::SharedDataplane,
};

use super::{
    environment::{Host, Link},
    slots::Slots,
    topology::{self, Tags},
};
use crate::policy::pattern::Pattern;

const HOOKS: [&str; 2] = ["tc_ingress", "tc_egress"];

/// Which interfaces are wanted, and what has been done about it.
pub struct Links {
    patterns: Vec<Pattern>,
    hooks_wanted: SocketHooks,
    hooks_now: Option<SocketHooks>,
    hooks_reason: Option<String>,
    attached: BTreeMap<u32, String>,
    failed: BTreeMap<u32, String>,
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
    pub fn new(patterns: Vec<Pattern>, hooks_wanted: SocketHooks) -> Self {
        Self {
            patterns,
            hooks_wanted,
            hooks_now: None,
            hooks_reason: None,
            attached: BTreeMap::new(),
            failed: BTreeMap::new(),
            stolen: BTreeSet::new(),
            restored: Vec::new(),
            slots: Slots::default(),
            tags: Tags::new(),
            tags_error: None,
        }
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
            .filter(|link| self.wants(link) && link.interface(0).is_some())
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
            if let Some(link) = link.filter(|link| self.wants(link)) {
                self.slots.give_as(link.ifindex, *slot);
            }
        }
    }

    /// What is not wrong, but not as somebody may think.
    pub fn warnings(&self, host: &Host) -> Vec<String> {
        let enforced = |ifindex| self.attached.contains_key(&ifindex);
        let mut warnings = topology::warnings(host, enforced);
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

    /// Why packets with VLAN tags may be judged in the wrong place.
    pub fn problem(&self) -> Option<String> {
        self.tags_error.clone()
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

    /// Whether `link` is asked for. A glob never means a loopback or a VRF: nobody wants `*` to cut
    /// a host off from itself; nor a link that carries no IP.
    fn wants(&self, link: &Link) -> bool {
        let usual = !link.is_local() && link.carries_ip();
        self.patterns
            .iter()
            .any(|p| p.matches(&link.name) && (p.is_literal() || usual))
    }

    /// These interfaces went away, and may have come back without their hooks.
    pub fn removed(&mut self, dataplane: &SharedDataplane, removed: &[u32]) {
        let mut dataplane = dataplane.lock().unwrap_or_else(PoisonError::into_inner);
        self.take_tags_back(&mut **dataplane, removed);
        for ifindex in removed {
            self.detach(&mut **dataplane, *ifindex);
            // What comes back may be another one.
            self.slots.remove(*ifindex);
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

    fn detach(&mut self, dataplane: &mut dyn Dataplane, ifindex: u32) {
        let Some(name) = self.attached.remove(&ifindex) else {
            return;
        };
        match dataplane.detach(ifindex) {
            Ok(()) => tracing::info!(interface = name, "interface gone, detached"),
            Err(error) => tracing::error!(interface = name, %error, "cannot detach"),
        }
    }

    /// Forgets interfaces whose programs the kernel does not have any more; [`Links::sync`]
    /// attaches again.
    ///
    /// # Errors
    /// What the dataplane says.
    pub fn verify(&mut self, dataplane: &SharedDataplane) -> Result<(), DataplaneError> {
        let mut dataplane = dataplane.lock().unwrap_or_else(PoisonError::into_inner);
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
    pub fn sync(&mut self, dataplane: &SharedDataplane, host: &Host) -> Vec<InterfaceStatus> {
        let mut guard = dataplane.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted: Vec<&Link> = host.links.iter().filter(|l| self.wants(l)).collect();
        let gone: Vec<u32> = self
            .attached
            .keys()
            .copied()
            .filter(|ifindex| !wanted.iter().any(|l| l.ifindex == *ifindex))
            .collect();
        self.take_tags_back(&mut **guard, &gone);
        for ifindex in gone {
            self.detach(&mut **guard, ifindex);
        }
        // A VLAN device may have got another parent, and a parent may have joined a bridge.
        let tags = topology::tags(host, |ifindex| self.attached.contains_key(&ifindex));
        self.set_tags(&mut **guard, tags);
        self.stolen
            .retain(|ifindex| wanted.iter().any(|l| l.ifindex == *ifindex));
        self.failed
            .retain(|ifindex, _| wanted.iter().any(|l| l.ifindex == *ifindex));
        let mut statuses: Vec<_> = wanted
            .into_iter()
            .map(|link| {
                let error = self.attach(&mut **guard, link).err();
                InterfaceStatus {
                    slot: self.slots.of(link.ifindex),
                    kind: Some(link.device.clone()).filter(|kind| !kind.is_empty()),
                    description: topology::describe(host, link),
                    ..status(&link.name, link.ifindex, error)
                }
            })
            .collect();
        let tags = topology::tags(host, |ifindex| self.attached.contains_key(&ifindex));
        self.set_tags(&mut **guard, tags);
        for pattern in self.patterns.iter().filter(|p| p.is_literal()) {
            if !host.links.iter().any(|l| l.name == pattern.as_str()) {
                let error = Some("no such interface; it is enforced when it appears".to_owned());
                statuses.push(status(pattern.as_str(), 0, error));
            }
        }
        statuses
    }

    fn attach(&mut self, dataplane: &mut dyn Dataplane, link: &Link) -> Result<(), String> {
        let interface = link.interface(self.slots.of(link.ifindex));
        if let Some(name) = self.attached.get_mut(&link.ifindex) {
            name.clone_from(&link.name);
            // Its slot, should it have got one by now.
            return match interface {
                Some(interface) => dataplane.attach(&interface).map_err(|e| e.to_string()),
                None => Ok(()),
            };
        }
        let result = match interface {
            None => Err(format!(
                "packets of links of type {} cannot be read",
                link.kind
            )),
            Some(interface) => dataplane.attach(&interface).map_err(|e| e.to_string()),
        };
        match result {
            Ok(()) => {
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
            Err(error) => {
                let before = self.failed.insert(link.ifindex, error.clone());
                if before.as_ref() != Some(&error) {
                    tracing::error!(interface = link.name, error, "cannot enforce");
                }
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

fn status(name: &str, ifindex: u32, error: Option<String>) -> InterfaceStatus {
    let enforced = error.is_none();
    let hooks = if enforced { &HOOKS[..] } else { &[] };
    InterfaceStatus {
        name: name.to_owned(),
        ifindex,
        hooks: hooks.iter().map(|h| (*h).to_owned()).collect(),
        enforced,
        error,
        slot: 0,
        kind: None,
        description: None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::daemon::{environment::Vlan, fake::Handle};

    fn link(ifindex: u32, name: &str) -> Link {
        Link {
            ifindex,
            name: name.to_owned(),
            kind: match name {
                "lo" => 772,
                "can0" => 280,
                _ => 1,
            },
            up: true,
            loopback: name == "lo",
            device: String::new(),
            master: None,
            vlan: None,
        }
    }

    fn vlan(ifindex: u32, name: &str, parent: u32, vid: u16) -> Link {
        Link {
            device: "vlan".to_owned(),
            vlan: Some(Vlan {
                parent: Some(parent),
                vid,
                service_tag: false,
            }),
            ..link(ifindex, name)
        }
    }

    fn host(links: &[(u32, &str)]) -> Host {
        Host {
            links: links.iter().map(|(i, name)| link(*i, name)).collect(),
            ..Host::default()
        }
    }

    fn setup(patterns: &[&str]) -> (Handle, SharedDataplane, Links) {
        let fake = Handle::default();
        fake.lock().applied.push((1, 1));
        let dataplane: SharedDataplane = Arc::new(Mutex::new(fake.open(0)));
        let patterns = patterns.iter().map(|p| p.parse().unwrap()).collect();
        (fake, dataplane, Links::new(patterns, SocketHooks::Refuse))
    }

    fn attached(fake: &Handle) -> Vec<u32> {
        fake.lock().attached.iter().copied().collect()
    }

    #[test]
    fn hooks_follow_interfaces_that_come_go_and_change_names() {
        let (fake, dataplane, mut links) = setup(&["veth*", "eth0"]);
        links.sync(
            &dataplane,
            &host(&[(1, "lo"), (2, "eth0"), (3, "veth1"), (4, "x")]),
        );
        assert_eq!(attached(&fake), [2, 3]);
        links.sync(
            &dataplane,
            &host(&[(2, "eth0"), (4, "veth9"), (5, "veth2")]),
        );
        assert_eq!(attached(&fake), [2, 4, 5]);
        // Away and back between two looks: the hooks are gone with the first one.
        fake.lock().attached.remove(&5);
        links.removed(&dataplane, &[5, 99]);
        let statuses = links.sync(&dataplane, &host(&[(4, "veth9"), (5, "veth2")]));
        assert_eq!(attached(&fake), [4, 5]);
        let missing = statuses.iter().find(|s| s.name == "eth0").unwrap();
        assert!(!missing.enforced && missing.ifindex == 0);
    }

    #[test]
    fn programs_that_others_took_off_are_attached_again() {
        let (fake, dataplane, mut links) = setup(&["eth*"]);
        let host = host(&[(2, "eth0"), (3, "eth1")]);
        links.sync(&dataplane, &host);
        fake.lock().stolen = vec![3];
        fake.lock().attached.remove(&3);
        links.verify(&dataplane).unwrap();
        let statuses = links.sync(&dataplane, &host);
        assert_eq!(attached(&fake), [2, 3]);
        assert!(statuses.iter().all(|s| s.enforced));
        // One that went away is not missed.
        fake.lock().stolen = vec![3];
        links.verify(&dataplane).unwrap();
        assert_eq!(links.sync(&dataplane, &self::host(&[(2, "eth0")])).len(), 1);
        assert!(links.stolen.is_empty());
    }

    #[test]
    fn a_failure_is_reported_and_tried_again() {
        let (fake, dataplane, mut links) = setup(&["eth0"]);
        fake.lock().refuse_attach = true;
        let status = links.sync(&dataplane, &host(&[(2, "eth0")])).remove(0);
        assert!(!status.enforced && status.hooks.is_empty());
        assert!(status.error.unwrap().contains("attach"));
        fake.lock().refuse_attach = false;
        let status = links.sync(&dataplane, &host(&[(2, "eth0")])).remove(0);
        assert!(status.enforced && status.error.is_none());
    }

    #[test]
    fn a_glob_spares_the_loopback_and_a_name_does_not() {
        let (fake, dataplane, mut links) = setup(&["*"]);
        let all = host(&[(1, "lo"), (2, "eth0"), (3, "can0")]);
        assert_eq!(links.sync(&dataplane, &all).len(), 1);
        assert_eq!(attached(&fake), [2]);
        links.sync_hooks(&dataplane, &all, false).unwrap();
        assert_eq!(links.socket_hooks(), Some(SocketHooks::Refuse));
        let mut vrf = host(&[(2, "eth0"), (4, "red")]);
        vrf.links[1].device = "vrf".to_owned();
        assert_eq!(links.sync(&dataplane, &vrf).len(), 1);
        links.sync_hooks(&dataplane, &vrf, false).unwrap();
        assert_eq!(links.socket_hooks(), Some(SocketHooks::Refuse));
        let (fake, dataplane, mut links) = setup(&["lo"]);
        links.sync(&dataplane, &host(&[(1, "lo")]));
        assert_eq!(attached(&fake), [1]);
    }

    #[test]
    fn socket_hooks_refuse_only_while_every_way_out_is_enforced() {
        let (fake, dataplane, mut links) = setup(&["eth*"]);
        let mut mode = |host: &Host, stale| {
            links.sync(&dataplane, host);
            links.sync_hooks(&dataplane, host, stale).unwrap();
            let hooks = fake.lock().hooks;
            let why = links.hooks_reason();
            assert_eq!(why.is_some(), hooks == Some(SocketHooks::Observe));
            hooks
        };
        let all = host(&[(1, "lo"), (2, "eth0")]);
        assert_eq!(mode(&all, false), Some(SocketHooks::Refuse));
        let mut open = host(&[(1, "lo"), (2, "eth0"), (3, "wg0")]);
        assert_eq!(mode(&open, false), Some(SocketHooks::Observe));
        open.links[2].up = false;
        assert_eq!(mode(&open, false), Some(SocketHooks::Refuse));
        assert_eq!(mode(&all, true), Some(SocketHooks::Observe));
        assert_eq!(mode(&all, false), Some(SocketHooks::Refuse));
    }

    #[test]
    fn a_tag_goes_to_its_device_after_the_programs_and_back_before() {
        let (fake, dataplane, mut links) = setup(&["eth*"]);
        let mut host = host(&[(2, "eth0")]);
        host.links.push(vlan(3, "eth0.20", 2, 20));
        links.sync(&dataplane, &host);
        let log = || std::mem::take(&mut fake.lock().log);
        assert_eq!(log(), ["attach 2", "attach 3", "vlans {2014}"]);
        links.sync(&dataplane, &host);
        assert!(log().is_empty());
        // Its parent joins a bridge, and leaves it.
        host.links.push(Link {
            device: "bridge".to_owned(),
            ..link(4, "br0")
        });
        host.links[0].master = Some(4);
        links.sync(&dataplane, &host);
        assert_eq!(log(), ["vlans {}"]);
        host.links[0].master = None;
        links.sync(&dataplane, &host);
        assert_eq!(log(), ["vlans {2014}"]);
        // Somebody takes the programs off the device; they come back.
        fake.lock().stolen = vec![3];
        links.verify(&dataplane).unwrap();
        assert_eq!(log(), ["vlans {}", "detach 3"]);
        fake.lock().attached.remove(&3);
        links.sync(&dataplane, &host);
        assert_eq!(log(), ["attach 3", "vlans {2014}"]);
        // Another name, which nobody asked for.
        host.links[1].name = "guest".to_owned();
        links.sync(&dataplane, &host);
        assert_eq!(log(), ["vlans {}", "detach 3"]);
        host.links[1].name = "eth0.20".to_owned();
        links.sync(&dataplane, &host);
        log();
        links.removed(&dataplane, &[3]);
        assert_eq!(log(), ["vlans {}", "detach 3"]);
        // A device that cannot be enforced leaves its tag where it is judged.
        fake.lock().refuse_attach = true;
        links.sync(&dataplane, &host);
        assert!(fake.lock().vlans.is_empty());
    }

    #[test]
    fn interfaces_keep_their_slots_and_leave_them_to_images_that_know_them() {
        let (fake, dataplane, mut links) = setup(&["eth*"]);
        let none = BTreeSet::new();
        let both = host(&[(1, "lo"), (2, "eth0"), (3, "eth1")]);
        let named = links.name(&both, &none);
        assert_eq!(
            named,
            [(1, "eth0".to_owned()), (2, "eth1".to_owned())].into()
        );
        let statuses = links.sync(&dataplane, &both);
        assert_eq!(fake.lock().slots, [(2, 1), (3, 2)].into());
        assert_eq!(statuses[1].slot, 2);
        // eth0 is gone, and an image in force knows it as 1.
        let taken: BTreeSet<u32> = named.into_keys().collect();
        links.removed(&dataplane, &[2]);
        let others = host(&[(3, "eth7"), (4, "eth4")]);
        let named = links.name(&others, &taken);
        assert_eq!(
            named,
            [(2, "eth7".to_owned()), (3, "eth4".to_owned())].into()
        );
        links.sync(&dataplane, &others);
        assert_eq!(fake.lock().slots[&4], 3);
        let named = links.name(&host(&[(5, "eth5")]), &BTreeSet::from([2, 3]));
        assert_eq!(named, [(1, "eth5".to_owned())].into());
    }

    #[test]
    fn an_interface_beyond_the_last_slot_is_told_and_gets_one_later() {
        let (fake, dataplane, mut links) = setup(&["eth0"]);
        let host = host(&[(2, "eth0")]);
        let all: BTreeSet<u32> = (1..1_024).collect();
        assert!(links.name(&host, &all).is_empty());
        links.sync(&dataplane, &host);
        assert_eq!(fake.lock().slots[&2], 0);
        assert!(links.warnings(&host)[0].contains("1023"));
        links.name(&host, &BTreeSet::from([1]));
        links.sync(&dataplane, &host);
        assert_eq!(fake.lock().slots[&2], 2);
        assert!(links.warnings(&host).is_empty());
    }
}
