//! The loaded programs under BPF_PROG_TEST_RUN.

use std::sync::{
    LazyLock, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU32, Ordering},
};

use aya::{
    maps::{Array, HashMap, PerCpuArray, PerCpuValues},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use enforcer::{
    compile::{self, Image, Options},
    dataplane::{
        Counters, Dataplane as _, EventSource, PacketCount, RecordCount, WallClock,
        kernel::{Keep, KernelDataplane, LoadOptions},
    },
    policy::model::{Environment, Policy},
};
use enforcer_common::{
    image::{SIZE_CLASSES, essential},
    verdict::{Hook, Outcome, Reason},
    wire::{
        DENIED_SLOTS, DeniedSlot, ETHERNET_LINKS, Event, FlowEntry, FlowKey, FragmentEntry,
        FragmentKey, INTERFACE_L3, Interface,
    },
};

static GENERATION: AtomicU32 = AtomicU32::new(1);

/// A generation that no other test of this process uses.
pub fn generation() -> u32 {
    GENERATION.fetch_add(1, Ordering::Relaxed)
}

/// Compiles with a fresh generation and every essential on.
pub fn compile(policy: &Policy, env: &Environment) -> Image {
    let options = Options {
        generation: generation(),
        essentials: essential::ALL,
        ..Options::default()
    };
    compile::compile(policy, env, &options).expect("the policy compiles")
}

/// The programs, loaded and attached to nothing.
pub struct Programs {
    pub dataplane: KernelDataplane,
    pub events: Box<dyn EventSource>,
    last: Counters,
    /// What `count` and `records` count from.
    base: Counters,
}

/// Packets counted at a hook with these outcomes, whatever the reason.
fn packets(counters: &Counters, hook: Hook, outcomes: &[Outcome]) -> u64 {
    let here = |c: &&PacketCount| c.hook == hook && outcomes.contains(&c.outcome);
    let packets = counters.packets.iter().filter(here);
    packets.map(|c| c.packets).sum()
}

/// Flows that the table of each family holds: fewer than a daemon's, for tests that fill it.
pub const FLOWS: u32 = 1 << 14;

/// A flow table, copied.
pub type Flows = std::collections::HashMap<FlowKey, FlowEntry>;

/// Keeps this thread on the CPU it is on, so that per-CPU aggregation sees all of its packets.
pub fn pin() {
    // SAFETY: no arguments, no effects.
    let cpu = unsafe { libc::sched_getcpu() };
    let mut set = nix::sched::CpuSet::new();
    set.set(usize::try_from(cpu).unwrap()).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
}

/// What one packet got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub passed: bool,
    pub outcome: Outcome,
    pub reason: Reason,
}

impl Programs {
    /// Loads the programs of the size class for `words` words, with a table of [`FLOWS`].
    pub fn load(words: usize) -> Self {
        Self::load_for(words, FLOWS)
    }

    /// Loads the programs with a table of `flows` of each family.
    pub fn load_for(words: usize, flows: u32) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests load programs: run them as root"
        );
        let options = LoadOptions {
            image_words: words,
            debug: false,
            flows,
            keep: Keep::Ephemeral,
            anew: false,
            extra: &["verdict"],
        };
        let mut dataplane = KernelDataplane::load(&options).expect("the programs load");
        let events = dataplane.take_events().expect("the first to ask");
        let last = dataplane.counters().expect("counters");
        let mut this = Self {
            dataplane,
            events,
            base: last.clone(),
            last,
        };
        // Loopback is what frames seem to come in at: known to be Ethernet, so that they may go
        // the short way.
        this.set_interface(1, 0, 0);
        this
    }

    /// The smallest size class, loaded once for all tests of a binary: the verifier takes two
    /// seconds. As good as new, but for the image of the test before.
    pub fn shared() -> MutexGuard<'static, Self> {
        static SHARED: LazyLock<Mutex<Programs>> =
            LazyLock::new(|| Mutex::new(Programs::load(SIZE_CLASSES[0] as usize)));
        let mut programs = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        pin();
        programs.forget_flows();
        programs.set_interface(1, 0, 0);
        programs.set_unix(0);
        let map = programs.dataplane.map_mut("DENIED").unwrap();
        let mut slots: PerCpuArray<_, DeniedSlot> = map.try_into().unwrap();
        let cpus = aya::util::nr_cpus().unwrap();
        // SAFETY: all zeros is a slot never used.
        let unused = unsafe { std::mem::zeroed::<DeniedSlot>() };
        for index in 0..DENIED_SLOTS {
            let values = PerCpuValues::try_from(vec![unused; cpus]).unwrap();
            slots.set(index, values, 0).unwrap();
        }
        programs.drain();
        programs.settle();
        programs.base = programs.last.clone();
        programs
    }

    pub fn apply(&mut self, image: &Image) {
        self.dataplane.apply(image).expect("the image is applied");
    }

    /// Runs a frame through a hook's program; the raw action.
    pub fn run(&mut self, hook: Hook, frame: &[u8]) -> i32 {
        self.run_often(hook, frame, 1).0
    }

    /// Runs a frame `times` times on one CPU; the last action and the frame as it comes out.
    pub fn run_often(&mut self, hook: Hook, frame: &[u8], times: u32) -> (i32, Vec<u8>) {
        self.run_with(hook, frame, None, times)
    }

    /// Runs a frame as one of an interface of the caller's namespace.
    pub fn run_at(&mut self, hook: Hook, ifindex: u32, frame: &[u8]) -> i32 {
        // `struct __sk_buff`: of the fields that may be given, this one alone.
        let mut context = [0; 192];
        let at = 10 * size_of::<u32>();
        context[at..at + 4].copy_from_slice(&ifindex.to_ne_bytes());
        self.run_with(hook, frame, Some(&context), 1).0
    }

    fn run_with(
        &mut self,
        hook: Hook,
        frame: &[u8],
        context: Option<&[u8]>,
        times: u32,
    ) -> (i32, Vec<u8>) {
        let mut out = vec![0; frame.len() + 256];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: context,
            repeat: times,
            ..TestRunOptions::new()
        };
        let program = self.program(hook);
        let result = program.test_run(options).expect("the kernel runs it");
        out.truncate(result.data_size_out as usize);
        (result.return_value.cast_signed(), out)
    }

    fn program(&self, hook: Hook) -> &SchedClassifier {
        self.dataplane.program(hook.name()).unwrap()
    }

    /// Runs `count` frames, each made of the one before by `next` from its number; how many of
    /// them passed.
    pub fn flood(
        &mut self,
        hook: Hook,
        frame: &mut [u8],
        count: usize,
        mut next: impl FnMut(&mut [u8], usize),
    ) -> usize {
        let program = self.program(hook);
        let mut passed = 0;
        for number in 0..count {
            next(frame, number);
            let options = TestRunOptions {
                data_in: Some(frame),
                ..TestRunOptions::new()
            };
            let result = program.test_run(options).expect("the kernel runs it");
            passed += usize::from(result.return_value.cast_signed() == -1);
        }
        passed
    }

    pub fn counters(&self) -> Counters {
        self.dataplane.counters().expect("counters")
    }

    /// Forgets what `judge` saw last, after frames that did not come through it.
    pub fn settle(&mut self) {
        self.last = self.counters();
    }

    /// Packets counted at a hook with this outcome, whatever the reason.
    pub fn count(&self, hook: Hook, outcome: Outcome) -> u64 {
        let counters = self.counters();
        packets(&counters, hook, &[outcome]) - packets(&self.base, hook, &[outcome])
    }

    /// The fates of records at a hook, after checking that each denial has exactly one.
    pub fn records(&self, hook: Hook) -> RecordCount {
        let counters = self.counters();
        let judged_denied = [Outcome::Denied, Outcome::WouldDeny];
        for records in &counters.records {
            let judged = packets(&counters, records.hook, &judged_denied);
            let accounted = records.emitted + records.suppressed + records.lost;
            assert_eq!(judged, accounted, "{records:?}");
        }
        let of = |counters: &Counters| *counters.records.iter().find(|r| r.hook == hook).unwrap();
        let (now, base) = (of(&counters), of(&self.base));
        RecordCount {
            hook,
            emitted: now.emitted - base.emitted,
            suppressed: now.suppressed - base.suppressed,
            lost: now.lost - base.lost,
            displaced: now.displaced - base.displaced,
            flow_insert_failed: now.flow_insert_failed - base.flow_insert_failed,
        }
    }

    /// Both flow tables, IPv4 first.
    pub fn flows(&mut self) -> (Flows, Flows) {
        let flows = self.dataplane.flows().expect("the flow table can be read");
        let flows = flows.into_iter().map(|flow| (flow.key, flow.entry));
        let (v6, v4): (Vec<_>, Vec<_>) = flows.partition(|(key, _)| key.is_v6());
        let (count4, count6) = (v4.len(), v6.len());
        let (v4, v6): (Flows, Flows) = (v4.into_iter().collect(), v6.into_iter().collect());
        assert_eq!((v4.len(), v6.len()), (count4, count6), "a key in two slots");
        (v4, v6)
    }

    /// How the kernel sees the packets of an interface (`INTERFACE_*` bits).
    pub fn set_interface(&mut self, ifindex: u32, flags: u32, slot: u32) {
        let map = self.dataplane.map_mut("INTERFACES").unwrap();
        let mut interfaces: HashMap<_, u32, Interface> = map.try_into().unwrap();
        interfaces
            .insert(ifindex, Interface { flags, slot }, 0)
            .unwrap();
        self.short_ways(ifindex, (flags & INTERFACE_L3 == 0).then_some(slot));
    }

    /// Lets packets of an interface in this slot go the shorter ways; `None`: none of them.
    pub fn short_ways(&mut self, ifindex: u32, slot: Option<u32>) {
        let map = self.dataplane.map_mut("ETHERNET").unwrap();
        let mut ethernet: Array<_, [u32; 2]> = map.try_into().unwrap();
        let known = slot.map_or([0, 0], |slot| [ifindex, slot]);
        ethernet
            .set(ifindex & (ETHERNET_LINKS - 1), known, 0)
            .unwrap();
    }

    /// Stops the time of rules at this Unix second: the floor holds it there, for the computed
    /// time starts at 0 now.
    pub fn set_unix(&mut self, unix: u64) {
        let boot = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).unwrap();
        let boot = std::time::Duration::from(boot).as_nanos() as u64;
        let clock = WallClock {
            unix_floor: unix,
            boot_unix_ns: 0u64.wrapping_sub(boot),
        };
        self.dataplane.set_clock(clock).expect("the clock is set");
    }

    /// Empties both flow tables.
    pub fn forget_flows(&mut self) {
        self.dataplane.forget_flows().expect("flows are forgotten");
        let map = self.dataplane.map_mut("FRAGMENTS").unwrap();
        let mut fragments: HashMap<_, FragmentKey, FragmentEntry> = map.try_into().unwrap();
        let keys: Vec<_> = fragments.keys().filter_map(Result::ok).collect();
        for key in keys {
            let _ = fragments.remove(&key);
        }
    }

    /// Runs a frame and finds its counter: exactly one must have moved since the last call, by
    /// one. Every frame must come through here, or the difference is not one packet's.
    pub fn judge(&mut self, hook: Hook, frame: &[u8]) -> Verdict {
        let action = self.run(hook, frame);
        self.judged(hook, action)
    }

    /// The same as one of an interface of the caller's namespace.
    pub fn judge_at(&mut self, hook: Hook, ifindex: u32, frame: &[u8]) -> Verdict {
        let action = self.run_at(hook, ifindex, frame);
        self.judged(hook, action)
    }

    fn judged(&mut self, hook: Hook, action: i32) -> Verdict {
        let after = self.counters();
        let before = std::mem::replace(&mut self.last, after.clone());
        let mut moved = after.packets.iter().filter_map(|a| {
            let old = before
                .packets
                .iter()
                .find(|b| (b.hook, b.outcome, b.reason) == (a.hook, a.outcome, a.reason))
                .map_or(0, |b| b.packets);
            (a.packets != old).then_some((a, a.packets - old))
        });
        let (counter, by) = moved.next().expect("a counter moved");
        assert_eq!(
            (by, moved.next()),
            (1, None),
            "exactly one counter moved, by one"
        );
        assert_eq!(counter.hook, hook);
        let passed = match action {
            -1 => true,
            2 => false,
            other => panic!("action {other}"),
        };
        assert_eq!(passed, counter.outcome.passes(), "action and counter agree");
        Verdict {
            passed,
            outcome: counter.outcome,
            reason: counter.reason,
        }
    }

    /// All records that are there.
    pub fn drain(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.events.next()).collect()
    }
}
