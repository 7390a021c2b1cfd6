//! The same policy as rules of nftables, in the best form that an expert would write.
//!
//! Per family one interval map from addresses to a number, one number for each distinct set of
//! segments; the source's number goes into the packet's mark, the destination's into the
//! connection's. Then one hash of source . destination . protocol . port. Established and related
//! connections are accepted first, whatever is left is dropped. Netfilter has no other place to
//! keep the second number: a concatenation cannot hold the result of a map, and the bits of two
//! marks cannot be joined before Linux 6.13.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
};

use enforcer::policy::model::{
    Action, AddrRange, Endpoints, Mode, Policy, Segment, SegmentId, Service, TUNNEL_PROTOCOLS,
    Unsegmented,
};

/// The table's name.
pub const TABLE: &str = "inet enforcer_peer";

/// Longest range of ports that is written out port by port.
const PORTS_WRITTEN_OUT: usize = 256;

/// What the generator does not translate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Untranslatable(pub String);

/// Number of a distinct set of segments; 0: in none.
type Class = u32;

/// An address of either family as a number.
type Span = (u128, u128);

/// Addresses by class, and what the classes are.
struct Classes {
    v4: Vec<(Span, Class)>,
    v6: Vec<(Span, Class)>,
    /// Segments of each class.
    sets: Vec<BTreeSet<u32>>,
}

/// The commands that make [`TABLE`] with the policy's meaning for forwarded flows.
///
/// # Errors
/// [`Untranslatable`] if the policy uses what this form has no place for: modes other than
/// `enforce`, times, sessions, interfaces, `host`, `multicast`, long port ranges, ICMP codes.
pub fn ruleset(policy: &Policy) -> Result<String, Untranslatable> {
    if policy.defaults.mode != Mode::Enforce {
        return Err(Untranslatable("defaults.mode".to_owned()));
    }
    for segment in &policy.segments {
        if segment.mode != Mode::Enforce || !segment.interfaces.is_empty() {
            return Err(Untranslatable(format!("segment {}", segment.name)));
        }
    }
    let classes = classes(policy);
    let mut allow = Services::default();
    let mut deny = Services::default();
    for rule in &policy.rules {
        let odd = |side: &Endpoints| side.host || side.multicast;
        if rule.expires.is_some() || rule.session.is_some() || odd(&rule.from) || odd(&rule.to) {
            return Err(Untranslatable(format!("rule {}", rule.name)));
        }
        let into = match rule.action {
            Action::Allow => &mut allow,
            Action::Deny => &mut deny,
        };
        let (from, to) = (classes.of(&rule.from), classes.of(&rule.to));
        for service in &rule.services {
            let keys = into.keys(*service);
            let Some((keys, services)) = keys else {
                return Err(Untranslatable(format!("rule {}: {service:?}", rule.name)));
            };
            for source in &from {
                for destination in &to {
                    for key in &services {
                        keys.insert((*source, *destination, key.clone()));
                    }
                }
            }
        }
    }
    Ok(table(policy, &classes, &allow, &deny))
}

/// Pairs of classes with a service each, by what of a packet the service is about.
#[derive(Default)]
struct Services {
    ports: Keys,
    icmp: Keys,
    icmpv6: Keys,
    protocols: Keys,
    any: Keys,
}

type Keys = BTreeSet<(Class, Class, String)>;

impl Services {
    /// The set of a service, and its keys there.
    fn keys(&mut self, service: Service) -> Option<(&mut Keys, Vec<String>)> {
        Some(match service {
            Service::Any => (&mut self.any, vec![String::new()]),
            Service::Ports {
                transport,
                first,
                last,
            } => {
                if usize::from(last - first) >= PORTS_WRITTEN_OUT {
                    return None;
                }
                let protocol = transport.number();
                let ports = (first..=last).map(|port| format!(" . {protocol} . {port}"));
                (&mut self.ports, ports.collect())
            }
            Service::Icmp { kind, code: None } => (&mut self.icmp, vec![format!(" . {kind}")]),
            Service::Icmpv6 { kind, code: None } => (&mut self.icmpv6, vec![format!(" . {kind}")]),
            Service::Protocol(protocol) => (&mut self.protocols, vec![format!(" . {protocol}")]),
            Service::Icmp { .. } | Service::Icmpv6 { .. } => return None,
        })
    }

    /// Name, type, match and keys of each set, the quickest to answer first.
    fn sets(&self) -> [(&'static str, &'static str, &'static str, &Keys); 5] {
        [
            ("ports", " . meta l4proto . th dport", "", &self.ports),
            ("icmp", " . icmp type", "meta l4proto icmp ", &self.icmp),
            (
                "icmpv6",
                " . icmpv6 type",
                "meta l4proto ipv6-icmp ",
                &self.icmpv6,
            ),
            ("protocols", " . meta l4proto", "", &self.protocols),
            ("any", "", "", &self.any),
        ]
    }
}

fn table(policy: &Policy, classes: &Classes, allow: &Services, deny: &Services) -> String {
    // Made anew in one transaction, whether it is there or not.
    let mut text = format!("table {TABLE} {{\n}}\ndelete table {TABLE}\ntable {TABLE} {{\n");
    let mut chain = String::new();
    chain += "\t\tct state established,related accept\n";
    for (family, name, spans) in [("ip", "ipv4", &classes.v4), ("ip6", "ipv6", &classes.v6)] {
        if spans.is_empty() {
            continue;
        }
        let _ = write!(
            text,
            "\tmap segments_{name} {{\n\t\ttype {name}_addr : mark\n\t\tflags interval\n\t\telements = {{"
        );
        for ((first, last), class) in spans {
            let _ = match name {
                "ipv4" => write!(text, " {}", range(v4(*first), v4(*last))),
                _ => write!(text, " {}", range(v6(*first), v6(*last))),
            };
            let _ = writeln!(text, " : {class},");
        }
        text += "\t\t}\n\t}\n";
        for (end, mark) in [("saddr", "meta mark"), ("daddr", "ct mark")] {
            let _ = writeln!(chain, "\t\t{mark} set {family} {end} map @segments_{name}");
        }
    }
    let mut sets = |services: &Services, word: &str, verdict: &str| {
        for (name, key, guard, keys) in services.sets() {
            if keys.is_empty() {
                continue;
            }
            let _ = writeln!(text, "\tset {word}_{name} {{");
            let _ = writeln!(text, "\t\ttypeof meta mark . ct mark{key}");
            let _ = writeln!(text, "\t\tsize {}", keys.len());
            text += "\t\telements = {";
            for (source, destination, service) in keys {
                let _ = writeln!(text, " {source} . {destination}{service},");
            }
            text += "\t\t}\n\t}\n";
            let mut guard = guard.to_owned();
            if name == "any" && word == "allow" {
                let tunnels = TUNNEL_PROTOCOLS.map(|number| number.to_string()).join(", ");
                guard = format!("meta l4proto != {{ {tunnels} }} ");
            }
            let _ = writeln!(
                chain,
                "\t\t{guard}meta mark . ct mark{key} @{word}_{name} {verdict}"
            );
        }
    };
    sets(deny, "deny", "drop");
    sets(allow, "allow", "accept");
    if policy.defaults.unsegmented == Unsegmented::Allow {
        let mut open = Services::default();
        let unguarded = |guards: fn(&Segment) -> bool| -> Vec<Class> {
            let free = |set: &BTreeSet<u32>| {
                let mut segments = set.iter().map(|id| &policy.segments[*id as usize]);
                !segments.any(guards)
            };
            let numbered = (0..).zip(&classes.sets);
            numbered
                .filter(|(_, set)| free(set))
                .map(|(class, _)| class)
                .collect()
        };
        let destinations = unguarded(|segment| segment.protect.inbound());
        for source in unguarded(|segment| segment.protect.outbound()) {
            for destination in &destinations {
                open.any.insert((source, *destination, String::new()));
            }
        }
        sets(&open, "open", "accept");
    }
    let _ = write!(
        text,
        "\tchain forward {{\n\t\ttype filter hook forward priority filter; policy drop;\n{chain}\t}}\n}}\n"
    );
    text
}

fn v4(number: u128) -> Ipv4Addr {
    Ipv4Addr::from(u32::try_from(number).unwrap())
}

fn v6(number: u128) -> Ipv6Addr {
    Ipv6Addr::from(number)
}

fn range<A: std::fmt::Display + PartialEq>(first: A, last: A) -> String {
    if first == last {
        first.to_string()
    } else {
        format!("{first}-{last}")
    }
}

impl Classes {
    /// The classes that a side of a rule speaks of.
    fn of(&self, side: &Endpoints) -> Vec<Class> {
        let named =
            |set: &BTreeSet<u32>| set.iter().any(|id| side.segments.contains(&SegmentId(*id)));
        (0..)
            .zip(&self.sets)
            .filter(|(_, set)| side.any || (side.unsegmented && set.is_empty()) || named(set))
            .map(|(class, _)| class)
            .collect()
    }
}

fn span(range: &AddrRange) -> (bool, Span) {
    match range {
        AddrRange::V4 { first, last } => {
            let number = |ip: &Ipv4Addr| u128::from(ip.to_bits());
            (true, (number(first), number(last)))
        }
        AddrRange::V6 { first, last } => (false, (first.to_bits(), last.to_bits())),
    }
}

/// Sweeps over the ends of all members.
fn classes(policy: &Policy) -> Classes {
    let mut numbers: BTreeMap<BTreeSet<u32>, Class> = BTreeMap::from([(BTreeSet::new(), 0)]);
    let mut spans = [true, false].map(|of_v4| {
        // Where segments begin and end; an end lies one behind the last address.
        let mut ends: Vec<(u128, u32, i32)> = Vec::new();
        for (segment, id) in policy.segments.iter().zip(0..) {
            for member in segment.members.iter() {
                let (is_v4, whole) = span(&member.range);
                if is_v4 != of_v4 {
                    continue;
                }
                let mut except: Vec<Span> = member.except.iter().map(|e| span(e).1).collect();
                except.sort_unstable();
                let mut first = whole.0;
                for (from, to) in except {
                    if first < from {
                        ends.extend([(first, id, 1), (from, id, -1)]);
                    }
                    first = first.max(to.saturating_add(1));
                }
                if first <= whole.1 {
                    ends.extend([(first, id, 1), (whole.1.saturating_add(1), id, -1)]);
                }
            }
        }
        ends.sort_unstable();
        let mut here: BTreeMap<u32, i32> = BTreeMap::new();
        let mut found: Vec<(Span, Class)> = Vec::new();
        let mut ends = ends.into_iter().peekable();
        while let Some((at, id, by)) = ends.next() {
            let count = here.entry(id).or_default();
            *count += by;
            if *count == 0 {
                here.remove(&id);
            }
            let Some((next, ..)) = ends.peek() else { break };
            if here.is_empty() || *next == at {
                continue;
            }
            let set: BTreeSet<u32> = here.keys().copied().collect();
            let fresh = Class::try_from(numbers.len()).unwrap();
            let class = *numbers.entry(set).or_insert(fresh);
            match found.last_mut() {
                Some(((_, last), same)) if *same == class && *last + 1 == at => *last = next - 1,
                _ => found.push(((at, next - 1), class)),
            }
        }
        found
    });
    let mut sets = vec![BTreeSet::new(); numbers.len()];
    for (set, class) in numbers {
        sets[class as usize] = set;
    }
    Classes {
        v4: std::mem::take(&mut spans[0]),
        v6: std::mem::take(&mut spans[1]),
        sets,
    }
}
