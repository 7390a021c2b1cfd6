//! Every interleaving of a reader and a writer, and of two writers, of one slot, through the code
//! of the programs.

use enforcer_common::{
    flow::{CLOSING, Change, FlowSlot as _, Glance, Glances as _, OPENER_IS_LOW, REPLIED, TIMED},
    table::{self, Bucket as _, Flows, Found, Memory as _, SLOTS, WORDS4},
    wire::{FlowEntry, FlowKey},
};
use enforcer_tests::{host::HZ, memory::HostMemory};

use crate::{common::*, model::*};

/// A flow, which differs from others in the words that are the model's, and in its age.
fn flow(number: u16, words: &[u32]) -> (FlowKey, FlowEntry) {
    let n = u32::from(number);
    let own = |at: u32, base: u32| if words.contains(&at) { base + n } else { base };
    let entry = FlowEntry {
        // When a flow of a higher number comes, this one has expired.
        last_seen: NOW + u64::from(n % 1000) * 100 * TICKS,
        generation: own(GENERATION, 100),
        rule: own(RULE, 200),
        flags: OPENER_IS_LOW,
        selector: own(STATE, 300),
        opened: own(OPENED, 400),
        checked: own(CHECKED, 500),
        arrived: [own(ARRIVED, 600), own(ARRIVED + 1, 700)],
    };
    let port = own(PORTS, 1) as u16;
    (v4(own(KEY, 0), port, TCP), entry)
}

/// Runs `threads` in a bucket of which the first slots, `free` of them, may be written: the others
/// are taken for good.
fn explore(
    fault: Fault,
    words: &'static [u32],
    free: u32,
    before: &'static (dyn Fn(Handle) + Sync),
    threads: [&'static (dyn Fn(Handle) + Sync); 2],
    after: &'static (dyn Fn(Handle) + Sync),
) {
    let memory = HostMemory::new(1, u32::MAX, 0);
    for port in 1000..1000 + SLOTS as u16 {
        let entry = FlowEntry {
            flags: OPENER_IS_LOW | REPLIED,
            ..flow(port, words).1
        };
        assert!(table::insert(&&memory, &v4(7, port, TCP), &entry, HZ));
    }
    for slot in 0..free {
        memory.tag(false, slot).set(0);
        (0..WORDS4).for_each(|at| memory.word(false, slot, at).set(0));
    }
    let slots = if free == 1 { &[0][..] } else { &[0, 1] };
    crate::model::explore(fault, words, &memory, slots, before, threads, after);
}

/// Looks a flow up; what is found is its own entry, whole.
fn look(handle: Handle, number: u16, flags: &[u32]) -> bool {
    let (key, entry) = flow(number, handle.1);
    let mut found = Found::EMPTY;
    if !table::find(&handle, &key, &mut found) {
        return false;
    }
    assert!(flags.contains(&found.entry.flags), "torn: {found:?}");
    let expected = FlowEntry {
        flags: found.entry.flags,
        last_seen: if handle.1.contains(&SEEN) {
            entry.last_seen
        } else {
            found.entry.last_seen
        },
        ..entry
    };
    assert_eq!(found.entry, expected, "torn");
    true
}

/// The same for who does not wait.
fn glance(handle: Handle, number: u16) {
    let (key, entry) = flow(number, handle.1);
    if let Glance::Entry(slot) = Flows(handle).glance(&key) {
        let seen = slot.load();
        let last_seen = if handle.1.contains(&SEEN) {
            entry.last_seen
        } else {
            seen.last_seen
        };
        assert_eq!(seen, FlowEntry { last_seen, ..entry }, "torn");
    }
}

fn enter(handle: Handle, number: u16) -> bool {
    let (key, entry) = flow(number, handle.1);
    table::insert(&handle, &key, &entry, HZ)
}

/// Words by a few, for all of them would take minutes. Each has some of the key and of the entry.
const PARTS: [&[u32]; 4] = [
    &[KEY, SEEN, GENERATION, STATE],
    &[PORTS, GENERATION, RULE, ARRIVED],
    &[KEY, PORTS, ARRIVED, ARRIVED + 1],
    &[PORTS, STATE, CHECKED, OPENED],
];

fn replaced(fault: Fault, words: &'static [u32], reader: &'static (dyn Fn(Handle) + Sync)) {
    explore(
        fault,
        words,
        1,
        &|handle| assert!(enter(handle, 1)),
        [&|handle| assert!(enter(handle, 2)), reader],
        &|handle| {
            assert!(!look(handle, 1, &[OPENER_IS_LOW]));
            assert!(look(handle, 2, &[OPENER_IS_LOW]));
        },
    );
}

#[test]
fn a_reader_sees_an_entry_whole_and_never_another_flows() {
    for words in PARTS {
        replaced(Fault::None, words, &|handle| {
            look(handle, 1, &[OPENER_IS_LOW]);
        });
        replaced(Fault::None, words, &|handle| {
            look(handle, 2, &[OPENER_IS_LOW]);
        });
        replaced(Fault::None, words, &|handle| glance(handle, 1));
        replaced(Fault::None, words, &|handle| glance(handle, 2));
    }
}

/// The same with a part of the protocol missing: what the model would say.
#[test]
fn the_model_finds_what_is_missing() {
    let looks: [[&'static (dyn Fn(Handle) + Sync); 2]; 2] = [
        [
            &|handle| {
                look(handle, 1, &[OPENER_IS_LOW]);
            },
            &|handle| {
                look(handle, 2, &[OPENER_IS_LOW]);
            },
        ],
        [&|handle| glance(handle, 1), &|handle| glance(handle, 2)],
    ];
    let faults = [Fault::NoAfter, Fault::NoPublish, Fault::NoSecondLook];
    for (fault, looks) in faults
        .into_iter()
        .flat_map(|f| looks.map(|looks| (f, looks)))
    {
        let found = PARTS.into_iter().any(|words| {
            looks.into_iter().any(|look| {
                // A thread of its own: the model's state is the thread's.
                let model = std::thread::spawn(move || replaced(fault, words, look));
                let panic = model.join().err();
                panic.is_some_and(|panic| {
                    let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                    assert!(text.contains("torn"), "another failure: {text}");
                    true
                })
            })
        });
        assert!(found, "{fault:?} goes unseen");
    }
}

/// What a policy that goes on with a flow writes.
const ADMITS: Change = Change {
    flags: REPLIED,
    admits: 1,
    generation: 901,
    rule: 902,
    timing: TIMED,
    boot: 903,
    begins: 1,
    side: 0,
    ifindex: 904,
};

/// A flow that is being changed is there all the time, as it was or as it will be.
#[test]
fn a_flow_that_is_being_changed_is_found() {
    const WORDS: [&[u32]; 3] = [
        &[STATE, GENERATION, RULE],
        &[RULE, OPENED, CHECKED],
        &[STATE, ARRIVED],
    ];
    fn find(handle: Handle) -> FlowEntry {
        let mut found = Found::EMPTY;
        let (key, _) = flow(1, handle.1);
        assert!(table::find(&handle, &key, &mut found), "missed");
        found.entry
    }
    for words in WORDS {
        explore(
            Fault::None,
            words,
            1,
            &|handle| {
                assert!(enter(handle, 1));
                let mut found = handle.0.found.lock().unwrap();
                assert!(table::find(&handle, &flow(1, handle.1).0, &mut found));
            },
            [
                &|handle| {
                    let found = *handle.0.found.lock().unwrap();
                    table::change(&handle, &found, &ADMITS);
                },
                &|handle| {
                    let old = flow(1, handle.1).1;
                    let mut new = old;
                    ADMITS.apply(&mut new);
                    let entry = find(handle);
                    let same = |expected: &FlowEntry| {
                        let differs = [
                            (STATE, entry.flags != expected.flags),
                            (GENERATION, entry.generation != expected.generation),
                            (RULE, entry.rule != expected.rule),
                            (OPENED, entry.opened != expected.opened),
                            (CHECKED, entry.checked != expected.checked),
                            (ARRIVED, entry.arrived[0] != expected.arrived[0]),
                        ];
                        let ours = |(at, _): &&(u32, bool)| handle.1.contains(at);
                        !differs.iter().filter(ours).any(|(_, differs)| *differs)
                    };
                    assert!(same(&old) || same(&new), "torn: {entry:?}");
                },
            ],
            &|handle| assert_eq!(find(handle).generation, 901),
        );
    }
}

/// A change of what was found while its slot goes to another flow.
#[test]
fn a_change_never_reaches_another_flow() {
    explore(
        Fault::None,
        &[STATE, PORTS],
        1,
        &|handle| assert!(enter(handle, 1)),
        [&|handle| assert!(enter(handle, 2)), &|handle| {
            let mut found = Found::EMPTY;
            if table::find(&handle, &flow(1, handle.1).0, &mut found) {
                table::change(&handle, &found, &Change::flags(CLOSING));
            }
        }],
        &|handle| {
            assert!(look(handle, 2, &[OPENER_IS_LOW]));
            assert!(!look(handle, 1, &[OPENER_IS_LOW]));
        },
    );
}

#[test]
fn two_writers_of_a_key_take_one_slot() {
    explore(
        Fault::None,
        &[STATE, KEY, PORTS],
        2,
        &|_| {},
        [&|handle| assert!(enter(handle, 1)), &|handle| {
            assert!(enter(handle, 1))
        }],
        &|handle| {
            assert!(look(handle, 1, &[OPENER_IS_LOW]));
            let bucket = handle.bucket(false, 0).unwrap();
            // The low end's address: the others' is another.
            let ours = |slot: &u32| bucket.get(slot * WORDS4 + KEY) == 0x0a01_0001;
            assert_eq!((0..SLOTS).filter(ours).count(), 1);
        },
    );
}
