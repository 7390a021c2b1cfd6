//! Addresses, frames and books that the modules share.

use std::{net::IpAddr, sync::MutexGuard};

use enforcer_common::verdict::{Hook, Outcome, Reason};
pub use enforcer_tests::two::{ends, instant, policy};
use enforcer_tests::{
    frame::{self, ACK, SYN},
    host::image,
    kernel::{Programs, Verdict},
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

/// A TCP flow from `a` to `b`, answered, and checked.
pub fn establish(programs: &mut Programs, a: (IpAddr, u16), b: (IpAddr, u16)) {
    assert_eq!(got(programs.judge(INGRESS, &tcp(a, b, SYN))), ALLOWED);
    let answer = programs.judge(INGRESS, &tcp(b, a, SYN | ACK));
    assert_eq!(got(answer), ESTABLISHED);
    assert_eq!(got(programs.judge(INGRESS, &tcp(a, b, ACK))), ESTABLISHED);
}
