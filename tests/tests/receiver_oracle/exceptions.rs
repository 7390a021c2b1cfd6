//! Where the enforcer is stricter than the host behind it: what is delivered without it, allowed
//! by a rule, and denied all the same, with the reason why.

use crate::{
    generate::{Case, Odd, Pieces, Sent},
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

fn fragments(case: &Case, is: impl Fn(&Sent) -> bool) -> bool {
    any(case, |odd| matches!(odd, Odd::Fragments(sent) if is(sent)))
}

/// Whether the pieces that pass make up the datagram, if first ones must hold `header` bytes. A
/// first one passes when its flow is the one that was delivered, another when a first one before
/// it has passed and does not reach into it. `None`: the pieces do not in any case.
fn complete(sent: &Sent, delivery: &Delivery, header: usize) -> Option<bool> {
    let whole = |passed: &[(usize, usize)]| {
        let mut end = 0;
        // Few enough to look through again for each step.
        while let Some(next) = passed.iter().filter(|p| p.0 <= end && p.1 > end).max() {
            end = next.1;
        }
        end == sent.length
    };
    let all: Vec<_> = sent.pieces.iter().map(|p| (p.0, p.1)).collect();
    if !whole(&all) {
        return None;
    }
    let (mut covered, mut passed) = (None, Vec::new());
    for (start, end, other) in &sent.pieces {
        let passes = if *start == 0 {
            let same = sent.port.is_none_or(|port| port == delivery.selector);
            let named = match delivery.protocol {
                6 | 17 | 132 | 136 => same != *other,
                1 | 58 => !other,
                _ => true,
            };
            named && *end >= header
        } else {
            covered.is_some_and(|covered| *start >= covered)
        };
        if passes {
            passed.push((*start, *end));
            if *start == 0 {
                covered = Some(*end);
            }
        }
    }
    Some(whole(&passed))
}

/// What the enforcer makes of a datagram that the host alone would throw away: with the pieces
/// that it denies, the contradiction is gone. Only what a rule allows comes of it.
pub fn mended(case: &Case) -> bool {
    fragments(case, |sent| sent.how == Pieces::Overlap)
}

/// Every exception.
pub const EXCEPTIONS: &[Exception] = &[
    Exception {
        name: "extension headers past the limit",
        reason: "a bound is needed in the kernel, and nobody sends more than six",
        applies: |case, _| {
            let sum = |of: fn(&Odd) -> usize| case.odds.iter().map(of).sum::<usize>();
            let built = sum(|odd| match odd {
                Odd::Headers(count, _) => *count,
                _ => 0,
            });
            let swallowed = sum(|odd| match odd {
                Odd::HeaderLength(count) => *count,
                _ => 0,
            });
            built - swallowed > 6
        },
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
        name: "fragments before their first",
        reason: "they carry no ports, and nothing waits here for the one that does",
        applies: |case, delivery| {
            fragments(case, |sent| {
                sent.pieces[0].0 != 0 && complete(sent, delivery, sent.header) == Some(false)
            })
        },
    },
    Exception {
        name: "first fragments without the whole transport header",
        reason: "what is looked at must not come in pieces (RFC 1858, RFC 7112)",
        applies: |case, delivery| {
            fragments(case, |sent| {
                complete(sent, delivery, 0) == Some(true)
                    && complete(sent, delivery, sent.header) == Some(false)
            })
        },
    },
    Exception {
        name: "source routes",
        reason: "the destination in the header is not the final one",
        applies: |case, _| {
            any(
                case,
                |odd| matches!(odd, Odd::Options(bytes) if bytes.iter().any(|b| matches!(b, 131 | 137))),
            )
        },
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
        name: "TCP headers of a length that they cannot have",
        reason: "raw sockets get to see them, TCP itself throws them away",
        applies: |case, delivery| {
            delivery.protocol == 6 && any(case, |odd| matches!(odd, Odd::TcpOffset(_, false)))
        },
    },
];
