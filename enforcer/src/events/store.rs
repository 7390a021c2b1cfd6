//! The last records, in memory, and those who follow them.

use std::{
    collections::VecDeque,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    sync::broadcast,
    time::{Duration, Instant, timeout_at},
};

use crate::api::types::{Lost, LostCause, LostVerdict, Peer, Record, Time};

/// Records kept.
const KEPT: usize = 10_000;
/// Records a follower may be behind before it loses the oldest of them.
const BEHIND: usize = 4_096;
/// How often a follower is told of gaps.
const EVERY: Duration = Duration::from_secs(1);

/// Which records a reader wants. Gaps are always wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Source.
    pub from: Option<Peer>,
    /// Destination.
    pub to: Option<Peer>,
}

impl Filter {
    /// Whether the reader wants `record`.
    pub fn wants(&self, record: &Record) -> bool {
        let Record::Denial(denial) = record else {
            return true;
        };
        let is = |peer: &Option<Peer>, ip: Option<IpAddr>, segments: &[Arc<str>]| match peer {
            None => true,
            Some(Peer::Address(wanted)) => ip == Some(*wanted),
            // What has no readable address is neither in a segment nor outside of all.
            Some(Peer::Segment(name)) if name == UNSEGMENTED => ip.is_some() && segments.is_empty(),
            Some(Peer::Segment(name)) => segments.iter().any(|s| **s == **name),
        };
        is(&self.from, denial.src, &denial.from_segments)
            && is(&self.to, denial.dst, &denial.to_segments)
    }
}

/// Stands for addresses in no segment, as in policies.
pub const UNSEGMENTED: &str = "unsegmented";

/// Packets that a record stands for.
fn packets(record: &Record) -> u64 {
    match record {
        Record::Denial(denial) => denial.packets,
        Record::Lost(lost) => lost.events,
        Record::Tampered(_) => 0,
    }
}

fn lost(cause: LostCause, events: u64) -> Record {
    Record::Lost(Lost {
        time: Time::now(),
        verdict: LostVerdict::Lost,
        cause,
        events,
    })
}

/// A record on its way to followers.
#[derive(Clone, Debug)]
struct Sent {
    record: Arc<Record>,
    /// Packets of all records so far, this one included.
    total: u64,
}

/// The records. Writers never wait for readers.
#[derive(Debug)]
pub struct Store {
    kept: Mutex<Kept>,
    followers: broadcast::Sender<Sent>,
}

#[derive(Debug, Default)]
struct Kept {
    records: VecDeque<Arc<Record>>,
    /// Packets of all records ever.
    total: u64,
    /// Packets of records that are not kept any more.
    evicted: u64,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            kept: Mutex::default(),
            followers: broadcast::Sender::new(BEHIND),
        }
    }
}

impl Store {
    /// Adds a record; the oldest one goes when there are too many.
    pub fn push(&self, record: Record) {
        let record = Arc::new(record);
        let mut kept = self.kept();
        if kept.records.len() == KEPT
            && let Some(oldest) = kept.records.pop_front()
        {
            kept.evicted += packets(&oldest);
        }
        kept.total += packets(&record);
        kept.records.push_back(Arc::clone(&record));
        let total = kept.total;
        // Under the lock, so that `follow` misses nothing. Fails when nobody follows.
        let _ = self.followers.send(Sent { record, total });
    }

    /// The last `last` records that `filter` wants, oldest first. When there may have been more
    /// of them, a gap comes first.
    pub fn last(&self, last: usize, filter: &Filter) -> Vec<Arc<Record>> {
        let kept = self.kept();
        let mut selected = select(&kept.records, last, filter);
        if kept.evicted > 0 && selected.len() < last {
            selected.insert(0, Arc::new(lost(LostCause::Store, kept.evicted)));
        }
        selected
    }

    /// The last `last` records that `filter` wants, oldest first, and all wanted ones that come
    /// after them.
    pub fn follow(&self, last: usize, filter: &Filter) -> (Vec<Arc<Record>>, Follower) {
        let kept = self.kept();
        let follower = Follower {
            receiver: self.followers.subscribe(),
            filter: filter.clone(),
            seen: kept.total,
            missed: 0,
            silent_until: None,
            next: None,
        };
        (select(&kept.records, last, filter), follower)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Receives records. One that falls behind loses the oldest ones, and is told how many packets
/// (of any filter) they stood for, at most once a second.
#[derive(Debug)]
pub struct Follower {
    receiver: broadcast::Receiver<Sent>,
    filter: Filter,
    /// Packets of all records up to the last one received.
    seen: u64,
    /// Packets of skipped records, not told yet.
    missed: u64,
    /// No word about them before.
    silent_until: Option<Instant>,
    /// What comes after that word.
    next: Option<Arc<Record>>,
}

impl Follower {
    /// The next record; `None` when the store is gone.
    pub async fn next(&mut self) -> Option<Arc<Record>> {
        loop {
            if self.missed > 0
                && self
                    .silent_until
                    .is_none_or(|until| Instant::now() >= until)
            {
                self.silent_until = Some(Instant::now() + EVERY);
                let events = std::mem::take(&mut self.missed);
                return Some(Arc::new(lost(LostCause::SlowReader, events)));
            }
            if let Some(record) = self.next.take() {
                return Some(record);
            }
            let due = self.silent_until.filter(|_| self.missed > 0);
            let received = match due {
                Some(due) => match timeout_at(due, self.receiver.recv()).await {
                    Ok(received) => received,
                    Err(_) => continue,
                },
                None => self.receiver.recv().await,
            };
            match received {
                Ok(Sent { record, total }) => {
                    let before = total.saturating_sub(packets(&record));
                    self.missed += before.saturating_sub(self.seen);
                    self.seen = total;
                    self.next = Some(record).filter(|record| self.filter.wants(record));
                }
                // The next record's total says how many packets that were.
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

fn select(records: &VecDeque<Arc<Record>>, last: usize, filter: &Filter) -> Vec<Arc<Record>> {
    let mut selected: Vec<_> = records
        .iter()
        .rev()
        .filter(|record| filter.wants(record))
        .take(last)
        .cloned()
        .collect();
    selected.reverse();
    selected
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::types::Denial,
        events::enrich::tests::{denial, event},
    };

    fn denied(packets: u64) -> Record {
        Record::Denial(Box::new(Denial {
            packets,
            ..denial(&event())
        }))
    }

    fn numbers(records: &[Arc<Record>]) -> Vec<u64> {
        records.iter().map(|record| packets(record)).collect()
    }

    fn gap(record: &Record) -> Option<(LostCause, u64)> {
        match record {
            Record::Lost(lost) => Some((lost.cause, lost.events)),
            Record::Denial(_) | Record::Tampered(_) => None,
        }
    }

    #[test]
    fn keeps_a_bounded_number_and_says_what_went() {
        let store = Store::default();
        for n in 1..=(KEPT as u64 + 5) {
            store.push(denied(n));
        }
        let all = store.last(usize::MAX, &Filter::default());
        assert_eq!((all.len(), packets(&all[1])), (KEPT + 1, 6));
        assert_eq!(gap(&all[0]), Some((LostCause::Store, 1 + 2 + 3 + 4 + 5)));
        // All that were asked for are there.
        let last = store.last(2, &Filter::default());
        assert_eq!(numbers(&last), [10_004, 10_005]);
    }

    #[tokio::test]
    async fn a_follower_that_falls_behind_is_told_of_packets_once_a_second() {
        let store = Store::default();
        let (before, mut follower) = store.follow(10, &Filter::default());
        assert!(before.is_empty());
        let mut gaps = Vec::new();
        for skipped in [7, 1, 2] {
            (0..BEHIND + skipped).for_each(|_| store.push(denied(3)));
            let mut records = 0;
            while records < BEHIND {
                match gap(&follower.next().await.unwrap()) {
                    Some(lost) => gaps.push((lost, Instant::now())),
                    None => records += 1,
                }
            }
        }
        // Nothing more comes: nobody waits for a record to learn of a gap.
        while gaps.iter().map(|((_, packets), _)| packets).sum::<u64>() < (7 + 1 + 2) * 3 {
            let record = follower.next().await.unwrap();
            gaps.push((gap(&record).unwrap(), Instant::now()));
        }
        assert_eq!(gaps[0].0, (LostCause::SlowReader, 7 * 3));
        for pair in gaps.windows(2) {
            assert!(pair[1].1 - pair[0].1 >= EVERY.mul_f32(0.9), "{gaps:?}");
        }
    }

    #[test]
    fn what_has_no_address_is_not_unsegmented() {
        let filter = Filter {
            from: Some(Peer::Segment(UNSEGMENTED.to_owned())),
            to: None,
        };
        let mut outside = denial(&event());
        outside.from_segments = [].into();
        assert!(filter.wants(&Record::Denial(Box::new(outside.clone()))));
        outside.src = None;
        assert!(!filter.wants(&Record::Denial(Box::new(outside))));
    }
}
