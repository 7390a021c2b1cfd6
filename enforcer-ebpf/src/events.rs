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
    packet::{Packet, Tuple, tcp},
    swift::Moment,
    verdict::{Hook, Outcome, Reason, Record, packet_counter, record_counter},
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
    let subject = Subject {
        tuple: &packet.tuple,
        ethertype: packet.ethertype,
        family: family(packet),
        ifindex: packet.ifindex,
        hook: *hook,
        generation: work.plan.generation,
    };
    let index = hash(&subject) & (DENIED_SLOTS - 1);
    let Some(slot) = DENIED.get_ptr_mut(index) else {
        return;
    };
    // SAFETY: this CPU's own element of a live array map. TC programs do not nest on a CPU: both
    // hooks run with bottom halves disabled.
    let slot = unsafe { &mut *slot };
    let judged = slot.event.outcome == decision.outcome as u8
        && slot.event.reason == decision.reason as u8
        && slot.event.rule == decision.rule;
    let record = if judged && same(slot, &subject) {
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
    event.lasting = u8::from(lasting(work));
    event.reserved = [0; 5];
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

/// What tells the packets of one slot from others.
struct Subject<'a> {
    tuple: &'a Tuple,
    ethertype: u16,
    family: u8,
    ifindex: u32,
    hook: Hook,
    generation: u32,
}

/// Whether the slot's packets are like this one but for the verdict. The source port takes part:
/// TCP and UDP clients take a new one for each attempt, and each attempt is worth a record of its
/// own.
#[inline(always)]
fn same(slot: &DeniedSlot, subject: &Subject<'_>) -> bool {
    let event = &slot.event;
    let tuple = subject.tuple;
    slot.epoch_end != 0
        && event.source == tuple.source
        && event.destination == tuple.destination
        && event.source_port == tuple.source_port
        && event.destination_port == tuple.destination_port
        && event.protocol == tuple.protocol
        && event.selector == tuple.selector
        && event.ethertype == subject.ethertype
        && event.family == subject.family
        && event.hook == subject.hook as u8
        && event.generation == subject.generation
        && event.ifindex == subject.ifindex
}

/// Any spread will do: a collision costs a record more, not a count.
/// Hook and interface take part: a forwarded packet that is only observed comes by twice. TCP flags
/// because the reason follows from them.
#[inline(always)]
fn hash(subject: &Subject<'_>) -> u32 {
    let t = subject.tuple;
    let flags = t.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN);
    let mut h = t.source[3] ^ t.source[2].rotate_left(7) ^ t.source[1].rotate_left(13);
    h = h.wrapping_mul(0x9e37_79b1) ^ t.destination[3] ^ t.destination[2].rotate_left(9);
    h = h.wrapping_mul(0x85eb_ca77) ^ (u32::from(t.source_port) << 16 | u32::from(t.selector));
    h = h.wrapping_mul(0xc2b2_ae3d)
        ^ (u32::from(t.protocol) << 16 | u32::from(flags) << 8 | t.kind as u32);
    h = h.wrapping_mul(0x27d4_eb2f) ^ (subject.ifindex << 2 | subject.hook as u32);
    h ^ (h >> 15)
}

/// Whether the image alone denied the packet, whatever the time: then it denies the next one like
/// it as long as it is live and no flow of it has come to be. Denials of form are left out; they
/// may be about what the short way does not look at.
#[inline(always)]
fn lasting(work: &Work) -> bool {
    let rules = matches!(work.decision.reason, Reason::DefaultDeny | Reason::RuleDeny);
    rules && matches!(work.decision.outcome, Outcome::Denied) && work.plan.lasts()
}

/// Counts a packet like one that was judged within the last second, and has no flow since: denied
/// again. `false`: it must be judged.
#[inline(always)]
pub fn denied_again(tuple: &Tuple, hook: Hook, moment: &Moment) -> bool {
    let subject = Subject {
        tuple,
        ethertype: if tuple.v6 { 0x86dd } else { 0x0800 },
        family: if tuple.v6 { 6 } else { 4 },
        ifindex: moment.ifindex,
        hook,
        generation: moment.generation,
    };
    let Some(slot) = DENIED.get_ptr_mut(hash(&subject) & (DENIED_SLOTS - 1)) else {
        return false;
    };
    // SAFETY: as in `account`.
    let slot = unsafe { &mut *slot };
    let late = moment.clock.now.wrapping_sub(slot.emitted_at) >= u64::from(moment.clock.hz);
    if slot.event.lasting == 0
        || late
        || slot.event.tcp_flags != tuple.tcp_flags
        || !same(slot, &subject)
    {
        return false;
    }
    slot.event.total += 1;
    slot.pending = slot.pending.wrapping_add(1);
    let reason = Reason::from_bits(u32::from(slot.event.reason));
    maps::count(packet_counter(hook, Outcome::Denied, reason), 1);
    maps::count(record_counter(hook, Record::Suppressed), 1);
    true
}
