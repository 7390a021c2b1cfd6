//! Rules that end and sessions with bounds, in the kernel: its own clocks, and what the daemon
//! tells it of the wall clock. The machine's clock is not touched.

use std::time::Duration;

use enforcer::dataplane::{Dataplane as _, WallClock};
use enforcer_common::verdict::{Outcome, Reason};
use enforcer_tests::{
    daemon::wait_for,
    frame::{ACK, SYN},
    host::image,
    kernel::Programs,
    netns::Family,
};

use crate::common::*;

/// Some time in 2027; what the kernel is told is a clock of its own.
const NOW: u64 = 1_800_000_000;
const SECOND: u64 = 1_000_000_000;

/// Has it be `unix` for rules, which never goes back behind `floor`.
fn set_clock(programs: &mut Programs, unix: u64, floor: u64) {
    let clock = WallClock {
        unix_floor: floor,
        boot_unix_ns: unix * SECOND - boottime(),
    };
    programs.dataplane.set_clock(clock).unwrap();
}

/// Waits until the second of the boot clock is another one than it was, so that flows with a time
/// are judged again.
fn next_second() {
    let now = boottime() / SECOND;
    wait_for("the next second", Duration::from_secs(5), || {
        (boottime() / SECOND > now).then_some(())
    });
}

fn rule(more: &str) -> String {
    policy(&format!(
        "  - {{ name: some, from: [a], to: [b], services: [tcp/8080, udp/4444], {more} }}"
    ))
}

/// What each direction of an open TCP and UDP flow gets, and a new opening of each.
fn all(programs: &mut Programs, family: Family) -> [(Outcome, Reason); 6] {
    let (a, b) = ends(family);
    [
        tcp((b, 8080), (a, 4000), ACK),
        tcp((a, 4000), (b, 8080), ACK),
        udp((a, 4000), (b, 4444)),
        udp((b, 4444), (a, 4000)),
        tcp((a, 4001), (b, 8080), SYN),
        udp((a, 4001), (b, 4444)),
    ]
    .map(|frame| got(programs.judge(INGRESS, &frame)))
}

fn open(programs: &mut Programs, family: Family) {
    let (a, b) = ends(family);
    establish(programs, (a, 4000), (b, 8080));
    let opened = programs.judge(INGRESS, &udp((a, 4000), (b, 4444)));
    assert_eq!(got(opened), ALLOWED);
}

#[test]
fn a_rule_that_expired_never_comes_back() {
    let at = instant(NOW + 1000);
    let mut programs = programs(&rule(&format!("expires: {at}")));
    let gone = [EXPIRED, EXPIRED, EXPIRED, EXPIRED, DENIED, DENIED];
    for family in Family::BOTH {
        programs.forget_flows();
        set_clock(&mut programs, NOW, 0);
        open(&mut programs, family);
        next_second();
        let alive = all(&mut programs, family);
        assert!(
            alive.iter().all(|(o, _)| *o == Outcome::Allowed),
            "{alive:?}"
        );
        programs.forget_flows();
        open(&mut programs, family);

        // The clock is set ahead, and with the next second all is over.
        set_clock(&mut programs, NOW + 1000, 0);
        next_second();
        assert_eq!(all(&mut programs, family), gone);
        for hook in [INGRESS, EGRESS] {
            programs.records(hook);
        }
        let records = programs.drain();
        assert!(records.iter().any(|r| r.reason() == Reason::Expired));

        // Set back by far; the daemon says how far time had come.
        for floor in [NOW + 1000, NOW + 1002] {
            set_clock(&mut programs, NOW - 86_400, floor);
            next_second();
            assert_eq!(all(&mut programs, family), gone, "{family:?}");
        }
        // The daemon writes the floor first and the offset after it: in between, too.
        set_clock(&mut programs, NOW + 2000, NOW + 1002);
        assert_eq!(all(&mut programs, family), gone, "{family:?}");
        programs.drain();
    }
    set_clock(&mut programs, NOW, 0);
}

#[test]
fn a_deny_rule_that_ended_does_not_come_back_either() {
    let at = instant(NOW + 1000);
    let text = policy(&format!(
        "  - {{ name: not-yet, from: [a], to: [b], services: [tcp/8080], action: deny, expires: {at} }}\n\
         \x20 - {{ name: web, from: [a], to: [b], services: [tcp/8080] }}"
    ));
    let mut programs = programs(&text);
    let (a, b) = ends(Family::V4);
    set_clock(&mut programs, NOW, 0);
    let syn = tcp((a, 4000), (b, 8080), SYN);
    let by_rule = (Outcome::Denied, Reason::RuleDeny);
    assert_eq!(got(programs.judge(INGRESS, &syn)), by_rule);
    set_clock(&mut programs, NOW + 1000, 0);
    assert_eq!(got(programs.judge(INGRESS, &syn)), ALLOWED);
    set_clock(&mut programs, NOW - 1000, NOW + 1000);
    next_second();
    assert_eq!(got(programs.judge(INGRESS, &syn)), ALLOWED);
    let ack = tcp((b, 8080), (a, 4000), ACK);
    assert_eq!(programs.judge(INGRESS, &ack).outcome, Outcome::Allowed);
    set_clock(&mut programs, NOW, 0);
}

/// Flows whose rules have no time do not notice clocks that jump, and neither do sessions, whose
/// time is the boot clock's.
#[test]
fn clocks_that_jump_cut_nothing_that_has_no_date() {
    const YEAR: u64 = 365 * 86_400;
    let session = "session: { max: 1d, idle: 1h }";
    for (text, first) in [
        (
            policy("  - { name: some, from: [a], to: [b], services: [tcp/8080, udp/4444] }"),
            ESTABLISHED,
        ),
        (rule(session), ALLOWED),
    ] {
        let mut programs = programs(&text);
        for family in Family::BOTH {
            set_clock(&mut programs, NOW, 0);
            open(&mut programs, family);
            for (unix, floor) in [(NOW + YEAR, 0), (NOW - YEAR, NOW + YEAR), (0, NOW + YEAR)] {
                let unix = unix.max(boottime() / SECOND + 1);
                set_clock(&mut programs, unix, floor);
                next_second();
                let got = all(&mut programs, family);
                assert_eq!(got[..4], [first, ESTABLISHED, first, ESTABLISHED]);
            }
        }
        set_clock(&mut programs, NOW, 0);
    }
}

#[test]
fn sessions_end_by_the_kernels_clock() {
    for (bounds, wait, talks) in [("max: 3s", 4, true), ("idle: 2s", 3, false)] {
        let mut programs = programs(&rule(&format!("session: {{ {bounds} }}")));
        for family in Family::BOTH {
            programs.forget_flows();
            let (a, b) = ends(family);
            let (there, back) = (
                tcp((a, 4000), (b, 8080), ACK),
                tcp((b, 8080), (a, 4000), ACK),
            );
            // Without a SYN there is no session.
            assert_eq!(got(programs.judge(INGRESS, &there)), NO_FLOW);
            assert_eq!(programs.judge(INGRESS, &back).outcome, Outcome::Denied);
            // Once more after it is over, on one family.
            for _ in 0..if family == Family::V4 { 2 } else { 1 } {
                // Its beginning may be anywhere in this second.
                let begin = boottime() / SECOND;
                establish(&mut programs, (a, 4000), (b, 8080));
                let began = boottime() / SECOND;
                while talks && boottime() / SECOND < begin + wait - 1 {
                    let verdict = programs.judge(INGRESS, &back);
                    let now = boottime() / SECOND;
                    assert!(verdict.passed || now >= begin + wait, "{bounds}: too early");
                    std::thread::sleep(Duration::from_millis(100));
                }
                while boottime() / SECOND < began + wait {
                    std::thread::sleep(Duration::from_millis(10));
                }
                for frame in [&there, &back] {
                    assert_eq!(got(programs.judge(INGRESS, frame)), EXPIRED, "{bounds}");
                }
                let other = tcp((b, 8080), (a, 4000), SYN);
                assert_eq!(got(programs.judge(INGRESS, &other)), DENIED);
            }
        }
        programs.records(INGRESS);
        programs.drain();
        programs.settle();
    }
}

/// A generation that comes does not bring an expired flow back, and no new entry either.
#[test]
fn an_expired_flow_stays_cut_under_the_next_policy() {
    let at = instant(NOW + 10);
    let text = rule(&format!("expires: {at}"));
    let mut programs = programs(&text);
    set_clock(&mut programs, NOW, 0);
    open(&mut programs, Family::V4);
    set_clock(&mut programs, NOW + 10, 0);
    programs.apply(&image(&text));
    let revoked = (Outcome::Denied, Reason::Revoked);
    let got = all(&mut programs, Family::V4);
    assert_eq!(got, [revoked, revoked, revoked, revoked, DENIED, DENIED]);
    assert_eq!(flows(&mut programs), 2);
    set_clock(&mut programs, NOW, 0);
}
