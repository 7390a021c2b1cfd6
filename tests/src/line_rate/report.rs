//! What a run found out: ratios, figures, notes.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::stats::Summary;

/// A figure with its unit.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// The part of the bench that it comes from.
    pub section: String,
    /// The table that it stands in.
    pub group: String,
    /// Its line there.
    pub name: String,
    /// Such as `ns`.
    pub unit: String,
    /// The median.
    pub value: f64,
    /// As [`Summary::spread`]; 0 where it was measured once.
    pub spread: f64,
}

/// A ratio, or another number that is held to a bound.
#[derive(Clone, Debug, PartialEq)]
pub struct Ratio {
    /// As in the bounds file.
    pub name: String,
    /// The median.
    pub value: f64,
    /// As [`Summary::spread`].
    pub spread: f64,
}

impl Ratio {
    /// Whether the rounds were further apart than the ratio is large: it says nothing then.
    pub fn is_noisy(&self) -> bool {
        // Not a number is noise as well.
        !(self.value.is_finite() && self.spread <= 1.0)
    }
}

/// All that a run found out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    ratios: Vec<Ratio>,
    figures: Vec<Figure>,
    notes: Vec<String>,
    section: String,
}

impl Report {
    /// What follows comes from this part of the bench.
    pub fn section(&mut self, name: &str) {
        name.clone_into(&mut self.section);
    }

    /// Adds a ratio. `spread` is the distance between quartiles as a share of the value
    /// ([`Summary::spread`]); 0 for what is measured once.
    pub fn ratio(&mut self, name: &str, value: f64, spread: f64) {
        self.ratios.retain(|ratio| ratio.name != name);
        self.ratios.push(Ratio {
            name: name.to_owned(),
            value,
            spread,
        });
    }

    /// Adds a figure to a table. The same one again replaces it.
    pub fn figure(&mut self, group: &str, name: &str, unit: &str, value: f64) {
        let summary = Summary {
            median: value,
            spread: 0.0,
        };
        self.measured(group, name, unit, summary);
    }

    /// Adds a figure of several rounds.
    pub fn measured(&mut self, group: &str, name: &str, unit: &str, summary: Summary) {
        let figure = Figure {
            section: self.section.clone(),
            group: group.to_owned(),
            name: name.to_owned(),
            unit: unit.to_owned(),
            value: summary.median,
            spread: summary.spread,
        };
        let same = |old: &&mut Figure| {
            (&old.section, &old.group, &old.name) == (&figure.section, &figure.group, &figure.name)
        };
        match self.figures.iter_mut().find(same) {
            Some(old) => *old = figure,
            None => self.figures.push(figure),
        }
    }

    /// Adds something that a reader must know: what could not be measured, and why.
    pub fn note(&mut self, text: impl Into<String>) {
        let text = text.into();
        if !self.notes.contains(&text) {
            self.notes.push(text);
        }
    }

    /// The ratios, noisy ones too.
    pub fn ratios(&self) -> &[Ratio] {
        &self.ratios
    }

    /// The figures, in their order.
    pub fn figures(&self) -> &[Figure] {
        &self.figures
    }

    /// The notes.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The parts that have figures, in their order.
    pub fn sections(&self) -> Vec<&str> {
        distinct(self.figures.iter().map(|f| f.section.as_str()))
    }

    /// The groups of a section, in the order of their first figures.
    pub fn groups(&self, section: &str) -> Vec<&str> {
        let here = self.figures.iter().filter(|f| f.section == section);
        distinct(here.map(|f| f.group.as_str()))
    }

    /// A figure's value.
    pub fn value(&self, section: &str, group: &str, name: &str) -> Option<f64> {
        let figure = |f: &&Figure| f.section == section && f.group == group && f.name == name;
        Some(self.figures.iter().find(figure)?.value)
    }

    /// `ratios` (flat; noisy ones are left out and listed in `noisy`), `figures`, `notes`.
    pub fn json(&self, machine: &Value) -> Value {
        let fine = self.ratios.iter().filter(|ratio| !ratio.is_noisy());
        let ratios: Map<String, Value> = fine.map(|r| (r.name.clone(), json!(r.value))).collect();
        let spreads = self.ratios.iter().filter(|ratio| !ratio.is_noisy());
        let spreads: Map<String, Value> =
            spreads.map(|r| (r.name.clone(), json!(r.spread))).collect();
        let noisy = self.ratios.iter().filter(|ratio| ratio.is_noisy());
        let noisy: Vec<&str> = noisy.map(|ratio| ratio.name.as_str()).collect();
        let figures: Vec<Value> = self
            .figures
            .iter()
            .map(|f| {
                json!({"section": f.section, "group": f.group, "name": f.name, "unit": f.unit, "value": f.value,
                       "spread": f.spread})
            })
            .collect();
        json!({"ratios": ratios, "spreads": spreads, "noisy": noisy, "figures": figures,
               "notes": self.notes, "machine": machine})
    }

    /// For people: ratios first.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let width = |names: &mut dyn Iterator<Item = usize>| names.max().unwrap_or(0);
        let widest = width(&mut self.ratios.iter().map(|ratio| ratio.name.len()));
        for ratio in &self.ratios {
            let Ratio {
                name,
                value,
                spread,
            } = ratio;
            let _ = if ratio.is_noisy() {
                writeln!(text, "{name:widest$}  noisy")
            } else {
                let share = spread * 100.0;
                writeln!(
                    text,
                    "{name:widest$}  {:>8}  ± {share:.0} %",
                    number(*value)
                )
            };
        }
        let groups = self.sections().into_iter().flat_map(|section| {
            let groups = self.groups(section).into_iter();
            groups.map(move |group| (section, group))
        });
        for (section, group) in groups {
            let _ = writeln!(text, "\n{section}: {group}");
            let here = || {
                let figures = self.figures.iter();
                figures.filter(|f| f.section == section && f.group == group)
            };
            let widest = width(&mut here().map(|f| f.name.chars().count()));
            for f in here() {
                let value = number(f.value);
                let _ = write!(text, "  {:widest$}  {value:>8} {}", f.name, f.unit);
                if f.spread > 0.0 {
                    let _ = write!(text, "  ± {:.0} %", f.spread * 100.0);
                }
                text.push('\n');
            }
        }
        if !self.notes.is_empty() {
            text.push('\n');
        }
        for note in &self.notes {
            let _ = writeln!(text, "note: {note}");
        }
        text
    }
}

/// Names once each, in the order in which they come first.
pub fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut found = Vec::new();
    for name in names {
        if !found.contains(&name) {
            found.push(name);
        }
    }
    found
}

/// A number with as many digits as mean something.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if size >= 100.0 {
        let sign = if value < 0.0 { "-" } else { "" };
        format!("{sign}{}", whole(size.round() as u64))
    } else if size >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// A count, in groups of three digits.
pub fn whole(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_says_nothing_is_called_noisy() {
        let mut report = Report::default();
        report.ratio("fine", 0.5, 0.2);
        report.ratio("wide", 0.5, 1.2);
        report.ratio("none", f64::NAN, 0.0);
        let json = report.json(&json!({}));
        assert_eq!(json["ratios"], json!({"fine": 0.5}));
        assert_eq!(json["noisy"], json!(["wide", "none"]));
        assert!(report.text().contains("wide  noisy"));
    }

    #[test]
    fn again_replaces() {
        let mut report = Report::default();
        report.section("s");
        report.figure("g", "a", "ns", 1.0);
        report.figure("h", "a", "ns", 2.0);
        report.figure("g", "a", "ns", 3.0);
        report.ratio("r", 1.0, 0.0);
        report.ratio("r", 2.0, 0.0);
        report.note("n");
        report.note("n");
        assert_eq!(report.groups("s"), ["g", "h"]);
        assert_eq!(report.value("s", "g", "a"), Some(3.0));
        assert_eq!(report.ratios().len(), 1);
        assert_eq!(report.notes().len(), 1);
    }

    #[test]
    fn digits() {
        let got = [1234567.0, -1234.4, 123.4, 12.34, 1.234, 0.0].map(number);
        assert_eq!(got, ["1 234 567", "-1 234", "123", "12.3", "1.23", "0.00"]);
        assert_eq!([10, 1_000].map(whole), ["10", "1 000"]);
    }
}
