//! The flow table: buckets of four slots with exact keys, read without locks.
//!
//! A slot is one cache line (IPv6: two). A key has two buckets; the second takes what the home
//! bucket refuses. Readers look at a slot's version before and after; writers hold the lock of the
//! key's stripe, make the version odd, write, and make it even again (a sequence lock per slot).
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

use crate::{
    flow::{
        CLOSING, Change, FlowSlot, Glance, Glances, OPENER_IS_LOW, PROTECTED, REPLIED, SESSION,
        TIMED, age, bound, idle,
    },
    wire::{FlowEntry, FlowKey},
};

/// Slots of a bucket.
pub const SLOTS: u32 = 4;
/// Words of an IPv4 slot: a cache line.
pub const WORDS4: u32 = 16;
/// Words of an IPv6 slot: two cache lines, of which established packets need one and the counters.
pub const WORDS6: u32 = 32;
/// Locks of each family: a key's two buckets share one.
pub const STRIPES: u32 = 256;
/// Number of 64-bit secrets.
pub const SECRETS: usize = 12;
/// Idle seconds below which an answered entry is never evicted.
pub const PROTECTED_SECONDS: u64 = 330;
/// An opener's share of a table's slots that may be protected: one of so many.
pub const SOURCE_SHARE: u32 = 16;

/// Words of a slot, by index.
mod word {
    /// Version: odd while written, 0 before the first time.
    pub const VERSION: u32 = 0;
    /// Jiffies of the last packet, low half.
    pub const SEEN: u32 = 1;
    /// The key.
    pub const KEY: u32 = 2;
}

/// Words behind the key.
mod behind {
    pub const GENERATION: u32 = 0;
    /// Flags, selector in the upper half.
    pub const STATE: u32 = 1;
    pub const ARRIVED: u32 = 2;
    pub const RULE: u32 = 4;
    pub const OPENED: u32 = 5;
    pub const CHECKED: u32 = 6;
    pub const PACKETS: u32 = 7;
    /// Two words.
    pub const BYTES: u32 = 8;
}

/// In a slot's flags: there is an entry.
const LIVE: u32 = 1 << 15;

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
    /// Writes a word after all before and before all after it.
    fn publish(&self, at: u32, value: u32);
}

/// Where a table is.
pub trait Memory {
    /// A bucket.
    type Bucket: Bucket;
    /// The bucket of this number; `None` past the end.
    fn bucket(&self, v6: bool, index: u32) -> Option<Self::Bucket>;
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
    /// [`worth`], which the kernel calls as a function that is verified once.
    fn worth(&self, age: u32, state: u32, rest: u32, hz: u32) -> u32 {
        worth(age, state, rest, hz)
    }
}

/// A key's buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Home bucket.
    pub home: u32,
    /// The other one.
    pub second: u32,
}

impl Place {
    /// The lock of both.
    #[inline(always)]
    pub const fn stripe(&self) -> u32 {
        stripe(self.home)
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

/// How much an entry deserves to be evicted: 0 not at all, the highest first. `rest` is the key's
/// last word. At most 27 bits.
#[inline(always)]
pub fn worth(age: u32, state: u32, rest: u32, hz: u32) -> u32 {
    const FREE: u32 = (1 << 27) - 1;
    const CLASS: u32 = 1 << 25;
    if state & LIVE == 0 {
        return FREE;
    }
    // Nine hours at 1 000 Hz; older ones are all alike.
    let scaled = age.min(CLASS - 1);
    let seconds = bound(rest as u8, state);
    if state & SESSION == 0 && u64::from(age) > seconds * u64::from(hz) {
        return (2 * CLASS) | scaled;
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

/// A key's 64-bit words, and what the layout of its slots follows from.
trait Family {
    const V6: bool;
    const PAIRS: u32;
    const WORDS: u32;
    const BEHIND: u32 = word::KEY + 2 * Self::PAIRS;
    fn pair(&self, index: u32) -> u64;
}

// By reference: two copies of a key would not fit the kernel's stack.
struct Key4<'a>(&'a FlowKey);
struct Key6<'a>(&'a FlowKey);

impl Family for Key4<'_> {
    const V6: bool = false;
    const PAIRS: u32 = 2;
    const WORDS: u32 = WORDS4;
    #[inline(always)]
    fn pair(&self, index: u32) -> u64 {
        self.0.pair4(index)
    }
}

impl Family for Key6<'_> {
    const V6: bool = true;
    const PAIRS: u32 = 5;
    const WORDS: u32 = WORDS6;
    #[inline(always)]
    fn pair(&self, index: u32) -> u64 {
        self.0.pair6(index)
    }
}

/// Half a product for each word, the key's words in their order.
#[inline(always)]
fn hash<M: Memory, F: Family>(memory: &M, key: &F) -> u32 {
    let mut sum = memory.secret(0);
    let mut i = 0;
    while i < F::PAIRS {
        let pair = key.pair(i);
        let at = 1 + 2 * i as usize;
        let left = memory.secret(at).wrapping_add(pair & 0xffff_ffff);
        let right = memory.secret(at + 1).wrapping_add(pair >> 32);
        sum = sum.wrapping_add(left.wrapping_mul(right));
        i += 1;
    }
    fold(sum)
}

/// A sum of products is linear in each word: without this, the ports that a client counts up meet
/// in a few buckets, with one draw of secrets in ten (SplitMix64's first step, then the upper half).
#[inline(always)]
const fn fold(sum: u64) -> u32 {
    ((sum ^ sum >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) as u32
}

/// The lock of a bucket: a group of sixteen has one.
#[inline(always)]
const fn stripe(bucket: u32) -> u32 {
    bucket >> 4 & (STRIPES - 1)
}

#[inline(always)]
fn place(hash: u32, mask: u32) -> Place {
    let home = hash & mask;
    // Another one on the same page, so that a key which is not there costs one miss of the TLB.
    let other = hash >> 28 | 1;
    Place {
        home,
        second: home ^ (other & mask),
    }
}

/// The hash by which an opener's entries are counted.
#[inline(always)]
fn opener<M: Memory>(memory: &M, key: &FlowKey, flags: u32) -> u32 {
    let address = key.end(flags & OPENER_IS_LOW != 0);
    // Who has one IPv6 address has a /64 of them.
    let words = if key.is_v6() {
        [address[0], address[1]]
    } else {
        [0, address[3]]
    };
    let left = memory.secret(1).wrapping_mul(u64::from(words[0]) | 1 << 32);
    let right = memory.secret(2).wrapping_mul(u64::from(words[1]));
    fold(memory.secret(11).wrapping_add(left).wrapping_add(right))
}

#[inline(always)]
fn find_in<B: Bucket, F: Family>(bucket: B, key: &F, found: &mut Found, torn: &mut u32) -> bool {
    let mut slot = 0;
    while slot < SLOTS {
        let base = slot * F::WORDS;
        let version = bucket.get(base + word::VERSION);
        let then = bucket.after(u64::from(version));
        let mut differs = 0;
        let mut i = 0;
        while i < F::PAIRS {
            differs |= then.pair(base + word::KEY + 2 * i) ^ key.pair(i);
            i += 1;
        }
        if bucket.hidden(differs) == 0 && version & 1 == 0 {
            let at = base + F::BEHIND;
            let seen = then.get(base + word::SEEN);
            let own = then.pair(at + behind::GENERATION);
            let arrived = then.pair(at + behind::ARRIVED);
            let rule = then.pair(at + behind::RULE);
            let checked = then.get(at + behind::CHECKED);
            let all = differs ^ u64::from(seen) ^ own ^ arrived ^ rule ^ u64::from(checked);
            let state = (own >> 32) as u32;
            if bucket.after(all).get(base + word::VERSION) == version && state & LIVE != 0 {
                found.entry = FlowEntry {
                    last_seen: u64::from(seen),
                    generation: own as u32,
                    rule: rule as u32,
                    flags: state & 0xffff & !(LIVE | PROTECTED),
                    selector: state >> 16,
                    opened: (rule >> 32) as u32,
                    checked,
                    arrived: [arrived as u32, (arrived >> 32) as u32],
                };
                found.base = base;
                found.version = version;
                return true;
            }
            *torn |= 1;
        }
        *torn |= version;
        slot += 1;
    }
    false
}

/// `torn` is odd afterwards if a slot was being written.
#[inline(always)]
fn find_key<M: Memory, F: Family>(
    memory: &M,
    key: &F,
    found: &mut Found,
    torn: &mut u32,
) -> Option<M::Bucket> {
    let place = place(hash(memory, key), memory.mask(F::V6));
    found.v6 = F::V6 as u32;
    found.bucket = place.home;
    if let Some(bucket) = memory.bucket(F::V6, place.home)
        && find_in(bucket, key, found, torn)
    {
        return Some(bucket);
    }
    found.bucket = place.second;
    if let Some(bucket) = memory.bucket(F::V6, place.second)
        && find_in(bucket, key, found, torn)
    {
        return Some(bucket);
    }
    None
}

/// Looks once; what is being written meanwhile is missed.
#[inline(always)]
fn glance<M: Memory>(
    memory: &M,
    key: &FlowKey,
    found: &mut Found,
    torn: &mut u32,
) -> Option<M::Bucket> {
    if key.is_v6() {
        find_key(memory, &Key6(key), found, torn)
    } else {
        find_key(memory, &Key4(key), found, torn)
    }
}

/// Looks a flow up; `found` is written if it is there, whatever its age. Should the slot be
/// written meanwhile, it waits: missing a flow that only changes would cost it a packet.
#[inline(always)]
pub fn find<M: Memory>(memory: &M, key: &FlowKey, found: &mut Found) -> bool {
    let mut torn = 0;
    if glance(memory, key, found, &mut torn).is_some() {
        return true;
    }
    if torn & 1 == 0 {
        return false;
    }
    let (v6, stripe) = (key.is_v6(), stripe(found.bucket));
    let locked = memory.lock(v6, stripe);
    let there = glance(memory, key, found, &mut torn).is_some();
    if locked {
        memory.unlock(v6, stripe);
    }
    there
}

/// Whether there is an entry, for who leaves the judgement to others: without a second look at the
/// version, so one that is being written may be missed or taken for whole.
#[inline(always)]
pub fn known<M: Memory>(memory: &M, key: &FlowKey) -> bool {
    if key.is_v6() {
        known_key(memory, &Key6(key))
    } else {
        known_key(memory, &Key4(key))
    }
}

#[inline(always)]
fn known_key<M: Memory, F: Family>(memory: &M, key: &F) -> bool {
    let place = place(hash(memory, key), memory.mask(F::V6));
    let mut which = 0;
    while which < 2 {
        let index = if which == 0 { place.home } else { place.second };
        let Some(bucket) = memory.bucket(F::V6, index) else {
            return false;
        };
        let mut slot = 0;
        while slot < SLOTS {
            let base = slot * F::WORDS;
            let mut i = 0;
            while i < F::PAIRS && bucket.pair(base + word::KEY + 2 * i) == key.pair(i) {
                i += 1;
            }
            if i == F::PAIRS && bucket.get(base + F::BEHIND + behind::STATE) & LIVE != 0 {
                return true;
            }
            slot += 1;
        }
        which += 1;
    }
    false
}

/// Renews an entry's age and adds to its counters. Should the slot have gone to another flow, that
/// one lives a little longer.
#[inline(always)]
pub fn renew<M: Memory>(memory: &M, found: &Found, now: u64, bytes: u32) {
    let Some(bucket) = memory.bucket(found.v6 != 0, found.bucket) else {
        return;
    };
    if found.v6 != 0 {
        renew_in::<_, Key6<'_>>(bucket, found, now, bytes);
    } else {
        renew_in::<_, Key4<'_>>(bucket, found, now, bytes);
    }
}

#[inline(always)]
fn renew_in<B: Bucket, F: Family>(bucket: B, found: &Found, now: u64, bytes: u32) {
    let base = found.base & ((SLOTS - 1) * F::WORDS);
    // Only what changes: a store would take the line from other CPUs.
    if found.entry.last_seen as u32 != now as u32 {
        bucket.set(base + word::SEEN, now as u32);
    }
    let at = base + F::BEHIND;
    // Two CPUs may lose a packet of each other's: these counters inform, they balance no books.
    bucket.set(
        at + behind::PACKETS,
        bucket.get(at + behind::PACKETS).wrapping_add(1),
    );
    let count = bucket
        .pair(at + behind::BYTES)
        .wrapping_add(u64::from(bytes));
    bucket.set(at + behind::BYTES, count as u32);
    bucket.set(at + behind::BYTES + 1, (count >> 32) as u32);
}

/// Changes an entry, unless its slot has gone to another flow or is being written.
#[inline(always)]
pub fn change<M: Memory>(memory: &M, found: &Found, change: &Change) {
    if found.v6 != 0 {
        change_in::<M, Key6<'_>>(memory, found, change);
    } else {
        change_in::<M, Key4<'_>>(memory, found, change);
    }
}

#[inline(always)]
fn change_in<M: Memory, F: Family>(memory: &M, found: &Found, change: &Change) {
    let stripe = stripe(found.bucket);
    let Some(bucket) = memory.bucket(F::V6, found.bucket) else {
        return;
    };
    if !memory.lock(F::V6, stripe) {
        return;
    }
    let base = found.base & ((SLOTS - 1) * F::WORDS);
    let version = bucket.get(base + word::VERSION);
    if version == found.version {
        let at = base + F::BEHIND;
        let old = bucket.get(at + behind::STATE);
        let mut state = old | change.flags;
        if change.admits != 0 {
            state = state & !(TIMED | SESSION) | change.timing;
        }
        state = guard(memory, &key_at::<M, F>(bucket, base), old, state);
        bucket.publish(base + word::VERSION, version | 1);
        bucket.set(at + behind::STATE, state);
        if change.admits != 0 {
            if change.begins != 0 {
                bucket.set(at + behind::OPENED, change.boot);
            }
            bucket.set(at + behind::CHECKED, change.boot);
            bucket.set(at + behind::RULE, change.rule);
            bucket.set(at + behind::GENERATION, change.generation);
        }
        // Two offsets, not one that is computed: Linux 6.1 loses its bounds.
        match change.side {
            0 => bucket.set(at + behind::ARRIVED, change.ifindex),
            1 => bucket.set(at + behind::ARRIVED + 1, change.ifindex),
            _ => {}
        }
        bucket.publish(base + word::VERSION, next(version));
    }
    memory.unlock(F::V6, stripe);
}

/// The version after one more change; never 0.
#[inline(always)]
const fn next(version: u32) -> u32 {
    (version | 1).wrapping_add(1) | ((version >= u32::MAX - 1) as u32) << 1
}

/// The key in a slot, of one's own stripe while its lock is held.
#[inline(always)]
fn key_at<M: Memory, F: Family>(bucket: M::Bucket, base: u32) -> FlowKey {
    let at = base + word::KEY;
    if F::V6 {
        FlowKey::from_pairs6([
            bucket.pair(at),
            bucket.pair(at + 2),
            bucket.pair(at + 4),
            bucket.pair(at + 6),
            bucket.pair(at + 8),
        ])
    } else {
        FlowKey::from_pairs4([bucket.pair(at), bucket.pair(at + 2)])
    }
}

/// The new state of an entry, protected if it is answered and its opener has room, and the
/// opener's count brought up to date.
#[inline(always)]
fn guard<M: Memory>(memory: &M, key: &FlowKey, old: u32, new: u32) -> u32 {
    let was = old & PROTECTED != 0;
    let wants = new & (LIVE | REPLIED | CLOSING) == LIVE | REPLIED;
    if was == wants {
        return new;
    }
    let hash = opener(memory, key, new);
    if was {
        memory.protect(hash, u32::MAX);
        return new & !PROTECTED;
    }
    if memory.protected(hash) >= memory.cap() {
        return new;
    }
    memory.protect(hash, 1);
    new | PROTECTED
}

/// Writes an entry, over the old one of its key or over the one that deserves it least. `false`:
/// every slot that it may have is taken by a live, answered flow, or others write for too long.
#[inline(always)]
pub fn insert<M: Memory>(memory: &M, key: &FlowKey, entry: &FlowEntry, hz: u32) -> bool {
    if key.is_v6() {
        insert_key(memory, &Key6(key), key, entry, hz)
    } else {
        insert_key(memory, &Key4(key), key, entry, hz)
    }
}

#[inline(always)]
fn insert_key<M: Memory, F: Family>(
    memory: &M,
    pairs: &F,
    key: &FlowKey,
    entry: &FlowEntry,
    hz: u32,
) -> bool {
    let place = place(hash(memory, pairs), memory.mask(F::V6));
    let (Some(home), Some(second)) = (
        memory.bucket(F::V6, place.home),
        memory.bucket(F::V6, place.second),
    ) else {
        return false;
    };
    if !memory.lock(F::V6, place.stripe()) {
        return false;
    }
    let now = entry.last_seen;
    // The best of both buckets: worth above, number of the slot below. The home bucket has the
    // higher numbers, so of equals its own goes, and readers find the flow where they look first.
    let mut best = 0;
    best = candidates(memory, home, pairs, now, hz, SLOTS, best);
    best = candidates(memory, second, pairs, now, hz, 0, best);
    let taken = best >= 2 * SLOTS;
    if taken {
        let bucket = if best & SLOTS != 0 { home } else { second };
        overwrite(
            memory,
            bucket,
            (best & (SLOTS - 1)) * F::WORDS,
            pairs,
            key,
            entry,
        );
    }
    memory.unlock(F::V6, place.stripe());
    taken
}

/// The slot of a bucket to write to, if one is better than `best`: the key's own goes before all.
#[inline(always)]
fn candidates<M: Memory, F: Family>(
    memory: &M,
    bucket: M::Bucket,
    key: &F,
    now: u64,
    hz: u32,
    number: u32,
    best: u32,
) -> u32 {
    const OWN: u32 = u32::MAX / (2 * SLOTS);
    let mut best = best;
    let mut slot = 0;
    while slot < SLOTS {
        let base = slot * F::WORDS;
        let mut differs = 0;
        let mut i = 0;
        while i < F::PAIRS {
            differs |= bucket.pair(base + word::KEY + 2 * i) ^ key.pair(i);
            i += 1;
        }
        let state = bucket.get(base + F::BEHIND + behind::STATE);
        let mut worth = OWN;
        if differs != 0 || state & LIVE == 0 {
            let age = age(now, bucket.get(base + word::SEEN));
            // The key's last word: above its ports.
            let rest = (bucket.pair(base + F::BEHIND - 2) >> 32) as u32;
            worth = memory.worth(age, state, rest, hz);
        }
        // Not by a branch of its own whether it is worth anything: each doubles the verifier's ways.
        best = best.max(worth.wrapping_mul(2 * SLOTS) | (number + slot));
        slot += 1;
    }
    best
}

#[inline(always)]
fn overwrite<M: Memory, F: Family>(
    memory: &M,
    bucket: M::Bucket,
    base: u32,
    pairs: &F,
    key: &FlowKey,
    entry: &FlowEntry,
) {
    let version = bucket.get(base + word::VERSION);
    let at = base + F::BEHIND;
    let old = bucket.get(at + behind::STATE);
    if old & PROTECTED != 0 {
        let hash = opener(memory, &key_at::<M, F>(bucket, base), old);
        memory.protect(hash, u32::MAX);
    }
    let state = entry.flags & !PROTECTED | LIVE | entry.selector << 16;
    let state = guard(memory, key, 0, state);
    bucket.publish(base + word::VERSION, version | 1);
    bucket.set(base + word::SEEN, entry.last_seen as u32);
    let mut i = 0;
    while i < F::PAIRS {
        let pair = pairs.pair(i);
        bucket.set(base + word::KEY + 2 * i, pair as u32);
        bucket.set(base + word::KEY + 2 * i + 1, (pair >> 32) as u32);
        i += 1;
    }
    bucket.set(at + behind::GENERATION, entry.generation);
    bucket.set(at + behind::STATE, state);
    bucket.set(at + behind::ARRIVED, entry.arrived[0]);
    bucket.set(at + behind::ARRIVED + 1, entry.arrived[1]);
    bucket.set(at + behind::RULE, entry.rule);
    bucket.set(at + behind::OPENED, entry.opened);
    bucket.set(at + behind::CHECKED, entry.checked);
    bucket.set(at + behind::PACKETS, 1);
    bucket.set(at + behind::BYTES, 0);
    bucket.set(at + behind::BYTES + 1, 0);
    bucket.publish(base + word::VERSION, next(version));
}

/// Takes expired entries out of a bucket; before 2³¹ ticks have gone by, or their ages would begin
/// anew. How many.
#[inline(always)]
pub fn sweep<M: Memory>(memory: &M, v6: bool, index: u32, now: u64, hz: u32) -> u32 {
    if v6 {
        sweep_in::<M, Key6<'_>>(memory, index, now, hz)
    } else {
        sweep_in::<M, Key4<'_>>(memory, index, now, hz)
    }
}

#[inline(always)]
fn sweep_in<M: Memory, F: Family>(memory: &M, index: u32, now: u64, hz: u32) -> u32 {
    let stripe = stripe(index);
    let Some(bucket) = memory.bucket(F::V6, index) else {
        return 0;
    };
    if !memory.lock(F::V6, stripe) {
        return 0;
    }
    let mut swept = 0;
    let mut slot = 0;
    while slot < SLOTS {
        let base = slot * F::WORDS;
        let at = base + F::BEHIND;
        let state = bucket.get(at + behind::STATE);
        let rest = (bucket.pair(at - 2) >> 32) as u32;
        let age = age(now, bucket.get(base + word::SEEN));
        if state & LIVE != 0 && expired(age, state, rest, hz) {
            if state & PROTECTED != 0 {
                let hash = opener(memory, &key_at::<M, F>(bucket, base), state);
                memory.protect(hash, u32::MAX);
            }
            let version = bucket.get(base + word::VERSION);
            bucket.publish(base + word::VERSION, version | 1);
            bucket.set(at + behind::STATE, 0);
            bucket.publish(base + word::VERSION, next(version));
            swept += 1;
        }
        slot += 1;
    }
    memory.unlock(F::V6, stripe);
    swept
}

/// Whether an entry speaks for nothing any more. One with a session's bounds, not known here, is
/// kept for a quarter of the time in which ages begin anew: 6 days at 1 000 Hz.
#[inline(always)]
fn expired(age: u32, state: u32, rest: u32, hz: u32) -> bool {
    if state & SESSION != 0 {
        return age > 1 << 29;
    }
    u64::from(age) > bound(rest as u8, state) * u64::from(hz)
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

impl<M: Memory + Clone> Glances for Flows<M> {
    type Slot = Held<M>;

    #[inline(always)]
    fn glance(&self, key: &FlowKey) -> Glance<Held<M>> {
        let (mut found, mut torn) = (Found::EMPTY, 0);
        match glance(&self.0, key, &mut found, &mut torn) {
            Some(bucket) => Glance::Entry(Held {
                memory: self.0.clone(),
                bucket,
                found,
            }),
            None if torn & 1 != 0 => Glance::Busy,
            None => Glance::Nothing,
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
