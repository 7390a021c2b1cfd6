//! Start, stop, interfaces that come and go, exit codes, accounting.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs,
    os::unix::process::CommandExt as _,
    process::{Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, binary, enforcer, wait_for},
    netns::{Family, Netns, Pair, Routed},
    scale,
    traffic::{self, QUIET, Tap},
};
use nix::{errno::Errno, sys::signal::Signal};
use serde_json::Value;

const NOTHING: &str = r#"version: 1
segments:
  all: { members: [{cidr: 0.0.0.0/0}, {cidr: "::/0"}] }
"#;

/// Runs to the end; what it said on stderr.
fn ends(setup: &Setup<'_>, code: i32) -> String {
    let output = setup
        .command()
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    complaint(&output, code)
}

fn complaint(output: &Output, code: i32) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(output.stdout.is_empty());
    said
}

fn interface(daemon: &Daemon<'_>, name: &str) -> Option<Value> {
    let status = daemon.status();
    let interfaces = status["interfaces"].as_array().unwrap();
    interfaces.iter().find(|i| i["name"] == name).cloned()
}

#[test]
fn interfaces_that_appear_are_enforced_within_a_second() {
    let net = Pair::new();
    let daemon = Setup::new(&net.host, "eth*", NOTHING)
        .with(&["--socket-hooks", "off"])
        .start();
    let late = Netns::new("late");
    let mut best = Duration::MAX;
    let mut indices = Vec::new();
    for _ in 0..3 {
        net.host.cable("eth7", &late, "eth0");
        let start = Instant::now();
        let found = wait_for("eth7 to be enforced", LONG, || {
            interface(&daemon, "eth7").filter(|i| i["enforced"] == true)
        });
        best = best.min(start.elapsed());
        assert_eq!(
            found["hooks"],
            serde_json::json!(["tc_ingress", "tc_egress"])
        );
        indices.push(found["ifindex"].as_u64().unwrap());
        assert_eq!(daemon.status()["state"], "enforcing");

        net.host.addresses("eth7", &["10.7.0.1/24"]);
        late.addresses("eth0", &["10.7.0.2/24"]);
        let denied = daemon.counted("tc_ingress", "denied", "default_deny");
        assert!(!traffic::pings(&late, [10, 7, 0, 1].into(), QUIET));
        assert!(daemon.counted("tc_ingress", "denied", "default_deny") > denied);

        net.host.ip("link del eth7\n");
        wait_for("eth7 to be gone", LONG, || {
            interface(&daemon, "eth7").is_none().then_some(())
        });
        assert_eq!(daemon.status()["state"], "enforcing");
    }
    assert!(
        best <= scale::within(Duration::from_secs(1)),
        "{best:?} at best"
    );
    indices.dedup();
    assert_eq!(indices.len(), 3, "each was another interface");
    // One that the pattern does not mean is left alone.
    net.host.cable("other0", &late, "eth0");
    thread::sleep(Duration::from_millis(1200));
    let other = interface(&daemon, "other0").unwrap();
    assert_eq!(other["state"], "unprotected", "{other}");
    assert_eq!(other["enforced"], false);
}

/// tun, WireGuard and PPP devices have none.
#[test]
fn interfaces_without_a_link_layer_address_are_enforced() {
    let net = Pair::new();
    net.host
        .ip("tuntap add dev tun9 mode tun\nlink set tun9 up\n");
    let daemon = Setup::new(&net.host, "*", NOTHING).start();
    let tun = interface(&daemon, "tun9").unwrap();
    assert_eq!(tun["enforced"], true, "{tun}");
    assert_eq!(daemon.status()["socket_hooks"], "refuse");
    daemon.stop();

    net.host.addresses("tun9", &["10.9.0.1/24"]);
    let daemon = Setup::new(&net.host, "tun9", NOTHING)
        .with(&["--socket-hooks", "off"])
        .start();
    assert_eq!(interface(&daemon, "tun9").unwrap()["enforced"], true);
    assert!(!traffic::pings(&net.host, [10, 9, 0, 2].into(), QUIET));
    assert!(daemon.counted("tc_egress", "denied", "default_deny") > 0);
    daemon.stop();

    // A way out that nobody enforces: the hooks must not refuse.
    let daemon = Setup::new(&net.host, "eth0", NOTHING).start();
    wait_for("the hooks to observe", LONG, || {
        (daemon.status()["socket_hooks"] == "observe").then_some(())
    });
}

#[test]
fn sigterm_detaches_cleanly() {
    let net = Pair::new();
    let mut daemon = Setup::new(&net.host, "eth0", NOTHING).start();
    let peer = Family::V4.address(1, 2);
    let me = Family::V4.address(1, 1);
    traffic::udp_echo(&net.host, traffic::any(7000));
    traffic::udp_echo(&net.peer, traffic::any(7000));
    assert!(!traffic::udp_answers(&net.peer, None, (me, 7000)));
    let refused = || {
        let socket = traffic::udp(&net.host, ([0, 0, 0, 0], 0), QUIET);
        socket
            .send_to(b"x", (peer, 7000))
            .map_err(|e| e.raw_os_error())
    };
    assert_eq!(refused(), Err(Some(libc::EPERM)));
    assert!(daemon.ask("status", &[]).status.success());

    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    assert!(!daemon.setup.socket().exists());
    assert_eq!(refused(), Ok(1));
    assert!(traffic::udp_answers_soon(&net.peer, (me, 7000)));
    assert!(traffic::udp_answers_soon(&net.host, (peer, 7000)));
    assert_eq!(daemon.ask("status", &[]).status.code(), Some(5));
}

/// bpf(2) with a structure of `u32` words; the commands used here have no other fields.
fn bpf(command: libc::c_long, attributes: &mut [u32]) -> i64 {
    // SAFETY: the kernel reads and writes within the stated length, and the lists that
    // `detach_links` names.
    unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_mut_ptr(),
            size_of_val(attributes),
        )
    }
}

/// Whether the kernel has tcx: one without does not know the attach type, one with it says at most
/// that nothing is attached.
fn has_tcx() -> bool {
    const PROG_QUERY: libc::c_long = 16;
    const LOOPBACK: u32 = 1;
    const TCX_INGRESS: u32 = 46;
    let mut query = [
        LOOPBACK,
        TCX_INGRESS,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    bpf(PROG_QUERY, &mut query) == 0 || Errno::last() != Errno::EINVAL
}

/// Detaches every tcx link of an interface of this thread's namespace, as `bpftool link detach`
/// does; how many.
fn detach_links(interface: &str) -> usize {
    const PROG_QUERY: libc::c_long = 16;
    const LINK_GET_FD_BY_ID: libc::c_long = 30;
    const LINK_DETACH: libc::c_long = 34;
    const TCX: [u32; 2] = [46, 47];
    let index = nix::net::if_::if_nametoindex(interface).unwrap();
    let mut detached = 0;
    for direction in TCX {
        let (mut programs, mut links) = ([0_u32; 16], [0_u32; 16]);
        let words = |pointer: *mut u32| {
            let address = pointer as u64;
            [address as u32, (address >> 32) as u32]
        };
        const { assert!(cfg!(target_endian = "little")) };
        let [p0, p1] = words(programs.as_mut_ptr());
        let [l0, l1] = words(links.as_mut_ptr());
        let mut query = [
            index, direction, 0, 0, p0, p1, 16, 0, 0, 0, l0, l1, 0, 0, 0, 0,
        ];
        assert_eq!(bpf(PROG_QUERY, &mut query), 0);
        for link in links.iter().filter(|link| **link != 0) {
            let fd = bpf(LINK_GET_FD_BY_ID, &mut [*link, 0, 0]);
            let fd = i32::try_from(fd).unwrap();
            assert_eq!(bpf(LINK_DETACH, &mut [fd.cast_unsigned()]), 0);
            nix::unistd::close(fd).unwrap();
            detached += 1;
        }
    }
    detached
}

#[test]
fn programs_that_somebody_removes_are_attached_again() {
    if !has_tcx() {
        println!("SKIPPED: no tcx, so the kernel cannot be asked what is attached");
        return;
    }
    let net = Pair::new();
    let daemon = Setup::new(&net.host, "eth0", NOTHING).start();
    let me = Family::V4.address(1, 1);
    assert!(!traffic::pings(&net.peer, me, QUIET));
    assert_eq!(net.host.enter(|| detach_links("eth0")), 2);
    wait_for("the programs", Duration::from_secs(5), || {
        let log = daemon.log();
        ["tc_ingress", "tc_egress"]
            .iter()
            .all(|hook| {
                log.contains(&format!(
                    "{hook} on eth0 was taken off; it is as it was again"
                ))
            })
            .then_some(())
    });
    assert!(!traffic::pings(&net.peer, me, QUIET));
    assert_eq!(net.host.enter(|| detach_links("eth0")), 2);
}

#[test]
fn a_log_that_nobody_reads_does_not_end_enforcement() {
    let net = Pair::new();
    let setup = Setup::new(&net.host, "eth0", NOTHING);
    let (reader, writer) = std::io::pipe().unwrap();
    let mut child = setup.command().stderr(writer).spawn().unwrap();
    drop(reader);
    let ask = |verb: &str| {
        let socket = setup.socket();
        enforcer(&[verb, "--socket", socket.to_str().unwrap()])
    };
    wait_for("the daemon to enforce", LONG, || {
        assert_eq!(child.try_wait().unwrap(), None);
        ask("status").status.success().then_some(())
    });
    // Both are logged.
    net.host.cable("eth7", &net.peer, "eth7");
    setup.write("version: 1\nsegmnts: {}\n");
    wait_for("the policy to be refused", LONG, || {
        assert_eq!(child.try_wait().unwrap(), None);
        (ask("status").status.code() == Some(4)).then_some(())
    });
    assert!(!traffic::pings(&net.peer, Family::V4.address(1, 1), QUIET));
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(child.id().cast_signed()),
        Signal::SIGTERM,
    )
    .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn one_daemon_at_a_time() {
    let net = Pair::new();
    let mut daemon = Setup::new(&net.host, "eth0", NOTHING).start();
    let said = ends(&daemon.setup, 3);
    assert!(said.contains("another enforcer answers at"), "{said}");
    assert_eq!(daemon.status()["state"], "enforcing");
    assert!(!traffic::pings(&net.peer, Family::V4.address(1, 1), QUIET));

    // One that was killed leaves its socket's file; the next one takes the place.
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    assert!(daemon.setup.socket().exists());
    assert_eq!(daemon.ask("status", &[]).status.code(), Some(5));
    let mut daemon = daemon.setup.start();
    assert!(!traffic::pings(&net.peer, Family::V4.address(1, 1), QUIET));
    daemon.signal(Signal::SIGINT);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    assert!(!daemon.setup.socket().exists());
    assert!(traffic::pings(&net.peer, Family::V4.address(1, 1), LONG));
}

#[test]
fn without_root_it_says_what_is_missing() {
    let net = Pair::new();
    let setup = Setup::new(&net.host, "eth0", NOTHING);
    // The binary may be where nobody else may look.
    let copy = setup.segments().with_file_name("enforcer");
    fs::copy(binary(), &copy).unwrap();
    for path in [
        &copy,
        &setup.policy(),
        &setup.segments(),
        &setup.segments().join(".."),
    ] {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = std::process::Command::new(&copy);
    command
        .args(setup.command().get_args())
        .stdin(Stdio::null())
        .uid(65534)
        .gid(65534);
    let said = complaint(&command.output().unwrap(), 3);
    for word in ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON", "sudo"] {
        assert!(said.contains(word), "{word} in {said}");
    }
    // What needs no root works without.
    let mut check = std::process::Command::new(&copy);
    check
        .arg("check")
        .arg(setup.segments())
        .stdin(Stdio::null())
        .uid(65534)
        .gid(65534);
    assert_eq!(check.output().unwrap().status.code(), Some(0));
}

#[test]
fn a_policy_that_is_broken_or_missing_prevents_the_start() {
    let net = Pair::new();
    let setup = Setup::new(&net.host, "eth0", "version: 1\nsegmnts: {}\n");
    let said = ends(&setup, 1);
    assert!(
        said.contains("policy.yaml:2:1") && said.contains("segments"),
        "{said}"
    );
    fs::remove_file(setup.policy()).unwrap();
    ends(&setup, 1);
    assert!(!setup.socket().exists());
    // Nothing is left behind that would judge packets.
    assert!(traffic::pings(&net.peer, Family::V4.address(1, 1), LONG));
}

#[test]
fn status_says_how_much_is_enforced() {
    let net = Pair::new();
    let daemon = Setup::new(&net.host, "eth8,eth9", NOTHING).spawn();
    let becomes = |code: i32, state: &str| {
        wait_for(state, LONG * 2, || {
            let output = daemon.ask("status", &["-o", "json"]);
            // A daemon that is not reachable yet has no interfaces to tell of.
            let status: Value = serde_json::from_slice(&output.stdout).ok()?;
            let is = output.status.code() == Some(code)
                && status["state"] == state
                && status["interfaces"].is_array();
            is.then_some(status)
        })
    };
    let status = becomes(5, "not_enforcing");
    assert_eq!(status["interfaces"][0]["name"], "eth8");
    assert_eq!(status["interfaces"][0]["enforced"], false);
    let problems = status["problems"].to_string();
    assert!(
        problems.contains("eth9") && problems.contains("no such interface"),
        "{problems}"
    );
    assert!(traffic::pings(&net.peer, Family::V4.address(1, 1), LONG));
    let late = Netns::new("late");
    net.host.cable("eth8", &late, "eth0");
    becomes(4, "degraded");
    net.host.cable("eth9", &late, "eth1");
    becomes(0, "enforcing");
    net.host.ip("link del eth8\n");
    becomes(4, "degraded");
    net.host.ip("link del eth9\n");
    becomes(5, "not_enforcing");
}

/// The three that every denied packet falls into.
fn records(status: &Value) -> [u64; 3] {
    ["emitted", "suppressed", "lost"].map(|name| status["events"][name].as_u64().unwrap())
}

#[test]
fn every_denied_packet_is_accounted_for() {
    const FLOWS: u64 = 50;
    const EACH: u64 = 200;
    let net = Routed::new();
    let daemon = Setup::new(&net.gateway, "gw-*", NOTHING).start();
    let (to, to6) = (Family::V4.address(2, 2), Family::V6.address(2, 2));
    let tap = Tap::new(&net.b);
    let mut sent = 0;
    for number in 0..FLOWS {
        let to = if number % 2 == 0 { to } else { to6 };
        let socket = traffic::udp(&net.a, (traffic::unspecified(to), 0), QUIET);
        socket.connect((to, 7000)).unwrap();
        for _ in 0..EACH {
            sent += u64::from(socket.send(b"burst").is_ok());
        }
    }
    assert_eq!(sent, FLOWS * EACH);
    // Of denials by default to this port there are exactly those packets.
    wait_for("all packets to be counted", LONG, || {
        (daemon.counted("tc_ingress", "denied", "default_deny") >= sent).then_some(())
    });
    assert!(!tap.sees(b"burst", QUIET));
    let mut named = 0;
    let deadline = Instant::now() + LONG;
    while named < sent && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(100));
        let denials = daemon.denials(&[]);
        assert!(denials.iter().all(|d| d["verdict"] != "LOST"));
        let burst = denials.iter().filter(|d| d["dst_port"] == 7000);
        named = burst.map(|d| d["packets"].as_u64().unwrap()).sum();
    }
    assert_eq!(named, sent, "packets named by records");
    let status = daemon.status();
    let denied = denied(&status);
    assert_eq!(records(&status).iter().sum::<u64>(), denied);
    assert!(denied >= sent);
    // Most were counted and not recorded one by one.
    assert!(records(&status)[1] > sent / 2, "{:?}", records(&status));
    a_flood_of_flows(&net, &daemon);
}

fn denied(status: &Value) -> u64 {
    let counters = status["counters"].as_array().unwrap();
    let denied = counters
        .iter()
        .filter(|c| c["outcome"] == "denied" || c["outcome"] == "would_deny");
    denied.map(|c| c["packets"].as_u64().unwrap()).sum()
}

/// More flows than the daemon keeps up with: records may be lost, counts may not.
fn a_flood_of_flows(net: &Routed, daemon: &Daemon<'_>) {
    let before = denied(&daemon.status());
    let to = Family::V4.address(2, 2);
    daemon.signal(Signal::SIGSTOP);
    let mut sent = 0;
    let socket = traffic::udp(&net.a, ([0, 0, 0, 0], 0), QUIET);
    for port in 1..=20_000u16 {
        sent += u64::from(socket.send_to(b"flood", (to, port)).is_ok());
    }
    daemon.signal(Signal::SIGCONT);
    assert_eq!(sent, 20_000);
    let status = wait_for("all packets to be counted", LONG, || {
        let status = daemon.status();
        (denied(&status) >= before + sent).then_some(status)
    });
    let [emitted, suppressed, lost] = records(&status);
    assert_eq!(emitted + suppressed + lost, denied(&status));
    assert!(lost > 0, "the ring holds fewer records than that");
    // The gap is shown where the denials are; once it is too old to be kept, its count is part of
    // the gap that says so. Displaced counts come on top.
    wait_for("the gap", LONG, || {
        let denials = daemon.denials(&[]);
        let gaps = denials.iter().filter(|d| d["verdict"] == "LOST");
        let told: u64 = gaps.map(|d| d["events"].as_u64().unwrap()).sum();
        (told >= lost).then_some(())
    });
}
