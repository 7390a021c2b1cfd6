//! Writers: each holds the lock of its key's stripe, but for the ages and counters of an entry.

use super::{
    Bucket, EXPIRED, FREE, Found, Look, Memory, SLOTS,
    layout::{Family, Key4, Key6, LIVE, behind, key_at, opener, place, stripe, tag_of, word},
    room::room,
};
use crate::{
    flow::{CLOSING, Change, PROTECTED, REPLIED, SESSION, TIMED, age, bound},
    wire::{FlowEntry, FlowKey},
};

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
pub(super) fn renew_in<B: Bucket, F: Family>(bucket: B, found: &Found, now: u64, bytes: u32) {
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
    bucket.set_pair(at + behind::BYTES, count);
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
pub(super) const fn next(version: u32) -> u32 {
    (version | 1).wrapping_add(1) | ((version >= u32::MAX - 1) as u32) << 1
}

/// Takes the entry of a slot, which is about to go, from its opener's count.
#[inline(always)]
pub(super) fn release<M: Memory, F: Family>(memory: &M, bucket: M::Bucket, base: u32) {
    let state = bucket.get(base + F::BEHIND + behind::STATE);
    if state & PROTECTED != 0 {
        let hash = opener(memory, &key_at::<M, F>(bucket, base), state);
        memory.protect(hash, u32::MAX);
    }
}

/// Empties a slot.
#[inline(always)]
pub(super) fn clear<M: Memory, F: Family>(memory: &M, bucket: M::Bucket, index: u32, slot: u32) {
    let base = slot * F::WORDS;
    let version = bucket.get(base + word::VERSION);
    bucket.publish(base + word::VERSION, version | 1);
    bucket.set(base + F::BEHIND + behind::STATE, 0);
    bucket.publish(base + word::VERSION, next(version));
    memory.set_tag(F::V6, index, slot, 0);
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

/// Whether a table took an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Taken {
    /// No: others write there for too long.
    Busy = 0,
    /// Yes.
    Yes = 1,
    /// No: every slot that it may have is taken by a live, answered flow. [`room`](super::room) may
    /// help.
    Full = 2,
}

/// Writes an entry, over the old one of its key or over the one that deserves it least. Where both
/// of its buckets are full of live, answered flows, one of these moves. `false`: none can, or others
/// write for too long.
#[inline(always)]
pub fn insert<M: Memory>(memory: &M, key: &FlowKey, entry: &FlowEntry, hz: u32) -> bool {
    match place_entry(memory, key, entry, hz) {
        Taken::Yes => true,
        Taken::Busy => false,
        Taken::Full => {
            room(memory, key, entry.last_seen, hz)
                && place_entry(memory, key, entry, hz) == Taken::Yes
        }
    }
}

/// The same where nothing moves.
#[inline(always)]
pub fn place_entry<M: Memory>(memory: &M, key: &FlowKey, entry: &FlowEntry, hz: u32) -> Taken {
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
) -> Taken {
    let place = place(memory, pairs);
    let stripe = stripe(place.home);
    if !memory.lock(F::V6, stripe) {
        return Taken::Busy;
    }
    let mut look = Look {
        now: entry.last_seen,
        hz,
        bucket: place.home,
        tag: place.tag,
        enough: 0,
        best: 0,
        number: place.slot | SLOTS,
    };
    // The best of both buckets: worth above, number of the slot below. The home bucket has the
    // higher numbers, and in each the slot that the key prefers, so that of equals the one goes
    // where readers look first.
    look.best = memory.best(key, &look);
    // If the home bucket has one that speaks for nothing any more, the other's are only asked
    // whether one is free.
    look.enough = u32::from(look.best / (2 * SLOTS) >= EXPIRED);
    look.bucket = place.second;
    look.number = place.slot;
    let best = memory.best(key, &look);
    let mut taken = Taken::Full;
    if best >= 2 * SLOTS {
        let index = if best & SLOTS != 0 {
            place.home
        } else {
            place.second
        };
        let slot = slot_of(best, place.slot);
        if let Some(bucket) = memory.bucket(F::V6, index) {
            overwrite(memory, bucket, slot * F::WORDS, pairs, key, entry);
            memory.set_tag(F::V6, index, slot, place.tag);
            taken = Taken::Yes;
        }
    }
    memory.unlock(F::V6, stripe);
    taken
}

/// The slot of a bucket to write to, if one is better than the best so far: the key's own goes
/// before all.
#[inline(always)]
pub fn best<M: Memory>(memory: &M, key: &FlowKey, look: &Look) -> u32 {
    if key.is_v6() {
        candidates(memory, &Key6(key), look)
    } else {
        candidates(memory, &Key4(key), look)
    }
}

#[inline(always)]
fn candidates<M: Memory, F: Family>(memory: &M, key: &F, look: &Look) -> u32 {
    const OWN: u32 = u32::MAX / (2 * SLOTS);
    let Some(bucket) = memory.bucket(F::V6, look.bucket) else {
        return look.best;
    };
    let tags = memory.tags(F::V6, look.bucket);
    let mut best = look.best;
    let mut slot = 0;
    while slot < SLOTS {
        let base = slot * F::WORDS;
        let tag = tag_of(tags, slot);
        let mut worth = if tag == 0 { FREE } else { 0 };
        if tag == look.tag {
            let mut differs = 0;
            let mut i = 0;
            while i < F::PAIRS {
                differs |= bucket.pair(base + word::KEY + 2 * i) ^ key.pair(i);
                i += 1;
            }
            worth = if differs == 0 { OWN } else { 0 };
        }
        if worth == 0 && look.enough == 0 {
            let age = age(look.now, bucket.get(base + word::SEEN));
            let state = bucket.get(base + F::BEHIND + behind::STATE);
            // The key's last word: above its ports.
            let rest = (bucket.pair(base + F::BEHIND - 2) >> 32) as u32;
            worth = super::worth(age, state, rest, look.hz);
        }
        // Not by a branch of its own whether it is worth anything: each doubles the verifier's ways.
        let number = look.number ^ (SLOTS - 1 - slot);
        best = best.max(worth.wrapping_mul(2 * SLOTS) | number);
        slot += 1;
    }
    best
}

/// The slot that [`best`] means, for a key that prefers one.
#[inline(always)]
pub(super) const fn slot_of(best: u32, preferred: u32) -> u32 {
    (SLOTS - 1 - (best & (SLOTS - 1))) ^ preferred
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
    release::<M, F>(memory, bucket, base);
    let state = entry.flags & !PROTECTED | LIVE | entry.selector << 16;
    let state = guard(memory, key, 0, state);
    bucket.publish(base + word::VERSION, version | 1);
    bucket.set(base + word::SEEN, entry.last_seen as u32);
    let mut i = 0;
    while i < F::PAIRS {
        bucket.set_pair(base + word::KEY + 2 * i, pairs.pair(i));
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
    bucket.set_pair(at + behind::BYTES, 0);
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
            release::<M, F>(memory, bucket, base);
            clear::<M, F>(memory, bucket, index, slot);
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
