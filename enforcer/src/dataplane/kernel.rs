//! The dataplane in the kernel, through aya: load, attach, swap, read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf},
    programs::{
        CgroupAttachMode, CgroupSockAddr, LinkOrder, SchedClassifier, TcAttachType, TestRun as _,
        TestRunOptions,
        cgroup_sock_addr::CgroupSockAddrLinkId,
        tc::{SchedClassifierLinkId, TcAttachOptions},
    },
    util::KernelVersion,
};
use aya_log::EbpfLogger;
use enforcer_common::{
    verdict::{COUNTERS, Hook, Outcome, Reason, Record, packet_counter, record_counter},
    wire::{
        CONTROL_DEBUG, CONTROL_SOCKET_REFUSE, Control, DeniedSlot, ETHERNET_LINKS, Event,
        INTERFACE_L3, Interface as WireInterface, VLAN_JUDGED_THERE, slot,
    },
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::errors::{attach_error, io_error, is_gone, load_error, map_error, missing, syscall};
use super::query::{has_program, interface_name};
use super::{
    Counters, Dataplane, DataplaneError, EventSource, Interface, LinkType, PacketCount,
    RecordCount, SocketHooks, WallClock, cgroup, clsact,
    flows::{self, Shape},
    objects, sys,
};
use crate::compile::Image;

/// Ticks a second that kernels are built with (`kernel/Kconfig.hz`, and 1024 on old Alpha).
const KNOWN_HZ: [u32; 5] = [100, 250, 300, 1000, 1024];
const SOCKET_PROGRAMS: [&str; 4] = ["connect4", "connect6", "sendmsg4", "sendmsg6"];
const TC_PROGRAMS: [(&str, TcAttachType); 2] = [
    ("tc_ingress", TcAttachType::Ingress),
    ("tc_egress", TcAttachType::Egress),
];

/// How to load.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Words of the largest image that will be applied; chooses the size class.
    pub image_words: usize,
    /// Rare debug messages of the programs through aya-log.
    pub debug: bool,
    /// Flows of each family that the table is to hold; rounded up to a power of two.
    pub flows: u32,
}

/// The loaded programs and everything attached. Dropping it detaches.
pub struct KernelDataplane {
    ebpf: Ebpf,
    image_words: u32,
    staging: sys::Staging,
    flow_buckets: u32,
    control: Control,
    attached: BTreeMap<u32, Attached>,
    /// Keys in `VLANS`.
    vlans: BTreeSet<u64>,
    socket_links: Vec<(&'static str, CgroupSockAddrLinkId)>,
    events: Option<RingBuf<MapData>>,
}

/// An image in a map of its own.
pub struct WrittenImage {
    map: OwnedFd,
    generation: u32,
}

/// Where the programs keep [`Control`].
const CONTROL: &str = ".bss.control";

struct Attached {
    name: String,
    slot: u32,
    links: Vec<(&'static str, SchedClassifierLinkId)>,
}

impl KernelDataplane {
    /// Loads programs and maps. Nothing is attached, no policy is live.
    ///
    /// # Errors
    /// [`DataplaneError::ImageTooLarge`], [`DataplaneError::Load`].
    pub fn load(options: &LoadOptions) -> Result<Self, DataplaneError> {
        let Some((image_words, object)) = objects::for_words(options.image_words) else {
            return Err(DataplaneError::ImageTooLarge {
                needed: options.image_words,
                limit: enforcer_common::image::SIZE_CLASSES[2] as usize,
            });
        };
        let shape = Shape::new(options.flows)?;
        let mut loader = EbpfLoader::new();
        shape.configure(&mut loader);
        let mut ebpf = loader.load(object).map_err(|e| load_error("object", &e))?;
        for name in ["tc_ingress", "tc_egress", "clock", "sweep"] {
            classifier(&mut ebpf, name)?
                .load()
                .map_err(|e| load_error(name, &e))?;
        }
        for name in SOCKET_PROGRAMS {
            socket_program(&mut ebpf, name)?
                .load()
                .map_err(|e| load_error(name, &e))?;
        }
        let events = match ebpf.take_map("EVENTS") {
            Some(map) => Some(RingBuf::try_from(map).map_err(|e| load_error("EVENTS", &e))?),
            None => return Err(missing("EVENTS")),
        };
        let hz = measure_hz(&mut ebpf)?;
        let netns_cookie = sys::netns_cookie().map_err(syscall("getsockopt(SO_NETNS_COOKIE)"))?;
        let control = Control {
            unix_floor: 0,
            boot_unix_ns: 0,
            netns_cookie,
            hz,
            flags: if options.debug { CONTROL_DEBUG } else { 0 },
            generation: 0,
            reserved: 0,
        };
        let staging = sys::Staging::new(image_words as usize);
        let mut this = Self {
            ebpf,
            image_words,
            staging: staging.map_err(syscall("make room for images"))?,
            flow_buckets: shape.buckets(),
            control,
            attached: BTreeMap::new(),
            vlans: BTreeSet::new(),
            socket_links: Vec::new(),
            events,
        };
        this.write_control()?;
        if options.debug {
            forward_messages(&mut this.ebpf)?;
        }
        Ok(this)
    }

    /// Words that an image may have.
    pub fn image_words(&self) -> u32 {
        self.image_words
    }

    pub(super) fn ebpf(&self) -> &Ebpf {
        &self.ebpf
    }

    pub(super) fn flow_buckets(&self) -> u32 {
        self.flow_buckets
    }

    /// The loaded object, for tests that run programs and read maps themselves.
    pub fn ebpf_mut(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    fn write_control(&mut self) -> Result<(), DataplaneError> {
        let control = self.control;
        let mut map: Array<_, Control> = typed_mut(&mut self.ebpf, CONTROL)?;
        map.set(0, control, 0)
            .map_err(map_error("write the settings"))
    }

    /// Notes an interface, and its slot if its frames begin with an Ethernet header, where the
    /// programs find it fast. Where two share an element, the other one is found in `INTERFACES`.
    fn set_ethernet(&mut self, ifindex: u32, slot: Option<u32>) -> Result<(), DataplaneError> {
        let mut map: Array<_, [u32; 2]> = typed_mut(&mut self.ebpf, "ETHERNET")?;
        let index = ifindex & (ETHERNET_LINKS - 1);
        let [known, _] = map.get(&index, 0).map_err(map_error("read ETHERNET"))?;
        let new = match slot {
            Some(slot) => [ifindex, slot],
            None if known == ifindex => [0, 0],
            None => return Ok(()),
        };
        map.set(index, new, 0).map_err(map_error("write ETHERNET"))
    }

    /// Has the programs know nothing of an interface any more.
    fn forget(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        let mut map: HashMap<_, u32, WireInterface> = typed_mut(&mut self.ebpf, "INTERFACES")?;
        let _ = map.remove(&ifindex);
        self.set_ethernet(ifindex, None)
    }

    fn attach_one(
        &mut self,
        name: &'static str,
        direction: TcAttachType,
        interface: &Interface,
    ) -> Result<SchedClassifierLinkId, DataplaneError> {
        let program = classifier(&mut self.ebpf, name)?;
        let attached = if tcx() {
            // First in the chain: nothing before us may accept a packet on our behalf.
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            program.attach_with_options(&interface.name, direction, options)
        } else {
            clsact::attach(program, name, direction, &interface.name)?
        };
        attached.map_err(|error| attach_error(name, &interface.name, &error))
    }

    /// Writes an image into a map of its own, that no program sees yet: the slow part of
    /// [`Dataplane::apply`].
    ///
    /// # Errors
    /// When the image does not fit, or the kernel says no.
    pub fn write_image(&mut self, image: &Image) -> Result<WrittenImage, DataplaneError> {
        let Some(words) = self.staging.fill(image.words()) else {
            return Err(DataplaneError::ImageTooLarge {
                needed: image.words().len(),
                limit: self.image_words as usize,
            });
        };
        // Written by one update and frozen before any program can see it.
        let inner = sys::create_image_map(self.image_words, image.generation())
            .map_err(syscall("create the image map"))?;
        sys::update_words(inner.as_fd(), 0, words).map_err(syscall("write the image"))?;
        sys::freeze(inner.as_fd()).map_err(syscall("freeze the image"))?;
        Ok(WrittenImage {
            map: inner,
            generation: image.generation(),
        })
    }

    /// Makes a written image the one that judges; returns when no packet is judged by another.
    ///
    /// # Errors
    /// When the kernel says no; then the image in force stays.
    pub fn make_live(&mut self, image: &WrittenImage) -> Result<(), DataplaneError> {
        // Between the two writes of the generation no packet passes for what an entry says without
        // being put to the image's generation. Should this process end there, that goes on: slow,
        // and right.
        let before = std::mem::take(&mut self.control.generation);
        let swapped = self.write_control().and_then(|()| self.swap(image));
        self.control.generation = match swapped {
            Ok(()) => image.generation,
            Err(_) => before,
        };
        if let Err(error) = self.write_control() {
            // Whatever is in force stays so; the next write of the settings makes it quick again.
            tracing::warn!("packets of established flows are slower for now: {error}");
        }
        swapped
    }

    fn swap(&self, image: &WrittenImage) -> Result<(), DataplaneError> {
        let Some(Map::ArrayOfMaps(policy)) = self.ebpf.map("POLICY") else {
            return Err(missing("POLICY"));
        };
        // The one pointer write. It returns after a grace period: from then on no packet is
        // judged by the old image.
        sys::update_inner(policy.fd().as_fd(), slot::LIVE, image.map.as_fd())
            .map_err(syscall("swap the live image"))
    }
}

/// tcx links came with Linux 6.6; before, clsact through netlink.
fn tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

impl Dataplane for KernelDataplane {
    fn apply(&mut self, image: &Image) -> Result<(), DataplaneError> {
        let written = self.write_image(image)?;
        self.make_live(&written)
    }

    fn set_clock(&mut self, clock: WallClock) -> Result<(), DataplaneError> {
        self.control.unix_floor = clock.unix_floor;
        self.control.boot_unix_ns = clock.boot_unix_ns;
        // The kernel copies word by word, the floor first: time stands still before it goes back.
        self.write_control()
    }

    fn sweep(&mut self) -> Result<(), DataplaneError> {
        flows::sweep(&mut self.ebpf, self.flow_buckets)
    }

    fn attach(&mut self, interface: &Interface) -> Result<(), DataplaneError> {
        let slot = interface.slot;
        if let Some(attached) = self.attached.get(&interface.ifindex)
            && attached.slot == slot
        {
            return Ok(());
        }
        let flags = match interface.link {
            LinkType::Ethernet => 0,
            LinkType::Ip => INTERFACE_L3,
        };
        let mut map: HashMap<_, u32, WireInterface> = typed_mut(&mut self.ebpf, "INTERFACES")?;
        map.insert(interface.ifindex, WireInterface { flags, slot }, 0)
            .map_err(map_error("write INTERFACES"))?;
        self.set_ethernet(
            interface.ifindex,
            (flags & INTERFACE_L3 == 0).then_some(slot),
        )?;
        if let Some(attached) = self.attached.get_mut(&interface.ifindex) {
            attached.slot = slot;
            return Ok(());
        }
        let mut attached = Attached {
            name: interface.name.clone(),
            slot,
            links: Vec::new(),
        };
        for (name, direction) in TC_PROGRAMS {
            match self.attach_one(name, direction, interface) {
                Ok(link) => attached.links.push((name, link)),
                Err(error) => {
                    // Half an interface is worse than none: take the first hook off again.
                    for (name, link) in attached.links {
                        let _ = classifier(&mut self.ebpf, name)?.detach(link);
                    }
                    // Nor may its number mean anything to the next one that gets it.
                    self.forget(interface.ifindex)?;
                    return Err(error);
                }
            }
        }
        self.attached.insert(interface.ifindex, attached);
        Ok(())
    }

    fn detach(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        let Some(attached) = self.attached.remove(&ifindex) else {
            return Ok(());
        };
        let mut result = Ok(());
        for (name, link) in attached.links {
            if let Err(error) = classifier(&mut self.ebpf, name)?.detach(link) {
                // The kernel has done it already when the interface is gone.
                if !is_gone(&error) && result.is_ok() {
                    result = Err(attach_error(name, &attached.name, &error));
                }
            }
        }
        result.and(self.forget(ifindex))
    }

    fn set_vlans(&mut self, keys: &BTreeSet<u64>) -> Result<(), DataplaneError> {
        if *keys == self.vlans {
            return Ok(());
        }
        let mut map: HashMap<_, u64, u32> = typed_mut(&mut self.ebpf, "VLANS")?;
        let old: Vec<u64> = self.vlans.difference(keys).copied().collect();
        for key in old {
            map.remove(&key).map_err(map_error("write VLANS"))?;
            self.vlans.remove(&key);
        }
        for key in keys {
            map.insert(key, VLAN_JUDGED_THERE, 0)
                .map_err(map_error("write VLANS"))?;
            self.vlans.insert(*key);
        }
        Ok(())
    }

    fn missing(&mut self) -> Result<Vec<u32>, DataplaneError> {
        let mut missing = Vec::new();
        // Filters of clsact have no query that aya offers: there the kernel is taken at its word.
        if !tcx() {
            return Ok(missing);
        }
        let mut ours = Vec::new();
        for (name, direction) in TC_PROGRAMS {
            let info = classifier(&mut self.ebpf, name)?.info();
            let info = info.map_err(|e| syscall("read a program's id")(io_error(&e)))?;
            ours.push((direction, info.id()));
        }
        for ifindex in self.attached.keys().copied() {
            // Renamed, perhaps; aya asks by name.
            let Some(name) = interface_name(ifindex) else {
                missing.push(ifindex);
                continue;
            };
            for (direction, id) in &ours {
                if !has_program(&name, *direction, *id)? {
                    missing.push(ifindex);
                    break;
                }
            }
        }
        Ok(missing)
    }

    fn socket_hooks(&mut self, mode: SocketHooks) -> Result<(), DataplaneError> {
        let flags = match mode {
            SocketHooks::Refuse => self.control.flags | CONTROL_SOCKET_REFUSE,
            SocketHooks::Observe | SocketHooks::Off => self.control.flags & !CONTROL_SOCKET_REFUSE,
        };
        if flags != self.control.flags {
            self.control.flags = flags;
            self.write_control()?;
        }
        if mode == SocketHooks::Off {
            for (name, link) in std::mem::take(&mut self.socket_links) {
                socket_program(&mut self.ebpf, name)?
                    .detach(link)
                    .map_err(|e| attach_error(name, "the root cgroup", &e))?;
            }
            return Ok(());
        }
        if !self.socket_links.is_empty() {
            return Ok(());
        }
        let root = cgroup::cgroup2_root()?;
        let directory = File::open(&root).map_err(syscall("open the root cgroup"))?;
        for name in SOCKET_PROGRAMS {
            let link = socket_program(&mut self.ebpf, name)?
                .attach(&directory, CgroupAttachMode::Single)
                .map_err(|e| attach_error(name, &root.display().to_string(), &e))?;
            self.socket_links.push((name, link));
        }
        Ok(())
    }

    fn counters(&self) -> Result<Counters, DataplaneError> {
        let Some(Map::PerCpuArray(map)) = self.ebpf.map("COUNTERS") else {
            return Err(missing("COUNTERS"));
        };
        // One call: the daemon reads them often, and 544 calls are half a millisecond.
        let cpus = aya::util::nr_cpus().map_err(|(_, e)| syscall("count CPUs")(e))?;
        let sums = sys::sums(map.fd().as_fd(), COUNTERS, cpus).map_err(syscall("read COUNTERS"))?;
        let at = |index: u32| sums.get(index as usize).copied().unwrap_or(0);
        let mut counters = Counters::default();
        for hook in Hook::ALL {
            for outcome in Outcome::ALL {
                for reason in Reason::ALL.iter().copied() {
                    let packets = at(packet_counter(hook, outcome, reason));
                    if packets != 0 {
                        counters.packets.push(PacketCount {
                            hook,
                            outcome,
                            reason,
                            packets,
                        });
                    }
                }
            }
            counters.records.push(RecordCount {
                hook,
                emitted: at(record_counter(hook, Record::Emitted)),
                suppressed: at(record_counter(hook, Record::Suppressed)),
                lost: at(record_counter(hook, Record::Lost)),
                displaced: at(record_counter(hook, Record::Displaced)),
                flow_insert_failed: at(record_counter(hook, Record::FlowInsertFailed)),
            });
        }
        Ok(counters)
    }

    fn running_counts(&self) -> Result<Vec<Event>, DataplaneError> {
        let map: PerCpuArray<_, DeniedSlot> = typed(&self.ebpf, "DENIED")?;
        let mut events = Vec::new();
        for slots in map.iter() {
            let slots = slots.map_err(map_error("read DENIED"))?;
            // A slot being written just now is seen by the next scan.
            events.extend(
                slots
                    .iter()
                    .filter(|s| s.pending != 0 && s.epoch == s.epoch_end && s.epoch != 0)
                    .map(|s| s.event),
            );
        }
        Ok(events)
    }

    fn take_events(&mut self) -> Option<Box<dyn EventSource>> {
        self.events
            .take()
            .map(|ring| Box::new(KernelEvents { ring }) as Box<dyn EventSource>)
    }

    fn detach_all(&mut self) -> Result<(), DataplaneError> {
        // First: what they refuse, TC must deny as well.
        let mut result = self.socket_hooks(SocketHooks::Off);
        for ifindex in self.attached.keys().copied().collect::<Vec<_>>() {
            let detached = self.detach(ifindex);
            result = result.and(detached);
        }
        result
    }
}

struct KernelEvents {
    ring: RingBuf<MapData>,
}

impl EventSource for KernelEvents {
    fn next(&mut self) -> Option<Event> {
        loop {
            let item = self.ring.next()?;
            if item.len() == size_of::<Event>() {
                // SAFETY: the length is the type's; `Event` is Pod (any bit pattern is a value)
                // and the read is unaligned.
                #[expect(unsafe_code, reason = "bytes of the ring to a Pod type")]
                return Some(unsafe { item.as_ptr().cast::<Event>().read_unaligned() });
            }
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

/// Passes what the programs say through aya-log on to `log`, and so to the daemon's own log, from
/// a thread that ends with the process.
fn forward_messages(ebpf: &mut Ebpf) -> Result<(), DataplaneError> {
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

/// Learns the kernel's ticks a second from a program that returns jiffies.
fn measure_hz(ebpf: &mut Ebpf) -> Result<u32, DataplaneError> {
    let mut ticks = || -> Result<u32, DataplaneError> {
        let frame = [0u8; 64];
        let options = TestRunOptions {
            data_in: Some(&frame),
            ..TestRunOptions::new()
        };
        classifier(ebpf, "clock")?
            .test_run(options)
            .map(|r| r.return_value)
            .map_err(|e| load_error("clock", &e))
    };
    let begin = std::time::Instant::now();
    let first = ticks()?;
    std::thread::sleep(Duration::from_millis(120));
    let second = ticks()?;
    let elapsed = begin.elapsed().as_micros().max(1);
    let measured = u128::from(second.wrapping_sub(first)) * 1_000_000 / elapsed;
    let distance = |hz: u32| u128::from(hz).abs_diff(measured);
    Ok(KNOWN_HZ
        .into_iter()
        .min_by_key(|hz| distance(*hz))
        .unwrap_or(250))
}

pub(super) fn classifier<'a>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> Result<&'a mut SchedClassifier, DataplaneError> {
    ebpf.program_mut(name)
        .ok_or_else(|| missing(name))?
        .try_into()
        .map_err(|e| load_error(name, &e))
}

fn socket_program<'a>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> Result<&'a mut CgroupSockAddr, DataplaneError> {
    ebpf.program_mut(name)
        .ok_or_else(|| missing(name))?
        .try_into()
        .map_err(|e| load_error(name, &e))
}

fn typed<'a, M>(ebpf: &'a Ebpf, name: &str) -> Result<M, DataplaneError>
where
    M: TryFrom<&'a Map, Error = aya::maps::MapError>,
{
    let map = ebpf.map(name).ok_or_else(|| missing(name))?;
    M::try_from(map).map_err(|e| load_error(name, &e))
}

fn typed_mut<'a, M>(ebpf: &'a mut Ebpf, name: &str) -> Result<M, DataplaneError>
where
    M: TryFrom<&'a mut Map, Error = aya::maps::MapError>,
{
    let map = ebpf.map_mut(name).ok_or_else(|| missing(name))?;
    M::try_from(map).map_err(|e| load_error(name, &e))
}
