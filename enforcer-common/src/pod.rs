//! The only unsafe code of the crate: aya's `Pod`, for the types of `wire`.
#![allow(
    unsafe_code,
    reason = "aya::Pod is an unsafe trait; the orphan rule puts it here"
)]

use crate::{
    shadow::{Difference, DifferenceKey},
    wire::{
        Control, DeniedSlot, Event, FlowEntry, FlowKey, FragmentEntry, FragmentKey, Interface,
        Process,
    },
};

macro_rules! pod {
    ($($type:ty),*) => { $(
        // SAFETY: repr(C), Copy, 'static, no padding (asserted where they are), and every bit pattern
        // is a value: the fields are integers and arrays of integers.
        unsafe impl aya::Pod for $type {}
    )* };
}

pod!(
    FlowKey,
    FlowEntry,
    FragmentKey,
    FragmentEntry,
    Control,
    Interface,
    Process,
    Event,
    DeniedSlot,
    DifferenceKey,
    Difference
);
