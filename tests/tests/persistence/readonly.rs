//! A BPF file system that the daemon can no longer write to.

use std::{
    fs::File, io::ErrorKind, net::UdpSocket, os::unix::process::CommandExt as _, path::Path,
    thread, time::Duration,
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    netns::{Family, Routed},
    numbers::FORBIDDEN,
    pins::Pins,
    rival, traffic,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

use crate::policy;

const BPFFS: &str = "/sys/fs/bpf";

/// Mounts the file system anew where the daemon sees it, and nowhere else.
fn remount(daemon: &Daemon<'_>, flags: MsFlags) {
    let mounts = File::open(
        Path::new("/proc")
            .join(daemon.pid().to_string())
            .join("ns/mnt"),
    );
    let mounts = mounts.unwrap();
    let none = None::<&str>;
    thread::scope(|scope| {
        let work = || {
            unshare(CloneFlags::CLONE_FS).unwrap();
            setns(mounts, CloneFlags::CLONE_NEWNS).unwrap();
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags;
            mount(none, BPFFS, none, flags, none).unwrap();
        };
        scope.spawn(work).join().unwrap();
    });
}

fn problems(daemon: &Daemon<'_>) -> String {
    daemon.status()["problems"].to_string()
}

#[test]
fn what_cannot_be_taken_off_or_put_back_stays_a_problem_until_it_can() {
    let (net, pins) = (Routed::new(), Pins::default());
    let to = (Family::V4.address(2, 2), FORBIDDEN);
    traffic::udp_echo(&net.b, to);
    // A mount namespace of its own.
    let daemon = Setup::new(&net.gateway, "gw-*", &policy(""))
        .pinned(pins.path())
        .spawn_with(|command| {
            let alone = || {
                unshare(CloneFlags::CLONE_NEWNS)?;
                let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                Ok(mount(
                    None::<&str>,
                    "/",
                    None::<&str>,
                    private,
                    None::<&str>,
                )?)
            };
            // SAFETY: between fork and exec only system calls.
            unsafe {
                command.pre_exec(alone);
            }
        });
    let refuses = || {
        net.gateway.enter(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            let error = socket.connect(to).err().map(|error| error.kind());
            error == Some(ErrorKind::PermissionDenied)
        })
    };
    wait_for("the socket hooks to refuse", LONG * 2, || {
        let status = daemon.try_status()?;
        (status["state"] == "enforcing" && status["socket_hooks"] == "refuse").then_some(())
    });
    assert!(refuses());

    remount(&daemon, MsFlags::MS_RDONLY);
    let output = daemon.ask("detach", &["--yes"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // Not 64: nobody has used it wrongly.
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("Read-only file system"), "{said}");
    wait_for("the socket hooks as before", LONG, || {
        refuses().then_some(())
    });
    assert!(!traffic::udp_answers(&net.a, None, to));
    assert_eq!(
        daemon.status()["state"],
        "enforcing",
        "{}",
        problems(&daemon)
    );

    rival::detach_pinned(&pins.path().join("links/connect4")).unwrap();
    let lost = "connect4 was taken off the root cgroup";
    wait_for("the daemon to say so", LONG, || {
        problems(&daemon).contains(lost).then_some(())
    });
    // At each look that comes.
    thread::sleep(Duration::from_millis(2500));
    let status = daemon.status();
    assert_eq!(status["state"], "degraded", "{status}");
    assert!(status["problems"].to_string().contains(lost), "{status}");
    assert!(!refuses());

    remount(&daemon, MsFlags::empty());
    wait_for("the socket hook", LONG, || {
        (daemon.status()["state"] == "enforcing").then_some(())
    });
    assert!(refuses());
    let told = daemon
        .denials(&[])
        .into_iter()
        .filter(|record| record["verdict"] == "TAMPER" && record["target"] == "connect4");
    let told: Vec<_> = told
        .map(|record| record["repaired"].as_bool().unwrap())
        .collect();
    assert_eq!(told, [false, true]);
    let output = daemon.ask("detach", &["--yes"]);
    assert!(output.status.success(), "{output:?}");
    assert!(traffic::udp_answers_soon(&net.a, to));
}
