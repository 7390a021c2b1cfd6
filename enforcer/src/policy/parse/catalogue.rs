//! Services that need no declaration, and the words for ICMP types and protocols.
//!
//! `docs/policy.md` shows the same table; a test keeps the two together.

use crate::policy::model::{Service, Transport};

const fn tcp(port: u16) -> Service {
    Service::Ports {
        transport: Transport::Tcp,
        first: port,
        last: port,
    }
}

const fn udp(port: u16) -> Service {
    Service::Ports {
        transport: Transport::Udp,
        first: port,
        last: port,
    }
}

const fn tcp_range(first: u16, last: u16) -> Service {
    Service::Ports {
        transport: Transport::Tcp,
        first,
        last,
    }
}

/// Names and what they stand for, sorted by name.
pub const CATALOGUE: [(&str, &[Service]); 54] = [
    ("amqp", &[tcp(5672)]),
    ("bacnet", &[udp(47808)]),
    ("cassandra", &[tcp(9042)]),
    ("dhcp", &[udp(67)]),
    ("dhcpv6", &[udp(547)]),
    ("dicom", &[tcp(104), tcp(11112)]),
    ("dicom-tls", &[tcp(2762)]),
    ("dns", &[udp(53), tcp(53)]),
    ("dns-tls", &[tcp(853)]),
    ("elasticsearch", &[tcp(9200)]),
    ("fhir", &[tcp(443)]),
    ("hl7-mllp", &[tcp(2575)]),
    ("http", &[tcp(80)]),
    ("http-alt", &[tcp(8080)]),
    ("https", &[tcp(443)]),
    ("ike", &[udp(500), udp(4500)]),
    ("imaps", &[tcp(993)]),
    ("ipp", &[tcp(631)]),
    ("jetdirect", &[tcp(9100)]),
    ("kafka", &[tcp(9092)]),
    ("kerberos", &[udp(88), tcp(88)]),
    ("ldap", &[tcp(389)]),
    ("ldaps", &[tcp(636)]),
    ("lpd", &[tcp(515)]),
    ("modbus", &[tcp(502)]),
    ("mongodb", &[tcp(27017)]),
    ("mqtt", &[tcp(1883)]),
    ("mqtt-tls", &[tcp(8883)]),
    ("msrpc", &[tcp(135)]),
    ("mssql", &[tcp(1433)]),
    ("mysql", &[tcp(3306)]),
    ("nfs", &[tcp(2049)]),
    ("ntp", &[udp(123)]),
    ("opc-ua", &[tcp(4840)]),
    ("oracle", &[tcp(1521)]),
    (
        "ping",
        &[Service::Icmp { kind: 8 }, Service::Icmpv6 { kind: 128 }],
    ),
    ("postgresql", &[tcp(5432)]),
    ("quic", &[udp(443)]),
    ("radius", &[udp(1812), udp(1813)]),
    ("rdp", &[tcp(3389), udp(3389)]),
    ("redis", &[tcp(6379)]),
    ("smb", &[tcp(445)]),
    ("smtp", &[tcp(25)]),
    ("snmp", &[udp(161)]),
    ("snmp-trap", &[udp(162)]),
    ("ssh", &[tcp(22)]),
    ("submission", &[tcp(587)]),
    ("syslog", &[udp(514)]),
    ("syslog-tls", &[tcp(6514)]),
    ("telnet", &[tcp(23)]),
    ("tftp", &[udp(69)]),
    ("vnc", &[tcp(5900)]),
    ("winrm", &[tcp_range(5985, 5986)]),
    ("wireguard", &[udp(51820)]),
];

/// Types of ICMP (IPv4).
pub(super) const ICMP_TYPES: [(&str, u8); 11] = [
    ("echo-reply", 0),
    ("destination-unreachable", 3),
    ("redirect", 5),
    ("echo-request", 8),
    ("router-advertisement", 9),
    ("router-solicitation", 10),
    ("time-exceeded", 11),
    ("parameter-problem", 12),
    ("timestamp-request", 13),
    ("timestamp-reply", 14),
    ("extended-echo-request", 42),
];

/// Types of ICMPv6.
pub(super) const ICMPV6_TYPES: [(&str, u8); 14] = [
    ("destination-unreachable", 1),
    ("packet-too-big", 2),
    ("time-exceeded", 3),
    ("parameter-problem", 4),
    ("echo-request", 128),
    ("echo-reply", 129),
    ("mld-query", 130),
    ("mld-report", 131),
    ("mld-done", 132),
    ("router-solicitation", 133),
    ("router-advertisement", 134),
    ("neighbor-solicitation", 135),
    ("neighbor-advertisement", 136),
    ("redirect", 137),
];

/// IP protocols without ports or types.
pub(super) const PROTOCOLS: [(&str, u8); 16] = [
    ("6in4", 41),
    ("ah", 51),
    ("dccp", 33),
    ("eigrp", 88),
    ("esp", 50),
    ("etherip", 97),
    ("gre", 47),
    ("igmp", 2),
    ("ipip", 4),
    ("l2tp", 115),
    ("mpls-in-ip", 137),
    ("ospf", 89),
    ("pim", 103),
    ("rsvp", 46),
    ("udplite", 136),
    ("vrrp", 112),
];

/// Protocols that are not written `proto/…`, and the word to use.
pub(super) const OWN_WORDS: [(&str, u8); 5] = [
    ("icmp", 1),
    ("tcp", 6),
    ("udp", 17),
    ("icmpv6", 58),
    ("sctp", 132),
];

/// What a catalogue name stands for.
pub(super) fn lookup(name: &str) -> Option<&'static [Service]> {
    CATALOGUE
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, services)| *services)
}

/// A service in the words of the language.
pub fn describe(service: &Service) -> String {
    let word = |table: &[(&str, u8)], number: u8| {
        table
            .iter()
            .find(|(_, n)| *n == number)
            .map_or_else(|| number.to_string(), |(name, _)| (*name).to_owned())
    };
    match *service {
        Service::Any => "any".to_owned(),
        Service::Ports {
            transport,
            first,
            last,
        } => {
            let protocol = word(&OWN_WORDS, transport.number());
            if first == last {
                format!("{protocol}/{first}")
            } else {
                format!("{protocol}/{first}-{last}")
            }
        }
        Service::Icmp { kind } => format!("icmp/{}", word(&ICMP_TYPES, kind)),
        Service::Icmpv6 { kind } => format!("icmpv6/{}", word(&ICMPV6_TYPES, kind)),
        Service::Protocol(number) => format!("proto/{}", word(&PROTOCOLS, number)),
    }
}
