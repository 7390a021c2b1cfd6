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
        &[
            Service::Icmp {
                kind: 8,
                code: None,
            },
            Service::Icmpv6 {
                kind: 128,
                code: None,
            },
        ],
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

/// Codes of ICMP: type, name, code.
pub(super) const ICMP_CODES: [(u8, &str, u8); 18] = [
    (3, "net-unreachable", 0),
    (3, "host-unreachable", 1),
    (3, "protocol-unreachable", 2),
    (3, "port-unreachable", 3),
    (3, "fragmentation-needed", 4),
    (3, "source-route-failed", 5),
    (3, "net-unknown", 6),
    (3, "host-unknown", 7),
    (3, "net-prohibited", 9),
    (3, "host-prohibited", 10),
    (3, "admin-prohibited", 13),
    (5, "redirect-net", 0),
    (5, "redirect-host", 1),
    (11, "ttl-exceeded", 0),
    (11, "reassembly-exceeded", 1),
    (12, "pointer", 0),
    (12, "missing-option", 1),
    (12, "bad-length", 2),
];

/// Codes of ICMPv6, as [`ICMP_CODES`].
pub(super) const ICMPV6_CODES: [(u8, &str, u8); 12] = [
    (1, "no-route", 0),
    (1, "admin-prohibited", 1),
    (1, "beyond-scope", 2),
    (1, "address-unreachable", 3),
    (1, "port-unreachable", 4),
    (1, "source-policy-failed", 5),
    (1, "reject-route", 6),
    (3, "hop-limit-exceeded", 0),
    (3, "reassembly-exceeded", 1),
    (4, "erroneous-header", 0),
    (4, "unknown-next-header", 1),
    (4, "unknown-option", 2),
];

/// IP protocols without ports or types.
pub(super) const PROTOCOLS: [(&str, u8); 15] = [
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
    ("vrrp", 112),
];

/// Protocols that are not written `proto/…`, and the word to use.
pub(super) const OWN_WORDS: [(&str, u8); 6] = [
    ("icmp", 1),
    ("tcp", 6),
    ("udp", 17),
    ("icmpv6", 58),
    ("sctp", 132),
    ("udplite", 136),
];

/// What a catalogue name stands for.
pub(super) fn lookup(name: &str) -> Option<&'static [Service]> {
    CATALOGUE
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, services)| *services)
}

/// `/` and a code, by name where it has one.
fn code_word(table: &[(u8, &str, u8)], kind: u8, code: u8) -> String {
    let named = table.iter().find(|(k, _, c)| (*k, *c) == (kind, code));
    named.map_or_else(|| format!("/{code}"), |(_, name, _)| format!("/{name}"))
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
        Service::Icmp { kind, code } => {
            let code = code.map(|code| code_word(&ICMP_CODES, kind, code));
            format!(
                "icmp/{}{}",
                word(&ICMP_TYPES, kind),
                code.unwrap_or_default()
            )
        }
        Service::Icmpv6 { kind, code } => {
            let code = code.map(|code| code_word(&ICMPV6_CODES, kind, code));
            format!(
                "icmpv6/{}{}",
                word(&ICMPV6_TYPES, kind),
                code.unwrap_or_default()
            )
        }
        Service::Protocol(number) => format!("proto/{}", word(&PROTOCOLS, number)),
    }
}
