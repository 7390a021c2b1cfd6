//! Words for what is below IP.

use enforcer_common::image::{LLC, essential};

/// Essential protocols by name, in the order of their bits.
pub const ESSENTIALS: [(&str, u32); 9] = [
    ("arp", essential::ARP),
    ("nd", essential::ND),
    ("dhcp", essential::DHCP),
    ("multicast-membership", essential::MULTICAST_MEMBERSHIP),
    ("lldp", essential::LLDP),
    ("stp", essential::STP),
    ("eapol", essential::EAPOL),
    ("slow", essential::SLOW),
    ("ptp", essential::PTP),
];

/// Ethertypes that have a name, sorted by it; some words stand for two.
pub const ETHERTYPES: [(&str, &[u16]); 17] = [
    ("aoe", &[0x88a2]),
    ("batman", &[0x4305]),
    ("cfm", &[0x8902]),
    ("ethercat", &[0x88a4]),
    ("fcoe", &[0x8906, 0x8914]),
    ("goose", &[0x88b8]),
    ("homeplug", &[0x88e1]),
    ("llc", &[LLC as u16]),
    ("macsec", &[0x88e5]),
    ("mpls", &[0x8847, 0x8848]),
    ("mrp", &[0x88e3]),
    ("powerlink", &[0x88ab]),
    ("pppoe", &[0x8863, 0x8864]),
    ("profinet", &[0x8892]),
    ("roce", &[0x8915]),
    ("sampled-values", &[0x88ba]),
    ("wake-on-lan", &[0x0842]),
];

/// Ethertypes of essential protocols: bit, number.
pub(super) const ESSENTIAL_ETHERTYPES: [(u32, u16); 5] = [
    (essential::ARP, 0x0806),
    (essential::LLDP, 0x88cc),
    (essential::EAPOL, 0x888e),
    (essential::SLOW, 0x8809),
    (essential::PTP, 0x88f7),
];

/// Names of the essentials that `on` lacks.
pub fn essentials_off(on: u32) -> Vec<&'static str> {
    let off = ESSENTIALS.iter().filter(|(_, bit)| on & bit == 0);
    off.map(|(name, _)| *name).collect()
}

/// `mpls (0x8847)`, `0x88b5`, `llc`.
pub fn ethertype_name(number: u16) -> String {
    let named = ETHERTYPES
        .iter()
        .find(|(_, numbers)| numbers.contains(&number));
    match named {
        Some((name, _)) if u32::from(number) == LLC => (*name).to_owned(),
        Some((name, _)) => format!("{name} ({number:#06x})"),
        None => format!("{number:#06x}"),
    }
}
