//! The binary as its users meet it: output, exit codes, streams.

use std::{
    fs,
    io::Read,
    os::unix::net::UnixListener,
    path::Path,
    process::{Command, Output, Stdio},
};

const POLICY: &str = "\
version: 1
segments:
  ehr-db:
    members: [{cidr: 10.10.1.0/24}]
    protect: inbound
  guest-wifi:
    members: [{cidr: 10.99.0.0/16}]
    mode: observe
rules:
  - {name: app-to-db, from: [any], to: [ehr-db], services: [tcp/5432]}
tests:
  - {from: 10.99.3.4, to: 10.10.1.5, service: tcp/22, expect: deny}
";

fn enforcer(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_enforcer"));
    command
        .args(args)
        .env_remove("ENFORCER_SOCKET")
        .env_remove("NO_COLOR")
        .stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = enforcer(args).output().unwrap();
    (
        status.code().unwrap(),
        String::from_utf8(stdout).unwrap(),
        String::from_utf8(stderr).unwrap(),
    )
}

fn policy(dir: &Path, text: &str) -> String {
    let file = dir.join("hospital.yaml");
    fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn check_accepts_a_good_policy() {
    let dir = tempfile::tempdir().unwrap();
    let path = policy(dir.path(), POLICY);
    let (code, stdout, stderr) = run(&["check", &path]);
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("hospital.yaml: ok\n  2 segments, 1 rule, 1 test passed\n  image "));

    let (code, stdout, _) = run(&["check", dir.path().to_str().unwrap(), "-o", "json"]);
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &report["ok"]), (0, &true.into()));
    assert_eq!(report["summary"]["segments"], 2);
}

#[test]
fn check_refuses_a_bad_policy_with_exit_code_1() {
    let dir = tempfile::tempdir().unwrap();
    let path = policy(dir.path(), &POLICY.replace("to: [ehr-db]", "to: [ehr-bd]"));
    let (code, stdout, _) = run(&["check", &path]);
    assert_eq!(code, 1);
    assert!(stdout.contains("hospital.yaml:10:"), "{stdout}");
    assert!(stdout.contains("ehr-db"), "{stdout}");
    assert!(!stdout.contains('\u{1b}'), "colour into a pipe");
    let (_, coloured, _) = run(&["check", &path, "--color", "always"]);
    assert!(coloured.contains('\u{1b}'));

    let (code, stdout, _) = run(&["check", &path, "-o", "json"]);
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &report["diagnostics"][0]["line"]), (1, &10.into()));

    let path = policy(dir.path(), &POLICY.replace("expect: deny", "expect: allow"));
    let (code, stdout, _) = run(&["check", &path]);
    assert_eq!(code, 1);
    assert!(stdout.contains("the test expects allow"), "{stdout}");

    let (code, stdout, _) = run(&["check", "/nonexistent/segments"]);
    assert_eq!(code, 1);
    assert!(
        stdout.contains("cannot read /nonexistent/segments"),
        "{stdout}"
    );
}

#[test]
fn explain_works_offline() {
    let dir = tempfile::tempdir().unwrap();
    let path = policy(dir.path(), POLICY);
    let explain = |service| {
        run(&[
            "explain",
            "--from",
            "10.99.3.4",
            "--to",
            "10.10.1.5",
            "--service",
            service,
            "--segments",
            &path,
        ])
    };
    let (code, stdout, _) = explain("postgresql");
    assert_eq!(code, 0);
    assert!(
        stdout.starts_with("ALLOWED  10.99.3.4 -> 10.10.1.5 postgresql\n"),
        "{stdout}"
    );
    assert!(
        stdout.contains("rule app-to-db (allow)  hospital.yaml:10\n"),
        "{stdout}"
    );
    let (_, stdout, _) = explain("tcp/22");
    assert!(stdout.starts_with("DENIED "), "{stdout}");
    assert!(
        stdout.contains("ehr-db protects inbound, mode enforce  hospital.yaml:3\n"),
        "{stdout}"
    );
    assert!(stdout.contains("from     guest-wifi\n") && stdout.contains("to       ehr-db\n"));
    let (code, stdout, stderr) = explain("tcp/1-9");
    assert_eq!((code, stdout.as_str()), (64, ""));
    assert!(stderr.contains("tcp/1-9"), "{stderr}");
}

#[test]
fn explain_refuses_flows_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = policy(dir.path(), POLICY);
    for (from, to, part) in [
        ("10.0.0.1", "fd00::1", "different families"),
        ("::ffff:10.0.0.1", "fd00::1", "write 10.0.0.1"),
    ] {
        let (code, _, stderr) = run(&[
            "explain",
            "--from",
            from,
            "--to",
            to,
            "--service",
            "tcp/22",
            "--segments",
            &path,
        ]);
        assert_eq!(code, 64);
        assert!(stderr.contains(part), "{stderr}");
    }
}

#[test]
fn usage_errors_are_64_and_help_is_data() {
    for args in [
        &["no-such-verb"][..],
        &[],
        &["run", "--segments", "x"],
        &["run", "--segments", "x", "--interface", "a b"],
        &[
            "explain",
            "--from",
            "nonsense",
            "--to",
            "10.0.0.1",
            "--service",
            "tcp/1",
        ],
        &["denials", "--from", "Not A Name"],
    ] {
        let (code, stdout, stderr) = run(args);
        assert_eq!((code, stdout.as_str()), (64, ""), "{args:?}");
        assert!(!stderr.is_empty());
    }
    let (code, stdout, stderr) = run(&["--help"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert!(stdout.contains("Exit codes:"));
    for shell in ["bash", "zsh", "fish"] {
        let (code, stdout, _) = run(&["completions", shell]);
        assert!(code == 0 && stdout.contains("enforcer"));
    }
}

#[test]
fn without_a_daemon_nothing_is_enforced() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    let socket = socket.to_str().unwrap();
    let (code, stdout, stderr) = run(&["status", "--socket", socket]);
    assert_eq!((code, stdout.as_str()), (5, ""));
    assert!(stderr.contains("no enforcer answers"), "{stderr}");
    let (code, stdout, _) = run(&["status", "-o", "json", "--socket", socket]);
    let status: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &status["state"]), (5, &"not_enforcing".into()));
    assert_eq!(run(&["denials", "--socket", socket]).0, 5);

    // A socket file that nobody listens on any more, by way of the environment.
    drop(UnixListener::bind(socket).unwrap());
    let output = enforcer(&["status"])
        .env("ENFORCER_SOCKET", socket)
        .output();
    assert_eq!(output.unwrap().status.code(), Some(5));
}

#[test]
fn a_closed_pipe_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = policy(dir.path(), POLICY);
    for args in [
        &["check", &path][..],
        &["check", &path, "-o", "json"],
        &["completions", "bash"],
        &["--help"],
    ] {
        let mut child = enforcer(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let mut stderr = String::new();
        let pipe = child.stderr.as_mut().unwrap();
        pipe.read_to_string(&mut stderr).unwrap();
        let code = child.wait().unwrap().code();
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{args:?}");
    }
}
