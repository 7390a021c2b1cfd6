//! Where a candidate policy, the shadow, says something else of a packet than the live one: what
//! the kernel counts, and under which key.
//!
//! A packet differs if it would fare otherwise: pass, pass and be recorded, or be dropped. That
//! another rule would let it pass is no difference. Plain words without padding, as all that
//! crosses the boundary; must not know: where it is counted.

use core::mem::size_of;

use crate::{
    case::Case,
    decide::{Decision, verdict_word},
    verdict::{Outcome, Reason},
};

/// What a policy says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct Said {
    /// Generation of its image; 0: there was none.
    pub generation: u32,
    /// [`Outcome`], `| Reason << 8`.
    verdict: u32,
    /// As in [`Decision`].
    pub rule: u32,
    /// As in [`Decision`].
    pub segment: u32,
}

impl Said {
    /// What the image of a generation decided.
    #[inline(always)]
    pub const fn of(decision: &Decision, generation: u32) -> Self {
        Self {
            generation,
            verdict: verdict_word(decision.outcome, decision.reason),
            rule: decision.rule,
            segment: decision.segment,
        }
    }

    /// Nothing: of no generation.
    pub const NOTHING: Self = Self {
        generation: 0,
        verdict: 0,
        rule: 0,
        segment: 0,
    };

    /// The verdict.
    #[inline(always)]
    pub const fn outcome(&self) -> Outcome {
        Outcome::from_bits(self.verdict)
    }

    /// Why.
    #[inline(always)]
    pub const fn reason(&self) -> Reason {
        Reason::from_bits(self.verdict >> 8)
    }
}

/// The key of a count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct DifferenceKey {
    /// What judged.
    pub live: Said,
    /// What would have judged.
    pub shadow: Said,
    /// [`Hook`](crate::verdict::Hook).
    pub hook: u32,
}

impl DifferenceKey {
    /// Counts the packets that found no room under a key of their own.
    pub const REST: Self = Self {
        live: Said::NOTHING,
        shadow: Said::NOTHING,
        hook: 0,
    };

    /// All of it, in the order of its fields.
    pub const fn words(&self) -> [u32; 9] {
        let (l, s) = (&self.live, &self.shadow);
        [
            l.generation,
            l.verdict,
            l.rule,
            l.segment,
            s.generation,
            s.verdict,
            s.rule,
            s.segment,
            self.hook,
        ]
    }

    /// The key of these [`words`](Self::words).
    pub const fn from_words(w: [u32; 9]) -> Self {
        const fn said(generation: u32, verdict: u32, rule: u32, segment: u32) -> Said {
            Said {
                generation,
                verdict,
                rule,
                segment,
            }
        }
        Self {
            live: said(w[0], w[1], w[2], w[3]),
            shadow: said(w[4], w[5], w[6], w[7]),
            hook: w[8],
        }
    }
}

/// A packet that differed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Example {
    /// As in [`Case`], like all that follow.
    pub source: [u32; 4],
    /// Where to.
    pub destination: [u32; 4],
    /// Ports.
    pub ports: u32,
    /// Selector, protocol, TCP flags.
    pub service: u32,
    /// Ethertype, family, kind.
    pub shape: u32,
    /// The interface.
    pub ifindex: u32,
    /// [`Case::hash`], written last: CPUs that write at once leave a mixture that does not match.
    pub check: u32,
    /// Always 0.
    pub reserved: u32,
}

impl Example {
    /// None yet.
    pub const NONE: Self = Self {
        source: [0; 4],
        destination: [0; 4],
        ports: 0,
        service: 0,
        shape: 0,
        ifindex: 0,
        check: 0,
        reserved: 0,
    };

    /// The packet, with its key's hook; `None`: there is none, or it was being written.
    pub fn case(&self, hook: u32) -> Option<Case> {
        let mut case = Case::EMPTY;
        case.source = self.source;
        case.destination = self.destination;
        case.ports = self.ports;
        case.service = self.service;
        case.shape = self.shape;
        case.ifindex = self.ifindex;
        case.hook = hook;
        (*self != Self::NONE && case.hash() == self.check).then_some(case)
    }
}

/// A count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Difference {
    /// Packets; calls where the hook is a socket's.
    pub packets: u64,
    /// Nanoseconds since boot of the latest.
    pub time: u64,
    /// The first.
    pub first: Example,
    /// The latest.
    pub last: Example,
}

/// Keys that are counted apart.
pub const DIFFERENCES: usize = 4096;

/// Whether a packet would fare otherwise.
#[inline(always)]
pub const fn differ(live: Outcome, shadow: Outcome) -> bool {
    fare(live) != fare(shadow)
}

#[inline(always)]
const fn fare(outcome: Outcome) -> u32 {
    match outcome {
        Outcome::Allowed | Outcome::Off => 0,
        Outcome::WouldDeny => 1,
        Outcome::Denied => 2,
    }
}

const _: () = {
    assert!(size_of::<DifferenceKey>() == 36);
    assert!(size_of::<Example>() == 56 && size_of::<Difference>() == 128);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixture_of_two_packets_is_no_example() {
        let example = |port: u32| {
            let mut case = Case::EMPTY;
            (case.ports, case.source[3]) = (port, port * 3);
            Example {
                source: case.source,
                ports: case.ports,
                shape: case.shape,
                check: case.hash(),
                ..Example::NONE
            }
        };
        let (one, two) = (example(7), example(8));
        assert_eq!(one.case(0).map(|case| case.ports), Some(7));
        let mixed = Example {
            source: two.source,
            ..one
        };
        assert!(mixed.case(0).is_none() && Example::NONE.case(0).is_none());
    }

    #[test]
    fn who_lets_a_packet_pass_is_no_difference() {
        use Outcome::{Allowed, Denied, Off, WouldDeny};
        assert!(!differ(Allowed, Off) && !differ(Denied, Denied));
        for (one, other) in [(Allowed, Denied), (Off, WouldDeny), (WouldDeny, Denied)] {
            assert!(differ(one, other) && differ(other, one));
        }
    }
}
