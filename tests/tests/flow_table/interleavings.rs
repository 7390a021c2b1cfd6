//! Every interleaving of a reader and a writer, and of two writers, of one slot, through the code
//! of the programs, with memory that orders no more than each method promises.
//!
//! Only the words named by a test are the model's; with all of a slot's there would be too many
//! ways. Preemptions are bounded, too.

use std::{
    cell::RefCell,
    collections::HashMap,
    sync::{
        Mutex,
        atomic::{AtomicU32 as Plain, Ordering::SeqCst},
    },
};

use enforcer_common::{
    flow::{CLOSING, Change, OPENER_IS_LOW, REPLIED, TIMED},
    table::{self, Bucket, Found, Memory, SLOTS, WORDS4},
    wire::{FlowEntry, FlowKey},
};
use enforcer_tests::{host::HZ, memory::HostMemory, scale};
use loom::{
    sync::atomic::{AtomicU32, Ordering, fence},
    thread,
};

use crate::common::*;

/// Words of an IPv4 slot: version, jiffies, key, generation, flags, interfaces, rule, and the
/// second of the last judgement.
const VERSION: u32 = 0;
const SEEN: u32 = 1;
const KEY: u32 = 2;
const PORTS: u32 = 4;
const GENERATION: u32 = 6;
const STATE: u32 = 7;
const ARRIVED: u32 = 8;
const RULE: u32 = 10;
const OPENED: u32 = 11;
const CHECKED: u32 = 12;

/// What a memory is to get wrong, to see that the model would find it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Loads need not come after what they should come after.
    NoAfter,
    /// The version is written like any word.
    NoPublish,
    /// The second look at the version sees what the first saw.
    NoSecondLook,
}

/// One bucket, home and second of every key.
struct Shared {
    /// Those of the model.
    words: Vec<Option<AtomicU32>>,
    /// What was written last.
    last: Vec<Plain>,
    /// The tags, likewise.
    tags: Vec<AtomicU32>,
    last_tags: Vec<Plain>,
    lock: loom::sync::Mutex<()>,
    held: RefCell<Option<loom::sync::MutexGuard<'static, ()>>>,
    owner: Mutex<Option<thread::ThreadId>>,
    fault: Fault,
    /// The version that each thread saw at its first look.
    first: Mutex<HashMap<thread::ThreadId, u32>>,
    /// What was found before the threads began.
    found: Mutex<Found>,
}

/// Loom's threads want `'static`; who makes the memory frees it.
#[derive(Clone, Copy)]
struct Handle(&'static Shared, &'static [u32]);

#[derive(Clone, Copy)]
struct Words {
    shared: &'static Shared,
    again: bool,
}

impl Bucket for Words {
    fn get(&self, at: u32) -> u32 {
        let shared = self.shared;
        let me = thread::current().id();
        if *shared.owner.lock().unwrap() == Some(me) {
            // Who holds the lock sees what was written last. As a load of the model it would hide
            // readers before it: Loom keeps the last access to a word alone, to see which threads
            // are in each other's way.
            return shared.last[at as usize].load(SeqCst);
        }
        let version = at % WORDS4 == VERSION;
        if version && self.again && shared.fault == Fault::NoSecondLook {
            return shared.first.lock().unwrap()[&me];
        }
        let value = match &shared.words[at as usize] {
            Some(word) => word.load(Ordering::Relaxed),
            None => shared.last[at as usize].load(SeqCst),
        };
        if version {
            shared.first.lock().unwrap().insert(me, value);
        }
        value
    }

    fn pair(&self, at: u32) -> u64 {
        u64::from(self.get(at)) | u64::from(self.get(at + 1)) << 32
    }

    fn after(&self, _: u64) -> Self {
        if self.shared.fault != Fault::NoAfter {
            fence(Ordering::Acquire);
        }
        Self {
            again: true,
            ..*self
        }
    }

    fn set(&self, at: u32, value: u32) {
        if let Some(word) = &self.shared.words[at as usize] {
            word.store(value, Ordering::Relaxed);
        }
        self.shared.last[at as usize].store(value, SeqCst);
    }

    fn publish(&self, at: u32, value: u32) {
        if self.shared.fault != Fault::NoPublish {
            fence(Ordering::Release);
        }
        self.set(at, value);
        if self.shared.fault != Fault::NoPublish {
            fence(Ordering::Release);
        }
    }
}

impl Memory for Handle {
    type Bucket = Words;

    fn bucket(&self, _: bool, index: u32) -> Option<Words> {
        (index == 0).then_some(Words {
            shared: self.0,
            again: false,
        })
    }

    fn tags(&self, _: bool, _: u32) -> u64 {
        let shared = self.0;
        let own = *shared.owner.lock().unwrap() == Some(thread::current().id());
        let tag = |slot: usize| match shared.tags.get(slot) {
            Some(tag) if !own => tag.load(Ordering::Relaxed),
            _ => shared.last_tags[slot].load(SeqCst),
        };
        (0..SLOTS as usize).fold(0, |tags, slot| tags | u64::from(tag(slot)) << (16 * slot))
    }

    fn set_tag(&self, _: bool, _: u32, slot: u32, tag: u32) {
        if let Some(place) = self.0.tags.get(slot as usize) {
            place.store(tag, Ordering::Relaxed);
        }
        self.0.last_tags[slot as usize].store(tag, SeqCst);
    }

    fn mask(&self, _: bool) -> u32 {
        0
    }

    fn secret(&self, _: usize) -> u64 {
        0
    }

    fn lock(&self, _: bool, _: u32) -> bool {
        // For as long as it takes; the kernel's sixteen tries are some ten times that.
        let guard = self.0.lock.lock().unwrap();
        *self.0.held.borrow_mut() = Some(guard);
        *self.0.owner.lock().unwrap() = Some(thread::current().id());
        true
    }

    fn unlock(&self, _: bool, _: u32) {
        *self.0.owner.lock().unwrap() = None;
        let guard = self.0.held.borrow_mut().take();
        drop(guard);
    }

    fn protected(&self, _: u32) -> u32 {
        0
    }

    fn protect(&self, _: u32, _: u32) {}

    fn cap(&self) -> u32 {
        u32::MAX
    }
}

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

/// Runs `threads` in every interleaving, in a bucket that `before` prepared and of which the first
/// slots, `free` of them, may be written. `words` of these slots are the model's.
fn explore(
    fault: Fault,
    words: &'static [u32],
    free: u32,
    before: &'static (dyn Fn(Handle) + Sync),
    threads: [&'static (dyn Fn(Handle) + Sync); 2],
    after: &'static (dyn Fn(Handle) + Sync),
) {
    // What is in the slots before there is a model: the others are taken for good.
    let memory = HostMemory::new(1, u32::MAX, 0);
    for port in 1000..1000 + SLOTS as u16 {
        let entry = FlowEntry {
            flags: OPENER_IS_LOW | REPLIED,
            ..flow(port, words).1
        };
        assert!(table::insert(&&memory, &v4(7, port, TCP), &entry, HZ));
    }
    let taken: Vec<u32> = (0..SLOTS * WORDS4)
        .map(|index| memory.word(false, 0, index).get())
        .collect();
    let tags: Vec<u32> = (0..SLOTS)
        .map(|slot| memory.tag(false, slot).get())
        .collect();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(scale::rounds(3, 2));
    builder.max_branches = 10_000;
    builder.check(move || {
        let value = |index: u32| match index / WORDS4 {
            slot if slot < free => 0,
            _ => taken[index as usize],
        };
        let word = |index: u32| {
            let (slot, at) = (index / WORDS4, index % WORDS4);
            let ours = slot < free && (at == VERSION || words.contains(&at));
            ours.then(|| AtomicU32::new(value(index)))
        };
        let all = 0..SLOTS * WORDS4;
        let shared = Box::into_raw(Box::new(Shared {
            words: all.clone().map(word).collect(),
            last: all.map(|index| Plain::new(value(index))).collect(),
            tags: (0..free).map(|_| AtomicU32::new(0)).collect(),
            last_tags: (0..)
                .zip(&tags)
                .map(|(slot, tag)| Plain::new(if slot < free { 0 } else { *tag }))
                .collect(),
            owner: Mutex::default(),
            found: Mutex::new(Found::EMPTY),
            lock: loom::sync::Mutex::new(()),
            held: RefCell::default(),
            fault,
            first: Mutex::default(),
        }));
        // SAFETY: freed below, when the other thread is no more.
        let handle = Handle(unsafe { &*shared }, words);
        before(handle);
        let [one, other] = threads;
        let thread = thread::spawn(move || one(handle));
        other(handle);
        thread.join().unwrap();
        after(handle);
        // SAFETY: of `into_raw`; no thread but this is left.
        drop(unsafe { Box::from_raw(shared) });
    });
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
    }
}

/// The same with a part of the protocol missing: what the model would say.
#[test]
fn the_model_finds_what_is_missing() {
    for fault in [Fault::NoAfter, Fault::NoPublish, Fault::NoSecondLook] {
        let found = PARTS.into_iter().any(|words| {
            [1, 2].into_iter().any(|number| {
                // A thread of its own: the model's state is the thread's.
                let model = std::thread::spawn(move || {
                    if number == 1 {
                        replaced(fault, words, &|handle| {
                            look(handle, 1, &[OPENER_IS_LOW]);
                        });
                    } else {
                        replaced(fault, words, &|handle| {
                            look(handle, 2, &[OPENER_IS_LOW]);
                        });
                    }
                });
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
