//! What is written differently: things are the same when their names are.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use crate::policy::{
    model::{
        Action, AddrRange, Endpoints, Member, Mode, Origin, Policy, Protect, Rule, Segment,
        SegmentId, Session, Unsegmented,
    },
    parse::describe,
};

use super::{
    DETAILS, ITEMS,
    types::{Item, Items, Sign, TextChanges},
};

/// Names in one detail.
const NAMES: usize = 8;

impl Items {
    /// Counts an item, and keeps it if there is room.
    pub(super) fn push(&mut self, sign: Sign, name: &str, origin: Option<&Origin>, all: Details) {
        match sign {
            Sign::Added => self.added += 1,
            Sign::Removed => self.removed += 1,
            Sign::Changed => self.changed += 1,
        }
        if self.items.len() < ITEMS {
            self.items.push(Item {
                sign,
                name: name.to_owned(),
                file: origin.map(|origin| Arc::clone(&origin.file)),
                line: origin.map(|origin| origin.line),
                details: all.lines,
                more: all.more,
            });
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.added + self.removed + self.changed
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A bounded list of details.
#[derive(Default)]
pub(super) struct Details {
    lines: Vec<String>,
    more: usize,
}

impl Details {
    pub(super) fn one(line: String) -> Self {
        let mut details = Self::default();
        details.push(|| line);
        details
    }

    fn push(&mut self, line: impl FnOnce() -> String) {
        if self.lines.len() < DETAILS {
            self.lines.push(line());
        } else {
            self.more += 1;
        }
    }

    /// `what: before -> after`, if they differ.
    pub(super) fn compare<T: PartialEq>(
        &mut self,
        what: &str,
        before: &T,
        after: &T,
        show: impl Fn(&T) -> String,
    ) {
        if before != after {
            self.push(|| format!("{what}: {} -> {}", show(before), show(after)));
        }
    }

    /// `what: +new -old`, if there are any.
    pub(super) fn sets(&mut self, what: &str, before: &BTreeSet<String>, after: &BTreeSet<String>) {
        if before == after {
            return;
        }
        let signed = |sign: char, of: &mut dyn Iterator<Item = &String>| -> Vec<String> {
            of.map(|name| format!("{sign}{name}")).collect()
        };
        let added = signed('+', &mut after.difference(before));
        let removed = signed('-', &mut before.difference(after));
        self.push(|| format!("{what}: {}", few(&[added, removed].concat(), " ")));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }
}

/// The first few of a list.
fn few(names: &[String], between: &str) -> String {
    let shown = names.iter().take(NAMES).cloned();
    let mut text = Vec::from_iter(shown).join(between);
    if let Some(more) = names.len().checked_sub(NAMES).filter(|more| *more > 0) {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

/// Compares two policies.
pub(super) fn compare(before: &Policy, after: &Policy) -> TextChanges {
    TextChanges {
        policy: defaults(before, after),
        segments: segments(before, after),
        groups: groups(before, after),
        rules: rules(before, after),
        settings: Items::default(),
    }
}

fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Off => "off",
        Mode::Observe => "observe",
        Mode::Enforce => "enforce",
    }
}

fn protect(protect: Protect) -> &'static str {
    match protect {
        Protect::Both => "both",
        Protect::Inbound => "inbound",
        Protect::Outbound => "outbound",
    }
}

fn defaults(before: &Policy, after: &Policy) -> Items {
    let mut items = Items::default();
    let mut details = Details::default();
    let (one, other) = (before.defaults, after.defaults);
    details.compare("mode", &one.mode, &other.mode, |m| mode(*m).to_owned());
    details.compare("unsegmented", &one.unsegmented, &other.unsegmented, |u| {
        let word = match u {
            Unsegmented::Allow => "allow",
            Unsegmented::Deny => "deny",
        };
        word.to_owned()
    });
    if !details.is_empty() {
        items.push(Sign::Changed, "defaults", None, details);
    }
    if reordered(before, after) {
        let details = Details::one("they are in another order".to_owned());
        items.push(Sign::Changed, "rules", None, details);
    }
    items
}

/// Whether rules that both have are in another order.
fn reordered(before: &Policy, after: &Policy) -> bool {
    let names = before.rules.iter().zip(0usize..);
    let numbers: HashMap<&str, usize> =
        names.map(|(r, number)| (r.name.as_str(), number)).collect();
    let common = after.rules.iter();
    let common = common.filter_map(|rule| numbers.get(rule.name.as_str()));
    !common.is_sorted()
}

/// Calls `see` with each pair of things of the same name, `after`'s in their order, then those that
/// are gone.
fn pairs<'a, T: 'a>(
    before: impl Iterator<Item = &'a T> + Clone,
    after: impl Iterator<Item = &'a T>,
    name: impl Fn(&'a T) -> &'a str,
    mut see: impl FnMut(Option<&'a T>, Option<&'a T>),
) {
    let mut known: HashMap<&str, &T> = before.clone().map(|thing| (name(thing), thing)).collect();
    for thing in after {
        see(known.remove(name(thing)), Some(thing));
    }
    for thing in before {
        if known.contains_key(name(thing)) {
            see(Some(thing), None);
        }
    }
}

fn segments(before: &Policy, after: &Policy) -> Items {
    let mut items = Items::default();
    let (one, other) = (before.segments.iter(), after.segments.iter());
    pairs(
        one,
        other,
        |s| &s.name,
        |one, other| match (one, other) {
            (None, Some(new)) => {
                items.push(Sign::Added, &new.name, Some(&new.origin), summary(new));
            }
            (Some(old), None) => {
                items.push(Sign::Removed, &old.name, Some(&old.origin), summary(old));
            }
            (Some(old), Some(new)) => {
                let details = segment(old, new);
                if !details.is_empty() {
                    items.push(Sign::Changed, &new.name, Some(&new.origin), details);
                }
            }
            (None, None) => {}
        },
    );
    items
}

fn summary(segment: &Segment) -> Details {
    let members = match segment.members.len() {
        1 => "1 member".to_owned(),
        members => format!("{members} members"),
    };
    let (mode, protect) = (mode(segment.mode), protect(segment.protect));
    Details::one(format!("{members}, mode {mode}, protects {protect}"))
}

fn segment(old: &Segment, new: &Segment) -> Details {
    let mut details = Details::default();
    details.compare("mode", &old.mode, &new.mode, |m| mode(*m).to_owned());
    details.compare("protect", &old.protect, &new.protect, |p| {
        protect(*p).to_owned()
    });
    let patterns = |segment: &Segment| -> BTreeSet<String> {
        let patterns = segment.interfaces.iter();
        patterns
            .map(|pattern| pattern.as_str().to_owned())
            .collect()
    };
    details.sets("interfaces", &patterns(old), &patterns(new));
    if old.description != new.description {
        details.push(|| "description".to_owned());
    }
    if Arc::ptr_eq(&old.members, &new.members) {
        return details;
    }
    let keyed = |segment: &'_ Segment| -> BTreeMap<(AddrRange, Vec<AddrRange>), Origin> {
        let members = segment.members.iter();
        members
            .map(|member| ((member.range, member.except.clone()), member.origin.clone()))
            .collect()
    };
    // Mostly a few differ.
    if same(&old.members, &new.members) {
        return details;
    }
    let (one, other) = (keyed(old), keyed(new));
    for (sign, of, without) in [('+', &other, &one), ('-', &one, &other)] {
        for (key, origin) in of.iter().filter(|(key, _)| !without.contains_key(*key)) {
            details.push(|| format!("{sign} {}  {origin}", member(&key.0, &key.1)));
        }
    }
    details
}

fn same(one: &[Member], other: &[Member]) -> bool {
    one.len() == other.len()
        && one
            .iter()
            .zip(other)
            .all(|(one, other)| one.range == other.range && one.except == other.except)
}

fn member(range: &AddrRange, except: &[AddrRange]) -> String {
    let except: Vec<String> = except.iter().map(shown).collect();
    if except.is_empty() {
        return shown(range);
    }
    format!("{} except {}", shown(range), few(&except, ", "))
}

/// A prefix if it is one, else an address or both ends.
fn shown(range: &AddrRange) -> String {
    let (first, last, bits): (String, String, _) = match range {
        AddrRange::V4 { first, last } => {
            let (low, high) = (u128::from(first.to_bits()), u128::from(last.to_bits()));
            (
                first.to_string(),
                last.to_string(),
                host_bits(low, high).map(|n| 32 - n),
            )
        }
        AddrRange::V6 { first, last } => {
            let bits = host_bits(first.to_bits(), last.to_bits());
            (first.to_string(), last.to_string(), bits.map(|n| 128 - n))
        }
    };
    match bits {
        _ if first == last => first,
        Some(bits) => format!("{first}/{bits}"),
        None => format!("{first}-{last}"),
    }
}

/// How many lower bits are free in a prefix with these ends; `None` if they are not a prefix's.
fn host_bits(first: u128, last: u128) -> Option<u32> {
    let differing = first ^ last;
    let free = (differing & differing.wrapping_add(1)) == 0;
    (free && first & differing == 0).then(|| differing.count_ones())
}

fn groups(before: &Policy, after: &Policy) -> Items {
    let mut items = Items::default();
    let members = |policy: &Policy, ids: &BTreeSet<SegmentId>| -> BTreeSet<String> {
        let segments = ids.iter().filter_map(|id| policy.segment(*id));
        segments.map(|segment| segment.name.clone()).collect()
    };
    let list = |names: BTreeSet<String>| Details::one(few(&Vec::from_iter(names), ", "));
    let (one, other) = (before.groups.iter(), after.groups.iter());
    pairs(
        one,
        other,
        |g| &g.name,
        |one, other| match (one, other) {
            (None, Some(new)) => {
                let details = list(members(after, &new.members));
                items.push(Sign::Added, &new.name, Some(&new.origin), details);
            }
            (Some(old), None) => {
                let details = list(members(before, &old.members));
                items.push(Sign::Removed, &old.name, Some(&old.origin), details);
            }
            (Some(old), Some(new)) => {
                let mut details = Details::default();
                let (one, other) = (members(before, &old.members), members(after, &new.members));
                details.sets("members", &one, &other);
                if !details.is_empty() {
                    items.push(Sign::Changed, &new.name, Some(&new.origin), details);
                }
            }
            (None, None) => {}
        },
    );
    items
}

fn rules(before: &Policy, after: &Policy) -> Items {
    let mut items = Items::default();
    let names = |policy: &Policy| -> Vec<String> {
        policy.segments.iter().map(|s| s.name.clone()).collect()
    };
    // Then equal numbers mean the same segments.
    let alike = names(before) == names(after);
    let (one, other) = (before.rules.iter(), after.rules.iter());
    pairs(
        one,
        other,
        |r| &r.name,
        |one, other| match (one, other) {
            (None, Some(new)) => {
                let details = Details::one(sentence(after, new));
                items.push(Sign::Added, &new.name, Some(&new.origin), details);
            }
            (Some(old), None) => {
                let details = Details::one(sentence(before, old));
                items.push(Sign::Removed, &old.name, Some(&old.origin), details);
            }
            (Some(old), Some(new)) => {
                let details = rule((before, old), (after, new), alike);
                if !details.is_empty() {
                    items.push(Sign::Changed, &new.name, Some(&new.origin), details);
                }
            }
            (None, None) => {}
        },
    );
    items
}

fn rule((before, old): (&Policy, &Rule), (after, new): (&Policy, &Rule), alike: bool) -> Details {
    let mut details = Details::default();
    for (what, one, other) in [("from", &old.from, &new.from), ("to", &old.to, &new.to)] {
        if !(alike && one == other) {
            details.sets(what, &ends(before, one), &ends(after, other));
        }
    }
    if old.services != new.services {
        details.sets("services", &services(old), &services(new));
    }
    details.compare("action", &old.action, &new.action, |a| {
        action(*a).to_owned()
    });
    details.compare("expires", &old.expires, &new.expires, |at| instant(*at));
    details.compare("session", &old.session, &new.session, |s| {
        session(s.as_ref())
    });
    details
}

fn ends(policy: &Policy, ends: &Endpoints) -> BTreeSet<String> {
    let segments = ends.segments.iter().filter_map(|id| policy.segment(*id));
    let mut names: BTreeSet<String> = segments.map(|segment| segment.name.clone()).collect();
    for (is, name) in [
        (ends.any, "any"),
        (ends.unsegmented, "unsegmented"),
        (ends.host, "host"),
        (ends.multicast, "multicast"),
    ] {
        if is {
            names.insert(name.to_owned());
        }
    }
    names
}

fn services(rule: &Rule) -> BTreeSet<String> {
    rule.services.iter().map(describe).collect()
}

fn action(action: Action) -> &'static str {
    match action {
        Action::Allow => "allow",
        Action::Deny => "deny",
    }
}

fn instant(at: Option<u64>) -> String {
    let Some(at) = at else {
        return "never".to_owned();
    };
    let time = i64::try_from(at).ok();
    let time = time.and_then(|at| jiff::Timestamp::from_second(at).ok());
    time.map_or_else(|| at.to_string(), |time| time.to_string())
}

fn session(session: Option<&Session>) -> String {
    let Some(session) = session else {
        return "unlimited".to_owned();
    };
    let bounds = [("max", session.max), ("idle", session.idle)];
    let bounds = bounds.into_iter().filter_map(|(what, seconds)| {
        let seconds = seconds?;
        Some(format!("{what} {seconds}s"))
    });
    Vec::from_iter(bounds).join(", ")
}

/// What a rule says, in one line.
fn sentence(policy: &Policy, rule: &Rule) -> String {
    let names = |side| few(&Vec::from_iter(ends(policy, side)), ", ");
    let (from, to) = (names(&rule.from), names(&rule.to));
    let services = few(&Vec::from_iter(services(rule)), ", ");
    let mut text = format!("{} {from} -> {to}: {services}", action(rule.action));
    if rule.expires.is_some() {
        text.push_str(&format!(" until {}", instant(rule.expires)));
    }
    if rule.session.is_some() {
        text.push_str(&format!(" ({})", session(rule.session.as_ref())));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_written_as_people_write_them() {
        let range = |first: &str, last: &str| AddrRange::V4 {
            first: first.parse().unwrap(),
            last: last.parse().unwrap(),
        };
        for (first, last, text) in [
            ("10.0.0.0", "10.255.255.255", "10.0.0.0/8"),
            ("10.0.0.7", "10.0.0.7", "10.0.0.7"),
            ("10.0.0.0", "10.0.0.2", "10.0.0.0-10.0.0.2"),
            ("10.0.0.1", "10.0.0.2", "10.0.0.1-10.0.0.2"),
            ("0.0.0.0", "255.255.255.255", "0.0.0.0/0"),
        ] {
            assert_eq!(shown(&range(first, last)), text);
        }
        let all = AddrRange::V6 {
            first: std::net::Ipv6Addr::UNSPECIFIED,
            last: std::net::Ipv6Addr::from_bits(u128::MAX),
        };
        assert_eq!(shown(&all), "::/0");
    }
}
