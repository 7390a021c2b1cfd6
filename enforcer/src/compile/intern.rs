//! Lists of words, each kept once and named by a number: a few words of overhead, no allocation
//! per list.

use enforcer_common::image::mix;

/// Hash of a sequence of words, fed one by one.
#[derive(Clone, Copy)]
pub(super) struct Hasher(u64);

impl Hasher {
    pub(super) fn new() -> Self {
        Self(0)
    }

    pub(super) fn feed(&mut self, word: u32) {
        self.0 = mix(u64::from(word), self.0);
    }

    pub(super) fn finish(self) -> u32 {
        (self.0 >> 16) as u32
    }
}

pub(super) fn hash(words: &[u32]) -> u32 {
    let mut hasher = Hasher::new();
    for word in words {
        hasher.feed(*word);
    }
    hasher.finish()
}

/// Marks a free slot.
const FREE: u32 = u32::MAX;

/// Numbers by the hash of what they name, which is kept elsewhere.
#[derive(Default)]
pub(super) struct Slots {
    /// Hash and number; a power of two of them, never full.
    slots: Vec<(u32, u32)>,
    used: usize,
}

impl Slots {
    /// The number with this hash for which `same` holds.
    pub(super) fn find(&self, hash: u32, same: impl Fn(u32) -> bool) -> Option<u32> {
        let mask = self.slots.len().checked_sub(1)?;
        let mut at = hash as usize & mask;
        loop {
            let (known, number) = *self.slots.get(at)?;
            if number == FREE {
                return None;
            }
            if known == hash && same(number) {
                return Some(number);
            }
            at = (at + 1) & mask;
        }
    }

    /// Adds a number that [`Slots::find`] did not find.
    pub(super) fn insert(&mut self, hash: u32, number: u32) {
        if self.used * 8 >= self.slots.len() * 7 {
            let size = (self.slots.len() * 2).max(64);
            let old = std::mem::replace(&mut self.slots, vec![(0, FREE); size]);
            for (hash, number) in old.into_iter().filter(|(_, number)| *number != FREE) {
                self.put(hash, number);
            }
        }
        self.put(hash, number);
        self.used += 1;
    }

    fn put(&mut self, hash: u32, number: u32) {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        while let Some(slot) = self.slots.get_mut(at) {
            if slot.1 == FREE {
                *slot = (hash, number);
                return;
            }
            at = (at + 1) & mask;
        }
    }
}

/// Lists of words by number, in the order in which they came.
#[derive(Default)]
pub(super) struct Interner {
    words: Vec<u32>,
    ends: Vec<usize>,
    slots: Slots,
}

impl Interner {
    /// The list's number; a list that is new gets the next one.
    pub(super) fn intern(&mut self, list: &[u32]) -> u32 {
        let hash = hash(list);
        if let Some(known) = self.find_hashed(hash, list) {
            return known;
        }
        let number = super::word(self.len());
        self.words.extend_from_slice(list);
        self.ends.push(self.words.len());
        self.slots.insert(hash, number);
        number
    }

    pub(super) fn find(&self, list: &[u32]) -> Option<u32> {
        self.find_hashed(hash(list), list)
    }

    fn find_hashed(&self, hash: u32, list: &[u32]) -> Option<u32> {
        self.slots
            .find(hash, |number| self.get(number as usize) == list)
    }

    /// The list of this number; empty where there is none.
    pub(super) fn get(&self, number: usize) -> &[u32] {
        let end = self.ends.get(number).copied();
        end.and_then(|end| self.words.get(self.start(number)..end))
            .unwrap_or(&[])
    }

    /// Where the list of this number starts among [`Interner::words`].
    pub(super) fn start(&self, number: usize) -> usize {
        let before = number.checked_sub(1);
        before.map_or(0, |before| self.ends.get(before).copied().unwrap_or(0))
    }

    /// All lists, one after another.
    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    /// The lists numbered in their own order, whatever the order in which they came; and per old number
    /// the new one.
    pub(super) fn sorted(&self) -> (Self, Vec<u32>) {
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.sort_unstable_by_key(|number| self.get(*number));
        let mut sorted = Self::default();
        let mut numbers = vec![0; self.len()];
        for old in order {
            let new = sorted.intern(self.get(old));
            if let Some(number) = numbers.get_mut(old) {
                *number = new;
            }
        }
        (sorted, numbers)
    }

    /// Whether the same lists have the same numbers.
    pub(super) fn same(&self, other: &Self) -> bool {
        self.ends == other.ends && self.words == other.words
    }

    /// Number of lists.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Words of all lists.
    pub(super) fn size(&self) -> usize {
        self.words.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn equal_lists_and_only_those_share_a_number(
            lists in prop::collection::vec(prop::collection::vec(0u32..4, 0..4), 0..400),
        ) {
            let mut interner = Interner::default();
            let mut known: HashMap<Vec<u32>, u32> = HashMap::new();
            for list in &lists {
                prop_assert_eq!(interner.find(list), known.get(list).copied());
                let next = u32::try_from(known.len()).unwrap();
                let expected = *known.entry(list.clone()).or_insert(next);
                prop_assert_eq!(interner.intern(list), expected);
            }
            prop_assert_eq!(interner.len(), known.len());
            let (sorted, numbers) = interner.sorted();
            prop_assert_eq!(sorted.len(), known.len());
            prop_assert!((1..sorted.len()).all(|n| sorted.get(n - 1) < sorted.get(n)));
            for (list, number) in known {
                prop_assert_eq!(interner.get(number as usize), &list);
                prop_assert_eq!(sorted.get(numbers[number as usize] as usize), &list);
            }
        }
    }

    #[test]
    fn lists_that_hash_alike_are_told_apart() {
        let mut slots = Slots::default();
        for number in 0..1_000 {
            assert_eq!(slots.find(7, |n| n == number), None);
            slots.insert(7, number);
        }
        for number in 0..1_000 {
            assert_eq!(slots.find(7, |n| n == number), Some(number));
        }
    }
}
