//! Services as text: literals, catalogue names, names of `services:`.

use std::net::IpAddr;

use super::{
    address::Problem,
    catalogue::{
        CATALOGUE, ICMP_CODES, ICMP_TYPES, ICMPV6_CODES, ICMPV6_TYPES, OWN_WORDS, PROTOCOLS,
        describe, lookup,
    },
    names::closest,
};
use crate::policy::{
    diag::shown,
    model::{Service, Transport},
};

/// `any`, a literal such as `tcp/5432`, or a catalogue name. `Ok(None)`: a name that is neither.
pub(super) fn literal_or_catalogue(text: &str) -> Result<Option<Vec<Service>>, Problem> {
    if text == "any" {
        return Ok(Some(vec![Service::Any]));
    }
    match text.split_once('/') {
        Some((word, rest)) => literal(text, word, rest).map(|s| Some(vec![s])),
        None => Ok(lookup(text).map(<[Service]>::to_vec)),
    }
}

fn literal(text: &str, word: &str, rest: &str) -> Result<Service, Problem> {
    match word {
        "tcp" => ports(text, Transport::Tcp, rest),
        "udp" => ports(text, Transport::Udp, rest),
        "sctp" => ports(text, Transport::Sctp, rest),
        "udplite" => ports(text, Transport::UdpLite, rest),
        "icmp" => {
            let (kind, code) = icmp(text, "ICMP", &ICMP_TYPES, &ICMP_CODES, rest)?;
            Ok(Service::Icmp { kind, code })
        }
        "icmpv6" => {
            let (kind, code) = icmp(text, "ICMPv6", &ICMPV6_TYPES, &ICMPV6_CODES, rest)?;
            Ok(Service::Icmpv6 { kind, code })
        }
        "proto" => protocol(text, rest),
        _ => Err((
            "E0301",
            format!("{} is not a service", shown(text)),
            Some(advice(word, rest)),
        )),
    }
}

/// What to write instead of `word/rest` with an unknown first word.
fn advice(word: &str, rest: &str) -> String {
    const WORDS: [&str; 7] = ["tcp", "udp", "sctp", "udplite", "icmp", "icmpv6", "proto"];
    if WORDS.contains(&rest) {
        return format!(
            "the protocol comes first: write {}",
            shown(&format!("{rest}/{word}"))
        );
    }
    if PROTOCOLS.iter().any(|(name, _)| *name == word) {
        return format!("write {}", shown(&format!("proto/{word}")));
    }
    match closest(word, WORDS) {
        Some(near) => format!("did you mean {}?", shown(&format!("{near}/{rest}"))),
        None => format!(
            "a service starts with one of: {}",
            WORDS.map(|w| format!("{w}/")).join(", ")
        ),
    }
}

/// Help for a name that is no service at all; `known` are the user's own.
pub(super) fn unknown_name_help<'a>(
    text: &str,
    known: impl IntoIterator<Item = &'a str>,
) -> Option<String> {
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'-') {
        return Some(format!(
            "name the protocol too: `tcp/{text}` or `udp/{text}`"
        ));
    }
    match text {
        "tcp" | "udp" | "sctp" | "udplite" => {
            return Some(format!("for every port write `{text}/any`"));
        }
        "icmp" | "icmpv6" => return Some(format!("name the type, such as `{text}/echo-request`")),
        _ => {}
    }
    if PROTOCOLS.iter().any(|(name, _)| *name == text) {
        return Some(format!("write `proto/{text}`"));
    }
    let catalogue = CATALOGUE.iter().map(|(name, _)| *name);
    closest(text, known.into_iter().chain(catalogue)).map(|near| format!("did you mean `{near}`?"))
}

/// A decimal number without sign or leading zeros.
fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let plain = digits && (text == "0" || !text.starts_with('0'));
    if plain { text.parse().ok() } else { None }
}

fn ports(text: &str, transport: Transport, rest: &str) -> Result<Service, Problem> {
    if rest == "any" {
        return Ok(Service::Ports {
            transport,
            first: 0,
            last: u16::MAX,
        });
    }
    let bad = |help: Option<String>| ("E0301", format!("{} is not a service", shown(text)), help);
    let (low, high) = rest.split_once('-').unwrap_or((rest, rest));
    let (Some(first), Some(last)) = (number::<u16>(low), number::<u16>(high)) else {
        let word = describe(&Service::Ports {
            transport,
            first: 0,
            last: 0,
        });
        let word = word.trim_end_matches('0').trim_end_matches('/');
        let help = match lookup(rest) {
            Some(services) => {
                let list: Vec<String> = services.iter().map(describe).collect();
                format!("write `{rest}` alone: it stands for {}", list.join(", "))
            }
            None => format!(
                "write a port from 0 to 65535, a range or `any`: `{word}/443`, `{word}/8000-8100`, `{word}/any`"
            ),
        };
        return Err(bad(Some(help)));
    };
    if first > last {
        let message = format!("the port range {} ends before it starts", shown(text));
        return Err(("E0205", message, None));
    }
    Ok(Service::Ports {
        transport,
        first,
        last,
    })
}

/// A type, and a code where one is named.
fn icmp(
    text: &str,
    family: &str,
    types: &[(&str, u8)],
    codes: &[(u8, &str, u8)],
    rest: &str,
) -> Result<(u8, Option<u8>), Problem> {
    let Some((word, code)) = rest.split_once('/') else {
        return Ok((kind(text, family, types, rest)?, None));
    };
    let kind = kind(text, family, types, word)?;
    let mut of_kind = codes.iter().filter(|(k, ..)| *k == kind);
    let named = of_kind.clone().find(|(_, name, _)| *name == code);
    let number = named.map(|(.., n)| *n).or_else(|| number::<u8>(code));
    let number = number.ok_or_else(|| {
        let help = match closest(code, of_kind.clone().map(|(_, name, _)| *name)) {
            Some(near) => format!("did you mean `{near}`?"),
            None => match of_kind.next() {
                Some((_, name, _)) => {
                    format!(
                        "write the code as a number from 0 to 255, or as a word such as `{name}`"
                    )
                }
                None => "write the code as a number from 0 to 255".to_owned(),
            },
        };
        let message = format!("{} names no code of this {family} type", shown(text));
        ("E0301", message, Some(help))
    })?;
    Ok((kind, Some(number)))
}

fn kind(text: &str, family: &str, table: &[(&str, u8)], rest: &str) -> Result<u8, Problem> {
    let named = table
        .iter()
        .find(|(name, _)| *name == rest)
        .map(|(_, n)| *n);
    named.or_else(|| number::<u8>(rest)).ok_or_else(|| {
        let help = match closest(rest, table.iter().map(|(name, _)| *name)) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!(
                "write the type as a number from 0 to 255, or as a word such as `{}`",
                if family == "ICMP" {
                    "icmp/echo-request"
                } else {
                    "icmpv6/echo-request"
                }
            ),
        };
        (
            "E0301",
            format!("{} names no {family} type", shown(text)),
            Some(help),
        )
    })
}

fn protocol(text: &str, rest: &str) -> Result<Service, Problem> {
    let own = OWN_WORDS
        .iter()
        .find(|(name, n)| *name == rest || n.to_string() == rest);
    if let Some((word, _)) = own {
        let example = if word.starts_with("icmp") {
            "echo-request"
        } else {
            "any"
        };
        return Err((
            "E0302",
            format!("{} is not how {word} is written", shown(text)),
            Some(format!("write `{word}/…`, such as `{word}/{example}`")),
        ));
    }
    let named = PROTOCOLS
        .iter()
        .find(|(name, _)| *name == rest)
        .map(|(_, n)| *n);
    named
        .or_else(|| number::<u8>(rest))
        .map(Service::Protocol)
        .ok_or_else(|| {
            let help = match closest(rest, PROTOCOLS.iter().map(|(name, _)| *name)) {
                Some(near) => format!("did you mean `proto/{near}`?"),
                None => "write the protocol's number, 0 to 255, or a word such as `proto/gre`"
                    .to_owned(),
            };
            (
                "E0301",
                format!("{} names no IP protocol", shown(text)),
                Some(help),
            )
        })
}

/// The single point, `(protocol, selector)`, that services mean for addresses of `ip`'s family.
/// The selector is as in [`crate::policy::model::FlowQuery`]; ICMP codes that are not named are 0.
pub(super) fn point(text: &str, services: &[Service], ip: IpAddr) -> Result<(u8, u16), Problem> {
    let fits = |service: &&Service| match service {
        Service::Icmp { .. } => ip.is_ipv4(),
        Service::Icmpv6 { .. } => ip.is_ipv6(),
        Service::Any | Service::Ports { .. } | Service::Protocol(_) => true,
    };
    // Two say as much as thousands.
    let fitting: Vec<&Service> = services.iter().filter(fits).take(2).collect();
    if fitting.is_empty() && !services.is_empty() {
        let (this, other, word) = if ip.is_ipv4() {
            ("IPv6", "IPv4", "icmp")
        } else {
            ("IPv4", "IPv6", "icmpv6")
        };
        return Err((
            "E0304",
            format!(
                "{} exists in {this} only, but the addresses are {other}",
                shown(text)
            ),
            Some(format!("write `{word}/…` or `ping`")),
        ));
    }
    match fitting.as_slice() {
        [
            Service::Ports {
                transport,
                first,
                last,
            },
        ] if first == last => Ok((transport.number(), *first)),
        [Service::Icmp { kind, code }] => {
            Ok((1, u16::from(*kind) << 8 | u16::from(code.unwrap_or(0))))
        }
        [Service::Icmpv6 { kind, code }] => {
            Ok((58, u16::from(*kind) << 8 | u16::from(code.unwrap_or(0))))
        }
        [Service::Protocol(number)] => Ok((*number, 0)),
        several => {
            let help = match several {
                [one, _, ..] => format!("choose one of its services, such as `{}`", describe(one)),
                _ => "write one port, one ICMP type or one protocol, such as `tcp/443`".to_owned(),
            };
            let message = format!("{} is not a single service", shown(text));
            Err(("E0303", message, Some(help)))
        }
    }
}

/// The point that `text` (a literal or a catalogue name) means between addresses of `ip`'s family,
/// as `explain` asks for it. The error is a message, with help where there is any.
pub fn parse_point(text: &str, ip: IpAddr) -> Result<(u8, u16), String> {
    let readable = |(_, message, help): Problem| match help {
        Some(help) => format!("{message}; {help}"),
        None => message,
    };
    let services = literal_or_catalogue(text)
        .map_err(readable)?
        .ok_or_else(|| {
            let help = unknown_name_help(text, []);
            readable(("E0108", format!("unknown service {}", shown(text)), help))
        })?;
    point(text, &services, ip).map_err(readable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Service {
        literal_or_catalogue(text).unwrap().unwrap()[0]
    }

    #[test]
    fn literals() {
        let tcp = |first, last| Service::Ports {
            transport: Transport::Tcp,
            first,
            last,
        };
        assert_eq!(one("any"), Service::Any);
        assert_eq!(one("tcp/5432"), tcp(5432, 5432));
        assert_eq!(one("tcp/0-65535"), tcp(0, 65535));
        assert_eq!(one("tcp/any"), tcp(0, 65535));
        let icmp = |kind, code| Service::Icmp { kind, code };
        let icmpv6 = |kind, code| Service::Icmpv6 { kind, code };
        assert_eq!(one("icmp/echo-request"), icmp(8, None));
        assert_eq!(one("icmp/255"), icmp(255, None));
        assert_eq!(one("icmp/3/4"), icmp(3, Some(4)));
        let needed = "icmp/destination-unreachable/fragmentation-needed";
        assert_eq!(one(needed), icmp(3, Some(4)));
        assert_eq!(one("icmp/3/fragmentation-needed"), icmp(3, Some(4)));
        assert_eq!(one("icmp/8/255"), icmp(8, Some(255)));
        assert_eq!(one("icmpv6/echo-request"), icmpv6(128, None));
        assert_eq!(one("icmpv6/destination-unreachable/4"), icmpv6(1, Some(4)));
        assert_eq!(one("icmpv6/1/port-unreachable"), icmpv6(1, Some(4)));
        let udplite = |first, last| Service::Ports {
            transport: Transport::UdpLite,
            first,
            last,
        };
        assert_eq!(one("udplite/53"), udplite(53, 53));
        assert_eq!(one("udplite/any"), udplite(0, 65535));
        assert_eq!(one("proto/gre"), Service::Protocol(47));
        assert_eq!(one("proto/47"), Service::Protocol(47));
        for (bad, code) in [
            ("tcp/", "E0301"),
            ("tcp/65536", "E0301"),
            ("tcp/-1", "E0301"),
            ("tcp/1-", "E0301"),
            ("tcp/ 1", "E0301"),
            ("tcp/01", "E0301"),
            ("tcp/+1", "E0301"),
            ("TCP/1", "E0301"),
            ("tcp/2-1", "E0205"),
            ("icmp/256", "E0301"),
            ("icmp/any", "E0301"),
            ("icmp/3/", "E0301"),
            ("icmp/3/256", "E0301"),
            ("icmp/3/4/5", "E0301"),
            ("icmp/3/any", "E0301"),
            ("icmp//4", "E0301"),
            ("icmp/8/fragmentation-needed", "E0301"),
            ("icmpv6/3/ttl-exceeded", "E0301"),
            ("udplite/", "E0301"),
            ("udplite/2-1", "E0205"),
            ("proto/136", "E0302"),
            ("proto/udplite", "E0302"),
            ("proto/256", "E0301"),
            ("proto/1", "E0302"),
            ("proto/tcp", "E0302"),
            ("proto/17", "E0302"),
            ("proto/58", "E0302"),
            ("proto/sctp", "E0302"),
            ("443/tcp", "E0301"),
        ] {
            assert_eq!(literal_or_catalogue(bad).unwrap_err().0, code, "{bad}");
        }
        assert_eq!(literal_or_catalogue("nonsense").unwrap(), None);
    }

    #[test]
    fn the_catalogue_is_sorted_and_its_names_are_valid() {
        assert!(CATALOGUE.windows(2).all(|w| w[0].0 < w[1].0));
        for (name, services) in CATALOGUE {
            assert!(super::super::names::check(name).is_ok(), "{name}");
            assert!(!services.is_empty());
            for service in services {
                assert_eq!(one(&describe(service)), *service);
            }
        }
    }

    #[test]
    fn what_is_described_reads_back() {
        for kind in 0..=u8::MAX {
            for code in (0..=u8::MAX).map(Some).chain([None]) {
                let services = [Service::Icmp { kind, code }, Service::Icmpv6 { kind, code }];
                for service in services {
                    assert_eq!(one(&describe(&service)), service);
                }
            }
        }
    }

    #[test]
    fn points() {
        let (v4, v6): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap());
        assert_eq!(parse_point("tcp/5432", v4), Ok((6, 5432)));
        assert_eq!(parse_point("postgresql", v6), Ok((6, 5432)));
        assert_eq!(parse_point("ping", v4), Ok((1, 8 << 8)));
        assert_eq!(parse_point("ping", v6), Ok((58, 128 << 8)));
        assert_eq!(parse_point("proto/gre", v4), Ok((47, 0)));
        assert_eq!(parse_point("icmp/3/4", v4), Ok((1, 3 << 8 | 4)));
        assert_eq!(parse_point("icmpv6/1/4", v6), Ok((58, 1 << 8 | 4)));
        assert_eq!(parse_point("udplite/7", v6), Ok((136, 7)));
        for bad in ["dns", "any", "tcp/1-2", "tcp/any", "nope"] {
            assert!(parse_point(bad, v4).is_err(), "{bad}");
        }
        assert!(
            parse_point("icmp/echo-request", v6)
                .unwrap_err()
                .contains("IPv4 only")
        );
        assert!(
            parse_point("icmpv6/echo-request", v4)
                .unwrap_err()
                .contains("IPv6 only")
        );
    }
}
