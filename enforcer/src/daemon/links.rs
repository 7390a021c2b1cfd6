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

use super::environment::{Host, Link};
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
        }
    }

    /// What the socket hooks do now.
    pub fn socket_hooks(&self) -> Option<SocketHooks> {
        self.hooks_now
    }

    /// Why they only observe when they were to refuse.
    pub fn hooks_reason(&self) -> Option<String> {
        self.hooks_reason.clone()
    }

    /// Whether `link` is asked for. A glob never means a loopback: nobody wants `*` to cut a
    /// host off from itself; nor a link that carries no IP.
    fn wants(&self, link: &Link) -> bool {
        let usual = !link.loopback && link.carries_ip();
        self.patterns
            .iter()
            .any(|p| p.matches(&link.name) && (p.is_literal() || usual))
    }

    /// These interfaces went away, and may have come back without their hooks.
    pub fn removed(&mut self, dataplane: &SharedDataplane, removed: &[u32]) {
        let mut dataplane = dataplane.lock().unwrap_or_else(PoisonError::into_inner);
        for ifindex in removed {
            self.detach(&mut **dataplane, *ifindex);
        }
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
        for ifindex in dataplane.missing()? {
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
        for ifindex in gone {
            self.detach(&mut **guard, ifindex);
        }
        self.stolen
            .retain(|ifindex| wanted.iter().any(|l| l.ifindex == *ifindex));
        self.failed
            .retain(|ifindex, _| wanted.iter().any(|l| l.ifindex == *ifindex));
        let mut statuses: Vec<_> = wanted
            .into_iter()
            .map(|link| {
                let error = self.attach(&mut **guard, link).err();
                status(&link.name, link.ifindex, error)
            })
            .collect();
        for pattern in self.patterns.iter().filter(|p| p.is_literal()) {
            if !host.links.iter().any(|l| l.name == pattern.as_str()) {
                let error = Some("no such interface; it is enforced when it appears".to_owned());
                statuses.push(status(pattern.as_str(), 0, error));
            }
        }
        statuses
    }

    fn attach(&mut self, dataplane: &mut dyn Dataplane, link: &Link) -> Result<(), String> {
        if let Some(name) = self.attached.get_mut(&link.ifindex) {
            name.clone_from(&link.name);
            return Ok(());
        }
        let result = match link.interface() {
            None => Err(format!(
                "packets of links of type {} cannot be read",
                link.kind
            )),
            Some(interface) => dataplane.attach(&interface).map_err(|e| e.to_string()),
        };
        match result {
            Ok(()) => {
                if self.stolen.remove(&link.ifindex) {
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
            .filter(|l| l.up && !l.loopback && l.carries_ip())
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
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::daemon::fake::Handle;

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
}
