//! IPv4 intervals → a trie of 16 bits, then 8 or 4 at a time, and single hosts for the host table.

use enforcer_common::image::{
    BYTE_NODE_WORDS, LEAF, NIBBLE_NODE_WORDS, V4_NODE_BITS, V4_ROOT_WORDS,
};

use super::{
    intern::{Hasher, Slots},
    intervals::Intervals,
    writer::{Full, Writer},
};

/// Words that one host costs in the host table, in halves: two and a half.
const HOST_HALVES: usize = 5;
/// Addresses of a /24.
const BLOCK: u32 = BYTE_NODE_WORDS;

/// The trie's offset, and the hosts that are to be found in the host table instead.
pub(super) struct Trie {
    pub(super) root: u32,
    pub(super) hosts: Vec<(u32, u32)>,
}

/// What a /24 holds: first last-bytes, ascending from 0, and their class. Equal ones share a node.
type Pattern = Vec<(u8, u32)>;

/// How a pattern is written.
#[derive(Default)]
struct Plan {
    shared: usize,
    /// The class of most addresses.
    background: u32,
    /// Addresses of other classes; left empty where a node is cheaper in any case.
    hosts: Vec<(u8, u32)>,
    /// How many there are.
    host_count: usize,
    /// Words of the trie for a /24 of the pattern.
    node_words: usize,
}

/// A stretch of the address space, first and last.
#[derive(Clone, Copy)]
struct Block {
    first: u32,
    last: u32,
}

/// Moves through the intervals in ascending order of address.
struct Cursor<'a> {
    intervals: &'a [(u32, u32)],
}

impl<'a> Cursor<'a> {
    /// The intervals that reach into the block, the first of which may start before it.
    fn within(&mut self, block: Block) -> &'a [(u32, u32)] {
        while let [_, second, ..] = self.intervals
            && second.0 <= block.first
        {
            self.intervals = &self.intervals[1..];
        }
        let reach = self
            .intervals
            .iter()
            .take_while(|(start, _)| *start <= block.last)
            .count();
        &self.intervals[..reach]
    }
}

fn pattern(intervals: &[(u32, u32)], block: Block, pattern: &mut Pattern) {
    pattern.clear();
    pattern.extend(intervals.iter().map(|(start, class)| {
        let offset = start.saturating_sub(block.first);
        (u8::try_from(offset).unwrap_or(u8::MAX), *class)
    }));
}

/// Patterns by number, and how each is written.
#[derive(Default)]
struct Plans {
    known: Slots,
    list: Vec<(Pattern, Plan)>,
}

impl Plans {
    /// Counts one /24 of the pattern; returns its number.
    fn count(&mut self, pattern: &Pattern) -> u32 {
        let mut hasher = Hasher::new();
        for (byte, class) in pattern {
            hasher.feed(u32::from(*byte));
            hasher.feed(*class);
        }
        let hash = hasher.finish();
        let list = &self.list;
        let same = |number: u32| {
            let known = list.get(number as usize);
            known.is_some_and(|(known, _)| known == pattern)
        };
        let number = self.known.find(hash, same).unwrap_or_else(|| {
            let number = super::word(self.list.len());
            self.list.push((pattern.clone(), Plan::new(pattern)));
            self.known.insert(hash, number);
            number
        });
        if let Some((_, plan)) = self.list.get_mut(number as usize) {
            plan.shared += 1;
        }
        number
    }
}

fn flatten(pattern: &[(u8, u32)]) -> Vec<u32> {
    let mut flat = Vec::with_capacity(BLOCK as usize);
    let ends = pattern.iter().skip(1).map(|(start, _)| usize::from(*start));
    for ((_, class), end) in pattern.iter().zip(ends.chain([BLOCK as usize])) {
        flat.resize(end, *class);
    }
    flat
}

impl Plan {
    fn new(pattern: &[(u8, u32)]) -> Self {
        let flat = flatten(pattern);
        let ends = pattern.iter().skip(1).map(|(start, _)| u32::from(*start));
        let runs = pattern.iter().zip(ends.chain([BLOCK]));
        let mut runs: Vec<(u32, usize)> = runs
            .map(|((start, class), end)| (*class, (end - u32::from(*start)) as usize))
            .collect();
        runs.sort_unstable();
        let mut background = (0, 0);
        for of_class in runs.chunk_by(|a, b| a.0 == b.0) {
            let count = of_class.iter().map(|(_, length)| length).sum();
            if count > background.0 {
                background = (count, of_class[0].0);
            }
        }
        let host_count = flat.len() - background.0;
        let mut plan = Self {
            shared: 1,
            background: background.1,
            hosts: Vec::new(),
            host_count,
            node_words: node_words(&flat.iter().map(|class| LEAF | class).collect::<Vec<_>>()),
        };
        if plan.as_hosts() {
            plan.hosts.reserve_exact(host_count);
            let hosts = (0..=u8::MAX).zip(flat);
            let hosts = hosts.filter(|(_, class)| *class != background.1);
            plan.hosts.extend(hosts);
        }
        plan.shared = 0;
        plan
    }

    /// Whether hosts cost less than a node, which all /24s of the pattern share.
    fn as_hosts(&self) -> bool {
        self.host_count * HOST_HALVES * self.shared <= self.node_words * 2
    }
}

/// Words of nodes for these children of a byte.
fn node_words(children: &[u32]) -> usize {
    let narrow = NIBBLE_NODE_WORDS as usize;
    let mixed = children.chunks(narrow).filter(|part| !is_leaf(part));
    let nodes = (mixed.count() + 1) * narrow;
    nodes.min(BYTE_NODE_WORDS as usize)
}

/// Whether a node of these children would say the same for all of them. (Where all are one node,
/// it would not: that node looks at further bits.)
fn is_leaf(children: &[u32]) -> bool {
    let same = children.windows(2).all(|two| two[0] == two[1]);
    same && children.first().is_none_or(|first| first & LEAF != 0)
}

/// The entry for a node of these children of a byte: where few parts of it differ inside, a narrow
/// node of narrow nodes takes less room, and a look-up one load more.
fn node(children: &[u32], writer: &mut Writer) -> Result<u32, Full> {
    let described = |offset: u32, bits: u32| {
        if offset & LEAF == 0 {
            offset | bits << V4_NODE_BITS
        } else {
            offset
        }
    };
    let wide = BYTE_NODE_WORDS as usize;
    if node_words(children) == wide {
        return Ok(described(writer.byte_node(children)?, 8));
    }
    let parts = children.chunks(NIBBLE_NODE_WORDS as usize);
    let parts = parts.map(|part| match part {
        [first, ..] if is_leaf(part) => Ok(*first),
        part => Ok(described(writer.byte_node(part)?, 4)),
    });
    let parts = parts.collect::<Result<Vec<u32>, Full>>()?;
    Ok(described(writer.byte_node(&parts)?, 4))
}

/// A part of the address space, as the trie sees it.
enum Found<'a> {
    /// A /16 of one class.
    Wide(u32),
    /// A /24 of one class, in a /16 of several.
    Uniform(u32),
    /// A /24 of several classes.
    Mixed(&'a [(u32, u32)], Block),
}

/// Goes through the whole address space in ascending order.
fn for_each_block(
    intervals: &Intervals<u32>,
    mut act: impl FnMut(Found<'_>) -> Result<(), Full>,
) -> Result<(), Full> {
    let mut cursor = Cursor { intervals };
    for upper in 0..V4_ROOT_WORDS {
        let wide = Block {
            first: upper << 16,
            last: upper << 16 | 0xffff,
        };
        if let [(_, class)] = cursor.within(wide) {
            act(Found::Wide(*class))?;
            continue;
        }
        for byte in 0..BLOCK {
            let first = wide.first | byte << 8;
            let block = Block {
                first,
                last: first | 0xff,
            };
            act(match cursor.within(block) {
                [(_, class)] => Found::Uniform(*class),
                several => Found::Mixed(several, block),
            })?;
        }
    }
    Ok(())
}

/// Builds and writes the trie.
pub(super) fn write(intervals: &Intervals<u32>, writer: &mut Writer) -> Result<Trie, Full> {
    let mut plans = Plans::default();
    // The pattern of each /24 that needs one.
    let mut numbers = Vec::new();
    let mut scratch = Pattern::new();
    for_each_block(intervals, |found| {
        if let Found::Mixed(intervals, block) = found {
            pattern(intervals, block, &mut scratch);
            numbers.push(plans.count(&scratch));
        }
        Ok(())
    })?;
    let mut numbers = numbers.into_iter();

    let mut hosts = Vec::new();
    let mut entries = Vec::with_capacity(V4_ROOT_WORDS as usize);
    let mut high: Vec<u32> = Vec::with_capacity(BLOCK as usize);
    for_each_block(intervals, |found| {
        match found {
            Found::Wide(class) => entries.push(LEAF | class),
            Found::Uniform(class) => high.push(LEAF | class),
            Found::Mixed(_, block) => {
                let number = numbers.next().unwrap_or(0);
                match plans.list.get(number as usize) {
                    Some((_, plan)) if plan.as_hosts() => {
                        let listed = plan.hosts.iter();
                        hosts.extend(listed.map(|(byte, c)| (block.first | u32::from(*byte), *c)));
                        high.push(LEAF | plan.background);
                    }
                    of_block => {
                        let pattern = of_block.map_or(&[][..], |(pattern, _)| pattern);
                        let leaves: Vec<u32> = flatten(pattern).iter().map(|c| LEAF | c).collect();
                        high.push(node(&leaves, writer)?);
                    }
                }
            }
        }
        if high.len() == BLOCK as usize {
            entries.push(node(&high, writer)?);
            high.clear();
        }
        Ok(())
    })?;
    Ok(Trie {
        root: writer.append_aligned(&entries)?,
        hosts,
    })
}
