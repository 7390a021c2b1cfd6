use std::time::Duration;

use enforcer::dataplane::hanging;
use enforcer_tests::{
    daemon::{Daemon, LONG, wait_for},
    netns::{Family, Routed},
    numbers::{ALLOWED, FORBIDDEN, under_load},
    pins::Pins,
    rival, scale,
    seen::moved,
    traffic::{self, QUIET},
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{gateway, policy};

const EXPEDITED: &str = "/sys/kernel/rcu_expedited";

/// The switch is on until somebody switches it off; a test that fails leaves it off.
struct Switched;

impl Switched {
    fn on() -> Self {
        std::fs::write(EXPEDITED, "1").unwrap();
        Self
    }
}

impl Drop for Switched {
    fn drop(&mut self) {
        let _ = std::fs::write(EXPEDITED, "0");
    }
}

/// Whether a switch of the kernel is off at some moment: daemons of other tests use it as well.
fn is_off(switch: &str) -> bool {
    let off = || std::fs::read_to_string(switch).is_ok_and(|text| text.trim() == "0");
    let start = std::time::Instant::now();
    while !off() && start.elapsed() < scale::within(Duration::from_secs(3)) {
        std::thread::sleep(Duration::from_millis(5));
    }
    off()
}

fn packets(status: &Value) -> u64 {
    let counters = status["counters"].as_array().unwrap().iter();
    counters.map(|c| c["packets"].as_u64().unwrap()).sum()
}

/// One program on each hook, and nothing pinned that nobody needs.
fn in_order(net: &Routed, pins: &Pins, daemon: &Daemon<'_>) {
    let links = pins.links();
    let interfaces = net.gateway.enter(|| {
        ["gw-a", "gw-b"].map(|name| {
            if let Ok(hanging) = hanging(name) {
                let hooks: Vec<_> = hanging.programs.iter().map(|(hook, ..)| *hook).collect();
                assert_eq!(hooks, ["tc_ingress", "tc_egress"], "{name}");
            }
            nix::net::if_::if_nametoindex(name).unwrap()
        })
    });
    // Before tcx there are no links.
    if !links.is_empty() {
        let mut expected: Vec<String> = interfaces
            .iter()
            .flat_map(|i| ["tc_egress", "tc_ingress"].map(|hook| format!("{hook}-{i}")))
            .collect();
        expected.sort_unstable();
        assert_eq!(links, expected);
    }
    let pinned = pins.list();
    assert!(
        !pinned.iter().any(|path| path.starts_with("next/")),
        "{pinned:?}"
    );
    let images: Vec<_> = pinned
        .iter()
        .filter_map(|path| path.strip_prefix("current/images/"))
        .collect();
    assert_eq!(images, [daemon.generation().to_string()]);
}

#[test]
fn a_killed_daemon_changes_no_verdict_and_the_next_adopts_what_is_there() {
    let (net, pins) = (Routed::new(), Pins::default());
    let mut daemon = gateway(&net, &pins).start();
    let rounds = scale::rounds(100, 4);
    let mut counted = 0;
    let daemon = under_load(&net, || {
        for round in 0..rounds {
            let before = packets(&daemon.status());
            assert!(before >= counted, "counts go on: {before} after {counted}");
            counted = before;
            // At any moment of its life.
            let generation = daemon.generation();
            let files = daemon.kill();
            let early = files.spawn();
            std::thread::sleep(Duration::from_millis(3 * round as u64 % 200));
            daemon = early.kill().start();
            assert_eq!(daemon.generation(), generation, "the same policy goes on");
        }
        daemon
    });
    in_order(&net, &pins, &daemon);
    let (_, status) = daemon.stop();
    assert!(status.success());
    // Stopped, it enforces on.
    let to = (Family::V4.address(2, 2), FORBIDDEN);
    traffic::udp_echo(&net.b, to);
    assert!(!traffic::udp_answers(&net.a, None, to));
    // Filters of clsact hold without pins.
    let pinned = !pins.links().is_empty();
    drop(pins);
    if pinned {
        assert!(traffic::udp_answers_soon(&net.a, to), "the pins held it");
    }
}

#[test]
fn programs_of_another_build_take_over_without_a_packet_in_between() {
    let (net, pins) = (Routed::new(), Pins::default());
    let mut daemon = gateway(&net, &pins).start();
    let full = if scale::thorough() { 100 } else { 20 };
    let rounds = scale::rounds(full, 2);
    let daemon = under_load(&net, || {
        for round in 0..rounds {
            let mut setup = daemon.stop().0;
            if round == 0 {
                setup = setup.with(&["--reload-programs"]);
            }
            // Every other time it is killed while it does so.
            if round % 2 == 1 {
                let half = setup.spawn();
                std::thread::sleep(Duration::from_millis(100 * round as u64));
                setup = half.kill();
            }
            daemon = setup.start();
        }
        daemon
    });
    in_order(&net, &pins, &daemon);
}

#[test]
fn what_changed_while_no_daemon_lived_is_brought_in_line() {
    let (net, pins) = (Routed::new(), Pins::default());
    let setup = gateway(&net, &pins).start().kill();
    let first = pins.links();
    // One interface goes and another comes under the same name.
    net.gateway.ip("link del gw-b\n");
    net.gateway.cable("gw-b", &net.b, "eth0");
    net.gateway
        .addresses("gw-b", &["10.2.0.1/24", "fd02::1/64"]);
    net.b.addresses("eth0", &["10.2.0.2/24", "fd02::2/64"]);
    net.b
        .ip("route add default via 10.2.0.1\nroute add default via fd02::1\n");
    // Names of somebody else's are not the enforcer's to sweep.
    let strange = ["foo-bar", "tc_ingress"].map(|name| pins.path().join("links").join(name));
    std::fs::create_dir_all(pins.path().join("links")).unwrap();
    for path in &strange {
        rival::pin(&rival::array(8).unwrap(), path).unwrap();
    }
    // It was killed while it attached, with grace periods expedited.
    let note = setup.socket().with_file_name("control.sock.expedited");
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let switch = is_off(EXPEDITED).then(|| {
        std::fs::write(&note, boot).unwrap();
        Switched::on()
    });
    // And the policy is another one.
    setup.write(&policy("-new"));
    let daemon = setup.start();
    for path in &strange {
        std::fs::remove_file(path).unwrap();
    }
    assert!(
        switch.is_none() || is_off(EXPEDITED),
        "grace periods stay expedited"
    );
    wait_for("no note", LONG, || (!note.exists()).then_some(()));
    in_order(&net, &pins, &daemon);
    assert!(first.is_empty() || pins.links() != first);
    under_load(&net, || std::thread::sleep(QUIET));
    // Another interface alone: the other one is let go.
    let setup = daemon.kill();
    let daemon = setup.on("gw-a").start();
    let links = pins.links();
    assert!(links.is_empty() || links.len() == 2, "{links:?}");
    daemon.signal(Signal::SIGTERM);
}

#[test]
fn a_table_of_another_size_has_the_same_flows() {
    let (net, pins) = (Routed::new(), Pins::default());
    let daemon = gateway(&net, &pins).start();
    let ends: Vec<_> = Family::BOTH
        .iter()
        .flat_map(|family| (0..50).map(move |_| family))
        .map(|family| {
            let server = traffic::udp(&net.b, (family.address(2, 2), 0), LONG);
            let port = server.local_addr().unwrap().port();
            (server, port, *family)
        })
        .collect();
    // Whatever they are, their ports are the only ones that the policy allows.
    let ports: Vec<_> = ends
        .iter()
        .map(|(_, port, _)| format!("udp/{port}"))
        .collect();
    let allowed = policy("").replace(&format!("udp/{ALLOWED}"), &ports.join(", "));
    daemon.swap(&allowed);
    let asked: Vec<_> = ends
        .iter()
        .map(|(server, port, family)| {
            let client = traffic::udp(&net.a, (family.address(1, 2), 0), LONG);
            client.connect((family.address(2, 2), *port)).unwrap();
            client.send(b"question").unwrap();
            let (_, from) = server.recv_from(&mut [0; 16]).unwrap();
            (client, from)
        })
        .collect();
    let daemon = daemon.kill().with(&["--flows", "300000"]).start();
    // The answers have no right but their flows'.
    for ((server, ..), (client, from)) in ends.iter().zip(&asked) {
        server.send_to(b"answer", from).unwrap();
        assert_eq!(client.recv(&mut [0; 16]).unwrap(), 6);
    }
    let stranger = traffic::udp(&net.b, (Family::V4.address(2, 2), 0), LONG);
    let denied = |record: &Value| record["reason"] == "default_deny";
    let [counted] = moved(&daemon, [("tc_ingress", "denied", "default_deny")], || {
        stranger.send_to(b"answer", asked[0].1).unwrap();
    });
    assert_eq!(counted, 1);
    assert!(daemon.denials(&[]).iter().any(denied));
}

#[test]
fn what_was_told_before_a_restart_is_not_told_again_and_the_rest_is() {
    // Each CPU counts for itself, and has records of its own.
    enforcer_tests::kernel::pin();
    let (net, pins) = (Routed::new(), Pins::default());
    let daemon = gateway(&net, &pins).start();
    let to = (Family::V4.address(2, 2), FORBIDDEN);
    let client = traffic::udp(&net.a, (Family::V4.address(1, 2), 0), LONG);
    let port = client.local_addr().unwrap().port();
    let told = |daemon: &Daemon<'_>| -> u64 {
        let mine = daemon.denials(&[]).into_iter();
        let mine = mine.filter(|record| record["src_port"] == port);
        mine.map(|record| record["packets"].as_u64().unwrap()).sum()
    };
    let send = |packets: u32| {
        for _ in 0..packets {
            client.send_to(b"no", to).unwrap();
        }
    };
    send(10);
    wait_for("ten", LONG, || (told(&daemon) == 10).then_some(()));
    // A second later the next one makes a record, which says of all of them.
    std::thread::sleep(Duration::from_millis(1200));
    send(1);
    wait_for("eleven", LONG, || (told(&daemon) == 11).then_some(()));
    let setup = daemon.kill();
    send(3);
    let daemon = setup.start();
    send(4);
    wait_for("seven more", LONG, || (told(&daemon) >= 7).then_some(()));
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(told(&daemon), 7);
}
