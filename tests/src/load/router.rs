//! The wire to measure on: a sender, the gateway, a receiver that drops at once what it gets.

use std::{fs, thread, time::Duration};

use super::{
    policy::{Flow, LEFT, RIGHT, Shape, Side, host},
    sender::{Frames, Sender},
};
use crate::{
    netns::{Family, Netns, Routed},
    wire,
};

/// Hosts of the first segments that are there for real, for connections.
const REAL: u8 = 250;

/// [`Routed`] with routes to the segments of a [`Shape`]. Behind both ends lie hosts with a link
/// address that nobody has: whatever is delivered to them costs the receiver next to nothing.
pub struct Router {
    pub wire: Routed,
    forth: Sender,
    back: Sender,
    links: [[u8; 6]; 4],
}

impl Router {
    pub fn new() -> Self {
        let wire = Routed::new();
        for (number, port, sides) in [(1, "gw-a", LEFT), (2, "gw-b", RIGHT)] {
            wire.gateway.ip(&format!(
                "neigh add 10.{number}.0.9 lladdr 02:00:00:00:00:09 dev {port} nud permanent\n\
                 neigh add fd0{number}::9 lladdr 02:00:00:00:00:09 dev {port} nud permanent\n\
                 route add {} via 10.{number}.0.9\n\
                 route add {} via fd0{number}::9\n",
                sides[0], sides[1]
            ));
        }
        for (space, side, number) in [(&wire.a, Side::Left, 1), (&wire.b, Side::Right, 2)] {
            for (family, bits, prefix) in [(Family::V4, 32, "10."), (Family::V6, 128, "fd0")] {
                let real = host(family, side, 0, REAL);
                space.addresses("eth0", &[&format!("{real}/{bits}")]);
                let via = family.address(number, 2);
                assert!(via.to_string().starts_with(prefix));
                wire.gateway
                    .ip(&format!("route add {real}/{bits} via {via}\n"));
            }
        }
        // What hardware has checked elsewhere.
        let checks = "netfilter/nf_conntrack_checksum";
        if wire
            .gateway
            .enter(|| fs::exists(format!("/proc/sys/net/{checks}")).unwrap())
        {
            wire.gateway.sysctl(checks, "0");
        }
        let links = [
            wire::link_address(&wire.a, "eth0"),
            wire::link_address(&wire.gateway, "gw-a"),
            wire::link_address(&wire.b, "eth0"),
            wire::link_address(&wire.gateway, "gw-b"),
        ];
        Self {
            forth: Sender::new(&wire.a, "eth0"),
            back: Sender::new(&wire.b, "eth0"),
            wire,
            links,
        }
    }

    /// The ends of a connection between the first segments, which [`Shape`]s allow.
    pub fn real(family: Family) -> Flow {
        Flow {
            source: host(family, Side::Left, 0, REAL),
            destination: host(family, Side::Right, 0, REAL),
            source_port: 0,
            destination_port: Shape::new(2).allowed(family, 0).destination_port,
        }
    }

    /// Frames from left to right.
    pub fn frames(&self, flows: impl Iterator<Item = Flow>) -> Frames {
        Frames::new((self.links[0], self.links[1]), flows)
    }

    /// Frames from right to left, the answers of these flows.
    pub fn answers(&self, flows: impl Iterator<Item = Flow>) -> Frames {
        let turned = flows.map(|flow| Flow {
            source: flow.destination,
            destination: flow.source,
            source_port: flow.destination_port,
            destination_port: flow.source_port,
        });
        Frames::new((self.links[2], self.links[3]), turned)
    }

    /// Sends from left to right: nanoseconds a frame, and how many came out at the other end.
    pub fn forth(&self, frames: &mut Frames) -> (f64, u64) {
        let before = received(&self.wire.b);
        let time = self.forth.send(frames);
        let came = came(&self.wire.b, before, frames);
        (time.as_nanos() as f64 / frames.len() as f64, came)
    }

    /// Sends from right to left; how many came out.
    pub fn back(&self, frames: &mut Frames) -> u64 {
        let before = received(&self.wire.a);
        self.back.send(frames);
        came(&self.wire.a, before, frames)
    }
}

/// How many of these frames came in. Mostly they are all there when the sender returns; a kernel
/// that put the rest off is given the time.
fn came(namespace: &Netns, before: u64, frames: &Frames) -> u64 {
    let mut came = received(namespace) - before;
    loop {
        if came >= frames.len() as u64 {
            return came;
        }
        thread::sleep(Duration::from_millis(1));
        let now = received(namespace) - before;
        if now == came {
            return came;
        }
        came = now;
    }
}

impl Default for Router {
    fn default() -> Self {
        Self::new()
    }
}

/// Packets that came in at `eth0` of a namespace, by the counter of the interface.
pub fn received(namespace: &Netns) -> u64 {
    namespace.enter(|| {
        let table = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = table
            .lines()
            .find_map(|line| line.trim().strip_prefix("eth0:"));
        let packets = line.unwrap().split_whitespace().nth(1).unwrap();
        packets.parse().unwrap()
    })
}
