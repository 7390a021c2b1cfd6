//! A rule that goes takes its live flows with it, both directions; the others do not notice.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    netns::{Family, Routed},
    traffic,
};

/// The rule that goes admits the first port, the other one the second.
const GOES: u16 = 7001;
const STAYS: u16 = 7002;

const OTHERS: &str = r#"version: 1
segments:
  a: { members: [{cidr: 10.1.0.0/24}, {cidr: "fd01::/64"}] }
  b: { members: [{cidr: 10.2.0.0/24}, {cidr: "fd02::/64"}] }
rules:
  - { name: stays, from: [a], to: [b], services: [tcp/7002, udp/7002] }
"#;

fn with_rule() -> String {
    format!("{OTHERS}  - {{ name: goes, from: [a], to: [b], services: [tcp/7001, udp/7001] }}\n")
}

/// Bytes or datagrams that arrived at each end.
#[derive(Default)]
struct Arrived {
    at_a: AtomicU64,
    at_b: AtomicU64,
}

impl Arrived {
    fn both(&self) -> (u64, u64) {
        (
            self.at_a.load(Ordering::Relaxed),
            self.at_b.load(Ordering::Relaxed),
        )
    }
}

/// A flow in which both ends talk without waiting for each other.
struct Flow {
    arrived: Arc<Arrived>,
    stop: Arc<AtomicBool>,
    what: String,
}

impl Flow {
    fn new(what: String) -> Self {
        Self {
            arrived: Arc::default(),
            stop: Arc::default(),
            what,
        }
    }

    /// Talks and listens at one end: the first half of `ends` talks, the second listens.
    fn end(
        &self,
        mut talk: impl FnMut() -> io::Result<()> + Send + 'static,
        mut listen: impl FnMut() -> io::Result<u64> + Send + 'static,
        count: fn(&Arrived) -> &AtomicU64,
    ) {
        let stop = Arc::clone(&self.stop);
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) && talk().is_ok() {
                thread::sleep(Duration::from_millis(10));
            }
        });
        let (stop, arrived) = (Arc::clone(&self.stop), Arc::clone(&self.arrived));
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                match listen() {
                    Ok(number) => {
                        count(&arrived).fetch_add(number, Ordering::Relaxed);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return,
                }
            }
        });
    }

    fn tcp(net: &Routed, family: Family, port: u16) -> Self {
        let flow = Self::new(format!("tcp/{port} {family:?}"));
        let at = SocketAddr::new(family.address(2, 2), port);
        let listener = net.b.enter(|| TcpListener::bind(at).unwrap());
        let a = traffic::tcp(&net.a, at);
        let (b, _) = listener.accept().unwrap();
        b.set_nodelay(true).unwrap();
        flow.tcp_end(a, |arrived| &arrived.at_a);
        flow.tcp_end(b, |arrived| &arrived.at_b);
        flow
    }

    fn tcp_end(&self, mut stream: TcpStream, count: fn(&Arrived) -> &AtomicU64) {
        let mut reader = stream.try_clone().unwrap();
        reader
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let mut bytes = [0; 4096];
        self.end(
            move || stream.write_all(b"tick"),
            move || match reader.read(&mut bytes)? {
                0 => Err(io::ErrorKind::UnexpectedEof.into()),
                length => Ok(length as u64),
            },
            count,
        );
    }

    fn udp(net: &Routed, family: Family, port: u16) -> Self {
        let flow = Self::new(format!("udp/{port} {family:?}"));
        let limit = Duration::from_millis(20);
        let a = traffic::udp(&net.a, (family.address(1, 2), 0), limit);
        let b = traffic::udp(&net.b, (family.address(2, 2), port), limit);
        a.connect(b.local_addr().unwrap()).unwrap();
        b.connect(a.local_addr().unwrap()).unwrap();
        // `a` opens the flow; what `b` says before would be a flow of its own.
        a.send(b"open").unwrap();
        wait_for("the first datagram", LONG, || b.recv(&mut [0; 4]).ok());
        flow.udp_end(a, |arrived| &arrived.at_a);
        flow.udp_end(b, |arrived| &arrived.at_b);
        flow
    }

    fn udp_end(&self, socket: UdpSocket, count: fn(&Arrived) -> &AtomicU64) {
        let reader = socket.try_clone().unwrap();
        let mut bytes = [0; 64];
        self.end(
            move || socket.send(b"tick").map(drop),
            move || reader.recv(&mut bytes).map(|_| 1),
            count,
        );
    }

    /// That both ends hear something new.
    fn lives(&self) {
        let before = self.arrived.both();
        wait_for(&format!("{} to live", self.what), LONG, || {
            let now = self.arrived.both();
            (now.0 > before.0 && now.1 > before.1).then_some(())
        });
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_rule_that_goes_cuts_its_flows_both_ways() {
    let net = Routed::new();
    let daemon = Setup::new(&net.gateway, "gw-*", &with_rule()).start();
    let flows = |port| -> Vec<Flow> {
        Family::BOTH
            .into_iter()
            .flat_map(|family| [Flow::tcp(&net, family, port), Flow::udp(&net, family, port)])
            .collect()
    };
    let (going, staying) = (flows(GOES), flows(STAYS));
    going.iter().chain(&staying).for_each(Flow::lives);

    daemon.swap(OTHERS);
    // The swap is over. What is still on its way was judged before; it is there in no time.
    thread::sleep(Duration::from_millis(100));
    let at_the_cut: Vec<_> = going.iter().map(|flow| flow.arrived.both()).collect();
    staying.iter().for_each(Flow::lives);
    thread::sleep(Duration::from_millis(700));
    staying.iter().for_each(Flow::lives);
    for (flow, before) in going.iter().zip(at_the_cut) {
        assert_eq!(flow.arrived.both(), before, "{} at (a, b)", flow.what);
    }
    each_direction_was_revoked(&daemon);

    daemon.swap(&with_rule());
    going.iter().chain(&staying).for_each(Flow::lives);

    // By a rule of its own, which is named.
    daemon.swap(&format!(
        "{}  - {{ name: stop, from: [a], to: [b], services: [udp/7001], action: deny }}\n",
        with_rule()
    ));
    let denial = wait_for("a denial by name", LONG, || {
        let mut denials = daemon.denials(&[]).into_iter();
        denials.find(|denial| denial["rule"] == "stop")
    });
    assert_eq!(denial["reason"], "revoked");
    assert_eq!(denial["default"], serde_json::Value::Null);
    assert_eq!(denial["generation"], 4);
}

/// Both ends' packets are recorded as revoked, of each protocol and family, and no others.
fn each_direction_was_revoked(daemon: &Daemon<'_>) {
    let denials = wait_for("a denial of each kind", LONG, || {
        let denials = daemon.denials(&[]);
        let all = ["tcp", "udp"].into_iter().all(|protocol| {
            Family::BOTH.into_iter().all(|family| {
                [(1, 2), (2, 1)].into_iter().all(|(from, to)| {
                    denials.iter().any(|d| {
                        d["protocol"] == protocol
                            && d["src"] == family.address(from, 2).to_string()
                            && d["dst"] == family.address(to, 2).to_string()
                    })
                })
            })
        });
        all.then_some(denials)
    });
    for denial in denials {
        assert_eq!(denial["reason"], "revoked", "{denial:#}");
        assert_eq!(denial["generation"], 2, "{denial:#}");
        assert_eq!(denial["default"], "b (both)", "{denial:#}");
        let ports = [&denial["src_port"], &denial["dst_port"]];
        assert!(ports.iter().any(|port| **port == GOES), "{denial:#}");
        assert!(ports.iter().all(|port| **port != STAYS), "{denial:#}");
    }
}
