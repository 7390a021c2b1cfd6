//! The bounds that the ratios are held to.

use std::collections::BTreeMap;

use super::report::Report;

/// The one file of bounds, as committed.
pub const COMMITTED: &str = include_str!("../../benches/line_rate/bounds.json");

/// What the ratios are meant to reach: no run fails for these.
pub const GOALS: &str = include_str!("../../benches/line_rate/goals.json");

/// What a ratio must not pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// It must not be larger.
    Max(f64),
    /// It must not be smaller.
    Min(f64),
}

impl Bound {
    /// Whether a value is within.
    pub fn holds(self, value: f64) -> bool {
        match self {
            Self::Max(max) => value <= max,
            Self::Min(min) => value >= min,
        }
    }
}

/// Bounds by the names of ratios.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounds(BTreeMap<String, Bound>);

/// Why a file of bounds is none.
#[derive(Debug, thiserror::Error)]
pub enum BoundsError {
    /// Not JSON.
    #[error("the bounds are no JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// Another shape.
    #[error("the bound of {0:?} is not {{\"max\": NUMBER}} or {{\"min\": NUMBER}}")]
    Shape(String),
}

impl Bounds {
    /// Reads `{"name": {"max": 0.8}, "other": {"min": 0.95}}`.
    ///
    /// # Errors
    /// When it is anything else.
    pub fn parse(text: &str) -> Result<Self, BoundsError> {
        let all: BTreeMap<String, BTreeMap<String, f64>> = serde_json::from_str(text)?;
        let bounds = all.into_iter().map(|(name, bound)| {
            let mut parts = bound.iter();
            let bound = match (parts.next().map(|(k, v)| (k.as_str(), *v)), parts.next()) {
                (Some(("max", value)), None) => Bound::Max(value),
                (Some(("min", value)), None) => Bound::Min(value),
                _ => return Err(BoundsError::Shape(name)),
            };
            Ok((name, bound))
        });
        Ok(Self(bounds.collect::<Result<_, _>>()?))
    }

    /// The bound of a ratio.
    pub fn of(&self, name: &str) -> Option<Bound> {
        self.0.get(name).copied()
    }

    /// Ratios of the report that are behind their bounds, in words; empty if all is well.
    ///
    /// A noisy ratio is behind none: it says nothing. A bound whose ratio was not measured is
    /// listed by [`Bounds::unmeasured`].
    pub fn behind(&self, report: &Report) -> Vec<String> {
        let fine = report.ratios().iter().filter(|ratio| !ratio.is_noisy());
        fine.filter_map(|ratio| {
            let (name, value) = (&ratio.name, ratio.value);
            let bound = self.of(name).filter(|bound| !bound.holds(value))?;
            let bound = match bound {
                Bound::Max(max) => format!("at most {max}"),
                Bound::Min(min) => format!("at least {min}"),
            };
            Some(format!("{name} is {value:.2}, the bound is {bound}"))
        })
        .collect()
    }

    /// Names with a bound for which the report has no usable ratio.
    pub fn unmeasured(&self, report: &Report) -> Vec<&str> {
        let usable = |name: &&str| {
            let ratios = report.ratios();
            ratios.iter().any(|r| r.name == *name && !r.is_noisy())
        };
        let names = self.0.keys().map(String::as_str);
        names.filter(|name| !usable(name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        report.ratio("low", 0.5, 0.1);
        report.ratio("high", 0.9, 0.1);
        report.ratio("noisy", 9.0, 2.0);
        report
    }

    fn bounds(text: &str) -> Bounds {
        Bounds::parse(text).unwrap()
    }

    #[test]
    fn within() {
        let bounds = bounds(
            r#"{"low": {"max": 0.5}, "high": {"min": 0.9}, "noisy": {"max": 1}, "other": {"max": 1}}"#,
        );
        assert_eq!(bounds.behind(&report()), Vec::<String>::new());
        assert_eq!(bounds.unmeasured(&report()), ["noisy", "other"]);
    }

    #[test]
    fn behind() {
        let bounds = bounds(r#"{"low": {"max": 0.4}, "high": {"min": 0.95}}"#);
        let want = [
            "low is 0.50, the bound is at most 0.4",
            "high is 0.90, the bound is at least 0.95",
        ];
        assert_eq!(bounds.behind(&report()), want);
    }

    #[test]
    fn the_committed_ones_are_bounds() {
        for text in [COMMITTED, GOALS] {
            assert!(bounds(text).of("established_hot_vs_lru").is_some());
        }
    }

    #[test]
    fn other_shapes_are_refused() {
        for text in [
            "",
            "[]",
            r#"{"a": {"max": 1, "min": 0}}"#,
            r#"{"a": {"most": 1}}"#,
        ] {
            assert!(Bounds::parse(text).is_err(), "{text}");
        }
    }
}
