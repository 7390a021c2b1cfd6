//! The task that takes records from the kernel.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use enforcer_common::wire::Event;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};

use super::{
    Store,
    enrich::{Clock, Enricher},
    tally::Tally,
};
use crate::{
    api::types::{Lost, LostCause, LostVerdict, Record, Time},
    dataplane::{Counters, Dataplane, DataplaneError, EventSource},
    poll::Readable,
    pulse::Pulse,
};

/// How often running counts and losses are picked up.
const SCAN_EVERY: Duration = Duration::from_secs(1);
/// Records taken before other tasks of this thread get a turn.
const BATCH: usize = 256;
/// Batches taken in a row before a scan gets its turn: a flood must not starve it.
const BATCHES: usize = 64;

/// When to look again after a record. Only the first record of a tick, at most 10 ms, wakes; those
/// that come after it in its tick are there by then. So it is longer than two ticks, and a record
/// that comes when a look has found nothing is the first one of its tick.
const LINGER: Duration = Duration::from_millis(25);

/// More than the ring holds.
const UNREAD: usize = 1 << 14;

/// The dataplane as the daemon's tasks share it.
pub type SharedDataplane = Arc<Mutex<Box<dyn Dataplane>>>;

/// What an earlier daemon has told already.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Totals of slots as of their last records.
    pub counts: Vec<Event>,
    /// All counters.
    pub counters: Counters,
}

/// Carries records from the kernel to a store.
pub struct Reader {
    readable: Readable,
    source: Box<dyn EventSource>,
    dataplane: SharedDataplane,
    enricher: Enricher,
    store: Arc<Store>,
    tally: Tally,
    told: Told,
    lost: u64,
    complained: bool,
    pulse: Arc<Pulse>,
}

impl Reader {
    /// Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When the source's descriptor cannot be polled.
    pub fn new(
        source: Box<dyn EventSource>,
        dataplane: SharedDataplane,
        enricher: Enricher,
        store: Arc<Store>,
    ) -> std::io::Result<Self> {
        Ok(Self {
            readable: Readable::new(&source.fd())?,
            source,
            dataplane,
            enricher,
            store,
            tally: Tally::default(),
            told: Told::default(),
            lost: 0,
            complained: false,
            pulse: Arc::default(),
        })
    }

    /// Beats after each scan, once a second.
    pub fn pulse(&self) -> Arc<Pulse> {
        Arc::clone(&self.pulse)
    }

    /// Goes on where an earlier daemon has ended.
    #[must_use]
    pub fn after(mut self, told: Told) -> Self {
        self.lost = lost(&told.counters);
        self.told = told;
        self
    }

    /// Takes what nobody has read, and notes of the rest that it was told.
    fn resume(&mut self) {
        let told = std::mem::take(&mut self.told);
        let mut unread = Vec::new();
        while unread.len() < UNREAD
            && let Some(event) = self.source.next()
        {
            unread.push(event);
        }
        let older: std::collections::HashMap<_, u64> = unread
            .iter()
            .rev()
            .map(|event| ((event.cpu, event.slot, event.epoch), event.total))
            .collect();
        for slot in &told.counts {
            // Of what a record that nobody has read adds, one packet is certain.
            let first = older.get(&(slot.cpu, slot.slot, slot.epoch));
            let total = first.map_or(slot.total, |first| slot.total.min(first.saturating_sub(1)));
            self.tally.begin(&Event { total, ..*slot });
        }
        self.record(&mut unread);
    }

    /// Runs until it is dropped.
    pub async fn run(mut self) {
        self.resume();
        let mut scan = interval_at(Instant::now() + SCAN_EVERY, SCAN_EVERY);
        scan.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH);
        let mut lingers = false;
        loop {
            let due = tokio::select! {
                ready = self.readable.ready() => {
                    if let Ok(mut guard) = ready
                        && take(&mut batch, &mut *self.source)
                    {
                        // Keeps its readiness if a record came since the last look.
                        guard.clear_ready();
                    }
                    lingers = true;
                    false
                }
                () = sleep(LINGER), if lingers => {
                    take(&mut batch, &mut *self.source);
                    lingers = !batch.is_empty();
                    false
                }
                _ = scan.tick() => true,
            };
            self.record(&mut batch);
            if due {
                self.scan(&mut batch).await;
                self.pulse.beat();
            }
        }
    }

    async fn scan(&mut self, batch: &mut Vec<Event>) {
        let dataplane = Arc::clone(&self.dataplane);
        let read = move || -> Result<(Vec<Event>, Counters), DataplaneError> {
            let dataplane = dataplane.lock().unwrap_or_else(PoisonError::into_inner);
            Ok((dataplane.running_counts()?, dataplane.counters()?))
        };
        let result = tokio::task::spawn_blocking(read).await;
        // The tally wants every record that was there before the scan ended; see there. It is
        // also the safety net under a missed wake-up.
        for _ in 0..BATCHES {
            let empty = take(batch, &mut *self.source);
            self.record(batch);
            if empty {
                break;
            }
            tokio::task::yield_now().await;
        }
        match result {
            Ok(Ok((mut running, counters))) => {
                self.complained = false;
                // The kernel notes the time of records, not of packets in a count. These came
                // since the last scan.
                if let Ok(clock) = Clock::sample() {
                    running.iter_mut().for_each(|e| e.time = clock.boottime());
                }
                self.record(&mut running);
                self.losses(&counters);
            }
            Ok(Err(error)) if !self.complained => {
                self.complained = true;
                tracing::error!(%error, "cannot read counts of denied packets");
            }
            // Said already; or the runtime is going down.
            Ok(Err(_)) | Err(_) => {}
        }
    }

    fn record(&mut self, events: &mut Vec<Event>) {
        if events.is_empty() {
            return;
        }
        let Ok(clock) = Clock::sample() else {
            return; // CLOCK_BOOTTIME is there since Linux 2.6.39.
        };
        for event in events.drain(..) {
            let packets = self.tally.packets(&event);
            if packets > 0 {
                let denial = self.enricher.denial(&event, packets, clock);
                self.store.push(Record::Denial(Box::new(denial)));
            }
        }
    }

    fn losses(&mut self, counters: &Counters) {
        // Later records may make good for the first; the second are gone. Rather one too many.
        let lost = lost(counters);
        let more = lost.saturating_sub(self.lost);
        self.lost = lost;
        if more > 0 {
            tracing::warn!(packets = more, "records of denied packets were lost");
            self.store.push(Record::Lost(Lost {
                time: Time::now(),
                verdict: LostVerdict::Lost,
                cause: LostCause::RingBufferFull,
                events: more,
            }));
        }
    }
}

fn lost(counters: &Counters) -> u64 {
    counters.records.iter().map(|r| r.lost + r.displaced).sum()
}

/// Moves up to [`BATCH`] records into `batch`; `true` when there are no more.
fn take(batch: &mut Vec<Event>, source: &mut dyn EventSource) -> bool {
    while batch.len() < BATCH {
        match source.next() {
            Some(event) => batch.push(event),
            None => return true,
        }
    }
    false
}
