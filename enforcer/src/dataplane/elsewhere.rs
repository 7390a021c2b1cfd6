//! Enforcers beside this one: pins that are not its own, and their programs on the same hooks.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::unistd::geteuid;

use super::{
    Beside, DataplaneError,
    errors::syscall,
    hooks::{TC_PROGRAMS, tcx},
    kernel::KernelDataplane,
    pins::{self, DEFAULT_PINS},
    query::interface_name,
    sys::{self, objects},
};

/// A directory of pins.
#[derive(Clone, Debug)]
pub struct Elsewhere {
    /// Where it is.
    pub root: PathBuf,
    /// Whether it is for the network namespace of whoever asks.
    pub here: bool,
    programs: BTreeSet<u32>,
}

/// Directories of pins where they usually are, but `own`.
pub fn elsewhere(own: Option<&Path>) -> Vec<Elsewhere> {
    let usual = Path::new(DEFAULT_PINS).parent();
    let places: BTreeSet<&Path> = usual
        .into_iter()
        .chain(own.and_then(Path::parent))
        .collect();
    let own = own.and_then(|own| fs::metadata(own).ok());
    let own = own.map(|own| (own.dev(), own.ino()));
    let cookie = sys::netns_cookie().ok();
    let mut found = BTreeMap::new();
    for entry in places
        .into_iter()
        .filter_map(|place| fs::read_dir(place).ok())
    {
        for entry in entry.flatten() {
            let root = entry.path();
            // Anybody may make directories there; what others own is no enforcer's.
            let Ok(metadata) = fs::symlink_metadata(&root) else {
                continue;
            };
            let id = (metadata.dev(), metadata.ino());
            let trusted = [0, geteuid().as_raw()].contains(&metadata.uid());
            if !metadata.is_dir() || !trusted || own == Some(id) {
                continue;
            }
            let Some(netns) = pins::netns_of(&root) else {
                continue;
            };
            let programs = pins::programs(&root);
            let here = cookie == Some(netns);
            found.insert(
                id,
                Elsewhere {
                    root,
                    here,
                    programs,
                },
            );
        }
    }
    let mut found: Vec<_> = found.into_values().collect();
    found.sort_unstable_by(|a, b| a.root.cmp(&b.root));
    found
}

/// Whose programs of an enforcer hang on an interface's hooks: where they are pinned, `None` for each
/// that is pinned nowhere among these. Linux 6.6 and later.
///
/// # Errors
/// [`DataplaneError::Syscall`].
pub fn enforcers_on(
    interface: u32,
    pinned: &[Elsewhere],
) -> Result<Vec<Option<PathBuf>>, DataplaneError> {
    let mut most = Vec::new();
    for (name, _, hook) in TC_PROGRAMS.iter().filter(|_| tcx()) {
        let programs = match objects::programs_on(interface, *hook) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Vec::new(),
            programs => programs.map_err(syscall("query the programs of a link"))?,
        };
        let found: Vec<_> = whose(&programs, name, pinned).collect();
        if found.len() > most.len() {
            most = found;
        }
    }
    Ok(most)
}

/// Of these programs on the hook of a program of this name, those of enforcers.
fn whose(
    programs: &[u32],
    name: &str,
    pinned: &[Elsewhere],
) -> impl Iterator<Item = Option<PathBuf>> {
    programs.iter().filter_map(move |id| {
        let place = pinned.iter().find(|place| place.programs.contains(id));
        // Its name is for CAP_SYS_ADMIN to know.
        let named = || objects::program_name(*id).is_ok_and(|of| of == name);
        match place {
            Some(place) => Some(Some(place.root.clone())),
            None => named().then_some(None),
        }
    })
}

impl KernelDataplane {
    /// See [`super::Dataplane::beside`].
    pub(super) fn enforcers_beside(&self) -> Vec<Beside> {
        let pinned = elsewhere(self.pins.place());
        let mut interfaces: BTreeMap<Option<PathBuf>, BTreeSet<String>> = BTreeMap::new();
        for ((ifindex, program), others) in &self.strangers {
            for whose in whose(others, program, &pinned) {
                let known = self
                    .attached
                    .get(ifindex)
                    .map(|attached| attached.name.clone());
                let name = interface_name(*ifindex).or(known);
                interfaces.entry(whose).or_default().extend(name);
            }
        }
        for place in pinned.into_iter().filter(|place| place.here) {
            interfaces.entry(Some(place.root)).or_default();
        }
        let beside = interfaces.into_iter();
        beside
            .map(|(pins, interfaces)| Beside { pins, interfaces })
            .collect()
    }

    /// Programs of other enforcers that are pinned: to fight them for the first place is in vain.
    pub(super) fn programs_elsewhere(&self) -> BTreeSet<u32> {
        let pinned = elsewhere(self.pins.place()).into_iter();
        pinned.flat_map(|place| place.programs).collect()
    }
}
