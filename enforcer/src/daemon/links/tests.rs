//! Hooks on interfaces that come, go and change, over a dataplane in memory.

use std::sync::{Arc, Mutex};

use super::*;
use crate::daemon::{environment::Vlan, fake::Handle};

fn link(ifindex: u32, name: &str) -> Link {
    Link {
        ifindex,
        name: name.to_owned(),
        kind: match name {
            "lo" => 772,
            "can0" => 280,
            _ => 1,
        },
        up: true,
        loopback: name == "lo",
        device: String::new(),
        master: None,
        vlan: None,
    }
}

fn vlan(ifindex: u32, name: &str, parent: u32, vid: u16) -> Link {
    Link {
        device: "vlan".to_owned(),
        vlan: Some(Vlan {
            parent: Some(parent),
            vid,
            service_tag: false,
        }),
        ..link(ifindex, name)
    }
}

fn host(links: &[(u32, &str)]) -> Host {
    Host {
        links: links.iter().map(|(i, name)| link(*i, name)).collect(),
        ..Host::default()
    }
}

fn setup(patterns: &[&str]) -> (Handle, SharedDataplane, Links) {
    let fake = Handle::default();
    fake.lock().applied.push((1, 1));
    let dataplane: SharedDataplane = Arc::new(Mutex::new(fake.open(0)));
    let selection = Selection {
        wanted: patterns.iter().map(|p| p.parse().unwrap()).collect(),
        exempt: Vec::new(),
    };
    (fake, dataplane, Links::new(selection, SocketHooks::Refuse))
}

/// Those that are asked for.
fn sync(links: &mut Links, dataplane: &SharedDataplane, host: &Host) -> Vec<InterfaceStatus> {
    let mut statuses = links.sync(dataplane, host, Effort::Looked).statuses;
    statuses.retain(InterfaceStatus::is_asked_for);
    statuses
}

fn attached(fake: &Handle) -> Vec<u32> {
    fake.lock().attached.iter().copied().collect()
}

#[test]
fn hooks_follow_interfaces_that_come_go_and_change_names() {
    let (fake, dataplane, mut links) = setup(&["veth*", "eth0"]);
    sync(
        &mut links,
        &dataplane,
        &host(&[(1, "lo"), (2, "eth0"), (3, "veth1"), (4, "x")]),
    );
    assert_eq!(attached(&fake), [2, 3]);
    sync(
        &mut links,
        &dataplane,
        &host(&[(2, "eth0"), (4, "veth9"), (5, "veth2")]),
    );
    assert_eq!(attached(&fake), [2, 4, 5]);
    // Away and back between two looks: the hooks are gone with the first one.
    fake.lock().attached.remove(&5);
    links.removed(&dataplane, &[5, 99]);
    let statuses = sync(&mut links, &dataplane, &host(&[(4, "veth9"), (5, "veth2")]));
    assert_eq!(attached(&fake), [4, 5]);
    let missing = statuses.iter().find(|s| s.name == "eth0").unwrap();
    assert!(!missing.enforced && missing.ifindex == 0);
}

#[test]
fn programs_that_others_took_off_are_attached_again() {
    let (fake, dataplane, mut links) = setup(&["eth*"]);
    let host = host(&[(2, "eth0"), (3, "eth1")]);
    sync(&mut links, &dataplane, &host);
    fake.lock().stolen = vec![3];
    fake.lock().attached.remove(&3);
    links.verify(&dataplane).unwrap();
    let statuses = sync(&mut links, &dataplane, &host);
    assert_eq!(attached(&fake), [2, 3]);
    assert!(statuses.iter().all(|s| s.enforced));
    // One that went away is not missed.
    fake.lock().stolen = vec![3];
    links.verify(&dataplane).unwrap();
    assert_eq!(
        sync(&mut links, &dataplane, &self::host(&[(2, "eth0")])).len(),
        1
    );
    assert!(links.stolen.is_empty());
}

#[test]
fn a_failure_is_reported_and_tried_again() {
    let (fake, dataplane, mut links) = setup(&["eth0"]);
    fake.lock().refuse_attach = true;
    let status = sync(&mut links, &dataplane, &host(&[(2, "eth0")])).remove(0);
    assert!(!status.enforced && status.hooks.is_empty());
    assert!(status.error.unwrap().contains("attach"));
    // Looking again would tell nothing new of it.
    let roster = links.sync(&dataplane, &host(&[(2, "eth0")]), Effort::Told);
    assert!(!roster.failed && !roster.statuses[0].enforced);
    let both = host(&[(2, "eth0"), (3, "eth0")]);
    assert!(links.sync(&dataplane, &both, Effort::Told).failed);
    fake.lock().refuse_attach = false;
    let status = sync(&mut links, &dataplane, &host(&[(2, "eth0")])).remove(0);
    assert!(status.enforced && status.error.is_none());
}

#[test]
fn what_cannot_be_taken_off_is_a_problem_and_tried_again() {
    let (fake, dataplane, mut links) = setup(&["veth*"]);
    sync(&mut links, &dataplane, &host(&[(3, "veth1")]));
    fake.lock().refuse_detach = true;
    sync(&mut links, &dataplane, &host(&[(3, "eth1")]));
    links.verify(&dataplane).unwrap();
    assert_eq!(attached(&fake), [3]);
    let problems: Vec<_> = links.problems().collect();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].starts_with("veth1 is still enforced"));
    fake.lock().refuse_detach = false;
    links.verify(&dataplane).unwrap();
    assert!(attached(&fake).is_empty());
    assert_eq!(links.problems().count(), 0);
    // One that is asked for again is not taken off by that.
    sync(&mut links, &dataplane, &host(&[(3, "veth1")]));
    fake.lock().refuse_detach = true;
    sync(&mut links, &dataplane, &host(&[(3, "eth1")]));
    sync(&mut links, &dataplane, &host(&[(3, "veth1")]));
    fake.lock().refuse_detach = false;
    links.verify(&dataplane).unwrap();
    assert_eq!(attached(&fake), [3]);
}

#[test]
fn a_glob_spares_the_loopback_and_a_name_does_not() {
    let (fake, dataplane, mut links) = setup(&["*"]);
    let all = host(&[(1, "lo"), (2, "eth0"), (3, "can0")]);
    assert_eq!(sync(&mut links, &dataplane, &all).len(), 1);
    assert_eq!(attached(&fake), [2]);
    links.sync_hooks(&dataplane, &all, false).unwrap();
    assert_eq!(links.socket_hooks(), Some(SocketHooks::Refuse));
    let mut vrf = host(&[(2, "eth0"), (4, "red")]);
    vrf.links[1].device = "vrf".to_owned();
    assert_eq!(sync(&mut links, &dataplane, &vrf).len(), 1);
    links.sync_hooks(&dataplane, &vrf, false).unwrap();
    assert_eq!(links.socket_hooks(), Some(SocketHooks::Refuse));
    let (fake, dataplane, mut links) = setup(&["lo"]);
    sync(&mut links, &dataplane, &host(&[(1, "lo")]));
    assert_eq!(attached(&fake), [1]);
}

#[test]
fn socket_hooks_refuse_only_while_every_way_out_is_enforced() {
    let (fake, dataplane, mut links) = setup(&["eth*"]);
    let mut mode = |host: &Host, stale| {
        sync(&mut links, &dataplane, host);
        links.sync_hooks(&dataplane, host, stale).unwrap();
        let hooks = fake.lock().hooks;
        let why = links.hooks_reason();
        assert_eq!(why.is_some(), hooks == Some(SocketHooks::Observe));
        hooks
    };
    let all = host(&[(1, "lo"), (2, "eth0")]);
    assert_eq!(mode(&all, false), Some(SocketHooks::Refuse));
    let mut open = host(&[(1, "lo"), (2, "eth0"), (3, "wg0")]);
    assert_eq!(mode(&open, false), Some(SocketHooks::Observe));
    open.links[2].up = false;
    assert_eq!(mode(&open, false), Some(SocketHooks::Refuse));
    assert_eq!(mode(&all, true), Some(SocketHooks::Observe));
    assert_eq!(mode(&all, false), Some(SocketHooks::Refuse));
}

#[test]
fn a_tag_goes_to_its_device_after_the_programs_and_back_before() {
    let (fake, dataplane, mut links) = setup(&["eth*"]);
    let mut host = host(&[(2, "eth0")]);
    host.links.push(vlan(3, "eth0.20", 2, 20));
    sync(&mut links, &dataplane, &host);
    let log = || std::mem::take(&mut fake.lock().log);
    assert_eq!(log(), ["attach 2", "attach 3", "vlans {2014}"]);
    sync(&mut links, &dataplane, &host);
    assert!(log().is_empty());
    // Its parent joins a bridge, and leaves it.
    host.links.push(Link {
        device: "bridge".to_owned(),
        ..link(4, "br0")
    });
    host.links[0].master = Some(4);
    sync(&mut links, &dataplane, &host);
    assert_eq!(log(), ["vlans {}"]);
    host.links[0].master = None;
    sync(&mut links, &dataplane, &host);
    assert_eq!(log(), ["vlans {2014}"]);
    // Somebody takes the programs off the device; they come back.
    fake.lock().stolen = vec![3];
    links.verify(&dataplane).unwrap();
    assert_eq!(log(), ["vlans {}", "detach 3"]);
    fake.lock().attached.remove(&3);
    sync(&mut links, &dataplane, &host);
    assert_eq!(log(), ["attach 3", "vlans {2014}"]);
    // Another name, which nobody asked for.
    host.links[1].name = "guest".to_owned();
    sync(&mut links, &dataplane, &host);
    assert_eq!(log(), ["vlans {}", "detach 3"]);
    host.links[1].name = "eth0.20".to_owned();
    sync(&mut links, &dataplane, &host);
    log();
    links.removed(&dataplane, &[3]);
    assert_eq!(log(), ["vlans {}"]);
    // A device that cannot be enforced leaves its tag where it is judged.
    fake.lock().refuse_attach = true;
    sync(&mut links, &dataplane, &host);
    assert!(fake.lock().vlans.is_empty());
}

#[test]
fn interfaces_keep_their_slots_and_leave_them_to_images_that_know_them() {
    let (fake, dataplane, mut links) = setup(&["eth*"]);
    let none = BTreeSet::new();
    let both = host(&[(1, "lo"), (2, "eth0"), (3, "eth1")]);
    let named = links.name(&both, &none);
    assert_eq!(
        named,
        [(1, "eth0".to_owned()), (2, "eth1".to_owned())].into()
    );
    let statuses = sync(&mut links, &dataplane, &both);
    assert_eq!(fake.lock().slots, [(2, 1), (3, 2)].into());
    assert_eq!(statuses[1].slot, 2);
    // eth0 is gone, and an image in force knows it as 1.
    let taken: BTreeSet<u32> = named.into_keys().collect();
    links.removed(&dataplane, &[2]);
    let others = host(&[(3, "eth7"), (4, "eth4")]);
    let named = links.name(&others, &taken);
    assert_eq!(
        named,
        [(2, "eth7".to_owned()), (3, "eth4".to_owned())].into()
    );
    sync(&mut links, &dataplane, &others);
    assert_eq!(fake.lock().slots[&4], 3);
    let named = links.name(&host(&[(5, "eth5")]), &BTreeSet::from([2, 3]));
    assert_eq!(named, [(1, "eth5".to_owned())].into());
}

#[test]
fn an_interface_beyond_the_last_slot_is_told_and_gets_one_later() {
    let (fake, dataplane, mut links) = setup(&["eth0"]);
    let host = host(&[(2, "eth0")]);
    let all: BTreeSet<u32> = (1..1_024).collect();
    assert!(links.name(&host, &all).is_empty());
    sync(&mut links, &dataplane, &host);
    assert_eq!(fake.lock().slots[&2], 0);
    assert!(links.warnings(&host)[0].contains("1023"));
    links.name(&host, &BTreeSet::from([1]));
    sync(&mut links, &dataplane, &host);
    assert_eq!(fake.lock().slots[&2], 2);
    assert!(links.warnings(&host).is_empty());
}

#[test]
fn every_interface_is_listed_for_what_becomes_of_it() {
    let (fake, dataplane, mut links) = setup(&["eth0", "eth9", "kind:veth"]);
    links.selection.exempt = vec!["veth7".parse().unwrap()];
    let mut host = host(&[
        (1, "lo"),
        (2, "eth0"),
        (3, "wlan0"),
        (4, "veth7"),
        (5, "veth8"),
        (6, "wg0"),
    ]);
    for at in [3, 4] {
        host.links[at].device = "veth".to_owned();
    }
    host.links[5].up = false;
    host.links.push(vlan(7, "eth0.20", 2, 20));
    let listed = |links: &mut Links| {
        let roster = links.sync(&dataplane, &host, Effort::Looked);
        let listed = roster.statuses.into_iter().map(|s| {
            let why = s.error.or(s.reason).unwrap_or_default();
            assert_eq!(s.enforced, s.state == InterfaceState::Enforced);
            assert_eq!(s.hooks.is_empty(), !s.enforced);
            format!("{} {} {why}", s.name, s.state.name())
        });
        (listed.collect::<Vec<_>>(), roster.failed)
    };
    let expected = [
        "eth0 enforced eth0",
        "veth8 enforced kind:veth",
        "eth9 failed no such interface; it is enforced when it appears",
        "wlan0 unprotected no --interface means it",
        "wg0 unprotected no --interface means it; it is down",
        "lo exempt loopback: what a host says to itself is not judged",
        "veth7 exempt --exempt veth7",
        "eth0.20 exempt its packets are judged on eth0",
    ];
    assert_eq!(
        listed(&mut links),
        (expected.map(str::to_owned).to_vec(), false)
    );
    fake.lock().attached.clear();
    let (_, _, mut links) = setup(&["eth0"]);
    fake.lock().refuse_attach = true;
    let (listed, failed) = listed(&mut links);
    assert!(listed[0].starts_with("eth0 failed ") && failed);
    // Its parent does not judge what it carries.
    assert!(listed.contains(&"eth0.20 unprotected no --interface means it".to_owned()));
}

#[test]
fn a_default_route_that_moves_leaves_what_it_left_enforced() {
    let (fake, dataplane, mut links) = setup(&["default-route"]);
    let mut host = host(&[(1, "lo"), (2, "eth0"), (3, "eth1")]);
    assert!(sync(&mut links, &dataplane, &host).is_empty());
    let warned = |links: &Links, host: &Host| {
        let warnings = links.warnings(host).join("\n");
        warnings.contains("no default route")
    };
    assert!(warned(&links, &host));
    host.default_routes = [2].into();
    sync(&mut links, &dataplane, &host);
    assert_eq!(attached(&fake), [2]);
    assert!(!warned(&links, &host));
    host.default_routes = [3].into();
    let statuses = sync(&mut links, &dataplane, &host);
    assert_eq!(fake.lock().log, ["attach 2", "attach 3"]);
    assert!(statuses[0].reason.as_ref().unwrap().contains("held before"));
    // It is another one that has the number then.
    links.removed(&dataplane, &[2]);
    sync(&mut links, &dataplane, &host);
    assert_eq!(attached(&fake), [3]);
}

#[test]
fn those_that_wait_are_attached_next_and_those_that_are_up_first() {
    let (fake, dataplane, mut links) = setup(&["*"]);
    let mut host = host(&[(2, "eth0"), (3, "eth1"), (4, "eth2")]);
    host.links[0].up = false;
    fake.lock().slow_attach = SLICE * 2 / 3;
    let roster = links.sync(&dataplane, &host, Effort::Told);
    assert_eq!(fake.lock().log, ["attach 3", "attach 4"]);
    assert_eq!((roster.waiting, roster.failed), (1, false));
    let waits = &roster.statuses[0];
    assert_eq!(
        (waits.state, waits.enforced),
        (InterfaceState::Failed, false)
    );
    let roster = links.sync(&dataplane, &host, Effort::Told);
    assert_eq!((roster.waiting, attached(&fake).len()), (0, 3));
    // At the start all are attached, however long it takes.
    let (fake, dataplane, mut links) = setup(&["*"]);
    fake.lock().slow_attach = SLICE;
    assert_eq!(links.sync(&dataplane, &host, Effort::Whole).waiting, 0);
    assert_eq!(attached(&fake), [2, 3, 4]);
}

#[test]
fn what_went_away_is_let_go_after_births_and_before_its_number_is_given_again() {
    let (fake, dataplane, mut links) = setup(&["*"]);
    let before = host(&[(2, "eth0"), (3, "eth1"), (4, "eth2"), (5, "eth3")]);
    sync(&mut links, &dataplane, &before);
    fake.lock().log.clear();
    links.removed(&dataplane, &[2, 3, 4]);
    assert!(fake.lock().log.is_empty());
    fake.lock().slow_attach = SLICE;
    let after = host(&[(3, "eth7"), (5, "eth3")]);
    let roster = links.sync(&dataplane, &after, Effort::Told);
    assert_eq!(fake.lock().log, ["detach 3", "attach 3"]);
    assert_eq!((roster.waiting, attached(&fake)), (2, vec![2, 3, 4, 5]));
    let roster = links.sync(&dataplane, &after, Effort::Told);
    assert_eq!((roster.waiting, attached(&fake)), (0, vec![3, 5]));
    // Nor is anything asked of those that have gone.
    links.removed(&dataplane, &[5]);
    links.verify(&dataplane).unwrap();
    assert!(attached(&fake) == [3] && links.stolen.is_empty());
}
