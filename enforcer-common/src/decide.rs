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

/// Judges a flow that is about to be opened at `unix` (seconds).
#[inline(always)]
pub fn decide<W: Words + ?Sized>(image: &W, query: &Query, unix: u64) -> Decision {
    Decision::unpack(verdict_at(image, query, unix))
}

/// The verdict words behind [`decide`], the first in the lower half: with
/// [`image::VERDICT_SESSION`] where the rule bounds sessions.
#[inline(always)]
pub fn verdict_at<W: Words + ?Sized>(image: &W, query: &Query, unix: u64) -> u64 {
    let words = answer(image, &Ask::rules(query));
    if words as u32 & image::VERDICT_TIMELINE == 0 {
        return words;
    }
    let (word, subject) = image::at_time(image, (words >> 32) as u32, unix);
    u64::from(word) | u64::from(subject) << 32
}

/// What [`answer`] is asked: plain words without padding, passed by address in the kernel.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Ask {
    source: Address,
    destination: Address,
    protocol: u32,
    selector: u32,
    form: u64,
}

impl Ask {
    /// What the rules say of a flow.
    #[inline(always)]
    pub const fn rules(query: &Query) -> Self {
        Self {
            source: query.source,
            destination: query.destination,
            protocol: query.protocol as u32,
            selector: query.selector as u32,
            form: 0,
        }
    }

    /// All zeros but `form`: for memory that is written before it is read.
    pub const EMPTY: Self = Self::form(Address::v4(0), Address::v4(0));

    /// The service selector asked about.
    #[inline(always)]
    pub const fn selector(&self) -> u32 {
        self.selector
    }

    /// What becomes of a denial of form between two addresses.
    #[inline(always)]
    pub const fn form(source: Address, destination: Address) -> Self {
        Self {
            source,
            destination,
            protocol: 0,
            selector: 0,
            form: 1,
        }
    }
}

/// Two verdict words, the first in the lower half: see [`Decision::unpack`]. Nothing but loads, 10
/// to 20 of them, whatever the number of rules and members (IPv6: up to 32 trie nodes, in
/// practice 2 to 5).
///
/// Not inlined: in the kernel it is a subprogram, or a judgement would hold a dozen copies (51 000
/// instructions a program instead of 3 000).
#[inline(never)]
pub fn answer<W: Words + ?Sized>(image: &W, ask: &Ask) -> u64 {
    let source = image::address_class(image, &ask.source);
    let destination = image::address_class(image, &ask.destination);
    let (row, offset) = image::row_of(image, source, destination);
    let (word, subject) = if ask.form != 0 {
        (
            image.word(offset.wrapping_add(2)),
            image.word(offset.wrapping_add(3)),
        )
    } else {
        let (protocol, selector) = (ask.protocol as u8, ask.selector as u16);
        let v6 = ask.destination.is_v6();
        let service = image::service_class(image, v6, protocol, selector);
        image::verdict_of(image, row, offset, service)
    };
    u64::from(word) | u64::from(subject) << 32
}
