//! The model of the table's memory: it orders no more than each method promises.
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

use enforcer_common::table::{Bucket, Found, Memory, SECRETS, SLOTS, WORDS4};
use enforcer_tests::{memory::HostMemory, scale};
use loom::{
    sync::atomic::{AtomicU32, Ordering, fence},
    thread,
};

/// Words of an IPv4 slot: version, jiffies, key, generation, flags, interfaces, rule, and the
/// second of the last judgement.
pub const VERSION: u32 = 0;
pub const SEEN: u32 = 1;
pub const KEY: u32 = 2;
pub const PORTS: u32 = 4;
pub const GENERATION: u32 = 6;
pub const STATE: u32 = 7;
pub const ARRIVED: u32 = 8;
pub const RULE: u32 = 10;
pub const OPENED: u32 = 11;
pub const CHECKED: u32 = 12;

/// What a memory is to get wrong, to see that the model would find it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    None,
    /// Loads need not come after what they should come after.
    NoAfter,
    /// The look into the second bucket need not come after the one into the first.
    NoIndexAfter,
    /// The version is written like any word.
    NoPublish,
    /// The second look at the version sees what the first saw.
    NoSecondLook,
}

/// A few buckets.
pub struct Shared {
    /// Those of the model.
    words: Vec<Option<AtomicU32>>,
    /// What was written last.
    last: Vec<Plain>,
    /// The tags, likewise.
    tags: Vec<Option<AtomicU32>>,
    last_tags: Vec<Plain>,
    lock: loom::sync::Mutex<()>,
    held: RefCell<Option<loom::sync::MutexGuard<'static, ()>>>,
    owner: Mutex<Option<thread::ThreadId>>,
    fault: Fault,
    /// The version of a slot that each thread saw at its first look.
    first: Mutex<HashMap<(thread::ThreadId, u32), u32>>,
    /// What was found before the threads began.
    pub found: Mutex<Found>,
    secrets: [u64; SECRETS],
}

/// Loom's threads want `'static`; who makes the memory frees it.
#[derive(Clone, Copy)]
pub struct Handle(pub &'static Shared, pub &'static [u32]);

#[derive(Clone, Copy)]
pub struct Words {
    shared: &'static Shared,
    /// First word of the bucket.
    first: u32,
    again: bool,
}

impl Bucket for Words {
    fn get(&self, at: u32) -> u32 {
        let shared = self.shared;
        let at = self.first + at;
        let me = thread::current().id();
        if *shared.owner.lock().unwrap() == Some(me) {
            // Who holds the lock sees what was written last. As a load of the model it would hide
            // readers before it: Loom keeps the last access to a word alone, to see which threads
            // are in each other's way.
            return shared.last[at as usize].load(SeqCst);
        }
        let version = at % WORDS4 == VERSION;
        if version
            && self.again
            && shared.fault == Fault::NoSecondLook
            && let Some(first) = shared.first.lock().unwrap().get(&(me, at))
        {
            return *first;
        }
        let value = match &shared.words[at as usize] {
            Some(word) => word.load(Ordering::Relaxed),
            None => shared.last[at as usize].load(SeqCst),
        };
        if version {
            shared.first.lock().unwrap().insert((me, at), value);
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
        let at = self.first + at;
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
        (index <= self.mask(false)).then_some(Words {
            shared: self.0,
            first: index * SLOTS * WORDS4,
            again: false,
        })
    }

    fn tags(&self, _: bool, index: u32) -> u64 {
        let shared = self.0;
        let own = *shared.owner.lock().unwrap() == Some(thread::current().id());
        let first = (index * SLOTS) as usize;
        let tag = |slot: usize| match &shared.tags[first + slot] {
            Some(tag) if !own => tag.load(Ordering::Relaxed),
            _ => shared.last_tags[first + slot].load(SeqCst),
        };
        (0..SLOTS as usize).fold(0, |tags, slot| tags | u64::from(tag(slot)) << (16 * slot))
    }

    fn index_after(&self, index: u32, _: u64) -> u32 {
        if !matches!(self.0.fault, Fault::NoAfter | Fault::NoIndexAfter) {
            fence(Ordering::Acquire);
        }
        index
    }

    fn set_tag(&self, _: bool, index: u32, slot: u32, tag: u32) {
        let at = (index * SLOTS + slot) as usize;
        if let Some(place) = &self.0.tags[at] {
            place.store(tag, Ordering::Relaxed);
        }
        self.0.last_tags[at].store(tag, SeqCst);
    }

    fn mask(&self, _: bool) -> u32 {
        self.0.last.len() as u32 / (SLOTS * WORDS4) - 1
    }

    fn secret(&self, index: usize) -> u64 {
        self.0.secrets[index]
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

/// Runs `threads` in every interleaving, with a table that `memory` made. The model's are `words` of
/// the slots of these numbers.
pub fn explore(
    fault: Fault,
    words: &'static [u32],
    memory: &HostMemory,
    slots: &'static [u32],
    before: &'static (dyn Fn(Handle) + Sync),
    threads: [&'static (dyn Fn(Handle) + Sync); 2],
    after: &'static (dyn Fn(Handle) + Sync),
) {
    // What is in the slots before there is a model.
    let taken: Vec<u32> = (0..memory.slots() * WORDS4)
        .map(|index| memory.word(false, 0, index).get())
        .collect();
    let tags: Vec<u32> = (0..memory.slots())
        .map(|slot| memory.tag(false, slot).get())
        .collect();
    let secrets = std::array::from_fn(|index| memory.secret(index));
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(scale::rounds(3, 2));
    builder.max_branches = 10_000;
    builder.check(move || {
        let word = |(index, value): (u32, &u32)| {
            let (slot, at) = (index / WORDS4, index % WORDS4);
            let ours = slots.contains(&slot) && (at == VERSION || words.contains(&at));
            ours.then(|| AtomicU32::new(*value))
        };
        let tag = |(slot, tag): (u32, &u32)| slots.contains(&slot).then(|| AtomicU32::new(*tag));
        let shared = Box::into_raw(Box::new(Shared {
            words: (0..).zip(&taken).map(word).collect(),
            last: taken.iter().map(|value| Plain::new(*value)).collect(),
            tags: (0..).zip(&tags).map(tag).collect(),
            last_tags: tags.iter().map(|tag| Plain::new(*tag)).collect(),
            owner: Mutex::default(),
            found: Mutex::new(Found::EMPTY),
            secrets,
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
