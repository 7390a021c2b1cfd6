//! A directory whose files are there whole or not at all, whatever ends this process or the
//! machine.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};

use super::super::guard;

/// Begins the names of files that are being written.
const UNFINISHED: &str = ".new-";
/// Ends the names of files that could not be read.
const ASIDE: &str = ".set-aside";
const LOCK: &str = ".lock";
/// The daemon before this one may be about to end.
const PATIENCE: Duration = Duration::from_secs(2);

/// The state directory, which this process alone writes.
pub struct Disk {
    path: PathBuf,
    /// To be synced after names have changed.
    directory: File,
    _lock: Flock<File>,
    /// Steps until everything fails, as after a crash.
    #[cfg(test)]
    pub fuse: std::cell::Cell<Option<u32>>,
}

impl Disk {
    /// Opens the directory, makes it if need be.
    ///
    /// # Errors
    /// In words, when it cannot be used; it is as it was then.
    pub fn open(path: &Path) -> Result<Self, String> {
        let failed = |what: &str, error: io::Error| format!("{what}: {error}");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|e| failed("cannot be made", e))?;
        // What is read here is put in force: nobody else may have a hand in it.
        let directory = guard::open(path, false).map_err(|error| error.summary())?;
        let metadata = directory
            .metadata()
            .map_err(|e| failed("cannot be read", e))?;
        if !metadata.is_dir() {
            return Err("is no directory".to_owned());
        }
        if metadata.permissions().mode() & 0o077 != 0 {
            let mode = fs::Permissions::from_mode(0o700);
            let closed = directory.set_permissions(mode);
            closed.map_err(|e| failed("cannot be closed to others", e))?;
        }
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.join(LOCK))
            .map_err(|e| failed("cannot be written", e))?;
        let this = Self {
            path: path.to_owned(),
            directory,
            _lock: locked(lock)?,
            #[cfg(test)]
            fuse: std::cell::Cell::new(None),
        };
        for name in this.names().map_err(|e| failed("cannot be read", e))? {
            if name.starts_with(UNFINISHED) {
                let _ = fs::remove_file(this.path.join(name));
            }
        }
        Ok(this)
    }

    /// Writes a file in place of what had its name.
    ///
    /// # Errors
    /// What the system says. The old file is there then, or the new one; never a part.
    pub fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let new = self.path.join(format!("{UNFINISHED}{name}"));
        let result = self.replace(name, &new, bytes);
        if result.is_err() {
            let _ = self.step().and_then(|()| fs::remove_file(&new));
        }
        result
    }

    fn replace(&self, name: &str, new: &Path, bytes: &[u8]) -> io::Result<()> {
        self.step()?;
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(new)?;
        let (first, second) = bytes.split_at(bytes.len() / 2);
        self.step()?;
        file.write_all(first)?;
        self.step()?;
        file.write_all(second)?;
        self.step()?;
        file.sync_all()?;
        self.step()?;
        fs::rename(new, self.path.join(name))?;
        self.sync()
    }

    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.step()?;
        match fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.step()?;
        self.directory.sync_all()
    }

    /// A whole file; `None` when there is none.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&self, name: &str, largest: u64) -> io::Result<Option<Vec<u8>>> {
        let file = match File::open(self.path.join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        file.take(largest + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > largest {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(Some(bytes))
    }

    /// All files.
    ///
    /// # Errors
    /// What the system says.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    }

    /// Takes a file that cannot be read out of the way, for somebody to look at. Only the last of a
    /// name is kept. Says where it is.
    pub fn set_aside(&self, name: &str) -> String {
        let aside = self.path.join(format!("{name}{ASIDE}"));
        match fs::rename(self.path.join(name), &aside) {
            Ok(()) => format!("it is kept as {}", aside.display()),
            Err(error) => format!("it cannot be set aside: {error}"),
        }
    }

    /// Where a crash may come.
    #[cfg(test)]
    fn step(&self) -> io::Result<()> {
        match self.fuse.get() {
            Some(0) => Err(io::Error::other("the fuse has blown")),
            Some(left) => {
                self.fuse.set(Some(left - 1));
                Ok(())
            }
            None => Ok(()),
        }
    }

    #[cfg(not(test))]
    #[expect(
        clippy::unused_self,
        clippy::unnecessary_wraps,
        reason = "tests let it fail"
    )]
    fn step(&self) -> io::Result<()> {
        Ok(())
    }
}

fn locked(mut file: File) -> Result<Flock<File>, String> {
    let start = Instant::now();
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, _)) if start.elapsed() < PATIENCE => {
                file = back;
                thread::sleep(Duration::from_millis(20));
            }
            Err((_, error)) => return Err(format!("is another daemon's: {error}")),
        }
    }
}
