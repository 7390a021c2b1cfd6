//! Services of rules → service classes: (protocol, selector) points that no rule tells apart.

use std::collections::HashMap;

use enforcer_common::image::{self, LEAF};

use crate::policy::model::{Action, Policy, Rule, Service, TUNNEL_PROTOCOLS};

use super::{
    bits::Bits,
    writer::{Full, Writer},
};

const PROTOCOLS: usize = image::PROTOCOLS as usize;
const SELECTORS: usize = 1 << 16;

/// Service classes, before they are written.
pub(super) struct Services {
    /// Number of classes.
    pub(super) count: usize,
    /// Per rule, the classes that it matches.
    pub(super) of_rule: Vec<Bits>,
    /// Per index of the service table: first selectors, ascending from 0, and their class.
    table: Vec<Vec<(u32, u32)>>,
}

/// A distinct list of services: its parts as (table index, first selector, last selector).
type Parts = Vec<(usize, u32, u32)>;

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
            Service::Icmp { kind } => parts.push(icmp(1, kind)),
            Service::Icmpv6 { kind } => parts.push(icmp(58, kind)),
            Service::Protocol(number) => parts.push((usize::from(number), WHOLE.0, WHOLE.1)),
        }
    }
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

/// Every code of a type.
fn icmp(index: usize, kind: u8) -> (usize, u32, u32) {
    let first = u32::from(kind) << 8;
    (index, first, first | 0xff)
}

impl Services {
    pub(super) fn new(policy: &Policy) -> Self {
        let mut lists: Vec<Parts> = Vec::new();
        let mut known: HashMap<Parts, usize> = HashMap::new();
        let list_of_rule: Vec<usize> = policy
            .rules
            .iter()
            .map(|rule| {
                *known.entry(parts(rule)).or_insert_with_key(|parts| {
                    lists.push(parts.clone());
                    lists.len() - 1
                })
            })
            .collect();

        let mut points: Vec<Vec<(u32, usize)>> = vec![Vec::new(); PROTOCOLS];
        for (list, parts) in lists.iter().enumerate() {
            for (index, first, last) in parts {
                if let Some(points) = points.get_mut(*index) {
                    points.push((*first, list));
                    points.push((last + 1, list));
                }
            }
        }
        let mut classes: HashMap<Bits, u32> = HashMap::new();
        let mut lists_of_class: Vec<Bits> = Vec::new();
        let table = points
            .into_iter()
            .map(|points| {
                sweep(points, lists.len(), |set| {
                    *classes.entry(set.clone()).or_insert_with(|| {
                        lists_of_class.push(set.clone());
                        super::word(lists_of_class.len() - 1)
                    })
                })
            })
            .collect();

        let count = lists_of_class.len();
        let mut of_list = vec![Bits::empty(count); lists.len()];
        for (class, members) in lists_of_class.iter().enumerate() {
            for list in members.iter() {
                if let Some(bits) = of_list.get_mut(list) {
                    bits.insert(class);
                }
            }
        }
        Self {
            count,
            of_rule: list_of_rule
                .into_iter()
                .filter_map(|list| of_list.get(list).cloned())
                .collect(),
            table,
        }
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
    mut class_of: impl FnMut(&Bits) -> u32,
) -> Vec<(u32, u32)> {
    points.sort_unstable();
    let mut set = Bits::empty(lists);
    let mut out: Vec<(u32, u32)> = Vec::new();
    let mut close = |start: u32, set: &Bits| {
        let class = class_of(set);
        if out.last().is_none_or(|(_, last)| *last != class) {
            out.push((start, class));
        }
    };
    let mut at = 0;
    for (point, list) in points {
        if point != at {
            close(at, &set);
            at = point;
        }
        if set.contains(list) {
            set.remove(list);
        } else {
            set.insert(list);
        }
    }
    if at <= WHOLE.1 {
        close(at, &set);
    }
    out
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
