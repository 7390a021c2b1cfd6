//! What an image says of an address beside the rules: whether it is this host's own, which failsafes
//! come from it, and at which interfaces it may come in.

use std::net::IpAddr;

use enforcer_common::image::{
    self as layout, CLASS_FAILSAFE_SHIFT, CLASS_OWN, INTERFACE_BITMAP_WORDS, INTERFACE_SLOTS,
    header,
};

use crate::policy::{
    model::{Environment, Policy},
    pattern::Pattern,
};

use super::{
    bits::{self, Bits},
    intern::Interner,
    intervals,
    writer::{Full, Writer},
};

/// Whether packets with this source are the host's own, wherever they come from. Another host may
/// have the same link-local address on another link, and loopback never meets TC.
pub(super) fn is_own(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    }
}

/// Follows a sweep and numbers the marks that it meets.
pub(super) struct Marks {
    /// Number of the set of own addresses; failsafes follow.
    own: u32,
    flags: u32,
    /// Slots that have an interface.
    slots: Bits,
    /// Per segment with `interfaces`, the number of the slots that it names.
    named: Vec<Option<u32>>,
    /// Distinct sets of slots that segments name.
    sets: Interner,
    /// Segments with `interfaces` in the current set.
    restricting: usize,
    /// Per slot, how many of those do not name it.
    without: Vec<u32>,
    /// Slots that all of those name.
    open: Bits,
    /// Distinct values of `open`.
    bitmaps: Interner,
    /// Number of `open` among them, once it is known.
    bitmap: Option<u32>,
    /// Flags, and number of the bitmap plus one: 0 for none.
    known: Interner,
}

impl Marks {
    pub(super) fn new(policy: &Policy, env: &Environment) -> Self {
        let mut slots = Bits::empty(INTERFACE_SLOTS as usize);
        for slot in env.interfaces.keys() {
            slots.insert(*slot as usize);
        }
        let mut sets = Interner::default();
        let named = policy.segments.iter().map(|segment| {
            (!segment.interfaces.is_empty())
                .then(|| sets.intern(naming(env, &segment.interfaces).words()))
        });
        Self {
            own: intervals::own(policy),
            flags: 0,
            named: named.collect(),
            sets,
            restricting: 0,
            without: vec![0; INTERFACE_SLOTS as usize],
            open: slots.clone(),
            slots,
            bitmaps: Interner::default(),
            bitmap: None,
            known: Interner::default(),
        }
    }

    pub(super) fn toggle(&mut self, number: u32, entered: bool) {
        if let Some(after) = number.checked_sub(self.own) {
            // Sixteen failsafes at most.
            let flag = match after {
                0 => CLASS_OWN,
                failsafe => 1 << (CLASS_FAILSAFE_SHIFT + failsafe - 1),
            };
            self.flags ^= flag;
        } else if let Some(Some(set)) = self.named.get(number as usize) {
            self.restricting = if entered {
                self.restricting + 1
            } else {
                self.restricting.saturating_sub(1)
            };
            let named = self.sets.get(*set as usize);
            let (without, open) = (&mut self.without, &mut self.open);
            bits::missing(self.slots.words(), named, |slot| {
                let Some(without) = without.get_mut(slot) else {
                    return;
                };
                if entered {
                    *without += 1;
                    open.remove(slot);
                } else {
                    *without = without.saturating_sub(1);
                    if *without == 0 {
                        open.insert(slot);
                    }
                }
            });
            self.bitmap = None;
        }
    }

    /// Number of the marks of the current set.
    pub(super) fn number(&mut self) -> u32 {
        let bitmap = if self.restricting == 0 {
            0
        } else {
            let (bitmaps, open) = (&mut self.bitmaps, &self.open);
            1 + *self
                .bitmap
                .get_or_insert_with(|| bitmaps.intern(open.words()))
        };
        self.known.intern(&[self.flags, bitmap])
    }

    /// Words that bitmaps take.
    pub(super) fn size(&self) -> usize {
        self.bitmaps.size()
    }

    /// Writes the bitmaps and what `of_class` names, class by class.
    pub(super) fn write(&self, of_class: &[u32], writer: &mut Writer) -> Result<(), Full> {
        let bitmaps = writer.append(self.bitmaps.words())?;
        let words = of_class.iter().flat_map(|number| {
            let [flags, bitmap] = match self.known.get(*number as usize) {
                [flags, bitmap] => [*flags, *bitmap],
                _ => [0, 0],
            };
            let offset = bitmap.checked_sub(1);
            [
                flags,
                offset.map_or(0, |number| bitmaps + number * INTERFACE_BITMAP_WORDS),
            ]
        });
        let count = of_class.len() * layout::CLASS_INFO_WORDS as usize;
        let at = writer.append_each(count, words)?;
        writer.set(header::CLASS_INFO, at);
        Ok(())
    }
}

/// Slots of the interfaces that some pattern means.
pub(super) fn naming(env: &Environment, patterns: &[Pattern]) -> Bits {
    let mut slots = Bits::empty(INTERFACE_SLOTS as usize);
    for (slot, name) in &env.interfaces {
        if patterns.iter().any(|pattern| pattern.matches(name)) {
            slots.insert(*slot as usize);
        }
    }
    slots
}
