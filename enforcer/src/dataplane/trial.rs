//! The dead man's switch: an image on trial, which the programs themselves leave again.
//!
//! Order of writes: the image to go back to is in its slot, then its generation is known, then the
//! deadline is set; only then comes the image on trial. So at each step that a daemon may die after,
//! the programs have one whole policy to judge by, at any time.

use std::time::Duration;

use enforcer_common::wire::{NO_DEADLINE, slot};

use super::{DataplaneError, OnTrial, images::WrittenImage, kernel::KernelDataplane, load::ticks};
use crate::compile::Image;

/// Too late to confirm: the word might come after the deadline.
const LAST: Duration = Duration::from_secs(1);

impl KernelDataplane {
    pub(super) fn begin_trial(
        &mut self,
        image: &Image,
        previous: Option<&Image>,
        within: Duration,
    ) -> Result<(), DataplaneError> {
        // One that has lost what it goes back to gets it from this one.
        let lost = self.has_lost_previous() && previous.is_some();
        if self.control.deadline != NO_DEADLINE && !lost {
            return Err(DataplaneError::Trial("a trial is running"));
        }
        let begun = self.arm(image, previous, within);
        if begun.is_err() {
            self.tidy_up();
        }
        begun
    }

    fn arm(
        &mut self,
        image: &Image,
        previous: Option<&Image>,
        within: Duration,
    ) -> Result<(), DataplaneError> {
        // To grow between the two would leave the first behind, with too few words.
        self.make_room([Some(image), previous].into_iter().flatten())?;
        let written = self.write_image(image)?;
        let previous = match previous {
            Some(previous) => {
                let previous = self.write_image(previous)?;
                self.announce(&previous)?;
                previous
            }
            None => self.in_force()?,
        };
        self.put(slot::PREVIOUS, &previous)?;
        self.control.previous = previous.generation;
        self.write_control()?;
        let now = ticks(self.classifier("clock")?)?;
        self.control.deadline = now
            .saturating_add(self.in_ticks(within))
            .min(NO_DEADLINE - 1);
        self.write_control()
            .inspect_err(|_| self.control.deadline = NO_DEADLINE)?;
        let live = self.make_live(&written);
        if live.is_err() {
            self.disarm()?;
        }
        live
    }

    /// The live image, as one that can be put elsewhere.
    fn in_force(&self) -> Result<WrittenImage, DataplaneError> {
        let Some(kept) = self.slots.get(&slot::LIVE) else {
            return Err(DataplaneError::Trial("there is nothing to go back to"));
        };
        let map = kept.map.try_clone();
        Ok(WrittenImage {
            map: map.map_err(super::errors::syscall("keep the image"))?,
            generation: kept.generation,
        })
    }

    fn in_ticks(&self, time: Duration) -> u64 {
        let ticks = time.as_millis() * u128::from(self.control.hz) / 1000;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    pub(super) fn trial_now(&self) -> Result<Option<OnTrial>, DataplaneError> {
        let deadline = self.control.deadline;
        if deadline == NO_DEADLINE {
            return Ok(None);
        }
        let left = deadline.saturating_sub(ticks(self.classifier("clock")?)?);
        let milliseconds = u128::from(left) * 1000 / u128::from(self.control.hz.max(1));
        let milliseconds = u64::try_from(milliseconds).unwrap_or(u64::MAX);
        Ok(Some(OnTrial {
            remaining: Duration::from_millis(milliseconds),
            live: self.control.generation,
            previous: self.control.previous,
        }))
    }

    pub(super) fn confirm_trial(&mut self) -> Result<(), DataplaneError> {
        let Some(trial) = self.trial_now()? else {
            return Err(DataplaneError::Trial("no trial is running"));
        };
        if trial.remaining < LAST {
            return Err(DataplaneError::Trial(
                "the trial is over, or ends within a second: what was in force before it stays",
            ));
        }
        let deadline = self.control.deadline;
        self.disarm()?;
        let now = self.classifier("clock").and_then(ticks);
        if !now.as_ref().is_ok_and(|now| *now < deadline) {
            // This process was held up: they had gone back already. Or nobody knows, and the trial
            // goes on; what cannot be written now is at the next look.
            self.control.deadline = deadline;
            self.write_control()?;
            now?;
            return Err(DataplaneError::Trial(
                "the trial ended before it was confirmed",
            ));
        }
        // It is confirmed, whatever becomes of what it would have gone back to.
        if let Err(error) = self.clear_previous() {
            tracing::warn!(%error, "cannot forget the image before the one in force");
        }
        Ok(())
    }

    pub(super) fn revert_trial(&mut self) -> Result<(), DataplaneError> {
        if self.control.deadline == NO_DEADLINE {
            return Err(DataplaneError::Trial("no trial is running"));
        }
        let Some(kept) = self.slots.get(&slot::PREVIOUS) else {
            return Err(DataplaneError::LostPrevious);
        };
        let map = kept.map.try_clone();
        let previous = WrittenImage {
            map: map.map_err(super::errors::syscall("keep the image"))?,
            generation: kept.generation,
        };
        self.make_live(&previous)?;
        self.disarm()?;
        if let Err(error) = self.clear_previous() {
            tracing::warn!(%error, "the image in force is kept twice");
        }
        Ok(())
    }

    /// Whether a trial is running, or has expired, whose image to go back to is in the kernel at most:
    /// somebody has unpinned it.
    fn has_lost_previous(&self) -> bool {
        self.control.deadline != NO_DEADLINE && !self.slots.contains_key(&slot::PREVIOUS)
    }

    /// Ends a trial that cannot go back, now that another image is live. Until the deadline is gone the
    /// programs judge as they did, by one image or the other.
    pub(super) fn leave_lost_trial(&mut self) -> Result<(), DataplaneError> {
        if !self.has_lost_previous() {
            return Ok(());
        }
        self.disarm()?;
        self.clear_previous()
    }

    pub(super) fn apply_during_trial(
        &mut self,
        previous: &Image,
        live: &Image,
    ) -> Result<(), DataplaneError> {
        if self.control.deadline == NO_DEADLINE {
            return Err(DataplaneError::Trial("no trial is running"));
        }
        self.make_room([live, previous].into_iter())?;
        let live = self.write_image(live)?;
        let previous = self.write_image(previous)?;
        self.announce(&previous)?;
        // As `make_live`, of the other slot: while it is neither the old one nor the new one, no
        // entry speaks for a packet.
        self.control.previous = 0;
        self.write_control()?;
        let put = self.put(slot::PREVIOUS, &previous);
        let kept = self.slots.get(&slot::PREVIOUS);
        self.control.previous = kept.map_or(0, |kept| kept.generation);
        self.write_control()?;
        put?;
        self.make_live(&live)
    }

    fn disarm(&mut self) -> Result<(), DataplaneError> {
        let deadline = std::mem::replace(&mut self.control.deadline, NO_DEADLINE);
        self.write_control()
            .inspect_err(|_| self.control.deadline = deadline)
    }

    /// Forgets what nobody needs: images of a trial that did not come to be, or is over, and programs
    /// that were to take over and did not.
    pub(super) fn tidy_up(&mut self) {
        if let Err(error) = self.pins.forget_others() {
            tracing::warn!(%error, "cannot remove what was to take over");
        }
        self.forget_previous();
        self.forget_unused();
    }

    /// Forgets the image before a trial that is over.
    pub(super) fn forget_previous(&mut self) {
        let over = self.control.deadline == NO_DEADLINE;
        if over
            && self.slots.contains_key(&slot::PREVIOUS)
            && let Err(error) = self.clear_previous()
        {
            tracing::warn!(%error, "cannot forget the image before the one in force");
        }
    }

    /// Gives its memory back.
    fn clear_previous(&mut self) -> Result<(), DataplaneError> {
        self.empty(slot::PREVIOUS)?;
        self.control.previous = 0;
        let written = self.write_control();
        self.forget_unused();
        written
    }
}
