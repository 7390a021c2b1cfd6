//! A directory of pins for one test, which goes with it; what killed tests left goes, too.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

const BPFFS: &str = "/sys/fs/bpf";
const PREFIX: &str = "enforcer-test-";

/// A directory in the BPF file system that does not exist yet.
pub struct Pins(PathBuf);

impl Default for Pins {
    fn default() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        sweep();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        Self(Path::new(BPFFS).join(name))
    }
}

impl Pins {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Everything pinned, as paths below the directory, sorted.
    pub fn list(&self) -> Vec<String> {
        let mut found = Vec::new();
        walk(&self.0, &mut |path| {
            let path = path.strip_prefix(&self.0).unwrap();
            found.push(path.to_str().unwrap().to_owned());
        });
        found.sort_unstable();
        found
    }

    /// Names of pinned links.
    pub fn links(&self) -> Vec<String> {
        let all = self.list().into_iter();
        all.filter_map(|path| path.strip_prefix("links/").map(str::to_owned))
            .collect()
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn walk(path: &Path, see: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() {
            walk(&entry.path(), see);
        } else {
            see(&entry.path());
        }
    }
}

fn remove(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        } else {
            let _ = fs::remove_file(entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}

/// Removes directories of processes that are no more.
fn sweep() {
    for entry in fs::read_dir(BPFFS).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let Some((process, _)) = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('-'))
        else {
            continue;
        };
        if !Path::new("/proc").join(process).exists() {
            remove(&entry.path());
        }
    }
}
