//! A packet and its verdict in plain words: what records are made of, and what the middle way
//! hands from step to step.
//!
//! Without padding and without references, so that the kernel passes it by address from one
//! function to another.

use crate::{
    decide::{Decision, verdict_word},
    packet::{Kind, Tuple, tcp},
    verdict::{Hook, Outcome, Reason},
    wire::DeniedSlot,
};

/// A packet at a hook, and what became of it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Case {
    /// Jiffies.
    pub now: u64,
    /// Generation of the image that judged.
    pub generation: u32,
    /// As in [`Tuple`].
    pub source: [u32; 4],
    /// As in [`Tuple`].
    pub destination: [u32; 4],
    /// Source port `<< 16 |` destination port.
    pub ports: u32,
    /// Selector `<< 16 |` protocol `<< 8 |` TCP flags.
    pub service: u32,
    /// Ethertype `<< 16 |` family (4, 6, 0: addresses not read) `<< 8 |` [`Kind`].
    pub shape: u32,
    /// The interface.
    pub ifindex: u32,
    /// Its slot in the image's bitmaps.
    pub slot: u32,
    /// [`Hook`].
    pub hook: u32,
    /// [`Outcome`], `| Reason << 8`, [`LASTING`].
    verdict: u32,
    /// As in [`Decision`].
    pub rule: u32,
    /// As in [`Decision`].
    pub segment: u32,
}

/// See [`Case::lasts`].
const LASTING: u32 = 1 << 16;

const _: () = assert!(size_of::<Case>() == 80 && align_of::<Case>() == 8);

impl Case {
    /// Nothing.
    pub const EMPTY: Self = Self::new(&Tuple::EMPTY, 0, 0, Hook::TcIngress, 0);

    /// A packet that nobody has judged.
    #[inline(always)]
    pub const fn new(tuple: &Tuple, ethertype: u16, family: u8, hook: Hook, now: u64) -> Self {
        Self {
            now,
            generation: 0,
            source: tuple.source,
            destination: tuple.destination,
            ports: (tuple.source_port as u32) << 16 | tuple.destination_port as u32,
            service: (tuple.selector as u32) << 16
                | (tuple.protocol as u32) << 8
                | tuple.tcp_flags as u32,
            shape: (ethertype as u32) << 16 | (family as u32) << 8 | tuple.kind as u32,
            ifindex: 0,
            slot: 0,
            hook: hook as u32,
            verdict: verdict_word(Outcome::Denied, Reason::NoPolicy),
            rule: u32::MAX,
            segment: u32::MAX,
        }
    }

    /// The same with the shape of a plain packet: IP without tags, TCP or UDP.
    #[inline(always)]
    #[must_use]
    pub const fn plain(mut self, v6: bool) -> Self {
        let kind = if self.protocol() == 6 {
            Kind::Tcp
        } else {
            Kind::Ports
        };
        let (ethertype, family) = if v6 { (0x86dd, 6) } else { (0x0800, 4) };
        self.shape = ethertype << 16 | family << 8 | kind as u32;
        self
    }

    /// The addresses and the transport.
    #[inline(always)]
    pub const fn tuple(&self) -> Tuple {
        Tuple {
            source: self.source,
            destination: self.destination,
            source_port: self.source_port(),
            destination_port: self.destination_port(),
            protocol: self.protocol(),
            v6: self.family() == 6,
            kind: Kind::from_bits(self.shape & 0xff),
            tcp_flags: self.service as u8,
            selector: self.selector(),
        }
    }

    /// Of the packet.
    #[inline(always)]
    pub const fn source_port(&self) -> u16 {
        (self.ports >> 16) as u16
    }

    /// Of the packet.
    #[inline(always)]
    pub const fn destination_port(&self) -> u16 {
        self.ports as u16
    }

    /// IP protocol.
    #[inline(always)]
    pub const fn protocol(&self) -> u8 {
        (self.service >> 8) as u8
    }

    /// As in [`Tuple`].
    #[inline(always)]
    pub const fn selector(&self) -> u16 {
        (self.service >> 16) as u16
    }

    /// TCP flags, else 0.
    #[inline(always)]
    pub const fn tcp_flags(&self) -> u8 {
        self.service as u8
    }

    /// After VLAN tags, 0 if not read.
    #[inline(always)]
    pub const fn ethertype(&self) -> u16 {
        (self.shape >> 16) as u16
    }

    /// 4, 6, or 0 when the addresses were not read.
    #[inline(always)]
    pub const fn family(&self) -> u8 {
        (self.shape >> 8) as u8
    }

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

    /// Whether the image alone denied the packet, whatever the time; then it denies the next one
    /// like it as long as it is live and no flow of it has come to be. Denials of form are none of
    /// these: they may be about what the short way does not look at.
    #[inline(always)]
    pub const fn lasts(&self) -> bool {
        self.verdict & LASTING != 0
    }

    /// Writes the verdict of an image, and whether it [lasts](Self::lasts).
    #[inline(always)]
    pub const fn decided(&mut self, decision: &Decision, generation: u32, lasting: bool) {
        self.generation = generation;
        self.verdict = verdict_word(decision.outcome, decision.reason);
        if lasting {
            self.verdict |= LASTING;
        }
        self.rule = decision.rule;
        self.segment = decision.segment;
    }

    /// Where it is counted: any spread will do, a collision costs a record more, not a count. Hook
    /// and interface take part: a forwarded packet that is only observed comes by twice. TCP flags
    /// because the reason follows from them.
    #[inline(always)]
    pub const fn hash(&self) -> u32 {
        const TURNS: u32 = (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) as u32;
        let (s, d) = (&self.source, &self.destination);
        let service = self.service & (0xff00 | TURNS) | (self.shape & 0xff) << 16;
        let mut h = s[3] ^ s[2].rotate_left(7) ^ s[1].rotate_left(13);
        h = h.wrapping_mul(0x9e37_79b1) ^ d[3] ^ d[2].rotate_left(9);
        h = h.wrapping_mul(0x85eb_ca77) ^ self.ports;
        h = h.wrapping_mul(0xc2b2_ae3d) ^ service ^ self.service >> 16;
        h = h.wrapping_mul(0x27d4_eb2f) ^ (self.ifindex << 2 | self.hook);
        h ^ (h >> 15)
    }

    /// Whether the slot's packets are like this one but for the verdict. The source port takes
    /// part: TCP and UDP clients take a new one for each attempt, and each attempt is worth a
    /// record of its own.
    #[inline(always)]
    pub fn is_in(&self, slot: &DeniedSlot) -> bool {
        let event = &slot.event;
        let upper = |a: &[u32; 4], b: &[u32; 4]| a[0] ^ b[0] | a[1] ^ b[1] | a[2] ^ b[2];
        // The fields lie side by side: two loads, not six.
        let ports = u32::from(event.source_port) | u32::from(event.destination_port) << 16;
        let form = u32::from(event.selector) | u32::from(event.ethertype) << 16;
        let kind = u32::from(event.protocol) | u32::from(event.family) << 8;
        let mut differs = ports.rotate_left(16) ^ self.ports;
        differs |= form ^ (u32::from(self.selector()) | u32::from(self.ethertype()) << 16);
        differs |= kind ^ (u32::from(self.protocol()) | u32::from(self.family()) << 8);
        differs |= u32::from(event.hook) ^ self.hook;
        differs |= event.generation ^ self.generation;
        differs |= event.ifindex ^ self.ifindex;
        differs |= event.source[3] ^ self.source[3];
        differs |= event.destination[3] ^ self.destination[3];
        if self.family() != 4 {
            differs |= upper(&event.source, &self.source);
            differs |= upper(&event.destination, &self.destination);
        }
        differs == 0 && slot.epoch_end != 0
    }
}
