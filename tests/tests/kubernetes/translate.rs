//! Network policies in the enforcer's language.
//!
//! Kubernetes wants an allow of each side that is isolated, the enforcer wants one allow rule. So
//! each egress rule is cut with each ingress rule: who is on both lists of openers may reach who is
//! on both lists of destinations, on the ports that both name. A side that is not isolated counts
//! as a rule that allows all of its flows. Isolation itself is two segments that guard one
//! direction each. Segments that only say who somebody is have mode `off`: they guard nothing.

use std::{fmt::Write as _, net::IpAddr};

use super::model::{
    Cluster, NetworkPolicy, Operator, Peer, Pod, Port, Protocol, Rule, SERVED, Selector,
};

/// A prefix and the holes in it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    prefix: Prefix,
    holes: Vec<Prefix>,
}

/// Addresses: those of any part.
type Addresses = Vec<Part>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Prefix {
    ip: IpAddr,
    length: u8,
}

impl Prefix {
    fn one(ip: IpAddr) -> Self {
        let length = if ip.is_ipv4() { 32 } else { 128 };
        Self { ip, length }
    }

    fn holds(self, other: Self) -> bool {
        let (a, b, width) = match (self.ip, other.ip) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(a.to_bits()), b.to_bits().into(), 32),
            (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits(), b.to_bits(), 128),
            _ => return false,
        };
        let rest = u32::from(width - self.length);
        self.length <= other.length && a.checked_shr(rest) == b.checked_shr(rest)
    }
}

fn everybody_but(holes: &[Prefix]) -> Addresses {
    ["0.0.0.0", "::"]
        .iter()
        .map(|ip| {
            let prefix = Prefix {
                ip: ip.parse().unwrap(),
                length: 0,
            };
            let holes = holes.iter().copied().filter(|h| prefix.holds(*h));
            Part {
                prefix,
                holes: holes.collect(),
            }
        })
        .collect()
}

fn of_pods<'a>(pods: impl IntoIterator<Item = &'a Pod>) -> Addresses {
    let ips = pods.into_iter().flat_map(|pod| [pod.v4, pod.v6]);
    ips.map(|ip| Part {
        prefix: Prefix::one(ip),
        holes: Vec::new(),
    })
    .collect()
}

/// What is in both.
fn common(a: &Addresses, b: &Addresses) -> Addresses {
    let mut parts = Vec::new();
    for (a, b) in a.iter().flat_map(|a| b.iter().map(move |b| (a, b))) {
        let prefix = if a.prefix.holds(b.prefix) {
            b.prefix
        } else if b.prefix.holds(a.prefix) {
            a.prefix
        } else {
            continue;
        };
        let mut holes: Vec<Prefix> = Vec::new();
        for hole in a.holes.iter().chain(&b.holes) {
            if !holes.contains(hole) && (hole.holds(prefix) || prefix.holds(*hole)) {
                holes.push(*hole);
            }
        }
        let part = Part { prefix, holes };
        if !part.holes.iter().any(|h| h.holds(prefix)) && !parts.contains(&part) {
            parts.push(part);
        }
    }
    parts
}

/// Destination ports.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Ports {
    All,
    These(Vec<(Protocol, u16, u16)>),
}

impl Ports {
    fn common(&self, other: &Self) -> Self {
        let (a, b) = match (self, other) {
            (Self::All, rest) | (rest, Self::All) => return rest.clone(),
            (Self::These(a), Self::These(b)) => (a, b),
        };
        let mut both = Vec::new();
        for (a, b) in a.iter().flat_map(|a| b.iter().map(move |b| (a, b))) {
            let range = (a.0, a.1.max(b.1), a.2.min(b.2));
            if a.0 == b.0 && range.1 <= range.2 && !both.contains(&range) {
                both.push(range);
            }
        }
        Self::These(both)
    }

    fn is_empty(&self) -> bool {
        *self == Self::These(Vec::new())
    }

    fn words(&self) -> String {
        let Self::These(ranges) = self else {
            return "any".to_owned();
        };
        let words = ranges.iter().map(|(protocol, first, last)| {
            let protocol = protocol.word();
            match (first, last) {
                (0, 65535) => format!("{protocol}/any"),
                (first, last) if first == last => format!("{protocol}/{first}"),
                (first, last) => format!("{protocol}/{first}-{last}"),
            }
        });
        words.collect::<Vec<_>>().join(", ")
    }
}

/// What one rule of one side lets through.
struct Pass {
    /// Whose rule it is.
    subjects: Addresses,
    peers: Addresses,
    ports: Ports,
    /// Stands for the pods that are not isolated, and for what is no pod.
    free: bool,
}

/// A direction: who is isolated in it, and what passes.
fn side(cluster: &Cluster, egress: bool) -> (Vec<&Pod>, Vec<Pass>) {
    let mut isolated: Vec<&Pod> = Vec::new();
    let mut passes = Vec::new();
    for policy in &cluster.policies {
        let rules = if egress {
            &policy.egress
        } else {
            &policy.ingress
        };
        let Some(rules) = rules else { continue };
        let subjects: Vec<&Pod> = cluster
            .pods
            .iter()
            .filter(|pod| {
                pod.namespace == policy.namespace
                    && selected(&policy.pods, |key| pod.labels.get(key))
            })
            .collect();
        for pod in &subjects {
            if !isolated.contains(pod) {
                isolated.push(pod);
            }
        }
        for rule in rules {
            let peers = peers(cluster, policy, rule);
            let (numbers, names) = ports(rule);
            let mut pass = |peers, ports| {
                passes.push(Pass {
                    subjects: of_pods(subjects.iter().copied()),
                    peers,
                    ports,
                    free: false,
                });
            };
            // Only pods have ports with names.
            let named = if egress {
                common(&peers, &of_pods(&cluster.pods))
            } else {
                peers.clone()
            };
            pass(named, names);
            pass(peers, numbers);
        }
    }
    let holes: Vec<Prefix> = isolated
        .iter()
        .flat_map(|pod| [Prefix::one(pod.v4), Prefix::one(pod.v6)])
        .collect();
    passes.push(Pass {
        subjects: everybody_but(&holes),
        peers: everybody_but(&[]),
        ports: Ports::All,
        free: true,
    });
    (isolated, passes)
}

fn peers(cluster: &Cluster, policy: &NetworkPolicy, rule: &Rule) -> Addresses {
    if rule.peers.is_empty() {
        return everybody_but(&[]);
    }
    let mut all = Addresses::new();
    for peer in &rule.peers {
        match peer {
            Peer::Block { cidr, except } => {
                let prefix = |&(ip, length): &(IpAddr, u8)| Prefix { ip, length };
                all.push(Part {
                    prefix: prefix(cidr),
                    holes: except.iter().map(prefix).collect(),
                });
            }
            Peer::Pods { pods, namespaces } => {
                all.extend(of_pods(cluster.pods.iter().filter(|pod| {
                    let labels = &cluster.namespaces[pod.namespace];
                    let here = match namespaces {
                        Some(selector) => selected(selector, |key| labels.get(key)),
                        None => pod.namespace == policy.namespace,
                    };
                    here && match pods {
                        Some(selector) => selected(selector, |key| pod.labels.get(key)),
                        None => true,
                    }
                })));
            }
        }
    }
    all
}

/// Ports by number, and those by name.
fn ports(rule: &Rule) -> (Ports, Ports) {
    if rule.ports.is_empty() {
        return (Ports::All, Ports::These(Vec::new()));
    }
    let (mut numbers, mut names) = (Vec::new(), Vec::new());
    for entry in &rule.ports {
        let protocol = entry.protocol.unwrap_or(Protocol::Tcp);
        match entry.port {
            None => numbers.push((protocol, 0, 65535)),
            Some(Port::Number(first)) => {
                numbers.push((protocol, first, entry.end.unwrap_or(first)));
            }
            Some(Port::Name(name)) => {
                let of_name = SERVED.iter().filter(|s| s.0 == name && s.1 == protocol);
                names.extend(of_name.map(|s| (protocol, s.2, s.2)));
            }
        }
    }
    (Ports::These(numbers), Ports::These(names))
}

fn selected<'a>(selector: &Selector, label: impl Fn(&str) -> Option<&'a String>) -> bool {
    let pairs = selector
        .labels
        .iter()
        .all(|(key, value)| label(key) == Some(value));
    pairs
        && selector.expressions.iter().all(|e| {
            let has = label(e.key).is_some_and(|value| e.values.iter().any(|v| v == value));
            match e.operator {
                Operator::In => has,
                Operator::NotIn => !has,
            }
        })
}

/// The policy that says what the cluster's network policies say.
pub fn translate(cluster: &Cluster) -> String {
    let (no_way_out, egress) = side(cluster, true);
    let (no_way_in, ingress) = side(cluster, false);
    let mut segments: Vec<(Addresses, String)> = Vec::new();
    let mut rules = String::new();
    for (o, out) in egress.iter().enumerate() {
        for (i, into) in ingress.iter().enumerate() {
            let from = common(&out.subjects, &into.peers);
            let to = common(&out.peers, &into.subjects);
            let ports = out.ports.common(&into.ports);
            let nothing = from.is_empty() || to.is_empty() || ports.is_empty();
            if nothing || (out.free && into.free) {
                continue;
            }
            let (from, to) = (name(&mut segments, from), name(&mut segments, to));
            let services = ports.words();
            writeln!(
                rules,
                "  - {{ name: out-{o}-in-{i}, from: [{from}], to: [{to}], services: [{services}] }}"
            )
            .unwrap();
        }
    }
    let mut text = "version: 1\ndefaults: { mode: enforce, unsegmented: allow }\n".to_owned();
    let guards = [
        ("isolated-out", "outbound", no_way_out),
        ("isolated-in", "inbound", no_way_in),
    ];
    let mut lines = String::new();
    for (name, protect, pods) in guards {
        if !pods.is_empty() {
            let members = members(&of_pods(pods));
            writeln!(
                lines,
                "  {name}: {{ protect: {protect}, members: [{members}] }}"
            )
            .unwrap();
        }
    }
    for (addresses, name) in &segments {
        let members = members(addresses);
        writeln!(lines, "  {name}: {{ mode: off, members: [{members}] }}").unwrap();
    }
    if !lines.is_empty() {
        text += "segments:\n";
        text += &lines;
    }
    if !rules.is_empty() {
        text += "rules:\n";
        text += &rules;
    }
    text
}

/// The segment of these addresses.
fn name(segments: &mut Vec<(Addresses, String)>, addresses: Addresses) -> String {
    if addresses == everybody_but(&[]) {
        return "any".to_owned();
    }
    if let Some((_, name)) = segments.iter().find(|(known, _)| *known == addresses) {
        return name.clone();
    }
    let name = format!("set-{}", segments.len());
    segments.push((addresses, name.clone()));
    name
}

fn members(addresses: &Addresses) -> String {
    let prefix = |p: &Prefix| format!("\"{}/{}\"", p.ip, p.length);
    let member = |part: &Part| {
        let mut text = format!("{{cidr: {}", prefix(&part.prefix));
        if !part.holes.is_empty() {
            let holes: Vec<String> = part.holes.iter().map(prefix).collect();
            write!(text, ", except: [{}]", holes.join(", ")).unwrap();
        }
        text + "}"
    };
    addresses.iter().map(member).collect::<Vec<_>>().join(", ")
}
