//! The flow table: buckets of four slots with exact keys, read without locks.
//!
//! A slot is one cache line (IPv6: two). A key has two buckets; the second takes what the home
//! bucket refuses. Beside the buckets are tags, sixteen bits of the hash for each slot, and those of
//! a key's two buckets are in one line: who looks for a flow that is not there touches that line
//! and none of the eight slots. Readers look at a slot's version before and after; writers hold the
//! lock of the key's stripe, make the version odd, write, and make it even again (a sequence lock
//! per slot). A tag is written last, and is 0 where there is no entry: a reader that sees an old one
//! misses an entry that is being made or goes away, never one that only changes or moves: where both
//! buckets of a new entry are full, one of theirs goes to its own second bucket (module `room`).
//! What is evicted: expired entries, then the oldest that nobody answered or that are closing, then
//! answered ones older than [`PROTECTED_SECONDS`]. Never a younger one: a flood of openings breaks
//! no flow. An opener has at most a fixed share of such protected entries, so that a flood that
//! completes its handshakes leaves room for others; beyond it, its flows can be evicted like
//! unanswered ones.
//!
//! The hash is keyed with secrets drawn at load: multilinear with half the multiplications (D.
//! Lemire, O. Kaser, "Strongly universal string hashing is fast", 2014).
//!
//! Memory is behind [`Memory`] and [`Bucket`]: maps in the kernel, vectors and model checkers on
//! the host. Must not know: what an entry means beyond its age and who was answered.

mod find;
mod layout;
mod room;
mod write;

pub use find::{find, known};
pub use room::room;
pub use write::{Taken, best, change, insert, place_entry, renew, sweep};

use crate::{
    flow::{Change, FlowSlot, Glance, Glances, PROTECTED, SESSION, bound, idle},
    wire::{FlowEntry, FlowKey},
};
use find::peek;
use layout::{Family as _, Key4, Key6, LIVE, behind, word};
use write::renew_in;

/// Slots of a bucket.
pub const SLOTS: u32 = 4;
/// Words of an IPv4 slot: a cache line.
pub const WORDS4: u32 = 16;
/// Words of an IPv6 slot: two cache lines, of which established packets need one and the counters.
pub const WORDS6: u32 = 32;
/// Locks of each family; the buckets whose tags share a line share one.
pub const STRIPES: u32 = 256;
/// Number of 64-bit secrets.
pub const SECRETS: usize = 12;
/// Idle seconds below which an answered entry is never evicted.
pub const PROTECTED_SECONDS: u64 = 330;
/// An opener's share of a table's slots that may be protected: one of so many.
pub const SOURCE_SHARE: u32 = 16;

/// The words of a bucket, which other CPUs read and write at the same time.
pub trait Bucket: Copy {
    /// A word, in no order with others.
    fn get(&self, at: u32) -> u32;
    /// Two words, the first in the lower half; `at` is even. In no order with others.
    fn pair(&self, at: u32) -> u64;
    /// The same bucket, whose loads come after those that `seen` was computed from.
    fn after(&self, seen: u64) -> Self;
    /// The value, which the compiler no longer knows by what it was compared with: or it would
    /// put the one for the other, and what is computed from it came after nothing.
    #[inline(always)]
    fn hidden(&self, value: u64) -> u64 {
        value
    }
    /// Writes a word, in no order with others but those of [`Bucket::publish`].
    fn set(&self, at: u32, value: u32);
    /// Writes two words, the first in the lower half; `at` is even.
    fn set_pair(&self, at: u32, value: u64) {
        self.set(at, value as u32);
        self.set(at + 1, (value >> 32) as u32);
    }
    /// Writes a word after all before and before all after it.
    fn publish(&self, at: u32, value: u32);
}

/// Where a table is.
pub trait Memory {
    /// A bucket.
    type Bucket: Bucket;
    /// The bucket of this number; `None` past the end.
    fn bucket(&self, v6: bool, index: u32) -> Option<Self::Bucket>;
    /// The tags of its slots, the first in the lowest bits; 0 past the end. In no order with
    /// anything.
    fn tags(&self, v6: bool, index: u32) -> u64;
    /// The same index, whose loads come after those that `seen` was computed from.
    fn index_after(&self, index: u32, seen: u64) -> u32;
    /// Writes one of them.
    fn set_tag(&self, v6: bool, index: u32, slot: u32, tag: u32);
    /// Number of buckets less one; the number is a power of two.
    fn mask(&self, v6: bool) -> u32;
    /// A secret of the hash.
    fn secret(&self, index: usize) -> u64;
    /// Takes a stripe's lock; `false`: it is held for too long.
    fn lock(&self, v6: bool, stripe: u32) -> bool;
    /// Gives it back.
    fn unlock(&self, v6: bool, stripe: u32);
    /// Protected entries of the openers with this hash.
    fn protected(&self, hash: u32) -> u32;
    /// Adds to them; `u32::MAX` takes one away.
    fn protect(&self, hash: u32, by: u32);
    /// How many an opener may have.
    fn cap(&self) -> u32;
    /// [`best`], which the kernel calls as a function that is verified once.
    fn best(&self, key: &FlowKey, look: &Look) -> u32
    where
        Self: Sized,
    {
        best(self, key, look)
    }
}

/// An entry that was found, and where.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Found {
    /// The entry as it was.
    pub entry: FlowEntry,
    /// Number of the bucket.
    pub bucket: u32,
    /// First word of the slot.
    pub base: u32,
    /// The slot's version.
    pub version: u32,
    /// Whether the flow is IPv6.
    pub v6: u32,
}

impl Found {
    /// Nothing found.
    pub const EMPTY: Self = Self {
        entry: FlowEntry::EMPTY,
        bucket: 0,
        base: 0,
        version: 0,
        v6: 0,
    };
}

/// What a slot without an entry is worth.
const FREE: u32 = (1 << 27) - 1;
/// Between the classes of what may be evicted.
const CLASS: u32 = 1 << 25;
/// From this on, an entry speaks for nothing any more.
const EXPIRED: u32 = 2 * CLASS;

/// What a writer looks for in a bucket. Plain words, passed by address in the kernel.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Look {
    /// Jiffies.
    pub now: u64,
    /// Jiffies a second.
    pub hz: u32,
    /// Number of the bucket.
    pub bucket: u32,
    /// The key's tag.
    pub tag: u32,
    /// Not 0: only the key's own slot, or a free one, is of interest.
    pub enough: u32,
    /// The best so far.
    pub best: u32,
    /// The slot that is preferred among equals, plus [`SLOTS`] in the bucket that is.
    pub number: u32,
}

/// How much an entry deserves to be evicted: 0 not at all, the highest first. `rest` is the key's
/// last word. At most 27 bits.
#[inline(always)]
fn worth(age: u32, state: u32, rest: u32, hz: u32) -> u32 {
    if state & LIVE == 0 {
        return FREE;
    }
    // Nine hours at 1 000 Hz; older ones are all alike.
    let scaled = age.min(CLASS - 1);
    let seconds = bound(rest as u8, state);
    if state & SESSION == 0 && u64::from(age) > seconds * u64::from(hz) {
        return EXPIRED | scaled;
    }
    if state & PROTECTED == 0 {
        return CLASS | scaled;
    }
    // Its bounds are not known here, and forgotten it could not go on.
    let bound = if state & SESSION != 0 {
        idle::TCP_ESTABLISHED
    } else {
        PROTECTED_SECONDS
    };
    if u64::from(age) > bound * u64::from(hz) {
        scaled
    } else {
        0
    }
}

/// A flow as a reader of the whole table sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Its key.
    pub key: FlowKey,
    /// Its entry; `last_seen` has the low half of jiffies only.
    pub entry: FlowEntry,
    /// Whether it cannot be evicted while it is live.
    pub protected: bool,
    /// Packets, modulo 2³², since it was entered.
    pub packets: u32,
    /// Bytes of the packets after the first.
    pub bytes: u64,
}

/// The flow in a slot: `words` are [`WORDS4`] or [`WORDS6`] words of a bucket's copy. `None`: there
/// is none, or it was being written.
pub fn flow(words: &[u32]) -> Option<Flow> {
    let v6 = words.len() == WORDS6 as usize;
    let word = |at: u32| words.get(at as usize).copied().unwrap_or_default();
    let pair = |at: u32| u64::from(word(at)) | u64::from(word(at + 1)) << 32;
    let at = if v6 { Key6::BEHIND } else { Key4::BEHIND };
    let state = word(at + behind::STATE);
    if state & LIVE == 0 || word(word::VERSION) & 1 != 0 {
        return None;
    }
    let k = |index: u32| pair(word::KEY + 2 * index);
    Some(Flow {
        key: if v6 {
            FlowKey::from_pairs6([k(0), k(1), k(2), k(3), k(4)])
        } else {
            FlowKey::from_pairs4([k(0), k(1)])
        },
        entry: FlowEntry {
            last_seen: u64::from(word(word::SEEN)),
            generation: word(at + behind::GENERATION),
            rule: word(at + behind::RULE),
            flags: state & 0xffff & !(LIVE | PROTECTED),
            selector: state >> 16,
            opened: word(at + behind::OPENED),
            checked: word(at + behind::CHECKED),
            arrived: [word(at + behind::ARRIVED), word(at + behind::ARRIVED + 1)],
        },
        protected: state & PROTECTED != 0,
        packets: word(at + behind::PACKETS),
        bytes: pair(at + behind::BYTES),
    })
}

/// Writes the counters of the flow in a slot; `words` as for [`flow`].
pub fn set_counts(words: &mut [u32], packets: u32, bytes: u64) {
    let v6 = words.len() == WORDS6 as usize;
    let at = if v6 { Key6::BEHIND } else { Key4::BEHIND };
    let counts = [packets, bytes as u32, (bytes >> 32) as u32];
    let first = (at + behind::PACKETS) as usize;
    if let Some(words) = words.get_mut(first..first + counts.len()) {
        words.copy_from_slice(&counts);
    }
}

/// A table in some memory, as the judgement uses it.
#[derive(Clone, Copy, Debug)]
pub struct Flows<M>(pub M);

/// An entry of a table in some memory.
#[derive(Clone, Copy, Debug)]
pub struct Held<M: Memory> {
    memory: M,
    bucket: M::Bucket,
    found: Found,
}

impl<M: Memory + Clone> Flows<M> {
    /// The entry of a key, whatever its age; waits for writers.
    pub fn find(&self, key: &FlowKey) -> Option<Held<M>> {
        let mut found = Found::EMPTY;
        if !find(&self.0, key, &mut found) {
            return None;
        }
        Some(Held {
            memory: self.0.clone(),
            bucket: self.0.bucket(found.v6 != 0, found.bucket)?,
            found,
        })
    }
}

impl<M: Memory + Clone> Glances for Flows<M> {
    type Slot = Held<M>;

    #[inline(always)]
    fn glance(&self, key: &FlowKey) -> Glance<Held<M>> {
        let mut found = Found::EMPTY;
        let bucket = if key.is_v6() {
            peek(&self.0, &Key6(key), &mut found)
        } else {
            peek(&self.0, &Key4(key), &mut found)
        };
        match bucket {
            Glance::Entry(bucket) => Glance::Entry(Held {
                memory: self.0.clone(),
                bucket,
                found,
            }),
            Glance::Busy => Glance::Busy,
            Glance::Nothing => Glance::Nothing,
        }
    }
}

impl<M: Memory> FlowSlot for Held<M> {
    #[inline(always)]
    fn load(&self) -> FlowEntry {
        self.found.entry
    }

    #[inline(always)]
    fn touch(&self, now: u64, bytes: u32) {
        if self.found.v6 != 0 {
            renew_in::<_, Key6<'_>>(self.bucket, &self.found, now, bytes);
        } else {
            renew_in::<_, Key4<'_>>(self.bucket, &self.found, now, bytes);
        }
    }

    #[inline(always)]
    fn change(&self, change: &Change) {
        self::change(&self.memory, &self.found, change);
    }
}
