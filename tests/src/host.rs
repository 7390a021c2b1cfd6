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
    decide::Decision,
    flow::{Clock, FlowSlot, FlowTable},
    judge,
    packet::{self, Bytes, Link, Packet},
    verdict::Reason,
    wire::{FlowEntry, FlowKey},
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
    /// Takes no new entries.
    pub full: Cell<bool>,
}

#[derive(Clone)]
pub struct Entry(pub Rc<Cell<FlowEntry>>);

impl FlowSlot for Entry {
    fn load(&self) -> FlowEntry {
        self.0.get()
    }

    fn touch(&self, now: u64, flags: u32) {
        let mut entry = self.0.get();
        entry.last_seen = now;
        entry.flags |= flags;
        self.0.set(entry);
    }

    fn admit(&self, generation: u32, rule: u32) {
        let mut entry = self.0.get();
        entry.generation = generation;
        entry.rule = rule;
        self.0.set(entry);
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
}

/// What came of one packet.
pub struct Seen {
    /// As far as it was read.
    pub packet: Packet,
    pub form: Result<(), Reason>,
    pub decision: Decision,
}

/// The whole path of one packet at the time `now`, with nothing kept but `flows`.
pub fn judge_on<B: Bytes + ?Sized>(
    image: &Image,
    flows: &HashFlows,
    now: u64,
    link: &Link,
    bytes: &B,
) -> Seen {
    let clock = Clock { now, hz: HZ };
    let mut packet = Packet::EMPTY;
    let form = packet::parse(bytes, link, &mut packet);
    let decision = match form {
        Ok(()) => judge::judge(image.words(), flows, &packet, &clock).decision,
        Err(reason) => judge::judge_form(image.words(), &packet, reason),
    };
    Seen {
        packet,
        form,
        decision,
    }
}

/// A host with a policy, a flow table and a clock that stands still.
pub struct Host {
    pub image: Image,
    pub flows: HashFlows,
    /// Jiffies, [`HZ`] a second.
    pub now: u64,
    pub ifindex: u32,
}

impl Host {
    pub fn new(image: Image) -> Self {
        Self {
            image,
            flows: HashFlows::default(),
            // Not 0: a clock that starts there hides subtractions.
            now: 1_000_000,
            ifindex: 1,
        }
    }

    pub fn judge(&mut self, ingress: bool, frame: &[u8]) -> Decision {
        let link = Link {
            ethernet: true,
            protocol: 0,
            vlan: None,
            ingress,
            ifindex: self.ifindex,
        };
        judge_on(&self.image, &self.flows, self.now, &link, frame).decision
    }

    /// Lets seconds go by.
    pub fn wait(&mut self, seconds: u64) {
        self.now += seconds * u64::from(HZ);
    }

    /// The only entry of the table.
    pub fn only(&self) -> FlowEntry {
        let entries = self.flows.entries.borrow();
        assert_eq!(entries.len(), 1, "one entry");
        entries.values().next().unwrap().load()
    }
}
