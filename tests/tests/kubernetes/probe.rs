//! Rounds of probes between all pods.
//!
//! A round sends every probe at once and waits for no time to pass: it is over when each probe has
//! either arrived or been counted as denied. TCP cells make a connection, UDP cells get an answer.
//! Not every kernel has SCTP, so those cells are an INIT sent and received through raw sockets.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use enforcer_tests::netns::Family;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn, SockaddrIn6, connect, recvfrom,
        sendto, setsockopt, socket, sockopt,
    },
};

use super::{
    model::{Protocol, SERVED},
    pods::{Denied, Host, Pods},
};

/// Datagrams that did not arrive are sent again after this.
const AGAIN: Duration = Duration::from_millis(400);
/// TCP sends a SYN again after a second: from then on denied packets are more than denied probes.
const FIRST_SYN_ONLY: Duration = Duration::from_millis(900);
/// So long a round that took longer than that still looks for what must not arrive.
const SLOW_LAST_LOOK: Duration = Duration::from_millis(100);

/// One probe: from whom to whom, by pod number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cell {
    pub from: u8,
    pub to: u8,
    pub v6: bool,
    pub protocol: Protocol,
    pub port: u16,
}

/// An SCTP header and an INIT chunk. The round is in the source port and the initiate tag.
fn init(round: u32, port: u16) -> Vec<u8> {
    let source = 1024 + u16::try_from(round % 60_000).unwrap();
    let mut packet = Vec::new();
    packet.extend(source.to_be_bytes());
    packet.extend(port.to_be_bytes());
    packet.extend([0; 8]);
    packet.extend([1, 0, 0, 20]);
    packet.extend(round.to_be_bytes());
    packet.extend([0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
    packet
}

/// What a round found that is not as it should be.
#[derive(Debug, Default)]
pub struct Findings {
    /// Arrived, against the policies.
    pub holes: BTreeSet<Cell>,
    /// Did not arrive.
    pub cuts: BTreeSet<Cell>,
    /// Of what was counted.
    pub counts: Option<String>,
    /// Whether each denied probe was one packet, so that the counts had to be the same.
    pub exact: bool,
}

impl Findings {
    pub fn none(&self) -> bool {
        self.holes.is_empty() && self.cuts.is_empty() && self.counts.is_none()
    }
}

impl Pods<'_> {
    /// Probes every pair on these ports in both families; `wanted` says which must arrive.
    pub fn round(
        &mut self,
        probes: &[(Protocol, u16)],
        wanted: impl Fn(&Cell) -> bool,
    ) -> Findings {
        self.round += 1;
        let mut cells = BTreeMap::new();
        for (&from, &to) in self
            .hosts
            .keys()
            .flat_map(|from| self.hosts.keys().map(move |to| (from, to)))
        {
            for (v6, &(protocol, port)) in [false, true]
                .iter()
                .flat_map(|v6| probes.iter().map(move |probe| (*v6, probe)))
            {
                let cell = Cell {
                    from,
                    to,
                    v6,
                    protocol,
                    port,
                };
                cells.insert(cell, wanted(&cell));
            }
        }
        let before = self.denied();
        Round {
            pods: self,
            cells,
            start: Instant::now(),
            clients: Vec::new(),
            accepted: Vec::new(),
            accepts: 0,
            asking: BTreeMap::new(),
            delivered: BTreeSet::new(),
            reached: BTreeSet::new(),
        }
        .run(before)
    }

    fn ip(&self, cell: &Cell) -> IpAddr {
        let family = if cell.v6 { Family::V6 } else { Family::V4 };
        self.hosts[&cell.to].pod.ip(family)
    }
}

struct Round<'a> {
    pods: &'a Pods<'a>,
    /// And whether they must arrive.
    cells: BTreeMap<Cell, bool>,
    start: Instant,
    clients: Vec<(Cell, OwnedFd)>,
    /// Connections at their servers, until the client has reset them: nothing of this round is to
    /// be under way in the next.
    accepted: Vec<TcpStream>,
    accepts: usize,
    /// Sockets that ask by UDP, by pod and family.
    asking: BTreeMap<(u8, bool), UdpSocket>,
    /// Seen where it was sent to.
    delivered: BTreeSet<Cell>,
    /// Seen by the sender to have arrived; for SCTP the same.
    reached: BTreeSet<Cell>,
}

impl Round<'_> {
    fn run(mut self, before: Denied) -> Findings {
        self.open();
        self.send(&self.cells.keys().copied().collect::<Vec<_>>());
        let refused = self.cells.values().filter(|wanted| !**wanted).count();
        let refused = u64::try_from(refused).unwrap();
        let mut resend = AGAIN;
        let mut denied;
        loop {
            self.look(PollTimeout::from(5_u8));
            let missing = self.missing();
            let late = self.start.elapsed() > self.pods.patience;
            let connected = self.reached.iter().filter(|c| c.protocol == Protocol::Tcp);
            let settled = self.accepted.is_empty() && self.accepts == connected.count();
            if late || (missing.is_empty() && settled) {
                denied = self.pods.denied();
                let all = denied.ingress - before.ingress >= refused || !self.holes().is_empty();
                if late || all {
                    break;
                }
            }
            if self.start.elapsed() > resend {
                resend += AGAIN;
                self.send(&missing);
            }
        }
        let once = self.start.elapsed() < FIRST_SYN_ONLY;
        // A count that is exact proves that nothing is still to come. One that is not does not.
        let last = Instant::now();
        self.look(PollTimeout::ZERO);
        while !once && last.elapsed() < SLOW_LAST_LOOK {
            self.look(PollTimeout::from(5_u8));
        }
        let counted = Denied {
            ingress: denied.ingress - before.ingress,
            egress: denied.egress - before.egress,
        };
        let as_many = if once {
            counted.ingress == refused
        } else {
            counted.ingress >= refused && (refused > 0 || counted.ingress == 0)
        };
        let counts = (!as_many || counted.egress > 0)
            .then(|| format!("{counted:?} for {refused} probes to be denied"));
        Findings {
            holes: self.holes(),
            cuts: self.missing().into_iter().collect(),
            counts,
            exact: once,
        }
    }

    /// What must arrive and has not.
    fn missing(&self) -> Vec<Cell> {
        let missing = |(cell, wanted): (&Cell, &bool)| {
            (*wanted && !self.reached.contains(cell)).then_some(*cell)
        };
        self.cells.iter().filter_map(missing).collect()
    }

    /// What must not arrive and has.
    fn holes(&self) -> BTreeSet<Cell> {
        let seen = self.delivered.union(&self.reached);
        seen.filter(|cell| !self.cells[cell]).copied().collect()
    }

    /// Opens the clients' sockets and TCP connections.
    fn open(&mut self) {
        for (number, host) in &self.pods.hosts {
            let (mut clients, mut asking) = (Vec::new(), Vec::new());
            let cells = &self.cells;
            let pods = self.pods;
            host.netns.enter(|| {
                for v6 in [false, true] {
                    let any = if v6 { "[::]:0" } else { "0.0.0.0:0" };
                    let socket = UdpSocket::bind(any).unwrap();
                    socket.set_nonblocking(true).unwrap();
                    asking.push((v6, socket));
                }
                let mine = |c: &&Cell| c.from == *number && c.protocol == Protocol::Tcp;
                for cell in cells.keys().filter(mine) {
                    clients.push((*cell, tcp_client((pods.ip(cell), cell.port).into())));
                }
            });
            self.clients.extend(clients);
            let asking = asking.into_iter();
            self.asking
                .extend(asking.map(|(v6, socket)| ((*number, v6), socket)));
        }
    }

    /// Sends the datagrams of these cells.
    fn send(&self, cells: &[Cell]) {
        let round = self.pods.round;
        for cell in cells {
            let to = SocketAddr::new(self.pods.ip(cell), cell.port);
            let sent = match cell.protocol {
                Protocol::Tcp => continue,
                Protocol::Udp => {
                    let socket = &self.asking[&(cell.from, cell.v6)];
                    socket.send_to(&round.to_be_bytes(), to).map(drop)
                }
                Protocol::Sctp => {
                    let raw = self.pods.hosts[&cell.from].raw[usize::from(cell.v6)].as_raw_fd();
                    let packet = init(round, cell.port);
                    // A raw socket wants no port.
                    let sent = match SocketAddr::new(to.ip(), 0) {
                        SocketAddr::V4(to) => {
                            sendto(raw, &packet, &SockaddrIn::from(to), MsgFlags::empty())
                        }
                        SocketAddr::V6(to) => {
                            sendto(raw, &packet, &SockaddrIn6::from(to), MsgFlags::empty())
                        }
                    };
                    sent.map(drop).map_err(io::Error::from)
                }
            };
            sent.unwrap_or_else(|error| panic!("{cell}: {error}"));
        }
    }

    /// Waits until something happens and takes note of all that has.
    fn look(&mut self, limit: PollTimeout) {
        let hosts = &self.pods.hosts;
        let mut polled = Vec::new();
        for host in hosts.values() {
            polled.extend(host.tcp.iter().map(|(_, s)| (s.as_fd(), PollFlags::POLLIN)));
            polled.extend(host.udp.iter().map(|(_, s)| (s.as_fd(), PollFlags::POLLIN)));
            polled.extend(host.raw.iter().map(|s| (s.as_fd(), PollFlags::POLLIN)));
        }
        polled.extend(self.asking.values().map(|s| (s.as_fd(), PollFlags::POLLIN)));
        let waiting = polled.len();
        polled.extend(
            self.clients
                .iter()
                .map(|(_, s)| (s.as_fd(), PollFlags::POLLOUT)),
        );
        // Errors are always reported.
        polled.extend(
            self.accepted
                .iter()
                .map(|s| (s.as_fd(), PollFlags::empty())),
        );
        let mut fds: Vec<PollFd<'_>> = polled
            .into_iter()
            .map(|(fd, f)| PollFd::new(fd, f))
            .collect();
        poll(&mut fds, limit).unwrap();
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        let (clients, accepted) = ready[waiting..].split_at(self.clients.len());

        // A client that connected resets the connection by being closed.
        let mut clients = clients.iter();
        let reached = &mut self.reached;
        self.clients.retain(|(cell, fd)| {
            let ready = *clients.next().unwrap();
            if ready && sockopt_error(fd) == 0 {
                reached.insert(*cell);
            }
            !ready
        });
        let mut accepted = accepted.iter();
        self.accepted.retain(|_| !*accepted.next().unwrap());
        for host in hosts.values() {
            self.serve(host);
        }
        self.answers();
    }

    /// Takes what came to a pod's servers.
    fn serve(&mut self, host: &Host) {
        let to = host.pod.number;
        let seen = |from: IpAddr, protocol, port| {
            let v6 = !from.to_canonical().is_ipv4();
            self.pods.number_at(from).map(|from| Cell {
                from,
                to,
                v6,
                protocol,
                port,
            })
        };
        for (port, listener) in &host.tcp {
            while let Some((stream, from)) = nothing_yet(listener.accept()) {
                self.delivered.extend(seen(from.ip(), Protocol::Tcp, *port));
                self.accepted.push(stream);
                self.accepts += 1;
            }
        }
        let mut bytes = [0; 256];
        for (port, socket) in &host.udp {
            while let Some((length, from)) = nothing_yet(socket.recv_from(&mut bytes)) {
                if bytes[..length] == self.pods.round.to_be_bytes() {
                    self.delivered.extend(seen(from.ip(), Protocol::Udp, *port));
                    // Lost like any packet; the question comes again.
                    let _ = socket.send_to(&bytes[..length], from);
                }
            }
        }
        for (raw, v6) in host.raw.iter().zip([false, true]) {
            while let Some((length, from)) = receive(raw, v6, &mut bytes) {
                // IPv4 comes with its header.
                let header = if v6 {
                    0
                } else {
                    usize::from(bytes[0] & 15) * 4
                };
                let packet = bytes.get(header..length).unwrap_or_default();
                for port in SERVED.map(|s| s.2) {
                    if packet == init(self.pods.round, port) {
                        let cell = seen(from, Protocol::Sctp, port);
                        self.delivered.extend(cell);
                        self.reached.extend(cell);
                    }
                }
            }
        }
    }

    /// Takes the answers of UDP servers.
    fn answers(&mut self) {
        let mut bytes = [0; 256];
        for ((from, v6), socket) in &self.asking {
            while let Some((length, who)) = nothing_yet(socket.recv_from(&mut bytes)) {
                let to = self.pods.number_at(who.ip());
                if bytes[..length] == self.pods.round.to_be_bytes() {
                    self.reached.extend(to.map(|to| Cell {
                        from: *from,
                        to,
                        v6: *v6,
                        protocol: Protocol::Udp,
                        port: who.port(),
                    }));
                }
            }
        }
    }
}

/// A socket that is connecting; closing it resets the connection.
fn tcp_client(to: SocketAddr) -> OwnedFd {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let client = socket(family, SockType::Stream, flags, None).unwrap();
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&client, sockopt::Linger, &linger).unwrap();
    let started = match to {
        SocketAddr::V4(to) => connect(client.as_raw_fd(), &SockaddrIn::from(to)),
        SocketAddr::V6(to) => connect(client.as_raw_fd(), &SockaddrIn6::from(to)),
    };
    assert!(
        matches!(started, Ok(()) | Err(Errno::EINPROGRESS)),
        "{started:?}"
    );
    client
}

fn sockopt_error(fd: &OwnedFd) -> i32 {
    nix::sys::socket::getsockopt(fd, sockopt::SocketError).unwrap()
}

/// What there is to take, if there is any.
fn nothing_yet<T>(taken: io::Result<T>) -> Option<T> {
    match taken {
        Ok(taken) => Some(taken),
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    }
}

fn receive(raw: &OwnedFd, v6: bool, bytes: &mut [u8]) -> Option<(usize, IpAddr)> {
    let taken = if v6 {
        recvfrom::<SockaddrIn6>(raw.as_raw_fd(), bytes)
            .map(|(n, from)| (n, from.unwrap().ip().into()))
    } else {
        recvfrom::<SockaddrIn>(raw.as_raw_fd(), bytes)
            .map(|(n, from)| (n, from.unwrap().ip().into()))
    };
    nothing_yet(taken.map_err(io::Error::from))
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (protocol, family) = (self.protocol.word(), if self.v6 { 6 } else { 4 });
        let Self { from, to, port, .. } = self;
        write!(f, "{from} > {to} {protocol}/{port} v{family}")
    }
}
