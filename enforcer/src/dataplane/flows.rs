//! The flow table from outside: its size and secrets before the programs are loaded, what is in it,
//! and the sweep that takes out what expired.

use std::{
    fs::File,
    io::Read as _,
    os::fd::{AsFd as _, OwnedFd},
};

use aya::{
    EbpfLoader,
    maps::Map,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use enforcer_common::table::{self, Flow, SECRETS, SLOTS, SOURCE_SHARE, WORDS4, WORDS6};

use super::{
    DataplaneError, FlowReader,
    errors::{load_error, missing, syscall},
    kernel::KernelDataplane,
    load::ticks,
    pins::{Meta, Set},
    resize::Table,
    sys::{self, objects},
};

/// Flows of each family, if nobody says otherwise: 8 MiB for IPv4, 16 MiB for IPv6.
pub const DEFAULT_FLOWS: u32 = 1 << 17;
/// Fewest and most: below, a few flows fill an opener's share; above, a map has 4 GiB.
const LIMITS: (u32, u32) = (1 << 11, 1 << 24);
const MAPS: [(&str, usize); 2] = [("FLOWS4", WORDS4 as usize), ("FLOWS6", WORDS6 as usize)];
const TAGS: [&str; 2] = ["FLOW_TAGS4", "FLOW_TAGS6"];

/// What the programs are told of their table before they are loaded.
pub(super) struct Shape {
    buckets: u32,
    mask: u32,
    cap: u32,
    secrets: [u64; SECRETS],
}

/// Buckets of each family for a table of at least `flows`.
pub(super) fn buckets(flows: u32) -> u32 {
    flows.clamp(LIMITS.0, LIMITS.1).next_power_of_two() / SLOTS
}

/// Fresh secrets for a table's hash.
pub(super) fn secrets() -> Result<[u64; SECRETS], DataplaneError> {
    let mut bytes = [0; SECRETS * 8];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .map_err(syscall("read /dev/urandom"))?;
    let mut secrets = [0; SECRETS];
    for (secret, bytes) in secrets.iter_mut().zip(bytes.chunks_exact(8)) {
        *secret = bytes
            .iter()
            .fold(0, |all, byte| all << 8 | u64::from(*byte));
    }
    Ok(secrets)
}

impl Shape {
    /// As it is, or is to be.
    pub(super) fn of(meta: &Meta) -> Self {
        Self {
            buckets: meta.buckets,
            mask: meta.buckets - 1,
            cap: meta.buckets * SLOTS / SOURCE_SHARE,
            secrets: meta.secrets,
        }
    }

    /// Writes it into the object.
    pub(super) fn configure<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        for map in MAPS.map(|(map, _)| map).into_iter().chain(TAGS) {
            loader.map_max_entries(map, self.buckets);
        }
        loader.override_global("FLOW_MASK", &self.mask, true);
        loader.override_global("FLOW_CAP", &self.cap, true);
        loader.override_global("FLOW_SECRETS", &self.secrets, true);
    }
}

impl KernelDataplane {
    /// Every flow in the table, as it is while it is read.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    pub fn flows(&self) -> Result<Vec<Flow>, DataplaneError> {
        let mut flows = Vec::new();
        self.each(|_, _, words, slot_words| {
            flows.extend(words.chunks_exact(slot_words).filter_map(table::flow));
            Ok(())
        })?;
        Ok(flows)
    }

    /// Enters what is in the table of `old` into this one, which no program uses yet.
    pub(super) fn take_flows(&mut self, old: &Set, before: &Meta) -> Result<(), DataplaneError> {
        let mut flows = Vec::new();
        for (name, slot_words) in MAPS {
            let map = objects::get(&old.map(name)).map_err(syscall("open the old flow table"))?;
            let words = slot_words * SLOTS as usize;
            let all = sys::array(map.as_fd(), before.buckets, words)
                .map_err(syscall("read the old flow table"))?;
            flows.extend(all.chunks_exact(slot_words).filter_map(table::flow));
        }
        let now = ticks(self.classifier("clock")?)?;
        let table = Table::with(flows, self.meta, now, self.control.hz);
        table.write(|name| match self.map(name) {
            Some(Map::Array(data)) => Ok(data.fd().as_fd()),
            _ => Err(missing(name)),
        })
    }

    fn each(
        &self,
        mut see: impl FnMut(&Map, u32, &[u32], usize) -> Result<(), DataplaneError>,
    ) -> Result<(), DataplaneError> {
        for (name, slot_words) in MAPS {
            let Some(map @ Map::Array(data)) = self.map(name) else {
                return Err(missing(name));
            };
            let words = slot_words * SLOTS as usize;
            let all = sys::array(data.fd().as_fd(), self.flow_buckets(), words)
                .map_err(syscall("read the flow table"))?;
            for (index, bucket) in (0..).zip(all.chunks_exact(words)) {
                see(map, index, bucket, slot_words)?;
            }
        }
        Ok(())
    }

    /// Forgets every flow.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    #[cfg(feature = "testing")]
    pub fn forget_flows(&mut self) -> Result<(), DataplaneError> {
        let none = vec![0; WORDS6 as usize * SLOTS as usize];
        self.each(|map, index, words, _| {
            if let Map::Array(data) = map
                && words.iter().any(|word| *word != 0)
            {
                let none = none.get(..words.len()).unwrap_or_default();
                sys::update_words(data.fd().as_fd(), index, none)
                    .map_err(syscall("empty the flow table"))?;
            }
            Ok(())
        })?;
        for name in TAGS {
            let Some(Map::Array(data)) = self.map(name) else {
                return Err(missing(name));
            };
            let tags = sys::array(data.fd().as_fd(), self.flow_buckets(), 2);
            let tags = tags.map_err(syscall("read the tags"))?;
            for (index, tags) in (0..).zip(tags.chunks_exact(2)) {
                if tags != [0, 0] {
                    sys::update_words(data.fd().as_fd(), index, &[0, 0])
                        .map_err(syscall("empty the tags"))?;
                }
            }
        }
        let Some(Map::Array(data)) = self.map("FLOW_SOURCES") else {
            return Err(missing("FLOW_SOURCES"));
        };
        let counts =
            sys::array(data.fd().as_fd(), super::resize::SOURCES, 1).map_err(syscall("read"))?;
        for (index, count) in (0..).zip(counts) {
            if count != 0 {
                sys::update_words(data.fd().as_fd(), index, &[0]).map_err(syscall("write"))?;
            }
        }
        Ok(())
    }
}

/// Buckets that are read at once: a megabyte, or two.
const PART: u32 = 1 << 12;

/// Descriptors of its own, so that whoever has it needs nothing else.
struct Reader {
    maps: Vec<(OwnedFd, usize)>,
    buckets: u32,
    jiffies: (u32, u32),
}

impl KernelDataplane {
    /// A reader of the table.
    pub(super) fn reader(
        &self,
        jiffies: (u32, u32),
    ) -> Result<Box<dyn FlowReader>, DataplaneError> {
        let mut maps = Vec::new();
        for (name, slot_words) in MAPS {
            let Some(Map::Array(data)) = self.map(name) else {
                return Err(missing(name));
            };
            let map = data.fd().as_fd().try_clone_to_owned();
            maps.push((map.map_err(syscall("open the flow table"))?, slot_words));
        }
        Ok(Box::new(Reader {
            maps,
            buckets: self.flow_buckets(),
            jiffies,
        }))
    }
}

impl FlowReader for Reader {
    fn jiffies(&self) -> (u32, u32) {
        self.jiffies
    }

    fn each(&mut self, see: &mut dyn FnMut(&Flow)) -> Result<(), DataplaneError> {
        for (map, slot_words) in &self.maps {
            let words = slot_words * SLOTS as usize;
            let mut start = 0;
            while start < self.buckets {
                let count = PART.min(self.buckets - start);
                let part = sys::array_part(map.as_fd(), start, count, words)
                    .map_err(syscall("read the flow table"))?;
                let flows = part.chunks_exact(*slot_words).filter_map(table::flow);
                flows.for_each(|flow| see(&flow));
                start += count;
            }
        }
        Ok(())
    }
}

/// Goes through the whole table once and takes out what expired: tens of nanoseconds a bucket.
pub(super) fn sweep(program: &SchedClassifier, buckets: u32) -> Result<(), DataplaneError> {
    let frame = [0u8; 64];
    let options = TestRunOptions {
        data_in: Some(&frame),
        repeat: buckets,
        ..TestRunOptions::new()
    };
    program
        .test_run(options)
        .map(drop)
        .map_err(|e| load_error("sweep", &e))
}
