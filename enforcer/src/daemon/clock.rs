//! What the kernel is told about the wall clock, so that time never goes back for a rule.

use std::sync::PoisonError;

use crate::{
    api::types::Time, clock::Sample, dataplane::WallClock, events::reader::SharedDataplane,
};

const SECOND: i128 = 1_000_000_000;
/// A clock that moved by less than this is as good as it was.
const DRIFT: i128 = SECOND / 10;
/// The kernel's programs read their clock while it is being set: what they can have read until
/// then is this much later than what was read here.
const MARGIN: i128 = SECOND / 20;

/// What the kernel was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    told: Option<WallClock>,
    error: bool,
}

impl Clock {
    /// An earlier daemon has told the kernel this.
    pub fn adopted(told: Option<WallClock>) -> Self {
        Self { told, error: false }
    }

    /// What to tell the kernel at `now`, if anything.
    fn next(&self, now: Sample) -> Option<WallClock> {
        let boot_unix_ns = u64::try_from(now.boot_unix).unwrap_or(0);
        let Some(told) = self.told else {
            return Some(WallClock {
                unix_floor: 0,
                boot_unix_ns,
            });
        };
        let moved = i128::from(boot_unix_ns) - i128::from(told.boot_unix_ns);
        if moved.abs() <= DRIFT {
            return None;
        }
        let mut unix_floor = told.unix_floor;
        if moved < 0 {
            unix_floor = unix_floor.max(reached(told, now.boottime, MARGIN));
        }
        Some(WallClock {
            unix_floor,
            boot_unix_ns,
        })
    }

    /// Tells the kernel when the clock was set or has drifted.
    pub fn refresh(&mut self, dataplane: &SharedDataplane) {
        self.refresh_from(dataplane, || Sample::now().ok());
    }

    fn refresh_from(
        &mut self,
        dataplane: &SharedDataplane,
        mut sample: impl FnMut() -> Option<Sample>,
    ) {
        // Once more when the kernel got past the floor before it learned of it.
        for _ in 0..2 {
            let Some(now) = sample() else {
                return;
            };
            let Some(next) = self.next(now) else {
                return;
            };
            let set = dataplane
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .set_clock(next);
            match set {
                Ok(()) => self.error = false,
                Err(error) => {
                    if !std::mem::replace(&mut self.error, true) {
                        tracing::error!(%error, "cannot tell the kernel the time");
                    }
                    return;
                }
            }
            let before = self.told.replace(next);
            let Some(before) = before else {
                return;
            };
            tracing::info!(
                seconds =
                    (i128::from(next.boot_unix_ns) - i128::from(before.boot_unix_ns)) as f64 / 1e9,
                "the clock was set"
            );
            let Some(after) = sample() else {
                return;
            };
            let late = reached(before, after.boottime, 0);
            if next.boot_unix_ns >= before.boot_unix_ns || late <= next.unix_floor {
                return;
            }
            // Anything may be asked again; the floor is what counts.
            self.told = Some(WallClock {
                unix_floor: late + 1,
                ..before
            });
        }
    }

    /// Unix seconds that the time of rules does not go back behind.
    pub fn floor(&self) -> u64 {
        self.told.map_or(0, |told| told.unix_floor)
    }

    /// What to say about a clock that was set back.
    pub fn warning(&self) -> Option<String> {
        let told = self.told?;
        let now = Sample::now().ok()?;
        behind(told, now)
    }

    /// Whether the kernel does not know the time.
    pub fn problem(&self) -> Option<String> {
        self.error.then(|| {
            "the kernel could not be told the time: rules with times may be off".to_owned()
        })
    }
}

/// The Unix second that rules have seen at `boottime` (and a little later).
fn reached(told: WallClock, boottime: u64, margin: i128) -> u64 {
    let unix = i128::from(told.boot_unix_ns) + i128::from(boottime) + margin;
    let seconds = u64::try_from(unix / SECOND).unwrap_or(0);
    seconds.max(told.unix_floor)
}

fn behind(told: WallClock, now: Sample) -> Option<String> {
    let unix = u64::try_from(now.unix(now.boottime) / SECOND).unwrap_or(0);
    // A step of less is over before anybody has read about it.
    if told.unix_floor <= unix + 1 {
        return None;
    }
    let floor = i64::try_from(told.unix_floor).ok()?;
    let floor = Time(jiff::Timestamp::from_second(floor).ok()?);
    Some(format!(
        "the clock was set back: rules that had expired stay expired, and for rules time stands \
         still until the clock reaches {:.0}",
        floor.0
    ))
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::{Arc, Mutex},
    };

    use super::*;
    use crate::daemon::fake::Handle;

    /// `boot` seconds after boot, which was at `unix`.
    fn sample(boot: f64, unix: f64) -> Sample {
        Sample {
            boottime: (boot * 1e9) as u64,
            boot_unix: (unix * 1e9) as i128,
        }
    }

    struct Setup {
        fake: Handle,
        dataplane: SharedDataplane,
        clock: Clock,
    }

    impl Setup {
        fn new() -> Self {
            let fake = Handle::default();
            let dataplane: SharedDataplane = Arc::new(Mutex::new(fake.open(0)));
            Self {
                fake,
                dataplane,
                clock: Clock::default(),
            }
        }

        /// Floor and offset in seconds that the kernel has after these readings.
        fn after(&mut self, samples: &[Sample]) -> (u64, f64) {
            let mut samples: VecDeque<Sample> = samples.iter().copied().collect();
            self.clock.refresh_from(&self.dataplane, || {
                let next = samples.pop_front()?;
                if samples.is_empty() {
                    samples.push_back(next);
                }
                Some(next)
            });
            let told = self.fake.lock().clock.unwrap();
            (told.unix_floor, told.boot_unix_ns as f64 / 1e9)
        }
    }

    #[test]
    fn time_never_goes_back_for_a_rule() {
        let mut setup = Setup::new();
        assert_eq!(setup.after(&[sample(10.0, 1_000.0)]), (0, 1_000.0));
        // Forward: the offset alone. It is 2 020 for rules.
        assert_eq!(setup.after(&[sample(20.0, 2_000.0)]), (0, 2_000.0));
        // Back by 1 500 s, at 2 030: that is what rules have seen.
        assert_eq!(setup.after(&[sample(30.0, 500.0)]), (2_030, 500.0));
        let said = behind(setup.clock.told.unwrap(), sample(30.0, 500.0)).unwrap();
        assert!(said.contains("1970-01-01T00:33:50Z"), "{said}");
        // Further back, and forth again: the floor stays.
        assert_eq!(setup.after(&[sample(40.0, 100.0)]), (2_030, 100.0));
        assert_eq!(setup.after(&[sample(50.0, 1_900.0)]), (2_030, 1_900.0));
        // Past the floor nobody needs to know; a step back from there raises it.
        assert_eq!(
            behind(setup.clock.told.unwrap(), sample(200.0, 1_900.0)),
            None
        );
        assert_eq!(setup.after(&[sample(200.0, 1_000.0)]), (2_100, 1_000.0));
    }

    #[test]
    fn time_does_not_go_back_over_a_restart() {
        let mut setup = Setup::new();
        setup.clock = Clock::adopted(Some(WallClock {
            unix_floor: 7,
            boot_unix_ns: 1_000_000_000_000,
        }));
        // It was set back while no daemon lived: rules went on by the old time.
        assert_eq!(setup.after(&[sample(60.0, 500.0)]), (1_060, 500.0));
        assert_eq!(setup.clock.floor(), 1_060);
    }

    #[test]
    fn a_floor_covers_what_was_read_while_it_was_set() {
        let mut setup = Setup::new();
        setup.after(&[sample(10.0, 1_000.0)]);
        // 30 ms before the second turns.
        assert_eq!(setup.after(&[sample(10.97, 500.0)]).0, 1_011);
        let mut setup = Setup::new();
        setup.after(&[sample(10.0, 1_000.0)]);
        // Held up for three seconds between reading the clock and telling the kernel.
        let floor = setup.after(&[sample(10.5, 500.0), sample(13.5, 500.0)]).0;
        assert!(floor >= 1_013, "{floor}");
        assert_eq!(
            setup.fake.lock().clock.unwrap().boot_unix_ns,
            500_000_000_000
        );
    }

    #[test]
    fn drift_is_followed_from_a_tenth_of_a_second() {
        let mut setup = Setup::new();
        setup.after(&[sample(10.0, 1_000.0)]);
        assert_eq!(setup.after(&[sample(70.0, 1_000.09)]), (0, 1_000.0));
        assert_eq!(setup.after(&[sample(130.0, 1_000.15)]), (0, 1_000.15));
    }

    #[test]
    fn a_refusal_is_told_and_tried_again() {
        let mut setup = Setup::new();
        setup.after(&[sample(10.0, 1_000.0)]);
        setup.fake.lock().refuse_clock = true;
        assert_eq!(setup.after(&[sample(20.0, 2_000.0)]).1, 1_000.0);
        assert!(setup.clock.problem().is_some());
        setup.fake.lock().refuse_clock = false;
        assert_eq!(setup.after(&[sample(21.0, 2_000.0)]).1, 2_000.0);
        assert_eq!(setup.clock.problem(), None);
    }
}
