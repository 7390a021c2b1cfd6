//! The dataplane in the kernel: adopt or load, attach, swap, read.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use aya::{
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf},
    programs::SchedClassifier,
};
use enforcer_common::{
    shadow::{Difference, DifferenceKey},
    table::SLOTS,
    verdict::{COUNTERS, Hook, Outcome, Reason, Record, packet_counter, record_counter},
    wire::{
        CONTROL_DEBUG, CONTROL_SOCKET_REFUSE, Control, DeniedSlot, ETHERNET_LINKS, Event,
        INTERFACE_L3, Interface as WireInterface, NO_DEADLINE, VLAN_JUDGED_THERE,
    },
};

use super::errors::{load_error, map_error, missing, syscall};
use super::{
    Adopted, Beside, Counters, Dataplane, DataplaneError, EventSource, FlowReader, Interface,
    LinkType, OnTrial, PacketCount, RecordCount, SocketHooks, Tamper, WallClock, flows,
    hooks::{Attached, Seen},
    images::Kept,
    load::{self, Opened},
    pins::{Meta, Pins},
    sys,
};
pub use super::{
    images::WrittenImage,
    load::LoadOptions,
    off::{TakenOff, take_off},
    pins::{DEFAULT_PINS, Keep},
};
use crate::compile::Image;

/// The loaded programs and everything attached. What is pinned stays when it is dropped.
pub struct KernelDataplane {
    pub(super) pins: Pins,
    pub(super) meta: Meta,
    pub(super) opened: Opened,
    pub(super) staging: sys::Staging,
    pub(super) control: Control,
    pub(super) attached: BTreeMap<u32, Attached>,
    /// Keys in `VLANS`.
    vlans: BTreeSet<u64>,
    pub(super) socket_links: BTreeMap<&'static str, OwnedFd>,
    /// Somebody has asked for the socket hooks: those that are missing are attached at each look.
    pub(super) socket_wanted: bool,
    /// What is in the slots of `POLICY`.
    pub(super) slots: BTreeMap<u32, Kept>,
    events: Option<RingBuf<MapData>>,
    /// Hooks that had lost their programs, and have them again.
    pub(super) restored: Vec<String>,
    /// What [`KernelDataplane::missing_hooks`] has just seen: each question takes the lock that births
    /// of interfaces need.
    pub(super) seen: BTreeMap<(u32, &'static str), Seen>,
    /// Programs of others on our hooks, at the last look.
    pub(super) strangers: BTreeMap<(u32, &'static str), Vec<u32>>,
    /// How often the first place on a hook was taken again.
    pub(super) fought: BTreeMap<(u32, &'static str), u32>,
    /// What was there before this process.
    adopted: bool,
    /// Programs that only tests run.
    extra: &'static [&'static str],
}

impl KernelDataplane {
    /// Adopts what is pinned; programs of another build, or too small ones, are replaced. Without
    /// pins, programs and maps are loaded; nothing is attached then, no policy is live.
    ///
    /// # Errors
    /// [`DataplaneError`]; what is pinned goes on enforcing as before.
    pub fn load(options: &LoadOptions) -> Result<Self, DataplaneError> {
        let cookie = sys::netns_cookie().map_err(syscall("getsockopt(SO_NETNS_COOKIE)"))?;
        let pins = Pins::open(&options.keep)?;
        let before = pins.meta(cookie)?;
        Self::start(options, pins, cookie, before)
    }

    /// The same, if anything is pinned.
    ///
    /// # Errors
    /// As [`KernelDataplane::load`].
    pub fn adopt(options: &LoadOptions) -> Result<Option<Self>, DataplaneError> {
        let cookie = sys::netns_cookie().map_err(syscall("getsockopt(SO_NETNS_COOKIE)"))?;
        let pins = Pins::open(&options.keep)?;
        match pins.meta(cookie)? {
            None => Ok(None),
            before => Self::start(options, pins, cookie, before).map(Some),
        }
    }

    fn start(
        options: &LoadOptions,
        pins: Pins,
        cookie: u64,
        before: Option<Meta>,
    ) -> Result<Self, DataplaneError> {
        let wanted = before
            .as_ref()
            .map_or(0, |before| before.image_words as usize);
        let (image_words, object, hash) = load::object(options.image_words.max(wanted))?;
        let meta = match &before {
            Some(before) => before.with(hash, image_words, flows::buckets(options.flows)),
            None => {
                let buckets = flows::buckets(options.flows);
                Meta::new(hash, image_words, buckets, cookie, flows::secrets()?)
            }
        };
        let same = before.is_some_and(|before| before == meta);
        // Its programs deny what they do not know; others can take over all the same.
        let broken = !pins.set(false).map(load::STEPS).exists();
        let fresh = !same || broken || options.anew || options.debug;
        if same && broken {
            tracing::warn!(
                "somebody has unpinned the table of the programs that judge: the ones on the hooks \
                 let nothing new pass, and are replaced"
            );
        }
        if fresh {
            let control = match &before {
                Some(_) => Some(load::control(&pins.set(false))?),
                None => None,
            };
            let before = before.as_ref().zip(control.as_ref());
            load::load(&pins, object, &meta, before, options)?;
        }
        let set = pins.set(fresh);
        let opened = load::open(&set, options.extra)?;
        let events = load::events(&set)?;
        let mut this = Self::of(pins, meta, opened, events)?;
        this.adopted = before.is_some();
        this.extra = options.extra;
        if before.is_none() {
            this.control = Control {
                netns_cookie: cookie,
                deadline: NO_DEADLINE,
                ..Control::default()
            };
        } else {
            let map: Array<_, Control> = this.typed(load::CONTROL)?;
            this.control = map.get(&0, 0).map_err(map_error("read the settings"))?;
        }
        // What an earlier build found out may be wrong.
        this.control.hz = load::ticks_a_second()?;
        this.control.flags &= !CONTROL_DEBUG;
        if options.debug {
            this.control.flags |= CONTROL_DEBUG;
        }
        if let Some(before) = &before {
            this.adopt_images(&set, before)?;
            if before.buckets != this.meta.buckets {
                let old = this.pins.set(false);
                this.take_flows(&old, before)?;
            }
        }
        this.write_control()?;
        this.adopt_interfaces()?;
        this.adopt_links()?;
        if fresh {
            this.pins
                .commit()
                .map_err(syscall("put the pins in their place"))?;
        }
        this.tidy_up();
        Ok(this)
    }

    fn of(
        pins: Pins,
        meta: Meta,
        opened: Opened,
        events: RingBuf<MapData>,
    ) -> Result<Self, DataplaneError> {
        let staging = sys::Staging::new(meta.image_words as usize);
        Ok(Self {
            pins,
            meta,
            opened,
            staging: staging.map_err(syscall("make room for images"))?,
            control: Control::default(),
            attached: BTreeMap::new(),
            vlans: BTreeSet::new(),
            socket_links: BTreeMap::new(),
            socket_wanted: false,
            slots: BTreeMap::new(),
            events: Some(events),
            restored: Vec::new(),
            seen: BTreeMap::new(),
            strangers: BTreeMap::new(),
            fought: BTreeMap::new(),
            adopted: false,
            extra: &[],
        })
    }

    /// Replaces the programs by some for images of `words` words, which judge by the images in force
    /// from their first packet; flows and counts stay.
    pub(super) fn grow(&mut self, words: usize) -> Result<(), DataplaneError> {
        let (image_words, object, hash) = load::object(words)?;
        let before = self.meta;
        let meta = before.with(hash, image_words, before.buckets);
        let options = LoadOptions {
            image_words: words,
            debug: false,
            flows: 0,
            keep: Keep::Ephemeral,
            anew: true,
            extra: self.extra,
        };
        let staging = sys::Staging::new(image_words as usize);
        let staging = staging.map_err(syscall("make room for images"))?;
        let control = self.control;
        let known = Some((&before, &control));
        let loaded = load::load(&self.pins, object, &meta, known, &options)
            .and_then(|()| load::open(&self.pins.set(true), self.extra));
        let opened = match loaded {
            Ok(opened) => opened,
            Err(error) => {
                self.tidy_up();
                return Err(error);
            }
        };
        let old = std::mem::replace(&mut self.opened, opened);
        let smaller = std::mem::replace(&mut self.staging, staging);
        self.meta = meta;
        let next = self.pins.set(true);
        let moved = self
            .adopt_images(&next, &before)
            .and_then(|()| self.replace_programs())
            .and_then(|()| {
                let committed = self.pins.commit();
                committed.map_err(syscall("put the pins in their place"))
            });
        if let Err(error) = moved {
            self.opened = old;
            self.staging = smaller;
            self.meta = before;
            // Hooks that have changed over go back; both judge by the same images.
            let current = self.pins.set(false);
            let images = self.adopt_images(&current, &before);
            match self.replace_programs() {
                // Nothing leads to the others any more.
                Ok(()) => self.tidy_up(),
                Err(error) => tracing::error!(%error, "cannot put the programs back"),
            }
            if let Err(error) = images {
                tracing::error!(%error, "cannot put the images back");
            }
            return Err(error);
        }
        Ok(())
    }

    /// Words that an image may have.
    pub fn image_words(&self) -> u32 {
        self.meta.image_words
    }

    pub(super) fn flow_buckets(&self) -> u32 {
        self.meta.buckets
    }

    /// A map of the programs.
    pub fn map(&self, name: &str) -> Option<&Map> {
        self.opened.maps.get(name)
    }

    /// A map of the programs, to write to.
    pub fn map_mut(&mut self, name: &str) -> Option<&mut Map> {
        self.opened.maps.get_mut(name)
    }

    /// A program for packets.
    pub fn program(&self, name: &str) -> Option<&SchedClassifier> {
        self.opened.classifiers.get(name)
    }

    pub(super) fn classifier(&self, name: &str) -> Result<&SchedClassifier, DataplaneError> {
        self.program(name).ok_or_else(|| missing(name))
    }

    pub(super) fn typed<'a, M>(&'a self, name: &str) -> Result<M, DataplaneError>
    where
        M: TryFrom<&'a Map, Error = aya::maps::MapError>,
    {
        let map = self.map(name).ok_or_else(|| missing(name))?;
        M::try_from(map).map_err(|e| load_error(name, &e))
    }

    pub(super) fn typed_mut<'a, M>(&'a mut self, name: &str) -> Result<M, DataplaneError>
    where
        M: TryFrom<&'a mut Map, Error = aya::maps::MapError>,
    {
        let map = self.map_mut(name).ok_or_else(|| missing(name))?;
        M::try_from(map).map_err(|e| load_error(name, &e))
    }

    pub(super) fn write_control(&mut self) -> Result<(), DataplaneError> {
        let Some(Map::Array(map)) = self.map(load::CONTROL) else {
            return Err(missing(load::CONTROL));
        };
        sys::write(map.fd().as_fd(), &self.control).map_err(syscall("write the settings"))
    }

    /// Notes an interface where the programs find it.
    pub(super) fn note_interface(&mut self, interface: &Interface) -> Result<(), DataplaneError> {
        let (ifindex, slot) = (interface.ifindex, interface.slot);
        let flags = match interface.link {
            LinkType::Ethernet => 0,
            LinkType::Ip => INTERFACE_L3,
        };
        let mut map: HashMap<_, u32, WireInterface> = self.typed_mut("INTERFACES")?;
        map.insert(ifindex, WireInterface { flags, slot }, 0)
            .map_err(map_error("write INTERFACES"))?;
        self.set_ethernet(ifindex, (flags & INTERFACE_L3 == 0).then_some(slot))
    }

    pub(super) fn forget_interface(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        let mut map: HashMap<_, u32, WireInterface> = self.typed_mut("INTERFACES")?;
        let _ = map.remove(&ifindex);
        self.set_ethernet(ifindex, None)
    }

    /// Notes an interface, and its slot if its frames begin with an Ethernet header, where the
    /// programs find it fast. Where two share an element, the other one is found in `INTERFACES`.
    fn set_ethernet(&mut self, ifindex: u32, slot: Option<u32>) -> Result<(), DataplaneError> {
        let mut map: Array<_, [u32; 2]> = self.typed_mut("ETHERNET")?;
        let index = ifindex & (ETHERNET_LINKS - 1);
        let [known, _] = map.get(&index, 0).map_err(map_error("read ETHERNET"))?;
        let new = match slot {
            Some(slot) => [ifindex, slot],
            None if known == ifindex => [0, 0],
            None => return Ok(()),
        };
        map.set(index, new, 0).map_err(map_error("write ETHERNET"))
    }

    /// What the maps say of interfaces and tags.
    fn adopt_interfaces(&mut self) -> Result<(), DataplaneError> {
        let map: HashMap<_, u64, u32> = self.typed("VLANS")?;
        let keys: Result<BTreeSet<u64>, _> = map.keys().collect();
        self.vlans = keys.map_err(map_error("read VLANS"))?;
        Ok(())
    }

    /// Slots of interfaces, by ifindex.
    pub(super) fn interfaces(&self) -> Result<BTreeMap<u32, u32>, DataplaneError> {
        let map: HashMap<_, u32, WireInterface> = self.typed("INTERFACES")?;
        let slots: Result<_, _> = map
            .iter()
            .map(|entry| entry.map(|(ifindex, interface)| (ifindex, interface.slot)))
            .collect();
        slots.map_err(map_error("read INTERFACES"))
    }
}

impl Dataplane for KernelDataplane {
    fn adopted(&self) -> Result<Option<Adopted>, DataplaneError> {
        if !self.adopted {
            return Ok(None);
        }
        let clock = WallClock {
            unix_floor: self.control.unix_floor,
            boot_unix_ns: self.control.boot_unix_ns,
        };
        Ok(Some(Adopted {
            live: self.live_image()?,
            generation: self.meta.generation,
            slots: self.interfaces()?,
            clock: Some(clock).filter(|clock| clock.boot_unix_ns != 0),
        }))
    }

    fn outlives(&self) -> bool {
        self.pins.place().is_some()
    }

    fn pins(&self) -> Option<std::path::PathBuf> {
        std::path::absolute(self.pins.place()?).ok()
    }

    fn beside(&self) -> Vec<Beside> {
        self.enforcers_beside()
    }

    fn apply(&mut self, image: &Image) -> Result<(), DataplaneError> {
        let written = self.write_image(image)?;
        self.make_live(&written)?;
        self.leave_lost_trial()
    }

    fn trial(
        &mut self,
        image: &Image,
        previous: Option<&Image>,
        within: std::time::Duration,
    ) -> Result<(), DataplaneError> {
        self.begin_trial(image, previous, within)
    }

    fn on_trial(&self) -> Result<Option<OnTrial>, DataplaneError> {
        self.trial_now()
    }

    fn confirm(&mut self) -> Result<(), DataplaneError> {
        self.confirm_trial()
    }

    fn revert(&mut self) -> Result<(), DataplaneError> {
        self.revert_trial()
    }

    fn apply_both(&mut self, previous: &Image, live: &Image) -> Result<(), DataplaneError> {
        self.apply_during_trial(previous, live)
    }

    fn set_shadow(&mut self, image: Option<&Image>, anew: bool) -> Result<(), DataplaneError> {
        self.put_shadow(image, anew)
    }

    fn shadow(&self) -> Result<Option<Image>, DataplaneError> {
        self.candidate()
    }

    fn differences(&self) -> Result<BTreeMap<DifferenceKey, Difference>, DataplaneError> {
        self.shadow_counts()
    }

    fn forget_differences(&mut self, keys: &[DifferenceKey]) -> Result<(), DataplaneError> {
        self.forget_counts(keys)
    }

    fn set_clock(&mut self, clock: WallClock) -> Result<(), DataplaneError> {
        self.control.unix_floor = clock.unix_floor;
        self.control.boot_unix_ns = clock.boot_unix_ns;
        self.write_control()
    }

    fn sweep(&mut self) -> Result<(), DataplaneError> {
        flows::sweep(self.classifier("sweep")?, self.meta.buckets)
    }

    fn flow_reader(&self) -> Result<Box<dyn FlowReader>, DataplaneError> {
        let now = load::ticks(self.classifier("clock")?)?;
        self.reader((now as u32, self.control.hz))
    }

    fn attach(&mut self, interface: &Interface) -> Result<(), DataplaneError> {
        self.attach_interface(interface)
    }

    fn detach(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        self.detach_interface(ifindex)
    }

    fn set_vlans(&mut self, keys: &BTreeSet<u64>) -> Result<(), DataplaneError> {
        if *keys == self.vlans {
            return Ok(());
        }
        let old: Vec<u64> = self.vlans.difference(keys).copied().collect();
        for key in old {
            let mut map: HashMap<_, u64, u32> = self.typed_mut("VLANS")?;
            map.remove(&key).map_err(map_error("write VLANS"))?;
            self.vlans.remove(&key);
        }
        for key in keys {
            let mut map: HashMap<_, u64, u32> = self.typed_mut("VLANS")?;
            map.insert(key, VLAN_JUDGED_THERE, 0)
                .map_err(map_error("write VLANS"))?;
            self.vlans.insert(*key);
        }
        Ok(())
    }

    fn missing(&mut self) -> Result<Vec<u32>, DataplaneError> {
        self.missing_hooks()
    }

    fn inspect(&mut self) -> Result<Vec<Tamper>, DataplaneError> {
        self.look_for_tampering()
    }

    fn read_back(&self) -> Result<Option<Image>, DataplaneError> {
        self.live_image()
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
        self.socket_wanted = mode != SocketHooks::Off;
        match mode {
            SocketHooks::Off => self.detach_socket_hooks(),
            SocketHooks::Refuse | SocketHooks::Observe => self.attach_socket_hooks(),
        }
    }

    fn counters(&self) -> Result<Counters, DataplaneError> {
        let Some(Map::PerCpuArray(map)) = self.map("COUNTERS") else {
            return Err(missing("COUNTERS"));
        };
        // One call: the daemon reads them often, and 544 calls are half a millisecond.
        let cpus = aya::util::nr_cpus().map_err(|(_, e)| syscall("count CPUs")(e))?;
        let sums = sys::sums(map.fd().as_fd(), COUNTERS, cpus).map_err(syscall("read COUNTERS"))?;
        let at = |index: u32| sums.get(index as usize).copied().unwrap_or(0);
        let mut counters = Counters {
            flows: self.meta.buckets * SLOTS,
            ..Counters::default()
        };
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
        let map: PerCpuArray<_, DeniedSlot> = self.typed("DENIED")?;
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

    fn recorded_counts(&self) -> Result<Vec<Event>, DataplaneError> {
        let map: PerCpuArray<_, DeniedSlot> = self.typed("DENIED")?;
        let mut events = Vec::new();
        for slots in map.iter() {
            let slots = slots.map_err(map_error("read DENIED"))?;
            let used = slots
                .iter()
                .filter(|s| s.epoch == s.epoch_end && s.epoch != 0);
            events.extend(used.map(|slot| Event {
                total: slot.event.total.saturating_sub(u64::from(slot.pending)),
                ..slot.event
            }));
        }
        Ok(events)
    }

    fn take_events(&mut self) -> Option<Box<dyn EventSource>> {
        self.events
            .take()
            .map(|ring| Box::new(KernelEvents { ring }) as Box<dyn EventSource>)
    }

    fn detach_all(&mut self) -> Result<(), DataplaneError> {
        let (wanted, flags) = (self.socket_wanted, self.control.flags);
        // First: what they refuse, TC must deny as well.
        let mut result = self.socket_hooks(SocketHooks::Off);
        if result.is_ok() {
            for ifindex in self.attached.keys().copied().collect::<Vec<_>>() {
                let detached = self.detach(ifindex);
                result = result.and(detached);
            }
        }
        // While a program is at work, so are its pins.
        if result.is_ok() {
            result = self.pins.remove().map_err(syscall("remove the pins"));
        }
        if result.is_err() {
            // The next look puts all of it back.
            (self.socket_wanted, self.control.flags) = (wanted, flags);
            let _ = self.write_control();
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
