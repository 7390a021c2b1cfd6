//! A set of prefixes is a set: however often and in whatever order its members are written, the image
//! is the same, and it says what the prefixes say.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::Ipv4Addr;

use enforcer::{
    compile::{Image, Options, compile},
    policy::{SourceFile, model::Environment, parse},
};
use enforcer_common::{
    decide::{Query, decide},
    image::{Address, mix},
    verdict::Outcome,
};

/// Repeatable noise.
struct Noise(u64);

impl Noise {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 += 1;
        mix(self.0, 2) % bound
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for at in (1..list.len()).rev() {
            list.swap(at, self.below(at as u64 + 1) as usize);
        }
    }
}

/// Address and length.
type Prefix = (u32, u32);

fn within((address, length): Prefix, ip: u32) -> bool {
    length == 0 || (address ^ ip) >> (32 - length) == 0
}

fn text((address, length): Prefix) -> String {
    format!("{}/{length}", Ipv4Addr::from_bits(address))
}

/// A prefix and what is cut out of it.
#[derive(Clone)]
struct Cut(Prefix, Vec<Prefix>);

impl Cut {
    fn has(&self, ip: u32) -> bool {
        within(self.0, ip) && !self.1.iter().any(|cut| within(*cut, ip))
    }
}

/// A rule of the naive evaluator: from, to, ports, whether it denies.
struct Line {
    from: usize,
    to: usize,
    ports: (u16, u16),
    deny: bool,
}

/// Prefixes that contain, touch and cut one another; 10.0.0.0/8 among them and its parts.
fn sets(noise: &mut Noise) -> Vec<Vec<Cut>> {
    (0..6)
        .map(|set| {
            let mut members: Vec<Cut> = (0..5)
                .map(|_| {
                    let length = [8, 9, 12, 16, 20, 24, 25, 30, 32][noise.below(9) as usize];
                    let ip = 0x0a00_0000 | (noise.below(1 << 24) as u32 & 0x00a1_0f87);
                    let prefix = (ip & (u32::MAX << (32 - length)), length);
                    let cuts = (0..noise.below(3)).filter_map(|_| {
                        let inner = (length + 1 + noise.below(6) as u32).min(32);
                        let ip = ip
                            ^ (noise.below(1 << 24) as u32 & !(u32::MAX << (32 - length)).max(1));
                        let cut = (ip & (u32::MAX << (32 - inner)), inner);
                        (inner > length && within(prefix, cut.0)).then_some(cut)
                    });
                    // Two halves would leave nothing.
                    Cut(prefix, cuts.take(1).collect())
                })
                .collect();
            if set == 0 {
                members.push(Cut((0x0a00_0000, 8), vec![(0x0aa1_0000, 16)]));
            }
            members
        })
        .collect()
}

fn lines(noise: &mut Noise) -> Vec<Line> {
    (0..12)
        .map(|number| {
            let first = 1 + noise.below(6) as u16;
            Line {
                from: noise.below(6) as usize,
                to: noise.below(6) as usize,
                ports: (first, first + noise.below(4) as u16),
                deny: number % 3 == 0,
            }
        })
        .collect()
}

fn yaml(sets: &[Vec<Cut>], lines: &[Line]) -> String {
    let mut out = "version: 1\nsegments:\n".to_owned();
    for (number, members) in sets.iter().enumerate() {
        let members = members.iter().map(|Cut(prefix, cuts)| {
            let cuts: Vec<String> = cuts.iter().map(|cut| text(*cut)).collect();
            let except = if cuts.is_empty() {
                String::new()
            } else {
                format!(", except: [{}]", cuts.join(", "))
            };
            format!("{{cidr: {}{except}}}", text(*prefix))
        });
        let members: Vec<String> = members.collect();
        out += &format!("  s{number}: {{ members: [{}] }}\n", members.join(", "));
    }
    out += "rules:\n";
    for (number, line) in lines.iter().enumerate() {
        let (first, last) = line.ports;
        let action = if line.deny { "deny" } else { "allow" };
        out += &format!(
            "  - {{ name: r{number}, from: [s{}], to: [s{}], services: [tcp/{first}-{last}], action: {action} }}\n",
            line.from, line.to
        );
    }
    out
}

fn image(text: String) -> Image {
    let file = SourceFile {
        name: "a.yaml".to_owned(),
        text,
    };
    let policy = parse(&[file]).unwrap();
    compile(&policy, &Environment::default(), &Options::default()).unwrap()
}

/// What the prefixes say: a deny that matches, else an allow, else whether anybody guards.
fn passes(sets: &[Vec<Cut>], lines: &[Line], src: u32, dst: u32, port: u16) -> bool {
    let has = |set: usize, ip: u32| sets[set].iter().any(|member| member.has(ip));
    let matches = |line: &&Line| {
        has(line.from, src) && has(line.to, dst) && line.ports.0 <= port && port <= line.ports.1
    };
    let mut matching = lines.iter().filter(matches).peekable();
    let guarded = (0..sets.len()).any(|set| has(set, src) || has(set, dst));
    match matching.peek() {
        Some(_) => !matching.any(|line| line.deny),
        None => !guarded,
    }
}

#[test]
fn one_set_of_prefixes_is_one_image_five_hundred_times() {
    let mut noise = Noise(0);
    let (mut sets, lines) = (sets(&mut noise), lines(&mut noise));
    let first = image(yaml(&sets, &lines));
    for _ in 0..500 {
        for members in &mut sets {
            // A member twice says nothing more.
            let again = members[noise.below(members.len() as u64) as usize].clone();
            if noise.below(2) == 0 && members.len() < 12 {
                members.push(again);
            }
            noise.shuffle(members);
        }
        assert!(image(yaml(&sets, &lines)) == first);
    }
}

#[test]
fn an_image_says_of_overlapping_prefixes_what_they_say() {
    let mut noise = Noise(1 << 32);
    let mut seen = [0; 2];
    for _ in 0..20 {
        let (sets, lines) = (sets(&mut noise), lines(&mut noise));
        let image = image(yaml(&sets, &lines));
        let ends: Vec<u32> = sets
            .iter()
            .flatten()
            .flat_map(|Cut(prefix, cuts)| std::iter::once(prefix).chain(cuts))
            .flat_map(|(address, length)| {
                let last = address | (u64::from(u32::MAX) >> length) as u32;
                [
                    address.wrapping_sub(1),
                    *address,
                    last,
                    last.wrapping_add(1),
                ]
            })
            .collect();
        for _ in 0..10_000 {
            let mut pick = || ends[noise.below(ends.len() as u64) as usize];
            let (src, dst) = (pick(), pick());
            let port = noise.below(12) as u16;
            let query = Query {
                source: Address::v4(src),
                destination: Address::v4(dst),
                protocol: 6,
                selector: port,
            };
            let decision = decide(image.words(), &query, 0);
            let want = passes(&sets, &lines, src, dst, port);
            assert_eq!(decision.outcome == Outcome::Allowed, want, "{query:?}");
            seen[usize::from(want)] += 1;
        }
    }
    assert!(seen.iter().all(|count| *count > 5_000), "{seen:?}");
}
