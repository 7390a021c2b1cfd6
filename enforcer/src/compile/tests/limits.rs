//! Time, settings and their limits.

use enforcer_common::{
    decide::{Query, decide},
    image::{INTERFACE_SLOTS, MAX_TIMELINE, VERDICT_TIMELINE},
};

use super::*;
use crate::policy::{SourceFile, parse};

fn policy(rules: &str) -> Policy {
    let text = format!(
        "version: 1\nsegments: {{a: {{members: [{{cidr: 10.0.0.0/24}}]}}}}\nrules:\n{rules}"
    );
    parse(&[SourceFile {
        name: "a.yaml".to_owned(),
        text,
    }])
    .unwrap()
}

/// A rule for ports up to `last` that expires in this hour of 2 January 1970.
fn until(number: u32, last: u32) -> String {
    let (day, hour) = (2 + number / 24, number % 24);
    format!(
        "- {{name: r{number}, from: [a], to: [any], services: [tcp/1-{last}], \
         expires: 1970-01-{day:02}T{hour:02}:00:00Z}}\n"
    )
}

fn instant(number: u32) -> u64 {
    86_400 + u64::from(number) * 3_600
}

fn built(policy: &Policy) -> Image {
    compile(policy, &Environment::default(), &Options::default()).unwrap()
}

fn rule_at(image: &Image, port: u16, unix: u64) -> u32 {
    let query = Query {
        source: Address::v4(0x0a00_0001),
        destination: Address::v4(1),
        protocol: 6,
        selector: port,
    };
    decide(image.words(), &query, unix).rule
}

/// Offsets of the timelines, one for each verdict that has one.
fn timelines(image: &Image) -> Vec<u32> {
    let at = |index: u32| image.words()[index as usize] as usize;
    let rows = image.words()[at(header::ROWS)..][..at(header::ROW_COUNT) * 4].chunks(4);
    let slots = at(header::EXCEPTIONS + 3) * 4;
    let exceptions = image.words()[at(header::EXCEPTIONS + 2)..][..slots].chunks(4);
    let exceptions = exceptions
        .filter(|slot| slot[0] != EMPTY)
        .map(|slot| &slot[2..]);
    rows.chain(exceptions)
        .filter(|verdict| verdict[0] & VERDICT_TIMELINE != 0)
        .map(|verdict| verdict[1])
        .collect()
}

#[test]
fn rules_that_expire_take_turns_up_to_the_limit() {
    let most = MAX_TIMELINE - 1;
    let rules: String = (0..most).map(|n| until(n, 9)).collect();
    let image = built(&policy(&rules));
    for number in 0..most {
        assert_eq!(rule_at(&image, 9, instant(number) - 1), number);
        assert_eq!(rule_at(&image, 10, instant(number) - 1), EMPTY);
    }
    assert_eq!(rule_at(&image, 9, instant(most - 1)), EMPTY);

    let one_more = rules.clone() + &until(most, 9);
    let refused = compile(
        &policy(&one_more),
        &Environment::default(),
        &Options::default(),
    );
    let entries = MAX_TIMELINE as usize + 1;
    assert_eq!(refused, Err(CompileError::Timeline { entries }));
    let said = refused.unwrap_err().to_string();
    assert!(
        said.contains("at least 65") && said.contains("limit is 64"),
        "{said}"
    );
    // For other flows they are no more than before.
    built(&policy(&(rules + &until(most, 9).replace("tcp/", "udp/"))));
}

#[test]
fn a_rule_that_outlives_the_next_ones_leaves_them_nothing() {
    let falling: String = (0..200).rev().map(|n| until(n, 9)).collect();
    let image = built(&policy(&falling));
    assert_eq!(rule_at(&image, 9, 0), 0);
    assert_eq!(rule_at(&image, 9, instant(199) - 1), 0);
    assert_eq!(rule_at(&image, 9, instant(199)), EMPTY);
    // One without end, wherever it stands, makes a plain verdict.
    let plain = falling + "- {name: all, from: [a], to: [any], services: [tcp/1-9]}\n";
    let image = built(&policy(&plain));
    assert_eq!(rule_at(&image, 9, 0), 200);
    assert!(timelines(&image).is_empty());
    let exceptions = image.stats().exceptions;
    let alone = "- {name: all, from: [a], to: [any], services: [tcp/1-9]}\n";
    assert_eq!(exceptions, built(&policy(alone)).stats().exceptions);
}

#[test]
fn judging_what_expires_is_bounded() {
    // The first rule looks at its class of service, the second at that and its own.
    let policy = policy(&(until(1, 9) + &until(2, 19)));
    let largest = image::largest() as usize;
    let (env, options) = (Environment::default(), Options::default());
    let with = |effort| compile_within(&policy, &env, &options, largest, effort);
    // Two behaviours as source and one as destination, one of them without rules.
    assert!(with(3).is_ok());
    assert_eq!(
        with(2),
        Err(CompileError::TooComplex {
            rules: 2,
            classes: 2,
            service_classes: 3
        })
    );
}

#[test]
fn equal_timelines_are_stored_once() {
    let image = built(&policy(
        "- {name: r, from: [any], to: [any], services: [tcp/1, udp/1], expires: 1970-01-02T00:00:00Z}\n\
         - {name: s, from: [a], to: [a], services: [tcp/2]}\n\
         - {name: t, from: [a], to: [any], services: [tcp/3]}\n",
    ));
    // Four pairs of classes are four rows, of which `a` guards three.
    let all = timelines(&image);
    assert_eq!(all.len(), 4);
    assert_eq!(all.into_iter().collect::<BTreeSet<_>>().len(), 2);
}

#[test]
fn what_is_not_used_is_not_written() {
    let image = built(&policy(
        "- {name: r, from: [a], to: [any], services: [ssh]}\n",
    ));
    for table in [
        header::SESSIONS,
        header::SERVICE_FAILSAFES,
        header::SLOT_FAILSAFES,
        header::ETHERTYPES,
        header::ETHERTYPES_COUNT,
    ] {
        assert_eq!(image.words()[table as usize], 0);
    }
    let at = image.words()[header::CLASS_INFO as usize] as usize;
    let count = image.stats().classes as usize * 2;
    assert!(image.words()[at..at + count].iter().all(|word| *word == 0));
}

#[test]
fn own_addresses_are_marked_but_not_what_others_may_have_too() {
    let addresses = [
        ("10.0.0.7", true),
        ("192.0.2.1", true),
        ("fd00::7", true),
        ("127.0.0.1", false),
        ("::1", false),
        ("169.254.3.4", false),
        ("fe80::1", false),
    ];
    let ips: Vec<(IpAddr, bool)> = addresses
        .iter()
        .map(|(ip, own)| (ip.parse().unwrap(), *own))
        .collect();
    let env = Environment {
        host_addresses: ips.iter().map(|(ip, _)| *ip).collect(),
        ..Environment::default()
    };
    let policy = policy("- {name: r, from: [a], to: [any], services: [ssh]}\n");
    let image = compile(&policy, &env, &Options::default()).unwrap();
    let words = image.words();
    let flags = |ip: IpAddr| layout::class_info(words, address_class(words, &ip.into())).0;
    for (ip, own) in ips {
        assert_eq!(flags(ip), u32::from(own), "{ip}");
    }
    assert_eq!(flags("10.0.0.8".parse().unwrap()), 0);
    // Of the unsegmented ones, own and link-local are judged alike: the hooks ask for one of them.
    assert_eq!(words[header::LOCAL4_CLASSES_COUNT as usize], 2);
    assert_eq!(words[header::LOCAL6_CLASSES_COUNT as usize], 1);
}

#[test]
fn settings_beyond_the_layout_are_refused_with_the_number() {
    let policy = policy("- {name: r, from: [a], to: [any], services: [ssh]}\n");
    let failsafe = Failsafe {
        sources: vec!["10.0.0.0/8".parse().unwrap()],
        ports: vec![(crate::policy::model::Transport::Tcp, 22, 22)],
        interfaces: vec![],
    };
    let with = |failsafes: usize, ethertypes: u16, slot: u32| {
        let env = Environment {
            interfaces: [(slot, "eth0".to_owned())].into(),
            ..Environment::default()
        };
        let options = Options {
            failsafes: vec![failsafe.clone(); failsafes],
            // Twice each: that does not count.
            ethertypes: (0..ethertypes)
                .chain(0..ethertypes)
                .map(|t| 0x8800 + t)
                .collect(),
            ..Options::default()
        };
        compile(&policy, &env, &options)
    };
    let image = with(16, 16, INTERFACE_SLOTS - 1).unwrap();
    let class = address_class(image.words(), &Address::v4(0x0a00_0001));
    assert_eq!(layout::class_info(image.words(), class).0, 0xffff_0000);
    assert_eq!(image.words()[header::ETHERTYPES_COUNT as usize], 16);
    let at = image.words()[header::ETHERTYPES as usize] as usize;
    let listed: Vec<u32> = (0x8800..0x8810).collect();
    assert_eq!(image.words()[at..at + 16], listed);
    for (refused, error, number) in [
        (with(17, 0, 1), CompileError::Failsafes { count: 17 }, "17"),
        (with(0, 17, 1), CompileError::Ethertypes { count: 17 }, "17"),
        (
            with(0, 0, INTERFACE_SLOTS),
            CompileError::InterfaceSlot { slot: 1024 },
            "1023",
        ),
        (
            with(0, 0, 0),
            CompileError::InterfaceSlot { slot: 0 },
            "slot 0",
        ),
    ] {
        assert_eq!(refused, Err(error));
        assert!(error.to_string().contains(number), "{error}");
    }
}
