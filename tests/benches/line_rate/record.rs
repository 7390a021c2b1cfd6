//! Writes the measured parts of `docs/performance.md`, and its plots.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use enforcer_tests::line_rate::{
    bounds::{Bounds, GOALS},
    markdown,
    report::Report,
    svg::{Line, plot},
};
use serde_json::Value;

use crate::{Options, machine, micro};

/// Where the documents are, when the bench runs where it was built.
const DOCS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs");

/// Nanoseconds a packet of enforcers that were measured once, by hand, in the same way on a machine
/// of this kind (Linux 6.18): established, at 1, 1 000 and 32 000 flows.
const PEERS: [(&str, [f64; 3]); 2] = [
    ("AWS policy agent", [111.0, 115.0, 320.0]),
    ("Calico, stub policy", [175.0, 194.0, 432.0]),
];

/// Writes all of it.
pub fn write(options: &Options, report: &Report, bounds: &Bounds) -> Result<()> {
    let docs = Path::new(DOCS);
    let file = docs.join("performance.md");
    let read = || format!("cannot read {}", file.display());
    let mut text = fs::read_to_string(&file).with_context(read)?;
    let goals = Bounds::parse(GOALS)?;
    let mut parts = vec![
        ("ratios", markdown::ratios(report, &goals, bounds)),
        ("machine", machine_table(options)),
        ("notes", markdown::notes(report)),
    ];
    for section in ["micro", "macro", "control"] {
        parts.push((section, markdown::figures(report, section)));
    }
    for (name, content) in parts {
        text = markdown::replace(&text, name, &content)?;
    }
    let plots = [
        ("performance-flows.svg", flows(report)),
        ("performance-policy.svg", policy(report)),
    ];
    for (name, svg) in plots {
        let file = docs.join(name);
        fs::write(&file, svg).with_context(|| format!("cannot write {}", file.display()))?;
    }
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
}

fn machine_table(options: &Options) -> String {
    let mut text = "| | |\n|---|---|\n".to_owned();
    if let Value::Object(fields) = machine::describe() {
        for (name, value) in fields {
            let value = if let Value::Array(all) = &value {
                let all: Vec<&str> = all.iter().filter_map(Value::as_str).collect();
                all.join(", ")
            } else {
                value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned)
            };
            text += &format!("| {name} | {value} |\n");
        }
    }
    let run = if options.quick { "quick" } else { "whole" };
    text + &format!("| run | {run} |\n")
}

/// Figures by a count that their names begin or end with.
fn line(
    report: &Report,
    name: &str,
    group: &str,
    counts: &[u32],
    of: impl Fn(u32) -> String,
) -> Line {
    let points = counts.iter().filter_map(|count| {
        let value = report.value("micro", group, &of(*count))?;
        Some((f64::from(*count), value))
    });
    Line {
        name: name.to_owned(),
        points: points.collect(),
        dashed: false,
    }
}

fn dashed(line: Line) -> Line {
    Line {
        dashed: true,
        ..line
    }
}

fn flows(report: &Report) -> String {
    use micro::{group, names};
    let counts = [1, 1_000, 32_000, 512_000];
    let established = |family| move |count| names::established(family, count);
    let mut lines = vec![
        line(
            report,
            "enforcer, IPv4",
            group::FLOWS,
            &counts,
            established("IPv4"),
        ),
        line(
            report,
            "enforcer, IPv6",
            group::FLOWS,
            &counts,
            established("IPv6"),
        ),
        dashed(line(
            report,
            "kernel's LRU hash alone",
            group::FLOWS,
            &counts,
            |n| names::lru_hit(40, n),
        )),
    ];
    for (name, costs) in PEERS {
        let points = [1.0, 1_000.0, 32_000.0].into_iter().zip(costs);
        lines.push(Line {
            name: name.to_owned(),
            points: points.collect(),
            dashed: true,
        });
    }
    plot(
        "A packet of an established flow, by flows in random order",
        "flows",
        "ns above an empty program",
        &lines,
    )
}

fn policy(report: &Report) -> String {
    use micro::{group, names};
    let rules = [10, 100, 1_000, 10_000, 100_000];
    let members = [10, 1_000, 100_000, 1_000_000];
    let lines = [
        line(report, "one pair, by rules", group::RULES, &rules, |n| {
            names::rules(n, names::ONE)
        }),
        line(
            report,
            "random pairs, by rules",
            group::RULES,
            &rules,
            |n| names::rules(n, names::ANY),
        ),
        line(
            report,
            "one pair, by members",
            group::MEMBERS,
            &members,
            |n| names::members("IPv4", n, names::ONE),
        ),
        line(
            report,
            "random pairs, by members",
            group::MEMBERS,
            &members,
            |n| names::members("IPv4", n, names::ANY),
        ),
        dashed(line(
            report,
            "two look-ups in LPM tries",
            group::MEMBERS,
            &members,
            |n| names::members("IPv4", n, names::LPM),
        )),
    ];
    plot(
        "A packet that the policy is asked about, by the policy's size",
        "rules, or member addresses",
        "ns above an empty program",
        &lines,
    )
}
