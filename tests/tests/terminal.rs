//! What asks on a terminal: a change of policy, and taking the programs off.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    process::{Command, ExitStatus, Stdio},
    thread,
};

use enforcer_tests::{
    daemon::{Daemon, Setup, binary},
    netns::{Netns, Pair},
};
use nix::pty::openpty;

const POLICY: &str = r#"version: 1
segments:
  far: { members: [{cidr: 10.1.0.2/32}] }
"#;

/// Runs a verb on a terminal of its own and answers its question; all that was on the screen.
fn on_a_terminal(daemon: &Daemon<'_>, words: &[&str], answer: &str) -> (ExitStatus, String) {
    let terminal = openpty(None, None).unwrap();
    let end = || Stdio::from(terminal.slave.try_clone().unwrap());
    let mut child = Command::new(binary())
        .args(words)
        .arg("--socket")
        .arg(daemon.setup.socket())
        .env_remove("NO_COLOR")
        .stdin(end())
        .stdout(end())
        .stderr(end())
        .spawn()
        .unwrap();
    drop(terminal.slave);
    let mut screen = File::from(terminal.master);
    let mut keys = screen.try_clone().unwrap();
    let reader = thread::spawn({
        let answer = answer.to_owned();
        move || {
            let (mut seen, mut bytes, mut asked) = (Vec::new(), [0; 4096], false);
            // EIO once nobody has the other end open.
            while let Ok(read @ 1..) = screen.read(&mut bytes) {
                seen.extend_from_slice(&bytes[..read]);
                if !asked && String::from_utf8_lossy(&seen).contains("[y/N] ") {
                    asked = true;
                    keys.write_all(answer.as_bytes()).unwrap();
                }
            }
            assert!(asked, "{}", String::from_utf8_lossy(&seen));
            String::from_utf8_lossy(&seen).into_owned()
        }
    });
    let status = child.wait().unwrap();
    (status, reader.join().unwrap())
}

fn start(host: &Netns) -> Daemon<'_> {
    Setup::new(host, "eth0", POLICY).start()
}

#[test]
fn a_person_is_shown_what_changes_and_asked() {
    let net = Pair::new();
    let mut daemon = start(&net.host);
    let other = daemon.setup.segments().parent().unwrap().join("other");
    fs::create_dir(&other).unwrap();
    let rule = "rules:\n  - { name: web, from: [any], to: [far], services: [tcp/80] }\n";
    fs::write(other.join("policy.yaml"), format!("{POLICY}{rule}")).unwrap();
    let path = other.to_str().unwrap();

    for no in ["n\n", "\n", "perhaps\n"] {
        let (status, screen) = on_a_terminal(&daemon, &["apply", path], no);
        assert_eq!(status.code(), Some(1), "{screen}");
        assert!(
            screen.contains("web") && screen.contains("Put it in force?"),
            "{screen}"
        );
        assert!(
            screen.contains("nothing was changed") && screen.contains("\x1b["),
            "{screen}"
        );
        assert_eq!(daemon.generation(), 1);
    }
    let (status, screen) = on_a_terminal(&daemon, &["apply", path], "y\n");
    assert_eq!(status.code(), Some(0), "{screen}");
    assert!(screen.contains("in force: "), "{screen}");
    assert_eq!(daemon.generation(), 2);

    // Where nobody can be asked nothing is done.
    let output = daemon.ask("apply", &[path]);
    assert_eq!(output.status.code(), Some(64), "{output:?}");

    let (status, screen) = on_a_terminal(&daemon, &["detach"], "n\n");
    assert_ne!(status.code(), Some(0), "{screen}");
    assert!(
        screen.contains("eth0") && screen.contains("Take the programs off?"),
        "{screen}"
    );
    assert_eq!(daemon.status()["state"], "enforcing");
    let (status, screen) = on_a_terminal(&daemon, &["detach"], "y\n");
    assert_eq!(status.code(), Some(0), "{screen}");
    assert_eq!(daemon.wait().code(), Some(5));
}
