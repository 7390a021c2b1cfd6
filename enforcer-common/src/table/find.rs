//! Readers: they take no lock, unless a writer is in their way.

use super::{
    Bucket, Found, Memory, SLOTS,
    layout::{Family, Key4, Key6, LIVE, behind, place, stripe, tag_of, word},
};
use crate::{
    flow::{Glance, PROTECTED},
    wire::{FlowEntry, FlowKey},
};

/// Looks into the slots with a key's tag. `torn` is odd afterwards if one was being written; `seen`
/// is computed from all that says that the entry is not there.
#[inline(always)]
fn find_in<M: Memory, F: Family>(
    memory: &M,
    index: u32,
    tag: u32,
    key: &F,
    found: &mut Found,
    torn: &mut u32,
    seen: &mut u64,
) -> Option<M::Bucket> {
    let tags = memory.tags(F::V6, index);
    *seen ^= tags;
    let mut slot = 0;
    while slot < SLOTS {
        if tag_of(tags, slot) == tag
            && let Some(bucket) = memory.bucket(F::V6, index)
            // An entry is there before its tag is.
            && read(bucket.after(tags), slot * F::WORDS, key, found, torn, seen)
        {
            found.bucket = index;
            return Some(bucket);
        }
        slot += 1;
    }
    None
}

/// Reads a slot, if it is the key's.
#[inline(always)]
fn read<B: Bucket, F: Family>(
    bucket: B,
    base: u32,
    key: &F,
    found: &mut Found,
    torn: &mut u32,
    seen: &mut u64,
) -> bool {
    let version = bucket.get(base + word::VERSION);
    let then = bucket.after(u64::from(version));
    let mut differs = 0;
    let mut i = 0;
    while i < F::PAIRS {
        differs |= then.pair(base + word::KEY + 2 * i) ^ key.pair(i);
        i += 1;
    }
    *torn |= version;
    *seen ^= differs;
    if bucket.hidden(differs) != 0 || version & 1 != 0 {
        return false;
    }
    let at = base + F::BEHIND;
    let last = then.get(base + word::SEEN);
    let own = then.pair(at + behind::GENERATION);
    let arrived = then.pair(at + behind::ARRIVED);
    let rule = then.pair(at + behind::RULE);
    let checked = then.get(at + behind::CHECKED);
    let all = differs ^ u64::from(last) ^ own ^ arrived ^ rule ^ u64::from(checked);
    let state = (own >> 32) as u32;
    if bucket.after(all).get(base + word::VERSION) != version || state & LIVE == 0 {
        *torn |= 1;
        return false;
    }
    found.entry = FlowEntry {
        last_seen: u64::from(last),
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
    true
}

#[inline(always)]
fn find_key<M: Memory, F: Family>(
    memory: &M,
    key: &F,
    found: &mut Found,
    torn: &mut u32,
) -> Option<M::Bucket> {
    let place = place(memory, key);
    found.v6 = F::V6 as u32;
    // Where the lock is, should there be one to wait for.
    found.bucket = place.home;
    let mut seen = 0;
    match find_in(memory, place.home, place.tag, key, found, torn, &mut seen) {
        None => {
            // What is no longer in the one is in the other already.
            let second = memory.index_after(place.second, seen);
            find_in(memory, second, place.tag, key, found, torn, &mut seen)
        }
        bucket => bucket,
    }
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

/// Looks once and reads at most one slot. `Busy` if it is being written or another key has the same
/// tag there, one look in 5 000 in a full table: then only [`find`] can tell. Half the instructions
/// of a look into every slot, and a third of the stack.
#[inline(always)]
pub(super) fn peek<M: Memory, F: Family>(
    memory: &M,
    key: &F,
    found: &mut Found,
) -> Glance<M::Bucket> {
    let place = place(memory, key);
    let mut seen = memory.tags(F::V6, place.home);
    let mut index = place.home;
    let mut there = place.slot;
    // Most are where they prefer to be. A processor that has learnt this loads the slot while the
    // tags are on their way: with many flows both lines are far, 100 ns [veth, 6.18].
    if tag_of(seen, there) != place.tag {
        there = matching(seen, place.tag);
    }
    if there == SLOTS {
        // What is no longer in the one is in the other already.
        index = memory.index_after(place.second, seen);
        seen = memory.tags(F::V6, index);
        there = matching(seen, place.tag);
        if there == SLOTS {
            return Glance::Nothing;
        }
    }
    let Some(bucket) = memory.bucket(F::V6, index) else {
        return Glance::Busy;
    };
    found.v6 = F::V6 as u32;
    found.bucket = index;
    let (base, mut torn) = (there * F::WORDS, 0);
    // An entry is there before its tag is.
    if read(bucket.after(seen), base, key, found, &mut torn, &mut seen) {
        Glance::Entry(bucket)
    } else {
        Glance::Busy
    }
}

/// The first slot with this tag; [`SLOTS`] if none has it. Compared one by one: what comes after is
/// predicted then, and need not wait for a number that is computed.
#[inline(always)]
const fn matching(tags: u64, tag: u32) -> u32 {
    let mut slot = 0;
    while slot < SLOTS {
        if tag_of(tags, slot) == tag {
            break;
        }
        slot += 1;
    }
    slot
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
    let place = place(memory, key);
    let (mut which, mut seen) = (0, 0);
    while which < 2 {
        let index = if which == 0 {
            place.home
        } else {
            memory.index_after(place.second, seen)
        };
        let tags = memory.tags(F::V6, index);
        seen ^= tags;
        let Some(bucket) = memory.bucket(F::V6, index) else {
            return false;
        };
        let mut slot = 0;
        while slot < SLOTS {
            if tag_of(tags, slot) == place.tag {
                let base = slot * F::WORDS;
                let then = bucket.after(tags);
                let mut i = 0;
                while i < F::PAIRS {
                    let pair = then.pair(base + word::KEY + 2 * i);
                    seen ^= pair;
                    if pair != key.pair(i) {
                        break;
                    }
                    i += 1;
                }
                if i == F::PAIRS {
                    let state = then.get(base + F::BEHIND + behind::STATE);
                    seen ^= u64::from(state);
                    if state & LIVE != 0 {
                        return true;
                    }
                }
            }
            slot += 1;
        }
        which += 1;
    }
    false
}
