//! Sources that cannot be what they say.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
};

use enforcer_tests::{
    daemon::{LONG, Setup},
    frame,
    netns::{Family, Netns, Routed},
    seen::{denied, moved},
    traffic::{self, QUIET},
    wire as packets,
};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, SockaddrIn, SockaddrIn6, bind, sendto},
};
use serde_json::json;

use crate::{
    bench::{Bench, GOOD, bench, port, sealed, udp},
    wire::{mark, open},
};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A datagram that the policy allows between friends.
fn datagram(bench: &mut Bench, from: &str, to: &str) -> Vec<u8> {
    let number = bench.next();
    let data = udp(port(number), GOOD, &mark(number));
    sealed(&frame::frame(ip(from), ip(to), 17, &data))
}

#[test]
fn this_hosts_own_address_cannot_come_in() {
    let mut bench = bench();
    bench.both(|pair| pair.host.sysctl("ipv4/conf/all/accept_local", "1"));
    for own in ["10.1.0.1", "fd01::1"] {
        let bytes = datagram(&mut bench, own, own);
        let seen = bench.judge(&[bytes]);
        seen.counts(&[("spoofed", 1)]).nothing_arrived().harmful(1);
    }
}

#[test]
fn addresses_that_no_packet_on_a_link_has_are_dropped() {
    let mut bench = bench();
    bench.both(|pair| {
        for name in ["all", "eth0"] {
            let sysctl = format!("ipv4/conf/{name}/route_localnet");
            pair.host.sysctl(&sysctl, "1");
        }
    });
    for (from, to) in [
        ("127.0.0.1", "10.1.0.1"),
        ("127.9.9.9", "10.1.0.1"),
        ("224.0.0.1", "10.1.0.1"),
        ("239.1.2.3", "10.1.0.1"),
        ("255.255.255.255", "10.1.0.1"),
        ("0.0.0.0", "10.1.0.1"),
        ("10.1.0.3", "127.0.0.1"),
        ("10.1.0.3", "0.0.0.0"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "fd01::1"),
        ("::", "fd01::1"),
        ("ff02::1", "fd01::1"),
        ("ff0e::1", "fd01::1"),
        ("fd01::3", "::1"),
        ("fd01::3", "::"),
    ] {
        let bytes = datagram(&mut bench, from, to);
        let seen = bench.judge(&[bytes]);
        let guarded = !(from.starts_with("127") && to.starts_with("127"));
        // Between two addresses that no segment guards the default for those holds.
        let count = if guarded { "martian" } else { "allowed" };
        seen.counts(&[(count, 1)]);
        if guarded {
            seen.nothing_arrived();
            assert!(seen.passed.is_empty(), "{from} to {to}");
        }
    }
}

const PORTS: &str = r#"version: 1
segments:
  a: { members: [{cidr: 10.1.0.0/24, except: [10.1.0.1]}, {cidr: "fd01::/64", except: ["fd01::1"]}], interfaces: [gw-a] }
  here: { members: [{cidr: 10.1.0.1/32}, {cidr: "fd01::1/128"}] }
rules:
  - { name: some, from: [a], to: [here], services: [udp/7000] }
"#;

/// A datagram socket that takes any source for its own.
fn transparent(namespace: &Netns, source: SocketAddr) -> std::os::fd::OwnedFd {
    namespace.enter(|| {
        let (family, level, option) = match source {
            SocketAddr::V4(_) => (libc::AF_INET, libc::SOL_IP, libc::IP_TRANSPARENT),
            SocketAddr::V6(_) => (libc::AF_INET6, libc::SOL_IPV6, libc::IPV6_TRANSPARENT),
        };
        let socket = open(family, libc::SOCK_DGRAM, 0);
        let on = 1i32;
        let fd = socket.as_raw_fd();
        // SAFETY: an int and its length.
        let set = unsafe { libc::setsockopt(fd, level, option, (&raw const on).cast(), 4) };
        assert_eq!(set, 0, "{}", Errno::last());
        match source {
            SocketAddr::V4(at) => bind(fd, &SockaddrIn::from(at)).unwrap(),
            SocketAddr::V6(at) => bind(fd, &SockaddrIn6::from(at)).unwrap(),
        }
        socket
    })
}

#[test]
fn a_segments_source_from_another_interface_is_dropped() {
    let net = Routed::new();
    for name in ["all", "gw-a", "gw-b"] {
        let filter = format!("ipv4/conf/{name}/rp_filter");
        net.gateway.sysctl(&filter, "0");
    }
    let daemon = Setup::new(&net.gateway, "gw-*", PORTS)
        .with(&["--socket-hooks", "off"])
        .start();
    let counters = [
        ("tc_ingress", "denied", "spoofed"),
        ("tc_ingress", "denied", ""),
    ];
    for family in Family::BOTH {
        let (real, here) = (family.address(1, 2), family.address(1, 1));
        let server = traffic::udp(&net.gateway, (here, 7000), QUIET);
        let mut bytes = [0; 16];
        let client = traffic::udp(&net.a, (real, 0), QUIET);
        client.send_to(b"real", (here, 7000)).unwrap();
        server.set_read_timeout(Some(LONG)).unwrap();
        let (_, from) = server.recv_from(&mut bytes).unwrap();
        server.set_read_timeout(Some(QUIET)).unwrap();
        // The very flow, a flow of its own, by a raw socket and by one that may take any source.
        let counts = moved(&daemon, counters, || {
            for source in [from, (real, 999).into(), (family.address(1, 3), 999).into()] {
                let forged = packets::udp((source.ip(), source.port()), (here, 7000), b"forged");
                traffic::send_raw(&net.b, &forged);
            }
            let socket = transparent(&net.b, (real, 998).into());
            let fd = socket.as_raw_fd();
            let sent = match SocketAddr::new(here, 7000) {
                SocketAddr::V4(to) => {
                    sendto(fd, b"forged", &SockaddrIn::from(to), MsgFlags::empty())
                }
                SocketAddr::V6(to) => {
                    sendto(fd, b"forged", &SockaddrIn6::from(to), MsgFlags::empty())
                }
            };
            assert_eq!(sent, Ok(6));
            assert!(server.recv_from(&mut bytes).is_err(), "{family:?}");
        });
        assert_eq!(counts, [4, 4], "{family:?}");
        denied(
            &daemon,
            &json!({
                "direction": "ingress", "interface": "gw-b", "reason": "spoofed",
                "src": real.to_string(), "src_port": 998, "dst": here.to_string(), "dst_port": 7000,
            }),
        );
        // The flow of the real one goes on, both ways.
        client.send_to(b"still", (here, 7000)).unwrap();
        server.set_read_timeout(Some(LONG)).unwrap();
        assert_eq!(server.recv_from(&mut bytes).unwrap(), (5, from));
        server.send_to(b"there", from).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        assert_eq!(client.recv(&mut bytes).unwrap(), 5);
    }
    // Where the segment may come in anywhere, the same packets arrive.
    let anywhere = PORTS.replace(", interfaces: [gw-a]", "");
    assert_ne!(anywhere, PORTS);
    daemon.swap(&anywhere);
    for family in Family::BOTH {
        let (real, here) = (family.address(1, 2), family.address(1, 1));
        let server = traffic::udp(&net.gateway, (here, 7000), LONG);
        let forged = packets::udp((real, 999), (here, 7000), b"forged");
        traffic::send_raw(&net.b, &forged);
        assert_eq!(server.recv(&mut [0; 16]).unwrap(), 6, "{family:?}");
    }
}
