//! Looks whether the kernel still has what was put there, and puts it back.
//!
//! Whoever may take programs off may do worse; this is for accidents, and for what another tool
//! does that takes the hooks for its own.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::Path,
};

use aya::maps::{Array, Map};
use enforcer_common::wire::{Control, NO_DEADLINE, slot};

use super::{
    DataplaneError, Tamper, clsact,
    errors::{map_error, missing, syscall},
    hooks::{Hook, Seen, TC_PROGRAMS, tcx},
    images::Kept,
    kernel::KernelDataplane,
    load::{CONTROL, MAPS, SOCKET_PROGRAMS, STEP_PROGRAMS, STEPS},
    query::interface_name,
    sys::{self, objects},
};

/// How often a place before others is fought for, for each interface: another tool may want it as
/// much, and each time packets are dropped for a moment.
const ATTEMPTS: u32 = 3;

impl KernelDataplane {
    /// See [`super::Dataplane::inspect`].
    pub(super) fn look_for_tampering(&mut self) -> Result<Vec<Tamper>, DataplaneError> {
        let restored = std::mem::take(&mut self.restored).into_iter();
        let mut found: Vec<_> = restored
            .map(|target| Tamper::of(&target, "was taken off", true))
            .collect();
        self.forget_previous();
        self.look_at_settings(&mut found)?;
        self.look_at_images(&mut found)?;
        self.look_at_steps(&mut found)?;
        self.look_at_hooks(&mut found)?;
        self.look_at_socket_hooks(&mut found)?;
        if let Err(error) = self.pins.restore() {
            tracing::debug!(%error, "what is not pinned stays so");
        }
        self.look_at_pins(&mut found);
        Ok(found)
    }

    fn look_at_settings(&mut self, found: &mut Vec<Tamper>) -> Result<(), DataplaneError> {
        let map: Array<_, Control> = self.typed(CONTROL)?;
        let now = map.get(&0, 0).map_err(map_error("read the settings"))?;
        if now != self.control {
            let written = self.write_control();
            found.push(Tamper::of(
                "the programs' settings",
                "were changed by somebody else",
                written.is_ok(),
            ));
        }
        Ok(())
    }

    fn look_at_images(&mut self, found: &mut Vec<Tamper>) -> Result<(), DataplaneError> {
        for slot in 0..slot::COUNT {
            let mut inside = [0];
            let looked = sys::lookup(self.policy()?, slot, &mut inside);
            let inside = match looked {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
                looked => Some(looked.map(|()| inside[0]).map_err(syscall("read POLICY"))?),
            };
            let ours = match self.slots.get(&slot) {
                Some(kept) => Some(id_of(kept)?),
                None => None,
            };
            if inside == ours {
                continue;
            }
            // One that was found there and is pinned no more: what judges by it, or will, would have
            // nothing instead.
            let judges = slot == slot::LIVE || self.control.deadline != NO_DEADLINE;
            if ours.is_none() && judges {
                continue;
            }
            let repaired = match self.slots.get(&slot) {
                Some(kept) => sys::update_inner(self.policy()?, slot, kept.map.as_fd()),
                None => sys::delete(self.policy()?, slot),
            };
            found.push(Tamper::of(
                &format!("slot {slot} of POLICY"),
                "had another image than the one that was put there",
                repaired.is_ok(),
            ));
        }
        Ok(())
    }

    /// Without one of them, what the attached programs do not settle is dropped.
    fn look_at_steps(&mut self, found: &mut Vec<Tamper>) -> Result<(), DataplaneError> {
        for (place, name) in STEP_PROGRAMS {
            let steps = self.map_fd(STEPS).ok_or_else(|| missing(STEPS))?;
            let mut inside = [0];
            let inside = match sys::lookup(steps, place, &mut inside) {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
                looked => Some(looked.map(|()| inside[0]).map_err(syscall("read STEPS"))?),
            };
            if inside == Some(self.id_of(name)?) {
                continue;
            }
            let program = self.classifier(name)?.fd();
            let program = program.map_err(|e| syscall("use a program")(io::Error::other(e)))?;
            let back = sys::update_inner(steps, place, program.as_fd());
            found.push(Tamper::of(
                &format!("{name} in STEPS"),
                "was taken out or replaced",
                back.is_ok(),
            ));
        }
        Ok(())
    }

    fn look_at_hooks(&mut self, found: &mut Vec<Tamper>) -> Result<(), DataplaneError> {
        let mut last = Vec::new();
        let (mut elsewhere, mut strangers) = (None, BTreeMap::new());
        let mut seen = std::mem::take(&mut self.seen);
        for (ifindex, attached) in &self.attached {
            for (program, hook) in &attached.hooks {
                let Hook::Tcx(link) = hook else { continue };
                let ours = self.classifier(program)?.fd();
                let ours = ours.map_err(|e| syscall("use a program")(io::Error::other(e)))?;
                let id = self.id_of(program)?;
                let Some((.., attach_type)) = TC_PROGRAMS.iter().find(|(name, ..)| name == program)
                else {
                    continue;
                };
                let Seen {
                    link: info,
                    programs: all,
                } = match seen.remove(&(*ifindex, *program)) {
                    Some(seen) => seen,
                    None => Seen {
                        link: objects::link_info(link.as_fd()).map_err(syscall("read a link"))?,
                        programs: objects::programs_on(*ifindex, *attach_type).unwrap_or_default(),
                    },
                };
                // What is gone is `missing`.
                if info.ifindex != *ifindex {
                    continue;
                }
                if all.iter().any(|other| *other != id) {
                    let others = all.iter().copied().filter(|other| *other != id);
                    strangers.insert((*ifindex, *program), others.collect());
                }
                let target = format!("{program} on {}", attached.name);
                if info.program != id {
                    let back = objects::update_link(link.as_fd(), ours.as_fd());
                    let what = "had another program behind its link";
                    found.push(Tamper::of(&target, what, back.is_ok()));
                    continue;
                }
                let mut others: Vec<_> = all.iter().take_while(|other| **other != id).collect();
                if others.len() == all.len() {
                    continue; // It is gone by now.
                }
                if !others.is_empty() {
                    // Another enforcer would fight for the place as well; it is told of elsewhere.
                    let known = elsewhere.get_or_insert_with(|| self.programs_elsewhere());
                    others.retain(|other| !known.contains(other));
                }
                if !others.is_empty() {
                    last.push((*ifindex, *program, target, format!("{others:?}")));
                }
            }
        }
        self.strangers = strangers;
        for (ifindex, program, target, others) in last {
            let repaired = self.come_first(ifindex, program);
            let what = format!("was not the first to be asked, programs {others} were before it");
            found.push(Tamper::of(&target, &what, repaired));
        }
        if !tcx() {
            self.look_at_filters(found);
        }
        Ok(())
    }

    /// Takes the first place again. The kernel has no program twice on a hook, so for a moment one
    /// that drops everything stands in.
    fn come_first(&mut self, ifindex: u32, program: &'static str) -> bool {
        let attempts = self.fought.entry((ifindex, program)).or_default();
        *attempts += 1;
        if *attempts > ATTEMPTS {
            return false;
        }
        let Some((.., attach_type)) = TC_PROGRAMS.iter().find(|(name, ..)| *name == program) else {
            return false;
        };
        let link_before = |name: &str| -> io::Result<std::os::fd::OwnedFd> {
            let program = self.program(name).ok_or(io::ErrorKind::NotFound)?;
            let fd = program.fd().map_err(io::Error::other)?;
            objects::link_interface(fd.as_fd(), ifindex, *attach_type)
        };
        // What is pinned and kept is the stand-in until ours is there: whatever fails or dies in
        // between leaves a hook that drops, and the next look, or start, puts ours behind its link.
        let moved = || -> io::Result<std::os::fd::OwnedFd> {
            let shut = link_before("shut")?;
            self.pins.pin_link(program, Some(ifindex), shut.as_fd())?;
            let hooks = self.attached.get(&ifindex).map(|attached| &attached.hooks);
            if let Some(Hook::Tcx(old)) = hooks.and_then(|hooks| hooks.get(program)) {
                objects::detach_link(old.as_fd())?;
            }
            let Ok(new) = link_before(program) else {
                return Ok(shut);
            };
            // Not pinned, it is at the next look.
            let pinned = self.pins.pin_link(program, Some(ifindex), new.as_fd());
            if let Err(error) = pinned {
                tracing::warn!(ifindex, program, %error, "cannot pin the link");
            }
            drop(shut);
            Ok(new)
        };
        match moved() {
            Ok(link) => {
                if let Some(attached) = self.attached.get_mut(&ifindex) {
                    attached.hooks.insert(program, Hook::Tcx(link));
                }
                true
            }
            Err(error) => {
                tracing::error!(ifindex, program, %error, "cannot be the first again");
                false
            }
        }
    }

    /// Filters are written anew: if one is not there, that says so.
    fn look_at_filters(&mut self, found: &mut Vec<Tamper>) {
        for (ifindex, attached) in self.attached.iter().filter(|(_, a)| !a.going) {
            let Some(name) = interface_name(*ifindex) else {
                continue;
            };
            for (program, direction, _) in TC_PROGRAMS {
                let Some(classifier) = self.opened.classifiers.get_mut(program) else {
                    continue;
                };
                if clsact::replace(classifier, direction, &name) {
                    continue;
                }
                let back = clsact::attach(classifier, program, direction, &name);
                let target = format!("{program} on {}", attached.name);
                found.push(Tamper::of(&target, "was taken off", back.is_ok()));
            }
        }
    }

    fn look_at_socket_hooks(&mut self, found: &mut Vec<Tamper>) -> Result<(), DataplaneError> {
        let mut lost = Vec::new();
        for (program, link) in &self.socket_links {
            let info = objects::link_info(link.as_fd()).map_err(syscall("read a link"))?;
            let Some(ours) = self.opened.socket.get(program) else {
                continue;
            };
            if info.cgroup == 0 {
                lost.push(*program);
            } else if info.program
                != objects::id(ours.as_fd()).map_err(syscall("read a program's id"))?
            {
                let back = objects::update_link(link.as_fd(), ours.as_fd());
                let what = "had another program behind its link";
                found.push(Tamper::of(program, what, back.is_ok()));
            }
        }
        for program in &lost {
            self.socket_links.remove(program);
        }
        // Those that could not be put back the last time, too.
        if self.socket_wanted && self.socket_links.len() < SOCKET_PROGRAMS.len() {
            let missing: Vec<_> = SOCKET_PROGRAMS
                .into_iter()
                .filter(|program| !self.socket_links.contains_key(program))
                .collect();
            if let Err(error) = self.attach_socket_hooks() {
                tracing::debug!(%error, "cannot attach the socket hooks again");
            }
            for program in missing {
                let back = self.socket_links.contains_key(program);
                found.push(Tamper::of(program, "was taken off the root cgroup", back));
            }
        }
        Ok(())
    }

    /// What is pinned must be there for the next daemon.
    fn look_at_pins(&self, found: &mut Vec<Tamper>) {
        let mut look = |target: String, path: &Path, object: Option<BorrowedFd<'_>>| {
            if path.exists() {
                return;
            }
            let back = object.is_some_and(|object| {
                self.pins.set(false).make().is_ok() && objects::pin(object, path).is_ok()
            });
            found.push(Tamper::of(&target, "is no longer pinned", back));
        };
        let set = self.pins.set(false);
        for (name, program) in &self.opened.classifiers {
            let fd = program.fd().ok();
            let fd = fd.map(|fd| fd.as_fd());
            look(format!("program {name}"), &set.program(name), fd);
        }
        for (name, program) in &self.opened.socket {
            look(
                format!("program {name}"),
                &set.program(name),
                Some(program.as_fd()),
            );
        }
        for name in MAPS {
            let fd = self.map_fd(name);
            look(format!("map {name}"), &set.map(name), fd);
        }
        for kept in self.slots.values() {
            let path = set.image(kept.generation);
            look(
                format!("image {}", kept.generation),
                &path,
                Some(kept.map.as_fd()),
            );
        }
        for (ifindex, attached) in &self.attached {
            for (program, hook) in &attached.hooks {
                if let Hook::Tcx(link) = hook {
                    let path = self.pins.link(program, Some(*ifindex));
                    let target = format!("the link of {program} on {}", attached.name);
                    look(target, &path, Some(link.as_fd()));
                }
            }
        }
        for (program, link) in &self.socket_links {
            let path = self.pins.link(program, None);
            look(format!("the link of {program}"), &path, Some(link.as_fd()));
        }
        if !set.described() {
            let back = set.describe(&self.meta).is_ok();
            found.push(Tamper::of("the description", "is no longer pinned", back));
        }
    }

    fn map_fd(&self, name: &str) -> Option<BorrowedFd<'_>> {
        let (Map::Array(map)
        | Map::ArrayOfMaps(map)
        | Map::HashMap(map)
        | Map::LruHashMap(map)
        | Map::PerCpuArray(map)
        | Map::ProgramArray(map)
        | Map::RingBuf(map)) = self.map(name)?
        else {
            return None; // The programs share no others.
        };
        Some(map.fd().as_fd())
    }
}

fn id_of(kept: &Kept) -> Result<u32, DataplaneError> {
    objects::id(kept.map.as_fd()).map_err(syscall("read an image's id"))
}
