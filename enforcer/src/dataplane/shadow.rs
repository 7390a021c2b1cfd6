//! A candidate policy beside the live one: its image in a slot of its own, which the programs ask and
//! never obey, and the counts of where it differs.

use std::collections::BTreeMap;

use aya::maps::HashMap;
use enforcer_common::{
    shadow::{Difference, DifferenceKey, Example},
    wire::{CONTROL_SHADOW, slot},
};

use super::{DataplaneError, errors::map_error, kernel::KernelDataplane, load::SHADOWED};
use crate::compile::Image;

const NOTHING: Difference = Difference {
    packets: 0,
    time: 0,
    first: Example::NONE,
    last: Example::NONE,
};

impl KernelDataplane {
    /// The image is in its slot before a program looks for it, and the programs have ceased to when it
    /// is taken out. What may well fail comes first.
    pub(super) fn put_shadow(
        &mut self,
        image: Option<&Image>,
        anew: bool,
    ) -> Result<(), DataplaneError> {
        let Some(image) = image else {
            self.ask_candidate(false)?;
            self.empty(slot::SHADOW)?;
            self.forget_unused();
            return Ok(());
        };
        self.make_room([image].into_iter())?;
        let written = self.write_image(image)?;
        self.pin_image(&written)?;
        if anew || self.control.flags & CONTROL_SHADOW == 0 {
            // What another candidate has left; nothing is added meanwhile.
            self.ask_candidate(false)?;
            let keys: Vec<_> = self.shadow_counts()?.into_keys().collect();
            self.forget_counts(&keys)?;
            let mut map: HashMap<_, DifferenceKey, Difference> = self.typed_mut(SHADOWED)?;
            map.insert(DifferenceKey::REST, NOTHING, 0)
                .map_err(map_error("write SHADOWED"))?;
        }
        self.put(slot::SHADOW, &written)?;
        self.ask_candidate(true)?;
        self.forget_unused();
        Ok(())
    }

    fn ask_candidate(&mut self, asked: bool) -> Result<(), DataplaneError> {
        let before = self.control.flags;
        self.control.flags &= !CONTROL_SHADOW;
        if asked {
            self.control.flags |= CONTROL_SHADOW;
        }
        self.write_control()
            .inspect_err(|_| self.control.flags = before)
    }

    /// The candidate that the programs ask.
    pub(super) fn candidate(&self) -> Result<Option<Image>, DataplaneError> {
        if self.control.flags & CONTROL_SHADOW == 0 {
            return Ok(None);
        }
        self.image_in(slot::SHADOW)
    }

    pub(super) fn shadow_counts(
        &self,
    ) -> Result<BTreeMap<DifferenceKey, Difference>, DataplaneError> {
        let map: HashMap<_, DifferenceKey, Difference> = self.typed(SHADOWED)?;
        map.iter()
            .collect::<Result<_, _>>()
            .map_err(map_error("read SHADOWED"))
    }

    pub(super) fn forget_counts(&mut self, keys: &[DifferenceKey]) -> Result<(), DataplaneError> {
        let mut map: HashMap<_, DifferenceKey, Difference> = self.typed_mut(SHADOWED)?;
        for key in keys {
            match map.remove(key) {
                Ok(()) | Err(aya::maps::MapError::KeyNotFound) => {}
                Err(aya::maps::MapError::SyscallError(error))
                    if error.io_error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(map_error("write SHADOWED")(error)),
            }
        }
        Ok(())
    }
}
