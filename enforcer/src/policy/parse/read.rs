//! Texts to trees, several at a time; those read before are not read again.

use std::{
    num::NonZero,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use super::{
    ParseOutcome, SourceFile, lower,
    raw::{self, Node, Refusal},
    reuse::Kept,
    segments,
};
use crate::policy::diag::Diagnostic;

/// What one file says, before names of other files are looked up.
#[derive(Debug)]
pub(super) struct Reading {
    pub name: Arc<str>,
    pub tree: Result<Option<Node>, Refusal>,
}

impl Reading {
    fn of(source: &SourceFile) -> Self {
        let name = Arc::from(source.name.as_str());
        let mut tree = raw::read(source);
        if let Ok(Some(root)) = &mut tree {
            segments::condense(&name, root);
        }
        Self { name, tree }
    }
}

/// What the files of a policy said when they were parsed last. A policy of a million members is
/// parsed in seconds; one of its files in a fraction of that.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    sources: Arc<Vec<SourceFile>>,
    readings: Vec<Arc<Reading>>,
    kept: Kept,
}

impl Cache {
    /// As [`super::parse_with_warnings`]; files that are as they were the last time are not read
    /// again.
    ///
    /// # Errors
    /// As [`super::parse_with_warnings`].
    pub fn parse(
        &mut self,
        sources: &Arc<Vec<SourceFile>>,
    ) -> Result<ParseOutcome, Vec<Diagnostic>> {
        let known = self.sources.iter().zip(&self.readings);
        let known: std::collections::BTreeMap<&str, _> = known
            .map(|(source, reading)| (source.name.as_str(), (&source.text, reading)))
            .collect();
        self.readings = read(sources, |source| {
            let (text, reading) = known.get(source.name.as_str())?;
            (**text == source.text).then(|| Arc::clone(reading))
        });
        self.sources = Arc::clone(sources);
        let (outcome, kept) = lower::lower(&self.readings, &self.kept)?;
        self.kept = kept;
        Ok(outcome)
    }
}

/// Bytes below which another thread costs more than it wins.
const THREADS_PAY: usize = 1 << 18;
/// No more gain: files are as large as 4 MiB.
const MOST_THREADS: usize = 8;

/// The readings of all files, those that `known` has not made by as many threads as there are
/// processors. In the order of the files, so it does not matter who read them.
pub(super) fn read(
    sources: &[SourceFile],
    known: impl Fn(&SourceFile) -> Option<Arc<Reading>>,
) -> Vec<Arc<Reading>> {
    let readings: Vec<OnceLock<Arc<Reading>>> = sources
        .iter()
        .map(|source| known(source).map_or_else(OnceLock::new, OnceLock::from))
        .collect();
    let missing = || {
        let all = sources.iter().zip(&readings);
        all.filter(|(_, reading)| reading.get().is_none())
    };
    let bytes: usize = missing().map(|(source, _)| source.text.len()).sum();
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let threads = if bytes < THREADS_PAY {
        1
    } else {
        processors.min(MOST_THREADS).min(missing().count())
    };
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let (Some(source), Some(reading)) = (sources.get(at), readings.get(at)) else {
                return;
            };
            reading.get_or_init(|| Arc::new(Reading::of(source)));
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    let all = readings.into_iter().zip(sources);
    all.map(|(reading, source)| {
        let reading = reading.into_inner();
        reading.unwrap_or_else(|| Arc::new(Reading::of(source)))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use proptest::{collection, prelude::*, sample::Index};

    use super::*;
    use crate::policy::{parse, parse_with_warnings};

    fn file(name: &str, text: impl Into<String>) -> SourceFile {
        SourceFile {
            name: name.to_owned(),
            text: text.into(),
        }
    }

    fn segments(name: &str, members: &[&str]) -> SourceFile {
        let members: Vec<_> = members.iter().map(|m| format!("{{cidr: {m}}}")).collect();
        let members = members.join(", ");
        let text = format!("version: 1\nsegments:\n  {name}: {{ members: [{members}] }}\n");
        file(&format!("{name}.yaml"), text)
    }

    #[test]
    fn a_cache_changes_nothing_but_the_time() {
        let rules = file(
            "rules.yaml",
            "version: 1\nrules:\n  - {name: r, from: [a], to: [b], services: [tcp/1]}\n",
        );
        let (a, b) = (
            segments("a", &["10.0.0.0/8"]),
            segments("b", &["10.1.0.0/16"]),
        );
        let versions = [
            vec![a.clone(), b.clone(), rules.clone()],
            // The same, another member, a member that is none, a file that is no YAML.
            vec![a.clone(), b.clone(), rules.clone()],
            vec![
                a.clone(),
                segments("b", &["10.1.0.0/16", "10.2.0.1/32"]),
                rules.clone(),
            ],
            vec![
                segments("a", &["10.0.0.1/8", "x"]),
                b.clone(),
                rules.clone(),
            ],
            vec![file("a.yaml", "version: [1\n"), b.clone(), rules.clone()],
            // Another file of the same text, a file less, another order.
            vec![file("c.yaml", a.text.clone()), b.clone(), rules.clone()],
            vec![b.clone(), rules.clone()],
            vec![rules, b, a],
            vec![],
        ];
        let mut cache = Cache::default();
        for files in versions {
            let files = Arc::new(files);
            assert_eq!(cache.parse(&files), parse_with_warnings(&files));
        }
    }

    /// What each file of a policy may say. Some of it is wrong, or only beside certain others.
    fn variants() -> Vec<(&'static str, Vec<&'static str>)> {
        let members = |members: &str| -> &'static str {
            let text = format!(
                "version: 1\nsegments:\n  a: {{members: [{members}]}}\n  \
                 b: {{members: [{{cidr: 10.2.0.0/16}}]}}\nrules:\n  \
                 - {{name: own, from: [a], to: [b], services: [web]}}\n"
            );
            text.leak()
        };
        vec![
            (
                "a.yaml",
                vec![
                    members("{cidr: 10.1.0.1/32}"),
                    members("{cidr: 10.1.0.1/32}, {cidr: 10.1.0.2/32}"),
                    members("\n    {cidr: 10.1.0.3/32}\n    "),
                    members("{cidr: 10.1.0.3/8}"),
                    "version: 1\nsegments: {b: {members: [{cidr: 10.2.0.0/16}]}}\n",
                ],
            ),
            (
                "g.yaml",
                vec![
                    "version: 1\ngroups: {g: [a, b]}\nservices: {web: [tcp/80]}\n",
                    "version: 1\ngroups: {g: [b, a]}\nservices: {web: [tcp/80]}\n# as before\n",
                    "version: 1\ngroups: {g: [b]}\nservices: {web: [tcp/80]}\n",
                    "version: 1\ngroups: {g: [a, b]}\nservices: {web: [tcp/80, tcp/81]}\n",
                    "version: 1\ngroups: {h: [b], g: [h]}\nservices: {web: [tcp/80], x: [tcp/1]}\n",
                    "version: 1\ngroups: {g: [a\n",
                ],
            ),
            (
                "r.yaml",
                vec![
                    "version: 1\nrules:\n  - {name: r, from: [g], to: [b], services: [web]}\n",
                    "version: 1\nrules:\n  - {name: r, from: [g], to: [b], services: [dns]}\n",
                    "version: 1\nrules:\n\n  - {name: q, from: [a], to: [any, b], services: [x]}\n",
                    "version: 1\nrules:\n  - {name: own, from: [a], to: [b], services: [ssh]}\n",
                    "version: 1\nrules:\n  - {name: s, from: [a], to: [b], services: [ssh]}\n",
                    "version: 1\nrules: []\n",
                ],
            ),
            (
                "s.yaml",
                vec![
                    "version: 1\nrules:\n  - {name: s, from: [b], to: [g], services: [web]}\n",
                    "version: 1\nrules:\n  - {name: t, from: [g, g], to: [b], services: [web]}\n",
                    "version: 1\nrules:\n  - {name: t, from: [b], to: [b], services: [web]}\n\
                     tests:\n  - {from: 10.2.0.1, to: 10.2.0.2, service: web, expect: allow}\n",
                    "version: 1\nrules:\n  - {name: t, from: [c], to: [b], services: [web]}\n",
                    "",
                ],
            ),
        ]
    }

    proptest! {
        #[test]
        fn edit_by_edit_a_cache_says_what_one_without_does(
            edits in collection::vec((any::<Index>(), any::<Index>()), 1..30),
        ) {
            let variants = variants();
            let mut chosen = vec![0; variants.len()];
            let mut cache = Cache::default();
            for (which, variant) in edits {
                let which = which.index(variants.len());
                chosen[which] = variant.index(variants[which].1.len());
                let files = variants.iter().zip(&chosen);
                let files = files.map(|((name, texts), at)| file(name, texts[*at]));
                let files = Arc::new(files.collect::<Vec<_>>());
                prop_assert_eq!(cache.parse(&files), parse_with_warnings(&files));
            }
        }
    }

    #[test]
    fn rules_of_other_files_are_shared_beside_one_that_changed() {
        let rules = |name: &str, port: u16| {
            let text = format!(
                "version: 1\nrules:\n  - {{name: {name}, from: [a], to: [b], services: [tcp/{port}]}}\n"
            );
            file(&format!("{name}.yaml"), text)
        };
        let of = |member, port| {
            Arc::new(vec![
                segments("a", &[member]),
                segments("b", &["10.0.0.9/32"]),
                rules("one", port),
                rules("two", 2),
            ])
        };
        let mut cache = Cache::default();
        let first = cache.parse(&of("10.0.0.1/32", 1)).unwrap().policy.rules;
        let second = cache.parse(&of("10.0.0.2/32", 3)).unwrap().policy.rules;
        assert!(!Arc::ptr_eq(&first.parts()[0], &second.parts()[0]));
        assert!(Arc::ptr_eq(&first.parts()[1], &second.parts()[1]));
        assert_eq!(second.get(0).map(|rule| &*rule.name), Some("one"));
        assert_eq!(second.get(1).map(|rule| &*rule.name), Some("two"));
        assert_eq!(second.get(2), None);
        // A mistake between them costs nothing that was known.
        cache.parse(&of("10.0.0.0.1/32", 3)).unwrap_err();
        let third = cache.parse(&of("10.0.0.3/32", 3)).unwrap().policy.rules;
        assert!(Arc::ptr_eq(&second.parts()[0], &third.parts()[0]));
    }

    /// Names that are no text read alike.
    #[test]
    fn a_file_beside_its_own_copy_is_refused_as_at_the_start() {
        let rules = file(
            "r.yaml",
            "version: 1\nrules:\n  - {name: r, from: [a], to: [any], services: [ssh]}\n",
        );
        let of = |copies| {
            let mut files = vec![segments("a", &["10.0.0.1/32"])];
            files.extend(std::iter::repeat_n(rules.clone(), copies));
            Arc::new(files)
        };
        let mut cache = Cache::default();
        cache.parse(&of(1)).unwrap();
        cache.parse(&of(2)).unwrap_err();
        cache.parse(&of(1)).unwrap();
    }

    #[test]
    fn what_did_not_change_is_shared() {
        let other = file(
            "r.yaml",
            "version: 1\nrules:\n  - {name: r, from: [a], to: [any], services: [ssh]}\n",
        );
        let of = |member| {
            Arc::new(vec![
                segments("a", &["10.0.0.1/32"]),
                segments("b", &[member]),
                other.clone(),
            ])
        };
        let mut cache = Cache::default();
        let first = cache.parse(&of("10.1.0.1/32")).unwrap().policy;
        let second = cache.parse(&of("10.1.0.2/32")).unwrap().policy;
        assert_ne!(first, second);
        let rules = |policy: &crate::policy::model::Policy| policy.rules.parts()[0].as_ptr();
        assert!(std::ptr::eq(rules(&first), rules(&second)));
        let members =
            |policy: &crate::policy::model::Policy, at: usize| policy.segments[at].members.as_ptr();
        assert!(std::ptr::eq(members(&first, 0), members(&second, 0)));
        assert!(!std::ptr::eq(members(&first, 1), members(&second, 1)));
    }

    #[test]
    fn threads_read_what_one_would() {
        let files: Vec<SourceFile> = (0..20)
            .map(|number| {
                let mut file = segments(&format!("s{number}"), &["10.0.0.0/8", "bad"]);
                file.text += &"# so that it takes a while\n".repeat(1 << 10);
                file
            })
            .collect();
        assert!(files.iter().map(|f| f.text.len()).sum::<usize>() > THREADS_PAY);
        let errors = parse(&files).unwrap_err();
        let found: Vec<_> = errors.iter().map(|e| (e.file.as_str(), e.line)).collect();
        let expected: Vec<_> = files.iter().map(|f| (f.name.as_str(), 3)).collect();
        assert_eq!(found, expected);
    }
}
