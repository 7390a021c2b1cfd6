//! The kernel programs: entry points, and the one place where a verdict becomes an action.
//!
//! Parsing, flow rules and decisions are in `enforcer-common`; maps, packet reads, records and
//! socket hooks in the modules here. No policy in this file.
#![no_std]
#![no_main]
#![allow(
    clippy::not_unsafe_ptr_arg_deref,
    reason = "a global function's arguments are raw pointers in its BTF; only the programs here call it"
)]
#![feature(asm_experimental_arch)] // one atomic addition, see `maps::count_shared`

mod ctx;
mod events;
mod flows;
mod maps;
mod shadow;
mod socket;

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::{cgroup_sock_addr, classifier},
    programs::{SockAddrContext, TcContext},
};
use aya_log_ebpf::info;
use enforcer_common::{
    case::Case,
    decide::{Decision, generation},
    flow::Clock,
    judge, opening, packet,
    shadow::{DifferenceKey, Said, differ},
    swift::{self, Known, Moment, Window as _},
    table::{self, Taken},
    verdict::{Hook, Outcome, Reason, Record, packet_counter, record_counter},
    wire::{CONTROL_DEBUG, step},
};
use flows::Flows;
use maps::{KernelTime, Work, now};

/// Packets coming into the host.
#[classifier]
pub fn tc_ingress(ctx: TcContext) -> i32 {
    short(&ctx, Hook::TcIngress)
}

/// Packets going out of the host.
#[classifier]
pub fn tc_egress(ctx: TcContext) -> i32 {
    short(&ctx, Hook::TcEgress)
}

/// Goes on where `tc_ingress` found no entry for a plain packet.
#[classifier]
pub fn new_ingress(ctx: TcContext) -> i32 {
    open(&ctx, Hook::TcIngress)
}

/// The same for `tc_egress`.
#[classifier]
pub fn new_egress(ctx: TcContext) -> i32 {
    open(&ctx, Hook::TcEgress)
}

/// Goes on where `tc_ingress` settles nothing.
#[classifier]
pub fn long_ingress(ctx: TcContext) -> i32 {
    long(&ctx, Hook::TcIngress)
}

/// The same for `tc_egress`.
#[classifier]
pub fn long_egress(ctx: TcContext) -> i32 {
    long(&ctx, Hook::TcEgress)
}

/// Writes jiffies into the frame, for the daemon to set deadlines.
/// Never attached.
#[classifier]
pub fn clock(ctx: TcContext) -> i32 {
    match ctx.store(0, &now(), 0) {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

/// Takes expired flows out of one bucket of each family, another one each time. Never attached.
#[classifier]
pub fn sweep(_ctx: TcContext) -> i32 {
    flows::sweep(now(), maps::hz());
    0
}

/// Drops everything: stands in where the program of a hook has to be taken off and put elsewhere.
#[classifier]
pub fn shut(_ctx: TcContext) -> i32 {
    TC_ACT_SHOT
}

/// Asks the live image about a plain packet that may open a flow, at ingress: looks no flow up,
/// enters none, counts and records nothing. Passes what the rules allow; [`LONG`] where they do not
/// settle it. Never attached.
#[classifier]
pub fn verdict(ctx: TcContext) -> i32 {
    let mut case = Case::EMPTY;
    if !read(ctx.skb.skb, Hook::TcIngress as u32, &mut case) || !policy(&mut case) {
        return LONG.cast_signed();
    }
    if case.outcome().passes() {
        TC_ACT_UNSPEC
    } else {
        TC_ACT_SHOT
    }
}

/// `connect(2)` on IPv4 sockets.
#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    permit(socket::judge_v4(&ctx, Hook::Connect))
}

/// `connect(2)` on IPv6 sockets, v4-mapped destinations included.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    permit(socket::judge_v6(&ctx, Hook::Connect))
}

/// `sendmsg(2)` with an address on IPv4 datagram sockets.
#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    permit(socket::judge_v4(&ctx, Hook::Sendmsg))
}

/// `sendmsg(2)` with an address on IPv6 datagram sockets, v4-mapped destinations included.
#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    permit(socket::judge_v6(&ctx, Hook::Sendmsg))
}

/// "Next", not "ok": other programs on the hook still run.
#[inline(always)]
fn action(decision: &Decision) -> i32 {
    if decision.outcome.passes() {
        TC_ACT_UNSPEC
    } else {
        TC_ACT_SHOT
    }
}

/// 1 lets the call go on, 0 is EPERM.
#[inline(always)]
fn permit(allowed: bool) -> i32 {
    i32::from(allowed)
}

/// The long way.
#[inline(always)]
fn long(ctx: &TcContext, hook: Hook) -> i32 {
    // An array map of one element: the look-up cannot fail.
    let Some(work) = maps::work() else {
        return TC_ACT_SHOT;
    };
    work.hook = hook;
    let skb = ctx.skb.skb;
    let shadowed = maps::shadowed();
    work.shadow.generation = 0;
    if look(skb, work) != 0 {
        work.plan.generation = 0;
        work.decision = Decision::pass(Reason::VlanDevice);
    } else {
        work.form = parse(skb, work);
        plan(work);
        if work.plan.asks() {
            // Not of a flow of which the judgement stands: that was asked when it was opened, or it is
            // older than the candidate.
            if shadowed && !work.plan.settled() {
                rehearse(work);
            }
            consult(work);
        }
        if conclude(work) != 0 {
            maps::count(record_counter(hook, Record::FlowInsertFailed), 1);
            if maps::control().flags & CONTROL_DEBUG != 0 {
                let ifindex = work.packet.ifindex;
                info!(ctx, "flow table took no entry on ifindex {}", ifindex);
            }
        }
    }
    account(skb, work);
    if shadowed {
        compare(work);
    }
    action(&work.decision)
}

/// No action's number: the long way.
const LONG: u32 = 0xffff;
/// Nor this: no entry speaks for the packet.
const UNKNOWN: u32 = 0xfffe;

/// The short way, see `enforcer_common::swift`: the action for a packet of an established flow or one
/// like one that was denied a moment ago. The others go on in programs of their own: these have the
/// whole stack, and what they are called with costs a jump. A function's return costs 7 ns where the
/// kernel guards the processor's predictor of returns, a third of this way.
#[inline(always)]
fn short(ctx: &TcContext, hook: Hook) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: a load from the context.
    let known = match u16::from_be(unsafe { (*skb).protocol } as u16) {
        0x0800 => known(skb, hook, false),
        0x86dd => known(skb, hook, true),
        _ => LONG,
    };
    let step = match (known, hook) {
        (UNKNOWN, Hook::TcIngress) => step::NEW_INGRESS,
        (UNKNOWN, _) => step::NEW_EGRESS,
        (LONG, _) => return go_long(ctx, hook),
        _ => return known.cast_signed(),
    };
    go_on(ctx, hook, step)
}

#[inline(always)]
fn go_long(ctx: &TcContext, hook: Hook) -> i32 {
    let step = match hook {
        Hook::TcIngress => step::LONG_INGRESS,
        _ => step::LONG_EGRESS,
    };
    go_on(ctx, hook, step)
}

#[inline(always)]
fn go_on(ctx: &TcContext, hook: Hook, step: u32) -> i32 {
    maps::go_on(ctx, step);
    // The kernel empties the table of programs when its last pin and descriptor are gone.
    maps::count(packet_counter(hook, Outcome::Denied, Reason::NoPolicy), 1);
    maps::count(record_counter(hook, Record::Lost), 1);
    TC_ACT_SHOT
}

/// The middle way, and the long one where that settles nothing.
#[inline(always)]
fn open(ctx: &TcContext, hook: Hook) -> i32 {
    let known = unknown(ctx.skb.skb, hook as u32);
    if known == LONG {
        return go_long(ctx, hook);
    }
    known.cast_signed()
}

/// Which of the two TC hooks.
#[inline(always)]
pub fn tc_hook(hook: u32) -> Hook {
    if hook == Hook::TcIngress as u32 {
        Hook::TcIngress
    } else {
        Hook::TcEgress
    }
}

/// The front of a frame and the moment it is judged at, if it may go the short way.
#[inline(always)]
fn front(skb: *mut __sk_buff, hook: Hook) -> Option<(ctx::Front, Moment)> {
    let ingress = matches!(hook, Hook::TcIngress);
    // SAFETY: a load from the context.
    let ifindex = unsafe { (*skb).ifindex };
    let slot = maps::ethernet(ifindex)?;
    let front = ctx::Front::of(&TcContext::new(skb))?;
    let now = now();
    let moment = Moment {
        ingress,
        ifindex,
        slot,
        generation: maps::live_generation(now),
        clock: Clock {
            now,
            hz: maps::hz(),
        },
    };
    Some((front, moment))
}

#[inline(always)]
fn known(skb: *mut __sk_buff, hook: Hook, v6: bool) -> u32 {
    let Some((front, moment)) = front(skb, hook) else {
        return LONG;
    };
    let packet = if v6 {
        swift::read6(&front)
    } else {
        swift::read4(&front)
    };
    let Some(packet) = packet else {
        return LONG;
    };
    match swift::look(&table::Flows(flows::Maps), &packet, &moment, front.length()) {
        Known::Established => {
            maps::count(
                packet_counter(hook, Outcome::Allowed, Reason::Established),
                1,
            );
            TC_ACT_UNSPEC as u32
        }
        Known::Nothing if maps::shadowed() => LONG,
        Known::Nothing if events::denied_again(&opening::case(&packet, &moment), hook) => {
            TC_ACT_SHOT as u32
        }
        Known::Nothing => UNKNOWN,
        Known::Entry => LONG,
    }
}

/// The way of a plain packet without a flow.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn unknown(skb: *mut __sk_buff, hook: u32) -> u32 {
    let Some(maps::Opening { case, key, entry }) = maps::opening() else {
        return LONG;
    };
    if !read(skb, hook, case) || !policy(case) {
        return LONG;
    }
    let (outcome, reason) = (case.outcome(), case.reason());
    if outcome.passes() {
        (*key, *entry) = opening::flow(case);
        // The long way may make room.
        if table::place_entry(&flows::Maps, key, entry, maps::hz()) != Taken::Yes {
            return LONG;
        }
    }
    maps::count(packet_counter(tc_hook(hook), outcome, reason), 1);
    if outcome.passes() {
        return TC_ACT_UNSPEC as u32;
    }
    record(skb, case);
    TC_ACT_SHOT as u32
}

/// Reads a plain packet. `false`: it is none.
#[inline(always)]
fn read(skb: *mut __sk_buff, hook: u32, case: &mut Case) -> bool {
    let Some((front, moment)) = front(skb, tc_hook(hook)) else {
        return false;
    };
    let Some(packet) = swift::read(&front) else {
        return false;
    };
    *case = opening::case(&packet, &moment);
    true
}

/// Asks the live image about a packet without a flow. `false`: the long way.
#[inline(always)]
fn policy(case: &mut Case) -> bool {
    let Some(image) = maps::live() else {
        return false;
    };
    let time = KernelTime::new(&maps::control());
    opening::settle(&image, &time, case)
}

/// See `events::record`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn record(skb: *mut __sk_buff, case: *const Case) -> u32 {
    // SAFETY: as in `read`.
    if let Some(case) = unsafe { case.as_ref() } {
        events::record(&TcContext::new(skb), case);
    }
    0
}

// The steps of a judgement. Global functions: the verifier goes through each once, on its own, and
// knows nothing of what is in `work` when it starts. All in one, the program took more than the
// million instructions that it follows.

/// Notes where and when the packet is. Whether it is judged on its VLAN device instead.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn look(skb: *mut __sk_buff, work: *mut Work) -> u32 {
    // SAFETY: the caller's workspace, or null to the verifier.
    let Some(work) = (unsafe { work.as_mut() }) else {
        return 0;
    };
    let control = maps::control();
    let ingress = matches!(work.hook, Hook::TcIngress);
    let elsewhere = ctx::link(&TcContext::new(skb), ingress, &mut work.scene.link);
    work.packet.ifindex = work.scene.link.ifindex;
    work.scene.clock = Clock {
        now: now(),
        hz: control.hz,
    };
    work.scene.time = KernelTime::new(&control);
    u32::from(elsewhere)
}

/// Reads the packet; the reason of form why it cannot be, else [`SOUND`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn parse(skb: *mut __sk_buff, work: *mut Work) -> u32 {
    // SAFETY: as in `look`.
    let Some(work) = (unsafe { work.as_mut() }) else {
        return Reason::Malformed as u32;
    };
    if !work.scene.link.ethernet && ctx::misplaced(&TcContext::new(skb)) {
        return Reason::Malformed as u32;
    }
    let bytes = ctx::Skb(TcContext::new(skb));
    match packet::parse(&bytes, &work.scene.link, &mut work.packet) {
        Ok(()) => SOUND,
        Err(reason) => reason as u32,
    }
}

/// No reason's number.
const SOUND: u32 = u32::MAX;

/// Looks the flow up and plans what to ask the policy.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn plan(work: *mut Work) -> u32 {
    // SAFETY: as in `look`.
    let Some(work) = (unsafe { work.as_mut() }) else {
        return 0;
    };
    // 0 is no generation: without an image no entry is current.
    let generation = match maps::live() {
        Some(image) => generation(&image),
        None => 0,
    };
    let Work {
        packet,
        scene,
        plan,
        form,
        ..
    } = work;
    if *form == SOUND {
        let flows = Flows { hz: scene.clock.hz };
        judge::plan(generation, &flows, packet, scene, plan);
    } else {
        judge::plan_form(packet, &scene.link, Reason::from_bits(*form), plan);
    }
    0
}

/// Asks the policy.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn consult(work: *mut Work) -> u32 {
    // SAFETY: as in `look`.
    let Some(work) = (unsafe { work.as_mut() }) else {
        return 0;
    };
    match maps::live() {
        Some(image) => judge::consult(&image, &work.scene.time, &mut work.plan),
        None => work.plan.without_policy(),
    }
    0
}

/// Asks the candidate policy.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn rehearse(work: *mut Work) -> u32 {
    // SAFETY: as in `look`.
    let (Some(work), Some(image)) = (unsafe { work.as_mut() }, maps::candidate()) else {
        return 0;
    };
    let decision = judge::rehearse(&image, &work.scene.time, &mut work.plan);
    work.shadow = Said::of(&decision, generation(&image));
    0
}

/// Counts a packet of which the candidate says something else.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn compare(work: *mut Work) -> u32 {
    // SAFETY: as in `look`.
    if let Some(work) = unsafe { work.as_mut() }
        && work.shadow.generation != 0
        && differ(work.decision.outcome, work.shadow.outcome())
    {
        let key = DifferenceKey {
            live: Said::of(&work.decision, work.plan.generation),
            shadow: work.shadow,
            hook: work.hook as u32,
        };
        shadow::count(&key, &events::case(work));
    }
    0
}

/// Concludes: the verdict, and the flow's entry. Whether the table refused it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn conclude(work: *mut Work) -> u32 {
    // SAFETY: as in `look`.
    let Some(work) = (unsafe { work.as_mut() }) else {
        return 0;
    };
    let flows = Flows {
        hz: work.scene.clock.hz,
    };
    let judgement = judge::conclude(&flows, &work.scene, &work.plan);
    work.decision = judgement.decision;
    u32::from(judgement.insert_failed)
}

/// Counts and records.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn account(skb: *mut __sk_buff, work: *mut Work) -> u32 {
    // SAFETY: as in `look`.
    if let Some(work) = unsafe { work.as_mut() } {
        events::account(&TcContext::new(skb), work);
    }
    0
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: every index is masked and nothing here unwraps. The verifier would refuse
    // an endless loop that could be.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
