//! Which addresses are in some segments, for one who asks often.

use std::net::IpAddr;

use crate::policy::model::{Defaults, Environment, Mode, Policy, Rules, Segment, Unsegmented};

use super::{
    Stop,
    intervals::{self, Follow, Intervals},
};

/// The addresses of some segments.
pub struct Inside {
    v4: Intervals<u32>,
    v6: Intervals<u128>,
}

/// In how many of them the current address is.
struct Count {
    segments: usize,
    inside: u32,
}

impl Follow for Count {
    fn toggle(&mut self, segment: u32, entered: bool) {
        // The built-in sets come behind.
        if (segment as usize) < self.segments {
            self.inside = if entered {
                self.inside + 1
            } else {
                self.inside.saturating_sub(1)
            };
        }
    }

    fn number(&mut self) -> Result<u32, Stop> {
        Ok(u32::from(self.inside > 0))
    }
}

impl Inside {
    /// Of all these segments together.
    pub fn of<'a>(segments: impl Iterator<Item = &'a Segment>) -> Self {
        let segments: Vec<Segment> = segments.cloned().collect();
        let mut count = Count {
            segments: segments.len(),
            inside: 0,
        };
        let policy = Policy {
            defaults: Defaults {
                mode: Mode::Off,
                unsegmented: Unsegmented::Allow,
            },
            segments,
            groups: Vec::new(),
            rules: Rules::default(),
            tests: Vec::new(),
        };
        let sweep = intervals::sweep(&policy, &Environment::default(), &[], &mut count);
        // The count stops nothing.
        sweep.map_or_else(
            |_| Self {
                v4: Vec::new(),
                v6: Vec::new(),
            },
            |sweep| Self {
                v4: sweep.v4,
                v6: sweep.v6,
            },
        )
    }

    /// Whether `ip` is in one of them.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let value = match ip {
            IpAddr::V4(ip) => intervals::value_at(&self.v4, ip.to_bits()),
            IpAddr::V6(ip) => intervals::value_at(&self.v6, ip.to_bits()),
        };
        value == Some(1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::arbitrary;

    proptest! {
        #[test]
        fn it_is_what_the_model_says(
            (policy, queries) in arbitrary::policy().prop_flat_map(|policy| {
                let queries = prop::collection::vec(arbitrary::query(&policy), 24);
                (Just(policy), queries)
            }),
        ) {
            let all = Inside::of(policy.segments.iter());
            let first = Inside::of(policy.segments.iter().take(1));
            for ip in queries.iter().flat_map(|q| [q.src, q.dst]) {
                let segments = policy.segments_of(ip);
                prop_assert_eq!(all.contains(ip), !segments.is_empty());
                let first_id = crate::policy::model::SegmentId(0);
                prop_assert_eq!(first.contains(ip), segments.contains(&first_id));
            }
        }
    }
}
