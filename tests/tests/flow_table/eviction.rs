//! Who is evicted, who never is, the share of an opener, and counters that wrap: in a table of one
//! bucket, where every flow is in every other's way.

use enforcer_common::{
    flow::{
        CLOSING, Change, FlowSlot as _, FlowTable as _, Glance, Glances as _, REPLIED, SESSION,
    },
    table::{PROTECTED_SECONDS, SLOTS},
    wire::{FlowEntry, FlowKey},
};
use enforcer_tests::memory::{HostMemory, HostTable};

use crate::common::*;

const NEVER_CAPPED: u32 = 1000;

/// What happens to four entries when a fifth comes `NOW`: the one that goes, by index.
fn victim(family6: bool, entries: [FlowEntry; 4]) -> Option<usize> {
    let memory = HostMemory::new(1, NEVER_CAPPED, 5);
    let table = HostTable::new(&memory);
    for (port, entry) in (0..).zip(&entries) {
        assert!(table.insert(&key(family6, port), entry));
    }
    let taken = table.insert(&key(family6, 100), &opened(NOW));
    memory.balances();
    let gone: Vec<_> = (0..4)
        .filter(|port| table.find(&key(family6, *port)).is_none())
        .collect();
    assert_eq!(gone.len(), usize::from(taken));
    assert_eq!(table.find(&key(family6, 100)).is_some(), taken);
    gone.first().map(|port| usize::from(*port))
}

fn aged(seconds: u64, flags: u32) -> FlowEntry {
    FlowEntry {
        flags,
        ..opened(NOW - seconds * TICKS)
    }
}

#[test]
fn what_expired_goes_first_then_the_unanswered_then_the_silent() {
    for family6 in [false, true] {
        let live = aged(1, REPLIED);
        let open = |seconds| aged(seconds, 0);
        let closing = |seconds| aged(seconds, REPLIED | CLOSING);
        let silent = aged(PROTECTED_SECONDS + 1, REPLIED);
        let protected = aged(PROTECTED_SECONDS, REPLIED);
        let session = aged(PROTECTED_SECONDS + 1, REPLIED | SESSION);
        for (entries, expected) in [
            // Expired before all others, the oldest of them.
            ([open(50), open(61), silent, live], Some(1)),
            ([open(61), open(70), open(65), open(59)], Some(1)),
            ([live, closing(121), open(60), silent], Some(1)),
            // The oldest unanswered or closing one.
            ([open(10), open(20), live, silent], Some(1)),
            ([live, closing(100), open(59), silent], Some(1)),
            ([live, closing(10), open(11), silent], Some(2)),
            // The oldest answered one past the bound.
            ([live, silent, aged(4000, REPLIED), live], Some(2)),
            ([live, protected, live, silent], Some(3)),
            // A session as long as its rule says, within reason.
            ([session, session, silent, session], Some(2)),
            ([session, live, open(1), session], Some(2)),
            // None of these.
            ([live, protected, session, live], None),
            ([live; 4], None),
        ] {
            assert_eq!(victim(family6, entries), expected, "{entries:#?}");
        }
    }
}

#[test]
fn a_free_slot_is_taken_before_any_entry() {
    for buckets in [1, 512] {
        let memory = HostMemory::new(buckets, NEVER_CAPPED, 9);
        let table = HostTable::new(&memory);
        // Expired, each: still not worth more than a free slot.
        for port in 0..4 {
            assert!(table.insert(&key(false, port), &aged(1000, 0)));
            assert_eq!(memory.flows().len(), usize::from(port) + 1);
        }
    }
}

#[test]
fn the_home_bucket_is_filled_first() {
    let memory = HostMemory::new(1 << 12, NEVER_CAPPED, 3);
    let table = HostTable::new(&memory);
    let mut at_home = 0;
    for port in 0..1000 {
        assert!(table.insert(&key(false, port), &opened(NOW)));
        // A reader that finds it has looked at as few buckets as can be.
        let seen = std::cell::Cell::new(0);
        let counting = Counting(&memory, &seen);
        let glance = enforcer_common::table::Flows(counting).glance(&key(false, port));
        assert!(matches!(glance, Glance::Entry(_)));
        at_home += u32::from(seen.get() == 1);
    }
    assert!(
        at_home > 950,
        "{at_home} of 1000 in a table that is nearly empty"
    );
}

/// Counts the buckets that are looked at.
#[derive(Clone)]
struct Counting<'a>(&'a HostMemory, &'a std::cell::Cell<u32>);

impl<'a> enforcer_common::table::Memory for Counting<'a> {
    type Bucket = enforcer_tests::memory::Words<'a>;
    fn bucket(&self, v6: bool, index: u32) -> Option<Self::Bucket> {
        self.1.set(self.1.get() + 1);
        self.0.bucket(v6, index)
    }
    fn tags(&self, v6: bool, index: u32) -> u64 {
        self.0.tags(v6, index)
    }
    fn index_after(&self, index: u32, _: u64) -> u32 {
        index
    }
    fn set_tag(&self, v6: bool, index: u32, slot: u32, tag: u32) {
        self.0.set_tag(v6, index, slot, tag);
    }
    fn mask(&self, v6: bool) -> u32 {
        self.0.mask(v6)
    }
    fn secret(&self, index: usize) -> u64 {
        self.0.secret(index)
    }
    fn lock(&self, v6: bool, stripe: u32) -> bool {
        self.0.lock(v6, stripe)
    }
    fn unlock(&self, v6: bool, stripe: u32) {
        self.0.unlock(v6, stripe);
    }
    fn protected(&self, hash: u32) -> u32 {
        enforcer_common::table::Memory::protected(&self.0, hash)
    }
    fn protect(&self, hash: u32, by: u32) {
        self.0.protect(hash, by);
    }
    fn cap(&self) -> u32 {
        self.0.cap()
    }
}

#[test]
fn a_table_fills_its_buckets_evenly() {
    const BUCKETS: u32 = 1 << 13;
    for seed in 0..2 {
        let memory = HostMemory::new(BUCKETS, u32::MAX, seed);
        let table = HostTable::new(&memory);
        let slots = BUCKETS * SLOTS;
        // Neighbours, as hosts and ports are, none of which may evict another.
        let mut refused = 0;
        for n in 0..slots / 4 {
            let key = v4(n >> 8, (n & 0xff) as u16, UDP);
            refused += u32::from(!table.insert(&key, &answered(NOW)));
        }
        assert!(refused <= slots / 1000, "{refused} of {slots}");
    }
}

#[test]
fn nothing_is_written_while_others_hold_the_lock() {
    let memory = HostMemory::new(1, NEVER_CAPPED, 1);
    let table = HostTable::new(&memory);
    assert!(table.insert(&key(false, 1), &answered(NOW - 40_000 * TICKS)));
    let before = memory.flows();
    memory.stuck.set(true);
    assert!(!table.insert(&key(false, 2), &opened(NOW)));
    table
        .find(&key(false, 1))
        .unwrap()
        .change(&Change::flags(CLOSING));
    assert_eq!(memory.sweep(NOW), 0);
    assert_eq!(memory.flows(), before);
    memory.stuck.set(false);
    assert_eq!(memory.sweep(NOW), 1);
    memory.balances();
}

#[test]
fn a_change_of_what_became_another_flow_does_nothing() {
    for family6 in [false, true] {
        let memory = HostMemory::new(1, NEVER_CAPPED, 1);
        let table = HostTable::new(&memory);
        for port in 0..4 {
            assert!(table.insert(&key(family6, port), &opened(NOW)));
        }
        let held: Vec<_> = (0..4)
            .map(|port| table.find(&key(family6, port)).unwrap())
            .collect();
        for port in 4..8 {
            assert!(table.insert(&key(family6, port), &opened(NOW + 61 * TICKS)));
        }
        let before = memory.flows();
        for slot in &held {
            slot.change(&Change::flags(REPLIED | CLOSING));
        }
        assert_eq!(memory.flows(), before);
        memory.balances();
    }
}

fn protected(memory: &HostMemory) -> usize {
    memory
        .flows()
        .values()
        .filter(|flow| flow.protected)
        .count()
}

/// Entries of one opener up to its share; what frees a place frees it.
#[test]
fn an_opener_has_its_share_and_no_more() {
    const CAP: u32 = 5;
    for family6 in [false, true] {
        let memory = HostMemory::new(256, CAP, 7);
        let table = HostTable::new(&memory);
        let insert = |port| assert!(table.insert(&key(family6, port), &answered(NOW)));
        (0..20).for_each(insert);
        assert_eq!(protected(&memory), 5);
        memory.balances();
        // Another has its own.
        let other = if family6 {
            v6(9, 2, 1, TCP)
        } else {
            v4(9, 1, TCP)
        };
        assert!(table.insert(&other, &answered(NOW)));
        assert_eq!(protected(&memory), 6);
        // Closing gives a place back, for the next that is answered.
        let of = |port| table.find(&key(family6, port)).unwrap();
        of(0).change(&Change::flags(CLOSING));
        assert_eq!(protected(&memory), 5);
        of(19).change(&Change::flags(REPLIED));
        assert_eq!(protected(&memory), 6);
        memory.balances();
        // A new opening over an old flow, too.
        assert!(table.insert(&key(family6, 1), &opened(NOW)));
        assert_eq!(protected(&memory), 5);
        of(1).change(&Change::flags(REPLIED));
        assert_eq!(protected(&memory), 6);
        memory.balances();
        // And the sweep.
        assert_eq!(memory.sweep(NOW + 8 * 3600 * TICKS + 1), 21);
        assert_eq!(protected(&memory), 0);
        memory.balances();
    }
}

#[test]
fn who_has_an_ipv6_network_has_one_share() {
    const CAP: u32 = 5;
    let memory = HostMemory::new(256, CAP, 7);
    let table = HostTable::new(&memory);
    for host in 0..20 {
        assert!(table.insert(&v6(1, host, 1, TCP), &answered(NOW)));
    }
    assert_eq!(protected(&memory), 5);
    for network in 100..120 {
        assert!(table.insert(&v6(network, 1, 1, TCP), &answered(NOW)));
    }
    assert_eq!(protected(&memory), 25, "others have theirs");
    memory.balances();
}

/// Who opened counts, not which end is the lower.
#[test]
fn the_share_is_the_openers() {
    let memory = HostMemory::new(256, 5, 7);
    let table = HostTable::new(&memory);
    for port in 0..20 {
        // Opened by the one high end, to many.
        let entry = FlowEntry {
            flags: REPLIED,
            ..opened(NOW)
        };
        assert!(table.insert(&v4(u32::from(port), port, TCP), &entry));
    }
    assert_eq!(protected(&memory), 5);
    memory.balances();
}

#[test]
fn beyond_its_share_an_openers_flows_go_as_unanswered_ones() {
    let memory = HostMemory::new(1, 2, 7);
    let table = HostTable::new(&memory);
    let entries = [4, 3, 2, 1].map(|seconds| aged(seconds, REPLIED));
    for (port, entry) in (0..).zip(&entries) {
        assert!(table.insert(&v4(2, port, TCP), entry));
    }
    // The first two had room; of the others the older goes.
    assert!(table.insert(&v4(3, 9, TCP), &answered(NOW)));
    let gone: Vec<u16> = (0..4)
        .filter(|port| table.find(&v4(2, *port, TCP)).is_none())
        .collect();
    assert_eq!(gone, [2]);
    memory.balances();
}

/// Ages up to 2³¹ ticks, whatever the clock's low half is; the sweep goes before they begin anew.
#[test]
fn ages_are_told_apart_up_to_half_of_what_the_clock_counts() {
    for now in [NOW, 1 << 32, (1 << 32) + 5, (3 << 32) + (1 << 31) - 1] {
        let later = now + (1 << 31) - 1;
        let memory = HostMemory::new(1, NEVER_CAPPED, 7);
        let table = HostTable::new(&memory);
        let session: FlowKey = key(false, 2);
        assert!(table.insert(&key(false, 1), &answered(now)));
        let entry = FlowEntry {
            flags: REPLIED | SESSION,
            ..opened(now)
        };
        assert!(table.insert(&session, &entry));
        assert!(table.insert(&key(false, 3), &answered(later)));
        assert_eq!(memory.sweep(now + (1 << 29)), 1, "the session is kept");
        assert!(table.find(&session).is_some());
        assert_eq!(memory.sweep(later), 1);
        assert!(table.find(&key(false, 3)).is_some());
        memory.balances();
    }
}

/// The oldest goes, also where its age's lower bits wrap.
#[test]
fn the_order_of_ages_holds_over_hours() {
    let hours = |n: u64| aged(n * 3600, REPLIED);
    let expected = victim(false, [hours(3), hours(30), hours(29), hours(5)]);
    assert_eq!(expected, Some(1), "8 hours: the second and third expired");
    let expected = victim(false, [hours(3), hours(1), hours(7), hours(5)]);
    assert_eq!(expected, Some(2));
}

/// Version 0 is an empty slot's; a slot that was written 2³¹ times goes on.
#[test]
fn versions_wrap_past_zero() {
    for first in [u32::MAX - 5, u32::MAX - 3, u32::MAX - 1] {
        let memory = HostMemory::new(1, NEVER_CAPPED, 7);
        let table = HostTable::new(&memory);
        for slot in 0..SLOTS {
            memory.word(false, slot, 0).set(first);
        }
        assert!(table.insert(&key(false, 1), &opened(NOW)));
        let mut entry = opened(NOW);
        for flags in [REPLIED, 0, 0, CLOSING, 0] {
            let stale = table.find(&key(false, 1)).unwrap();
            let change = Change::flags(flags);
            table.find(&key(false, 1)).unwrap().change(&change);
            change.apply(&mut entry);
            stale.change(&Change::flags(SESSION));
            let found = table.find(&key(false, 1)).unwrap().load();
            assert_eq!(found, kept(entry));
            let versions = (0..SLOTS).map(|slot| memory.word(false, slot, 0).get());
            assert!(
                versions
                    .into_iter()
                    .all(|version| version != 0 && version % 2 == 0)
            );
        }
        memory.balances();
    }
}

#[test]
fn packets_and_bytes_are_counted() {
    for family6 in [false, true] {
        let memory = HostMemory::new(1, NEVER_CAPPED, 7);
        let table = HostTable::new(&memory);
        let flow = || memory.flows()[&key(family6, 1)];
        assert!(table.insert(&key(family6, 1), &opened(NOW)));
        assert_eq!((flow().packets, flow().bytes), (1, 0));
        for number in 2..=5 {
            let slot = table.find(&key(family6, 1)).unwrap();
            slot.touch(NOW + u64::from(number / 3), u32::MAX);
            slot.change(&Change::flags(REPLIED));
            let bytes = u64::from(u32::MAX) * u64::from(number - 1);
            assert_eq!((flow().packets, flow().bytes), (number, bytes));
        }
        // Those of another flow do not go on with its slot.
        assert!(table.insert(&key(family6, 1), &opened(NOW)));
        assert_eq!((flow().packets, flow().bytes), (1, 0));
    }
}

/// What one client of one server takes, whatever secrets were drawn.
#[test]
fn ports_that_are_counted_up_spread_with_any_secrets() {
    for seed in 0..60 {
        let memory = HostMemory::new(1 << 13, u32::MAX, seed);
        let table = HostTable::new(&memory);
        // A quarter of the slots.
        let refused = (0..8000)
            .filter(|n| !table.insert(&v4(1, n * 2, TCP), &answered(NOW)))
            .count();
        assert!(refused <= 16, "{refused} refused with seed {seed}");
    }
}

/// A flow that waits for its answer stays while either of the new one's buckets has an expired
/// entry, however crowded the first is.
#[test]
fn what_expired_goes_before_what_waits_in_either_bucket() {
    for seed in 0..200 {
        let memory = HostMemory::new(2, NEVER_CAPPED, seed);
        let table = HostTable::new(&memory);
        for port in 0..3 {
            assert!(table.insert(&key(false, port), &answered(NOW)));
        }
        // 300 ms ago.
        assert!(table.insert(&key(false, 3), &opened(NOW - 3 * TICKS / 10)));
        for port in 4..8 {
            assert!(table.insert(&key(false, port), &opened(NOW - 3600 * TICKS)));
        }
        assert_eq!(memory.flows().len(), 8);
        assert!(table.insert(&key(false, 8), &opened(NOW)));
        assert!(table.find(&key(false, 3)).is_some(), "seed {seed}");
    }
}
