//! How large images become. No time is asserted; sizes are.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking; the sizes are there to be read"
)]

use std::{
    collections::BTreeSet,
    fmt::Write,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::Command,
    sync::Arc,
};

use enforcer::{
    compile::{CompileError, Image, Options, compile},
    policy::{
        model::{
            Action, AddrRange, Defaults, Endpoints, Environment, FlowQuery, Member, Mode, Origin,
            Policy, Protect, Rule, Segment, SegmentId, Service, Transport, Unsegmented,
        },
        reference,
    },
};
use enforcer_common::{
    decide::{Query, decide},
    image::{SIZE_CLASSES, mix},
};

/// Repeatable noise.
struct Noise(u64);

impl Noise {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 += 1;
        mix(self.0, 1) % bound
    }
}

fn origin() -> Origin {
    Origin {
        file: Arc::from("scale.yaml"),
        line: 1,
        column: 1,
    }
}

fn member(range: AddrRange) -> Member {
    Member {
        range,
        except: vec![],
        origin: origin(),
    }
}

fn v4(address: u64, size: u64) -> Member {
    let first = address as u32;
    member(AddrRange::V4 {
        first: Ipv4Addr::from_bits(first),
        last: Ipv4Addr::from_bits(first.saturating_add(size as u32 - 1)),
    })
}

fn v6(hi: u64, lo: u64, last_lo: u64) -> Member {
    let address = |lo| Ipv6Addr::from_bits(u128::from(hi) << 64 | u128::from(lo));
    member(AddrRange::V6 {
        first: address(lo),
        last: address(last_lo),
    })
}

fn segment(number: usize, members: Vec<Member>, noise: &mut Noise) -> Segment {
    Segment {
        name: format!("s{number}"),
        description: String::new(),
        members: members.into(),
        mode: [Mode::Enforce, Mode::Enforce, Mode::Observe][noise.below(3) as usize],
        protect: Protect::Both,
        interfaces: vec![],
        origin: origin(),
    }
}

fn rule(number: usize, segments: u64, ports: u64, wide: u64, noise: &mut Noise) -> Rule {
    let mut side = |most: u64| Endpoints {
        segments: (0..=noise.below(most))
            .map(|_| SegmentId(noise.below(segments) as u32))
            .collect(),
        ..Endpoints::default()
    };
    let (from, to) = (side(wide), side(2));
    let services = (0..=noise.below(3))
        .map(|_| {
            let first = noise.below(ports) as u16;
            Service::Ports {
                transport: [Transport::Tcp, Transport::Udp][noise.below(2) as usize],
                first,
                last: first.saturating_add(noise.below(4) as u16),
            }
        })
        .collect();
    Rule {
        name: format!("r{number}"),
        from,
        to,
        services,
        action: [Action::Allow, Action::Deny][usize::from(noise.below(20) == 0)],
        expires: None,
        session: None,
        origin: origin(),
    }
}

/// Rules name up to `wide` segments in `from`, up to two in `to`.
fn policy(
    segments: Vec<Segment>,
    rules: usize,
    ports: u64,
    wide: u64,
    noise: &mut Noise,
) -> Policy {
    let count = segments.len() as u64;
    Policy {
        defaults: Defaults {
            mode: Mode::Enforce,
            unsegmented: Unsegmented::Allow,
        },
        segments,
        groups: vec![],
        rules: (0..rules)
            .map(|n| rule(n, count, ports, wide, noise))
            .collect(),
        tests: vec![],
    }
}

/// `count` segments that share `members` members: mostly hosts, some networks, some IPv6.
fn large(count: usize, members: usize, rules: usize) -> Policy {
    let mut noise = Noise(0);
    let each = members / count;
    let segments = (0..count)
        .map(|number| {
            let site = number as u64;
            let members = (0..each)
                .map(|_| match noise.below(10) {
                    0 => v4(0x0a00_0000 | site << 14 | noise.below(64) << 8, 256),
                    1 => v6(0xfd00_0010_0000_0000 | site, noise.below(1 << 40), u64::MAX),
                    2 => {
                        let lo = noise.below(1 << 40);
                        v6(0xfd00_0011_0000_0000 | site, lo, lo)
                    }
                    _ => v4(0xac10_0000 + noise.below(1 << 28), 1),
                })
                .collect();
            segment(number, members, &mut noise)
        })
        .collect();
    policy(segments, rules, 60_000, 3, &mut noise)
}

/// Wards, offices and server rooms of the large hospital.
const PLACES: u64 = 40;
/// Kinds of device that stand in their networks.
const KINDS: u64 = 8;

/// A large hospital: 40 places with networks of both families; 8 kinds of device, 2 000 of them,
/// listed one by one wherever they stand, so that a device is in two segments; 300 rules.
fn hospital() -> Policy {
    let mut noise = Noise(0);
    let mut segments = Vec::new();
    for place in 0..PLACES {
        let members = (0..12).flat_map(|net| {
            [
                v4(0x0a00_0000 | place << 16 | net << 8, 256),
                v6(0xfd00_0010_0000_0000 | place << 8 | net, 0, u64::MAX),
            ]
        });
        let number = segments.len();
        segments.push(segment(number, members.collect(), &mut noise));
    }
    for kind in 0..KINDS {
        let devices = (0..250).map(|_| {
            // A kind stands in a third of the places.
            let place = (kind * 5 + noise.below(PLACES / 3)) % PLACES;
            let network = 0x0a00_0000 | place << 16 | noise.below(12) << 8;
            v4(network | (1 + noise.below(250)), 1)
        });
        let devices = devices.collect();
        let number = segments.len();
        segments.push(segment(number, devices, &mut noise));
    }
    policy(segments, 300, 2_000, 2, &mut noise)
}

fn compiled(name: &str, policy: &Policy, env: &Environment) -> Image {
    let image = compile(policy, env, &Options::default()).unwrap();
    println!(
        "{name}: {} KiB, class of {} MiB, {:?}",
        image.words().len() / 256,
        image.size_class() >> 18,
        image.stats()
    );
    image
}

/// Verdicts between first and last addresses of random members.
fn spot_check(policy: &Policy, env: &Environment, image: &Image, count: usize) {
    let mut noise = Noise(1 << 40);
    let mut pick = || loop {
        let segment = &policy.segments[noise.below(policy.segments.len() as u64) as usize];
        let at = noise.below(segment.members.len() as u64) as usize;
        if let AddrRange::V4 { first, last } = segment.members[at].range {
            return [first, last][noise.below(2) as usize];
        }
    };
    for n in 0..count {
        let (src, dst) = (pick(), pick());
        let rule = policy.rules.get(n % policy.rules.len()).unwrap();
        let Service::Ports {
            transport, last, ..
        } = rule.services[0]
        else {
            continue;
        };
        let query = FlowQuery {
            src: IpAddr::V4(src),
            dst: IpAddr::V4(dst),
            protocol: transport.number(),
            selector: last,
        };
        let decision = decide(
            image.words(),
            &Query {
                source: query.src.into(),
                destination: query.dst.into(),
                protocol: query.protocol,
                selector: query.selector,
            },
            0,
        );
        let judgement = reference::judge(policy, env, &query, 0);
        assert_eq!(decision.outcome.name(), {
            match judgement.outcome {
                reference::Outcome::Allowed => "allowed",
                reference::Outcome::Denied => "denied",
                reference::Outcome::WouldDeny => "would_deny",
                reference::Outcome::Off => "off",
            }
        });
        assert_eq!(
            (decision.rule != u32::MAX).then_some(decision.rule),
            judgement.rule.map(|r| r.0)
        );
    }
}

fn environment() -> Environment {
    Environment {
        host_addresses: BTreeSet::from([
            IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
            IpAddr::V6(Ipv6Addr::LOCALHOST),
        ]),
        ..Environment::default()
    }
}

#[test]
fn a_hospital_fits_the_smallest_size_class() {
    let (policy, env) = (hospital(), environment());
    let image = compiled("hospital", &policy, &env);
    assert_eq!(image.size_class(), SIZE_CLASSES[0]);
    spot_check(&policy, &env, &image, 2_000);
}

#[test]
fn two_hundred_segments_twenty_thousand_members_two_thousand_rules() {
    let (policy, env) = (large(200, 20_000, 2_000), environment());
    let image = compiled("200 segments", &policy, &env);
    assert!(image.size_class() <= SIZE_CLASSES[1]);
    spot_check(&policy, &env, &image, 200);
}

/// With a million members it takes 3 s and 278 MB in a release build; here a twentieth of that.
#[test]
fn a_thousand_segments_compile() {
    let (policy, env) = (large(1_000, 50_000, 2_000), environment());
    let image = compiled("1000 segments", &policy, &env);
    spot_check(&policy, &env, &image, 20);
}

/// What `enforcer check` says to this policy, and its exit code, when it may have 512 MiB of
/// addresses and no more: beyond them it would abort.
fn check_in_512_mib(policy: &str) -> (Option<i32>, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("policy.yaml");
    fs::write(&file, policy).unwrap();
    let output = Command::new("sh")
        .args(["-c", "ulimit -v 524288 && exec \"$0\" check \"$1\""])
        .arg(env!("CARGO_BIN_EXE_enforcer"))
        .arg(&file)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

/// `count` segments of `members` random prefixes each, all over 10.0.0.0/8.
fn scattered_segments(count: usize, members: usize, noise: &mut Noise) -> String {
    let mut text = String::new();
    for number in 0..count {
        let prefixes = (0..members).map(|_| {
            let length = [16, 20, 24][noise.below(3) as usize];
            let address = 0x0a00_0000 | noise.below(1 << 24) >> (32 - length) << (32 - length);
            let address = Ipv4Addr::from_bits(address as u32);
            format!("{{cidr: {address}/{length}}}")
        });
        let prefixes = prefixes.collect::<Vec<_>>().join(", ");
        writeln!(text, "  s{number}: {{ members: [{prefixes}] }}").unwrap();
    }
    text
}

#[test]
fn a_policy_of_too_many_rows_is_refused_within_512_mib() {
    let mut noise = Noise(0);
    let mut text = "version: 1\nsegments:\n".to_owned();
    text += &scattered_segments(120, 30, &mut noise);
    text += "rules:\n";
    for number in 0..300 {
        let [a, b, c, d] = [(); 4].map(|()| noise.below(120));
        let port = 1 + noise.below(60_000);
        writeln!(
            text,
            "  - {{ name: r{number}, from: [s{a}, s{b}], to: [s{c}, s{d}], services: [tcp/{port}] }}"
        )
        .unwrap();
    }
    let (code, said) = check_in_512_mib(&text);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("too large"), "{said}");
    assert!(said.contains("the limit is 16777216"), "{said}");
    assert!(!said.contains("(0 kinds of address"), "{said}");
    assert!(!said.contains(" 0 distinct rows"), "{said}");
}

#[test]
fn long_sets_of_segments_that_mean_the_same_take_no_memory() {
    let mut noise = Noise(0);
    let mut text = "version: 1\nsegments:\n".to_owned();
    // Each address is in thousands of segments, and nearly each stretch of them in other ones.
    for number in 0..4_000 {
        writeln!(text, "  all{number}: {{ members: [{{cidr: 0.0.0.0/0}}] }}").unwrap();
    }
    text += &scattered_segments(600, 20, &mut noise);
    text += "rules:\n  - { name: r, from: [any], to: [all0], services: [tcp/1] }\n";
    let (code, said) = check_in_512_mib(&text);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn more_kinds_of_service_than_can_be_told_apart_are_refused() {
    // Nested ranges: each rule's services are a class of their own.
    let nested = (1..=20_000u16).map(|number| Rule {
        name: format!("r{number}"),
        from: Endpoints::default(),
        to: Endpoints::default(),
        services: vec![Service::Ports {
            transport: Transport::Tcp,
            first: number,
            last: u16::MAX - number,
        }],
        action: Action::Allow,
        expires: None,
        session: None,
        origin: origin(),
    });
    let mut policy = policy(vec![], 0, 1, 1, &mut Noise(0));
    policy.rules = nested.collect();
    let refused = compile(&policy, &environment(), &Options::default());
    assert_eq!(
        refused,
        Err(CompileError::TooComplex {
            rules: 20_000,
            classes: 0,
            service_classes: 0
        })
    );
    policy.rules.edit(|rules| rules.truncate(10_000));
    let image = compiled("nested services", &policy, &environment());
    assert_eq!(image.stats().service_classes, 10_001);
}

/// Nested ranges of ports, each rule's with one of `instants` expiries, in an order that makes later
/// rules live longer as often as not.
fn expiring(rules: u16, instants: u64) -> Policy {
    let nested = (1..=rules).map(|number| Rule {
        name: format!("r{number}"),
        from: Endpoints {
            any: true,
            ..Endpoints::default()
        },
        to: Endpoints {
            segments: BTreeSet::from([SegmentId(u32::from(number % 40))]),
            any: number % 2 == 0,
            ..Endpoints::default()
        },
        services: vec![Service::Ports {
            transport: Transport::Tcp,
            first: number,
            last: u16::MAX - number,
        }],
        action: Action::Allow,
        expires: Some(1 + mix(u64::from(number), 3) % instants),
        session: None,
        origin: origin(),
    });
    let mut policy = policy(
        (0..40)
            .map(|n| {
                segment(
                    n,
                    vec![v4(0x0a00_0000 | (n as u64) << 8, 256)],
                    &mut Noise(0),
                )
            })
            .collect(),
        0,
        1,
        1,
        &mut Noise(0),
    );
    policy.rules = nested.collect();
    policy
}

#[test]
fn a_thousand_rules_that_expire_compile_or_are_refused() {
    let policy = expiring(1_000, 50);
    let env = environment();
    let image = compiled("expiring rules", &policy, &env);
    spot_check(&policy, &env, &image, 40);
    let mut growing = policy;
    growing.rules.edit(|rules| {
        for (number, rule) in (1..).zip(rules) {
            rule.expires = Some(number);
        }
    });
    let refused = compile(&growing, &env, &Options::default());
    assert_eq!(refused, Err(CompileError::Timeline { entries: 65 }));
}
