//! Loading: an object's programs and maps become a pinned set.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hasher as _},
    os::fd::OwnedFd,
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, Map, MapData, ProgramArray, RingBuf},
    programs::{CgroupSockAddr, Program, SchedClassifier, TestRun as _, TestRunOptions},
};

use enforcer_common::wire::{Control, step};
use nix::time::{ClockId, clock_getres};

use super::{
    DataplaneError,
    errors::{load_error, map_error, missing, syscall},
    flows::Shape,
    objects,
    pins::{Keep, Meta, Pins, Set},
    resize::SIZED,
    sys::objects::get,
};

/// Programs for packets, and those that only the daemon runs.
pub(super) const CLASSIFIERS: [&str; 9] = [
    "tc_ingress",
    "tc_egress",
    "new_ingress",
    "new_egress",
    "long_ingress",
    "long_egress",
    "clock",
    "sweep",
    "shut",
];
/// Where `tc_ingress` and `tc_egress` go on, by their place in `STEPS`.
pub(super) const STEP_PROGRAMS: [(u32, &str); step::COUNT as usize] = [
    (step::NEW_INGRESS, "new_ingress"),
    (step::NEW_EGRESS, "new_egress"),
    (step::LONG_INGRESS, "long_ingress"),
    (step::LONG_EGRESS, "long_egress"),
];
/// Programs for the socket hooks.
pub(super) const SOCKET_PROGRAMS: [&str; 4] = ["connect4", "connect6", "sendmsg4", "sendmsg6"];
/// What the programs of every build share, but for [`STEPS`]. Their layouts are counted by `pins::LAYOUT`.
pub(super) const MAPS: [&str; 21] = [
    CONTROL,
    ".bss.woken",
    "COUNTERS",
    "DENIED",
    DENIED_HASHES,
    "ETHERNET",
    "EVENTS",
    "FLOWS4",
    "FLOWS6",
    "FLOW_LOCKS",
    "FLOW_SOURCES",
    "FLOW_SWEEP",
    "FLOW_TAGS4",
    "FLOW_TAGS6",
    "FRAGMENTS",
    "INTERFACES",
    POLICY,
    SHADOWED,
    "SOCKETS",
    STEPS,
    "VLANS",
];
pub(super) const POLICY: &str = "POLICY";
/// The programs of one build.
pub(super) const STEPS: &str = "STEPS";
/// Tells which packets may have been denied a moment ago.
const DENIED_HASHES: &str = "DENIED_HASHES";
/// Counts where a candidate policy differs.
pub(super) const SHADOWED: &str = "SHADOWED";
/// Those that builds of this layout did not have at first: made anew beside the older ones.
const NEWER: [&str; 2] = [DENIED_HASHES, SHADOWED];
/// Where the programs keep [`Control`].
pub(super) const CONTROL: &str = ".bss.control";

/// How to load.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Words of the largest image that will be applied; chooses the size class.
    pub image_words: usize,
    /// Rare debug messages of the programs through aya-log.
    pub debug: bool,
    /// Flows of each family that the table is to hold; rounded up to a power of two.
    pub flows: u32,
    /// Where.
    pub keep: Keep,
    /// Loads the programs even if those that are pinned are of the same build.
    pub anew: bool,
    /// More programs to load, that only tests run.
    pub extra: &'static [&'static str],
}

/// Opened programs and maps of a set.
pub(super) struct Opened {
    pub(super) classifiers: BTreeMap<&'static str, SchedClassifier>,
    pub(super) socket: BTreeMap<&'static str, OwnedFd>,
    pub(super) maps: BTreeMap<&'static str, Map>,
}

/// The object for images of so many words, its size class, and what tells it from others.
pub(super) fn object(words: usize) -> Result<(u32, &'static [u8], u64), DataplaneError> {
    let Some((image_words, object)) = objects::for_words(words) else {
        return Err(DataplaneError::ImageTooLarge {
            needed: words,
            limit: enforcer_common::image::SIZE_CLASSES[2] as usize,
        });
    };
    let mut hasher = DefaultHasher::new();
    hasher.write(object);
    Ok((image_words, object, hasher.finish()))
}

/// Loads an object into `next`. Programs of another build share the maps of `current`, but for
/// `POLICY` where its images have another size.
pub(super) fn load(
    pins: &Pins,
    object: &[u8],
    meta: &Meta,
    before: Option<(&Meta, &Control)>,
    options: &LoadOptions,
) -> Result<(), DataplaneError> {
    let current = pins.set(false);
    let next = pins.make_next();
    let next = next.map_err(syscall("make directories for pins"))?;
    let shape = Shape::of(meta);
    let mut loader = EbpfLoader::new();
    shape.configure(&mut loader);
    if let Some((_, control)) = before {
        // aya writes what the object says into maps that are there already, zeros in this case.
        loader.override_global("CONTROL", control, true);
    }
    let shared: Vec<_> = before.map_or(Vec::new(), |(before, _)| {
        let same = before.image_words == meta.image_words;
        let table = before.buckets == meta.buckets;
        let shared = MAPS
            .iter()
            .filter(|name| **name != STEPS)
            .filter(|name| same || **name != POLICY)
            .filter(|name| table || !SIZED.contains(name))
            .filter(|name| !NEWER.contains(name) || current.map(name).exists());
        shared.map(|name| (*name, current.map(name))).collect()
    });
    for (name, path) in &shared {
        if !path.exists() {
            return Err(missing_pin(name));
        }
        loader.map_pin_path(name, path);
    }
    let mut ebpf = loader.load(object).map_err(|e| load_error("object", &e))?;
    for name in CLASSIFIERS.iter().chain(options.extra) {
        let program = classifier(&mut ebpf, name)?;
        program.load().map_err(|e| load_error(name, &e))?;
    }
    connect_steps(&mut ebpf)?;
    for name in SOCKET_PROGRAMS {
        let program: &mut CgroupSockAddr = named(&mut ebpf, name)?
            .try_into()
            .map_err(|e| load_error(name, &e))?;
        program.load().map_err(|e| load_error(name, &e))?;
    }
    for name in CLASSIFIERS
        .iter()
        .chain(options.extra)
        .chain(&SOCKET_PROGRAMS)
    {
        let pinned = named(&mut ebpf, name)?.pin(next.program(name));
        pinned.map_err(|e| load_error(name, &e))?;
    }
    for name in MAPS {
        let map = ebpf.map(name).ok_or_else(|| missing(name))?;
        map.pin(next.map(name)).map_err(|e| load_error(name, &e))?;
    }
    if options.debug {
        // The logger's map is not shared: it goes with the programs that write to it.
        forward_messages(&mut ebpf)?;
    }
    next.describe(meta).map_err(syscall("pin the description"))
}

/// Says which programs go on. The table keeps them as long as it is pinned, or open.
fn connect_steps(ebpf: &mut Ebpf) -> Result<(), DataplaneError> {
    for (place, name) in STEP_PROGRAMS {
        let program = classifier(ebpf, name)?.fd();
        let program = program.map_err(|e| load_error(name, &e))?.try_clone();
        let program = program.map_err(syscall("keep a program open"))?;
        let steps = ebpf.map_mut(STEPS).ok_or_else(|| missing(STEPS))?;
        ProgramArray::try_from(steps)
            .and_then(|mut steps| steps.set(place, &program, 0))
            .map_err(|e| load_error(STEPS, &e))?;
    }
    Ok(())
}

/// What the programs of a set are told.
pub(super) fn control(set: &Set) -> Result<Control, DataplaneError> {
    let map = MapData::from_pin(set.map(CONTROL)).and_then(Map::from_map_data);
    let map = map.map_err(|e| load_error(CONTROL, &e))?;
    let map: Array<_, Control> = map.try_into().map_err(|e| load_error(CONTROL, &e))?;
    map.get(&0, 0).map_err(map_error("read the settings"))
}

/// The ring of records of a set, for its reader.
pub(super) fn events(set: &Set) -> Result<RingBuf<MapData>, DataplaneError> {
    let map = MapData::from_pin(set.map("EVENTS")).and_then(Map::from_map_data);
    map.and_then(RingBuf::try_from)
        .map_err(|e| load_error("EVENTS", &e))
}

fn missing_pin(name: &str) -> DataplaneError {
    DataplaneError::Environment {
        what: format!("the pinned map {name} is gone"),
        help: "somebody removed it; take the rest off with `enforcer detach`, then start again"
            .to_owned(),
    }
}

/// Opens the programs and maps of a set.
pub(super) fn open(set: &Set, extra: &'static [&'static str]) -> Result<Opened, DataplaneError> {
    let mut opened = Opened {
        classifiers: BTreeMap::new(),
        socket: BTreeMap::new(),
        maps: BTreeMap::new(),
    };
    for name in CLASSIFIERS.iter().chain(extra) {
        let program = SchedClassifier::from_pin(set.program(name));
        let program = program.map_err(|e| load_error(name, &e))?;
        opened.classifiers.insert(name, program);
    }
    for name in SOCKET_PROGRAMS {
        let program = get(&set.program(name)).map_err(|e| load_error(name, &e))?;
        opened.socket.insert(name, program);
    }
    for name in MAPS {
        let path = set.map(name);
        if !path.exists() {
            return Err(missing_pin(name));
        }
        let map = MapData::from_pin(path).and_then(Map::from_map_data);
        opened
            .maps
            .insert(name, map.map_err(|e| load_error(name, &e))?);
    }
    Ok(opened)
}

fn named<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program, DataplaneError> {
    ebpf.program_mut(name).ok_or_else(|| missing(name))
}

fn classifier<'a>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> Result<&'a mut SchedClassifier, DataplaneError> {
    named(ebpf, name)?
        .try_into()
        .map_err(|e| load_error(name, &e))
}

/// Passes what the programs say through aya-log on to `log`, and so to the daemon's own log, from
/// a thread that ends with the process.
fn forward_messages(ebpf: &mut Ebpf) -> Result<(), DataplaneError> {
    use aya_log::EbpfLogger;
    use nix::{
        errno::Errno,
        poll::{PollFd, PollFlags, PollTimeout, poll},
    };
    use std::os::fd::AsFd as _;
    let mut logger = EbpfLogger::init(ebpf).map_err(|e| load_error("AYA_LOGS", &e))?;
    std::thread::Builder::new()
        .name("kernel-debug".to_owned())
        .spawn(move || {
            loop {
                let mut fds = [PollFd::new(logger.as_fd(), PollFlags::POLLIN)];
                if poll(&mut fds, PollTimeout::NONE).is_err_and(|e| e != Errno::EINTR) {
                    return;
                }
                logger.flush();
            }
        })
        .map(drop)
        .map_err(syscall("start a thread for debug messages"))
}

/// Jiffies, from a program that writes them.
pub(super) fn ticks(clock: &SchedClassifier) -> Result<u64, DataplaneError> {
    let frame = [0u8; 64];
    let mut out = [0u8; 64];
    let options = TestRunOptions {
        data_in: Some(&frame),
        data_out: Some(&mut out),
        ..TestRunOptions::new()
    };
    clock
        .test_run(options)
        .map_err(|e| load_error("clock", &e))?;
    let (ticks, _) = out.split_first_chunk().unwrap_or((&[0; 8], &[]));
    Ok(u64::from_ne_bytes(*ticks))
}

/// The kernel's ticks a second: the coarse clocks advance with the tick, and say by how much
/// (`LOW_RES_NSEC` in `include/linux/hrtimer.h`). To measure it takes time, and a machine that is short
/// of it showed 300 for 250: a trial of a minute took 72 seconds.
pub(super) fn ticks_a_second() -> Result<u32, DataplaneError> {
    let tick = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE)
        .map_err(|errno| syscall("ask for the length of a tick")(errno.into()))?;
    let tick = Duration::from(tick).as_nanos().max(1);
    // 300 and 1 024 Hz do not divide a second.
    let hz = (1_000_000_000 + tick / 2) / tick;
    Ok(u32::try_from(hz).unwrap_or(u32::MAX))
}
