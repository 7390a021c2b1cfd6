//! Model → policy image. Pure: the same policy gives the same words, on any machine.
//!
//! Must not know: YAML, the kernel, time.

use enforcer_common::image::header;

/// A policy image: the words the kernel reads (see `enforcer_common::image`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    words: Vec<u32>,
}

impl Image {
    /// The words, header included.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// The generation written in the header.
    pub fn generation(&self) -> u32 {
        self.words
            .get(header::GENERATION as usize)
            .copied()
            .unwrap_or(0)
    }

    /// Content hash: equal for equal meaning-bearing words, whatever the generation.
    pub fn hash(&self) -> u64 {
        let half = |i: u32| u64::from(self.words.get(i as usize).copied().unwrap_or(0));
        half(header::HASH_LO) | half(header::HASH_HI) << 32
    }
}
