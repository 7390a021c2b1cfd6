//! What a candidate policy, the shadow, would have done: the kernel's counts in names, added up
//! over generations. The JSON of the control socket: fields are only added.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use enforcer_common::{
    case::Case,
    decide::Decision,
    shadow::{self, Difference, DifferenceKey},
    verdict::Hook,
};
use serde::{Deserialize, Serialize};

use crate::{
    api::{peer::Named, types::Time},
    compile::segments_of,
    plan::{
        because, count,
        flows::address,
        services,
        types::{Because, FlowChanges},
    },
    policy::model::Policy,
};

/// Examples of a difference.
const EXAMPLES: usize = 5;
/// Differences that are listed, and kept; the packets of others are counted all the same.
const LISTED: usize = 2_000;

/// A packet of which two policies say something else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Sample {
    /// Who sent it; `None` where addresses could not be read.
    pub from: Option<IpAddr>,
    /// Source port; `None` where there are none.
    pub from_port: Option<u16>,
    /// To whom.
    pub to: Option<IpAddr>,
    /// Destination port; `None` where there are none.
    pub to_port: Option<u16>,
    /// As a rule names it: `tcp/5432`, `icmp/echo-request`; without addresses the ethertype.
    pub service: String,
    /// The interface; `None` of a call, or when it is gone.
    pub interface: Option<Arc<str>>,
    /// Every segment of `from`, by the candidate.
    pub from_segments: Vec<String>,
    /// Every segment of `to`, by the candidate.
    pub to_segments: Vec<String>,
}

/// Where the candidate says something else than the policy in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct DifferenceCount {
    /// What happened.
    pub now: Because,
    /// What would have happened.
    pub then: Because,
    /// `tc_ingress`, `tc_egress`, `connect`, `sendmsg`.
    pub hook: String,
    /// Packets that asked the policy: the first of a flow that passes, each one of what does not;
    /// of the socket hooks, calls.
    pub packets: u64,
    /// When the latest came.
    pub last: Time,
    /// Some of them.
    pub examples: Vec<Sample>,
}

/// A candidate policy beside the one in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Rehearsal {
    /// Where the candidate was read.
    pub path: String,
    /// Content hash of its image.
    pub hash: String,
    /// Its segments.
    pub segments: usize,
    /// Its rules.
    pub rules: usize,
    /// Who began.
    pub by: Named,
    /// When.
    pub since: Time,
    /// Packets and calls that would have fared otherwise, all of them.
    pub differing: u64,
    /// Those among them that would be denied, and are not.
    pub newly_denied: u64,
    /// Those among them that would pass, and are denied.
    pub newly_allowed: u64,
    /// Those among them of which it is not known why: there were more differences than are told apart.
    pub unlisted: u64,
    /// Where they differ, those with most packets first.
    pub differences: Vec<DifferenceCount>,
    /// Live flows that the candidate would cut, as of now.
    pub flows: FlowChanges,
    /// Why the candidate is not asked as it should be.
    pub problem: Option<String>,
    /// Whether there is anything of that kind.
    pub differs: bool,
    /// The summary, in one line.
    pub summary: String,
}

/// The answer to `GET /v1/shadow`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Shadowing {
    /// The candidate; `None`: there is none.
    pub shadow: Option<Rehearsal>,
}

/// Body of `POST /v1/shadow/begin`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ShadowRequest {
    /// Absolute path of a directory or a file, which the daemon reads; it must be safe from others.
    pub path: String,
}

/// Counts in names, by what was said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    counts: BTreeMap<Said, Count>,
    unlisted: u64,
}

/// Hook, what happened, what would have happened.
type Said = (String, Because, Because);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Count {
    packets: u64,
    last: Time,
    examples: Vec<Sample>,
}

impl Count {
    fn add(&mut self, other: &Self) {
        self.packets += other.packets;
        self.last = self.last.max(other.last);
        self.see(&other.examples);
    }

    /// Of flows that differ only in the port they come from, one is enough.
    fn see(&mut self, examples: &[Sample]) {
        for sample in examples {
            let alike = |other: &Sample| {
                let rest = |s: &Sample| (s.from, s.to, s.to_port);
                rest(other) == rest(sample)
                    && other.service == sample.service
                    && other.interface == sample.interface
            };
            if self.examples.len() < EXAMPLES && !self.examples.iter().any(alike) {
                self.examples.push(sample.clone());
            }
        }
    }
}

/// What numbers mean.
pub struct Names<'a> {
    /// The policy of a generation that judged, if it is known yet.
    pub live: &'a dyn Fn(u32) -> Option<Arc<Policy>>,
    /// The candidate.
    pub candidate: &'a Policy,
    /// An interface.
    pub interface: &'a dyn Fn(u32) -> Option<Arc<str>>,
    /// Boot nanoseconds in the time of the wall.
    pub time: &'a dyn Fn(u64) -> Time,
}

impl Names<'_> {
    fn said(&self, said: &shadow::Said, policy: Option<&Policy>) -> Because {
        let decision = Decision {
            outcome: said.outcome(),
            reason: said.reason(),
            rule: said.rule,
            segment: said.segment,
        };
        match policy {
            Some(policy) => because(policy, &decision),
            None => Because {
                outcome: decision.outcome.into(),
                reason: decision.reason.name().to_owned(),
                rule: None,
                segment: None,
                file: None,
                line: None,
            },
        }
    }

    /// Without its segments: to find those of one address costs as much as of all.
    fn sample(&self, case: &Case) -> Sample {
        let v6 = case.family() == 6;
        let read = case.family() != 0;
        let [from, to] = [case.source, case.destination].map(|words| address(words, v6));
        let ports = read && matches!(case.protocol(), 6 | 17 | 132 | 136);
        Sample {
            from: read.then_some(from),
            from_port: ports.then(|| case.source_port()),
            to: read.then_some(to),
            to_port: ports.then(|| case.destination_port()),
            service: if read {
                services::point(v6, case.protocol(), case.selector())
            } else {
                format!("ethertype/0x{:04x}", case.ethertype())
            },
            interface: (self.interface)(case.ifindex),
            from_segments: Vec::new(),
            to_segments: Vec::new(),
        }
    }
}

impl Tally {
    /// Adds a count of the kernel's.
    pub fn add(&mut self, key: &DifferenceKey, count: &Difference, names: &Names<'_>) {
        if *key == DifferenceKey::REST {
            self.unlisted += count.packets;
            return;
        }
        let live = (names.live)(key.live.generation);
        let hook = u8::try_from(key.hook).ok().and_then(Hook::from_bits);
        let said = (
            hook.map_or("?", Hook::name).to_owned(),
            names.said(&key.live, live.as_deref()),
            names.said(&key.shadow, Some(names.candidate)),
        );
        let cases = [&count.first, &count.last].map(|example| example.case(key.hook));
        let samples = cases.iter().flatten().map(|case| names.sample(case));
        let mut counted = Count {
            packets: count.packets,
            last: (names.time)(count.time),
            examples: Vec::new(),
        };
        counted.see(&samples.collect::<Vec<_>>());
        self.join(said, counted);
    }

    fn join(&mut self, said: Said, count: Count) {
        let room = self.counts.len() < LISTED;
        match self.counts.get_mut(&said) {
            Some(own) => own.add(&count),
            None if room => {
                self.counts.insert(said, count);
            }
            None => self.unlisted += count.packets,
        }
    }

    /// Both together.
    #[must_use]
    pub fn with(mut self, other: &Self) -> Self {
        self.unlisted += other.unlisted;
        for (said, count) in &other.counts {
            self.join(said.clone(), count.clone());
        }
        self
    }

    /// Notes what packets there were, without their number: the kernel keeps the first and the latest.
    pub fn see(&mut self, other: &Self) {
        for (said, count) in &other.counts {
            let own = self.counts.get(said);
            if own.is_none_or(|own| own.examples.len() < EXAMPLES) {
                let packets = 0;
                self.join(
                    said.clone(),
                    Count {
                        packets,
                        ..count.clone()
                    },
                );
            }
        }
    }

    /// All packets.
    pub fn differing(&self) -> u64 {
        let counts = self.counts.values();
        counts.map(|count| count.packets).sum::<u64>() + self.unlisted
    }

    /// Those of which the verdicts on them are not kept.
    pub fn unlisted(&self) -> u64 {
        self.unlisted
    }

    /// Packets that would be denied and are not; those that would pass and are not.
    pub fn turned(&self) -> (u64, u64) {
        let sum = |wanted: (bool, bool)| {
            let counts = self.counts.iter();
            let turned = counts.filter(|((_, now, then), _)| {
                (now.outcome.passes(), then.outcome.passes()) == wanted
            });
            turned.map(|(_, count)| count.packets).sum()
        };
        (sum((true, false)), sum((false, true)))
    }

    /// Those with most packets first, with segments by the candidate.
    pub fn list(&self, candidate: &Policy) -> Vec<DifferenceCount> {
        let ends = |s: &Sample| [s.from, s.to];
        let examples = self.counts.values().flat_map(|count| &count.examples);
        let addresses: BTreeSet<IpAddr> = examples.flat_map(ends).flatten().collect();
        let segments = segments_of(candidate, addresses.into_iter());
        let names = |ip: Option<IpAddr>| -> Vec<String> {
            let ids = ip.and_then(|ip| segments.get(&ip)).into_iter().flatten();
            let found = ids.filter_map(|id| candidate.segment(*id));
            found.map(|segment| segment.name.clone()).collect()
        };
        let counted = self.counts.iter().filter(|(_, count)| count.packets > 0);
        let named = |sample: &Sample| Sample {
            from_segments: names(sample.from),
            to_segments: names(sample.to),
            ..sample.clone()
        };
        let mut list: Vec<_> = counted
            .map(|((hook, now, then), count)| DifferenceCount {
                now: now.clone(),
                then: then.clone(),
                hook: hook.clone(),
                packets: count.packets,
                last: count.last,
                examples: count.examples.iter().map(named).collect(),
            })
            .collect();
        list.sort_by_key(|count| std::cmp::Reverse(count.packets));
        list
    }

    /// For a file: [`Tally::from_saved`].
    pub fn saved(&self) -> SavedTally {
        let counts = self.counts.iter();
        let counts = counts.map(|((hook, now, then), count)| DifferenceCount {
            now: now.clone(),
            then: then.clone(),
            hook: hook.clone(),
            packets: count.packets,
            last: count.last,
            examples: count.examples.clone(),
        });
        SavedTally {
            counts: counts.collect(),
            unlisted: self.unlisted,
        }
    }

    /// What was [`Tally::saved`].
    pub fn from_saved(saved: SavedTally) -> Self {
        let mut tally = Self {
            unlisted: saved.unlisted,
            ..Self::default()
        };
        for count in saved.counts {
            let said = (count.hook, count.now, count.then);
            let (packets, last, examples) = (count.packets, count.last, count.examples);
            tally.join(
                said,
                Count {
                    packets,
                    last,
                    examples,
                },
            );
        }
        tally
    }
}

/// A [`Tally`] in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedTally {
    counts: Vec<DifferenceCount>,
    unlisted: u64,
}

/// A rehearsal in one line.
pub fn summary(rehearsal: &Rehearsal) -> String {
    let mut parts = Vec::new();
    let mut part = |number: u64, what: &str| {
        if number > 0 {
            parts.push(format!("{} {what}", count(number, "packet", "packets")));
        }
    };
    part(rehearsal.newly_denied, "would be denied and are not");
    part(rehearsal.newly_allowed, "would pass and are denied");
    let turned = rehearsal.newly_denied + rehearsal.newly_allowed + rehearsal.unlisted;
    part(
        rehearsal.differing.saturating_sub(turned),
        "would be recorded otherwise",
    );
    part(
        rehearsal.unlisted,
        "of more differences than are told apart",
    );
    if rehearsal.flows.cut > 0 {
        let flows = count(rehearsal.flows.cut, "live flow", "live flows");
        parts.push(format!("{flows} would be cut"));
    }
    if parts.is_empty() {
        return "no difference so far".to_owned();
    }
    parts.join("; ")
}

/// Whether there is something that an author of the candidate should look at.
pub fn differs(rehearsal: &Rehearsal) -> bool {
    rehearsal.differing > 0 || rehearsal.flows.cut > 0 || rehearsal.flows.would_deny > 0
}
