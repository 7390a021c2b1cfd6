//! Outcomes, reasons and hooks. Their numbers are wire format: counter indices and event fields.

/// What happens to a packet.
///
/// `Denied` is 0 so that memory nobody wrote reads as a drop. A word wide, as is [`Reason`]: a
/// structure of them has no padding, which the verifier would refuse to see copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Outcome {
    /// Dropped and recorded.
    Denied = 0,
    /// Passes.
    Allowed = 1,
    /// Judged denied under `mode: observe`: passes and is recorded.
    WouldDeny = 2,
    /// Judged denied under `mode: off`: passes, not recorded.
    Off = 3,
}

/// Number of outcomes.
pub const OUTCOMES: u32 = 4;

impl Outcome {
    /// Every outcome, by number.
    pub const ALL: [Self; 4] = [Self::Denied, Self::Allowed, Self::WouldDeny, Self::Off];

    /// The outcome behind the two low bits of `bits`.
    #[inline(always)]
    pub const fn from_bits(bits: u32) -> Self {
        match bits & 3 {
            0 => Self::Denied,
            1 => Self::Allowed,
            2 => Self::WouldDeny,
            _ => Self::Off,
        }
    }

    /// Whether the packet goes on.
    #[inline(always)]
    pub const fn passes(self) -> bool {
        !matches!(self, Self::Denied)
    }

    /// Stable lower-case name, as in counters.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Allowed => "allowed",
            Self::WouldDeny => "would_deny",
            Self::Off => "off",
        }
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal;)*) => {
        /// Why the outcome is what it is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Reason { $($(#[$doc])* $variant = $number,)* }

        impl Reason {
            /// Every reason, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Stable snake_case name, as in events and counters.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The reason with this number. Unknown numbers, which no image of this ABI holds,
            /// read as the first: a default deny.
            #[inline(always)]
            pub const fn from_bits(bits: u32) -> Self {
                match bits & 0xff {
                    $($number => Self::$variant,)*
                    _ => Self::DefaultDeny,
                }
            }
        }
    };
}

reasons! {
    /// A guarded segment, and no rule allows the flow.
    DefaultDeny = 0, "default_deny";
    /// A deny rule.
    RuleDeny = 1, "rule_deny";
    /// An allow rule.
    RuleAllow = 2, "rule_allow";
    /// No segment guards the flow: `defaults.unsegmented`.
    Unsegmented = 3, "unsegmented";
    /// Part of a flow judged before under this policy.
    Established = 4, "established";
    /// An ICMP error about a tracked flow.
    Related = 5, "related";
    /// A protocol without which the link itself does not work (ARP, ND, DHCP …).
    Essential = 6, "essential";
    /// The flow was admitted by an earlier policy; this one does not allow it.
    Revoked = 7, "revoked";
    /// A TCP packet that can neither open a flow nor belongs to one.
    NoFlow = 8, "no_flow";
    /// An ICMP error about no tracked flow.
    IcmpUnrelated = 9, "icmp_unrelated";
    /// Headers that contradict themselves or the packet's length; v4-mapped addresses.
    Malformed = 10, "malformed";
    /// A later fragment without its first before it, one that overlaps it, or a first one without
    /// the whole transport header.
    Fragment = 11, "fragment";
    /// IPv6 extension headers past the limit, out of place, or with segments left.
    ExtensionHeader = 12, "extension_header";
    /// A third VLAN tag, or a second one with VID 0.
    VlanNested = 13, "vlan_nested";
    /// An ethertype that is neither IP nor essential.
    Ethertype = 14, "ethertype";
    /// No policy image is loaded, or it is not of this ABI.
    NoPolicy = 15, "no_policy";
    /// A source that cannot come from there: this host's own address, or one of a segment that is
    /// bound to other interfaces.
    Spoofed = 16, "spoofed";
    /// An address that no packet on a link has: loopback, a multicast source, an unspecified one.
    Martian = 17, "martian";
    /// A failsafe of the daemon's settings.
    Failsafe = 18, "failsafe";
    /// The flow's rule has expired, or its session has lasted as long as it may.
    Expired = 19, "expired";
    /// A tagged frame that is judged on its VLAN device, which is enforced.
    VlanDevice = 20, "vlan_device";
    /// A socket hook leaves the call to TC.
    Deferred = 21, "deferred";
    /// An ethertype that the daemon's settings list.
    EthertypeListed = 22, "ethertype_listed";
    /// IPv4 options with a source route: the destination is not the final one.
    SourceRoute = 23, "source_route";
}

/// Counter slots reserved for reasons; more than there are, so that new ones keep indices stable.
pub const REASONS: u32 = 32;

/// Where a packet or a system call was judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Hook {
    /// TC, towards the host.
    TcIngress = 0,
    /// TC, out of the host.
    TcEgress = 1,
    /// `connect(2)`.
    Connect = 2,
    /// `sendmsg(2)` on an unconnected datagram socket.
    Sendmsg = 3,
}

/// Number of hooks.
pub const HOOKS: u32 = 4;

impl Hook {
    /// Every hook, by number.
    pub const ALL: [Self; 4] = [
        Self::TcIngress,
        Self::TcEgress,
        Self::Connect,
        Self::Sendmsg,
    ];

    /// The hook with this number.
    #[inline(always)]
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::TcIngress),
            1 => Some(Self::TcEgress),
            2 => Some(Self::Connect),
            3 => Some(Self::Sendmsg),
            _ => None,
        }
    }

    /// Stable snake_case name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TcIngress => "tc_ingress",
            Self::TcEgress => "tc_egress",
            Self::Connect => "connect",
            Self::Sendmsg => "sendmsg",
        }
    }
}

/// What became of the record of a denied or would-be-denied packet. Exactly one per packet, so
/// `denied + would_deny = emitted + suppressed + lost`, per hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Record {
    /// A ring buffer record was written for this packet.
    Emitted = 0,
    /// The packet was added to its flow's count; a later record or scan carries it.
    Suppressed = 1,
    /// The ring buffer was full; the packet is in the counters only.
    Lost = 2,
    /// The flow table refused an entry: the packet passed, its replies may be judged anew.
    FlowInsertFailed = 3,
    /// Suppressed packets whose slot another flow took over while the ring buffer was full: unless
    /// a scan saw them before, no record names their flow. Also among `Suppressed`.
    Displaced = 4,
}

/// Counters per hook besides outcomes.
pub const RECORDS: u32 = 8;

/// Elements of the `COUNTERS` map.
pub const COUNTERS: u32 = HOOKS * OUTCOMES * REASONS + HOOKS * RECORDS;

/// Index of the packet counter of (hook, outcome, reason).
#[inline(always)]
pub const fn packet_counter(hook: Hook, outcome: Outcome, reason: Reason) -> u32 {
    (hook as u32 * OUTCOMES + outcome as u32) * REASONS + reason as u32
}

/// The same of a denial whose reason is a number from a record: past the last one, one of the
/// numbers that no reason has.
#[inline(always)]
pub const fn denied_counter(hook: Hook, reason: u8) -> u32 {
    (hook as u32 * OUTCOMES + Outcome::Denied as u32) * REASONS + (reason as u32 & (REASONS - 1))
}

/// Index of the counter of (hook, record).
#[inline(always)]
pub const fn record_counter(hook: Hook, record: Record) -> u32 {
    HOOKS * OUTCOMES * REASONS + hook as u32 * RECORDS + record as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_dense_and_round_trip() {
        for (number, reason) in (0u32..).zip(Reason::ALL) {
            assert_eq!(*reason as u32, number);
            assert_eq!(Reason::from_bits(number), *reason);
        }
        assert!(Reason::ALL.len() <= REASONS as usize);
        for (number, outcome) in (0u32..).zip(Outcome::ALL) {
            assert_eq!(Outcome::from_bits(number), outcome);
        }
        for (number, hook) in (0u8..).zip(Hook::ALL) {
            assert_eq!(Hook::from_bits(number), Some(hook));
        }
        assert_eq!(Hook::from_bits(4), None);
    }

    #[test]
    fn every_counter_has_its_own_index() {
        extern crate std;
        let mut seen = std::collections::BTreeSet::new();
        for hook in Hook::ALL {
            for outcome in Outcome::ALL {
                for reason in Reason::ALL {
                    assert!(seen.insert(packet_counter(hook, outcome, *reason)));
                }
            }
            for record in [
                Record::Emitted,
                Record::Suppressed,
                Record::Lost,
                Record::FlowInsertFailed,
                Record::Displaced,
            ] {
                assert!(seen.insert(record_counter(hook, record)));
            }
        }
        assert!(seen.iter().all(|i| *i < COUNTERS));
    }
}
