//! Services of rules → service classes: (protocol, selector) points that no rule tells apart.

use std::collections::{HashMap, hash_map::Entry};

use enforcer_common::image::{self, LEAF};

use crate::policy::model::{Action, Policy, Rule, Service, TUNNEL_PROTOCOLS};

use super::{
    Failsafe, SCRATCH, Stop,
    bits::{self, Bits},
    intern::Interner,
    writer::{Full, Writer},
};

const PROTOCOLS: usize = image::PROTOCOLS as usize;
const SELECTORS: usize = 1 << 16;

/// Service classes, before they are written.
pub(super) struct Services {
    /// Number of classes.
    pub(super) count: usize,
    /// Per distinct list of services, the classes that it matches.
    of_list: Vec<Bits>,
    /// Per rule, its list.
    list_of_rule: Vec<usize>,
    /// Per failsafe, its list.
    list_of_failsafe: Vec<usize>,
    /// Per index of the service table: first selectors, ascending from 0, and their class.
    table: Vec<Vec<(u32, u32)>>,
}

/// A distinct list of services: its parts as (table index, first selector, last selector).
type Parts = Vec<(usize, u32, u32)>;

/// Parts that all distinct lists may have.
const MOST_PARTS: usize = 1 << 20;

const WHOLE: (u32, u32) = (0, SELECTORS as u32 - 1);

fn parts(rule: &Rule) -> Parts {
    let mut parts = Parts::new();
    for service in &rule.services {
        match *service {
            Service::Any => parts.extend(
                (0..PROTOCOLS)
                    .filter(|index| {
                        rule.action == Action::Deny
                            || !u8::try_from(*index).is_ok_and(|p| TUNNEL_PROTOCOLS.contains(&p))
                    })
                    .map(|index| (index, WHOLE.0, WHOLE.1)),
            ),
            Service::Ports {
                transport,
                first,
                last,
            } => parts.push((
                usize::from(transport.number()),
                u32::from(first),
                u32::from(last),
            )),
            Service::Icmp { kind, code } => parts.push(icmp(1, kind, code)),
            Service::Icmpv6 { kind, code } => parts.push(icmp(58, kind, code)),
            Service::Protocol(number) => parts.push((usize::from(number), WHOLE.0, WHOLE.1)),
        }
    }
    unite(parts)
}

fn failsafe_parts(failsafe: &Failsafe) -> Parts {
    let ports = failsafe.ports.iter();
    unite(
        ports
            .map(|(transport, first, last)| {
                let index = usize::from(transport.number());
                (index, u32::from(*first), u32::from(*last))
            })
            .collect(),
    )
}

fn unite(mut parts: Parts) -> Parts {
    parts.sort_unstable();
    // Unite what overlaps or touches, so that a sweep meets each part's ends once.
    let mut united: Parts = Vec::with_capacity(parts.len());
    for (index, first, last) in parts {
        match united.last_mut() {
            Some((i, _, end)) if *i == index && first <= *end + 1 => *end = last.max(*end),
            _ => united.push((index, first, last)),
        }
    }
    united
}

/// A code of a type, or all of them.
fn icmp(index: usize, kind: u8, code: Option<u8>) -> (usize, u32, u32) {
    let first = u32::from(kind) << 8;
    match code {
        Some(code) => (index, first | u32::from(code), first | u32::from(code)),
        None => (index, first, first | 0xff),
    }
}

impl Services {
    pub(super) fn new(policy: &Policy, failsafes: &[Failsafe]) -> Result<Self, Stop> {
        let mut lists: Vec<Parts> = Vec::new();
        let mut known: HashMap<Parts, usize> = HashMap::new();
        let mut list_of_rule = Vec::with_capacity(policy.rules.len());
        let mut size = 0;
        let of_rules = policy.rules.iter().map(parts);
        for parts in of_rules.chain(failsafes.iter().map(failsafe_parts)) {
            let list = match known.entry(parts) {
                Entry::Occupied(entry) => *entry.get(),
                Entry::Vacant(entry) => {
                    size += entry.key().len();
                    if size > MOST_PARTS {
                        return Err(Stop::Complex);
                    }
                    lists.push(entry.key().clone());
                    *entry.insert(lists.len() - 1)
                }
            };
            list_of_rule.push(list);
        }
        drop(known);
        let list_of_failsafe = list_of_rule.split_off(policy.rules.len());

        let mut points: Vec<Vec<(u32, usize)>> = vec![Vec::new(); PROTOCOLS];
        for (list, parts) in lists.iter().enumerate() {
            for (index, first, last) in parts {
                if let Some(points) = points.get_mut(*index) {
                    points.push((*first, list));
                    points.push((last + 1, list));
                }
            }
        }
        let mut classes = Interner::default();
        let mut table = Vec::with_capacity(PROTOCOLS);
        for points in points {
            table.push(sweep(points, lists.len(), |set| {
                let class = classes.intern(set.words());
                // As much again for the lists by class, turned round below.
                (classes.size() <= SCRATCH / 2)
                    .then_some(class)
                    .ok_or(Stop::Complex)
            })?);
        }

        let count = classes.len();
        let mut of_list = vec![Bits::empty(count); lists.len()];
        for class in 0..count {
            bits::each(classes.get(class), |list| {
                if let Some(bits) = of_list.get_mut(list) {
                    bits.insert(class);
                }
            });
        }
        Ok(Self {
            count,
            of_list,
            list_of_rule,
            list_of_failsafe,
            table,
        })
    }

    /// Number of distinct lists of services.
    pub(super) fn lists(&self) -> usize {
        self.of_list.len()
    }

    /// Number of the rule's list.
    pub(super) fn list(&self, rule: usize) -> Option<usize> {
        self.list_of_rule.get(rule).copied()
    }

    /// The classes that the rule matches.
    pub(super) fn of_rule(&self, rule: usize) -> Option<&Bits> {
        self.of_list.get(self.list(rule)?)
    }

    /// Bit `i` says that failsafe `i` names the class.
    pub(super) fn failsafes_of(&self, class: usize) -> u32 {
        let lists = (0..).zip(&self.list_of_failsafe);
        let naming = lists.filter(|(_, list)| {
            let bits = self.of_list.get(**list);
            bits.is_some_and(|bits| bits.contains(class))
        });
        naming.fold(0, |bits, (number, _): (u32, _)| bits | 1 << number)
    }

    /// Writes the trie, nodes first; returns the offset of the table.
    pub(super) fn write(&self, writer: &mut Writer) -> Result<u32, Full> {
        let mut entries = Vec::with_capacity(PROTOCOLS);
        for selectors in &self.table {
            entries.push(match selectors.as_slice() {
                [(_, class)] => LEAF | class,
                _ => {
                    let flat = flatten(selectors);
                    let high = flat
                        .chunks(image::BYTE_NODE_WORDS as usize)
                        .map(|low| writer.byte_node(low))
                        .collect::<Result<Vec<u32>, Full>>()?;
                    writer.byte_node(&high)?
                }
            });
        }
        writer.append(&entries)
    }
}

/// Walks the points of one protocol; neighbours in the result differ.
fn sweep(
    mut points: Vec<(u32, usize)>,
    lists: usize,
    mut class_of: impl FnMut(&Bits) -> Result<u32, Stop>,
) -> Result<Vec<(u32, u32)>, Stop> {
    points.sort_unstable();
    let mut set = Bits::empty(lists);
    let mut out: Vec<(u32, u32)> = Vec::new();
    let mut close = |start: u32, set: &Bits| -> Result<(), Stop> {
        let class = class_of(set)?;
        if out.last().is_none_or(|(_, last)| *last != class) {
            out.push((start, class));
        }
        Ok(())
    };
    let mut at = 0;
    for (point, list) in points {
        if point != at {
            close(at, &set)?;
            at = point;
        }
        if set.contains(list) {
            set.remove(list);
        } else {
            set.insert(list);
        }
    }
    if at <= WHOLE.1 {
        close(at, &set)?;
    }
    Ok(out)
}

/// One leaf entry per selector.
fn flatten(selectors: &[(u32, u32)]) -> Vec<u32> {
    let mut flat = Vec::with_capacity(SELECTORS);
    let ends = selectors.iter().skip(1).map(|(start, _)| *start as usize);
    for ((_, class), end) in selectors.iter().zip(ends.chain([SELECTORS])) {
        flat.resize(end, LEAF | class);
    }
    flat
}
