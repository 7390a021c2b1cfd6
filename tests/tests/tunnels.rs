//! Tunnels: the outside is what it is and needs a rule that names it; the inside is judged where
//! the device that unpacks it is enforced.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::net::{IpAddr, Ipv4Addr};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup},
    frame,
    netns::{Family, Pair, Routed},
    seen::{denied, moved, skipped},
    traffic::{self, QUIET, Tap},
    wire,
};
use serde_json::json;

const INNER_HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1));
const INNER_PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 2));

/// Both ends of the outside may send what `outer` names; the peer inside may be asked at udp/7000.
fn policy(outer: &str) -> String {
    format!(
        r#"version: 1
segments:
  ends: {{ members: [{{cidr: 10.1.0.0/24}}, {{cidr: "fd01::/64"}}] }}
  inside: {{ members: [{{cidr: 10.9.0.0/24}}] }}
rules:
  - {{ name: outer, from: [ends], to: [ends], services: [{outer}] }}
  - {{ name: inner, from: [inside], to: [inside], services: [udp/7000, tcp/7000] }}
"#
    )
}

/// A tunnel between the hosts of a [`Pair`]: what makes it at each end, or the kernel's complaint.
fn tunnel(net: &Pair, kind: &str) -> Result<(), String> {
    let ends = [
        (&net.host, "10.1.0.1", "10.1.0.2", INNER_HOST),
        (&net.peer, "10.1.0.2", "10.1.0.1", INNER_PEER),
    ];
    for (end, local, remote, inner) in ends {
        let mut words = vec!["link", "add", "inner", "type"];
        words.extend(kind.split(' '));
        words.extend(["local", local, "remote", remote]);
        end.ask("ip", &words)?;
        end.addresses("inner", &[&format!("{inner}/24")]);
        end.ip("link set inner up\n");
    }
    Ok(())
}

fn echoes(net: &Pair) {
    for end in [&net.host, &net.peer] {
        for port in [7000, 7001] {
            traffic::udp_echo(end, traffic::any(port));
        }
        traffic::tcp_echo(end, 7000);
    }
}

/// Whether the peer's echo answers inside, and how many packets of the outside were denied.
fn outer_denials(daemon: &Daemon<'_>, net: &Pair) -> (bool, u64) {
    let mut answered = false;
    let [dropped] = moved(daemon, [("", "denied", "default_deny")], || {
        answered = traffic::udp_answers(&net.host, None, (INNER_PEER, 7000));
    });
    (answered, dropped)
}

/// A tunnel on an enforced host: outside first, then inside. `name` is the outside in records.
fn a_tunnel_of_an_enforced_host(kind: &str, service: &str, name: &str) {
    let net = Pair::new();
    if let Err(complaint) = tunnel(&net, kind) {
        skipped(&format!("no {kind} in this kernel: {complaint}"));
        return;
    }
    echoes(&net);
    // A rule for everything is none for tunnels; a rule for another port none for this one.
    let others = if service.starts_with("proto") {
        "any"
    } else {
        "udp/1-4788, udp/4790-65535, tcp/any"
    };
    let daemon = Setup::new(&net.host, "eth0,inner", &policy(others))
        .with(&["--socket-hooks", "off"])
        .start();
    let (answered, dropped) = outer_denials(&daemon, &net);
    assert!(!answered && dropped > 0, "{kind}: {dropped} dropped");
    denied(
        &daemon,
        &json!({
            "direction": "egress", "interface": "eth0", "protocol": name,
            "src": "10.1.0.1", "dst": "10.1.0.2", "reason": "default_deny",
        }),
    );
    // Likewise from the other end.
    assert!(!traffic::udp_answers(&net.peer, None, (INNER_HOST, 7000)));
    denied(
        &daemon,
        &json!({
            "direction": "ingress", "interface": "eth0", "protocol": name,
            "src": "10.1.0.2", "dst": "10.1.0.1", "reason": "default_deny",
        }),
    );

    // With the outside allowed, the inside is judged by its own rules.
    daemon.swap(&policy(service));
    for (from, to) in [(&net.host, INNER_PEER), (&net.peer, INNER_HOST)] {
        assert!(traffic::udp_answers_soon(from, (to, 7000)), "{kind}");
        let mut stream = traffic::tcp(from, (to, 7000));
        traffic::converse(&mut stream, b"inside").unwrap();
        assert!(!traffic::udp_answers(from, None, (to, 7001)), "{kind}");
        assert!(!traffic::pings(from, to, QUIET), "{kind}");
    }
    for (direction, src, dst) in [
        ("egress", INNER_HOST, INNER_PEER),
        ("ingress", INNER_PEER, INNER_HOST),
    ] {
        denied(
            &daemon,
            &json!({
                "direction": direction, "interface": "inner", "protocol": "udp",
                "reason": "default_deny", "dst_port": 7001,
                "src": src.to_string(), "dst": dst.to_string(),
            }),
        );
    }
    let status = daemon.status();
    let interfaces = status["interfaces"].as_array().unwrap().iter();
    assert_eq!(interfaces.filter(|i| i["enforced"] == true).count(), 2);
    drop(daemon);

    // A limit, pinned: with the device left out, the inside is nobody's business.
    let _daemon = Setup::new(&net.host, "eth0", &policy(service))
        .with(&["--socket-hooks", "off"])
        .start();
    assert!(traffic::udp_answers_soon(&net.host, (INNER_PEER, 7001)));
}

#[test]
fn vxlan() {
    a_tunnel_of_an_enforced_host("vxlan id 7 dev eth0 dstport 4789", "udp/4789", "udp");
}

#[test]
fn ipip() {
    a_tunnel_of_an_enforced_host("ipip", "proto/ipip", "ipip");
}

#[test]
fn gre() {
    a_tunnel_of_an_enforced_host("gre", "proto/gre", "gre");
}

#[test]
fn gre_of_ethernet() {
    a_tunnel_of_an_enforced_host("gretap", "proto/gre", "gre");
}

#[test]
fn geneve() {
    let net = Pair::new();
    let words = "link add inner type geneve id 7 remote 10.1.0.2";
    let words: Vec<&str> = words.split(' ').collect();
    if let Err(complaint) = net.host.ask("ip", &words) {
        skipped(&format!("no geneve in this kernel: {complaint}"));
        return;
    }
    let words = "link add inner type geneve id 7 remote 10.1.0.1";
    net.peer
        .ask("ip", &words.split(' ').collect::<Vec<_>>())
        .unwrap();
    for (end, inner) in [(&net.host, INNER_HOST), (&net.peer, INNER_PEER)] {
        end.addresses("inner", &[&format!("{inner}/24")]);
        end.ip("link set inner up\n");
    }
    echoes(&net);
    let daemon = Setup::new(&net.host, "eth0,inner", &policy("udp/4789"))
        .with(&["--socket-hooks", "off"])
        .start();
    let (answered, dropped) = outer_denials(&daemon, &net);
    assert!(!answered && dropped > 0);
    daemon.swap(&policy("udp/6081"));
    assert!(traffic::udp_answers_soon(&net.host, (INNER_PEER, 7000)));
    assert!(!traffic::udp_answers(&net.host, None, (INNER_PEER, 7001)));
}

/// IPv6 inside IPv4.
#[test]
fn six_in_four() {
    let net = Pair::new();
    for (end, local, remote, inner) in [
        (&net.host, "10.1.0.1", "10.1.0.2", "fd09::1/64"),
        (&net.peer, "10.1.0.2", "10.1.0.1", "fd09::2/64"),
    ] {
        let words = ["link", "add", "inner", "type", "sit", "local", local];
        let made = end.ask("ip", &[&words[..], &["remote", remote]].concat());
        if let Err(complaint) = made {
            skipped(&format!("no sit in this kernel: {complaint}"));
            return;
        }
        end.addresses("inner", &[inner]);
        end.ip("link set inner up\n");
    }
    echoes(&net);
    let text = |outer| policy(outer).replace("{cidr: 10.9.0.0/24}", r#"{cidr: "fd09::/64"}"#);
    let daemon = Setup::new(&net.host, "eth0,inner", &text("any"))
        .with(&["--socket-hooks", "off"])
        .start();
    let peer: IpAddr = "fd09::2".parse().unwrap();
    assert!(!traffic::udp_answers(&net.host, None, (peer, 7000)));
    denied(
        &daemon,
        &json!({
            "direction": "egress", "interface": "eth0", "protocol": "6in4",
            "src": "10.1.0.1", "dst": "10.1.0.2", "reason": "default_deny",
        }),
    );
    daemon.swap(&text("proto/6in4"));
    assert!(traffic::udp_answers_soon(&net.host, (peer, 7000)));
    assert!(!traffic::udp_answers(&net.host, None, (peer, 7001)));
    denied(
        &daemon,
        &json!({
            "direction": "egress", "interface": "inner", "protocol": "udp",
            "dst": "fd09::2", "dst_port": 7001, "reason": "default_deny",
        }),
    );
}

/// Protocols that carry other packets: name and number.
const TUNNELS: [(&str, u8); 8] = [
    ("ipip", 4),
    ("6in4", 41),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("etherip", 97),
    ("l2tp", 115),
    ("mpls-in-ip", 137),
];

fn through(services: &str) -> String {
    format!(
        r#"version: 1
segments:
  a: {{ members: [{{cidr: 10.1.0.0/24}}, {{cidr: "fd01::/64"}}] }}
  b: {{ members: [{{cidr: 10.2.0.0/24}}, {{cidr: "fd02::/64"}}] }}
rules:
  - {{ name: some, from: [a], to: [b], services: [{services}] }}
"#
    )
}

/// What a tunnel carries from `a` to `b` would be allowed by itself.
fn outside(net: &Routed, family: Family, protocol: u8, mark: u8) -> Vec<u8> {
    let (a, b) = (family.address(1, 2), family.address(2, 2));
    let mut data = vec![0; 8];
    data.extend(wire::udp((a, 5000), (b, 7000), &[mark; 9]));
    let packet = frame::ip(a, b, protocol, &data);
    traffic::send_raw(&net.a, &packet);
    data
}

/// Through a gateway that unpacks nothing: on every kernel, whatever devices it has.
#[test]
fn a_tunnel_passes_where_a_rule_names_it_and_no_rule_for_everything_does() {
    let net = Routed::new();
    let daemon = Setup::new(&net.gateway, "gw-*", &through("any")).start();
    let tap = Tap::new(&net.b);
    traffic::udp_echo(&net.b, traffic::any(7000));
    assert!(traffic::udp_answers_soon(
        &net.a,
        (Family::V4.address(2, 2), 7000)
    ));
    for family in Family::BOTH {
        for (name, number) in TUNNELS {
            let data = outside(&net, family, number, 1);
            assert!(!tap.sees(&data, QUIET / 3), "{family:?} {name}");
            // Records name what is common, and number the rest.
            let shown = match number {
                97 | 115 | 137 => format!("proto/{number}"),
                _ => name.to_owned(),
            };
            denied(
                &daemon,
                &json!({
                    "direction": "ingress", "interface": "gw-a", "protocol": shown,
                    "src": family.address(1, 2).to_string(), "src_port": null,
                    "reason": "default_deny",
                }),
            );
        }
    }
    let named: Vec<_> = TUNNELS.map(|(name, _)| format!("proto/{name}")).into();
    for (at, (name, number)) in TUNNELS.into_iter().enumerate() {
        daemon.swap(&through(&named[at]));
        let other = TUNNELS[(at + 1) % TUNNELS.len()];
        for family in Family::BOTH {
            let data = outside(&net, family, other.1, 2);
            assert!(
                !tap.sees(&data, QUIET / 3),
                "{family:?} {} by {name}",
                other.0
            );
            let data = outside(&net, family, number, 3);
            assert!(tap.sees(&data, LONG), "{family:?} {name}");
        }
    }
}

#[test]
fn a_tunnel_device_that_appears_later_is_enforced() {
    let net = Pair::new();
    echoes(&net);
    let daemon = Setup::new(&net.host, "eth0,inner*", &policy("udp/4789"))
        .with(&["--socket-hooks", "off"])
        .start();
    if let Err(complaint) = tunnel(&net, "vxlan id 8 dev eth0 dstport 4789") {
        skipped(&format!("no vxlan in this kernel: {complaint}"));
        return;
    }
    enforcer_tests::daemon::wait_for("the device to be enforced", LONG, || {
        let status = daemon.status();
        let interfaces = status["interfaces"].as_array().unwrap().clone();
        let inner = interfaces.iter().find(|i| i["name"] == "inner")?;
        (inner["enforced"] == true).then_some(())
    });
    assert!(traffic::udp_answers_soon(&net.host, (INNER_PEER, 7000)));
    assert!(!traffic::udp_answers(&net.host, None, (INNER_PEER, 7001)));
}
