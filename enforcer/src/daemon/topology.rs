//! How interfaces hang together: VLAN devices on their parents, ports on bridges, slaves on bonds.

use std::collections::BTreeMap;

use enforcer_common::wire::vlan_key;

use super::environment::{Host, Link};

/// The tags of an interface that are judged on a VLAN device: key of `VLANS` → (parent, device).
pub type Tags = BTreeMap<u64, (u32, u32)>;

/// Tags to leave to VLAN devices, where device and parent are both enforced. Not on ports of a
/// bridge: what comes in there may be switched on with its tag, past the VLAN device.
pub fn tags(host: &Host, enforced: impl Fn(u32) -> bool) -> Tags {
    let devices = host.links.iter().filter(|link| enforced(link.ifindex));
    devices
        .filter_map(|device| {
            let vlan = device.vlan?;
            let parent = host.link(vlan.parent?)?;
            let switched = host.master(parent).is_some_and(Link::is_bridge);
            if switched || !enforced(parent.ifindex) {
                return None;
            }
            let key = vlan_key(parent.ifindex, vlan.service_tag, vlan.vid);
            Some((key, (parent.ifindex, device.ifindex)))
        })
        .collect()
}

/// What an interface is, where that is more than a name: `vlan 20 on eth0`, `port of br0`.
pub fn describe(host: &Host, link: &Link) -> Option<String> {
    let mut parts = Vec::new();
    match &link.vlan {
        Some(vlan) => {
            let tag = if vlan.service_tag { "802.1ad " } else { "" };
            let parent = vlan.parent.and_then(|parent| host.link(parent));
            let parent = parent.map_or("another namespace's link", |parent| &parent.name);
            parts.push(format!("{tag}vlan {} on {parent}", vlan.vid));
        }
        None if link.is_bridge() || link.device == "bond" => parts.push(link.device.clone()),
        None => {}
    }
    if let Some(master) = host.master(link) {
        let role = match master.device.as_str() {
            "bond" => "slave",
            _ if master.is_bridge() => "port",
            _ => "member",
        };
        parts.push(format!("{role} of {}", master.name));
    }
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// Why the packets of an interface that is not enforced are judged all the same, or are none that a
/// policy judges; `None` when they pass unjudged.
pub fn judged_elsewhere(
    host: &Host,
    link: &Link,
    enforced: &impl Fn(u32) -> bool,
) -> Option<String> {
    if link.loopback {
        return Some("loopback: what a host says to itself is not judged".to_owned());
    }
    if link.is_local() {
        return Some("vrf: its packets are judged on its members".to_owned());
    }
    if !link.carries_ip() {
        return Some("carries no IP".to_owned());
    }
    if let Some(below) = on_members(host, link, enforced) {
        return Some(below);
    }
    if let Some(master) = host.master(link)
        && BUNDLES.contains(&master.device.as_str())
        && enforced(master.ifindex)
    {
        return Some(format!("its packets are judged on {}", master.name));
    }
    let parent = host.link(link.vlan?.parent?)?;
    if enforced(parent.ifindex) {
        return Some(format!("its packets are judged on {}", parent.name));
    }
    on_members(host, parent, enforced).map(|_| {
        let (name, ports) = (&parent.name, "are judged on the ports of");
        format!("its packets {ports} {name}")
    })
}

/// Kinds of devices whose packets all go through their members, and come from them.
const BUNDLES: [&str; 2] = ["bond", "team"];

/// For a bridge or a bond all of whose members are enforced.
fn on_members(host: &Host, link: &Link, enforced: &impl Fn(u32) -> bool) -> Option<String> {
    if !link.is_bridge() && !BUNDLES.contains(&link.device.as_str()) {
        return None;
    }
    let members = host
        .links
        .iter()
        .filter(|port| port.master == Some(link.ifindex));
    let members: Vec<&Link> = members.collect();
    if members.is_empty() {
        return Some(format!("a {} without members", link.device));
    }
    let all = members.iter().all(|member| enforced(member.ifindex));
    let names = || {
        members
            .iter()
            .take(NAMED)
            .map(|member| member.name.as_str())
    };
    all.then(|| {
        let more = match members.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let names: Vec<&str> = names().collect();
        format!("judged on its members: {}{more}", names.join(", "))
    })
}

/// Members that a sentence names.
const NAMED: usize = 8;

/// Where enforcing is without effect, or happens twice.
pub fn warnings(host: &Host, enforced: impl Fn(u32) -> bool) -> Vec<String> {
    let mut warnings = Vec::new();
    let masters = |link: &&Link| link.is_bridge() || link.device == "bond";
    for master in host.links.iter().filter(masters) {
        let ports = host
            .links
            .iter()
            .filter(|port| port.master == Some(master.ifindex) && enforced(port.ifindex));
        let on: Vec<&str> = ports.map(|port| port.name.as_str()).collect();
        let (name, whole) = (&master.name, enforced(master.ifindex));
        if master.is_bridge() && whole {
            if on.is_empty() {
                warnings.push(format!(
                    "{name} is a {}: packets between its ports are not judged there; enforce on \
                     its ports instead",
                    master.device
                ));
            } else {
                warnings.push(format!(
                    "{name} is enforced together with its ports ({}): packets between them and \
                     this host are judged twice; enforce on the ports alone",
                    on.join(", ")
                ));
            }
        } else if master.device == "bond" && !on.is_empty() {
            let (what, instead) = if whole {
                ("judged twice", "enforce on it alone")
            } else {
                (
                    "judged on its slaves, which come and go",
                    "enforce on it instead",
                )
            };
            warnings.push(format!(
                "{name} is a bond, and its packets are {what} ({}): {instead}",
                on.join(", ")
            ));
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::environment::Vlan;

    fn link(ifindex: u32, name: &str, device: &str, master: Option<u32>) -> Link {
        Link {
            ifindex,
            name: name.to_owned(),
            kind: 1,
            up: true,
            loopback: false,
            device: device.to_owned(),
            master,
            vlan: None,
        }
    }

    fn vlan(ifindex: u32, name: &str, parent: Option<u32>, vid: u16, service_tag: bool) -> Link {
        Link {
            vlan: Some(Vlan {
                parent,
                vid,
                service_tag,
            }),
            ..link(ifindex, name, "vlan", None)
        }
    }

    fn host(links: Vec<Link>) -> Host {
        Host {
            links,
            ..Host::default()
        }
    }

    #[test]
    fn a_tag_is_left_to_its_device_where_both_are_enforced() {
        let host = host(vec![
            link(2, "eth0", "", None),
            link(3, "eth1", "", Some(5)),
            link(4, "eth2", "", Some(6)),
            link(5, "br0", "bridge", None),
            link(6, "bond0", "bond", None),
            link(7, "ovs", "openvswitch", None),
            link(8, "eth3", "", Some(7)),
            vlan(10, "eth0.20", Some(2), 20, false),
            vlan(11, "eth0.s30", Some(2), 30, true),
            vlan(12, "eth1.20", Some(3), 20, false),
            vlan(13, "eth3.20", Some(8), 20, false),
            vlan(14, "eth2.20", Some(4), 20, false),
            vlan(15, "br0.20", Some(5), 20, false),
            vlan(16, "eth0.20.7", Some(10), 7, false),
            vlan(17, "away", None, 9, false),
            vlan(18, "gone", Some(99), 9, false),
        ]);
        let devices = |enforced: &dyn Fn(u32) -> bool| -> Vec<u32> {
            tags(&host, enforced).values().map(|(_, d)| *d).collect()
        };
        let mut all = devices(&|_| true);
        all.sort_unstable();
        assert_eq!(all, [10, 11, 14, 15, 16]);
        assert_eq!(devices(&|i| i != 2), [14, 15, 16]);
        assert!(!devices(&|i| i != 10).contains(&10));
        let found = tags(&host, |i| i == 2 || i == 11);
        assert_eq!(found, Tags::from([(1 << 63 | 2 << 12 | 30, (2, 11))]));
        let text = |i: u32| describe(&host, host.link(i).unwrap());
        assert_eq!(text(10).as_deref(), Some("vlan 20 on eth0"));
        assert_eq!(text(11).as_deref(), Some("802.1ad vlan 30 on eth0"));
        assert_eq!(text(3).as_deref(), Some("port of br0"));
        assert_eq!(text(4).as_deref(), Some("slave of bond0"));
        assert_eq!(text(5).as_deref(), Some("bridge"));
        assert_eq!(text(2), None);
    }

    #[test]
    fn what_is_not_enforced_may_be_judged_elsewhere() {
        let mut host = host(vec![
            link(2, "eth0", "", Some(5)),
            link(3, "eth1", "", Some(5)),
            link(4, "eth2", "", Some(6)),
            link(5, "br0", "bridge", None),
            link(6, "bond0", "bond", None),
            link(7, "docker0", "bridge", None),
            link(8, "red", "vrf", None),
            link(9, "eth9", "", Some(8)),
            vlan(10, "br0.20", Some(5), 20, false),
            vlan(11, "eth9.7", Some(9), 7, false),
            vlan(12, "away", None, 7, false),
            link(13, "can0", "", None),
        ]);
        host.links[11].kind = 280;
        let why = |i: u32, on: &[u32]| {
            let enforced = |ifindex: u32| on.contains(&ifindex);
            judged_elsewhere(&host, host.link(i).unwrap(), &enforced).unwrap_or_default()
        };
        assert_eq!(why(5, &[2, 3]), "judged on its members: eth0, eth1");
        // Between an open port and the host nothing is judged.
        assert_eq!(why(5, &[2]), "");
        assert_eq!(why(10, &[2]), "");
        assert_eq!(
            why(10, &[2, 3]),
            "its packets are judged on the ports of br0"
        );
        assert_eq!(why(10, &[5]), "its packets are judged on br0");
        // A bridge that is enforced judges nothing between its ports.
        assert_eq!(why(2, &[5]), "");
        assert_eq!(why(4, &[6]), "its packets are judged on bond0");
        assert_eq!(why(4, &[]), "");
        assert_eq!(why(6, &[4]), "judged on its members: eth2");
        assert_eq!(why(7, &[]), "a bridge without members");
        assert!(why(8, &[]).contains("vrf"));
        // A VRF judges nothing for its members.
        assert_eq!(why(9, &[8]), "");
        assert_eq!(why(11, &[9]), "its packets are judged on eth9");
        assert_eq!(why(12, &[9]), "");
        assert_eq!(why(13, &[]), "carries no IP");
        let many: Vec<u32> = (2..20).collect();
        let ports = many
            .iter()
            .map(|i| link(*i, &format!("p{i}"), "veth", Some(20)));
        let bridge = link(20, "br1", "bridge", None);
        let host = self::host(ports.chain([bridge]).collect());
        let why = judged_elsewhere(&host, &host.links[18], &|_| true).unwrap();
        assert!(why.ends_with("p9 and 10 more"), "{why}");
    }

    #[test]
    fn useless_and_double_enforcement_is_told() {
        let host = host(vec![
            link(2, "eth0", "", Some(5)),
            link(3, "eth1", "", Some(5)),
            link(4, "eth2", "", Some(6)),
            link(5, "br0", "bridge", None),
            link(6, "bond0", "bond", None),
        ]);
        let told = |enforced: &[u32]| warnings(&host, |i| enforced.contains(&i)).join("\n");
        assert!(told(&[5]).contains("packets between its ports are not judged"));
        assert!(told(&[2, 5]).contains("together with its ports (eth0)"));
        assert_eq!(told(&[2, 3]), "");
        // A bridge may have ports that nobody wants judged.
        assert_eq!(told(&[2]), "");
        assert!(told(&[4]).contains("enforce on it instead"));
        assert!(told(&[4, 6]).contains("judged twice (eth2): enforce on it alone"));
        assert_eq!(told(&[6]), "");
    }
}
