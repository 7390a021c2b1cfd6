//! What a cluster says about its network: namespaces, pods, policies, and how they change. Data
//! only: what it means is for `matcher` and `translate`, each on its own.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use enforcer_tests::netns::Family;

pub type Labels = BTreeMap<String, String>;

/// `key=value` pairs, separated by commas.
pub fn labels(text: &str) -> Labels {
    text.split(',')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap();
            (key.to_owned(), value.to_owned())
        })
        .collect()
}

/// A label selector: all of both must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    pub labels: Labels,
    pub expressions: Vec<Expression>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expression {
    pub key: &'static str,
    pub operator: Operator,
    pub values: Vec<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    In,
    NotIn,
}

impl Selector {
    pub fn everything() -> Self {
        Self::default()
    }

    pub fn of(text: &str) -> Self {
        Self {
            labels: labels(text),
            expressions: Vec::new(),
        }
    }

    pub fn expression(key: &'static str, operator: Operator, values: &[&'static str]) -> Self {
        Self {
            labels: Labels::new(),
            expressions: vec![Expression {
                key,
                operator,
                values: values.to_vec(),
            }],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    pub fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }

    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    Number(u16),
    Name(&'static str),
}

/// An entry of `ports`. No protocol means TCP, no port means all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyPort {
    pub protocol: Option<Protocol>,
    pub port: Option<Port>,
    pub end: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// No namespace selector means the policy's own namespace, no pod selector all pods.
    Pods {
        pods: Option<Selector>,
        namespaces: Option<Selector>,
    },
    Block {
        cidr: (IpAddr, u8),
        except: Vec<(IpAddr, u8)>,
    },
}

/// No ports: every port of every protocol. No peers: everybody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    pub ports: Vec<PolicyPort>,
    pub peers: Vec<Peer>,
}

/// A direction that is there isolates the pods, whatever its rules are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    pub namespace: &'static str,
    pub name: &'static str,
    pub pods: Selector,
    pub ingress: Option<Vec<Rule>>,
    pub egress: Option<Vec<Rule>>,
}

/// Where a pod is: fixed, so that address blocks mean something. Blocks of 8 and of 4 bits around
/// z/c hold y and z, and three of those.
const PLACES: [(&str, &str, u8, u8); 13] = [
    ("x", "a", 1, 2),
    ("x", "b", 1, 3),
    ("x", "c", 1, 4),
    ("x", "d", 1, 5),
    ("y", "a", 2, 3),
    ("y", "b", 2, 17),
    ("y", "c", 2, 18),
    ("z", "a", 2, 33),
    ("z", "b", 2, 6),
    ("z", "c", 2, 5),
    ("y-2", "a", 3, 2),
    ("y-2", "b", 3, 3),
    ("w", "a", 4, 2),
];

/// The address with these last two parts.
pub fn address(family: Family, upper: u8, lower: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 40, upper, lower).into(),
        Family::V6 => {
            Ipv6Addr::new(0xfd40, 0, 0, 0, 0, 0, u16::from(upper), u16::from(lower)).into()
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    pub namespace: &'static str,
    pub name: &'static str,
    pub labels: Labels,
    /// Unlike that of every other pod of the table.
    pub number: u8,
    pub v4: IpAddr,
    pub v6: IpAddr,
}

impl Pod {
    fn new(namespace: &'static str, name: &'static str, labels: Labels) -> Self {
        let place = PLACES
            .iter()
            .position(|p| (p.0, p.1) == (namespace, name))
            .unwrap();
        let (_, _, upper, lower) = PLACES[place];
        Self {
            namespace,
            name,
            labels,
            number: u8::try_from(place).unwrap(),
            v4: address(Family::V4, upper, lower),
            v6: address(Family::V6, upper, lower),
        }
    }

    pub fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }

    pub fn is_at(&self, ip: IpAddr) -> bool {
        ip == self.v4 || ip == self.v6
    }
}

/// The ports that every pod serves, with the names that they have.
pub const SERVED: [(&str, Protocol, u16); 6] = [
    ("serve-80-tcp", Protocol::Tcp, 80),
    ("serve-81-tcp", Protocol::Tcp, 81),
    ("serve-80-udp", Protocol::Udp, 80),
    ("serve-81-udp", Protocol::Udp, 81),
    ("serve-80-sctp", Protocol::Sctp, 80),
    ("serve-81-sctp", Protocol::Sctp, 81),
];

#[derive(Clone, Debug)]
pub struct Cluster {
    pub namespaces: BTreeMap<&'static str, Labels>,
    pub pods: Vec<Pod>,
    pub policies: Vec<NetworkPolicy>,
}

/// What happens between two rounds of probes.
#[derive(Clone, Debug)]
pub enum Action {
    Create(NetworkPolicy),
    Update(NetworkPolicy),
    Delete {
        namespace: &'static str,
        name: &'static str,
    },
    CreateNamespace(&'static str, &'static str),
    LabelNamespace(&'static str, &'static str),
    DeleteNamespace(&'static str),
    CreatePod(&'static str, &'static str, &'static str),
    LabelPod(&'static str, &'static str, &'static str),
    DeletePod(&'static str, &'static str),
}

impl Cluster {
    /// Namespaces x, y, z with pods a, b, c each.
    pub fn new() -> Self {
        let mut this = Self {
            namespaces: BTreeMap::new(),
            pods: Vec::new(),
            policies: Vec::new(),
        };
        for (namespace, labels) in [("x", "ns=x"), ("y", "ns=y"), ("z", "ns=z")] {
            this.act(&Action::CreateNamespace(namespace, labels));
            for (pod, labels) in [("a", "pod=a"), ("b", "pod=b"), ("c", "pod=c")] {
                this.act(&Action::CreatePod(namespace, pod, labels));
            }
        }
        this
    }

    fn policy(&self, namespace: &str, name: &str) -> Option<usize> {
        let is = |p: &NetworkPolicy| (p.namespace, p.name) == (namespace, name);
        self.policies.iter().position(is)
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<usize> {
        let is = |p: &Pod| (p.namespace, p.name) == (namespace, name);
        self.pods.iter().position(is)
    }

    /// Applies a change, which must be one.
    pub fn act(&mut self, action: &Action) {
        match action {
            Action::Create(policy) => {
                assert_eq!(self.policy(policy.namespace, policy.name), None);
                self.policies.push(policy.clone());
            }
            Action::Update(policy) => {
                let index = self.policy(policy.namespace, policy.name).unwrap();
                assert_ne!(self.policies[index], *policy);
                self.policies[index] = policy.clone();
            }
            Action::Delete { namespace, name } => {
                let index = self.policy(namespace, name).unwrap();
                self.policies.remove(index);
            }
            Action::CreateNamespace(name, labels) => {
                assert!(!self.namespaces.contains_key(name));
                self.namespaces.insert(name, Labels::new());
                self.label_namespace(name, labels);
            }
            Action::LabelNamespace(name, labels) => self.label_namespace(name, labels),
            Action::DeleteNamespace(name) => {
                self.namespaces.remove(name).unwrap();
                self.pods.retain(|pod| pod.namespace != *name);
                self.policies.retain(|policy| policy.namespace != *name);
            }
            Action::CreatePod(namespace, name, text) => {
                assert!(self.namespaces.contains_key(namespace));
                assert_eq!(self.pod(namespace, name), None);
                self.pods.push(Pod::new(namespace, name, labels(text)));
            }
            Action::LabelPod(namespace, name, text) => {
                let index = self.pod(namespace, name).unwrap();
                self.pods[index].labels = labels(text);
            }
            Action::DeletePod(namespace, name) => {
                let index = self.pod(namespace, name).unwrap();
                self.pods.remove(index);
            }
        }
    }

    /// The label with its name is one that a namespace always has.
    fn label_namespace(&mut self, name: &'static str, text: &str) {
        let mut labels = labels(text);
        labels.insert("kubernetes.io/metadata.name".to_owned(), name.to_owned());
        *self.namespaces.get_mut(name).unwrap() = labels;
    }
}
