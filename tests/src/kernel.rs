//! The loaded programs under BPF_PROG_TEST_RUN.

use std::sync::atomic::{AtomicU32, Ordering};

use aya::{
    maps::HashMap,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use enforcer::{
    compile::{self, Image, Options},
    dataplane::{
        Counters, Dataplane as _, EventSource,
        kernel::{KernelDataplane, LoadOptions},
    },
    policy::model::{Environment, Policy},
};
use enforcer_common::{
    image::essential,
    verdict::{Hook, Outcome, Reason},
    wire::{Event, FlowEntry, FlowKey, FlowKey4},
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
    };
    compile::compile(policy, env, &options).expect("the policy compiles")
}

/// The programs, loaded and attached to nothing.
pub struct Programs {
    pub dataplane: KernelDataplane,
    pub events: Box<dyn EventSource>,
    last: Counters,
}

/// What one packet got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub passed: bool,
    pub outcome: Outcome,
    pub reason: Reason,
}

impl Programs {
    /// Loads the programs of the size class for `words` words.
    pub fn load(words: usize) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests load programs: run them as root"
        );
        let options = LoadOptions {
            image_words: words,
            debug: false,
        };
        let mut dataplane = KernelDataplane::load(&options).expect("the programs load");
        let events = dataplane.take_events().expect("the first to ask");
        let last = dataplane.counters().expect("counters");
        Self {
            dataplane,
            events,
            last,
        }
    }

    pub fn apply(&mut self, image: &Image) {
        self.dataplane.apply(image).expect("the image is applied");
    }

    /// Runs a frame through a hook's program; the raw action.
    pub fn run(&mut self, hook: Hook, frame: &[u8]) -> i32 {
        let program: &mut SchedClassifier = self
            .dataplane
            .ebpf_mut()
            .program_mut(hook.name())
            .unwrap()
            .try_into()
            .unwrap();
        let options = TestRunOptions {
            data_in: Some(frame),
            ..TestRunOptions::new()
        };
        program
            .test_run(options)
            .expect("the kernel runs it")
            .return_value
            .cast_signed()
    }

    pub fn counters(&self) -> Counters {
        self.dataplane.counters().expect("counters")
    }

    /// Empties both flow tables.
    pub fn forget_flows(&mut self) {
        fn empty<K: aya::Pod>(map: &mut aya::maps::Map) {
            let mut flows: HashMap<_, K, FlowEntry> = map.try_into().unwrap();
            let keys: Vec<K> = flows.keys().filter_map(Result::ok).collect();
            for key in keys {
                let _ = flows.remove(&key);
            }
        }
        empty::<FlowKey4>(self.dataplane.ebpf_mut().map_mut("FLOWS4").unwrap());
        empty::<FlowKey>(self.dataplane.ebpf_mut().map_mut("FLOWS6").unwrap());
    }

    /// Runs a frame and finds its counter: exactly one must have moved since the last call, by
    /// one. Every frame must come through here, or the difference is not one packet's.
    pub fn judge(&mut self, hook: Hook, frame: &[u8]) -> Verdict {
        let action = self.run(hook, frame);
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
