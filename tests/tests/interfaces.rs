//! Which interfaces are enforced: by kind, by the default route, but for those that are exempt; and
//! what becomes of those that change.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{collections::BTreeSet, net::IpAddr};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, enforcer, wait_for},
    inside::Inside,
    netns::Netns,
    traffic::{self, QUIET},
};
use serde_json::Value;

const NOTHING: &str = r#"version: 1
segments:
  all: { members: [{cidr: 0.0.0.0/0}, {cidr: "::/0"}] }
"#;

fn interface(daemon: &Daemon<'_>, name: &str) -> Option<Value> {
    let status = daemon.status();
    let all = status["interfaces"].as_array().unwrap();
    all.iter().find(|i| i["name"] == name).cloned()
}

fn becomes(daemon: &Daemon<'_>, name: &str, state: &str) -> Value {
    wait_for(&format!("{name} to be {state}"), LONG, || {
        interface(daemon, name).filter(|i| i["state"] == state)
    })
}

fn why(interface: &Value) -> &str {
    interface["reason"].as_str().unwrap()
}

/// Both ends of a network: this host's interface has the address 1.
struct Network<'a> {
    far: &'a Netns,
    number: u8,
}

impl<'a> Network<'a> {
    fn new(near: &Netns, interface: &str, far: &'a Netns, number: u8) -> Self {
        near.cable(interface, far, &format!("to{number}"));
        let this = Self { far, number };
        this.addresses(near, interface);
        far.addresses(&format!("to{number}"), &[&format!("10.{number}.0.2/24")]);
        this
    }

    fn addresses(&self, near: &Netns, interface: &str) {
        near.addresses(interface, &[&format!("10.{}.0.1/24", self.number)]);
    }

    fn near(&self) -> IpAddr {
        [10, self.number, 0, 1].into()
    }

    /// Every packet that comes in is judged, and denied.
    fn is_judged(&self, daemon: &Daemon<'_>, interface: &str) {
        wait_for("a denial at the interface", LONG, || {
            assert!(!traffic::pings(self.far, self.near(), QUIET), "{interface}");
            let denials = daemon.denials(&["--last", "50"]);
            let here = |d: &Value| {
                d["interface"] == interface && d["src"] == format!("10.{}.0.2", self.number)
            };
            denials.iter().any(here).then_some(())
        });
        assert!(!traffic::pings(self.far, self.near(), QUIET), "{interface}");
    }

    fn is_open(&self) {
        assert!(traffic::pings(self.far, self.near(), LONG));
    }
}

#[test]
fn kinds_are_enforced_the_exempt_are_not_and_the_status_lists_every_interface() {
    let (host, far) = (Netns::new("host"), Netns::new("far"));
    let lan = Network::new(&host, "lan0", &far, 5);
    let management = Network::new(&host, "mgmt0", &far, 6);
    host.ip("tuntap add dev tun9 mode tun\nlink set tun9 up\n");
    let daemon = Setup::new(&host, "kind:veth", NOTHING)
        .with(&["--exempt", "mgmt*", "--socket-hooks", "off"])
        .start();
    let find = |name: &str| interface(&daemon, name).unwrap();
    for (name, state, reason, kind) in [
        ("lan0", "enforced", "kind:veth", Value::from("veth")),
        ("mgmt0", "exempt", "--exempt mgmt*", "veth".into()),
        (
            "tun9",
            "unprotected",
            "no --interface means it",
            "tun".into(),
        ),
    ] {
        let found = find(name);
        assert_eq!((&found["state"], why(&found)), (&state.into(), reason));
        assert_eq!((&found["kind"], &found["error"]), (&kind, &Value::Null));
        assert_eq!(found["enforced"], state == "enforced");
    }
    let lo = find("lo");
    assert!(
        lo["state"] == "exempt" && why(&lo).contains("loopback"),
        "{lo}"
    );
    // Every interface that the kernel has, and no other.
    let status = daemon.status();
    let listed = status["interfaces"].as_array().unwrap().iter();
    let listed: BTreeSet<&str> = listed.map(|i| i["name"].as_str().unwrap()).collect();
    let all = host.interfaces();
    assert_eq!(listed, all.keys().map(String::as_str).collect());
    // What nobody protects is what somebody asked for: no fault.
    assert_eq!(status["state"], "enforcing");
    let text = daemon.ask("status", &["--color", "always"]);
    assert_eq!(text.status.code(), Some(0));
    let text = String::from_utf8(text.stdout).unwrap();
    let (head, _) = text.split_once('\n').unwrap();
    assert!(
        head.contains("1 enforced") && head.contains("1 unprotected"),
        "{head}"
    );
    assert!(
        text.contains("\x1b[33mUNPROTECTED\x1b[0m: no --interface means it"),
        "{text}"
    );
    assert!(text.contains("exempt\x1b[0m: --exempt mgmt*"), "{text}");
    lan.is_judged(&daemon, "lan0");
    management.is_open();

    // A name decides what it is exempt from, and it may change.
    host.ip("link set mgmt0 down\nlink set mgmt0 name lan1\nlink set lan1 up\n");
    becomes(&daemon, "lan1", "enforced");
    management.is_judged(&daemon, "lan1");
    host.ip("link set lan1 down\nlink set lan1 name mgmt1\nlink set mgmt1 up\n");
    becomes(&daemon, "mgmt1", "exempt");
    management.is_open();

    moved_away_and_back(&daemon, &host, &lan);
    numbers_are_given_again(&daemon, &host, &far);
}

fn known(daemon: &Daemon<'_>) -> BTreeSet<u32> {
    let pid = daemon.status()["pid"].as_u64().unwrap();
    let [all, quick] = Inside(u32::try_from(pid).unwrap()).interfaces();
    assert_eq!(all, quick);
    all
}

fn moved_away_and_back(daemon: &Daemon<'_>, host: &Netns, lan: &Network<'_>) {
    let away = Netns::new("away");
    host.hand_over("lan0", &away);
    wait_for("lan0 to be gone", LONG, || {
        interface(daemon, "lan0").is_none().then_some(())
    });
    away.ip("link set lan0 up\n");
    lan.addresses(&away, "lan0");
    // There it is none of this daemon's business.
    lan.is_open();
    assert!(known(daemon).is_empty());
    away.hand_over("lan0", host);
    host.ip("link set lan0 up\n");
    lan.addresses(host, "lan0");
    becomes(daemon, "lan0", "enforced");
    lan.is_judged(daemon, "lan0");
    assert_eq!(known(daemon).len(), 1);
}

/// By one that is to be enforced as well, and by one that is not.
fn numbers_are_given_again(daemon: &Daemon<'_>, host: &Netns, far: &Netns) {
    let make = |name: &str, number: u8| {
        host.ip(&format!(
            "link add {name} index 7777 type veth peer name to{number} netns {}\n\
             link set {name} up\n",
            far.name()
        ));
        far.ip(&format!("link set to{number} up\n"));
        let network = Network { far, number };
        network.addresses(host, name);
        far.addresses(&format!("to{number}"), &[&format!("10.{number}.0.2/24")]);
        network
    };
    let first = make("lan7", 7);
    becomes(daemon, "lan7", "enforced");
    first.is_judged(daemon, "lan7");
    assert!(known(daemon).contains(&7777));
    // Nobody looks between the two.
    host.ip(&format!(
        "link del lan7\nlink add lan8 index 7777 type veth peer name to8 netns {}\n\
         link set lan8 up\n",
        far.name()
    ));
    let second = Network { far, number: 8 };
    far.ip("link set to8 up\n");
    second.addresses(host, "lan8");
    far.addresses("to8", &["10.8.0.2/24"]);
    becomes(daemon, "lan8", "enforced");
    second.is_judged(daemon, "lan8");
    host.ip("link del lan8\n");
    let third = make("mgmt9", 9);
    let found = becomes(daemon, "mgmt9", "exempt");
    assert_eq!(
        (&found["ifindex"], &found["slot"]),
        (&7777.into(), &0.into())
    );
    third.is_open();
    wait_for("nothing to be known of 7777", LONG, || {
        (!known(daemon).contains(&7777)).then_some(())
    });
}

#[test]
fn the_default_route_is_followed_and_what_it_left_stays_enforced() {
    let (host, far) = (Netns::new("host"), Netns::new("far"));
    let networks = [("up0", 5), ("up1", 6), ("up2", 7)];
    let [one, two, three] = networks.map(|(name, number)| Network::new(&host, name, &far, number));
    host.ip("route add default via 10.5.0.2 dev up0\n");
    let daemon = Setup::new(&host, "default-route", NOTHING)
        .with(&["--socket-hooks", "off"])
        .start();
    let found = becomes(&daemon, "up0", "enforced");
    assert_eq!(why(&found), "default-route");
    becomes(&daemon, "up1", "unprotected");
    one.is_judged(&daemon, "up0");
    two.is_open();

    host.ip("route replace default via 10.6.0.2 dev up1\n");
    becomes(&daemon, "up1", "enforced");
    two.is_judged(&daemon, "up1");
    let left = becomes(&daemon, "up0", "enforced");
    assert!(why(&left).contains("held before"), "{left}");
    one.is_judged(&daemon, "up0");
    three.is_open();
    // The default route of IPv6 is one as well, whatever its metric.
    let route = [
        "-6", "route", "add", "default", "dev", "up2", "metric", "4000",
    ];
    host.ask("ip", &route).unwrap();
    becomes(&daemon, "up2", "enforced");
    three.is_judged(&daemon, "up2");
    assert_eq!(daemon.status()["warnings"], serde_json::json!([]));
    for name in ["up1", "up2"] {
        host.ip(&format!("link del {name}\n"));
    }
    wait_for("the lack of a default route to be told", LONG, || {
        let warnings = daemon.status()["warnings"].to_string();
        warnings.contains("no default route").then_some(())
    });
    one.is_judged(&daemon, "up0");
    assert_eq!(daemon.status()["state"], "enforcing");
}

#[test]
fn what_cannot_be_meant_is_refused_with_what_could_be() {
    let said = |arguments: &[&str]| {
        let all = [&["run", "--segments", "/nonexistent"], arguments].concat();
        let output = enforcer(&all);
        assert_eq!(output.status.code(), Some(64), "{arguments:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(said(&["--interface", "kind:vteh"]).contains("did you mean `kind:veth`?"));
    assert!(said(&["--interface", "eth0,defautl-route"]).contains("`default-route`"));
    let both = said(&["--interface", "eth0", "--exempt", "eth*"]);
    assert!(
        both.contains("--interface eth0 and --exempt eth*"),
        "{both}"
    );
    let follows = said(&["--interface", "eth0", "--exempt", "default-route"]);
    assert!(follows.contains("name the interface"), "{follows}");
}
