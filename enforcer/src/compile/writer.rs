//! The growing array of words.

use enforcer_common::image::{LEAF, header};

use super::intern::{Slots, hash};

/// The image would grow past its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full {
    /// Words that are needed, at least.
    pub(super) words: usize,
}

/// Appends tables and counts what they take.
pub(super) struct Writer {
    words: Vec<u32>,
    limit: usize,
    /// Offsets of nodes.
    nodes: Slots,
}

/// Words in a cache line: tables of buckets start at one.
const LINE: usize = 16;

impl Writer {
    /// An image of header zeros.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            words: vec![0; header::WORDS as usize],
            limit,
            nodes: Slots::default(),
        }
    }

    /// The words so far.
    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    /// Whether `more` words still fit: asked before large tables are built.
    pub(super) fn reserve(&self, more: usize) -> Result<(), Full> {
        let words = self.words.len().saturating_add(more);
        if words > self.limit {
            return Err(Full { words });
        }
        Ok(())
    }

    /// Appends words; returns their offset.
    pub(super) fn append(&mut self, words: &[u32]) -> Result<u32, Full> {
        self.reserve(words.len())?;
        let offset = super::word(self.words.len());
        self.words.extend_from_slice(words);
        Ok(offset)
    }

    /// Pads to a cache line and appends.
    pub(super) fn append_aligned(&mut self, words: &[u32]) -> Result<u32, Full> {
        self.align(words.len())?;
        self.append(words)
    }

    /// Pads to a cache line and appends `count` words that come one by one: no copy of a large
    /// table is ever made.
    pub(super) fn append_each(
        &mut self,
        count: usize,
        words: impl Iterator<Item = u32>,
    ) -> Result<u32, Full> {
        self.align(count)?;
        let offset = super::word(self.words.len());
        self.words.reserve_exact(count);
        self.words.extend(words.take(count));
        Ok(offset)
    }

    /// Pads to a cache line, where `more` words are to follow.
    fn align(&mut self, more: usize) -> Result<(), Full> {
        let padded = self.words.len().next_multiple_of(LINE);
        self.reserve((padded - self.words.len()).saturating_add(more))?;
        self.words.resize(padded, 0);
        Ok(())
    }

    /// The entry for a node of byte-indexed children: a leaf where all are the same one, else a
    /// node, written once however often it is asked for.
    pub(super) fn byte_node(&mut self, children: &[u32]) -> Result<u32, Full> {
        if let [first, rest @ ..] = children
            && first & LEAF != 0
            && rest.iter().all(|child| child == first)
        {
            return Ok(*first);
        }
        let hash = hash(children);
        let same = |offset: u32| {
            let rest = self.words.get(offset as usize..);
            rest.is_some_and(|rest| rest.starts_with(children))
        };
        if let Some(offset) = self.nodes.find(hash, same) {
            return Ok(offset);
        }
        let offset = self.append_aligned(children)?;
        self.nodes.insert(hash, offset);
        Ok(offset)
    }

    /// Writes a header word.
    pub(super) fn set(&mut self, index: u32, value: u32) {
        if let Some(word) = self.words.get_mut(index as usize) {
            *word = value;
        }
    }

    pub(super) fn finish(self) -> Vec<u32> {
        self.words
    }
}
