//! Frames below IP: each essential passes until it is switched off, others by their ethertype.

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup},
    link::{self, Delivered},
    netns::Pair,
    seen::moved,
    traffic::QUIET,
    wire::{self, Packets},
};

use crate::lab::NOTHING;

/// Essential, its group, ethertype or (of 802.3) length, first bytes.
const ESSENTIALS: [(&str, [u8; 6], u16, &[u8]); 5] = [
    ("lldp", [1, 0x80, 0xc2, 0, 0, 0x0e], 0x88cc, &[2, 7, 4]),
    ("stp", [1, 0x80, 0xc2, 0, 0, 0], 38, &[0x42, 0x42, 3, 0, 0]),
    ("eapol", [1, 0x80, 0xc2, 0, 0, 3], 0x888e, &[2, 1, 0, 0]),
    ("slow", [1, 0x80, 0xc2, 0, 0, 2], 0x8809, &[1, 1]),
    ("ptp", [1, 0x1b, 0x19, 0, 0, 0], 0x88f7, &[0, 2]),
];
/// What packet sockets call 802.3 frames with LLC.
const LLC: u16 = 4;

struct Link {
    net: Pair,
    peer_link: [u8; 6],
    out: Packets,
    back: Packets,
}

impl Link {
    fn new() -> Self {
        let net = Pair::new();
        Self {
            peer_link: wire::link_address(&net.peer, "eth0"),
            out: Packets::new(&net.peer, "eth0", false),
            back: Packets::new(&net.host, "eth0", false),
            net,
        }
    }

    /// Sends a frame each way: both pass or neither does, and the counters say why.
    fn each_way(
        &self,
        daemon: &Daemon<'_>,
        (to, ethertype, bytes): ([u8; 6], u16, &[u8]),
        (outcome, reason): (&str, &str),
    ) {
        let kind = if ethertype < 0x600 { LLC } else { ethertype };
        for (hook, from, at) in [
            ("tc_ingress", &self.out, &self.net.host),
            ("tc_egress", &self.back, &self.net.peer),
        ] {
            let frame = link::ethernet(self.peer_link, to, ethertype, bytes);
            let delivered = Delivered::new(at, "eth0", kind);
            let [counted] = moved(daemon, [(hook, outcome, reason)], || {
                // ENOBUFS: dropped on the way out.
                let _ = from.try_send(&frame);
            });
            // Others use the same links: ARP is essential, too.
            assert!(counted >= 1, "{hook} {outcome} {reason}: {frame:02x?}");
            let passes = outcome == "allowed";
            let limit = if passes { LONG } else { QUIET };
            assert_eq!(
                delivered.find(limit, |found| found == frame).is_some(),
                passes,
                "{hook} {frame:02x?}"
            );
        }
    }
}

#[test]
fn frames_of_essential_protocols_pass_until_they_are_switched_off() {
    let link = Link::new();
    let daemon = Setup::new(&link.net.host, "eth0", NOTHING)
        .with_settings("version: 1\n")
        .start();
    for (_, to, ethertype, bytes) in ESSENTIALS {
        link.each_way(&daemon, (to, ethertype, bytes), ("allowed", "essential"));
    }
    for (off, ..) in ESSENTIALS {
        let before = daemon.generation();
        daemon
            .setup
            .write_settings(&format!("version: 1\nessentials: {{off: [{off}]}}\n"));
        daemon.wait_swapped(before);
        for (name, to, ethertype, bytes) in ESSENTIALS {
            let expected = if name == off {
                ("denied", "ethertype")
            } else {
                ("allowed", "essential")
            };
            link.each_way(&daemon, (to, ethertype, bytes), expected);
        }
    }
}

#[test]
fn frames_that_are_no_ip_are_counted_and_dropped_unless_they_are_listed() {
    let bridges = [1, 0x80, 0xc2, 0, 0, 0];
    let frames: [([u8; 6], u16, &[u8]); 6] = [
        // IPX and SNAP over LLC; a spanning tree that is not sent to bridges; LLC to bridges that
        // is no spanning tree.
        (link::BROADCAST, 46, &[0xe0, 0xe0, 3]),
        (link::BROADCAST, 46, &[0xaa, 0xaa, 3, 0, 0, 0, 8, 0]),
        (link::BROADCAST, 38, &[0x42, 0x42, 3]),
        (bridges, 46, &[0xfe, 0xfe, 3]),
        (link::BROADCAST, 0x8847, &[0, 0, 0x11, 64]),
        (link::BROADCAST, 0x88b5, &[1]),
    ];
    let link = Link::new();
    let daemon = Setup::new(&link.net.host, "eth0", NOTHING)
        .with_settings("version: 1\n")
        .start();
    for frame in frames {
        link.each_way(&daemon, frame, ("denied", "ethertype"));
    }
    let before = daemon.generation();
    daemon
        .setup
        .write_settings("version: 1\nethertypes: [llc, 0x88b5]\n");
    daemon.wait_swapped(before);
    for frame in frames {
        let expected = if frame.1 == 0x8847 {
            ("denied", "ethertype")
        } else {
            ("allowed", "ethertype_listed")
        };
        link.each_way(&daemon, frame, expected);
    }
}
