//! `decide()`: the one function that turns a flow into a verdict, in the kernel and in userspace.

use crate::{
    ABI_VERSION,
    image::{
        self, Address, CLASS_FAILSAFE_SHIFT, CLASS_OWN, EMPTY, VERDICT_SESSION, VERDICT_TIMELINE,
        Words, header,
    },
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
    /// Destination port (TCP, UDP, UDP-Lite, SCTP), `type << 8 | code` (ICMP, ICMPv6), else 0.
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

/// What time it is, asked only where it matters: it costs 30 ns in the kernel.
pub trait Time {
    /// Seconds since boot, suspend included.
    fn boot(&self) -> u32;
    /// Unix seconds; never goes back.
    fn unix(&self) -> u64;
}

/// A moment given in Unix seconds.
#[derive(Clone, Copy, Debug)]
pub struct At(pub u64);

impl Time for At {
    fn boot(&self) -> u32 {
        0
    }

    fn unix(&self) -> u64 {
        self.0
    }
}

/// Judges a flow that is about to be opened, at `unix` seconds.
#[inline(always)]
pub fn decide<W: Words + ?Sized>(image: &W, query: &Query, unix: u64) -> Decision {
    Decision::unpack(verdict_at(image, query, unix))
}

/// The verdict words behind [`decide`], the first in the lower half: with
/// [`image::VERDICT_SESSION`] where the rule bounds sessions.
#[inline(always)]
pub fn verdict_at<W: Words + ?Sized>(image: &W, query: &Query, unix: u64) -> u64 {
    answer(image, &Ask::rules(query), &At(unix))
}

/// The packet's source is the ask's destination: it is a reply.
pub const REVERSED: u32 = 1;
/// This host's own address must not come in.
pub const NOT_OWN: u32 = 1 << 1;
/// Loopback, multicast sources and the like are on no link.
pub const NOT_MARTIAN: u32 = 1 << 2;
/// The source must be one that may come in at [`Ask::slot`].
pub const ARRIVAL: u32 = 1 << 3;
/// A failsafe lets the flow pass.
pub const FAILSAFE: u32 = 1 << 4;
/// The packet may be the reply of a flow that a failsafe lets pass.
pub const FAILSAFE_REPLY: u32 = 1 << 5;
/// A rule with sessions does not admit it: it is no SYN.
pub const NO_SESSION: u32 = 1 << 6;
/// The transport of the flow has no SYN that could open it again.
pub const REOPENS: u32 = 1 << 7;
/// The packet is not its opener's: it starts no session again.
pub const NO_RENEWAL: u32 = 1 << 8;

/// In an answer: the session starts again. Above all flags of the image.
pub const RENEWED: u32 = 1 << 24;

const MODE_RULES: u32 = 0;
const MODE_FORM: u32 = 1;
const MODE_SCREEN: u32 = 2;

/// What [`answer`] is asked: plain words without padding, passed by address in the kernel.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Ask {
    source: Address,
    destination: Address,
    protocol: u32,
    selector: u32,
    mode: u32,
    /// Of a denial of form, or of the pass that follows the screening.
    reason: u32,
    // What most asks leave at 0 lies apart: side by side, the compiler would call a function to
    // write it byte by byte.
    /// What to look at before: see [`REVERSED`] and the others.
    pub screen: u32,
    /// Seconds that the session has lasted.
    pub age: u32,
    /// Slot of the interface, for [`ARRIVAL`] and failsafes.
    pub slot: u32,
    /// Seconds since its last packet.
    pub quiet: u32,
    /// Source port, for [`FAILSAFE_REPLY`].
    pub source_port: u32,
    /// Ethertype, for denials because of it.
    pub ethertype: u32,
    /// Bits of [`image::essential`] that the packet falls under.
    pub essential: u32,
    reserved: u32,
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
            mode: MODE_RULES,
            reason: 0,
            screen: 0,
            slot: 0,
            source_port: 0,
            age: 0,
            quiet: 0,
            essential: 0,
            ethertype: 0,
            reserved: 0,
        }
    }

    /// All zeros but the mode: for memory that is written before it is read.
    pub const EMPTY: Self = Self::rules(&Query {
        source: Address::v4(0),
        destination: Address::v4(0),
        protocol: 0,
        selector: 0,
    });

    /// The service selector asked about.
    #[inline(always)]
    pub const fn selector(&self) -> u32 {
        self.selector
    }

    /// Whether the flow is IPv6.
    #[inline(always)]
    pub const fn is_v6(&self) -> bool {
        self.destination.is_v6()
    }

    /// Asks about another opener.
    #[inline(always)]
    pub const fn set_source(&mut self, source: Address) {
        self.source = source;
    }

    /// Makes it the question what becomes of a denial of form.
    #[inline(always)]
    pub const fn form(mut self, reason: Reason) -> Self {
        self.mode = MODE_FORM;
        self.reason = reason as u32;
        self
    }

    /// Makes it a pass with this reason, unless the screening denies it.
    #[inline(always)]
    pub const fn pass(mut self, reason: Reason) -> Self {
        self.mode = MODE_SCREEN;
        self.reason = reason as u32;
        self
    }
}

/// Two verdict words, the first in the lower half: see [`Decision::unpack`]. Flags of the image
/// that speak of time stay in the first. Nothing but loads, 10 to 20 of them, whatever the number
/// of rules and members (IPv6: up to 32 trie nodes, in practice 2 to 5).
///
/// Not inlined: in the kernel it is a subprogram, or a judgement would hold a dozen copies (51 000
/// instructions a program instead of 3 000).
#[inline(never)]
pub fn answer<W: Words + ?Sized, T: Time>(image: &W, ask: &Ask, time: &T) -> u64 {
    let source = image::address_class(image, &ask.source);
    let destination = image::address_class(image, &ask.destination);
    answer_of(image, ask, (source, destination), time)
}

/// [`answer`] for who knows most of the question when it is compiled.
#[inline(always)]
pub(crate) fn answer_here<W: Words + ?Sized, T: Time>(image: &W, ask: &Ask, time: &T) -> u64 {
    let source = image::address_class_here(image, &ask.source);
    let destination = image::address_class_here(image, &ask.destination);
    answer_of(image, ask, (source, destination), time)
}

/// The answer about addresses of these classes.
#[inline(always)]
fn answer_of<W: Words + ?Sized, T: Time>(
    image: &W,
    ask: &Ask,
    (source, destination): (u32, u32),
    time: &T,
) -> u64 {
    let essential = ask.essential & image.word(header::ESSENTIALS) != 0;
    let mut observed = 0;
    if ask.screen & (NOT_OWN | NOT_MARTIAN | ARRIVAL | FAILSAFE | FAILSAFE_REPLY) != 0 {
        let reason = screen(image, ask, source, destination, essential);
        if reason == PASSED_BY_FAILSAFE {
            return pack(verdict_word(Outcome::Allowed, Reason::Failsafe), EMPTY);
        }
        if reason != 0 {
            let words = form(image, ask, source, destination, reason);
            let passes = Outcome::from_bits(words as u32).passes();
            if !passes || essential || ask.mode != MODE_RULES {
                return words;
            }
            // What is only observed takes nothing away: the rules may still deny.
            observed = words;
        }
    }
    if essential {
        return pack(verdict_word(Outcome::Allowed, Reason::Essential), EMPTY);
    }
    if ask.mode == MODE_FORM {
        return form(image, ask, source, destination, ask.reason);
    }
    if ask.mode == MODE_SCREEN {
        return pack(Outcome::Allowed as u32 | ask.reason << 8, EMPTY);
    }
    let (row, offset) = image::row_of(image, source, destination);
    let (protocol, selector) = (ask.protocol as u8, ask.selector as u16);
    let v6 = ask.destination.is_v6();
    let service = image::service_class(image, v6, protocol, selector);
    let (mut word, mut subject) = image::verdict_of(image, row, offset, service);
    if word & VERDICT_TIMELINE != 0 {
        (word, subject) = image::at_time(image, subject, time.unix());
        word |= VERDICT_TIMELINE;
    }
    if word & VERDICT_SESSION != 0 {
        let denial = session(image, ask, subject);
        if denial == RENEWED {
            word |= RENEWED;
        } else if denial != 0 {
            return form(image, ask, source, destination, denial);
        }
    }
    if observed != 0 && Outcome::from_bits(word).passes() {
        let timing = word & (VERDICT_TIMELINE | VERDICT_SESSION | RENEWED);
        return observed | timing as u64;
    }
    pack(word, subject)
}

#[inline(always)]
const fn pack(word: u32, subject: u32) -> u64 {
    word as u64 | (subject as u64) << 32
}

/// A denial of form of the packet, which may go against the flow asked about.
#[inline(always)]
fn form<W: Words + ?Sized>(
    image: &W,
    ask: &Ask,
    source: u32,
    destination: u32,
    reason: u32,
) -> u64 {
    let (from, to) = if ask.screen & REVERSED != 0 {
        (destination, source)
    } else {
        (source, destination)
    };
    let (_, offset) = image::row_of(image, from, to);
    let word = image.word(offset.wrapping_add(2)) & 0xff;
    pack(word | reason << 8, image.word(offset.wrapping_add(3)))
}

/// No reason's number.
const PASSED_BY_FAILSAFE: u32 = 0xff;

/// What speaks against a packet before the rules are asked: a [`Reason`], 0 for nothing (the first
/// reason is one of the rules' own), or [`PASSED_BY_FAILSAFE`].
#[inline(always)]
fn screen<W: Words + ?Sized>(
    image: &W,
    ask: &Ask,
    source: u32,
    destination: u32,
    essential: bool,
) -> u32 {
    let opener = image::class_info(image, source);
    let other = image::class_info(image, destination);
    let reversed = ask.screen & REVERSED != 0;
    let (flags, bitmap) = if reversed { other } else { opener };
    if ask.screen & NOT_MARTIAN != 0 {
        let martian = if reversed {
            martian(&ask.destination, &ask.source)
        } else {
            martian(&ask.source, &ask.destination)
        };
        if martian {
            return Reason::Martian as u32;
        }
    }
    // A neighbour with our address must be heard: that is how duplicates are found.
    let neighbour = essential && ask.essential == image::essential::ND;
    if ask.screen & NOT_OWN != 0 && flags & CLASS_OWN != 0 && !neighbour {
        return Reason::Spoofed as u32;
    }
    if essential {
        return 0;
    }
    if failsafe(image, ask, opener.0, other.0) {
        return PASSED_BY_FAILSAFE;
    }
    if ask.screen & ARRIVAL != 0 && !image::may_arrive(image, bitmap, ask.slot) {
        return Reason::Spoofed as u32;
    }
    0
}

/// Whether a failsafe speaks for the flow, or for a flow that the packet is a reply of.
#[inline(always)]
fn failsafe<W: Words + ?Sized>(image: &W, ask: &Ask, opener: u32, other: u32) -> bool {
    let services = image.word(header::SERVICE_FAILSAFES);
    if services == 0 {
        return false;
    }
    let (remote, own, selector, reply) = if ask.screen & FAILSAFE != 0
        && other & CLASS_OWN != 0
        && opener >> CLASS_FAILSAFE_SHIFT != 0
    {
        (opener, other, ask.selector, false)
    } else if ask.screen & FAILSAFE_REPLY != 0 {
        (other, opener, ask.source_port, true)
    } else {
        return false;
    };
    if own & CLASS_OWN == 0 {
        return false;
    }
    let v6 = ask.destination.is_v6();
    let service = image::service_class(image, v6, ask.protocol as u8, selector as u16);
    let mut named = remote >> CLASS_FAILSAFE_SHIFT & image.word(services.wrapping_add(service));
    let slots = image.word(header::SLOT_FAILSAFES);
    // Where the remote end's packets come in, not where replies go out.
    let reversed = ask.screen & REVERSED != 0;
    if slots != 0 && ask.screen & ARRIVAL != 0 && reversed == reply {
        let slot = ask.slot & (image::INTERFACE_SLOTS - 1);
        named &= image.word(slots.wrapping_add(slot));
    }
    named != 0
}

/// Whether a packet has an address that none on a link has (RFC 1122 §3.2.1.3, RFC 4291 §2.5).
/// Hosts without an address ask all others for one from the unspecified address.
#[inline(always)]
fn martian(source: &Address, destination: &Address) -> bool {
    if source.is_v6() {
        let multicast = destination.hi() >> 56 == 0xff;
        let unspecified = source.hi() == 0 && source.lo() == 0;
        return source.hi() >> 56 == 0xff
            || (source.hi() == 0 && source.lo() == 1)
            || (unspecified && !multicast)
            || (destination.hi() == 0 && destination.lo() <= 1);
    }
    let (s, d) = (source.lo() as u32, destination.lo() as u32);
    let everyone = d >> 28 == 0xe || d == u32::MAX;
    s >> 24 == 127
        || s >> 28 == 0xe
        || s == u32::MAX
        || (s == 0 && !everyone)
        || d >> 24 == 127
        || d == 0
}

/// What a rule's bounds say of a flow: a [`Reason`], 0 for nothing, or [`RENEWED`].
#[inline(always)]
fn session<W: Words + ?Sized>(image: &W, ask: &Ask, rule: u32) -> u32 {
    if ask.screen & NO_SESSION != 0 {
        return Reason::NoFlow as u32;
    }
    let sessions = image.word(header::SESSIONS);
    let at = sessions.wrapping_add(rule.wrapping_mul(2));
    let (longest, idle) = (image.word(at), image.word(at.wrapping_add(1)));
    let reopens = ask.screen & REOPENS != 0;
    let idle = match (idle, reopens) {
        (0, false) => u32::MAX,
        // How long a datagram flow is remembered that no rule bounds.
        (0, true) => crate::flow::idle::PORTS as u32,
        (idle, _) => idle,
    };
    if ask.quiet > idle {
        if reopens && ask.screen & NO_RENEWAL == 0 {
            return RENEWED;
        }
        return Reason::Expired as u32;
    }
    if longest != 0 && ask.age > longest {
        return Reason::Expired as u32;
    }
    0
}

/// The verdict words on a frame of which no addresses could be read, or whose ethertype is not IP.
#[inline(always)]
pub fn answer_unreadable<W: Words + ?Sized>(image: &W, ask: &Ask) -> u64 {
    if ask.reason == Reason::Ethertype as u32 {
        if ask.essential & image.word(header::ESSENTIALS) != 0 {
            return pack(verdict_word(Outcome::Allowed, Reason::Essential), EMPTY);
        }
        if listed(image, ask.ethertype) {
            return pack(
                verdict_word(Outcome::Allowed, Reason::EthertypeListed),
                EMPTY,
            );
        }
    }
    let word = image.word(header::FORM_UNREADABLE) & 0xff;
    pack(word | ask.reason << 8, EMPTY)
}

/// Whether the settings list an ethertype.
#[inline(always)]
fn listed<W: Words + ?Sized>(image: &W, ethertype: u32) -> bool {
    // IEEE 802.3: up to 1535 it is a length.
    let wanted = if ethertype < 0x600 {
        image::LLC
    } else {
        ethertype
    };
    let (list, count) = (
        image.word(header::ETHERTYPES),
        image.word(header::ETHERTYPES_COUNT),
    );
    let mut i = 0;
    while i < image::MAX_ETHERTYPES {
        if i < count && image.word(list.wrapping_add(i)) == wanted {
            return true;
        }
        i += 1;
    }
    false
}
