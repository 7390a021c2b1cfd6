//! `groups:`: names for sets of segments, nested at will.

use std::collections::BTreeSet;

use super::{
    lower::{Declared, Lowering, Target},
    names::BUILTINS,
};
use crate::policy::{
    diag::{Span, shown},
    model::{Group, SegmentId},
};

/// What a group lists, before nesting is resolved.
#[derive(Default)]
struct Listed {
    segments: BTreeSet<SegmentId>,
    /// Index of the inner group and where it is named.
    inner: Vec<(usize, Span)>,
}

/// All groups, in the order of their declaration, expanded to segments.
pub(super) fn groups<'a>(lowering: &mut Lowering<'a>) -> Vec<Group> {
    let declared = std::mem::take(&mut lowering.groups);
    let listed: Vec<Listed> = declared.iter().map(|d| listed(lowering, d)).collect();
    let expanded = expand(lowering, &declared, &listed);
    let groups = declared
        .iter()
        .zip(expanded)
        .map(|(d, members)| Group {
            name: d.key.text.to_string(),
            members,
            origin: d.origin(),
        })
        .collect();
    lowering.groups = declared;
    groups
}

fn listed<'a>(lowering: &mut Lowering<'a>, declared: &Declared<'a>) -> Listed {
    let Declared { file, key, node } = declared;
    let mut listed = Listed::default();
    let mut seen = BTreeSet::new();
    let what = format!("the group {}", shown(&key.text));
    for item in lowering
        .findings
        .list(file, node, &what)
        .unwrap_or_default()
    {
        let what = "the name of a segment or group";
        let Some(name) = lowering.findings.text(file, item, what) else {
            continue;
        };
        if BUILTINS.contains(&name) {
            let message = format!("{} cannot be part of a group", shown(name));
            let found = file.error("E0115", item.span, message);
            lowering
                .findings
                .push(file, found.help("name it in the rules themselves"));
            continue;
        }
        if !seen.insert(name) {
            let message = format!("{} is listed twice", shown(name));
            lowering
                .findings
                .push(file, file.warning("W0001", item.span, message));
            continue;
        }
        match lowering.target(file, item.span, name) {
            Some(Target::Segment(id)) => {
                listed.segments.insert(id);
            }
            Some(Target::Group(index)) => {
                lowering.used.insert(name);
                listed.inner.push((index, item.span));
            }
            None => {}
        }
    }
    listed
}

/// Inner groups first (Kahn's order), so that nesting of any depth needs no recursion.
fn expand(
    lowering: &mut Lowering<'_>,
    declared: &[Declared<'_>],
    listed: &[Listed],
) -> Vec<BTreeSet<SegmentId>> {
    let mut waiting: Vec<usize> = listed.iter().map(|l| l.inner.len()).collect();
    let mut outer: Vec<Vec<usize>> = vec![Vec::new(); listed.len()];
    for (index, list) in listed.iter().enumerate() {
        for (inner, _) in &list.inner {
            if let Some(of) = outer.get_mut(*inner) {
                of.push(index);
            }
        }
    }
    let mut members: Vec<BTreeSet<SegmentId>> = listed.iter().map(|l| l.segments.clone()).collect();
    let mut ready: Vec<usize> = waiting
        .iter()
        .enumerate()
        .filter(|(_, n)| **n == 0)
        .map(|(i, _)| i)
        .collect();
    while let Some(index) = ready.pop() {
        let finished = members.get(index).cloned().unwrap_or_default();
        for to in outer.get(index).cloned().unwrap_or_default() {
            if let (Some(set), Some(d)) = (members.get_mut(to), declared.get(to))
                && lowering.may_expand(d.file, d.key.span, finished.len())
            {
                set.extend(&finished);
            }
            if let Some(count) = waiting.get_mut(to) {
                *count -= 1;
                if *count == 0 {
                    ready.push(to);
                }
            }
        }
    }
    let stuck: Vec<bool> = waiting.iter().map(|n| *n > 0).collect();
    cycles(lowering, declared, listed, &stuck);
    members
}

/// Reports each circle among the groups that never became ready, once.
fn cycles(
    lowering: &mut Lowering<'_>,
    declared: &[Declared<'_>],
    listed: &[Listed],
    stuck: &[bool],
) {
    let is_stuck = |i: usize| stuck.get(i).copied().unwrap_or(false);
    let mut visited = vec![false; listed.len()];
    for start in 0..listed.len() {
        // Every stuck group has a stuck inner one: following them must end in a circle.
        let mut path: Vec<(usize, Span)> = Vec::new();
        let mut at = start;
        while is_stuck(at) && !visited.get(at).copied().unwrap_or(true) {
            if let Some(seen) = visited.get_mut(at) {
                *seen = true;
            }
            let next = listed
                .get(at)
                .and_then(|l| l.inner.iter().find(|(i, _)| is_stuck(*i)));
            let Some((next, span)) = next else { break };
            path.push((at, *span));
            at = *next;
        }
        let Some(begin) = path.iter().position(|(i, _)| *i == at) else {
            continue;
        };
        let circle = path.get(begin..).unwrap_or_default();
        let name = |i: usize| declared.get(i).map_or("", |d| &*d.key.text);
        let mut names: Vec<&str> = circle.iter().take(8).map(|(i, _)| name(*i)).collect();
        if circle.len() > names.len() {
            names.push("…");
        }
        names.push(name(at));
        if let (Some((first, span)), Some(d)) = (circle.first(), declared.get(at)) {
            let message = format!("the group {} contains itself", shown(name(*first)));
            let found = d
                .file
                .error("E0114", *span, message)
                .note(names.join(" -> "));
            lowering.findings.push(d.file, found);
        }
    }
}
