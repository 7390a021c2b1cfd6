//! What Kubernetes says becomes of a connection: the expected values. Written from the API's
//! description, one connection at a time; shares no code with the enforcer or the translator.

use std::net::IpAddr;

use super::model::{
    Cluster, Labels, NetworkPolicy, Operator, Peer, Pod, PolicyPort, Port, Protocol, Rule, SERVED,
    Selector,
};

/// A connection as its opener means it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    pub from: IpAddr,
    pub to: IpAddr,
    pub protocol: Protocol,
    pub port: u16,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Ingress,
    Egress,
}

/// Whether the connection may be made.
pub fn allowed(cluster: &Cluster, connection: &Connection) -> bool {
    let pod_at = |ip| cluster.pods.iter().find(|pod| pod.is_at(ip));
    let (from, to) = (pod_at(connection.from), pod_at(connection.to));
    // A pod is never kept from itself.
    if connection.from == connection.to {
        return true;
    }
    let leaves = from.is_none_or(|pod| side(cluster, pod, Direction::Egress, connection));
    let enters = to.is_none_or(|pod| side(cluster, pod, Direction::Ingress, connection));
    leaves && enters
}

/// Whether one end lets the connection through, in its direction.
fn side(cluster: &Cluster, pod: &Pod, direction: Direction, connection: &Connection) -> bool {
    let rules = |policy: &NetworkPolicy| match direction {
        Direction::Ingress => policy.ingress.clone(),
        Direction::Egress => policy.egress.clone(),
    };
    let mut isolated = false;
    for policy in &cluster.policies {
        if policy.namespace != pod.namespace || !selects(&policy.pods, &pod.labels) {
            continue;
        }
        let Some(rules) = rules(policy) else { continue };
        isolated = true;
        let other = match direction {
            Direction::Ingress => connection.from,
            Direction::Egress => connection.to,
        };
        if rules
            .iter()
            .any(|rule| permits(cluster, policy, rule, other, connection))
        {
            return true;
        }
    }
    !isolated
}

fn permits(
    cluster: &Cluster,
    policy: &NetworkPolicy,
    rule: &Rule,
    other: IpAddr,
    connection: &Connection,
) -> bool {
    let port = rule.ports.is_empty()
        || rule
            .ports
            .iter()
            .any(|port| port_is(cluster, port, connection));
    let peer = rule.peers.is_empty()
        || rule
            .peers
            .iter()
            .any(|peer| peer_is(cluster, policy, peer, other));
    port && peer
}

fn port_is(cluster: &Cluster, port: &PolicyPort, connection: &Connection) -> bool {
    if port.protocol.unwrap_or(Protocol::Tcp) != connection.protocol {
        return false;
    }
    match (port.port, port.end) {
        (None, _) => true,
        (Some(Port::Number(first)), Some(last)) => {
            first <= connection.port && connection.port <= last
        }
        (Some(Port::Number(number)), None) => number == connection.port,
        // A name is looked up where the connection goes; only pods have named ports.
        (Some(Port::Name(name)), _) => {
            let is_pod = cluster.pods.iter().any(|pod| pod.is_at(connection.to));
            is_pod && SERVED.contains(&(name, connection.protocol, connection.port))
        }
    }
}

fn peer_is(cluster: &Cluster, policy: &NetworkPolicy, peer: &Peer, ip: IpAddr) -> bool {
    match peer {
        Peer::Block { cidr, except } => {
            in_block(*cidr, ip) && !except.iter().any(|hole| in_block(*hole, ip))
        }
        Peer::Pods { pods, namespaces } => {
            let Some(pod) = cluster.pods.iter().find(|pod| pod.is_at(ip)) else {
                return false;
            };
            let namespace = match namespaces {
                None => pod.namespace == policy.namespace,
                Some(selector) => selects(selector, &cluster.namespaces[pod.namespace]),
            };
            namespace && pods.as_ref().is_none_or(|s| selects(s, &pod.labels))
        }
    }
}

fn selects(selector: &Selector, labels: &Labels) -> bool {
    for (key, value) in &selector.labels {
        if labels.get(key) != Some(value) {
            return false;
        }
    }
    for expression in &selector.expressions {
        let listed = match labels.get(expression.key) {
            Some(value) => expression.values.contains(&value.as_str()),
            None => false,
        };
        // Without the label, "not in" holds.
        if listed != (expression.operator == Operator::In) {
            return false;
        }
    }
    true
}

fn in_block((network, length): (IpAddr, u8), ip: IpAddr) -> bool {
    let same = |a: &[u8], b: &[u8]| {
        (0..usize::from(length)).all(|bit| {
            let mask = 0x80 >> (bit % 8);
            a[bit / 8] & mask == b[bit / 8] & mask
        })
    };
    match (network, ip) {
        (IpAddr::V4(a), IpAddr::V4(b)) => same(&a.octets(), &b.octets()),
        (IpAddr::V6(a), IpAddr::V6(b)) => same(&a.octets(), &b.octets()),
        _ => false,
    }
}
