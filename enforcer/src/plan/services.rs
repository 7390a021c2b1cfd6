//! Services in the words of the language.

use enforcer_common::image::ICMP_OF_OTHER_FAMILY;

use crate::{
    compile::reach::Run,
    policy::{
        model::{Service, TUNNEL_PROTOCOLS, Transport},
        parse::describe,
    },
};

/// Protocols that may be missing from what is called `any but …`.
const FEW: usize = 32;

/// Runs, ascending and united, in families (1: IPv4, 2: IPv6). Never empty where there are runs.
pub(super) fn names(runs: &[Run], families: u8) -> Vec<String> {
    let whole = |protocol: u8| {
        let mut of = runs.iter().filter(|run| run.index == u32::from(protocol));
        of.any(|run| (run.first, run.last) == (0, u16::MAX))
    };
    let there = |protocol: u8| match protocol {
        1 => families & 1 != 0,
        58 => families & 2 != 0,
        _ => true,
    };
    let tunnel = |protocol: u8| TUNNEL_PROTOCOLS.contains(&protocol);
    let ordinary = (0..=u8::MAX).filter(|p| there(*p) && !tunnel(*p));
    let missing: Vec<u8> = ordinary.filter(|p| !whole(*p)).collect();
    let of_other_family = |run: &&Run| run.index != ICMP_OF_OTHER_FAMILY;
    if missing.len() > FEW {
        let mut names: Vec<String> = runs.iter().filter(of_other_family).flat_map(run).collect();
        if names.is_empty() && !runs.is_empty() {
            names.push("ICMP of the other family".to_owned());
        }
        return names;
    }
    let but = missing.iter().flat_map(|protocol| {
        let index = u32::from(*protocol);
        let mut next = Some(0u16);
        let mut gaps = Vec::new();
        for there in runs.iter().filter(|run| run.index == index) {
            if let Some(first) = next
                && first < there.first
            {
                let last = there.first - 1;
                gaps.push(Run { index, first, last });
            }
            next = there.last.checked_add(1);
        }
        gaps.extend(next.map(|first| Run {
            index,
            first,
            last: u16::MAX,
        }));
        gaps
    });
    let but: Vec<String> = but.flat_map(|gap| run(&gap)).collect();
    let tunnels = TUNNEL_PROTOCOLS.iter().filter(|protocol| whole(**protocol));
    let tunnels: Vec<String> = tunnels.map(|p| describe(&Service::Protocol(*p))).collect();
    let mut any = "any".to_owned();
    if !but.is_empty() {
        any.push_str(&format!(" but {}", but.join(" and ")));
    }
    if tunnels.len() == TUNNEL_PROTOCOLS.len() {
        any.push_str(", tunnels as well");
        return vec![any];
    }
    [vec![any], tunnels].concat()
}

/// One run; several where it spans parts of several ICMP types.
fn run(run: &Run) -> Vec<String> {
    let (first, last) = (run.first, run.last);
    let ports = |transport| {
        let service = Service::Ports {
            transport,
            first,
            last,
        };
        vec![describe(&service)]
    };
    match run.index {
        1 | 58 => icmp(run),
        6 => ports(Transport::Tcp),
        17 => ports(Transport::Udp),
        132 => ports(Transport::Sctp),
        136 => ports(Transport::UdpLite),
        other => match u8::try_from(other) {
            Ok(protocol) => vec![describe(&Service::Protocol(protocol))],
            Err(_) => vec![],
        },
    }
}

fn icmp(run: &Run) -> Vec<String> {
    let word = if run.index == 1 { "icmp" } else { "icmpv6" };
    let service = |kind, code| {
        if run.index == 1 {
            describe(&Service::Icmp { kind, code })
        } else {
            describe(&Service::Icmpv6 { kind, code })
        }
    };
    if (run.first, run.last) == (0, u16::MAX) {
        return vec![word.to_owned()];
    }
    let [first, low] = run.first.to_be_bytes();
    let [last, high] = run.last.to_be_bytes();
    if first == last {
        return vec![match (low, high) {
            (0, u8::MAX) => service(first, None),
            _ if low == high => service(first, Some(low)),
            _ => format!("{word}/{first}/{low}-{high}"),
        }];
    }
    // Whole types, and parts of one before and behind.
    let part = |kind: u8, low: u8, high: u8| {
        let at = |code| u16::from_be_bytes([kind, code]);
        let (first, last) = (at(low), at(high));
        icmp(&Run {
            index: run.index,
            first,
            last,
        })
    };
    let mut names = Vec::new();
    let (from, to) = (
        first.saturating_add(u8::from(low != 0)),
        last.saturating_sub(u8::from(high != u8::MAX)),
    );
    if low != 0 {
        names.extend(part(first, low, u8::MAX));
    }
    if from == to {
        names.push(service(from, None));
    } else if from < to {
        names.push(format!("{word}/{from}-{to}"));
    }
    if high != u8::MAX {
        names.extend(part(last, 0, high));
    }
    names
}

/// One point.
pub(crate) fn point(v6: bool, protocol: u8, selector: u16) -> String {
    let index = match (v6, protocol) {
        (false, 58) | (true, 1) => return format!("proto/{protocol}"),
        (_, protocol) => u32::from(protocol),
    };
    let (first, last) = (selector, selector);
    run(&Run { index, first, last }).concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(index: u32) -> Run {
        span(index, 0, u16::MAX)
    }

    fn span(index: u32, first: u16, last: u16) -> Run {
        Run { index, first, last }
    }

    fn tunnel(index: u32) -> bool {
        u8::try_from(index).is_ok_and(|p| TUNNEL_PROTOCOLS.contains(&p))
    }

    #[test]
    fn all_of_it_is_any() {
        let whole: Vec<Run> = (0..=256).filter(|i| !tunnel(*i)).map(all).collect();
        assert_eq!(names(&whole, 3), ["any"]);
        let four: Vec<Run> = whole.iter().filter(|r| r.index != 58).copied().collect();
        assert_eq!(names(&four, 1), ["any"]);
        assert_eq!(names(&four, 3), ["any but icmpv6"]);
        let tunnels: Vec<Run> = (0..=256).map(all).collect();
        assert_eq!(names(&tunnels, 3), ["any, tunnels as well"]);
        let gre: Vec<Run> = (0..=256)
            .filter(|i| *i == 47 || !tunnel(*i))
            .map(all)
            .collect();
        assert_eq!(names(&gre, 3), ["any", "proto/gre"]);
    }

    #[test]
    fn what_any_lacks_is_named() {
        let mut runs: Vec<Run> = (0..=256)
            .filter(|i| !tunnel(*i) && *i != 6)
            .map(all)
            .collect();
        runs.extend([span(6, 0, 79), span(6, 81, 442), span(6, 444, u16::MAX)]);
        runs.sort_unstable();
        assert_eq!(names(&runs, 3), ["any but tcp/80 and tcp/443"]);
    }

    #[test]
    fn parts_are_named_one_by_one() {
        let runs = [span(6, 80, 80), span(17, 8000, 8100), all(47)];
        assert_eq!(names(&runs, 3), ["tcp/80", "udp/8000-8100", "proto/gre"]);
        let echo = span(1, 0x0800, 0x08ff);
        assert_eq!(names(&[echo], 1), ["icmp/echo-request"]);
        let port = span(1, 0x0303, 0x0303);
        assert_eq!(
            names(&[port], 1),
            ["icmp/destination-unreachable/port-unreachable"]
        );
        let odd = span(58, 0x0102, 0x0401);
        let expected = ["icmpv6/1/2-255", "icmpv6/2-3", "icmpv6/4/0-1"];
        assert_eq!(names(&[odd], 2), expected);
        assert_eq!(names(&[all(1)], 1), ["icmp"]);
        assert_eq!(names(&[all(256)], 1), ["ICMP of the other family"]);
    }
}
