//! Where things are: the words of a slot, the buckets, tag and lock of a key.

use super::{Bucket, Memory, SLOTS, STRIPES, WORDS4, WORDS6};
use crate::{flow::OPENER_IS_LOW, wire::FlowKey};

/// Words of a slot, by index.
pub(super) mod word {
    /// Version: odd while written, 0 before the first time.
    pub const VERSION: u32 = 0;
    /// Jiffies of the last packet, low half.
    pub const SEEN: u32 = 1;
    /// The key.
    pub const KEY: u32 = 2;
}

/// Words behind the key.
pub(super) mod behind {
    pub const GENERATION: u32 = 0;
    /// Flags, selector in the upper half.
    pub const STATE: u32 = 1;
    pub const ARRIVED: u32 = 2;
    pub const RULE: u32 = 4;
    pub const OPENED: u32 = 5;
    pub const CHECKED: u32 = 6;
    pub const PACKETS: u32 = 7;
    /// Two words.
    pub const BYTES: u32 = 8;
}

/// In a slot's flags: there is an entry.
pub(super) const LIVE: u32 = 1 << 15;

/// Where a key may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Home bucket.
    pub home: u32,
    /// The other one, whose tags are in the same line.
    pub second: u32,
    /// The slot of either bucket that it is entered in if it may choose: a reader can load that line
    /// before it knows the tags.
    pub slot: u32,
    /// Sixteen bits of the hash; never 0.
    pub tag: u32,
}

/// A key's 64-bit words, and what the layout of its slots follows from.
pub(super) trait Family {
    const V6: bool;
    const PAIRS: u32;
    const WORDS: u32;
    const BEHIND: u32 = word::KEY + 2 * Self::PAIRS;
    fn pair(&self, index: u32) -> u64;
}

// By reference: two copies of a key would not fit the kernel's stack.
pub(super) struct Key4<'a>(pub(super) &'a FlowKey);
pub(super) struct Key6<'a>(pub(super) &'a FlowKey);

impl Family for Key4<'_> {
    const V6: bool = false;
    const PAIRS: u32 = 2;
    const WORDS: u32 = WORDS4;
    #[inline(always)]
    fn pair(&self, index: u32) -> u64 {
        self.0.pair4(index)
    }
}

impl Family for Key6<'_> {
    const V6: bool = true;
    const PAIRS: u32 = 5;
    const WORDS: u32 = WORDS6;
    #[inline(always)]
    fn pair(&self, index: u32) -> u64 {
        self.0.pair6(index)
    }
}

/// The buckets and the tag of a key: half a product for each word, the key's words in their order.
#[inline(always)]
pub(super) fn place<M: Memory, F: Family>(memory: &M, key: &F) -> Place {
    let mut sum = memory.secret(0);
    let mut i = 0;
    while i < F::PAIRS {
        let pair = key.pair(i);
        let at = 1 + 2 * i as usize;
        let left = memory.secret(at).wrapping_add(pair & 0xffff_ffff);
        let right = memory.secret(at + 1).wrapping_add(pair >> 32);
        sum = sum.wrapping_add(left.wrapping_mul(right));
        i += 1;
    }
    let hash = fold(sum);
    let mask = memory.mask(F::V6);
    let home = (hash >> 32) as u32 & mask;
    // One of eight, whose tags fill a line; not the home bucket itself.
    let other = (hash >> 61) as u32 | 1;
    Place {
        home,
        second: home ^ (other & mask),
        slot: (hash >> 59) as u32 & (SLOTS - 1),
        tag: (hash as u32 >> 16) | 1,
    }
}

/// A sum of products is linear in each word: without this, the ports that a client counts up meet
/// in a few buckets, with one draw of secrets in ten (SplitMix64's first step). Below the sixteenth
/// bit it is not good for much.
#[inline(always)]
const fn fold(sum: u64) -> u64 {
    (sum ^ sum >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// The lock of a bucket.
#[inline(always)]
pub(super) const fn stripe(bucket: u32) -> u32 {
    bucket >> 3 & (STRIPES - 1)
}

/// The tag of a slot.
#[inline(always)]
pub(super) const fn tag_of(tags: u64, slot: u32) -> u32 {
    (tags >> (16 * slot)) as u32 & 0xffff
}

/// The hash by which an opener's entries are counted.
#[inline(always)]
pub(super) fn opener<M: Memory>(memory: &M, key: &FlowKey, flags: u32) -> u32 {
    let address = key.end(flags & OPENER_IS_LOW != 0);
    // Who has one IPv6 address has a /64 of them.
    let words = if key.is_v6() {
        [address[0], address[1]]
    } else {
        [0, address[3]]
    };
    let left = memory.secret(1).wrapping_mul(u64::from(words[0]) | 1 << 32);
    let right = memory.secret(2).wrapping_mul(u64::from(words[1]));
    (fold(memory.secret(11).wrapping_add(left).wrapping_add(right)) >> 32) as u32
}

/// The key in a slot, of one's own stripe while its lock is held.
#[inline(always)]
pub(super) fn key_at<M: Memory, F: Family>(bucket: M::Bucket, base: u32) -> FlowKey {
    let at = base + word::KEY;
    if F::V6 {
        FlowKey::from_pairs6([
            bucket.pair(at),
            bucket.pair(at + 2),
            bucket.pair(at + 4),
            bucket.pair(at + 6),
            bucket.pair(at + 8),
        ])
    } else {
        FlowKey::from_pairs4([bucket.pair(at), bucket.pair(at + 2)])
    }
}
