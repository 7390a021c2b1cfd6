//! `rules:` and `tests:`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    address::Problem,
    context::{File, Findings},
    lower::{Lowering, MAX_EXPANDED, Target},
    names,
    raw::{Node, Value},
    read::Reading,
    reuse::{Kept, Names, Part},
    segments::test_address,
    services, time,
};
use crate::policy::{
    diag::{Span, shown},
    model::{
        Action, Endpoints, Expect, FlowQuery, Group, Origin, PolicyTest, Rule, Rules, Service,
        Session,
    },
};

pub(super) fn rules(
    lowering: &mut Lowering<'_>,
    groups: &[Group],
    readings: &[Arc<Reading>],
    kept: &Kept,
) -> (Rules, Kept) {
    let written = std::mem::take(&mut lowering.rules);
    let names = Names::of(lowering, groups);
    let files = written
        .iter()
        .filter_map(|(file, nodes)| Some((readings.get(file.index)?, *nodes)));
    let files: Vec<(&Arc<Reading>, &[Node])> = files.collect();
    let known = kept.find(&names, &files);
    let mut named: HashMap<&str, Origin> = HashMap::new();
    let (mut rules, mut parts) = (Rules::default(), Vec::new());
    for (((file, nodes), (reading, _)), known) in written.iter().zip(files).zip(known) {
        if let Some(part) = known
            && lowering.expanded.saturating_add(part.expanded) <= MAX_EXPANDED
        {
            lowering.expanded += part.expanded;
            lowering.uses(&part.used);
            rules.push_part(Arc::clone(&part.rules));
            parts.push(part.clone());
            continue;
        }
        let (found, expanded) = (lowering.findings.count(), lowering.expanded);
        let used = std::mem::take(&mut lowering.used);
        let of_file = nodes.iter();
        let of_file: Vec<Rule> = of_file
            .filter_map(|node| rule(lowering, groups, &mut named, file, node))
            .collect();
        let expanded = lowering.expanded - expanded;
        let part = Part::new(reading, of_file, &lowering.used, expanded);
        lowering.used.extend(used);
        rules.push_part(Arc::clone(&part.rules));
        if lowering.findings.count() == found {
            parts.push(part);
        }
    }
    (rules, Kept::new(names, parts))
}

fn rule<'a>(
    lowering: &mut Lowering<'a>,
    groups: &[Group],
    named: &mut HashMap<&'a str, Origin>,
    file: &File,
    node: &'a Node,
) -> Option<Rule> {
    let known = [
        "name", "from", "to", "services", "action", "expires", "session",
    ];
    let fields = lowering
        .findings
        .fields(file, node, "a rule", &known, &["schedule"])?;
    let name = lowering
        .findings
        .required(file, &fields, "name")
        .and_then(|node| rule_name(lowering, named, file, node));
    let from = lowering.findings.required(file, &fields, "from");
    let from = from.map(|node| side(lowering, groups, file, node, "`from`"));
    let to = lowering.findings.required(file, &fields, "to");
    let to = to.map(|node| side(lowering, groups, file, node, "`to`"));
    let services = lowering.findings.required(file, &fields, "services");
    let services = services.map(|node| service_list(lowering, file, node));
    let words = [("allow", Action::Allow), ("deny", Action::Deny)];
    let action = match fields.get("action") {
        Some(node) => lowering.findings.choice(file, node, "action", &words)?,
        None => Action::Allow,
    };
    let findings = &mut lowering.findings;
    let expires = fields
        .get("expires")
        .and_then(|node| instant(findings, file, node));
    let session = fields
        .get("session")
        .and_then(|node| session(findings, file, node, action));
    Some(Rule {
        name: name?,
        from: from?,
        to: to?,
        services: services?,
        action,
        expires,
        session,
        origin: file.origin(fields.span),
    })
}

/// Reads a word; what is wrong with it is reported.
fn word<T>(
    findings: &mut Findings,
    file: &File,
    node: &Node,
    what: &str,
    parse: fn(&str) -> Result<T, Problem>,
) -> Option<T> {
    let text = findings.text(file, node, what)?;
    match parse(text) {
        Ok(value) => Some(value),
        Err(problem) => {
            findings.problem(file, node.span, problem);
            None
        }
    }
}

fn instant(findings: &mut Findings, file: &File, node: &Node) -> Option<u64> {
    word(findings, file, node, "an instant", time::instant)
}

fn session(findings: &mut Findings, file: &File, node: &Node, action: Action) -> Option<Session> {
    let fields = findings.fields(file, node, "`session`", &["max", "idle"], &[])?;
    if matches!(&node.value, Value::Map(entries) if entries.is_empty()) {
        findings.empty(file, node.span, "`session`");
    }
    if action == Action::Deny {
        let message = "a deny rule admits nothing that `session` could bound";
        let help = "remove it, or end the rule itself with `expires`";
        findings.push(file, file.error("E0505", node.span, message).help(help));
        return None;
    }
    let mut bound = |key| {
        let node = fields.get(key)?;
        word(findings, file, node, "a duration", time::duration)
    };
    let session = Session {
        max: bound("max"),
        idle: bound("idle"),
    };
    if let (Some(max), Some(idle), Some(node)) = (session.max, session.idle, fields.get("idle"))
        && idle > max
    {
        let message = "`idle` is longer than `max`, so it never ends a session";
        let help = "make it shorter, or leave it out";
        findings.push(file, file.error("E0504", node.span, message).help(help));
    }
    (session.max.is_some() || session.idle.is_some()).then_some(session)
}

fn rule_name<'a>(
    lowering: &mut Lowering<'a>,
    named: &mut HashMap<&'a str, Origin>,
    file: &File,
    node: &'a Node,
) -> Option<String> {
    let name = lowering.findings.text(file, node, "a name")?;
    if let Err(problem) = names::check(name) {
        lowering.findings.problem(file, node.span, problem);
        return None;
    }
    if let Some(first) = named.get(name) {
        let message = format!("the rule {} is declared twice", shown(name));
        let note = format!("first declared at {first}");
        lowering
            .findings
            .push(file, file.error("E0113", node.span, message).note(note));
        return None;
    }
    named.insert(name, file.origin(node.span));
    Some(name.to_owned())
}

fn side<'a>(
    lowering: &mut Lowering<'a>,
    groups: &[Group],
    file: &File,
    node: &'a Node,
    what: &str,
) -> Endpoints {
    let mut side = Endpoints::default();
    let mut seen: BTreeMap<&str, Span> = BTreeMap::new();
    let items = lowering.findings.list(file, node, what).unwrap_or_default();
    for item in items {
        let expected = "the name of a segment or group";
        let Some(name) = lowering.findings.text(file, item, expected) else {
            continue;
        };
        if seen.insert(name, item.span).is_some() {
            let message = format!("{} is listed twice", shown(name));
            lowering
                .findings
                .push(file, file.warning("W0001", item.span, message));
            continue;
        }
        match name {
            "any" => side.any = true,
            "unsegmented" => side.unsegmented = true,
            "host" => side.host = true,
            "multicast" => side.multicast = true,
            _ => match lowering.target(file, item.span, name) {
                Some(Target::Segment(id)) => {
                    side.segments.insert(id);
                }
                Some(Target::Group(index)) => {
                    lowering.used.insert(name);
                    if let Some(group) = groups.get(index)
                        && lowering.may_expand(file, item.span, group.members.len())
                    {
                        side.segments.extend(&group.members);
                    }
                }
                None => {}
            },
        }
    }
    if let (Some(span), true) = (seen.get("any"), items.len() > 1) {
        let message =
            format!("`any` in {what} matches every address, the others add nothing to it");
        let mut found = file.warning("W0002", *span, message);
        found.help = Some("name either `any` or the segments".to_owned());
        lowering.findings.push(file, found);
    }
    side
}

fn service_list<'a>(lowering: &mut Lowering<'a>, file: &File, node: &'a Node) -> Vec<Service> {
    let mut list: Vec<Service> = Vec::new();
    let mut listed: BTreeSet<Service> = BTreeSet::new();
    let mut seen: BTreeMap<&str, Span> = BTreeMap::new();
    let items = lowering
        .findings
        .list(file, node, "`services`")
        .unwrap_or_default();
    for item in items {
        let Some(text) = lowering.findings.text(file, item, "a service") else {
            continue;
        };
        if seen.insert(text, item.span).is_some() {
            let message = format!("{} is listed twice", shown(text));
            lowering
                .findings
                .push(file, file.warning("W0001", item.span, message));
            continue;
        }
        let Some(found) = service(lowering, file, item, text) else {
            continue;
        };
        if !lowering.may_expand(file, item.span, found.len()) {
            continue;
        }
        // What one name stands for repeats nothing.
        if list.is_empty() {
            list.extend(found.iter());
            continue;
        }
        if listed.is_empty() {
            listed.extend(&list);
        }
        list.extend(found.iter().filter(|service| listed.insert(**service)));
    }
    list
}

/// What one name or literal stands for; reported when nothing.
fn service<'a>(
    lowering: &mut Lowering<'a>,
    file: &File,
    item: &Node,
    text: &'a str,
) -> Option<Arc<[Service]>> {
    match services::literal_or_catalogue(text) {
        Ok(Some(found)) => Some(found.into()),
        Err(problem) => {
            lowering.findings.problem(file, item.span, problem);
            None
        }
        Ok(None) => {
            lowering.used.insert(text);
            if let Some((found, ..)) = lowering.services.get(text) {
                return Some(Arc::clone(found));
            }
            lowering.unknown_service(file, item.span, text);
            None
        }
    }
}

pub(super) fn tests(lowering: &mut Lowering<'_>) -> Vec<PolicyTest> {
    let written = std::mem::take(&mut lowering.tests);
    written
        .iter()
        .filter_map(|(file, node)| test(lowering, file, node))
        .collect()
}

fn test<'a>(lowering: &mut Lowering<'a>, file: &File, node: &'a Node) -> Option<PolicyTest> {
    let known = ["from", "to", "service", "expect", "at"];
    let fields = lowering
        .findings
        .fields(file, node, "a test", &known, &[])?;
    let from = lowering.findings.required(file, &fields, "from");
    let src = from.and_then(|node| test_address(lowering, file, node));
    let to = lowering.findings.required(file, &fields, "to");
    let dst = to.and_then(|node| test_address(lowering, file, node));
    let written = lowering.findings.required(file, &fields, "service");
    let written = written.and_then(|node| {
        let text = lowering.findings.text(file, node, "a service")?;
        Some((node, text, service(lowering, file, node, text)?))
    });
    let words = [("allow", Expect::Allow), ("deny", Expect::Deny)];
    let expect = lowering.findings.required(file, &fields, "expect");
    let expect = expect.and_then(|node| lowering.findings.choice(file, node, "expect", &words));
    let at = match fields.get("at") {
        Some(node) => Some(instant(&mut lowering.findings, file, node)?),
        None => None,
    };
    let (src, dst, (node, text, list)) = (src?, dst?, written?);
    if src.is_ipv4() != dst.is_ipv4() {
        let message = format!("the test mixes IPv4 and IPv6: {src} and {dst}");
        lowering
            .findings
            .push(file, file.error("E0206", to?.span, message));
        return None;
    }
    let (protocol, selector) = match services::point(text, &list, src) {
        Ok(point) => point,
        Err(problem) => {
            lowering.findings.problem(file, node.span, problem);
            return None;
        }
    };
    Some(PolicyTest {
        query: FlowQuery {
            src,
            dst,
            protocol,
            selector,
        },
        service: text.to_owned(),
        expect: expect?,
        at,
        origin: file.origin(fields.span),
    })
}
