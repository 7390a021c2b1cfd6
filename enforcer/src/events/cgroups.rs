//! From cgroup ids to paths.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// An id that is in no directory is looked for again after this time at the earliest.
const WALK_EVERY: Duration = Duration::from_secs(1);
/// Directories looked at in one walk.
const WALK_LIMIT: usize = 65_536;

/// Paths below the cgroup v2 root by inode number, which is the cgroup id.
#[derive(Debug)]
pub struct Cgroups {
    root: Option<PathBuf>,
    paths: HashMap<u64, String>,
    walked: Option<Instant>,
}

impl Cgroups {
    /// Nothing is read before the first look-up. Without a root every id stays a number.
    pub fn new(root: Option<PathBuf>) -> Self {
        Self {
            root,
            paths: HashMap::new(),
            walked: None,
        }
    }

    /// The path of a cgroup (`/system.slice/ssh.service`), or `id N` when it is gone.
    pub fn path(&mut self, id: u64) -> String {
        if let Some(path) = self.paths.get(&id) {
            return path.clone();
        }
        let due = self.walked.is_none_or(|at| at.elapsed() >= WALK_EVERY);
        if due {
            self.walk();
        }
        match self.paths.get(&id) {
            Some(path) => path.clone(),
            None => format!("id {id}"),
        }
    }

    fn walk(&mut self) {
        let Some(root) = self.root.clone() else {
            return;
        };
        self.walked = Some(Instant::now());
        self.paths.clear();
        let mut pending = vec![root.clone()];
        while let Some(directory) = pending.pop() {
            if self.paths.len() >= WALK_LIMIT {
                return;
            }
            let Ok(metadata) = fs::symlink_metadata(&directory) else {
                continue; // Removed meanwhile.
            };
            self.paths.insert(metadata.ino(), below(&root, &directory));
            let Ok(entries) = fs::read_dir(&directory) else {
                continue;
            };
            pending.extend(
                entries
                    .flatten()
                    .filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()))
                    .map(|entry| entry.path()),
            );
        }
    }
}

fn below(root: &Path, directory: &Path) -> String {
    let path = directory.strip_prefix(root).unwrap_or(directory);
    format!("/{}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_paths_by_inode_and_says_when_they_are_gone() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("system.slice/ssh.service");
        fs::create_dir_all(&inner).unwrap();
        let id = fs::metadata(&inner).unwrap().ino();
        let top = fs::metadata(root.path()).unwrap().ino();
        let mut cgroups = Cgroups::new(Some(root.path().to_owned()));
        assert_eq!(cgroups.path(id), "/system.slice/ssh.service");
        assert_eq!(cgroups.path(top), "/");
        assert_eq!(cgroups.path(0), "id 0");
        assert_eq!(Cgroups::new(None).path(id), format!("id {id}"));
    }
}
