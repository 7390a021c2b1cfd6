//! `segments:`: names for sets of addresses.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    address::{self, Problem},
    context::{File, Findings},
    lower::{Declared, Lowering, MODES},
    overlap,
    raw::{Node, Value},
};
use crate::policy::{
    diag::{is_unprintable, shown},
    model::{AddrRange, Member, Mode, Protect, Segment},
    pattern::Pattern,
};

const PROTECTS: [(&str, Protect); 3] = [
    ("both", Protect::Both),
    ("inbound", Protect::Inbound),
    ("outbound", Protect::Outbound),
];

pub(super) fn segments(lowering: &mut Lowering<'_>, default_mode: Mode) -> Vec<Segment> {
    let declared = std::mem::take(&mut lowering.segments);
    let segments: Vec<Segment> = declared
        .iter()
        .map(|d| segment(&mut lowering.findings, d, default_mode))
        .collect();
    for (one, other) in overlap::without_common_interface(&segments) {
        let (Some(d), Some(other)) = (declared.get(one), segments.get(other)) else {
            continue;
        };
        let message = format!(
            "{} shares addresses with {}, but no word of its `interfaces`",
            shown(&d.key.text),
            shown(&other.name)
        );
        let help = "an address in both comes in only where both let it";
        let found = d.file.warning("W0005", d.key.span, message);
        let note = format!("{} is declared at {}", shown(&other.name), other.origin);
        lowering.findings.push(d.file, found.note(note).help(help));
    }
    segments
}

fn segment(findings: &mut Findings, declared: &Declared<'_>, default_mode: Mode) -> Segment {
    let Declared { file, key, node } = declared;
    let mut segment = Segment {
        name: key.text.to_string(),
        description: String::new(),
        members: Arc::default(),
        mode: default_mode,
        protect: Protect::Both,
        interfaces: Vec::new(),
        origin: declared.origin(),
    };
    let known = ["description", "members", "mode", "protect", "interfaces"];
    let Some(fields) = findings.fields(file, node, "a segment", &known, &[]) else {
        return segment;
    };
    if let Some(node) = fields.get("description") {
        let text = findings
            .text(file, node, "text for `description`")
            .unwrap_or_default();
        if text.chars().any(is_unprintable) {
            let message = "a description is one line of printable text";
            findings.push(file, file.error("E0004", node.span, message));
        }
        text.clone_into(&mut segment.description);
    }
    if let Some(node) = fields.get("mode") {
        segment.mode = findings
            .choice(file, node, "mode", &MODES)
            .unwrap_or(default_mode);
    }
    if let Some(node) = fields.get("protect") {
        segment.protect = findings
            .choice(file, node, "protect", &PROTECTS)
            .unwrap_or(Protect::Both);
    }
    if let Some(node) = fields.get("interfaces") {
        let mut seen = BTreeSet::new();
        for item in findings
            .list(file, node, "`interfaces`")
            .unwrap_or_default()
        {
            let Some(text) = findings.text(file, item, "the name of an interface") else {
                continue;
            };
            if !seen.insert(text) {
                let message = format!("{} is listed twice", shown(text));
                findings.push(file, file.warning("W0001", item.span, message));
                continue;
            }
            match text.parse::<Pattern>() {
                Ok(pattern) => segment.interfaces.push(pattern),
                Err(message) => {
                    let help = "`*` stands for any characters, `?` for one";
                    let found = file.error("E0209", item.span, message);
                    findings.push(file, found.help(help));
                }
            }
        }
    }
    if let Some(node) = findings.required(file, &fields, "members") {
        if let Value::Members(members) = &node.value {
            findings.absorb(file, &members.findings);
            segment.members = Arc::clone(&members.members);
        } else {
            // What is no list, or an empty one.
            findings.list(file, node, "`members`");
        }
    }
    segment
}

/// The members of a segment, and what is wrong with others.
#[derive(Debug, Default)]
pub(crate) struct Members {
    members: Arc<[Member]>,
    findings: Findings,
}

/// Gives the lists of members in a file their meaning, which depends on nothing else.
pub(super) fn condense(name: &Arc<str>, root: &mut Node) {
    let file = File {
        index: 0,
        name: Arc::clone(name),
    };
    each_value(root, "segments", |segments| {
        let Value::Map(segments) = &mut segments.value else {
            return;
        };
        for (_, segment) in segments {
            each_value(segment, "members", |node| {
                let Value::Seq(items) = &node.value else {
                    return;
                };
                if items.is_empty() {
                    return;
                }
                let mut findings = Findings::default();
                let members = items
                    .iter()
                    .filter_map(|item| member(&mut findings, &file, item))
                    .collect();
                node.value = Value::Members(Arc::new(Members { members, findings }));
            });
        }
    });
}

fn each_value(node: &mut Node, key: &str, mut act: impl FnMut(&mut Node)) {
    if let Value::Map(entries) = &mut node.value {
        for (_, value) in entries.iter_mut().filter(|(known, _)| &*known.text == key) {
            act(value);
        }
    }
}

fn member(findings: &mut Findings, file: &File, node: &Node) -> Option<Member> {
    let later = ["file", "dns", "workload", "pod"];
    let fields = findings.fields(file, node, "a member", &["cidr", "range", "except"], &later)?;
    let range = match (fields.get("cidr"), fields.get("range")) {
        (Some(node), None) => read(findings, file, node, "a prefix for `cidr`", address::prefix),
        (None, Some(node)) => read(findings, file, node, "a range for `range`", address::range),
        (Some(_), Some(_)) => {
            let message = "a member has either `cidr` or `range`, not both";
            let found = file.error("E0204", fields.span, message);
            findings.push(file, found.help("write two members"));
            None
        }
        (None, None) => {
            // A key that is refused already says what was meant.
            if fields.is_empty() && !is_empty_map(node) {
                return None;
            }
            let message = "a member needs `cidr` or `range`";
            findings.push(file, file.error("E0103", fields.span, message));
            None
        }
    };
    let mut except = Vec::new();
    if let Some(node) = fields.get("except") {
        for item in findings.list(file, node, "`except`").unwrap_or_default() {
            let what = "an address, a prefix or a range";
            let Some(cut) = read(findings, file, item, what, address::exception) else {
                continue;
            };
            if let Some(range) = &range
                && !range.contains_range(&cut)
            {
                outside(findings, file, item, range, &cut);
                continue;
            }
            except.push(cut);
        }
        if let Some(range) = &range
            && address::nothing_left(range, &except)
        {
            let message = "`except` leaves nothing of the member";
            findings.push(
                file,
                file.error("E0207", node.span, message)
                    .help("remove the member"),
            );
        }
    }
    Some(Member {
        range: range?,
        except,
        origin: file.origin(fields.span),
    })
}

fn is_empty_map(node: &Node) -> bool {
    matches!(&node.value, Value::Map(entries) if entries.is_empty())
}

fn outside(findings: &mut Findings, file: &File, item: &Node, range: &AddrRange, cut: &AddrRange) {
    let found = if address::same_family(range, cut) {
        let message = "the exception is not inside its member";
        let help =
            "an exception holds for its own member only; remove it or put it where it belongs";
        file.error("E0208", item.span, message).help(help)
    } else {
        let message = "the exception and its member are of different families";
        file.error("E0206", item.span, message)
            .help("IPv4 and IPv6 never overlap; remove it")
    };
    findings.push(file, found);
}

fn read(
    findings: &mut Findings,
    file: &File,
    node: &Node,
    what: &str,
    parse: fn(&str) -> Result<AddrRange, Problem>,
) -> Option<AddrRange> {
    let text = findings.text(file, node, what)?;
    match parse(text) {
        Ok(range) => Some(range),
        Err(problem) => {
            findings.problem(file, node.span, problem);
            None
        }
    }
}

/// A plain address, for `tests:`.
pub(super) fn test_address(
    lowering: &mut Lowering<'_>,
    file: &File,
    node: &Node,
) -> Option<std::net::IpAddr> {
    let text = lowering.findings.text(file, node, "an IP address")?;
    match address::address(text) {
        Ok(ip) => Some(ip),
        Err((code, message, mut help)) => {
            if lowering.targets.contains_key(text) {
                help = Some("a test names addresses: write one that the segment has".to_owned());
            }
            lowering
                .findings
                .problem(file, node.span, (code, message, help));
            None
        }
    }
}
