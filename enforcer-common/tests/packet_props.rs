//! The parser on arbitrary and on cut-off bytes.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests and their helpers")]

#[path = "../../tests/src/frame.rs"]
#[allow(
    dead_code,
    missing_docs,
    clippy::panic,
    reason = "shared by suites that use different parts"
)]
mod frame;

use enforcer_common::{
    packet::{Bytes, Kind, Link, Packet, parse},
    verdict::Reason,
};
use frame::Extension;
use proptest::{collection::vec, prelude::*};

fn read(bytes: &[u8], link: &Link) -> (Result<(), Reason>, Packet) {
    let mut packet = Packet::EMPTY;
    let result = parse(bytes, link, &mut packet);
    (result, packet)
}

/// The farthest byte that the parser was given.
struct Watched<'a> {
    bytes: &'a [u8],
    end: std::cell::Cell<usize>,
}

impl Bytes for Watched<'_> {
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let read = self.bytes.read::<N>(offset);
        if read.is_some() {
            self.end.set(self.end.get().max(offset as usize + N));
        }
        read
    }

    fn length(&self) -> u32 {
        self.bytes.length()
    }
}

fn link() -> impl Strategy<Value = Link> {
    (
        prop::bool::weighted(0.9),
        prop_oneof![Just(0x0800u16), Just(0x86dd), any::<u16>()],
        proptest::option::of(any::<u16>()),
        any::<bool>(),
    )
        .prop_map(|(ethernet, protocol, vlan, ingress)| Link {
            ethernet,
            protocol,
            vlan: vlan.filter(|_| ethernet),
            ingress,
            ifindex: 1,
            slot: 0,
            gso: false,
            looped: false,
        })
}

fn extension() -> impl Strategy<Value = Extension> {
    prop_oneof![
        1 => Just(Extension::HopByHop),
        3 => Just(Extension::Options),
        1 => (0u8..2).prop_map(Extension::Routing),
        1 => (0u16..2, any::<bool>()).prop_map(|(o, m)| Extension::Fragment(o, m)),
    ]
}

fn payload() -> impl Strategy<Value = (u8, Vec<u8>)> {
    let quoted = (any::<bool>(), any::<u16>()).prop_map(|(v6, port)| {
        let (s, d) = if v6 {
            ("fd77::1", "fd77::2")
        } else {
            ("10.77.0.1", "10.77.0.2")
        };
        frame::ip(
            s.parse().unwrap(),
            d.parse().unwrap(),
            6,
            &frame::tcp(port, 80, 0x10),
        )
    });
    prop_oneof![
        (any::<u16>(), any::<u16>(), any::<u8>()).prop_map(|(s, d, f)| (6, frame::tcp(s, d, f))),
        (any::<u16>(), any::<u16>()).prop_map(|(s, d)| (17, frame::udp(s, d))),
        (any::<bool>(), any::<u8>(), any::<u16>())
            .prop_map(|(v6, kind, id)| (if v6 { 58 } else { 1 }, frame::icmp(kind, 0, id))),
        (
            any::<bool>(),
            prop::sample::select(vec![1u8, 2, 3, 4, 11, 12]),
            quoted
        )
            .prop_map(|(v6, kind, quoted)| (
                if v6 { 58 } else { 1 },
                frame::icmp_error(kind, 0, &quoted)
            )),
        (any::<u8>(), vec(any::<u8>(), 0..40)),
    ]
}

/// Frames that are sound or nearly so, without padding.
fn sound() -> impl Strategy<Value = Vec<u8>> {
    (
        any::<bool>(),
        payload(),
        vec(extension(), 0..8),
        0u8..11,
        vec((prop_oneof![Just(0x8100u16), Just(0x88a8)], 0u16..3), 0..4),
        proptest::option::weighted(0.2, (0u16..2, any::<bool>())),
    )
        .prop_map(
            |(v6, (protocol, payload), headers, words, tags, fragment)| {
                let bytes = if v6 {
                    let (first, payload) = frame::extended(&headers, protocol, &payload);
                    let (s, d) = ("fd77::1", "fd77::2");
                    frame::frame(s.parse().unwrap(), d.parse().unwrap(), first, &payload)
                } else {
                    let (s, d) = ("10.77.0.1", "10.77.0.2");
                    let plain =
                        frame::frame(s.parse().unwrap(), d.parse().unwrap(), protocol, &payload);
                    let bytes = frame::with_options(&plain, words);
                    match fragment {
                        Some((offset, more)) => frame::as_fragment(&bytes, offset, more),
                        None => bytes,
                    }
                };
                frame::tagged(&bytes, &tags)
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_are_read_within_bounds(
        bytes in vec(any::<u8>(), 0..200),
        ip in prop_oneof![Just(None), Just(Some([0x08u8, 0x00, 0x45])), Just(Some([0x86, 0xdd, 0x60]))],
        link in link(),
    ) {
        let mut bytes = bytes;
        if let (Some(ip), true) = (ip, bytes.len() > 15) {
            bytes[12..15].copy_from_slice(&ip);
        }
        let (result, packet) = read(&bytes, &link);
        prop_assert!(result.is_err() || packet.addresses);
        prop_assert!(packet.essential.count_ones() <= 1);
        prop_assert!(!packet.has_inner || packet.tuple.kind == Kind::IcmpError);
    }

    #[test]
    fn flipped_bytes_are_read_within_bounds(
        bytes in sound(),
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        link in link(),
    ) {
        let mut bytes = bytes;
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let (result, packet) = read(&bytes, &link);
        prop_assert!(result.is_err() || packet.addresses);
    }

    /// A packet cut off is an error, or reads exactly as the whole (only padding was lost).
    #[test]
    fn a_cut_never_changes_what_is_read(
        bytes in sound(),
        padding in 0usize..20,
        cut in any::<prop::sample::Index>(),
        link in link(),
    ) {
        let mut bytes = bytes;
        bytes.resize(bytes.len() + padding, 0xaa);
        let (whole, full) = read(&bytes, &link);
        let (result, packet) = read(&bytes[..cut.index(bytes.len())], &link);
        if result.is_ok() {
            prop_assert_eq!(whole, Ok(()));
            prop_assert_eq!(packet.tuple, full.tuple);
            prop_assert_eq!(packet.has_inner, full.has_inner);
            prop_assert_eq!(packet.inner, full.inner);
            prop_assert_eq!(packet.essential, full.essential);
        } else if packet.addresses {
            prop_assert_eq!(packet.tuple.source, full.tuple.source);
            prop_assert_eq!(packet.tuple.destination, full.tuple.destination);
        }
    }

    /// Nothing behind the end that the IP header states has a say, or is even read for a field.
    #[test]
    fn padding_has_no_say(
        bytes in sound(), padding in vec(any::<u8>(), 1..80), link in link(),
    ) {
        let (whole, full) = read(&bytes, &link);
        let mut longer = bytes.clone();
        longer.extend(padding);
        let watched = Watched { bytes: &longer, end: std::cell::Cell::new(0) };
        let mut packet = Packet::EMPTY;
        let result = parse(&watched, &link, &mut packet);
        prop_assert_eq!(result, whole);
        if whole.is_ok() {
            prop_assert_eq!(packet.tuple, full.tuple);
            prop_assert_eq!(packet.has_inner, full.has_inner);
            prop_assert_eq!(packet.essential, full.essential);
            // A quotation that was cut off is looked for past the end, and not taken.
            if packet.tuple.kind != Kind::IcmpError || packet.has_inner {
                prop_assert!(watched.end.get() <= bytes.len());
            }
        }
    }
}
