//! How often the live policy follows a host that changes all the time.

use std::time::{Duration, Instant};

/// Where addresses or interfaces change all the time, the live policy is compiled for them at most
/// so often: the rest after each time grows from the first to the last of these, is at least so many
/// times as long as the work, and begins anew when nothing has changed for so long.
const REST: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];
const REST_TO_WORK: u32 = 3;
const LONGEST_REST: Duration = Duration::from_secs(5);
const CALM: Duration = Duration::from_secs(2);

/// When the live policy may follow the host again.
#[derive(Debug, Default)]
pub struct Rest {
    /// The end of the last time.
    last: Option<Instant>,
    length: Duration,
    /// Something waits for the end of the rest.
    pub awaited: bool,
}

impl Rest {
    /// When it is over.
    pub fn end(&self) -> Option<Instant> {
        Some(self.last? + self.length)
    }

    /// After so much work.
    pub fn begin(&mut self, now: Instant, work: Duration) {
        let calm = |last: Instant| now.duration_since(last) > self.length + work + CALM;
        let [first, last] = REST;
        let length = match self.last.is_none_or(calm) {
            true => first,
            false => (self.length * 2).min(last),
        };
        let length = length.max((work * REST_TO_WORK).min(LONGEST_REST));
        (self.last, self.length, self.awaited) = (Some(now), length, false);
    }

    /// Whether it is over.
    pub fn over(&mut self, now: Instant) -> bool {
        self.awaited = self.end().is_some_and(|end| end > now);
        !self.awaited
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_grows_while_the_host_changes_and_is_as_long_as_the_work_takes() {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        let mut rest = Rest::default();
        assert!(rest.over(start) && rest.end().is_none());
        let mut now = start;
        let mut lengths = Vec::new();
        for _ in 0..8 {
            rest.begin(now, ms(5));
            assert!(!rest.over(now) && rest.awaited);
            lengths.push(rest.length.as_millis());
            now = rest.end().unwrap();
            assert!(rest.over(now) && !rest.awaited);
        }
        assert_eq!(lengths, [20, 40, 80, 160, 320, 640, 1000, 1000]);
        // Long work, and work without end.
        rest.begin(now, ms(800));
        assert_eq!(rest.length, ms(2400));
        rest.begin(now, ms(60_000));
        assert_eq!(rest.length, LONGEST_REST);
        rest.begin(now + ms(20_000), ms(1));
        assert_eq!(rest.length, REST[0]);
    }
}
