//! Rules of files that are as they were, while the names in them stand for what they stood for: they
//! need not be given their meaning again. A policy of 100 000 rules is looked at whenever an address
//! comes or goes.

use std::{
    collections::BTreeSet,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use super::{
    lower::{Lowering, Target},
    raw::{Node, Value},
    read::Reading,
};
use crate::policy::model::{Group, Rule, SegmentId, Service};

/// The rules of a policy without mistakes, file by file.
#[derive(Clone, Debug, Default)]
pub(super) struct Kept(Arc<Content>);

#[derive(Debug, Default)]
struct Content {
    names: Names,
    parts: Vec<Part>,
}

/// What the names in rules stand for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    targets: Vec<(Box<str>, Target)>,
    groups: Vec<BTreeSet<SegmentId>>,
    services: Vec<(Box<str>, Arc<[Service]>)>,
}

/// The rules of one file, of which there was nothing to report.
#[derive(Clone, Debug)]
pub(super) struct Part {
    reading: Arc<Reading>,
    pub rules: Arc<[Rule]>,
    /// Hashes of their names, ascending.
    hashes: Arc<[u64]>,
    /// Groups and declared services that they name.
    pub used: Arc<BTreeSet<Box<str>>>,
    /// Memberships and services that they stand for.
    pub expanded: usize,
}

fn hash(name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

impl Names {
    pub(super) fn of(lowering: &Lowering<'_>, groups: &[Group]) -> Self {
        let targets = lowering.targets.iter();
        let services = lowering.services.iter();
        Self {
            targets: targets.map(|(name, (t, _))| ((*name).into(), *t)).collect(),
            groups: groups.iter().map(|group| group.members.clone()).collect(),
            services: services
                .map(|(name, (list, ..))| ((*name).into(), Arc::clone(list)))
                .collect(),
        }
    }
}

impl Part {
    pub(super) fn new(
        reading: &Arc<Reading>,
        rules: Vec<Rule>,
        used: &BTreeSet<&str>,
        expanded: usize,
    ) -> Self {
        let mut hashes: Vec<u64> = rules.iter().map(|rule| hash(&rule.name)).collect();
        hashes.sort_unstable();
        Self {
            reading: Arc::clone(reading),
            rules: rules.into(),
            hashes: hashes.into(),
            used: Arc::new(used.iter().map(|name| (*name).into()).collect()),
            expanded,
        }
    }
}

impl Kept {
    /// Of one policy: no two of its rules have the same name.
    pub(super) fn new(names: Names, parts: Vec<Part>) -> Self {
        Self(Arc::new(Content { names, parts }))
    }

    /// What is known of the rules of each of these files. All of it or nothing where one of the
    /// others may have a rule of the same name: that is for the one who reports it.
    pub(super) fn find(
        &self,
        names: &Names,
        files: &[(&Arc<Reading>, &[Node])],
    ) -> Vec<Option<&Part>> {
        let none = || vec![None; files.len()];
        if *names != self.0.names {
            return none();
        }
        // Two files that read alike under one name: their rules have the same names.
        let twice = |(at, (reading, _)): (usize, &(&Arc<Reading>, &[Node]))| {
            let mut before = files.iter().take(at);
            before.any(|(other, _)| Arc::ptr_eq(other, reading))
        };
        if files.iter().enumerate().any(twice) {
            return none();
        }
        let known = files.iter().map(|(reading, _)| {
            let mut parts = self.0.parts.iter();
            parts.find(|part| Arc::ptr_eq(&part.reading, reading))
        });
        let known: Vec<Option<&Part>> = known.collect();
        let others = files
            .iter()
            .zip(&known)
            .filter(|(_, known)| known.is_none());
        let mut hashes = others.flat_map(|((_, rules), _)| rules.iter().filter_map(name).map(hash));
        let taken = |hash: u64| {
            let mut parts = known.iter().flatten();
            parts.any(|part| part.hashes.binary_search(&hash).is_ok())
        };
        if hashes.any(taken) { none() } else { known }
    }
}

/// What a rule calls itself.
fn name(rule: &Node) -> Option<&str> {
    let Value::Map(entries) = &rule.value else {
        return None;
    };
    let (_, node) = entries.iter().find(|(key, _)| &*key.text == "name")?;
    match &node.value {
        Value::Scalar { text, .. } => Some(text),
        Value::Seq(_) | Value::Map(_) | Value::Members(_) => None,
    }
}
