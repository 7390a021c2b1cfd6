//! Which pins are an enforcer's, and for which network namespace.

use std::{
    collections::BTreeSet,
    io::{self, ErrorKind},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use aya::maps::{HashMap, Map, MapData};

use super::{
    super::{
        hooks::{TC_PROGRAMS, tcx},
        load::SOCKET_PROGRAMS,
        sys::{self, objects},
    },
    META_WORDS, Meta, Pins, asides, gone, names, unlink,
};

/// A link of ours: the program's name, the ifindex if it is on an interface, and the link.
pub(in crate::dataplane) type PinnedLink = (&'static str, Option<u32>, OwnedFd);

/// Words of a description up to the network namespace: those stay where they are in every layout.
const LEAST_WORDS: usize = 10;
const MOST_WORDS: usize = 1024;

/// Reads a pinned description; `None` when it is nobody's that we know.
///
/// # Errors
/// The kernel's; ENOENT when there is none.
pub(super) fn description(path: &Path) -> io::Result<Option<Meta>> {
    let map = objects::get(path)?;
    let size = objects::array_words(map.as_fd())?;
    let Some(size) = size.filter(|words| (LEAST_WORDS..=MOST_WORDS).contains(words)) else {
        return Ok(None);
    };
    // Another layout may have more words: the kernel writes them all.
    let mut words = vec![0; size.max(META_WORDS)];
    sys::lookup(map.as_fd(), 0, &mut words)?;
    let meta = words.first_chunk().map(Meta::from_words);
    Ok(meta.filter(|meta| meta.magic == super::MAGIC))
}

/// What a name in `links` stands for, if an enforcer gives such names.
fn meant(name: &str) -> Option<(&'static str, Option<u32>)> {
    if let Some(socket) = SOCKET_PROGRAMS.iter().find(|program| **program == name) {
        return Some((socket, None));
    }
    let (program, ifindex) = name.split_once('-')?;
    let (program, ..) = TC_PROGRAMS.iter().find(|(tc, ..)| *tc == program)?;
    Some((program, Some(ifindex.parse().ok()?)))
}

/// Ids of the programs that are pinned in a directory of pins, in use or about to be.
pub(in crate::dataplane) fn programs(root: &Path) -> BTreeSet<u32> {
    let mut ids = BTreeSet::new();
    let mut sets = asides(root).unwrap_or_default();
    sets.extend(["current", "next"].map(|set| root.join(set)));
    for set in sets {
        let programs = set.join("programs");
        for name in names(&programs).unwrap_or_default() {
            let program = objects::get(&programs.join(name));
            ids.extend(program.and_then(|program| objects::id(program.as_fd())));
        }
    }
    ids
}

impl Pins {
    /// Pinned links of ours; what else is in their directory is somebody else's.
    ///
    /// # Errors
    /// The kernel's.
    pub(in crate::dataplane) fn links(&self) -> io::Result<Vec<PinnedLink>> {
        let mut links = Vec::new();
        for name in names(&self.root.join("links"))? {
            let Some((program, ifindex)) = meant(&name) else {
                continue;
            };
            match objects::get(&self.root.join("links").join(&name)) {
                Ok(link) => links.push((program, ifindex, link)),
                // A directory, say.
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                    tracing::warn!(name, %error, "not a link, though it has the name of one");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(links)
    }

    /// Whether what is pinned is on no interface any more: those that it was on are gone.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn is_abandoned(&self) -> io::Result<bool> {
        if !tcx() {
            // There are no links to ask.
            return Ok(self.noted_interfaces().is_empty());
        }
        for (_, ifindex, link) in self.links()? {
            if ifindex.is_some() && objects::link_info(link.as_fd())?.ifindex != 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Interfaces that the programs know.
    pub(in crate::dataplane) fn noted_interfaces(&self) -> BTreeSet<u32> {
        let map = MapData::from_pin(self.set(false).map("INTERFACES"));
        let map = map.and_then(Map::from_map_data);
        let map: Result<HashMap<_, u32, [u32; 2]>, _> = map.and_then(TryInto::try_into);
        map.iter().flat_map(|map| map.keys().flatten()).collect()
    }

    /// Takes the links away, whichever enforcer made them. What is not one of theirs stays.
    ///
    /// # Errors
    /// The first of the kernel's; the rest is attempted all the same.
    pub(super) fn remove_links(&self) -> io::Result<()> {
        let (directory, programs) = (self.root.join("links"), programs(&self.root));
        let mut result = Ok(());
        for name in names(&directory)? {
            let path = directory.join(&name);
            if meant(&name).is_some() || leads_to(&path, &programs) {
                result = result.and(gone(unlink(path)));
            }
        }
        result.and(unless_filled(std::fs::remove_dir(directory)))
    }

    /// What is in the directory of links and is no enforcer's.
    pub(in crate::dataplane) fn strange(&self) -> Vec<PathBuf> {
        let directory = self.root.join("links");
        let names = names(&directory).unwrap_or_default().into_iter();
        let strange = names.filter(|name| meant(name).is_none());
        strange.map(|name| directory.join(name)).collect()
    }
}

fn leads_to(path: &Path, programs: &BTreeSet<u32>) -> bool {
    let link = objects::get(path).and_then(|link| objects::link_info(link.as_fd()));
    link.is_ok_and(|link| programs.contains(&link.program))
}

/// A directory with something of somebody else's in it stays.
pub(super) fn unless_filled(removed: io::Result<()>) -> io::Result<()> {
    match gone(removed) {
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_enforcer_gives_mean_nothing() {
        assert_eq!(meant("tc_ingress-7"), Some(("tc_ingress", Some(7))));
        assert_eq!(meant("connect6"), Some(("connect6", None)));
        for strange in [
            "",
            "tc_ingress",
            "tc_ingress-",
            "tc_ingress-x",
            "connect4-7",
            "foo-7",
        ] {
            assert_eq!(meant(strange), None, "{strange}");
        }
    }
}
