//! `cargo xtask soak`: what a daemon holds stays as it is, however often it takes another policy.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking; this one tells how it is getting on"
)]

mod sample;

use std::{
    fmt::Write as _,
    fs, thread,
    time::{Duration, Instant},
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    netns::{Family, Routed, directory},
    numbers::{ALLOWED, FORBIDDEN, Load, under_measured_load},
    pins::Pins,
    traffic,
};
use serde_json::json;

use sample::{Group, Sample};

const MINUTES: &str = "ENFORCER_SOAK_MINUTES";
const JSON: &str = "ENFORCER_SOAK_JSON";

/// A figure of a sample.
type Figure = fn(&Sample) -> u64;

/// How many policies take turns.
const VARIANTS: usize = 4;
/// More changes and more denials than the daemon remembers.
const CHANGES: usize = 520;
const DENIALS: u64 = 11_000;
/// Memory may be this much more at the end than after the first minute, in KiB: allocators have
/// their ways.
const GROWTH: [(&str, u64); 2] = [
    ("memory of the daemon", 2048),
    ("of its cgroup's kernel", 1024),
];

/// Each has segments and rules that the others have not, and the same right for the load.
fn policy(variant: usize) -> String {
    let mut text = "version: 1\n\
         segments:\n\
         \x20 a: { members: [{cidr: 10.1.0.0/24}, {cidr: \"fd01::/64\"}] }\n\
         \x20 b: { members: [{cidr: 10.2.0.0/24}, {cidr: \"fd02::/64\"}] }\n"
        .to_owned();
    for more in 0..10 * variant {
        let members: Vec<_> = (0..100)
            .map(|host| format!("{{cidr: 10.{}.{variant}.{host}/32}}", 100 + more))
            .collect();
        writeln!(text, "  s{more}: {{ members: [{}] }}", members.join(", ")).unwrap();
    }
    write!(
        text,
        "rules:\n  - {{ name: some, from: [a], to: [b], services: [udp/{ALLOWED}, tcp/{ALLOWED}] }}\n"
    )
    .unwrap();
    for more in 0..10 * variant {
        let port = 8000 + more;
        writeln!(
            text,
            "  - {{ name: r{more}, from: [s{more}], to: [a], services: [tcp/{port}] }}"
        )
        .unwrap();
    }
    text
}

/// Fills what is bounded: history, and the store of denials. What is there after that stays.
fn fill(net: &Routed, daemon: &Daemon<'_>) {
    for change in 0..CHANGES {
        daemon.setup.write(&policy(change % VARIANTS));
        let (code, answer) = daemon.reload();
        assert_eq!(code, 200, "{}", answer["code"]);
    }
    let to = (Family::V4.address(2, 2), FORBIDDEN);
    wait_for("a full store of denials", 2 * LONG, || {
        for _ in 0..500 {
            // Each from another port.
            let socket = traffic::udp(&net.a, traffic::any(0), LONG);
            socket.send_to(b"none", to).unwrap();
        }
        (daemon.status()["events"]["emitted"].as_u64()? > DENIALS).then_some(())
    });
}

/// A second's worth: another policy is in force, a connection that may be is made, and one that may
/// not is not.
fn turn(net: &Routed, daemon: &Daemon<'_>, variant: usize) {
    daemon.setup.write(&policy(variant));
    let (code, answer) = daemon.reload();
    assert_eq!(code, 200, "{}", answer["code"]);
    let family = Family::BOTH[variant % 2];
    let to = |port| (family.address(2, 2), port);
    let mut stream = traffic::tcp(&net.a, to(ALLOWED));
    traffic::converse(&mut stream, b"hello").unwrap();
    let limit = Duration::from_millis(10);
    assert!(!traffic::tcp_connects(&net.a, to(FORBIDDEN), limit));
}

/// What grew beyond its bound.
fn growth(first: &Sample, rest: &[Sample]) -> Vec<String> {
    let mut grown = Vec::new();
    let last = &rest[rest.len().saturating_sub(3)..];
    let least = |of: Figure| last.iter().map(of).min().unwrap_or_default();
    let memory: [Figure; 2] = [|s| s.anonymous, |s| s.kernel.unwrap_or_default()];
    for ((what, bound), of) in GROWTH.into_iter().zip(memory) {
        if least(of) > of(first) + bound {
            grown.push(format!("{what}: {} to {} KiB", of(first), least(of)));
        }
    }
    // Nothing of these is a matter of degree.
    let counts: [(&str, Figure); 6] = [
        ("descriptors", |s| s.descriptors),
        ("maps", |s| s.maps),
        ("programs", |s| s.programs),
        ("links", |s| s.links),
        ("locked memory of maps", |s| s.locked),
        ("pins", |s| s.pins),
    ];
    for (what, of) in counts {
        if least(of) > of(first) {
            grown.push(format!("{what}: {} to {}", of(first), least(of)));
        }
    }
    grown
}

fn report(minutes: u64, swaps: u64, load: &Load, samples: &[Sample]) {
    println!("\n{}", Sample::HEAD);
    for sample in samples {
        println!("{}", sample.row());
    }
    println!(
        "{minutes} minutes, {swaps} policies: {} datagrams delivered and none lost, {} forbidden and none delivered, \
         {} rounds of one TCP session",
        load.delivered, load.in_vain, load.rounds
    );
    if let Some(path) = std::env::var_os(JSON) {
        let all = json!({
            "minutes": minutes,
            "reloads": swaps,
            "delivered": load.delivered,
            "lost": 0,
            "forbidden": load.in_vain,
            "leaked": 0,
            "samples": samples.iter().map(Sample::json).collect::<Vec<_>>(),
        });
        fs::write(path, serde_json::to_string_pretty(&all).unwrap()).unwrap();
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask soak"]
fn what_a_daemon_holds_does_not_grow() {
    let minutes = std::env::var(MINUTES).map_or(10, |minutes| minutes.parse().unwrap());
    assert!(
        minutes >= 2,
        "the first minute is what others are compared with"
    );
    let (net, pins, state, group) = (Routed::new(), Pins::default(), directory(), Group::new());
    let setup = Setup::new(&net.gateway, "gw-*", &policy(0))
        .with(&["--socket-hooks", "off"])
        .with(&["--state-dir", state.path().to_str().unwrap()])
        .pinned(pins.path());
    let daemon = group.start(setup);
    let ((samples, turns, swaps), load) = under_measured_load(&net, || {
        fill(&net, &daemon);
        let begin = daemon.generation();
        println!("{}", Sample::HEAD);
        let (start, mut samples, mut turns) = (Instant::now(), Vec::new(), 0);
        let mut second = 0;
        while (samples.len() as u64) < minutes {
            second += 1;
            turn(&net, &daemon, second as usize % VARIANTS);
            turns += 1;
            if second % 60 == 0 {
                let sample = Sample::take(&daemon, &pins, &group, second / 60);
                println!("{}", sample.row());
                samples.push(sample);
            }
            let due = Duration::from_secs(second);
            thread::sleep(due.saturating_sub(start.elapsed()));
        }
        (samples, turns, daemon.generation() - begin)
    });
    assert!(swaps >= turns, "{turns} edits made {swaps} generations");
    let status = daemon.status();
    assert_eq!(status["state"], "enforcing", "{status}");
    report(minutes, swaps, &load, &samples);
    let grown = growth(&samples[0], &samples[1..]);
    assert!(grown.is_empty(), "{grown:?}");
}

#[test]
fn what_grows_is_found() {
    let first = Sample {
        anonymous: 10_000,
        kernel: Some(5_000),
        descriptors: 40,
        pins: 20,
        ..Sample::default()
    };
    let later = |change: fn(&mut Sample)| {
        let mut sample = first.clone();
        change(&mut sample);
        growth(
            &first,
            &[first.clone(), sample.clone(), sample.clone(), sample],
        )
    };
    assert_eq!(later(|_| ()), [""; 0]);
    assert_eq!(later(|s| s.anonymous += 2048), [""; 0]);
    assert_eq!(later(|s| s.anonymous += 2049).len(), 1);
    assert_eq!(later(|s| s.kernel = Some(6_025)).len(), 1);
    assert_eq!(later(|s| s.descriptors += 1).len(), 1);
    assert_eq!(later(|s| s.pins += 1), ["pins: 20 to 21"]);
}
