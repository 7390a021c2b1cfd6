//! The judgement of a packet: image × flow table × packet → verdict.
//!
//! In three steps, so that the kernel's verifier walks each once and not once for each way that
//! leads to it: [`plan`] (what does the flow table know, what must the image be asked?),
//! [`consult`] (what does the image say?), [`conclude`] (what follows, for the packet and the
//! table). Between the steps everything is in a [`Plan`], which the kernel keeps in a map, and each
//! step is a function of its own to the verifier, which then knows nothing of values there.
//!
//! Only `consult` reads the image, so a packet is judged by one image whole. `plan` knows the
//! generation: an entry of that generation stands for the image's judgement. Should a swap come
//! between the two, the flow is judged anew by the newer image. Must not know: what the table is
//! made of, what time it is.

pub use crate::conclude::{conclude, verdict};
use crate::{
    decide::{
        ARRIVAL, Ask, Decision, FAILSAFE, FAILSAFE_REPLY, NO_RENEWAL, NO_SESSION, NOT_MARTIAN,
        NOT_OWN, Query, REOPENS, REVERSED, Time, answer, answer_unreadable, generation,
    },
    flow::{
        CLOSING, Change, Clock, FlowSlot as _, FlowTable, OPENER_IS_LOW, REPLIED, SESSION, TIMED,
        follow, fragment_entry, fragment_key, fresh, is_multicast, key_of, state_flags,
    },
    image::{EMPTY, VERDICT_SESSION, VERDICT_TIMELINE, Words},
    packet::{Fragment, Kind, Link, Packet, Tuple, tcp},
    verdict::{Outcome, Reason},
    wire::{FlowEntry, FlowKey, FragmentEntry, FragmentKey},
};

/// The judgement of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// The verdict.
    pub decision: Decision,
    /// Whether the table refused the flow's entry, or that of the packet's later fragments.
    pub insert_failed: bool,
}

/// Where and when a packet is judged.
#[derive(Clone, Copy, Debug)]
pub struct Scene<T> {
    /// What is known of the packet besides its bytes.
    pub link: Link,
    /// Jiffies.
    pub clock: Clock,
    /// Time that is only asked for when a rule depends on it.
    pub time: T,
}

/// It passes; no question.
pub(crate) const PASS: u32 = 0;
/// The rules decide, and no flow comes of it.
pub(crate) const RULES: u32 = 1;
/// The rules decide, and the packet opens a flow if it passes.
pub(crate) const OPEN: u32 = 2;
/// The rules decide in either direction, and the flow is entered again if it passes.
pub(crate) const MIDSTREAM: u32 = 3;
/// The rules decide whether the flow, admitted by another policy, or a while ago, or with its end
/// at another interface, goes on.
pub(crate) const REJUDGE: u32 = 4;
/// The same, and the packet is an ICMP error about the flow, which `reverse` asks about.
pub(crate) const REJUDGE_RELATED: u32 = 5;
/// A denial of form without addresses.
pub(crate) const FORM_UNREADABLE: u32 = 6;

/// What to do about a packet. Plain words without padding.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Plan {
    pub(crate) ask: Ask,
    pub(crate) reverse: Ask,
    pub(crate) key: FlowKey,
    pub(crate) fragment_key: FragmentKey,
    pub(crate) fragment: FragmentEntry,
    pub(crate) step: u32,
    /// [`Reason`] of a pass or of a denial of form.
    pub(crate) reason: u32,
    /// Rule of the entry behind a pass.
    pub(crate) rule: u32,
    /// State flags for the entry if the packet's source is its opener, or of the packet.
    pub(crate) flags: u32,
    /// The same for an entry that comes of `reverse`.
    pub(crate) reverse_flags: u32,
    /// Whether `reverse` is to be asked when `ask` does not settle it.
    pub(crate) has_reverse: u32,
    /// Index in [`FlowEntry::arrived`] of the packet's end.
    pub(crate) side: u32,
    /// Interface that the packet came in at, 0 if it goes out.
    pub(crate) ifindex: u32,
    /// Whether later fragments follow the packet.
    pub(crate) has_fragments: u32,
    /// Whether the entry was admitted by another policy.
    pub(crate) stale: u32,
    /// Whether the entry's rule depends on time, which went on.
    pub(crate) due: u32,
    /// State flags of the entry that was found.
    pub(crate) found: u32,
    /// Generation of the image that was consulted.
    pub generation: u32,
    /// The packet's length.
    pub(crate) bytes: u32,
    /// What the image says to `ask`.
    pub(crate) words: u64,
    /// What it says to `reverse`.
    pub(crate) reverse_words: u64,
}

impl Plan {
    /// Nothing planned.
    pub const EMPTY: Self = Self {
        ask: Ask::EMPTY,
        reverse: Ask::EMPTY,
        key: FlowKey::new([0; 4], [0; 4], 0, 0, 0, false, 0),
        fragment_key: FragmentKey::new([0; 4], [0; 4], 0, 0, false, false),
        fragment: FragmentEntry {
            seen: 0,
            ports: 0,
            service: 0,
            kind: 0,
            covered: 0,
        },
        step: FORM_UNREADABLE,
        reason: Reason::NoPolicy as u32,
        rule: EMPTY,
        flags: 0,
        reverse_flags: 0,
        has_reverse: 0,
        side: 0,
        ifindex: 0,
        has_fragments: 0,
        stale: 0,
        due: 0,
        found: 0,
        generation: 0,
        bytes: 0,
        words: Self::NO_POLICY,
        reverse_words: Self::NO_POLICY,
    };

    /// What nobody says when there is no image.
    const NO_POLICY: u64 =
        (Outcome::Denied as u32 | (Reason::NoPolicy as u32) << 8) as u64 | (EMPTY as u64) << 32;

    /// Whether the packet is of a flow of which the judgement stands: only the packet has to be
    /// looked at.
    #[inline(always)]
    pub const fn settled(&self) -> bool {
        (self.step == REJUDGE || self.step == REJUDGE_RELATED) && self.stale == 0 && self.due == 0
    }

    /// Whether the image has a say.
    #[inline(always)]
    pub const fn asks(&self) -> bool {
        self.step != PASS
    }

    /// Whether the image alone decided, and would say the same at another time.
    #[inline(always)]
    pub const fn lasts(&self) -> bool {
        let timed = VERDICT_TIMELINE | VERDICT_SESSION;
        (self.step == OPEN || self.step == MIDSTREAM)
            && (self.words as u32 | self.reverse_words as u32) & timed == 0
    }

    /// There is no image to ask: denied.
    #[inline(always)]
    pub const fn without_policy(&mut self) {
        self.step = FORM_UNREADABLE;
        self.has_reverse = 0;
        self.has_fragments = 0;
        self.generation = 0;
        self.words = Self::NO_POLICY;
    }

    #[inline(always)]
    fn pass(&mut self, reason: Reason, rule: u32) {
        self.step = PASS;
        self.reason = reason as u32;
        self.rule = rule;
    }

    /// A denial of form, after `screen`.
    #[inline(always)]
    fn form(&mut self, link: &Link, tuple: &Tuple, reason: Reason, screen: u32) {
        self.rules(RULES, link, tuple, screen);
        self.ask = self.ask.form(reason);
    }

    #[inline(always)]
    fn rules(&mut self, step: u32, link: &Link, tuple: &Tuple, screen: u32) {
        self.step = step;
        self.ask = forward(tuple, tuple.selector);
        self.ask.screen = screen;
        self.ask.slot = link.slot;
        self.ask.source_port = u32::from(tuple.source_port);
    }
}

/// What is looked at before the rules are asked about a packet.
#[inline(always)]
fn screening(link: &Link) -> u32 {
    if link.ingress && !link.looped {
        NOT_MARTIAN | NOT_OWN | FAILSAFE | ARRIVAL
    } else {
        NOT_MARTIAN | FAILSAFE
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

/// Judges a packet: `form` is what [`parse`](crate::packet::parse) said of it.
#[inline(always)]
pub fn judge<W: Words + ?Sized, F: FlowTable, T: Time>(
    image: &W,
    table: &F,
    packet: &mut Packet,
    scene: &Scene<T>,
    form: Result<(), Reason>,
) -> Judgement {
    let mut plan = Plan::EMPTY;
    match form {
        Ok(()) => self::plan(generation(image), table, packet, scene, &mut plan),
        Err(reason) => plan_form(packet, &scene.link, reason, &mut plan),
    }
    if plan.asks() {
        consult(image, &scene.time, &mut plan);
    }
    conclude(table, scene, &plan)
}

/// Asks the image what the plan wants to know.
#[inline(always)]
pub fn consult<W: Words + ?Sized, T: Time>(image: &W, time: &T, plan: &mut Plan) {
    // A swap came in between: no entry that was found counts.
    plan.stale |= u32::from(plan.generation != generation(image));
    plan.generation = generation(image);
    if plan.step == FORM_UNREADABLE {
        plan.words = answer_unreadable(image, &plan.ask);
        return;
    }
    plan.words = answer(image, &plan.ask, time);
    plan.reverse_words = plan.words;
    let allowed = Outcome::from_bits(plan.words as u32) as u32 == Outcome::Allowed as u32;
    if plan.has_reverse != 0 && (!allowed || plan.step == REJUDGE_RELATED) {
        plan.reverse_words = answer(image, &plan.reverse, time);
    }
}

/// Asks an image that does not judge, the shadow, what the plan wants to know, and says what would
/// follow. The plan is afterwards as it was, but for the answers.
#[inline(always)]
pub fn rehearse<W: Words + ?Sized, T: Time>(image: &W, time: &T, plan: &mut Plan) -> Decision {
    let (own, stale) = (plan.generation, plan.stale);
    // Why an entry does not count is no matter of the shadow's.
    plan.generation = generation(image);
    consult(image, time, plan);
    let decision = verdict(plan);
    (plan.generation, plan.stale) = (own, stale);
    decision
}

/// Plans a denial of form, or the pass of a protocol below IP.
#[inline(always)]
pub fn plan_form(packet: &Packet, link: &Link, reason: Reason, plan: &mut Plan) {
    plan.has_reverse = 0;
    plan.has_fragments = 0;
    plan.form(link, &packet.tuple, reason, 0);
    plan.ask.essential = packet.essential;
    plan.ask.ethertype = u32::from(packet.ethertype);
    if !packet.addresses {
        plan.step = FORM_UNREADABLE;
    }
}

/// Looks a packet's flow up and plans what to ask.
#[inline(always)]
pub fn plan<F: FlowTable, T: Time>(
    generation: u32,
    table: &F,
    packet: &mut Packet,
    scene: &Scene<T>,
    plan: &mut Plan,
) {
    let Scene { link, clock, time } = scene;
    // The kernel's plan still holds the last packet's.
    plan.has_reverse = 0;
    plan.has_fragments = 0;
    plan.stale = 0;
    plan.found = 0;
    plan.generation = generation;
    plan.bytes = packet.length;
    plan.ifindex = if link.ingress { link.ifindex } else { 0 };
    let screen = screening(link);
    if packet.fragment as u32 != Fragment::Whole as u32 {
        plan.fragment_key = fragment_key(packet, link.ingress);
        if packet.fragment as u32 == Fragment::First as u32 {
            plan.fragment = fragment_entry(packet, clock.now);
            // An error's later fragments do not have the packet that it quotes.
            plan.has_fragments = u32::from(packet.tuple.kind as u32 != Kind::IcmpError as u32);
        } else {
            let followed = match table.fragment(&plan.fragment_key) {
                Some(first) => follow(packet, &first, clock),
                None => false,
            };
            if !followed {
                return plan.form(link, &packet.tuple, Reason::Fragment, 0);
            }
        }
    }
    let tuple = &packet.tuple;
    let error = tuple.kind == Kind::IcmpError;
    if !error && (is_multicast(tuple) || tuple.kind == Kind::IcmpOther) {
        plan.rules(RULES, link, tuple, screen);
        plan.ask.essential = packet.essential;
        return;
    }
    if error && !(packet.has_inner && packet.inner.source == tuple.destination) {
        return plan.form(link, tuple, Reason::IcmpUnrelated, screen);
    }
    // A SYN asks for a new flow: it is judged as one, even over a live entry.
    let opens = !error
        && tuple.kind == Kind::Tcp
        && tuple.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN;
    let reply = if link.ingress || opens {
        screen
    } else {
        screen | FAILSAFE_REPLY
    };
    if tuple.kind == Kind::Tcp && impossible(tuple.tcp_flags) {
        return plan.form(link, tuple, Reason::NoFlow, screen & !FAILSAFE);
    }
    // An ICMP error passes when it speaks of a current flow, to the end whose packet it quotes.
    let subject = if error { &packet.inner } else { tuple };
    let (key, from_low) = key_of(subject, packet.ifindex);
    plan.key = key;
    plan.side = u32::from(from_low);
    if let Some(slot) = table.find(&key) {
        let entry = slot.load();
        if fresh(&entry, subject.protocol, clock) {
            let from_opener = (entry.flags & OPENER_IS_LOW != 0) == from_low;
            let current = entry.generation == generation;
            if opens {
                // Simultaneous open, or a spoofed SYN against a live flow: it may pass, but it
                // takes nothing from the flow that is there.
                let live = entry.flags & (REPLIED | CLOSING) == REPLIED && current;
                if !from_opener && live {
                    return plan.rules(RULES, link, tuple, screen);
                }
            } else {
                plan.flags = state_flags(subject, from_opener);
                plan.rule = entry.rule;
                plan.found = entry.flags;
                let timed = entry.flags & TIMED != 0;
                let due = timed && entry.checked != time.boot();
                let arrived = entry.arrived[usize::from(from_low)];
                let known = plan.ifindex == 0 || plan.ifindex == arrived;
                if current && !due && known && !error {
                    slot.touch(clock.now, packet.length);
                    if entry.flags & plan.flags != plan.flags {
                        slot.change(&Change::flags(plan.flags));
                    }
                    return plan.pass(Reason::Established, entry.rule);
                }
                plan.stale = u32::from(!current);
                plan.due = u32::from(due);
                return rejudge(plan, scene, packet, &entry, from_opener);
            }
        }
    }
    if error {
        return plan.form(link, tuple, Reason::IcmpUnrelated, screen);
    }
    if tuple.kind == Kind::IcmpReply {
        return plan.rules(RULES, link, tuple, screen);
    }
    let (opener, other) = if from_low {
        (OPENER_IS_LOW, 0)
    } else {
        (0, OPENER_IS_LOW)
    };
    plan.flags = state_flags(tuple, true) | opener;
    plan.reverse_flags = state_flags(tuple, false) | other;
    if tuple.kind != Kind::Tcp || opens {
        plan.rules(OPEN, link, tuple, reply);
        plan.ask.essential = packet.essential;
        return;
    }
    if tuple.tcp_flags & (tcp::ACK | tcp::SYN | tcp::RST) != tcp::ACK {
        return plan.form(link, tuple, Reason::NoFlow, reply);
    }
    plan.rules(MIDSTREAM, link, tuple, reply | NO_SESSION);
    plan.has_reverse = 1;
    plan.reverse = backward(tuple, tuple.source_port);
    plan.reverse.screen = REVERSED | NO_SESSION;
}

/// Plans to ask about the opener of a flow, for a packet of it or an ICMP error about it.
#[inline(always)]
fn rejudge<T: Time>(
    plan: &mut Plan,
    scene: &Scene<T>,
    packet: &Packet,
    entry: &FlowEntry,
    from_opener: bool,
) {
    let link = &scene.link;
    let error = packet.tuple.kind == Kind::IcmpError;
    let subject = if error { &packet.inner } else { &packet.tuple };
    let selector = entry.selector as u16;
    let mut screen = screening(link);
    if error {
        plan.step = REJUDGE_RELATED;
        plan.has_reverse = 1;
        plan.reverse = forward(&packet.tuple, packet.tuple.selector).pass(Reason::Related);
        plan.reverse.screen = screen & !FAILSAFE;
        plan.reverse.slot = link.slot;
        screen = FAILSAFE | FAILSAFE_REPLY;
    } else {
        plan.step = REJUDGE;
        // This host may have been taken for the opener of a flow that a failsafe speaks for.
        screen |= FAILSAFE_REPLY;
    }
    let opener_port = if from_opener {
        plan.ask = forward(subject, selector);
        subject.source_port
    } else {
        plan.ask = backward(subject, selector);
        screen |= REVERSED;
        subject.destination_port
    };
    plan.ask.source_port = u32::from(opener_port);
    if error || !from_opener {
        screen |= NO_RENEWAL;
    }
    let datagrams = matches!(subject.kind, Kind::Ports | Kind::Other);
    if subject.kind != Kind::Tcp {
        screen |= REOPENS;
    }
    plan.ask.screen = screen;
    plan.ask.slot = link.slot;
    if entry.flags & SESSION != 0 {
        let boot = scene.time.boot();
        plan.ask.age = boot.wrapping_sub(entry.opened);
        plan.ask.quiet = boot.wrapping_sub(entry.checked);
    }
    // The far end may have a right of its own to this flow (a rule each way between two fixed
    // ports). Not for TCP: there a SYN says who opens, and data in the other direction must not
    // outlive the opener's rule.
    if !error && !from_opener && datagrams {
        let from_low = plan.side != 0;
        plan.has_reverse = 1;
        plan.reverse = forward(subject, subject.selector);
        plan.reverse.screen = screening(link);
        plan.reverse.slot = link.slot;
        plan.reverse_flags = if from_low { OPENER_IS_LOW } else { 0 };
    }
}
