//! A denied packet, as `denials -f` shows it: what it says, and how soon.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use enforcer_tests::{
    daemon::{Daemon, Follow, LONG, Setup, line_of},
    netns::{Family, Netns, Pair, Routed},
    scale, traffic,
};
use nix::sys::prctl;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_millis(100);
const TRIES: u16 = 5;

/// Takes the time out of a denial, after a look at it.
fn timeless(mut denial: Value) -> Value {
    let time = denial["time"].take();
    let text = time.as_str().unwrap();
    assert_eq!(
        (text.len(), &text[19..20], &text[23..]),
        (24, ".", "Z"),
        "{text}"
    );
    let time: enforcer::api::types::Time = serde_json::from_value(time.clone()).unwrap();
    let age = enforcer::api::types::Time::now().0.duration_since(time.0);
    assert!(age.as_millis_f64().abs() < 60_000.0, "{text} is not now");
    denial.as_object_mut().unwrap().remove("time");
    denial
}

/// All hosts of a test share one kernel, so the gateway may know who sent a packet even at
/// ingress. Then it must be right; it is taken out.
fn stranger(mut denial: Value) -> Value {
    if denial["process"] != Value::Null {
        clerk_is_named(&denial);
        denial["process"] = Value::Null;
    }
    denial
}

#[derive(Clone, Copy, Debug)]
enum Protocol {
    Tcp,
    Udp,
    Icmp,
}

/// A packet that cannot be taken for another: when it was sent, and its source port.
fn send(from: &Netns, source: IpAddr, to: IpAddr, protocol: Protocol, port: u16) -> (Instant, u16) {
    match protocol {
        Protocol::Tcp => {
            // A SYN leaves at once; nobody waits for the answer that does not come.
            let own = 20_000 + port;
            let mut syn = enforcer_tests::frame::tcp(own, port, enforcer_tests::frame::SYN);
            syn.extend([0; 4]);
            let packet = enforcer_tests::frame::ip(source, to, 6, &syn);
            let at = Instant::now();
            traffic::send_raw(from, &packet);
            (at, own)
        }
        Protocol::Udp => {
            let socket = from.enter(|| UdpSocket::bind((source, 0)).unwrap());
            let own = socket.local_addr().unwrap().port();
            as_clerk(from, || {
                let at = Instant::now();
                socket.send_to(b"hello", (to, port)).unwrap();
                (at, own)
            })
        }
        Protocol::Icmp => {
            let (number, kind) = if to.is_ipv6() { (58, 128) } else { (1, 8) };
            let message = enforcer_tests::frame::icmp(kind, 0, port);
            let packet = enforcer_tests::frame::ip(source, to, number, &message);
            let at = Instant::now();
            traffic::send_raw(from, &packet);
            (at, port)
        }
    }
}

const ROUTED: &str = r#"version: 1
segments:
  db:
    members: [{cidr: 10.2.0.2/32}, {cidr: "fd02::2/128"}]
  archive:
    mode: observe
    protect: inbound
    members: [{cidr: 10.2.0.3/32}, {cidr: "fd02::3/128"}]
  guest:
    protect: outbound
    members: [{cidr: 10.1.0.2/32}, {cidr: "fd01::2/128"}]
  visitors:
    mode: observe
    protect: inbound
    members: [{cidr: 10.1.0.0/24}, {cidr: "fd01::/64"}]
rules:
  - { name: fence, from: [guest], to: [db], services: [tcp/9] }
  - name: no-ssh
    from: [visitors]
    to: [db]
    services: [tcp/22]
    action: deny
"#;

/// What a denial between hosts of [`Routed`] says, but for ports.
fn expected(protocol: Protocol, v6: bool, fields: Value) -> Value {
    let name = match (protocol, v6) {
        (Protocol::Tcp, _) => "tcp",
        (Protocol::Udp, _) => "udp",
        (Protocol::Icmp, false) => "icmp",
        (Protocol::Icmp, true) => "icmpv6",
    };
    let icmp = matches!(protocol, Protocol::Icmp);
    let mut all = json!({
        "verdict": "DENIED",
        "reason": "default_deny",
        "rule": null,
        "default": null,
        "file": "policy.yaml",
        "protocol": name,
        "tcp_flags": matches!(protocol, Protocol::Tcp).then_some("SYN"),
        "icmp_type": icmp.then_some(if v6 { 128 } else { 8 }),
        "icmp_code": icmp.then_some(0),
        "direction": "ingress",
        "interface": "gw-a",
        "process": null,
        "packets": 1,
        "generation": 1,
    });
    for (name, value) in fields.as_object().unwrap() {
        all[name] = value.clone();
    }
    all
}

/// The line about a packet from this source to that destination and port.
fn line(
    follow: &Follow,
    source: IpAddr,
    to: IpAddr,
    ports: (Option<u16>, Option<u16>),
) -> (Instant, Value) {
    follow.find(|line| {
        line["src"] == source.to_string()
            && line["dst"] == to.to_string()
            && line["src_port"] == json!(ports.0)
            && line["dst_port"] == json!(ports.1)
    })
}

#[test]
fn denial_is_seen_within_100_ms() {
    let net = Routed::new();
    let daemon = Setup::new(&net.gateway, "gw-*", ROUTED).start();
    let probe = || {
        for family in Family::BOTH {
            // Also makes the hosts know each other's link addresses.
            send(
                &net.a,
                family.address(1, 3),
                family.address(2, 2),
                Protocol::Udp,
                1,
            );
        }
    };
    let follow = daemon.follow(probe);
    for family in Family::BOTH {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Icmp] {
            let (source, to) = (family.address(1, 2), family.address(2, 2));
            let mut best = Duration::MAX;
            for try_number in 0..TRIES {
                let port = 5432 + try_number;
                let (sent, own) = send(&net.a, source, to, protocol, port);
                let ports = match protocol {
                    Protocol::Tcp | Protocol::Udp => (Some(own), Some(port)),
                    Protocol::Icmp => (None, None),
                };
                let (came, denial) = line(&follow, source, to, ports);
                best = best.min(came.saturating_duration_since(sent));
                let want = expected(
                    protocol,
                    source.is_ipv6(),
                    json!({
                        "default": "db (both)",
                        "line": line_of(ROUTED, "db:"),
                        "from_segments": ["guest", "visitors"],
                        "to_segments": ["db"],
                        "src": source.to_string(),
                        "dst": to.to_string(),
                        "src_port": ports.0,
                        "dst_port": ports.1,
                    }),
                );
                assert_eq!(stranger(timeless(denial)), want);
            }
            assert!(
                best <= scale::within(SOON),
                "{family:?} {protocol:?}: {best:?} at best"
            );
        }
    }
}

#[test]
fn denials_name_deny_rules_and_observed_segments() {
    let net = Routed::new();
    let daemon = Setup::new(&net.gateway, "gw-*", ROUTED).start();
    for family in Family::BOTH {
        traffic::udp_echo(&net.b, (family.address(2, 3), 7000));
    }
    let follow = daemon.follow(|| {
        send(
            &net.a,
            Family::V4.address(1, 3),
            Family::V4.address(2, 2),
            Protocol::Udp,
            1,
        );
    });
    for family in Family::BOTH {
        let v6 = family == Family::V6;
        // A deny rule, though another one allows nothing either: the rule is named.
        let (source, to) = (family.address(1, 2), family.address(2, 2));
        let (_, own) = send(&net.a, source, to, Protocol::Tcp, 22);
        let (_, denial) = line(&follow, source, to, (Some(own), Some(22)));
        let want = expected(
            Protocol::Tcp,
            v6,
            json!({
                "reason": "rule_deny",
                "rule": "no-ssh",
                "line": line_of(ROUTED, "name: no-ssh"),
                "from_segments": ["guest", "visitors"],
                "to_segments": ["db"],
                "src": source.to_string(),
                "dst": to.to_string(),
                "src_port": own,
                "dst_port": 22,
            }),
        );
        assert_eq!(stranger(timeless(denial)), want);

        // An observed segment: delivered, answered, and recorded.
        let (source, to) = (family.address(1, 3), family.address(2, 3));
        let socket = traffic::udp(&net.a, (source, 0), LONG);
        as_clerk(&net.a, || socket.send_to(b"hello", (to, 7000)).unwrap());
        assert_eq!(socket.recv(&mut [0; 16]).unwrap(), 5);
        let (_, denial) =
            follow.find(|l| l["dst"] == to.to_string() && l["direction"] == "ingress");
        let own = denial["src_port"].clone();
        assert!(own.as_u64().is_some_and(|port| port > 1023));
        let want = expected(
            Protocol::Udp,
            v6,
            json!({
                "verdict": "WOULD_DENY",
                "default": "archive (inbound)",
                "line": line_of(ROUTED, "archive:"),
                "from_segments": ["visitors"],
                "to_segments": ["archive"],
                "src": source.to_string(),
                "dst": to.to_string(),
                "src_port": own,
                "dst_port": 7000,
            }),
        );
        assert_eq!(stranger(timeless(denial)), want);
    }
    // As text, with the same facts.
    let text = daemon
        .ask("denials", &["--to", "archive", "--color", "never"])
        .stdout;
    let text = String::from_utf8(text).unwrap();
    let line = line_of(ROUTED, "archive:");
    assert!(text.contains(" WOULD_DENY  visitors 10.1.0.3:"), "{text}");
    assert!(
        text.contains(
            " -> archive 10.2.0.3:7000 udp  ingress gw-a  default deny (archive protects inbound)"
        ),
        "{text}"
    );
    assert!(text.contains(&format!("  policy.yaml:{line}")), "{text}");
}

const HOST: &str = r#"version: 1
segments:
  clerk:
    members: [{cidr: 10.1.0.1/32}, {cidr: "fd01::1/128"}]
  server:
    members: [{cidr: 10.1.0.2/32}, {cidr: "fd01::2/128"}]
"#;

/// The cgroup of this thread, as the host names it.
fn own_cgroup() -> String {
    let text = fs::read_to_string("/proc/thread-self/cgroup").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("0::"));
    line.unwrap().to_owned()
}

/// Runs on a thread inside, with a name and a user id of its own.
fn as_clerk<T: Send>(namespace: &Netns, work: impl FnOnce() -> T + Send) -> T {
    namespace.enter(|| {
        prctl::set_name(c"enft-clerk").unwrap();
        // SAFETY: the raw system call changes this thread only; it ends with the work.
        let set = unsafe { libc::syscall(libc::SYS_setresuid, 4242, 4242, 4242) };
        assert_eq!(set, 0);
        work()
    })
}

fn clerk_is_named(denial: &Value) {
    let want = json!({
        "pid": std::process::id(),
        "comm": "enft-clerk",
        "uid": 4242,
        "cgroup": own_cgroup(),
    });
    assert_eq!(denial["process"], want, "{denial:#}");
}

fn host_daemon<'a>(net: &'a Pair, hooks: &str) -> Daemon<'a> {
    let daemon = Setup::new(&net.host, "eth0", HOST)
        .with(&["--socket-hooks", hooks])
        .start();
    assert_eq!(daemon.status()["socket_hooks"], hooks);
    daemon
}

/// Sends from the peer, so that no local process is involved.
fn probe(net: &Pair) {
    send(
        &net.peer,
        Family::V4.address(1, 2),
        Family::V4.address(1, 1),
        Protocol::Udp,
        1,
    );
}

#[test]
fn a_local_process_is_named_when_tc_drops_its_packet() {
    let net = Pair::new();
    let daemon = host_daemon(&net, "observe");
    let follow = daemon.follow(|| probe(&net));
    for (family, port) in Family::BOTH.into_iter().zip([7001, 7002]) {
        let (source, to) = (family.address(1, 1), family.address(1, 2));
        let own = as_clerk(&net.host, || {
            let socket = UdpSocket::bind((traffic::unspecified(to), 0)).unwrap();
            socket
                .send_to(b"hello", (to, port))
                .expect("the hook refuses nothing");
            socket.local_addr().unwrap().port()
        });
        let (_, denial) = line(&follow, source, to, (Some(own), Some(port)));
        clerk_is_named(&denial);
        assert_eq!(denial["direction"], "egress");
        assert_eq!(denial["interface"], "eth0");
        assert_eq!(denial["verdict"], "DENIED");
        // TCP: the SYN of a connect(2) that times out.
        as_clerk(&net.host, || {
            let error = TcpStream::connect_timeout(&(to, port).into(), Duration::from_millis(20));
            assert_eq!(error.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
        });
        let (_, denial) = follow.find(|l| l["protocol"] == "tcp" && l["dst_port"] == port);
        clerk_is_named(&denial);
        assert_eq!(denial["src"], source.to_string());
        assert_eq!(denial["direction"], "egress");
    }
}

#[test]
fn a_refused_call_is_eperm_and_names_the_process() {
    let net = Pair::new();
    let daemon = host_daemon(&net, "refuse");
    let follow = daemon.follow(|| probe(&net));
    let eperm = |result: std::io::Result<()>, what: &str| {
        let error = result.expect_err(what);
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{what}: {error}");
    };
    for (family, port) in Family::BOTH.into_iter().zip([7001, 7002]) {
        let to = SocketAddr::new(family.address(1, 2), port);
        as_clerk(&net.host, || {
            eperm(TcpStream::connect(to).map(drop), "connect, tcp");
            let socket = UdpSocket::bind((traffic::unspecified(to.ip()), 0)).unwrap();
            eperm(socket.connect(to), "connect, udp");
            eperm(socket.send_to(b"hello", to).map(drop), "sendmsg, udp");
        });
        for (direction, protocol) in [("connect", "tcp"), ("connect", "udp"), ("sendmsg", "udp")] {
            let (_, denial) =
                follow.find(|l| l["direction"] == direction && l["protocol"] == protocol);
            clerk_is_named(&denial);
            let want = json!({
                "verdict": "DENIED",
                "reason": "default_deny",
                "rule": null,
                "default": "server (both)",
                "file": "policy.yaml",
                "line": line_of(HOST, "server:"),
                "to_segments": ["server"],
                "dst": to.ip().to_string(),
                "dst_port": port,
                "protocol": protocol,
                "tcp_flags": null,
                "icmp_type": null,
                "icmp_code": null,
                "direction": direction,
                "interface": null,
                "packets": 1,
                "generation": 1,
            });
            for (name, value) in want.as_object().unwrap() {
                assert_eq!(&denial[name], value, "{name} of {denial:#}");
            }
        }
    }
    // Nothing got as far as the wire.
    assert_eq!(daemon.counted("tc_egress", "denied", "default_deny"), 0);
}
