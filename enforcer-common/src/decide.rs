//! `decide()`: the one function that turns a flow into a verdict, in the kernel and in userspace.

use crate::{
    ABI_VERSION,
    image::{self, Address, EMPTY, Words, header},
    verdict::{Outcome, Reason},
};

/// A flow to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Query {
    /// Who opens it.
    pub source: Address,
    /// To whom; of the same family.
    pub destination: Address,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port (TCP, UDP, SCTP), `type << 8 | code` (ICMP, ICMPv6), else 0.
    pub selector: u16,
}

/// A verdict and what stands behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Decision {
    /// What happens.
    pub outcome: Outcome,
    /// Why.
    pub reason: Reason,
    /// The rule, for [`Reason::RuleAllow`] and [`Reason::RuleDeny`]; else [`EMPTY`].
    pub rule: u32,
    /// The segment that guards, for [`Reason::DefaultDeny`] and denials of form; else [`EMPTY`].
    pub segment: u32,
}

impl Decision {
    /// The verdict when there is no policy to ask.
    pub const NO_POLICY: Self = Self {
        outcome: Outcome::Denied,
        reason: Reason::NoPolicy,
        rule: EMPTY,
        segment: EMPTY,
    };

    /// A pass that no rule was asked about.
    #[inline(always)]
    pub const fn pass(reason: Reason) -> Self {
        Self {
            outcome: Outcome::Allowed,
            reason,
            rule: EMPTY,
            segment: EMPTY,
        }
    }

    /// The decision behind two verdict words, the first in the lower half.
    #[inline(always)]
    pub const fn unpack(words: u64) -> Self {
        let (word, subject) = (words as u32, (words >> 32) as u32);
        let reason = Reason::from_bits(word >> 8);
        let by_rule = matches!(reason, Reason::RuleAllow | Reason::RuleDeny);
        Self {
            outcome: Outcome::from_bits(word),
            reason,
            rule: if by_rule { subject } else { EMPTY },
            segment: if by_rule { EMPTY } else { subject },
        }
    }
}

/// The first word of a verdict, as the compiler writes it.
pub const fn verdict_word(outcome: Outcome, reason: Reason) -> u32 {
    outcome as u32 | (reason as u32) << 8
}

/// Whether these words are an image this code can read.
#[inline(always)]
pub fn readable<W: Words + ?Sized>(image: &W) -> bool {
    image.word(header::MAGIC) == image::MAGIC && image.word(header::ABI) == ABI_VERSION
}

/// The image's generation.
#[inline(always)]
pub fn generation<W: Words + ?Sized>(image: &W) -> u32 {
    image.word(header::GENERATION)
}

/// Judges a flow that is about to be opened. Calls nothing but loads: 10 to 20 of them, whatever
/// the number of rules and members (IPv6: up to 32 trie nodes, in practice 2 to 5). Not inlined:
/// see [`image::address_class`].
#[inline(never)]
pub fn decide<W: Words + ?Sized>(image: &W, query: &Query) -> Decision {
    let source = image::address_class(image, &query.source);
    Decision::unpack(decide_class(image, source, &Target::of(image, query)))
}

/// The part of a query that does not change with the source.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    class: u32,
    service: u32,
}

impl Target {
    /// Looks up a query's destination and service.
    #[inline(always)]
    pub fn of<W: Words + ?Sized>(image: &W, query: &Query) -> Self {
        Self {
            class: image::address_class(image, &query.destination),
            service: image::service_class(
                image,
                query.destination.is_v6(),
                query.protocol,
                query.selector,
            ),
        }
    }
}

/// The verdict words for a source class and a target, the first in the lower half:
/// [`Decision::unpack`]. For those who ask for many sources in a loop: plain words keep the
/// verifier from following each outcome and reason on a path of its own.
#[inline(never)]
pub fn decide_class<W: Words + ?Sized>(image: &W, source: u32, target: &Target) -> u64 {
    let (row, offset) = image::row_of(image, source, target.class);
    let (word, subject) = image::verdict_of(image, row, offset, target.service);
    u64::from(word) | u64::from(subject) << 32
}

/// The verdict of a denial of form: no rule is asked, only who guards the addresses.
#[inline(always)]
pub fn decide_form<W: Words + ?Sized>(
    image: &W,
    addresses: Option<(Address, Address)>,
    reason: Reason,
) -> Decision {
    let (word, subject) = match addresses {
        Some((source, destination)) => {
            let source = image::address_class(image, &source);
            let destination = image::address_class(image, &destination);
            let (_, offset) = image::row_of(image, source, destination);
            (
                image.word(offset.wrapping_add(2)),
                image.word(offset.wrapping_add(3)),
            )
        }
        None => (image.word(header::FORM_UNREADABLE), EMPTY),
    };
    Decision {
        outcome: Outcome::from_bits(word),
        reason,
        rule: EMPTY,
        segment: subject,
    }
}
