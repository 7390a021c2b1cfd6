//! What the files of the state directory look like.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    api::{peer::Named, types::Time},
    compile::Image,
    daemon::files::Texts,
    events::rehearsal::SavedTally,
    policy::{SourceFile, model::Environment},
};

/// Of all files; another one is not read.
pub const FORMAT: u32 = 1;
const MAGIC: &[u8; 8] = b"ENFORCER";

/// FNV-1a. It finds damage and equal content; it does not withstand a forger, and need not: who can
/// write here is root.
pub fn hash<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    for part in parts {
        (part.len() as u64)
            .to_le_bytes()
            .into_iter()
            .for_each(&mut add);
        part.iter().copied().for_each(&mut add);
    }
    hash
}

/// What files say, in few digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Of the policy.
    pub policy: String,
    /// Of the settings.
    pub settings: Option<String>,
}

impl Content {
    /// Of these texts.
    pub fn of(texts: &Texts) -> Self {
        let files = |files: &mut dyn Iterator<Item = &SourceFile>| {
            let parts = files.flat_map(|file| [file.name.as_bytes(), file.text.as_bytes()]);
            format!("{:016x}", hash(parts))
        };
        Self {
            policy: files(&mut texts.policy.iter()),
            settings: texts
                .settings
                .as_ref()
                .map(|file| files(&mut std::iter::once(file))),
        }
    }

    /// Both in one.
    pub fn whole(&self) -> String {
        let settings = self.settings.as_deref().unwrap_or_default();
        format!(
            "{:016x}",
            hash([self.policy.as_bytes(), settings.as_bytes()])
        )
    }
}

/// A policy and its settings, as they were.
#[derive(Serialize, Deserialize)]
struct State {
    content: Content,
    policy: Vec<SavedFile>,
    settings: Option<SavedFile>,
}

#[derive(Serialize, Deserialize)]
struct SavedFile {
    name: String,
    text: String,
}

impl SavedFile {
    fn of(file: &SourceFile) -> Self {
        Self {
            name: file.name.clone(),
            text: file.text.clone(),
        }
    }

    fn source(&self) -> SourceFile {
        SourceFile {
            name: self.name.clone(),
            text: self.text.clone(),
        }
    }
}

/// Bytes of a file with a line before them that names format, length and hash.
pub fn seal(body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(body.len() + 28);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&FORMAT.to_le_bytes());
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&hash([body]).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// The body again.
///
/// # Errors
/// In words, when it is not whole or not of this format.
pub fn open(bytes: &[u8]) -> Result<&[u8], String> {
    let rest = bytes
        .strip_prefix(MAGIC)
        .ok_or("it is no file of the enforcer")?;
    let (format, rest) = rest.split_first_chunk().ok_or("it is cut off")?;
    let format = u32::from_le_bytes(*format);
    if format != FORMAT {
        return Err(format!(
            "it has format {format}, this enforcer reads format {FORMAT}"
        ));
    }
    let (length, rest) = rest.split_first_chunk().ok_or("it is cut off")?;
    let (sum, body) = rest.split_first_chunk().ok_or("it is cut off")?;
    if u64::from_le_bytes(*length) != body.len() as u64 {
        return Err("it is cut off".to_owned());
    }
    if u64::from_le_bytes(*sum) != hash([body]) {
        return Err("it is damaged: its content does not match its hash".to_owned());
    }
    Ok(body)
}

/// [`seal`]ed JSON.
pub fn to_json(value: &impl Serialize) -> Vec<u8> {
    // Strings, numbers and maps with strings for keys: this cannot fail.
    seal(&serde_json::to_vec(value).unwrap_or_default())
}

/// [`to_json`], read.
///
/// # Errors
/// In words.
pub fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    serde_json::from_slice(open(bytes)?).map_err(|error| error.to_string())
}

/// Texts for a file.
pub fn state(texts: &Texts) -> Vec<u8> {
    to_json(&State {
        content: Content::of(texts),
        policy: texts.policy.iter().map(SavedFile::of).collect(),
        settings: texts.settings.as_ref().map(SavedFile::of),
    })
}

/// [`state`], read.
///
/// # Errors
/// In words.
pub fn read_state(bytes: &[u8]) -> Result<Texts, String> {
    let state: State = from_json(bytes)?;
    let policy: Vec<SourceFile> = state.policy.iter().map(SavedFile::source).collect();
    Ok(Texts {
        policy: policy.into(),
        settings: state.settings.as_ref().map(SavedFile::source),
    })
}

/// A candidate policy, and what it has seen.
#[derive(Serialize, Deserialize)]
pub struct SavedShadow {
    /// Where it was read.
    pub path: String,
    /// Who began.
    pub by: Named,
    /// When.
    pub since: Time,
    policy: Vec<SavedFile>,
    settings: Option<SavedFile>,
}

/// What a candidate has seen.
#[derive(Clone, Serialize, Deserialize)]
pub struct SavedCounts {
    /// Of the candidate that began then.
    pub since: Time,
    /// Generation of its image.
    pub generation: u32,
    /// Counts that are not asked of the kernel any more.
    pub past: SavedTally,
    /// Those that are.
    pub present: SavedTally,
    /// Keys of those in `past` that the kernel may have still.
    pub moved: Vec<[u32; 9]>,
}

impl SavedShadow {
    /// Of these texts.
    pub fn new(path: String, by: Named, since: Time, texts: &Texts) -> Self {
        Self {
            path,
            by,
            since,
            policy: texts.policy.iter().map(SavedFile::of).collect(),
            settings: texts.settings.as_ref().map(SavedFile::of),
        }
    }

    /// Its texts.
    pub fn texts(&self) -> Texts {
        let policy: Vec<SourceFile> = self.policy.iter().map(SavedFile::source).collect();
        Texts {
            policy: policy.into(),
            settings: self.settings.as_ref().map(SavedFile::source),
        }
    }
}

/// An image that may judge packets before any text was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedImage {
    /// The image, with its generation.
    pub image: Image,
    /// The state whose texts it was made of.
    pub state: u64,
    /// What it was made for.
    pub environment: Environment,
}

#[derive(Serialize, Deserialize)]
struct ImageHead {
    state: u64,
    generation: u32,
    /// 16 hex digits.
    hash: String,
    size_class: u32,
    interfaces: BTreeMap<u32, String>,
    addresses: BTreeSet<IpAddr>,
}

/// An image for a file.
pub fn image(saved: &SavedImage) -> Vec<u8> {
    let head = ImageHead {
        state: saved.state,
        generation: saved.image.generation(),
        hash: format!("{:016x}", saved.image.hash()),
        size_class: saved.image.size_class(),
        interfaces: saved.environment.interfaces.clone(),
        addresses: saved.environment.host_addresses.clone(),
    };
    let head = serde_json::to_vec(&head).unwrap_or_default();
    let words = saved.image.words();
    let mut body = Vec::with_capacity(8 + head.len() + size_of_val(words));
    body.extend_from_slice(&(head.len() as u64).to_le_bytes());
    body.extend_from_slice(&head);
    body.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    seal(&body)
}

/// [`image`], read.
///
/// # Errors
/// In words.
pub fn read_image(bytes: &[u8]) -> Result<SavedImage, String> {
    let body = open(bytes)?;
    let (length, rest) = body.split_first_chunk().ok_or("it is cut off")?;
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    let (head, words) = rest.split_at_checked(length).ok_or("it is cut off")?;
    let head: ImageHead = serde_json::from_slice(head).map_err(|error| error.to_string())?;
    let words = words.as_chunks::<4>().0.iter();
    let words = words.map(|word| u32::from_le_bytes(*word)).collect();
    let image = Image::from_words(words).map_err(|error| error.to_string())?;
    let hash = format!("{:016x}", image.hash());
    if (image.generation(), &hash) != (head.generation, &head.hash) {
        return Err("its head is another image's".to_owned());
    }
    Ok(SavedImage {
        image,
        state: head.state,
        environment: Environment {
            host_addresses: head.addresses,
            interfaces: head.interfaces,
        },
    })
}
