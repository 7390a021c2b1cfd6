//! Pods as network namespaces around one router.
//!
//! ```text
//! x/a (eth0 10.40.1.2, fd40::1:2) ── pod-x-a ┐
//! x/b (eth0 10.40.1.3, fd40::1:3) ── pod-x-b ┤ router, on which the enforcer runs
//! …                                          ┘
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read as _, Write as _},
    net::{IpAddr, TcpListener, UdpSocket},
    os::{
        fd::{FromRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    time::Duration,
};

use enforcer_tests::{
    daemon::{LONG, wait_for},
    netns::Netns,
    traffic,
};
use serde_json::Value;

use super::model::{Pod, Protocol, SERVED};

/// A pod, with its servers.
pub struct Host {
    pub netns: Netns,
    pub pod: Pod,
    interface: String,
    pub tcp: Vec<(u16, TcpListener)>,
    pub udp: Vec<(u16, UdpSocket)>,
    /// Raw SCTP, IPv4 and IPv6.
    pub raw: [OwnedFd; 2],
}

impl Host {
    /// Neighbours are entered by hand: their discovery is other tests' business.
    fn new(router: &Netns, pod: &Pod) -> Self {
        let netns = Netns::new(&format!("{}-{}", pod.namespace, pod.name));
        let interface = format!("pod-{}-{}", pod.namespace, pod.name);
        router.cable(&interface, &netns, "eth0");
        let (v4, v6, number) = (pod.v4, pod.v6, pod.number);
        let (outside, inside) = (
            format!("02:00:00:00:01:{number:02x}"),
            format!("02:00:00:00:02:{number:02x}"),
        );
        router.ip(&format!(
            "link set {interface} address {outside}\n\
             route add {v4}/32 dev {interface}\n\
             route add {v6}/128 dev {interface}\n\
             neigh add {v4} lladdr {inside} dev {interface} nud permanent\n\
             neigh add {v6} lladdr {inside} dev {interface} nud permanent\n"
        ));
        netns.ip(&format!(
            "link set eth0 address {inside}\n\
             addr add {v4}/32 dev eth0\n\
             addr add {v6}/128 dev eth0 nodad\n\
             neigh add 169.254.1.1 lladdr {outside} dev eth0 nud permanent\n\
             neigh add fe80::1 lladdr {outside} dev eth0 nud permanent\n\
             route add 169.254.1.1 dev eth0 scope link\n\
             route add default via 169.254.1.1 dev eth0 src {v4}\n\
             route add default via fe80::1 dev eth0 src {v6}\n"
        ));
        let served = |protocol| SERVED.iter().filter(move |s| s.1 == protocol).map(|s| s.2);
        let (tcp, udp, raw) = netns.enter(|| {
            let tcp = served(Protocol::Tcp).map(|port| {
                let listener = TcpListener::bind(traffic::any(port)).unwrap();
                listener.set_nonblocking(true).unwrap();
                (port, listener)
            });
            let udp = served(Protocol::Udp).map(|port| {
                let socket = UdpSocket::bind(traffic::any(port)).unwrap();
                socket.set_nonblocking(true).unwrap();
                (port, socket)
            });
            let raw = [libc::AF_INET, libc::AF_INET6].map(raw_sctp);
            (tcp.collect(), udp.collect(), raw)
        });
        Self {
            netns,
            pod: pod.clone(),
            interface,
            tcp,
            udp,
            raw,
        }
    }
}

fn raw_sctp(family: libc::c_int) -> OwnedFd {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: a system call without pointers.
    let fd = unsafe { libc::socket(family, kind, libc::IPPROTO_SCTP) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: just made, owned by nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Packets denied at the router's two hooks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Denied {
    pub ingress: u64,
    pub egress: u64,
}

/// All pods that there are, and the daemon that is asked what was denied.
pub struct Pods<'a> {
    router: &'a Netns,
    control: PathBuf,
    /// By number.
    pub hosts: BTreeMap<u8, Host>,
    /// Of the last round of probes.
    pub round: u32,
    /// How long a probe that should arrive may take.
    pub patience: Duration,
}

impl<'a> Pods<'a> {
    pub fn new(router: &'a Netns, pods: &[Pod]) -> Self {
        router.sysctl("ipv4/ip_forward", "1");
        router.sysctl("ipv6/conf/all/forwarding", "1");
        let hosts = pods.iter().map(|pod| (pod.number, Host::new(router, pod)));
        Self {
            router,
            control: PathBuf::new(),
            hosts: hosts.collect(),
            round: 0,
            patience: LONG,
        }
    }

    /// Where the daemon listens.
    pub fn control(&mut self, path: PathBuf) {
        self.control = path;
    }

    /// Makes pods that are new, removes those that are gone, and waits until the daemon enforces
    /// exactly the interfaces of those that are there.
    pub fn follow(&mut self, pods: &[Pod]) {
        let there: BTreeSet<u8> = pods.iter().map(|pod| pod.number).collect();
        if self.hosts.keys().copied().eq(there.iter().copied()) {
            return;
        }
        for pod in pods {
            let new = || Host::new(self.router, pod);
            self.hosts.entry(pod.number).or_insert_with(new);
        }
        self.hosts.retain(|number, host| {
            let stays = there.contains(number);
            if !stays {
                // The namespace takes a moment to go, its interface does not.
                self.router.ip(&format!("link del {}\n", host.interface));
            }
            stays
        });
        let names: BTreeSet<&str> = self.hosts.values().map(|h| &h.interface[..]).collect();
        wait_for("the pods' interfaces to be enforced", LONG, || {
            let status = self.status();
            let enforced = status["interfaces"].as_array().unwrap().iter();
            let enforced = enforced.filter(|i| i["enforced"] == true);
            let enforced: BTreeSet<&str> = enforced.map(|i| i["name"].as_str().unwrap()).collect();
            (enforced == names).then_some(())
        });
    }

    fn status(&self) -> Value {
        let mut stream = UnixStream::connect(&self.control).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let request = b"GET /v1/status HTTP/1.1\r\nHost: enforcer\r\nConnection: close\r\n\r\n";
        stream.write_all(request).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        serde_json::from_str(body).unwrap()
    }

    /// What was denied so far.
    pub fn denied(&self) -> Denied {
        let status = self.status();
        let at = |hook: &str| {
            let counters = status["counters"].as_array().unwrap().iter();
            let here = counters.filter(|c| c["hook"] == hook && c["outcome"] == "denied");
            here.map(|c| c["packets"].as_u64().unwrap()).sum()
        };
        Denied {
            ingress: at("tc_ingress"),
            egress: at("tc_egress"),
        }
    }

    /// The pod at an address.
    pub fn number_at(&self, ip: IpAddr) -> Option<u8> {
        let ip = ip.to_canonical();
        let host = self.hosts.values().find(|host| host.pod.is_at(ip));
        host.map(|host| host.pod.number)
    }
}
