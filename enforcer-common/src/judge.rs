//! The judgement of a packet: image × flow table × packet → verdict.
//!
//! In three steps, so that the kernel's verifier walks the look-ups in the image once and not once
//! for each way that leads to them: [`plan`] (what does the flow table know, what must the image
//! be asked?), [`answer`] (the image), [`conclude`] (what follows, for the packet and the table).
//! Between the steps everything is in a [`Plan`], which the kernel keeps in a map: of values there
//! the verifier knows nothing, so all ways meet. Must not know: what the table is made of, what
//! time it is.

use crate::{
    decide::{Ask, Decision, Query, answer, generation},
    flow::{
        CLOSING, Clock, FlowSlot as _, FlowTable, OPENER_IS_LOW, REPLIED, fresh, is_multicast,
        key_of, state_flags,
    },
    image::{EMPTY, Words, header},
    packet::{Kind, Packet, Tuple, tcp},
    verdict::{Outcome, Reason},
    wire::{FlowEntry, FlowKey},
};

/// The judgement of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// The verdict.
    pub decision: Decision,
    /// Whether the table refused the flow's entry.
    pub insert_failed: bool,
}

/// It passes; no question.
const PASS: u32 = 0;
/// The rules decide, and no flow comes of it.
const RULES: u32 = 1;
/// The rules decide, and the packet opens a flow if it passes.
const OPEN: u32 = 2;
/// The rules decide in either direction, and the flow is entered again if it passes.
const MIDSTREAM: u32 = 3;
/// The rules decide whether the flow, admitted under another policy, goes on.
const REJUDGE: u32 = 4;
/// The same, and the packet is an ICMP error about the flow.
const REJUDGE_RELATED: u32 = 5;
/// A denial of form between addresses that are known.
const FORM: u32 = 6;
/// A denial of form without addresses.
const FORM_UNREADABLE: u32 = 7;

/// What to do about a packet. Plain words without padding.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Plan {
    ask: Ask,
    reverse: Ask,
    key: FlowKey,
    step: u32,
    /// [`Reason`] of a pass or of a denial of form.
    reason: u32,
    /// Rule of the entry behind a pass.
    rule: u32,
    /// State flags for the entry if the packet's source is its opener, or of the packet.
    flags: u32,
    /// The same for an entry that comes of `reverse`.
    reverse_flags: u32,
    /// Whether `reverse` is to be asked when `ask` does not settle it.
    has_reverse: u32,
}

impl Plan {
    /// Nothing planned.
    pub const EMPTY: Self = Self {
        ask: Ask::EMPTY,
        reverse: Ask::EMPTY,
        key: FlowKey::new([0; 4], [0; 4], 0, 0, 0, false, 0),
        step: FORM_UNREADABLE,
        reason: Reason::NoPolicy as u32,
        rule: EMPTY,
        flags: 0,
        reverse_flags: 0,
        has_reverse: 0,
    };

    #[inline(always)]
    fn pass(&mut self, reason: Reason, rule: u32) {
        self.step = PASS;
        self.reason = reason as u32;
        self.rule = rule;
    }

    #[inline(always)]
    fn form(&mut self, tuple: &Tuple, reason: Reason) {
        self.step = FORM;
        self.reason = reason as u32;
        self.ask = Ask::form(tuple.source_address(), tuple.destination_address());
    }

    #[inline(always)]
    fn rules(&mut self, step: u32, tuple: &Tuple) {
        self.step = step;
        self.ask = forward(tuple, tuple.selector);
    }
}

/// SYN with FIN or RST: no stack sends it, but some take it for a SYN, so it must not ride on an
/// entry past the judgement that a SYN gets.
#[inline(always)]
const fn impossible(flags: u8) -> bool {
    flags & tcp::SYN != 0 && flags & (tcp::FIN | tcp::RST) != 0
}

/// May the packet's source open this flow?
#[inline(always)]
fn forward(tuple: &Tuple, selector: u16) -> Ask {
    Ask::rules(&Query {
        source: tuple.source_address(),
        destination: tuple.destination_address(),
        protocol: tuple.protocol,
        selector,
    })
}

/// May the packet's far end open this flow?
#[inline(always)]
fn backward(tuple: &Tuple, selector: u16) -> Ask {
    Ask::rules(&Query {
        source: tuple.destination_address(),
        destination: tuple.source_address(),
        protocol: tuple.protocol,
        selector,
    })
}

/// Judges a packet whose form is sound.
#[inline(always)]
pub fn judge<W: Words + ?Sized, T: FlowTable>(
    image: &W,
    table: &T,
    packet: &Packet,
    clock: &Clock,
) -> Judgement {
    let mut plan = Plan::EMPTY;
    self::plan(image, table, packet, clock, &mut plan);
    carry_out(image, table, clock, &plan)
}

/// The verdict on a packet whose form is not sound.
#[inline(always)]
pub fn judge_form<W: Words + ?Sized>(image: &W, packet: &Packet, reason: Reason) -> Decision {
    let mut plan = Plan::EMPTY;
    plan_form(image, packet, reason, &mut plan);
    let words = question(image, &plan);
    form(&plan, words)
}

/// Asks the image what the plan wants to know, and concludes.
#[inline(always)]
pub fn carry_out<W: Words + ?Sized, T: FlowTable>(
    image: &W,
    table: &T,
    clock: &Clock,
    plan: &Plan,
) -> Judgement {
    let words = question(image, plan);
    let mut reverse = words;
    let allowed = Outcome::from_bits(words as u32) as u32 == Outcome::Allowed as u32;
    if plan.has_reverse != 0 && !allowed {
        reverse = answer(image, &plan.reverse);
    }
    let told = Told {
        words,
        reverse,
        generation: generation(image),
        now: clock.now,
    };
    conclude(table, plan, &told)
}

#[inline(always)]
fn question<W: Words + ?Sized>(image: &W, plan: &Plan) -> u64 {
    match plan.step {
        PASS => 0,
        FORM_UNREADABLE => u64::from(image.word(header::FORM_UNREADABLE)) | u64::from(EMPTY) << 32,
        _ => answer(image, &plan.ask),
    }
}

/// Plans a denial of form, or the pass of an essential protocol below IP.
#[inline(never)]
pub fn plan_form<W: Words + ?Sized>(image: &W, packet: &Packet, reason: Reason, plan: &mut Plan) {
    plan.has_reverse = 0;
    if reason as u32 == Reason::Ethertype as u32
        && packet.essential & image.word(header::ESSENTIALS) != 0
    {
        plan.pass(Reason::Essential, EMPTY);
    } else if packet.addresses {
        plan.form(&packet.tuple, reason);
    } else {
        plan.step = FORM_UNREADABLE;
        plan.reason = reason as u32;
    }
}

/// Looks a packet's flow up and plans what to ask.
// A subprogram in the kernel, with a stack frame of its own.
#[inline(never)]
pub fn plan<W: Words + ?Sized, T: FlowTable>(
    image: &W,
    table: &T,
    packet: &Packet,
    clock: &Clock,
    plan: &mut Plan,
) {
    // The kernel's plan still holds the last packet's.
    plan.has_reverse = 0;
    if packet.essential & image.word(header::ESSENTIALS) != 0 {
        return plan.pass(Reason::Essential, EMPTY);
    }
    let tuple = &packet.tuple;
    let error = tuple.kind == Kind::IcmpError;
    if !error && (is_multicast(tuple) || tuple.kind == Kind::IcmpOther) {
        return plan.rules(RULES, tuple);
    }
    if error && !(packet.has_inner && packet.inner.source == tuple.destination) {
        return plan.form(tuple, Reason::IcmpUnrelated);
    }
    if tuple.kind == Kind::Tcp && impossible(tuple.tcp_flags) {
        return plan.form(tuple, Reason::NoFlow);
    }
    // An ICMP error passes when it speaks of a current flow, to the end whose packet it quotes.
    let subject = if error { &packet.inner } else { tuple };
    let (key, from_low) = key_of(subject, packet.ifindex);
    plan.key = key;
    // A SYN asks for a new flow: it is judged as one, even over a live entry.
    let opens = !error
        && tuple.kind == Kind::Tcp
        && tuple.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN;
    if let Some(slot) = table.find(&key) {
        let entry = slot.load();
        if fresh(&entry, subject.protocol, clock) {
            let from_opener = (entry.flags & OPENER_IS_LOW != 0) == from_low;
            if opens {
                // Simultaneous open, or a spoofed SYN against a live flow: it may pass, but it
                // takes nothing from the flow that is there.
                let live = entry.flags & (REPLIED | CLOSING) == REPLIED
                    && entry.generation == generation(image);
                if !from_opener && live {
                    return plan.rules(RULES, tuple);
                }
            } else {
                plan.flags = state_flags(subject, from_opener);
                if entry.generation == generation(image) {
                    if error {
                        return plan.pass(Reason::Related, entry.rule);
                    }
                    slot.touch(clock.now, plan.flags);
                    return plan.pass(Reason::Established, entry.rule);
                }
                plan.step = if error { REJUDGE_RELATED } else { REJUDGE };
                if from_opener {
                    plan.ask = forward(subject, entry.selector as u16);
                    return;
                }
                plan.ask = backward(subject, entry.selector as u16);
                // The far end may have a right of its own to this flow (a rule each way between
                // two fixed ports). Not for TCP: there a SYN says who opens, and data in the
                // other direction must not outlive the opener's rule.
                if !error && matches!(subject.kind, Kind::Ports | Kind::Other) {
                    plan.has_reverse = 1;
                    plan.reverse = forward(subject, subject.selector);
                    plan.reverse_flags = if from_low { OPENER_IS_LOW } else { 0 };
                }
                return;
            }
        }
    }
    if error {
        return plan.form(tuple, Reason::IcmpUnrelated);
    }
    if tuple.kind == Kind::IcmpReply {
        return plan.rules(RULES, tuple);
    }
    let (opener, other) = if from_low {
        (OPENER_IS_LOW, 0)
    } else {
        (0, OPENER_IS_LOW)
    };
    plan.flags = state_flags(tuple, true) | opener;
    plan.reverse_flags = state_flags(tuple, false) | other;
    plan.rules(OPEN, tuple);
    if tuple.kind == Kind::Tcp && !opens {
        if tuple.tcp_flags & (tcp::ACK | tcp::SYN | tcp::RST) != tcp::ACK {
            return plan.form(tuple, Reason::NoFlow);
        }
        plan.step = MIDSTREAM;
        plan.has_reverse = 1;
        plan.reverse = backward(tuple, tuple.source_port);
    }
}

/// What the image said, and when.
struct Told {
    words: u64,
    reverse: u64,
    generation: u32,
    now: u64,
}

#[inline(always)]
fn form(plan: &Plan, words: u64) -> Decision {
    let reason = Reason::from_bits(plan.reason);
    if plan.step == PASS {
        return Decision {
            rule: plan.rule,
            ..Decision::pass(reason)
        };
    }
    Decision {
        outcome: Outcome::from_bits(words as u32),
        reason,
        rule: EMPTY,
        segment: (words >> 32) as u32,
    }
}

/// What follows from the answer: the verdict, and what becomes of the flow's entry.
// A subprogram in the kernel, with a stack frame of its own.
#[inline(never)]
fn conclude<T: FlowTable>(table: &T, plan: &Plan, told: &Told) -> Judgement {
    let mut insert_failed = false;
    let decision = match plan.step {
        RULES => Decision::unpack(told.words),
        OPEN | MIDSTREAM => {
            let mut decision = Decision::unpack(told.words);
            let mut flags = plan.flags;
            let mut selector = plan.ask.selector();
            if plan.step == MIDSTREAM && decision.outcome != Outcome::Allowed {
                // Whichever end may have opened the flow; a clear "allowed" in either direction
                // goes before a pass that would be recorded.
                let reverse = Decision::unpack(told.reverse);
                if reverse.outcome == Outcome::Allowed
                    || (!decision.outcome.passes() && reverse.outcome.passes())
                {
                    decision = reverse;
                    flags = plan.reverse_flags;
                    selector = plan.reverse.selector();
                }
            }
            if decision.outcome.passes() {
                let entry = FlowEntry {
                    last_seen: told.now,
                    generation: told.generation,
                    rule: decision.rule,
                    flags,
                    selector,
                };
                insert_failed = !table.insert(&plan.key, &entry);
            }
            decision
        }
        REJUDGE | REJUDGE_RELATED => {
            let mut decision = Decision::unpack(told.words);
            if decision.outcome.passes() {
                if let Some(slot) = table.find(&plan.key) {
                    slot.admit(told.generation, decision.rule);
                    if plan.step == REJUDGE {
                        slot.touch(told.now, plan.flags);
                    }
                }
                if plan.step == REJUDGE_RELATED && decision.outcome == Outcome::Allowed {
                    decision.reason = Reason::Related;
                }
            } else {
                let own = Decision::unpack(told.reverse);
                if plan.has_reverse != 0 && own.outcome.passes() {
                    let entry = FlowEntry {
                        last_seen: told.now,
                        generation: told.generation,
                        rule: own.rule,
                        flags: plan.reverse_flags,
                        selector: plan.reverse.selector(),
                    };
                    insert_failed = !table.insert(&plan.key, &entry);
                    decision = own;
                } else {
                    decision.reason = Reason::Revoked;
                }
            }
            decision
        }
        _ => form(plan, told.words),
    };
    Judgement {
        decision,
        insert_failed,
    }
}
