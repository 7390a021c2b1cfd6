//! An input of the `packets` target: a policy, and packets in their order.
//!
//! ```text
//! policy u8 { flags u8, argument u8, length u16 BE, bytes }*
//! ```
//! Any bytes are a script. The last packet may be shorter than its length says.

use std::sync::LazyLock;

use enforcer::{compile::Image, policy::model::Environment, policy::model::Policy};
use enforcer_common::packet::Link;

use crate::{host, kernel};

/// Of longer scripts the rest is left out.
pub const MAX_STEPS: usize = 24;
/// Policies that follow each other in one script, at most.
pub const MAX_SWAPS: usize = 3;

pub const INGRESS: u8 = 1;
/// The argument is a VLAN tag in metadata.
pub const VLAN: u8 = 1 << 1;
/// No Ethernet header.
pub const L3: u8 = 1 << 2;
/// The argument names the policy from here on.
pub const SWAP: u8 = 1 << 3;
/// The argument says how much time has gone by.
pub const WAIT: u8 = 1 << 4;
/// On the other interface.
pub const OTHER: u8 = 1 << 5;
/// Merged segments, which may be longer than their length field can say.
pub const GSO: u8 = 1 << 6;
/// The host's own multicast, looped back.
pub const LOOPED: u8 = 1 << 7;

/// Around every bound of a flow's age.
const SECONDS: [u64; 8] = [1, 59, 61, 119, 121, 181, 601, 28_801];

/// By number in scripts. The first denies all, the second denies nothing.
pub const TEXTS: [&str; 6] = [
    r#"
version: 1
segments:
  all: { members: [{cidr: 0.0.0.0/0}, {cidr: "::/0"}] }
"#,
    r#"
version: 1
defaults: { mode: observe, unsegmented: deny }
segments:
  all: { members: [{cidr: 0.0.0.0/0}, {cidr: "::/0"}] }
rules:
  - { name: none, from: [any], to: [any], services: [tcp/22], action: deny }
"#,
    r#"
version: 1
segments:
  a: { members: [{cidr: 10.77.0.1/32}, {cidr: "fd77::1/128"}] }
  b: { members: [{cidr: 10.77.0.2/32}, {cidr: "fd77::2/128"}] }
rules:
  - { name: web, from: [a], to: [b], services: [tcp/8080, udp/4444, sctp/any, ping, proto/gre] }
  - { name: group, from: [a], to: [multicast], services: [udp/5353] }
"#,
    r#"
version: 1
defaults: { mode: observe }
segments:
  a: { members: [{cidr: 10.77.0.1/32}, {cidr: "fd77::1/128"}], mode: enforce, interfaces: [eth0] }
  b: { members: [{cidr: 10.77.0.0/29}, {cidr: "fd77::/125"}], protect: inbound }
rules:
  - { name: some, from: [a], to: [b], services: [tcp/8080], session: { max: 10m, idle: 60s } }
  - { name: none, from: [b], to: [a], services: [udp/any], action: deny }
"#,
    r#"
version: 1
defaults: { mode: enforce, unsegmented: deny }
segments:
  a: { members: [{cidr: 10.77.0.1/32}, {cidr: "fd77::1/128"}], mode: "off" }
  b: { members: [{cidr: 10.77.0.2/32}, {cidr: "fd77::2/128"}], mode: observe }
rules:
  - { name: back, from: [b], to: [a], services: [any] }
  - { name: mine, from: [host], to: [unsegmented], services: [any] }
"#,
    r#"
version: 1
segments:
  all: { members: [{cidr: 0.0.0.0/0}, {cidr: "::/0"}] }
rules:
  - { name: everything, from: [any], to: [any], services: [any] }
"#,
];

/// A policy and its images, each of a generation of its own, in growing order over all policies.
pub struct Compiled {
    pub policy: Policy,
    pub images: Vec<Image>,
}

/// The host's own addresses and interfaces.
pub static ENVIRONMENT: LazyLock<Environment> = LazyLock::new(|| Environment {
    host_addresses: ["10.77.0.2".parse().unwrap(), "fd77::2".parse().unwrap()].into(),
    interfaces: [(1, "eth0".to_owned()), (2, "eth1".to_owned())].into(),
});

/// What [`TEXTS`] say.
pub static POLICIES: LazyLock<Vec<Compiled>> = LazyLock::new(|| {
    let compile = |(number, text): (u32, &&str)| {
        let policy = host::policy(text);
        let image = kernel::compile(&policy, &ENVIRONMENT);
        let count = u32::try_from(TEXTS.len()).unwrap();
        let images = (0..=u32::try_from(MAX_SWAPS).unwrap())
            .map(|swap| image.clone().with_generation(1 + swap * count + number))
            .collect();
        Compiled { policy, images }
    };
    (0..).zip(&TEXTS).map(compile).collect()
});

/// One packet, and what happens before it.
#[derive(Clone, Debug)]
pub struct Step<'a> {
    pub policy: usize,
    /// How many policies came before this one.
    pub swaps: usize,
    /// Seconds since the packet before.
    pub waited: u64,
    pub link: Link,
    pub bytes: &'a [u8],
}

/// Reads a script.
pub fn decode(data: &[u8]) -> Vec<Step<'_>> {
    let Some((first, mut rest)) = data.split_first() else {
        return Vec::new();
    };
    let mut policy = usize::from(*first) % TEXTS.len();
    let (mut swaps, mut steps) = (0, Vec::new());
    while let [flags, argument, high, low, tail @ ..] = rest {
        if steps.len() == MAX_STEPS {
            break;
        }
        let has = |flag: u8| flags & flag != 0;
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(tail.len());
        let (bytes, behind) = tail.split_at(length);
        rest = behind;
        if has(SWAP) && swaps < MAX_SWAPS {
            policy = usize::from(*argument) % TEXTS.len();
            swaps += 1;
        }
        let waited = if has(WAIT) {
            SECONDS[usize::from(*argument) % SECONDS.len()]
        } else {
            0
        };
        let link = Link {
            ethernet: !has(L3),
            protocol: match (has(L3), bytes.first().map_or(0, |b| b >> 4)) {
                (true, 4) => 0x0800,
                (true, 6) => 0x86dd,
                (true, _) => u16::from(*argument),
                (false, _) => 0,
            },
            vlan: (has(VLAN) && !has(L3)).then_some(u16::from(*argument)),
            ingress: has(INGRESS),
            ifindex: if has(OTHER) { 2 } else { 1 },
            slot: if has(OTHER) { 2 } else { 1 },
            gso: has(GSO),
            looped: has(LOOPED),
        };
        steps.push(Step {
            policy,
            swaps,
            waited,
            link,
            bytes,
        });
    }
    steps
}

/// Writes a script of packets (flags, argument, bytes).
pub fn encode(policy: u8, packets: &[(u8, u8, Vec<u8>)]) -> Vec<u8> {
    let mut script = vec![policy];
    for (flags, argument, bytes) in packets {
        script.extend([*flags, *argument]);
        script.extend(u16::try_from(bytes.len()).unwrap().to_be_bytes());
        script.extend(bytes);
    }
    script
}
