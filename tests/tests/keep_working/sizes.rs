//! Packets of every size that a link can be set to carry, with the work of checksums and of
//! segments done by the kernel or left to the interface.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup},
    link::Delivered,
    netns::{Family, Netns, Pair},
    scale,
    seen::skipped,
    traffic::{self, QUIET},
};

use crate::lab::allowing;

const PORT: u16 = 7000;

/// What is allowed, in a namespace pair of this MTU.
fn start(net: &Pair) -> Daemon<'_> {
    Setup::new(&net.host, "eth0", &allowing("tcp/7000, udp/7000")).start()
}

fn both(net: &Pair, words: &str) {
    for namespace in [&net.host, &net.peer] {
        namespace.ip(&format!("link set dev eth0 {words}\n"));
    }
}

/// Sends `length` bytes of a pattern each way over one connection.
fn transfer(daemon: &Daemon<'_>, net: &Pair, family: Family, length: usize) {
    let at = family.address(1, 1);
    let listener = net.host.enter(|| TcpListener::bind((at, PORT)).unwrap());
    let mut client = traffic::tcp(&net.peer, (at, PORT));
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(LONG)).unwrap();
    let bytes: Vec<u8> = (0..length).map(|at| (at * 7 + at / 251) as u8).collect();
    let both = one_way(&mut client, &mut server, &bytes)
        .and_then(|()| one_way(&mut server, &mut client, &bytes));
    if let Err(error) = both {
        panic!("{error}: {:#?} {}", daemon.denials(&[]), daemon.status());
    }
}

fn one_way(from: &mut TcpStream, to: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            from.write_all(bytes)?;
            from.shutdown(Shutdown::Write)
        });
        let mut got = vec![0; bytes.len()];
        let read = to.read_exact(&mut got);
        if read.is_err() {
            // So that the writer does not wait for ever.
            let _ = to.shutdown(Shutdown::Both);
        }
        let written = writer.join().unwrap();
        read.and(written)?;
        assert!(got == bytes, "the bytes that were sent");
        Ok(())
    })
}

/// A datagram as large as the link takes in one piece, and one in pieces.
fn datagrams(net: &Pair, family: Family, mtu: usize) {
    let at = family.address(1, 1);
    let server = traffic::udp(&net.host, (at, PORT), LONG);
    let client = traffic::udp(&net.peer, (traffic::unspecified(at), 0), LONG);
    let headers = if family == Family::V4 { 28 } else { 48 };
    let largest = 65_535 - if family == Family::V4 { 28 } else { 8 };
    // Reassembly has bounds of its own: not too many pieces.
    for length in [
        mtu - headers,
        (mtu - headers + 1).min(largest),
        (mtu * 4).min(largest),
    ] {
        let bytes: Vec<u8> = (0..length).map(|at| (at % 253) as u8).collect();
        answered(&client, &server, &bytes);
    }
}

fn answered(client: &UdpSocket, server: &UdpSocket, bytes: &[u8]) {
    let mut got = vec![0; 65_536];
    client.send_to(bytes, server.local_addr().unwrap()).unwrap();
    let (length, from) = server.recv_from(&mut got).unwrap();
    assert!(got[..length] == *bytes, "a question of {}", bytes.len());
    server.send_to(bytes, from).unwrap();
    let (length, _) = client.recv_from(&mut got).unwrap();
    assert!(got[..length] == *bytes, "an answer of {}", bytes.len());
}

fn nothing_denied(daemon: &Daemon<'_>, what: &str) {
    for reason in ["malformed", "fragment", "default_deny", "no_flow"] {
        let denied = daemon.counted("", "denied", reason);
        assert_eq!(denied, 0, "{what} {reason}: {:#?}", daemon.denials(&[]));
    }
}

#[test]
fn transfers_pass_at_every_mtu() {
    let net = Pair::new();
    for namespace in [&net.host, &net.peer] {
        // What one connection learns at a small MTU would slow down the next.
        namespace.sysctl("ipv4/tcp_no_metrics_save", "1");
    }
    let daemon = start(&net);
    // The smallest last: Linux itself is bad at TCP there, even without an enforcer.
    for mtu in [65_535, 9000, 1500, 1280, 576, 68] {
        both(&net, &format!("mtu {mtu}"));
        let bytes = if mtu < 1000 {
            1 << 14
        } else {
            scale::rounds(1 << 20, 1 << 17)
        };
        for family in Family::BOTH {
            // Below 1280 bytes there is no IPv6.
            if family == Family::V6 && mtu < 1280 {
                continue;
            }
            println!("{family:?}, MTU {mtu}");
            transfer(&daemon, &net, family, bytes);
            datagrams(&net, family, mtu);
            nothing_denied(&daemon, &format!("{family:?}, MTU {mtu}"));
        }
    }
}

/// Turns a feature of `eth0` inside on or off (linux/ethtool.h); whether the driver lets one.
fn set_feature(namespace: &Netns, command: u32, on: bool) -> bool {
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    #[repr(C)]
    struct Request {
        name: [u8; libc::IFNAMSIZ],
        value: *mut Value,
        rest: [u8; 16],
    }
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    let socket = traffic::udp(namespace, traffic::any(0), QUIET);
    let mut value = Value {
        command,
        data: u32::from(on),
    };
    let mut name = [0; libc::IFNAMSIZ];
    name[..4].copy_from_slice(b"eth0");
    let mut request = Request {
        name,
        value: &raw mut value,
        rest: [0; 16],
    };
    // SAFETY: an `ifreq` that points to an `ethtool_value`, both alive during the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) };
    result == 0
}

const SET_RECEIVE_CHECKSUM: u32 = 0x15;
const SET_SEND_CHECKSUM: u32 = 0x17;
const SET_TCP_SEGMENTS: u32 = 0x1f;
const SET_SEGMENTS: u32 = 0x24;
const SET_MERGING: u32 = 0x2c;

#[test]
fn transfers_pass_with_and_without_help_of_the_interface() {
    let net = Pair::new();
    let daemon = start(&net);
    let bytes = scale::rounds(4 << 20, 1 << 18);
    let sets: [(&str, &[u32]); 4] = [
        ("segments in software", &[SET_TCP_SEGMENTS, SET_SEGMENTS]),
        ("checksums sent in software", &[SET_SEND_CHECKSUM]),
        ("checksums received in software", &[SET_RECEIVE_CHECKSUM]),
        ("no segments merged", &[SET_MERGING]),
    ];
    for on in [false, true] {
        for (what, commands) in sets {
            for namespace in [&net.host, &net.peer] {
                for command in commands {
                    let done = set_feature(namespace, *command, on);
                    assert!(done, "{what}: {}", nix::errno::Errno::last());
                }
            }
            for family in Family::BOTH {
                transfer(&daemon, &net, family, bytes);
                datagrams(&net, family, 1500);
            }
            nothing_denied(&daemon, what);
        }
    }
}

#[test]
fn segments_merged_beyond_64_kib_pass() {
    let net = Pair::new();
    for (family, words) in [
        (Family::V6, ["gso_max_size", "gro_max_size"]),
        (Family::V4, ["gso_ipv4_max_size", "gro_ipv4_max_size"]),
    ] {
        let complaint = [&net.host, &net.peer].into_iter().find_map(|namespace| {
            words.into_iter().find_map(|word| {
                let set = ["link", "set", "dev", "eth0", word, "150000"];
                namespace.ask("ip", &set).err()
            })
        });
        if let Some(complaint) = complaint {
            skipped(&format!("no {}: {complaint}", words[0]));
            continue;
        }
        let daemon = start(&net);
        let ethertype = if family == Family::V4 { 0x0800 } else { 0x86dd };
        let delivered = Delivered::new(&net.host, "eth0", ethertype);
        let over = AtomicBool::new(false);
        let largest = thread::scope(|scope| {
            let largest = scope.spawn(|| {
                let mut largest = 0;
                while !over.load(Ordering::Relaxed) {
                    largest = largest.max(delivered.length(QUIET).unwrap_or_default());
                }
                largest
            });
            transfer(&daemon, &net, family, scale::rounds(32 << 20, 4 << 20));
            over.store(true, Ordering::Relaxed);
            largest.join().unwrap()
        });
        nothing_denied(&daemon, &format!("{family:?}"));
        // There were such packets, or this has shown nothing.
        assert!(
            largest > 65_549,
            "{family:?}: the largest had {largest} bytes"
        );
    }
}
