//! What the daemon tells systemd, as a service manager of the test's own hears it.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::{fs::OpenOptionsExt as _, net::UnixDatagram},
    },
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use enforcer_tests::{
    daemon::{LONG, Setup, wait_for},
    netns::{Family, Pair, directory},
    scale,
    traffic::{self, QUIET},
};
use nix::{
    sys::signal::Signal,
    time::{ClockId, clock_gettime},
};

const POLICY: &str = r#"version: 1
segments: { server: { members: [{cidr: 10.1.0.1/32}], protect: inbound } }
rules: [{ name: some, from: [any], to: [server], services: [udp/7000] }]
"#;

/// The other end of `NOTIFY_SOCKET`.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Manager {
    fn new() -> Self {
        let directory = directory();
        let path = directory.path().join("notify");
        Self {
            socket: UnixDatagram::bind(&path).unwrap(),
            path,
            _directory: directory,
        }
    }

    /// The next message within this time, as lines.
    fn next(&self, limit: Duration) -> Option<Vec<String>> {
        self.socket.set_read_timeout(Some(limit)).unwrap();
        let mut buffer = [0; 4096];
        let length = match self.socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            Err(error) => panic!("{error}"),
        };
        let text = String::from_utf8(buffer[..length].to_vec()).unwrap();
        Some(text.lines().map(str::to_owned).collect())
    }

    /// Waits for a message with this line; with it those that came before.
    fn until(&self, line: &str) -> (Vec<String>, Vec<Vec<String>>) {
        let limit = scale::within(LONG);
        let (start, mut before) = (Instant::now(), Vec::new());
        while let Some(message) = self.next(limit) {
            if message.iter().any(|found| found == line) {
                return (message, before);
            }
            before.push(message);
            assert!(start.elapsed() < limit, "no {line}, but {before:#?}");
        }
        panic!("no {line} within {limit:?}, but {before:#?}");
    }
}

fn value<'a>(message: &'a [String], name: &str) -> &'a str {
    let mut lines = message.iter();
    let found = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    found.unwrap_or_else(|| panic!("no {name} in {message:?}"))
}

fn monotonic() -> u128 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    Duration::from(now).as_micros()
}

#[test]
fn ready_means_enforced_and_a_reload_and_the_end_are_told() {
    let pair = Pair::new();
    let manager = Manager::new();
    let host = Family::V4.address(1, 1);
    let heard = traffic::udp(&pair.host, (host, 7001), QUIET);
    let sender = traffic::udp(&pair.peer, (Family::V4.address(1, 2), 0), QUIET);
    let arrives = |limit| {
        heard.set_read_timeout(Some(limit)).unwrap();
        sender.send_to(b"is anybody there", (host, 7001)).unwrap();
        heard.recv(&mut [0; 64]).is_ok()
    };
    assert!(arrives(LONG), "nobody enforces yet");

    // One that there is, and one that the network may make later.
    let setup = Setup::new(&pair.host, "eth0,later0", POLICY);
    let mut daemon = setup.spawn_with(|command| {
        command.env("NOTIFY_SOCKET", &manager.path);
    });
    let (ready, before) = manager.until("READY=1");
    assert!(!arrives(QUIET), "enforced when it says so: {ready:?}");
    let status = daemon.status();
    let interfaces = status["interfaces"].as_array().unwrap();
    assert_eq!(interfaces[0]["enforced"], true, "{status:#}");
    let said = value(&ready, "STATUS");
    assert!(
        said.starts_with("enforcing on eth0: 1 segments, 1 rules"),
        "{said}"
    );
    assert!(said.contains("later0 is not enforced"), "{said}");
    assert_eq!(before[0], ["STATUS=reading the policy"]);
    assert!(
        before
            .iter()
            .flatten()
            .all(|line| line.starts_with("STATUS="))
    );

    // A good policy, then one with a mistake.
    for (policy, says) in [
        (
            POLICY.replace("7000", "7000, udp/7001"),
            "rules, generation 2",
        ),
        (
            POLICY.replace("rules:", "rulez:"),
            "what is on disk was refused",
        ),
    ] {
        daemon.setup.write(&policy);
        let start = monotonic();
        daemon.signal(Signal::SIGHUP);
        let (reloading, _) = manager.until("RELOADING=1");
        let at: u128 = value(&reloading, "MONOTONIC_USEC").parse().unwrap();
        assert!((start..=monotonic()).contains(&at), "{start} {at}");
        let (ready, _) = manager.until("READY=1");
        let said = value(&ready, "STATUS");
        assert!(said.contains(says), "{said}");
        assert_eq!(daemon.generation(), 2);
        assert!(arrives(LONG), "what is new holds, and stays");
    }
    assert!(daemon.status()["policy"]["last_error"].is_string());

    daemon.signal(Signal::SIGTERM);
    manager.until("STOPPING=1");
    assert!(daemon.wait().success());
}

/// Of systemd's patience in the test.
const WATCHDOG: Duration = Duration::from_secs(3);

#[test]
fn the_watchdog_hears_of_a_control_task_that_hangs() {
    let pair = Pair::new();
    let manager = Manager::new();
    let (mut reader, writer) = std::io::pipe().unwrap();
    // A description of its own: the daemon's stays one that blocks.
    let mut filler = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", writer.as_raw_fd()))
        .unwrap();
    let daemon = Setup::new(&pair.host, "eth0", POLICY).spawn_with(|command| {
        command
            .env("NOTIFY_SOCKET", &manager.path)
            .env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string())
            .stderr(writer);
    });
    manager.until("READY=1");
    for _ in 0..2 {
        manager.until("WATCHDOG=1");
    }

    // Nobody reads the log, and it is full: the next task that logs hangs, and of a reload that is
    // the control task.
    fill(&mut filler);
    daemon.signal(Signal::SIGHUP);
    manager.until("RELOADING=1");
    let quiet = Instant::now();
    // What was said before it got there.
    while quiet.elapsed() < WATCHDOG * 3 && manager.next(WATCHDOG).is_some() {}
    assert!(quiet.elapsed() >= WATCHDOG, "it hangs");
    assert!(quiet.elapsed() < WATCHDOG * 3, "yet it says that it lives");
    // The others do not hang: a timer of their own would have told that all is well.
    assert_eq!(daemon.status()["state"], "enforcing");

    let drain = thread::spawn(move || {
        let mut buffer = [0; 4096];
        while reader.read(&mut buffer).is_ok_and(|length| length > 0) {}
    });
    manager.until("READY=1");
    manager.until("WATCHDOG=1");
    drop((filler, daemon));
    wait_for("the log to end", LONG, || drain.is_finished().then_some(()));
}

fn fill(pipe: &mut File) {
    for size in [4096, 1] {
        while pipe.write(&vec![b'.'; size]).is_ok() {}
    }
}
