//! A dataplane in memory: what the daemon asked for, and records at the test's word.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io::{Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use enforcer_common::{
    shadow::{Difference, DifferenceKey},
    table::Flow,
    wire::Event,
};

use crate::{
    compile::Image,
    dataplane::{
        Adopted, Counters, Dataplane, DataplaneError, EventSource, FlowReader, Interface, OnTrial,
        SocketHooks, Tamper, WallClock,
    },
};

/// What has happened, and what is to happen.
#[derive(Default)]
pub struct Fake {
    /// Images applied, by generation and hash.
    pub applied: Vec<(u32, u64)>,
    /// Attached now.
    pub attached: BTreeSet<u32>,
    /// Slots of those ever attached.
    pub slots: BTreeMap<u32, u32>,
    pub vlans: BTreeSet<u64>,
    /// What happened to interfaces and VLANs, in order.
    pub log: Vec<String>,
    pub clock: Option<WallClock>,
    pub sweeps: u32,
    /// What is in the flow table; it is one second young.
    pub flows: Vec<Flow>,
    pub refuse_clock: bool,
    /// Interfaces whose programs somebody takes off before the next look.
    pub stolen: Vec<u32>,
    pub hooks: Option<SocketHooks>,
    pub detached_all: bool,
    pub refuse_apply: bool,
    pub refuse_attach: bool,
    pub refuse_detach: bool,
    /// What each attachment takes.
    pub slow_attach: std::time::Duration,
    pub counters: Counters,
    pub running: Vec<Event>,
    /// The next record asked for ends the reader.
    pub poisoned: bool,
    pub size_class: u32,
    /// The image that judges, or will when the trial is confirmed.
    pub live: Option<Image>,
    /// What is on trial in the kernel: what came before, and until when.
    pub trial: Option<(Image, Instant)>,
    pub refuse_trial: bool,
    /// The next confirmation, and no other.
    pub refuse_confirm: bool,
    /// Steps of changes until one never returns: as if the daemon were killed there.
    pub halt: Option<u32>,
    pub halted: bool,
    /// Threads that were held up end.
    pub over: bool,
    pub refuse_revert: bool,
    /// What an earlier daemon has left.
    pub adopted: Option<Adopted>,
    pub outlives: bool,
    pub tampered: Vec<Tamper>,
    pub refuse_shadow: bool,
    /// The candidate, and where it differs.
    pub shadow: Option<Image>,
    pub differences: BTreeMap<DifferenceKey, Difference>,
    pub recorded: Vec<Event>,
    events: VecDeque<Event>,
    wake: Option<UnixStream>,
}

impl Fake {
    /// Hash of the image that judges packets now, as the programs find it.
    pub fn judges(&self) -> u64 {
        let expired = self
            .trial
            .as_ref()
            .filter(|(_, end)| *end <= Instant::now());
        let image = expired.map(|(previous, _)| previous).or(self.live.as_ref());
        image.map_or(0, Image::hash)
    }
}

/// A fake and the test's handle on it.
#[derive(Clone, Default)]
pub struct Handle(Arc<Mutex<Fake>>);

impl Handle {
    pub fn lock(&self) -> MutexGuard<'_, Fake> {
        self.0.lock().unwrap()
    }

    pub fn open(&self, size_class: u32) -> Box<dyn Dataplane> {
        self.lock().size_class = size_class;
        Box::new(self.clone())
    }

    /// As the daemon asks for it.
    pub fn open_or_adopt(&self, size_class: Option<u32>) -> Option<Box<dyn Dataplane>> {
        match size_class {
            Some(size_class) => Some(self.open(size_class)),
            None if self.adopted().unwrap().is_some() => Some(Box::new(self.clone())),
            None => None,
        }
    }

    /// Puts records into the ring buffer.
    pub fn emit(&self, events: &[Event]) {
        let mut fake = self.lock();
        fake.events.extend(events);
        let wake = fake.wake.as_mut().unwrap();
        wake.write_all(&[1]).unwrap();
    }
}

impl Handle {
    /// Where a daemon may be killed: before and after each change of the kernel.
    fn step(&self) -> Result<(), DataplaneError> {
        let mut fake = self.lock();
        match fake.halt {
            None => return Ok(()),
            Some(0) => (fake.halt, fake.halted) = (None, true),
            Some(left) => {
                fake.halt = Some(left - 1);
                return Ok(());
            }
        }
        drop(fake);
        while !self.lock().over {
            std::thread::sleep(Duration::from_millis(5));
        }
        Err(refused("killed"))
    }
}

fn refused(call: &str) -> DataplaneError {
    DataplaneError::Syscall {
        call: call.to_owned(),
        source: std::io::Error::from_raw_os_error(12),
    }
}

impl Dataplane for Handle {
    fn apply(&mut self, image: &Image) -> Result<(), DataplaneError> {
        self.step()?;
        let mut fake = self.lock();
        if fake.refuse_apply {
            return Err(refused("apply"));
        }
        assert!(fake.trial.is_none(), "applied during a trial");
        fake.applied.push((image.generation(), image.hash()));
        fake.live = Some(image.clone());
        drop(fake);
        self.step()
    }

    fn trial(
        &mut self,
        image: &Image,
        previous: Option<&Image>,
        within: Duration,
    ) -> Result<(), DataplaneError> {
        self.step()?;
        let mut fake = self.lock();
        assert!(fake.trial.is_none(), "a trial in a trial");
        if fake.refuse_trial {
            return Err(refused("trial"));
        }
        let previous = previous.or(fake.live.as_ref()).unwrap().clone();
        fake.trial = Some((previous, Instant::now() + within));
        fake.live = Some(image.clone());
        fake.applied.push((image.generation(), image.hash()));
        drop(fake);
        self.step()
    }

    fn on_trial(&self) -> Result<Option<OnTrial>, DataplaneError> {
        let fake = self.lock();
        let on = fake.trial.as_ref().map(|(previous, end)| OnTrial {
            remaining: end.saturating_duration_since(Instant::now()),
            live: fake.live.as_ref().unwrap().generation(),
            previous: previous.generation(),
        });
        Ok(on)
    }

    fn confirm(&mut self) -> Result<(), DataplaneError> {
        self.step()?;
        let mut fake = self.lock();
        let (_, end) = fake.trial.as_ref().unwrap();
        if end.saturating_duration_since(Instant::now()) < Duration::from_secs(1) {
            return Err(DataplaneError::Trial("too late"));
        }
        if std::mem::take(&mut fake.refuse_confirm) {
            return Err(refused("confirm"));
        }
        fake.trial = None;
        drop(fake);
        self.step()
    }

    fn revert(&mut self) -> Result<(), DataplaneError> {
        self.step()?;
        let mut fake = self.lock();
        if fake.refuse_revert {
            return Err(refused("revert"));
        }
        let (previous, _) = fake.trial.take().unwrap();
        fake.live = Some(previous);
        drop(fake);
        self.step()
    }

    fn apply_both(&mut self, previous: &Image, live: &Image) -> Result<(), DataplaneError> {
        self.step()?;
        let mut fake = self.lock();
        let trial = fake.trial.as_mut().unwrap();
        trial.0 = previous.clone();
        fake.live = Some(live.clone());
        let both = [previous, live].map(|image| (image.generation(), image.hash()));
        fake.applied.extend(both);
        drop(fake);
        self.step()
    }

    fn set_shadow(&mut self, image: Option<&Image>, anew: bool) -> Result<(), DataplaneError> {
        let mut fake = self.lock();
        if fake.refuse_shadow {
            return Err(refused("shadow"));
        }
        if anew || fake.shadow.is_none() {
            fake.differences.clear();
        }
        fake.shadow = image.cloned();
        Ok(())
    }

    fn shadow(&self) -> Result<Option<Image>, DataplaneError> {
        Ok(self.lock().shadow.clone())
    }

    fn differences(&self) -> Result<BTreeMap<DifferenceKey, Difference>, DataplaneError> {
        Ok(self.lock().differences.clone())
    }

    fn forget_differences(&mut self, keys: &[DifferenceKey]) -> Result<(), DataplaneError> {
        self.lock().differences.retain(|key, _| !keys.contains(key));
        Ok(())
    }

    fn adopted(&self) -> Result<Option<Adopted>, DataplaneError> {
        let fake = self.lock();
        if fake.adopted.is_some() || !fake.outlives {
            return Ok(fake.adopted.clone());
        }
        let newest = fake.applied.iter().map(|(generation, _)| *generation).max();
        let mut slots = fake.slots.clone();
        slots.retain(|ifindex, _| fake.attached.contains(ifindex));
        Ok(fake.live.clone().map(|live| Adopted {
            live: Some(live),
            generation: newest.unwrap_or(0),
            slots,
            clock: fake.clock,
        }))
    }

    fn outlives(&self) -> bool {
        self.lock().outlives
    }

    fn set_clock(&mut self, clock: WallClock) -> Result<(), DataplaneError> {
        let mut fake = self.lock();
        if fake.refuse_clock {
            return Err(refused("clock"));
        }
        let before = fake.clock.map_or(0, |clock| clock.unix_floor);
        assert!(before <= clock.unix_floor, "a floor that sinks");
        fake.clock = Some(clock);
        Ok(())
    }

    fn sweep(&mut self) -> Result<(), DataplaneError> {
        self.lock().sweeps += 1;
        Ok(())
    }

    fn flow_reader(&self) -> Result<Box<dyn FlowReader>, DataplaneError> {
        Ok(Box::new(Flows(self.lock().flows.clone())))
    }

    fn attach(&mut self, interface: &Interface) -> Result<(), DataplaneError> {
        let mut fake = self.lock();
        assert!(!fake.applied.is_empty(), "attached before a policy is live");
        if fake.refuse_attach {
            return Err(refused("attach"));
        }
        if fake.attached.insert(interface.ifindex) {
            std::thread::sleep(fake.slow_attach);
            fake.log.push(format!("attach {}", interface.ifindex));
        }
        fake.slots.insert(interface.ifindex, interface.slot);
        Ok(())
    }

    fn detach(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        let mut fake = self.lock();
        if fake.refuse_detach {
            return Err(refused("detach"));
        }
        fake.attached.remove(&ifindex);
        fake.log.push(format!("detach {ifindex}"));
        Ok(())
    }

    fn set_vlans(&mut self, keys: &BTreeSet<u64>) -> Result<(), DataplaneError> {
        let mut fake = self.lock();
        if fake.vlans != *keys {
            fake.vlans.clone_from(keys);
            fake.log.push(format!("vlans {keys:x?}"));
        }
        Ok(())
    }

    fn missing(&mut self) -> Result<Vec<u32>, DataplaneError> {
        Ok(std::mem::take(&mut self.lock().stolen))
    }

    fn inspect(&mut self) -> Result<Vec<Tamper>, DataplaneError> {
        Ok(std::mem::take(&mut self.lock().tampered))
    }

    fn read_back(&self) -> Result<Option<Image>, DataplaneError> {
        Ok(None)
    }

    fn socket_hooks(&mut self, mode: SocketHooks) -> Result<(), DataplaneError> {
        self.lock().hooks = Some(mode);
        Ok(())
    }

    fn counters(&self) -> Result<Counters, DataplaneError> {
        Ok(self.lock().counters.clone())
    }

    fn running_counts(&self) -> Result<Vec<Event>, DataplaneError> {
        Ok(self.lock().running.clone())
    }

    fn recorded_counts(&self) -> Result<Vec<Event>, DataplaneError> {
        Ok(self.lock().recorded.clone())
    }

    fn take_events(&mut self) -> Option<Box<dyn EventSource>> {
        let (wake, woken) = UnixStream::pair().unwrap();
        woken.set_nonblocking(true).unwrap();
        self.lock().wake = Some(wake);
        Some(Box::new(Source {
            handle: self.clone(),
            woken,
        }))
    }

    fn detach_all(&mut self) -> Result<(), DataplaneError> {
        let mut fake = self.lock();
        fake.attached.clear();
        fake.detached_all = true;
        Ok(())
    }
}

struct Flows(Vec<Flow>);

impl FlowReader for Flows {
    fn jiffies(&self) -> (u32, u32) {
        (100, 100)
    }

    fn each(&mut self, see: &mut dyn FnMut(&Flow)) -> Result<(), DataplaneError> {
        self.0.iter().for_each(see);
        Ok(())
    }
}

struct Source {
    handle: Handle,
    woken: UnixStream,
}

impl EventSource for Source {
    fn next(&mut self) -> Option<Event> {
        let _ = self.woken.read(&mut [0; 64]);
        let poisoned = self.handle.lock().poisoned;
        assert!(!poisoned, "a fault of the reader");
        self.handle.lock().events.pop_front()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.woken.as_fd()
    }
}
