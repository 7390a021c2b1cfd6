//! Every map, and the traits of the shared core on top of them.

use aya_ebpf::{
    bindings::BPF_F_RDONLY_PROG,
    btf_maps::{Array, ArrayOfMaps, HashMap, LruHashMap, PerCpuArray, ProgramArray, RingBuf},
    helpers::generated::{bpf_jiffies64, bpf_ktime_get_boot_ns},
    macros::btf_map,
    programs::TcContext,
};
use enforcer_common::{
    case::Case,
    decide::{self, Decision, Time},
    image::Words,
    judge::{Plan, Scene},
    packet::Packet,
    shadow::Said,
    table::Found,
    verdict::{COUNTERS as COUNTER_COUNT, Hook},
    wire::{
        CONTROL_SHADOW, Control, DENIED_SLOTS, DeniedSlot, ETHERNET_LINKS, Event, FlowEntry,
        FlowKey, FragmentEntry, FragmentKey, Interface, Process, VLAN_JUDGED_THERE, slot, step,
    },
};

/// Words of an image; a power of two, so that an index is masked and not compared.
#[cfg(feature = "image-64m")]
pub const IMAGE_WORDS: usize = 1 << 24;
#[cfg(all(feature = "image-16m", not(feature = "image-64m")))]
pub const IMAGE_WORDS: usize = 1 << 22;
#[cfg(not(any(feature = "image-16m", feature = "image-64m")))]
pub const IMAGE_WORDS: usize = 1 << 18;

type ImageMap = Array<[u32; IMAGE_WORDS], 1, { BPF_F_RDONLY_PROG as usize }>;

/// In a second.
const NANOSECONDS: u64 = 1_000_000_000;
/// Fragmented packets of which a first fragment passed. Nobody without the right to send can fill
/// it, and a full one evicts: what follows an evicted one is denied.
const FRAGMENTED: usize = 1 << 14;
/// VLAN devices.
const VLAN_DEVICES: usize = 4096;
/// Sockets whose process is remembered.
const SOCKET_COUNT: usize = 1 << 14;
/// Bytes of the event ring: 7 000 records.
const EVENT_BYTES: usize = 1 << 20;

#[btf_map]
static POLICY: ArrayOfMaps<ImageMap, { slot::COUNT as usize }> = ArrayOfMaps::new();
/// All zero (no generation, nothing refused, no debugging) until the daemon wrote it.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.control")]
static mut CONTROL: Control = Control {
    unix_floor: 0,
    boot_unix_ns: 0,
    netns_cookie: 0,
    hz: 0,
    flags: 0,
    generation: 0,
    previous: 0,
    deadline: 0,
};
/// The tick, in its low bits, in which a record last woke the daemon.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.woken")]
static mut WOKEN: u32 = 0;
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentEntry, FRAGMENTED> = LruHashMap::new();
#[btf_map]
static VLANS: HashMap<u64, u32, VLAN_DEVICES> = HashMap::new();
#[btf_map]
pub static DENIED: PerCpuArray<DeniedSlot, { DENIED_SLOTS as usize }> = PerCpuArray::new();
/// Hashes of the flows in `DENIED`: a packet of another flow is told by one load from a table that
/// stays in the caches; `DENIED` does not. One element, or the addresses of its elements would take
/// twice the room of the hashes.
#[btf_map]
static DENIED_HASHES: PerCpuArray<[u32; DENIED_SLOTS as usize], 1> = PerCpuArray::new();
#[btf_map]
pub static EVENTS: RingBuf<Event, EVENT_BYTES> = RingBuf::new();
#[btf_map]
static COUNTERS: PerCpuArray<u64, { COUNTER_COUNT as usize }> = PerCpuArray::new();
#[btf_map]
static INTERFACES: HashMap<u32, Interface, 4096> = HashMap::new();
/// Interfaces whose frames begin with an Ethernet header, by the low bits of their ifindex: the
/// ifindex and the slot. A look-up costs a tenth of one in `INTERFACES`.
#[btf_map]
static ETHERNET: Array<[u32; 2], { ETHERNET_LINKS as usize }> = Array::new();
/// The programs that go on where the attached ones settle nothing, see [`step`].
#[btf_map]
static STEPS: ProgramArray<{ step::COUNT as usize }> = ProgramArray::new();
#[btf_map]
static SCRATCH: PerCpuArray<Work, 1> = PerCpuArray::new();
#[btf_map]
pub static SOCKETS: LruHashMap<u64, Process, SOCKET_COUNT> = LruHashMap::new();

/// The live image. Looked up once per run and passed on: two look-ups may see two images.
#[derive(Clone, Copy)]
pub struct Image(&'static [u32; IMAGE_WORDS]);

impl Words for Image {
    #[inline(always)]
    fn word(&self, index: u32) -> u32 {
        self.0[index as usize & (IMAGE_WORDS - 1)]
    }
}

/// The image that judges, if there is one this program can read: past the deadline of a trial, the
/// one before it.
#[inline(always)]
pub fn live() -> Option<Image> {
    // SAFETY: as in `control`.
    let deadline = unsafe { (&raw const CONTROL.deadline).read_volatile() };
    let which = if now() < deadline {
        slot::LIVE
    } else {
        slot::PREVIOUS
    };
    let image = Image(POLICY.get_value(which, &0)?);
    if decide::readable(&image) {
        Some(image)
    } else {
        None
    }
}

/// The image of a candidate policy, if there is one this program can read.
#[inline(always)]
pub fn candidate() -> Option<Image> {
    let image = Image(POLICY.get_value(slot::SHADOW, &0)?);
    if decide::readable(&image) {
        Some(image)
    } else {
        None
    }
}

/// The hash of the flow that a slot of `DENIED` counts, to read and to write.
#[inline(always)]
pub fn denied_tag(slot: u32) -> Option<&'static mut u32> {
    let tags = DENIED_HASHES.get_ptr_mut(0)?;
    // SAFETY: this CPU's own element of a live array map; TC programs do not nest on a CPU.
    unsafe { (*tags).get_mut((slot & (DENIED_SLOTS - 1)) as usize) }
}

/// Goes on in the program of a step. Comes back only if there is none.
#[inline(always)]
pub fn go_on(ctx: &TcContext, step: u32) {
    // SAFETY: nothing here has to be dropped.
    unsafe { STEPS.tail_call(ctx, step) }
}

/// Whether there is a candidate to ask.
#[inline(always)]
pub fn shadowed() -> bool {
    // SAFETY: as in `control`.
    let flags = unsafe { (&raw const CONTROL.flags).read_volatile() };
    flags & CONTROL_SHADOW != 0
}

/// The daemon's settings.
#[inline(always)]
pub fn control() -> Control {
    // SAFETY: plain words that only the daemon writes.
    unsafe { (&raw const CONTROL).read_volatile() }
}

/// Ticks a second; 0 until the daemon wrote them.
#[inline(always)]
pub fn hz() -> u32 {
    // SAFETY: as in `control`.
    unsafe { (&raw const CONTROL.hz).read_volatile() }
}

/// Whether nobody has woken the daemon in this tick; from now on, somebody has.
#[inline(always)]
pub fn wakes(tick: u32) -> bool {
    // SAFETY: a plain word of the programs'. Of two CPUs at once, both may wake.
    unsafe {
        let woken = (&raw const WOKEN).read_volatile();
        (&raw mut WOKEN).write_volatile(tick);
        woken != tick
    }
}

/// The generation of the image that judges, for who does not ask it; see [`Control::generation`].
#[inline(always)]
pub fn live_generation(now: u64) -> u32 {
    // SAFETY: as in `control`; word by word, or all of them would be read.
    unsafe {
        if now < (&raw const CONTROL.deadline).read_volatile() {
            (&raw const CONTROL.generation).read_volatile()
        } else {
            (&raw const CONTROL.previous).read_volatile()
        }
    }
}

/// Nanoseconds since boot, suspend included, at the first record of this tick on this CPU: to ask
/// the clock for each takes a tenth of what a new denial costs in a flood of them.
#[inline(always)]
pub fn boot_time(tick: u64) -> u64 {
    let Some(work) = SCRATCH.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: as in `work`; two words that nobody else looks at, so no reference is made of them.
    unsafe {
        let (at, time) = (&raw mut (*work).tick, &raw mut (*work).time);
        if time.read() == 0 || at.read() != tick {
            at.write(tick);
            time.write(bpf_ktime_get_boot_ns());
        }
        time.read()
    }
}

/// Jiffies.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: a helper without arguments; jiffies cost nothing, ktime 30 ns [measured on 6.18].
    unsafe { bpf_jiffies64() }
}

/// An interface; Ethernet without a slot if it is not listed.
#[inline(always)]
pub fn interface(ifindex: u32) -> Interface {
    if let Some(slot) = ethernet(ifindex) {
        return Interface { flags: 0, slot };
    }
    // SAFETY: two plain u32 that only the daemon writes.
    match unsafe { INTERFACES.get(&ifindex) } {
        Some(interface) => *interface,
        None => Interface { flags: 0, slot: 0 },
    }
}

/// The slot of an interface that is known to have Ethernet frames.
#[inline(always)]
pub fn ethernet(ifindex: u32) -> Option<u32> {
    let [known, slot] = ETHERNET.get(ifindex & (ETHERNET_LINKS - 1))?;
    (*known == ifindex).then_some(*slot)
}

/// Whether frames with this tag are judged on their VLAN device.
#[inline(always)]
pub fn judged_on_vlan_device(key: u64) -> bool {
    // SAFETY: a plain u32 that only the daemon writes.
    unsafe { VLANS.get(&key) }.is_some_and(|flags| flags & VLAN_JUDGED_THERE != 0)
}

/// Time by the daemon's offset: right across suspend, and across clock steps once it has written
/// the new one.
#[derive(Clone, Copy)]
pub struct KernelTime {
    boot_unix_ns: u64,
    floor: u64,
}

impl KernelTime {
    #[inline(always)]
    pub fn new(control: &Control) -> Self {
        Self {
            boot_unix_ns: control.boot_unix_ns,
            floor: control.unix_floor,
        }
    }
}

impl Time for KernelTime {
    #[inline(always)]
    fn boot(&self) -> u32 {
        // SAFETY: a helper without arguments.
        (unsafe { bpf_ktime_get_boot_ns() } / NANOSECONDS) as u32
    }

    #[inline(always)]
    fn unix(&self) -> u64 {
        // SAFETY: a helper without arguments.
        let now = unsafe { bpf_ktime_get_boot_ns() };
        (now.wrapping_add(self.boot_unix_ns) / NANOSECONDS).max(self.floor)
    }
}

/// Adds to a per-CPU counter.
#[inline(always)]
pub fn count(index: u32, packets: u64) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: this CPU's own slot of a live array map.
        unsafe { *counter = (*counter).wrapping_add(packets) };
    }
}

/// Adds one to a per-CPU counter from a program that another one on this CPU may interrupt.
#[inline(always)]
pub fn count_shared(index: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: this CPU's own slot of a live array map.
        unsafe { increment(counter) };
    }
}

/// Adds one where others add at the same time.
///
/// # Safety
/// `count` is an aligned word of a live map.
#[inline(always)]
pub unsafe fn increment(count: *mut u64) {
    // SAFETY: the caller's promise; one instruction that only writes there. The target has no
    // `fetch_add`, the instruction set has always had this one.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({count} + 0) += {one}",
            count = in(reg) count,
            one = in(reg) 1u64,
        );
    }
}

/// The packet at hand and all that is found out about it. In a map because the 512-byte stack has
/// no room for it, and because the verifier knows nothing of values there (see
/// `enforcer_common::judge`).
pub struct Work {
    pub packet: Packet,
    pub scene: Scene<KernelTime>,
    pub plan: Plan,
    pub decision: Decision,
    pub hook: Hook,
    /// What the parser said.
    pub form: u32,
    /// What the shadow says.
    pub shadow: Said,
    /// The packet of the middle way, and the flow that it opens.
    pub opening: Opening,
    /// See [`boot_time`].
    tick: u64,
    time: u64,
}

/// What the middle way would have no room for on the stack.
pub struct Opening {
    pub case: Case,
    pub key: FlowKey,
    pub entry: FlowEntry,
}

/// Values of which all zeros are one.
pub trait Zero {}
impl Zero for Packet {}
impl Zero for Found {}
impl Zero for Process {}

const _: () = {
    // `Packet::EMPTY` is what `clear` writes.
    assert!(Packet::EMPTY.fragment as u8 == 0 && Packet::EMPTY.tuple.kind as u8 == 0);
};

/// Writes zeros, word by word: written as a value, the compiler calls a function that does it byte
/// by byte, 50 ns for a packet [measured on 6.18].
#[inline(always)]
pub fn clear<T: Zero>(value: &mut T) {
    const { assert!(align_of::<T>() >= 4 && size_of::<T>().is_multiple_of(4)) };
    let words = core::ptr::from_mut(value).cast::<u32>();
    let mut at = 0;
    while at < size_of::<T>() / 4 {
        // SAFETY: within the value, aligned; all zeros is a value of it.
        unsafe { words.add(at).write_volatile(0) };
        at += 1;
    }
}

/// Copies a value word by word, for the same reason.
#[inline(always)]
pub fn copy<T: Zero>(to: &mut T, from: &T) {
    const { assert!(align_of::<T>() >= 8 && size_of::<T>().is_multiple_of(8)) };
    let (to, from) = (
        core::ptr::from_mut(to).cast::<u64>(),
        core::ptr::from_ref(from).cast::<u64>(),
    );
    let mut at = 0;
    while at < size_of::<T>() / 8 {
        // SAFETY: within both values, aligned.
        unsafe { to.add(at).write_volatile(from.add(at).read_volatile()) };
        at += 1;
    }
}

/// This run's workspace; `packet` is empty.
#[inline(always)]
pub fn work() -> Option<&'static mut Work> {
    let work = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: this CPU's own element of a live array map; TC programs do not nest on a CPU (both
    // hooks run with bottom halves disabled), and all zeros is a valid `Work`.
    let work = unsafe { &mut *work };
    clear(&mut work.packet);
    Some(work)
}

/// Where this run keeps what the middle way works on.
#[inline(always)]
pub fn opening() -> Option<&'static mut Opening> {
    let work = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: as in `work`; the middle way is over before the long one begins.
    Some(unsafe { &mut (*work).opening })
}
