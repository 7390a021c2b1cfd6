//! The hospital's network: a gateway and the hosts around it, each in a namespace of its own.

use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

use crate::env;

/// Every namespace of the demo starts with this, so that a stale one is known by its name.
const PREFIX: &str = "enforcer-demo-";

/// The namespace between the others, where the enforcer runs.
pub const GATEWAY: &str = "gateway";

/// A machine of the hospital, one hop from the gateway.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// Its name, and its namespace's after the prefix.
    pub name: &'static str,
    /// The gateway's interface towards it.
    pub interface: &'static str,
    /// First three groups of its /24; the gateway has `.1`.
    v4: (&'static str, u8),
    /// Its /64; the gateway has `::1`.
    v6: (&'static str, u8),
    /// TCP ports it serves.
    pub tcp: &'static [u16],
    /// UDP ports it serves.
    pub udp: &'static [u16],
}

pub const DB: Host = Host {
    name: "ehr-db",
    interface: "gw-db",
    v4: ("10.10.1", 5),
    v6: ("fd00:10:1", 5),
    tcp: &[22, 5432],
    udp: &[],
};
pub const APP: Host = Host {
    name: "ehr-app",
    interface: "gw-app",
    v4: ("10.10.2", 7),
    v6: ("fd00:10:2", 7),
    tcp: &[2575],
    udp: &[],
};
pub const LAB: Host = Host {
    name: "lab-analyser",
    interface: "gw-lab",
    v4: ("10.20.0", 9),
    v6: ("fd00:20", 9),
    tcp: &[],
    udp: &[],
};
pub const GUEST: Host = Host {
    name: "guest-laptop",
    interface: "gw-guest",
    v4: ("10.99.3", 4),
    v6: ("fd00:99", 4),
    tcp: &[],
    udp: &[],
};
/// Stands for the world outside: an address in no segment.
pub const INTERNET: Host = Host {
    name: "internet",
    interface: "gw-wan",
    v4: ("198.51.100", 10),
    v6: ("2001:db8:100", 10),
    tcp: &[443],
    udp: &[53],
};

pub const HOSTS: [Host; 5] = [DB, APP, LAB, GUEST, INTERNET];

/// Version of the Internet Protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Host {
    /// Its address.
    pub fn address(&self, family: Family) -> Result<IpAddr> {
        let text = match family {
            Family::V4 => format!("{}.{}", self.v4.0, self.v4.1),
            Family::V6 => format!("{}::{}", self.v6.0, self.v6.1),
        };
        text.parse()
            .with_context(|| format!("{text} is no address"))
    }
}

/// The file that stands for a namespace.
pub fn path(name: &str) -> PathBuf {
    PathBuf::from(format!("/run/netns/{PREFIX}{name}"))
}

/// Makes all namespaces, cables, addresses and routes.
pub fn create() -> Result<()> {
    let mut batch = format!("netns add {PREFIX}{GATEWAY}\n");
    for host in HOSTS {
        batch += &format!("netns add {PREFIX}{}\n", host.name);
    }
    ip(&batch)?;
    for name in HOSTS.map(|host| host.name).into_iter().chain([GATEWAY]) {
        inside(name, prepare)??;
    }
    inside(GATEWAY, || {
        write_sysctl("ipv4/ip_forward", "1")?;
        write_sysctl("ipv6/conf/all/forwarding", "1")
    })??;

    let mut gateway = String::from("link set lo up\n");
    for Host {
        name,
        interface,
        v4,
        v6,
        ..
    } in HOSTS
    {
        // Made in place: no interface ever shows up in the namespace of whoever runs the demo.
        gateway += &format!(
            "link add {interface} type veth peer name eth0 netns {PREFIX}{name}\n\
             addr add {}.1/24 dev {interface}\n\
             addr add {}::1/64 dev {interface} nodad\n\
             link set {interface} up\n",
            v4.0, v6.0
        );
    }
    inside(GATEWAY, || ip(&gateway))??;
    for Host { name, v4, v6, .. } in HOSTS {
        let batch = format!(
            "link set lo up\n\
             addr add {}.{}/24 dev eth0\n\
             addr add {}::{}/64 dev eth0 nodad\n\
             link set eth0 up\n\
             route add default via {}.1\n\
             route add default via {}::1\n",
            v4.0, v4.1, v6.0, v6.1, v4.0, v6.0
        );
        inside(name, || ip(&batch))??;
    }
    Ok(())
}

/// Removes every namespace of the demo; their interfaces go with them. Returns how many.
pub fn delete() -> Result<usize> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return Ok(0);
    };
    let names: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(PREFIX))
        .collect();
    for name in &names {
        ip(&format!("netns del {name}\n"))?;
    }
    Ok(names.len())
}

/// Runs `work` on a thread inside a namespace. Sockets it returns stay in that namespace.
pub fn inside<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
    let file = open(name)?;
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            // Moves this thread only; it ends with the work.
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        });
        thread
            .join()
            .map_err(|_| anyhow!("a thread in namespace {name} panicked"))?
    })
}

/// Opens a namespace, for `setns`.
pub fn open(name: &str) -> Result<File> {
    let path = path(name);
    File::open(&path).with_context(|| format!("cannot open {}", path.display()))
}

fn prepare() -> Result<()> {
    // Addresses must be usable at once.
    write_sysctl("ipv6/conf/all/accept_dad", "0")?;
    write_sysctl("ipv6/conf/default/accept_dad", "0")?;
    // ICMP echo over datagram sockets, as ordinary programs send it.
    write_sysctl("ipv4/ping_group_range", "0 2147483647")
}

/// `/proc/sys/net` shows the namespace of the thread that looks.
fn write_sysctl(name: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{name}");
    std::fs::write(&path, value).with_context(|| format!("cannot write {path}"))
}

/// Runs lines of `ip -batch` in the namespace of this thread.
///
/// Not with `ip -n`, which remounts things and fails where `/` is no mount point.
fn ip(batch: &str) -> Result<()> {
    let program = env::find_program("ip").context("ip (package iproute2) is not installed")?;
    let mut child = Command::new(program)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // Where it ends early, its own message says more than a broken pipe.
        let _ = stdin.write_all(batch.as_bytes());
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "ip failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
