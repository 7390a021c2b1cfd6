//! Who may use the control sockets, and how much.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs,
    io::{self, ErrorKind, Read as _, Write as _},
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    netns::{Pair, directory},
    scale, traffic,
    user::{User, answer, converse},
};
use serde_json::Value;

const POLICY: &str = "\
version: 1
segments:
  here: { members: [{cidr: 10.1.0.0/24}, {cidr: \"fd01::/64\"}] }
rules:
  - { name: echo, from: [here], to: [host], services: [udp/7777] }
";

/// Ids that nothing else has. Numbers do for groups: no test touches `/etc/group`.
const CHANGE: u32 = 61_001;
const VIEW: u32 = 61_002;
const SOMEBODY: u32 = 61_010;
const STRANGER: u32 = 61_999;

const GROUPS: &str = "version: 1\ncontrol: { change: 61001, view: 61002 }\n";

struct Sockets {
    _place: tempfile::TempDir,
    control: PathBuf,
    view: PathBuf,
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Mode and group.
fn guard(path: &Path) -> (u32, u32) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.mode() & 0o7777, metadata.gid())
}

/// A daemon with both sockets in directories that others may look for.
fn start<'a>(pair: &'a Pair, settings: &str) -> (Daemon<'a>, Sockets) {
    let place = directory();
    mode(place.path(), 0o755);
    let view = place.path().join("view/view.sock");
    let daemon = Setup::new(&pair.host, "eth0", POLICY)
        .with(&["--view-socket", view.to_str().unwrap()])
        .with_settings(settings)
        .start();
    let control = daemon.setup.socket();
    mode(control.parent().unwrap(), 0o755);
    let sockets = Sockets {
        _place: place,
        control,
        view,
    };
    (daemon, sockets)
}

fn shut(result: io::Result<(u16, Value)>) {
    let error = result.map(|answer| panic!("{answer:?}")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
}

fn forbidden((code, said): (u16, Value), group: u32) -> String {
    assert_eq!((code, &said["code"]), (403, &"forbidden".into()), "{said}");
    assert_eq!(said["group"], group.to_string(), "{said}");
    said["error"].as_str().unwrap().to_owned()
}

const EXPLAIN: &str =
    "POST /v1/explain\n{\"from\": \"10.1.0.2\", \"to\": \"10.1.0.1\", \"service\": \"udp/7777\"}";
const ASKING: [&str; 6] = [
    "GET /v1/history",
    "GET /v1/status",
    "GET /v1/denials",
    "GET /v1/flows?limit=2",
    EXPLAIN,
    "GET /v1/openapi.json",
];
const RELOAD: &str = "POST /v1/reload";
/// Other changes, and what becomes of them if one may ask for them.
const CHANGES: [(&str, u16); 3] = [
    ("POST /v1/apply\n{\"path\": \"/nonexistent\"}", 422),
    ("POST /v1/confirm", 409),
    ("POST /v1/rollback", 400),
];
/// Changes nothing, but has the daemon read what its caller names.
const PLAN: &str = "POST /v1/plan\n{}";

#[test]
fn root_and_groups_may_what_they_may_and_strangers_nothing() {
    let pair = Pair::new();
    let (daemon, sockets) = start(&pair, GROUPS);
    assert_eq!(guard(&sockets.control), (0o660, CHANGE));
    assert_eq!(guard(&sockets.view), (0o660, VIEW));
    assert_eq!(guard(sockets.view.parent().unwrap()), (0o750, VIEW));

    let changer = User::new(SOMEBODY, &[7, CHANGE]);
    let first = User {
        gid: CHANGE,
        ..User::new(SOMEBODY, &[])
    };
    let viewer = User::new(SOMEBODY + 1, &[VIEW]);
    let stranger = User::new(STRANGER, &[0, 7]);
    let root = User::new(0, &[]);
    for request in ASKING {
        for user in [&changer, &first, &root] {
            assert_eq!(
                user.ask(&sockets.control, request).unwrap().0,
                200,
                "{request}"
            );
        }
        for user in [&viewer, &root] {
            assert_eq!(
                user.ask(&sockets.view, request).unwrap().0,
                200,
                "{request}"
            );
        }
    }
    for user in [&changer, &first, &root] {
        let (code, said) = user.ask(&sockets.control, RELOAD).unwrap();
        assert_eq!((code, &said["generation"]), (200, &1.into()), "{said}");
    }
    // Who it was is in the log.
    let log = daemon.log();
    let by: Vec<_> = log
        .lines()
        .filter(|line| line.contains("reloaded") && line.contains("by="))
        .collect();
    assert_eq!(by.len(), 3, "{log}");
    assert!(by[0].contains(&format!("uid {SOMEBODY} (no name")), "{log}");
    assert!(by[0].contains("pid "), "{log}");
    assert!(by[2].contains("root (uid 0"), "{log}");

    for (change, code) in CHANGES {
        let (found, said) = changer.ask(&sockets.control, change).unwrap();
        assert_eq!(found, code, "{change}: {said}");
    }

    // The kernel keeps the others out.
    shut(viewer.ask(&sockets.control, ASKING[0]));
    shut(changer.ask(&sockets.view, ASKING[0]));
    shut(stranger.ask(&sockets.control, ASKING[0]));
    shut(stranger.ask(&sockets.view, ASKING[0]));
    // A socket for asking is for asking, even for root: it may be in anybody's container.
    for user in [&viewer, &root] {
        forbidden(user.ask(&sockets.view, RELOAD).unwrap(), CHANGE);
        for (change, _) in CHANGES {
            forbidden(user.ask(&sockets.view, change).unwrap(), CHANGE);
        }
        forbidden(user.ask(&sockets.view, PLAN).unwrap(), CHANGE);
    }
    let (code, said) = changer.ask(&sockets.control, PLAN).unwrap();
    assert_eq!((code, &said["changed"]), (200, &false.into()), "{said}");
    // Diagnostics quote lines of files, and the daemon reads what only root may.
    let secret = daemon.setup.segments().join("secret");
    fs::write(&secret, "password: hunter2\n").unwrap();
    mode(&secret, 0o600);
    for (verb, refused) in [("plan", 400), ("apply", 422)] {
        let request = format!("POST /v1/{verb}\n{{\"path\": \"{}\"}}", secret.display());
        let (code, said) = changer.ask(&sockets.control, &request).unwrap();
        let error = said["error"].as_str().unwrap();
        assert_eq!(code, refused, "{verb}: {said}");
        assert!(error.contains("*.yaml or *.yml"), "{verb}: {said}");
        assert!(!said.to_string().contains("hunter2"), "{verb}: {said}");
    }
}

#[test]
fn a_door_left_open_lets_nobody_in() {
    let pair = Pair::new();
    let (daemon, sockets) = start(&pair, GROUPS);
    mode(&sockets.control, 0o666);
    mode(&sockets.view, 0o666);
    mode(sockets.view.parent().unwrap(), 0o755);
    let (stranger, viewer) = (User::new(STRANGER, &[7]), User::new(SOMEBODY, &[VIEW]));
    for request in ASKING {
        for socket in [&sockets.control, &sockets.view] {
            let said = forbidden(stranger.ask(socket, request).unwrap(), VIEW);
            assert!(said.contains(&format!("uid {STRANGER} may not")), "{said}");
        }
        assert_eq!(viewer.ask(&sockets.control, request).unwrap().0, 200);
    }
    for user in [&stranger, &viewer] {
        forbidden(user.ask(&sockets.control, RELOAD).unwrap(), CHANGE);
    }
    // Root of a container with users of its own is whoever that is outside.
    let contained = User {
        contained: true,
        ..stranger.clone()
    };
    match contained.ask(&sockets.control, RELOAD) {
        Ok(answer) => {
            let said = forbidden(answer, CHANGE);
            assert!(said.contains(&format!("uid {STRANGER} may not")), "{said}");
        }
        // Closed on some machines to those who are not root.
        Err(error) => {
            let closed = [libc::EPERM, libc::ENOSPC, libc::EUSERS, libc::EINVAL];
            assert!(closed.contains(&error.raw_os_error().unwrap()), "{error}");
            println!("SKIPPED: no user namespace: {error}");
        }
    }
    // What there is, a stranger does not learn.
    forbidden(
        stranger.ask(&sockets.control, "GET /v1/none").unwrap(),
        VIEW,
    );
    assert_eq!(daemon.generation(), 1);
    let log = daemon.log();
    let refused = |uid: u32| {
        let of = |line: &&str| line.contains("refused a caller") && line.contains(&uid.to_string());
        log.lines().filter(of).count()
    };
    assert_eq!((refused(STRANGER), refused(SOMEBODY)), (1, 1), "{log}");
    assert!(!log.contains("reloaded"), "{log}");

    // The command line says which group it takes.
    let socket = sockets.control.to_str().unwrap();
    let output = stranger.enforcer(&["status", "--socket", socket]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("member of group 61002"), "{said}");
    let output = viewer.enforcer(&["status", "--socket", sockets.view.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn groups_change_with_the_settings() {
    let pair = Pair::new();
    let (daemon, sockets) = start(&pair, GROUPS);
    let (old, new) = (User::new(SOMEBODY, &[CHANGE]), User::new(SOMEBODY, &[VIEW]));
    // A connection that was made before the change.
    let before = old.connect(&sockets.control).unwrap();
    daemon
        .setup
        .write_settings("version: 1\ncontrol: { change: 61002, view: 61003 }\n");
    wait_for("the new groups", LONG, || {
        (guard(&sockets.control) == (0o660, VIEW)).then_some(())
    });
    wait_for("the new groups", LONG, || {
        (guard(&sockets.view) == (0o660, VIEW + 1)).then_some(())
    });
    assert_eq!(new.ask(&sockets.control, RELOAD).unwrap().0, 200);
    shut(old.ask(&sockets.control, ASKING[0]));
    forbidden(converse(before, ASKING[0]), VIEW + 1);

    // Names that this host does not have: root alone.
    daemon
        .setup
        .write_settings("version: 1\ncontrol: { change: no-such-group, view: none-such }\n");
    wait_for("no groups", LONG, || {
        (guard(&sockets.control).0 == 0o600).then_some(())
    });
    wait_for("no groups", LONG, || {
        (guard(sockets.view.parent().unwrap()).0 == 0o700).then_some(())
    });
    assert!(daemon.log().contains("groupadd --system no-such-group"));
    shut(new.ask(&sockets.control, ASKING[0]));
    assert_eq!(daemon.status()["state"], "enforcing");

    // A name that cannot be one changes nothing.
    daemon
        .setup
        .write_settings("version: 1\ncontrol: { change: \"a b\" }\n");
    wait_for("the error", LONG, || {
        let status = daemon.status();
        let error = status["policy"]["last_error"].as_str()?;
        error
            .contains("`a b` is not the name of a group")
            .then_some(())
    });
}

#[test]
fn requests_that_there_are_not_are_refused_for_programs_too() {
    let pair = Pair::new();
    let (_daemon, sockets) = start(&pair, GROUPS);
    let ask = |request: &str| {
        let stream = UnixStream::connect(&sockets.control).unwrap();
        let (code, said) = converse(stream, request);
        assert!(said["error"].is_string(), "{request}: {said}");
        (code, said["code"].as_str().unwrap().to_owned())
    };
    let is = |code, word: &str| (code, word.to_owned());
    assert_eq!(ask("GET /v1/nothing"), is(404, "not_found"));
    assert_eq!(ask("GET /status"), is(404, "not_found"));
    assert_eq!(ask("GET /v1/reload"), is(405, "method_not_allowed"));
    assert_eq!(ask("DELETE /v1/status"), is(405, "method_not_allowed"));
    assert_eq!(ask("POST /v1/explain\n{"), is(400, "bad_request"));
    assert_eq!(
        ask("POST /v1/explain\n{\"from\": 1}"),
        is(400, "bad_request")
    );
    assert_eq!(ask("GET /v1/denials?last=x"), is(400, "bad_request"));
    assert_eq!(ask("GET /v1/denials?from=nobody"), is(400, "bad_request"));
    let long = format!("POST /v1/explain\n{}", " ".repeat(70_000));
    assert_eq!(ask(&long), is(413, "too_large"));
    // What is served is what is in the documentation.
    let (code, served) = converse(
        UnixStream::connect(&sockets.control).unwrap(),
        "GET /v1/openapi.json",
    );
    let written = include_str!("../../docs/openapi.json");
    let written: Value = serde_json::from_str(written).unwrap();
    assert_eq!((code, served), (200, written));
}

/// Descriptors and resident KiB of the daemon.
fn takes(daemon: &Daemon<'_>) -> (usize, u64) {
    let pid = daemon.status()["pid"].as_u64().unwrap();
    let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib = line.and_then(|l| l.split_whitespace().next());
    (files, kib.unwrap().parse().unwrap())
}

/// That the daemon answers within a second, and that packets are judged.
fn is_well(daemon: &Daemon<'_>, pair: &Pair, what: &str) {
    let best = (0..3).map(|_| {
        let start = Instant::now();
        let output = daemon.ask("status", &["-o", "json"]);
        assert_eq!(output.status.code(), Some(0), "{what}: {output:?}");
        start.elapsed()
    });
    let worst = best.max().unwrap();
    assert!(
        worst < scale::within(Duration::from_secs(1)),
        "{what}: {worst:?}"
    );
    assert!(
        traffic::udp_answers_soon(&pair.peer, ([10, 1, 0, 1], 7777)),
        "{what}: what is allowed"
    );
    assert!(
        !traffic::udp_answers(&pair.peer, None, ([10, 1, 0, 1], 7778)),
        "{what}: what is denied"
    );
}

fn reads_end(stream: &mut UnixStream) -> bool {
    let mut byte = [0; 64];
    stream.set_nonblocking(true).unwrap();
    match stream.read(&mut byte) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    }
}

#[test]
fn many_clients_that_say_nothing_are_ended_and_hurt_nobody() {
    let pair = Pair::new();
    traffic::udp_echo(&pair.host, traffic::any(7777));
    traffic::udp_echo(&pair.host, traffic::any(7778));
    let (daemon, sockets) = start(&pair, GROUPS);
    let before = takes(&daemon);
    let member = User::new(SOMEBODY, &[CHANGE]);
    let mut silent: Vec<UnixStream> = (0..500)
        .map(|_| UnixStream::connect(&sockets.control).unwrap())
        .collect();
    silent.extend((0..50).map(|_| member.connect(&sockets.control).unwrap()));
    is_well(&daemon, &pair, "550 silent clients");
    let held = takes(&daemon).0;
    assert!(
        held < before.0 + 140,
        "{held} descriptors, {} before",
        before.0
    );

    // A letter now and then does not help.
    let mut drip = member.connect(&sockets.control).unwrap();
    drip.write_all(b"GET /v1/sta").unwrap();
    let mut body = member.connect(&sockets.control).unwrap();
    body.write_all(b"POST /v1/explain HTTP/1.1\r\nHost: e\r\nContent-Length: 50\r\n\r\n{")
        .unwrap();
    wait_for("the end of all that say nothing", LONG, || {
        let _ = drip.write_all(b"t");
        let ended = silent.iter_mut().all(reads_end);
        (ended && reads_end(&mut drip)).then_some(())
    });
    assert_eq!(answer(&mut blocking(body)).0, 408);
    wait_for("the descriptors to be free", LONG, || {
        (takes(&daemon).0 <= before.0 + 2).then_some(())
    });
    is_well(&daemon, &pair, "after them");
}

fn blocking(stream: UnixStream) -> UnixStream {
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

/// Writes `bytes` again and again until so many are written or nobody takes them.
fn pour(stream: &mut UnixStream, bytes: &[u8], total: usize) {
    stream.set_write_timeout(Some(LONG)).unwrap();
    let mut written = 0;
    while written < total {
        match stream.write(bytes) {
            Ok(n) => written += n,
            Err(_) => return,
        }
    }
}

#[test]
fn what_is_too_long_is_refused_and_not_kept() {
    let pair = Pair::new();
    traffic::udp_echo(&pair.host, traffic::any(7777));
    traffic::udp_echo(&pair.host, traffic::any(7778));
    let (daemon, sockets) = start(&pair, GROUPS);
    let before = takes(&daemon);
    let connect = || UnixStream::connect(&sockets.control).unwrap();
    let junk = vec![b'x'; 1 << 16];
    const HUNDRED_MB: usize = 100 << 20;

    let mut announced = connect();
    let head =
        format!("POST /v1/explain HTTP/1.1\r\nHost: e\r\nContent-Length: {HUNDRED_MB}\r\n\r\n");
    announced.write_all(head.as_bytes()).unwrap();
    pour(&mut announced, &junk, HUNDRED_MB);
    assert_eq!(answer(&mut blocking(announced)).0, 413);

    let mut chunked = connect();
    let head = "POST /v1/reload HTTP/1.1\r\nHost: e\r\nTransfer-Encoding: chunked\r\n\r\n";
    chunked.write_all(head.as_bytes()).unwrap();
    let chunk = [b"10000\r\n", &junk[..], b"\r\n"].concat();
    pour(&mut chunked, &chunk, HUNDRED_MB);
    assert_eq!(answer(&mut blocking(chunked)).0, 413);

    let mut line = connect();
    line.write_all(b"GET /").unwrap();
    pour(&mut line, &junk, 1 << 20);
    let code = answer(&mut blocking(line)).0;
    assert!(code == 414 || code == 431, "{code}");

    let mut header = connect();
    header.write_all(b"GET /v1/status HTTP/1.1\r\n").unwrap();
    pour(&mut header, b"x: 0123456789\r\n", 1 << 20);
    assert_eq!(answer(&mut blocking(header)).0, 431);

    let mut noise = connect();
    pour(&mut noise, &[0, 255, 13, 10], 4 << 10);
    assert_eq!(answer(&mut blocking(noise)).0, 400);

    is_well(&daemon, &pair, "after all that");
    let after = takes(&daemon);
    assert!(
        after.1 < before.1 + (32 << 10),
        "{before:?} -> {after:?} KiB"
    );
    assert_eq!(daemon.generation(), 1);
}

#[test]
fn readers_that_do_not_read_hold_up_nobody_and_are_few() {
    let pair = Pair::new();
    traffic::udp_echo(&pair.host, traffic::any(7777));
    traffic::udp_echo(&pair.host, traffic::any(7778));
    let (daemon, sockets) = start(&pair, GROUPS);
    let viewer = User::new(SOMEBODY, &[VIEW]);
    let follow = || {
        let mut stream = viewer.connect(&sockets.view).unwrap();
        let request = b"GET /v1/denials?follow=true HTTP/1.1\r\nHost: e\r\n\r\n";
        stream.write_all(request).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let mut code = [0; 12];
        stream.read_exact(&mut code).unwrap();
        (String::from_utf8_lossy(&code[9..]).into_owned(), stream)
    };
    let streams: Vec<_> = (0..16).map(|_| follow()).collect();
    assert!(streams.iter().all(|(code, _)| code == "200"));
    let (code, mut refused) = follow();
    let mut rest = String::new();
    let _ = refused.read_to_string(&mut rest);
    assert!(code == "503" && rest.contains("\"busy\""), "{code} {rest}");
    // The same user may still ask, and others follow.
    assert_eq!(viewer.ask(&sockets.view, ASKING[0]).unwrap().0, 200);
    let before = takes(&daemon).1;

    // Denials that none of them reads; each is another flow.
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            pair.peer.enter(|| {
                let mut port = 20_000_u16;
                while !stop.load(Ordering::Relaxed) {
                    let socket = std::net::UdpSocket::bind("10.1.0.2:0").unwrap();
                    for _ in 0..64 {
                        port = port.checked_add(1).unwrap_or(20_000);
                        let _ = socket.send_to(b"x", ("10.1.0.1", port));
                    }
                    thread::sleep(Duration::from_millis(1));
                }
            });
        });
        let reader = daemon.follow(|| {});
        reader.find(|line| line["verdict"] == "DENIED");
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(4) {
            is_well(&daemon, &pair, "readers that do not read");
            reader.find(|line| line["verdict"] == "DENIED");
        }
        stop.store(true, Ordering::Relaxed);
    });
    // What is kept for readers is bounded: 10 000 records, and what a reader is behind.
    let after = takes(&daemon).1;
    assert!(after < before + (64 << 10), "{before} -> {after} KiB");

    // Whoever hangs up makes room.
    drop(streams);
    wait_for("room for another", LONG, || {
        (follow().0 == "200").then_some(())
    });
}
