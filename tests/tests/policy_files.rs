//! Files of policy and settings are taken from root alone.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::Path,
    process::Stdio,
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    netns::{Pair, directory},
    traffic,
    user::User,
};

const NOBODY: u32 = 61_234;

/// A policy that opens one UDP port of the host.
fn policy(port: u16) -> String {
    format!(
        "version: 1\nsegments:\n  here: {{ members: [{{cidr: 10.1.0.0/24}}, {{cidr: \"fd01::/64\"}}] }}\n\
         rules:\n  - {{ name: one, from: [here], to: [host], services: [udp/{port}] }}\n"
    )
}

fn pair() -> Pair {
    let pair = Pair::new();
    traffic::udp_echo(&pair.host, traffic::any(7001));
    traffic::udp_echo(&pair.host, traffic::any(7002));
    pair
}

fn only(pair: &Pair, open: u16) {
    let to = |port| ([10, 1, 0, 1], port);
    assert!(traffic::udp_answers_soon(&pair.peer, to(open)), "{open}");
    let other = 7001 + 7002 - open;
    assert!(
        !traffic::udp_answers(&pair.peer, None, to(other)),
        "{other}"
    );
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Why the files are not what runs, once it contains `part`.
fn error_with(daemon: &Daemon<'_>, part: &str) -> String {
    wait_for(part, LONG, || {
        let status = daemon.status();
        let error = status["policy"]["last_error"].as_str()?;
        error.contains(part).then(|| error.to_owned())
    })
}

fn recovers(daemon: &Daemon<'_>) {
    wait_for("no error", LONG, || {
        let status = daemon.status();
        (status["state"] == "enforcing" && status["policy"]["last_error"].is_null()).then_some(())
    });
}

#[test]
fn what_others_could_have_written_does_not_take_over_until_it_is_mended() {
    let pair = pair();
    let daemon = Setup::new(&pair.host, "eth0", &policy(7001))
        .with_settings("version: 1\n")
        .start();
    let (file, segments) = (daemon.setup.policy(), daemon.setup.segments());
    let settings = daemon.setup.settings();
    let around = segments.parent().unwrap();
    for (path, bad) in [
        (file.as_path(), 0o666),
        (&file, 0o620),
        (&segments, 0o777),
        (&segments, 0o1777),
        (&settings, 0o664),
        (around, 0o770),
    ] {
        let before = fs::metadata(path).unwrap().permissions();
        mode(path, bad);
        fs::write(&file, policy(7002)).unwrap();
        let error = error_with(&daemon, "chmod go-w");
        let named = path.to_str().unwrap();
        assert!(error.starts_with(named), "{named}: {error}");
        assert!(error.ends_with(&format!("chmod go-w {named}")), "{error}");
        assert_eq!(daemon.status()["state"], "degraded");
        // Asked for, it is refused in the same words.
        let (code, answer) = daemon.reload();
        assert_eq!(
            (code, &answer["code"]),
            (422, &"rejected".into()),
            "{answer}"
        );
        assert!(
            answer["error"].as_str().unwrap().contains(&error),
            "{answer}"
        );
        only(&pair, 7001);

        fs::write(&file, policy(7001)).unwrap();
        fs::set_permissions(path, before).unwrap();
        if path == around {
            // Nobody watches so far up.
            daemon.reload();
        }
        recovers(&daemon);
    }
    let generation = daemon.generation();

    // Another owner, whatever the mode.
    for path in [&file, &segments] {
        chown(path, Some(NOBODY), None).unwrap();
        let error = error_with(&daemon, &format!("owned by uid {NOBODY}"));
        let mend = format!("chown root {}", path.display());
        assert!(error.ends_with(&mend), "{error}");
        chown(path, Some(0), None).unwrap();
        recovers(&daemon);
    }
    assert_eq!(daemon.generation(), generation);
    only(&pair, 7001);

    // All that is wrong in one answer.
    let other = segments.join("other.yaml");
    fs::write(&other, "version: 1\n").unwrap();
    mode(&other, 0o666);
    mode(&file, 0o666);
    mode(&settings, 0o666);
    let error = error_with(&daemon, "(and 2 more)");
    assert!(error.contains("other.yaml"), "{error}");
    let (_, answer) = daemon.reload();
    let said = answer["error"].as_str().unwrap();
    assert_eq!(said.matches("chmod go-w").count(), 3, "{said}");
}

#[test]
fn a_daemon_does_not_start_with_files_of_others() {
    let pair = pair();
    let starts = |setup: &Setup<'_>| {
        let output = setup
            .command()
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        said
    };
    let setup = Setup::new(&pair.host, "eth0", &policy(7001));
    mode(&setup.policy(), 0o602);
    let said = starts(&setup);
    let command = format!("chmod go-w {}", setup.policy().display());
    assert!(said.contains(&command), "{said}");
    assert!(said.contains("nothing is enforced"), "{said}");
    mode(&setup.policy(), 0o644);

    let real = setup.segments().join("real");
    fs::rename(setup.policy(), &real).unwrap();
    symlink("real", setup.policy()).unwrap();
    let said = starts(&setup);
    assert!(said.contains("policy.yaml: a symbolic link"), "{said}");
    assert!(said.contains("--follow-links"), "{said}");
    fs::remove_file(setup.policy()).unwrap();
    nix::unistd::mkfifo(&setup.policy(), nix::sys::stat::Mode::S_IRUSR).unwrap();
    let said = starts(&setup);
    assert!(said.contains("policy.yaml: not a regular file"), "{said}");

    let setup = Setup::new(&pair.host, "eth0", &policy(7001)).with_settings("version: 1\n");
    chown(setup.settings(), Some(NOBODY), None).unwrap();
    let said = starts(&setup);
    assert!(said.contains("enforcer.yaml: owned by uid"), "{said}");
}

/// As Kubernetes mounts a ConfigMap: files are links into a directory that is a link, which is
/// replaced at once.
#[test]
fn a_config_map_is_followed_when_told_to() {
    let pair = pair();
    let setup = Setup::new(&pair.host, "eth0", &policy(7001)).with(&["--follow-links"]);
    let segments = setup.segments();
    let version = |name: &str, port| {
        let directory = segments.join(name);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("policy.yaml"), policy(port)).unwrap();
        symlink(name, segments.join("..new")).unwrap();
        fs::rename(segments.join("..new"), segments.join("..data")).unwrap();
    };
    fs::remove_file(setup.policy()).unwrap();
    version("..1", 7001);
    symlink("..data/policy.yaml", setup.policy()).unwrap();
    let daemon = setup.start();
    only(&pair, 7001);
    version("..2", 7002);
    daemon.wait_swapped(1);
    only(&pair, 7002);

    // The way is looked at as well as its end.
    let generation = daemon.generation();
    version("..3", 7001);
    daemon.wait_swapped(generation);
    mode(&segments.join("..3"), 0o777);
    error_with(&daemon, "..3: everybody may write it");
    mode(&segments.join("..3"), 0o755);
    recovers(&daemon);
    let link = daemon.setup.policy();
    std::os::unix::fs::lchown(&link, Some(NOBODY), None).unwrap();
    error_with(&daemon, &format!("a symbolic link of uid {NOBODY}"));
    only(&pair, 7001);
}

#[test]
fn everybody_may_check_files_of_their_own() {
    let place = directory();
    mode(place.path(), 0o755);
    let (file, link) = (place.path().join("p.yaml"), place.path().join("l.yaml"));
    fs::write(&file, policy(7001)).unwrap();
    chown(&file, Some(NOBODY), Some(NOBODY)).unwrap();
    mode(&file, 0o666);
    symlink(&file, &link).unwrap();
    for path in [&file, &link] {
        let output = User::new(NOBODY, &[]).enforcer(&["check", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
    }
}
