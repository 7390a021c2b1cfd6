//! The middle way through the judgement: a plain packet that no entry speaks for and that may open
//! a flow.
//!
//! What [`crate::judge`] does with such a packet, less what it cannot need, and without a plan in
//! memory between the steps: that costs as much as the answer. It settles only what the rules alone
//! allow or deny, whatever the time; everything else goes the long way. That both agree is tested
//! with every packet that a test judges on the host.

use crate::{
    case::Case,
    decide::{
        ARRIVAL, Ask, Decision, FAILSAFE, FAILSAFE_REPLY, NOT_MARTIAN, NOT_OWN, Query, Time,
        answer_here, generation,
    },
    flow::{OPENER_IS_LOW, ordered},
    image::{VERDICT_SESSION, VERDICT_TIMELINE, Words},
    packet::tcp,
    swift::{Moment, Plain},
    verdict::{Hook, Outcome, Reason},
    wire::{FlowEntry, FlowKey},
};

const TCP: u8 = 6;

/// The case of a plain packet.
#[inline(always)]
pub const fn case(packet: &Plain, moment: &Moment) -> Case {
    let hook = if moment.ingress {
        Hook::TcIngress
    } else {
        Hook::TcEgress
    };
    let mut case = Case::new(&packet.tuple, 0, 0, hook, moment.clock.now).plain(packet.tuple.v6);
    case.generation = moment.generation;
    case.ifindex = moment.ifindex;
    case.slot = moment.slot;
    case
}

/// Asks the image about a packet that no entry speaks for. `false`: the long way.
#[inline(always)]
pub fn settle<W: Words + ?Sized, T: Time>(image: &W, time: &T, case: &mut Case) -> bool {
    let Some(ask) = question(case) else {
        return false;
    };
    match settled(answer_here(image, &ask, time)) {
        Some(decision) => {
            case.decided(&decision, generation(image), true);
            true
        }
        None => false,
    }
}

/// What the rules are asked about the packet.
#[inline(always)]
fn question(case: &Case) -> Option<Ask> {
    let tuple = case.tuple();
    let flags = tuple.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN);
    let syn = tuple.protocol == TCP;
    if syn && flags != tcp::SYN {
        return None;
    }
    // DHCP is essential.
    if !syn && (dhcp(tuple.source_port) || dhcp(tuple.destination_port)) {
        return None;
    }
    let mut ask = Ask::rules(&Query {
        source: tuple.source_address(),
        destination: tuple.destination_address(),
        protocol: tuple.protocol,
        selector: tuple.selector,
    });
    ask.screen = if case.hook == Hook::TcIngress as u32 {
        NOT_MARTIAN | NOT_OWN | FAILSAFE | ARRIVAL
    } else if syn {
        NOT_MARTIAN | FAILSAFE
    } else {
        NOT_MARTIAN | FAILSAFE | FAILSAFE_REPLY
    };
    ask.slot = case.slot;
    ask.source_port = u32::from(tuple.source_port);
    Some(ask)
}

/// Ports of DHCP, or one next to them.
#[inline(always)]
const fn dhcp(port: u16) -> bool {
    matches!(port | 1, 67 | 69 | 547)
}

/// The decision behind verdict words, if the rules alone made it and time has no part in it.
#[inline(always)]
const fn settled(words: u64) -> Option<Decision> {
    if words as u32 & (VERDICT_TIMELINE | VERDICT_SESSION) != 0 {
        return None;
    }
    let decision = Decision::unpack(words);
    let settled = match decision.outcome {
        Outcome::Allowed => matches!(decision.reason, Reason::RuleAllow | Reason::Unsegmented),
        Outcome::Denied => matches!(decision.reason, Reason::DefaultDeny | Reason::RuleDeny),
        Outcome::WouldDeny | Outcome::Off => false,
    };
    if settled { Some(decision) } else { None }
}

/// The flow that a settled packet opens.
#[inline(always)]
pub fn flow(case: &Case) -> (FlowKey, FlowEntry) {
    let (source, destination) = (case.source_port(), case.destination_port());
    let from_low = ordered(&case.source, &case.destination, (source, destination));
    let (low, high, low_port, high_port) = if from_low {
        (&case.source, &case.destination, source, destination)
    } else {
        (&case.destination, &case.source, destination, source)
    };
    // Link-local addresses are not plain: no scope.
    let v6 = case.family() == 6;
    let key = FlowKey::new(*low, *high, low_port, high_port, case.protocol(), v6, 0);
    let ifindex = if case.hook == Hook::TcIngress as u32 {
        case.ifindex
    } else {
        0
    };
    let (flags, arrived) = if from_low {
        (OPENER_IS_LOW, [0, ifindex])
    } else {
        (0, [ifindex, 0])
    };
    let entry = FlowEntry {
        last_seen: case.now,
        generation: case.generation,
        rule: case.rule,
        flags,
        selector: u32::from(case.selector()),
        opened: 0,
        checked: 0,
        arrived,
    };
    (key, entry)
}
