//! A policy on trial: the programs go back by themselves, whatever becomes of the daemon.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use enforcer::api::types::Time;
use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, enforcer, wait_for},
    netns::{Family, Routed},
    pins::Pins,
    scale, traffic,
};
use serde_json::Value;

/// A policy that lets `a` reach one UDP port of `b`, and of the gateway itself.
fn policy(port: u16) -> String {
    format!(
        "version: 1\n\
         segments:\n\
         \x20 a: {{ members: [{{cidr: 10.1.0.0/25}}] }}\n\
         \x20 b: {{ members: [{{cidr: 10.2.0.0/24}}] }}\n\
         rules:\n\
         \x20 - {{ name: one, from: [a], to: [b, host], services: [udp/{port}] }}\n"
    )
}

/// Two echo ports at `b`.
fn net() -> Routed {
    let net = Routed::new();
    for port in [7001, 7002] {
        traffic::udp_echo(&net.b, traffic::any(port));
    }
    net
}

fn setup<'a>(net: &'a Routed, pins: &Pins) -> Setup<'a> {
    let setup = Setup::new(&net.gateway, "gw-*", &policy(7001)).pinned(pins.path());
    let state = setup.segments().parent().unwrap().join("state");
    setup.with(&[
        "--socket-hooks",
        "off",
        "--state-dir",
        state.to_str().unwrap(),
    ])
}

/// Another directory with a policy, beside the one that is watched.
fn other(setup: &Setup<'_>, port: u16) -> PathBuf {
    let directory = setup.segments().parent().unwrap().join("other");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("policy.yaml"), policy(port)).unwrap();
    directory
}

fn port_of_b(port: u16) -> SocketAddr {
    (Family::V4.address(2, 2), port).into()
}

fn opens(net: &Routed, to: SocketAddr) -> bool {
    traffic::udp_answers(&net.a, None, to)
}

/// That exactly one of the two ports is open from `a` to `b`, on new sockets.
fn only(net: &Routed, open: u16) {
    assert!(
        traffic::udp_answers_soon(&net.a, port_of_b(open)),
        "{open} is open"
    );
    let other = 7001 + 7002 - open;
    assert!(!opens(net, port_of_b(other)), "{other} is closed");
}

/// Runs a verb that must succeed and answers with JSON.
fn told(daemon: &Daemon<'_>, verb: &str, arguments: &[&str]) -> Value {
    let output = daemon.ask(verb, &[arguments, &["-o", "json"]].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{verb}: {said}\n{}", daemon.log());
    serde_json::from_slice(&output.stdout).unwrap()
}

fn apply(daemon: &Daemon<'_>, path: &std::path::Path, within: Duration) -> Value {
    let within = format!("{}s", within.as_secs());
    let path = path.to_str().unwrap();
    let arguments = [
        path,
        "--confirm-within",
        &within,
        "-y",
        "--message",
        "a test",
    ];
    told(daemon, "apply", &arguments)
}

/// When the programs are to go back, as the daemon said.
fn deadline(trial: &Value) -> SystemTime {
    let time: Time = serde_json::from_value(trial["deadline"].clone()).unwrap();
    time.0.into()
}

/// Waits until `back` is open from `a`; that must be within a second of the deadline, on either
/// side. Where everything before took longer than the trial, within a second from now.
fn goes_back(net: &Routed, deadline: SystemTime, back: SocketAddr) {
    let deadline = deadline.max(SystemTime::now());
    let at = wait_for("what was before", LONG * 2, || {
        opens(net, back).then(SystemTime::now)
    });
    let tolerance = scale::within(Duration::from_secs(1));
    match at.duration_since(deadline) {
        Ok(late) => assert!(late < tolerance, "{late:?} late"),
        Err(early) => assert!(early.duration() < tolerance, "{early:?}"),
    }
}

/// Time for what a test does before a deadline.
fn short() -> Duration {
    scale::within(Duration::from_secs(6))
}

/// Outcomes of the changes of a kind, oldest first.
fn outcomes(daemon: &Daemon<'_>, kind: &str) -> Vec<String> {
    let history = told(daemon, "history", &[]);
    let changes = history["changes"].as_array().unwrap().iter();
    let changes = changes.filter(|change| change["kind"] == kind);
    changes
        .map(|change| change["outcome"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_trial_ends_in_the_kernel_and_a_confirmed_one_stays() {
    let (net, pins) = (net(), Pins::default());
    let daemon = setup(&net, &pins).start();
    only(&net, 7001);
    let other = other(&daemon.setup, 7002);
    let trial = apply(&daemon, &other, short())["trial"].clone();
    only(&net, 7002);
    assert_eq!(daemon.status()["trial"]["change"], trial["change"]);
    // Nothing else comes into force meanwhile.
    let refused = daemon.ask("apply", &[other.to_str().unwrap(), "-y"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("is on trial since"), "{said}");

    let files = daemon.kill();
    goes_back(&net, deadline(&trial), port_of_b(7001));
    only(&net, 7001);

    // The next daemon tidies up, and knows what happened.
    let daemon = files.start();
    only(&net, 7001);
    assert_eq!(daemon.status()["trial"], Value::Null);
    assert_eq!(outcomes(&daemon, "apply"), ["reverted", "refused"]);
    assert_eq!(outcomes(&daemon, "revert"), ["in_force"]);

    // Killed and started again, it goes on with the trial.
    apply(&daemon, &other, LONG * 10);
    let daemon = daemon.kill().start();
    assert_ne!(daemon.status()["trial"], Value::Null);
    only(&net, 7002);
    told(&daemon, "confirm", &[]);
    assert_eq!(daemon.ask("confirm", &[]).status.code(), Some(1));
    let daemon = daemon.kill().start();
    only(&net, 7002);
    let status = daemon.status();
    assert_eq!(status["policy"]["origin"]["kind"], "applied");
    assert_eq!(status["trial"], Value::Null);
    assert_eq!(outcomes(&daemon, "apply").last().unwrap(), "confirmed");

    // The state before is a state before across restarts as well.
    told(&daemon, "rollback", &["-y"]);
    only(&net, 7001);
    // An edit is newer than all that.
    daemon.swap(&policy(7002));
    only(&net, 7002);
}

#[test]
fn the_daemon_follows_the_kernel_at_the_deadline() {
    let (net, pins) = (net(), Pins::default());
    let daemon = setup(&net, &pins).start();
    let other = other(&daemon.setup, 7002);
    let trial = apply(&daemon, &other, short())["trial"].clone();
    let before = daemon.status()["policy"]["hash"].clone();
    only(&net, 7002);
    goes_back(&net, deadline(&trial), port_of_b(7001));
    wait_for("the status", LONG, || {
        let status = daemon.status();
        (status["trial"] == Value::Null).then_some(())
    });
    let late = SystemTime::now().duration_since(deadline(&trial)).unwrap();
    assert!(late < scale::within(Duration::from_secs(2)), "{late:?}");
    let status = daemon.status();
    assert_ne!(status["policy"]["hash"], before);
    assert!(
        status["warnings"]
            .to_string()
            .contains("was not confirmed in time"),
        "{status}"
    );
    assert!(daemon.log().contains("was not confirmed in time"));
    only(&net, 7001);
    // Ended by hand: at once.
    apply(&daemon, &other, LONG * 10);
    only(&net, 7002);
    told(&daemon, "rollback", &[]);
    only(&net, 7001);
}

#[test]
fn the_first_policy_goes_back_to_letting_everything_pass() {
    let (net, pins) = (net(), Pins::default());
    let within = format!("{}s", short().as_secs());
    let daemon = setup(&net, &pins)
        .with(&["--confirm-within", &within])
        .spawn();
    let trial = wait_for("the trial", LONG * 2, || {
        let trial = daemon.try_status()?["trial"].clone();
        (trial != Value::Null).then_some(trial)
    });
    only(&net, 7001);
    let files = daemon.kill();
    goes_back(&net, deadline(&trial), port_of_b(7002));
    assert!(traffic::udp_answers_soon(&net.a, port_of_b(7001)));
    // Tried again, and confirmed.
    let daemon = files.with(&["--confirm-within", "10m"]).start();
    only(&net, 7001);
    told(&daemon, "confirm", &[]);
    assert_eq!(outcomes(&daemon, "start"), ["reverted", "confirmed"]);
    only(&net, 7001);
}

#[test]
fn an_address_that_comes_during_a_trial_counts_after_it() {
    let (net, pins) = (net(), Pins::default());
    let daemon = setup(&net, &pins).start();
    let new = |port: u16| SocketAddr::from(([10, 1, 0, 200], port));
    let other = other(&daemon.setup, 7002);
    let within = scale::within(Duration::from_secs(8));
    let trial = apply(&daemon, &other, within)["trial"].clone();
    net.gateway.addresses("gw-a", &["10.1.0.200/24"]);
    for port in [7001, 7002] {
        traffic::udp_echo(&net.gateway, new(port));
    }
    assert!(traffic::udp_answers_soon(&net.a, new(7002)), "on trial");
    assert!(!opens(&net, new(7001)));
    drop(daemon.kill());
    goes_back(&net, deadline(&trial), new(7001));
    assert!(
        !opens(&net, new(7002)),
        "the policy before, with the address"
    );
}

#[test]
fn a_start_gets_out_of_a_trial_whose_way_back_somebody_unpinned() {
    let (net, pins) = (net(), Pins::default());
    let daemon = setup(&net, &pins).start();
    let before = daemon.generation();
    let other = other(&daemon.setup, 7002);
    let trial = apply(&daemon, &other, short())["trial"].clone();
    only(&net, 7002);
    let files = daemon.kill();
    fs::remove_file(pins.path().join(format!("current/images/{before}"))).unwrap();
    // What is in the kernel is not in danger.
    goes_back(&net, deadline(&trial), port_of_b(7001));
    let daemon = files.start();
    only(&net, 7001);
    assert!(
        daemon.log().contains("is pinned no more"),
        "{}",
        daemon.log()
    );
    assert_eq!(daemon.status()["trial"], Value::Null);
    assert_eq!(outcomes(&daemon, "apply"), ["reverted"]);
    let history = told(&daemon, "history", &[]).to_string();
    assert!(
        history.contains("has unpinned the image before it"),
        "{history}"
    );
    let images = pins.list().into_iter();
    let images: Vec<_> = images.filter(|pin| pin.contains("/images/")).collect();
    assert_eq!(images, [format!("current/images/{}", daemon.generation())]);
    // All goes on, with another trial as well.
    apply(&daemon, &other, LONG * 10);
    only(&net, 7002);
    told(&daemon, "rollback", &[]);
    only(&net, 7001);
}

/// As after a boot: nothing is in the kernel, and the files are broken.
#[test]
fn the_last_image_is_in_force_before_the_files_are_read() {
    let (net, pins) = (net(), Pins::default());
    let daemon = setup(&net, &pins).start();
    let hash = daemon.status()["policy"]["hash"].clone();
    told(&daemon, "history", &[]);
    let (files, _) = daemon.stop();
    let (pinned, socket) = (pins.path().to_str().unwrap(), files.socket());
    let arguments = [
        "detach",
        "--yes",
        "--pins",
        pinned,
        "--socket",
        socket.to_str().unwrap(),
    ];
    let output = net.gateway.enter(|| enforcer(&arguments));
    assert!(output.status.success(), "{output:?}");
    assert!(traffic::udp_answers_soon(&net.a, port_of_b(7002)), "gone");
    files.write("version: 1\nsegmnts: {}\n");
    let pins = Pins::default();
    let daemon = files.pinned(pins.path()).spawn();
    let status = wait_for("the daemon", LONG * 2, || {
        let status = daemon.try_status()?;
        (status["state"] == "degraded").then_some(status)
    });
    assert_eq!(status["policy"]["hash"], hash);
    assert_eq!(status["policy"]["origin"]["kind"], "last_good");
    assert!(
        status["policy"]["last_error"]
            .as_str()
            .unwrap()
            .contains("segmnts")
    );
    only(&net, 7001);
    let log = daemon.log();
    let early = log.find("the last image is in force until").unwrap();
    let late = log.find("the watched files cannot be used").unwrap();
    assert!(early < late, "{log}");
    // Mended, the files are what counts.
    daemon.swap(&policy(7002));
    only(&net, 7002);
}
