//! `enforcer plan`

use std::path::{Path, PathBuf};

use crate::api::{
    client::{Client, ClientError},
    types::{
        Because, ChangedFlow, End, FlowChanges, Items, LiveFlow, Plan, PlanRequest, ReachChange,
        ReachGroup, Refusal, Sign,
    },
};

use super::{
    Exit, Failure, Format, Globals, block_on,
    out::{Hue, Out, clean, count},
};

/// Flows of a list that are shown as text.
const SHOWN: usize = 50;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Policy to compare with the one in force: a directory or one file (default: where the
    /// enforcer reads its own).
    path: Option<PathBuf>,
    /// Form of the output.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

/// What came of asking for a plan.
pub(super) enum Answer {
    /// The policy can be used.
    Plan(Box<Plan>),
    /// It cannot, and this is why.
    Refused(Box<Refusal>),
}

/// Asks the daemon what the policy at `path` would change.
pub(super) fn ask(globals: &Globals, path: Option<&Path>) -> Result<Answer, Failure> {
    // The daemon is in another directory.
    let whole = path.map(std::path::absolute).transpose();
    let whole =
        whole.map_err(|error| Failure::new(Exit::Usage, format!("no such path: {error}")))?;
    let request = PlanRequest {
        path: whole.map(|path| path.to_string_lossy().into_owned()),
    };
    let client = Client::new(&globals.socket);
    block_on(async {
        match client.plan(&request).await {
            Ok(plan) => Ok(Answer::Plan(Box::new(plan))),
            Err(ClientError::Rejected(refusal)) => Ok(Answer::Refused(refusal)),
            Err(error) => Err(error.into()),
        }
    })
}

pub fn run(args: &Args, globals: &Globals, out: &mut Out) -> Result<Exit, Failure> {
    match (ask(globals, args.path.as_deref())?, args.output) {
        (Answer::Plan(plan), format) => {
            match format {
                Format::Json => out.json(&plan)?,
                Format::Text => show(&plan, out)?,
            }
            Ok(if plan.changed {
                Exit::Changes
            } else {
                Exit::Fine
            })
        }
        (Answer::Refused(refusal), Format::Json) => {
            out.json(&refusal)?;
            Ok(Exit::Policy)
        }
        (Answer::Refused(refusal), Format::Text) => {
            show_refusal(&refusal, args.path.as_deref(), out)?;
            Ok(Exit::Policy)
        }
    }
}

/// Shows why a policy cannot be used, as `check` does.
pub(super) fn show_refusal(
    refusal: &Refusal,
    path: Option<&Path>,
    out: &mut Out,
) -> Result<(), Failure> {
    out.text(&multiline(&refusal.error))?;
    let errors = refusal.diagnostics.iter();
    let errors = errors.filter(|finding| finding.severity == "error").count();
    let subject = path.map_or_else(
        || "the policy".to_owned(),
        |path| path.display().to_string(),
    );
    let verdict = match errors {
        0 => "refused".to_owned(),
        errors => count(errors, "error"),
    };
    let verdict = out.paint(Hue::Bad, &verdict);
    out.line(format!(
        "\n{}: {verdict}; nothing has changed",
        clean(&subject)
    ))?;
    Ok(())
}

/// Lines stay lines.
fn multiline(text: &str) -> String {
    let lines = text.lines().map(|line| clean(line) + "\n");
    lines.collect()
}

/// Shows a plan; the summary is the last line.
pub(super) fn show(plan: &Plan, out: &mut Out) -> Result<(), Failure> {
    for warning in &plan.warnings {
        out.text(&multiline(warning))?;
        out.line("")?;
    }
    for (title, items) in [
        ("policy", &plan.text.policy),
        ("segments", &plan.text.segments),
        ("groups", &plan.text.groups),
        ("rules", &plan.text.rules),
        ("settings", &plan.text.settings),
    ] {
        written(title, items, out)?;
    }
    reach(plan, out)?;
    let flows = &plan.flows;
    flow_changes(flows, out)?;
    let hue = if !plan.changed {
        Hue::Good
    } else if flows.cut > 0 || flows.error.is_some() {
        Hue::Bad
    } else {
        Hue::Strong
    };
    let summary = out.paint(hue, &clean(&plan.summary));
    out.line(summary)?;
    Ok(())
}

fn title(text: &str, out: &mut Out) -> Result<(), Failure> {
    let text = out.paint(Hue::Strong, text);
    Ok(out.line(text)?)
}

fn signed(sign: Sign, out: &Out) -> String {
    match sign {
        Sign::Added => out.paint(Hue::Good, "+"),
        Sign::Removed => out.paint(Hue::Bad, "-"),
        Sign::Changed => out.paint(Hue::Warn, "~"),
    }
}

fn place(file: Option<&str>, line: Option<u32>) -> String {
    match (file, line) {
        (Some(file), Some(line)) => format!("{}:{line}", clean(file)),
        (Some(file), None) => clean(file),
        (None, _) => String::new(),
    }
}

fn written(name: &str, items: &Items, out: &mut Out) -> Result<(), Failure> {
    if items.is_empty() {
        return Ok(());
    }
    title(name, out)?;
    for item in &items.items {
        let sign = signed(item.sign, out);
        let place = place(item.file.as_deref(), item.line);
        let place = out.paint(Hue::Dim, &place);
        let name = clean(&item.name);
        // What is new or gone says all in one line.
        if let (Sign::Added | Sign::Removed, [said]) = (item.sign, &item.details[..]) {
            out.line(format!("  {sign} {name}  {}  {place}", clean(said)))?;
            continue;
        }
        out.line(format!("  {sign} {name}  {place}"))?;
        for detail in &item.details {
            out.line(format!("      {}", clean(detail)))?;
        }
        more("      ", item.more, "", out)?;
    }
    more("  ", items.len() - items.items.len(), "", out)?;
    Ok(out.line("")?)
}

/// Says how many were left out.
fn more(indent: &str, number: usize, what: &str, out: &mut Out) -> Result<(), Failure> {
    if number > 0 {
        let text = out.paint(Hue::Dim, &format!("… and {number} more{what}"));
        out.line(format!("{indent}{text}"))?;
    }
    Ok(())
}

fn reach(plan: &Plan, out: &mut Out) -> Result<(), Failure> {
    let reach = &plan.reach;
    if reach.groups.is_empty() && reach.cut.is_empty() {
        return Ok(());
    }
    title("who reaches whom", out)?;
    for group in &reach.groups {
        let (from, to) = (
            ends(&group.from, group.more_from),
            ends(&group.to, group.more_to),
        );
        let pairs = pairs(group);
        let pairs = out.paint(Hue::Dim, &pairs);
        out.line(format!("  {from} -> {to}{pairs}"))?;
        for change in &group.changes {
            changed(change, out)?;
        }
    }
    more("  ", reach.more, " groups of pairs", out)?;
    for cut in &reach.cut {
        let label = out.paint(Hue::Warn, "not all");
        out.line(format!("  {label}: {}", clean(cut)))?;
    }
    Ok(out.line("")?)
}

fn pairs(group: &ReachGroup) -> String {
    if group.pairs == 1 {
        return String::new();
    }
    format!("  ({} pairs)", group.pairs)
}

fn ends(ends: &[End], more: usize) -> String {
    let names = ends.iter().map(|end| {
        let after = clean(&end.after.join("+"));
        match &end.before {
            Some(before) => format!("{after} (was {})", clean(&before.join("+"))),
            None => after,
        }
    });
    let mut text = Vec::from_iter(names).join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

fn changed(change: &ReachChange, out: &mut Out) -> Result<(), Failure> {
    let (sign, hue) = match (change.before.passes(), change.after.passes()) {
        (true, false) => ('-', Hue::Bad),
        (false, true) => ('+', Hue::Good),
        _ => ('~', Hue::Warn),
    };
    let sign = out.paint(hue, &sign.to_string());
    let mut services = clean(&change.services.join(", "));
    if change.more > 0 {
        services.push_str(&format!(" and {} more", change.more));
    }
    let (before, after) = (change.before.name(), change.after.name());
    out.line(format!("    {sign} {services}: {before} -> {after}"))?;
    let example = &change.example;
    let why = format!(
        "        {} -> {} {}: {} -> {}",
        example.from,
        example.to,
        clean(&example.service),
        because(&example.before),
        because(&example.after),
    );
    let why = out.paint(Hue::Dim, &why);
    Ok(out.line(why)?)
}

/// `allowed by rule app-to-db (policy.yaml:12)`.
pub(super) fn because(because: &Because) -> String {
    let outcome = because.outcome.name();
    let place = place(because.file.as_deref(), because.line);
    if let Some(rule) = &because.rule {
        return format!("{outcome} by rule {} ({place})", clean(rule));
    }
    if let Some(segment) = &because.segment {
        return match because.reason.as_str() {
            "default_deny" => format!("{outcome} by default of {} ({place})", clean(segment)),
            other => format!(
                "{outcome}: {} ({}, {place})",
                other.replace('_', " "),
                clean(segment)
            ),
        };
    }
    match because.reason.as_str() {
        "unsegmented" => format!("{outcome}, no segment guards it"),
        other => format!("{outcome}: {}", other.replace('_', " ")),
    }
}

/// Live flows that do not go on as they do now.
pub(super) fn flow_changes(flows: &FlowChanges, out: &mut Out) -> Result<(), Failure> {
    let cut = "live flows that would be cut";
    changed_flows(cut, Hue::Bad, '-', flows.cut, &flows.cut_flows, out)?;
    let observed = "live flows that would be recorded as WOULD_DENY";
    let list = &flows.would_deny_flows;
    changed_flows(observed, Hue::Warn, '~', flows.would_deny, list, out)?;
    if let Some(error) = &flows.error {
        let label = out.paint(Hue::Warn, "live flows could not be judged");
        out.line(format!("{label}: {}\n", clean(error)))?;
    }
    Ok(())
}

fn changed_flows(
    name: &str,
    hue: Hue,
    sign: char,
    total: u64,
    flows: &[ChangedFlow],
    out: &mut Out,
) -> Result<(), Failure> {
    if total == 0 {
        return Ok(());
    }
    title(&format!("{name}: {total}"), out)?;
    for changed in flows.iter().take(SHOWN) {
        let sign = out.paint(hue, &sign.to_string());
        let facts = out.paint(Hue::Dim, &facts(&changed.flow));
        out.line(format!("  {sign} {}  {facts}", tuple(&changed.flow)))?;
        let (now, then) = (because(&changed.flow.now), because(&changed.then));
        out.line(format!("      {now} -> {then}"))?;
    }
    let listed = flows.len().min(SHOWN);
    let left = usize::try_from(total).unwrap_or(usize::MAX) - listed;
    let hint = format!(" (-o json lists {})", flows.len());
    let hint = if flows.len() > SHOWN {
        hint.as_str()
    } else {
        ""
    };
    more("  ", left, hint, out)?;
    Ok(out.line("")?)
}

/// `10.1.0.2:40000 -> 10.2.0.2:5432 tcp`.
pub(super) fn tuple(flow: &LiveFlow) -> String {
    let end = |ip: std::net::IpAddr, port: Option<u16>| match port {
        Some(port) => std::net::SocketAddr::new(ip, port).to_string(),
        None => ip.to_string(),
    };
    let what = if flow.to_port.is_some() {
        &flow.protocol
    } else {
        &flow.service
    };
    let (from, to) = (end(flow.from, flow.from_port), end(flow.to, flow.to_port));
    format!("{from} -> {to} {}", clean(what))
}

/// `answered, idle 2 s, 12 packets, 3 kB`.
pub(super) fn facts(flow: &LiveFlow) -> String {
    let state = clean(&flow.state.replace('_', " "));
    let idle = flow
        .idle
        .map_or_else(String::new, |s| format!(", idle {s} s"));
    let packets = count(flow.packets as usize, "packet");
    format!("{state}{idle}, {packets}, {}", bytes(flow.bytes))
}

fn bytes(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")];
    let unit = UNITS.iter().find(|(size, _)| bytes >= *size);
    match unit {
        Some((size, unit)) => format!("{}.{} {unit}", bytes / size, bytes % size * 10 / size),
        None => format!("{bytes} B"),
    }
}
