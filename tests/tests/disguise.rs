//! A device without Ethernet headers that says it has them: its packets' addresses would be read
//! as an ethertype.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    net::UdpSocket,
    os::fd::AsRawFd as _,
};

use enforcer_tests::{daemon::Setup, frame, netns::Netns, seen::skipped, traffic};

const TUNSETIFF: libc::Ioctl = 0x4004_54ca_u32 as libc::Ioctl;
const TUNSETLINK: libc::Ioctl = 0x4004_54cd_u32 as libc::Ioctl;

/// A tun device of this namespace with another link type, which is Ethernet's.
fn tun() -> Option<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .ok()?;
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"tun0");
    // IFF_TUN | IFF_NO_PI
    request[16..18].copy_from_slice(&0x1001u16.to_ne_bytes());
    // SAFETY: the calls read a `struct ifreq` and a number.
    unsafe {
        assert_eq!(
            libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_ptr()),
            0
        );
        assert_eq!(
            libc::ioctl(file.as_raw_fd(), TUNSETLINK, 1 as libc::c_ulong),
            0
        );
    }
    Some(file)
}

#[test]
fn an_address_is_not_taken_for_an_ethertype() {
    let host = Netns::new("disguise");
    let Some(mut device) = host.enter(tun) else {
        skipped("no /dev/net/tun");
        return;
    };
    host.addresses("tun0", &["10.5.0.1/24"]);
    host.ip("link set tun0 up\nroute add default dev tun0\n");
    let server: UdpSocket = traffic::udp(&host, traffic::any(7000), traffic::QUIET);
    // 8.6.x.x, and 0x0806 is ARP.
    let (from, to) = ("8.6.0.1".parse().unwrap(), "10.5.0.1".parse().unwrap());
    let to_port = |port| {
        let mut packet = frame::ip(from, to, 17, &frame::udp(4000, port));
        let words = packet[..20].chunks(2);
        let sum: u32 = words.map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
        let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        packet
    };
    let packet = to_port(7000);
    device.write_all(&packet).unwrap();
    assert!(
        server.recv_from(&mut [0; 64]).is_ok(),
        "without the enforcer"
    );
    let policy = "version: 1
segments: {all: {members: [{cidr: 0.0.0.0/0}]}}
rules: [{name: in, from: [any], to: [all], services: [udp/7001]}]
";
    let _daemon = Setup::new(&host, "tun0", policy)
        .with(&["--socket-hooks", "off"])
        .start();
    device.write_all(&packet).unwrap();
    assert!(server.recv_from(&mut [0; 64]).is_err(), "it is denied");
    let server: UdpSocket = traffic::udp(&host, traffic::any(7001), traffic::QUIET);
    device.write_all(&to_port(7001)).unwrap();
    assert!(server.recv_from(&mut [0; 64]).is_ok(), "this is allowed");
}
