//! The binary as its users meet it: output, exit codes, streams.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixListener,
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
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
fn help_is_a_verb_too() {
    let (code, stdout, stderr) = run(&["help"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert!(stdout.contains("Usage: enforcer"), "{stdout}");
    let (code, stdout, _) = run(&["help", "denials"]);
    assert_eq!(code, 0);
    assert!(stdout.contains("--follow"), "{stdout}");
}

#[test]
fn nobody_is_asked_where_nobody_is() {
    for verb in [
        &["apply", "x"][..],
        &["rollback", "3"],
        &["rollback", "--dry-run", "--confirm-within", "1s"],
    ] {
        let nowhere = ["--socket", "/nonexistent/socket"];
        let (code, stdout, stderr) = run(&[verb, &nowhere].concat());
        assert_eq!((code, stdout.as_str()), (64, ""), "{stderr}");
    }
    let (_, _, stderr) = run(&["apply", "x", "--socket", "/nonexistent/socket"]);
    assert!(
        stderr.contains("no terminal") && stderr.contains("-y"),
        "{stderr}"
    );
    let (_, _, stderr) = run(&["apply", "x", "-y", "--confirm-within", "2s"]);
    assert!(stderr.contains("3s to 24h"), "{stderr}");
    // Told not to ask, it asks the daemon, which is not there.
    for verb in [
        &["apply", "x", "-y"][..],
        &["confirm"],
        &["history"],
        &["apply", "x", "--dry-run"],
    ] {
        let nowhere = ["--socket", "/nonexistent/socket"];
        let (code, _, stderr) = run(&[verb, &nowhere].concat());
        assert_eq!(code, 5, "{stderr}");
    }
}

#[test]
fn the_loopback_is_refused_by_name() {
    let (code, stdout, stderr) = run(&["run", "--segments", "x.yaml", "--interface", "eth0,lo"]);
    assert_eq!((code, stdout.as_str()), (64, ""));
    assert!(
        stderr.contains("--interface lo: this is the loopback"),
        "{stderr}"
    );
}

#[test]
fn addresses_of_two_families_are_no_flow_with_or_without_a_daemon() {
    let (code, _, stderr) = run(&[
        "explain",
        "--from",
        "10.0.0.1",
        "--to",
        "fd00::1",
        "--service",
        "tcp/1",
        "--socket",
        "/nonexistent/socket",
    ]);
    assert_eq!(code, 64, "{stderr}");
    assert!(stderr.contains("different families"), "{stderr}");
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
fn check_reads_settings_alone_and_with_a_policy() {
    let dir = tempfile::tempdir().unwrap();
    let path = policy(dir.path(), POLICY);
    let settings = dir.path().join("enforcer.yaml");
    fs::write(
        &settings,
        "version: 1\nessentials: {off: [stp]}\nfailsafe: [{name: a, sources: [10.0.0.0/8], ports: [tcp/22]}]\n",
    )
    .unwrap();
    let config = settings.to_str().unwrap();
    let (code, stdout, stderr) = run(&["check", "--config", config]);
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    let said = format!("{config}: ok\n  settings: 1 failsafe, 0 ethertypes, essentials off: stp\n");
    assert_eq!(stdout, said);
    let (code, stdout, _) = run(&["check", &path, "--config", config]);
    assert_eq!(code, 0);
    assert!(
        stdout.contains("2 segments, 1 rule") && stdout.contains("1 failsafe"),
        "{stdout}"
    );
    let (_, stdout, _) = run(&["check", "--config", config, "-o", "json"]);
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["settings"]["essentials_off"][0], "stp");
    assert_eq!(report["summary"], serde_json::Value::Null);

    fs::write(&settings, "version: 1\nessentials: {off: [spt]}\n").unwrap();
    for arguments in [
        &["check", "--config", config][..],
        &["check", &path, "--config", config],
    ] {
        let (code, stdout, _) = run(arguments);
        assert_eq!(code, 1, "{stdout}");
        assert!(stdout.contains("did you mean `stp`?"), "{stdout}");
        assert!(stdout.contains("enforcer.yaml:2:20"), "{stdout}");
    }
    let (code, stdout, _) = run(&["check", "--config", "/nonexistent/enforcer.yaml"]);
    assert_eq!(code, 1);
    assert!(
        stdout.contains("cannot read /nonexistent/enforcer.yaml"),
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

const DENIAL: &str = r#"{"time":"2026-03-04T12:04:31.207Z","verdict":"WOULD_DENY","reason":"rule_deny","rule":"guests-out","default":null,"file":"hospital.yaml","line":12,"from_segments":["guest-wifi"],"to_segments":["ehr-app","ehr-db"],"src":"fd00::4","dst":"fd00::5","src_port":51514,"dst_port":443,"protocol":"udp","tcp_flags":null,"icmp_type":null,"icmp_code":null,"direction":"egress","interface":"eth0","process":null,"packets":3,"generation":1}"#;

/// Answers one request with one line of a stream that stays open while `hold` lives.
fn stream_one(socket: &Path, hold: std::sync::mpsc::Receiver<()>) {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut request = BufReader::new(stream.try_clone().unwrap());
        let mut line = String::new();
        while request.read_line(&mut line).unwrap() > 2 {
            line.clear();
        }
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        let body = format!("{head}{:x}\r\n{DENIAL}\n\r\n", DENIAL.len() + 1);
        let mut stream = stream;
        stream.write_all(body.as_bytes()).unwrap();
        let _ = hold.recv();
    });
}

fn first_line(child: &mut Child) -> String {
    let mut line = String::new();
    let stdout = child.stdout.take().unwrap();
    BufReader::new(stdout).read_line(&mut line).unwrap();
    line
}

#[test]
fn follow_prints_at_once_and_ends_when_its_reader_does() {
    let dir = tempfile::tempdir().unwrap();
    for (format, expected) in [
        (
            "text",
            "WOULD_DENY  guest-wifi [fd00::4]:51514 -> ehr-app,ehr-db [fd00::5]:443 udp  \
             egress eth0  rule guests-out (deny)  hospital.yaml:12  ×3\n",
        ),
        ("json", DENIAL),
    ] {
        let socket = dir.path().join(format);
        let (held, hold) = std::sync::mpsc::channel();
        stream_one(&socket, hold);
        let mut child = enforcer(&["denials", "-f", "-o", format, "--socket"])
            .arg(&socket)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let line = first_line(&mut child);
        assert!(line.contains(expected), "{line}");
        // The pipe is closed now, and no second denial comes.
        let deadline = Instant::now() + Duration::from_secs(5);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                child.kill().unwrap();
            }
            thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(status.code(), Some(0));
        drop(held);
    }
}
