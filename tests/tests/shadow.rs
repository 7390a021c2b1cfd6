//! A candidate policy is asked beside the one in force and never obeyed; where they differ is
//! counted, exactly.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, line_of, wait_for},
    netns::{Family, Netns, Pair, Routed},
    pins::Pins,
    seen::moved,
    traffic,
};
use serde_json::Value;

/// Admitted by both policies; by the one in force alone; by the candidate alone.
const STAYS: u16 = 7000;
const GOES: u16 = 7001;
const COMES: u16 = 7002;

fn policy(port: u16) -> String {
    format!(
        "version: 1\n\
         segments:\n\
         \x20 a: {{ members: [{{cidr: 10.1.0.0/24}}, {{cidr: \"fd01::/64\"}}] }}\n\
         \x20 b: {{ members: [{{cidr: 10.2.0.0/24}}, {{cidr: \"fd02::/64\"}}] }}\n\
         rules:\n\
         \x20 - {{ name: own, from: [a], to: [b], services: [tcp/{port}, udp/{port}] }}\n\
         \x20 - {{ name: both, from: [a], to: [b], services: [tcp/{STAYS}, udp/{STAYS}] }}\n"
    )
}

/// Writes a policy beside the one that is watched.
fn candidate(setup: &Setup<'_>, text: &str) -> PathBuf {
    let directory = setup.segments().parent().unwrap().join("candidate");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("policy.yaml"), text).unwrap();
    directory
}

/// Exit code and answer.
fn shadow(daemon: &Daemon<'_>, what: &Path) -> (i32, Value) {
    let output = daemon.ask("shadow", &[what.to_str().unwrap(), "-o", "json"]);
    let said = serde_json::from_slice(&output.stdout);
    let said: Value = said.unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output.status.code().unwrap(), said["shadow"].clone())
}

fn status(daemon: &Daemon<'_>) -> Value {
    shadow(daemon, Path::new("status")).1
}

/// Packets of a hook that had one outcome and would have had the other.
fn counted(shadow: &Value, hook: &str, outcomes: [&str; 2]) -> u64 {
    let all = shadow["differences"].as_array().unwrap().iter();
    let of = all
        .filter(|d| d["hook"] == hook && [&d["now"]["outcome"], &d["then"]["outcome"]] == outcomes);
    of.map(|d| d["packets"].as_u64().unwrap()).sum()
}

const LOST: [&str; 2] = ["allowed", "denied"];
const WON: [&str; 2] = ["denied", "allowed"];

/// A TCP connection and a UDP exchange to a port of `b`, of each family, one packet each that opens
/// them; how many worked. Those that are to have all the time that they need; the others are given up
/// before they are sent again.
fn exchange(net: &Routed, port: u16) -> usize {
    let limit = if port == COMES {
        Duration::from_millis(300)
    } else {
        LONG
    };
    let mut worked = 0;
    for family in Family::BOTH {
        let to = SocketAddr::new(family.address(2, 2), port);
        let socket = traffic::udp(&net.a, (traffic::unspecified(to.ip()), 0), limit);
        socket.send_to(b"hello", to).unwrap();
        worked += usize::from(socket.recv_from(&mut [0; 16]).is_ok());
        worked += usize::from(traffic::tcp_connects(&net.a, to, limit));
    }
    worked
}

/// The same with what is admitted, until its connections are closed.
fn exchanged(daemon: &Daemon<'_>, net: &Routed, port: u16) {
    let passed = [("tc_ingress", "allowed", "")];
    let [passed] = moved(daemon, passed, || assert_eq!(exchange(net, port), 4));
    assert!(passed > 8);
}

fn connections(net: &Routed, port: u16) -> Vec<TcpStream> {
    let to = Family::BOTH.map(|family| SocketAddr::new(family.address(2, 2), port));
    let open = |to| {
        let mut stream = traffic::tcp(&net.a, to);
        stream.set_read_timeout(Some(LONG)).unwrap();
        traffic::converse(&mut stream, b"hello").unwrap();
        stream
    };
    to.into_iter().map(open).collect()
}

#[test]
fn a_candidate_is_asked_and_never_obeyed_and_outlives_the_daemon() {
    let (net, pins) = (Routed::new(), Pins::default());
    for port in [STAYS, GOES, COMES] {
        traffic::tcp_echo(&net.b, port);
        traffic::udp_echo(&net.b, traffic::any(port));
    }
    let setup = Setup::new(&net.gateway, "gw-*", &policy(GOES)).pinned(pins.path());
    let state = setup.segments().parent().unwrap().join("state");
    let options = ["--socket-hooks", "off", "--state-dir"];
    let setup = setup.with(&[&options[..], &[state.to_str().unwrap()]].concat());
    let other = candidate(&setup, &policy(COMES));
    let mut daemon = setup.start();
    assert_eq!(shadow(&daemon, Path::new("status")), (0, Value::Null));

    // What lives already is judged at once, where no packet asks for it.
    let mut live = connections(&net, GOES);
    let mut kept = connections(&net, STAYS);
    let (code, begun) = shadow(&daemon, &other);
    assert_eq!((code, &begun["flows"]["cut"]), (2, &2.into()), "{begun:#}");
    assert_eq!(begun["differing"], 0);
    let cut = &begun["flows"]["cut_flows"][0];
    assert_eq!(
        (&cut["to_port"], &cut["then"]["reason"]),
        (&GOES.into(), &"default_deny".into())
    );

    // Each asks once, of both families and protocols: flows that are admitted.
    exchanged(&daemon, &net, STAYS);
    exchanged(&daemon, &net, GOES);
    let denied = [("tc_ingress", "denied", "default_deny")];
    let [dropped] = moved(&daemon, denied, || assert_eq!(exchange(&net, COMES), 0));
    assert!(dropped >= 4);
    let said = status(&daemon);
    assert_eq!(counted(&said, "tc_ingress", LOST), 4, "{said:#}");
    assert_eq!(counted(&said, "tc_ingress", WON), dropped, "{said:#}");
    // A SYN is judged where it goes out as well.
    assert_eq!(counted(&said, "tc_egress", LOST), 2, "{said:#}");
    assert_eq!(
        (
            &said["newly_denied"],
            &said["newly_allowed"],
            &said["differing"]
        ),
        (&6.into(), &dropped.into(), &(6 + dropped).into())
    );
    let lines = [
        line_of(&policy(GOES), "name: own"),
        line_of(&policy(COMES), "  b:"),
    ];
    let lost = said["differences"].as_array().unwrap().iter();
    let lost = lost
        .clone()
        .find(|d| d["then"]["outcome"] == "denied")
        .unwrap();
    assert_eq!(
        (
            &lost["now"]["rule"],
            &lost["now"]["line"],
            &lost["then"]["segment"],
            &lost["then"]["line"]
        ),
        (
            &"own".into(),
            &lines[0].into(),
            &"b".into(),
            &lines[1].into()
        )
    );
    let example = &lost["examples"][0];
    assert_eq!(
        (
            &example["to_port"],
            &example["from_segments"][0],
            &example["interface"]
        ),
        (&GOES.into(), &"a".into(), &"gw-a".into())
    );
    let text = daemon.ask("shadow", &[]);
    let text = String::from_utf8(text.stdout).unwrap();
    for part in [
        "is asked beside the policy in force, and not obeyed; since ",
        "x tc_ingress: allowed by rule own (policy.yaml:",
        "-> denied by default of b (policy.yaml:",
        "6 packets would be denied and are not; ",
        "live flows that would be cut: ",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    let short = &daemon.status()["shadow"];
    assert_eq!(short["path"], other.to_str().unwrap());

    // Without a daemon the programs go on counting; the next one has it all.
    let setup = daemon.kill();
    assert_eq!(exchange(&net, GOES), 4);
    fs::remove_dir_all(&other).unwrap();
    daemon = setup.start();
    let said = wait_for("the shadow to go on", LONG, || {
        Some(status(&daemon)).filter(|shadow| !shadow.is_null())
    });
    assert_eq!(counted(&said, "tc_ingress", LOST), 8, "{said:#}");

    // Other numbers of rules in force mix nothing up.
    daemon.swap(
        &policy(GOES)
            .replace("name: own", "name: new")
            .replace("7000", "7003"),
    );
    exchanged(&daemon, &net, GOES);
    let said = wait_for("all to be counted", LONG, || {
        Some(status(&daemon)).filter(|said| counted(said, "tc_ingress", LOST) >= 12)
    });
    let rules = said["differences"].as_array().unwrap().iter();
    let rules = rules.filter(|d| d["then"]["outcome"] == "denied" && d["hook"] == "tc_ingress");
    let rules: Vec<_> = rules
        .map(|d| (d["now"]["rule"].clone(), d["packets"].clone()))
        .collect();
    assert_eq!(rules, [("own".into(), 8.into()), ("new".into(), 4.into())]);
    daemon.swap(&policy(GOES));

    for stream in live.iter_mut().chain(&mut kept) {
        traffic::converse(stream, b"still here").unwrap();
    }
    // Those of the first were judged again, by another generation.
    let (code, last) = shadow(&daemon, Path::new("off"));
    assert_eq!(
        (code, counted(&last, "tc_ingress", LOST)),
        (2, 14),
        "{last:#}"
    );
    exchanged(&daemon, &net, GOES);
    assert_eq!(shadow(&daemon, Path::new("status")), (0, Value::Null));
    let images = pins.list().into_iter();
    let images = images.filter(|path| path.starts_with("current/images/"));
    assert_eq!(images.count(), 1);
    daemon.ask("detach", &["--yes"]);
}

#[test]
fn a_whole_policy_is_rehearsed_before_anything_is_enforced() {
    const OPEN: &str = "version: 1\ndefaults: { unsegmented: allow }\n";
    const STRICT: &str = r#"version: 1
defaults: { unsegmented: deny }
segments:
  b: { members: [{cidr: 10.2.0.0/24}, {cidr: "fd02::/64"}] }
rules:
  - { name: here, from: [any], to: [host], services: [udp/7005] }
"#;
    let net = Routed::new();
    traffic::udp_echo(&net.b, traffic::any(STAYS));
    let setup = Setup::new(&net.gateway, "gw-*", OPEN).with(&["--socket-hooks", "off"]);
    let strict = candidate(&setup, STRICT);
    let daemon = setup.start();

    // What is no good is refused like by `check`, and is not asked.
    let broken = candidate(&daemon.setup, &STRICT.replace("[host]", "[hots]"));
    let output = daemon.ask("shadow", &[broken.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        said.contains("did you mean `host`") && said.contains("^^"),
        "{said}"
    );
    assert_eq!(status(&daemon), Value::Null);
    candidate(&daemon.setup, STRICT);

    let (_, begun) = shadow(&daemon, &strict);
    assert_eq!(begun["path"], strict.to_str().unwrap());
    let to = (Family::V4.address(2, 2), STAYS);
    for _ in 0..5 {
        let socket = traffic::udp(&net.a, (Family::V4.address(1, 2), 0), LONG);
        socket.send_to(b"hello", to).unwrap();
        socket.recv_from(&mut [0; 16]).unwrap();
    }
    let said = status(&daemon);
    assert_eq!(counted(&said, "tc_ingress", LOST), 5, "{said:#}");
    assert!(daemon.denials(&[]).is_empty());

    // The candidate learns of an address of this host as the policy in force does.
    let sender = traffic::udp(&net.a, (Family::V4.address(1, 2), 0), LONG);
    let port = sender.local_addr().unwrap().port();
    let ask = |n: u16| {
        let socket = traffic::udp(&net.a, (Family::V4.address(1, 2), 0), LONG);
        assert_ne!(socket.local_addr().unwrap().port(), port);
        socket
            .send_to(&n.to_be_bytes(), ("10.1.0.9", 7005))
            .unwrap();
    };
    net.gateway.addresses("gw-a", &["10.1.0.9/24"]);
    wait_for("the candidate to know the address", LONG, || {
        let before = status(&daemon)["differing"].as_u64().unwrap();
        let [passed] = moved(&daemon, [("tc_ingress", "allowed", "unsegmented")], || {
            ask(1)
        });
        assert!(passed >= 1);
        let after = status(&daemon)["differing"].as_u64().unwrap();
        (after == before).then_some(())
    });
    assert_eq!(status(&daemon)["problem"], Value::Null);
}

#[test]
fn calls_that_are_refused_are_counted_where_the_candidate_would_not() {
    let net = Pair::new();
    let rule = |port: u16| {
        format!(
            "version: 1\n\
             segments:\n\
             \x20 far: {{ members: [{{cidr: 10.1.0.2/32}}, {{cidr: \"fd01::2/128\"}}] }}\n\
             rules:\n\
             \x20 - {{ name: one, from: [any], to: [far], services: [tcp/{port}, udp/{port}] }}\n"
        )
    };
    let setup = Setup::new(&net.host, "eth0", &rule(STAYS));
    let other = candidate(&setup, &rule(COMES));
    let daemon = setup.start();
    assert_eq!(daemon.status()["socket_hooks"], "refuse");
    shadow(&daemon, &other);
    for family in Family::BOTH {
        for port in [COMES, GOES] {
            refused(&net.host, SocketAddr::new(family.address(1, 2), port));
        }
    }
    let said = status(&daemon);
    let calls = ["connect", "sendmsg"].map(|hook| counted(&said, hook, WON));
    assert_eq!(calls, [2, 2], "{said:#}");
    assert_eq!(said["newly_allowed"], 4);
    assert_eq!(said["differences"][0]["examples"][0]["to_port"], COMES);
}

/// What is only observed, and errors about flows, whose judgement stands: no difference.
#[test]
fn the_policy_in_force_does_not_differ_from_itself() {
    const OBSERVED: &str = r#"version: 1
defaults: { mode: observe }
segments:
  b: { members: [{cidr: 10.2.0.0/24}, {cidr: "fd02::/64"}] }
"#;
    let net = Routed::new();
    let setup = Setup::new(&net.gateway, "gw-*", OBSERVED).with(&["--socket-hooks", "off"]);
    let same = candidate(&setup, OBSERVED);
    let daemon = setup.start();
    assert_eq!(shadow(&daemon, &same).0, 0);
    let errors = [("", "allowed", "related")];
    let [related] = moved(&daemon, errors, || {
        for family in Family::BOTH {
            let socket = traffic::udp(&net.a, (family.address(1, 2), 0), LONG);
            socket.connect((family.address(2, 2), GOES)).unwrap();
            socket.send(b"closed").unwrap();
            let error = socket.recv(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        }
    });
    assert!(related >= 2, "{related}");
    let (code, said) = shadow(&daemon, Path::new("status"));
    assert_eq!((code, &said["differing"]), (0, &0.into()), "{said:#}");
}

/// Both kinds of calls, which are refused.
fn refused(host: &Netns, to: SocketAddr) {
    let no = |result: std::io::Result<()>| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{to}");
    };
    no(host.enter(|| TcpStream::connect(to).map(drop)));
    let socket = traffic::udp(host, (traffic::unspecified(to.ip()), 0), LONG);
    no(host.enter(|| socket.send_to(b"hello", to).map(drop)));
}
