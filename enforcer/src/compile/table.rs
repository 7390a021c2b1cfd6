//! Perfect hash tables: where each key goes, so that a look-up reads one slot and nothing else.
//!
//! Keys are thrown into groups of some four; each group has a *pilot*, the first of a sequence of
//! multipliers under which all of its keys find free slots. Large groups choose first.

use std::{sync::Arc, thread};

use enforcer_common::image::{self, EMPTY};

/// Keys of a group, on average.
const GROUP: usize = 4;
/// Pilots tried for a group. At the load of [`slots_for`] the last groups take a few dozen.
const PILOTS: u32 = 1 << 16;
/// Seeds tried before the tables grow, and again after each growth.
const SEEDS_PER_SIZE: u64 = 2;
/// Attempts in all. Every second one adds an eighth to what did not fit, so few are ever made.
const ATTEMPTS: u64 = 24;
/// Keys below which a thread costs more than it wins.
const THREADS_PAY: usize = 50_000;

/// The keys of one table.
pub(super) struct Keys<'a> {
    /// Number of keys.
    pub(super) count: usize,
    /// Hash of the key with this index under this seed.
    pub(super) hash: &'a (dyn Fn(usize, u64) -> u64 + Sync),
    /// Where the same keys were placed before, and under which seed.
    pub(super) known: Option<(u64, &'a Arc<Placed>)>,
}

/// Where the keys of one table are.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) pilots: Vec<u32>,
    /// Per slot the index of its key, or [`EMPTY`].
    pub(super) slots: Vec<u32>,
}

/// Places the keys of all tables under one seed.
///
/// `None` when no seed did: keys that hash alike under every seed, so practically never.
pub(super) fn place(tables: &[Keys<'_>]) -> Option<(u64, Vec<Arc<Placed>>)> {
    let mut sizes: Vec<usize> = tables.iter().map(|keys| slots_for(keys.count)).collect();
    for attempt in 0..ATTEMPTS {
        let seed = image::mix(attempt, 0x656e_666f_7263_6572);
        let grow = attempt % SEEDS_PER_SIZE == SEEDS_PER_SIZE - 1;
        let placed: Vec<Option<Arc<Placed>>> = thread::scope(|scope| {
            let placing = tables.iter().zip(&sizes).map(|(keys, slots)| {
                let slots = *slots;
                if let Some((known_seed, placed)) = keys.known
                    && known_seed == seed
                    && placed.slots.len() == slots
                {
                    return Err(Some(Arc::clone(placed)));
                }
                let work = move || place_one(keys, slots, seed).map(Arc::new);
                if keys.count < THREADS_PAY {
                    Err(work())
                } else {
                    Ok(scope.spawn(work))
                }
            });
            let placing: Vec<_> = placing.collect();
            let done = placing.into_iter().map(|placing| match placing {
                Ok(thread) => thread.join().ok().flatten(),
                Err(done) => done,
            });
            done.collect()
        });
        for (placed, slots) in placed.iter().zip(&mut sizes) {
            if placed.is_none() && grow {
                *slots += *slots / 8 + 1;
            }
        }
        if let Some(placed) = placed.into_iter().collect() {
            return Some((seed, placed));
        }
    }
    None
}

/// Full to nine tenths.
fn slots_for(keys: usize) -> usize {
    match keys {
        0 => 0,
        keys => keys + keys / 9 + 1,
    }
}

fn place_one(keys: &Keys<'_>, slots: usize, seed: u64) -> Option<Placed> {
    let groups = keys.count.div_ceil(GROUP);
    let (group_count, slot_count) = (super::word(groups), super::word(slots));
    // Keys and the part of their hashes that pilots multiply, group by group.
    let mut starts = vec![0u32; groups + 1];
    for key in 0..keys.count {
        let group = image::pilot_of((keys.hash)(key, seed), group_count);
        if let Some(count) = starts.get_mut(group as usize) {
            *count += 1;
        }
    }
    let mut sum = 0;
    for start in &mut starts {
        sum += *start;
        *start = sum;
    }
    let mut members = vec![(0u64, 0u32); keys.count];
    for key in (0..keys.count).rev() {
        let hash = (keys.hash)(key, seed);
        let group = image::pilot_of(hash, group_count);
        if let Some(start) = starts.get_mut(group as usize) {
            *start -= 1;
            if let Some(member) = members.get_mut(*start as usize) {
                *member = (hash, super::word(key));
            }
        }
    }
    let group = |number: u32| {
        let bounds = starts.get(number as usize..number as usize + 2);
        let bounds = bounds.map(|bounds| bounds[0] as usize..bounds[1] as usize);
        bounds.and_then(|bounds| members.get(bounds)).unwrap_or(&[])
    };
    let mut order: Vec<u32> = (0..group_count).collect();
    order.sort_by_key(|number| std::cmp::Reverse(group(*number).len()));

    let mut pilots = vec![1; groups];
    let mut placed = vec![EMPTY; slots];
    let mut taken = vec![0u64; slots.div_ceil(64)];
    let mut found: Vec<u32> = Vec::new();
    for number in order {
        let group = group(number);
        // The pilot sees half of the hash.
        let halves = |i: usize| group.get(i).map(|(hash, _)| hash >> 32);
        let alike = (1..group.len()).any(|i| (0..i).any(|j| halves(i) == halves(j)));
        if alike {
            return None;
        }
        let pilot = (0..PILOTS).map(pilot).find(|pilot| {
            found.clear();
            group.iter().all(|(hash, _)| {
                let slot = image::piloted(*hash, *pilot, slot_count);
                let word = taken.get(slot as usize / 64).copied().unwrap_or(u64::MAX);
                let free = word >> (slot % 64) & 1 == 0 && !found.contains(&slot);
                found.push(slot);
                free
            })
        })?;
        for (slot, (_, key)) in found.iter().zip(group) {
            *taken.get_mut(*slot as usize / 64)? |= 1 << (slot % 64);
            *placed.get_mut(*slot as usize)? = *key;
        }
        *pilots.get_mut(number as usize)? = pilot;
    }
    Some(Placed {
        pilots,
        slots: placed,
    })
}

/// The multipliers in the order in which they are tried: odd, so that no two hashes meet at all.
fn pilot(number: u32) -> u32 {
    number.wrapping_mul(0x9e37_79b9) << 1 | 1
}
