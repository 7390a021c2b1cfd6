//! What outlives the daemon: the history, the texts of the last states, and the image to begin with.
//!
//! The memory is here; a thread brings the directory in line with it. Nobody waits for a disk but
//! those who ask to, and they not for long: enforcement goes on without.

mod disk;
mod format;
mod journal;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};
use tokio::{sync::watch, time::timeout};

use super::files::Texts;
use crate::{api::changes::History, policy::model::Environment};
use disk::Disk;

pub use format::{Content, SavedCounts, SavedImage, SavedShadow};
pub use journal::{Force, Journal, Kept, Material, Measure, Note, Pending};

/// What a first trial goes back to, in words.
pub const PASS_ALL: &str = "(everything passes)";

const JOURNAL: &str = "journal";
const IMAGE: &str = "image";
const STATE: &str = "state-";
const SHADOW: &str = "shadow";
const COUNTS: &str = "shadow-counts";
/// Bytes of files that are read.
const LARGEST: u64 = 1 << 30;
/// Changes that nobody waits for are written after so much time, several at once.
const LAZY: Duration = Duration::from_secs(1);
/// A write that failed is tried again after so much time.
const RETRY: Duration = Duration::from_secs(10);
/// So long somebody waits for a disk.
const PATIENCE: Duration = Duration::from_secs(5);

/// The memory, and the way to the directory.
pub struct Store {
    inner: Arc<Inner>,
    written: watch::Receiver<Written>,
    path: Option<PathBuf>,
    saved: Mutex<Option<Arc<SavedImage>>>,
    shadow: Mutex<Option<(SavedShadow, Option<SavedCounts>)>>,
    /// What was wrong with the directory at the start.
    troubles: Vec<String>,
}

struct Inner {
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

#[derive(Default)]
struct Wanted {
    journal: Journal,
    /// Texts that are not on disk yet.
    texts: BTreeMap<u64, Texts>,
    /// An image that is not on disk yet.
    image: Option<SavedImage>,
    /// A candidate that is not on disk yet, or that is to go.
    shadow: Option<Option<Arc<SavedShadow>>>,
    /// What it has seen, likewise.
    counts: Option<Option<Arc<SavedCounts>>>,
    /// Counts what is to be written.
    version: u64,
    urgent: bool,
    closing: bool,
}

/// How far the directory is.
#[derive(Clone, Debug, Default)]
struct Written {
    version: u64,
    /// Counts writes, good or bad.
    attempts: u64,
    error: Option<String>,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Opens a directory; without one, or with one that cannot be used, the memory ends with the
    /// daemon.
    pub fn open(path: Option<&Path>) -> Self {
        let mut troubles = Vec::new();
        let disk = path.and_then(|path| match Disk::open(path) {
            Ok(disk) => Some(disk),
            Err(error) => {
                troubles.push(format!("the state directory {} {error}", path.display()));
                None
            }
        });
        let (journal, saved) = disk
            .as_ref()
            .map(|disk| read(disk, &mut troubles))
            .unwrap_or_default();
        let shadow = disk.as_ref().and_then(|disk| {
            let shadow: SavedShadow = sealed(disk, SHADOW, &mut troubles)?;
            let counts: Option<SavedCounts> = sealed(disk, COUNTS, &mut troubles);
            let counts = counts.filter(|counts| counts.since == shadow.since);
            Some((shadow, counts))
        });
        for trouble in &troubles {
            tracing::error!("{trouble}");
        }
        let inner = Arc::new(Inner {
            wanted: Mutex::new(Wanted {
                journal,
                ..Wanted::default()
            }),
            changed: Condvar::new(),
        });
        let (sender, written) = watch::channel(Written::default());
        let kept = disk.is_some();
        if let Some(disk) = disk {
            let inner = Arc::clone(&inner);
            thread::spawn(move || write_on(&disk, &inner, &sender));
        }
        Self {
            inner,
            written,
            path: path.filter(|_| kept).map(Path::to_owned),
            saved: Mutex::new(saved.map(Arc::new)),
            shadow: Mutex::new(shadow),
            troubles,
        }
    }

    /// The directory, if it can be used.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Looks at the memory.
    pub fn read<T>(&self, look: impl FnOnce(&Journal) -> T) -> T {
        look(&self.inner.lock().journal)
    }

    /// Changes the memory; what comes of it is written soon.
    pub fn change<T>(&self, change: impl FnOnce(&mut Journal) -> T) -> T {
        let mut wanted = self.inner.lock();
        let result = change(&mut wanted.journal);
        wanted.version += 1;
        self.inner.changed.notify_one();
        result
    }

    /// The same, where a state may be new: these are its texts.
    pub fn keep<T>(
        &self,
        texts: &Texts,
        change: impl FnOnce(&mut Journal) -> (T, Option<u64>),
    ) -> T {
        let mut wanted = self.inner.lock();
        let (result, new) = change(&mut wanted.journal);
        if let Some(state) = new {
            wanted.texts.insert(state, texts.clone());
        }
        let Wanted { journal, texts, .. } = &mut *wanted;
        texts.retain(|state, _| journal.states().contains_key(state));
        wanted.version += 1;
        self.inner.changed.notify_one();
        result
    }

    /// The image to begin with is this one, if the state in force is `state`.
    pub fn save_image(&self, image: &crate::compile::Image, environment: &Environment) {
        if self.path.is_none() {
            return;
        }
        let mut wanted = self.inner.lock();
        let journal = &mut wanted.journal;
        journal.generation = journal.generation.max(image.generation());
        let Some(force) = journal.force() else {
            return;
        };
        wanted.image = Some(SavedImage {
            image: image.clone(),
            state: force.state,
            environment: environment.clone(),
        });
        wanted.version += 1;
        self.inner.changed.notify_one();
    }

    /// The image that was in force when the daemon last ran, if its texts are there as well.
    pub fn saved_image(&self) -> Option<Arc<SavedImage>> {
        self.saved
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Another one is in force by now: it takes memory no more.
    pub fn forget_saved_image(&self) {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        *saved = None;
    }

    /// The candidate that was there when the daemon last ran, and what it had seen; once.
    pub fn take_shadow(&self) -> Option<(SavedShadow, Option<SavedCounts>)> {
        let mut shadow = self.shadow.lock().unwrap_or_else(PoisonError::into_inner);
        shadow.take()
    }

    /// The candidate that is to be there when the daemon starts again.
    pub fn save_shadow(&self, shadow: Option<SavedShadow>) {
        self.keep_shadow(|wanted| {
            if shadow.is_none() {
                wanted.counts = Some(None);
            }
            wanted.shadow = Some(shadow.map(Arc::new));
        });
    }

    /// What it has seen; a number for [`Store::has`].
    pub fn save_counts(&self, counts: SavedCounts) -> u64 {
        self.keep_shadow(|wanted| wanted.counts = Some(Some(Arc::new(counts))))
    }

    fn keep_shadow(&self, change: impl FnOnce(&mut Wanted)) -> u64 {
        if self.path.is_none() {
            return 0;
        }
        let mut wanted = self.inner.lock();
        change(&mut wanted);
        wanted.version += 1;
        self.inner.changed.notify_one();
        wanted.version
    }

    /// Whether what was to be kept is on disk, or is not kept at all.
    pub fn has(&self, version: u64) -> bool {
        self.path.is_none() || self.written.borrow().version >= version
    }

    /// The texts of a state.
    ///
    /// # Errors
    /// In words.
    pub fn texts(&self, state: u64) -> Result<Texts, String> {
        if let Some(texts) = self.inner.lock().texts.get(&state) {
            return Ok(texts.clone());
        }
        let Some(path) = &self.path else {
            return Err(format!("the texts of state {state} are not kept any more"));
        };
        let path = path.join(name(state));
        let bytes =
            std::fs::read(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        format::read_state(&bytes).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// Waits until all that was changed is on disk, or until that has failed or takes too long.
    /// Says what is wrong then.
    pub async fn persist(&self) -> Option<String> {
        self.path.as_ref()?;
        let version = {
            let mut wanted = self.inner.lock();
            wanted.urgent = true;
            self.inner.changed.notify_one();
            wanted.version
        };
        let mut written = self.written.clone();
        let before = written.borrow().attempts;
        let done = written
            .wait_for(|w| w.version >= version || (w.error.is_some() && w.attempts > before));
        match timeout(PATIENCE, done).await {
            Ok(Ok(written)) => written.error.clone(),
            Ok(Err(_)) => Some("the writer of the state directory has ended".to_owned()),
            Err(_) => Some(format!("no answer within {} s", PATIENCE.as_secs())),
        }
        .map(|error| self.unkept(&error))
    }

    /// What is wrong, for the status.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.troubles.clone();
        if let Some(error) = &self.written.borrow().error {
            problems.push(self.unkept(error));
        }
        problems
    }

    fn unkept(&self, error: &str) -> String {
        let path = self.path.as_deref().unwrap_or(Path::new("?"));
        format!(
            "changes cannot be kept in {}: {error}; after a restart they are forgotten",
            path.display()
        )
    }

    /// For those who ask.
    pub fn history(&self) -> History {
        let problems = self.problems();
        let wanted = self.inner.lock();
        let journal = &wanted.journal;
        History {
            changes: journal.changes(),
            dropped: journal.dropped(),
            in_force: journal.force().map(|force| force.state),
            before: journal.before(),
            directory: self.path.as_ref().map(|path| path.display().to_string()),
            problem: (!problems.is_empty()).then(|| problems.join("; ")),
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.inner.lock().closing = true;
        self.inner.changed.notify_one();
    }
}

fn name(state: u64) -> String {
    format!("{STATE}{state}")
}

/// What the last daemon left behind. What cannot be read is set aside.
fn read(disk: &Disk, troubles: &mut Vec<String>) -> (Journal, Option<SavedImage>) {
    let mut file = |name: &str| match disk.read(name, LARGEST) {
        Ok(bytes) => bytes,
        Err(error) => {
            troubles.push(format!(
                "the state directory's {name} cannot be read: {error}"
            ));
            None
        }
    };
    let (journal, image) = (file(JOURNAL), file(IMAGE));
    let mut aside = |name: &str, error: &str| {
        let kept = disk.set_aside(name);
        troubles.push(format!(
            "the state directory's {name} cannot be used: {error}; {kept}"
        ));
    };
    let journal = journal.map(|bytes| format::from_json::<Journal>(&bytes));
    let mut journal = match journal {
        None => Journal::default(),
        Some(Ok(journal)) => journal,
        Some(Err(error)) => {
            aside(JOURNAL, &error);
            Journal::default()
        }
    };
    let names = disk.names().unwrap_or_default();
    journal.retain(|state| names.contains(&name(state)));
    let image = image.and_then(|bytes| match format::read_image(&bytes) {
        Ok(image) => Some(image),
        Err(error) => {
            aside(IMAGE, &error);
            None
        }
    });
    // An image that nothing explains, or that is on the way out, is none to begin with.
    let force = journal.force().map(|force| force.state);
    let mut texts = |state: u64| {
        let bytes = disk.read(&name(state), LARGEST).map_err(|e| e.to_string());
        let bytes = bytes.and_then(|bytes| bytes.ok_or_else(|| "it is gone".to_owned()));
        bytes
            .and_then(|bytes| format::read_state(&bytes))
            .inspect_err(|error| aside(&name(state), error))
    };
    let good = force.is_some_and(|state| texts(state).is_ok());
    if !good {
        let bad = force;
        journal.retain(|state| Some(state) != bad);
    }
    let image = image.filter(|image| good && Some(image.state) == force);
    (journal, image)
}

/// Brings the directory in line with the memory until the store is dropped.
fn write_on(disk: &Disk, inner: &Inner, written: &watch::Sender<Written>) {
    let (mut done, mut attempts) = (0, 0);
    let mut failed: Option<Instant> = None;
    loop {
        let mut wanted = inner.lock();
        let mut since: Option<Instant> = None;
        loop {
            let due = wanted.version > done;
            let wait = match failed {
                _ if wanted.closing || (wanted.urgent && due) => Duration::ZERO,
                Some(at) => RETRY.saturating_sub(at.elapsed()),
                None if due => {
                    let since = since.get_or_insert_with(Instant::now);
                    LAZY.saturating_sub(since.elapsed())
                }
                None => Duration::MAX,
            };
            if wait.is_zero() {
                break;
            }
            wanted = if wait == Duration::MAX {
                let woken = inner.changed.wait(wanted);
                woken.unwrap_or_else(PoisonError::into_inner)
            } else {
                let waited = inner.changed.wait_timeout(wanted, wait);
                waited.unwrap_or_else(PoisonError::into_inner).0
            };
        }
        let closing = wanted.closing;
        wanted.urgent = false;
        if wanted.version == done {
            return;
        }
        let (version, journal, texts, image, shadow, counts) = (
            wanted.version,
            wanted.journal.clone(),
            wanted.texts.clone(),
            wanted.image.take(),
            wanted.shadow.take(),
            wanted.counts.take(),
        );
        drop(wanted);
        attempts += 1;
        let written_all = write(disk, &journal, &texts, image.as_ref());
        let written_all = written_all
            .and_then(|()| put(disk, SHADOW, shadow.as_ref()))
            .and_then(|()| put(disk, COUNTS, counts.as_ref()));
        let error = match written_all {
            Ok(()) => {
                (failed, done) = (None, version);
                let mut wanted = inner.lock();
                wanted.texts.retain(|state, _| !texts.contains_key(state));
                None
            }
            Err(error) => {
                if failed.is_none() {
                    tracing::error!(%error, "cannot write the state directory; enforcement goes on");
                }
                failed = Some(Instant::now());
                let mut wanted = inner.lock();
                wanted.image = wanted.image.take().or(image);
                wanted.shadow = wanted.shadow.take().or(shadow);
                wanted.counts = wanted.counts.take().or(counts);
                Some(error.to_string())
            }
        };
        written.send_replace(Written {
            version: done,
            attempts,
            error,
        });
        if closing {
            return;
        }
    }
}

/// Texts first, then what speaks of them; what nobody speaks of any more goes last.
fn write(
    disk: &Disk,
    journal: &Journal,
    texts: &BTreeMap<u64, Texts>,
    image: Option<&SavedImage>,
) -> std::io::Result<()> {
    for (state, texts) in texts {
        disk.write(&name(*state), &format::state(texts))?;
    }
    disk.write(JOURNAL, &format::to_json(journal))?;
    if let Some(image) = image {
        disk.write(IMAGE, &format::image(image))?;
    }
    for file in disk.names()? {
        let state = file
            .strip_prefix(STATE)
            .and_then(|number| number.parse().ok());
        if state.is_some_and(|state: u64| !journal.states().contains_key(&state)) {
            disk.remove(&file)?;
        }
    }
    Ok(())
}

/// Writes a file, or removes it.
fn put<T: Serialize>(
    disk: &Disk,
    name: &str,
    file: Option<&Option<Arc<T>>>,
) -> std::io::Result<()> {
    match file {
        None => Ok(()),
        Some(None) => disk.remove(name),
        Some(Some(value)) => disk.write(name, &format::to_json(&**value)),
    }
}

/// A file that is there and whole. Another one is set aside.
fn sealed<T: DeserializeOwned>(disk: &Disk, name: &str, troubles: &mut Vec<String>) -> Option<T> {
    let read = disk.read(name, LARGEST).map_err(|e| e.to_string());
    let value = read.and_then(|bytes| {
        let value = bytes.map(|bytes| format::from_json(&bytes));
        value.transpose()
    });
    value.unwrap_or_else(|error| {
        let kept = disk.set_aside(name);
        troubles.push(format!(
            "the state directory's {name} cannot be used: {error}; {kept}"
        ));
        None
    })
}
