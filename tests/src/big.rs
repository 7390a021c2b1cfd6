//! Large policies, the same ones each time: segments of hosts and prefixes of both families, some
//! of which overlap, groups, and rules between random pairs.

use std::{
    fmt::Write,
    net::{Ipv4Addr, Ipv6Addr},
};

use enforcer::policy::SourceFile;
use enforcer_common::image::mix;

/// How large a policy is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Segments; no more than members.
    pub segments: u32,
    /// Rules.
    pub rules: u32,
    /// Entries of the segments' `members`.
    pub members: u32,
}

/// Small, medium and large, as they are measured.
pub const SMALL: Shape = Shape {
    segments: 10,
    rules: 20,
    members: 100,
};
/// A site.
pub const MEDIUM: Shape = Shape {
    segments: 100,
    rules: 10_000,
    members: 1_000,
};
/// As much as is promised.
pub const LARGE: Shape = Shape {
    segments: 1_000,
    rules: 100_000,
    members: 1_000_000,
};

/// Values of a file: three for a member, about a dozen for a rule.
const NODES_PER_FILE: usize = 150_000;
/// Addresses of a segment in one /24.
const PER_SUBNET: u32 = 40;
/// Of so many segments the last one takes its hosts from others.
const TAGS: u32 = 32;

fn noise(of: u64, kind: u64) -> u32 {
    (mix(of, kind) >> 32) as u32
}

impl Shape {
    fn segments(&self) -> u32 {
        self.segments.clamp(1, self.members.max(1))
    }

    fn is_tag(&self, segment: u32) -> bool {
        segment % TAGS == TAGS - 1
    }

    /// Host `number` of a segment, in 10.0.0.0/8: two segments never have the same one, but for tags.
    fn host4(&self, segment: u32, number: u32) -> Ipv4Addr {
        let mut subnet = segment + self.segments() * (number / PER_SUBNET);
        let slot = number % PER_SUBNET;
        let mut byte = 5 * slot + 1 + noise(u64::from(number), 1) % 5;
        // Every tenth is far from the others.
        if slot == 7 {
            let used = 0xffff;
            (subnet, byte) = (subnet.wrapping_mul(7919) % used, 201 + subnet / used % 54);
        }
        Ipv4Addr::from_bits(10 << 24 | (subnet & 0xffff) << 8 | byte)
    }

    fn host6(&self, segment: u32, number: u32) -> Ipv6Addr {
        let subnet = u128::from(segment) << 16 | u128::from(number / 64);
        let interface = mix(u64::from(number), u64::from(segment));
        Ipv6Addr::from_bits(0xfd00 << 112 | subnet << 64 | u128::from(interface))
    }
}

/// Writes members one by one; prefixes of either family are handed out in ascending order.
struct Members {
    shape: Shape,
    next4: u32,
    next6: u128,
}

impl Members {
    fn write(&mut self, text: &mut String, segment: u32, number: u32) {
        let random = noise(u64::from(segment) << 32 | u64::from(number), 2);
        let shape = self.shape;
        let owner = if shape.is_tag(segment) {
            segment - 1 - number % 8
        } else {
            segment
        };
        let entry = match random % 20 {
            0..14 => writeln!(text, "      - cidr: {}/32", shape.host4(owner, number)),
            14..17 => writeln!(text, "      - cidr: {}/128", shape.host6(owner, number)),
            17..19 => {
                let length = 24 + (random >> 8) % 7;
                let size = 1 << (32 - length);
                let first = self.next4.next_multiple_of(size);
                self.next4 = first + size;
                let first = Ipv4Addr::from_bits(first);
                writeln!(text, "      - cidr: {first}/{length}")
            }
            _ => {
                let length = [48, 56, 60, 64, 64, 64][(random >> 8) as usize % 6];
                let size = 1u128 << (128 - length);
                let first = self.next6.next_multiple_of(size);
                self.next6 = first + size;
                let first = Ipv6Addr::from_bits(first);
                writeln!(text, "      - cidr: \"{first}/{length}\"")
            }
        };
        entry.unwrap();
    }
}

/// The files of a policy.
pub fn policy(shape: Shape) -> Vec<SourceFile> {
    let mut files = Files::default();
    let segments = shape.segments();
    let mut members = Members {
        shape,
        next4: Ipv4Addr::new(100, 64, 0, 0).to_bits(),
        next6: 0xfd20 << 112,
    };
    for segment in 0..segments {
        let count = shape.members / segments + u32::from(segment < shape.members % segments);
        files.room("segments:\n", 3 * count as usize + 8);
        let mode = if segment % 10 == 9 {
            "observe"
        } else {
            "enforce"
        };
        let text = &mut files.text;
        writeln!(text, "  s{segment}:\n    mode: {mode}\n    members:").unwrap();
        for number in 0..count {
            members.write(text, segment, number);
        }
    }
    let groups = segments / 20;
    for group in 0..groups {
        files.room("groups:\n", 12);
        let names = (0..5 + group % 5).map(|n| format!("s{}", (group * 17 + n * 3) % segments));
        let names: Vec<_> = names.collect();
        writeln!(files.text, "  g{group}: [{}]", names.join(", ")).unwrap();
    }
    for rule in 0..shape.rules {
        files.room("rules:\n", 14);
        let random = |kind| noise(u64::from(rule), kind);
        let side = |kind| {
            let random = random(kind);
            if groups > 0 && (rule < groups || random % 32 == 0) {
                format!("g{}", (rule + random / 32) % groups)
            } else {
                format!("s{}", random / 32 % segments)
            }
        };
        let from = if rule < groups {
            format!("g{rule}")
        } else {
            side(3)
        };
        let services = (0..=random(5) % 3).map(|n| service(random(6 + u64::from(n))));
        let mut services: Vec<_> = services.collect();
        services.sort();
        services.dedup();
        let action = if random(10) % 100 == 0 {
            ", action: deny"
        } else {
            ""
        };
        let services = services.join(", ");
        let to = side(4);
        let text = &mut files.text;
        writeln!(
            text,
            "  - {{name: r{rule}, from: [{from}], to: [{to}], services: [{services}]{action}}}"
        )
        .unwrap();
    }
    files.finish()
}

/// One of some two hundred.
fn service(random: u32) -> String {
    const NAMED: [&str; 8] = [
        "postgresql",
        "hl7-mllp",
        "dicom",
        "dns",
        "ntp",
        "rdp",
        "smb",
        "ping",
    ];
    let (kind, number) = (random % 8, random / 8);
    match kind {
        0..3 => NAMED[number as usize % NAMED.len()].to_owned(),
        3 => format!("udp/{}", 5_000 + number % 50),
        4 => {
            let first = 9_000 + number % 40 * 20;
            format!("tcp/{first}-{}", first + 9)
        }
        _ => format!("tcp/{}", 1_000 + number % 100 * 7),
    }
}

#[derive(Default)]
struct Files {
    done: Vec<SourceFile>,
    text: String,
    section: &'static str,
    nodes: usize,
}

impl Files {
    /// So many values of a section are to come.
    fn room(&mut self, section: &'static str, nodes: usize) {
        if self.nodes + nodes > NODES_PER_FILE || self.section != section {
            self.close();
            self.text = format!("version: 1\n{section}");
            (self.section, self.nodes) = (section, 0);
        }
        self.nodes += nodes;
    }

    fn close(&mut self) {
        let text = std::mem::take(&mut self.text);
        if !text.is_empty() {
            let number = self.done.len();
            let name = format!(
                "{number:03}-{}.yaml",
                self.section.trim_end_matches([':', '\n'])
            );
            self.done.push(SourceFile { name, text });
        }
    }

    fn finish(mut self) -> Vec<SourceFile> {
        self.close();
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_has_what_was_asked_for() {
        for shape in [
            SMALL,
            MEDIUM,
            Shape {
                segments: 10,
                rules: 10,
                members: 1,
            },
        ] {
            let files = policy(shape);
            assert_eq!(files, policy(shape));
            let policy = enforcer::policy::parse(&files).unwrap();
            assert_eq!(policy.segments.len(), shape.segments() as usize);
            assert_eq!(policy.rules.len(), shape.rules as usize);
            let members = policy.segments.iter().map(|s| s.members.len());
            assert_eq!(members.sum::<usize>(), shape.members as usize);
        }
    }
}
