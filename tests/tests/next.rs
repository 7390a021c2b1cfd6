//! What the enforcer permits goes on to other programs on the same hook; what it denies does not.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking"
)]

use aya::util::KernelVersion;
use enforcer::{
    dataplane::{Dataplane as _, Interface, LinkType},
    policy::{SourceFile, model::Environment, parse},
};
use enforcer_common::{image::SIZE_CLASSES, verdict::Hook};
use enforcer_tests::{
    daemon::{LONG, Setup},
    kernel::{self, Programs},
    netns::{Family, Netns, Routed},
    traffic,
};

const POLICY: &str = r#"version: 1
segments:
  b: { members: [{cidr: 10.2.0.0/24}, {cidr: "fd02::/64"}] }
rules:
  - { name: some, from: [any], to: [b], services: [udp/7000] }
"#;

/// Ten packets each of what is allowed and of what is not; returns when they are judged.
fn traffic(net: &Routed) {
    for family in Family::BOTH {
        let to = family.address(2, 2);
        let receiver = traffic::udp(&net.b, (to, 7000), LONG);
        let sender = traffic::udp(&net.a, (traffic::unspecified(to), 0), LONG);
        for _ in 0..5 {
            sender.send_to(b"deny", (to, 7001)).unwrap();
            sender.send_to(b"pass", (to, 7000)).unwrap();
            assert_eq!(receiver.recv(&mut [0; 8]).unwrap(), 4);
        }
    }
}

/// UDP packets that a program judged at this hook: it allows all, so each is there once.
fn seen(programs: &Programs, hook: Hook) -> u64 {
    let counters = programs.counters();
    let mut reasons = counters.packets.iter().filter(|c| c.hook == hook);
    let udp = |name: &str| matches!(name, "unsegmented" | "established");
    reasons
        .by_ref()
        .filter(|c| udp(c.reason.name()))
        .map(|c| c.packets)
        .sum()
}

/// A program that lets everything pass, and counts.
fn witness(namespace: &Netns, interface: &str) -> Programs {
    let mut programs = Programs::load(SIZE_CLASSES[0] as usize);
    let text = "version: 1\n".to_owned();
    let policy = parse(&[SourceFile {
        name: "all.yaml".to_owned(),
        text,
    }])
    .unwrap();
    programs.apply(&kernel::compile(&policy, &Environment::default()));
    namespace.enter(|| {
        let interface = Interface {
            ifindex: nix::net::if_::if_nametoindex(interface).unwrap(),
            name: interface.to_owned(),
            link: LinkType::Ethernet,
            slot: 0,
        };
        programs.dataplane.attach(&interface).unwrap();
    });
    programs
}

#[test]
fn what_is_behind_sees_what_is_permitted_only() {
    let net = Routed::new();
    let mirrored = mirror(&net);
    // The daemon's programs go before those that are there.
    let behind = witness(&net.gateway, "gw-a");
    let _daemon = Setup::new(&net.gateway, "gw-*", POLICY).start();
    // On the cable's other end: in front of its own programs the enforcer lets nobody be.
    let before = witness(&net.a, "eth0");
    let mirrored_before = mirrored.as_ref().map(|packets| packets());
    traffic(&net);
    let sent = seen(&before, Hook::TcEgress);
    assert_eq!(sent, 20, "the control: in front of the enforcer");
    // Filters of clsact are told apart by their number: there another enforcer's are replaced.
    if KernelVersion::current().unwrap() >= KernelVersion::new(6, 6, 0) {
        assert_eq!(seen(&behind, Hook::TcIngress), 10);
    }
    if let (Some(packets), Some(before)) = (mirrored, mirrored_before) {
        assert_eq!(packets() - before, 5, "the IPv4 half of what is permitted");
    }
}

/// Puts a classic filter on `gw-a`; what counts the IPv4 packets that it sees, if this kernel has
/// such a filter.
fn mirror(net: &Routed) -> Option<impl Fn() -> u64> {
    let tc = |arguments: &str| {
        let words: Vec<&str> = arguments.split(' ').collect();
        net.gateway.ask("tc", &words)
    };
    tc("qdisc add dev gw-a clsact").expect("clsact, of module sch_ingress");
    // A mirror to nowhere: the action that every kernel seems to have.
    net.gateway
        .ip("link add sink0 type veth peer name sink1\nlink set sink0 up\n");
    let mirror = "filter add dev gw-a ingress protocol ip u32 match u32 0 0 \
                  action mirred egress mirror dev sink0";
    if let Err(error) = tc(mirror) {
        println!("left out, this kernel has no such filter to look through: {error}");
        return None;
    }
    Some(move || {
        let shown = tc("-s filter show dev gw-a ingress").unwrap();
        let words: Vec<&str> = shown.split_whitespace().collect();
        let at = words.iter().position(|word| *word == "pkt").unwrap();
        words[at - 1].parse().unwrap()
    })
}
