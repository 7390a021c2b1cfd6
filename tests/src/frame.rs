//! Frames, built from their parts. Checksums are left at zero: nothing under test reads them.

use std::net::IpAddr;

pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;
pub const RST: u8 = 0x04;
pub const FIN: u8 = 0x01;

/// An Ethernet header with this ethertype.
pub fn ethernet(ethertype: u16) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    frame.extend(ethertype.to_be_bytes());
    frame
}

/// An IP header (hop limit 64) in front of `payload`.
pub fn ip(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            let total = u16::try_from(20 + payload.len()).unwrap();
            let mut packet = vec![0x45, 0];
            packet.extend(total.to_be_bytes());
            packet.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
            packet.extend(s.octets());
            packet.extend(d.octets());
            packet.extend(payload);
            packet
        }
        (IpAddr::V6(s), IpAddr::V6(d)) => {
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend(s.octets());
            packet.extend(d.octets());
            packet.extend(payload);
            packet
        }
        _ => panic!("mixed families"),
    }
}

/// The frame of an IP packet.
pub fn frame(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(if source.is_ipv4() { 0x0800 } else { 0x86dd });
    frame.extend(ip(source, destination, protocol, payload));
    frame
}

/// A TCP header with these flags.
pub fn tcp(source_port: u16, destination_port: u16, flags: u8) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(source_port.to_be_bytes());
    header.extend(destination_port.to_be_bytes());
    header.extend([0; 8]);
    header.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    header
}

/// A UDP header and four bytes of data.
pub fn udp(source_port: u16, destination_port: u16) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(source_port.to_be_bytes());
    header.extend(destination_port.to_be_bytes());
    header.extend([0, 12, 0, 0, 1, 2, 3, 4]);
    header
}

/// An ICMP or ICMPv6 message of eight bytes.
pub fn icmp(kind: u8, code: u8, identifier: u16) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend(identifier.to_be_bytes());
    message.extend([0, 1]);
    message
}

/// VLAN tags (tag protocol, tag control information) put behind the addresses.
pub fn tagged(frame: &[u8], tags: &[(u16, u16)]) -> Vec<u8> {
    let mut out = frame[..12].to_vec();
    for (protocol, tci) in tags {
        out.extend(protocol.to_be_bytes());
        out.extend(tci.to_be_bytes());
    }
    out.extend(&frame[12..]);
    out
}

/// The IPv4 frame with `words` words of NOP options.
pub fn with_options(frame: &[u8], words: u8) -> Vec<u8> {
    let mut out = frame[..34].to_vec();
    out.extend(vec![1; usize::from(words) * 4]);
    out.extend(&frame[34..]);
    out[14] = 0x45 + words;
    let total = u16::try_from(out.len() - 14).unwrap();
    out[16..18].copy_from_slice(&total.to_be_bytes());
    out
}

/// The IPv4 frame as a fragment: offset in units of eight bytes.
pub fn as_fragment(frame: &[u8], offset: u16, more: bool) -> Vec<u8> {
    let mut out = frame.to_vec();
    let field = offset | if more { 0x2000 } else { 0 };
    out[20..22].copy_from_slice(&field.to_be_bytes());
    out
}

/// An IPv6 extension header.
#[derive(Clone, Copy, Debug)]
pub enum Extension {
    HopByHop,
    Options,
    /// Segments left.
    Routing(u8),
    /// Offset in units of eight bytes, and whether more fragments follow.
    Fragment(u16, bool),
}

/// A payload behind extension headers of eight bytes each, and the protocol of the first.
pub fn extended(headers: &[Extension], protocol: u8, payload: &[u8]) -> (u8, Vec<u8>) {
    let mut next = protocol;
    let mut bytes = payload.to_vec();
    for header in headers.iter().rev() {
        let (number, mut all) = match *header {
            Extension::HopByHop => (0, vec![next, 0, 1, 4, 0, 0, 0, 0]),
            Extension::Options => (60, vec![next, 0, 1, 4, 0, 0, 0, 0]),
            Extension::Routing(left) => (43, vec![next, 0, 0, left, 0, 0, 0, 0]),
            Extension::Fragment(offset, more) => {
                let [a, b] = (offset << 3 | u16::from(more)).to_be_bytes();
                (44, vec![next, 0, a, b, 0, 0, 0, 7])
            }
        };
        all.extend(bytes);
        bytes = all;
        next = number;
    }
    (next, bytes)
}

/// An ICMP or ICMPv6 error of this type that quotes a packet.
pub fn icmp_error(kind: u8, code: u8, quoted: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
    message.extend(quoted);
    message
}
