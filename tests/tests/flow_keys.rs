//! Keys of flows, on random tuples: one for both directions, another for any other flow.
#![allow(missing_docs, reason = "a test")]

use enforcer_common::{
    flow::key_of,
    packet::{Kind, Tuple},
};
use proptest::prelude::*;

fn tuple() -> impl Strategy<Value = Tuple> {
    let address = prop_oneof![
        any::<[u32; 4]>(),
        // Equal and nearly equal ends.
        proptest::array::uniform4(0u32..2),
    ];
    let ports = prop_oneof![any::<(u16, u16)>(), (0u16..3, 0u16..3)];
    (address.clone(), address, ports, any::<bool>(), 0u8..3).prop_map(
        |(mut source, mut destination, ports, v6, protocol)| {
            if !v6 {
                source[..3].fill(0);
                destination[..3].fill(0);
            }
            let (protocol, kind) =
                [(6, Kind::Tcp), (17, Kind::Ports), (47, Kind::Other)][usize::from(protocol)];
            let (source_port, destination_port) = if kind == Kind::Other { (0, 0) } else { ports };
            Tuple {
                source,
                destination,
                source_port,
                destination_port,
                protocol,
                v6,
                kind,
                ..Tuple::EMPTY
            }
        },
    )
}

fn reversed(tuple: &Tuple) -> Tuple {
    Tuple {
        source: tuple.destination,
        destination: tuple.source,
        source_port: tuple.destination_port,
        destination_port: tuple.source_port,
        ..*tuple
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn both_directions_have_one_key(tuple in tuple(), ifindex in 0u32..1 << 20) {
        let back = reversed(&tuple);
        let (key, low) = key_of(&tuple, ifindex);
        let (back_key, back_low) = key_of(&back, ifindex);
        prop_assert_eq!(key, back_key);
        prop_assert_eq!(key.is_v6(), tuple.v6);
        // A flow of an end to itself has one direction only.
        let itself = tuple.source == tuple.destination
            && tuple.source_port == tuple.destination_port;
        prop_assert_eq!(low != back_low, !itself);
    }

    #[test]
    fn different_flows_have_different_keys(one in tuple(), two in tuple()) {
        let back = reversed(&two);
        let same = one == two || one == back;
        prop_assert_eq!(key_of(&one, 0).0 == key_of(&two, 0).0, same);
        if !one.v6 && !two.v6 {
            let words = |tuple| {
                let key = key_of(tuple, 0).0;
                [key.pair4(0), key.pair4(1)]
            };
            prop_assert_eq!(words(&one) == words(&two), same);
        }
    }
}
