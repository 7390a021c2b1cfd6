//! A flow table of another size: what is in the old one is entered into words of the daemon's, by the
//! programs' own rules, and written into the new maps before any program uses them.
//!
//! What opens while this goes on is in the old table alone, and what moves in it may be missed: its
//! next packet is judged anew, as after an eviction.

use std::{cell::Cell, os::fd::BorrowedFd};

use enforcer_common::table::{
    self, Bucket, Flow, Memory, SLOTS, SOURCE_SHARE, WORDS4, WORDS6, set_counts,
};

use super::{DataplaneError, errors::syscall, pins::Meta, sys};

/// Elements of `FLOW_SOURCES`.
pub(super) const SOURCES: u32 = 1 << 14;
/// Maps whose size is the table's, and the one that counts its protected entries.
pub(super) const SIZED: [&str; 5] = [
    "FLOWS4",
    "FLOWS6",
    "FLOW_TAGS4",
    "FLOW_TAGS6",
    "FLOW_SOURCES",
];

/// A table in this process.
pub(super) struct Table {
    words: [Vec<Cell<u32>>; 2],
    tags: [Vec<Cell<u64>>; 2],
    sources: Vec<Cell<u32>>,
    meta: Meta,
}

const fn slot_words(v6: bool) -> u32 {
    if v6 { WORDS6 } else { WORDS4 }
}

fn cells<T: Default>(count: u32) -> Vec<Cell<T>> {
    (0..count).map(|_| Cell::default()).collect()
}

impl Table {
    /// A table as `meta` wants it, with these flows; those of openers that have more than their share
    /// of a smaller table are forgotten, the oldest first.
    pub(super) fn with(mut flows: Vec<Flow>, meta: Meta, now: u64, hz: u32) -> Self {
        let table = Self {
            words: [false, true].map(|v6| cells(meta.buckets * SLOTS * slot_words(v6))),
            tags: [cells(meta.buckets), cells(meta.buckets)],
            sources: cells(SOURCES),
            meta,
        };
        let age = |flow: &Flow| (now as u32).wrapping_sub(flow.entry.last_seen as u32);
        flows.sort_unstable_by_key(|flow| std::cmp::Reverse(age(flow)));
        let known: std::collections::HashMap<_, _> = flows
            .iter()
            .map(|flow| (flow.key, (flow.packets, flow.bytes)))
            .collect();
        for flow in &flows {
            let mut entry = flow.entry;
            entry.last_seen = now.wrapping_sub(u64::from(age(flow)));
            table::insert(&&table, &flow.key, &entry, hz);
        }
        for v6 in [false, true] {
            for slot in table.words[usize::from(v6)].chunks_exact(slot_words(v6) as usize) {
                let mut words: Vec<u32> = slot.iter().map(Cell::get).collect();
                let Some(flow) = table::flow(&words) else {
                    continue;
                };
                if let Some((packets, bytes)) = known.get(&flow.key) {
                    set_counts(&mut words, *packets, *bytes);
                    slot.iter()
                        .zip(words)
                        .for_each(|(cell, word)| cell.set(word));
                }
            }
        }
        table
    }

    /// Writes it into empty maps, named as in [`SIZED`].
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn write<'a>(
        &self,
        map: impl Fn(&str) -> Result<BorrowedFd<'a>, DataplaneError>,
    ) -> Result<(), DataplaneError> {
        let failed = syscall("write the flow table");
        for (v6, buckets, tags) in [
            (false, "FLOWS4", "FLOW_TAGS4"),
            (true, "FLOWS6", "FLOW_TAGS6"),
        ] {
            let (buckets, tags) = (map(buckets)?, map(tags)?);
            let bucket_words = (SLOTS * slot_words(v6)) as usize;
            let words = self.words[usize::from(v6)].chunks_exact(bucket_words);
            for ((index, words), tag) in (0..).zip(words).zip(&self.tags[usize::from(v6)]) {
                let tag = tag.get();
                if tag == 0 {
                    continue;
                }
                let words: Vec<u32> = words.iter().map(Cell::get).collect();
                sys::update_words(buckets, index, &words).map_err(&failed)?;
                let tag = [tag as u32, (tag >> 32) as u32];
                sys::update_words(tags, index, &tag).map_err(&failed)?;
            }
        }
        let sources = map("FLOW_SOURCES")?;
        for (index, count) in (0..).zip(&self.sources) {
            if count.get() != 0 {
                sys::update_words(sources, index, &[count.get()]).map_err(&failed)?;
            }
        }
        Ok(())
    }
}

/// A bucket of it.
#[derive(Clone, Copy)]
pub(super) struct Words<'a>(&'a [Cell<u32>]);

impl Bucket for Words<'_> {
    fn get(&self, at: u32) -> u32 {
        self.0.get(at as usize).map_or(0, Cell::get)
    }

    fn pair(&self, at: u32) -> u64 {
        u64::from(self.get(at)) | u64::from(self.get(at + 1)) << 32
    }

    fn after(&self, _: u64) -> Self {
        *self
    }

    fn set(&self, at: u32, value: u32) {
        if let Some(cell) = self.0.get(at as usize) {
            cell.set(value);
        }
    }

    fn publish(&self, at: u32, value: u32) {
        self.set(at, value);
    }
}

/// One thread's own: locks are free.
impl<'a> Memory for &'a Table {
    type Bucket = Words<'a>;

    fn bucket(&self, v6: bool, index: u32) -> Option<Words<'a>> {
        let words = (SLOTS * slot_words(v6)) as usize;
        let first = index as usize * words;
        self.words[usize::from(v6)]
            .get(first..first + words)
            .map(Words)
    }

    fn tags(&self, v6: bool, index: u32) -> u64 {
        let tags = self.tags[usize::from(v6)].get(index as usize);
        tags.map_or(0, Cell::get)
    }

    fn index_after(&self, index: u32, _: u64) -> u32 {
        index
    }

    fn set_tag(&self, v6: bool, index: u32, slot: u32, tag: u32) {
        if let Some(tags) = self.tags[usize::from(v6)].get(index as usize) {
            let others = tags.get() & !(0xffff << (16 * slot));
            tags.set(others | u64::from(tag) << (16 * slot));
        }
    }

    fn mask(&self, _: bool) -> u32 {
        self.meta.buckets - 1
    }

    fn secret(&self, index: usize) -> u64 {
        self.meta.secrets.get(index).copied().unwrap_or_default()
    }

    fn lock(&self, _: bool, _: u32) -> bool {
        true
    }

    fn unlock(&self, _: bool, _: u32) {}

    fn protected(&self, hash: u32) -> u32 {
        let count = self.sources.get((hash & (SOURCES - 1)) as usize);
        count.map_or(0, Cell::get)
    }

    fn protect(&self, hash: u32, by: u32) {
        if let Some(count) = self.sources.get((hash & (SOURCES - 1)) as usize) {
            count.set(count.get().wrapping_add(by));
        }
    }

    fn cap(&self) -> u32 {
        self.meta.buckets * SLOTS / SOURCE_SHARE
    }
}
