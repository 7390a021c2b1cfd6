use std::{
    fs::{self, Permissions},
    io,
    os::unix::{
        fs::{PermissionsExt as _, chown},
        process::CommandExt as _,
    },
    path::Path,
};

use aya::maps::{Array, Map, MapData};
use enforcer_common::table::SECRETS;
use enforcer_tests::{
    daemon::{Daemon, LONG, wait_for},
    netns::{Family, Routed, directory},
    numbers::{FORBIDDEN, under_load},
    pins::Pins,
    traffic::{self, QUIET},
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
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

/// Mounts this for the calling process alone.
fn alone(kind: &str, at: &str, flags: MsFlags) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
    Ok(mount(Some(kind), at, Some(kind), flags, None::<&str>)?)
}

/// From now on, and after exec, without this capability.
fn without(capability: i32) -> io::Result<()> {
    // SAFETY: takes numbers only.
    match unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[test]
fn where_nothing_can_be_kept_it_does_not_start_and_says_why() {
    const CAP_SYS_ADMIN: i32 = 21;
    const BPFFS: &str = "/sys/fs/bpf";
    let (net, pins, place) = (Routed::new(), Pins::default(), directory());
    let to = (Family::V4.address(2, 2), FORBIDDEN);
    traffic::udp_echo(&net.b, to);
    let elsewhere = place.path().join("pins");
    let within = pins.path().join("a/b");
    type Change = fn() -> io::Result<()>;
    let cases: [(&Path, Change, [&str; 2]); 5] = [
        (
            &elsewhere,
            || Ok(()),
            ["not in a BPF file system", "mount -t bpf bpf /sys/fs/bpf"],
        ),
        (&within, || Ok(()), ["No such file", "--pins"]),
        (
            pins.path(),
            || alone("bpf", BPFFS, MsFlags::MS_RDONLY),
            ["Read-only", "remount,rw"],
        ),
        (
            pins.path(),
            || {
                alone("tmpfs", BPFFS, MsFlags::empty())?;
                without(CAP_SYS_ADMIN)
            },
            ["bpffs is not mounted", "mount -t bpf bpf /sys/fs/bpf"],
        ),
        (
            pins.path(),
            || alone("tmpfs", "/sys/kernel/btf", MsFlags::empty()),
            ["no BTF", "CONFIG_DEBUG_INFO_BTF"],
        ),
    ];
    let mut setup = gateway(&net, &pins);
    for (at, change, words) in cases {
        let daemon = setup.pinned(at).spawn_with(|command| {
            // SAFETY: between fork and exec only system calls.
            unsafe {
                command.pre_exec(change);
            }
        });
        let state = wait_for("an answer", LONG, || daemon.try_status());
        assert_eq!(state["state"], "not_enforcing", "{words:?}: {state}");
        let log;
        (setup, log) = daemon.refused(3);
        for word in words {
            assert!(log.contains(word), "{word}: {log}");
        }
        assert!(!at.exists(), "{words:?}");
        assert!(traffic::udp_answers_soon(&net.a, to), "{words:?}");
    }
    // Maps are charged to the cgroup; what may be locked is no bound.
    let daemon = setup.pinned(pins.path()).spawn_with(|command| {
        let locked = || {
            let none = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: reads what is on the stack.
            match unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const none) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // SAFETY: between fork and exec only a system call.
        unsafe {
            command.pre_exec(locked);
        }
    });
    wait_for("the daemon to enforce", LONG * 2, || {
        (daemon.try_status()?["state"] == "enforcing").then_some(())
    });
    assert!(!traffic::udp_answers(&net.a, None, to));

    // What an enforcer with other maps has left goes on, and is not misread.
    setup = daemon.kill();
    let pinned = MapData::from_pin(pins.path().join("current/meta")).unwrap();
    let mut meta: Array<_, [u32; 12 + 2 * SECRETS]> =
        Map::from_map_data(pinned).unwrap().try_into().unwrap();
    let own = meta.get(&0, 0).unwrap();
    for (layout, maker) in [(own[2] + 1, "a newer"), (own[2] - 1, "an older")] {
        let mut other = own;
        other[2] = layout;
        meta.set(0, other, 0).unwrap();
        let log;
        (setup, log) = setup.spawn().refused(3);
        let said = format!("was made by {maker} enforcer");
        assert!(log.contains(&said), "{log}");
        assert!(log.contains("enforcer detach"), "{log}");
        assert!(!traffic::udp_answers(&net.a, None, to), "{maker}");
    }
    meta.set(0, own, 0).unwrap();
    drop(setup.start());
    assert!(!traffic::udp_answers(&net.a, None, to));
}
