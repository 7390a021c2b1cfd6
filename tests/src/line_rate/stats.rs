//! Rounds of subject and baseline in turn, medians and spread.
//!
//! A machine that others use gets faster and slower while one measures. So what is compared is
//! measured within the same round, and compared there; the median over the rounds is reported.

/// A value for each round.
#[derive(Clone, Debug, PartialEq)]
pub struct Series(Vec<f64>);

/// A median, and how far apart the rounds were.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Of the rounds.
    pub median: f64,
    /// Distance between the quartiles as a share of the median.
    pub spread: f64,
}

impl Series {
    /// The rounds' values, in their order.
    pub fn new(values: Vec<f64>) -> Self {
        Self(values)
    }

    /// Round by round without the baseline.
    pub fn minus(&self, baseline: &Self) -> Self {
        self.each(baseline, |value, base| value - base)
    }

    /// Round by round as a multiple of the unit.
    pub fn over(&self, unit: &Self) -> Self {
        self.each(unit, |value, unit| value / unit)
    }

    /// Round by round multiplied.
    pub fn times(&self, factor: &Self) -> Self {
        self.each(factor, |value, factor| value * factor)
    }

    fn each(&self, other: &Self, what: impl Fn(f64, f64) -> f64) -> Self {
        assert_eq!(self.0.len(), other.0.len(), "rounds belong together");
        let pairs = self.0.iter().zip(&other.0);
        Self(pairs.map(|(a, b)| what(*a, *b)).collect())
    }

    /// The median; not a number without rounds.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Median and spread.
    pub fn summary(&self) -> Summary {
        let median = self.median();
        let between = self.quantile(0.75) - self.quantile(0.25);
        Summary {
            median,
            spread: between / median.abs(),
        }
    }

    /// Between the values at either side of the place, in proportion.
    fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else {
            return f64::NAN;
        };
        let place = part * last as f64;
        let (below, above) = (place.floor() as usize, place.ceil() as usize);
        sorted[below] + (sorted[above] - sorted[below]) * (place - place.floor())
    }
}

/// Something that is measured once a round.
pub type Lane<'a, E> = Box<dyn FnMut() -> Result<f64, E> + 'a>;

/// Measures all lanes in turn, `rounds` times; every other round backwards, so that none always
/// profits from what the one before it left in the caches.
///
/// # Errors
/// The first of a lane.
pub fn interleave<E>(rounds: usize, lanes: &mut [Lane<'_, E>]) -> Result<Vec<Series>, E> {
    let mut values = vec![Vec::with_capacity(rounds); lanes.len()];
    for round in 0..rounds {
        for place in 0..lanes.len() {
            let lane = if round % 2 == 0 {
                place
            } else {
                lanes.len() - 1 - place
            };
            values[lane].push(lanes[lane]()?);
        }
    }
    Ok(values.into_iter().map(Series).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(values: &[f64]) -> Series {
        Series::new(values.to_vec())
    }

    #[test]
    fn medians_and_quartiles() {
        let got = series(&[4.0, 1.0, 100.0, 3.0, 2.0]).summary();
        assert_eq!((got.median, got.spread), (3.0, 2.0 / 3.0));
        assert_eq!(series(&[1.0, 2.0]).median(), 1.5);
        assert!(series(&[]).median().is_nan());
    }

    #[test]
    fn what_slows_a_round_slows_both_and_leaves_the_ratio() {
        let slow = [1.0, 1.0, 7.0, 1.0];
        let lane = |cost: f64| series(&slow.map(|factor| factor * (cost + 2.0)));
        let empty = lane(0.0);
        let ratio = lane(6.0).minus(&empty).over(&lane(3.0).minus(&empty));
        let want = Summary {
            median: 2.0,
            spread: 0.0,
        };
        assert_eq!(ratio.summary(), want);
    }

    #[test]
    fn lanes_take_turns() {
        let order = std::cell::RefCell::new(String::new());
        let lane = |name: char, value: f64| -> Lane<'_, ()> {
            let order = &order;
            Box::new(move || {
                order.borrow_mut().push(name);
                Ok(value)
            })
        };
        let mut lanes = [lane('a', 1.0), lane('b', 2.0), lane('c', 3.0)];
        let got = interleave(3, &mut lanes).unwrap();
        assert_eq!(*order.borrow(), "abccbaabc");
        assert_eq!(got[1], series(&[2.0; 3]));
    }

    #[test]
    fn a_lane_that_fails_ends_it() {
        let mut lanes: [Lane<'_, &str>; 1] = [Box::new(|| Err("no"))];
        assert_eq!(interleave(2, &mut lanes), Err("no"));
    }
}
