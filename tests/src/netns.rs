//! Network namespaces of the tests: made, wired, entered by threads, removed.
//!
//! Names are `enft-PID-N-LABEL`: tests of several processes do not meet, and what a killed test
//! left behind is known by a PID that is gone.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};

const DIRECTORY: &str = "/run/netns";
const PREFIX: &str = "enft-";

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A name for a thing outside of this process.
fn unique(label: &str) -> String {
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    format!("{PREFIX}{}-{number}-{label}", std::process::id())
}

/// A directory of this test, swept like the namespaces if the test is killed.
pub fn directory() -> tempfile::TempDir {
    sweep();
    tempfile::Builder::new()
        .prefix(&format!("{}-", unique("dir")))
        .tempdir()
        .unwrap()
}

/// Removes what killed tests left behind; once per process.
fn sweep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let stale = |directory: &Path| -> Vec<PathBuf> {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            entries
                .map(|entry| entry.path())
                .filter(|path| {
                    let name = path.file_name().unwrap().to_string_lossy();
                    let pid = name
                        .strip_prefix(PREFIX)
                        .and_then(|rest| rest.split('-').next());
                    pid.is_some_and(|pid| {
                        pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()
                    })
                })
                .collect()
        };
        // Another test process may sweep at the same time: failures are no news.
        for path in stale(Path::new(DIRECTORY)) {
            let name = path.file_name().unwrap();
            let _ = Command::new("ip")
                .args(["netns", "del"])
                .arg(name)
                .stderr(Stdio::null())
                .status();
        }
        for path in stale(&std::env::temp_dir()) {
            let _ = fs::remove_dir_all(path);
        }
    });
}

/// A network namespace; goes with its interfaces when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
}

impl Netns {
    /// A namespace with its loopback up, addresses usable at once, and ping sockets for all.
    pub fn new(label: &str) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make network namespaces: run them as root"
        );
        sweep();
        let name = unique(label);
        ip(&[], &format!("netns add {name}\n"));
        let file = File::open(Path::new(DIRECTORY).join(&name)).unwrap();
        let this = Self { name, file };
        this.sysctl("ipv6/conf/all/accept_dad", "0");
        this.sysctl("ipv6/conf/default/accept_dad", "0");
        this.sysctl("ipv4/ping_group_range", "0 2147483647");
        // Errors are what some tests wait for.
        this.sysctl("ipv4/icmp_ratelimit", "0");
        this.sysctl("ipv6/icmp/ratelimit", "0");
        this.ip("link set lo up\n");
        this
    }

    /// As `ip -n` takes it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// For `setns` in a child.
    pub fn file(&self) -> File {
        self.file.try_clone().unwrap()
    }

    /// Runs `work` on a thread inside. Sockets it returns stay in this namespace.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // This thread only; it ends with the work.
                setns(&self.file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Number of each interface inside, by name.
    pub fn interfaces(&self) -> BTreeMap<String, u32> {
        self.enter(|| {
            let all = nix::net::if_::if_nameindex().unwrap();
            let named = |i: &nix::net::if_::Interface| i.name().to_str().unwrap().to_owned();
            all.iter().map(|i| (named(i), i.index())).collect()
        })
    }

    /// Runs lines of `ip -batch` inside.
    pub fn ip(&self, batch: &str) {
        ip(&["-n", &self.name], batch);
    }

    /// What a command of iproute2 (`ip`, `tc`) prints about the inside, or its complaint.
    pub fn ask(&self, program: &str, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new(program)
            .args(["-n", &self.name])
            .args(arguments)
            .output()
            .unwrap();
        if output.status.success() {
            Ok(String::from_utf8(output.stdout).unwrap())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// Writes a file below `/proc/sys/net` of the inside.
    pub fn sysctl(&self, name: &str, value: &str) {
        self.enter(|| fs::write(Path::new("/proc/sys/net").join(name), value).unwrap());
    }

    /// A cable from `interface` here to `peer` in `other`, both up.
    pub fn cable(&self, interface: &str, other: &Self, peer: &str) {
        self.ip(&format!(
            "link add {interface} type veth peer name {peer} netns {}\nlink set {interface} up\n",
            other.name
        ));
        other.ip(&format!("link set {peer} up\n"));
        // The kernel gives both ends an address soon: one that comes later would be a change.
        self.settled(interface);
        other.settled(peer);
    }

    /// Waits for an interface's own IPv6 address, a second at most: it may be meant to have none.
    fn settled(&self, interface: &str) {
        let has = || {
            let all = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
            let mut own = all.lines().filter(|line| line.starts_with("fe80"));
            own.any(|line| line.split_whitespace().next_back() == Some(interface))
        };
        self.enter(|| {
            let start = Instant::now();
            while !has() && start.elapsed() < Duration::from_secs(1) {
                thread::sleep(Duration::from_millis(1));
            }
        });
    }

    /// Moves an interface from here into another namespace.
    pub fn hand_over(&self, interface: &str, to: &Self) {
        self.ip(&format!("link set {interface} netns {}\n", to.name));
    }

    /// Gives addresses, each with its prefix length, to an interface.
    pub fn addresses(&self, interface: &str, addresses: &[&str]) {
        let mut batch = String::new();
        for address in addresses {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            batch += &format!("addr add {address} dev {interface} {nodad}\n");
        }
        self.ip(&batch);
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // A panic while another unwinds would abort the whole process.
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

fn ip(options: &[&str], batch: &str) {
    let mut child = Command::new("ip")
        .args(options)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ip, of package iproute2, runs");
    child
        .stdin
        .take()
        .unwrap()
        .write_all(batch.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "ip {options:?}: {}{batch}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Two hosts and the router between them, on which the enforcer runs.
///
/// ```text
/// a (eth0 10.1.0.2, fd01::2) ── gw-a gateway gw-b ── b (eth0 10.2.0.2, fd02::2)
/// ```
/// `a` and `b` each have `.3` as a second address.
pub struct Routed {
    pub gateway: Netns,
    pub a: Netns,
    pub b: Netns,
}

impl Routed {
    pub fn new() -> Self {
        let this = Self {
            gateway: Netns::new("gw"),
            a: Netns::new("a"),
            b: Netns::new("b"),
        };
        this.gateway.sysctl("ipv4/ip_forward", "1");
        this.gateway.sysctl("ipv6/conf/all/forwarding", "1");
        for (host, port, number) in [(&this.a, "gw-a", 1), (&this.b, "gw-b", 2)] {
            this.gateway.cable(port, host, "eth0");
            this.gateway.addresses(
                port,
                &[
                    &format!("10.{number}.0.1/24"),
                    &format!("fd0{number}::1/64"),
                ],
            );
            host.addresses(
                "eth0",
                &[
                    &format!("10.{number}.0.2/24"),
                    &format!("10.{number}.0.3/24"),
                    // The address added last is the preferred source.
                    &format!("fd0{number}::3/64"),
                    &format!("fd0{number}::2/64"),
                ],
            );
            host.ip(&format!(
                "route add default via 10.{number}.0.1 src 10.{number}.0.2\n\
                 route add default via fd0{number}::1 src fd0{number}::2\n"
            ));
        }
        this
    }
}

impl Default for Routed {
    fn default() -> Self {
        Self::new()
    }
}

/// A host that runs the enforcer, and its neighbour.
///
/// ```text
/// host (eth0 10.1.0.1, fd01::1) ── (eth0 10.1.0.2, fd01::2) peer
/// ```
pub struct Pair {
    pub host: Netns,
    pub peer: Netns,
}

impl Pair {
    pub fn new() -> Self {
        let this = Self {
            host: Netns::new("host"),
            peer: Netns::new("peer"),
        };
        this.host.cable("eth0", &this.peer, "eth0");
        this.host.addresses("eth0", &["10.1.0.1/24", "fd01::1/64"]);
        this.peer.addresses("eth0", &["10.1.0.2/24", "fd01::2/64"]);
        this
    }
}

impl Default for Pair {
    fn default() -> Self {
        Self::new()
    }
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The address number `host` in network `network` of [`Routed`] and [`Pair`].
    pub fn address(self, network: u8, host: u8) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(10, network, 0, host).into(),
            Self::V6 => {
                Ipv6Addr::new(0xfd00 + u16::from(network), 0, 0, 0, 0, 0, 0, host.into()).into()
            }
        }
    }
}
