//! What crosses the boundary between kernel and userspace, byte for byte: map keys and values,
//! event records. No padding, no enum, no bool, no Option; every layout is asserted.

use core::mem::{align_of, offset_of, size_of};

use crate::verdict::{Hook, Outcome, Reason};

/// The key of a flow, the same for both directions: two ends in a canonical order. A table of
/// IPv4 flows keeps four of its words, see [`FlowKey::pair4`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C, align(8))]
pub struct FlowKey {
    low: [u32; 4],
    high: [u32; 4],
    /// Low end's port in the upper half. ICMP: identifier, type of the request.
    ports: u32,
    /// `ifindex` of link-local addresses (0 otherwise) `<< 9 | v6 << 8 | protocol`.
    rest: u32,
}

impl FlowKey {
    /// A key from its parts; ports in host byte order.
    #[inline(always)]
    pub const fn new(
        low: [u32; 4],
        high: [u32; 4],
        low_port: u16,
        high_port: u16,
        protocol: u8,
        v6: bool,
        scope: u32,
    ) -> Self {
        Self {
            low,
            high,
            ports: (low_port as u32) << 16 | high_port as u32,
            rest: scope << 9 | (v6 as u32) << 8 | protocol as u32,
        }
    }

    /// Whether the flow is IPv6.
    #[inline(always)]
    pub const fn is_v6(&self) -> bool {
        self.rest & 0x100 != 0
    }

    /// The address of the low end, or of the high one.
    #[inline(always)]
    pub const fn end(&self, low: bool) -> [u32; 4] {
        if low { self.low } else { self.high }
    }

    /// Two words of an IPv4 key as a table compares them, `index` below 2.
    #[inline(always)]
    pub const fn pair4(&self, index: u32) -> u64 {
        match index {
            0 => pair(self.low[3], self.high[3]),
            _ => pair(self.ports, self.rest),
        }
    }

    /// Two words of an IPv6 key as a table compares them, `index` below 5.
    #[inline(always)]
    pub const fn pair6(&self, index: u32) -> u64 {
        match index {
            0 => pair(self.low[0], self.low[1]),
            1 => pair(self.low[2], self.low[3]),
            2 => pair(self.high[0], self.high[1]),
            3 => pair(self.high[2], self.high[3]),
            _ => pair(self.ports, self.rest),
        }
    }

    /// The key of these words.
    #[inline(always)]
    pub const fn from_pairs4(pairs: [u64; 2]) -> Self {
        Self {
            low: [0, 0, 0, pairs[0] as u32],
            high: [0, 0, 0, (pairs[0] >> 32) as u32],
            ports: pairs[1] as u32,
            rest: (pairs[1] >> 32) as u32,
        }
    }

    /// The key of these words.
    #[inline(always)]
    pub const fn from_pairs6(p: [u64; 5]) -> Self {
        Self {
            low: [
                p[0] as u32,
                (p[0] >> 32) as u32,
                p[1] as u32,
                (p[1] >> 32) as u32,
            ],
            high: [
                p[2] as u32,
                (p[2] >> 32) as u32,
                p[3] as u32,
                (p[3] >> 32) as u32,
            ],
            ports: p[4] as u32,
            rest: (p[4] >> 32) as u32,
        }
    }
}

#[inline(always)]
const fn pair(first: u32, second: u32) -> u64 {
    first as u64 | (second as u64) << 32
}

/// A flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FlowEntry {
    /// Jiffies of the last packet that passed.
    pub last_seen: u64,
    /// Generation of the policy that admitted the flow.
    pub generation: u32,
    /// Rule that admitted it, or `u32::MAX`.
    pub rule: u32,
    /// See `flow::{OPENER_IS_LOW, REPLIED, CLOSING, TIMED, SESSION}`.
    pub flags: u32,
    /// Selector of the opener's query, which ports alone do not give (ICMP).
    pub selector: u32,
    /// Boot second in which the session began; meaningful with `flow::SESSION`.
    pub opened: u32,
    /// Boot second of the last judgement; meaningful with `flow::TIMED`.
    pub checked: u32,
    /// Interface that packets of the high end, of the low end, last came in at; 0: none did.
    pub arrived: [u32; 2],
}

impl FlowEntry {
    /// All zeros.
    pub const EMPTY: Self = Self {
        last_seen: 0,
        generation: 0,
        rule: 0,
        flags: 0,
        selector: 0,
        opened: 0,
        checked: 0,
        arrived: [0; 2],
    };
}

/// The key of a fragmented packet on its way through a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FragmentKey {
    source: [u32; 4],
    destination: [u32; 4],
    id: u32,
    /// `hook << 16 | v6 << 8 | protocol` (IPv6: protocol 0, as receivers reassemble).
    rest: u32,
}

impl FragmentKey {
    /// A key from its parts. `protocol` is 0 for IPv6.
    #[inline(always)]
    pub const fn new(
        source: [u32; 4],
        destination: [u32; 4],
        id: u32,
        protocol: u8,
        v6: bool,
        egress: bool,
    ) -> Self {
        Self {
            source,
            destination,
            id,
            rest: (egress as u32) << 16 | (v6 as u32) << 8 | protocol as u32,
        }
    }
}

/// What later fragments of a packet whose first one passed need to be judged like it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FragmentEntry {
    /// Jiffies when the first fragment passed.
    pub seen: u64,
    /// Source port `<< 16 |` destination port.
    pub ports: u32,
    /// Selector `<< 16 |` protocol `<< 8 |` TCP flags.
    pub service: u32,
    /// How the transport takes part in flows, see `packet::Kind`.
    pub kind: u32,
    /// Bytes that the first fragment covers.
    pub covered: u32,
}

/// What the daemon tells the programs, in their `.bss.control`: a load away, not a look-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Control {
    /// Unix seconds that rules already saw: their time never goes back behind it, so that a rule
    /// which expired stays expired when the clock is set back.
    pub unix_floor: u64,
    /// Unix time of the boot in nanoseconds: what `CLOCK_BOOTTIME` lacks to Unix time.
    pub boot_unix_ns: u64,
    /// Network namespace whose processes the socket hooks may refuse (`SO_NETNS_COOKIE`).
    pub netns_cookie: u64,
    /// Kernel ticks a second.
    pub hz: u32,
    /// See the `CONTROL_*` bits.
    pub flags: u32,
    /// Generation of the live image for the short way, 0 while there is none or another is put in
    /// its place: then no packet passes for what an entry says, each is judged by an image.
    pub generation: u32,
    /// Generation of the image to go back to.
    pub previous: u32,
    /// The tick (jiffies) from which the programs judge by the previous image, `slot::PREVIOUS`, and
    /// no longer by the live one; [`NO_DEADLINE`] while none is on trial.
    pub deadline: u64,
}

/// No image is on trial.
pub const NO_DEADLINE: u64 = u64::MAX;

/// The socket hooks refuse; without it they attribute only.
pub const CONTROL_SOCKET_REFUSE: u32 = 1;
/// Rare debug messages through aya-log.
pub const CONTROL_DEBUG: u32 = 1 << 1;
/// The image in `slot::SHADOW` is asked as well: every packet that no entry speaks for goes the long
/// way.
pub const CONTROL_SHADOW: u32 = 1 << 2;

/// The value of `INTERFACES`, by ifindex.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Interface {
    /// See the `INTERFACE_*` bits.
    pub flags: u32,
    /// Its number in the image's interface bitmaps, 1 to 1023; 0: in none.
    pub slot: u32,
}

/// Elements of `ETHERNET`; a power of two.
pub const ETHERNET_LINKS: u32 = 4096;

/// Packets start with the IP header (tun, GRE).
pub const INTERFACE_L3: u32 = 1;

/// Bit 63: 802.1ad; then ifindex `<< 12 | VID`: the key of `VLANS`.
#[inline(always)]
pub const fn vlan_key(ifindex: u32, service_tag: bool, vid: u16) -> u64 {
    (service_tag as u64) << 63 | (ifindex as u64) << 12 | (vid & 0xfff) as u64
}

/// Value of `VLANS`: packets with this tag are judged on the VLAN device, which is enforced.
pub const VLAN_JUDGED_THERE: u32 = 1;

/// A process, as the socket hooks saw it: the value of `SOCKETS`, by socket cookie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Process {
    /// cgroup v2 id (inode number).
    pub cgroup: u64,
    /// Process (thread group) id in the initial pid namespace; 0 means unknown.
    pub pid: u32,
    /// User id in the initial user namespace.
    pub uid: u32,
    /// Command name, NUL padded.
    pub comm: [u8; 16],
}

/// A record of the ring buffer: a denied or would-be-denied packet or call, with its count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// Nanoseconds since boot, suspend included (`CLOCK_BOOTTIME`).
    pub time: u64,
    /// Packets of this flow and verdict so far, this one included, since `epoch` began. A
    /// difference between two records (or scans) of one epoch is a number of packets, so a record
    /// that was lost is made good by the next.
    pub total: u64,
    /// Socket cookie, 0 if none.
    pub cookie: u64,
    /// The process, `pid` 0 if unknown.
    pub process: Process,
    /// Source, big-endian words as numbers; IPv4 in the last.
    pub source: [u32; 4],
    /// Destination, likewise.
    pub destination: [u32; 4],
    /// Rule, or `u32::MAX`.
    pub rule: u32,
    /// Guarding segment, or `u32::MAX`.
    pub segment: u32,
    /// Generation of the image that judged.
    pub generation: u32,
    /// Interface, 0 for the socket hooks.
    pub ifindex: u32,
    /// Aggregation slot the packet was counted in; `u32::MAX` for the socket hooks.
    pub slot: u32,
    /// CPU of the slot.
    pub cpu: u32,
    /// Times the slot was taken over by another flow before this one.
    pub epoch: u32,
    /// Source port, ICMP identifier, or 0.
    pub source_port: u16,
    /// Destination port, ICMP identifier, or 0.
    pub destination_port: u16,
    /// See [`crate::decide::Query::selector`].
    pub selector: u16,
    /// Ethertype after VLAN tags, 0 if not read.
    pub ethertype: u16,
    /// IP protocol.
    pub protocol: u8,
    /// 4, 6, or 0 when the addresses were not read.
    pub family: u8,
    /// [`Hook`].
    pub hook: u8,
    /// [`Outcome`].
    pub outcome: u8,
    /// [`Reason`].
    pub reason: u8,
    /// TCP flags.
    pub tcp_flags: u8,
    /// Not 0: the image alone denied the packet, and would deny the next one like it.
    pub lasting: u8,
    /// Always 0.
    pub reserved: [u8; 5],
}

impl Event {
    /// The hook, or `None` for a number of another ABI.
    pub fn hook(&self) -> Option<Hook> {
        Hook::from_bits(self.hook)
    }

    /// The outcome.
    pub fn outcome(&self) -> Outcome {
        Outcome::from_bits(u32::from(self.outcome))
    }

    /// The reason.
    pub fn reason(&self) -> Reason {
        Reason::from_bits(u32::from(self.reason))
    }
}

/// One slot of the per-CPU aggregation table `DENIED`. A reader that finds `epoch` and
/// `epoch_end` equal before and after has a consistent copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct DeniedSlot {
    /// Times the slot was taken over; written before the rest.
    pub epoch: u32,
    /// Copy of `epoch`, written after the rest; 0 in a slot never used.
    pub epoch_end: u32,
    /// Jiffies of the last record.
    pub emitted_at: u64,
    /// Packets since the last record of this slot was written.
    pub pending: u32,
    /// How many of them were counted as lost; the others as suppressed.
    pub pending_lost: u32,
    /// The flow and its `total`, as of the slot's first packet but for `total` and `time`.
    pub event: Event,
}

/// Slots of `DENIED` per CPU; a power of two.
pub const DENIED_SLOTS: u32 = 4096;

/// Places of `STEPS`: the programs that go on where the attached ones settle nothing.
pub mod step {
    /// A plain packet that no entry speaks for, coming in.
    pub const NEW_INGRESS: u32 = 0;
    /// The same, going out.
    pub const NEW_EGRESS: u32 = 1;
    /// Everything else that comes in.
    pub const LONG_INGRESS: u32 = 2;
    /// The same, going out.
    pub const LONG_EGRESS: u32 = 3;
    /// How many there are.
    pub const COUNT: u32 = 4;
}

/// Slots of `POLICY`.
pub mod slot {
    /// The image that judges.
    pub const LIVE: u32 = 0;
    /// The image to go back to, while the live one is on trial.
    pub const PREVIOUS: u32 = 1;
    /// A candidate that is evaluated beside the live one.
    pub const SHADOW: u32 = 2;
    /// Number of slots.
    pub const COUNT: u32 = 3;
}

const _: () = {
    assert!(size_of::<FlowKey>() == 40 && align_of::<FlowKey>() == 8);
    assert!(size_of::<FlowEntry>() == 40 && align_of::<FlowEntry>() == 8);
    assert!(offset_of!(FlowEntry, generation) == 8 && offset_of!(FlowEntry, flags) == 16);
    assert!(size_of::<FragmentKey>() == 40 && size_of::<FragmentEntry>() == 24);
    assert!(size_of::<Control>() == 48 && offset_of!(Control, hz) == 24);
    assert!(offset_of!(Control, deadline) == 40);
    assert!(size_of::<Interface>() == 8);
    assert!(size_of::<Process>() == 32 && offset_of!(Process, comm) == 16);
    assert!(size_of::<Event>() == 136 && align_of::<Event>() == 8);
    assert!(offset_of!(Event, process) == 24 && offset_of!(Event, source) == 56);
    assert!(offset_of!(Event, rule) == 88 && offset_of!(Event, source_port) == 116);
    assert!(offset_of!(Event, protocol) == 124 && offset_of!(Event, reserved) == 131);
    assert!(size_of::<DeniedSlot>() == 160 && offset_of!(DeniedSlot, event) == 24);
};
