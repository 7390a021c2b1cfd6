//! Records of denied packets: the first at once, repeats as counts, everything counted.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::generated::{bpf_get_smp_processor_id, bpf_get_socket_cookie, bpf_skb_cgroup_id},
    programs::TcContext,
};
use enforcer_common::{
    case::Case,
    verdict::{Hook, Outcome, Reason, Record, denied_counter, packet_counter, record_counter},
    wire::{DENIED_SLOTS, DeniedSlot},
};

use crate::maps::{self, DENIED, EVENTS, SOCKETS, Work};

/// Counts a judged packet and, if it was denied or would have been, records it.
#[inline(always)]
pub fn account(ctx: &TcContext, work: &Work) {
    let Work {
        hook,
        decision,
        plan,
        ..
    } = work;
    maps::count(packet_counter(*hook, decision.outcome, decision.reason), 1);
    match decision.outcome {
        Outcome::Denied | Outcome::WouldDeny => {}
        Outcome::Allowed | Outcome::Off => return,
    }
    let mut case = case(work);
    let rules = matches!(decision.reason, Reason::DefaultDeny | Reason::RuleDeny);
    let lasting = rules && matches!(decision.outcome, Outcome::Denied) && plan.lasts();
    case.decided(decision, plan.generation, lasting);
    crate::record(ctx.skb.skb, &raw const case);
}

/// The packet at hand, before anybody has judged it.
#[inline(always)]
pub fn case(work: &Work) -> Case {
    let packet = &work.packet;
    let family = match (packet.addresses, packet.tuple.v6) {
        (false, _) => 0,
        (true, false) => 4,
        (true, true) => 6,
    };
    let now = work.scene.clock.now;
    let mut case = Case::new(&packet.tuple, packet.ethertype, family, work.hook, now);
    case.ifindex = packet.ifindex;
    case
}

/// Records a denied packet, or one that would have been; it is counted already.
#[inline(always)]
pub fn record(ctx: &TcContext, case: &Case) {
    let hook = crate::tc_hook(case.hook);
    let hash = case.hash();
    let index = hash & (DENIED_SLOTS - 1);
    let Some(slot) = DENIED.get_ptr_mut(index) else {
        return;
    };
    // SAFETY: this CPU's own element of a live array map. TC programs do not nest on a CPU: both
    // hooks run with bottom halves disabled.
    let slot = unsafe { &mut *slot };
    let judged = slot.event.outcome == case.outcome() as u8
        && slot.event.reason == case.reason() as u8
        && slot.event.rule == case.rule;
    // Also of a slot that is in use: programs of another build may have counted it.
    if let Some(tag) = maps::denied_tag(index) {
        *tag = hash;
    }
    let record = if judged && case.is_in(slot) {
        slot.event.total += 1;
        slot.pending = slot.pending.wrapping_add(1);
        if case.now.wrapping_sub(slot.emitted_at) < u64::from(maps::hz()) {
            Record::Suppressed
        } else {
            emit(slot, case.now)
        }
    } else {
        if slot.pending != 0 && !output(slot, case.now) {
            let suppressed = slot.pending.wrapping_sub(slot.pending_lost);
            // Of the hook that counted them.
            let displaced = Hook::from_bits(slot.event.hook).unwrap_or(hook);
            maps::count(
                record_counter(displaced, Record::Displaced),
                u64::from(suppressed),
            );
        }
        take_over(ctx, slot, index, case);
        emit(slot, case.now)
    };
    maps::count(record_counter(hook, record), 1);
}

/// Writes the slot's record for the packet at hand. A full ring leaves the packet pending: the
/// next record's total includes it.
#[inline(always)]
fn emit(slot: &mut DeniedSlot, now: u64) -> Record {
    if output(slot, now) {
        slot.pending = 0;
        slot.pending_lost = 0;
        slot.emitted_at = now;
        Record::Emitted
    } else {
        slot.pending_lost = slot.pending_lost.wrapping_add(1);
        Record::Lost
    }
}

/// Writes a record. The first one of a tick wakes the daemon; it comes for the others by itself,
/// see `enforcer::events::reader`. To be woken for each costs more than all the rest of a denial.
#[inline(always)]
fn output(slot: &mut DeniedSlot, now: u64) -> bool {
    slot.event.time = maps::boot_time(now);
    let wake = if maps::wakes(now as u32) {
        BPF_RB_FORCE_WAKEUP
    } else {
        BPF_RB_NO_WAKEUP
    };
    EVENTS.output(&slot.event, u64::from(wake)).is_ok()
}

/// A copy word by word: as a whole, the compiler calls a function that does it byte by byte.
#[inline(always)]
fn words(from: &[u32; 4]) -> [u32; 4] {
    // SAFETY: aligned words of a live array; volatile, so that they stay apart.
    let word = |at: usize| unsafe { from.as_ptr().add(at).read_volatile() };
    [word(0), word(1), word(2), word(3)]
}

/// Starts a new epoch of the slot for another flow.
#[inline(always)]
fn take_over(ctx: &TcContext, slot: &mut DeniedSlot, index: u32, case: &Case) {
    let epoch = slot.epoch.wrapping_add(1);
    slot.epoch = epoch;
    slot.pending = 1;
    slot.pending_lost = 0;
    slot.emitted_at = 0;
    let event = &mut slot.event;
    event.total = 1;
    event.source = words(&case.source);
    event.destination = words(&case.destination);
    event.rule = case.rule;
    event.segment = case.segment;
    event.generation = case.generation;
    event.ifindex = case.ifindex;
    event.slot = index;
    // SAFETY: a helper without arguments.
    event.cpu = unsafe { bpf_get_smp_processor_id() };
    event.epoch = epoch;
    event.source_port = case.source_port();
    event.destination_port = case.destination_port();
    event.selector = case.selector();
    event.ethertype = case.ethertype();
    event.protocol = case.protocol();
    event.family = case.family();
    event.hook = case.hook as u8;
    event.outcome = case.outcome() as u8;
    event.reason = case.reason() as u8;
    event.tcp_flags = case.tcp_flags();
    event.lasting = u8::from(case.lasts());
    // SAFETY: a load from the context, and a call with it, which is the program's own.
    let cookie = unsafe {
        if (*ctx.skb.skb).__bindgen_anon_2.sk.is_null() {
            0
        } else {
            bpf_get_socket_cookie(ctx.as_ptr())
        }
    };
    event.cookie = cookie;
    maps::clear(&mut event.process);
    if cookie != 0 {
        // SAFETY: values are written once per socket by the socket hooks; a torn read could only
        // mix two writers of one socket.
        if let Some(process) = unsafe { SOCKETS.get(&cookie) } {
            maps::copy(&mut event.process, process);
        } else if case.hook == Hook::TcEgress as u32 {
            // SAFETY: the context is the program's own.
            event.process.cgroup = unsafe { bpf_skb_cgroup_id(ctx.skb.skb) };
        }
    }
    slot.epoch_end = epoch;
}

/// Counts a packet like one that was judged within the last second, and has no flow since: denied
/// again. `false`: it must be judged.
#[inline(always)]
pub fn denied_again(case: &Case, hook: Hook) -> bool {
    let hash = case.hash();
    let index = hash & (DENIED_SLOTS - 1);
    if maps::denied_tag(index).copied() != Some(hash) {
        return false;
    }
    let Some(slot) = DENIED.get_ptr_mut(index) else {
        return false;
    };
    // SAFETY: as in `record`.
    let slot = unsafe { &mut *slot };
    let late = case.now.wrapping_sub(slot.emitted_at) >= u64::from(maps::hz());
    if slot.event.lasting == 0
        || late
        || slot.event.tcp_flags != case.tcp_flags()
        || !case.is_in(slot)
    {
        return false;
    }
    slot.event.total += 1;
    slot.pending = slot.pending.wrapping_add(1);
    maps::count(denied_counter(hook, slot.event.reason), 1);
    maps::count(record_counter(hook, Record::Suppressed), 1);
    true
}
