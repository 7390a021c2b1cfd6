//! Two-choice bucketed hash tables: where each key goes, so that a look-up reads two buckets at
//! most. Cuckoo placement: a key that finds both its buckets full moves another one on.

use enforcer_common::image::{self, EMPTY};

/// Moves before a placement is given up. At the loads that [`fewest`] allows, a placement that
/// exists is found within a few dozen.
const KICKS: usize = 1_000;
/// Seeds tried before the tables grow, and again after each growth.
const SEEDS_PER_SIZE: u64 = 2;
/// Attempts in all. Every second one adds an eighth to what did not fit, so few are ever made.
const ATTEMPTS: u64 = 24;

/// The keys of one table, and the shape of its buckets.
pub(super) struct Keys<'a> {
    /// Number of keys.
    pub(super) count: usize,
    /// Slots of a bucket.
    pub(super) slots: usize,
    /// Hash of the key with this index under this seed.
    pub(super) hash: &'a dyn Fn(usize, u64) -> u64,
}

/// Where the keys of one table are.
#[derive(Debug)]
pub(super) struct Placed {
    /// Number of buckets.
    pub(super) buckets: u32,
    /// Per slot, bucket by bucket: the index of its key, or [`EMPTY`].
    pub(super) slots: Vec<u32>,
}

/// Places the keys of all tables under one seed.
///
/// `None` when no seed did: keys that hash alike under every seed, so practically never.
pub(super) fn place(tables: &[Keys<'_>]) -> Option<(u64, Vec<Placed>)> {
    let mut sizes: Vec<u32> = tables.iter().map(fewest).collect();
    for attempt in 0..ATTEMPTS {
        let seed = image::mix(attempt, 0x656e_666f_7263_6572);
        let mut placed = Vec::with_capacity(tables.len());
        let grow = attempt % SEEDS_PER_SIZE == SEEDS_PER_SIZE - 1;
        for (table, buckets) in tables.iter().zip(&mut sizes) {
            match place_one(table, *buckets, seed) {
                Some(slots) => placed.push(Placed {
                    buckets: *buckets,
                    slots,
                }),
                None if grow => *buckets = buckets.saturating_add(*buckets / 8 + 1),
                None => {}
            }
        }
        if placed.len() == tables.len() {
            return Some((seed, placed));
        }
    }
    None
}

/// Fewest buckets: full to 96 % (four slots; 98 % is possible) or 92 % (three; 96 %).
fn fewest(keys: &Keys<'_>) -> u32 {
    let percent = if keys.slots > 3 { 96 } else { 92 };
    super::word((keys.count * 100).div_ceil(keys.slots * percent))
}

fn place_one(keys: &Keys<'_>, buckets: u32, seed: u64) -> Option<Vec<u32>> {
    let mut slots = vec![EMPTY; buckets as usize * keys.slots];
    let mut random = seed;
    for key in 0..keys.count {
        let mut key = super::word(key);
        let mut from = None;
        let mut kicks = 0;
        loop {
            let (first, second) = image::buckets((keys.hash)(key as usize, seed), buckets);
            if put(&mut slots, keys.slots, first, key) || put(&mut slots, keys.slots, second, key) {
                break;
            }
            if kicks == KICKS {
                return None;
            }
            kicks += 1;
            random = image::mix(random, kicks as u64);
            // Not back to where it was moved from, unless there is no other place.
            let bucket = match from {
                Some(bucket) if bucket == first => second,
                Some(bucket) if bucket == second => first,
                _ if random & 1 == 0 => first,
                _ => second,
            };
            let victim = (random >> 32) as usize % keys.slots;
            let slot = slots.get_mut(bucket as usize * keys.slots + victim)?;
            std::mem::swap(slot, &mut key);
            from = Some(bucket);
        }
    }
    Some(slots)
}

/// Puts the key into a free slot of the bucket, if there is one.
fn put(slots: &mut [u32], width: usize, bucket: u32, key: u32) -> bool {
    let base = bucket as usize * width;
    let free = slots
        .get_mut(base..base + width)
        .and_then(|bucket| bucket.iter_mut().find(|slot| **slot == EMPTY));
    match free {
        Some(slot) => {
            *slot = key;
            true
        }
        None => false,
    }
}
