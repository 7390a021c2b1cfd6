//! `rules:` and `tests:`.

use std::collections::BTreeMap;

use super::{
    context::File,
    lower::{Lowering, Target},
    names,
    raw::Node,
    segments::test_address,
    services,
};
use crate::policy::{
    diag::{Span, shown},
    model::{Action, Endpoints, Expect, FlowQuery, Group, Origin, PolicyTest, Rule, Service},
};

pub(super) fn rules(lowering: &mut Lowering<'_>, groups: &[Group]) -> Vec<Rule> {
    let written = std::mem::take(&mut lowering.rules);
    let mut named: BTreeMap<String, Origin> = BTreeMap::new();
    written
        .iter()
        .filter_map(|(file, node)| rule(lowering, groups, &mut named, file, node))
        .collect()
}

fn rule<'a>(
    lowering: &mut Lowering<'a>,
    groups: &[Group],
    named: &mut BTreeMap<String, Origin>,
    file: &File,
    node: &'a Node,
) -> Option<Rule> {
    let known = ["name", "from", "to", "services", "action"];
    let later = ["expires", "schedule", "session"];
    let fields = lowering
        .findings
        .fields(file, node, "a rule", &known, &later)?;
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
    Some(Rule {
        name: name?,
        from: from?,
        to: to?,
        services: services?,
        action,
        origin: file.origin(fields.span),
    })
}

fn rule_name(
    lowering: &mut Lowering<'_>,
    named: &mut BTreeMap<String, Origin>,
    file: &File,
    node: &Node,
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
    named.insert(name.to_owned(), file.origin(node.span));
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
        for service in service(lowering, file, item, text).unwrap_or_default() {
            if !list.contains(&service) {
                list.push(service);
            }
        }
    }
    list
}

/// What one name or literal stands for; reported when nothing.
fn service<'a>(
    lowering: &mut Lowering<'a>,
    file: &File,
    item: &Node,
    text: &'a str,
) -> Option<Vec<Service>> {
    match services::literal_or_catalogue(text) {
        Ok(Some(found)) => Some(found),
        Err(problem) => {
            lowering.findings.problem(file, item.span, problem);
            None
        }
        Ok(None) => {
            lowering.used.insert(text);
            if let Some((found, ..)) = lowering.services.get(text) {
                return Some(found.clone());
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
    let known = ["from", "to", "service", "expect"];
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
        origin: file.origin(fields.span),
    })
}
