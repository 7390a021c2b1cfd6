//! Random operations on the programs' table and on a map: whatever the table finds the map has,
//! equal, and what it forgot it had to.

use std::collections::HashMap;

use enforcer_common::{
    flow::{
        CLOSING, Change, FlowSlot as _, FlowTable as _, Glance, Glances as _, OPENER_IS_LOW,
        REPLIED, SESSION, TIMED, age, bound, idle,
    },
    table::{self, Flow, Flows, Held, PROTECTED_SECONDS},
    wire::{FlowEntry, FlowKey},
};
use enforcer_tests::memory::{HostMemory, HostTable};
use proptest::prelude::*;

use crate::common::*;

#[derive(Clone, Debug)]
enum Operation {
    Insert(usize, u32),
    Change(usize, u32, bool),
    Touch(usize),
    /// Looks a flow up, for later.
    Hold(usize),
    /// Changes what was looked up then.
    ChangeHeld(u32),
    Wait(u64),
    Sweep,
}

/// Flows of a few openers, some of which share a network.
fn keys() -> Vec<(FlowKey, u8)> {
    let protocols = [TCP, UDP, 1, 47];
    let mut keys = Vec::new();
    for (index, protocol) in protocols.into_iter().enumerate() {
        for port in 0..2 {
            let host = index as u32 & 1;
            keys.push((v4(host, port, protocol), protocol));
            keys.push((v6(1, host, port, protocol), protocol));
            keys.push((v6(2, host, port, protocol), protocol));
        }
    }
    keys
}

fn operation() -> impl Strategy<Value = Operation> {
    let flags = prop::sample::select(vec![
        OPENER_IS_LOW,
        0,
        OPENER_IS_LOW | REPLIED,
        REPLIED,
        OPENER_IS_LOW | REPLIED | SESSION | TIMED,
        OPENER_IS_LOW | REPLIED | CLOSING,
    ]);
    let more = prop::sample::select(vec![REPLIED, CLOSING, 0, REPLIED | CLOSING]);
    let wait = prop::sample::select(vec![0, 1, 30, 61, 121, 200, 331, 8 * 3600, 1 << 22]);
    let key = 0..keys().len();
    prop_oneof![
        8 => (key.clone(), flags).prop_map(|(k, f)| Operation::Insert(k, f)),
        4 => (key.clone(), more.clone(), any::<bool>())
            .prop_map(|(k, f, admits)| Operation::Change(k, f, admits)),
        2 => key.clone().prop_map(Operation::Touch),
        2 => key.prop_map(Operation::Hold),
        2 => more.prop_map(Operation::ChangeHeld),
        2 => wait.prop_map(Operation::Wait),
        1 => Just(Operation::Sweep),
    ]
}

/// As the module's documentation says it: the class of an entry, the highest goes first.
fn class(flow: &Flow, protocol: u8, now: u64) -> u32 {
    let age = u64::from(age(now, flow.entry.last_seen as u32));
    let session = flow.entry.flags & SESSION != 0;
    if !session && age > bound(protocol, flow.entry.flags) * TICKS {
        return 3;
    }
    if !flow.protected {
        return 2;
    }
    let limit = if session {
        idle::TCP_ESTABLISHED
    } else {
        PROTECTED_SECONDS
    };
    u32::from(age > limit * TICKS)
}

fn expired(flow: &Flow, protocol: u8, now: u64) -> bool {
    let age = age(now, flow.entry.last_seen as u32);
    if flow.entry.flags & SESSION != 0 {
        age > 1 << 29
    } else {
        u64::from(age) > bound(protocol, flow.entry.flags) * TICKS
    }
}

struct Run<'a> {
    memory: &'a HostMemory,
    table: HostTable<'a>,
    keys: Vec<(FlowKey, u8)>,
    /// What was entered and not forgotten, and how often it was written.
    map: HashMap<FlowKey, (FlowEntry, u32)>,
    written: u32,
    held: Option<(FlowKey, u32, Held<&'a HostMemory>)>,
    now: u64,
}

impl Run<'_> {
    fn protocol(&self, key: &FlowKey) -> u8 {
        self.keys.iter().find(|(k, _)| k == key).unwrap().1
    }

    fn change(&mut self, key: &FlowKey, change: &Change) {
        self.written += 1;
        if let Some((entry, written)) = self.map.get_mut(key) {
            change.apply(entry);
            *written = self.written;
        }
    }

    /// Forgets what the table forgot, after checking that it had to.
    fn forget(&mut self, before: &HashMap<FlowKey, Flow>, new: Option<FlowKey>, swept: bool) {
        let after = self.memory.flows();
        let gone: Vec<&Flow> = before
            .values()
            .filter(|flow| !after.contains_key(&flow.key))
            .collect();
        for flow in &gone {
            let protocol = self.protocol(&flow.key);
            if swept {
                assert!(expired(flow, protocol, self.now), "{flow:?}");
            } else {
                let new = new.expect("only those that come evict");
                self.evicted(before, flow, &new);
            }
            self.map.remove(&flow.key);
        }
        if swept {
            for flow in after.values() {
                assert!(!expired(flow, self.protocol(&flow.key), self.now));
            }
        } else {
            assert!(gone.len() <= 1, "one goes for one that comes");
        }
    }

    /// The best of its bucket: the table has one.
    fn evicted(&self, before: &HashMap<FlowKey, Flow>, gone: &Flow, new: &FlowKey) {
        let others = before
            .values()
            .filter(|flow| flow.key.is_v6() == new.is_v6());
        let rank = |flow: &Flow| {
            let class = class(flow, self.protocol(&flow.key), self.now);
            // Ages are told apart in four ticks, up to a fortnight.
            let age = age(self.now, flow.entry.last_seen as u32) >> 2;
            (class, age.min((1 << 25) - 1))
        };
        let best = others.clone().map(rank).max().unwrap();
        assert_eq!(others.count(), 4, "no slot was free");
        assert_eq!(rank(gone), best);
        assert_ne!(best.0, 0, "a younger answered flow");
    }

    fn insert(&mut self, number: usize, flags: u32) {
        let before = self.memory.flows();
        let (key, _) = self.keys[number];
        self.written += 1;
        let entry = FlowEntry {
            flags,
            rule: self.written,
            generation: !self.written,
            ..opened(self.now)
        };
        let taken = self.table.insert(&key, &entry);
        self.forget(&before, Some(key), false);
        if taken {
            self.map.insert(key, (entry, self.written));
            return;
        }
        let family: Vec<&Flow> = before
            .values()
            .filter(|flow| flow.key.is_v6() == key.is_v6())
            .collect();
        assert_eq!((family.len(), before.contains_key(&key)), (4, false));
        for flow in family {
            assert_eq!(class(flow, self.protocol(&flow.key), self.now), 0);
        }
    }

    fn step(&mut self, operation: &Operation) {
        let admitted = Change {
            admits: 1,
            generation: 5,
            rule: 6,
            timing: TIMED,
            boot: 7,
            begins: 1,
            side: 1,
            ifindex: 8,
            ..Change::flags(0)
        };
        match *operation {
            Operation::Insert(number, flags) => self.insert(number, flags),
            Operation::Change(number, flags, admits) => {
                let (key, _) = self.keys[number];
                let base = if admits { admitted } else { Change::flags(0) };
                let change = Change { flags, ..base };
                if let Some(slot) = self.table.find(&key) {
                    slot.change(&change);
                    self.change(&key, &change);
                }
            }
            Operation::Touch(number) => {
                let (key, _) = self.keys[number];
                if let Some(slot) = self.table.find(&key) {
                    slot.touch(self.now, 100);
                    self.map.get_mut(&key).unwrap().0.last_seen = self.now;
                }
            }
            Operation::Hold(number) => {
                let (key, _) = self.keys[number];
                if let Some(slot) = self.table.find(&key) {
                    self.held = Some((key, self.map[&key].1, slot));
                }
            }
            Operation::ChangeHeld(flags) => {
                if let Some((key, written, slot)) = self.held.take() {
                    slot.change(&Change::flags(flags));
                    if self.map.get(&key).is_some_and(|(_, w)| *w == written) {
                        self.change(&key, &Change::flags(flags));
                    }
                }
            }
            Operation::Wait(seconds) => self.now += seconds * TICKS + 3,
            Operation::Sweep => {
                let before = self.memory.flows();
                let swept = self.memory.sweep(self.now) as usize;
                assert_eq!(swept, before.len() - self.memory.flows().len());
                self.forget(&before, None, true);
            }
        }
        self.check();
    }

    fn check(&self) {
        for (key, _) in &self.keys {
            let found = self.table.find(key).map(|slot| slot.load());
            let expected = self.map.get(key).map(|(entry, _)| kept(*entry));
            assert_eq!(found, expected, "{key:?}");
        }
        assert_eq!(self.memory.flows().len(), self.map.len());
        for flow in self.memory.flows().values() {
            let answered = flow.entry.flags & (REPLIED | CLOSING) == REPLIED;
            assert!(answered || !flow.protected, "{flow:?}");
        }
        self.memory.balances();
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: enforcer_tests::scale::rounds(400, 20) as u32,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_the_table_finds_a_map_has_and_what_it_forgot_it_had_to(
        operations in prop::collection::vec(operation(), 1..120),
        seed in any::<u64>(),
        start in prop::sample::select(vec![NOW, (5u64 << 32) - 5_000, (1 << 31) - 5_000]),
        cap in 1u32..6,
    ) {
        let memory = HostMemory::new(1, cap, seed);
        let mut run = Run {
            memory: &memory,
            table: HostTable::new(&memory),
            keys: keys(),
            map: HashMap::new(),
            written: 0,
            held: None,
            now: start,
        };
        for operation in &operations {
            run.step(operation);
        }
    }
}

/// One tag in 32 768 is another key's: a glance must leave that open, or the flow would be missed.
#[test]
fn another_flow_with_the_same_tag_hides_none() {
    for family6 in [false, true] {
        // One bucket is everybody's.
        let memory = HostMemory::new(1, u32::MAX, 5);
        let table = Flows(&memory);
        let first = key(family6, 0);
        assert!(table::insert(
            &table.0,
            &first,
            &answered(NOW),
            TICKS as u32
        ));
        let number = |n: u32| {
            if family6 {
                v6(2, n, 1, TCP)
            } else {
                v4(n, 1, TCP)
            }
        };
        let same = (0..0xffff).map(number).find(|key| {
            assert!(table.find(key).is_none());
            matches!(table.glance(key), Glance::Busy)
        });
        let same = same.expect("one of 65 535 keys has the tag");
        assert!(table::insert(&table.0, &same, &opened(NOW), TICKS as u32));
        for (key, entry) in [(first, answered(NOW)), (same, opened(NOW))] {
            assert_eq!(table.find(&key).map(|slot| slot.load()), Some(kept(entry)));
            assert!(!matches!(table.glance(&key), Glance::Nothing));
        }
    }
}
