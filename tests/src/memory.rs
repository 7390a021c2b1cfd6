//! The programs' flow table in memory of the host, for one thread: the same code, other words.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
};

use enforcer_common::{
    flow::{FlowSlot as _, FlowTable, Glance, Glances as _},
    table::{self, Bucket, Flow, Flows, Held, Memory, SECRETS, SLOTS, WORDS4, WORDS6},
    wire::{FlowEntry, FlowKey, FragmentEntry, FragmentKey},
};

use crate::host::HZ;

/// Words of a slot of this family.
pub const fn slot_words(v6: bool) -> u32 {
    if v6 { WORDS6 } else { WORDS4 }
}

/// A table's buckets, locks and counters.
pub struct HostMemory {
    words: [Vec<Cell<u32>>; 2],
    tags: [Vec<Cell<u32>>; 2],
    buckets: u32,
    secrets: [u64; SECRETS],
    cap: u32,
    held: RefCell<HashSet<(bool, u32)>>,
    /// Protected entries by the opener's hash; those that came to nothing stay as 0.
    pub protected: RefCell<HashMap<u32, u32>>,
    /// The last two buckets whose tags were asked for.
    asked: Cell<[u32; 2]>,
    /// Somebody holds every lock.
    pub stuck: Cell<bool>,
}

impl HostMemory {
    /// An empty table: `buckets`, a power of two, of each family, and `cap` protected entries for
    /// an opener. The secrets follow from `seed`.
    pub fn new(buckets: u32, cap: u32, seed: u64) -> Self {
        assert!(buckets.is_power_of_two());
        let mut state = seed;
        let secrets = std::array::from_fn(|_| {
            // SplitMix64.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        });
        let words = |v6| {
            let count = buckets * SLOTS * slot_words(v6);
            (0..count).map(|_| Cell::new(0)).collect()
        };
        Self {
            words: [words(false), words(true)],
            tags: std::array::from_fn(|_| vec![Cell::new(0); (buckets * SLOTS) as usize]),
            buckets,
            secrets,
            cap,
            held: RefCell::default(),
            protected: RefCell::default(),
            asked: Cell::default(),
            stuck: Cell::new(false),
        }
    }

    /// A word of a slot, for tests that know what it is.
    pub fn word(&self, v6: bool, slot: u32, at: u32) -> &Cell<u32> {
        &self.words[usize::from(v6)][(slot * slot_words(v6) + at) as usize]
    }

    /// A slot's tag.
    pub fn tag(&self, v6: bool, slot: u32) -> &Cell<u32> {
        &self.tags[usize::from(v6)][slot as usize]
    }

    /// Number of slots of each family.
    pub fn slots(&self) -> u32 {
        self.buckets * SLOTS
    }

    /// What is in each slot of a family.
    pub fn dump(&self, v6: bool) -> Vec<Option<Flow>> {
        let words: Vec<u32> = self.words[usize::from(v6)].iter().map(Cell::get).collect();
        let slots = words.chunks_exact(slot_words(v6) as usize);
        slots.map(table::flow).collect()
    }

    /// All flows, once each.
    pub fn flows(&self) -> HashMap<FlowKey, Flow> {
        let all: Vec<Flow> = [false, true]
            .into_iter()
            .flat_map(|v6| self.dump(v6).into_iter().flatten())
            .collect();
        let count = all.len();
        let flows: HashMap<_, _> = all.into_iter().map(|flow| (flow.key, flow)).collect();
        assert_eq!(flows.len(), count, "a key in two slots");
        flows
    }

    /// Takes what expired out of every bucket; how many.
    pub fn sweep(&self, now: u64) -> u32 {
        let buckets = (0..self.buckets).flat_map(|index| [(false, index), (true, index)]);
        let swept = buckets.map(|(v6, index)| table::sweep(&self, v6, index, now, HZ));
        swept.sum()
    }

    /// The hash by which this entry's opener is counted, as an empty table with the same secrets
    /// shows it.
    pub fn opener(&self, key: &FlowKey, entry: &FlowEntry) -> u32 {
        let mut empty = Self::new(1, 1, 0);
        empty.secrets = self.secrets;
        let answered = FlowEntry {
            flags: entry.flags & enforcer_common::flow::OPENER_IS_LOW
                | enforcer_common::flow::REPLIED,
            ..*entry
        };
        assert!(table::insert(&&empty, key, &answered, HZ));
        let protected = empty.protected.borrow();
        assert_eq!(protected.len(), 1);
        *protected.keys().next().unwrap()
    }

    /// The home bucket of a key and the second one: where somebody looks for it in vain.
    pub fn buckets_of(&self, key: &FlowKey) -> [u32; 2] {
        let mut empty = Self::new(self.buckets, 1, 0);
        empty.secrets = self.secrets;
        assert!(!table::known(&&empty, key));
        empty.asked.get()
    }

    /// Asserts that no lock is held and that the counters are the protected entries', no more than
    /// the cap for any opener.
    pub fn balances(&self) {
        assert!(self.held.borrow().is_empty(), "a lock that is still held");
        for v6 in [false, true] {
            for (slot, flow) in (0..).zip(self.dump(v6)) {
                assert_eq!(self.tag(v6, slot).get() != 0, flow.is_some(), "a tag");
            }
        }
        let mut counts = HashMap::<u32, u32>::new();
        for flow in self.flows().values().filter(|flow| flow.protected) {
            *counts
                .entry(self.opener(&flow.key, &flow.entry))
                .or_default() += 1;
        }
        let mut counters = self.protected.borrow().clone();
        counters.retain(|_, count| *count != 0);
        assert_eq!(counters, counts, "counters and protected entries");
        assert!(counts.values().all(|count| *count <= self.cap), "the cap");
    }
}

/// A bucket of it.
#[derive(Clone, Copy)]
pub struct Words<'a>(&'a [Cell<u32>]);

impl Bucket for Words<'_> {
    fn get(&self, at: u32) -> u32 {
        self.0[at as usize].get()
    }

    fn pair(&self, at: u32) -> u64 {
        assert_eq!(at % 2, 0, "aligned");
        u64::from(self.get(at)) | u64::from(self.get(at + 1)) << 32
    }

    fn after(&self, _: u64) -> Self {
        *self
    }

    fn set(&self, at: u32, value: u32) {
        self.0[at as usize].set(value);
    }

    fn publish(&self, at: u32, value: u32) {
        self.set(at, value);
    }
}

impl<'a> Memory for &'a HostMemory {
    type Bucket = Words<'a>;

    fn bucket(&self, v6: bool, index: u32) -> Option<Words<'a>> {
        let words = (SLOTS * slot_words(v6)) as usize;
        let first = index as usize * words;
        let bucket = self.words[usize::from(v6)].get(first..first + words);
        bucket.map(Words)
    }

    fn tags(&self, v6: bool, index: u32) -> u64 {
        self.asked.set([self.asked.get()[1], index]);
        (0..SLOTS).fold(0, |tags, slot| {
            tags | u64::from(self.tag(v6, index * SLOTS + slot).get()) << (16 * slot)
        })
    }

    fn index_after(&self, index: u32, _: u64) -> u32 {
        index
    }

    fn set_tag(&self, v6: bool, index: u32, slot: u32, tag: u32) {
        self.tag(v6, index * SLOTS + slot).set(tag);
    }

    fn mask(&self, _: bool) -> u32 {
        self.buckets - 1
    }

    fn secret(&self, index: usize) -> u64 {
        self.secrets[index]
    }

    fn lock(&self, v6: bool, stripe: u32) -> bool {
        if self.stuck.get() {
            return false;
        }
        let new = self.held.borrow_mut().insert((v6, stripe));
        assert!(new, "a lock taken twice");
        true
    }

    fn unlock(&self, v6: bool, stripe: u32) {
        let held = self.held.borrow_mut().remove(&(v6, stripe));
        assert!(held, "a lock given back that was not taken");
    }

    fn protected(&self, hash: u32) -> u32 {
        self.protected
            .borrow()
            .get(&hash)
            .copied()
            .unwrap_or_default()
    }

    fn protect(&self, hash: u32, by: u32) {
        let mut protected = self.protected.borrow_mut();
        let count = protected.entry(hash).or_default();
        *count = count.wrapping_add(by);
    }

    fn cap(&self) -> u32 {
        self.cap
    }
}

/// The table as the judgement uses it, with fragments of unlimited number.
pub struct HostTable<'a> {
    pub memory: &'a HostMemory,
    pub fragments: RefCell<HashMap<FragmentKey, FragmentEntry>>,
}

impl<'a> HostTable<'a> {
    pub fn new(memory: &'a HostMemory) -> Self {
        Self {
            memory,
            fragments: RefCell::default(),
        }
    }
}

impl<'a> FlowTable for HostTable<'a> {
    type Slot = Held<&'a HostMemory>;

    fn find(&self, key: &FlowKey) -> Option<Self::Slot> {
        let flows = Flows(self.memory);
        let found = flows.find(key);
        // What does not wait may leave it open, but never says something else.
        let there = found.as_ref().map(|slot| slot.load());
        match flows.glance(key) {
            Glance::Entry(seen) => assert_eq!(Some(seen.load()), there),
            Glance::Nothing => assert_eq!(None, there),
            Glance::Busy => {}
        }
        found
    }

    fn insert(&self, key: &FlowKey, entry: &FlowEntry) -> bool {
        table::insert(&self.memory, key, entry, HZ)
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentEntry> {
        self.fragments.borrow().get(key).copied()
    }

    fn insert_fragment(&self, key: &FragmentKey, entry: &FragmentEntry) -> bool {
        self.fragments.borrow_mut().insert(*key, *entry);
        true
    }
}
