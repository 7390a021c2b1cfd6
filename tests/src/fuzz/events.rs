//! Records as the ring buffer carries them → denials as readers see them.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::{Arc, LazyLock},
};

use enforcer::{
    api::types::{Denial, Record},
    events::{
        Generations,
        cgroups::Cgroups,
        enrich::{Clock, Enricher, Local},
        tally::Tally,
    },
};
use enforcer_common::wire::Event;

use super::script::{ENVIRONMENT, POLICIES};

struct Somewhere;

impl Local for Somewhere {
    fn interface_name(&self, ifindex: u32) -> Option<Arc<str>> {
        (ifindex < 3).then(|| "eth0".into())
    }

    fn addresses(&self) -> BTreeSet<IpAddr> {
        ENVIRONMENT.host_addresses.iter().copied().collect()
    }
}

static GENERATIONS: LazyLock<Arc<Generations>> = LazyLock::new(|| {
    let generations = Generations::default();
    for (generation, compiled) in (1..).zip(POLICIES.iter()) {
        generations.insert(generation, Arc::new(compiled.policy.clone()));
    }
    Arc::new(generations)
});

/// A record from the bytes of the ring.
pub fn decode(bytes: &[u8]) -> Event {
    assert_eq!(bytes.len(), size_of::<Event>());
    // SAFETY: the length is the type's, and any bit pattern is a value of it (it is Pod).
    unsafe { bytes.as_ptr().cast::<Event>().read_unaligned() }
}

/// Carries records to their readers; panics where something does not hold.
pub fn run(data: &[u8]) {
    let generations = Arc::clone(&GENERATIONS);
    let mut enricher = Enricher::new(generations, Arc::new(Somewhere), Cgroups::new(None));
    let mut tally = Tally::default();
    let clock = Clock::sample().unwrap();
    // Per slot and epoch: the packets told, and the highest total that said so.
    let mut told: HashMap<(u32, u32, u32), (u64, u64)> = HashMap::new();
    for bytes in data.chunks_exact(size_of::<Event>()) {
        let mut event = decode(bytes);
        // Close enough that none of them counts as one that wrapped.
        event.epoch &= 0xffff;
        let packets = tally.packets(&event);
        if event.slot != u32::MAX {
            let (sum, highest) = told
                .entry((event.cpu, event.slot, event.epoch))
                .or_default();
            *highest = event.total.max(*highest);
            *sum += packets;
            assert!(*sum <= *highest, "{sum} packets told of {highest}");
        }
        if packets == 0 {
            continue;
        }
        let denial = enricher.denial(&event, packets, clock);
        assert_eq!(denial.packets, packets);
        assert_eq!(denial.src.is_some(), matches!(event.family, 4 | 6));
        let record = Record::Denial(Box::new(denial));
        let line = serde_json::to_string(&record).unwrap();
        // Those beyond ASCII, which a terminal may act on, are for whoever prints it.
        let breaks = line.contains(|c: char| c < ' ');
        assert!(!breaks, "one record, one line: {line:?}");
        let read: Record = serde_json::from_str(&line).unwrap();
        let (Record::Denial(read), Record::Denial(record)) = (read, record) else {
            panic!("{line} reads as a loss");
        };
        // Times are written in milliseconds.
        let time = record.time;
        assert_eq!(Denial { time, ..*read }, *record, "{line}");
    }
}
