//! New policies take over; broken ones change nothing and say why.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, broken_examples, enforcer, wait_for},
    netns::{Family, Pair, Routed},
    scale, traffic,
};
use nix::sys::signal::Signal;
use serde_json::Value;

const SEGMENTS: &str = r#"version: 1
segments:
  a: { members: [{cidr: 10.1.0.0/24}, {cidr: "fd01::/64"}] }
  b: { members: [{cidr: 10.2.0.0/24}, {cidr: "fd02::/64"}] }
"#;

/// A policy that lets `a` reach one UDP port of `b`.
fn policy(port: u16) -> String {
    format!("{SEGMENTS}rules:\n  - {{ name: one, from: [a], to: [b], services: [udp/{port}] }}\n")
}

/// Two echo ports at `b`.
fn net() -> Routed {
    let net = Routed::new();
    for port in [7001, 7002] {
        traffic::udp_echo(&net.b, traffic::any(port));
    }
    net
}

/// That exactly one of the two ports is open from `a` to `b`, on new sockets.
fn only(net: &Routed, open: u16) {
    for family in Family::BOTH {
        let to = family.address(2, 2);
        assert!(
            traffic::udp_answers_soon(&net.a, (to, open)),
            "{open} is open"
        );
        let other = 7001 + 7002 - open;
        assert!(
            !traffic::udp_answers(&net.a, None, (to, other)),
            "{other} is closed"
        );
    }
}

/// The error of the policy on disk, once it contains `part`.
fn error_with(daemon: &Daemon<'_>, part: &str) -> String {
    wait_for(part, LONG, || {
        let status = daemon.status();
        let error = status["policy"]["last_error"].as_str()?;
        error.contains(part).then(|| error.to_owned())
    })
}

/// That the policy on disk is the one in force.
fn is_well(daemon: &Daemon<'_>) {
    let status = wait_for("no error", LONG, || {
        let status = daemon.status();
        (status["policy"]["last_error"] == Value::Null).then_some(status)
    });
    assert_eq!(status["state"], "enforcing");
    assert!(daemon.ask("status", &[]).status.success());
}

#[test]
fn edits_and_sighup_swap_the_policy() {
    let net = net();
    let daemon = Setup::new(&net.gateway, "gw-*", &policy(7001))
        .with(&["--follow-links"])
        .start();
    assert_eq!(daemon.generation(), 1);
    only(&net, 7001);

    // Saved by renaming, seen without being told.
    daemon.swap(&policy(7002));
    assert_eq!(daemon.generation(), 2);
    only(&net, 7002);

    // Written in place.
    fs::write(daemon.setup.policy(), policy(7001)).unwrap();
    daemon.wait_swapped(2);
    only(&net, 7001);

    // A second file in the directory; names and lines are reported per file.
    let more = "rules:\n  - { name: two, from: [a], to: [b], services: [udp/7002] }\n";
    fs::write(
        daemon.setup.segments().join("more.yml"),
        format!("version: 1\n{more}"),
    )
    .unwrap();
    daemon.wait_swapped(3);
    assert_eq!(daemon.status()["policy"]["rules"], 2);
    assert!(traffic::udp_answers_soon(
        &net.a,
        (Family::V4.address(2, 2), 7002)
    ));
    fs::remove_file(daemon.setup.segments().join("more.yml")).unwrap();
    daemon.wait_swapped(4);
    only(&net, 7001);

    // The same meaning is no new generation, told or not.
    let generation = daemon.generation();
    daemon
        .setup
        .write(&format!("# a comment\n{}", policy(7001)));
    daemon.signal(Signal::SIGHUP);
    wait_for("the log to say so", LONG, || {
        let log = daemon.log();
        (log.contains("policy unchanged") && log.contains("SIGHUP")).then_some(())
    });
    assert_eq!(daemon.generation(), generation);
    only(&net, 7001);

    // A file behind a link: its own directory is watched, too.
    let elsewhere = enforcer_tests::netns::directory();
    let (real, link) = (elsewhere.path().join("real"), elsewhere.path().join("link"));
    fs::write(&real, policy(7002)).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    fs::rename(link, daemon.setup.policy()).unwrap();
    daemon.wait_swapped(generation);
    only(&net, 7002);
    let generation = daemon.generation();
    fs::write(&real, policy(7001)).unwrap();
    daemon.wait_swapped(generation);
    only(&net, 7001);
    is_well(&daemon);
}

/// An edit while the programs are being loaded is not lost.
#[test]
fn an_edit_during_the_start_is_seen() {
    let net = net();
    let daemon = Setup::new(&net.gateway, "gw-*", &policy(7001)).spawn();
    // The socket's file is there before the policy is read. A start takes seconds, nearly all of them
    // after that.
    wait_for("the socket", LONG, || {
        daemon.setup.socket().exists().then_some(())
    });
    thread::sleep(scale::within(Duration::from_millis(300)));
    daemon.setup.write(&policy(7002));
    wait_for("the second policy", LONG, || {
        let answer = daemon.ask(
            "explain",
            &[
                "--from",
                "10.1.0.2",
                "--to",
                "10.2.0.2",
                "--service",
                "udp/7002",
                "-o",
                "json",
            ],
        );
        let answer: Value = serde_json::from_slice(&answer.stdout).ok()?;
        (answer["verdict"] == "ALLOWED").then_some(())
    });
    only(&net, 7002);
}

#[test]
fn broken_policies_change_nothing() {
    let net = net();
    let daemon = Setup::new(&net.gateway, "gw-*", &policy(7001)).start();
    let before = daemon.status();
    let examples = broken_examples();
    assert!(examples.len() >= 45, "{} examples", examples.len());
    for (number, example) in examples.iter().enumerate() {
        let name = example.display();
        let check = enforcer(&["check", example.to_str().unwrap()]);
        assert_eq!(check.status.code(), Some(1), "check {name}");
        assert!(
            check.stdout.is_empty() || check.stderr.is_empty(),
            "{check:?}"
        );

        fs::copy(example, daemon.setup.policy()).unwrap();
        let (code, answer) = daemon.reload();
        assert_ne!(code, 200, "{name}: {answer}");
        assert!(
            answer["error"]
                .as_str()
                .is_some_and(|e| e.contains("error")),
            "{name}: {answer}"
        );

        let status = daemon.status();
        assert_eq!(status["generation"], before["generation"], "{name}");
        assert_eq!(status["policy"]["hash"], before["policy"]["hash"], "{name}");
        assert_eq!(status["state"], "degraded", "{name}");
        let error = status["policy"]["last_error"].as_str().unwrap();
        assert!(error.starts_with("policy.yaml:"), "{name}: {error}");
        if number % 10 == 0 {
            only(&net, 7001);
        }
    }
    only(&net, 7001);
    assert_eq!(daemon.ask("status", &[]).status.code(), Some(4));

    // Repaired: the same meaning, so the same generation, and no error any more.
    daemon.setup.write(&policy(7001));
    is_well(&daemon);
    assert_eq!(daemon.generation(), 1);
    daemon.swap(&policy(7002));
    only(&net, 7002);
}

#[test]
fn failing_tests_and_missing_files_block_the_swap() {
    let net = net();
    let daemon = Setup::new(&net.gateway, "gw-*", &policy(7001)).start();

    let tested = |expect: &str| {
        format!(
            "{}tests:\n  - {{ from: 10.1.0.2, to: 10.2.0.2, service: udp/7002, expect: {expect} }}\n",
            policy(7002)
        )
    };
    let text = tested("deny");
    daemon.setup.write(&text);
    let line = enforcer_tests::daemon::line_of(&text, "service: udp/7002, expect");
    error_with(&daemon, &format!("policy.yaml:{line}"));
    assert_eq!(daemon.generation(), 1);
    only(&net, 7001);
    daemon.swap(&tested("allow"));
    only(&net, 7002);
    is_well(&daemon);

    // The file, and the whole directory, go and come back.
    let generation = daemon.generation();
    fs::remove_file(daemon.setup.policy()).unwrap();
    error_with(&daemon, "no *.yaml");
    assert_eq!(daemon.generation(), generation);
    only(&net, 7002);
    fs::remove_dir(daemon.setup.segments()).unwrap();
    daemon.signal(Signal::SIGHUP);
    error_with(&daemon, "No such file");
    only(&net, 7002);
    fs::create_dir(daemon.setup.segments()).unwrap();
    daemon.setup.write(&policy(7001));
    daemon.wait_swapped(generation);
    only(&net, 7001);
    is_well(&daemon);

    // Cut off in the middle of a save.
    let text = policy(7002);
    fs::write(daemon.setup.policy(), &text[..text.len() / 2]).unwrap();
    error_with(&daemon, "policy.yaml:");
    only(&net, 7001);
    daemon.swap(&text);
    only(&net, 7002);
}

/// A policy whose segments overlap in so many ways that it takes long to compile.
fn large() -> String {
    let mut state = 1_u32;
    let mut random = |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % below
    };
    let mut text = "version: 1\nsegments:\n".to_owned();
    for segment in 0..60 {
        let members: Vec<String> = (0..40)
            .map(|_| match random(3) {
                0 => format!("{{cidr: 10.{}.0.0/16}}", random(64)),
                1 => format!("{{cidr: 10.{}.{}.0/20}}", random(64), random(16) * 16),
                _ => format!("{{cidr: 10.{}.{}.0/24}}", random(64), random(256)),
            })
            .collect();
        text += &format!("  s{segment}: {{ members: [{}] }}\n", members.join(", "));
    }
    text += "rules:\n";
    for rule in 0..300 {
        let (from, to, port) = (random(60), random(60), 1024 + random(60_000));
        text += &format!(
            "  - {{ name: r{rule}, from: [s{from}], to: [s{to}], services: [tcp/{port}] }}\n"
        );
    }
    text
}

#[test]
fn a_compiler_at_work_holds_up_nothing() {
    let net = Pair::new();
    let mut daemon = Setup::new(&net.host, "eth*", SEGMENTS).start();
    daemon.setup.write(&large());
    // The change is noticed after a moment of quiet.
    thread::sleep(Duration::from_millis(500));
    net.host.cable("eth7", &net.peer, "eth7");
    wait_for("eth7 to be enforced", Duration::from_secs(4), || {
        let status = daemon.status();
        let interfaces = status["interfaces"].as_array().unwrap();
        let new = interfaces.iter().find(|i| i["name"] == "eth7")?;
        (new["enforced"] == true).then_some(())
    });
    let start = Instant::now();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    assert!(start.elapsed() < scale::within(Duration::from_secs(4)));
}

#[test]
fn a_broken_file_does_not_keep_the_addresses_of_the_host_old() {
    let net = Pair::new();
    // The test of this policy holds on any host, whatever its addresses.
    let policy = format!(
        "{SEGMENTS}tests:\n  - {{from: 10.1.0.1, to: 10.2.0.1, service: tcp/80, expect: deny}}\n"
    );
    let daemon = Setup::new(&net.host, "eth0", &policy).start();
    daemon.setup.write("version: 1\nsegmnts: {}\n");
    error_with(&daemon, "segmnts");
    let before = daemon.generation();
    net.host.addresses("eth0", &["10.2.0.77/24"]);
    daemon.wait_swapped(before);
    let status = daemon.status();
    assert_eq!(status["state"], "degraded");
    assert_eq!(status["policy"]["segments"], 2);
    assert_eq!(status["socket_hooks"], "refuse");
    error_with(&daemon, "segmnts");
    // And back, with a good file.
    daemon.setup.write(&policy);
    is_well(&daemon);
}
