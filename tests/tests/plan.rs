//! A plan says what another policy changes, and which live flows it cuts: just those are cut.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Output,
    time::Duration,
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, enforcer, line_of},
    netns::{Family, Routed, directory},
    scale, traffic,
};
use serde_json::Value;

/// The rule that goes admits the first port, the other one the second.
const GOES: u16 = 7001;
const STAYS: u16 = 7002;

const OTHERS: &str = r#"version: 1
segments:
  a: { members: [{cidr: 10.1.0.0/24}, {cidr: "fd01::/64"}] }
  b: { members: [{cidr: 10.2.0.0/24}, {cidr: "fd02::/64"}] }
rules:
  - { name: stays, from: [a], to: [b], services: [tcp/7002, udp/7002] }
"#;

const OBSERVED: &str = r#"version: 1
defaults: { mode: observe }
segments:
  a: { members: [{cidr: 10.1.0.0/24}, {cidr: "fd01::/64"}] }
  b: { members: [{cidr: 10.2.0.0/24}, {cidr: "fd02::/64"}] }
"#;

fn with_rule() -> String {
    format!("{OTHERS}  - {{ name: goes, from: [a], to: [b], services: [tcp/7001, udp/7001] }}\n")
}

/// A live flow of `a`, and its end there.
enum End {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

struct Flow {
    end: End,
    tuple: Tuple,
}

/// Protocol, the opener's end, the other one.
type Tuple = (String, SocketAddr, SocketAddr);

impl Flow {
    fn open(net: &Routed, family: Family, port: u16) -> [Self; 2] {
        let to = SocketAddr::new(family.address(2, 2), port);
        let stream = traffic::tcp(&net.a, to);
        let socket = traffic::udp(&net.a, (family.address(1, 2), 0), LONG);
        socket.connect(to).unwrap();
        let tuple = |protocol: &str, from| (protocol.to_owned(), from, to);
        let mut flows = [
            Self {
                tuple: tuple("tcp", stream.local_addr().unwrap()),
                end: End::Tcp(stream),
            },
            Self {
                tuple: tuple("udp", socket.local_addr().unwrap()),
                end: End::Udp(socket),
            },
        ];
        for flow in &mut flows {
            assert!(flow.lives(LONG), "{:?}", flow.tuple);
        }
        flows
    }

    /// Whether an echo comes back in time.
    fn lives(&mut self, limit: Duration) -> bool {
        match &mut self.end {
            End::Tcp(stream) => {
                stream.set_read_timeout(Some(limit)).unwrap();
                traffic::converse(stream, b"still here?").is_ok()
            }
            End::Udp(socket) => {
                socket.set_read_timeout(Some(limit)).unwrap();
                let mut answer = [0; 16];
                socket.send(b"still here?").is_ok() && socket.recv(&mut answer).is_ok()
            }
        }
    }
}

fn tuples(flows: &[Flow]) -> BTreeSet<Tuple> {
    flows.iter().map(|flow| flow.tuple.clone()).collect()
}

/// Flows of a list of a plan, or of `flows`.
fn listed(list: &Value) -> BTreeSet<Tuple> {
    let list = list.as_array().unwrap().iter();
    let listed = list.map(|flow| {
        let end = |ip: &str, port: &str| {
            let ip: IpAddr = flow[ip].as_str().unwrap().parse().unwrap();
            let port = flow[port].as_u64().unwrap();
            SocketAddr::new(ip, port.try_into().unwrap())
        };
        let protocol = flow["protocol"].as_str().unwrap().to_owned();
        (protocol, end("from", "from_port"), end("to", "to_port"))
    });
    listed.collect()
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// `plan DIRECTORY -o json` and its exit code.
fn plan(daemon: &Daemon<'_>, directory: &Path) -> (i32, Value) {
    let path = directory.to_str().unwrap();
    let output = daemon.ask("plan", &[path, "-o", "json"]);
    let plan = serde_json::from_slice(&output.stdout);
    let plan = plan.unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output.status.code().unwrap(), plan)
}

#[test]
fn the_flows_that_a_plan_lists_are_cut_and_no_others() {
    let net = Routed::new();
    for port in [GOES, STAYS] {
        traffic::tcp_echo(&net.b, port);
        traffic::udp_echo(&net.b, traffic::any(port));
    }
    let daemon = Setup::new(&net.gateway, "gw-*", &with_rule()).start();
    let open = |port| -> Vec<Flow> {
        let both = Family::BOTH.into_iter();
        both.flat_map(|family| Flow::open(&net, family, port))
            .collect()
    };
    let (mut going, mut staying) = (open(GOES), open(STAYS));
    let place = directory();
    let candidate = place.path().join("policy.yaml");
    fs::write(&candidate, OTHERS).unwrap();

    let (code, said) = plan(&daemon, place.path());
    assert_eq!(code, 2);
    let flows = &said["flows"];
    assert_eq!(listed(&flows["cut_flows"]), tuples(&going), "{said:#}");
    assert_eq!(
        (&flows["cut"], &flows["would_deny"]),
        (&4.into(), &0.into())
    );
    let line = line_of(&with_rule(), "name: goes");
    for flow in flows["cut_flows"].as_array().unwrap() {
        assert_eq!(flow["now"]["rule"], "goes");
        assert_eq!(
            (&flow["now"]["file"], &flow["now"]["line"]),
            (&"policy.yaml".into(), &line.into())
        );
        assert_eq!(flow["then"]["reason"], "default_deny");
        assert_eq!(flow["then"]["segment"], "b");
        assert_eq!(
            (&flow["state"], &flow["from_segments"][0]),
            (&"answered".into(), &"a".into())
        );
    }
    let removed = &said["text"]["rules"]["items"][0];
    assert_eq!(
        (&removed["sign"], &removed["name"], &removed["line"]),
        (&"removed".into(), &"goes".into(), &line.into())
    );
    let group = &said["reach"]["groups"][0];
    assert_eq!(
        (&group["from"][0]["after"][0], &group["to"][0]["after"][0]),
        (&"a".into(), &"b".into())
    );
    let change = &group["changes"][0];
    assert_eq!(
        change["services"],
        serde_json::json!(["tcp/7001", "udp/7001"])
    );
    assert_eq!(
        (&change["before"], &change["after"]),
        (&"allowed".into(), &"denied".into())
    );

    for_people(&daemon, place.path(), &going);
    the_list_of_flows(&daemon, &going, &staying);
    refusals(&daemon, &candidate);

    // Nothing of it was done.
    assert_eq!(daemon.generation(), 1);
    for flow in going.iter_mut().chain(&mut staying) {
        assert!(flow.lives(LONG), "{:?}", flow.tuple);
    }

    // Now it is.
    fs::write(&candidate, OTHERS).unwrap();
    daemon.swap(OTHERS);
    let cut = scale::within(Duration::from_millis(300));
    for flow in &mut staying {
        assert!(flow.lives(LONG), "{:?}", flow.tuple);
    }
    for flow in &mut going {
        assert!(!flow.lives(cut), "{:?}", flow.tuple);
    }
    let (code, said) = plan(&daemon, place.path());
    assert_eq!(
        (code, &said["changed"], &said["summary"]),
        (0, &false.into(), &"no changes".into())
    );

    // Without its rule, but where denials are only observed. Those that are cut already are no
    // news.
    fs::write(&candidate, OBSERVED).unwrap();
    let (code, said) = plan(&daemon, place.path());
    assert_eq!(code, 2, "{said:#}");
    let flows = &said["flows"];
    assert_eq!(
        listed(&flows["would_deny_flows"]),
        tuples(&staying),
        "{said:#}"
    );
    assert_eq!(
        (&flows["cut"], &flows["would_deny"]),
        (&0.into(), &4.into())
    );
}

/// The text is what the JSON says, and its last line is all of it in short.
fn for_people(daemon: &Daemon<'_>, directory: &Path, going: &[Flow]) {
    let output = daemon.ask("plan", &[directory.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    let text = text(&output);
    for flow in going {
        let (protocol, from, to) = &flow.tuple;
        let line = format!("  - {from} -> {to} {protocol}  answered, ");
        assert!(text.contains(&line), "{line}\n{text}");
    }
    let line = line_of(&with_rule(), "name: goes");
    for part in [
        format!("  - goes  allow a -> b: tcp/7001, udp/7001  policy.yaml:{line}\n"),
        "  a -> b\n    - tcp/7001, udp/7001: allowed -> denied\n".to_owned(),
        "        10.1.0.1 -> 10.2.0.1 tcp/7001: allowed by rule goes ".to_owned(),
        "live flows that would be cut: 4\n".to_owned(),
        format!(
            "allowed by rule goes (policy.yaml:{line}) -> denied by default of b (policy.yaml:4)\n"
        ),
    ] {
        assert!(text.contains(&part), "{part}\n{text}");
    }
    let summary =
        "1 rule removed; 1 pair of segments loses tcp/7001, udp/7001; 4 live flows would be cut";
    assert_eq!(text.lines().last(), Some(summary), "{text}");
    assert!(!text.contains('\x1b'), "{text}");
}

fn the_list_of_flows(daemon: &Daemon<'_>, going: &[Flow], staying: &[Flow]) {
    let flows = |arguments: &[&str]| -> Value {
        let output = daemon.ask("flows", &[arguments, &["-o", "json"]].concat());
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let all = &tuples(going) | &tuples(staying);
    // Others may be there as well: hosts talk.
    let has = |said: &Value| -> BTreeSet<Tuple> {
        let mine = |flow: &&Value| !flow["to_port"].is_null();
        let list = said["flows"].as_array().unwrap().iter().filter(mine);
        let list = listed(&list.cloned().collect());
        &list & &all
    };
    let of_family = |v6: bool| -> BTreeSet<Tuple> {
        let all = all.iter().filter(|(_, from, _)| from.is_ipv6() == v6);
        all.cloned().collect()
    };
    assert_eq!(has(&flows(&[])), all);
    assert_eq!(has(&flows(&["--from", "a", "--to", "b"])), all);
    assert_eq!(has(&flows(&["--segment", "b"])), all);
    assert_eq!(has(&flows(&["--from", "b"])), BTreeSet::new());
    assert_eq!(has(&flows(&["--to", "unsegmented"])), BTreeSet::new());
    assert_eq!(has(&flows(&["--to", "10.2.0.2"])), of_family(false));
    assert_eq!(has(&flows(&["--from", "fd01::2"])), of_family(true));
    let one = flows(&["--limit", "1"]);
    assert_eq!(one["flows"].as_array().unwrap().len(), 1);
    assert!(
        one["total"].as_u64().unwrap() >= 8 && one["matched"] == one["total"],
        "{one}"
    );
    let first = &flows(&["--from", "10.1.0.2"])["flows"][0];
    assert!(["goes", "stays"].contains(&first["now"]["rule"].as_str().unwrap()));
    assert!(
        first["packets"].as_u64().unwrap() >= 2 && first["idle"].as_u64().is_some(),
        "{first}"
    );

    let text = text(&daemon.ask("flows", &["--segment", "a"]));
    let (_, from, to) = &going[0].tuple;
    assert!(
        text.contains(&format!("{from} -> {to} tcp  answered")),
        "{text}"
    );
    assert!(
        text.contains("    a -> b: allowed by rule goes (policy.yaml:"),
        "{text}"
    );
    let unknown = daemon.ask("flows", &["--segment", "bb"]);
    assert_eq!(unknown.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("did you mean `b`"));
}

/// What cannot be used is refused as `check` does it, and changes nothing.
fn refusals(daemon: &Daemon<'_>, candidate: &Path) {
    let directory = candidate.parent().unwrap();
    fs::write(candidate, OTHERS.replace("from: [a]", "from: [aa]")).unwrap();
    let output = daemon.ask("plan", &[directory.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let (said, checked) = (
        text(&output),
        text(&enforcer(&["check", directory.to_str().unwrap()])),
    );
    let caret = said.lines().position(|line| line.contains("^^")).unwrap();
    let shown = |text: &str| Vec::from_iter(text.lines().take(caret + 1).map(str::to_owned));
    assert_eq!(shown(&said), shown(&checked));
    assert!(said.contains("1 error; nothing has changed"), "{said}");
    let (code, refusal) = plan(daemon, directory);
    assert_eq!((code, &refusal["code"]), (1, &"rejected".into()));
    assert_eq!(
        refusal["diagnostics"][0]["line"],
        line_of(OTHERS, "from: [a]")
    );

    // Others could have written it.
    fs::write(candidate, OTHERS).unwrap();
    fs::set_permissions(candidate, fs::Permissions::from_mode(0o666)).unwrap();
    let (code, refusal) = plan(daemon, directory);
    assert_eq!((code, &refusal["code"]), (1, &"rejected".into()));
    assert!(
        refusal["error"].as_str().unwrap().contains("policy.yaml"),
        "{refusal}"
    );
    fs::set_permissions(candidate, fs::Permissions::from_mode(0o644)).unwrap();
    let missing = daemon.ask("plan", &["/nowhere/at/all"]);
    assert_eq!(missing.status.code(), Some(1), "{missing:?}");
    let status = daemon.status();
    assert_eq!(
        (&status["state"], &status["policy"]["last_error"]),
        (&"enforcing".into(), &Value::Null)
    );
}

#[test]
fn without_a_daemon_there_is_no_plan() {
    let place = directory();
    let socket = place.path().join("none.sock");
    for verb in ["plan", "flows"] {
        let output = enforcer(&[verb, "--socket", socket.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(5), "{output:?}");
        assert!(output.stdout.is_empty());
    }
    // What the command line does not take is a slip, not a change.
    let output = enforcer(&["plan", "--nonsense"]);
    assert_eq!(output.status.code(), Some(64));
}
