//! The kernel programs, built from `enforcer-ebpf` and embedded: one object per size class.

use aya::include_bytes_aligned;
use enforcer_common::image::SIZE_CLASSES;

static OBJECT_1M: &[u8] = include_bytes_aligned!(env!("ENFORCER_BPF_1M"));
static OBJECT_16M: &[u8] = include_bytes_aligned!(env!("ENFORCER_BPF_16M"));
static OBJECT_64M: &[u8] = include_bytes_aligned!(env!("ENFORCER_BPF_64M"));

/// The smallest object whose images hold `words` words, and its size class in words.
pub(super) fn for_words(words: usize) -> Option<(u32, &'static [u8])> {
    SIZE_CLASSES
        .into_iter()
        .zip([OBJECT_1M, OBJECT_16M, OBJECT_64M])
        .find(|(class, _)| words <= *class as usize)
}

/// The smallest object as machines with weakly ordered memory load it.
#[cfg(feature = "testing")]
pub(super) static WEAK: &[u8] = include_bytes_aligned!(env!("ENFORCER_BPF_1M_WEAK"));
