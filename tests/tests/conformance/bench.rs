//! One host with the enforcer and one without, which get the same frames.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read as _, Write as _},
    net::IpAddr,
    ops::{Deref, DerefMut},
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use enforcer_tests::{
    daemon::{LONG, Setup},
    frame, kernel,
    netns::Pair,
};
use serde_json::Value;

use crate::wire::{Delivery, Wire, mark};

/// `.2` and `.3` may send some things to `.1`, the receiver; everybody else nothing.
pub const POLICY: &str = r#"version: 1
segments:
  ehr:  { members: [{cidr: 10.1.0.2/31}, {cidr: "fd01::2/127"}] }
  pacs: { members: [{cidr: 10.1.0.1/32}, {cidr: "fd01::1/128"}] }
rules:
  - { name: some, from: [ehr], to: [pacs], services: [udp/4444, tcp/8080, ping] }
  - { name: back, from: [pacs], to: [ehr], services: [udp/4445] }
"#;
pub const SETTINGS: &str = "version: 1\n";
/// The port that a rule allows, and one that none does.
pub const GOOD: u16 = 4444;
pub const BAD: u16 = 5555;

/// What became of some frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// How often each reason denied; `allowed` is all that passed.
    pub counts: BTreeMap<String, u64>,
    /// What sockets of the host behind the enforcer got.
    pub delivered: BTreeSet<Delivery>,
    /// What sockets of a host without enforcer got of the same frames.
    pub bare: BTreeSet<Delivery>,
    /// Frames past the TC hook.
    pub passed: Vec<Vec<u8>>,
}

impl Seen {
    /// The counts are these and no others.
    #[track_caller]
    pub fn counts(&self, expected: &[(&str, u64)]) -> &Self {
        let expected: BTreeMap<String, u64> = expected
            .iter()
            .map(|(r, n)| ((*r).to_owned(), *n))
            .collect();
        assert_eq!(self.counts, expected, "{:?}", self.delivered);
        self
    }

    /// Nothing was delivered, nor did anything pass.
    #[track_caller]
    pub fn nothing_arrived(&self) -> &Self {
        assert_eq!(self.delivered, BTreeSet::new());
        self
    }

    /// As much was delivered as without enforcer.
    #[track_caller]
    pub fn arrived(&self, packets: usize) -> &Self {
        assert_eq!(self.delivered.len(), packets, "{self:?}");
        self
    }

    /// Without enforcer these many would have been delivered.
    #[track_caller]
    pub fn harmful(&self, packets: usize) -> &Self {
        assert_eq!(self.bare.len(), packets, "{self:?}");
        self
    }
}

/// The bench. Loading the programs takes a second, so all tests of this binary share one.
pub struct Bench {
    pub pair: Arc<Pair>,
    pub wire: Wire,
    twin: Wire,
    twin_pair: Arc<Pair>,
    socket: PathBuf,
    policy: PathBuf,
    settings: PathBuf,
    current: (String, String),
    number: u32,
    stop: mpsc::Sender<()>,
    host: JoinHandle<()>,
}

static BENCH: Mutex<Option<Bench>> = Mutex::new(None);

/// The bench, for one test at a time.
pub struct Guard(MutexGuard<'static, Option<Bench>>);

impl Deref for Guard {
    type Target = Bench;
    fn deref(&self) -> &Bench {
        self.0.as_ref().unwrap()
    }
}

/// At the end of each test, every denial has been told.
impl Drop for Guard {
    fn drop(&mut self) {
        if !thread::panicking()
            && let Some(bench) = self.0.as_ref()
        {
            bench.check_told();
        }
    }
}

impl DerefMut for Guard {
    fn deref_mut(&mut self) -> &mut Bench {
        self.0.as_mut().unwrap()
    }
}

/// A static is never dropped, and a daemon and namespaces would stay.
extern "C" fn clear_up() {
    let bench = BENCH.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(bench) = bench {
        drop(bench.stop);
        let _ = bench.host.join();
    }
}

/// The bench with [`POLICY`] and [`SETTINGS`] in force.
pub fn bench() -> Guard {
    let mut bench = BENCH.lock().unwrap_or_else(PoisonError::into_inner);
    if bench.is_none() {
        *bench = Some(Bench::new());
        // SAFETY: a function that may be called when the process ends.
        assert_eq!(unsafe { libc::atexit(clear_up) }, 0);
    }
    let mut bench = Guard(bench);
    // One processor takes the frames in the order in which they were sent.
    kernel::pin();
    bench.enforce(POLICY, SETTINGS);
    bench
}

impl Bench {
    fn new() -> Self {
        let (pair, twin_pair) = (Arc::new(Pair::new()), Arc::new(Pair::new()));
        let (wire, twin) = (Wire::new(&pair), Wire::new(&twin_pair));
        let (started, start) = mpsc::channel();
        let (stop, stopped) = mpsc::channel::<()>();
        let place = Arc::clone(&pair);
        // A daemon ends with the thread that started it, and tests are threads.
        let host = thread::spawn(move || {
            let daemon = Setup::new(&place.host, "eth0", POLICY)
                .with_settings(SETTINGS)
                .with(&["--socket-hooks", "off"])
                .start();
            let setup = &daemon.setup;
            let _ = started.send((setup.socket(), setup.policy(), setup.settings()));
            let _ = stopped.recv();
        });
        let (socket, policy, settings) = start.recv().expect("the daemon starts");
        Self {
            pair,
            wire,
            twin,
            twin_pair,
            socket,
            policy,
            settings,
            current: (POLICY.to_owned(), SETTINGS.to_owned()),
            number: 0,
            stop,
            host,
        }
    }

    /// Puts a policy and settings in force; if others, then of another meaning.
    pub fn enforce(&mut self, policy: &str, settings: &str) {
        let before = self.generation();
        let mut changed = false;
        for (path, text, current) in [
            (&self.policy, policy, &mut self.current.0),
            (&self.settings, settings, &mut self.current.1),
        ] {
            if text != current {
                let new = path.with_file_name(".new");
                fs::write(&new, text).unwrap();
                fs::rename(&new, path).unwrap();
                text.clone_into(current);
                changed = true;
            }
        }
        if changed {
            let answer = self.ask("POST /v1/reload");
            assert!(answer.contains("generation"), "{answer}");
            let start = Instant::now();
            while self.generation() == before {
                assert!(start.elapsed() < LONG, "{answer}: {}", self.status());
                thread::sleep(Duration::from_millis(5));
            }
        }
    }

    /// For both hosts.
    pub fn both(&self, act: impl Fn(&Pair)) {
        act(&self.pair);
        act(&self.twin_pair);
    }

    fn ask(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        write!(stream, "{request} HTTP/1.0\r\nHost: enforcer\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(" 200 "), "{answer}");
        body.to_owned()
    }

    pub fn status(&self) -> Value {
        serde_json::from_str(&self.ask("GET /v1/status")).unwrap()
    }

    fn generation(&self) -> u64 {
        self.status()["generation"].as_u64().unwrap()
    }

    /// Packets at a hook so far by reason, those that passed under `allowed`; without the
    /// essential ones, which hosts send at times of their own.
    pub fn counted(&self, hook: &str) -> BTreeMap<String, u64> {
        let status = self.status();
        let mut counts = BTreeMap::new();
        for counter in status["counters"].as_array().unwrap() {
            let word = |key: &str| counter[key].as_str().unwrap().to_owned();
            if word("hook") != hook || word("reason") == "essential" {
                continue;
            }
            let name = match word("outcome").as_str() {
                "denied" => word("reason"),
                _ => "allowed".to_owned(),
            };
            *counts.entry(name).or_default() += counter["packets"].as_u64().unwrap();
        }
        let denied: u64 = counts
            .iter()
            .filter(|(r, _)| *r != "allowed")
            .map(|(_, n)| n)
            .sum();
        let records = status["records"].as_array().unwrap();
        let of = records.iter().find(|r| r["hook"] == hook);
        let recorded = of.map_or(0, |r| {
            ["emitted", "suppressed", "lost"]
                .iter()
                .map(|k| r[k].as_u64().unwrap())
                .sum()
        });
        assert_eq!(denied, recorded, "each denial has a record: {records:?}");
        counts
    }

    /// Packets that passed for a reason.
    pub fn passed_for(&self, reason: &str) -> u64 {
        let status = self.status();
        let counters = status["counters"].as_array().unwrap();
        let of = counters
            .iter()
            .filter(|c| c["reason"] == reason && c["outcome"] == "allowed");
        of.map(|c| c["packets"].as_u64().unwrap()).sum()
    }

    /// Denied packets at ingress that denials shown to users speak of, by reason.
    fn told(&self) -> BTreeMap<String, u64> {
        let mut told = BTreeMap::new();
        for line in self.ask("GET /v1/denials?follow=false").lines() {
            let denial: Value = serde_json::from_str(line).unwrap();
            if denial["direction"] == "ingress" {
                let reason = denial["reason"].as_str().unwrap().to_owned();
                *told.entry(reason).or_default() += denial["packets"].as_u64().unwrap();
            }
        }
        told
    }

    /// A number that no packet of this bench had: for marks, source ports and identifications.
    pub fn next(&mut self) -> u32 {
        self.number += 1;
        self.number
    }

    /// Waits until users were told of every denied packet; repeats are told once a second.
    fn check_told(&self) {
        let mut counts = self.counted("tc_ingress");
        counts.remove("allowed");
        let mut told = BTreeMap::new();
        let start = Instant::now();
        while told != counts {
            assert!(start.elapsed() < LONG, "counted {counts:?}, told {told:?}");
            thread::sleep(Duration::from_millis(20));
            told = self.told();
        }
    }

    /// Sends frames to both hosts.
    pub fn judge(&mut self, frames: &[Vec<u8>]) -> Seen {
        let number = self.next();
        let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
        let datagram = udp(port(number), GOOD, &mark(number));
        let fence = frame::frame(ip("10.1.0.3"), ip("10.1.0.1"), 17, &datagram);
        let fence = sealed(&fence);
        self.wire.receiver.frames();
        let before = self.counted("tc_ingress");
        let bare = self.twin.send(frames, (&fence, number));
        let delivered = self.wire.send(frames, (&fence, number));
        let mut passed = self.wire.receiver.frames();
        passed.retain(|f| crate::wire::marked(f) != Some(number));
        let after = self.counted("tc_ingress");
        let mut counts = BTreeMap::new();
        for (reason, packets) in after {
            let by = packets - before.get(&reason).unwrap_or(&0);
            let by = if reason == "allowed" { by - 1 } else { by };
            if by != 0 {
                counts.insert(reason, by);
            }
        }
        Seen {
            counts,
            delivered,
            bare,
            passed,
        }
    }
}

/// The source port of a numbered packet.
pub fn port(number: u32) -> u16 {
    10_000 + u16::try_from(number % 40_000).unwrap()
}

/// A UDP header in front of data.
pub fn udp(from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(from.to_be_bytes());
    bytes.extend(to.to_be_bytes());
    bytes.extend(u16::try_from(8 + data.len()).unwrap().to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(data);
    bytes
}

/// The frame with the IPv4 header checksum that it needs.
pub fn sealed(frame: &[u8]) -> Vec<u8> {
    let mut out = frame.to_vec();
    if out.len() < 34 || out[12..14] != [0x08, 0x00] {
        return out;
    }
    out[24..26].fill(0);
    let end = (14 + usize::from(out[14] & 15) * 4).clamp(34, out.len());
    let mut sum = 0u32;
    for pair in out[14..end].chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = !u16::try_from(sum).unwrap();
    out[24..26].copy_from_slice(&sum.to_be_bytes());
    out
}
