//! New flows by the million against the flow table: who is still there, and who still gets in.
//!
//! The programs run under BPF_PROG_TEST_RUN, so each packet's verdict is known, and nothing here
//! knows what the table is made of: a packet found its flow if it is counted as `established`.
//!
//! What a table forgets in a flood depends on how many new flows come between two packets of a
//! flow, not on the time that they take, unless the table itself looks at the clock. So the flood
//! of the first part comes as fast as one CPU can, and "a packet each 30 s" means a packet each
//! 30 × [`RATE`] new flows: time passes some five times as fast as it seems to, which is harder on
//! what grows old in a table and no help to what must not. [`Options::real_time`] takes the time it
//! says. Handshakes are measured at the real rate always: their round trip is 50 ms.

use std::{
    collections::VecDeque,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    thread,
    time::{Duration, Instant},
};

use enforcer::policy::{
    SourceFile,
    model::{Environment, Policy},
    parse,
};
use enforcer_common::verdict::{Hook, Reason};

use crate::{
    frame::{self, ACK, SYN},
    kernel::{self, Programs},
    netns::Family,
};

/// New flows a second.
pub const RATE: u64 = 65_536;
/// From a SYN to its answer.
const ROUND_TRIP: Duration = Duration::from_millis(50);
/// Legitimate handshakes begun a second while the flood lasts.
const HANDSHAKES: u64 = 400;
/// Flows that one client has at a time.
const FLOWS_OF_A_CLIENT: u64 = 4;
const PORT: u16 = 443;

/// How much of it.
#[derive(Clone, Debug)]
pub struct Options {
    pub family: Family,
    /// New flows before anything is measured: more than the table has room for.
    pub fill: u64,
    /// Established flows of each kind.
    pub established: u64,
    /// Seconds between two packets of a flow: one kind of flows each.
    pub idle: &'static [u64],
    /// Whether the flood takes as long as it says, and so as long as the longest of `idle`.
    pub real_time: bool,
    /// Time that handshakes are tried for, in either flood.
    pub handshakes: Duration,
}

impl Options {
    /// Half a minute.
    pub fn full() -> Self {
        Self {
            family: Family::V4,
            fill: 1 << 20,
            established: 1_000,
            idle: &[1, 30, 300],
            real_time: false,
            handshakes: Duration::from_secs(8),
        }
    }

    /// A few seconds: without flows that are silent for minutes.
    pub fn quick() -> Self {
        Self {
            fill: 1 << 18,
            idle: &[1, 5],
            handshakes: Duration::from_secs(1),
            ..Self::full()
        }
    }
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// By seconds between two packets of a flow: share of packets that found their flow.
    pub alive: Vec<(u64, f64)>,
    /// New flows a second that the flood had while that was measured.
    pub rate: f64,
    /// Share of legitimate handshakes completed during a flood of SYNs.
    pub handshakes: f64,
    /// The same during a flood that completes handshakes, from one source.
    pub others: f64,
    /// Share of packets that found their flow in that flood, of flows with a packet each second.
    pub others_alive: f64,
    /// New flows a second of the second and third part, where the machine kept up with [`RATE`].
    pub paced: [f64; 2],
    /// Flows that the table took no entry for.
    pub refused: u64,
}

impl Outcome {
    /// The worst kind of flow.
    pub fn worst_alive(&self) -> f64 {
        let shares = self.alive.iter().map(|(_, share)| *share);
        shares.fold(1.0, f64::min)
    }
}

/// Strangers and an office may connect to servers.
pub fn policy() -> Policy {
    let text = "version: 1\n\
        segments:\n\
        \x20 strangers: { members: [{cidr: 10.64.0.0/10}, {cidr: \"fd0a::/32\"}] }\n\
        \x20 office: { members: [{cidr: 10.32.0.0/16}, {cidr: \"fd0c::/32\"}] }\n\
        \x20 servers: { members: [{cidr: 10.128.0.0/10}, {cidr: \"fd0b::/32\"}] }\n\
        rules:\n\
        \x20 - { name: web, from: [strangers, office], to: [servers], services: [tcp/443] }\n";
    let (name, text) = ("flood.yaml".to_owned(), text.to_owned());
    parse(&[SourceFile { name, text }]).unwrap()
}

/// Floods programs of its own.
pub fn run(options: &Options) -> Outcome {
    kernel::pin();
    let image = kernel::compile(&policy(), &Environment::default());
    let mut programs = Programs::load(image.words().len());
    programs.apply(&image);
    let mut flood = Flood::new(options.family, programs);
    let mut outcome = Outcome::default();
    flood.spoofed(options.fill);
    flood.established(options, &mut outcome);
    flood.handshakes(options, &mut outcome);
    flood.one_source(options, &mut outcome);
    let records = flood.programs.counters().records;
    outcome.refused = records.iter().map(|r| r.flow_insert_failed).sum();
    outcome
}

/// A flow of an honest client.
#[derive(Clone, Copy)]
struct Honest {
    client: IpAddr,
    server: IpAddr,
    port: u16,
}

impl Honest {
    /// The flow of a number; of each kind those with other numbers are others.
    fn new(family: Family, kind: u16, number: u64) -> Self {
        let client = number / FLOWS_OF_A_CLIENT;
        let [a, b] = ((client % 65_000) as u16).to_be_bytes();
        let (client, server) = match family {
            Family::V4 => (
                Ipv4Addr::new(10, 32, a, b).into(),
                Ipv4Addr::new(10, 128, 0, 1).into(),
            ),
            Family::V6 => (
                Ipv6Addr::new(0xfd0c, 0, 0, 0, 0, 0, 0, u16::from_be_bytes([a, b])).into(),
                Ipv6Addr::new(0xfd0b, 0, 0, 0, 0, 0, 0, 1).into(),
            ),
        };
        // Kinds have ports of their own; numbers come again after four times 65 000 flows.
        let port = 10_000 + kind * 1_000 + (number % FLOWS_OF_A_CLIENT) as u16;
        Self {
            client,
            server,
            port,
        }
    }

    /// A segment of the client's, or of the server's.
    fn segment(&self, of_client: bool, flags: u8) -> Vec<u8> {
        if of_client {
            let header = frame::tcp(self.port, PORT, flags);
            frame::frame(self.client, self.server, 6, &header)
        } else {
            let header = frame::tcp(PORT, self.port, flags);
            frame::frame(self.server, self.client, 6, &header)
        }
    }
}

/// Handshakes that wait for their answer.
#[derive(Default)]
struct Pending {
    /// When the answer comes, and whether the SYN passed.
    waiting: VecDeque<(Instant, Honest, bool)>,
    begun: u64,
    completed: u64,
    ended: u64,
}

impl Pending {
    fn share(&self) -> f64 {
        self.completed as f64 / self.ended as f64
    }
}

struct Flood {
    family: Family,
    programs: Programs,
    /// The next flow of the flood.
    number: u64,
    /// The frame that the flood's are made of.
    frame: Vec<u8>,
}

impl Flood {
    fn new(family: Family, programs: Programs) -> Self {
        let stranger = match family {
            Family::V4 => Ipv4Addr::new(10, 64, 0, 0).into(),
            Family::V6 => Ipv6Addr::new(0xfd0a, 0, 0, 0, 0, 0, 0, 0).into(),
        };
        let mut first = Honest::new(family, 0, 0);
        first.client = stranger;
        Self {
            family,
            programs,
            number: 0,
            frame: first.segment(true, SYN),
        }
    }

    /// Where the source address ends and the source port begins in the frame.
    fn places(&self) -> (usize, usize) {
        match self.family {
            Family::V4 => (30, 34),
            Family::V6 => (38, 54),
        }
    }

    /// SYNs of this many flows, each from another source; every fourth is sent twice, as SYNs
    /// without an answer are. A table that tells flows of one packet from others sees both.
    fn spoofed(&mut self, count: u64) {
        let (address, port) = self.places();
        let first = self.number;
        self.number += count;
        let frames = usize::try_from(count / 4 * 5).unwrap();
        let next = |frame: &mut [u8], at: usize| {
            let at = at as u64;
            let number = first + at / 5 * 4 + (at % 5).saturating_sub(1);
            let source = mixed(number).to_be_bytes();
            // 22 bits: the strangers' prefix.
            frame[address - 3] = 64 | source[5] & 63;
            frame[address - 2..address].copy_from_slice(&source[6..]);
            frame[port..port + 2].copy_from_slice(&(number as u16).to_be_bytes());
        };
        let frame = &mut self.frame;
        let passed = self.programs.flood(Hook::TcIngress, frame, frames, next);
        // Whether the table takes them or not.
        assert_eq!(passed, frames, "the policy allows them");
    }

    /// Whole handshakes of this many flows of one source.
    fn completed(&mut self, count: u64) {
        for _ in 0..count {
            let number = self.number;
            self.number += 1;
            let [.., a, b, c] = (number >> 16).to_be_bytes();
            let (client, server) = match self.family {
                Family::V4 => (
                    Ipv4Addr::new(10, 64, 0, 1).into(),
                    Ipv4Addr::new(10, 128 | a & 63, b, c).into(),
                ),
                Family::V6 => (
                    Ipv6Addr::new(0xfd0a, 0, 0, 0, 0, 0, 0, 1).into(),
                    Ipv6Addr::new(0xfd0b, 0, 0, 0, 0, 0, a.into(), u16::from_be_bytes([b, c]))
                        .into(),
                ),
            };
            let flow = Honest {
                client,
                server,
                port: number as u16,
            };
            self.passes(&flow.segment(true, SYN));
            self.passes(&flow.segment(false, SYN | ACK));
            self.passes(&flow.segment(true, ACK));
        }
    }

    fn passes(&mut self, frame: &[u8]) -> bool {
        let mut frame = frame.to_vec();
        self.programs
            .flood(Hook::TcIngress, &mut frame, 1, |_, _| {})
            == 1
    }

    /// Packets that found their flow, so far.
    fn found(&self) -> u64 {
        let packets = self.programs.counters().packets;
        let established = packets.iter().filter(|c| c.reason == Reason::Established);
        established.map(|c| c.packets).sum()
    }

    fn open(&mut self, flow: Honest) {
        for (of_client, flags) in [(true, SYN), (false, SYN | ACK), (true, ACK)] {
            assert!(self.passes(&flow.segment(of_client, flags)));
        }
    }

    /// A packet of each flow of a kind, from one end or the other; how many found theirs.
    fn probe(&mut self, kind: u16, count: u64, of_client: bool) -> u64 {
        let before = self.found();
        for number in 0..count {
            let flow = Honest::new(self.family, kind, number);
            assert!(self.passes(&flow.segment(of_client, ACK)), "rules allow it");
        }
        self.found() - before
    }

    /// Flows that say something now and then, in a flood of SYNs.
    fn established(&mut self, options: &Options, outcome: &mut Outcome) {
        /// New flows between two looks at the clock.
        const STEP: u64 = 1 << 12;
        let kinds = 0..u16::try_from(options.idle.len()).unwrap();
        for kind in kinds.clone() {
            for number in 0..options.established {
                self.open(Honest::new(self.family, kind, number));
            }
        }
        let mut tally = vec![(0, 0); options.idle.len()];
        let longest = options.idle.iter().max().unwrap() * RATE;
        let start = Instant::now();
        let mut sent = 0;
        while sent < longest {
            self.spoofed(STEP);
            sent += STEP;
            if options.real_time {
                pace(start, sent);
            }
            for (kind, idle) in kinds.clone().zip(options.idle) {
                let every = idle * RATE;
                if sent % every == 0 {
                    let of_client = (sent / every).is_multiple_of(2);
                    let (found, asked) = &mut tally[usize::from(kind)];
                    *found += self.probe(kind, options.established, of_client);
                    *asked += options.established;
                }
            }
        }
        outcome.rate = sent as f64 / start.elapsed().as_secs_f64();
        let shares = tally
            .iter()
            .map(|(found, asked)| *found as f64 / *asked as f64);
        outcome.alive = options.idle.iter().copied().zip(shares).collect();
    }

    /// Honest handshakes in a flood of SYNs.
    fn handshakes(&mut self, options: &Options, outcome: &mut Outcome) {
        let (pending, rate) = self.during(options.handshakes, 100, |flood, count| {
            flood.spoofed(count);
        });
        outcome.handshakes = pending.share();
        outcome.paced[0] = rate;
    }

    /// Honest handshakes while one source opens flow after flow and completes each.
    fn one_source(&mut self, options: &Options, outcome: &mut Outcome) {
        const KIND: u16 = 50;
        self.completed(options.fill);
        for number in 0..options.established {
            self.open(Honest::new(self.family, KIND, number));
        }
        let mut tally = (0, 0);
        let mut next = RATE;
        let mut sent = 0;
        let (pending, rate) = self.during(options.handshakes, 200, |flood, count| {
            flood.completed(count);
            sent += count;
            if sent >= next {
                next += RATE;
                tally.0 += flood.probe(KIND, options.established, true);
                tally.1 += options.established;
            }
        });
        tally.0 += self.probe(KIND, options.established, false);
        tally.1 += options.established;
        outcome.others = pending.share();
        outcome.others_alive = tally.0 as f64 / tally.1 as f64;
        outcome.paced[1] = rate;
    }

    /// Tries handshakes while `more` floods with as many new flows as are due.
    fn during(
        &mut self,
        time: Duration,
        kind: u16,
        mut more: impl FnMut(&mut Self, u64),
    ) -> (Pending, f64) {
        let mut pending = Pending::default();
        let start = Instant::now();
        let mut sent = 0;
        while start.elapsed() < time + ROUND_TRIP {
            let elapsed = start.elapsed();
            let due = |rate: u64| u64::try_from(elapsed.as_nanos()).unwrap() * rate / 1_000_000_000;
            // As long as the last ones wait for their answers, too. Not too many at once: what a
            // busy machine missed comes later than it should, not in one burst.
            let count = (due(RATE) - sent).min(256) / 4 * 4;
            more(self, count);
            sent += count;
            while elapsed < time && pending.begun < due(HANDSHAKES) {
                let flow = Honest::new(
                    self.family,
                    kind % 50,
                    pending.begun + u64::from(kind) * 1_000,
                );
                pending.begun += 1;
                let passed = self.passes(&flow.segment(true, SYN));
                let answer = Instant::now() + ROUND_TRIP;
                pending.waiting.push_back((answer, flow, passed));
            }
            while let Some((at, flow, passed)) = pending.waiting.front().copied() {
                if Instant::now() < at {
                    break;
                }
                pending.waiting.pop_front();
                pending.ended += 1;
                // A SYN's answer passes only where its flow is known.
                let answered = self.passes(&flow.segment(false, SYN | ACK));
                let acknowledged = self.passes(&flow.segment(true, ACK));
                pending.completed += u64::from(passed && answered && acknowledged);
            }
            if count == 0 {
                thread::sleep(Duration::from_micros(200));
            }
        }
        let rate = sent as f64 / start.elapsed().as_secs_f64();
        (pending, rate)
    }
}

/// Waits until as many new flows are due.
fn pace(start: Instant, sent: u64) {
    let due = Duration::from_nanos(sent * 1_000_000_000 / RATE);
    thread::sleep(due.saturating_sub(start.elapsed()));
}

/// Other bits for each number (splitmix).
pub(super) fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
