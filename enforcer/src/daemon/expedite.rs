//! Quick grace periods while programs are attached.
//!
//! The kernel waits for a grace period of RCU at each program that is attached to tcx or taken off,
//! with the lock held that everybody needs who makes an interface: 28 ms for an interface, measured
//! with two CPUs at 250 Hz. Expedited it takes 1.3 ms. The kernel expedites its own when it removes
//! interfaces, so hosts where they come and go know the short interruption that this costs their CPUs.

//!
//! A daemon that is killed meanwhile would leave it switched on. So it notes first, in a file, that it
//! is about to, and the next start switches it off.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// Not there in containers that see `/sys` read-only; without effect where `rcu_normal` is set, as
/// hosts with real-time work do.
const SWITCH: &str = "/sys/kernel/rcu_expedited";
/// The switch forgets with the kernel, the note does not: it holds for one boot.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";
const NOTE: &str = "expedited";

/// Knows where to ask for it.
#[derive(Clone, Debug, Default)]
pub struct Expedite {
    switch: Option<PathBuf>,
    note: Option<PathBuf>,
}

impl Expedite {
    /// Of this kernel; notes are in the state directory or, where there is none, beside the socket.
    pub fn of_kernel(state: Option<&Path>, socket: &Path) -> Self {
        let note = state.map(|state| state.join(NOTE)).or_else(|| {
            let mut name = socket.file_name()?.to_owned();
            name.push(".");
            name.push(NOTE);
            Some(socket.with_file_name(name))
        });
        Self {
            switch: Some(SWITCH.into()),
            note,
        }
    }

    /// Switches off what a daemon has left switched on that was killed.
    pub fn mend(&self) {
        let Some((switch, note)) = self.switch.as_ref().zip(self.note.as_ref()) else {
            return;
        };
        let Ok(text) = fs::read_to_string(note) else {
            return;
        };
        let is_on = || fs::read_to_string(switch).is_ok_and(|text| text.trim() == "1");
        if text == boot() && is_on() {
            tracing::warn!(
                "{} was left on by an enforcer that was killed: it is off again",
                switch.display()
            );
            off(switch);
        }
        let _ = fs::remove_file(note);
    }

    /// Grace periods are short while the answer lives, if they may be. What somebody else has
    /// switched on stays so.
    pub fn begin(&self) -> Expedited<'_> {
        let switch = self.switch.as_ref().filter(|switch| {
            let off = fs::read_to_string(switch).is_ok_and(|text| text.trim() == "0");
            if !off {
                return false;
            }
            // Without a note it is as useful.
            if let Some(Err(error)) = self.note.as_deref().map(write) {
                tracing::debug!(%error, "cannot note that grace periods are expedited");
            }
            fs::write(switch, "1").is_ok()
        });
        Expedited {
            switch,
            note: self.note.as_ref().filter(|_| switch.is_some()),
        }
    }
}

fn boot() -> String {
    fs::read_to_string(BOOT).unwrap_or_default()
}

/// Somebody's link is not followed.
fn write(note: &Path) -> io::Result<()> {
    let _ = fs::remove_file(note);
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(note)?;
    file.write_all(boot().as_bytes())
}

fn off(switch: &Path) {
    if let Err(error) = fs::write(switch, "0") {
        tracing::warn!(%error, "{} stays on", switch.display());
    }
}

/// See [`Expedite::begin`].
#[derive(Debug)]
pub struct Expedited<'a> {
    switch: Option<&'a PathBuf>,
    note: Option<&'a PathBuf>,
}

impl Drop for Expedited<'_> {
    fn drop(&mut self) {
        if let Some(switch) = self.switch {
            off(switch);
        }
        if let Some(note) = self.note {
            let _ = fs::remove_file(note);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_switched_back_unless_somebody_else_had_switched_it_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rcu_expedited");
        let read = || fs::read_to_string(&path).unwrap();
        let note = directory.path().join("note");
        let expedite = Expedite {
            switch: Some(path.clone()),
            note: Some(note.clone()),
        };
        drop(expedite.begin());
        assert!(!path.exists());
        fs::write(&path, "0\n").unwrap();
        let on = expedite.begin();
        assert_eq!(read(), "1");
        assert!(note.exists());
        let second = expedite.begin();
        drop(second);
        assert_eq!(read(), "1");
        drop(on);
        assert_eq!(read(), "0");
        assert!(!note.exists());
        // A daemon that is killed, and the next one.
        std::mem::forget(expedite.begin());
        assert_eq!(read(), "1");
        expedite.mend();
        assert_eq!((read().as_str(), note.exists()), ("0", false));
        // One that was killed before a reboot has switched on nothing of this kernel's.
        fs::write(&path, "1\n").unwrap();
        fs::write(&note, "another boot\n").unwrap();
        expedite.mend();
        assert_eq!((read().as_str(), note.exists()), ("1\n", false));
        expedite.mend();
        drop(expedite.begin());
        assert_eq!(read(), "1\n");
        drop(Expedite::default().begin());
    }
}
