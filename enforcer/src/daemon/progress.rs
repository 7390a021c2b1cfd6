//! What is being done to a policy, for those who wait for it.

use std::{
    fmt,
    sync::{
        atomic::{AtomicU8, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

/// Nothing is said of what takes no longer, and so long it stays quiet in between.
pub const QUIET: Duration = Duration::from_secs(1);

/// Steps from files to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Files are read.
    Reading,
    /// Text is given its meaning.
    Parsing,
    /// The policy's own tests run.
    Testing,
    /// The image is made.
    Compiling,
    /// The image is compared with the policy.
    Validating,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reading => "reading the policy",
            Self::Parsing => "parsing the policy",
            Self::Testing => "running the policy's tests",
            Self::Compiling => "compiling the policy",
            Self::Validating => "comparing the compiled policy with what was written",
        })
    }
}

/// Told by those who work, asked by those who watch.
#[derive(Debug, Default)]
pub struct Progress(AtomicU8);

impl Progress {
    /// Another stage begins.
    pub fn enter(&self, stage: Stage) {
        self.0.store(stage as u8, Ordering::Relaxed);
    }

    /// The stage that began last.
    pub fn stage(&self) -> Stage {
        match self.0.load(Ordering::Relaxed) {
            0 => Stage::Reading,
            1 => Stage::Parsing,
            2 => Stage::Testing,
            3 => Stage::Compiling,
            _ => Stage::Validating,
        }
    }
}

/// Does `work`; once it has taken longer than [`QUIET`], `tell` hears of it again and again.
pub fn watched<T>(tell: impl Fn(Stage, Duration) + Send, work: impl FnOnce(&Progress) -> T) -> T {
    let progress = Progress::default();
    let (done, waiting) = mpsc::channel::<()>();
    let (start, watched) = (Instant::now(), &progress);
    thread::scope(|scope| {
        scope.spawn(move || {
            while waiting.recv_timeout(QUIET) == Err(RecvTimeoutError::Timeout) {
                tell(watched.stage(), start.elapsed());
            }
        });
        let result = work(watched);
        drop(done);
        result
    })
}

/// [`watched`], with lines in the log.
pub fn logged<T>(work: impl FnOnce(&Progress) -> T) -> T {
    let log = |stage: Stage, elapsed: Duration| {
        tracing::info!(seconds = elapsed.as_secs(), "still {stage}");
    };
    watched(log, work)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn what_takes_long_is_told_with_its_stage() {
        let told = Mutex::new(Vec::new());
        let tell = |stage, elapsed| told.lock().unwrap().push((stage, elapsed));
        let quick = watched(tell, |progress| {
            progress.enter(Stage::Compiling);
            7
        });
        assert_eq!(quick, 7);
        assert!(told.lock().unwrap().is_empty());

        let tell = |stage, elapsed| told.lock().unwrap().push((stage, elapsed));
        watched(tell, |progress| {
            progress.enter(Stage::Compiling);
            while told.lock().unwrap().is_empty() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        let told = told.into_inner().unwrap();
        assert_eq!(told[0].0, Stage::Compiling);
        assert!(told[0].1 >= QUIET);
    }
}
