//! What a daemon holds at a moment.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    pins::Pins,
};
use serde_json::{Value, json};
use std::os::unix::process::CommandExt as _;

/// A memory cgroup of the daemon's own, where there are any: the kernel counts there what BPF maps
/// take, whoever holds them.
pub struct Group(Option<PathBuf>);

const PREFIX: &str = "enforcer-soak-";
/// Of the first version and of the second, which has the figures only where the controller is on.
const ROOTS: [&str; 2] = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"];

/// Removes groups of processes that are no more.
fn sweep(root: &str) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

impl Group {
    pub fn new() -> Self {
        ROOTS.iter().for_each(|root| sweep(root));
        let name = format!("{PREFIX}{}", std::process::id());
        let made = ROOTS
            .map(|root| Path::new(root).join(&name))
            .into_iter()
            .find(|path| {
                fs::create_dir(path).is_ok() && {
                    let counts = kernel(path).is_some();
                    if !counts {
                        let _ = fs::remove_dir(path);
                    }
                    counts
                }
            });
        Self(made)
    }

    /// Starts a daemon in it.
    pub fn start<'a>(&self, setup: Setup<'a>) -> Daemon<'a> {
        let door = self.0.as_ref().map(|path| path.join("cgroup.procs"));
        let daemon = setup.spawn_with(|command| {
            let Some(door) = door else { return };
            let enter = move || fs::write(&door, "0");
            // SAFETY: between fork and exec only system calls; the allocation for the path is short
            // enough for the stack.
            unsafe {
                command.pre_exec(enter);
            }
        });
        wait_for("the daemon to enforce", LONG * 2, || {
            (daemon.try_status()?["state"] == "enforcing").then_some(())
        });
        daemon
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_dir(path);
        }
    }
}

/// KiB that the kernel has for a group.
fn kernel(group: &Path) -> Option<u64> {
    if let Ok(bytes) = fs::read_to_string(group.join("memory.kmem.usage_in_bytes")) {
        return bytes.trim().parse::<u64>().ok().map(|bytes| bytes / 1024);
    }
    let text = fs::read_to_string(group.join("memory.stat")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("kernel "))?;
    line.parse::<u64>().ok().map(|bytes| bytes / 1024)
}

#[derive(Debug, Clone, Default)]
pub struct Sample {
    pub minute: u64,
    /// Resident, in KiB.
    pub resident: u64,
    /// Of these, what no file has.
    pub anonymous: u64,
    pub descriptors: u64,
    pub maps: u64,
    pub programs: u64,
    pub links: u64,
    /// What its maps lock, in KiB.
    pub locked: u64,
    /// What the kernel has for its cgroup, in KiB.
    pub kernel: Option<u64>,
    pub pins: u64,
}

impl Sample {
    pub const HEAD: &'static str = "minute  resident KiB  anonymous KiB  descriptors  maps  programs  links  locked KiB  kernel KiB  pins";

    /// The least of some looks: a client that is served is no leak.
    pub fn take(daemon: &Daemon<'_>, pins: &Pins, group: &Group, minute: u64) -> Self {
        let looks = (0..10).map(|_| {
            thread::sleep(Duration::from_millis(20));
            Self::look(daemon.pid(), pins, group, minute).unwrap()
        });
        looks.min_by_key(|sample| sample.descriptors).unwrap()
    }

    fn look(process: u32, pins: &Pins, group: &Group, minute: u64) -> io::Result<Self> {
        let process = Path::new("/proc").join(process.to_string());
        let mut this = Self {
            minute,
            pins: pins.list().len() as u64,
            kernel: group.0.as_deref().and_then(kernel),
            ..Self::default()
        };
        let status = fs::read_to_string(process.join("status"))?;
        this.resident = field(&status, "VmRSS:").unwrap_or_default();
        this.anonymous = field(&status, "RssAnon:").unwrap_or_default();
        let mut seen = BTreeSet::new();
        for entry in fs::read_dir(process.join("fd"))? {
            let entry = entry?;
            // Closed since.
            let Ok(target) = fs::read_link(entry.path()) else {
                continue;
            };
            let target = target.to_string_lossy();
            this.descriptors += 1;
            this.programs += u64::from(target.contains("bpf-prog"));
            this.links += u64::from(target.contains("bpf_link") || target.contains("bpf-link"));
            if !target.contains("bpf-map") {
                continue;
            }
            this.maps += 1;
            let information = process.join("fdinfo").join(entry.file_name());
            let information = fs::read_to_string(information).unwrap_or_default();
            if seen.insert(field(&information, "map_id:")) {
                this.locked += field(&information, "memlock:").unwrap_or_default() / 1024;
            }
        }
        Ok(this)
    }

    pub fn row(&self) -> String {
        let kernel = self
            .kernel
            .map_or_else(|| "-".to_owned(), |kernel| kernel.to_string());
        format!(
            "{:>6}  {:>12}  {:>13}  {:>11}  {:>4}  {:>8}  {:>5}  {:>10}  {kernel:>10}  {:>4}",
            self.minute,
            self.resident,
            self.anonymous,
            self.descriptors,
            self.maps,
            self.programs,
            self.links,
            self.locked,
            self.pins
        )
    }

    pub fn json(&self) -> Value {
        json!({
            "minute": self.minute,
            "resident_kib": self.resident,
            "anonymous_kib": self.anonymous,
            "descriptors": self.descriptors,
            "maps": self.maps,
            "programs": self.programs,
            "links": self.links,
            "locked_kib": self.locked,
            "kernel_kib": self.kernel,
            "pins": self.pins,
        })
    }
}

/// A number behind a name.
fn field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}
