//! The images in the slots of `POLICY`, and how another one comes into force.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use aya::maps::Map;
use enforcer_common::wire::slot;

use super::{
    DataplaneError,
    errors::{missing, syscall},
    kernel::KernelDataplane,
    load::POLICY,
    pins::{Meta, Set},
    sys::{self, objects},
};
use crate::compile::Image;

/// An image in a map of its own.
pub struct WrittenImage {
    pub(super) map: OwnedFd,
    pub(super) generation: u32,
}

/// An image in a slot of `POLICY`. Others may hold it: one image may be in two slots.
pub(super) struct Kept {
    pub(super) map: OwnedFd,
    pub(super) generation: u32,
}

impl KernelDataplane {
    /// Writes an image into a map of its own, that no program sees yet: the slow part of applying.
    ///
    /// # Errors
    /// When the image does not fit, or the kernel says no.
    pub fn write_image(&mut self, image: &Image) -> Result<WrittenImage, DataplaneError> {
        self.make_room([image].into_iter())?;
        self.write_words(image.words(), image.generation())
    }

    /// Sees to it that the programs can take each of these.
    pub(super) fn make_room<'a>(
        &mut self,
        images: impl Iterator<Item = &'a Image>,
    ) -> Result<(), DataplaneError> {
        let words = images.map(|image| image.words().len()).max().unwrap_or(0);
        if words > self.meta.image_words as usize {
            self.grow(words)?;
        }
        Ok(())
    }

    fn write_words(
        &mut self,
        words: &[u32],
        generation: u32,
    ) -> Result<WrittenImage, DataplaneError> {
        let Some(filled) = self.staging.fill(words) else {
            return Err(DataplaneError::ImageTooLarge {
                needed: words.len(),
                limit: self.meta.image_words as usize,
            });
        };
        // Written by one update and frozen before any program can see it.
        let map = sys::create_image_map(self.meta.image_words, generation)
            .map_err(syscall("create the image map"))?;
        sys::update_words(map.as_fd(), 0, filled).map_err(syscall("write the image"))?;
        sys::freeze(map.as_fd()).map_err(syscall("freeze the image"))?;
        Ok(WrittenImage { map, generation })
    }

    /// Makes a written image the one that judges; returns when no packet is judged by another.
    ///
    /// # Errors
    /// When the kernel says no; then the image in force stays.
    pub fn make_live(&mut self, image: &WrittenImage) -> Result<(), DataplaneError> {
        self.announce(image)?;
        // Between the two writes of the generation no packet passes for what an entry says without
        // being put to the image's generation. Should this process end there, that goes on until a
        // daemon is back: slow, and right.
        let before = std::mem::take(&mut self.control.generation);
        let swapped = self
            .write_control()
            .and_then(|()| self.put(slot::LIVE, image));
        self.control.generation = match swapped {
            Ok(()) => image.generation,
            Err(_) => before,
        };
        if let Err(error) = self.write_control() {
            // Whatever is in force stays so; the next write of the settings makes it quick again.
            tracing::warn!("packets of established flows are slower for now: {error}");
        }
        self.forget_unused();
        swapped
    }

    /// Notes the generation, never to be used again, and pins the image, so that what is in a slot
    /// can always be read.
    pub(super) fn announce(&mut self, image: &WrittenImage) -> Result<(), DataplaneError> {
        if image.generation > self.meta.generation {
            self.meta.generation = image.generation;
            self.pins
                .set(false)
                .update(&self.meta)
                .map_err(syscall("note the generation"))?;
        }
        self.pin_image(image)
    }

    pub(super) fn pin_image(&self, image: &WrittenImage) -> Result<(), DataplaneError> {
        self.pins
            .set(false)
            .pin_image(image.generation, image.map.as_fd())
            .map_err(syscall("pin the image"))
    }

    /// The one pointer write. It returns after a grace period: from then on no packet is judged by
    /// what was in the slot.
    pub(super) fn put(&mut self, slot: u32, image: &WrittenImage) -> Result<(), DataplaneError> {
        let policy = self.policy()?;
        sys::update_inner(policy, slot, image.map.as_fd())
            .map_err(syscall("swap the live image"))?;
        let map = image.map.try_clone().map_err(syscall("keep the image"))?;
        let generation = image.generation;
        self.slots.insert(slot, Kept { map, generation });
        Ok(())
    }

    /// Leaves nothing in a slot.
    pub(super) fn empty(&mut self, slot: u32) -> Result<(), DataplaneError> {
        match sys::delete(self.policy()?, slot) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            deleted => deleted.map_err(syscall("empty a slot"))?,
        }
        self.slots.remove(&slot);
        Ok(())
    }

    pub(super) fn policy(&self) -> Result<BorrowedFd<'_>, DataplaneError> {
        match self.map(POLICY) {
            Some(Map::ArrayOfMaps(policy)) => Ok(policy.fd().as_fd()),
            _ => Err(missing(POLICY)),
        }
    }

    /// Unpins images that are in no slot. What cannot be unpinned is tried again at the next swap.
    pub(super) fn forget_unused(&self) {
        let set = self.pins.set(false);
        let used = |generation| {
            self.slots
                .values()
                .any(|kept| kept.generation == generation)
        };
        let images = set.images().unwrap_or_default();
        for (generation, _) in images.iter().filter(|(generation, _)| !used(*generation)) {
            if let Err(error) = set.forget_image(*generation) {
                tracing::debug!(generation, %error, "cannot unpin an image that is not used");
            }
        }
    }

    /// Finds out what is in force, so that the programs of `set` judge by it. Where their images have
    /// another size than `before`, it is written anew into slots of their own.
    pub(super) fn adopt_images(&mut self, set: &Set, before: &Meta) -> Result<(), DataplaneError> {
        let current = self.pins.set(false);
        let pinned = current.images().map_err(syscall("open pinned images"))?;
        let policy = objects::get(&current.map(POLICY));
        let policy = policy.map_err(syscall("open the pinned POLICY"))?;
        let mut slots = in_slots(policy.as_fd(), &pinned)?;
        let mut moved: BTreeMap<u32, WrittenImage> = BTreeMap::new();
        for (slot, kept) in &mut slots {
            if before.image_words != self.meta.image_words {
                // One that is in two slots stays one: the pin has its generation's name.
                let image = match moved.remove(&kept.generation) {
                    Some(image) => image,
                    None => {
                        let words = read(kept, before.image_words)?;
                        let fits = words.len().min(self.meta.image_words as usize);
                        let words = words.get(..fits).unwrap_or(&[]);
                        self.write_words(words, kept.generation)?
                    }
                };
                self.put(*slot, &image)?;
                let map = image.map.try_clone();
                kept.map = map.map_err(syscall("keep the image"))?;
                moved.insert(kept.generation, image);
            }
            set.pin_image(kept.generation, kept.map.as_fd())
                .map_err(syscall("pin the image"))?;
        }
        let generation = |slot| slots.get(&slot).map_or(0, |kept| kept.generation);
        self.control.generation = generation(slot::LIVE);
        self.control.previous = generation(slot::PREVIOUS);
        self.slots = slots;
        Ok(())
    }

    /// The image in force, read back from the kernel.
    ///
    /// # Errors
    /// When the kernel says no; `None` when there is none, or it is not whole.
    pub fn live_image(&self) -> Result<Option<Image>, DataplaneError> {
        self.image_in(slot::LIVE)
    }

    /// What is in a slot.
    pub(super) fn image_in(&self, slot: u32) -> Result<Option<Image>, DataplaneError> {
        let Some(kept) = self.slots.get(&slot) else {
            return Ok(None);
        };
        let words = read(kept, self.meta.image_words)?;
        Ok(Image::from_words(words)
            .inspect_err(|error| tracing::error!(%error, slot, "an image in the kernel"))
            .ok())
    }
}

fn read(kept: &Kept, words: u32) -> Result<Vec<u32>, DataplaneError> {
    let mut value = vec![0; words as usize];
    sys::lookup(kept.map.as_fd(), 0, &mut value).map_err(syscall("read an image back"))?;
    Ok(value)
}

/// What is in the slots of `policy`, as far as it is pinned.
fn in_slots(
    policy: BorrowedFd<'_>,
    pinned: &[(u32, OwnedFd)],
) -> Result<BTreeMap<u32, Kept>, DataplaneError> {
    let mut ids = BTreeMap::new();
    for (generation, map) in pinned {
        let id = objects::id(map.as_fd()).map_err(syscall("read an image's id"))?;
        ids.insert(id, (*generation, map));
    }
    let mut slots = BTreeMap::new();
    for slot in 0..slot::COUNT {
        let mut inside = [0];
        match sys::lookup(policy, slot, &mut inside) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            looked => looked.map_err(syscall("read what is in force"))?,
        }
        if let Some((generation, map)) = ids.get(&inside[0]) {
            let map = map.try_clone().map_err(syscall("keep the image"))?;
            let generation = *generation;
            slots.insert(slot, Kept { map, generation });
        }
    }
    Ok(slots)
}
