//! Room by moving: a new flow whose two buckets are full of answered ones finds a place while one of
//! those can go to its other bucket; what moves stays what it was.

use std::collections::HashMap;

use enforcer_common::{
    flow::{Change, FlowSlot as _, FlowTable as _, OPENER_IS_LOW, REPLIED, SESSION, TIMED},
    table::{self, Flow, PROTECTED_SECONDS, SLOTS},
    wire::{FlowEntry, FlowKey},
};
use enforcer_tests::{
    host::HZ,
    memory::{HostMemory, HostTable},
    scale,
};

use crate::common::*;

/// Keys by their home and second bucket, of a table of eight.
pub struct Keys {
    pub memory: HostMemory,
    by: HashMap<[u32; 2], Vec<FlowKey>>,
}

impl Keys {
    pub fn new(family6: bool, seed: u64) -> Self {
        let memory = HostMemory::new(8, 1000, seed);
        let mut by = HashMap::<_, Vec<_>>::new();
        for port in 0..1000 {
            let key = key(family6, port);
            by.entry(memory.buckets_of(&key)).or_default().push(key);
        }
        Self { memory, by }
    }

    /// A key with these buckets that was not asked for before.
    pub fn take(&mut self, buckets: [u32; 2]) -> FlowKey {
        self.by.get_mut(&buckets).unwrap().pop().unwrap()
    }

    /// Enters `count` flows with these buckets.
    pub fn fill(&mut self, buckets: [u32; 2], count: u32, entry: &FlowEntry) -> Vec<FlowKey> {
        let mut keys = Vec::new();
        for _ in 0..count {
            let key = self.take(buckets);
            assert!(table::insert(&&self.memory, &key, entry, HZ));
            keys.push(key);
        }
        keys
    }

    /// The bucket in which a flow is.
    fn bucket(&self, key: &FlowKey) -> u32 {
        self.slot(key) / SLOTS
    }

    /// The slot in which a flow is.
    pub fn slot(&self, key: &FlowKey) -> u32 {
        let slots = self.memory.dump(key.is_v6());
        let slot = slots
            .iter()
            .position(|flow| flow.is_some_and(|flow| flow.key == *key));
        slot.expect("it is there") as u32
    }
}

/// The buckets of the new flow; and the second one of those that can move.
const HOME: u32 = 2;
const SECOND: u32 = 5;
const AWAY: u32 = 7;

/// An answered flow with counts and flags of its own.
fn busy(memory: &HostMemory, key: &FlowKey) {
    let slot = HostTable::new(memory).find(key).unwrap();
    for bytes in [100, 1400, u32::MAX] {
        slot.touch(NOW, bytes);
    }
    slot.change(&Change {
        flags: REPLIED,
        admits: 1,
        generation: 91,
        rule: 92,
        timing: TIMED | SESSION,
        boot: 93,
        begins: 1,
        side: 1,
        ifindex: 94,
    });
}

/// Whether a new flow finds room, the others as they were but those in `gone`.
fn enters(keys: &mut Keys, gone: &[FlowKey]) -> Option<FlowKey> {
    let mut before = keys.memory.flows();
    let new = keys.take([HOME, SECOND]);
    let entry = FlowEntry {
        flags: OPENER_IS_LOW,
        ..opened(NOW + 1)
    };
    let taken = table::insert(&&keys.memory, &new, &entry, HZ);
    keys.memory.balances();
    let mut after: HashMap<FlowKey, Flow> = keys.memory.flows();
    assert_eq!(
        after.remove(&new).map(|flow| flow.entry),
        taken.then_some(kept(entry))
    );
    if taken {
        before.retain(|key, _| !gone.contains(key));
    }
    assert_eq!(after, before);
    let table = HostTable::new(&keys.memory);
    for (key, flow) in before {
        assert_eq!(table.find(&key).unwrap().load(), flow.entry);
        assert!(table::known(&&keys.memory, &key));
    }
    taken.then_some(new)
}

fn each(test: impl Fn(Keys)) {
    for family6 in [false, true] {
        (0..3).for_each(|seed| test(Keys::new(family6, seed)));
    }
}

#[test]
fn an_answered_flow_moves_to_its_second_bucket_with_all_it_has() {
    for from in [HOME, SECOND] {
        each(|mut keys| {
            let (other, away) = (HOME ^ SECOND ^ from, from ^ 3);
            let moves = keys.fill([from, away], 1, &answered(NOW))[0];
            busy(&keys.memory, &moves);
            keys.fill([from, other], 3, &answered(NOW));
            keys.fill([other, from], 4, &answered(NOW));
            let new = enters(&mut keys, &[]).expect("there is room");
            assert_eq!(keys.bucket(&moves), away);
            assert_eq!(
                keys.bucket(&new),
                from,
                "in the place of the one that moved"
            );
            // It is changed, counted and closed where it is.
            busy(&keys.memory, &moves);
            keys.memory.balances();
            assert_eq!(keys.memory.flows()[&moves].packets, 7);
            // There is no second one that could move.
            assert_eq!(
                enters(&mut keys, &[new]).map(|new| keys.bucket(&new)),
                Some(from)
            );
            let slot = HostTable::new(&keys.memory).find(&new);
            assert!(slot.is_none(), "the unanswered one went");
        });
    }
}

/// What of the second bucket of the one that moves is taken: what goes first everywhere else.
#[test]
fn what_moves_takes_the_place_of_what_goes_first() {
    let aged = |seconds: u64, flags| FlowEntry {
        flags,
        ..opened(NOW - seconds * TICKS)
    };
    let live = answered(NOW);
    for (entries, goes) in [
        ([live, live, live, aged(61, 0)], Some(3)),
        ([live, aged(20, 0), aged(30, 0), live], Some(2)),
        (
            [
                live,
                aged(20, 0),
                live,
                aged(PROTECTED_SECONDS + 1, REPLIED),
            ],
            Some(1),
        ),
        (
            [aged(PROTECTED_SECONDS + 1, REPLIED), live, live, live],
            Some(0),
        ),
        ([live; 4], None),
    ] {
        each(|mut keys| {
            let moves = keys.fill([HOME, AWAY], 1, &live)[0];
            keys.fill([HOME, SECOND], 3, &live);
            keys.fill([SECOND, HOME], 4, &live);
            let away: Vec<_> = entries
                .iter()
                .map(|entry| keys.fill([AWAY, AWAY ^ 1], 1, entry)[0])
                .collect();
            let gone: Vec<_> = goes.map(|index: usize| away[index]).into_iter().collect();
            let new = enters(&mut keys, &gone);
            assert_eq!(new.is_some(), goes.is_some(), "{entries:#?}");
            let expected = if goes.is_some() { AWAY } else { HOME };
            assert_eq!(keys.bucket(&moves), expected);
        });
    }
}

/// Of several that can move, the one goes whose second bucket has the most room.
#[test]
fn nobody_is_evicted_while_one_can_move_to_a_free_slot() {
    each(|mut keys| {
        let other = HOME ^ 1;
        let waits = keys.fill([other, other ^ 1], 1, &opened(NOW))[0];
        keys.fill([other, other ^ 1], 3, &answered(NOW));
        keys.fill([HOME, other], 4, &answered(NOW));
        keys.fill([SECOND, HOME], 3, &answered(NOW));
        let moves = keys.fill([SECOND, 0], 1, &answered(NOW))[0];
        assert!(enters(&mut keys, &[]).is_some());
        assert_eq!((keys.bucket(&moves), keys.bucket(&waits)), (0, other));
    });
}

/// An entry in its second bucket stays there: readers look at the home bucket first, and would miss
/// one that goes back.
#[test]
fn nothing_moves_back() {
    each(|mut keys| {
        let first = keys.fill([AWAY, HOME], 4, &answered(NOW));
        let strays = keys.fill([AWAY, HOME], 4, &answered(NOW));
        assert!(strays.iter().all(|key| keys.bucket(key) == HOME));
        keys.fill([SECOND, HOME], 4, &answered(NOW));
        // Their home is empty again.
        let table = HostTable::new(&keys.memory);
        for key in &first {
            let slot = table.find(key).unwrap();
            slot.change(&Change::flags(enforcer_common::flow::CLOSING));
            slot.touch(NOW - 1000 * TICKS, 0);
        }
        assert_eq!(keys.memory.sweep(NOW), 4);
        assert_eq!(enters(&mut keys, &[]), None);
    });
}

/// One bucket is home and second of every key.
#[test]
fn a_table_of_one_bucket_has_nowhere_to_move_to() {
    for family6 in [false, true] {
        let memory = HostMemory::new(1, 1000, 1);
        let insert = |port| table::insert(&&memory, &key(family6, port), &answered(NOW), HZ);
        assert!((0..4).all(insert));
        let before = memory.flows();
        assert!(!insert(4));
        assert_eq!(memory.flows(), before);
        memory.balances();
    }
}

/// The share of so many eighths of a table's answered flows, of many openers, that find no room.
fn refused(family6: bool, eighths: u32, seeds: std::ops::Range<u64>) -> f64 {
    let buckets = 1 << scale::rounds(15, 10) as u32;
    let (mut sent, mut refused) = (0, 0);
    for seed in seeds {
        let memory = HostMemory::new(buckets, buckets * SLOTS / table::SOURCE_SHARE, seed);
        let count = memory.slots() / 8 * eighths;
        let key = |n: u32| {
            let port = (n / 200 * 3 + seed as u32) as u16;
            if family6 {
                v6(n % 200, n % 7, port, UDP)
            } else {
                v4(n % 200, port, UDP)
            }
        };
        let taken: Vec<FlowKey> = (0..count)
            .map(key)
            .filter(|key| table::insert(&&memory, key, &answered(NOW), HZ))
            .collect();
        let table = HostTable::new(&memory);
        assert!(taken.iter().all(|key| table.find(key).is_some()));
        // It looks at each entry for long.
        if seed == 0 {
            memory.balances();
        }
        sent += count;
        refused += count - taken.len() as u32;
    }
    f64::from(refused) / f64::from(sent)
}

#[test]
fn a_table_that_is_a_quarter_full_refuses_nobody() {
    for family6 in [false, true] {
        let share = refused(family6, 2, 0..8);
        assert!(share < 1e-5, "{share}");
    }
}

#[test]
fn a_table_that_is_half_full_refuses_hardly_anybody() {
    for family6 in [false, true] {
        let share = refused(family6, 4, 0..8);
        assert!(share < 5e-4, "{share}");
        let share = refused(family6, 6, 0..2);
        assert!(share < 1.5e-2, "{share}");
    }
}
