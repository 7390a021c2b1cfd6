//! The growing array of words.

use std::collections::HashMap;

use enforcer_common::image::{LEAF, header};

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
    nodes: HashMap<Vec<u32>, u32>,
}

/// Words in a cache line: tables of buckets start at one.
const LINE: usize = 16;

impl Writer {
    /// An image of header zeros.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            words: vec![0; header::WORDS as usize],
            limit,
            nodes: HashMap::new(),
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
        let padded = self.words.len().next_multiple_of(LINE);
        self.reserve(padded - self.words.len() + words.len())?;
        self.words.resize(padded, 0);
        self.append(words)
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
        if let Some(offset) = self.nodes.get(children) {
            return Ok(*offset);
        }
        let offset = self.append_aligned(children)?;
        self.nodes.insert(children.to_vec(), offset);
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
