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
mod inside;
mod intern;
mod intervals;
mod key;
mod known;
mod local;
mod marks;
mod matches;
pub mod reach;
mod rows;
mod services;
mod settings;
mod sides;
mod table;
mod tables;
#[cfg(test)]
mod tests;
mod timelines;
mod v4;
mod v6;
mod validate;
mod writer;

use std::{net::IpAddr, sync::Arc, thread};

pub use image::{Image, ImageError, Stats};
pub use inside::Inside;
pub use known::{Changed, Known};
pub use settings::{Failsafe, Options};
pub use validate::{segments_of, validate, validate_changes};

use enforcer_common::{
    decide::verdict_word,
    image::{self as layout, header},
    verdict::Reason,
};

use crate::policy::model::{Environment, Policy};

use known::Content;
use rows::Refused;
use tables::Tables;
use writer::{Full, Writer};

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
    /// Too many rules expire one after another.
    #[error(
        "at least {entries} verdicts follow one another in time for the same flows, the limit is {}: \
         remove the rules that have expired, or let more of them expire together",
        layout::MAX_TIMELINE
    )]
    Timeline {
        /// Verdicts of a timeline, at least.
        entries: usize,
    },
    /// More failsafes than an image has bits for.
    #[error(
        "{count} failsafes, the limit is {}: give some of them more sources or ports",
        layout::MAX_FAILSAFES
    )]
    Failsafes {
        /// How many there are.
        count: usize,
    },
    /// More ethertypes than an image lists.
    #[error("{count} ethertypes, the limit is {}", layout::MAX_ETHERTYPES)]
    Ethertypes {
        /// How many there are.
        count: usize,
    },
    /// An interface that no bitmap has a bit for.
    #[error("interface slot {slot}: slots are 1 to {}", layout::INTERFACE_SLOTS - 1)]
    InterfaceSlot {
        /// Its slot.
        slot: u32,
    },
    /// The image says of a flow what the policy does not.
    #[error(
        "the compiled policy does not say what was written of {from} -> {to}, protocol {protocol}, \
         port or type {selector}: that is a fault of the enforcer or of this machine's memory"
    )]
    Disagrees {
        /// Source.
        from: IpAddr,
        /// Destination.
        to: IpAddr,
        /// IP protocol number.
        protocol: u8,
        /// Destination port, or type and code.
        selector: u16,
    },
    /// The keys of a hash table found no place under any seed that was tried.
    #[error("the hash tables of the policy image could not be built")]
    Placement,
}

/// Looks at a service class under a rule, where rules expire: a few seconds of them.
const EFFORT: u64 = 1 << 31;

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
/// When the image would be larger than the largest size class, or the policy or the options go
/// beyond another limit of the layout.
pub fn compile(
    policy: &Policy,
    env: &Environment,
    options: &Options,
) -> Result<Image, CompileError> {
    compile_within(policy, env, options, image::largest() as usize, EFFORT)
}

/// [`compile`] for one who has compiled other versions of the policy: what those had in common with
/// this one is not done again. The image is the same, bit for bit.
///
/// # Errors
/// As [`compile`].
pub fn compile_again(
    policy: &Policy,
    env: &Environment,
    options: &Options,
    known: &mut Known,
) -> Result<Image, CompileError> {
    let bounds = Bounds {
        limit: image::largest() as usize,
        effort: EFFORT,
    };
    let (image, content) = build(policy, env, options, bounds, known.content())?;
    known.keep(content);
    Ok(image)
}

/// How far the compiler goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bounds {
    /// Words of an image.
    limit: usize,
    /// Looks at a service class under a rule.
    effort: u64,
}

fn compile_within(
    policy: &Policy,
    env: &Environment,
    options: &Options,
    limit: usize,
    effort: u64,
) -> Result<Image, CompileError> {
    let bounds = Bounds { limit, effort };
    build(policy, env, options, bounds, None).map(|(image, _)| image)
}

fn build(
    policy: &Policy,
    env: &Environment,
    options: &Options,
    bounds: Bounds,
    known: Option<&Content>,
) -> Result<(Image, Content), CompileError> {
    settings::check(env, options)?;
    let limit = bounds.limit;
    let complex = |classes, service_classes| CompileError::TooComplex {
        rules: policy.rules.len(),
        classes,
        service_classes,
    };
    // Rules and bounds are the same as well where something is `known` from here on.
    let known = known.filter(|known| known.serves(policy, &options.failsafes, bounds));
    let services = match known {
        Some(known) => Arc::clone(&known.services),
        None => Arc::new(
            services::Services::new(policy, &options.failsafes).map_err(|_| complex(0, 0))?,
        ),
    };
    let too_large = |full: Full, classes: usize, rows: usize| CompileError::TooLarge {
        classes,
        service_classes: services.count,
        rows,
        words: full.words,
        limit,
    };

    let denial = sides::denials(policy);
    let mut classifier = sides::Classifier::new(policy, env, &denial, limit);
    let sweep = intervals::sweep(policy, env, &options.failsafes, &mut classifier);
    let sweep = sweep.map_err(|stop| match stop {
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

    let taken = writer.words().len() + pairs;
    // A row is made from rules, services and behaviours, and fits where it did.
    let known_rows =
        known.filter(|known| known.taken >= taken && classes.behave_as(&known.classes));
    let members: usize = policy.segments.iter().map(|s| s.members.len()).sum();
    let (rows, tries) = both(
        known_rows.is_none() && members >= THREADS_PAY,
        || match known_rows {
            Some(known) => Ok(Arc::clone(&known.rows)),
            None => {
                rows::build(policy, &classes, &services, bounds.effort, taken, limit).map(Arc::new)
            }
        },
        || Tries::write(sweep, &mut writer),
    );
    let rows = rows.map_err(|refused| match refused {
        Refused::Full(full, rows) => too_large(full, class_count, rows),
        Refused::Timeline(entries) => CompileError::Timeline { entries },
        Refused::Effort => complex(class_count, services.count),
    })?;
    let row_count = rows.count();
    let late = |full: Full| too_large(full, class_count, row_count);
    let tries = tries.map_err(late)?;
    let timelines = rows.write_timelines(&mut writer).map_err(late)?;
    let rows_at = rows.write(timelines, &mut writer).map_err(late)?;
    let matrix = rows.matrix(&classes);
    let pairs_at = writer.append_each(pairs, matrix).map_err(late)?;
    writer.set(header::ROWS, rows_at);
    writer.set(header::PAIRS, pairs_at);
    classes.write_marks(&mut writer).map_err(late)?;
    let sources: Vec<u32> = classes.classes.iter().map(|(source, _)| *source).collect();

    let tables = Tables {
        hosts4: &tries.hosts4,
        hosts6: &tries.hosts6,
        nets6: &tries.nets6,
        rows: &rows,
        timelines,
    };
    writer.reserve(tables.size()).map_err(late)?;
    let (seed, placed) = tables.place(known).ok_or(CompileError::Placement)?;
    writer.set(header::SEED_LO, seed as u32);
    writer.set(header::SEED_HI, (seed >> 32) as u32);
    tables.write(&placed, &mut writer).map_err(late)?;

    local::write(env, &sources, &mut writer).map_err(late)?;
    write_sessions(policy, &mut writer).map_err(late)?;
    settings::write(env, options, &services, &mut writer).map_err(late)?;
    let form = rows::outcome(policy.defaults.mode);
    writer.set(
        header::FORM_UNREADABLE,
        verdict_word(form, Reason::Malformed),
    );
    for (index, count) in [
        (header::CLASSES, class_count),
        (header::RULES, policy.rules.len()),
        (header::SEGMENTS, policy.segments.len()),
        (header::SERVICE_CLASSES, services.count),
        (header::ROW_COUNT, row_count),
        (header::EXCEPTION_COUNT, rows.exceptions().len()),
        (header::V4_HOST_COUNT, tries.hosts4.len()),
        (header::V6_HOST_COUNT, tries.hosts6.len()),
        (header::V6_NET_COUNT, tries.nets6.len()),
    ] {
        writer.set(index, word(count));
    }
    let image = Image::seal(writer.finish(), options.generation);
    let content = Content {
        policy: policy.clone(),
        failsafes: options.failsafes.clone(),
        bounds,
        services,
        classes,
        taken,
        rows,
        tries,
        seed,
        placed,
    };
    Ok((image, content))
}

/// How long sessions may be, rule by rule.
fn write_sessions(policy: &Policy, writer: &mut Writer) -> Result<(), Full> {
    if policy.rules.iter().all(|rule| rule.session.is_none()) {
        return Ok(());
    }
    let words = policy.rules.iter().flat_map(|rule| {
        let session = rule.session;
        let max = session.and_then(|session| session.max);
        let idle = session.and_then(|session| session.idle);
        [max.unwrap_or(0), idle.unwrap_or(0)]
    });
    let at = writer.append_each(policy.rules.len() * 2, words)?;
    writer.set(header::SESSIONS, at);
    Ok(())
}

/// What the tries leave to tables.
struct Tries {
    hosts4: Vec<(u32, u32)>,
    hosts6: Vec<(u128, u32)>,
    nets6: Vec<(u64, u32)>,
}

impl Tries {
    /// Writes the tries of both families.
    fn write(sweep: intervals::Sweep, writer: &mut Writer) -> Result<Self, Full> {
        let trie4 = v4::write(&sweep.v4, writer)?;
        let (rest6, hosts6) = v6::split(&sweep.v6);
        drop(sweep);
        let (rest6, nets6) = v6::nets(&rest6);
        let root6 = v6::write(&rest6, writer)?;
        writer.set(header::V4_ROOT, trie4.root);
        writer.set(header::V6_ROOT, root6);
        Ok(Self {
            hosts4: trie4.hosts,
            hosts6,
            nets6,
        })
    }
}

/// Members below which a thread costs more than it wins.
const THREADS_PAY: usize = 10_000;

/// Does both, at the same time where that is worth it.
fn both<A: Send, B>(
    worth: bool,
    one: impl FnOnce() -> A + Send,
    other: impl FnOnce() -> B,
) -> (A, B) {
    if !worth {
        return (one(), other());
    }
    thread::scope(|scope| {
        let one = scope.spawn(one);
        let other = other();
        match one.join() {
            Ok(one) => (one, other),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// An IPv6 address as words, the upper end first.
fn quarters(address: u128) -> [u32; 4] {
    [96, 64, 32, 0].map(|shift| (address >> shift) as u32)
}

/// A count or index as a word. What does not fit is past every size limit, and stays so.
fn word(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
