//! A host and its neighbour, who sends it frames as they are.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use enforcer_tests::{
    daemon::{Daemon, LONG},
    frame,
    link::Delivered,
    netns::{Family, Netns, Pair},
    seen::moved,
    traffic::QUIET,
    wire::{self, Packets},
};

/// Everything is guarded, and nothing is allowed.
pub const NOTHING: &str = r#"version: 1
segments:
  all: { members: [{cidr: 0.0.0.0/0}, {cidr: "::/0"}] }
"#;

/// Everything is guarded; the neighbour may send the host these services.
pub fn allowing(services: &str) -> String {
    format!(
        "{NOTHING}  peer: {{ members: [{{cidr: 10.1.0.2/32}}, {{cidr: \"fd01::2/128\"}}] }}\n\
         rules:\n  - {{ name: some, from: [peer], to: [host], services: [{services}] }}\n"
    )
}

/// A link address of nobody's.
pub const STRANGER: [u8; 6] = [2, 0, 0, 0, 0, 0x99];

pub struct Lab {
    pub net: Pair,
    pub host_link: [u8; 6],
    pub peer_link: [u8; 6],
    from_peer: Packets,
    from_host: Packets,
    v4: Delivered,
    v6: Delivered,
    peer_v4: Delivered,
    peer_v6: Delivered,
}

impl Lab {
    pub fn new() -> Self {
        Self::of(Pair::new())
    }

    pub fn of(net: Pair) -> Self {
        let delivered = |at: &Netns, ethertype| Delivered::new(at, "eth0", ethertype);
        Self {
            host_link: wire::link_address(&net.host, "eth0"),
            peer_link: wire::link_address(&net.peer, "eth0"),
            from_peer: Packets::new(&net.peer, "eth0", false),
            from_host: Packets::new(&net.host, "eth0", false),
            v4: delivered(&net.host, 0x0800),
            v6: delivered(&net.host, 0x86dd),
            peer_v4: delivered(&net.peer, 0x0800),
            peer_v6: delivered(&net.peer, 0x86dd),
            net,
        }
    }

    /// A frame from the peer.
    pub fn send_frame(&self, frame: &[u8]) {
        self.from_peer.send(frame);
    }

    /// An IP packet from the peer to the host's link address, or that of its multicast group.
    pub fn send(&self, packet: &[u8]) {
        let to = self.link_of(packet, self.host_link);
        self.send_frame(&wire::ethernet(self.peer_link, to, packet));
    }

    /// An IP packet out of the host.
    pub fn send_out(&self, packet: &[u8]) {
        let to = self.link_of(packet, self.peer_link);
        // ENOBUFS: dropped on the way out.
        let _ = self
            .from_host
            .try_send(&wire::ethernet(self.host_link, to, packet));
    }

    fn link_of(&self, packet: &[u8], one: [u8; 6]) -> [u8; 6] {
        if packet[0] >> 4 == 4 {
            let to = Ipv4Addr::new(packet[16], packet[17], packet[18], packet[19]);
            if to.is_broadcast() {
                return [0xff; 6];
            }
            if to.is_multicast() {
                return [1, 0, 0x5e, packet[17] & 0x7f, packet[18], packet[19]];
            }
        } else if packet[24] == 0xff {
            return [0x33, 0x33, packet[36], packet[37], packet[38], packet[39]];
        }
        one
    }

    /// Whether the host gets the packet, or the peer if it goes `out`.
    pub fn gets(&self, out: bool, packet: &[u8], limit: Duration) -> bool {
        let at = match (out, packet[0] >> 4 == 4) {
            (false, true) => &self.v4,
            (false, false) => &self.v6,
            (true, true) => &self.peer_v4,
            (true, false) => &self.peer_v6,
        };
        at.find(limit, |frame| {
            frame.get(14..14 + packet.len()) == Some(packet)
        })
        .is_some()
    }

    /// Sends packets to the host; all are delivered, or none is, and counted so.
    pub fn all(&self, daemon: &Daemon<'_>, packets: &[Vec<u8>], outcome: &str, reason: &str) {
        self.both(daemon, false, packets, outcome, reason);
    }

    /// The same out of the host.
    pub fn all_out(&self, daemon: &Daemon<'_>, packets: &[Vec<u8>], outcome: &str, reason: &str) {
        self.both(daemon, true, packets, outcome, reason);
    }

    fn both(
        &self,
        daemon: &Daemon<'_>,
        out: bool,
        packets: &[Vec<u8>],
        outcome: &str,
        reason: &str,
    ) {
        let hook = if out { "tc_egress" } else { "tc_ingress" };
        let [counted] = moved(daemon, [(hook, outcome, reason)], || {
            for packet in packets {
                if out {
                    self.send_out(packet);
                } else {
                    self.send(packet);
                }
            }
        });
        let sent = packets.len() as u64;
        // The two kernels' own probes of one another, seconds later, are essential too.
        let probes = (outcome, reason) == ("allowed", "essential");
        assert!(
            counted == sent || (probes && counted > sent),
            "{hook} {outcome} {reason}: {counted} of {sent}, {:#?}",
            daemon.denials(&[])
        );
        let passes = outcome != "denied";
        for packet in packets {
            let limit = if passes { LONG } else { QUIET / 10 };
            assert_eq!(self.gets(out, packet, limit), passes, "{packet:02x?}");
        }
    }
}

/// An IP packet from the peer to the host.
pub fn to_host(v6: bool, protocol: u8, payload: &[u8]) -> Vec<u8> {
    packet(v6, 2, 1, protocol, payload)
}

/// An IP packet between numbers of the network, with its checksums.
pub fn packet(v6: bool, from: u8, to: u8, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let family = if v6 { Family::V6 } else { Family::V4 };
    let ip = |number| -> IpAddr { family.address(1, number) };
    let packet = frame::ip(ip(from), ip(to), protocol, payload);
    // Some are cut short before their checksum.
    if payload.len() < 8 {
        packet
    } else {
        wire::checksummed(packet)
    }
}
