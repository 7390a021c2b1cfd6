//! Numbers of enforced interfaces, by which images know them.

use std::collections::{BTreeMap, BTreeSet};

use enforcer_common::image::INTERFACE_SLOTS;

/// Who has which number.
#[derive(Debug, Default)]
pub struct Slots {
    given: BTreeMap<u32, u32>,
}

impl Slots {
    /// Interfaces have these slots since an earlier daemon.
    pub fn adopt(&mut self, given: &BTreeMap<u32, u32>) {
        let given = given.iter().filter(|(_, slot)| **slot != 0);
        self.given
            .extend(given.map(|(ifindex, slot)| (*ifindex, *slot)));
    }

    /// The slot of an interface, which stays its own while it lives; a new one is neither anybody's
    /// nor among `taken`: slots of images that are in force or may come into force, for interfaces
    /// that are gone. 0 when there is none left.
    pub fn give(&mut self, ifindex: u32, taken: &BTreeSet<u32>) -> u32 {
        if let Some(slot) = self.given.get(&ifindex) {
            return *slot;
        }
        let used: BTreeSet<u32> = self.given.values().chain(taken).copied().collect();
        let Some(free) = (1..INTERFACE_SLOTS).find(|slot| !used.contains(slot)) else {
            return 0;
        };
        self.given.insert(ifindex, free);
        free
    }

    /// Gives an interface the slot by which an image knows it already.
    pub fn give_as(&mut self, ifindex: u32, slot: u32) {
        self.given.insert(ifindex, slot);
    }

    /// The slot of an interface; 0 when it has none.
    pub fn of(&self, ifindex: u32) -> u32 {
        self.given.get(&ifindex).copied().unwrap_or(0)
    }

    /// The interface is gone.
    pub fn remove(&mut self, ifindex: u32) {
        self.given.remove(&ifindex);
    }

    /// Only these interfaces are left.
    pub fn retain(&mut self, lives: impl Fn(u32) -> bool) {
        self.given.retain(|ifindex, _| lives(*ifindex));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_stays_while_the_interface_lives_and_rests_while_an_image_has_it() {
        let mut slots = Slots::default();
        let none = BTreeSet::new();
        assert_eq!((slots.give(7, &none), slots.give(9, &none)), (1, 2));
        assert_eq!(slots.give(7, &BTreeSet::from([1, 2])), 1);
        slots.remove(7);
        assert_eq!(slots.of(7), 0);
        // The image in force still means the one that is gone.
        assert_eq!(slots.give(11, &BTreeSet::from([1, 2])), 3);
        assert_eq!(slots.give(12, &BTreeSet::from([2])), 1);
        slots.retain(|ifindex| ifindex == 9);
        assert_eq!((slots.of(9), slots.of(12)), (2, 0));
    }

    #[test]
    fn there_are_1023() {
        let mut slots = Slots::default();
        let none = BTreeSet::new();
        for ifindex in 1..INTERFACE_SLOTS {
            assert_eq!(slots.give(ifindex, &none), ifindex);
        }
        assert_eq!(slots.give(5_000, &none), 0);
        slots.remove(17);
        assert_eq!(slots.give(5_000, &BTreeSet::from([17])), 0);
        assert_eq!(slots.give(5_000, &none), 17);
    }
}
