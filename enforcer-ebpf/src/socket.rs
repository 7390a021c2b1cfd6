//! The socket hooks: who opens which socket, and an early EPERM for what TC would deny anyway.
//!
//! Not the boundary: raw, ping and UDP-Lite sockets pass them. They refuse only what TC would
//! deny for *every* local source that the socket could take, and only processes of the
//! enforcer's own network namespace; all else is left to TC.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_ANY, bpf_sock_addr},
    helpers::{
        bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
        generated::{
            bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_get_smp_processor_id,
            bpf_get_socket_cookie, bpf_ktime_get_boot_ns,
        },
    },
    programs::SockAddrContext,
};
use enforcer_common::{
    case::Case,
    decide::{Ask, Decision, FAILSAFE_REPLY, Query, answer, generation},
    flow,
    image::{Address, LOCAL_UNKNOWN, MAX_LOCAL, MAX_LOCAL_CLASSES, Words as _, header},
    packet::{Kind, Tuple},
    shadow::{DifferenceKey, Said},
    verdict::{Hook, Outcome, Reason, Record, packet_counter, record_counter},
    wire::{CONTROL_SOCKET_REFUSE, Control, Event, Process},
};

use crate::flows::flow_known;
use crate::maps::{self, EVENTS, Image, KernelTime, SOCKETS};
use crate::shadow;

const TCP: u32 = 6;
const UDP: u32 = 17;

/// Judges a call on an IPv4 socket. `false`: refuse it.
#[inline(always)]
pub fn judge_v4(ctx: &SockAddrContext, hook: Hook) -> bool {
    let c = ctx.sock_addr;
    // SAFETY: loads from the context, which the verifier checks field by field; `sk` is a socket
    // held by the caller.
    let (destination, bound, source_port) = unsafe {
        let sk = (*c).__bindgen_anon_1.sk;
        let from_message = if matches!(hook, Hook::Sendmsg) {
            (*c).msg_src_ip4
        } else {
            0
        };
        let bound = if from_message != 0 {
            from_message
        } else {
            (*sk).src_ip4
        };
        ((*c).user_ip4, bound, (*sk).src_port as u16)
    };
    judge(
        ctx,
        hook,
        false,
        [0, 0, 0, u32::from_be(destination)],
        [0, 0, 0, u32::from_be(bound)],
        source_port,
    )
}

/// Judges a call on an IPv6 socket, v4-mapped destinations as IPv4. `false`: refuse it.
#[inline(always)]
pub fn judge_v6(ctx: &SockAddrContext, hook: Hook) -> bool {
    let c = ctx.sock_addr;
    // SAFETY: as in `judge_v4`.
    let (destination, socket, message, socket4, source_port) = unsafe {
        let sk = (*c).__bindgen_anon_1.sk;
        let message = if matches!(hook, Hook::Sendmsg) {
            words(&raw const (*c).msg_src_ip6)
        } else {
            [0; 4]
        };
        (
            words(&raw const (*c).user_ip6),
            words(&raw const (*sk).src_ip6),
            message,
            (*sk).src_ip4,
            (*sk).src_port as u16,
        )
    };
    let mapped = destination[0] == 0 && destination[1] == 0 && destination[2] == 0xffff;
    let bound = if !mapped {
        if message == [0; 4] { socket } else { message }
    } else if message[2] == 0xffff {
        [0, 0, 0, message[3]]
    } else if socket[2] == 0xffff {
        [0, 0, 0, socket[3]]
    } else {
        [0, 0, 0, u32::from_be(socket4)]
    };
    let destination = if mapped {
        [0, 0, 0, destination[3]]
    } else {
        destination
    };
    judge(ctx, hook, !mapped, destination, bound, source_port)
}

/// Four big-endian words of a context, each with a load of its own as the verifier demands.
///
/// # Safety
/// `at` points into a live context.
#[inline(always)]
unsafe fn words(at: *const [u32; 4]) -> [u32; 4] {
    let at = at.cast::<u32>();
    // SAFETY: the caller's promise; volatile, so that loads are not merged into wider ones.
    unsafe {
        [
            u32::from_be(at.read_volatile()),
            u32::from_be(at.add(1).read_volatile()),
            u32::from_be(at.add(2).read_volatile()),
            u32::from_be(at.add(3).read_volatile()),
        ]
    }
}

#[inline(always)]
fn judge(
    ctx: &SockAddrContext,
    hook: Hook,
    v6: bool,
    destination: [u32; 4],
    bound: [u32; 4],
    source_port: u16,
) -> bool {
    let refused = refuse(ctx, hook, v6, destination, bound, source_port);
    if !refused {
        maps::count_shared(packet_counter(hook, Outcome::Allowed, Reason::Deferred));
    }
    !refused
}

/// Whether the call is refused; then it is counted and recorded.
#[inline(always)]
fn refuse(
    ctx: &SockAddrContext,
    hook: Hook,
    v6: bool,
    destination: [u32; 4],
    bound: [u32; 4],
    source_port: u16,
) -> bool {
    let c: *mut bpf_sock_addr = ctx.sock_addr;
    // SAFETY: the context is the program's own.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    remember(cookie);
    let control = maps::control();
    if control.flags & CONTROL_SOCKET_REFUSE == 0 || other_namespace(ctx, &control) {
        return false;
    }
    // SAFETY: loads from the context.
    let (protocol, port) = unsafe { ((*c).protocol, u16::from_be((*c).user_port as u16)) };
    if protocol != TCP && protocol != UDP {
        return false;
    }
    let Some(image) = maps::live() else {
        return false;
    };
    let mut tuple = Tuple {
        source: bound,
        destination,
        source_port,
        destination_port: port,
        protocol: protocol as u8,
        v6,
        kind: if protocol == TCP {
            Kind::Tcp
        } else {
            Kind::Ports
        },
        tcp_flags: 0,
        selector: port,
    };
    if unjudged(&image, &tuple) || essential(&tuple) {
        return false;
    }
    let mut words = 0;
    if !denied(LIVE, generation(&image), &tuple, &mut words) {
        return false;
    }
    if answers_a_flow(&image, &mut tuple) {
        return false;
    }
    let decision = Decision::unpack(words);
    if maps::shadowed() {
        let shadow = candidate_passes(&tuple);
        if shadow != 0 {
            let live = Said::of(&decision, generation(&image));
            compare(hook, &tuple, &live, shadow);
        }
    }
    maps::count_shared(packet_counter(hook, Outcome::Denied, decision.reason));
    let record = record(hook, &tuple, &decision, generation(&image), cookie);
    maps::count_shared(record_counter(hook, record));
    true
}

#[inline(always)]
fn other_namespace(ctx: &SockAddrContext, control: &Control) -> bool {
    // SAFETY: the context is the program's own.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    cookie != control.netns_cookie
}

/// The process that makes the call.
#[inline(always)]
fn process() -> Process {
    Process {
        // SAFETY: a helper without arguments.
        cgroup: unsafe { bpf_get_current_cgroup_id() },
        pid: (bpf_get_current_pid_tgid() >> 32) as u32,
        uid: bpf_get_current_uid_gid() as u32,
        comm: bpf_get_current_comm().unwrap_or([0; 16]),
    }
}

/// Notes which process uses the socket.
// A subprogram: its part of the 512-byte stack is free again afterwards.
#[inline(never)]
fn remember(cookie: u64) {
    if cookie == 0 {
        return;
    }
    let process = process();
    // SAFETY: only compared; see `events::take_over`.
    let known = unsafe { SOCKETS.get(&cookie) }.is_some_and(|p| p.pid == process.pid);
    if !known {
        // A full table evicts; an attribution is a courtesy.
        let _ = SOCKETS.insert(&cookie, &process, u64::from(BPF_ANY));
    }
}

/// Destinations that TC judges by more than addresses, or not at all: this host, loopback,
/// unspecified (means loopback), link-local (scoped by interface), multicast and broadcast.
#[inline(always)]
fn unjudged(image: &Image, tuple: &Tuple) -> bool {
    let d = tuple.destination;
    if tuple.v6 {
        if d[0] == 0 && d[1] == 0 && d[2] == 0 && d[3] <= 1 {
            return true;
        }
        if d[0] >> 22 == 0xfe80 >> 6 || d[0] >> 24 == 0xff {
            return true;
        }
    } else {
        let top = d[3] >> 24;
        if top == 0 || top == 127 || top >= 224 || d[3] >> 16 == 0xa9fe {
            return true;
        }
    }
    let (_, count) = locals(image, tuple.v6);
    if count == LOCAL_UNKNOWN || count > MAX_LOCAL {
        return true;
    }
    let mut i = 0;
    while i < MAX_LOCAL {
        if i >= count {
            break;
        }
        if local(image, tuple.v6, i) == d {
            return true;
        }
        i += 1;
    }
    false
}

/// The DHCP client's messages: essential to TC whatever the rules say.
#[inline(always)]
fn essential(tuple: &Tuple) -> bool {
    matches!(tuple.kind, Kind::Ports)
        && matches!(
            (tuple.source_port, tuple.destination_port),
            (68, 67) | (546, 547)
        )
}

#[inline(always)]
fn locals(image: &Image, v6: bool) -> (u32, u32) {
    if v6 {
        (image.word(header::LOCAL6), image.word(header::LOCAL6_COUNT))
    } else {
        (image.word(header::LOCAL4), image.word(header::LOCAL4_COUNT))
    }
}

#[inline(always)]
fn local(image: &Image, v6: bool, i: u32) -> [u32; 4] {
    let (base, _) = locals(image, v6);
    if v6 {
        let at = base.wrapping_add(i * 4);
        [
            image.word(at),
            image.word(at.wrapping_add(1)),
            image.word(at.wrapping_add(2)),
            image.word(at.wrapping_add(3)),
        ]
    } else {
        [0, 0, 0, image.word(base.wrapping_add(i))]
    }
}

/// One look into the image about a socket. On the stack: calls can be preempted.
#[repr(C)]
pub struct Turn {
    ask: Ask,
    /// Which image: [`LIVE`] or [`CANDIDATE`].
    image: u32,
    /// Which of the host's address classes the source is; [`BOUND`]: it is in `ask`.
    index: u32,
    /// Generation of the image that is looked into.
    generation: u32,
    /// Verdict words.
    words: u64,
}

/// The one that judges.
const LIVE: u32 = 0;
/// The one that is only asked.
const CANDIDATE: u32 = 1;
/// The socket has an address.
const BOUND: u32 = u32::MAX;
/// TC would deny it.
const DENIED: u32 = 0;
/// There are no more classes.
const END: u32 = 1;
/// TC might let it pass, or another image came in between.
const LEAVE: u32 = 2;

/// Takes a turn. A global function, which the verifier goes through once and not once a turn: in a
/// loop, `connect6` took 618 000 instructions of its million.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn socket_turn(turn: *mut Turn) -> u32 {
    // SAFETY: the caller's, or null to the verifier.
    let Some(turn) = (unsafe { turn.as_mut() }) else {
        return LEAVE;
    };
    let image = if turn.image == LIVE {
        maps::live()
    } else {
        maps::candidate()
    };
    let Some(image) = image else {
        return LEAVE;
    };
    if generation(&image) != turn.generation {
        return LEAVE;
    }
    if turn.index != BOUND {
        let (base, count) = if turn.ask.is_v6() {
            (
                image.word(header::LOCAL6_CLASSES),
                image.word(header::LOCAL6_CLASSES_COUNT),
            )
        } else {
            (
                image.word(header::LOCAL4_CLASSES),
                image.word(header::LOCAL4_CLASSES_COUNT),
            )
        };
        if count > MAX_LOCAL_CLASSES {
            return LEAVE;
        }
        if turn.index >= count {
            return END;
        }
        let class = image.word(base.wrapping_add(turn.index));
        turn.ask.set_source(Address::of_class(class));
    }
    turn.words = answer(&image, &turn.ask, &KernelTime::new(&maps::control()));
    if Outcome::from_bits(turn.words as u32).passes() {
        LEAVE
    } else {
        DENIED
    }
}

/// Whether TC would deny a packet from this socket: from the address it is bound to, or from every
/// local one. `false` when one would pass, or the image names none. `words`: of the last denial.
// A subprogram for its stack, as `remember`.
#[inline(never)]
fn denied(image: u32, generation: u32, tuple: &Tuple, words: &mut u64) -> bool {
    let bound = tuple.source != [0; 4];
    let mut ask = Ask::rules(&Query {
        source: tuple.source_address(),
        destination: tuple.destination_address(),
        protocol: tuple.protocol,
        selector: tuple.selector,
    });
    if matches!(tuple.kind, Kind::Ports) {
        // It may be the reply of a flow that a failsafe lets in, with an entry or without.
        ask.screen = FAILSAFE_REPLY;
        ask.source_port = u32::from(tuple.source_port);
    }
    let mut turn = Turn {
        ask,
        image,
        index: if bound { BOUND } else { 0 },
        generation,
        words: 0,
    };
    if bound {
        let denied = socket_turn(&raw mut turn) == DENIED;
        *words = turn.words;
        return denied;
    }
    let mut any = false;
    let mut i = 0;
    while i <= MAX_LOCAL_CLASSES {
        turn.index = i;
        match socket_turn(&raw mut turn) {
            DENIED => any = true,
            END => return any,
            _ => return false,
        }
        *words = turn.words;
        i += 1;
    }
    false
}

/// The generation of a candidate policy that lets TC decide what the live one denies; 0: there is
/// none, or it denies it, too.
#[inline(always)]
fn candidate_passes(tuple: &Tuple) -> u32 {
    let asked = || maps::candidate().map_or(0, |image| generation(&image));
    let own = asked();
    let mut words = 0;
    // Should another have taken its place meanwhile, nobody knows which one answered.
    if own == 0 || denied(CANDIDATE, own, tuple, &mut words) || asked() != own {
        return 0;
    }
    own
}

/// Counts a call that the candidate would let pass.
// A subprogram for its stack, as `remember`.
#[inline(never)]
fn compare(hook: Hook, tuple: &Tuple, live: &Said, generation: u32) {
    let key = DifferenceKey {
        live: *live,
        shadow: Said::of(&Decision::pass(Reason::Deferred), generation),
        hook: hook as u32,
    };
    let (ethertype, family) = if tuple.v6 { (0x86dd, 6) } else { (0x0800, 4) };
    let case = Case::new(tuple, ethertype, family, hook, 0);
    shadow::count_call(&key, &case);
}

/// Whether a datagram may be the answer to a flow that the other end opened. TC knows whether
/// that entry is current; here it is enough that there is one.
// A subprogram for its stack, as `remember`.
#[inline(never)]
fn answers_a_flow(image: &Image, tuple: &mut Tuple) -> bool {
    if !matches!(tuple.kind, Kind::Ports) {
        return false;
    }
    if tuple.source != [0; 4] {
        return scoped(tuple) || flow_known(&flow::key_of(tuple, 0).0) != 0;
    }
    let (_, count) = locals(image, tuple.v6);
    let mut i = 0;
    while i < MAX_LOCAL {
        if i >= count {
            break;
        }
        tuple.source = local(image, tuple.v6, i);
        if scoped(tuple) || flow_known(&flow::key_of(tuple, 0).0) != 0 {
            // Returned from here: with a flag carried around the loop, Linux 6.1's verifier fails
            // to track back what the flag depends on (EFAULT).
            return true;
        }
        i += 1;
    }
    // What is reported is the socket's source, not the last one tried.
    tuple.source = [0; 4];
    false
}

/// A link-local IPv4 source (node-local DNS has one): its flows are keyed by an interface that is
/// not known here. An IPv6 one only ever answers a link-local peer, which is left to TC anyway.
#[inline(always)]
fn scoped(tuple: &Tuple) -> bool {
    !tuple.v6 && tuple.source[3] >> 16 == 0xa9fe
}

// A subprogram for its stack, as `remember`.
#[inline(never)]
fn record(hook: Hook, tuple: &Tuple, decision: &Decision, generation: u32, cookie: u64) -> Record {
    let Some(mut entry) = EVENTS.reserve(0) else {
        return Record::Lost;
    };
    entry.write(Event {
        // SAFETY: a helper without arguments.
        time: unsafe { bpf_ktime_get_boot_ns() },
        total: 1,
        cookie,
        process: process(),
        source: tuple.source,
        destination: tuple.destination,
        rule: decision.rule,
        segment: decision.segment,
        generation,
        ifindex: 0,
        slot: u32::MAX,
        // SAFETY: a helper without arguments.
        cpu: unsafe { bpf_get_smp_processor_id() },
        epoch: 0,
        source_port: tuple.source_port,
        destination_port: tuple.destination_port,
        selector: tuple.selector,
        ethertype: 0,
        protocol: tuple.protocol,
        family: if tuple.v6 { 6 } else { 4 },
        hook: hook as u8,
        outcome: decision.outcome as u8,
        reason: decision.reason as u8,
        tcp_flags: 0,
        lasting: 0,
        reserved: [0; 5],
    });
    entry.submit(0);
    Record::Emitted
}
