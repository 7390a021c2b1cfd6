//! From cumulative totals to numbers of packets.
//!
//! A record carries the total of its slot's flow since the slot's `epoch` began, so what a record
//! adds is the difference to the last total seen: a record that got lost is made good by the next
//! one, or by a scan.

use std::collections::HashMap;

use enforcer_common::wire::Event;

/// Slot number of records that are not aggregated.
const NO_SLOT: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Seen {
    epoch: u32,
    total: u64,
    /// The epoch before, for its record that comes after the newer one was seen.
    previous: Option<(u32, u64)>,
}

/// The totals seen so far, per CPU and slot. At most [`enforcer_common::wire::DENIED_SLOTS`]
/// entries per CPU.
#[derive(Debug, Default)]
pub struct Tally {
    seen: HashMap<(u32, u32), Seen>,
}

impl Tally {
    /// How many packets `event` stands for that no earlier event did.
    ///
    /// Scans must be fed after every record that was in the ring buffer when the scan ended;
    /// records of the same CPU in their order.
    pub fn packets(&mut self, event: &Event) -> u64 {
        if event.slot == NO_SLOT {
            return event.total;
        }
        let fresh = Seen {
            epoch: event.epoch,
            total: 0,
            previous: None,
        };
        let seen = self
            .seen
            .entry((event.cpu, event.slot))
            .or_insert_with(|| fresh);
        if event.epoch == seen.epoch {
            let packets = event.total.saturating_sub(seen.total);
            seen.total += packets;
            return packets;
        }
        // Epochs count up and may wrap.
        if event.epoch.wrapping_sub(seen.epoch) < 1 << 31 {
            let previous = Some((seen.epoch, seen.total));
            *seen = Seen {
                epoch: event.epoch,
                total: event.total,
                previous,
            };
            return event.total;
        }
        match &mut seen.previous {
            Some((epoch, total)) if *epoch == event.epoch => {
                let packets = event.total.saturating_sub(*total);
                *total += packets;
                packets
            }
            // Older than all that is remembered: whether it was counted cannot be known.
            _ => 0,
        }
    }
}

impl Tally {
    /// An earlier daemon was told of this many packets of a slot.
    pub fn begin(&mut self, told: &Event) {
        let seen = Seen {
            epoch: told.epoch,
            total: told.total,
            previous: None,
        };
        self.seen.insert((told.cpu, told.slot), seen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::enrich::tests::event;

    fn at(cpu: u32, slot: u32, epoch: u32, total: u64) -> Event {
        Event {
            cpu,
            slot,
            epoch,
            total,
            ..event()
        }
    }

    #[test]
    fn totals_become_differences_and_lost_records_are_made_good() {
        let mut tally = Tally::default();
        assert_eq!(tally.packets(&at(0, 7, 1, 1)), 1);
        assert_eq!(tally.packets(&at(0, 7, 1, 15)), 14);
        // The record with total 20 was lost; the scan finds 31.
        assert_eq!(tally.packets(&at(0, 7, 1, 31)), 16);
        assert_eq!(tally.packets(&at(0, 7, 1, 31)), 0);
    }

    #[test]
    fn a_stale_scan_adds_nothing_and_takes_nothing_back() {
        let mut tally = Tally::default();
        assert_eq!(tally.packets(&at(0, 7, 1, 30)), 30);
        assert_eq!(tally.packets(&at(0, 7, 1, 25)), 0);
        assert_eq!(tally.packets(&at(0, 7, 1, 32)), 2);
    }

    #[test]
    fn a_displaced_flow_starts_anew_and_its_late_record_counts_once() {
        let mut tally = Tally::default();
        assert_eq!(tally.packets(&at(0, 7, 1, 10)), 10);
        assert_eq!(tally.packets(&at(0, 7, 2, 1)), 1);
        assert_eq!(tally.packets(&at(0, 7, 1, 14)), 4);
        assert_eq!(tally.packets(&at(0, 7, 1, 14)), 0);
        assert_eq!(tally.packets(&at(0, 7, 2, 6)), 5);
        // Two epochs back: nothing is made up.
        assert_eq!(tally.packets(&at(0, 7, 3, 2)), 2);
        assert_eq!(tally.packets(&at(0, 7, 1, 99)), 0);
    }

    #[test]
    fn cpus_and_slots_are_apart_and_epochs_wrap() {
        let mut tally = Tally::default();
        assert_eq!(tally.packets(&at(0, 7, 1, 5)), 5);
        assert_eq!(tally.packets(&at(1, 7, 1, 5)), 5);
        assert_eq!(tally.packets(&at(0, 8, u32::MAX, 5)), 5);
        assert_eq!(tally.packets(&at(0, 8, 0, 3)), 3);
    }

    #[test]
    fn socket_hooks_count_as_they_are() {
        let mut tally = Tally::default();
        assert_eq!(tally.packets(&at(0, NO_SLOT, 0, 1)), 1);
        assert_eq!(tally.packets(&at(0, NO_SLOT, 0, 1)), 1);
    }
}
