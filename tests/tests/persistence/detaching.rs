use enforcer_tests::{
    daemon::{Daemon, enforcer},
    netns::{Family, Routed},
    numbers::FORBIDDEN,
    pins::Pins,
    traffic,
};
use serde_json::Value;

use crate::gateway;

fn passes(net: &Routed) -> bool {
    traffic::udp_answers(&net.a, None, (Family::V4.address(2, 2), FORBIDDEN))
}

fn taken_off(net: &Routed, pins: &Pins) {
    assert!(traffic::udp_answers_soon(
        &net.a,
        (Family::V4.address(2, 2), FORBIDDEN)
    ));
    assert!(!pins.path().exists(), "{:?}", pins.list());
}

fn detach(daemon: &Daemon<'_>, arguments: &[&str]) -> (i32, String, String) {
    let output = daemon.ask("detach", arguments);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code().unwrap();
    (code, text(&output.stdout), text(&output.stderr))
}

#[test]
fn programs_go_at_somebodys_word_alone_and_it_is_remembered() {
    let (net, pins) = (Routed::new(), Pins::default());
    traffic::udp_echo(&net.b, (Family::V4.address(2, 2), FORBIDDEN));
    let state = enforcer_tests::netns::directory();
    let state = state.path().to_str().unwrap();
    let daemon = gateway(&net, &pins).with(&["--state-dir", state]).start();
    // Nobody can be asked.
    let (code, _, said) = detach(&daemon, &[]);
    assert_eq!(code, 64, "{said}");
    assert!(said.contains("gw-a") && said.contains("gw-b"), "{said}");
    assert!(!passes(&net));

    let (code, said, _) = detach(&daemon, &["--yes"]);
    assert_eq!(code, 0);
    assert!(said.contains("gw-a, gw-b"), "{said}");
    let (setup, _) = daemon.refused(5);
    taken_off(&net, &pins);

    // The next start enforces again, and knows.
    let daemon = setup.start();
    assert!(!passes(&net));
    let history = daemon.ask("history", &["-o", "json"]);
    let history: Value = serde_json::from_slice(&history.stdout).unwrap();
    let changes = history["changes"].as_array().unwrap();
    let detached = changes.iter().find(|c| c["kind"] == "detach").unwrap();
    assert_eq!(detached["outcome"], "not_enforcing", "{detached}");
    assert_eq!(detached["by"]["uid"], 0, "{detached}");

    // Without a daemon.
    let setup = daemon.kill();
    assert!(!passes(&net));
    let pinned = pins.path().to_str().unwrap();
    let socket = setup.socket();
    let socket = socket.to_str().unwrap();
    let output = net.gateway.enter(|| {
        enforcer(&[
            "detach", "--yes", "--pins", pinned, "--socket", socket, "-o", "json",
        ])
    });
    assert!(output.status.success(), "{output:?}");
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        answer["interfaces"].as_array().unwrap().len(),
        2,
        "{answer}"
    );
    taken_off(&net, &pins);
    // And where nothing is.
    let output = enforcer(&["detach", "--yes", "--pins", pinned, "--socket", socket]);
    assert_eq!(output.status.code(), Some(5), "{output:?}");
}
