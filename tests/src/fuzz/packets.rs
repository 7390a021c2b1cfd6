//! Packets in sequence, through parser, flow table and image.

use std::{
    cell::Cell,
    collections::{HashMap, HashSet},
    net::IpAddr,
    rc::Rc,
};

use enforcer::{
    compile::Image,
    policy::{model::FlowQuery, reference},
};
use enforcer_common::{
    flow::{self, Clock, FlowSlot as _, key_of},
    judge::Scene,
    packet::{Fragment, Kind, Link, Packet, Tuple, tcp},
    verdict::{Outcome, Reason},
    wire::{FlowEntry, FlowKey, FragmentEntry, FragmentKey},
};

use super::{
    oracle::{self, Reading},
    script::{self, Compiled, ENVIRONMENT, POLICIES},
};
use crate::{
    frame,
    host::{self, Entry, HZ, HashFlows, Moment, Seen},
};

/// Runs a script; panics where something does not hold.
pub fn run(data: &[u8]) {
    let flows = HashFlows::default();
    let mut seconds = 0;
    let mut firsts = HashSet::new();
    for step in script::decode(data) {
        seconds += step.waited;
        Step::new(&step, &flows, seconds).check(&mut firsts);
    }
}

/// The datagrams whose first fragments have passed: source, destination, identification, protocol
/// (0 for IPv6), and the hook.
type Firsts = HashSet<(IpAddr, IpAddr, u32, u8, bool)>;

/// A packet and the state it meets.
struct Step<'a> {
    step: &'a script::Step<'a>,
    compiled: &'static Compiled,
    image: &'static Image,
    flows: &'a HashFlows,
    clock: Clock,
    time: Moment,
}

/// What the tables hold.
#[derive(Debug, PartialEq)]
struct Table {
    flows: HashMap<FlowKey, FlowEntry>,
    fragments: HashMap<FragmentKey, FragmentEntry>,
}

fn snapshot(flows: &HashFlows) -> Table {
    let entries = flows.entries.borrow();
    Table {
        flows: entries.iter().map(|(k, e)| (*k, e.load())).collect(),
        fragments: flows.fragments.borrow().clone(),
    }
}

fn restored(table: &Table) -> HashFlows {
    let flows = HashFlows::default();
    let entry = |(k, e): (&FlowKey, &FlowEntry)| (*k, Entry(Rc::new(Cell::new(*e))));
    flows
        .entries
        .replace(table.flows.iter().map(entry).collect());
    flows.fragments.replace(table.fragments.clone());
    flows
}

impl<'a> Step<'a> {
    fn new(step: &'a script::Step<'a>, flows: &'a HashFlows, seconds: u64) -> Self {
        let compiled = &POLICIES[step.policy];
        Self {
            step,
            compiled,
            image: &compiled.images[step.swaps],
            flows,
            // Not 0: clocks that start there hide subtractions.
            clock: Clock {
                now: 1_000_000 + seconds * u64::from(HZ),
                hz: HZ,
            },
            time: Moment {
                boot: 10_000 + u32::try_from(seconds).unwrap(),
                unix: 1_800_000_000 + seconds,
            },
        }
    }

    fn see(&self, flows: &HashFlows, link: &Link, bytes: &[u8]) -> Seen {
        let scene = Scene {
            link: *link,
            clock: self.clock,
            time: self.time,
        };
        host::see(self.image, flows, &scene, bytes)
    }

    /// Judges other bytes in the same place, on a copy of the flows.
    fn judge(&self, table: &Table, link: &Link, bytes: &[u8]) -> Seen {
        self.see(&restored(table), link, bytes)
    }

    /// Whether every address is guarded and every segment enforces.
    fn strict(&self) -> bool {
        matches!(self.step.policy, 0 | 5)
    }

    fn check(&self, firsts: &mut Firsts) {
        let (link, bytes) = (&self.step.link, self.step.bytes);
        let before = snapshot(self.flows);
        let seen = self.see(self.flows, link, bytes);
        let after = snapshot(self.flows);
        let reading = oracle::read(bytes, link);

        self.reading(&seen, reading.as_ref());
        self.verdict(&seen, reading.as_ref(), &before);
        self.fragments(&seen, firsts);
        let decision = seen.decision;
        if !decision.outcome.passes() {
            assert_eq!(before, after, "what is denied leaves no trace");
        }
        if after.flows.len() != before.flows.len() {
            assert!(seen.form.is_ok(), "only sound packets open flows");
            assert_eq!(
                after.flows.len(),
                before.flows.len() + 1,
                "one flow a packet"
            );
            assert_ne!(decision.reason, Reason::Essential);
        }
        if let Some(reading) = &reading {
            self.padding(&seen, reading, &before);
            self.same_elsewhere(&seen, &before);
        }
        // A retransmission, in the state that the packet leaves.
        let again = self.judge(&after, link, bytes).decision;
        assert_eq!(
            again.outcome.passes(),
            decision.outcome.passes(),
            "{decision:?}, then {again:?}"
        );
        if !decision.outcome.passes() {
            assert_eq!(again, decision);
        }
        if seen.form.is_ok() && decision.outcome.passes() {
            self.reply(&seen, &after);
        }
    }

    /// A later fragment passes as part of a datagram whose first one did, at the same hook.
    fn fragments(&self, seen: &Seen, firsts: &mut Firsts) {
        let packet = &seen.packet;
        if seen.form.is_err() || packet.fragment == Fragment::Whole {
            return;
        }
        let tuple = &packet.tuple;
        let (source, destination) = oracle::addresses(tuple);
        let protocol = if tuple.v6 { 0 } else { tuple.protocol };
        let hook = self.step.link.ingress;
        let datagram = (source, destination, packet.fragment_id, protocol, hook);
        let passes = seen.decision.outcome.passes();
        if packet.fragment == Fragment::First {
            if passes && tuple.kind != Kind::IcmpError {
                firsts.insert(datagram);
            }
        } else if seen.decision.reason != Reason::Fragment {
            assert!(firsts.contains(&datagram), "follows nothing: {packet:?}");
        }
    }

    /// The parser against the second reading.
    fn reading(&self, seen: &Seen, reading: Option<&Reading<'_>>) {
        let tuple = &seen.packet.tuple;
        if seen.form.is_ok() {
            let reading = reading.expect("what is sound can be read");
            // A later fragment has taken over what its first one said.
            if seen.packet.fragment != Fragment::Later {
                assert!(reading.agrees(tuple), "{tuple:?} is not {reading:?}");
            }
        } else if let Some(reading) = reading {
            assert!(!reading.must_parse(), "{:?} of {reading:?}", seen.form);
        }
        if seen.packet.addresses && seen.form.is_ok() {
            let back = Tuple {
                source: tuple.destination,
                destination: tuple.source,
                source_port: tuple.destination_port,
                destination_port: tuple.source_port,
                ..*tuple
            };
            if !matches!(tuple.kind, Kind::IcmpRequest | Kind::IcmpReply) {
                let (one, from_low) = key_of(tuple, seen.packet.ifindex);
                let (other, from_high) = key_of(&back, seen.packet.ifindex);
                assert_eq!(one, other, "a flow has one key");
                let same_ends =
                    tuple.source == back.source && tuple.source_port == back.source_port;
                assert_eq!(from_low == from_high, same_ends, "and two ends");
            }
        }
    }

    /// The verdict against the reference interpreter.
    fn verdict(&self, seen: &Seen, reading: Option<&Reading<'_>>, before: &Table) {
        let decision = seen.decision;
        let reason = decision.reason;
        if reason == Reason::Essential {
            assert_eq!(decision.outcome, Outcome::Allowed);
            let by_ip = reading.is_some_and(|r| seen.form.is_ok() && r.essential(&self.step.link));
            assert!(
                by_ip || essential_below_ip(&seen.packet),
                "not essential: {reading:?}"
            );
            return;
        }
        if let Err(form) = seen.form {
            assert_eq!(reason, form);
        }
        let pair = seen
            .packet
            .addresses
            .then(|| oracle::addresses(&seen.packet.tuple));
        let link = &self.step.link;
        let own = |(source, _): (IpAddr, IpAddr)| {
            link.ingress && !link.looped && ENVIRONMENT.host_addresses.contains(&source)
        };
        match reason {
            Reason::Malformed
            | Reason::ExtensionHeader
            | Reason::VlanNested
            | Reason::Ethertype
            | Reason::SourceRoute => {
                assert_eq!(seen.form, Err(reason));
                self.form(seen);
            }
            Reason::Fragment => {
                assert!(seen.form.is_err() || seen.packet.fragment == Fragment::Later);
                self.form(seen);
            }
            Reason::Martian => {
                assert!(
                    pair.is_some_and(|(s, d)| oracle::martian(s, d)),
                    "{pair:?} is not martian"
                );
                self.form(seen);
            }
            Reason::Spoofed => {
                let (source, destination) = pair.expect("its addresses were read");
                let name = &ENVIRONMENT.interfaces[&link.slot];
                let elsewhere = link.ingress
                    && !link.looped
                    && reference::spoofed(&self.compiled.policy, &ENVIRONMENT, source, name);
                assert!(
                    elsewhere || own((source, destination)),
                    "{pair:?} at {name}"
                );
                self.form(seen);
            }
            Reason::NoFlow => {
                assert_eq!(seen.packet.tuple.kind, Kind::Tcp);
                self.form(seen);
            }
            Reason::IcmpUnrelated => {
                assert_eq!(seen.packet.tuple.kind, Kind::IcmpError);
                self.form(seen);
            }
            // A session that has lasted as long as it may; until then it was a flow.
            Reason::Expired => {
                let subject = self.subject(&seen.packet);
                let key = key_of(subject, seen.packet.ifindex).0;
                let entry = before.flows.get(&key).expect("there was a flow");
                assert_ne!(entry.flags & flow::SESSION, 0);
                assert!(!decision.outcome.passes());
            }
            Reason::Established | Reason::Related | Reason::Revoked => {
                let subject = self.subject(&seen.packet);
                let entry = before.flows.get(&key_of(subject, seen.packet.ifindex).0);
                let entry = entry.expect("there was a flow");
                let current = entry.generation == self.image.generation();
                match reason {
                    Reason::Revoked => assert!(!current && !decision.outcome.passes()),
                    Reason::Established => assert!(current && decision.outcome == Outcome::Allowed),
                    _ => assert_eq!(decision.outcome, Outcome::Allowed),
                }
            }
            Reason::RuleAllow | Reason::RuleDeny | Reason::DefaultDeny | Reason::Unsegmented => {
                self.rules(seen);
            }
            other => panic!("{other:?}"),
        }
        if self.strict() && decision.outcome.passes() {
            let (source, destination) = pair.expect("what was not read cannot pass");
            assert!(!oracle::martian(source, destination), "martian: {pair:?}");
            assert!(!own((source, destination)), "from this host: {pair:?}");
        }
        // Spelled out for the two policies whose meaning needs no interpreter.
        match self.step.policy {
            0 => assert_eq!(decision.outcome, Outcome::Denied, "deny-all: {decision:?}"),
            1 => assert_ne!(decision.outcome, Outcome::Denied, "observe: {decision:?}"),
            _ => {}
        }
    }

    fn subject<'p>(&self, packet: &'p Packet) -> &'p Tuple {
        if packet.tuple.kind == Kind::IcmpError {
            &packet.inner
        } else {
            &packet.tuple
        }
    }

    /// A denial of form has the strength that the reference gives it.
    fn form(&self, seen: &Seen) {
        let pair = seen
            .packet
            .addresses
            .then(|| oracle::addresses(&seen.packet.tuple));
        let (outcome, guard) = reference::judge_form(&self.compiled.policy, &ENVIRONMENT, pair);
        assert_eq!(
            seen.decision.outcome,
            outcome_of(outcome),
            "{:?}",
            seen.decision
        );
        assert_eq!(seen.decision.segment, guard.map_or(u32::MAX, |g| g.0));
    }

    /// A verdict of rules is the reference's on the flow that the packet opens, or may be part of.
    fn rules(&self, seen: &Seen) {
        let tuple = self.subject(&seen.packet);
        let (source, destination) = oracle::addresses(tuple);
        let judge = |(src, dst): (IpAddr, IpAddr), selector| {
            let query = FlowQuery {
                src,
                dst,
                protocol: tuple.protocol,
                selector,
            };
            let policy = &self.compiled.policy;
            let judgement = reference::judge(policy, &ENVIRONMENT, &query, self.time.unix);
            (
                outcome_of(judgement.outcome),
                judgement.rule.map_or(u32::MAX, |r| r.0),
                judgement.guard.map_or(u32::MAX, |g| g.0),
            )
        };
        let decision = seen.decision;
        let got = (decision.outcome, decision.rule, decision.segment);
        let mut may_be = vec![judge((source, destination), tuple.selector)];
        let syn = tuple.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN;
        let may_be_reply = tuple.kind != Kind::Tcp || !syn;
        if may_be_reply && !multicast(destination) {
            let selector = match tuple.kind {
                Kind::IcmpReply if tuple.selector >> 8 == 0 => 8 << 8,
                Kind::IcmpReply => (tuple.selector >> 8).wrapping_sub(1) << 8,
                _ => tuple.source_port,
            };
            may_be.push(judge((destination, source), selector));
        }
        assert!(
            may_be.contains(&got),
            "{decision:?} of {tuple:?}, not {may_be:?}"
        );
    }

    /// What lies behind the packet's own end changes nothing.
    fn padding(&self, seen: &Seen, reading: &Reading<'_>, before: &Table) {
        let (link, bytes) = (&self.step.link, self.step.bytes);
        if reading.merged {
            return; // it has no end of its own
        }
        let Some(packet) = bytes.get(..reading.end) else {
            return;
        };
        // Headers of what could be, if it were looked at.
        let padded = [
            packet,
            &[6, 0, 0, 80, 0, 80, 17, 0x45, 0, 0, 0, 0x10, 2, 1, 4, 0],
        ]
        .concat();
        for other in [packet, &padded] {
            let judged = self.judge(before, link, other);
            assert_eq!(judged.form, seen.form);
            assert_eq!(judged.decision, seen.decision, "with other padding");
        }
    }

    /// The same packet with its tag in the other place, or without Ethernet header.
    fn same_elsewhere(&self, seen: &Seen, before: &Table) {
        let (link, bytes) = (&self.step.link, self.step.bytes);
        if !link.ethernet || bytes.len() < 18 {
            return;
        }
        let ethertype = u16::from_be_bytes([bytes[12], bytes[13]]);
        if let Some(tci) = link.vlan {
            let tagged = frame::tagged(bytes, &[(0x8100, tci)]);
            let inside = Link {
                vlan: None,
                ..*link
            };
            let judged = self.judge(before, &inside, &tagged);
            assert_eq!(judged.decision, seen.decision, "with the tag in the packet");
        } else if ethertype == 0x0800 || ethertype == 0x86dd {
            let bare = Link {
                ethernet: false,
                protocol: ethertype,
                ..*link
            };
            let judged = self.judge(before, &bare, &bytes[14..]);
            assert_eq!(judged.decision, seen.decision, "without Ethernet header");
        }
    }

    /// The far end may answer what passed.
    fn reply(&self, seen: &Seen, after: &Table) {
        let tuple = &seen.packet.tuple;
        let opens = matches!(
            tuple.kind,
            Kind::Tcp | Kind::Ports | Kind::IcmpRequest | Kind::Other
        );
        let (source, destination) = oracle::addresses(tuple);
        // What a denial of form lets pass is no flow, nor is what no default deny may break.
        let flow = matches!(
            seen.decision.reason,
            Reason::RuleAllow
                | Reason::RuleDeny
                | Reason::DefaultDeny
                | Reason::Unsegmented
                | Reason::Established
        );
        if !opens || !flow || multicast(source) || multicast(destination) {
            return;
        }
        let (key, _) = key_of(tuple, seen.packet.ifindex);
        assert!(
            after.flows.contains_key(&key),
            "{tuple:?} passed and left no flow"
        );
        let (from, to) = (tuple.destination_port, tuple.source_port);
        let payload = match (tuple.kind, tuple.protocol) {
            (Kind::Tcp, _) if tuple.tcp_flags & tcp::ACK == 0 => {
                frame::tcp(from, to, frame::SYN | frame::ACK)
            }
            (Kind::Tcp, _) => frame::tcp(from, to, frame::ACK),
            (Kind::Ports, _) => [frame::udp(from, to), vec![0; 8]].concat(),
            (Kind::IcmpRequest, 1) => {
                let kind = if tuple.selector >> 8 == 8 { 0 } else { 14 };
                frame::icmp(kind, 0, tuple.source_port)
            }
            (Kind::IcmpRequest, _) => frame::icmp(129, 0, tuple.source_port),
            _ => vec![0; 24],
        };
        let link = Link {
            ethernet: true,
            vlan: None,
            ingress: !self.step.link.ingress,
            looped: false,
            ..self.step.link
        };
        let mine = link.ingress && ENVIRONMENT.host_addresses.contains(&destination);
        let name = &ENVIRONMENT.interfaces[&link.slot];
        let policy = &self.compiled.policy;
        let forged = link.ingress && reference::spoofed(policy, &ENVIRONMENT, destination, name);
        if mine || forged || oracle::martian(destination, source) {
            return; // from addresses that no reply has there
        }
        let bytes = frame::frame(destination, source, tuple.protocol, &payload);
        let answer = self.judge(after, &link, &bytes);
        assert!(
            answer.decision.outcome.passes(),
            "{:?} of the answer to {tuple:?}, which got {:?}",
            answer.decision,
            seen.decision
        );
        if answer.decision.reason != Reason::Essential {
            assert_eq!(answer.decision.reason, Reason::Established);
        }
    }
}

/// Group or limited broadcast.
fn multicast(ip: IpAddr) -> bool {
    ip.is_multicast() || ip == IpAddr::from([255, 255, 255, 255])
}

fn essential_below_ip(packet: &Packet) -> bool {
    matches!(
        packet.ethertype,
        0x0806 | 0x88cc | 0x888e | 0x8809 | 0x88f7 | 0..=1535
    )
}

/// The same outcome in the words of the image.
pub fn outcome_of(of: reference::Outcome) -> Outcome {
    match of {
        reference::Outcome::Allowed => Outcome::Allowed,
        reference::Outcome::Denied => Outcome::Denied,
        reference::Outcome::WouldDeny => Outcome::WouldDeny,
        reference::Outcome::Off => Outcome::Off,
    }
}
