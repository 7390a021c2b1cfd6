//! The table: 230 cases in nine groups. Most vary one thing of one base policy; the others are
//! policies of their own, or change the cluster between rounds of probes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use enforcer_tests::netns::Family;

use super::{
    model::{
        Action, NetworkPolicy, Operator, Peer, PolicyPort, Port, Protocol, Rule, SERVED, Selector,
        address,
    },
    over_time,
};

/// Groups and how many cases each has.
pub const GROUPS: [(&str, usize); 9] = [
    ("peers", 112),
    ("ports", 70),
    ("conflict", 16),
    ("scenario", 13),
    ("target", 6),
    ("action", 6),
    ("rules", 4),
    ("namespace", 2),
    ("example", 1),
];

#[derive(Clone, Debug)]
pub struct Case {
    pub group: &'static str,
    pub name: String,
    pub steps: Vec<Step>,
}

/// Changes, then a round of probes.
#[derive(Clone, Debug)]
pub struct Step {
    pub actions: Vec<Action>,
    pub probes: Vec<(Protocol, u16)>,
}

/// Every port that the pods serve.
pub fn served() -> Vec<(Protocol, u16)> {
    let ports = |protocol| [(protocol, 80), (protocol, 81)];
    Protocol::ALL.into_iter().flat_map(ports).collect()
}

pub fn step(actions: Vec<Action>) -> Step {
    Step {
        actions,
        probes: served(),
    }
}

pub fn case(group: &'static str, name: impl Into<String>, steps: Vec<Step>) -> Case {
    Case {
        group,
        name: name.into(),
        steps,
    }
}

/// A case of one round, under these policies.
fn once(group: &'static str, name: impl Into<String>, policies: Vec<NetworkPolicy>) -> Case {
    let actions = policies.into_iter().map(Action::Create).collect();
    case(group, name, vec![step(actions)])
}

pub fn all() -> Vec<Case> {
    let groups = [
        peers(),
        ports(),
        conflict(),
        over_time::scenario(),
        target(),
        over_time::action(),
        rules(),
        namespace(),
        over_time::example(),
    ];
    groups.concat()
}

pub const TCP: Option<Protocol> = Some(Protocol::Tcp);
pub const UDP: Option<Protocol> = Some(Protocol::Udp);

pub fn port(protocol: Option<Protocol>, number: u16) -> PolicyPort {
    PolicyPort {
        protocol,
        port: Some(Port::Number(number)),
        end: None,
    }
}

pub fn named(protocol: Option<Protocol>, name: &'static str) -> PolicyPort {
    PolicyPort {
        protocol,
        port: Some(Port::Name(name)),
        end: None,
    }
}

fn every_port(protocol: Option<Protocol>) -> PolicyPort {
    PolicyPort {
        protocol,
        ..PolicyPort::default()
    }
}

fn pods_in(pods: &[&'static str], namespaces: &[&'static str]) -> Peer {
    Peer::Pods {
        pods: Some(Selector::expression("pod", Operator::In, pods)),
        namespaces: Some(Selector::expression("ns", Operator::In, namespaces)),
    }
}

pub fn selecting(pods: Option<&str>, namespaces: Option<&str>) -> Peer {
    Peer::Pods {
        pods: pods.map(Selector::of),
        namespaces: namespaces.map(Selector::of),
    }
}

pub fn rule(ports: &[PolicyPort], peers: &[Peer]) -> Rule {
    Rule {
        ports: ports.to_vec(),
        peers: peers.to_vec(),
    }
}

pub fn dns() -> Rule {
    rule(&[port(UDP, 53)], &[])
}

/// x/a takes TCP 80 from b and c of x and y, opens it to a and b of y and z, and may ask for names.
pub fn base() -> NetworkPolicy {
    let http = [port(TCP, 80)];
    NetworkPolicy {
        namespace: "x",
        name: "base",
        pods: Selector::of("pod=a"),
        ingress: Some(vec![rule(&http, &[pods_in(&["b", "c"], &["x", "y"])])]),
        egress: Some(vec![
            rule(&http, &[pods_in(&["a", "b"], &["y", "z"])]),
            dns(),
        ]),
    }
}

const DIRECTIONS: [&str; 2] = ["ingress", "egress"];

/// The base policy with one direction's first rule changed.
pub fn base_with(direction: &str, change: impl FnOnce(&mut Rule)) -> NetworkPolicy {
    let mut policy = base();
    let rules = match direction {
        "ingress" => &mut policy.ingress,
        _ => &mut policy.egress,
    };
    change(&mut rules.as_mut().unwrap()[0]);
    policy
}

/// A block in both families: Kubernetes writes one for each. Around z/c.
fn block(bits: u8, hole: Option<u8>) -> Vec<Peer> {
    let cut = |family: Family, bits: u8| {
        let IpAddr::V4(low) = address(Family::V4, 2, 5) else {
            unreachable!()
        };
        let low = u8::try_from(u32::from(low.octets()[3]) >> bits << bits).unwrap();
        let width = if family == Family::V4 { 32 } else { 128 };
        (address(family, 2, low), width - bits)
    };
    Family::BOTH
        .map(|family| Peer::Block {
            cidr: cut(family, bits),
            except: hole.map(|bits| cut(family, bits)).into_iter().collect(),
        })
        .to_vec()
}

/// Eight ways to select pods and two blocks.
pub fn peer_kinds() -> Vec<(&'static str, Vec<Peer>)> {
    let pods = |pods, namespaces| vec![selecting(pods, namespaces)];
    vec![
        ("all pods here", pods(Some(""), None)),
        ("c here", pods(Some("pod=c"), None)),
        ("all namespaces", pods(None, Some(""))),
        ("all pods of all namespaces", pods(Some(""), Some(""))),
        ("c of all namespaces", pods(Some("pod=c"), Some(""))),
        ("namespace x", pods(None, Some("ns=x"))),
        ("all pods of x", pods(Some(""), Some("ns=x"))),
        ("c of x", pods(Some("pod=c"), Some("ns=x"))),
        ("block", block(8, None)),
        ("block with a hole", block(8, Some(4))),
    ]
}

fn peers() -> Vec<Case> {
    let mut cases = Vec::new();
    let kinds = peer_kinds();
    for direction in DIRECTIONS {
        let mut add = |name: String, peers: Vec<Peer>| {
            let policy = base_with(direction, |rule| rule.peers = peers);
            cases.push(once("peers", format!("{direction}: {name}"), vec![policy]));
        };
        add("none".to_owned(), Vec::new());
        for (name, peers) in &kinds {
            add((*name).to_owned(), peers.clone());
        }
        for (i, (one, first)) in kinds.iter().enumerate() {
            for (other, second) in &kinds[i + 1..] {
                let both = [first.clone(), second.clone()].concat();
                add(format!("{one} + {other}"), both);
            }
        }
    }
    cases
}

/// What `ports` of a rule may be.
pub fn port_kinds() -> Vec<(String, Vec<PolicyPort>)> {
    let mut kinds: Vec<(String, Vec<PolicyPort>)> = vec![("none".to_owned(), Vec::new())];
    let protocols = [None, TCP, UDP, Some(Protocol::Sctp)];
    let word = |protocol: Option<Protocol>| protocol.map_or("default", Protocol::word);
    for protocol in protocols {
        kinds.push((word(protocol).to_owned(), vec![every_port(protocol)]));
        for number in [80, 81] {
            let name = format!("{}/{number}", word(protocol));
            kinds.push((name, vec![port(protocol, number)]));
        }
    }
    for (name, protocol, _) in SERVED {
        kinds.push((name.to_owned(), vec![named(Some(protocol), name)]));
    }
    for protocol in Protocol::ALL {
        for end in [80, 84] {
            let mut range = port(Some(protocol), 53);
            range.end = Some(end);
            kinds.push((format!("{}/53-{end}", protocol.word()), vec![range]));
        }
    }
    let odd = [
        ("a name of another protocol", named(TCP, "serve-81-udp")),
        ("a name that nobody has", named(TCP, "serve-7981-udp")),
        ("a port that nobody serves", port(TCP, 7981)),
    ];
    kinds.extend(odd.map(|(name, port)| (name.to_owned(), vec![port])));
    let pairs = [
        ("all TCP + 80", every_port(None), port(None, 80)),
        (
            "all TCP + a name",
            every_port(None),
            named(None, "serve-80-tcp"),
        ),
        ("all TCP + all UDP", every_port(None), every_port(UDP)),
        ("80 + 81", port(None, 80), port(None, 81)),
        ("80 + a name", port(None, 80), named(None, "serve-81-tcp")),
        (
            "80 + a name of UDP",
            port(None, 80),
            named(UDP, "serve-81-udp"),
        ),
        (
            "udp/80 + a name of UDP",
            port(UDP, 80),
            named(UDP, "serve-81-udp"),
        ),
    ];
    kinds.extend(pairs.map(|(name, a, b)| (name.to_owned(), vec![a, b])));
    kinds
}

fn ports() -> Vec<Case> {
    let mut cases = Vec::new();
    for direction in DIRECTIONS {
        for (name, ports) in &port_kinds() {
            let policy = base_with(direction, |rule| rule.ports.clone_from(ports));
            cases.push(once("ports", format!("{direction}: {name}"), vec![policy]));
        }
    }
    cases
}

/// Policies that pull in two directions, at a source (x/b) and a destination (y/c).
fn conflict() -> Vec<Case> {
    type Rules = Vec<Rule>;
    let allow_all: Rules = vec![Rule::default()];
    let nothing: Rules = Vec::new();
    let all_pods: Rules = vec![rule(&[], &[selecting(None, Some(""))])];
    let no_pods: Rules = vec![rule(&[], &[selecting(None, Some("no-such=label"))])];
    let blocks = |length: [u8; 2]| {
        let any = [
            IpAddr::from(Ipv4Addr::UNSPECIFIED),
            Ipv6Addr::UNSPECIFIED.into(),
        ];
        let blocks = any.iter().zip(length).map(|(ip, length)| Peer::Block {
            cidr: (*ip, length),
            except: Vec::new(),
        });
        vec![rule(&[], &blocks.collect::<Vec<_>>())]
    };
    let (all_addresses, no_addresses) = (blocks([0, 0]), blocks([31, 127]));

    let at = |place: &str, name, ingress: Option<&Rules>, egress: Option<&Rules>| {
        let (namespace, pods) = match place {
            "source" => ("x", "pod=b"),
            _ => ("y", "pod=c"),
        };
        NetworkPolicy {
            namespace,
            name,
            pods: Selector::of(pods),
            ingress: ingress.cloned(),
            egress: egress.cloned(),
        }
    };
    let out = |name, rules: &Rules| at("source", name, None, Some(rules));
    let into = |place, name, rules: &Rules| at(place, name, Some(rules), None);

    let mut sets: Vec<(&str, Vec<NetworkPolicy>)> = vec![
        (
            "out nothing, in all",
            vec![out("out", &nothing), into("destination", "in", &allow_all)],
        ),
        (
            "out all, in nothing",
            vec![out("out", &allow_all), into("destination", "in", &nothing)],
        ),
        (
            "out nothing + all",
            vec![out("one", &nothing), out("two", &allow_all)],
        ),
        (
            "in nothing + all",
            vec![
                into("destination", "one", &nothing),
                into("destination", "two", &allow_all),
            ],
        ),
    ];
    let layers = [
        ("nothing + all pods", &nothing, &all_pods),
        ("nothing + all addresses", &nothing, &all_addresses),
        ("no address + all pods", &no_addresses, &all_pods),
        ("no pod + all addresses", &no_pods, &all_addresses),
    ];
    sets.extend(layers.map(|(name, a, b)| (name, vec![out("one", a), out("two", b)])));
    sets.extend(layers.map(|(name, a, b)| {
        let both = [into("source", "one", a), into("source", "two", b)];
        (name, both.to_vec())
    }));
    for (name, rules) in [("no address", &no_addresses), ("no pod", &no_pods)] {
        sets.push((name, vec![out("one", rules)]));
    }
    for (name, rules) in [("no address", &no_addresses), ("no pod", &no_pods)] {
        sets.push((name, vec![into("source", "one", rules)]));
    }
    sets.into_iter()
        .map(|(name, mut policies)| {
            // Names can still be asked for where egress is limited.
            if policies.iter().any(|policy| policy.egress.is_some()) {
                policies.push(out("dns", &vec![dns()]));
            }
            let direction = match policies[0].egress {
                Some(_) => "egress",
                None => "ingress",
            };
            once("conflict", format!("{direction}: {name}"), policies)
        })
        .collect()
}

fn target() -> Vec<Case> {
    let namespaces = ["x", "y", "z"].map(|namespace| {
        let policy = NetworkPolicy {
            namespace,
            ..base()
        };
        once("target", format!("namespace {namespace}"), vec![policy])
    });
    let selectors = [
        ("all pods", Selector::everything()),
        ("a", Selector::of("pod=a")),
        (
            "a and b",
            Selector::expression("pod", Operator::In, &["a", "b"]),
        ),
    ];
    let selectors =
        selectors.map(|(name, pods)| once("target", name, vec![NetworkPolicy { pods, ..base() }]));
    [namespaces, selectors].concat()
}

fn rules() -> Vec<Case> {
    let mut cases = Vec::new();
    for direction in DIRECTIONS {
        for (name, rules) in [("no rule", vec![]), ("all", vec![Rule::default()])] {
            let mut policy = base();
            match direction {
                "ingress" => policy.ingress = Some(rules),
                _ => policy.egress = Some(rules),
            }
            cases.push(once("rules", format!("{direction}: {name}"), vec![policy]));
        }
    }
    cases
}

/// By the label that every namespace has.
fn namespace() -> Vec<Case> {
    let peer = selecting(None, Some("kubernetes.io/metadata.name=z"));
    DIRECTIONS
        .map(|direction| {
            let policy = base_with(direction, |rule| rule.peers = vec![peer.clone()]);
            once("namespace", direction, vec![policy])
        })
        .to_vec()
}
