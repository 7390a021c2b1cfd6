//! Programs on hooks: attached once, found again by the next daemon, replaced in one step.
//!
//! tcx links and those of the socket hooks are pinned. Before tcx (Linux 6.6), filters of the clsact
//! discipline do without: they stay as they are.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use aya::{programs::TcAttachType, util::KernelVersion};

use super::{
    DataplaneError, Interface, cgroup, clsact,
    errors::{attach_error, syscall},
    kernel::KernelDataplane,
    load::SOCKET_PROGRAMS,
    query::interface_name,
    sys::objects::{self, AttachType, LinkInfo},
};

pub(super) const TC_PROGRAMS: [(&str, TcAttachType, AttachType); 2] = [
    ("tc_ingress", TcAttachType::Ingress, AttachType::TcxIngress),
    ("tc_egress", TcAttachType::Egress, AttachType::TcxEgress),
];

/// Programs on one interface.
pub(super) struct Attached {
    pub(super) name: String,
    pub(super) slot: u32,
    /// It was to be taken off, and could not be.
    pub(super) going: bool,
    pub(super) hooks: BTreeMap<&'static str, Hook>,
}

/// One program on one interface.
pub(super) enum Hook {
    Tcx(OwnedFd),
    Clsact,
}

/// A hook as the kernel has it.
pub(super) struct Seen {
    pub(super) link: LinkInfo,
    /// All programs on it, in the order in which they are asked.
    pub(super) programs: Vec<u32>,
}

/// tcx links came with Linux 6.6; before, clsact through netlink.
pub(super) fn tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

fn attach_type(program: &str) -> AttachType {
    match program {
        "connect4" => AttachType::Connect4,
        "connect6" => AttachType::Connect6,
        "sendmsg4" => AttachType::Sendmsg4,
        _ => AttachType::Sendmsg6,
    }
}

/// The kernel's word for a link, or a filter, whose interface is gone.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOLINK | libc::ENODEV | libc::ENOENT)
    )
}

impl KernelDataplane {
    pub(super) fn attach_interface(&mut self, interface: &Interface) -> Result<(), DataplaneError> {
        let (ifindex, slot) = (interface.ifindex, interface.slot);
        if let Some(attached) = self.attached.get_mut(&ifindex) {
            attached.name.clone_from(&interface.name);
            // What is off already is missing at the next look.
            attached.going = false;
            if attached.slot == slot {
                return Ok(());
            }
        }
        self.note_interface(interface)?;
        if let Some(attached) = self.attached.get_mut(&ifindex) {
            attached.slot = slot;
            return Ok(());
        }
        let mut attached = Attached {
            name: interface.name.clone(),
            slot,
            going: false,
            hooks: BTreeMap::new(),
        };
        for (program, direction, tcx) in TC_PROGRAMS {
            match self.hook(program, direction, tcx, interface) {
                Ok(hook) => {
                    attached.hooks.insert(program, hook);
                }
                Err(error) => {
                    // Half an interface is worse than none: take the first hook off again.
                    if let (_, Some(left)) = self.unhook(ifindex, attached) {
                        self.attached.insert(ifindex, left);
                        return Err(error);
                    }
                    // Nor may its number mean anything to the next one that gets it.
                    self.forget_interface(ifindex)?;
                    return Err(error);
                }
            }
        }
        self.attached.insert(ifindex, attached);
        Ok(())
    }

    fn hook(
        &mut self,
        program: &'static str,
        direction: TcAttachType,
        attach_type: AttachType,
        interface: &Interface,
    ) -> Result<Hook, DataplaneError> {
        let ifindex = interface.ifindex;
        if !tcx() {
            let classifier = self.opened.classifiers.get_mut(program);
            let classifier = classifier.ok_or_else(|| super::errors::missing(program))?;
            clsact::attach(classifier, program, direction, &interface.name)?;
            return Ok(Hook::Clsact);
        }
        let failed = |error: io::Error| attach_error(program, &interface.name, &error);
        let fd = self
            .classifier(program)?
            .fd()
            .map_err(|e| failed(io::Error::other(e)))?;
        let link = objects::link_interface(fd.as_fd(), ifindex, attach_type).map_err(failed)?;
        self.pins
            .pin_link(program, Some(ifindex), link.as_fd())
            .map_err(failed)?;
        Ok(Hook::Tcx(link))
    }

    pub(super) fn detach_interface(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        let Some(attached) = self.attached.remove(&ifindex) else {
            return Ok(());
        };
        let (result, left) = self.unhook(ifindex, attached);
        if let Some(mut left) = left {
            left.going = true;
            self.attached.insert(ifindex, left);
            return result;
        }
        result.and(self.forget_interface(ifindex))
    }

    /// Takes programs off; answers with those that stay, as their pins cannot be removed.
    fn unhook(
        &mut self,
        ifindex: u32,
        attached: Attached,
    ) -> (Result<(), DataplaneError>, Option<Attached>) {
        let Attached {
            name, slot, hooks, ..
        } = attached;
        let (mut result, mut left) = (Ok(()), BTreeMap::new());
        for (program, hook) in hooks {
            let done = match &hook {
                // The last who knows of the link is `hook`, dropped here.
                Hook::Tcx(_) => self
                    .pins
                    .forget_link(program, Some(ifindex))
                    .map_err(|error| attach_error(program, &name, &error)),
                Hook::Clsact => {
                    // Renamed, perhaps; and if it is gone, so is the filter.
                    let name = interface_name(ifindex);
                    let directions = TC_PROGRAMS.iter().find(|(name, ..)| *name == program);
                    name.zip(directions)
                        .map_or(Ok(()), |(name, (_, direction, _))| {
                            clsact::detach(program, *direction, &name)
                        })
                }
            };
            if done.is_err() {
                left.insert(program, hook);
            }
            result = result.and(done);
        }
        let left = (!left.is_empty()).then_some(Attached {
            name,
            slot,
            going: false,
            hooks: left,
        });
        (result, left)
    }

    /// Finds what an earlier daemon has attached. Links that name other programs than ours are led to
    /// ours, those whose interface is gone are forgotten.
    pub(super) fn adopt_links(&mut self) -> Result<(), DataplaneError> {
        let slots = self.interfaces()?;
        let mut found: BTreeMap<u32, Attached> = BTreeMap::new();
        let links = self.pins.links().map_err(syscall("open pinned links"))?;
        for (name, ifindex, link) in links {
            let info = objects::link_info(link.as_fd()).map_err(syscall("read a link"))?;
            match ifindex {
                None => {
                    self.socket_links.insert(name, link);
                }
                Some(ifindex) if info.ifindex == ifindex => {
                    let attached = found.entry(ifindex).or_insert_with(|| Attached {
                        name: interface_name(ifindex).unwrap_or_default(),
                        slot: slots.get(&ifindex).copied().unwrap_or(0),
                        going: false,
                        hooks: BTreeMap::new(),
                    });
                    attached.hooks.insert(name, Hook::Tcx(link));
                }
                // Its interface is gone.
                Some(_) => {
                    let forgotten = self.pins.forget_link(name, ifindex);
                    forgotten.map_err(syscall("unpin a link"))?;
                }
            }
        }
        if !tcx() {
            for (ifindex, slot) in &slots {
                let Some(name) = interface_name(*ifindex) else {
                    continue;
                };
                let hooks = TC_PROGRAMS.map(|(program, ..)| (program, Hook::Clsact));
                let attached = Attached {
                    name,
                    slot: *slot,
                    going: false,
                    hooks: hooks.into(),
                };
                found.insert(*ifindex, attached);
            }
        }
        for ifindex in slots.keys().filter(|ifindex| !found.contains_key(ifindex)) {
            self.forget_interface(*ifindex)?;
        }
        self.attached = found;
        self.replace_programs()
    }

    /// Sees to it that every hook has our programs, each in one step: no packet passes unjudged, as
    /// all programs share what they judge by.
    pub(super) fn replace_programs(&mut self) -> Result<(), DataplaneError> {
        for (ifindex, attached) in &self.attached {
            for (program, hook) in &attached.hooks {
                let Hook::Tcx(link) = hook else { continue };
                let classifier = self.classifier(program)?;
                let ours = classifier
                    .fd()
                    .map_err(|e| attach_error(program, &attached.name, &e))?;
                match replace(link, ours.as_fd()) {
                    // Its interface went away meanwhile: rtnetlink says so.
                    Err(error) if is_gone(&error) => {
                        tracing::debug!(ifindex, program, "the link is gone");
                    }
                    replaced => {
                        replaced.map_err(|e| attach_error(program, &attached.name, &e))?;
                    }
                }
            }
        }
        for (program, link) in &self.socket_links {
            if let Some(ours) = self.opened.socket.get(program) {
                replace(link, ours.as_fd()).map_err(|e| attach_error(program, "a cgroup", &e))?;
            }
        }
        if tcx() {
            return Ok(());
        }
        let mut gone = Vec::new();
        for (ifindex, attached) in &self.attached {
            for (program, direction, _) in TC_PROGRAMS {
                let Some(classifier) = self.opened.classifiers.get_mut(program) else {
                    continue;
                };
                let Some(name) = interface_name(*ifindex) else {
                    gone.push(*ifindex);
                    break;
                };
                if attached.hooks.contains_key(program) {
                    clsact::attach(classifier, program, direction, &name)?;
                }
            }
        }
        for ifindex in gone {
            self.detach_interface(ifindex)?;
        }
        Ok(())
    }

    /// The kernel's number for a program.
    pub(super) fn id_of(&self, program: &str) -> Result<u32, DataplaneError> {
        let failed = syscall("read a program's id");
        let fd = self.classifier(program)?.fd();
        let fd = fd.map_err(|e| failed(io::Error::other(e)))?;
        objects::id(fd.as_fd()).map_err(failed)
    }

    pub(super) fn missing_hooks(&mut self) -> Result<Vec<u32>, DataplaneError> {
        // Filters of clsact are written anew at each look, see `inspect`.
        if !tcx() {
            return Ok(Vec::new());
        }
        let mut lost = Vec::new();
        self.seen.clear();
        for (ifindex, attached) in self.attached.iter().filter(|(_, a)| !a.going) {
            for (program, _, attach_type) in TC_PROGRAMS {
                let ours = self.id_of(program)?;
                let programs = match objects::programs_on(*ifindex, attach_type) {
                    Err(error) if is_gone(&error) => Vec::new(),
                    programs => programs.map_err(syscall("query the programs of a link"))?,
                };
                // A link of ours with another program behind it is led back, not made anew.
                let link = match attached.hooks.get(program) {
                    Some(Hook::Tcx(link)) => objects::link_info(link.as_fd()).ok(),
                    _ => None,
                };
                let holds = link.is_some_and(|info| info.ifindex == *ifindex);
                if !holds
                    || !(programs.contains(&ours)
                        || link.is_some_and(|l| programs.contains(&l.program)))
                {
                    lost.push((*ifindex, program, attach_type));
                } else if let Some(link) = link {
                    self.seen
                        .insert((*ifindex, program), Seen { link, programs });
                }
            }
        }
        let mut missing = Vec::new();
        for (ifindex, program, attach_type) in lost {
            // This hook alone: the other one is not taken off for it.
            match self.hook_again(ifindex, program, attach_type) {
                Ok(name) => self.restored.push(format!("{program} on {name}")),
                // Its interface is gone, or it cannot be.
                Err(error) => {
                    tracing::debug!(ifindex, program, %error, "cannot attach again at once");
                    if missing.last() != Some(&ifindex) {
                        missing.push(ifindex);
                    }
                }
            }
        }
        Ok(missing)
    }

    fn hook_again(
        &mut self,
        ifindex: u32,
        program: &'static str,
        attach_type: AttachType,
    ) -> io::Result<String> {
        let ours = self.program(program).ok_or(io::ErrorKind::NotFound)?;
        let fd = ours.fd().map_err(io::Error::other)?;
        let link = objects::link_interface(fd.as_fd(), ifindex, attach_type)?;
        self.pins.pin_link(program, Some(ifindex), link.as_fd())?;
        let attached = self.attached.get_mut(&ifindex);
        let attached = attached.ok_or(io::ErrorKind::NotFound)?;
        attached.hooks.insert(program, Hook::Tcx(link));
        Ok(attached.name.clone())
    }

    pub(super) fn attach_socket_hooks(&mut self) -> Result<(), DataplaneError> {
        if self.socket_links.len() == SOCKET_PROGRAMS.len() {
            return Ok(());
        }
        let root = cgroup::cgroup2_root()?;
        let directory = File::open(&root).map_err(syscall("open the root cgroup"))?;
        let mut result = Ok(());
        for program in SOCKET_PROGRAMS {
            if self.socket_links.contains_key(program) {
                continue;
            }
            let Some(ours) = self.opened.socket.get(program) else {
                continue;
            };
            let link = objects::link_cgroup(ours.as_fd(), directory.as_fd(), attach_type(program));
            let pinned = link.and_then(|link| {
                self.pins.pin_link(program, None, link.as_fd())?;
                self.socket_links.insert(program, link);
                Ok(())
            });
            let at = root.display().to_string();
            result = result.and(pinned.map_err(|error| attach_error(program, &at, &error)));
        }
        result
    }

    pub(super) fn detach_socket_hooks(&mut self) -> Result<(), DataplaneError> {
        let mut result = Ok(());
        for (program, link) in std::mem::take(&mut self.socket_links) {
            let forgotten = self.pins.forget_link(program, None);
            if forgotten.is_err() {
                // It stays where it is pinned.
                self.socket_links.insert(program, link);
            }
            result = result.and(forgotten.map_err(|e| attach_error(program, "a cgroup", &e)));
        }
        result
    }
}

/// Puts a program behind a link, unless it is there.
fn replace(link: &OwnedFd, program: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    if objects::link_info(link.as_fd())?.program == objects::id(program)? {
        return Ok(());
    }
    objects::update_link(link.as_fd(), program)
}
