//! `enforcer doctor` finds what is wrong with a host, and says what mends it.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, binary, wait_for},
    netns::{Netns, Pair, directory},
    rival::{self, Hook, Place},
    user::User,
};
use serde_json::Value;

const POLICY: &str = "version: 1\nsegments: {a: {members: [{cidr: 10.0.0.0/8}]}}\n";

const XDP_PASS: i32 = 2;

/// Linux 6.6; `/proc/sys/kernel/osrelease` begins with two numbers.
fn has_tcx() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split('.')
        .map(|n| n.trim().parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap()) >= (6, 6)
}

/// Runs it in a namespace.
fn doctor(namespace: &Netns, arguments: &[&str]) -> Output {
    namespace.enter(|| {
        let mut command = Command::new(binary());
        command.env_remove("ENFORCER_SOCKET").arg("doctor");
        command.args(arguments).output().unwrap()
    })
}

fn report(output: &Output) -> Value {
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let ok = report["ok"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(i32::from(!ok)), "{report}");
    for check in report["checks"].as_array().unwrap() {
        let fine = check["state"] == "ok";
        assert_eq!(
            check["mend"].is_null(),
            fine,
            "what is not fine can be mended: {check}"
        );
    }
    report
}

fn checks<'a>(report: &'a Value, name: &str) -> Vec<&'a Value> {
    let all = report["checks"].as_array().unwrap();
    all.iter().filter(|check| check["name"] == name).collect()
}

fn about(daemon: &Daemon<'_>, namespace: &Netns) -> Value {
    let (socket, segments) = (daemon.setup.socket(), daemon.setup.segments());
    let settings = daemon.setup.settings();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let (socket, segments, settings) = (path(&socket), path(&segments), path(&settings));
    report(&doctor(
        namespace,
        &[
            "-o",
            "json",
            "--socket",
            &socket,
            "--segments",
            &segments,
            "--config",
            &settings,
        ],
    ))
}

#[test]
fn a_host_that_is_well_gets_no_complaint() {
    let pair = Pair::new();
    let daemon = Setup::new(&pair.host, "eth0", POLICY)
        .with_settings("version: 1\n")
        .start();
    let report = about(&daemon, &pair.host);
    assert_eq!(report["ok"], true, "{report:#}");
    for name in [
        "btf",
        "bpffs",
        "cgroup v2",
        "capabilities",
        "daemon",
        "files",
        "socket",
    ] {
        let found = checks(&report, name);
        assert_eq!(found.len(), 1, "{name}: {report:#}");
        assert_eq!(found[0]["state"], "ok", "{name}: {report:#}");
    }
    let said = checks(&report, "capabilities")[0]["said"].as_str().unwrap();
    assert!(said.starts_with("the daemon has"), "{said}");
    // For people, the same.
    let socket = daemon.setup.socket();
    let output = doctor(&pair.host, &["--socket", socket.to_str().unwrap()]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("ok    daemon        enforcing, version "),
        "{text}"
    );
}

#[test]
fn files_and_modes_that_are_wrong_fail_until_they_are_mended() {
    let pair = Pair::new();
    let daemon = Setup::new(&pair.host, "eth0", POLICY)
        .with_settings("version: 1\n")
        .start();
    let policy = daemon.setup.policy();
    let chmod = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    chmod(&policy, 0o666);
    chmod(&daemon.setup.socket(), 0o666);
    let report = about(&daemon, &pair.host);
    assert_eq!(report["ok"], false);
    let files = checks(&report, "files");
    assert_eq!(files.len(), 1, "{report:#}");
    assert_eq!(files[0]["state"], "fail");
    let mend = files[0]["mend"].as_str().unwrap().to_owned();
    assert_eq!(mend, format!("chmod go-w {}", policy.display()));
    assert_eq!(checks(&report, "socket")[0]["state"], "warn");
    let mended = Command::new("/bin/sh").args(["-c", &mend]).status();
    if mended.is_err() {
        // Small guests have no shell.
        chmod(&policy, 0o644);
    }
    let report = about(&daemon, &pair.host);
    assert_eq!(checks(&report, "files")[0]["state"], "ok", "{report:#}");
}

#[test]
fn a_program_in_front_of_the_enforcers_is_found() {
    let pair = Pair::new();
    let daemon = Setup::new(&pair.host, "eth0", POLICY)
        .with_settings("version: 1\n")
        .start();
    let attach = |place| {
        let program = rival::program(Hook::TcxIngress, -1).unwrap();
        let attached = pair
            .host
            .enter(|| rival::on_interface(&program, Hook::TcxIngress, "eth0", place));
        (program, attached)
    };
    if !has_tcx() {
        println!("SKIPPED: this kernel has no tcx");
        return;
    }
    let (_program, behind) = attach(Place::Last);
    let behind = behind.unwrap();
    let report = about(&daemon, &pair.host);
    let found = checks(&report, "interfaces")[0];
    assert_eq!(found["state"], "ok", "{report:#}");
    assert!(
        found["said"]
            .as_str()
            .unwrap()
            .contains("asked after the enforcer")
    );
    drop(behind);

    // Three times the enforcer takes the first place again.
    let mut others = Vec::new();
    for times in 1..=3 {
        others.push(attach(Place::First).1.unwrap());
        wait_for("the first place again", LONG, || {
            let records = daemon.denials(&[]);
            let first = records
                .iter()
                .filter(|r| r["target"] == "tc_ingress on eth0");
            (first.count() == times).then_some(())
        });
    }
    drop(others);
    let (_program, front) = attach(Place::First);
    let front = front.unwrap();
    wait_for("the enforcer to say so", LONG, || {
        let status = daemon.status();
        let problems = status["problems"].as_array()?;
        let not_first = |p: &Value| p.as_str().is_some_and(|p| p.contains("was not the first"));
        problems.iter().any(not_first).then_some(())
    });
    let report = about(&daemon, &pair.host);
    let found = checks(&report, "interfaces")[0];
    assert_eq!(
        (&report["ok"], &found["state"]),
        (&false.into(), &"fail".into())
    );
    let said = found["said"].as_str().unwrap();
    assert!(
        said.starts_with("eth0: asked before the enforcer"),
        "{said}"
    );
    drop(front);
    assert_eq!(about(&daemon, &pair.host)["ok"], true);
}

#[test]
fn filters_and_xdp_programs_of_others_are_found() {
    let pair = Pair::new();
    let daemon = Setup::new(&pair.host, "eth0", POLICY)
        .with_settings("version: 1\n")
        .start();
    let tc = |words: &str, last: &str| {
        let words: Vec<_> = words.split(' ').chain([last]).collect();
        pair.host.ask("tc", &words).unwrap();
    };
    let found = |state: &str, what: &str| {
        let report = about(&daemon, &pair.host);
        let found = checks(&report, "interfaces");
        let is = |check: &&&Value| {
            let said = check["said"].as_str().unwrap();
            check["state"] == state && said.starts_with(what)
        };
        assert!(found.iter().any(|c| is(&c)), "{state} {what}: {report:#}");
        found.len()
    };
    assert_eq!(found("ok", "eth0: no program of anybody else's"), 1);
    if has_tcx() {
        tc("qdisc add dev eth0", "clsact");
    }
    tc(
        "filter add dev eth0 ingress protocol all prio 5 u32 match u32 0 0 flowid",
        "1:1",
    );
    found(
        "ok",
        "eth0: asked after the enforcer: tc_ingress 5 (u32 filter)",
    );
    // The kernel asks the youngest of a priority first, and all of tcx before that.
    tc(
        "filter add dev eth0 egress protocol all prio 1 bpf bytecode",
        "1,6 0 0 0",
    );
    if has_tcx() {
        found("ok", "eth0: asked after the enforcer: ");
    } else {
        found(
            "fail",
            "eth0: asked before the enforcer, and can pass what it would deny: tc_egress",
        );
    }

    let xdp = "eth0: an XDP program (id ";
    let program = rival::program(Hook::Xdp, XDP_PASS).unwrap();
    let link = pair
        .host
        .enter(|| rival::on_interface(&program, Hook::Xdp, "eth0", Place::Generic));
    let link = link.unwrap();
    assert_eq!(found("warn", xdp), 2);
    drop(link);
    assert_eq!(
        found(if has_tcx() { "ok" } else { "fail" }, "eth0: asked"),
        1
    );
}

#[test]
fn without_a_daemon_or_root_it_says_what_it_can() {
    let place = directory();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (socket, segments) = (place.path().join("none"), place.path().join("segments"));
    let arguments = [
        "doctor",
        "-o",
        "json",
        "--socket",
        socket.to_str().unwrap(),
        "--segments",
        segments.to_str().unwrap(),
        "--interface",
        "nosuch*",
    ];
    for uid in [0, 61_321] {
        let report = report(&User::new(uid, &[]).enforcer(&arguments));
        let one = |name: &str| checks(&report, name)[0].clone();
        assert_eq!(one("daemon")["state"], "warn", "{report:#}");
        assert_eq!(one("files")["state"], "warn", "{report:#}");
        assert!(
            one("interfaces")["said"]
                .as_str()
                .unwrap()
                .contains("nosuch*")
        );
        let state = if uid == 0 { "ok" } else { "warn" };
        assert_eq!(one("capabilities")["state"], state, "{report:#}");
    }
}
