//! Addresses, prefixes and ranges as text.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::policy::{diag::shown, model::AddrRange};

/// What is wrong with an address: code, message, help.
pub(crate) type Problem = (&'static str, String, Option<String>);

fn problem(code: &'static str, message: String) -> Problem {
    (code, message, None)
}

/// An address on its own. Addresses in ::ffff:0:0/96 are refused: as IPv6 no packet carries them,
/// and as IPv4 they are written in IPv4.
pub(super) fn address(text: &str) -> Result<IpAddr, Problem> {
    let Ok(ip) = text.parse::<IpAddr>() else {
        let message = format!("{} is not an IP address", shown(text));
        let help = if text.contains('/') {
            Some("write a single address, without a prefix length".to_owned())
        } else if text.contains('%') {
            Some("addresses are written without an interface".to_owned())
        } else {
            None
        };
        return Err(("E0201", message, help));
    };
    match ip {
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => Err((
                "E0203",
                format!("{} is an IPv4 address mapped into IPv6", shown(text)),
                Some(format!("write `{v4}`")),
            )),
            None => Ok(ip),
        },
        IpAddr::V4(_) => Ok(ip),
    }
}

/// `address/length`, no host bits set.
pub(crate) fn prefix(text: &str) -> Result<AddrRange, Problem> {
    let Some((base, length)) = text.split_once('/') else {
        let help = match text.parse::<IpAddr>() {
            Ok(ip) => format!(
                "write `{ip}/{}` for this one address",
                if ip.is_ipv4() { 32 } else { 128 }
            ),
            Err(_) if text.contains('-') => "write a range as `range: first-last`".to_owned(),
            Err(_) => {
                "write `address/length`, such as `10.10.1.0/24` or `\"fd00:10:1::/64\"`".to_owned()
            }
        };
        return Err((
            "E0201",
            format!("{} is not a prefix", shown(text)),
            Some(help),
        ));
    };
    let not_a_prefix = || problem("E0201", format!("{} is not a prefix", shown(text)));
    let ip: IpAddr = base.parse().map_err(|_| not_a_prefix())?;
    let widest = if ip.is_ipv4() { 32 } else { 128 };
    let digits = length.len() <= 3
        && length.bytes().all(|b| b.is_ascii_digit())
        && (length == "0" || !length.starts_with('0'));
    let length: u8 = length
        .parse()
        .ok()
        .filter(|l| digits && *l <= widest)
        .ok_or_else(|| {
            let (code, message, _) = not_a_prefix();
            let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
            (
                code,
                message,
                Some(format!("the length of an {family} prefix is 0 to {widest}")),
            )
        })?;
    let net = IpNet::new(ip, length).map_err(|_| not_a_prefix())?;
    if let IpNet::V6(v6) = net
        && v6.prefix_len() >= 96
        && let Some(v4) = v6.network().to_ipv4_mapped()
    {
        return Err((
            "E0203",
            format!("{} is an IPv4 prefix mapped into IPv6", shown(text)),
            Some(format!("write `{v4}/{}`", v6.prefix_len() - 96)),
        ));
    }
    if net.network() != ip {
        return Err((
            "E0202",
            format!("{} has bits set after the first {length}", shown(text)),
            Some(format!(
                "write `{}` for the prefix, or `{ip}/{widest}` for the one address",
                net.trunc()
            )),
        ));
    }
    Ok(net.into())
}

/// `first-last`, both included.
pub(super) fn range(text: &str) -> Result<AddrRange, Problem> {
    let Some((first, last)) = text.split_once('-') else {
        let help = if text.contains('/') {
            "write a prefix as `cidr: …`".to_owned()
        } else {
            "write `first-last`, such as `10.21.0.10-10.21.0.40`".to_owned()
        };
        return Err((
            "E0201",
            format!("{} is not a range", shown(text)),
            Some(help),
        ));
    };
    let (first, last) = (address(first)?, address(last)?);
    match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) if first <= last => Ok(AddrRange::V4 { first, last }),
        (IpAddr::V6(first), IpAddr::V6(last)) if first <= last => Ok(AddrRange::V6 { first, last }),
        (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => Err((
            "E0205",
            format!("the range {} ends before it starts", shown(text)),
            Some(format!("write `{last}-{first}`")),
        )),
        _ => Err(problem(
            "E0206",
            format!("the range {} mixes IPv4 and IPv6", shown(text)),
        )),
    }
}

/// An exception: an address, a prefix or a range.
pub(super) fn exception(text: &str) -> Result<AddrRange, Problem> {
    if text.contains('/') {
        prefix(text)
    } else if text.contains('-') {
        range(text)
    } else {
        Ok(match address(text)? {
            IpAddr::V4(ip) => AddrRange::V4 {
                first: ip,
                last: ip,
            },
            IpAddr::V6(ip) => AddrRange::V6 {
                first: ip,
                last: ip,
            },
        })
    }
}

/// Whether two ranges are of one family.
pub(super) fn same_family(a: &AddrRange, b: &AddrRange) -> bool {
    matches!(
        (a, b),
        (AddrRange::V4 { .. }, AddrRange::V4 { .. }) | (AddrRange::V6 { .. }, AddrRange::V6 { .. })
    )
}

/// Whether the exceptions, all inside `whole`, leave none of its addresses.
pub(super) fn nothing_left(whole: &AddrRange, except: &[AddrRange]) -> bool {
    let bounds = |range: &AddrRange| match *range {
        AddrRange::V4 { first, last } => (v4_bits(first), v4_bits(last)),
        AddrRange::V6 { first, last } => (v6_bits(first), v6_bits(last)),
    };
    let (mut next, end) = bounds(whole);
    let mut cuts: Vec<(u128, u128)> = except.iter().map(bounds).collect();
    cuts.sort_unstable();
    for (first, last) in cuts {
        if first > next {
            return false;
        }
        if last >= end {
            return true;
        }
        next = next.max(last + 1);
    }
    false
}

fn v4_bits(ip: Ipv4Addr) -> u128 {
    u128::from(ip.to_bits())
}

fn v6_bits(ip: Ipv6Addr) -> u128 {
    ip.to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes() {
        for good in [
            "0.0.0.0/0",
            "::/0",
            "10.0.0.0/8",
            "10.1.2.3/32",
            "fd00::/118",
            "::/80",
        ] {
            assert!(prefix(good).is_ok(), "{good}");
        }
        for (bad, code) in [
            ("10.0.0.1/8", "E0202"),
            ("fd00::1/64", "E0202"),
            ("10.0.0.0/33", "E0201"),
            ("10.0.0.0/08", "E0201"),
            ("10.0.0.0/+8", "E0201"),
            ("10.0.0.0/", "E0201"),
            ("10.0.0.0", "E0201"),
            ("10.0.0/24", "E0201"),
            ("010.0.0.0/8", "E0201"),
            ("::ffff:10.0.0.0/104", "E0203"),
            ("::ffff:0:0/96", "E0203"),
            ("::ffff:10.0.0.1/104", "E0203"),
        ] {
            assert_eq!(prefix(bad).unwrap_err().0, code, "{bad}");
        }
        assert_eq!(
            prefix("::ffff:10.0.0.0/104").unwrap_err().2.unwrap(),
            "write `10.0.0.0/8`"
        );
    }

    #[test]
    fn ranges() {
        assert!(range("10.0.0.1-10.0.0.1").is_ok());
        assert!(range("fd00::1-fd00::f").is_ok());
        for (bad, code) in [
            ("10.0.0.2-10.0.0.1", "E0205"),
            ("10.0.0.2-fd00::1", "E0206"),
            ("10.0.0.2-", "E0201"),
            ("10.0.0.2 - 10.0.0.3", "E0201"),
            ("fd00::1-::ffff:1.2.3.4", "E0203"),
            ("fe80::1%eth0-fe80::2", "E0201"),
        ] {
            assert_eq!(range(bad).unwrap_err().0, code, "{bad}");
        }
    }

    #[test]
    fn a_member_may_not_be_cut_to_nothing() {
        let whole = prefix("10.0.0.0/30").unwrap();
        let cut = |list: &[&str]| {
            let list: Vec<AddrRange> = list.iter().map(|t| exception(t).unwrap()).collect();
            nothing_left(&whole, &list)
        };
        assert!(cut(&["10.0.0.0/30"]));
        assert!(cut(&["10.0.0.2/31", "10.0.0.0", "10.0.0.0-10.0.0.1"]));
        assert!(!cut(&["10.0.0.2/31", "10.0.0.0"]));
        assert!(!cut(&["10.0.0.1-10.0.0.3"]));
        assert!(!cut(&[]));
        let all = prefix("::/0").unwrap();
        assert!(nothing_left(&all, &[all]));
    }
}
