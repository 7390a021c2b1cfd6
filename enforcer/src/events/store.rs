//! The last records, in memory, and those who follow them.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::broadcast;

use crate::api::types::{Peer, Record};

/// Records kept.
const KEPT: usize = 10_000;
/// Records a follower may be behind before it loses the oldest of them.
const BEHIND: usize = 4_096;

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
        let is = |peer: &Option<Peer>, ip, segments: &[Arc<str>]| match peer {
            None => true,
            Some(Peer::Address(wanted)) => ip == Some(*wanted),
            Some(Peer::Segment(name)) if name == UNSEGMENTED => segments.is_empty(),
            Some(Peer::Segment(name)) => segments.iter().any(|s| **s == **name),
        };
        is(&self.from, denial.src, &denial.from_segments)
            && is(&self.to, denial.dst, &denial.to_segments)
    }
}

/// Stands for addresses in no segment, as in policies.
pub const UNSEGMENTED: &str = "unsegmented";

/// The records. Writers never wait for readers.
#[derive(Debug)]
pub struct Store {
    records: Mutex<VecDeque<Arc<Record>>>,
    followers: broadcast::Sender<Arc<Record>>,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            records: Mutex::default(),
            followers: broadcast::Sender::new(BEHIND),
        }
    }
}

impl Store {
    /// Adds a record; the oldest one goes when there are too many.
    pub fn push(&self, record: Record) {
        let record = Arc::new(record);
        let mut records = self.records();
        if records.len() == KEPT {
            records.pop_front();
        }
        records.push_back(Arc::clone(&record));
        // Under the lock, so that `follow` misses nothing. Fails when nobody follows.
        let _ = self.followers.send(record);
    }

    /// The last `last` records that `filter` wants, oldest first.
    pub fn last(&self, last: usize, filter: &Filter) -> Vec<Arc<Record>> {
        select(&self.records(), last, filter)
    }

    /// The same, and a receiver of everything (unfiltered) that comes after them.
    pub fn follow(
        &self,
        last: usize,
        filter: &Filter,
    ) -> (Vec<Arc<Record>>, broadcast::Receiver<Arc<Record>>) {
        let records = self.records();
        (select(&records, last, filter), self.followers.subscribe())
    }

    fn records(&self) -> MutexGuard<'_, VecDeque<Arc<Record>>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
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
    use crate::api::types::{Lost, LostCause, LostVerdict, Time};

    fn lost(events: u64) -> Record {
        Record::Lost(Lost {
            time: Time::now(),
            verdict: LostVerdict::Lost,
            cause: LostCause::RingBufferFull,
            events,
        })
    }

    fn numbers(records: &[Arc<Record>]) -> Vec<u64> {
        records
            .iter()
            .map(|record| match &**record {
                Record::Lost(lost) => lost.events,
                Record::Denial(_) => panic!("a denial"),
            })
            .collect()
    }

    #[test]
    fn keeps_a_bounded_number_and_never_waits_for_followers() {
        let store = Store::default();
        let (before, mut follower) = store.follow(10, &Filter::default());
        assert!(before.is_empty());
        for n in 0..(KEPT as u64 + 5) {
            store.push(lost(n));
        }
        let all = numbers(&store.last(usize::MAX, &Filter::default()));
        assert_eq!((all.len(), all[0]), (KEPT, 5));
        assert_eq!(
            numbers(&store.last(2, &Filter::default())),
            [10_003, 10_004]
        );
        let behind = follower.try_recv();
        assert!(
            matches!(behind, Err(broadcast::error::TryRecvError::Lagged(n)) if n == 10_005 - BEHIND as u64)
        );
    }
}
