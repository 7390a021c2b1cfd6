//! Counts where the shadow, a candidate policy, says something else than the live one; changes no
//! verdict.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    btf_maps::{HashMap, PerCpuArray},
    helpers::generated::bpf_ktime_get_boot_ns,
    macros::btf_map,
};
use enforcer_common::{
    case::Case,
    shadow::{DIFFERENCES, Difference, DifferenceKey, Example},
};

use crate::maps::{self, Zero};

#[btf_map]
static SHADOWED: HashMap<DifferenceKey, Difference, DIFFERENCES> = HashMap::new();
/// What a program is about to add.
#[btf_map]
static DRAFT: PerCpuArray<Difference, 1> = PerCpuArray::new();

impl Zero for Difference {}

/// Counts a packet of a TC hook.
#[inline(always)]
pub fn count(key: &DifferenceKey, case: &Case) {
    if add(key, case) {
        return;
    }
    if let Some(value) = DRAFT.get_ptr_mut(0) {
        // SAFETY: this CPU's own element of a live array map; TC programs do not nest on a CPU.
        first(key, unsafe { &mut *value }, case);
    }
}

/// Counts a call, whose program may be preempted.
#[inline(always)]
pub fn count_call(key: &DifferenceKey, case: &Case) {
    if !add(key, case) {
        let mut value = MaybeUninit::<Difference>::uninit();
        // SAFETY: written whole before anything is read; all zeros is a value of it.
        first(key, unsafe { &mut *value.as_mut_ptr() }, case);
    }
}

/// Adds to a count that is there.
#[inline(always)]
fn add(key: &DifferenceKey, case: &Case) -> bool {
    let Some(there) = SHADOWED.get_ptr_mut(key) else {
        return false;
    };
    // SAFETY: a live element that other CPUs write, too: the count in one instruction, the example
    // so that a reader can tell a mixture.
    unsafe {
        maps::increment(&raw mut (*there).packets);
        (&raw mut (*there).time).write_volatile(bpf_ktime_get_boot_ns());
        write(&raw mut (*there).last, case);
    }
    true
}

/// Makes a count; where there is no room, the packet goes to the rest.
#[inline(always)]
fn first(key: &DifferenceKey, value: &mut Difference, case: &Case) {
    maps::clear(value);
    value.packets = 1;
    // SAFETY: a helper without arguments.
    value.time = unsafe { bpf_ktime_get_boot_ns() };
    // SAFETY: the caller's memory.
    unsafe {
        write(&raw mut value.first, case);
        write(&raw mut value.last, case);
    }
    if SHADOWED.insert(key, value, u64::from(BPF_NOEXIST)).is_ok() || add(key, case) {
        return;
    }
    // The daemon has put it there with the shadow, and nobody takes it out.
    if let Some(rest) = SHADOWED.get_ptr_mut(&DifferenceKey::REST) {
        // SAFETY: as in `add`.
        unsafe { maps::increment(&raw mut (*rest).packets) };
    }
}

/// Writes an example, its check last.
///
/// # Safety
/// `to` points to live memory.
#[inline(always)]
unsafe fn write(to: *mut Example, case: &Case) {
    let words = to.cast::<u32>();
    // SAFETY: the caller's promise; words, volatile, in their order in `Example`.
    unsafe {
        let mut i = 0;
        while i < 4 {
            words.add(i).write_volatile(case.source[i]);
            words.add(4 + i).write_volatile(case.destination[i]);
            i += 1;
        }
        words.add(8).write_volatile(case.ports);
        words.add(9).write_volatile(case.service);
        words.add(10).write_volatile(case.shape);
        words.add(11).write_volatile(case.ifindex);
        words.add(12).write_volatile(case.hash());
    }
}
