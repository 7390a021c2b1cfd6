//! Tells when policy files change.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::poll::Readable;

/// A change is reported when nothing more has happened for this long: a save is several events.
const QUIET: Duration = Duration::from_millis(100);
/// … but a directory that never comes to rest is reported at this interval.
const LONGEST: Duration = Duration::from_secs(1);

/// Watches the directory of a policy; for a single file the directory it is in, since editors
/// save by renaming another file over it.
pub struct Watch {
    readable: Readable,
    inotify: Inotify,
    directories: BTreeSet<PathBuf>,
    watched: BTreeMap<PathBuf, WatchDescriptor>,
    /// Something changed and was not reported yet.
    pending: bool,
}

impl Watch {
    /// Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When inotify has no instance or watch left, or a directory is gone.
    pub fn new(policy: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let mut watch = Self {
            readable: Readable::new(&inotify)?,
            inotify,
            directories: directories(policy),
            watched: BTreeMap::new(),
            pending: false,
        };
        watch.add()?;
        watch.pending = false;
        Ok(watch)
    }

    /// A directory that was replaced has lost its watch and gets a new one.
    fn add(&mut self) -> io::Result<()> {
        // Not MODIFY: a file is looked at when its writer has closed it.
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        for directory in &self.directories {
            let watch = self.inotify.add_watch(directory, flags)?;
            if self.watched.insert(directory.clone(), watch) != Some(watch) {
                self.pending = true;
            }
        }
        Ok(())
    }

    /// Returns after a change, once things are quiet. Safe to drop and call again.
    ///
    /// # Errors
    /// When the watch is broken for good.
    pub async fn changed(&mut self) -> io::Result<()> {
        if !self.pending {
            self.events().await?;
            self.pending = true;
        }
        let deadline = tokio::time::Instant::now() + LONGEST;
        while tokio::time::Instant::now() < deadline {
            match tokio::time::timeout(QUIET, self.events()).await {
                Ok(result) => result?,
                Err(_) => break,
            }
        }
        // When a directory is missing now, the load that follows says so.
        let _ = self.add();
        self.pending = false;
        Ok(())
    }

    async fn events(&mut self) -> io::Result<()> {
        loop {
            let mut guard = self.readable.ready().await?;
            let mut any = false;
            loop {
                match self.inotify.read_events() {
                    Ok(events) => any |= !events.is_empty(),
                    Err(nix::errno::Errno::EAGAIN) => break,
                    Err(nix::errno::Errno::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            guard.clear_ready();
            if any {
                return Ok(());
            }
        }
    }

    /// Watches again what was missing, such as a directory that was removed and made anew.
    pub fn repair(&mut self) {
        // Nothing to do about a failure but to try again.
        let _ = self.add();
    }
}

fn directories(policy: &Path) -> BTreeSet<PathBuf> {
    if policy.is_dir() {
        return BTreeSet::from([policy.to_owned()]);
    }
    let parent = |path: &Path| match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let mut directories = BTreeSet::from([parent(policy)]);
    // A link's target may be edited in place.
    if let Ok(target) = policy.canonicalize() {
        directories.insert(parent(&target));
    }
    directories
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    async fn changes(watch: &mut Watch) -> bool {
        tokio::time::timeout(Duration::from_secs(2), watch.changed())
            .await
            .is_ok()
    }

    #[tokio::test]
    async fn saving_in_place_by_rename_and_removal_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        fs::write(&file, "1").unwrap();
        for path in [dir.path(), &file] {
            let mut watch = Watch::new(path).unwrap();
            fs::write(&file, "2").unwrap();
            assert!(changes(&mut watch).await, "in place");
            let other = dir.path().join(".a.yaml.new");
            fs::write(&other, "3").unwrap();
            assert!(changes(&mut watch).await);
            fs::rename(&other, &file).unwrap();
            assert!(changes(&mut watch).await, "rename over");
            fs::write(&file, "4").unwrap();
            assert!(changes(&mut watch).await, "after the rename");
            assert!(
                tokio::time::timeout(Duration::from_millis(300), watch.changed())
                    .await
                    .is_err(),
                "nothing happened"
            );
        }
    }
}
