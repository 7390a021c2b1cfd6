//! Programs of others on the enforcer's hooks: what they allow is denied all the same.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{net::SocketAddr, os::fd::AsRawFd as _};

use enforcer_tests::{
    calls::{DATA, Form},
    child::Child,
    daemon::{Daemon, LONG, Setup, wait_for},
    netns::{Family, Pair, Routed},
    rival::{self, Attach, Cgroup, Hook, Place},
    seen::{denied, moved, skipped},
    traffic::{self, QUIET, Tap},
    wire::{self, Packets},
};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, SockaddrStorage, connect, sendto},
};
use serde_json::json;

const POLICY: &str = r#"version: 1
segments:
  peer: { members: [{cidr: 10.1.0.2/32}, {cidr: "fd01::2/128"}] }
rules:
  - { name: some, from: [any], to: [peer], services: [udp/7000] }
"#;

/// A verdict of cgroup programs: go on.
const PROCEED: i32 = 1;
/// Verdicts of TC programs: let it pass and ask nobody else; ask the next.
const PASS: i32 = 0;
const NEXT: i32 = -1;

fn start(net: &Pair) -> Daemon<'_> {
    let daemon = Setup::new(&net.host, "eth0", POLICY).start();
    assert_eq!(daemon.status()["socket_hooks"], "refuse");
    daemon
}

/// What the two calls say to a process in `cgroup`: connect(2), sendto(2).
fn calls(net: &Pair, cgroup: &Cgroup, to: SocketAddr) -> [nix::Result<()>; 2] {
    [false, true].map(|unconnected| {
        let child = net.host.enter(|| {
            Child::new(|line| {
                line.wait();
                let socket = Form::V4.socket(libc::SOCK_DGRAM, 0)?;
                let (fd, to) = (socket.as_raw_fd(), SockaddrStorage::from(to));
                if unconnected {
                    sendto(fd, DATA, &to, MsgFlags::empty()).map(drop)
                } else {
                    connect(fd, &to)
                }
            })
        });
        cgroup.take(child.pid);
        child.say(None);
        child.end()
    })
}

#[test]
fn a_program_of_the_processs_own_cgroup_takes_nothing_away() {
    let net = Pair::new();
    let daemon = start(&net);
    let peer = Family::V4.address(1, 2);
    traffic::udp_echo(&net.peer, (peer, 7000));
    assert!(traffic::udp_answers_soon(&net.host, (peer, 7000)));
    // All of them before the first record: the enforcer looks for new ones once a second.
    let rivals = [
        (7101, Attach::Alone),
        (7102, Attach::Override),
        (7103, Attach::Multi),
    ]
    .map(|(port, how)| (port, how, Cgroup::new(&format!("rival-{port}"))));
    for (port, how, cgroup) in &rivals {
        let (port, how) = (*port, *how);
        for hook in [Hook::Connect4, Hook::Sendmsg4] {
            let program = rival::program(hook, PROCEED).unwrap();
            cgroup.attach(&program, hook, how).unwrap();
        }
        let good = calls(&net, cgroup, (peer, 7000).into());
        assert_eq!(good, [Ok(()); 2], "{how:?}");
        let bad = calls(&net, cgroup, (peer, port).into());
        assert_eq!(bad, [Err(Errno::EPERM); 2], "{how:?}");
        for direction in ["connect", "sendmsg"] {
            let record = denied(
                &daemon,
                &json!({ "direction": direction, "dst_port": port, "reason": "default_deny" }),
            );
            assert_eq!(record["process"]["cgroup"], cgroup.name());
        }
    }
}

#[test]
fn a_program_on_the_interface_cannot_allow_what_is_denied() {
    let net = Pair::new();
    let daemon = start(&net);
    for family in Family::BOTH {
        for port in [7000, 7100] {
            traffic::udp_echo(&net.peer, (family.address(1, 2), port));
        }
        assert!(traffic::udp_answers_soon(
            &net.host,
            (family.address(1, 2), 7000)
        ));
    }
    // Raw sockets are refused nothing: what is dropped, TC drops.
    let packets = || {
        Family::BOTH.map(|family| {
            let to = SocketAddr::new(family.address(1, 2), 7100);
            let own = family.address(1, 1);
            let heard = traffic::udp(&net.peer, (to.ip(), 0), QUIET);
            let to = SocketAddr::new(to.ip(), heard.local_addr().unwrap().port());
            let datagram = wire::udp((own, 5000), (to.ip(), to.port()), DATA);
            wire::Raw::new(&net.host, to.ip()).send(&datagram);
            heard.recv(&mut [0; 16]).is_ok()
        })
    };
    let attach = |verdict, place| {
        net.host.enter(|| {
            let program = rival::program(Hook::TcxEgress, verdict).unwrap();
            rival::on_interface(&program, Hook::TcxEgress, "eth0", place)
        })
    };
    if let Err(errno @ (Errno::EINVAL | Errno::EOPNOTSUPP)) = attach(NEXT, Place::Last) {
        skipped(&format!("no links on interfaces in this kernel: {errno}"));
        return;
    }
    let egress = [("tc_egress", "denied", "default_deny")];
    for (verdict, place) in [
        (PASS, Place::Last),
        (NEXT, Place::Last),
        (NEXT, Place::First),
    ] {
        let _rival = attach(verdict, place).unwrap();
        let dropped = moved(&daemon, egress, || assert_eq!(packets(), [false; 2]));
        // Where the enforcer takes the first place again meanwhile, what stands in drops uncounted.
        assert!(
            dropped == [2] || place == Place::First,
            "{verdict} {place:?}: {dropped:?}"
        );
    }
    // In front of the enforcer's it asks nobody else, until the enforcer is the first again.
    let rival = attach(PASS, Place::First).unwrap();
    wait_for("the first place again", LONG, || {
        (packets() == [false; 2]).then_some(())
    });
    let told = daemon.denials(&[]);
    assert!(told.iter().any(|record| record["verdict"] == "TAMPER"
        && record["target"] == "tc_egress on eth0"
        && record["repaired"] == true));
    drop(rival);
    assert_eq!(packets(), [false; 2]);
}

/// A limit, pinned: XDP comes before TC, and what it sends on leaves without TC.
#[test]
fn a_program_at_xdp_forwards_past_the_enforcer() {
    let net = Routed::new();
    let policy = "version: 1\ndefaults: { unsegmented: deny }\n";
    let daemon = Setup::new(&net.gateway, "gw-*", policy).start();
    let links = [&net.a, &net.b].map(|end| wire::link_address(end, "eth0"));
    let a = Packets::new(&net.a, "eth0", false);
    let judged = [("tc_ingress", "denied", ""), ("tc_egress", "denied", "")];
    let tap = Tap::new(&net.b);
    // Or `b` would answer that nobody listens.
    let _receiver = net
        .b
        .enter(|| std::net::UdpSocket::bind(traffic::any(7000)).unwrap());
    for family in Family::BOTH {
        let (from, to) = (family.address(1, 2), family.address(2, 2));
        let packet = wire::udp((from, 5000), (to, 7000), b"a way around");
        let frame = wire::ethernet(links[0], links[1], &packet);
        // The control: the same frame, to the gateway.
        let gateway = wire::link_address(&net.gateway, "gw-a");
        a.send(&wire::ethernet(links[0], gateway, &packet));
        denied(
            &daemon,
            &json!({
                "direction": "ingress", "interface": "gw-a", "src": from.to_string(),
                "dst_port": 7000,
            }),
        );
        assert!(!tap.sees(&packet, QUIET), "{family:?}");

        let _rival = net.gateway.enter(|| {
            let program = rival::redirect(Hook::Xdp, "gw-b").unwrap();
            rival::on_interface(&program, Hook::Xdp, "gw-a", Place::Generic).unwrap()
        });
        let counts = moved(&daemon, judged, || {
            a.send(&frame);
            assert!(tap.sees(&packet, LONG), "{family:?}");
        });
        assert_eq!(counts, [0, 0], "{family:?}");
    }
}
