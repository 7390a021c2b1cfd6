//! Each structure against brute force, read back through the functions that the kernel runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use enforcer_common::image::{Address, EMPTY, Words, address_class, service_class};
use proptest::{collection::vec, prelude::*};

use crate::policy::{
    arbitrary,
    model::{Action, Policy, Service, TUNNEL_PROTOCOLS, Transport},
};

use super::{
    intervals::{Follow, Intervals, push, sweep, value_at},
    services::Services,
    table::{Keys, Placed},
    *,
};

mod again;
mod limits;

/// The address half of an image, all other tables left out.
fn address_image(v4: &Intervals<u128>, v6: &Intervals<u128>) -> Vec<u32> {
    let mut writer = Writer::new(image::largest() as usize);
    let v4: Vec<(u32, u32)> = v4.iter().map(|(a, c)| (*a as u32, *c)).collect();
    let trie4 = v4::write(&v4, &mut writer).unwrap();
    let (rest6, hosts6) = v6::split(v6);
    let (rest6, nets6) = v6::nets(&rest6);
    let root6 = v6::write(&rest6, &mut writer).unwrap();
    writer.set(header::V4_ROOT, trie4.root);
    writer.set(header::V6_ROOT, root6);
    let tables = Tables {
        hosts4: &trie4.hosts,
        hosts6: &hosts6,
        nets6: &nets6,
        rows: &Arc::default(),
        timelines: 0,
    };
    let (seed, placed) = tables.place(None).unwrap();
    writer.set(header::SEED_LO, seed as u32);
    writer.set(header::SEED_HI, (seed >> 32) as u32);
    tables.write(&placed, &mut writer).unwrap();
    writer.finish()
}

fn class4(words: &[u32], address: u128) -> u32 {
    address_class(words, &Address::v4(u32::try_from(address).unwrap()))
}

fn class6(words: &[u32], address: u128) -> u32 {
    let (hi, lo) = ((address >> 64) as u64, address as u64);
    address_class(words, &Address::v6(hi, lo))
}

/// Every start and its neighbours, up to `top`.
fn probes(intervals: &Intervals<u128>, top: u128) -> BTreeSet<u128> {
    intervals
        .iter()
        .flat_map(|(s, _)| [s.saturating_sub(1), *s, s.saturating_add(1), s ^ 1 << 8])
        .chain([0, top / 2, top])
        .filter(|address| *address <= top)
        .collect()
}

/// Prefixes laid over one another, few classes so that neighbours often agree.
fn painted(bits: u32, prefixes: &[(u128, u32, u32)]) -> Intervals<u128> {
    let top = u128::MAX >> (128 - bits);
    let mut edges = BTreeSet::from([0]);
    for (address, host_bits, _) in prefixes {
        let (first, last) = block(*address & top, *host_bits, top);
        edges.insert(first);
        if last < top {
            edges.insert(last + 1);
        }
    }
    let mut intervals = Intervals::<u128>::new();
    for edge in edges {
        let class = prefixes
            .iter()
            .rev()
            .find(|(address, host_bits, _)| {
                let (first, last) = block(*address & top, *host_bits, top);
                first <= edge && edge <= last
            })
            .map_or(0, |(_, _, class)| *class);
        push(&mut intervals, edge, class);
    }
    intervals
}

fn block(address: u128, host_bits: u32, top: u128) -> (u128, u128) {
    let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
    (address & mask, (address | !mask) & top)
}

/// Addresses that share bits, with prefixes of every length and many single hosts.
fn prefixes(bits: u32) -> impl Strategy<Value = Vec<(u128, u32, u32)>> {
    let near = (0u128..64).prop_map(|low| 0xfd00_0010_0001_0000_0000_0000_0a00_0000 | low);
    let far = any::<u128>();
    let high = (0u128..=u128::from(u16::MAX)).prop_map(|n| u128::MAX - n);
    let address = prop_oneof![4 => near, 1 => far, 1 => high, 1 => 0u128..600];
    let length = prop_oneof![2 => Just(0), 1 => 0..9u32, 2 => 0..=bits];
    vec((address, length, 0u32..4), 0..24)
}

/// Numbers every set of segments that a sweep meets.
#[derive(Default)]
struct Sets {
    current: BTreeSet<u32>,
    known: Vec<Vec<u32>>,
}

impl Follow for Sets {
    fn toggle(&mut self, segment: u32, entered: bool) {
        let changed = if entered {
            self.current.insert(segment)
        } else {
            self.current.remove(&segment)
        };
        assert!(changed);
    }

    fn number(&mut self) -> Result<u32, Stop> {
        let set: Vec<u32> = self.current.iter().copied().collect();
        let known = self.known.iter().position(|known| *known == set);
        Ok(word(known.unwrap_or_else(|| {
            self.known.push(set);
            self.known.len() - 1
        })))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn tries_and_host_tables_agree_with_the_intervals(
        four in prefixes(32),
        six in prefixes(128),
    ) {
        let (four, six) = (painted(32, &four), painted(128, &six));
        let words = address_image(&four, &six);
        for address in probes(&four, u128::from(u32::MAX)) {
            prop_assert_eq!(Some(class4(&words, address)), value_at(&four, address));
        }
        for address in probes(&six, u128::MAX) {
            prop_assert_eq!(Some(class6(&words, address)), value_at(&six, address));
        }
    }

    #[test]
    fn the_sweep_agrees_with_the_members(
        policy in arbitrary::policy(),
        env in arbitrary::environment(),
    ) {
        let mut sets = Sets::default();
        let sweep = sweep(&policy, &env, &[], &mut sets).unwrap();
        prop_assert!(sets.current.is_empty());
        let check = |ip: IpAddr, found: Option<u32>| {
            let mut expected: Vec<u32> = policy.segments_of(ip).iter().map(|s| s.0).collect();
            if env.host_addresses.contains(&ip) {
                expected.push(intervals::host(&policy));
            }
            if crate::policy::model::is_multicast(ip) {
                expected.push(intervals::multicast(&policy));
            }
            // No address of the strategies is link-local or loopback.
            if env.host_addresses.contains(&ip) {
                expected.push(intervals::own(&policy));
            }
            prop_assert_eq!(&sets.known[found.unwrap() as usize], &expected, "{}", ip);
            Ok(())
        };
        // The whole universe of the strategies, and every boundary besides.
        let base = u128::from(Ipv4Addr::new(10, 0, 0, 0).to_bits());
        let v4: Vec<(u128, u32)> = sweep.v4.iter().map(|(a, c)| (u128::from(*a), *c)).collect();
        for address in probes(&v4, u128::from(u32::MAX)).into_iter().chain(base..base + 1024) {
            let ip = Ipv4Addr::from_bits(u32::try_from(address).unwrap());
            check(ip.into(), value_at(&v4, address))?;
        }
        let base = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0).to_bits();
        for address in probes(&sweep.v6, u128::MAX).into_iter().chain(base..base + 1024) {
            check(Ipv6Addr::from_bits(address).into(), value_at(&sweep.v6, address))?;
        }
    }
}

fn matches(service: Service, action: Action, v6: bool, protocol: u8, selector: u16) -> bool {
    match service {
        Service::Any => action == Action::Deny || !TUNNEL_PROTOCOLS.contains(&protocol),
        Service::Ports {
            transport,
            first,
            last,
        } => transport.number() == protocol && (first..=last).contains(&selector),
        Service::Icmp { kind, code } => {
            !v6 && protocol == 1
                && selector >> 8 == u16::from(kind)
                && code.is_none_or(|code| selector & 0xff == u16::from(code))
        }
        Service::Icmpv6 { kind, code } => {
            v6 && protocol == 58
                && selector >> 8 == u16::from(kind)
                && code.is_none_or(|code| selector & 0xff == u16::from(code))
        }
        Service::Protocol(number) => number == protocol,
    }
}

fn check_services(policy: &Policy, words: &[u32], services: &Services) {
    for v6 in [false, true] {
        for protocol in 0..=u8::MAX {
            // Every selector of the protocols that have them.
            let last = match protocol {
                1 | 6 | 17 | 58 | 132 | 136 => u16::MAX,
                _ => 0,
            };
            for selector in 0..=last {
                let class = service_class(words, v6, protocol, selector) as usize;
                assert!(class < services.count);
                for (number, rule) in policy.rules.iter().enumerate() {
                    let bits = services.of_rule(number).unwrap();
                    let expected = rule
                        .services
                        .iter()
                        .any(|s| matches(*s, rule.action, v6, protocol, selector));
                    assert_eq!(
                        bits.contains(class),
                        expected,
                        "{v6} {protocol} {selector} {rule:?}"
                    );
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn service_classes_agree_with_the_rules_at_every_point(policy in arbitrary::policy()) {
        let services = Services::new(&policy, &[]).unwrap();
        let mut writer = Writer::new(image::largest() as usize);
        let at = services.write(&mut writer).unwrap();
        writer.set(header::SERVICES, at);
        check_services(&policy, &writer.finish(), &services);
    }
}

/// A 64-bit sequence without repetitions.
fn scattered(n: u64) -> u64 {
    layout::mix(n, 7)
}

#[test]
fn a_hundred_thousand_hosts_are_all_found() {
    let mut four: BTreeMap<u128, u32> = BTreeMap::new();
    let mut six: BTreeMap<u128, u32> = BTreeMap::new();
    for n in 0..100_000u64 {
        let class = 1 + (n % 5) as u32;
        four.insert(u128::from(scattered(n) as u32), class);
        six.insert(
            u128::from(scattered(n)) << 64 | u128::from(scattered(n + 1_000_000)),
            class,
        );
    }
    let intervals = |hosts: &BTreeMap<u128, u32>| {
        let mut intervals = Intervals::from([(0, 0)]);
        for (address, class) in hosts {
            push(&mut intervals, *address, *class);
            if !hosts.contains_key(&(address + 1)) {
                push(&mut intervals, address + 1, 0);
            }
        }
        intervals
    };
    let words = address_image(&intervals(&four), &intervals(&six));
    for (address, class) in &four {
        assert_eq!(class4(&words, *address), *class);
    }
    for (address, class) in &six {
        assert_eq!(class6(&words, *address), *class);
        assert_eq!(class6(&words, address ^ 1 << 70), 0);
    }
    for n in 0..100_000u64 {
        let other = u128::from(scattered(n + 5_000_000) as u32);
        assert_eq!(
            class4(&words, other),
            four.get(&other).copied().unwrap_or(0)
        );
    }
}

#[test]
fn placed_keys_sit_where_their_pilot_says_once() {
    for count in [0, 1, 4, 5, 1_000, 250_000] {
        let hash = |key: usize, seed: u64| layout::mix(key as u64, seed);
        let place = |known| {
            let hash = &hash;
            table::place(&[Keys { count, hash, known }]).unwrap()
        };
        let (seed, placed) = place(None);
        let Placed { pilots, slots } = &*placed[0];
        let mut seen = vec![false; count];
        for (slot, key) in (0u32..).zip(slots).filter(|(_, key)| **key != EMPTY) {
            let hash = hash(*key as usize, seed);
            let pilot = pilots[layout::pilot_of(hash, pilots.len() as u32) as usize];
            assert_eq!(slot, layout::piloted(hash, pilot, slots.len() as u32));
            assert!(!std::mem::replace(&mut seen[*key as usize], true));
        }
        assert!(seen.into_iter().all(|found| found));
        // Hardly larger than its keys, and the same each time, however many threads were at work.
        assert!(slots.len() <= count + count / 8 + 8);
        assert!(pilots.len() <= count / 4 + 1);
        assert_eq!(place(None), (seed, placed.clone()));
        // What is known is taken as it is, under the seed and for the size that it was made for.
        let other = |slots| {
            Arc::new(Placed {
                pilots: Vec::new(),
                slots,
            })
        };
        let same = other(slots.clone());
        let (_, taken) = place(Some((seed, &same)));
        assert!(Arc::ptr_eq(&taken[0], &same));
        assert_eq!(place(Some((seed + 1, &same))), (seed, placed.clone()));
        let longer = other(vec![EMPTY; slots.len() + 1]);
        assert_eq!(place(Some((seed, &longer))), (seed, placed.clone()));
    }
}

#[test]
fn a_table_grows_when_its_keys_crowd() {
    // Hashes of four kinds that no pilot tells apart, under the first seeds: three slots or four.
    let crowded = |key: usize, seed: u64| {
        if seed == layout::mix(2, 0x656e_666f_7263_6572) {
            layout::mix(key as u64, seed)
        } else {
            7
        }
    };
    let place = |hash| {
        let known = None;
        let count = 9;
        table::place(&[Keys { count, hash, known }])
    };
    let (_, placed) = place(&crowded).unwrap();
    assert!(placed[0].slots.len() > 11);
    // Keys that hash alike under every seed have no place in any table.
    assert!(place(&|_: usize, _: u64| 5).is_none());
}

#[test]
fn ranges_cost_nodes_and_scattered_hosts_do_not() {
    // The same two hosts in every /24 of a /16: one shared node. A host alone: no node at all.
    let mut shared = Intervals::from([(0, 0)]);
    for upper in 0..256u128 {
        let base = 0x0a00_0000 | upper << 8;
        for (offset, class) in [(1, 1), (2, 0), (254, 2), (255, 0)] {
            push(&mut shared, base + offset, class);
        }
    }
    let mut writer = Writer::new(image::largest() as usize);
    let shared: Vec<(u32, u32)> = shared.iter().map(|(a, c)| (*a as u32, *c)).collect();
    let trie = v4::write(&shared, &mut writer).unwrap();
    assert!(trie.hosts.is_empty());
    let words = writer.finish().len();
    assert!(words <= (header::WORDS + layout::V4_ROOT_WORDS + 256 + 3 * 16) as usize);

    let alone = Intervals::from([(0, 0), (0x0a00_0001, 1), (0x0a00_0002, 0)]);
    let mut writer = Writer::new(image::largest() as usize);
    let trie = v4::write(&alone, &mut writer).unwrap();
    assert_eq!(trie.hosts, [(0x0a00_0001, 1)]);
    assert_eq!(
        writer.finish().len(),
        (header::WORDS + layout::V4_ROOT_WORDS) as usize
    );
}

#[test]
fn an_ipv6_prefix_costs_few_nodes() {
    let first = Ipv6Addr::new(0xfd00, 0x10, 1, 0, 0, 0, 0, 0).to_bits();
    let intervals = Intervals::from([(0, 0), (first, 1), (first + (1 << 68), 0)]);
    let mut writer = Writer::new(image::largest() as usize);
    let (rest, hosts) = v6::split(&intervals);
    let (rest, nets) = v6::nets(&rest);
    assert!(hosts.is_empty() && nets.is_empty());
    let root = v6::write(&rest, &mut writer).unwrap();
    writer.set(header::V6_ROOT, root);
    let words = writer.finish();
    assert_eq!(
        words.len(),
        (header::WORDS + layout::V6_NODE_WORDS) as usize
    );
    assert_eq!(class6(&words, first | 0xffff), 1);
    assert_eq!(words.as_slice().word(header::V4_HOSTS), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn a_smaller_limit_is_an_error_with_numbers_and_the_same_limit_is_none(
        policy in arbitrary::policy(),
        env in arbitrary::environment(),
    ) {
        let options = Options {
            ethertypes: vec![1, 0x8847],
            failsafes: vec![Failsafe {
                sources: vec!["10.0.0.0/23".parse().unwrap()],
                ports: vec![(Transport::Tcp, 22, 80)],
                interfaces: vec!["eth*".parse().unwrap()],
            }],
            ..Options::default()
        };
        let whole = compile(&policy, &env, &options).unwrap();
        let length = whole.words().len();
        let exact = compile_within(&policy, &env, &options, length, EFFORT);
        prop_assert_eq!(exact.as_ref(), Ok(&whole));
        for limit in [length - 1, length / 2, 100] {
            let error = compile_within(&policy, &env, &options, limit, EFFORT).unwrap_err();
            let CompileError::TooLarge { words, limit: said, classes, .. } = error else {
                panic!("{error}");
            };
            prop_assert!(words > limit && words <= length);
            prop_assert_eq!(said, limit);
            // It may have stopped at the first class too many.
            prop_assert!(classes > 0 && classes <= whole.stats().classes as usize);
        }
    }
}
