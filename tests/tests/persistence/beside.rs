use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use aya::maps::MapData;
use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, binary, enforcer, wait_for},
    netns::{Family, Netns, Pair, Routed, directory},
    numbers::{ALLOWED, FORBIDDEN},
    pins::Pins,
    traffic,
};
use serde_json::Value;

use crate::{gateway, policy};

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// `enforcer detach --yes --pins PINS`, inside.
fn detach(namespace: &Netns, pins: &Path, socket: &Path) -> (i32, String) {
    let (pins, socket) = (text(pins), text(socket));
    let arguments = ["detach", "--yes", "--pins", &pins, "--socket", &socket];
    let output = namespace.enter(|| enforcer(&arguments));
    said(&output)
}

fn said(output: &Output) -> (i32, String) {
    let said = [&*output.stdout, &*output.stderr].concat();
    let said = String::from_utf8(said).unwrap();
    (output.status.code().unwrap(), said)
}

/// Pins a map under a name that no enforcer gives.
fn strange(pins: &Pins, name: &str) -> std::path::PathBuf {
    let map = MapData::from_pin(pins.path().join("current/maps/POLICY")).unwrap();
    let path = pins.path().join("links").join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    map.pin(&path).unwrap();
    path
}

/// A sentence of the status that names this.
fn told(daemon: &Daemon<'_>, list: &str, name: &str) -> Option<String> {
    let status = daemon.try_status()?;
    let all = status[list].as_array()?.iter().filter_map(Value::as_str);
    all.map(str::to_owned).find(|text| text.contains(name))
}

fn doctor(daemon: &Daemon<'_>, namespace: &Netns) -> Option<Value> {
    let output = namespace.enter(|| {
        let mut command = Command::new(binary());
        command.args(["doctor", "-o", "json", "--socket"]);
        command.arg(daemon.setup.socket()).output().unwrap()
    });
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut checks = report["checks"].as_array().unwrap().iter();
    checks.find(|check| check["name"] == "enforcers").cloned()
}

#[test]
fn another_enforcer_on_the_same_hooks_is_told_and_can_be_taken_off_alone() {
    let (net, old, none) = (Routed::new(), Pins::default(), Pins::default());
    let forbidden = (Family::V4.address(2, 2), FORBIDDEN);
    traffic::udp_echo(&net.b, forbidden);
    let daemon = gateway(&net, &old).start();
    let socket = daemon.setup.socket();
    assert_eq!(daemon.status()["pins"], text(old.path()));
    assert_eq!(doctor(&daemon, &net.gateway), None);

    // Another directory is not the daemon's.
    let (code, answer) = detach(&net.gateway, none.path(), &socket);
    assert_eq!(code, 5, "{answer}");
    assert!(answer.contains("nothing is pinned in"), "{answer}");
    // Nor are pins to be taken from under a daemon that listens elsewhere.
    let (code, answer) = detach(&net.gateway, old.path(), Path::new("/nonexistent/socket"));
    assert_eq!(code, 3, "{answer}");
    assert!(answer.contains("at work there"), "{answer}");
    assert_eq!(daemon.status()["state"], "enforcing");
    assert!(!traffic::udp_answers(&net.a, None, forbidden));

    // What is no enforcer's is not touched.
    let others = ["foo-bar", "tc_ingress", "connect4-1"].map(|name| strange(&old, name));
    drop(daemon.kill());
    let open = policy("").replace(
        &format!("udp/{ALLOWED}"),
        &format!("udp/{ALLOWED}, udp/{FORBIDDEN}"),
    );
    let daemon = Setup::new(&net.gateway, "gw-*", &open)
        .with(&["--socket-hooks", "off"])
        .spawn();
    let place = text(old.path());
    // Before tcx there is one place on a hook: the youngest program has it.
    let both = old
        .links()
        .iter()
        .any(|link| link.starts_with("tc_ingress-"));
    let list = if both { "problems" } else { "warnings" };
    let sentence = wait_for("a word about the other", LONG * 2, || {
        told(&daemon, list, &place)
    });
    let way_out = format!("enforcer detach --pins {place}");
    assert!(sentence.contains(&way_out), "{sentence}");
    let found = doctor(&daemon, &net.gateway).unwrap();
    assert!(
        found["mend"].as_str().unwrap().contains(&way_out),
        "{found}"
    );
    if both {
        assert!(sentence.contains("gw-a, gw-b"), "{sentence}");
        assert_eq!(daemon.status()["state"], "degraded");
        assert_eq!(found["state"], "fail", "{found}");
        // It is as they say: the old policy denies what the new one allows.
        assert!(!traffic::udp_answers(&net.a, None, forbidden));
    }

    let (code, answer) = detach(&net.gateway, old.path(), &daemon.setup.socket());
    assert_eq!(code, 0, "{answer}");
    assert!(
        answer.contains("gw-a, gw-b") && answer.contains("the daemon enforces on"),
        "{answer}"
    );
    for other in &others {
        assert!(answer.contains(&text(other)), "{answer}");
        assert!(other.exists(), "{other:?}");
    }
    assert_eq!(old.list().len(), others.len(), "{:?}", old.list());
    wait_for("the daemon alone", LONG, || {
        (daemon.status()["state"] == "enforcing" && told(&daemon, list, &place).is_none())
            .then_some(())
    });
    assert_eq!(doctor(&daemon, &net.gateway), None);
    assert!(traffic::udp_answers_soon(&net.a, forbidden));
}

#[test]
fn what_no_enforcer_has_made_is_not_taken_off() {
    let (here, pins, place) = (Netns::new("here"), Pins::default(), directory());
    let nobody = place.path().join("socket");
    // Not in a BPF file system: it stays, empty as it is.
    let elsewhere = place.path().join("empty");
    fs::create_dir(&elsewhere).unwrap();
    let (code, answer) = detach(&here, &elsewhere, &nobody);
    assert_eq!(code, 3, "{answer}");
    assert!(elsewhere.exists(), "{answer}");
    // Somebody's pins that have the enforcer's names by chance.
    let array = |words: u32| {
        let bytes = words * 4;
        enforcer_tests::rival::array(bytes).unwrap()
    };
    for (name, words) in [("links/a-1", 1), ("current/meta", 1), ("current/meta", 32)] {
        for directory in ["links", "current"] {
            fs::create_dir_all(pins.path().join(directory)).unwrap();
        }
        let path = pins.path().join(name);
        let _ = fs::remove_file(&path);
        enforcer_tests::rival::pin(&array(words), &path).unwrap();
        let before = pins.list();
        let (code, answer) = detach(&here, pins.path(), &nobody);
        assert_eq!(pins.list(), before, "{answer}");
        let expected = if name == "links/a-1" { 0 } else { 3 };
        assert_eq!(code, expected, "{name} {words}: {answer}");
    }
}

#[test]
fn pins_of_a_network_namespace_that_is_gone_make_way_and_others_do_not() {
    let (first, second, pins) = (Pair::new(), Pair::new(), Pins::default());
    let (policy, peer) = (policy(""), (Family::V4.address(1, 1), FORBIDDEN));
    traffic::udp_echo(&first.host, peer);
    fn setup<'a>(host: &'a Netns, policy: &str, pins: &Pins) -> Setup<'a> {
        let setup = Setup::new(host, "eth0", policy);
        setup.pinned(pins.path()).with(&["--socket-hooks", "off"])
    }
    drop(setup(&first.host, &policy, &pins).start().kill());
    let way_out = format!("enforcer detach --pins {}", text(pins.path()));
    let before = pins.list();
    let (files, log) = setup(&second.host, &policy, &pins).spawn().refused(3);
    assert!(log.contains(&way_out), "{log}");
    assert_eq!(pins.list(), before);
    assert!(!traffic::udp_answers(&first.peer, None, peer));

    let links = !pins.links().is_empty();
    drop(first);
    let mut files = Some(files);
    if !links {
        // Nobody can tell whether its filters are still at work somewhere.
        let socket = files.as_ref().unwrap().socket();
        let (code, answer) = detach(&second.host, pins.path(), &socket);
        assert_eq!(code, 0, "{answer}");
        assert!(answer.contains("another network namespace"), "{answer}");
    }
    // The kernel takes its time to end a namespace.
    let daemon = wait_for("a start in the new namespace", LONG * 2, || {
        let mut daemon = files.take()?.spawn();
        let ended = wait_for("an end or a start", LONG * 2, || {
            let enforcing = daemon
                .try_status()
                .is_some_and(|s| s["state"] == "enforcing");
            if enforcing {
                return Some(false);
            }
            daemon.has_ended().then_some(true)
        });
        if ended {
            files = Some(daemon.refused(3).0);
            return None;
        }
        Some(daemon)
    });
    traffic::udp_echo(&second.host, peer);
    assert!(!traffic::udp_answers(&second.peer, None, peer));
    if links {
        let log = daemon.log();
        assert!(log.contains("begins anew"), "{log}");
        assert_eq!(pins.links().len(), 2, "{:?}", pins.links());
    }
}
