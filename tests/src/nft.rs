//! nftables inside a namespace: address translation and what else a gateway does besides.

use std::{
    io::Write as _,
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
};

use nix::sched::{CloneFlags, setns};

use crate::{netns::Netns, seen::skipped};

/// Runs commands of `nft` inside; its complaint if it refuses.
pub fn try_nft(namespace: &Netns, commands: &str) -> Result<(), String> {
    let inside = namespace.file();
    let mut command = Command::new("nft");
    command
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: between fork and exec only a system call, on a file opened before.
    unsafe {
        command.pre_exec(move || Ok(setns(&inside, CloneFlags::CLONE_NEWNET)?));
    }
    let mut child = command.spawn().expect("nft, of package nftables, runs");
    child
        .stdin
        .take()
        .unwrap()
        .write_all(commands.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Runs commands of `nft` inside.
pub fn nft(namespace: &Netns, commands: &str) {
    if let Err(complaint) = try_nft(namespace, commands) {
        panic!("nft: {complaint}{commands}");
    }
}

/// Whether this kernel translates addresses; says so where it does not.
pub fn translates(namespace: &Netns) -> bool {
    let table = "table inet probe {\n\
                 chain out { type nat hook postrouting priority 100; masquerade\n }\n}\n";
    match try_nft(namespace, table) {
        Ok(()) => {
            nft(namespace, "delete table inet probe\n");
            true
        }
        Err(complaint) => {
            skipped(&format!(
                "no address translation in this kernel: {complaint}"
            ));
            false
        }
    }
}
