//! The policy image: one flat array of 32-bit words, written by the compiler, read by the kernel
//! programs and by userspace through the same functions.
//!
//! ```text
//! source address ─► address class ─┐
//! destination    ─► address class ─┼─► row ─┐
//! protocol+port  ─► service class ─┴────────┴─► verdict
//! ```
//!
//! Classification by equivalence classes (P. Gupta, N. McKeown, "Packet Classification on
//! Multiple Fields", SIGCOMM 1999). All offsets are word indices from the start of the image.
//! Every read is masked to the image's size class, so no image, however broken, reads elsewhere.

/// `ENFI`, little endian: the first word of every image.
pub const MAGIC: u32 = 0x4946_4e45;

/// Header words, by index.
pub mod header {
    /// [`super::MAGIC`].
    pub const MAGIC: u32 = 0;
    /// [`crate::ABI_VERSION`].
    pub const ABI: u32 = 1;
    /// Generation: compared with `!=`, never 0, never used twice.
    pub const GENERATION: u32 = 2;
    /// Words in use, header included.
    pub const LENGTH: u32 = 3;
    /// Low half of the content hash (all words but generation and hash).
    pub const HASH_LO: u32 = 4;
    /// High half of the content hash.
    pub const HASH_HI: u32 = 5;
    /// Bits of [`super::essential`] that pass before any rule.
    pub const ESSENTIALS: u32 = 6;
    /// [`super::VERDICT_WORDS`]-style word: outcome of denials of form without readable addresses.
    pub const FORM_UNREADABLE: u32 = 7;
    /// 65 536 trie entries, indexed by the upper half of an IPv4 address.
    pub const V4_ROOT: u32 = 8;
    /// A trie entry: where IPv6 look-ups start.
    pub const V6_ROOT: u32 = 9;
    /// Low half of the seed of every hash table.
    pub const SEED_LO: u32 = 10;
    /// High half of the hash seed.
    pub const SEED_HI: u32 = 11;
    /// [`super::PROTOCOLS`] service trie entries, indexed by protocol.
    pub const SERVICES: u32 = 12;
    /// `CLASSES` × `CLASSES` row numbers, source class major.
    pub const PAIRS: u32 = 13;
    /// Number of address classes.
    pub const CLASSES: u32 = 14;
    /// Rows of [`super::ROW_WORDS`] words.
    pub const ROWS: u32 = 15;
    /// Hash table of single IPv4 hosts, [`super::TABLE_WORDS`] words; see [`super::slot_of`].
    pub const V4_HOSTS: u32 = 16;
    /// Hash table of single IPv6 hosts.
    pub const V6_HOSTS: u32 = 20;
    /// Hash table of IPv6 prefixes of 64 bits.
    pub const V6_NETS: u32 = 24;
    /// Hash table of exceptions.
    pub const EXCEPTIONS: u32 = 28;
    /// Number of single IPv6 prefixes of 64 bits, for the reader's information.
    pub const V6_NET_COUNT: u32 = 43;
    /// Number of segments, for the reader's information.
    pub const SEGMENTS: u32 = 44;
    /// Distinct address classes of this host's IPv4 addresses (loopback left out), one word each.
    pub const LOCAL4_CLASSES: u32 = 45;
    /// How many (at most [`super::MAX_LOCAL_CLASSES`], else [`super::LOCAL_UNKNOWN`]).
    pub const LOCAL4_CLASSES_COUNT: u32 = 46;
    /// The same for IPv6.
    pub const LOCAL6_CLASSES: u32 = 47;
    /// How many, as for IPv4.
    pub const LOCAL6_CLASSES_COUNT: u32 = 48;
    /// This host's IPv4 addresses, one word each.
    pub const LOCAL4: u32 = 49;
    /// How many (at most [`super::MAX_LOCAL`]; [`super::LOCAL_UNKNOWN`] when there are more).
    pub const LOCAL4_COUNT: u32 = 50;
    /// This host's IPv6 addresses, four words each.
    pub const LOCAL6: u32 = 51;
    /// How many, as for IPv4.
    pub const LOCAL6_COUNT: u32 = 52;
    /// Number of rules, for the reader's information.
    pub const RULES: u32 = 53;
    /// Number of service classes, for the reader's information.
    pub const SERVICE_CLASSES: u32 = 32;
    /// Number of distinct rows, for the reader's information.
    pub const ROW_COUNT: u32 = 33;
    /// Number of exceptions, for the reader's information.
    pub const EXCEPTION_COUNT: u32 = 34;
    /// Number of single IPv4 hosts, for the reader's information.
    pub const V4_HOST_COUNT: u32 = 35;
    /// Number of single IPv6 hosts, for the reader's information.
    pub const V6_HOST_COUNT: u32 = 36;
    /// [`super::CLASS_INFO_WORDS`] words per address class: flags, offset of an interface bitmap.
    pub const CLASS_INFO: u32 = 37;
    /// Per service class a word: bit `i` says that failsafe `i` names it; 0 without failsafes.
    pub const SERVICE_FAILSAFES: u32 = 38;
    /// Per interface slot a word: bit `i` says that failsafe `i` holds there; 0: each everywhere.
    pub const SLOT_FAILSAFES: u32 = 39;
    /// Per rule two words, longest and longest idle time of its sessions in seconds (0: none);
    /// 0 when no rule has them.
    pub const SESSIONS: u32 = 40;
    /// Ethertypes that pass although they are not IP, one word each; see [`super::LLC`].
    pub const ETHERTYPES: u32 = 41;
    /// How many, at most [`super::MAX_ETHERTYPES`].
    pub const ETHERTYPES_COUNT: u32 = 42;
    /// Length of the header; the tables follow.
    pub const WORDS: u32 = 64;
}

/// Bits of [`header::ESSENTIALS`].
pub mod essential {
    /// ARP (0x0806).
    pub const ARP: u32 = 1;
    /// IPv6 neighbour and router discovery, hop limit 255 (RFC 4861 §7.1).
    pub const ND: u32 = 1 << 1;
    /// DHCP and DHCPv6, the client's part.
    pub const DHCP: u32 = 1 << 2;
    /// IGMP and MLD.
    pub const MULTICAST_MEMBERSHIP: u32 = 1 << 3;
    /// LLDP (0x88cc).
    pub const LLDP: u32 = 1 << 4;
    /// Spanning tree (LLC 0x42 to 01:80:c2:00:00:00).
    pub const STP: u32 = 1 << 5;
    /// EAPOL (0x888e).
    pub const EAPOL: u32 = 1 << 6;
    /// Slow protocols, LACP among them (0x8809).
    pub const SLOW: u32 = 1 << 7;
    /// PTP (0x88f7).
    pub const PTP: u32 = 1 << 8;
    /// All of them, the default.
    pub const ALL: u32 = (1 << 9) - 1;
}

/// Set in a trie entry that is a class; clear in one that is the offset of a node.
pub const LEAF: u32 = 1 << 31;
/// Entries of the IPv4 root.
pub const V4_ROOT_WORDS: u32 = 1 << 16;
/// Children of a service node, or of a wide IPv4 node, indexed by one byte.
pub const BYTE_NODE_WORDS: u32 = 256;
/// Children of a narrow IPv4 node, indexed by half a byte: one cache line.
pub const NIBBLE_NODE_WORDS: u32 = 16;
/// In an entry of the IPv4 trie that is a node: its offset.
pub const V4_NODE_OFFSET: u32 = (1 << V4_NODE_BITS) - 1;
/// Above the offset: how many bits of the address index the node, 4 or 8.
pub const V4_NODE_BITS: u32 = 24;
/// An IPv6 node: depth in nibbles, background class, 4 words of path (big end first), 16 children.
pub const V6_NODE_WORDS: u32 = 22;
/// Offset of the path in an IPv6 node.
pub const V6_NODE_PATH: u32 = 2;
/// Offset of the children in an IPv6 node.
pub const V6_NODE_CHILDREN: u32 = 6;
/// Words of a hash table in the header: offset and number of its pilots, offset and number of its
/// slots. All zeros when it is empty.
pub const TABLE_WORDS: u32 = 4;
/// A slot of IPv4 hosts: address, class.
pub const V4_HOST_WORDS: u32 = 2;
/// A slot of IPv6 hosts: 4 words of address, class.
pub const V6_HOST_WORDS: u32 = 5;
/// A slot of IPv6 prefixes: 2 words of address, class and one unused word.
pub const V6_NET_WORDS: u32 = 4;
/// A slot of exceptions: row, service class, 2 verdict words.
pub const EXCEPTION_WORDS: u32 = 4;
/// Row of an empty slot of exceptions; no rule or segment. An empty slot of another table holds a
/// copy of a key that is elsewhere, which is no lie.
pub const EMPTY: u32 = u32::MAX;
/// A row: default verdict (2 words), verdict of denials of form (2 words).
pub const ROW_WORDS: u32 = 4;
/// A verdict: `outcome | reason << 8 | flags << 16`, then a rule number (rule reasons), a segment
/// number (default deny) or [`EMPTY`].
pub const VERDICT_WORDS: u32 = 2;
/// Flag of a row's default verdict: some service classes have exceptions.
pub const ROW_HAS_EXCEPTIONS: u32 = 1 << 16;
/// Flag of a verdict: it changes with time. The second word is the offset of a timeline: the number
/// of entries (1 to [`MAX_TIMELINE`]), then per entry the Unix second until which it holds (low
/// half, high half; ascending, the last one all ones) and two verdict words.
pub const VERDICT_TIMELINE: u32 = 1 << 17;
/// Flag of a verdict: its rule bounds sessions, see [`header::SESSIONS`].
pub const VERDICT_SESSION: u32 = 1 << 18;
/// Entries of a timeline.
pub const MAX_TIMELINE: u32 = 64;
/// Words of an entry of a timeline.
pub const TIMELINE_WORDS: u32 = 4;
/// Words per address class at [`header::CLASS_INFO`].
pub const CLASS_INFO_WORDS: u32 = 2;
/// Flag of an address class: its addresses are this host's own (link-local ones are never marked:
/// another host may have the same on another link).
pub const CLASS_OWN: u32 = 1;
/// Shift of the flags that say in which failsafes' sources an address class is.
pub const CLASS_FAILSAFE_SHIFT: u32 = 16;
/// Failsafes of an image.
pub const MAX_FAILSAFES: u32 = 16;
/// Interface slots: numbers that the daemon gives to enforced interfaces, from 1. An interface
/// bitmap has one bit each; bit `slot & 31` of word `slot >> 5`. Slot 0, for an interface not yet
/// known to the image, is in no bitmap.
pub const INTERFACE_SLOTS: u32 = 1024;
/// Words of an interface bitmap.
pub const INTERFACE_BITMAP_WORDS: u32 = INTERFACE_SLOTS / 32;
/// Stands for every IEEE 802.3 frame with a length instead of an ethertype (LLC) in
/// [`header::ETHERTYPES`].
pub const LLC: u32 = 1;
/// Listed ethertypes.
pub const MAX_ETHERTYPES: u32 = 16;
/// Indices of the service table: protocol numbers, then [`ICMP_OF_OTHER_FAMILY`].
pub const PROTOCOLS: u32 = 257;
/// Stands for protocol 58 in IPv4 and protocol 1 in IPv6, which no ICMP service names.
pub const ICMP_OF_OTHER_FAMILY: u32 = 256;
/// Local addresses per family that the socket hooks go through. The verifier follows each turn; with
/// 16 an earlier `connect6` took more than half its limit (552 000 instructions) [6.18].
pub const MAX_LOCAL: u32 = 8;
/// Distinct classes of local addresses per family that the socket hooks go through. The verifier
/// follows each turn of their loop: `connect6` is 260 000 instructions with 4, 370 000 with 6 and
/// 486 000 with 8 [6.18]; 16 addresses with a look-up each were over a million.
pub const MAX_LOCAL_CLASSES: u32 = 6;
/// Count of local addresses when there are more than [`MAX_LOCAL`]: the hooks must not refuse.
pub const LOCAL_UNKNOWN: u32 = u32::MAX;

/// Size classes of an image, in words: 1, 16 and 64 MiB. One kernel object each.
pub const SIZE_CLASSES: [u32; 3] = [1 << 18, 1 << 22, 1 << 24];

/// An image that can be read. `word` returns 0 past the end and never panics.
pub trait Words {
    /// The word at `index`, masked to the size of the image.
    fn word(&self, index: u32) -> u32;
}

impl Words for [u32] {
    #[inline(always)]
    fn word(&self, index: u32) -> u32 {
        match self.get(index as usize) {
            Some(word) => *word,
            None => 0,
        }
    }
}

/// An address as the image sees it. IPv4 and IPv6 are disjoint.
///
/// A plain structure, not an enum: a variant's unused half would be uninitialised memory, which
/// the kernel's verifier refuses to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Address {
    hi: u64,
    lo: u64,
    // A whole word: padding would be uninitialised memory too.
    kind: u64,
}

const KIND_V4: u64 = 0;
const KIND_V6: u64 = 1;
const KIND_CLASS: u64 = 2;

impl Address {
    /// An IPv4 address in host byte order.
    #[inline(always)]
    pub const fn v4(address: u32) -> Self {
        Self {
            hi: 0,
            lo: address as u64,
            kind: KIND_V4,
        }
    }

    /// An IPv6 address, upper and lower half in host byte order.
    #[inline(always)]
    pub const fn v6(hi: u64, lo: u64) -> Self {
        Self {
            hi,
            lo,
            kind: KIND_V6,
        }
    }

    /// Any address of a class that was looked up before.
    #[inline(always)]
    pub const fn of_class(class: u32) -> Self {
        Self {
            hi: 0,
            lo: class as u64,
            kind: KIND_CLASS,
        }
    }

    /// Upper half of an IPv6 address, else 0.
    #[inline(always)]
    pub const fn hi(&self) -> u64 {
        self.hi
    }

    /// Lower half of an IPv6 address; an IPv4 address; a class.
    #[inline(always)]
    pub const fn lo(&self) -> u64 {
        self.lo
    }

    /// Whether the address is IPv6.
    #[inline(always)]
    pub const fn is_v6(&self) -> bool {
        self.kind == KIND_V6
    }
}

impl From<core::net::IpAddr> for Address {
    fn from(ip: core::net::IpAddr) -> Self {
        match ip {
            core::net::IpAddr::V4(ip) => Self::v4(ip.to_bits()),
            core::net::IpAddr::V6(ip) => Self::v6((ip.to_bits() >> 64) as u64, ip.to_bits() as u64),
        }
    }
}

/// Mixes a 64-bit key with the image's seed. The seed is not a secret: an image is built from
/// its own keys, which the compiler places, so nobody can crowd a bucket from outside.
#[inline(always)]
pub const fn mix(key: u64, seed: u64) -> u64 {
    let a = (key ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let b = (a ^ (a >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    b ^ (b >> 32)
}

/// A 32-bit hash as a number below `count`, whatever that is: so a table is as long as its keys
/// need, not the next power of two.
#[inline(always)]
pub const fn scaled(hash: u32, count: u32) -> u32 {
    ((hash as u64).wrapping_mul(count as u64) >> 32) as u32
}

/// The pilot that speaks for a key, of `count`.
#[inline(always)]
pub const fn pilot_of(hash: u64, count: u32) -> u32 {
    scaled(hash as u32, count)
}

/// The slot of a key under its pilot, of `count`. The pilot multiplies: with an exclusive or, keys
/// whose hashes begin alike would meet under every pilot.
#[inline(always)]
pub const fn piloted(hash: u64, pilot: u32, count: u32) -> u32 {
    scaled(((hash >> 32) as u32).wrapping_mul(pilot), count)
}

/// Offset of the only slot where a key may be, in the table whose description is at `table` in the
/// header. Perfect hashing: some four keys share a pilot, a word that the compiler has chosen so
/// that none of them meets another key. Two loads that depend on each other, and no search. (Two
/// buckets of four slots took up to 16 loads; the verifier went through all of them.)
#[inline(always)]
pub fn slot_of<W: Words + ?Sized>(image: &W, table: u32, words: u32, hash: u64) -> u32 {
    let pilots = image.word(table);
    let at = pilot_of(hash, image.word(table.wrapping_add(1)));
    let pilot = image.word(pilots.wrapping_add(at));
    let slot = piloted(hash, pilot, image.word(table.wrapping_add(3)));
    image
        .word(table.wrapping_add(2))
        .wrapping_add(slot.wrapping_mul(words))
}

/// Hash of an IPv4 host.
#[inline(always)]
pub const fn hash_v4(address: u32, seed: u64) -> u64 {
    mix(address as u64, seed)
}

/// Hash of an IPv6 host.
#[inline(always)]
pub const fn hash_v6(hi: u64, lo: u64, seed: u64) -> u64 {
    mix(lo, mix(hi, seed))
}

/// Hash of an IPv6 prefix of 64 bits.
#[inline(always)]
pub const fn hash_net(hi: u64, seed: u64) -> u64 {
    mix(hi, seed)
}

/// Hash of an exception.
#[inline(always)]
pub const fn hash_exception(row: u32, service: u32, seed: u64) -> u64 {
    mix(((row as u64) << 32) | service as u64, seed)
}

/// The image's hash seed.
#[inline(always)]
pub fn seed<W: Words + ?Sized>(image: &W) -> u64 {
    u64::from(image.word(header::SEED_LO)) | (u64::from(image.word(header::SEED_HI)) << 32)
}

/// The class of an address: the set of segments (and built-ins) it is in.
#[inline(never)]
pub fn address_class<W: Words + ?Sized>(image: &W, address: &Address) -> u32 {
    address_class_here(image, address)
}

/// [`address_class`] for who knows most of the address when it is compiled.
#[inline(always)]
pub(crate) fn address_class_here<W: Words + ?Sized>(image: &W, address: &Address) -> u32 {
    match address.kind {
        KIND_V6 => class_v6(image, address.hi, address.lo),
        KIND_CLASS => address.lo as u32,
        _ => class_v4(image, address.lo as u32),
    }
}

#[inline(always)]
fn class_v4<W: Words + ?Sized>(image: &W, address: u32) -> u32 {
    if image.word(header::V4_HOSTS) != 0 {
        let hash = hash_v4(address, seed(image));
        let at = slot_of(image, header::V4_HOSTS, V4_HOST_WORDS, hash);
        if image.word(at) == address {
            return image.word(at.wrapping_add(1));
        }
    }
    let root = image.word(header::V4_ROOT);
    let mut entry = image.word(root.wrapping_add(address >> 16));
    let mut rest = address << 16;
    // Two wide nodes or up to four narrow ones. Written out: Linux 6.1 takes few forms of loop.
    if entry & LEAF == 0 {
        (entry, rest) = below(image, entry, rest);
        if entry & LEAF == 0 {
            (entry, rest) = below(image, entry, rest);
            if entry & LEAF == 0 {
                (entry, rest) = below(image, entry, rest);
                if entry & LEAF == 0 {
                    (entry, _) = below(image, entry, rest);
                }
            }
        }
    }
    entry & !LEAF
}

/// The child of a node of the IPv4 trie for the upper bits of `rest`, and the bits below.
#[inline(always)]
fn below<W: Words + ?Sized>(image: &W, node: u32, rest: u32) -> (u32, u32) {
    let bits = node >> V4_NODE_BITS & 15;
    let index = rest.wrapping_shr(32u32.wrapping_sub(bits));
    let child = image.word((node & V4_NODE_OFFSET).wrapping_add(index));
    (child, rest << bits)
}

#[inline(always)]
fn class_v6<W: Words + ?Sized>(image: &W, hi: u64, lo: u64) -> u32 {
    if image.word(header::V6_HOSTS) != 0 {
        let hash = hash_v6(hi, lo, seed(image));
        let at = slot_of(image, header::V6_HOSTS, V6_HOST_WORDS, hash);
        if pair(image, at) == hi && pair(image, at.wrapping_add(2)) == lo {
            return image.word(at.wrapping_add(4));
        }
    }
    if image.word(header::V6_NETS) != 0 {
        let hash = hash_net(hi, seed(image));
        let at = slot_of(image, header::V6_NETS, V6_NET_WORDS, hash);
        if pair(image, at) == hi {
            return image.word(at.wrapping_add(2));
        }
    }
    let mut entry = image.word(header::V6_ROOT);
    let mut level = 0;
    // 32 nibbles: no path is longer.
    while level < 33 {
        if entry & LEAF != 0 {
            return entry & !LEAF;
        }
        let node = entry;
        let depth = image.word(node) & 31;
        let path = node.wrapping_add(V6_NODE_PATH);
        // Masks instead of branches: with three ways through each of 33 turns, Linux 6.1's
        // verifier gave up after 1 000 000 instructions.
        let lower = 0u64.wrapping_sub(u64::from(depth >> 4));
        let bits = 4 * (depth & 15);
        let partial = !(u64::MAX >> bits);
        let differs = ((hi ^ pair(image, path)) & (partial | lower))
            | ((lo ^ pair(image, path.wrapping_add(2))) & (partial & lower));
        if differs != 0 {
            return image.word(node.wrapping_add(1));
        }
        let half = (hi & !lower) | (lo & lower);
        let nibble = (half >> (60 - bits)) as u32 & 15;
        entry = image.word(node.wrapping_add(V6_NODE_CHILDREN).wrapping_add(nibble));
        level += 1;
    }
    entry & !LEAF
}

/// Two words as one number, the first word upper.
#[inline(always)]
fn pair<W: Words + ?Sized>(image: &W, at: u32) -> u64 {
    (u64::from(image.word(at)) << 32) | u64::from(image.word(at.wrapping_add(1)))
}

/// The service class of (protocol, selector): services that no rule tells apart.
///
/// `selector` is the destination port of TCP, UDP and SCTP, `type << 8 | code` of ICMP and
/// ICMPv6, else 0.
#[inline(always)]
pub fn service_class<W: Words + ?Sized>(image: &W, v6: bool, protocol: u8, selector: u16) -> u32 {
    let index = match (v6, protocol) {
        (false, 58) | (true, 1) => ICMP_OF_OTHER_FAMILY,
        _ => protocol as u32,
    };
    let table = image.word(header::SERVICES);
    let mut entry = image.word(table.wrapping_add(index));
    if entry & LEAF == 0 {
        entry = image.word(entry.wrapping_add(u32::from(selector >> 8)));
        if entry & LEAF == 0 {
            entry = image.word(entry.wrapping_add(u32::from(selector & 0xff)));
        }
    }
    entry & !LEAF
}

/// Offset of the row of a class pair.
#[inline(always)]
pub fn row_of<W: Words + ?Sized>(image: &W, source: u32, destination: u32) -> (u32, u32) {
    let classes = image.word(header::CLASSES);
    let pairs = image.word(header::PAIRS);
    let row = image.word(
        pairs
            .wrapping_add(source.wrapping_mul(classes))
            .wrapping_add(destination),
    );
    (
        row,
        image
            .word(header::ROWS)
            .wrapping_add(row.wrapping_mul(ROW_WORDS)),
    )
}

/// The verdict words of (row, service class).
#[inline(always)]
pub fn verdict_of<W: Words + ?Sized>(image: &W, row: u32, offset: u32, service: u32) -> (u32, u32) {
    let default = (image.word(offset), image.word(offset.wrapping_add(1)));
    if default.0 & ROW_HAS_EXCEPTIONS == 0 {
        return default;
    }
    let hash = hash_exception(row, service, seed(image));
    let at = slot_of(image, header::EXCEPTIONS, EXCEPTION_WORDS, hash);
    if image.word(at) == row && image.word(at.wrapping_add(1)) == service {
        return (
            image.word(at.wrapping_add(2)),
            image.word(at.wrapping_add(3)),
        );
    }
    default
}

/// The verdict words that hold at `unix` (seconds) of a verdict with [`VERDICT_TIMELINE`].
#[inline(always)]
pub fn at_time<W: Words + ?Sized>(image: &W, offset: u32, unix: u64) -> (u32, u32) {
    let count = image.word(offset);
    let unix = unix & END;
    // The first entry that holds longer than `unix`: six halvings of at most 64. Arithmetic
    // instead of branches, of which the verifier would follow 64 ways.
    let (mut low, mut step) = (0u32, MAX_TIMELINE / 2);
    while step > 0 {
        let probe = low.wrapping_add(step);
        let inside = probe.wrapping_sub(count.wrapping_add(1)) >> 31;
        let until = until(image, offset, probe.wrapping_sub(1)) & END;
        let passed = until.wrapping_sub(unix).wrapping_sub(1) >> 63;
        low = low.wrapping_add(step.wrapping_mul(inside & passed as u32));
        step /= 2;
    }
    let entry = entry_of(offset, low);
    (
        image.word(entry.wrapping_add(2)),
        image.word(entry.wrapping_add(3)),
    )
}

/// All bits of a time but the highest: differences of two such numbers have a sign.
const END: u64 = u64::MAX >> 1;

#[inline(always)]
const fn entry_of(offset: u32, entry: u32) -> u32 {
    offset
        .wrapping_add(1)
        .wrapping_add(entry.wrapping_mul(TIMELINE_WORDS))
}

#[inline(always)]
fn until<W: Words + ?Sized>(image: &W, offset: u32, entry: u32) -> u64 {
    let at = entry_of(offset, entry);
    u64::from(image.word(at)) | u64::from(image.word(at.wrapping_add(1))) << 32
}

/// Whether the addresses of a class may come in at an interface slot.
#[inline(always)]
pub fn may_arrive<W: Words + ?Sized>(image: &W, bitmap: u32, slot: u32) -> bool {
    let slot = slot & (INTERFACE_SLOTS - 1);
    bitmap == 0 || image.word(bitmap.wrapping_add(slot >> 5)) >> (slot & 31) & 1 != 0
}

/// Flags and interface bitmap of an address class.
#[inline(always)]
pub fn class_info<W: Words + ?Sized>(image: &W, class: u32) -> (u32, u32) {
    let at = image
        .word(header::CLASS_INFO)
        .wrapping_add(class.wrapping_mul(CLASS_INFO_WORDS));
    (image.word(at), image.word(at.wrapping_add(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;

    #[test]
    fn a_timeline_is_read_as_written() {
        for count in 1..=MAX_TIMELINE {
            let mut words = std::vec![0, count];
            for i in 0..count {
                let until = if i + 1 == count {
                    u32::MAX
                } else {
                    10 * (i + 1)
                };
                let high = if i + 1 == count { u32::MAX } else { 0 };
                words.extend([until, high, i, 100 + i]);
            }
            for unix in 0..u64::from(10 * count + 20) {
                let want = (unix / 10).min(u64::from(count) - 1) as u32;
                assert_eq!(
                    at_time(&words[..], 1, unix),
                    (want, 100 + want),
                    "{count} {unix}"
                );
            }
        }
    }
}
