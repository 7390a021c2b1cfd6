//! Room for a new entry where both of its buckets are full: one of theirs moves to its own second
//! bucket.
//!
//! Entries move from their home bucket to their second one, never back, and readers look in that
//! order. The copy is there, with its tag, before anything of the old slot is written. So who finds
//! the old slot empty, or another's, or its tag gone, finds the copy if what it loads of the second
//! bucket comes after that ([`Memory::index_after`], [`Bucket::after`]); who sees the old slot while
//! it is written waits for the lock. All buckets are in one line of eight, so one lock is theirs.
//!
//! Who found the entry in its old place: a change of it sees another version and is left to the
//! flow's next packet, as after every other write. A packet that is counted at that very moment may
//! be missing from the entry's count, or be in that of the slot's next one.

use super::{
    Bucket, EXPIRED, Look, Memory, SLOTS,
    layout::{Family, Key4, Key6, Place, behind, key_at, place, stripe, tag_of, word},
    write::{clear, next, release, slot_of},
};
use crate::wire::FlowKey;

/// No entry has it.
const NO_TAG: u32 = u32::MAX;

/// Frees a slot of a key's two buckets, which were found full, if one of their entries can move to
/// where another is worth less. Whether it did.
#[inline(always)]
pub fn room<M: Memory>(memory: &M, key: &FlowKey, now: u64, hz: u32) -> bool {
    if key.is_v6() {
        room_for(memory, &Key6(key), now, hz)
    } else {
        room_for(memory, &Key4(key), now, hz)
    }
}

#[inline(always)]
fn room_for<M: Memory, F: Family>(memory: &M, key: &F, now: u64, hz: u32) -> bool {
    let Place { home, second, .. } = place(memory, key);
    let stripe = stripe(home);
    if !memory.lock(F::V6, stripe) {
        return false;
    }
    let look = Look {
        now,
        hz,
        bucket: home,
        tag: NO_TAG,
        enough: 0,
        // Above what deserves to stay.
        best: 2 * SLOTS - 1,
        number: 0,
    };
    let moved = room_in::<M, F>(memory, home, second, look);
    memory.unlock(F::V6, stripe);
    moved
}

#[inline(always)]
fn room_in<M: Memory, F: Family>(memory: &M, home: u32, second: u32, mut look: Look) -> bool {
    // The number of the slot, the home bucket's above; above, what its key prefers, and in which
    // bucket of the line.
    let mut from = 0;
    let mut number = 2 * SLOTS;
    // Under the lock: a slot whose entry speaks for nothing ends the search.
    while number > 0 && look.best / (2 * SLOTS) < EXPIRED {
        number -= 1;
        let index = if number & SLOTS != 0 { home } else { second };
        let slot = number & (SLOTS - 1);
        if tag_of(memory.tags(F::V6, index), slot) == 0 {
            // Since they were found full.
            return true;
        }
        let Some(bucket) = memory.bucket(F::V6, index) else {
            return false;
        };
        let key = key_at::<M, F>(bucket, slot * F::WORDS);
        let own = if F::V6 {
            place(memory, &Key6(&key))
        } else {
            place(memory, &Key4(&key))
        };
        // Not to those of the new entry: they are full.
        if own.home == index && own.second != home && own.second != second {
            look.bucket = own.second;
            look.number = own.slot;
            let best = memory.best(&key, &look);
            if best > look.best {
                look.best = best;
                from = (own.second & 7) << 5 | own.slot << 3 | number;
            }
        }
    }
    if look.best < 2 * SLOTS {
        return false;
    }
    let index = if from & SLOTS != 0 { home } else { second };
    // In the line of the others.
    let to = home & !7 | from >> 5;
    let (Some(source), Some(target)) = (memory.bucket(F::V6, index), memory.bucket(F::V6, to))
    else {
        return false;
    };
    let slot = from & (SLOTS - 1);
    let to_slot = slot_of(look.best, from >> 3 & (SLOTS - 1));
    let tag = tag_of(memory.tags(F::V6, index), slot);
    release::<M, F>(memory, target, to_slot * F::WORDS);
    copy::<M, F>(source, slot * F::WORDS, target, to_slot * F::WORDS);
    memory.set_tag(F::V6, to, to_slot, tag);
    // Its opener's count is not touched: what is protected is the copy.
    clear::<M, F>(memory, source, index, slot);
    true
}

/// Copies an entry as it is, counts included.
#[inline(always)]
fn copy<M: Memory, F: Family>(source: M::Bucket, from: u32, target: M::Bucket, to: u32) {
    let version = target.get(to + word::VERSION);
    target.publish(to + word::VERSION, version | 1);
    target.set(to + word::SEEN, source.get(from + word::SEEN));
    let mut at = word::KEY;
    while at < F::BEHIND + behind::BYTES + 2 {
        target.set_pair(to + at, source.pair(from + at));
        at += 2;
    }
    target.publish(to + word::VERSION, next(version));
}
