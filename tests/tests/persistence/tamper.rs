use std::{fs, os::fd::AsFd as _, time::Duration};

use aya::maps::{Array, Map, MapData};
use enforcer_common::wire::Control;
use enforcer_tests::{
    daemon::{Daemon, LONG, wait_for},
    netns::{Family, Routed},
    numbers::{ALLOWED, FORBIDDEN},
    pins::Pins,
    rival::{self, Hook, Place},
    traffic,
};
use serde_json::Value;

use crate::gateway;

/// Ends the chain: the packet passes.
const PASS: i32 = 0;

/// What was found out about something, once it is.
fn told(daemon: &Daemon<'_>, target: &str, what: &str) -> Value {
    wait_for(&format!("{target} {what}"), LONG, || {
        daemon.denials(&[]).into_iter().find(|record| {
            let has =
                |field: &str, part: &str| record[field].as_str().is_some_and(|s| s.contains(part));
            record["verdict"] == "TAMPER" && has("target", target) && has("what", what)
        })
    })
}

fn map(pins: &Pins, name: &str) -> MapData {
    MapData::from_pin(pins.path().join("current/maps").join(name)).unwrap()
}

#[test]
fn what_somebody_changes_is_told_and_put_right() {
    let (net, pins) = (Routed::new(), Pins::default());
    let daemon = gateway(&net, &pins).start();
    let to = |port| (Family::V4.address(2, 2), port);
    traffic::udp_echo(&net.b, to(ALLOWED));
    traffic::udp_echo(&net.b, to(FORBIDDEN));
    let in_order = |after: &str| {
        assert!(traffic::udp_answers_soon(&net.a, to(ALLOWED)), "{after}");
        assert!(
            !traffic::udp_answers(&net.a, None, to(FORBIDDEN)),
            "{after}"
        );
    };

    let before = pins.list();
    for name in &before {
        fs::remove_file(pins.path().join(name)).unwrap();
    }
    let record = told(&daemon, "map POLICY", "is no longer pinned");
    assert_eq!(record["repaired"], true, "{record}");
    wait_for("all pins", LONG, || (pins.list() == before).then_some(()));
    in_order("pins removed");

    for name in &before {
        fs::remove_file(pins.path().join(name)).unwrap();
    }
    for name in [
        "links",
        "current/maps",
        "current/programs",
        "current/images",
        "current",
        "",
    ] {
        // There are no links before tcx.
        let _ = fs::remove_dir(pins.path().join(name));
    }
    wait_for("the directory and all pins", LONG, || {
        (pins.list() == before).then_some(())
    });
    in_order("the directory removed");

    let settings = Map::from_map_data(map(&pins, "bss-control")).unwrap();
    let mut settings: Array<_, Control> = settings.try_into().unwrap();
    let control = settings.get(&0, 0).unwrap();
    settings
        .set(
            0,
            Control {
                deadline: 0,
                ..control
            },
            0,
        )
        .unwrap();
    let record = told(&daemon, "settings", "changed");
    assert_eq!(record["repaired"], true, "{record}");
    assert_eq!(settings.get(&0, 0).unwrap(), control);
    in_order("settings changed");

    rival::empty_slot(&map(&pins, "POLICY").fd().as_fd(), 0);
    let record = told(&daemon, "slot 0 of POLICY", "another image");
    assert_eq!(record["repaired"], true, "{record}");
    in_order("image taken out");

    for (place, name) in (0..).zip(["new_ingress", "new_egress", "long_ingress", "long_egress"]) {
        rival::empty_slot(&map(&pins, "STEPS").fd().as_fd(), place);
        let record = told(&daemon, &format!("{name} in STEPS"), "was taken out");
        assert_eq!(record["repaired"], true, "{record}");
    }
    in_order("programs taken out");

    // Before tcx a filter comes before ours only with our own priority.
    if !pins.links().is_empty() {
        let rival = net.gateway.enter(|| {
            let program = rival::program(Hook::TcxEgress, PASS).unwrap();
            rival::on_interface(&program, Hook::TcxEgress, "gw-b", Place::First).unwrap()
        });
        let record = told(&daemon, "tc_egress on gw-b", "not the first");
        assert_eq!(record["repaired"], true, "{record}");
        in_order("another one in front");
        drop(rival);
    }
    assert_eq!(daemon.status()["state"], "enforcing");
    let text = daemon.ask("denials", &[]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("TAMPER"));
    // Each is told once.
    std::thread::sleep(Duration::from_millis(1100));
    let records = daemon.denials(&[]);
    let tampered = records.iter().filter(|r| r["verdict"] == "TAMPER");
    let again = tampered.filter(|r| r["target"] == "slot 0 of POLICY");
    assert_eq!(again.count(), 1);
}
