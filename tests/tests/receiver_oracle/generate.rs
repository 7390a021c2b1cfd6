//! The cases: odd frames by number. The same number is the same case on every run; the round only
//! changes what reassembly goes by.

use std::net::IpAddr;

use crate::packet::{Header, V4, V6, chain, checksum, checksum_icmp};

/// In front of each case's number.
pub const MARK: [u8; 4] = *b"EORC";
pub const UDP_PORTS: [u16; 2] = [4444, 5555];
pub const TCP_PORTS: [u16; 2] = [8080, 9090];
/// Protocols that raw sockets listen for.
pub const RAW_PROTOCOLS: [u8; 13] = [1, 4, 6, 33, 41, 47, 50, 51, 58, 59, 132, 136, 253];
pub const SENDER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x77];
pub const RECEIVER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// What is odd about a case.
#[derive(Clone, Debug, PartialEq)]
pub enum Odd {
    Source(IpAddr),
    Destination(IpAddr),
    /// IPv4 options.
    Options(Vec<u8>),
    Ihl(i8),
    TotalLength(i16),
    HeaderChecksum,
    HopLimit(u8),
    /// Reserved or "do not fragment" bit.
    Flags(u16),
    Fragments(Sent),
    /// IPv6 extension headers, all told, and those behind the fragment header.
    Headers(usize, usize),
    RoutingLeft,
    LateHopByHop,
    /// Option type of a destination option.
    UnknownOption(u8),
    /// An extension header that takes so many of those behind it for its own.
    HeaderLength(usize),
    Atomic,
    Tags(Vec<(u16, u16)>),
    Mac(u8),
    /// Not that of the packet.
    Ethertype(u16),
    Padding(usize),
    UdpLength(usize),
    UdpChecksum,
    TcpFlags(u8),
    /// What the header says of its length, and whether the segment has as much.
    TcpOffset(u8, bool),
    /// Nothing but a mark behind the network header.
    NoTransport,
}

/// A datagram in pieces.
#[derive(Clone, Debug, PartialEq)]
pub struct Sent {
    pub how: Pieces,
    /// Byte ranges in the order in which they are sent, and whether the bytes of one are others
    /// than the datagram's.
    pub pieces: Vec<(usize, usize, bool)>,
    pub length: usize,
    /// Bytes that the headers of extension and transport take of it.
    pub header: usize,
    /// Where the datagram goes, if it has ports.
    pub port: Option<u16>,
}

/// How the pieces of a datagram lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pieces {
    InOrder,
    Reversed,
    /// Eight bytes each.
    Tiny,
    Duplicate,
    /// One byte range twice, with other bytes.
    Overlap,
    /// One is never sent.
    Missing,
}

/// Frames to be sent one after the other.
#[derive(Clone, Debug)]
pub struct Case {
    pub frames: Vec<Vec<u8>>,
    pub odds: Vec<Odd>,
}

/// xorshift64*.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u32) -> Self {
        let mut this = Self(0x9e37_79b9_7f4a_7c15 ^ (u64::from(seed) << 17 | u64::from(seed)));
        for _ in 0..8 {
            this.below(2);
        }
        this
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let mixed = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(mixed).unwrap() % limit
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| u8::try_from(self.below(256)).unwrap())
    }
}

/// What the sender's and the receiver's addresses are.
pub fn ends(v6: bool) -> (IpAddr, IpAddr) {
    let ends = if v6 {
        ["fd01::2", "fd01::1"]
    } else {
        ["10.1.0.2", "10.1.0.1"]
    };
    let [source, destination] = ends.map(|text| text.parse().unwrap());
    (source, destination)
}

const SOURCES: [&str; 16] = [
    "10.1.0.3",
    "172.16.0.9",
    "10.1.0.1",
    "127.0.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "10.1.0.255",
    "255.255.255.255",
    "fd01::3",
    "2001:db8::9",
    "fd01::1",
    "::1",
    "::",
    "ff02::1",
    "::ffff:10.1.0.2",
    "2002:a01:2::1",
];
const DESTINATIONS: [&str; 8] = [
    "10.1.0.255",
    "255.255.255.255",
    "224.0.0.1",
    "127.0.0.1",
    "ff02::1",
    "::1",
    "::ffff:10.1.0.1",
    "fd01::9",
];

/// Draws a case while its oddities are written down.
struct Draw {
    random: Random,
    number: u32,
    /// Names datagrams in reassembly.
    id: u32,
    source: IpAddr,
    destination: IpAddr,
    odds: Vec<Odd>,
}

/// The case of a number.
pub fn case(number: u32, round: u32) -> Case {
    let mut random = Random::new(number);
    let v6 = random.one_in(2);
    let (source, destination) = ends(v6);
    let mut draw = Draw {
        random,
        number,
        id: round << 14 | number,
        source,
        destination,
        odds: Vec::new(),
    };
    draw.addresses(v6);
    // Few enough that some cases are sound, and most have one oddity that decides.
    let fragments = draw.random.one_in(4);
    let (protocol, transport) = draw.transport(v6, fragments);
    let packets = match (v6, fragments) {
        (false, false) => vec![draw.four(protocol).packet(&transport)],
        (false, true) => draw.four_in_pieces(protocol, &transport),
        (true, false) => vec![draw.six(protocol, &transport)],
        (true, true) => draw.six_in_pieces(protocol, &transport),
    };
    let frames = draw.frames(v6, &packets);
    Case {
        frames,
        odds: draw.odds,
    }
}

impl Draw {
    fn addresses(&mut self, v6: bool) {
        let among = |of: &[&str]| -> Vec<IpAddr> {
            let all = of.iter().map(|text| text.parse().unwrap());
            all.filter(|ip: &IpAddr| ip.is_ipv6() == v6).collect()
        };
        if self.random.one_in(8) {
            self.source = self.random.pick(&among(&SOURCES));
            self.odds.push(Odd::Source(self.source));
        }
        if self.random.one_in(25) {
            self.destination = self.random.pick(&among(&DESTINATIONS));
            self.odds.push(Odd::Destination(self.destination));
        }
    }

    fn marks(&mut self, long: bool) -> Vec<u8> {
        let mark = [MARK, self.number.to_be_bytes()].concat();
        let count = if long {
            4 + self.random.below(12)
        } else {
            1 + self.random.below(6)
        };
        mark.repeat(count)
    }

    /// A port of this case alone: no case's flow carries another's.
    fn port(&self) -> [u8; 2] {
        u16::try_from(10_000 + self.number % 50_000)
            .unwrap()
            .to_be_bytes()
    }

    fn transport(&mut self, v6: bool, long: bool) -> (u8, Vec<u8>) {
        let marks = self.marks(long);
        if self.random.one_in(40) {
            self.odds.push(Odd::NoTransport);
            return (
                self.random.pick(&[6, 17, 132, if v6 { 58 } else { 1 }]),
                marks[..8].to_vec(),
            );
        }
        match self.random.below(12) {
            0..=3 => (17, self.udp(&marks)),
            4..=6 => (6, self.tcp(&marks)),
            7 | 8 => self.icmp(v6, &marks),
            9 => {
                let protocol = self.random.pick(&[132, 132, 136, 33]);
                let port = self.random.pick(&UDP_PORTS).to_be_bytes();
                let header = [self.port(), port].concat();
                (protocol, [&header[..], &[0; 12], &marks].concat())
            }
            10 => {
                let inner = {
                    let (source, destination) = ends(false);
                    let outer = (self.source, self.destination);
                    (self.source, self.destination) = (source, destination);
                    let udp = [
                        &self.port()[..],
                        &4444u16.to_be_bytes(),
                        &[0, 8, 0, 0],
                        &marks,
                    ]
                    .concat();
                    let packet = self.plain_four(17).packet(&udp);
                    (self.source, self.destination) = outer;
                    packet
                };
                let protocol = self.random.pick(&[47, 47, 4, 41, 50, 51]);
                let header: &[u8] = match protocol {
                    47 => &[0, 0, 8, 0],
                    50 | 51 => &[17, 4, 0, 0, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0],
                    _ => &[],
                };
                (protocol, [header, &inner].concat())
            }
            _ => (self.random.pick(&[253, 253, 59]), marks),
        }
    }

    fn udp(&mut self, marks: &[u8]) -> Vec<u8> {
        let port = self.random.pick(&UDP_PORTS).to_be_bytes();
        let mut segment = [&self.port()[..], &port, &[0; 4], marks].concat();
        let mut length = segment.len();
        if self.random.one_in(8) {
            length = self
                .random
                .pick(&[0, 7, 8, length - 8, length + 8, length - 1, 65_535]);
            self.odds.push(Odd::UdpLength(length));
        }
        segment[4..6].copy_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
        let ends = (self.source, self.destination);
        checksum(&mut segment, 6, 17, ends, length);
        if self.random.one_in(8) {
            self.odds.push(Odd::UdpChecksum);
            let other = self.random.pick(&[[0, 0], [segment[6] ^ 1, segment[7]]]);
            segment[6..8].copy_from_slice(&other);
        }
        segment
    }

    fn tcp(&mut self, marks: &[u8]) -> Vec<u8> {
        const FLAGS: [u8; 14] = [
            0x02, 0x02, 0x02, 0xc2, 0x10, 0x18, 0x12, 0x01, 0x11, 0x04, 0x00, 0x29, 0x03, 0xff,
        ];
        let port = self.random.pick(&TCP_PORTS).to_be_bytes();
        let flags = if self.random.one_in(16) {
            self.random.pick(&[0x06, 0x14, 0x20])
        } else {
            self.random.pick(&FLAGS)
        };
        let words = if self.random.one_in(6) {
            self.random.below(11)
        } else {
            0
        };
        let mut offset = u8::try_from(5 + words).unwrap();
        if self.random.one_in(16) {
            offset = u8::try_from(self.random.below(16)).unwrap();
            let length = 20 + words * 4 + marks.len();
            let fits = (20..=length).contains(&(usize::from(offset) * 4));
            self.odds.push(Odd::TcpOffset(offset, fits));
        }
        if flags != 0x02 {
            self.odds.push(Odd::TcpFlags(flags));
        }
        let sequence = self.number.to_be_bytes();
        let rest = [0, 0, 0, 0, offset << 4, flags, 0xff, 0xff, 0, 0, 0, 0];
        let mut segment = [&self.port()[..], &port, &sequence, &rest].concat();
        segment.extend(vec![1; words * 4]);
        segment.extend(marks);
        let length = segment.len();
        checksum(&mut segment, 16, 6, (self.source, self.destination), length);
        segment
    }

    fn icmp(&mut self, v6: bool, marks: &[u8]) -> (u8, Vec<u8>) {
        let kind = match (self.random.one_in(2), v6) {
            (true, false) => 8,
            (true, true) => 128,
            (_, false) => self.random.pick(&[0, 3, 5, 8, 10, 11, 13, 14, 17, 42]),
            // Neighbour discovery with a hop limit that makes it none.
            (_, true) => self.random.pick(&[1, 2, 3, 128, 129, 135, 137, 139, 200]),
        };
        let mut message = vec![kind, 0, 0, 0];
        message.extend(self.port());
        message.extend([0, 1]);
        message.extend(marks);
        if v6 {
            let length = message.len();
            checksum(&mut message, 2, 58, (self.source, self.destination), length);
            (58, message)
        } else {
            checksum_icmp(&mut message);
            (1, message)
        }
    }

    fn plain_four(&self, protocol: u8) -> V4 {
        V4 {
            source: self.source,
            destination: self.destination,
            protocol,
            options: Vec::new(),
            id: u16::try_from(self.id & 0xffff).unwrap(),
            fragment: 0,
            ttl: 64,
            ihl_lie: 0,
            total_lie: 0,
            bad_checksum: false,
        }
    }

    fn four(&mut self, protocol: u8) -> V4 {
        let mut header = self.plain_four(protocol);
        if self.random.one_in(4) {
            let words = 1 + self.random.below(10);
            let kind = self.random.pick(&[0, 1, 1, 7, 68, 130, 131, 137, 148, 222]);
            header.options = option(kind, words * 4, &mut self.random);
            self.odds.push(Odd::Options(header.options.clone()));
        }
        if self.random.one_in(20) {
            header.ihl_lie = self.random.pick(&[-5, -2, -1, 1, 2, 5]);
            self.odds.push(Odd::Ihl(header.ihl_lie));
        }
        if self.random.one_in(20) {
            header.total_lie = self.random.pick(&[-100, -9, -8, -1, 1, 8, 100]);
            self.odds.push(Odd::TotalLength(header.total_lie));
        }
        if self.random.one_in(12) {
            header.ttl = self.random.pick(&[0, 1, 255]);
            self.odds.push(Odd::HopLimit(header.ttl));
        }
        if self.random.one_in(12) {
            header.fragment = self.random.pick(&[0x4000, 0x8000, 0xc000]);
            self.odds.push(Odd::Flags(header.fragment));
        }
        if self.random.one_in(30) {
            header.bad_checksum = true;
            self.odds.push(Odd::HeaderChecksum);
        }
        header
    }

    /// Cuts a datagram whose transport header begins at `behind`.
    fn pieces(
        &mut self,
        protocol: u8,
        datagram: &[u8],
        behind: usize,
    ) -> Vec<(usize, usize, bool)> {
        let length = datagram.len();
        let how = self.random.pick(&[
            Pieces::InOrder,
            Pieces::InOrder,
            Pieces::Reversed,
            Pieces::Tiny,
            Pieces::Duplicate,
            Pieces::Overlap,
            Pieces::Missing,
        ]);
        let eighths = length / 8;
        let mut cuts: Vec<usize> = if how == Pieces::Tiny || eighths < 3 {
            (1..eighths).collect()
        } else {
            let first = 1 + self.random.below(eighths - 2);
            let second = first + 1 + self.random.below(eighths - first - 1);
            if self.random.one_in(2) {
                vec![first]
            } else {
                vec![first, second]
            }
        };
        cuts.retain(|cut| cut * 8 < length);
        cuts.insert(0, 0);
        cuts.push(length.div_ceil(8));
        let mut pieces: Vec<_> = cuts
            .windows(2)
            .map(|pair| (pair[0] * 8, (pair[1] * 8).min(length), false))
            .collect();
        let at = self.random.below(pieces.len());
        match how {
            Pieces::InOrder | Pieces::Tiny => {}
            Pieces::Reversed => pieces.reverse(),
            Pieces::Duplicate => pieces.insert(at, pieces[at]),
            Pieces::Overlap => {
                let (start, end, _) = pieces[at];
                let end = end.min(start + 16);
                // Before or behind the true one, shorter or longer.
                let longer = (end + 8).min(length);
                let to = self.random.pick(&[end, longer]);
                let place = self.random.pick(&[at, at + 1, pieces.len()]);
                pieces.insert(place, (start, to, true));
            }
            Pieces::Missing => drop(pieces.remove(at)),
        }
        let transport = &datagram[behind..];
        let header = match protocol {
            6 => transport.get(12).map_or(20, |b| usize::from(b >> 4) * 4),
            132 => 12,
            1 | 17 | 58 | 136 => 8,
            _ => 0,
        };
        let port = matches!(protocol, 6 | 17 | 132 | 136)
            .then(|| u16::from_be_bytes([transport[2], transport[3]]));
        self.odds.push(Odd::Fragments(Sent {
            how,
            pieces: pieces.clone(),
            length,
            header: behind + header,
            port,
        }));
        pieces
    }

    /// The bytes of a piece; others than the datagram's name other ports.
    fn piece(bytes: &[u8], (start, end, other): (usize, usize, bool)) -> Vec<u8> {
        let mut piece = bytes[start..end].to_vec();
        if other {
            for (at, byte) in piece.iter_mut().enumerate().take(4) {
                // 4444 and 5555, 8080 and 9090 trade places.
                *byte ^= match (start + at, *byte) {
                    (2, 0x11) => 0x11 ^ 0x15,
                    (3, 0x5c) => 0x5c ^ 0xb3,
                    (2, 0x1f) => 0x1f ^ 0x23,
                    (3, 0x90) => 0x90 ^ 0x82,
                    _ => 0xff,
                };
            }
        }
        piece
    }

    fn four_in_pieces(&mut self, protocol: u8, transport: &[u8]) -> Vec<Vec<u8>> {
        let header = self.plain_four(protocol);
        let pieces = self.pieces(protocol, transport, 0);
        let packet = |piece: &(usize, usize, bool)| {
            let more = if piece.1 < transport.len() { 0x2000 } else { 0 };
            let header = V4 {
                fragment: u16::try_from(piece.0 / 8).unwrap() | more,
                ..header.clone()
            };
            header.packet(&Self::piece(transport, *piece))
        };
        pieces.iter().map(packet).collect()
    }

    /// Extension headers, often none.
    fn headers(&mut self) -> Vec<Header> {
        if !self.random.one_in(3) {
            return Vec::new();
        }
        let count = self.random.pick(&[1, 1, 2, 3, 4, 5, 6, 7, 8, 16, 64, 120]);
        let mut headers = vec![Header::OPTIONS; count];
        let at = self.random.below(count);
        match self.random.below(9) {
            0 | 1 => headers[0] = Header::HOP_BY_HOP,
            2 | 3 => {
                let kind = self.random.pick(&[0, 2, 3, 4, 253]);
                headers[at] = Header::routing(kind, 0);
            }
            4 => {
                headers[at] = Header::routing(self.random.pick(&[0, 2, 4]), 1);
                self.odds.push(Odd::RoutingLeft);
            }
            5 if at > 0 => {
                headers[at] = Header::HOP_BY_HOP;
                self.odds.push(Odd::LateHopByHop);
            }
            6 => {
                let kind = self.random.pick(&[0x1e, 0x5e, 0x9e, 0xde]);
                headers[at].1[1] = kind;
                self.odds.push(Odd::UnknownOption(kind));
            }
            7 if self.random.one_in(2) => {
                let more = self.random.pick(&[1, 200, 255]);
                headers[at].1[0] = more;
                let swallowed = usize::from(more).min(count - at - 1);
                self.odds.push(Odd::HeaderLength(swallowed));
            }
            _ => {}
        }
        headers
    }

    fn plain_six(&self, next: u8) -> V6 {
        V6 {
            source: self.source,
            destination: self.destination,
            next,
            hop_limit: 64,
            length_lie: 0,
        }
    }

    fn six(&mut self, protocol: u8, transport: &[u8]) -> Vec<u8> {
        let mut headers = self.headers();
        if self.random.one_in(8) {
            let at = self.random.below(headers.len() + 1);
            headers.insert(at, Header::fragment(0, false, self.id));
            self.odds.push(Odd::Atomic);
        }
        if !headers.is_empty() {
            self.odds.push(Odd::Headers(headers.len(), 0));
        }
        let (next, payload) = chain(&headers, protocol, transport);
        let mut header = self.plain_six(next);
        if self.random.one_in(20) {
            header.length_lie = self.random.pick(&[-100, -9, -8, -1, 1, 8, 100]);
            self.odds.push(Odd::TotalLength(header.length_lie));
        }
        // Not with neighbour discovery: there 255 would be right.
        if protocol != 58 && self.random.one_in(12) {
            header.hop_limit = self.random.pick(&[0, 1, 255]);
            self.odds.push(Odd::HopLimit(header.hop_limit));
        }
        header.packet(&payload)
    }

    fn six_in_pieces(&mut self, protocol: u8, transport: &[u8]) -> Vec<Vec<u8>> {
        let headers = self.headers();
        let behind = if self.random.one_in(4) {
            self.random.below(3)
        } else {
            0
        };
        self.odds
            .push(Odd::Headers(headers.len() + 1 + behind, behind));
        let (inner, whole) = chain(&vec![Header::OPTIONS; behind], protocol, transport);
        let pieces = self.pieces(protocol, &whole, behind * 8);
        let packet = |piece: &(usize, usize, bool)| {
            let offset = u16::try_from(piece.0 / 8).unwrap();
            let mut headers = headers.clone();
            headers.push(Header::fragment(offset, piece.1 < whole.len(), self.id));
            let (next, payload) = chain(&headers, inner, &Self::piece(&whole, *piece));
            self.plain_six(next).packet(&payload)
        };
        pieces.iter().map(packet).collect()
    }

    /// Ethernet around the packets.
    fn frames(&mut self, v6: bool, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
        const TAGS: [&[(u16, u16)]; 10] = [
            &[(0x8100, 0)],
            &[(0x8100, 0x6000)],
            &[(0x8100, 5)],
            &[(0x88a8, 0)],
            &[(0x8100, 0), (0x8100, 0)],
            &[(0x88a8, 0), (0x8100, 0)],
            &[(0x8100, 0), (0x8100, 0), (0x8100, 0)],
            &[(0x8100, 5), (0x8100, 0)],
            &[(0x8100, 0), (0x8100, 5)],
            &[(0x88a8, 5), (0x8100, 6)],
        ];
        let mut ethertype: u16 = if v6 { 0x86dd } else { 0x0800 };
        let mut destination = RECEIVER_MAC;
        if self.random.one_in(12) {
            destination = self.random.pick(&[
                [0xff; 6],
                [0xff; 6],
                [1, 0, 0x5e, 0, 0, 1],
                [2, 0, 0, 0, 0, 9],
            ]);
            self.odds.push(Odd::Mac(destination[0]));
        }
        let mut tags: &[(u16, u16)] = &[];
        if self.random.one_in(6) {
            tags = self.random.pick(&TAGS);
            self.odds.push(Odd::Tags(tags.to_vec()));
        }
        if self.random.one_in(30) {
            let length = u16::try_from(packets[0].len()).unwrap();
            ethertype = self.random.pick(&[
                0x0800 ^ 0x86dd ^ ethertype,
                0x88b5,
                0x8847,
                0x8864,
                0x0806 + 1,
                length,
            ]);
            self.odds.push(Odd::Ethertype(ethertype));
        }
        let mut padding = 0;
        if self.random.one_in(5) {
            padding = 1 + self.random.below(40);
            self.odds.push(Odd::Padding(padding));
        }
        let frame = |packet: &Vec<u8>| {
            let mut frame = [destination, SENDER_MAC].concat();
            for (protocol, control) in tags {
                frame.extend(protocol.to_be_bytes());
                frame.extend(control.to_be_bytes());
            }
            frame.extend(ethertype.to_be_bytes());
            frame.extend(packet);
            frame.extend(vec![0x5a; padding]);
            frame
        };
        packets.iter().map(frame).collect()
    }
}

/// IPv4 options that fill `length` bytes.
fn option(kind: u8, length: usize, random: &mut Random) -> Vec<u8> {
    let size = u8::try_from(length).unwrap();
    let mut bytes = vec![1; length];
    match kind {
        0 => bytes.fill(0),
        1 => {}
        // Record route, source routes: pointer behind the length.
        7 | 131 | 137 => {
            bytes.fill(0);
            let pointer = random.pick(&[4, size + 1]);
            bytes[..3].copy_from_slice(&[kind, size - 1, pointer]);
        }
        68 => {
            bytes.fill(0);
            bytes[..4].copy_from_slice(&[kind, size, 5, 0]);
        }
        148 => bytes[..4].copy_from_slice(&[kind, 4, 0, 0]),
        // An unknown one, its length true or not.
        _ => {
            let lie = random.pick(&[0, 1, size, size + 4]);
            let garbage: [u8; 4] = random.bytes();
            bytes[..4].copy_from_slice(&garbage);
            bytes[..2].copy_from_slice(&[kind, lie]);
        }
    }
    bytes
}
