//! Every interleaving of a reader, or of somebody who changes a flow, with the writer that moves it.

use enforcer_common::{
    flow::{Change, FlowSlot as _, Glance, Glances as _, REPLIED, TIMED},
    table::{self, Flows, Found, SLOTS},
    wire::{FlowEntry, FlowKey},
};
use enforcer_tests::{host::HZ, memory::HostMemory};

use crate::{common::*, model::*, room::Keys};

/// Two buckets of the new flow, and the second one of the flow that moves.
const HOME: u32 = 0;
const SECOND: u32 = 1;
const AWAY: u32 = 3;
/// The first slots of its home bucket and of its second one.
const SLOTS_OF: &[u32] = &[HOME * SLOTS, AWAY * SLOTS];

/// A table in which the new flow finds room only where the other moves away.
fn crowded() -> (HostMemory, FlowKey, FlowKey) {
    // Whose flow prefers the slots that the model knows.
    let preferring = |seed| {
        let mut keys = Keys::new(false, seed);
        let moves = keys.fill([HOME, AWAY], 1, &answered(NOW))[0];
        (keys.slot(&moves) == HOME * SLOTS).then_some((keys, moves))
    };
    let (mut keys, moves) = (0..100).find_map(preferring).expect("one in four");
    keys.fill([HOME, SECOND], 3, &answered(NOW));
    keys.fill([SECOND, HOME], 4, &answered(NOW));
    let new = keys.take([HOME, SECOND]);
    (keys.memory, moves, new)
}

thread_local! {
    static KEYS: (FlowKey, FlowKey) = {
        let (_, moves, new) = crowded();
        (moves, new)
    };
}

fn moves() -> FlowKey {
    KEYS.with(|keys| keys.0)
}

fn new() -> FlowKey {
    KEYS.with(|keys| keys.1)
}

/// No field that is the model's is like the other's.
fn entry(handle: Handle) -> FlowEntry {
    let old = answered(NOW);
    let own = |at: u32, value: u32| value + 100 * u32::from(handle.1.contains(&at));
    FlowEntry {
        last_seen: NOW + 7 * u64::from(handle.1.contains(&SEEN)),
        generation: own(GENERATION, old.generation),
        rule: own(RULE, old.rule),
        selector: own(STATE, old.selector),
        checked: own(CHECKED, old.checked),
        ..old
    }
}

fn enter(handle: Handle) {
    assert!(
        table::insert(&handle, &new(), &entry(handle), HZ),
        "no room"
    );
}

fn found(handle: Handle, key: &FlowKey) -> Option<FlowEntry> {
    let mut found = Found::EMPTY;
    table::find(&handle, key, &mut found).then_some(found.entry)
}

fn is_there(handle: Handle) {
    let entry = found(handle, &moves()).expect("missed");
    assert_eq!(entry, kept(answered(NOW)), "torn");
}

/// The same for who does not wait, and leaves it open where somebody writes.
fn is_seen(handle: Handle) {
    match Flows(handle).glance(&moves()) {
        Glance::Entry(slot) => assert_eq!(slot.load(), kept(answered(NOW)), "torn"),
        Glance::Busy => {}
        Glance::Nothing => panic!("missed"),
    }
}

/// What differs between the keys, and whether there is an entry, in each.
const PARTS: [&[u32]; 3] = [
    &[PORTS, STATE, SEEN],
    &[PORTS, STATE, GENERATION],
    &[PORTS, STATE, CHECKED],
];

fn moved(fault: Fault, words: &'static [u32], other: &'static (dyn Fn(Handle) + Sync)) {
    let (memory, ..) = crowded();
    explore(
        fault,
        words,
        &memory,
        SLOTS_OF,
        &|_| {},
        [&enter, other],
        &|handle| {
            assert!(found(handle, &moves()).is_some(), "lost");
            assert_eq!(found(handle, &new()), Some(kept(entry(handle))));
        },
    );
}

#[test]
fn a_flow_that_moves_is_found_all_the_time() {
    for words in PARTS {
        moved(Fault::None, words, &is_there);
        moved(Fault::None, words, &is_seen);
        moved(Fault::None, words, &|handle| {
            assert!(table::known(&handle, &moves()), "missed");
        });
    }
}

#[test]
fn what_takes_its_place_is_seen_whole() {
    for words in PARTS {
        moved(Fault::None, words, &|handle| {
            let seen = found(handle, &new());
            assert!(seen.is_none_or(|seen| seen == kept(entry(handle))), "torn");
        });
    }
}

/// The same with a part of the protocol missing: what the model would say.
#[test]
fn the_model_finds_a_flow_that_is_missed() {
    let looks: [&'static (dyn Fn(Handle) + Sync); 2] = [&is_there, &is_seen];
    let faults = [Fault::NoAfter, Fault::NoIndexAfter, Fault::NoPublish];
    for (fault, look) in faults.into_iter().flat_map(|f| looks.map(|look| (f, look))) {
        let found = PARTS.into_iter().any(|words| {
            // A thread of its own: the model's state is the thread's.
            let model = std::thread::spawn(move || moved(fault, words, look));
            let text = model.join().err().map(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            });
            let text = text.map(Option::unwrap_or_default);
            text.is_some_and(|text| {
                let ours = ["missed", "torn"].iter().any(|word| text.contains(word));
                assert!(ours, "another failure: {text}");
                true
            })
        });
        assert!(found, "{fault:?} goes unseen");
    }
}

/// Who found the flow before changes it or does nothing; never the one that took its place. (It stays
/// protected: one that closes would go, and not move.)
#[test]
fn a_change_never_reaches_what_took_its_place() {
    moved(Fault::None, &[PORTS, STATE], &|handle| {
        let mut found = Found::EMPTY;
        assert!(table::find(&handle, &moves(), &mut found), "missed");
        table::change(&handle, &found, &Change::flags(TIMED));
        let flags = self::found(handle, &moves()).expect("missed").flags;
        assert!(flags & REPLIED != 0, "what it had is gone");
    });
}
