//! The packet path on the host: the same parser and judgement as in the kernel, over a hash map.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
};

use enforcer::{
    compile::Image,
    policy::{
        model::{Environment, Policy},
        parse::{SourceFile, parse},
    },
};
use enforcer_common::{
    decide::{self, Decision, Time},
    flow::{Change, Clock, FlowSlot, FlowTable, Glance, Glances},
    judge::{self, Scene},
    opening,
    packet::{self, Bytes, Link, Packet},
    swift,
    verdict::Reason,
    wire::{FlowEntry, FlowKey, FragmentEntry, FragmentKey},
};

use crate::kernel;

/// Ticks a second of the host's clock.
pub const HZ: u32 = 100;

/// The policy that a text says, through the real parser.
pub fn policy(text: &str) -> Policy {
    let file = SourceFile {
        name: "test.yaml".to_owned(),
        text: text.to_owned(),
    };
    parse(&[file]).unwrap_or_else(|errors| panic!("{errors:?}\n{text}"))
}

/// The image of a policy's text, of a fresh generation. The host has no addresses.
pub fn image(text: &str) -> Image {
    kernel::compile(&policy(text), &Environment::default())
}

/// A flow table of unlimited size.
#[derive(Default)]
pub struct HashFlows {
    pub entries: RefCell<HashMap<FlowKey, Entry>>,
    pub fragments: RefCell<HashMap<FragmentKey, FragmentEntry>>,
    /// Takes no new entries.
    pub full: Cell<bool>,
}

#[derive(Clone)]
pub struct Entry(pub Rc<Cell<FlowEntry>>);

impl FlowSlot for Entry {
    fn load(&self) -> FlowEntry {
        self.0.get()
    }

    fn touch(&self, now: u64, _: u32) {
        let mut entry = self.0.get();
        entry.last_seen = now;
        self.0.set(entry);
    }

    fn change(&self, change: &Change) {
        let mut entry = self.0.get();
        change.apply(&mut entry);
        self.0.set(entry);
    }
}

impl HashFlows {
    /// As it is now.
    fn copy(&self) -> Self {
        let entries = self.entries.borrow();
        let entry = |(k, e): (&FlowKey, &Entry)| (*k, Entry(Rc::new(Cell::new(e.load()))));
        Self {
            entries: RefCell::new(entries.iter().map(entry).collect()),
            fragments: RefCell::new(self.fragments.borrow().clone()),
            full: self.full.clone(),
        }
    }
}

impl Glances for HashFlows {
    type Slot = Entry;

    fn glance(&self, key: &FlowKey) -> Glance<Entry> {
        match self.find(key) {
            Some(entry) => Glance::Entry(entry),
            None => Glance::Nothing,
        }
    }
}

impl FlowTable for HashFlows {
    type Slot = Entry;

    fn find(&self, key: &FlowKey) -> Option<Entry> {
        self.entries.borrow().get(key).cloned()
    }

    fn insert(&self, key: &FlowKey, entry: &FlowEntry) -> bool {
        if self.full.get() {
            return false;
        }
        let entry = Entry(Rc::new(Cell::new(*entry)));
        self.entries.borrow_mut().insert(*key, entry);
        true
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentEntry> {
        self.fragments.borrow().get(key).copied()
    }

    fn insert_fragment(&self, key: &FragmentKey, entry: &FragmentEntry) -> bool {
        if self.full.get() {
            return false;
        }
        self.fragments.borrow_mut().insert(*key, *entry);
        true
    }
}

/// A moment of the host's clocks.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub boot: u32,
    pub unix: u64,
}

impl Time for Moment {
    fn boot(&self) -> u32 {
        self.boot
    }

    fn unix(&self) -> u64 {
        self.unix
    }
}

/// What came of one packet.
pub struct Seen {
    /// As far as it was read.
    pub packet: Packet,
    pub form: Result<(), Reason>,
    pub decision: Decision,
}

/// The whole path of one packet, with nothing kept but `flows`.
pub fn see<B: Bytes + ?Sized>(
    image: &Image,
    flows: &HashFlows,
    scene: &Scene<Moment>,
    bytes: &B,
) -> Seen {
    let mut packet = Packet::EMPTY;
    let form = packet::parse(bytes, &scene.link, &mut packet);
    let judgement = judge::judge(image.words(), flows, &mut packet, scene, form);
    Seen {
        packet,
        form,
        decision: judgement.decision,
    }
}

/// A host with a policy, a flow table and a clock that stands still.
pub struct Host {
    pub image: Image,
    pub flows: HashFlows,
    /// Jiffies, [`HZ`] a second.
    pub now: u64,
    pub ifindex: u32,
    /// The interface's slot.
    pub slot: u32,
    pub time: Moment,
}

impl Host {
    pub fn new(image: Image) -> Self {
        Self {
            image,
            flows: HashFlows::default(),
            // Not 0: a clock that starts there hides subtractions.
            now: 1_000_000,
            ifindex: 1,
            slot: 0,
            time: Moment {
                boot: 10_000,
                unix: 1_800_000_000,
            },
        }
    }

    pub fn judge(&mut self, ingress: bool, frame: &[u8]) -> Decision {
        let link = Link {
            ethernet: true,
            protocol: 0,
            vlan: None,
            ingress,
            ifindex: self.ifindex,
            slot: self.slot,
            gso: false,
            looped: false,
        };
        self.judge_on(link, frame)
    }

    /// Judges a frame of which this much is known.
    pub fn judge_on(&mut self, link: Link, frame: &[u8]) -> Decision {
        let scene = Scene {
            link,
            clock: Clock {
                now: self.now,
                hz: HZ,
            },
            time: self.time,
        };
        // Whatever a shorter way settles, the long way settles alike, and leaves the same behind.
        let small = self.flows.entries.borrow().len() < 100;
        let shorter = small.then(|| self.flows.copy()).and_then(|flows| {
            let decision = self.shorter(&flows, &scene, frame)?;
            Some((decision, flows))
        });
        let decision = see(&self.image, &self.flows, &scene, frame).decision;
        if let Some((shorter, flows)) = shorter {
            assert_eq!(
                (decision.outcome, decision.reason),
                (shorter.outcome, shorter.reason)
            );
            if shorter.reason != Reason::Established {
                assert_eq!(decision, shorter);
            }
            let entries = self.flows.entries.borrow();
            assert_eq!(entries.len(), flows.entries.borrow().len());
            for (key, entry) in flows.entries.borrow().iter() {
                assert_eq!(entries[key].load(), entry.load(), "{key:?}");
            }
        }
        decision
    }

    /// What the short way or the middle one says, if they settle it.
    fn shorter(&self, flows: &HashFlows, scene: &Scene<Moment>, frame: &[u8]) -> Option<Decision> {
        if !swift::may(&scene.link) {
            return None;
        }
        let moment = swift::Moment {
            ingress: scene.link.ingress,
            ifindex: scene.link.ifindex,
            slot: scene.link.slot,
            generation: decide::generation(self.image.words()),
            clock: scene.clock,
        };
        let packet = swift::read(frame)?;
        match swift::look(flows, &packet, &moment, 0) {
            swift::Known::Established => Some(Decision::pass(Reason::Established)),
            swift::Known::Entry => None,
            swift::Known::Nothing => {
                let mut case = opening::case(&packet, &moment);
                if !opening::settle(self.image.words(), &scene.time, &mut case) {
                    return None;
                }
                let (key, entry) = opening::flow(&case);
                let outcome = case.outcome();
                if outcome.passes() && !flows.insert(&key, &entry) {
                    return None;
                }
                Some(Decision {
                    outcome,
                    reason: case.reason(),
                    rule: case.rule,
                    segment: case.segment,
                })
            }
        }
    }

    /// Lets seconds go by.
    pub fn wait(&mut self, seconds: u64) {
        self.now += seconds * u64::from(HZ);
        self.time.boot += seconds as u32;
        self.time.unix += seconds;
    }

    /// The only entry of the table.
    pub fn only(&self) -> FlowEntry {
        let entries = self.flows.entries.borrow();
        assert_eq!(entries.len(), 1, "one entry");
        entries.values().next().unwrap().load()
    }
}
