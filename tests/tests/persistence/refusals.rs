use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt as _, chown},
};

use enforcer_tests::{
    daemon::{Daemon, LONG, wait_for},
    netns::Routed,
    numbers::under_load,
    pins::Pins,
    traffic::QUIET,
};

use serde_json::Value;

use crate::gateway;

/// What it says, once it does.
fn answer(daemon: &Daemon<'_>) -> Option<Value> {
    let status = daemon.try_status()?;
    (status["state"] != "not_enforcing").then_some(status)
}

#[test]
fn a_restart_with_a_broken_policy_keeps_what_was_in_force_and_says_so() {
    let (net, pins) = (Routed::new(), Pins::default());
    let daemon = gateway(&net, &pins).start();
    let generation = daemon.generation();
    under_load(&net, || {
        let setup = daemon.kill();
        let good = fs::read_to_string(setup.policy()).unwrap();
        setup.write("version: 1\nsegmnts: {}\n");
        let daemon = setup.spawn();
        let status = wait_for("a status", LONG, || answer(&daemon));
        assert_eq!(status["state"], "degraded", "{status}");
        assert_eq!(status["generation"], generation);
        let error = status["policy"]["last_error"].as_str().unwrap();
        assert!(error.contains("policy.yaml:2"), "{error}");
        daemon.setup.write(&good);
        wait_for("the policy that is good again", LONG, || {
            let status = daemon.try_status()?;
            (status["state"] == "enforcing").then_some(())
        });
        // It says the same as before: what is in force stays.
        assert_eq!(daemon.generation(), generation);
        // And with no policy at all.
        let setup = daemon.kill();
        fs::remove_file(setup.policy()).unwrap();
        let daemon = setup.spawn();
        let status = wait_for("a status", LONG, || answer(&daemon));
        assert_eq!(status["state"], "degraded", "{status}");
        std::thread::sleep(QUIET);
        drop(daemon);
    });
}

#[test]
fn a_directory_that_others_own_or_write_holds_no_pins() {
    let (net, pins) = (Routed::new(), Pins::default());
    fs::create_dir(pins.path()).unwrap();
    for (owner, mode) in [(65_534, 0o700), (0, 0o777)] {
        chown(pins.path(), Some(owner), None).unwrap();
        fs::set_permissions(pins.path(), Permissions::from_mode(mode)).unwrap();
        let mut daemon = gateway(&net, &pins).spawn();
        assert_eq!(daemon.wait().code(), Some(3), "{}", daemon.log());
        let log = daemon.log();
        assert!(log.contains("others than root can change"), "{log}");
    }
    fs::set_permissions(pins.path(), Permissions::from_mode(0o755)).unwrap();
    let daemon = gateway(&net, &pins).start();
    assert!(pins.list().contains(&"current/meta".to_owned()));
    drop(daemon);
}

#[test]
fn what_is_taken_off_at_somebodys_word_is_not_put_on_again_by_the_service_manager() {
    let (net, pins) = (Routed::new(), Pins::default());
    let mut daemon = gateway(&net, &pins).start();
    let answer = daemon.ask("detach", &["--yes"]);
    assert!(answer.status.success(), "{answer:?}");
    let code = daemon.wait().code().unwrap();
    assert_eq!(code, 5, "{}", daemon.log());
    let unit = include_str!("../../../deploy/enforcer.service");
    let prevented = unit
        .lines()
        .find_map(|line| line.strip_prefix("RestartPreventExitStatus="));
    let prevented = prevented.unwrap().split(' ');
    assert!(prevented.map(str::parse).any(|status| status == Ok(code)));
    assert!(!pins.path().exists());
}
