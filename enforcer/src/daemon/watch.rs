//! Tells when policy files change.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::time::Instant;

use super::files::{Sources, is_policy_name};
use crate::poll::Readable;

/// A change is reported when nothing more has happened for this long: a save is several events.
const QUIET: Duration = Duration::from_millis(20);
/// … but a directory that never comes to rest is reported at this interval.
const LONGEST: Duration = Duration::from_secs(1);

/// Watches the directory of a policy; for a single file the directory it is in, since editors
/// save by renaming another file over it; the directory of the settings, if it exists; and the
/// directories of files that links lead to.
pub struct Watch {
    readable: Readable,
    inotify: Inotify,
    sources: Sources,
    watched: BTreeMap<PathBuf, WatchDescriptor>,
    /// The first and the last change that were not reported yet.
    pending: Option<(Instant, Instant)>,
}

impl Watch {
    /// Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When inotify has no instance or watch left, or a directory is gone.
    pub fn new(sources: &Sources) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let mut watch = Self {
            readable: Readable::new(&inotify)?,
            inotify,
            sources: sources.clone(),
            watched: BTreeMap::new(),
            pending: None,
        };
        watch.add()?;
        watch.pending = None;
        Ok(watch)
    }

    /// A directory that was replaced has lost its watch and gets a new one.
    fn add(&mut self) -> io::Result<()> {
        // Not MODIFY: a file is looked at when its writer has closed it.
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            // Who owns a file, and who may write it, decides whether it is read.
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        let directories = directories(&self.sources);
        for directory in &directories {
            let watch = self.inotify.add_watch(directory, flags)?;
            if self.watched.insert(directory.clone(), watch) != Some(watch) {
                self.touch();
            }
        }
        // No link leads there any more.
        let inotify = &self.inotify;
        let mut old = Vec::new();
        self.watched.retain(|directory, watch| {
            let keep = directories.contains(directory);
            if !keep {
                old.push(*watch);
            }
            keep
        });
        for watch in old {
            // Two names of one directory have one watch; the kernel drops those of removed ones.
            if !self.watched.values().any(|w| *w == watch) {
                let _ = inotify.rm_watch(watch);
            }
        }
        Ok(())
    }

    fn touch(&mut self) {
        let now = Instant::now();
        let first = self.pending.map_or(now, |(first, _)| first);
        self.pending = Some((first, now));
    }

    /// Returns after a change, once things are quiet. Safe to drop and call again: the time
    /// counts on.
    ///
    /// # Errors
    /// When the watch is broken for good.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            let Some((first, last)) = self.pending else {
                self.events().await?;
                self.touch();
                continue;
            };
            let due = (first + LONGEST).min(last + QUIET);
            if Instant::now() >= due {
                break;
            }
            match tokio::time::timeout_at(due, self.events()).await {
                Ok(result) => {
                    result?;
                    self.touch();
                }
                Err(_) => break,
            }
        }
        // When a directory is missing now, the load that follows says so.
        let _ = self.add();
        self.pending = None;
        Ok(())
    }

    async fn events(&mut self) -> io::Result<()> {
        loop {
            let mut guard = self.readable.ready().await?;
            let mut any = false;
            loop {
                match self.inotify.read_events() {
                    Ok(events) => any |= events.iter().any(|event| self.matters(event)),
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

    /// A new file is empty or half-written; it matters when its writer closes it. A link matters
    /// at once: nobody will write to it.
    fn matters(&self, event: &InotifyEvent) -> bool {
        // The answer to a watch that was taken back.
        if event.mask == AddWatchFlags::IN_IGNORED {
            return false;
        }
        let Some(name) = event
            .name
            .as_ref()
            .filter(|_| event.mask.contains(AddWatchFlags::IN_CREATE))
        else {
            return true;
        };
        let directory = self.watched.iter().find(|(_, watch)| **watch == event.wd);
        let Some((directory, _)) = directory else {
            return true;
        };
        // Gone again: another event says so.
        fs::symlink_metadata(directory.join(name)).is_ok_and(|m| !m.is_file() || m.nlink() > 1)
    }

    /// Watches again what was missing, such as a directory that was removed and made anew, and
    /// what links lead to now.
    pub fn repair(&mut self) {
        // Nothing to do about a failure but to try again.
        let _ = self.add();
    }
}

fn directories(sources: &Sources) -> BTreeSet<PathBuf> {
    let policy = &sources.segments;
    let parent = |path: &Path| match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let (first, files) = if policy.is_dir() {
        let entries = fs::read_dir(policy).into_iter().flatten().flatten();
        let links = entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_symlink()))
            .map(|entry| entry.path())
            .filter(|path| is_policy_name(path));
        (policy.clone(), links.collect())
    } else {
        (parent(policy), vec![policy.clone()])
    };
    let settings = sources.settings.as_ref().map(|settings| &settings.path);
    // The default path may not exist, and one that was named is missed when it is read.
    let around = settings.map(|path| parent(path)).filter(|dir| dir.is_dir());
    let files = files.into_iter().chain(settings.cloned());
    // A link's target may be edited in place.
    let targets = files.filter_map(|file| file.canonicalize().ok());
    let mut directories: BTreeSet<PathBuf> = targets.map(|target| parent(&target)).collect();
    directories.insert(first);
    directories.extend(around);
    directories
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::daemon::{files::SettingsPath, guard::Trust};

    fn policy(path: &Path) -> Sources {
        Sources {
            segments: path.to_owned(),
            settings: None,
            trust: Trust::Anyone,
        }
    }

    async fn changes(watch: &mut Watch) -> bool {
        tokio::time::timeout(Duration::from_secs(2), watch.changed())
            .await
            .is_ok()
    }

    async fn quiet(watch: &mut Watch) -> bool {
        let limit = Duration::from_millis(300);
        tokio::time::timeout(limit, watch.changed()).await.is_err()
    }

    #[tokio::test]
    async fn a_caller_that_asks_again_and_again_gets_its_answer() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        fs::write(&file, "1").unwrap();
        let mut watch = Watch::new(&policy(dir.path())).unwrap();
        fs::write(&file, "2").unwrap();
        let start = Instant::now();
        // As select! does while another arm is busy.
        let each = Duration::from_millis(5);
        while tokio::time::timeout(each, watch.changed()).await.is_err() {
            assert!(start.elapsed() < Duration::from_secs(2));
        }
        // And a directory that never rests.
        let start = Instant::now();
        fs::write(&file, "3").unwrap();
        let (mut written, mut rested) = (start, Duration::ZERO);
        while tokio::time::timeout(each, watch.changed()).await.is_err() {
            fs::write(&file, "4").unwrap();
            rested = rested.max(written.elapsed());
            written = Instant::now();
            assert!(start.elapsed() < Duration::from_secs(3));
        }
        // On a busy machine it may have come to rest after all.
        rested = rested.max(written.elapsed());
        assert!(start.elapsed() >= LONGEST || rested >= QUIET);
    }

    #[tokio::test]
    async fn a_new_file_counts_when_it_is_closed_and_a_link_at_once() {
        use std::io::Write as _;
        let dir = tempfile::tempdir().unwrap();
        let mut watch = Watch::new(&policy(dir.path())).unwrap();
        let mut file = fs::File::create(dir.path().join("a.yaml")).unwrap();
        file.write_all(b"half").unwrap();
        assert!(quiet(&mut watch).await, "half-written");
        file.write_all(b"whole").unwrap();
        drop(file);
        assert!(changes(&mut watch).await, "closed");
        std::os::unix::fs::symlink("a.yaml", dir.path().join("b.yaml")).unwrap();
        assert!(changes(&mut watch).await, "symbolic link");
        fs::hard_link(dir.path().join("a.yaml"), dir.path().join("c.yaml")).unwrap();
        assert!(changes(&mut watch).await, "hard link");
        fs::create_dir(dir.path().join("d")).unwrap();
        assert!(changes(&mut watch).await, "directory");
    }

    #[tokio::test]
    async fn targets_of_links_in_the_directory_are_watched() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let target = other.path().join("target.yaml");
        fs::write(&target, "1").unwrap();
        let mut watch = Watch::new(&policy(dir.path())).unwrap();
        let link = dir.path().join("a.yaml");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(changes(&mut watch).await, "the link");
        fs::write(&target, "2").unwrap();
        assert!(changes(&mut watch).await, "in place");
        fs::remove_file(&link).unwrap();
        assert!(changes(&mut watch).await, "the link is gone");
        fs::write(&target, "3").unwrap();
        assert!(quiet(&mut watch).await, "no link leads there");
    }

    #[tokio::test]
    async fn saving_in_place_by_rename_and_removal_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        fs::write(&file, "1").unwrap();
        for path in [dir.path(), &file] {
            let mut watch = Watch::new(&policy(path)).unwrap();
            fs::write(&file, "2").unwrap();
            assert!(changes(&mut watch).await, "in place");
            let other = dir.path().join(".a.yaml.new");
            fs::write(&other, "3").unwrap();
            assert!(changes(&mut watch).await);
            fs::rename(&other, &file).unwrap();
            assert!(changes(&mut watch).await, "rename over");
            fs::write(&file, "4").unwrap();
            assert!(changes(&mut watch).await, "after the rename");
            assert!(quiet(&mut watch).await, "nothing happened");
        }
    }

    #[tokio::test]
    async fn settings_are_watched_once_their_directory_is_there() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let etc = other.path().join("etc");
        let settings = etc.join("enforcer.yaml");
        let mut watch = Watch::new(&Sources {
            settings: Some(SettingsPath {
                path: settings.clone(),
                required: false,
            }),
            ..policy(dir.path())
        })
        .unwrap();
        assert!(quiet(&mut watch).await);
        fs::create_dir(&etc).unwrap();
        watch.repair();
        assert!(changes(&mut watch).await, "the directory");
        fs::write(&settings, "version: 1").unwrap();
        assert!(changes(&mut watch).await, "the file");
        fs::remove_file(&settings).unwrap();
        assert!(changes(&mut watch).await, "gone");
    }
}
