//! Records of denied packets: the first at once, repeats as counts, everything counted.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{
        bpf_get_smp_processor_id, bpf_get_socket_cookie, bpf_ktime_get_boot_ns, bpf_skb_cgroup_id,
    },
    programs::TcContext,
};
use enforcer_common::{
    flow::Clock,
    packet::Packet,
    verdict::{Hook, Outcome, Record, packet_counter, record_counter},
    wire::{DENIED_SLOTS, DeniedSlot, Process},
};

use crate::maps::{self, DENIED, EVENTS, SOCKETS, Work};

/// Counts a judged packet and, if it was denied or would have been, records it.
#[inline(always)]
pub fn account(ctx: &TcContext, work: &Work) {
    let Work {
        hook,
        decision,
        packet,
        scene,
        ..
    } = work;
    let clock = &scene.clock;
    maps::count(packet_counter(*hook, decision.outcome, decision.reason), 1);
    match decision.outcome {
        Outcome::Denied | Outcome::WouldDeny => {}
        Outcome::Allowed | Outcome::Off => return,
    }
    let index = hash(packet, work) & (DENIED_SLOTS - 1);
    let Some(slot) = DENIED.get_ptr_mut(index) else {
        return;
    };
    // SAFETY: this CPU's own element of a live array map. TC programs do not nest on a CPU: both
    // hooks run with bottom halves disabled.
    let slot = unsafe { &mut *slot };
    let record = if same(slot, packet, work) {
        slot.event.total += 1;
        slot.pending = slot.pending.wrapping_add(1);
        if clock.now.wrapping_sub(slot.emitted_at) < u64::from(clock.hz) {
            Record::Suppressed
        } else {
            emit(slot, clock)
        }
    } else {
        if slot.pending != 0 && !output(slot) {
            let suppressed = slot.pending.wrapping_sub(slot.pending_lost);
            // Of the hook that counted them.
            let displaced = Hook::from_bits(slot.event.hook).unwrap_or(*hook);
            maps::count(
                record_counter(displaced, Record::Displaced),
                u64::from(suppressed),
            );
        }
        take_over(ctx, slot, index, packet, work);
        emit(slot, clock)
    };
    maps::count(record_counter(*hook, record), 1);
}

/// Writes the slot's record for the packet at hand. A full ring leaves the packet pending: the
/// next record's total includes it.
#[inline(always)]
fn emit(slot: &mut DeniedSlot, clock: &Clock) -> Record {
    if output(slot) {
        slot.pending = 0;
        slot.pending_lost = 0;
        slot.emitted_at = clock.now;
        Record::Emitted
    } else {
        slot.pending_lost = slot.pending_lost.wrapping_add(1);
        Record::Lost
    }
}

#[inline(always)]
fn output(slot: &mut DeniedSlot) -> bool {
    // SAFETY: a helper without arguments.
    slot.event.time = unsafe { bpf_ktime_get_boot_ns() };
    EVENTS.output(&slot.event, 0).is_ok()
}

/// Starts a new epoch of the slot for another flow.
#[inline(always)]
fn take_over(ctx: &TcContext, slot: &mut DeniedSlot, index: u32, packet: &Packet, work: &Work) {
    let Work {
        hook,
        decision,
        plan,
        ..
    } = work;
    let generation = &plan.generation;
    let epoch = slot.epoch.wrapping_add(1);
    slot.epoch = epoch;
    slot.pending = 1;
    slot.pending_lost = 0;
    slot.emitted_at = 0;
    let tuple = &packet.tuple;
    let event = &mut slot.event;
    event.total = 1;
    event.source = tuple.source;
    event.destination = tuple.destination;
    event.rule = decision.rule;
    event.segment = decision.segment;
    event.generation = *generation;
    event.ifindex = packet.ifindex;
    event.slot = index;
    // SAFETY: a helper without arguments.
    event.cpu = unsafe { bpf_get_smp_processor_id() };
    event.epoch = epoch;
    event.source_port = tuple.source_port;
    event.destination_port = tuple.destination_port;
    event.selector = tuple.selector;
    event.ethertype = packet.ethertype;
    event.protocol = tuple.protocol;
    event.family = family(packet);
    event.hook = *hook as u8;
    event.outcome = decision.outcome as u8;
    event.reason = decision.reason as u8;
    event.tcp_flags = tuple.tcp_flags;
    event.reserved = [0; 6];
    // SAFETY: the context is the program's own; 0 when the packet has no local socket.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    event.cookie = cookie;
    event.process = Process {
        cgroup: 0,
        pid: 0,
        uid: 0,
        comm: [0; 16],
    };
    if cookie != 0 {
        // SAFETY: values are written once per socket by the socket hooks; a torn read could only
        // mix two writers of one socket.
        if let Some(process) = unsafe { SOCKETS.get(&cookie) } {
            event.process = *process;
        } else if matches!(hook, Hook::TcEgress) {
            // SAFETY: the context is the program's own.
            event.process.cgroup = unsafe { bpf_skb_cgroup_id(ctx.skb.skb) };
        }
    }
    slot.epoch_end = epoch;
}

#[inline(always)]
fn family(packet: &Packet) -> u8 {
    match (packet.addresses, packet.tuple.v6) {
        (false, _) => 0,
        (true, false) => 4,
        (true, true) => 6,
    }
}

/// The source port that tells repeats of one flow from another. TCP and UDP clients take a new
/// one for each attempt, and each attempt is worth a record of its own.
#[inline(always)]
fn same(slot: &DeniedSlot, packet: &Packet, work: &Work) -> bool {
    let Work {
        hook,
        decision,
        plan,
        ..
    } = work;
    let generation = &plan.generation;
    let event = &slot.event;
    let tuple = &packet.tuple;
    slot.epoch_end != 0
        && event.source == tuple.source
        && event.destination == tuple.destination
        && event.source_port == tuple.source_port
        && event.destination_port == tuple.destination_port
        && event.protocol == tuple.protocol
        && event.selector == tuple.selector
        && event.ethertype == packet.ethertype
        && event.family == family(packet)
        && event.hook == *hook as u8
        && event.outcome == decision.outcome as u8
        && event.reason == decision.reason as u8
        && event.rule == decision.rule
        && event.generation == *generation
        && event.ifindex == packet.ifindex
}

/// Any spread will do: a collision costs a record more, not a count.
/// Hook and interface take part: a forwarded packet that is only observed comes by twice.
#[inline(always)]
fn hash(packet: &Packet, work: &Work) -> u32 {
    let Work { hook, decision, .. } = work;
    let t = &packet.tuple;
    let mut h = t.source[3] ^ t.source[2].rotate_left(7) ^ t.source[1].rotate_left(13);
    h = h.wrapping_mul(0x9e37_79b1) ^ t.destination[3] ^ t.destination[2].rotate_left(9);
    h = h.wrapping_mul(0x85eb_ca77) ^ (u32::from(t.source_port) << 16 | u32::from(t.selector));
    h = h.wrapping_mul(0xc2b2_ae3d)
        ^ (u32::from(t.protocol) << 16 | u32::from(decision.reason as u8) << 8 | t.kind as u32);
    h = h.wrapping_mul(0x27d4_eb2f) ^ (packet.ifindex << 2 | *hook as u32);
    h ^ (h >> 15)
}
