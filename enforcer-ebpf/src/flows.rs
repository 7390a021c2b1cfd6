//! The flow table in the kernel: `enforcer_common::table` over array maps.
//!
//! An array map's values are 8 bytes apart from being aligned to cache lines unless the map can be
//! mapped into memory, so these can. Sizes, secrets and the share of an opener are constants that
//! the daemon fills in before it loads the programs.

use core::{arch::asm, mem::MaybeUninit};

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_MMAPABLE},
    btf_maps::Array,
    macros::btf_map,
};
use enforcer_common::{
    flow::{Change, FlowSlot, FlowTable},
    table::{self, Bucket, Found, Look, Memory, SECRETS, SLOTS, STRIPES, Taken, WORDS4, WORDS6},
    wire::{FlowEntry, FlowKey, FragmentEntry, FragmentKey},
};

use crate::maps::{self, FRAGMENTS};

/// Buckets of each family, unless the daemon chooses another number.
const BUCKETS: usize = 1 << 15;
/// Counters of protected entries; openers share them by hash.
const SOURCES: usize = 1 << 14;
const MAPPED: usize = BPF_F_MMAPABLE as usize;

type Bucket4 = [u64; (SLOTS * WORDS4 / 2) as usize];
type Bucket6 = [u64; (SLOTS * WORDS6 / 2) as usize];
/// A lock and the rest of its cache line.
type Lock = [u64; 8];

#[btf_map]
static FLOWS4: Array<Bucket4, BUCKETS, MAPPED> = Array::new();
#[btf_map]
static FLOWS6: Array<Bucket6, BUCKETS, MAPPED> = Array::new();
/// The tags of a bucket's slots.
#[btf_map]
static FLOW_TAGS4: Array<u64, BUCKETS, MAPPED> = Array::new();
#[btf_map]
static FLOW_TAGS6: Array<u64, BUCKETS, MAPPED> = Array::new();
#[btf_map]
static FLOW_LOCKS: Array<Lock, { 2 * STRIPES as usize }, MAPPED> = Array::new();
#[btf_map]
static FLOW_SWEEP: Array<u32, 1> = Array::new();
#[btf_map]
static FLOW_SOURCES: Array<u32, SOURCES> = Array::new();

/// Buckets of each family less one.
#[unsafe(no_mangle)]
static FLOW_MASK: u32 = BUCKETS as u32 - 1;
/// Protected entries that an opener may have.
#[unsafe(no_mangle)]
static FLOW_CAP: u32 = BUCKETS as u32 * SLOTS / table::SOURCE_SHARE;
/// Of the hash.
#[unsafe(no_mangle)]
static FLOW_SECRETS: [u64; SECRETS] = [0; SECRETS];

/// A constant that was filled in before the programs were loaded.
macro_rules! constant {
    ($place:expr) => {
        // SAFETY: a live static; volatile, for the compiler knows another value.
        unsafe { core::ptr::read_volatile(&raw const $place) }
    };
}

/// A bucket in a map.
#[derive(Clone, Copy)]
pub struct Words(*mut u32);

impl Bucket for Words {
    #[inline(always)]
    fn get(&self, at: u32) -> u32 {
        // SAFETY: within the bucket, or the verifier refuses the program; aligned.
        unsafe { self.0.add(at as usize).read_volatile() }
    }

    #[inline(always)]
    fn pair(&self, at: u32) -> u64 {
        // SAFETY: as in `get`; `at` is even, buckets are aligned to their size.
        unsafe { self.0.add(at as usize).cast::<u64>().read_volatile() }
    }

    #[inline(always)]
    fn after(&self, seen: u64) -> Self {
        // x86 keeps loads in order. arm64 does not, but it orders a load behind the one that its
        // address was computed from (Arm ARM, "address dependency"), though the value has no
        // influence. In assembly, because a compiler would see through it.
        if cfg!(feature = "tso") {
            return *self;
        }
        let mut none = seen;
        // SAFETY: one instruction on a register.
        unsafe { asm!("{none} &= 0", none = inout(reg) none, options(pure, nomem)) };
        // SAFETY: 0 bytes further.
        Self(unsafe { self.0.byte_add(none as usize) })
    }

    #[inline(always)]
    fn hidden(&self, value: u64) -> u64 {
        if cfg!(feature = "tso") {
            return value;
        }
        let mut value = value;
        // SAFETY: no instruction.
        unsafe { asm!("/* {value} */", value = inout(reg) value, options(pure, nomem)) };
        value
    }

    #[inline(always)]
    fn set(&self, at: u32, value: u32) {
        // SAFETY: as in `get`.
        unsafe { self.0.add(at as usize).write_volatile(value) }
    }

    #[inline(always)]
    fn set_pair(&self, at: u32, value: u64) {
        // SAFETY: as in `pair`.
        unsafe { self.0.add(at as usize).cast::<u64>().write_volatile(value) }
    }

    #[inline(always)]
    fn publish(&self, at: u32, value: u32) {
        if cfg!(feature = "tso") {
            return self.set(at, value);
        }
        // SAFETY: as in `get`. An exchange is fully ordered (Documentation/bpf/standardization,
        // atomic operations; the JITs emit a full barrier with it).
        unsafe {
            asm!(
                "w0 = xchg32_32(r1 + 0, w0)",
                in("r1") self.0.add(at as usize),
                inout("r0") u64::from(value) => _,
            );
        }
    }
}

/// The maps above.
#[derive(Clone, Copy)]
pub struct Maps;

#[inline(always)]
fn exchange(lock: *mut u64, value: u64) -> u64 {
    let before: u64;
    // SAFETY: the caller's aligned word in a live map; fully ordered, see `publish`.
    unsafe { asm!("r0 = xchg_64(r1 + 0, r0)", in("r1") lock, inout("r0") value => before) };
    before
}

#[inline(always)]
fn tags(v6: bool, index: u32) -> Option<*mut u64> {
    if v6 {
        FLOW_TAGS6.get_ptr_mut(index)
    } else {
        FLOW_TAGS4.get_ptr_mut(index)
    }
}

#[inline(always)]
fn lock_word(v6: bool, stripe: u32) -> Option<*mut u64> {
    let lock = FLOW_LOCKS.get_ptr_mut(stripe & (STRIPES - 1) | (v6 as u32) << 8)?;
    Some(lock.cast())
}

const _: () = assert!(STRIPES == 1 << 8);

impl Memory for Maps {
    type Bucket = Words;

    #[inline(always)]
    fn bucket(&self, v6: bool, index: u32) -> Option<Words> {
        if v6 {
            FLOWS6.get_ptr_mut(index).map(|words| Words(words.cast()))
        } else {
            FLOWS4.get_ptr_mut(index).map(|words| Words(words.cast()))
        }
    }

    #[inline(always)]
    fn tags(&self, v6: bool, index: u32) -> u64 {
        match tags(v6, index) {
            // SAFETY: a live element that other CPUs write.
            Some(tags) => unsafe { tags.read_volatile() },
            None => 0,
        }
    }

    #[inline(always)]
    fn index_after(&self, index: u32, seen: u64) -> u32 {
        // See `Words::after`; by way of the stack, where the map's key is.
        if cfg!(feature = "tso") {
            return index;
        }
        let mut none = seen;
        // SAFETY: one instruction on a register.
        unsafe { asm!("{none} &= 0", none = inout(reg) none, options(pure, nomem)) };
        index.wrapping_add(none as u32)
    }

    #[inline(always)]
    fn set_tag(&self, v6: bool, index: u32, slot: u32, tag: u32) {
        if let Some(tags) = tags(v6, index) {
            let slot = (slot & (SLOTS - 1)) as usize;
            // SAFETY: one of the four halves of a live element.
            unsafe { tags.cast::<u16>().add(slot).write_volatile(tag as u16) }
        }
    }

    #[inline(always)]
    fn mask(&self, _: bool) -> u32 {
        constant!(FLOW_MASK)
    }

    #[inline(always)]
    fn secret(&self, index: usize) -> u64 {
        constant!(FLOW_SECRETS[index])
    }

    #[inline(always)]
    fn lock(&self, v6: bool, stripe: u32) -> bool {
        let Some(lock) = lock_word(v6, stripe) else {
            return false;
        };
        // Held for some 100 ns. Written out: see `packet::extension_headers`.
        macro_rules! tries {
            ($($try:literal)*) => { $(
                let _ = $try;
                if exchange(lock, 1) == 0 {
                    return true;
                }
            )* };
        }
        tries!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        false
    }

    #[inline(always)]
    fn unlock(&self, v6: bool, stripe: u32) {
        let Some(lock) = lock_word(v6, stripe) else {
            return;
        };
        if cfg!(feature = "tso") {
            // SAFETY: as in `exchange`.
            unsafe { lock.write_volatile(0) };
        } else {
            exchange(lock, 0);
        }
    }

    #[inline(always)]
    fn protected(&self, hash: u32) -> u32 {
        match FLOW_SOURCES.get(hash & (SOURCES as u32 - 1)) {
            // SAFETY: a live element that other CPUs add to.
            Some(count) => unsafe { core::ptr::from_ref(count).read_volatile() },
            None => u32::MAX,
        }
    }

    #[inline(always)]
    fn protect(&self, hash: u32, by: u32) {
        if let Some(count) = FLOW_SOURCES.get_ptr_mut(hash & (SOURCES as u32 - 1)) {
            // SAFETY: one instruction that only writes there.
            unsafe {
                asm!(
                    "lock *(u32 *)({count} + 0) += {by}",
                    count = in(reg) count,
                    by = in(reg) u64::from(by),
                );
            }
        }
    }

    #[inline(always)]
    fn cap(&self) -> u32 {
        constant!(FLOW_CAP)
    }

    #[inline(always)]
    fn best(&self, key: &FlowKey, look: &Look) -> u32 {
        flow_best(key, look)
    }
}

// Global functions, which the verifier goes through once each.

/// See [`table::best`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn flow_best(key: *const FlowKey, look: *const Look) -> u32 {
    // SAFETY: the caller's, or null to the verifier.
    match unsafe { (key.as_ref(), look.as_ref()) } {
        (Some(key), Some(look)) => table::best(&Maps, key, look),
        _ => 0,
    }
}

/// See [`table::room`]. Not called by [`flow_insert`]: their stacks would be too large together.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn flow_room(key: *const FlowKey, now: u64, hz: u32) -> u32 {
    // SAFETY: as in `flow_find`.
    match unsafe { key.as_ref() } {
        Some(key) => u32::from(table::room(&Maps, key, now, hz)),
        None => 0,
    }
}

/// See [`table::find`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn flow_find(key: *const FlowKey, found: *mut Found) -> u32 {
    // SAFETY: the caller's, or null to the verifier.
    match unsafe { (key.as_ref(), found.as_mut()) } {
        (Some(key), Some(found)) => u32::from(table::find(&Maps, key, found)),
        _ => 0,
    }
}

/// See [`table::known`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn flow_known(key: *const FlowKey) -> u32 {
    // SAFETY: as in `flow_find`.
    match unsafe { key.as_ref() } {
        Some(key) => u32::from(table::known(&Maps, key)),
        None => 0,
    }
}

/// See [`table::place_entry`]; [`Taken`] as a number.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn flow_insert(key: *const FlowKey, entry: *const FlowEntry, hz: u32) -> u32 {
    // SAFETY: as in `flow_find`.
    match unsafe { (key.as_ref(), entry.as_ref()) } {
        (Some(key), Some(entry)) => table::place_entry(&Maps, key, entry, hz) as u32,
        _ => 0,
    }
}

/// See [`table::change`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn flow_change(found: *const Found, change: *const Change) -> u32 {
    // SAFETY: as in `flow_find`.
    if let (Some(found), Some(change)) = unsafe { (found.as_ref(), change.as_ref()) } {
        table::change(&Maps, found, change);
    }
    0
}

/// Takes expired entries out of the next bucket of each family.
#[inline(always)]
pub fn sweep(now: u64, hz: u32) {
    let Some(cursor) = FLOW_SWEEP.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: a live element; the daemon runs one sweep at a time, and two would only skip.
    let index = unsafe { cursor.read_volatile() };
    // SAFETY: as above.
    unsafe { cursor.write_volatile(index.wrapping_add(1)) };
    let index = index & constant!(FLOW_MASK);
    table::sweep(&Maps, false, index, now, hz);
    table::sweep(&Maps, true, index, now, hz);
}

/// The table as the judgement uses it.
pub struct Flows {
    pub hz: u32,
}

/// An entry of it.
pub struct Entry(Found);

impl FlowTable for Flows {
    type Slot = Entry;

    #[inline(always)]
    fn find(&self, key: &FlowKey) -> Option<Entry> {
        let mut found = MaybeUninit::<Found>::uninit();
        // SAFETY: `clear` writes all of it and reads nothing. The verifier wants the memory that a
        // global function is given to be written.
        maps::clear(unsafe { &mut *found.as_mut_ptr() });
        let there = flow_find(key, found.as_mut_ptr()) != 0;
        // SAFETY: written above.
        there.then(|| Entry(unsafe { found.assume_init() }))
    }

    #[inline(always)]
    fn insert(&self, key: &FlowKey, entry: &FlowEntry) -> bool {
        let mut taken = flow_insert(key, entry, self.hz);
        if taken == Taken::Full as u32 && flow_room(key, entry.last_seen, self.hz) != 0 {
            taken = flow_insert(key, entry, self.hz);
        }
        taken == Taken::Yes as u32
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentEntry> {
        // Copied to the stack: Linux 6.1 takes no key from a pointer that is a global function's
        // argument, as the workspace is.
        let key = *key;
        // SAFETY: an LRU may hand the element to another packet while it is copied; the worst is a
        // fragment judged by the ports of another allowed packet, of which the receiver has no
        // first fragment.
        unsafe { FRAGMENTS.get(&key) }.copied()
    }

    #[inline(always)]
    fn insert_fragment(&self, key: &FragmentKey, entry: &FragmentEntry) -> bool {
        let (key, entry) = (*key, *entry);
        FRAGMENTS.insert(&key, &entry, u64::from(BPF_ANY)).is_ok()
    }
}

impl FlowSlot for Entry {
    #[inline(always)]
    fn load(&self) -> FlowEntry {
        self.0.entry
    }

    #[inline(always)]
    fn touch(&self, now: u64, bytes: u32) {
        table::renew(&Maps, &self.0, now, bytes);
    }

    #[inline(always)]
    fn change(&self, change: &Change) {
        flow_change(&raw const self.0, change);
    }
}
