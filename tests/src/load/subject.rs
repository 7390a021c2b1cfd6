//! What stands in the gateway while packets go through: nothing, an empty program, the enforcer,
//! nftables with the same policy.

use std::{
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use enforcer::{
    dataplane::{
        Dataplane as _, Interface, LinkType,
        kernel::{Keep, KernelDataplane, LoadOptions},
    },
    policy::model::{Environment, Policy},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{nftables, sender};
use crate::{
    kernel,
    netns::Netns,
    nft,
    rival::{self, Hook, Place},
};

/// The gateway's interfaces.
const INTERFACES: [&str; 2] = ["gw-a", "gw-b"];

/// Something that may stand in the gateway.
pub trait Subject {
    fn name(&self) -> &'static str;
    fn on(&mut self, gateway: &Netns);
    fn off(&mut self, gateway: &Netns);
}

/// Nothing.
pub struct Nothing;

impl Subject for Nothing {
    fn name(&self) -> &'static str {
        "nothing"
    }
    fn on(&mut self, _: &Netns) {}
    fn off(&mut self, _: &Netns) {}
}

/// A program without work on both hooks of both interfaces.
pub struct Empty {
    program: OwnedFd,
    links: Vec<OwnedFd>,
}

impl Empty {
    pub fn load() -> Self {
        const NEXT: i32 = -1;
        Self {
            program: rival::program(Hook::TcxIngress, NEXT).unwrap(),
            links: Vec::new(),
        }
    }
}

impl Subject for Empty {
    fn name(&self) -> &'static str {
        "empty"
    }

    fn on(&mut self, gateway: &Netns) {
        let program = &self.program;
        self.links = gateway.enter(|| {
            let hooks = [Hook::TcxIngress, Hook::TcxEgress];
            let all = INTERFACES.iter().flat_map(|i| hooks.map(|hook| (i, hook)));
            all.map(|(i, hook)| rival::on_interface(program, hook, i, Place::First).unwrap())
                .collect()
        });
    }

    fn off(&mut self, _: &Netns) {
        self.links.clear();
    }
}

/// The enforcer's programs as the daemon attaches them, and somebody who reads the records.
pub struct Enforcer {
    dataplane: KernelDataplane,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Enforcer {
    pub fn load(policy: &Policy) -> Self {
        let image = kernel::compile(policy, &Environment::default());
        let options = LoadOptions {
            image_words: image.words().len(),
            debug: false,
            flows: enforcer::dataplane::flows::DEFAULT_FLOWS,
            keep: Keep::Ephemeral,
            anew: false,
            extra: &[],
        };
        let mut dataplane = KernelDataplane::load(&options).unwrap();
        dataplane.apply(&image).unwrap();
        let mut events = dataplane.take_events().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let reader = thread::spawn(move || {
            sender::leave_cpu();
            while !stopped.load(Ordering::Relaxed) {
                let mut fds = [PollFd::new(events.fd(), PollFlags::POLLIN)];
                let timeout = PollTimeout::try_from(Duration::from_millis(50)).unwrap();
                let _ = poll(&mut fds, timeout);
                while events.next().is_some() {}
            }
        });
        Self {
            dataplane,
            stop,
            reader: Some(reader),
        }
    }
}

impl Drop for Enforcer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn index(interface: &str) -> u32 {
    nix::net::if_::if_nametoindex(interface).unwrap()
}

impl Subject for Enforcer {
    fn name(&self) -> &'static str {
        "enforcer"
    }

    fn on(&mut self, gateway: &Netns) {
        let dataplane = &mut self.dataplane;
        gateway.enter(|| {
            for (name, slot) in INTERFACES.into_iter().zip(1..) {
                let interface = Interface {
                    ifindex: index(name),
                    name: name.to_owned(),
                    link: LinkType::Ethernet,
                    slot,
                };
                dataplane.attach(&interface).unwrap();
            }
        });
    }

    fn off(&mut self, gateway: &Netns) {
        let dataplane = &mut self.dataplane;
        gateway.enter(|| {
            for name in INTERFACES {
                dataplane.detach(index(name)).unwrap();
            }
        });
    }
}

/// The same policy for nftables.
pub struct Nftables {
    rules: String,
}

impl Nftables {
    pub fn new(policy: &Policy) -> Self {
        let rules = nftables::ruleset(policy).unwrap();
        Self { rules }
    }
}

impl Subject for Nftables {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn on(&mut self, gateway: &Netns) {
        nft::nft(gateway, &self.rules);
    }

    fn off(&mut self, gateway: &Netns) {
        nft::nft(gateway, &format!("delete table {}\n", nftables::TABLE));
    }
}
