//! The packets that are measured, and the fields in which they differ.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use enforcer_tests::{
    frame::{Extension, as_fragment, extended, frame, icmp, icmp_error, ip, udp},
    line_rate::asm::Size,
};

use super::{
    policies::{
        ALLOWED_PORT, CLIENTS, CLIENTS4, CLIENTS6, DENIED_PORT, MEMBERS4, MEMBERS6, MESSAGE,
        MESSAGE6, SERVER4, SERVER6, STEP, member4, member6,
    },
    prologue::{Draw, Field, Index},
};

/// Of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// Which end of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

const PORT: u16 = 1024;

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    fn client(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from_bits(CLIENTS4).into(),
            Self::V6 => Ipv6Addr::from_bits(u128::from(CLIENTS6) << 64).into(),
        }
    }

    fn server(self) -> IpAddr {
        match self {
            Self::V4 => SERVER4.into(),
            Self::V6 => SERVER6.into(),
        }
    }

    fn member(self, index: usize) -> IpAddr {
        match self {
            Self::V4 => member4(index).into(),
            Self::V6 => member6(index).into(),
        }
    }

    /// From the first client to the server.
    pub fn request(self) -> Vec<u8> {
        frame(self.client(), self.server(), 17, &udp(PORT, ALLOWED_PORT))
    }

    /// What the server answers.
    pub fn reply(self) -> Vec<u8> {
        frame(self.server(), self.client(), 17, &udp(ALLOWED_PORT, PORT))
    }

    /// What no rule allows.
    pub fn denied(self) -> Vec<u8> {
        frame(self.client(), self.server(), 17, &udp(PORT, DENIED_PORT))
    }

    /// From the server to the first client: it cannot take the request.
    pub fn error(self) -> Vec<u8> {
        let quoted = ip(self.client(), self.server(), 17, &udp(PORT, ALLOWED_PORT));
        let (protocol, kind, code) = match self {
            Self::V4 => (1, 3, 3),
            Self::V6 => (58, 1, 4),
        };
        let error = icmp_error(kind, code, &quoted);
        frame(self.server(), self.client(), protocol, &error)
    }

    /// The first fragment of a request, and the next.
    pub fn fragments(self) -> [Vec<u8>; 2] {
        let request = self.request();
        match self {
            Self::V4 => {
                let mut first = as_fragment(&request, 0, true);
                // Only the last fragment may end off the boundary of eight bytes.
                first.extend([0; 4]);
                first[16..18].copy_from_slice(&36u16.to_be_bytes());
                let later = as_fragment(&first, 2, false);
                [first, later]
            }
            Self::V6 => [(0, true), (2, false)].map(|(offset, more)| {
                let mut payload = udp(PORT, ALLOWED_PORT);
                payload.extend([0; 4]);
                let (protocol, payload) =
                    extended(&[Extension::Fragment(offset, more)], 17, &payload);
                frame(self.client(), self.server(), protocol, &payload)
            }),
        }
    }

    /// A message from client to server that the rules allow, and that opens no flow.
    pub fn message_of_client(self) -> Vec<u8> {
        self.message(self.client(), self.server())
    }

    /// The same between two members.
    pub fn message_of_members(self) -> Vec<u8> {
        self.message(self.member(1), self.member(2))
    }

    fn message(self, source: IpAddr, destination: IpAddr) -> Vec<u8> {
        let (protocol, kind) = match self {
            Self::V4 => (1, MESSAGE),
            Self::V6 => (58, MESSAGE6),
        };
        frame(source, destination, protocol, &icmp(kind, 0, 0))
    }

    /// A request between two members.
    pub fn between_members(self) -> Vec<u8> {
        let payload = udp(PORT, ALLOWED_PORT);
        frame(self.member(1), self.member(2), 17, &payload)
    }

    /// What is answered.
    pub fn reply_between_members(self) -> Vec<u8> {
        let payload = udp(ALLOWED_PORT, PORT);
        frame(self.member(2), self.member(1), 17, &payload)
    }

    /// What no rule allows between them.
    pub fn denied_between_members(self) -> Vec<u8> {
        let payload = udp(PORT, DENIED_PORT);
        frame(self.member(1), self.member(2), 17, &payload)
    }

    fn port(self, end: End) -> i16 {
        let first = match self {
            Self::V4 => 34,
            Self::V6 => 54,
        };
        first + if end == End::Source { 0 } else { 2 }
    }

    /// One of so many flows, with the client at this end.
    pub fn flows(self, end: End, index: Index) -> Vec<Draw> {
        // Eight flows a client.
        let address = self.client_field(end, 3);
        let port = Field {
            at: self.port(end),
            size: Size::B2,
            base: u64::from(PORT),
            shift: 0,
            mask: 7,
            step: 1,
        };
        vec![Draw {
            index,
            fields: vec![address, port],
        }]
    }

    /// A source that has never been seen: any client, and the next port.
    pub fn new_clients(self) -> Vec<Draw> {
        let clients = Draw {
            index: Index::Random(CLIENTS),
            fields: vec![self.client_field(End::Source, 0)],
        };
        vec![clients, self.next_port()]
    }

    /// Any two members of so many, and the next port.
    pub fn new_members(self, members: usize) -> Vec<Draw> {
        let mut draws = self.members(members);
        draws.push(self.next_port());
        draws
    }

    /// Any two members of so many.
    pub fn members(self, members: usize) -> Vec<Draw> {
        let ends = [End::Source, End::Destination];
        let draws = ends.map(|end| Draw {
            index: Index::Random(members as u32),
            fields: vec![self.member_field(end)],
        });
        draws.into()
    }

    fn next_port(self) -> Draw {
        Draw {
            index: Index::Turn(1 << 15),
            fields: vec![Field {
                at: self.port(End::Source),
                size: Size::B2,
                base: u64::from(PORT),
                shift: 0,
                mask: 0x7fff,
                step: 1,
            }],
        }
    }

    fn client_field(self, end: End, shift: i32) -> Field {
        let (at, size, base) = match (self, end) {
            (Self::V4, End::Source) => (26, Size::B4, u64::from(CLIENTS4)),
            (Self::V4, End::Destination) => (30, Size::B4, u64::from(CLIENTS4)),
            // The lower half.
            (Self::V6, End::Source) => (30, Size::B8, 0),
            (Self::V6, End::Destination) => (46, Size::B8, 0),
        };
        Field {
            at,
            size,
            base,
            shift,
            mask: CLIENTS - 1,
            step: 1,
        }
    }

    fn member_field(self, end: End) -> Field {
        let (at, size, base) = match (self, end) {
            (Self::V4, End::Source) => (26, Size::B4, u64::from(MEMBERS4)),
            (Self::V4, End::Destination) => (30, Size::B4, u64::from(MEMBERS4)),
            // The upper half.
            (Self::V6, End::Source) => (22, Size::B8, MEMBERS6),
            (Self::V6, End::Destination) => (38, Size::B8, MEMBERS6),
        };
        Field {
            at,
            size,
            base,
            shift: 0,
            mask: (1 << 24) - 1,
            step: STEP.cast_signed(),
        }
    }
}
