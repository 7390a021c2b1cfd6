//! Taking off what is pinned in a directory, while no daemon is at work there.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use super::{
    DataplaneError, clsact,
    errors::syscall,
    hooks::{TC_PROGRAMS, tcx},
    pins::{Keep, Pins},
    query::interface_name,
    sys,
};

/// What became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TakenOff {
    /// Names of the interfaces that are not enforced any more.
    pub interfaces: Vec<String>,
    /// What was among the pins and is no enforcer's: it was left alone.
    pub left: Vec<PathBuf>,
    /// It was for another network namespace, and before Linux 6.6 filters there cannot be reached
    /// from here.
    pub unreached: bool,
}

/// Takes off what an enforcer has pinned in a directory, whichever it was; `None` when nothing of one
/// is there. On the interfaces `but` another one is at work: before Linux 6.6 it has taken the place of
/// this one's filters there.
///
/// # Errors
/// [`DataplaneError`]: the directory is not in a BPF file system, somebody is at work there, what is
/// there is not an enforcer's. What could be taken off is off.
pub fn take_off(root: &Path, but: &BTreeSet<u32>) -> Result<Option<TakenOff>, DataplaneError> {
    if !root.exists() {
        return Ok(None);
    }
    let cookie = sys::netns_cookie().map_err(syscall("getsockopt(SO_NETNS_COOKIE)"))?;
    let pins = Pins::open(&Keep::Pinned(root.to_owned()))?;
    let netns = pins.netns()?;
    let here = netns.is_none_or(|netns| netns == cookie);
    let links = pins.links().map_err(syscall("open pinned links"))?;
    if netns.is_none() && links.is_empty() && !pins.is_begun() {
        return Ok(None);
    }
    let mut interfaces: BTreeSet<u32> = links.iter().filter_map(|(_, i, _)| *i).collect();
    let mut result = Ok(());
    if !tcx() {
        interfaces = pins.noted_interfaces();
        for ifindex in interfaces.difference(but).filter(|_| here) {
            let Some(name) = interface_name(*ifindex) else {
                continue;
            };
            for (program, direction, _) in TC_PROGRAMS {
                result = result.and(clsact::detach(program, direction, &name));
            }
        }
    }
    // A number means another interface elsewhere.
    let name = |ifindex| match here {
        true => interface_name(ifindex),
        false => Some(format!("ifindex {ifindex} of another network namespace")),
    };
    let unreached = !here && !tcx() && !interfaces.is_empty();
    let left = pins.strange();
    // A filter that stays must find its programs.
    result?;
    pins.remove().map_err(syscall("remove the pins"))?;
    Ok(Some(TakenOff {
        interfaces: interfaces.into_iter().filter_map(name).collect(),
        left,
        unreached,
    }))
}
