use enforcer_common::{
    decide::At,
    image::header,
    packet::{self},
};
use proptest::prelude::*;

use super::*;
use crate::{
    compile::{Image, Options, compile},
    policy::{
        arbitrary,
        model::{Environment, FlowQuery},
    },
    settings::Settings,
};

/// Keeps the flow that is entered.
#[derive(Default)]
struct Entered(Cell<Option<(FlowKey, FlowEntry)>>);

impl<'a> FlowTable for &'a Entered {
    type Slot = &'a One;

    fn find(&self, _: &FlowKey) -> Option<&'a One> {
        None
    }

    fn insert(&self, key: &FlowKey, entry: &FlowEntry) -> bool {
        self.0.set(Some((*key, *entry)));
        true
    }

    fn fragment(&self, _: &FragmentKey) -> Option<FragmentEntry> {
        None
    }

    fn insert_fragment(&self, _: &FragmentKey, _: &FragmentEntry) -> bool {
        true
    }
}

/// Whether a packet from there is denied for its form, which is not that of a reply.
fn on_no_link(ip: IpAddr) -> bool {
    let odd = match ip {
        IpAddr::V4(ip) => matches!(ip.octets()[0], 0 | 127),
        IpAddr::V6(ip) => ip.to_bits() <= 1,
    };
    odd || crate::policy::model::is_multicast(ip)
}

fn words(ip: IpAddr) -> [u32; 4] {
    let bits = match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    };
    [96, 64, 32, 0].map(|shift| (bits >> shift) as u32)
}

/// A packet that opens the flow, as a parser would have it; `None` if none does.
fn opening(query: &FlowQuery, port: u16) -> Option<Packet> {
    let v6 = query.dst.is_ipv6();
    let (kind, source_port, destination_port) = match (query.protocol, v6) {
        (6, _) => (packet::Kind::Tcp, port, query.selector),
        (17 | 132 | 136, _) => (packet::Kind::Ports, port, query.selector),
        (1, false) => match query.selector >> 8 {
            8 | 13 => (packet::Kind::IcmpRequest, port, port),
            _ => return None,
        },
        (58, true) => match query.selector >> 8 {
            128 => (packet::Kind::IcmpRequest, port, port),
            _ => return None,
        },
        _ => (packet::Kind::Other, 0, 0),
    };
    Some(Packet {
        tuple: Tuple {
            source: words(query.src),
            destination: words(query.dst),
            source_port,
            destination_port,
            protocol: query.protocol,
            v6,
            kind,
            tcp_flags: if query.protocol == 6 { tcp::SYN } else { 0 },
            selector: query.selector,
        },
        addresses: true,
        ..Packet::EMPTY
    })
}

/// What the other end sends back.
fn answer(packet: &Packet) -> Packet {
    let t = packet.tuple;
    let reply = match t.selector >> 8 {
        8 => 0,
        request => request + 1,
    };
    let (kind, selector) = match t.kind {
        packet::Kind::IcmpRequest => (packet::Kind::IcmpReply, reply << 8),
        kind => (
            kind,
            if kind == packet::Kind::Other {
                0
            } else {
                t.source_port
            },
        ),
    };
    Packet {
        tuple: Tuple {
            source: t.destination,
            destination: t.source,
            source_port: t.destination_port,
            destination_port: t.source_port,
            kind,
            selector,
            ..t
        },
        ..*packet
    }
}

fn scene<T>(time: T) -> Scene<T> {
    Scene {
        link: Link {
            ethernet: true,
            protocol: 0,
            vlan: None,
            ingress: false,
            ifindex: 0,
            slot: 0,
            gso: false,
            looped: false,
        },
        clock: Clock { now: 50, hz: 100 },
        time,
    }
}

fn image(policy: &Policy, env: &Environment, generation: u32) -> Image {
    let options = Options {
        generation,
        ..Options::default()
    };
    compile(policy, env, &options).unwrap()
}

/// The flow that a packet opens.
fn opened(image: &Image, packet: &Packet, unix: u64) -> Option<Flow> {
    let table = Entered::default();
    let mut packet = *packet;
    let scene = scene(At(unix));
    judge(image.words(), &&table, &mut packet, &scene, Ok(()));
    let (key, entry) = table.0.get()?;
    Some(Flow {
        key,
        entry,
        protected: false,
        packets: 1,
        bytes: 0,
    })
}

/// What the kernel would do with a packet of the flow, were this image the next one.
fn judged(image: &Image, flow: &Flow, packet: &Packet, unix: u64) -> Outcome {
    let one = One {
        key: flow.key,
        entry: Cell::new(flow.entry),
    };
    let mut packet = *packet;
    if packet.tuple.kind == packet::Kind::Tcp {
        packet.tuple.tcp_flags = tcp::ACK;
    }
    let judgement = judge(image.words(), &&one, &mut packet, &scene(At(unix)), Ok(()));
    judgement.decision.outcome
}

fn moment(unix: u64) -> Moment {
    Moment {
        unix,
        boot: 0,
        jiffies: (60, 100),
        slots: BTreeMap::new(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// What is said of a flow in the table is what happens to its next packet.
    #[test]
    fn flows_fare_as_it_says(
        (one, other, queries) in (arbitrary::policy(), arbitrary::policy()).prop_flat_map(
            |(one, other)| {
                let queries = prop::collection::vec(arbitrary::query(&one), 16);
                (Just(one), Just(other), queries)
            }
        ),
        env in arbitrary::environment(),
        unix in arbitrary::time(),
        port in any::<u16>(),
    ) {
        let (live, new) = (image(&one, &env, 7), image(&other, &env, 8));
        let settings = Settings::default();
        let moment = moment(unix);
        for query in queries {
            if on_no_link(query.src) || on_no_link(query.dst) {
                continue;
            }
            let Some(packet) = opening(&query, port) else {
                continue;
            };
            let Some(mut flow) = opened(&live, &packet, unix) else {
                continue;
            };
            let first = judged(&new, &flow, &packet, unix);
            prop_assert_eq!(next(new.words(), &flow, &moment).outcome, first, "{:?}", query);
            flow.entry.flags |= REPLIED;
            let back = judged(&new, &flow, &answer(&packet), unix);
            let said = next(new.words(), &flow, &moment).outcome;
            prop_assert_eq!(said, if first.passes() && !back.passes() { back } else { first });

            // And the lists say which those are.
            let version = |policy, image| Version { policy, image, settings: &settings };
            let mut changes = Changes::new(version(&one, &live), version(&other, &new), &moment);
            changes.see(&flow);
            let changes = changes.finish();
            prop_assert_eq!(changes.judged, 1);
            prop_assert_eq!(changes.cut, u64::from(said == Outcome::Denied));
            let before = next(live.words(), &flow, &moment).outcome;
            prop_assert!(before.passes());
            let observed = said == Outcome::WouldDeny && before != said;
            prop_assert_eq!(changes.would_deny, u64::from(observed));
            for changed in changes.cut_flows {
                prop_assert_eq!((changed.flow.from, changed.flow.to), (query.src, query.dst));
                let decided = matches!(
                    &*changed.then.reason,
                    "rule_deny" | "default_deny" | "unsegmented" | "revoked" | "expired" | "martian"
                );
                prop_assert!(decided, "{:?}", changed.then);
            }
        }
    }
}

#[test]
fn what_expired_is_no_live_flow() {
    let text = "version: 1\nsegments:\n  a: { members: [{cidr: 10.0.0.0/24}] }\n  \
                b: { members: [{cidr: 10.0.1.0/24}] }\nrules:\n  \
                - {name: r, from: [a], to: [b], services: [tcp/80]}\n";
    let file = crate::policy::SourceFile {
        name: "p.yaml".to_owned(),
        text: text.to_owned(),
    };
    let policy = crate::policy::parse(&[file]).unwrap();
    let image = image(&policy, &Environment::default(), 1);
    assert_eq!(image.words()[header::GENERATION as usize], 1);
    let query = FlowQuery {
        src: "10.0.0.1".parse().unwrap(),
        dst: "10.0.1.1".parse().unwrap(),
        protocol: 6,
        selector: 80,
    };
    let flow = opened(&image, &opening(&query, 40_000).unwrap(), 0).unwrap();
    let settings = Settings::default();
    let live = Version {
        policy: &policy,
        image: &image,
        settings: &settings,
    };
    let seen = |jiffies| {
        let mut moment = moment(0);
        moment.jiffies.0 = jiffies;
        let mut listing = Listing::new(live, &moment, 10);
        listing.see(&flow, |_, _| true);
        listing.finish()
    };
    // Seen at 50; half-open flows are remembered for 60 seconds of 100 ticks.
    let (total, matched, flows) = seen(50 + 59 * 100);
    assert_eq!((total, matched), (1, 1));
    let flow = &flows[0];
    assert_eq!((flow.from_port, flow.to_port), (Some(40_000), Some(80)));
    assert_eq!(
        (&*flow.service, &*flow.state, flow.idle),
        ("tcp/80", "one_way", Some(59))
    );
    assert_eq!(flow.now.rule.as_deref(), Some("r"));
    assert_eq!(
        (&*flow.from_segments, &*flow.to_segments),
        (&["a".to_owned()][..], &["b".to_owned()][..])
    );
    assert_eq!(seen(50 + 61 * 100).0, 0);
}

#[test]
fn the_busiest_are_kept_and_all_are_counted() {
    let mut busiest = Busiest::new(3);
    for number in 0..1_000u64 {
        busiest.push(number * 7919 % 1_000, number * 7919 % 1_000);
    }
    assert_eq!(busiest.finish(), (1_000, vec![999, 998, 997]));
}
