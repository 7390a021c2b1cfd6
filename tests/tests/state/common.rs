//! Addresses, frames and books that the modules share.

use std::{net::IpAddr, sync::MutexGuard};

use enforcer_common::verdict::{Hook, Outcome, Reason};
use enforcer_tests::{
    frame::{self, ACK, SYN},
    host::image,
    kernel::{Programs, Verdict},
    netns::Family,
};

pub const INGRESS: Hook = Hook::TcIngress;
pub const EGRESS: Hook = Hook::TcEgress;

pub const ALLOWED: (Outcome, Reason) = (Outcome::Allowed, Reason::RuleAllow);
pub const ESTABLISHED: (Outcome, Reason) = (Outcome::Allowed, Reason::Established);
pub const RELATED: (Outcome, Reason) = (Outcome::Allowed, Reason::Related);
pub const DENIED: (Outcome, Reason) = (Outcome::Denied, Reason::DefaultDeny);
pub const NO_FLOW: (Outcome, Reason) = (Outcome::Denied, Reason::NoFlow);
pub const EXPIRED: (Outcome, Reason) = (Outcome::Denied, Reason::Expired);
pub const SPOOFED: (Outcome, Reason) = (Outcome::Denied, Reason::Spoofed);
pub const UNRELATED: (Outcome, Reason) = (Outcome::Denied, Reason::IcmpUnrelated);

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

pub fn tcp(from: (IpAddr, u16), to: (IpAddr, u16), flags: u8) -> Vec<u8> {
    frame::frame(from.0, to.0, 6, &frame::tcp(from.1, to.1, flags))
}

pub fn udp(from: (IpAddr, u16), to: (IpAddr, u16)) -> Vec<u8> {
    frame::frame(from.0, to.0, 17, &frame::udp(from.1, to.1))
}

pub fn icmp(from: IpAddr, to: IpAddr, message: &[u8]) -> Vec<u8> {
    let protocol = if from.is_ipv4() { 1 } else { 58 };
    frame::frame(from, to, protocol, message)
}

/// The programs with this policy.
pub fn programs(text: &str) -> MutexGuard<'static, Programs> {
    let mut programs = Programs::shared();
    programs.apply(&image(text));
    programs
}

pub fn got(verdict: Verdict) -> (Outcome, Reason) {
    (verdict.outcome, verdict.reason)
}

/// How many flows the kernel remembers.
pub fn flows(programs: &mut Programs) -> usize {
    let (v4, v6) = programs.flows();
    v4.len() + v6.len()
}

/// Seconds since boot, suspend included, in nanoseconds.
pub fn boottime() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).unwrap();
    u64::try_from(now.tv_sec()).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap()
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

/// A TCP flow from `a` to `b`, answered, and checked.
pub fn establish(programs: &mut Programs, a: (IpAddr, u16), b: (IpAddr, u16)) {
    assert_eq!(got(programs.judge(INGRESS, &tcp(a, b, SYN))), ALLOWED);
    let answer = programs.judge(INGRESS, &tcp(b, a, SYN | ACK));
    assert_eq!(got(answer), ESTABLISHED);
    assert_eq!(got(programs.judge(INGRESS, &tcp(a, b, ACK))), ESTABLISHED);
}
