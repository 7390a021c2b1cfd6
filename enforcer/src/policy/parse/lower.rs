//! From trees to a policy: first every declaration of every file, then what they refer to.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    ParseOutcome,
    context::{Fields, File, Findings},
    groups, names,
    raw::{Key, Node, Value},
    read::Reading,
    reuse::Kept,
    rules, segments, services,
};
use crate::policy::{
    diag::{Diagnostic, Span, shown},
    model::{Defaults, Mode, Origin, Policy, SegmentId, Service, Unsegmented},
};

const TOP: [&str; 7] = [
    "version", "defaults", "services", "segments", "groups", "rules", "tests",
];

pub(super) const MODES: [(&str, Mode); 3] = [
    ("enforce", Mode::Enforce),
    ("observe", Mode::Observe),
    ("off", Mode::Off),
];

/// Memberships and services that groups and rules may expand to, in all: bounds the memory a policy can ask for.
pub(super) const MAX_EXPANDED: usize = 4_000_000;

/// A named thing and its body, as written.
pub(super) struct Declared<'a> {
    pub file: &'a File,
    pub key: &'a Key,
    pub node: &'a Node,
}

impl Declared<'_> {
    pub fn origin(&self) -> Origin {
        self.file.origin(self.key.span)
    }
}

/// What a name of a segment or group stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Segment(SegmentId),
    /// Index into the groups.
    Group(usize),
}

/// All declarations, and what was found on the way.
#[derive(Default)]
pub(super) struct Lowering<'a> {
    pub findings: Findings,
    /// Some file could not be read: names that look unknown may be declared there.
    pub partial: bool,
    pub segments: Vec<Declared<'a>>,
    pub groups: Vec<Declared<'a>>,
    pub targets: BTreeMap<&'a str, (Target, Origin)>,
    pub services: BTreeMap<&'a str, (Arc<[Service]>, &'a File, Span)>,
    pub rules: Vec<(&'a File, &'a [Node])>,
    pub tests: Vec<(&'a File, &'a Node)>,
    service_bodies: Vec<Declared<'a>>,
    defaults: Option<(Defaults, Origin)>,
    /// Services and groups that something refers to.
    pub used: BTreeSet<&'a str>,
    pub expanded: usize,
}

/// `kept` is what an earlier call has returned, and spares work; it changes nothing else.
pub(super) fn lower(
    readings: &[Arc<Reading>],
    kept: &Kept,
) -> Result<(ParseOutcome, Kept), Vec<Diagnostic>> {
    let files: Vec<File> = readings
        .iter()
        .enumerate()
        .map(|(index, reading)| File {
            index,
            name: Arc::clone(&reading.name),
        })
        .collect();
    if files.is_empty() {
        let none = "there is no policy file";
        let found = Diagnostic::error("E0006", "(no file)", Span::START, none.to_owned());
        return Err(vec![
            found.help("a policy is one or more files named `*.yaml` or `*.yml`"),
        ]);
    }

    let mut findings = Findings::default();
    let mut partial = false;
    let mut trees: Vec<(&File, &Node)> = Vec::new();
    for (file, reading) in files.iter().zip(readings) {
        match &reading.tree {
            Ok(Some(tree)) => trees.push((file, tree)),
            Ok(None) => {
                let empty = file.error("E0006", Span::START, "the file is empty");
                findings.push(file, empty.help("a policy file starts with `version: 1`"));
            }
            Err(broken) => {
                partial = true;
                let note = "the rest of this file was not checked";
                findings.push(file, (**broken).clone().note(note));
            }
        }
    }

    let mut lowering = Lowering {
        findings,
        partial,
        ..Lowering::default()
    };
    for (file, tree) in &trees {
        lowering.declare(file, tree);
    }
    lowering.resolve_services();
    let (policy, kept) = lowering.policy(readings, kept);
    lowering.warn(&policy, trees.first().map(|(file, _)| *file));
    let warnings = lowering.findings.finish()?;
    Ok((ParseOutcome { policy, warnings }, kept))
}

impl<'a> Lowering<'a> {
    fn policy(&mut self, readings: &[Arc<Reading>], kept: &Kept) -> (Policy, Kept) {
        let defaults = match &self.defaults {
            Some((defaults, _)) => *defaults,
            None => DEFAULTS,
        };
        let segments = segments::segments(self, defaults.mode);
        let groups = groups::groups(self);
        let (rules, kept) = rules::rules(self, &groups, readings, kept);
        let tests = rules::tests(self);
        let policy = Policy {
            defaults,
            segments,
            groups,
            rules,
            tests,
        };
        (policy, kept)
    }

    /// Takes in the declarations of one file.
    fn declare(&mut self, file: &'a File, tree: &'a Node) {
        let Some(top) = self
            .findings
            .fields(file, tree, "a policy file", &TOP, &["invariants"])
        else {
            return;
        };
        self.version(file, &top);
        if let Some(node) = top.get("defaults") {
            self.defaults(file, node);
        }
        for declared in self.named(file, &top, "segments") {
            let id = SegmentId(u32::try_from(self.segments.len()).unwrap_or(u32::MAX));
            if self.name_target(&declared, Target::Segment(id)) {
                self.segments.push(declared);
            }
        }
        for declared in self.named(file, &top, "groups") {
            if self.name_target(&declared, Target::Group(self.groups.len())) {
                self.groups.push(declared);
            }
        }
        let services = self.named(file, &top, "services");
        self.service_bodies.extend(services);
        let mut items = |key| {
            let what = format!("`{key}`");
            let node = top.get(key)?;
            self.findings.list(file, node, &what)
        };
        let (rules, tests) = (items("rules"), items("tests"));
        self.rules.extend(rules.map(|rules| (file, rules)));
        let tests = tests.unwrap_or_default();
        self.tests.extend(tests.iter().map(|test| (file, test)));
    }

    fn version(&mut self, file: &File, top: &Fields<'a>) {
        let Some(node) = self.findings.required(file, top, "version") else {
            return;
        };
        let one = matches!(&node.value, Value::Scalar { text, plain: true } if &**text == "1");
        if !one {
            let message = "this version of the enforcer reads `version: 1` only";
            self.findings.push(
                file,
                file.error("E0110", node.span, message)
                    .help("write `version: 1`"),
            );
        }
    }

    fn defaults(&mut self, file: &File, node: &Node) {
        let keys = ["mode", "unsegmented"];
        let Some(fields) = self.findings.fields(file, node, "`defaults`", &keys, &[]) else {
            return;
        };
        if fields.is_empty() && matches!(&node.value, Value::Map(entries) if entries.is_empty()) {
            self.findings.empty(file, node.span, "`defaults`");
        }
        if let Some((_, first)) = &self.defaults {
            let found = file.error("E0117", node.span, "`defaults` is written in a second file");
            let found = found.note(format!("first written at {first}"));
            self.findings.push(
                file,
                found.help("keep one of them: it holds for the whole policy"),
            );
            return;
        }
        let mut defaults = DEFAULTS;
        if let Some(node) = fields.get("mode") {
            defaults.mode = self
                .findings
                .choice(file, node, "mode", &MODES)
                .unwrap_or(defaults.mode);
        }
        if let Some(node) = fields.get("unsegmented") {
            let words = [("allow", Unsegmented::Allow), ("deny", Unsegmented::Deny)];
            let fallback = defaults.unsegmented;
            defaults.unsegmented = self
                .findings
                .choice(file, node, "unsegmented", &words)
                .unwrap_or(fallback);
        }
        self.defaults = Some((defaults, file.origin(node.span)));
    }

    /// The entries of a section that maps names to bodies; bad names are reported and kept, so that
    /// what refers to them is not reported as well.
    fn named(&mut self, file: &'a File, top: &Fields<'a>, section: &str) -> Vec<Declared<'a>> {
        let Some(node) = top.get(section) else {
            return Vec::new();
        };
        let what = format!("`{section}`");
        let entries = self.findings.entries(file, node, &what).unwrap_or_default();
        if matches!(&node.value, Value::Map(entries) if entries.is_empty()) {
            self.findings.empty(file, node.span, &what);
        }
        for (key, _) in &entries {
            if let Err(problem) = names::check(&key.text) {
                self.findings.problem(file, key.span, problem);
            }
        }
        entries
            .into_iter()
            .map(|(key, node)| Declared { file, key, node })
            .collect()
    }

    /// Registers a segment's or group's name; `false` if it is taken.
    fn name_target(&mut self, declared: &Declared<'a>, target: Target) -> bool {
        let name = declared.key.text.as_ref();
        if let Some((other, origin)) = self.targets.get(name) {
            let kind = match other {
                Target::Segment(_) => "segment",
                Target::Group(_) => "group",
            };
            let message = format!("the name {} is taken by a {kind}", shown(name));
            let found = declared.file.error("E0113", declared.key.span, message);
            let found = found.note(format!("first declared at {origin}"));
            let help = "segments and groups share their names over all files";
            self.findings.push(declared.file, found.help(help));
            return false;
        }
        self.targets.insert(name, (target, declared.origin()));
        true
    }

    /// Reads the user's services, once all of their names are known.
    fn resolve_services(&mut self) {
        let bodies = std::mem::take(&mut self.service_bodies);
        let declared: BTreeSet<&str> = bodies.iter().map(|d| &*d.key.text).collect();
        for Declared { file, key, node } in bodies {
            let name = &*key.text;
            // A bad name was reported where it was declared; `any` is one of those.
            if name != "any" && matches!(services::literal_or_catalogue(name), Ok(Some(_))) {
                let message = format!("{} is a service of the catalogue", shown(name));
                let found = file.error("E0116", key.span, message);
                self.findings.push(
                    file,
                    found.help("choose another name, such as the application's"),
                );
                continue;
            }
            if let Some((_, first, span)) = self.services.get(name) {
                let message = format!("the service {} is declared twice", shown(name));
                let note = format!("first declared at {}", first.origin(*span));
                self.findings
                    .push(file, file.error("E0113", key.span, message).note(note));
                continue;
            }
            let mut list: Vec<Service> = Vec::new();
            let mut listed: BTreeSet<Service> = BTreeSet::new();
            let what = format!("the service {}", shown(name));
            for item in self.findings.list(file, node, &what).unwrap_or_default() {
                let Some(text) = self.findings.text(file, item, "a service") else {
                    continue;
                };
                match services::literal_or_catalogue(text) {
                    Ok(Some(found)) => {
                        list.extend(found.into_iter().filter(|service| listed.insert(*service)));
                    }
                    Err(problem) => self.findings.problem(file, item.span, problem),
                    Ok(None) if declared.contains(text) => {
                        let message = format!(
                            "a service cannot contain the declared service {}",
                            shown(text)
                        );
                        let found = file.error("E0118", item.span, message);
                        self.findings
                            .push(file, found.help("write out what it stands for"));
                    }
                    Ok(None) => self.unknown_service(file, item.span, text),
                }
            }
            self.services.insert(name, (list.into(), file, key.span));
        }
    }

    /// Reports a service nobody knows.
    pub fn unknown_service(&mut self, file: &File, span: Span, text: &str) {
        // It may be declared in the file that could not be read.
        if self.partial {
            return;
        }
        let mut found = file.error("E0108", span, format!("unknown service {}", shown(text)));
        if !self.findings.is_full() {
            found.help = services::unknown_name_help(text, self.services.keys().copied());
        }
        self.findings.push(file, found);
    }

    /// What a name of a segment or group stands for; reported when nothing does.
    pub fn target(&mut self, file: &File, span: Span, name: &str) -> Option<Target> {
        if let Some((target, _)) = self.targets.get(name) {
            return Some(*target);
        }
        if self.partial {
            return None;
        }
        let mut found = file.error(
            "E0107",
            span,
            format!("unknown segment or group {}", shown(name)),
        );
        if !self.findings.is_full() {
            found.help = self.target_help(name);
        }
        self.findings.push(file, found);
        None
    }

    fn target_help(&self, name: &str) -> Option<String> {
        if name.parse::<std::net::IpAddr>().is_ok() || name.contains('/') {
            return Some("name a segment here, and give it this address as a member".to_owned());
        }
        let candidates = self.targets.keys().copied().chain(names::BUILTINS);
        let near = names::closest(name, candidates)?;
        Some(match self.targets.get(near) {
            Some((_, origin)) => format!("did you mean `{near}` ({origin})?"),
            None => format!("did you mean `{near}`?"),
        })
    }

    /// Notes that something refers to these groups and services.
    pub fn uses(&mut self, names: &BTreeSet<Box<str>>) {
        for name in names {
            let group = self.targets.get_key_value(&**name).map(|(name, _)| *name);
            let service = self.services.get_key_value(&**name).map(|(name, _)| *name);
            self.used.extend(group.into_iter().chain(service));
        }
    }

    /// Counts memberships and services; `false` once there are too many, reported where that happened.
    pub fn may_expand(&mut self, file: &File, span: Span, count: usize) -> bool {
        let before = self.expanded;
        self.expanded = self.expanded.saturating_add(count);
        if before <= MAX_EXPANDED && self.expanded > MAX_EXPANDED {
            let message = format!(
                "groups and rules stand for more than {MAX_EXPANDED} memberships and services in all"
            );
            self.findings.push(file, file.error("E0002", span, message));
        }
        self.expanded <= MAX_EXPANDED
    }

    fn warn(&mut self, policy: &Policy, first: Option<&File>) {
        let services: Vec<_> = self
            .services
            .iter()
            .map(|(n, (_, f, s))| (*n, *f, *s))
            .collect();
        let groups = self
            .groups
            .iter()
            .map(|d| (&*d.key.text, d.file, d.key.span));
        let groups: Vec<_> = groups.collect();
        for (kind, list) in [("service", services), ("group", groups)] {
            for (name, file, span) in list {
                if !self.used.contains(name) {
                    let message = format!("the {kind} {} is never used", shown(name));
                    self.findings
                        .push(file, file.warning("W0003", span, message));
                }
            }
        }
        if let (true, Some(file)) = (policy.segments.is_empty(), first) {
            let message = "the policy has no segments, so it guards nothing";
            self.findings
                .push(file, file.warning("W0004", Span::START, message));
        }
    }
}

/// What holds where `defaults` is silent.
const DEFAULTS: Defaults = Defaults {
    mode: Mode::Enforce,
    unsegmented: Unsegmented::Allow,
};
