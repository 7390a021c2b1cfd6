//! The wall clock beside the time since boot, which is what the kernel's programs read.

use std::io;

use nix::{
    errno::Errno,
    sys::{
        time::TimeSpec,
        timerfd::{ClockId as TimerClock, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
    time::{ClockId, clock_gettime},
};

use crate::poll::Readable;

/// Readings of which the best is taken: an interrupt between two of them spoils one.
const READINGS: u32 = 5;

/// Both clocks at one moment, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Since boot, suspended time included.
    pub boottime: u64,
    /// Unix time minus that.
    pub boot_unix: i128,
}

impl Sample {
    /// Reads both.
    ///
    /// # Errors
    /// What `clock_gettime` says.
    pub fn now() -> io::Result<Self> {
        let mut best: Option<(i128, Self)> = None;
        for _ in 0..READINGS {
            let before = read(ClockId::CLOCK_BOOTTIME)?;
            let unix = read(ClockId::CLOCK_REALTIME)?;
            let after = read(ClockId::CLOCK_BOOTTIME)?;
            let sample = Self {
                boottime: u64::try_from(after).unwrap_or(0),
                boot_unix: unix - (before + after) / 2,
            };
            let took = after - before;
            if best.is_none_or(|(least, _)| took < least) {
                best = Some((took, sample));
            }
        }
        best.map(|(_, sample)| sample)
            .ok_or_else(|| io::ErrorKind::Other.into())
    }

    /// A time since boot as Unix time, in nanoseconds.
    pub fn unix(self, boottime: u64) -> i128 {
        self.boot_unix + i128::from(boottime)
    }
}

fn read(clock: ClockId) -> nix::Result<i128> {
    let time = clock_gettime(clock)?;
    Ok(i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
}

/// Tells when somebody sets the wall clock.
#[derive(Debug)]
pub struct Steps {
    readable: Readable,
    timer: TimerFd,
}

impl Steps {
    /// Must be called on a tokio runtime.
    ///
    /// # Errors
    /// What the timer calls say.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(TimerClock::CLOCK_REALTIME, flags)?;
        let this = Self {
            readable: Readable::new(&timer)?,
            timer,
        };
        this.arm()?;
        Ok(this)
    }

    /// For a moment that never comes; setting the clock cancels the wait.
    fn arm(&self) -> io::Result<()> {
        let never = Expiration::OneShot(TimeSpec::new(i64::MAX, 0));
        let flags =
            TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
        Ok(self.timer.set(never, flags)?)
    }

    /// Waits for it. Safe to drop and call again.
    ///
    /// # Errors
    /// When the timer is broken.
    pub async fn step(&mut self) -> io::Result<()> {
        loop {
            let mut guard = self.readable.ready().await?;
            match self.timer.wait() {
                Err(Errno::EAGAIN) => guard.clear_ready(),
                Ok(()) | Err(Errno::ECANCELED) => {
                    guard.clear_ready();
                    // Before the caller reads the clock: a step after that is told again.
                    self.arm()?;
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn both_clocks_are_read_together() {
        let sample = Sample::now().unwrap();
        let wall = jiff::Timestamp::now().as_nanosecond();
        let unix = sample.unix(sample.boottime);
        // A machine may be busy, and a clock may be set; nobody is off by an hour.
        assert!((wall - unix).abs() < 3_600_000_000_000, "{wall} {unix}");
        assert!(sample.boottime > 0);
    }

    #[tokio::test]
    async fn a_clock_that_nobody_sets_is_quiet() {
        let mut steps = Steps::new().unwrap();
        let limit = Duration::from_millis(100);
        assert!(tokio::time::timeout(limit, steps.step()).await.is_err());
    }
}
