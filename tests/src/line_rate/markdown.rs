//! The tables of a document that a run writes, between marks; the rest of it is people's.

use std::fmt::Write as _;

use super::{
    bounds::{Bound, Bounds},
    report::{Figure, Report, distinct, number},
};

/// A document without a place to write to.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the document has no lines `{0}` and, below it, `{END}`")]
pub struct NoPlace(String);

const END: &str = "<!-- end of what was measured -->";

fn begin(name: &str) -> String {
    format!("<!-- measured: {name} -->")
}

/// Puts `content` in place of what is between the marks of this name.
///
/// # Errors
/// When the document has no such marks.
pub fn replace(document: &str, name: &str, content: &str) -> Result<String, NoPlace> {
    let begin = begin(name);
    let missing = || NoPlace(begin.clone());
    let (before, rest) = document.split_once(&begin).ok_or_else(missing)?;
    let (_, after) = rest.split_once(END).ok_or_else(missing)?;
    let content = content.trim_end();
    Ok(format!("{before}{begin}\n{content}\n{END}{after}"))
}

/// Each ratio with its spread, its goal, and the bound that CI holds it to.
pub fn ratios(report: &Report, goals: &Bounds, bounds: &Bounds) -> String {
    let mut text =
        "| ratio | value | spread | goal | held to in CI |\n|---|---|---|---|---|\n".to_owned();
    for ratio in report.ratios() {
        let (value, spread) = if ratio.is_noisy() {
            ("noisy".to_owned(), String::new())
        } else {
            (number(ratio.value), percent(ratio.spread))
        };
        let (goal, bound) = (goals.of(&ratio.name), bounds.of(&ratio.name));
        let met = match goal {
            Some(goal) if !ratio.is_noisy() && goal.holds(ratio.value) => " ✓",
            Some(_) => " ✗",
            None => "",
        };
        let _ = writeln!(
            text,
            "| `{}` | {value} | {spread} | {}{met} | {} |",
            ratio.name,
            words(goal),
            words(bound)
        );
    }
    text
}

fn words(bound: Option<Bound>) -> String {
    match bound {
        Some(Bound::Max(most)) => format!("≤ {most}"),
        Some(Bound::Min(least)) => format!("≥ {least}"),
        None => String::new(),
    }
}

fn percent(share: f64) -> String {
    if share == 0.0 {
        String::new()
    } else {
        format!("{:.0} %", share * 100.0)
    }
}

/// The tables of a section, a heading each. Figures called `subject: what` make a table of subjects
/// and whats, if several subjects share a what; the others follow in a list.
pub fn figures(report: &Report, section: &str) -> String {
    let mut text = String::new();
    for group in report.groups(section) {
        let here = report.figures().iter();
        let here = here.filter(|f| f.section == section && f.group == group);
        let (crossed, listed): (Vec<&Figure>, Vec<&Figure>) =
            here.partition(|f| f.name.contains(BETWEEN));
        let table = crossed_table(&crossed);
        let listed = match table {
            Some(_) => listed,
            None => crossed.into_iter().chain(listed).collect(),
        };
        let _ = writeln!(text, "\n### {group}\n");
        if let Some(table) = table {
            text += &table;
            if !listed.is_empty() {
                text.push('\n');
            }
        }
        if !listed.is_empty() {
            text.push_str("| | | spread |\n|---|---|---|\n");
        }
        for f in listed {
            let value = number(f.value);
            let spread = percent(f.spread);
            let _ = writeln!(text, "| {} | {value} {} | {spread} |", f.name, f.unit);
        }
    }
    text
}

/// Between a subject and what is measured of it.
const BETWEEN: &str = ": ";

fn crossed_table(figures: &[&Figure]) -> Option<String> {
    let halves = |f: &Figure| {
        let (row, column) = f.name.rsplit_once(BETWEEN)?;
        Some((row.to_owned(), column.to_owned()))
    };
    let names: Vec<(String, String)> = figures.iter().filter_map(|f| halves(f)).collect();
    let rows = distinct(names.iter().map(|(row, _)| row.as_str()));
    let columns = distinct(names.iter().map(|(_, column)| column.as_str()));
    let unit = &figures.first()?.unit;
    if columns.len() == names.len() || figures.iter().any(|f| f.unit != *unit) {
        return None;
    }
    let mut text = format!("| {unit} |");
    for column in &columns {
        let _ = write!(text, " {column} |");
    }
    let _ = writeln!(text, "\n|---|{}", "---|".repeat(columns.len()));
    for row in rows {
        let _ = write!(text, "| {row} |");
        for column in &columns {
            let name = format!("{row}{BETWEEN}{column}");
            let cell = figures.iter().find(|f| f.name == name).map(|f| {
                let spread = percent(f.spread);
                let value = number(f.value);
                if spread.is_empty() {
                    value
                } else {
                    format!("{value} ± {spread}")
                }
            });
            let _ = write!(text, " {} |", cell.unwrap_or_default());
        }
        text.push('\n');
    }
    Some(text)
}

/// What a reader must know.
pub fn notes(report: &Report) -> String {
    if report.notes().is_empty() {
        return "None.\n".to_owned();
    }
    let notes = report.notes().iter().map(|note| format!("- {note}\n"));
    notes.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::line_rate::stats::Summary;

    #[test]
    fn between_the_marks() {
        let document = "a\n<!-- measured: x -->\nold\n<!-- end of what was measured -->\nb\n";
        let once = replace(document, "x", "| new |\n").unwrap();
        let want = document.replace("old", "| new |");
        assert_eq!(once, want);
        assert_eq!(replace(&once, "x", "| new |").unwrap(), want, "again");
        assert!(replace(document, "y", "").is_err());
        assert!(replace("<!-- measured: x -->", "x", "").is_err());
    }

    #[test]
    fn goals_are_met_or_not() {
        let mut report = Report::default();
        report.ratio("good", 0.5, 0.1);
        report.ratio("bad", 0.5, 0.0);
        report.ratio("wide", 0.5, 2.0);
        let goals = r#"{"good": {"max": 0.8}, "bad": {"min": 0.8}, "wide": {"max": 1}}"#;
        let goals = Bounds::parse(goals).unwrap();
        let bounds = Bounds::parse(r#"{"good": {"max": 1.2}}"#).unwrap();
        let want = "| ratio | value | spread | goal | held to in CI |\n\
                    |---|---|---|---|---|\n\
                    | `good` | 0.50 | 10 % | ≤ 0.8 ✓ | ≤ 1.2 |\n\
                    | `bad` | 0.50 |  | ≥ 0.8 ✗ |  |\n\
                    | `wide` | noisy |  | ≤ 1 ✗ |  |\n";
        assert_eq!(ratios(&report, &goals, &bounds), want);
    }

    #[test]
    fn a_table_for_each_group_of_the_section() {
        let mut report = Report::default();
        report.section("micro");
        report.figure("One flow", "established", "ns", 12.34);
        report.section("macro");
        report.figure("One flow", "other", "ns", 1.0);
        let want =
            "\n### One flow\n\n| | | spread |\n|---|---|---|\n| established | 12.3 ns |  |\n";
        assert_eq!(figures(&report, "micro"), want);
    }

    #[test]
    fn subjects_that_share_a_what_make_a_table() {
        let mut report = Report::default();
        let spread = Summary {
            median: 1.5,
            spread: 0.1,
        };
        report.measured("g", "IPv4: new", "ns", spread);
        report.figure("g", "unit", "ns", 3.0);
        report.figure("g", "IPv6: new", "ns", 4.0);
        report.figure("g", "IPv4: old", "ns", 5.0);
        let want = "\n### g\n\n| ns | new | old |\n|---|---|---|\n\
                    | IPv4 | 1.50 ± 10 % | 5.00 |\n| IPv6 | 4.00 |  |\n\n\
                    | | | spread |\n|---|---|---|\n| unit | 3.00 ns |  |\n";
        assert_eq!(figures(&report, ""), want);
        // Nothing shared, nothing to cross.
        let mut report = Report::default();
        report.figure("g", "a: b", "ns", 1.0);
        report.figure("g", "c: d", "ns", 1.0);
        assert!(figures(&report, "").contains("| a: b | 1.00 ns |  |\n| c: d |"));
    }
}
