//! The boundary to the kernel: what the daemon may ask of it, and the types of the answers.
//!
//! [`kernel`] is the only module (with its children) that imports aya or makes bpf(2) calls.
//! Must not know: YAML, segment names, tokio, the control socket.

pub mod cgroup;
mod clsact;
mod elsewhere;
mod errors;
pub mod flows;
mod hooks;
mod images;
mod inspect;
pub mod kernel;
mod load;
mod objects;
mod off;
mod pins;
mod query;
mod resize;
mod shadow;
mod sys;
mod trial;

pub use elsewhere::{Elsewhere, elsewhere, enforcers_on};
pub use query::{Hanging, hanging};
#[cfg(feature = "testing")]
pub use sys::faults;
pub use sys::{clock_is_kept, peer_groups, release_memory, share_heaps};

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Duration,
};

use enforcer_common::{
    shadow::{Difference, DifferenceKey},
    table::Flow,
    verdict::{Hook, Outcome, Reason},
    wire::Event,
};

use crate::compile::Image;

/// The object of the smallest size class, for tests that load it themselves.
#[cfg(feature = "testing")]
pub fn smallest_object() -> &'static [u8] {
    objects::for_words(1).map_or(&[], |(_, object)| object)
}

/// The same for machines with weakly ordered memory.
#[cfg(feature = "testing")]
pub fn weak_object() -> &'static [u8] {
    objects::WEAK
}

/// What the socket hooks do with a call that TC would deny for every local source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SocketHooks {
    /// Refuse it with EPERM and record who asked (the default).
    #[default]
    Refuse,
    /// Let it go on to TC, which names the process.
    Observe,
    /// Do not attach them.
    Off,
}

/// How packets on an interface start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkType {
    /// With an Ethernet header.
    Ethernet,
    /// With the IP header (tun, GRE).
    Ip,
}

/// An interface to enforce on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Kernel index, never reused while the interface lives.
    pub ifindex: u32,
    /// Name at the time of attaching.
    pub name: String,
    /// How its packets start.
    pub link: LinkType,
    /// Its number in the interface bitmaps of images, 1 to 1023; 0: in none.
    pub slot: u32,
}

/// What turns time since boot into Unix time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WallClock {
    /// Unix seconds that the time of rules never goes back behind.
    pub unix_floor: u64,
    /// Unix time of the boot in nanoseconds.
    pub boot_unix_ns: u64,
}

/// A packet counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketCount {
    /// Where.
    pub hook: Hook,
    /// What happened.
    pub outcome: Outcome,
    /// Why.
    pub reason: Reason,
    /// Packets (socket hooks: calls) since the programs were loaded, summed over CPUs.
    pub packets: u64,
}

/// What became of records of denied packets, per hook. `emitted + suppressed + lost` is the
/// number of packets denied or would-be denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordCount {
    /// Where.
    pub hook: Hook,
    /// Packets with a record of their own.
    pub emitted: u64,
    /// Packets added to a running count.
    pub suppressed: u64,
    /// Packets of which the counters alone know.
    pub lost: u64,
    /// Suppressed packets that no record names (unless a scan saw them): their slot was taken over
    /// while the ring was full. Also among `suppressed`.
    pub displaced: u64,
    /// Flows the flow table took no entry for.
    pub flow_insert_failed: u64,
}

/// All counters at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Those above zero.
    pub packets: Vec<PacketCount>,
    /// One per hook.
    pub records: Vec<RecordCount>,
    /// How many flows of each family the flow table has room for.
    pub flows: u32,
}

/// What was in force before this process, and goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// The live image, read back; `None` when there is none, or it is not whole.
    pub live: Option<Image>,
    /// The largest generation that ever judged.
    pub generation: u32,
    /// Slots of interfaces, by ifindex.
    pub slots: BTreeMap<u32, u32>,
    /// What the programs were told of the time; `None`: nothing yet.
    pub clock: Option<WallClock>,
}

/// What was not as it had been left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tamper {
    /// What it was.
    pub target: String,
    /// What was wrong with it.
    pub what: String,
    /// Whether it is as it was again.
    pub repaired: bool,
}

impl Tamper {
    fn of(target: &str, what: &str, repaired: bool) -> Self {
        Self {
            target: target.to_owned(),
            what: what.to_owned(),
            repaired,
        }
    }
}

/// Another enforcer's programs and pins, beside those of this one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Beside {
    /// Where they are pinned; `None`: nowhere that is known.
    pub pins: Option<PathBuf>,
    /// Interfaces on which both judge.
    pub interfaces: BTreeSet<String>,
}

/// A trial in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnTrial {
    /// Time until the programs go back by themselves; zero: they have.
    pub remaining: Duration,
    /// Generation of the image on trial.
    pub live: u32,
    /// Generation of the image to go back to.
    pub previous: u32,
}

/// What the kernel, or this process, said no to. Nothing was changed unless said otherwise.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// Something that the machine must have is missing: exit code 3.
    #[error("{what}\n  help: {help}")]
    Environment {
        /// What is missing.
        what: String,
        /// What to do about it.
        help: String,
    },
    /// The kernel refused a program or map.
    #[error("cannot load the kernel programs: {message}")]
    Load {
        /// The loader's chain of errors; the verifier's last lines if it was the verifier.
        message: String,
    },
    /// An image larger than the loaded size class.
    #[error(
        "the policy image needs {needed} words; the loaded programs take {limit}{}",
        remedy(*needed)
    )]
    ImageTooLarge {
        /// Words of the image.
        needed: usize,
        /// Words of the loaded size class.
        limit: usize,
    },
    /// One system call failed.
    #[error("{call}: {source}")]
    Syscall {
        /// What was attempted, in words.
        call: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// Asked for what does not go with the trial that is, or is not, running.
    #[error("{0}")]
    Trial(&'static str),
    /// A trial cannot be ended: somebody has unpinned the image that it goes back to. Another image that
    /// is applied ends it.
    #[error("the image that was in force before the trial is pinned no more")]
    LostPrevious,
    /// A program could not be attached.
    #[error("cannot attach {hook} to {target}: {message}")]
    Attach {
        /// Program.
        hook: &'static str,
        /// Interface name or cgroup path.
        target: String,
        /// The kernel's answer.
        message: String,
    },
}

/// What helps against an image that is too large for the loaded programs.
fn remedy(needed: usize) -> &'static str {
    let mut classes = enforcer_common::image::SIZE_CLASSES.iter();
    if classes.any(|words| needed <= *words as usize) {
        ": restart the daemon to load it"
    } else {
        ", and there are no larger ones"
    }
}

/// What the daemon asks of the kernel. Order: [`Dataplane::apply`] first, then attach; programs
/// without an image drop everything.
pub trait Dataplane: Send {
    /// Makes `image` the live policy by one pointer write. Every packet is judged wholly by the
    /// old or wholly by the new image; on error the old one stays.
    ///
    /// # Errors
    /// [`DataplaneError`]; nothing has changed then.
    fn apply(&mut self, image: &Image) -> Result<(), DataplaneError>;

    /// Puts an image on trial: the one in force, or `previous` if one is given, is judged by again
    /// once `within` has passed, by the programs themselves, whether a daemon lives or not.
    ///
    /// # Errors
    /// [`DataplaneError::Trial`] while one is running, [`DataplaneError`]; the image in force stays.
    fn trial(
        &mut self,
        image: &Image,
        previous: Option<&Image>,
        within: Duration,
    ) -> Result<(), DataplaneError>;

    /// The trial that is running, or has expired and was not reverted yet.
    ///
    /// # Errors
    /// [`DataplaneError`].
    fn on_trial(&self) -> Result<Option<OnTrial>, DataplaneError>;

    /// The image on trial stays.
    ///
    /// # Errors
    /// [`DataplaneError::Trial`] within its last second, or when none is running.
    fn confirm(&mut self) -> Result<(), DataplaneError>;

    /// Ends a trial by the image before it; also after the programs have gone back by themselves.
    ///
    /// # Errors
    /// [`DataplaneError`]; the deadline stands. [`DataplaneError::LostPrevious`] when there is nothing to
    /// go back to but what the programs go back to by themselves.
    fn revert(&mut self) -> Result<(), DataplaneError>;

    /// Puts others in the place of both images of a trial, the one to go back to first.
    ///
    /// # Errors
    /// [`DataplaneError`]; the second may be the old one.
    fn apply_both(&mut self, previous: &Image, live: &Image) -> Result<(), DataplaneError>;

    /// Has the programs ask a candidate beside the image in force, or no more; what they drop stays
    /// the same. Its generation must be none that ever judged. The counts begin anew if they are to, or
    /// if there was no candidate.
    ///
    /// # Errors
    /// [`DataplaneError`]. What [`Dataplane::shadow`] says then is asked: the last candidate if the
    /// image could not be taken, perhaps none if the kernel refused to change over.
    fn set_shadow(&mut self, image: Option<&Image>, anew: bool) -> Result<(), DataplaneError>;

    /// The candidate that is asked, read back.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    fn shadow(&self) -> Result<Option<Image>, DataplaneError>;

    /// Where the candidate said something else than the image in force.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    fn differences(&self) -> Result<BTreeMap<DifferenceKey, Difference>, DataplaneError>;

    /// Takes counts out to which nothing is added any more.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    fn forget_differences(&mut self, keys: &[DifferenceKey]) -> Result<(), DataplaneError>;

    /// What an earlier daemon has left at work.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    fn adopted(&self) -> Result<Option<Adopted>, DataplaneError>;

    /// Whether enforcement goes on when this is dropped.
    fn outlives(&self) -> bool;

    /// Where that is pinned which outlives this.
    fn pins(&self) -> Option<PathBuf> {
        None
    }

    /// Other enforcers whose pins are for the same network namespace, or whose programs were on the
    /// same hooks at the last [`Dataplane::inspect`].
    fn beside(&self) -> Vec<Beside> {
        Vec::new()
    }

    /// Tells the programs the time; before the first image, and when the clock was set.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    fn set_clock(&mut self, clock: WallClock) -> Result<(), DataplaneError>;

    /// Takes expired flows out of the table. Before 2³¹ ticks have gone by since the last time (24
    /// days at 1 000 Hz), or ages begin anew.
    ///
    /// # Errors
    /// [`DataplaneError`].
    fn sweep(&mut self) -> Result<(), DataplaneError>;

    /// Makes a reader of the flow table.
    ///
    /// # Errors
    /// [`DataplaneError`].
    fn flow_reader(&self) -> Result<Box<dyn FlowReader>, DataplaneError>;

    /// Attaches `tc_ingress` and `tc_egress`; of an interface that has them only the slot is
    /// written anew.
    ///
    /// # Errors
    /// [`DataplaneError::Attach`]; neither hook stays attached then.
    fn attach(&mut self, interface: &Interface) -> Result<(), DataplaneError>;

    /// Forgets an interface that is gone, or takes the programs off one that is there.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    fn detach(&mut self, ifindex: u32) -> Result<(), DataplaneError>;

    /// Leaves packets with these tags, and no others, to the programs on their VLAN device; see
    /// [`enforcer_common::wire::vlan_key`]. The caller sees to it that the device has programs.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`]; call it again.
    fn set_vlans(&mut self, keys: &BTreeSet<u64>) -> Result<(), DataplaneError>;

    /// Asks the kernel which of the interfaces that were attached lack a program of ours: taken off
    /// by others, or gone with the interface. [`Dataplane::detach`] forgets them.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    fn missing(&mut self) -> Result<Vec<u32>, DataplaneError>;

    /// Looks whether settings, images, hooks and pins are as they were left, and puts them back. What
    /// is missing on interfaces is [`Dataplane::missing`].
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    fn inspect(&mut self) -> Result<Vec<Tamper>, DataplaneError>;

    /// The image in force, read back from the kernel.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`]; `None` when there is none, or it is not whole.
    fn read_back(&self) -> Result<Option<Image>, DataplaneError>;

    /// Attaches the socket hooks to the root cgroup, or changes what they do. `Refuse` is the
    /// caller's promise that every interface but loopback is enforced.
    ///
    /// # Errors
    /// [`DataplaneError::Attach`].
    fn socket_hooks(&mut self, mode: SocketHooks) -> Result<(), DataplaneError>;

    /// Reads all counters.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    fn counters(&self) -> Result<Counters, DataplaneError>;

    /// Running counts of denied flows (at most one per CPU and slot): picks up packets that no
    /// ring buffer record has carried yet. `Event::total` is the count so far.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    fn running_counts(&self) -> Result<Vec<Event>, DataplaneError>;

    /// Counts of denied flows as of their last records in the ring: what a reader of the ring knows.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    fn recorded_counts(&self) -> Result<Vec<Event>, DataplaneError>;

    /// The stream of records; `None` when it was taken before.
    fn take_events(&mut self) -> Option<Box<dyn EventSource>>;

    /// Takes every program off. Enforcement ends.
    ///
    /// # Errors
    /// The first [`DataplaneError::Syscall`]; what is off then comes back with the next
    /// [`Dataplane::inspect`] and [`Dataplane::attach`].
    fn detach_all(&mut self) -> Result<(), DataplaneError>;
}

/// Reads the flow table while packets go on: it holds nobody up, and needs no lock of its own.
pub trait FlowReader: Send {
    /// The low half of jiffies when it was made, and how many there are in a second.
    fn jiffies(&self) -> (u32, u32);

    /// Calls `see` with each entry, expired ones among them, as it is while it is read.
    ///
    /// # Errors
    /// [`DataplaneError::Syscall`].
    fn each(&mut self, see: &mut dyn FnMut(&Flow)) -> Result<(), DataplaneError>;
}

/// A stream of records from the kernel.
pub trait EventSource: Send {
    /// The next record that is there, without waiting.
    fn next(&mut self) -> Option<Event>;
    /// A descriptor that polls readable when there are records.
    fn fd(&self) -> std::os::fd::BorrowedFd<'_>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_grew_says_what_helps() {
        let error = |needed| {
            let limit = 1;
            DataplaneError::ImageTooLarge { needed, limit }.to_string()
        };
        assert!(error(2).ends_with(": restart the daemon to load it"));
        assert!(!error(usize::MAX).contains("restart"));
    }
}
