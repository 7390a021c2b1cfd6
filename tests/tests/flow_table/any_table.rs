//! What every flow table does, with a hash map and with the programs' table.

use enforcer_common::{
    flow::{CLOSING, Change, Clock, FlowSlot as _, FlowTable, REPLIED, SESSION, TIMED, fresh},
    wire::FlowEntry,
};
use enforcer_tests::{
    host::{HZ, HashFlows},
    memory::{HostMemory, HostTable},
};

use crate::common::*;

/// Tests with each of the tables on the host: without bounds, large, and with few buckets.
macro_rules! with_each_table {
    ($($name:ident),* $(,)?) => { $(
        #[test]
        fn $name() {
            super::$name(&HashFlows::default());
            for buckets in [1, 2, 256, 512, 4096] {
                for seed in 0..8 {
                    let memory = HostMemory::new(buckets, 64, seed);
                    super::$name(&HostTable::new(&memory));
                    memory.balances();
                }
            }
        }
    )* };
}

mod each {
    use super::{HashFlows, HostMemory, HostTable};
    with_each_table!(
        an_entry_is_found_as_it_was_entered,
        an_entry_replaces_the_old_one_of_its_key,
        near_keys_are_other_flows,
        a_packet_renews_the_age_alone,
        a_change_changes_what_it_says,
        an_entry_speaks_for_its_flow_for_its_time,
        time_goes_on_where_the_low_half_of_jiffies_wraps,
    );
}

fn load<F: FlowTable>(table: &F, key: &enforcer_common::wire::FlowKey) -> Option<FlowEntry> {
    table.find(key).map(|slot| kept(slot.load()))
}

fn an_entry_is_found_as_it_was_entered<F: FlowTable>(table: &F) {
    for family6 in [false, true] {
        for (port, entry) in [(1, opened(NOW)), (2, answered(NOW))] {
            assert_eq!(load(table, &key(family6, port)), None);
            assert!(table.insert(&key(family6, port), &entry));
            assert_eq!(load(table, &key(family6, port)), Some(kept(entry)));
        }
        let all = FlowEntry {
            last_seen: u64::from(u32::MAX),
            generation: u32::MAX,
            rule: u32::MAX,
            flags: 0x1f,
            selector: 0xffff,
            opened: u32::MAX,
            checked: u32::MAX,
            arrived: [u32::MAX; 2],
        };
        assert!(table.insert(&key(family6, 3), &all));
        assert_eq!(load(table, &key(family6, 3)), Some(all), "every bit");
    }
}

fn an_entry_replaces_the_old_one_of_its_key<F: FlowTable>(table: &F) {
    for family6 in [false, true] {
        for (entry, at) in [
            (opened as fn(u64) -> FlowEntry, NOW),
            (answered, NOW + 1),
            (answered, NOW + 2),
            (opened, NOW + 3),
        ] {
            assert!(table.insert(&key(family6, 1), &entry(at)));
            assert_eq!(load(table, &key(family6, 1)), Some(kept(entry(at))));
        }
    }
}

/// Keys that differ from another in one word, one after the other.
fn near_keys_are_other_flows<F: FlowTable>(table: &F) {
    let near = [
        v4(2, 1, TCP),
        v4(2, 1, UDP),
        v4(2, 2, TCP),
        v4(3, 1, TCP),
        v6(1, 2, 1, TCP),
        v6(1, 2, 1, UDP),
        v6(1, 3, 1, TCP),
        v6(2, 2, 1, TCP),
    ];
    for key in near {
        assert_eq!(load(table, &key), None, "{key:?}");
        assert!(table.insert(&key, &opened(NOW)));
    }
    for key in near {
        assert!(load(table, &key).is_some(), "{key:?}");
    }
}

fn a_packet_renews_the_age_alone<F: FlowTable>(table: &F) {
    for family6 in [false, true] {
        assert!(table.insert(&key(family6, 1), &answered(NOW)));
        for later in [0, 1, 1, 500] {
            table
                .find(&key(family6, 1))
                .unwrap()
                .touch(NOW + later, 1500);
            let expected = kept(answered(NOW + later));
            assert_eq!(load(table, &key(family6, 1)), Some(expected));
        }
    }
}

fn a_change_changes_what_it_says<F: FlowTable>(table: &F) {
    let admits = Change {
        flags: REPLIED,
        admits: 1,
        generation: 81,
        rule: 82,
        timing: TIMED | SESSION,
        boot: 83,
        begins: 1,
        side: 1,
        ifindex: 84,
    };
    let changes = [
        Change::flags(REPLIED),
        admits,
        Change {
            side: 0,
            begins: 0,
            timing: TIMED,
            boot: 85,
            ifindex: 86,
            ..admits
        },
        Change {
            side: u32::MAX,
            timing: 0,
            ..admits
        },
        Change::flags(CLOSING | REPLIED),
        Change {
            admits: 0,
            ..admits
        },
    ];
    for family6 in [false, true] {
        let mut expected = opened(NOW);
        assert!(table.insert(&key(family6, 1), &expected));
        for change in changes {
            table.find(&key(family6, 1)).unwrap().change(&change);
            change.apply(&mut expected);
            assert_eq!(load(table, &key(family6, 1)), Some(kept(expected)));
        }
    }
}

/// The bounds that the documentation promises, to the tick.
fn an_entry_speaks_for_its_flow_for_its_time<F: FlowTable>(table: &F) {
    for (protocol, flags, seconds) in [
        (TCP, 0, 60),
        (TCP, REPLIED, 8 * 3600),
        (TCP, REPLIED | CLOSING, 120),
        (UDP, 0, 60),
        (UDP, REPLIED, 180),
        (1, 0, 60),
        (47, REPLIED, 600),
    ] {
        let key = v4(2, 1, protocol);
        let entry = FlowEntry {
            flags,
            ..opened(NOW)
        };
        assert!(table.insert(&key, &entry));
        let found = table.find(&key).unwrap().load();
        for (later, speaks) in [
            (0, true),
            (seconds * TICKS, true),
            (seconds * TICKS + 1, false),
        ] {
            let clock = Clock {
                now: NOW + later,
                hz: HZ,
            };
            assert_eq!(
                fresh(&found, protocol, &clock),
                speaks,
                "{protocol} {later}"
            );
        }
    }
}

fn time_goes_on_where_the_low_half_of_jiffies_wraps<F: FlowTable>(table: &F) {
    let wraps = 7u64 << 32;
    for family6 in [false, true] {
        assert!(table.insert(&key(family6, 1), &opened(wraps - 10)));
        let clock = |now| Clock { now, hz: HZ };
        let is_fresh = |now| {
            let slot = table.find(&key(family6, 1)).unwrap();
            fresh(&slot.load(), TCP, &clock(now))
        };
        assert!(is_fresh(wraps - 10) && is_fresh(wraps) && is_fresh(wraps + 60 * TICKS - 10));
        assert!(!is_fresh(wraps + 60 * TICKS - 9));
        // Read a tick earlier on another CPU.
        assert!(is_fresh(wraps - 11));
        table.find(&key(family6, 1)).unwrap().touch(wraps + 5, 0);
        assert!(is_fresh(wraps + 60 * TICKS + 5) && !is_fresh(wraps + 60 * TICKS + 6));
    }
}
