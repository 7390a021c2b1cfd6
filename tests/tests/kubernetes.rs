//! Kubernetes network policies, translated, hold: each of 230 cases says of every pair of nine pods
//! which ports the one reaches at the other. What is expected comes from a matcher of its own.
//!
//! A pod that connects to itself does so over its own loopback, which no enforcer sees: on the wire
//! such cells are probed like others and always reach; `decide()` is not asked about them.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod kubernetes {
    pub mod cases;
    pub mod matcher;
    pub mod model;
    pub mod over_time;
    pub mod pods;
    pub mod probe;
    pub mod translate;
}

use std::{cell::Cell, collections::BTreeMap, net::IpAddr};

use enforcer::{
    compile::{self, Image, Options},
    policy::{SourceFile, model::Environment, parse},
};
use enforcer_common::{
    decide::{Query, decide},
    verdict::Outcome,
};
use enforcer_tests::{
    daemon::{Daemon, Setup},
    netns::{Family, Netns},
};
use kubernetes::{
    cases::{self, Case, GROUPS},
    matcher::{self, Connection},
    model::{Action, Cluster, NetworkPolicy, Pod, Protocol, Rule, Selector, address},
    pods::Pods,
    probe,
    translate::translate,
};
use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::select,
    test_runner::{Config, TestRunner},
};

#[test]
fn the_table_is_complete() {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let cases = cases::all();
    for case in &cases {
        *counts.entry(case.group).or_default() += 1;
    }
    assert_eq!(counts, BTreeMap::from(GROUPS));
    assert_eq!(cases.len(), 230);
    let mut names: Vec<_> = cases.iter().map(|c| (c.group, &c.name)).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 230, "a case is there twice");
}

/// Who reaches whom: a line for each source, a column for each destination, x/a to z/c.
fn grid(cluster: &Cluster, protocol: Protocol, port: u16) -> String {
    let line = |from: &Pod| -> String {
        let cell = |to: &Pod| {
            let connection = Connection {
                from: from.v4,
                to: to.v4,
                protocol,
                port,
            };
            let allowed = matcher::allowed(cluster, &connection);
            if allowed { '.' } else { 'X' }
        };
        cluster.pods.iter().map(cell).collect()
    };
    cluster.pods.iter().map(line).collect::<Vec<_>>().join(" ")
}

fn clusters(group: &str, name: &str) -> Vec<Cluster> {
    let cases = cases::all();
    let is = |c: &&Case| c.group == group && c.name == name;
    let case = cases.iter().find(is).unwrap();
    let mut cluster = Cluster::new();
    let states = case.steps.iter().map(|step| {
        step.actions.iter().for_each(|action| cluster.act(action));
        cluster.clone()
    });
    states.collect()
}

/// The oracle itself, against grids filled in by hand.
#[test]
fn the_matcher_says_what_people_say() {
    const OPEN: &str = "......... ......... ......... ......... ......... ......... ......... \
                        ......... .........";
    // The base policy is that of x.
    let [base] = &clusters("target", "namespace x")[..] else {
        panic!()
    };
    assert_eq!(
        grid(base, Protocol::Tcp, 80),
        ".XX..X..X ......... ......... X........ ......... ......... X........ X........ X........"
    );
    let cut =
        ".XXXXXXXX X........ X........ X........ X........ X........ X........ X........ X........";
    assert_eq!(grid(base, Protocol::Tcp, 81), cut);
    assert_eq!(grid(base, Protocol::Sctp, 80), cut);
    assert_eq!(
        grid(base, Protocol::Udp, 53),
        "......... X........ X........ X........ X........ X........ X........ X........ X........"
    );
    // The hole holds y/a, z/b and z/c.
    let [hole] = &clusters("peers", "ingress: block with a hole")[..] else {
        panic!()
    };
    assert_eq!(
        grid(hole, Protocol::Tcp, 80),
        ".XX..X..X X........ X........ X........ ......... ......... ......... X........ X........"
    );
    let [both] = &clusters("conflict", "egress: out all, in nothing")[..] else {
        panic!()
    };
    assert_eq!(
        grid(both, Protocol::Tcp, 80),
        ".....X... .....X... .....X... .....X... .....X... ......... .....X... .....X... .....X..."
    );
    let [before, after] = &clusters("scenario", "deny all goes")[..] else {
        panic!()
    };
    assert_eq!(
        grid(before, Protocol::Udp, 81),
        ".XXXXXXXX X.XXXXXXX XX.XXXXXX XXX...... XXX...... XXX...... XXX...... XXX...... XXX......"
    );
    assert_eq!(grid(after, Protocol::Udp, 81), OPEN);
}

/// Whether machines are slow, as those are that a processor is emulated for.
fn small() -> bool {
    std::env::var("ENFORCER_TEST_SCALE").is_ok_and(|scale| scale == "small")
}

/// The cases to run: all of them, or with `ENFORCER_TEST_SCALE=small` every eighth of the two large
/// groups and all of the others. What is checked of each is the same.
fn scaled() -> Vec<Case> {
    let mut cases = cases::all();
    if small() {
        let mut number = 0;
        cases.retain(|case| {
            number += 1;
            !matches!(case.group, "peers" | "ports") || number % 8 == 0
        });
    }
    cases
}

fn image(text: &str) -> Image {
    let file = SourceFile {
        name: "policy.yaml".to_owned(),
        text: text.to_owned(),
    };
    let policy = parse(&[file]).unwrap_or_else(|errors| panic!("{errors:#?}\n{text}"));
    compile::compile(&policy, &Environment::default(), &Options::default()).unwrap()
}

fn passes(image: &Image, connection: &Connection) -> bool {
    let query = Query {
        source: connection.from.into(),
        destination: connection.to.into(),
        protocol: connection.protocol.number(),
        selector: connection.port,
    };
    match decide(image.words(), &query, 0).outcome {
        Outcome::Allowed | Outcome::Off => true,
        Outcome::Denied => false,
        outcome => panic!("{outcome:?} of {connection:?}"),
    }
}

/// What the image of a cluster's policies says of every pair of its pods and of some addresses that
/// are no pod's, on every port that some case tells apart, is what Kubernetes says. How many
/// connections are allowed and denied.
fn compare(cluster: &Cluster, what: &str) -> (u32, u32) {
    const PORTS: [u16; 12] = [0, 1, 52, 53, 54, 79, 80, 81, 84, 85, 7981, 65535];
    let (mut allowed, mut denied) = (0, 0);
    let text = translate(cluster);
    let image = image(&text);
    for family in Family::BOTH {
        // In the smaller block, in the larger one, in none; in the blocks that hold no pod.
        let mut ends: Vec<IpAddr> = vec![
            address(family, 2, 14),
            address(family, 2, 200),
            address(family, 9, 9),
            match family {
                Family::V4 => [0, 0, 0, 1].into(),
                Family::V6 => [0, 0, 0, 0, 0, 0, 0, 1].into(),
            },
        ];
        ends.extend(cluster.pods.iter().map(|pod| pod.ip(family)));
        for ((from, to), (protocol, port)) in
            product(&pairs(&ends), &product(&Protocol::ALL, &PORTS))
        {
            let connection = Connection {
                from,
                to,
                protocol,
                port,
            };
            let want = matcher::allowed(cluster, &connection);
            let got = passes(&image, &connection);
            assert_eq!(got, want, "{what}: {connection:?}\n{text}");
            *(if want { &mut allowed } else { &mut denied }) += 1;
        }
    }
    (allowed, denied)
}

#[test]
fn images_say_what_the_network_policies_say() {
    let (mut allowed, mut denied) = (0, 0);
    let cases = scaled();
    for case in &cases {
        for (step, cluster) in clusters(case.group, &case.name).iter().enumerate() {
            let what = format!("{}: {}, step {step}", case.group, case.name);
            let (more_allowed, more_denied) = compare(cluster, &what);
            allowed += more_allowed;
            denied += more_denied;
        }
    }
    println!(
        "{} of 230 cases, {allowed} connections allowed, {denied} denied",
        cases.len()
    );
    let cases = u32::try_from(cases.len()).unwrap();
    assert!(allowed > 8_000 * cases && denied > 1_000 * cases);
}

fn any_rules() -> impl Strategy<Value = Vec<Rule>> {
    let peers: Vec<_> = cases::peer_kinds().into_iter().map(|kind| kind.1).collect();
    let ports: Vec<_> = cases::port_kinds().into_iter().map(|kind| kind.1).collect();
    let rule = (vec(select(ports), 0..3), vec(select(peers), 0..3)).prop_map(|(ports, peers)| {
        let (ports, peers) = (ports.concat(), peers.concat());
        Rule { ports, peers }
    });
    vec(rule, 0..3)
}

fn any_cluster() -> impl Strategy<Value = Cluster> {
    const NAMES: [&str; 5] = ["one", "two", "three", "four", "five"];
    let pods = ["", "pod=a", "pod=b", "pod=c"].map(Selector::of).to_vec();
    let policy = (
        select(&["x", "y", "z"][..]),
        select(pods),
        option::of(any_rules()),
        option::of(any_rules()),
    );
    vec(policy, 1..=NAMES.len()).prop_map(|policies| {
        let mut cluster = Cluster::new();
        for (name, (namespace, pods, ingress, egress)) in NAMES.iter().zip(policies) {
            cluster.act(&Action::Create(NetworkPolicy {
                namespace,
                name,
                pods,
                ingress,
                egress,
            }));
        }
        cluster
    })
}

/// Beyond the table: policies of both directions at both ends, made of the table's parts.
#[test]
fn images_say_what_random_network_policies_say() {
    let cases = if small() { 20 } else { 150 };
    let mut runner = TestRunner::new(Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    });
    let (allowed, denied) = (Cell::new(0), Cell::new(0));
    let result = runner.run(&any_cluster(), |cluster| {
        let (more_allowed, more_denied) = compare(&cluster, "random policies");
        allowed.set(allowed.get() + more_allowed);
        denied.set(denied.get() + more_denied);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let (allowed, denied) = (allowed.get(), denied.get());
    println!("{allowed} connections allowed, {denied} denied");
    assert!(allowed > 2_000 * cases && denied > 500 * cases);
}

fn product<A: Copy, B: Copy>(a: &[A], b: &[B]) -> Vec<(A, B)> {
    a.iter().flat_map(|a| b.iter().map(|b| (*a, *b))).collect()
}

/// All ordered pairs of unlike ones.
fn pairs(ends: &[IpAddr]) -> Vec<(IpAddr, IpAddr)> {
    let mut pairs = product(ends, ends);
    pairs.retain(|(from, to)| from != to);
    pairs
}

/// Puts the cluster's policies in force.
fn enforce(daemon: &Daemon<'_>, cluster: &Cluster) {
    daemon.setup.write(&translate(cluster));
    let (code, answer) = daemon.reload();
    assert_eq!(code, 200, "{answer}");
}

/// Whether a probe must arrive.
fn wanted(cluster: &Cluster, cell: &probe::Cell) -> bool {
    let family = if cell.v6 { Family::V6 } else { Family::V4 };
    let ip = |number| {
        let pod = cluster
            .pods
            .iter()
            .find(|pod| pod.number == number)
            .unwrap();
        pod.ip(family)
    };
    let connection = Connection {
        from: ip(cell.from),
        to: ip(cell.to),
        protocol: cell.protocol,
        port: cell.port,
    };
    matcher::allowed(cluster, &connection)
}

fn daemon_for<'a>(router: &'a Netns, pods: &mut Pods<'_>) -> Daemon<'a> {
    let setup = Setup::new(router, "pod-*", &translate(&Cluster::new()));
    let daemon = setup.with(&["--socket-hooks", "off"]).start();
    pods.control(daemon.setup.socket());
    daemon
}

#[test]
fn pods_reach_what_the_network_policies_allow_and_nothing_else() {
    let router = Netns::new("router");
    let mut pods = Pods::new(&router, &Cluster::new().pods);
    let daemon = daemon_for(&router, &mut pods);
    let (mut rounds, mut exact, mut probes) = (0, 0, 0);
    let cases = scaled();
    for case in &cases {
        let mut cluster = Cluster::new();
        for (number, step) in case.steps.iter().enumerate() {
            for action in &step.actions {
                cluster.act(action);
            }
            pods.follow(&cluster.pods);
            enforce(&daemon, &cluster);
            let findings = pods.round(&step.probes, |cell| wanted(&cluster, cell));
            assert!(
                findings.none(),
                "{}: {}, step {number}: {findings:#?}\n{}",
                case.group,
                case.name,
                translate(&cluster)
            );
            rounds += 1;
            exact += usize::from(findings.exact);
            probes += cluster.pods.len() * cluster.pods.len() * step.probes.len() * 2;
        }
    }
    println!(
        "{} of 230 cases, {rounds} rounds ({exact} counted exactly), {probes} probes",
        cases.len()
    );
}

/// A round under other policies than are in force finds exactly what they tell apart.
#[test]
fn holes_and_cuts_are_found() {
    let router = Netns::new("router");
    let mut pods = Pods::new(&router, &Cluster::new().pods);
    let daemon = daemon_for(&router, &mut pods);
    pods.patience = std::time::Duration::from_secs(2);
    let [in_force] = &clusters("ports", "ingress: udp/80")[..] else {
        panic!()
    };
    let [expected] = &clusters("ports", "ingress: sctp/80")[..] else {
        panic!()
    };
    enforce(&daemon, in_force);
    let findings = pods.round(&cases::served(), |cell| wanted(expected, cell));
    let differ = |cell: &&probe::Cell, protocol| cell.protocol == protocol && cell.port == 80;
    assert_eq!(findings.holes.len(), 8, "{findings:?}");
    assert!(findings.holes.iter().all(|c| differ(&c, Protocol::Udp)));
    assert_eq!(findings.cuts.len(), 8, "{findings:?}");
    assert!(findings.cuts.iter().all(|c| differ(&c, Protocol::Sctp)));
    assert!(
        pods.round(&cases::served(), |cell| wanted(in_force, cell))
            .none()
    );
}
