//! Model → policy image. Pure: the same policy gives the same words, on any machine.
//!
//! ```text
//! members, host addresses ─ intervals ─ sides ─┬─ v4, v6 ─► tries, hosts ─┐
//! services of rules ─────── services ──────────┴─ rows ──► exceptions ────┴─ table ─► image
//! ```
//!
//! Hash maps are asked, never walked: their order differs from run to run.
//!
//! Space is asked for before it is used: beyond an image's limit, or [`SCRATCH`], the compiler stops
//! at the first excess, so that no policy, however large, costs much more memory than an image.
//!
//! Must not know: YAML, the kernel, time.

mod bits;
mod image;
mod intern;
mod intervals;
mod rows;
mod services;
mod sides;
mod table;
#[cfg(test)]
mod tests;
mod v4;
mod v6;
mod writer;

pub use image::{Image, ImageError, Stats};

use std::{collections::BTreeSet, net::IpAddr};

use enforcer_common::{
    decide::verdict_word,
    image::{self as layout, EMPTY, essential, header},
    verdict::Reason,
};

use crate::policy::{
    model::{Environment, Policy, Transport},
    pattern::Pattern,
};
use ipnet::IpNet;

use rows::Exception;
use table::{Keys, Placed};
use writer::{Full, Writer};

/// What an image says besides the policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Never 0, never used twice ([`Image::with_generation`] gives an image its own later).
    pub generation: u32,
    /// Bits of [`essential`]: what passes before any rule.
    pub essentials: u32,
    /// What nothing in the policy cuts; at most 16.
    pub failsafes: Vec<Failsafe>,
    /// Ethertypes that pass although they are not IP, at most 16; 1 stands for all of LLC.
    pub ethertypes: Vec<u16>,
}

/// Flows to this host that nothing in the policy cuts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failsafe {
    /// Prefixes that they come from.
    pub sources: Vec<IpNet>,
    /// Ports of this host, TCP or UDP: transport, first, last.
    pub ports: Vec<(Transport, u16, u16)>,
    /// Interfaces that they come in at; empty: any.
    pub interfaces: Vec<Pattern>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            generation: 1,
            essentials: essential::ALL,
            failsafes: Vec::new(),
            ethertypes: Vec::new(),
        }
    }
}

/// Why a policy has no image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// Over the size limit. Counts are what the compiler had found when it gave up.
    #[error(
        "the policy is too large: it needs at least {words} words of 4 bytes, the limit is \
         {limit} ({classes} kinds of address, {service_classes} kinds of service, {rows} distinct \
         rows); merge segments that the rules do not tell apart, or overlap fewer of them"
    )]
    TooLarge {
        /// Address classes.
        classes: usize,
        /// Service classes.
        service_classes: usize,
        /// Distinct rows.
        rows: usize,
        /// Words needed, at least.
        words: usize,
        /// Words of the largest size class.
        limit: usize,
    },
    /// Its rules are too many, for so many kinds of service or address, to be compiled at all.
    #[error(
        "the policy is too large: its {rules} rules tell more kinds of service and address apart \
         than can be compiled ({service_classes} kinds of service, {classes} kinds of address \
         before it gave up); merge rules, or services and segments that they do not tell apart"
    )]
    TooComplex {
        /// Rules of the policy.
        rules: usize,
        /// Address classes when the compiler gave up.
        classes: usize,
        /// Service classes; 0 when it gave up counting those.
        service_classes: usize,
    },
    /// The keys of a hash table found no place under any seed that was tried.
    #[error("the hash tables of the policy image could not be built")]
    Placement,
}

/// Words of any one table that is needed only while compiling: as many as the largest image has.
const SCRATCH: usize = 1 << 24;

/// Why the compiler stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Full(Full),
    /// A table would pass [`SCRATCH`].
    Complex,
}

impl From<Full> for Stop {
    fn from(full: Full) -> Self {
        Self::Full(full)
    }
}

/// Compiles a policy.
///
/// # Errors
/// When the image would be larger than the largest size class.
pub fn compile(
    policy: &Policy,
    env: &Environment,
    options: &Options,
) -> Result<Image, CompileError> {
    compile_within(policy, env, options, image::largest() as usize)
}

fn compile_within(
    policy: &Policy,
    env: &Environment,
    options: &Options,
    limit: usize,
) -> Result<Image, CompileError> {
    let complex = |classes, service_classes| CompileError::TooComplex {
        rules: policy.rules.len(),
        classes,
        service_classes,
    };
    let services = services::Services::new(policy).map_err(|_| complex(0, 0))?;
    let too_large = |full: Full, classes: usize, rows: usize| CompileError::TooLarge {
        classes,
        service_classes: services.count,
        rows,
        words: full.words,
        limit,
    };

    let denial = sides::denials(policy);
    let mut classifier = sides::Classifier::new(policy, &denial, limit);
    let sweep = intervals::sweep(policy, env, &mut classifier).map_err(|stop| match stop {
        Stop::Full(full) => too_large(full, classifier.count(), 0),
        Stop::Complex => complex(classifier.count(), services.count),
    })?;
    let classes = classifier.finish();
    let class_count = classes.classes.len();
    let early = |full: Full| too_large(full, class_count, 0);

    let mut writer = Writer::new(limit);
    let pairs = class_count.saturating_mul(class_count);
    writer.reserve(pairs).map_err(early)?;
    let services_at = services.write(&mut writer).map_err(early)?;
    writer.set(header::SERVICES, services_at);

    let rows = rows::build(policy, &denial, &classes, &services, &writer)
        .map_err(|(full, rows)| too_large(full, class_count, rows))?;
    let row_count = rows.count();
    let late = |full: Full| too_large(full, class_count, row_count);
    let rows_at = writer.append_aligned(&rows.words).map_err(late)?;
    let matrix = rows.matrix(&classes);
    let pairs_at = writer.append_each(pairs, matrix).map_err(late)?;
    writer.set(header::ROWS, rows_at);
    writer.set(header::PAIRS, pairs_at);
    // The rest is in the image now.
    drop(classes);
    let exceptions = rows.into_exceptions();

    let trie4 = v4::write(&sweep.v4, &mut writer).map_err(late)?;
    let (rest6, hosts6) = v6::split(&sweep.v6);
    let root6 = v6::write(&rest6, &mut writer).map_err(late)?;
    writer.set(header::V4_ROOT, trie4.root);
    writer.set(header::V6_ROOT, root6);

    let tables = Tables {
        hosts4: &trie4.hosts,
        hosts6: &hosts6,
        exceptions: &exceptions,
    };
    writer.reserve(tables.size()).map_err(late)?;
    let (seed, placed) = tables.place().ok_or(CompileError::Placement)?;
    writer.set(header::SEED_LO, seed as u32);
    writer.set(header::SEED_HI, (seed >> 32) as u32);
    tables.write(&placed, &mut writer).map_err(late)?;

    write_local(env, &mut writer).map_err(late)?;
    let form = rows::outcome(policy.defaults.mode);
    writer.set(
        header::FORM_UNREADABLE,
        verdict_word(form, Reason::Malformed),
    );
    writer.set(header::ESSENTIALS, options.essentials);
    for (index, count) in [
        (header::CLASSES, class_count),
        (header::RULES, policy.rules.len()),
        (header::SEGMENTS, policy.segments.len()),
        (header::SERVICE_CLASSES, services.count),
        (header::ROW_COUNT, row_count),
        (header::EXCEPTION_COUNT, exceptions.len()),
        (header::V4_HOST_COUNT, trie4.hosts.len()),
        (header::V6_HOST_COUNT, hosts6.len()),
    ] {
        writer.set(index, word(count));
    }
    Ok(Image::seal(writer.finish(), options.generation))
}

/// The bucketed tables of an image.
struct Tables<'a> {
    hosts4: &'a [(u32, u32)],
    hosts6: &'a [(u128, u32)],
    exceptions: &'a [Exception],
}

impl Tables<'_> {
    /// Words that the tables take, at least.
    fn size(&self) -> usize {
        self.hosts4.len() * 2 + self.hosts6.len() * 5 + self.exceptions.len() * 4
    }

    fn place(&self) -> Option<(u64, Vec<Placed>)> {
        table::place(&[
            Keys {
                count: self.hosts4.len(),
                slots: layout::V4_BUCKET_SLOTS as usize,
                hash: &|key, seed| layout::hash_v4(self.hosts4[key].0, seed),
            },
            Keys {
                count: self.hosts6.len(),
                slots: layout::V6_BUCKET_SLOTS as usize,
                hash: &|key, seed| {
                    let address = self.hosts6[key].0;
                    layout::hash_v6((address >> 64) as u64, address as u64, seed)
                },
            },
            Keys {
                count: self.exceptions.len(),
                slots: layout::EXCEPTION_BUCKET_SLOTS as usize,
                hash: &|key, seed| {
                    let exception = &self.exceptions[key];
                    layout::hash_exception(exception.row, exception.service, seed)
                },
            },
        ])
    }

    fn write(&self, placed: &[Placed], writer: &mut Writer) -> Result<(), Full> {
        let [hosts4, hosts6, exceptions] = placed else {
            return Ok(());
        };
        if !self.hosts4.is_empty() {
            let at = buckets(writer, hosts4, layout::V4_BUCKET_SLOTS, 0, |key| {
                let host = self.hosts4.get(key as usize);
                host.map_or([0, EMPTY], |(address, class)| [*address, *class])
            })?;
            writer.set(header::V4_HOSTS_BUCKETS, hosts4.buckets);
            writer.set(header::V4_HOSTS, at);
        }
        if !self.hosts6.is_empty() {
            let at = buckets(writer, hosts6, layout::V6_BUCKET_SLOTS, 1, |key| {
                let host = self.hosts6.get(key as usize);
                host.map_or([0, 0, 0, 0, EMPTY], |(address, class)| {
                    let [a, b, c, d] = quarters(*address);
                    [a, b, c, d, *class]
                })
            })?;
            writer.set(header::V6_HOSTS_BUCKETS, hosts6.buckets);
            writer.set(header::V6_HOSTS, at);
        }
        if !self.exceptions.is_empty() {
            let at = buckets(
                writer,
                exceptions,
                layout::EXCEPTION_BUCKET_SLOTS,
                0,
                |key| {
                    let exception = self.exceptions.get(key as usize);
                    exception.map_or([EMPTY, EMPTY, 0, 0], |e| {
                        [e.row, e.service, e.verdict.0, e.verdict.1]
                    })
                },
            )?;
            writer.set(header::EXCEPTIONS_BUCKETS, exceptions.buckets);
            writer.set(header::EXCEPTIONS, at);
        }
        Ok(())
    }
}

/// Writes a table: each slot's words, then the padding of the bucket. `slot` is asked with
/// [`EMPTY`], no key's index, where there is none.
fn buckets<const N: usize>(
    writer: &mut Writer,
    placed: &Placed,
    slots: u32,
    padding: usize,
    slot: impl Fn(u32) -> [u32; N],
) -> Result<u32, Full> {
    let count = placed.slots.len() * N + placed.slots.len() / slots as usize * padding;
    let words = placed.slots.chunks(slots as usize).flat_map(|bucket| {
        let keys = bucket.iter().flat_map(|key| slot(*key));
        keys.chain(std::iter::repeat_n(0, padding))
    });
    writer.append_each(count, words)
}

/// The host's own addresses, for the socket hooks.
fn write_local(env: &Environment, writer: &mut Writer) -> Result<(), Full> {
    let mut v4 = Vec::new();
    let mut v6 = Vec::new();
    // Loopback never meets TC, and the hooks know it by its prefix.
    for address in env.host_addresses.iter().filter(|ip| !ip.is_loopback()) {
        match address {
            IpAddr::V4(ip) => v4.push(ip.to_bits()),
            IpAddr::V6(ip) => v6.extend(quarters(ip.to_bits())),
        }
    }
    for (words, each, at, count) in [
        (v4, 1, header::LOCAL4, header::LOCAL4_COUNT),
        (v6, 4, header::LOCAL6, header::LOCAL6_COUNT),
    ] {
        let number = word(words.len() / each);
        if number > layout::MAX_LOCAL {
            writer.set(count, layout::LOCAL_UNKNOWN);
        } else if number > 0 {
            let offset = writer.append(&words)?;
            writer.set(at, offset);
            writer.set(count, number);
        }
    }
    write_local_classes(env, writer)
}

/// The distinct classes of the host's own addresses but loopback, which never meets TC. Asks the
/// image's own tables, so it comes after them.
fn write_local_classes(env: &Environment, writer: &mut Writer) -> Result<(), Full> {
    for (v6, at, count) in [
        (false, header::LOCAL4_CLASSES, header::LOCAL4_CLASSES_COUNT),
        (true, header::LOCAL6_CLASSES, header::LOCAL6_CLASSES_COUNT),
    ] {
        let classes: BTreeSet<u32> = env
            .host_addresses
            .iter()
            .filter(|ip| ip.is_ipv6() == v6 && !ip.is_loopback())
            .map(|ip| layout::address_class(writer.words(), &(*ip).into()))
            .collect();
        let words: Vec<u32> = classes.into_iter().collect();
        let number = word(words.len());
        if number > layout::MAX_LOCAL_CLASSES {
            writer.set(count, layout::LOCAL_UNKNOWN);
        } else if number > 0 {
            let offset = writer.append(&words)?;
            writer.set(at, offset);
            writer.set(count, number);
        }
    }
    Ok(())
}

/// An IPv6 address as words, the upper end first.
fn quarters(address: u128) -> [u32; 4] {
    [96, 64, 32, 0].map(|shift| (address >> shift) as u32)
}

/// A count or index as a word. What does not fit is past every size limit, and stays so.
fn word(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
