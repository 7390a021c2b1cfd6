//! Where the enforcer is stricter than the host behind it: what is delivered without it, allowed
//! by a rule, and denied all the same, with the reason why.

use crate::{
    generate::{Case, Odd},
    receiver::Delivery,
};

/// A kind of packet that is denied although the host would take it.
pub struct Exception {
    pub name: &'static str,
    pub reason: &'static str,
    /// Whether a case falls under it. All such cases must be denied.
    pub applies: fn(&Case, &Delivery) -> bool,
}

fn any(case: &Case, is: impl Fn(&Odd) -> bool) -> bool {
    case.odds.iter().any(is)
}

/// Every exception.
pub const EXCEPTIONS: &[Exception] = &[
    Exception {
        name: "extension headers past the limit",
        reason: "a bound is needed in the kernel, and nobody sends more than six",
        applies: |case, _| any(case, |odd| matches!(odd, Odd::Headers(7.., _))),
    },
    Exception {
        name: "nested priority tags",
        reason: "a second tag of VLAN 0 serves to get past filters, and nothing else",
        applies: |case, _| {
            any(
                case,
                |odd| matches!(odd, Odd::Tags(tags) if tags.iter().filter(|(_, c)| c & 0xfff == 0).count() > 1),
            )
        },
    },
    Exception {
        name: "fragments that follow a first one",
        reason: "they carry no ports",
        applies: |case, _| any(case, |odd| matches!(odd, Odd::Fragments(2.., _))),
    },
    Exception {
        name: "TCP that can open nothing",
        reason: "only a SYN opens a flow, and only data or an ACK takes one up again",
        applies: |case, delivery| {
            delivery.protocol == 6
                && any(case, |odd| match odd {
                    Odd::TcpFlags(flags) => match flags & 0x17 {
                        // SYN alone, ACK with or without FIN.
                        0x02 | 0x10 | 0x11 => false,
                        _ => true,
                    },
                    _ => false,
                })
        },
    },
    Exception {
        name: "TCP headers shorter than themselves",
        reason: "raw sockets get to see them, TCP itself throws them away",
        applies: |case, delivery| {
            delivery.protocol == 6 && any(case, |odd| matches!(odd, Odd::TcpOffset(0..5)))
        },
    },
];
