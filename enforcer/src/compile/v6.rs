//! IPv6 intervals → single hosts for the host table, and a path-compressed trie of nibbles.

use enforcer_common::image::{LEAF, V6_NODE_CHILDREN, V6_NODE_WORDS};

use super::{
    intervals::{self, Intervals, value_at},
    writer::{Full, Writer},
};

/// Longest run of addresses, with the same class before and after, that goes to the host table.
/// A host costs 5 to 11 words there; in the trie a run that is no whole nibble costs a node of 22.
const RUN: u128 = 4;
/// Longest run of prefixes of 64 bits that goes to their table; 4 to 5 words each there.
const NETS: u128 = 4;
/// Nibbles of an address.
const NIBBLES: u32 = 32;

/// Splits single hosts off: short runs between two intervals of one class.
pub(super) fn split(all: &Intervals<u128>) -> (Intervals<u128>, Vec<(u128, u32)>) {
    let mut rest = Intervals::new();
    let mut hosts = Vec::new();
    let mut at = 0;
    while let Some((start, class)) = all.get(at) {
        intervals::push(&mut rest, *start, *class);
        let Some((first, _)) = all.get(at + 1) else {
            break;
        };
        // The next interval of this class, if it starts within reach.
        let end = all
            .iter()
            .enumerate()
            .skip(at + 2)
            .take_while(|(_, (start, _))| start - first <= RUN)
            .find(|(_, (_, other))| other == class);
        match end {
            Some((next, _)) => {
                for pair in all[at + 1..=next].windows(2) {
                    let [(from, class), (to, _)] = pair else {
                        continue;
                    };
                    hosts.extend((*from..*to).map(|address| (address, *class)));
                }
                at = next;
            }
            None => at += 1,
        }
    }
    (rest, hosts)
}

/// Splits whole prefixes of 64 bits off: short runs of one class. What the trie says of them does not
/// matter then, so the class before goes on.
pub(super) fn nets(all: &Intervals<u128>) -> (Intervals<u128>, Vec<(u64, u32)>) {
    let mut rest = Intervals::new();
    let mut nets = Vec::new();
    let whole = |start: u128| start as u64 == 0;
    for (at, (start, class)) in all.iter().enumerate() {
        match all.get(at + 1) {
            Some((end, _))
                if at > 0 && whole(*start) && whole(*end) && (end - start) >> 64 <= NETS =>
            {
                let prefixes = (start >> 64) as u64..(end >> 64) as u64;
                nets.extend(prefixes.map(|prefix| (prefix, *class)));
            }
            _ => intervals::push(&mut rest, *start, *class),
        }
    }
    (rest, nets)
}

/// Writes the trie; returns the entry where look-ups start.
pub(super) fn write(intervals: &Intervals<u128>, writer: &mut Writer) -> Result<u32, Full> {
    let class = |address| value_at(intervals, address).unwrap_or(0);
    // Starts inside the block: where the class changes.
    entry(intervals.get(1..).unwrap_or(&[]), &class, 0, 0, writer)
}

/// The entry for the block of `depth` nibbles at `path`; `changes` are the intervals that start
/// inside the block, but not at its first address.
fn entry(
    changes: &[(u128, u32)],
    class: &impl Fn(u128) -> u32,
    path: u128,
    depth: u32,
    writer: &mut Writer,
) -> Result<u32, Full> {
    let (Some((first, _)), Some((last, after))) = (changes.first(), changes.last()) else {
        return Ok(LEAF | class(path));
    };
    let before = class(path);
    // Where the block begins and ends in one class, the node stands at the smallest block that
    // holds all others, and that class is its background; else it stands here and needs none.
    let common = (first ^ (last - 1)).leading_zeros() / 4;
    let (depth, inside) = if before == *after {
        (common.min(NIBBLES - 1), *first)
    } else {
        (depth, path)
    };
    let path = if depth == 0 {
        0
    } else {
        inside >> (128 - 4 * depth) << (128 - 4 * depth)
    };
    let shift = 4 * (NIBBLES - 1 - depth);
    let mut children = [0; 16];
    let mut rest = changes;
    for (nibble, child) in (0u128..).zip(&mut children) {
        let start = path | nibble << shift;
        let end = start | ((1 << shift) - 1);
        let inside = rest.partition_point(|(change, _)| *change <= end);
        let (mine, later) = rest.split_at(inside);
        rest = later;
        let mine = match mine {
            [(change, _), mine @ ..] if *change == start => mine,
            _ => mine,
        };
        *child = entry(mine, class, start, depth + 1, writer)?;
    }
    let mut words = [0; V6_NODE_WORDS as usize];
    words[0] = depth;
    words[1] = before;
    for (word, shift) in words[2..].iter_mut().zip([96, 64, 32, 0]) {
        *word = (path >> shift) as u32;
    }
    words[V6_NODE_CHILDREN as usize..].copy_from_slice(&children);
    writer.append(&words)
}
