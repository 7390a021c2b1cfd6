//! Odd packets, layer by layer, with the checksums that a receiver looks at.

use std::net::IpAddr;

/// The sum of 16-bit words, folded (RFC 1071).
fn sum(parts: &[&[u8]]) -> u16 {
    let mut total = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            total += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        }
    }
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    !u16::try_from(total).unwrap()
}

pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Writes the checksum of a segment whose own length field may lie.
pub fn checksum(
    segment: &mut [u8],
    at: usize,
    protocol: u8,
    ends: (IpAddr, IpAddr),
    length: usize,
) {
    segment[at..at + 2].fill(0);
    let length = u32::try_from(length).unwrap().to_be_bytes();
    let pseudo = [
        octets(ends.0),
        octets(ends.1),
        length.to_vec(),
        vec![0, 0, 0, protocol],
    ]
    .concat();
    let covered = segment.len().min(u32::from_be_bytes(length) as usize);
    let sum = match sum(&[&pseudo, &segment[..covered]]) {
        0 => 0xffff,
        other => other,
    };
    segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// An ICMP checksum: without pseudo header.
pub fn checksum_icmp(message: &mut [u8]) {
    message[2..4].fill(0);
    let sum = sum(&[message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
}

/// What an IPv4 header says, true or not.
#[derive(Clone, Debug)]
pub struct V4 {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub options: Vec<u8>,
    pub id: u16,
    /// Flags and offset.
    pub fragment: u16,
    pub ttl: u8,
    /// Added to the true header length, in words.
    pub ihl_lie: i8,
    /// Added to the true total length.
    pub total_lie: i16,
    pub bad_checksum: bool,
}

impl V4 {
    pub fn packet(&self, payload: &[u8]) -> Vec<u8> {
        assert_eq!(self.options.len() % 4, 0);
        let header = 20 + self.options.len();
        let words = i8::try_from(header / 4).unwrap() + self.ihl_lie;
        let total = i16::try_from(header + payload.len()).unwrap() + self.total_lie;
        let mut packet = vec![0x40 | u8::try_from(words.clamp(0, 15)).unwrap(), 0];
        packet.extend(total.max(0).to_be_bytes());
        packet.extend(self.id.to_be_bytes());
        packet.extend(self.fragment.to_be_bytes());
        packet.extend([self.ttl, self.protocol, 0, 0]);
        packet.extend(octets(self.source));
        packet.extend(octets(self.destination));
        packet.extend(&self.options);
        packet.extend(payload);
        // Over what the receiver takes for the header.
        let covered = (usize::from(packet[0] & 15) * 4).clamp(20, packet.len());
        let mut sum = sum(&[&packet[..covered]]);
        if self.bad_checksum {
            sum ^= 0x0101;
        }
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet
    }
}

/// What an IPv6 header says, true or not.
#[derive(Clone, Debug)]
pub struct V6 {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Of the first header behind it.
    pub next: u8,
    pub hop_limit: u8,
    /// Added to the true length.
    pub length_lie: i16,
}

impl V6 {
    pub fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let length = i16::try_from(payload.len()).unwrap() + self.length_lie;
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend(length.max(0).to_be_bytes());
        packet.extend([self.next, self.hop_limit]);
        packet.extend(octets(self.source));
        packet.extend(octets(self.destination));
        packet.extend(payload);
        packet
    }
}

/// An IPv6 extension header of eight bytes: its number, and its bytes but the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header(pub u8, pub [u8; 7]);

impl Header {
    pub const HOP_BY_HOP: Self = Self(0, [0, 1, 4, 0, 0, 0, 0]);
    pub const OPTIONS: Self = Self(60, [0, 1, 4, 0, 0, 0, 0]);

    pub fn routing(kind: u8, left: u8) -> Self {
        Self(43, [0, kind, left, 0, 0, 0, 0])
    }

    /// Offset in units of eight bytes.
    pub fn fragment(offset: u16, more: bool, id: u32) -> Self {
        let [a, b] = (offset << 3 | u16::from(more)).to_be_bytes();
        let [c, d, e, f] = id.to_be_bytes();
        Self(44, [0, a, b, c, d, e, f])
    }
}

/// Headers in front of a payload: the number of the first, and all bytes.
pub fn chain(headers: &[Header], protocol: u8, payload: &[u8]) -> (u8, Vec<u8>) {
    let (mut next, mut bytes) = (protocol, payload.to_vec());
    for Header(number, rest) in headers.iter().rev() {
        bytes = [&[next][..], rest, &bytes].concat();
        next = *number;
    }
    (next, bytes)
}
