//! Signs of life: a task that goes on beats, one that hangs does not.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// When a task was last seen to go on.
#[derive(Debug)]
pub struct Pulse(Mutex<Instant>);

impl Default for Pulse {
    /// It counts as alive to begin with.
    fn default() -> Self {
        Self(Mutex::new(Instant::now()))
    }
}

impl Pulse {
    /// The task goes on.
    pub fn beat(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Whether it has beaten in this time.
    pub fn is_within(&self, time: Duration) -> bool {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.elapsed() <= time
    }
}
