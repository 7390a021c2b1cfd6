//! Interfaces that come, go and change by the hundred.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    os::fd::AsRawFd as _,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};

use aya::util::KernelVersion;
use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    inside::{Inside, hanging, links_of},
    netns::Netns,
    pins::Pins,
    scale,
    traffic::{self, QUIET},
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt,
    socket, sockopt,
};

const POLICY: &str = r#"version: 1
segments:
  all: { members: [{cidr: 0.0.0.0/0}, {cidr: "::/0"}] }
"#;

/// `ip` inside, which does each line as it comes.
struct Ip(Child);

impl Ip {
    fn new(namespace: &Netns) -> Self {
        let mut command = Command::new("ip");
        // What is gone already is no reason to stop.
        command.args(["-n", namespace.name(), "-force", "-batch", "-"]);
        command.stdin(Stdio::piped()).stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }

    fn line(&mut self, line: &str) {
        writeln!(self.0.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Waits until all is done.
    fn end(mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

/// When the kernel told of each new interface inside, from now on until `over`.
fn announced(namespace: &Netns, over: &AtomicBool) -> BTreeMap<String, SystemTime> {
    const NEWLINK: [u8; 2] = 16u16.to_ne_bytes();
    const LINKS: u32 = 1;
    let socket = namespace.enter(|| {
        let kind = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkRoute;
        socket(AddressFamily::Netlink, SockType::Raw, kind, protocol).unwrap()
    });
    setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).unwrap();
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, LINKS)).unwrap();
    let (mut bytes, mut found) = (vec![0; 65536], BTreeMap::new());
    loop {
        let Ok(length) = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) else {
            if over.load(Ordering::Relaxed) {
                return found;
            }
            thread::sleep(Duration::from_micros(500));
            continue;
        };
        let message = &bytes[..length];
        // Of an interface's first attribute, IFLA_IFNAME, the text.
        if message[4..6] == NEWLINK {
            let text = message[36..].split(|byte| *byte == 0).next().unwrap();
            let name = String::from_utf8_lossy(text).into_owned();
            found.entry(name).or_insert_with(SystemTime::now);
        }
    }
}

/// Name and number of those of the daemon's interest.
fn there(namespace: &Netns) -> BTreeMap<String, u32> {
    let mut all = namespace.interfaces();
    all.retain(|name, _| name.starts_with("lan"));
    all
}

/// Those that the status has as enforced, and whether it has any other of these.
fn enforced(daemon: &Daemon<'_>) -> (BTreeMap<String, u32>, bool) {
    let status = daemon.status();
    let all = status["interfaces"].as_array().unwrap().iter();
    let (mut enforced, mut others) = (BTreeMap::new(), false);
    for interface in all {
        let name = interface["name"].as_str().unwrap();
        if !name.starts_with("lan") {
            continue;
        }
        if interface["state"] == "enforced" {
            let ifindex = interface["ifindex"].as_u64().unwrap();
            let before = enforced.insert(name.to_owned(), u32::try_from(ifindex).unwrap());
            assert_eq!(before, None, "{name} is listed twice");
        } else {
            others = true;
        }
    }
    (enforced, others)
}

fn settles(daemon: &Daemon<'_>, namespace: &Netns) {
    wait_for("exactly those that live to be enforced", LONG * 2, || {
        let live = there(namespace);
        (enforced(daemon) == (live, false)).then_some(())
    });
}

/// When each interface was attached, by the log.
fn attached(daemon: &Daemon<'_>) -> BTreeMap<String, SystemTime> {
    let log = daemon.log();
    let lines = log.lines().filter(|line| line.contains(" attached "));
    lines
        .map(|line| {
            let at: enforcer::api::types::Time =
                serde_json::from_value(line.split(' ').next().unwrap().into()).unwrap();
            let (_, name) = line.split_once("interface=\"").unwrap();
            let (name, _) = name.split_once('"').unwrap();
            (name.to_owned(), at.0.into())
        })
        .collect()
}

/// A pair, with the near end up from the first moment.
fn pair(number: usize, far: &Netns) -> String {
    format!(
        "link add lan{number} up type veth peer name p{number} netns {}",
        far.name()
    )
}

/// 500 a second; how long each was there without being enforced.
fn windows(daemon: &Daemon<'_>, near: &Netns, far: &Netns, count: usize) -> Vec<Duration> {
    let pause = scale::within(Duration::from_millis(2));
    let over = AtomicBool::new(false);
    let (births, took) = thread::scope(|scope| {
        let births = scope.spawn(|| announced(near, &over));
        let mut ip = Ip::new(near);
        let start = Instant::now();
        for number in 0..count {
            let due = start + pause * u32::try_from(number).unwrap();
            thread::sleep(due.saturating_duration_since(Instant::now()));
            ip.line(&pair(number, far));
        }
        ip.end();
        let took = start.elapsed();
        settles(daemon, near);
        over.store(true, Ordering::Relaxed);
        (births.join().unwrap(), took)
    });
    println!("{count} births in {took:?}");
    let attached = attached(daemon);
    let window = |number: usize| {
        let name = format!("lan{number}");
        attached[&name]
            .duration_since(births[&name])
            .unwrap_or_default()
    };
    let mut windows: Vec<Duration> = (0..count).map(window).collect();
    windows.sort_unstable();
    windows
}

/// Births, deaths, new names, and numbers that are given again, as fast as it goes. Those with
/// numbers that six divides live.
fn churn(near: &Netns, far: &Netns, count: usize) {
    let mut ip = Ip::new(near);
    for number in 0..count {
        ip.line(&pair(number, far));
        match number % 6 {
            1 => ip.line(&format!("link del lan{number}")),
            2 => ip.line(&format!("link set lan{number} down")),
            3 => ip.line(&format!("link set lan{number} name lan{number}x")),
            _ => {}
        }
        if number % 6 == 5 {
            // The number of the one before last, for another one and then for a third.
            let [gone, again] = [number - 1, number].map(|n| format!("lan{n}"));
            ip.line(&format!("link del {again}"));
            ip.line(&format!("link del {gone}"));
            let index = 100_000 + number;
            for name in [&again, &gone] {
                ip.line(&format!("link add {name} index {index} up type veth"));
                ip.line(&format!("link del {name}"));
            }
        }
    }
    for number in 0..count {
        match number % 6 {
            2 => ip.line(&format!("link del lan{number}")),
            3 => ip.line(&format!("link del lan{number}x")),
            _ => {}
        }
    }
    ip.end();
}

#[test]
fn births_and_deaths_by_the_hundred_leave_those_that_live_enforced_and_nothing_else() {
    let (near, far) = (Netns::new("near"), Netns::new("far"));
    let (once, pins) = (Netns::new("once"), Pins::default());
    let daemon = Setup::new(&near, "lan*", POLICY)
        .with(&["--socket-hooks", "off"])
        .pinned(pins.path())
        .spawn();
    wait_for("the daemon", LONG * 2, || {
        let output = daemon.ask("status", &["-o", "json"]);
        (output.status.code() == Some(5) && daemon.setup.socket().exists()).then_some(())
    });
    let pid = daemon.status()["pid"].as_u64().unwrap();
    let inside = Inside(u32::try_from(pid).unwrap());

    let count = scale::rounds(500, 40);
    let windows = windows(&daemon, &near, &once, count);
    let at = |share: usize| windows[(windows.len() - 1) * share / 100];
    println!(
        "not enforced after birth: median {:?}, 90 % {:?}, 99 % {:?}, at most {:?}",
        at(50),
        at(90),
        at(99),
        at(100)
    );
    // Without it, the kernel alone takes 28 ms for each.
    let quick = fs::OpenOptions::new()
        .write(true)
        .open("/sys/kernel/rcu_expedited");
    let limit = scale::within(Duration::from_secs(3));
    assert!(at(100) < limit || quick.is_err(), "{:?}", at(100));
    let [all, quick] = inside.interfaces();
    let numbers = |live: BTreeMap<String, u32>| -> BTreeSet<u32> { live.into_values().collect() };
    assert_eq!(all, numbers(there(&near)));
    assert_eq!(quick, all);
    // All at once, which is quicker.
    drop(once);
    settles(&daemon, &near);

    let count = scale::rounds(180, 24);
    let mut taken = Vec::new();
    let over = AtomicBool::new(false);
    let slowest = thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut slowest = Duration::ZERO;
            while !over.load(Ordering::Relaxed) {
                let start = Instant::now();
                daemon.status();
                slowest = slowest.max(start.elapsed());
                thread::sleep(Duration::from_millis(20));
            }
            slowest
        });
        for _ in 0..3 {
            churn(&near, &far, count);
            settles(&daemon, &near);
            taken.push((inside.descriptors(), inside.memory()));
            let [all, quick] = inside.interfaces();
            assert_eq!(all, numbers(there(&near)));
            assert_eq!(quick, all);
            let mut ip = Ip::new(&near);
            (6..count)
                .step_by(6)
                .for_each(|number| ip.line(&format!("link del lan{number}")));
            ip.end();
            settles(&daemon, &near);
        }
        over.store(true, Ordering::Relaxed);
        asking.join().unwrap()
    });
    println!("descriptors and KiB: {taken:?}; the slowest answer took {slowest:?}");
    assert!(
        slowest < scale::within(Duration::from_secs(4)),
        "{slowest:?}"
    );
    // What could not be deleted while it was renamed goes now. One is left, as it should be.
    wait_for("one", LONG, || {
        let others: Vec<_> = there(&near).into_keys().filter(|n| n != "lan0").collect();
        let mut ip = Ip::new(&near);
        others
            .iter()
            .for_each(|name| ip.line(&format!("link del {name}")));
        ip.end();
        others.is_empty().then_some(())
    });
    settles(&daemon, &near);
    assert_eq!(there(&near).len(), 1);
    assert_eq!(inside.tags(), 0);
    let (first, last) = (taken[0], taken[2]);
    // Clients that just asked may not be gone yet.
    assert!(last.0.abs_diff(first.0) <= 6, "{taken:?}");
    // Allocators take what they like at first.
    assert!(
        last.1 < first.1 + 8192 && last.1 < taken[1].1 + 2048,
        "{taken:?}"
    );
    if KernelVersion::current().unwrap() >= KernelVersion::new(6, 6, 0) {
        let hooks = hanging(&near, "lan0");
        assert_eq!(hooks.each_ref().map(Vec::len), [1, 1]);
        assert_eq!(links_of(&hooks.concat().into_iter().collect()), 2);
        assert_eq!(pins.links().len(), 2, "{:?}", pins.links());
    }
    near.addresses("lan0", &["10.7.0.1/24"]);
    far.ip("link set p0 up\n");
    far.addresses("p0", &["10.7.0.2/24"]);
    let denied = daemon.counted("tc_ingress", "denied", "default_deny");
    assert!(!traffic::pings(&far, [10, 7, 0, 1].into(), QUIET));
    assert!(daemon.counted("tc_ingress", "denied", "default_deny") > denied);
    assert_eq!(daemon.ask("status", &[]).status.code(), Some(0));
    let log = daemon.log();
    assert!(!log.contains("ERROR"), "{log}");
    // Each that came up brought an address of its own along.
    let compiled = log.matches("policy in force").count();
    println!("the policy was compiled {compiled} times");
    assert!(compiled < 60, "{compiled}");
}
