//! Live flows, judged by an image as the kernel would judge their next packets.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use enforcer_common::{
    decide::{Decision, Query, Time, decide},
    flow::{CLOSING, Change, Clock, FlowSlot, FlowTable, OPENER_IS_LOW, REPLIED, age, fresh},
    image::Words,
    judge::{Scene, judge},
    packet::{Kind, Link, Packet, Tuple, tcp},
    table::Flow,
    verdict::{Outcome, Reason},
    wire::{FlowEntry, FlowKey, FragmentEntry, FragmentKey},
};

use crate::{compile::segments_of, policy::model::Policy};

use super::{
    FLOWS, Version, because, services,
    types::{ChangedFlow, FlowChanges, LiveFlow},
};

/// When flows are judged, and where.
#[derive(Clone, Debug, Default)]
pub struct Moment {
    /// Unix seconds.
    pub unix: u64,
    /// Seconds since boot.
    pub boot: u32,
    /// Low half of jiffies, and how many there are in a second.
    pub jiffies: (u32, u32),
    /// Slots of interfaces, by their kernel index.
    pub slots: BTreeMap<u32, u32>,
}

impl Time for &Moment {
    fn boot(&self) -> u32 {
        self.boot
    }

    fn unix(&self) -> u64 {
        self.unix
    }
}

impl Moment {
    fn clock(&self) -> Clock {
        Clock {
            now: u64::from(self.jiffies.0),
            hz: self.jiffies.1,
        }
    }

    /// Whether a flow still speaks for its packets.
    pub fn is_live(&self, flow: &Flow) -> bool {
        fresh(&flow.entry, End::of(flow).protocol, &self.clock())
    }
}

/// A table of one flow, which it keeps as it is.
struct One {
    key: FlowKey,
    entry: Cell<FlowEntry>,
}

impl<'a> FlowTable for &'a One {
    type Slot = &'a One;

    fn find(&self, key: &FlowKey) -> Option<&'a One> {
        (*key == self.key).then_some(*self)
    }

    fn insert(&self, _: &FlowKey, _: &FlowEntry) -> bool {
        true
    }

    fn fragment(&self, _: &FragmentKey) -> Option<FragmentEntry> {
        None
    }

    fn insert_fragment(&self, _: &FragmentKey, _: &FragmentEntry) -> bool {
        true
    }
}

impl FlowSlot for &One {
    fn load(&self) -> FlowEntry {
        self.entry.get()
    }

    fn touch(&self, _: u64, _: u32) {}

    fn change(&self, _: &Change) {}
}

/// What a key says.
struct End {
    low: [u32; 4],
    high: [u32; 4],
    low_port: u16,
    high_port: u16,
    protocol: u8,
    v6: bool,
    scope: u32,
}

impl End {
    fn of(flow: &Flow) -> Self {
        let key = &flow.key;
        // The last pair of either family: ports, and what is left.
        let pair = key.pair6(4);
        let (ports, rest) = (pair as u32, (pair >> 32) as u32);
        Self {
            low: key.end(true),
            high: key.end(false),
            low_port: (ports >> 16) as u16,
            high_port: ports as u16,
            protocol: rest as u8,
            v6: key.is_v6(),
            scope: rest >> 9,
        }
    }

    fn icmp(&self) -> bool {
        (self.v6, self.protocol) == (false, 1) || (self.v6, self.protocol) == (true, 58)
    }

    /// A packet of the flow from one of its ends.
    fn tuple(&self, flow: &Flow, from_low: bool) -> Tuple {
        let (source, destination) = if from_low {
            (self.low, self.high)
        } else {
            (self.high, self.low)
        };
        let tuple = Tuple {
            source,
            destination,
            protocol: self.protocol,
            v6: self.v6,
            ..Tuple::EMPTY
        };
        if self.icmp() {
            // The requester is the low end; the type asked for is in the other one's place.
            let (kind, selector) = match (from_low, self.high_port) {
                (true, _) => (Kind::IcmpRequest, flow.entry.selector as u16),
                (false, 8) => (Kind::IcmpReply, 0),
                (false, request) => (Kind::IcmpReply, request.wrapping_add(1) << 8),
            };
            return Tuple {
                source_port: self.low_port,
                destination_port: self.low_port,
                kind,
                selector,
                ..tuple
            };
        }
        let (source_port, destination_port) = if from_low {
            (self.low_port, self.high_port)
        } else {
            (self.high_port, self.low_port)
        };
        let (kind, tcp_flags, selector) = match self.protocol {
            6 => (Kind::Tcp, tcp::ACK, destination_port),
            17 | 132 | 136 => (Kind::Ports, 0, destination_port),
            _ => (Kind::Other, 0, 0),
        };
        Tuple {
            source_port,
            destination_port,
            kind,
            tcp_flags,
            selector,
            ..tuple
        }
    }
}

/// What an image says of the next packet of a flow, whoever sends it: of the opener's, or of the
/// other end's if only that is denied.
pub(super) fn next<W: Words + ?Sized>(image: &W, flow: &Flow, moment: &Moment) -> Decision {
    let end = End::of(flow);
    let opener_is_low = flow.entry.flags & OPENER_IS_LOW != 0;
    let of = |from_low| packet(image, flow, &end, from_low, moment);
    let opener = of(opener_is_low);
    if opener.outcome.passes() && flow.entry.flags & REPLIED != 0 {
        let other = of(!opener_is_low);
        if !other.outcome.passes() {
            return other;
        }
    }
    if opener.outcome.passes() || opener.reason != Reason::Revoked {
        return opener;
    }
    // Not why it was denied, but that it was allowed before: rules say why.
    let tuple = end.tuple(flow, opener_is_low);
    let query = Query {
        source: tuple.source_address(),
        destination: tuple.destination_address(),
        protocol: end.protocol,
        selector: flow.entry.selector as u16,
    };
    let rules = decide(image, &query, moment.unix);
    if rules.outcome == opener.outcome {
        rules
    } else {
        opener
    }
}

fn packet<W: Words + ?Sized>(
    image: &W,
    flow: &Flow,
    end: &End,
    from_low: bool,
    moment: &Moment,
) -> Decision {
    let mut entry = flow.entry;
    // Admitted by another policy, so that it is judged.
    entry.generation = enforcer_common::decide::generation(image).wrapping_add(1);
    // The table keeps the low half of it.
    let one = One {
        key: flow.key,
        entry: Cell::new(entry),
    };
    // Where its packets come in they are judged first; what leaves is asked less.
    let arrived = entry.arrived.get(usize::from(from_low)).copied();
    let arrived = arrived.and_then(|ifindex| Some((ifindex, *moment.slots.get(&ifindex)?)));
    let (ifindex, slot) = arrived.unwrap_or((0, 0));
    let mut packet = Packet {
        tuple: end.tuple(flow, from_low),
        addresses: true,
        ifindex: if end.scope != 0 { end.scope } else { ifindex },
        ..Packet::EMPTY
    };
    let scene = Scene {
        link: Link {
            ethernet: true,
            protocol: 0,
            vlan: None,
            ingress: arrived.is_some(),
            ifindex,
            slot,
            gso: false,
            looped: false,
        },
        clock: Clock {
            // Whether it is live was asked before.
            now: entry.last_seen,
            hz: moment.jiffies.1.max(1),
        },
        time: moment,
    };
    judge(image, &&one, &mut packet, &scene, Ok(())).decision
}

/// The things with most bytes.
struct Busiest<T> {
    most: usize,
    things: Vec<(u64, T)>,
    seen: u64,
}

impl<T> Busiest<T> {
    fn new(most: usize) -> Self {
        Self {
            most,
            things: Vec::new(),
            seen: 0,
        }
    }

    fn push(&mut self, bytes: u64, thing: T) {
        self.seen += 1;
        self.things.push((bytes, thing));
        if self.things.len() > 2 * self.most {
            self.cut();
        }
    }

    fn cut(&mut self) {
        self.things
            .sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
        self.things.truncate(self.most);
    }

    fn finish(mut self) -> (u64, Vec<T>) {
        self.cut();
        (
            self.seen,
            self.things.into_iter().map(|(_, thing)| thing).collect(),
        )
    }
}

/// Finds the live flows that a change of policy changes, one by one.
pub struct Changes<'a> {
    live: Version<'a>,
    new: Version<'a>,
    moment: &'a Moment,
    judged: u64,
    cut: Busiest<(Flow, Decision, Decision)>,
    would_deny: Busiest<(Flow, Decision, Decision)>,
}

impl<'a> Changes<'a> {
    /// None was seen yet.
    pub fn new(live: Version<'a>, new: Version<'a>, moment: &'a Moment) -> Self {
        Self {
            live,
            new,
            moment,
            judged: 0,
            cut: Busiest::new(FLOWS),
            would_deny: Busiest::new(FLOWS),
        }
    }

    /// The next entry of the table.
    pub fn see(&mut self, flow: &Flow) {
        if !self.moment.is_live(flow) {
            return;
        }
        self.judged += 1;
        let then = next(self.new.image.words(), flow, self.moment);
        let list = match then.outcome {
            Outcome::Allowed | Outcome::Off => return,
            Outcome::Denied => &mut self.cut,
            Outcome::WouldDeny => &mut self.would_deny,
        };
        let now = next(self.live.image.words(), flow, self.moment);
        // What has been cut already, or is recorded already, does not change.
        if now.outcome.passes() && now.outcome != then.outcome {
            list.push(flow.bytes, (*flow, now, then));
        }
    }

    /// All were seen.
    pub fn finish(self) -> FlowChanges {
        let (live, new, moment) = (self.live, self.new, self.moment);
        let list = |busiest: Busiest<(Flow, Decision, Decision)>| {
            let (total, flows) = busiest.finish();
            let named = name(
                live.policy,
                flows.iter().map(|(f, now, _)| (*f, *now)),
                moment,
            );
            let then = flows.iter().map(|(_, _, then)| because(new.policy, then));
            let flows = named.into_iter().zip(then);
            let flows = flows.map(|(flow, then)| ChangedFlow { flow, then });
            (total, flows.collect())
        };
        let (cut, cut_flows) = list(self.cut);
        let (would_deny, would_deny_flows) = list(self.would_deny);
        FlowChanges {
            judged: self.judged,
            cut,
            would_deny,
            cut_flows,
            would_deny_flows,
            error: None,
        }
    }
}

/// Collects live flows for a list.
pub struct Listing<'a> {
    live: Version<'a>,
    moment: &'a Moment,
    total: u64,
    flows: Busiest<Flow>,
}

impl<'a> Listing<'a> {
    /// Of at most so many flows.
    pub fn new(live: Version<'a>, moment: &'a Moment, most: usize) -> Self {
        Self {
            live,
            moment,
            total: 0,
            flows: Busiest::new(most),
        }
    }

    /// The next entry of the table, and whether a flow from one address to the other is wanted.
    pub fn see(&mut self, flow: &Flow, wanted: impl Fn(IpAddr, IpAddr) -> bool) {
        if !self.moment.is_live(flow) {
            return;
        }
        self.total += 1;
        let (from, to) = ends(flow);
        if wanted(from, to) {
            self.flows.push(flow.bytes, *flow);
        }
    }

    /// Live flows in all, those wanted, and the busiest of these.
    pub fn finish(self) -> (u64, u64, Vec<LiveFlow>) {
        let (matched, flows) = self.flows.finish();
        let judged = flows.into_iter().map(|flow| {
            let now = next(self.live.image.words(), &flow, self.moment);
            (flow, now)
        });
        let named = name(self.live.policy, judged, self.moment);
        (self.total, matched, named)
    }
}

/// The opener's address and the other end's.
fn ends(flow: &Flow) -> (IpAddr, IpAddr) {
    let opener_is_low = flow.entry.flags & OPENER_IS_LOW != 0;
    let address = |low| address(flow.key.end(low), flow.key.is_v6());
    (address(opener_is_low), address(!opener_is_low))
}

pub(crate) fn address(words: [u32; 4], v6: bool) -> IpAddr {
    let bits = words
        .iter()
        .fold(0u128, |bits, word| bits << 32 | u128::from(*word));
    if v6 {
        Ipv6Addr::from_bits(bits).into()
    } else {
        Ipv4Addr::from_bits(bits as u32).into()
    }
}

/// Flows in names, by what is said of each.
fn name(
    policy: &Policy,
    flows: impl Iterator<Item = (Flow, Decision)>,
    moment: &Moment,
) -> Vec<LiveFlow> {
    let flows: Vec<(Flow, Decision)> = flows.collect();
    let addresses: BTreeSet<IpAddr> = flows
        .iter()
        .flat_map(|(flow, _)| <[IpAddr; 2]>::from(ends(flow)))
        .collect();
    let segments = segments_of(policy, addresses.into_iter());
    let names = |ip: IpAddr| -> Vec<String> {
        let ids = segments.get(&ip).into_iter().flatten();
        let found = ids.filter_map(|id| policy.segment(*id));
        found.map(|segment| segment.name.clone()).collect()
    };
    let one = |(flow, now): &(Flow, Decision)| {
        let (from, to) = ends(flow);
        let end = End::of(flow);
        let entry = &flow.entry;
        let ports = matches!(end.protocol, 6 | 17 | 132 | 136);
        let opener_is_low = entry.flags & OPENER_IS_LOW != 0;
        let tuple = end.tuple(flow, opener_is_low);
        let port = |port: u16| ports.then_some(port);
        let selector = entry.selector as u16;
        let service = services::point(end.v6, end.protocol, selector);
        let state = if entry.flags & CLOSING != 0 {
            "closing"
        } else if entry.flags & REPLIED != 0 {
            "answered"
        } else {
            "one_way"
        };
        let (jiffies, hz) = moment.jiffies;
        let age = age(u64::from(jiffies), entry.last_seen as u32);
        LiveFlow {
            from,
            from_port: port(tuple.source_port),
            to,
            to_port: port(tuple.destination_port),
            protocol: protocol(&end, &service),
            service,
            ifindex: (end.scope != 0).then_some(end.scope),
            state: state.to_owned(),
            generation: entry.generation,
            idle: age.checked_div(hz),
            packets: flow.packets,
            bytes: flow.bytes,
            from_segments: names(from),
            to_segments: names(to),
            now: because(policy, now),
        }
    };
    flows.iter().map(one).collect()
}

/// `tcp`, `icmp`; of those without ports or types all there is to say.
fn protocol(end: &End, service: &str) -> String {
    match service.split_once('/') {
        Some((word, _)) if word != "proto" => word.to_owned(),
        _ if end.icmp() => service.to_owned(),
        _ => service.to_owned(),
    }
}

#[cfg(test)]
mod tests;
