//! Two segments, and rules between them that may end.

use std::net::IpAddr;

use crate::netns::Family;

/// `a` is `10.1.0.0/24`, `b` is `10.2.0.0/24`, and so on for IPv6; `rules` as lines of YAML.
pub fn policy(rules: &str) -> String {
    format!(
        r#"version: 1
segments:
  a: {{ members: [{{cidr: 10.1.0.0/24}}, {{cidr: "fd01::/64"}}] }}
  b: {{ members: [{{cidr: 10.2.0.0/24}}, {{cidr: "fd02::/64"}}] }}
rules:
{rules}
"#
    )
}

/// Addresses of `a` and of `b`.
pub fn ends(family: Family) -> (IpAddr, IpAddr) {
    (family.address(1, 2), family.address(2, 2))
}

/// As in `expires`: an instant of Unix seconds.
pub fn instant(unix: u64) -> String {
    // Howard Hinnant's algorithm, for days after 1970.
    let (days, rest) = (unix / 86_400 + 719_468, unix % 86_400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::instant;

    #[test]
    fn instants_are_written_as_people_do() {
        for (unix, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_827_696, "2000-02-29T12:34:56Z"),
            (1_800_000_000, "2027-01-15T08:00:00Z"),
        ] {
            assert_eq!(instant(unix), text);
        }
    }
}
