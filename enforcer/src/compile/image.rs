//! The finished image: its words, its content hash, what is in it.

use enforcer_common::{
    ABI_VERSION,
    image::{self, SIZE_CLASSES, header},
};

/// A policy image: the words the kernel reads (see `enforcer_common::image`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    words: Vec<u32>,
}

/// Why words are not an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// The first word is another one, or there is none.
    #[error("not a policy image: no magic number at its start")]
    Magic,
    /// Written by another version.
    #[error("policy image of ABI {found}; this program reads ABI {ABI_VERSION}")]
    Abi {
        /// The version in the header.
        found: u32,
    },
    /// The header names more words than there are, fewer than a header, or more than fit.
    #[error(
        "policy image is cut off or damaged: its header says {header} words, {found} are there"
    )]
    Length {
        /// Words that the header names.
        header: u32,
        /// Words that were given.
        found: usize,
    },
    /// The content does not match the hash in the header.
    #[error("policy image is damaged: its content does not match its hash")]
    Hash,
}

/// What is in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Rules of the policy.
    pub rules: u32,
    /// Segments of the policy.
    pub segments: u32,
    /// Address classes.
    pub classes: u32,
    /// Service classes.
    pub service_classes: u32,
    /// Distinct rows.
    pub rows: u32,
    /// Exceptions to the rows' default verdicts.
    pub exceptions: u32,
    /// IPv4 addresses in the host table.
    pub v4_hosts: u32,
    /// IPv6 addresses in the host table.
    pub v6_hosts: u32,
    /// Words in all.
    pub words: u32,
}

impl Image {
    /// Reads an image back: from a file, or from a map's value, which may be longer.
    ///
    /// # Errors
    /// When the words are not a whole image of this ABI. Their meaning is not checked: an image
    /// with the right hash was written by the compiler.
    pub fn from_words(mut words: Vec<u32>) -> Result<Self, ImageError> {
        let head = |index: u32| words.get(index as usize).copied();
        if head(header::MAGIC) != Some(image::MAGIC) {
            return Err(ImageError::Magic);
        }
        let abi = head(header::ABI).unwrap_or(0);
        if abi != ABI_VERSION {
            return Err(ImageError::Abi { found: abi });
        }
        let length = head(header::LENGTH).unwrap_or(0);
        if length < header::WORDS || length as usize > words.len() || length > largest() {
            return Err(ImageError::Length {
                header: length,
                found: words.len(),
            });
        }
        words.truncate(length as usize);
        let image = Self { words };
        if image.hash() != content_hash(&image.words) {
            return Err(ImageError::Hash);
        }
        Ok(image)
    }

    /// Completes the header of compiled words.
    pub(super) fn seal(mut words: Vec<u32>, generation: u32) -> Self {
        let length = super::word(words.len());
        set(&mut words, header::MAGIC, image::MAGIC);
        set(&mut words, header::ABI, ABI_VERSION);
        set(&mut words, header::LENGTH, length);
        let hash = content_hash(&words);
        set(&mut words, header::HASH_LO, hash as u32);
        set(&mut words, header::HASH_HI, (hash >> 32) as u32);
        Self { words }.with_generation(generation)
    }

    /// The words, header included.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// The generation written in the header.
    pub fn generation(&self) -> u32 {
        self.head(header::GENERATION)
    }

    /// The same policy as another generation: content and hash stay.
    #[must_use]
    pub fn with_generation(mut self, generation: u32) -> Self {
        set(&mut self.words, header::GENERATION, generation);
        self
    }

    /// Content hash: equal for equal meaning-bearing words, whatever the generation.
    pub fn hash(&self) -> u64 {
        u64::from(self.head(header::HASH_LO)) | u64::from(self.head(header::HASH_HI)) << 32
    }

    /// The smallest of [`SIZE_CLASSES`] that holds the image, in words.
    pub fn size_class(&self) -> u32 {
        SIZE_CLASSES
            .into_iter()
            .find(|class| self.words.len() <= *class as usize)
            .unwrap_or_else(largest)
    }

    /// What is in the image.
    pub fn stats(&self) -> Stats {
        Stats {
            rules: self.head(header::RULES),
            segments: self.head(header::SEGMENTS),
            classes: self.head(header::CLASSES),
            service_classes: self.head(header::SERVICE_CLASSES),
            rows: self.head(header::ROW_COUNT),
            exceptions: self.head(header::EXCEPTION_COUNT),
            v4_hosts: self.head(header::V4_HOST_COUNT),
            v6_hosts: self.head(header::V6_HOST_COUNT),
            words: self.head(header::LENGTH),
        }
    }

    fn head(&self, index: u32) -> u32 {
        self.words.get(index as usize).copied().unwrap_or(0)
    }
}

/// The largest size class, in words.
pub(super) fn largest() -> u32 {
    SIZE_CLASSES.into_iter().max().unwrap_or(0)
}

fn set(words: &mut [u32], index: u32, value: u32) {
    if let Some(word) = words.get_mut(index as usize) {
        *word = value;
    }
}

/// Hash of all words but the generation and the hash itself: [`image::mix`], word after word.
/// It finds damage and equal content; it does not withstand a forger.
fn content_hash(words: &[u32]) -> u64 {
    let skipped = [header::GENERATION, header::HASH_LO, header::HASH_HI];
    (0u32..)
        .zip(words)
        .filter(|(index, _)| !skipped.contains(index))
        .fold(0, |hash, (_, word)| image::mix(u64::from(*word), hash))
}
