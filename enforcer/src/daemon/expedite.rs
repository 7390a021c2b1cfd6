//! Quick grace periods while programs are attached.
//!
//! The kernel waits for a grace period of RCU at each program that is attached to tcx or taken off,
//! with the lock held that everybody needs who makes an interface: 28 ms for an interface, measured
//! with two CPUs at 250 Hz. Expedited it takes 1.3 ms. The kernel expedites its own when it removes
//! interfaces, so hosts where they come and go know the short interruption that this costs their CPUs.

use std::{fs, path::PathBuf};

/// Not there in containers that see `/sys` read-only; without effect where `rcu_normal` is set, as
/// hosts with real-time work do.
const SWITCH: &str = "/sys/kernel/rcu_expedited";

/// Knows where to ask for it.
#[derive(Debug, Default)]
pub struct Expedite(Option<PathBuf>);

impl Expedite {
    /// Of this kernel.
    pub fn of_kernel() -> Self {
        Self(Some(SWITCH.into()))
    }

    /// Grace periods are short while the answer lives, if they may be. What somebody else has
    /// switched on stays so.
    pub fn begin(&self) -> Expedited<'_> {
        let path = self.0.as_ref().filter(|path| {
            let off = fs::read_to_string(path).is_ok_and(|text| text.trim() == "0");
            off && fs::write(path, "1").is_ok()
        });
        Expedited(path)
    }
}

/// See [`Expedite::begin`].
#[derive(Debug)]
pub struct Expedited<'a>(Option<&'a PathBuf>);

impl Drop for Expedited<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.0
            && let Err(error) = fs::write(path, "0")
        {
            tracing::warn!(%error, "{} stays on", path.display());
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
        let expedite = Expedite(Some(path.clone()));
        drop(expedite.begin());
        assert!(!path.exists());
        fs::write(&path, "0\n").unwrap();
        let on = expedite.begin();
        assert_eq!(read(), "1");
        let second = expedite.begin();
        drop(second);
        assert_eq!(read(), "1");
        drop(on);
        assert_eq!(read(), "0");
        fs::write(&path, "1\n").unwrap();
        drop(expedite.begin());
        assert_eq!(read(), "1\n");
        drop(Expedite::default().begin());
    }
}
