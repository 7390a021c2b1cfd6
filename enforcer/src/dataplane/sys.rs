//! The bpf(2) calls that aya keeps to itself. The only raw system calls of the project.
#![expect(unsafe_code, reason = "bpf(2) takes a union of structs by address")]

pub(super) mod objects;

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    ptr::NonNull,
};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_FREEZE: libc::c_long = 22;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_RDONLY_PROG: u32 = 1 << 7;

/// `bpf_attr` of BPF_MAP_CREATE, up to the map's name (linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct CreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

/// `bpf_attr` of the element commands.
#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `bpf_attr` of the batch commands.
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// `bpf_attr` of BPF_MAP_FREEZE.
#[repr(C)]
struct FreezeAttr {
    map_fd: u32,
}

/// Faults at a test's word: what happens at each of the calls that change something.
#[cfg(feature = "testing")]
pub mod faults {
    use std::{
        io,
        sync::atomic::{AtomicU32, Ordering},
    };

    /// What is to happen.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Fault {
        /// The process ends after the call was made.
        Crash,
        /// The call is not made; the kernel has no room.
        Refusal,
    }

    static STEP: AtomicU32 = AtomicU32::new(0);
    static AT: AtomicU32 = AtomicU32::new(0);
    static REFUSE: AtomicU32 = AtomicU32::new(0);

    /// From now on: at the call of this number, the first is 1; 0 is none.
    pub fn set(fault: Fault, at: u32) {
        STEP.store(0, Ordering::SeqCst);
        AT.store(at, Ordering::SeqCst);
        REFUSE.store(u32::from(fault == Fault::Refusal), Ordering::SeqCst);
    }

    /// How many calls there were since then.
    pub fn steps() -> u32 {
        STEP.load(Ordering::SeqCst)
    }

    pub(in crate::dataplane) fn step<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let step = STEP.fetch_add(1, Ordering::SeqCst) + 1;
        let now = step == AT.load(Ordering::SeqCst);
        if now && REFUSE.load(Ordering::SeqCst) != 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let done = call();
        if now {
            std::process::abort();
        }
        done
    }
}

/// Nothing but the call.
#[cfg(not(feature = "testing"))]
pub(in crate::dataplane) mod faults {
    pub(in crate::dataplane) fn step<T>(
        call: impl FnOnce() -> std::io::Result<T>,
    ) -> std::io::Result<T> {
        call()
    }
}

/// Calls that only read.
const READS: [libc::c_long; 6] = [
    BPF_MAP_LOOKUP_ELEM,
    BPF_MAP_LOOKUP_BATCH,
    objects::BPF_OBJ_GET,
    objects::BPF_OBJ_GET_INFO_BY_FD,
    objects::BPF_PROG_GET_FD_BY_ID,
    objects::BPF_PROG_QUERY,
];

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    if READS.contains(&command) {
        return call(command, attr);
    }
    faults::step(|| call(command, attr))
}

fn call<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: `attr` is a live, exclusive, fully initialised structure and its size is passed
    // along; the kernel reads at most that much, and writes only to `count` and the buffers of
    // their stated lengths that a batch look-up names.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    i32::try_from(result)
        .ok()
        .filter(|r| *r >= 0)
        .ok_or_else(io::Error::last_os_error)
}

/// Creates the array map that holds one image of `words` words, read-only for programs.
///
/// # Errors
/// The kernel's: EPERM, ENOMEM (memory cgroup), E2BIG.
pub(super) fn create_image_map(words: u32, generation: u32) -> io::Result<OwnedFd> {
    create_array(&format!("image_{generation}"), words, BPF_F_RDONLY_PROG)
}

/// Creates an array map of one element of `words` words.
///
/// # Errors
/// As [`create_image_map`].
pub(super) fn create_array(name: &str, words: u32, flags: u32) -> io::Result<OwnedFd> {
    let mut attr = CreateAttr {
        map_type: BPF_MAP_TYPE_ARRAY,
        key_size: 4,
        value_size: words * 4,
        max_entries: 1,
        map_flags: flags,
        ..CreateAttr::default()
    };
    for (to, from) in attr.map_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    let fd = bpf(BPF_MAP_CREATE, &mut attr)?;
    // SAFETY: a descriptor the kernel just made for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Writes element `index` of an array map. `value` has the map's value size, in words.
///
/// # Errors
/// The kernel's.
pub(super) fn update_words(map: BorrowedFd<'_>, index: u32, value: &[u32]) -> io::Result<()> {
    update(map, &index, value.as_ptr().cast())
}

/// Writes the one element of an array map whose values are this type.
///
/// # Errors
/// The kernel's.
pub(super) fn write<T: aya::Pod>(map: BorrowedFd<'_>, value: &T) -> io::Result<()> {
    update(map, &0, std::ptr::from_ref(value).cast())
}

/// Puts the map or program behind `inner` into slot `index` of an array of maps or programs.
///
/// # Errors
/// The kernel's; EINVAL when the inner map's shape differs from the declared one.
pub(super) fn update_inner(
    outer: BorrowedFd<'_>,
    index: u32,
    inner: BorrowedFd<'_>,
) -> io::Result<()> {
    let fd = inner.as_raw_fd();
    update(outer, &index, std::ptr::from_ref(&fd).cast())
}

fn update(map: BorrowedFd<'_>, index: &u32, value: *const u8) -> io::Result<()> {
    let mut attr = ElementAttr {
        map_fd: map.as_raw_fd().unsigned_abs(),
        _pad: 0,
        key: std::ptr::from_ref(index) as u64,
        value: value as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Reads element `index` of an array map into `value`, which has the map's value size, in words. Of
/// an array of maps or programs, the element is the id of what is there.
///
/// # Errors
/// The kernel's; ENOENT when there is none.
pub(super) fn lookup(map: BorrowedFd<'_>, index: u32, value: &mut [u32]) -> io::Result<()> {
    let mut attr = ElementAttr {
        map_fd: map.as_raw_fd().unsigned_abs(),
        _pad: 0,
        key: std::ptr::from_ref(&index) as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    bpf(BPF_MAP_LOOKUP_ELEM, &mut attr).map(drop)
}

/// Takes the map out of slot `index` of an array of maps.
///
/// # Errors
/// The kernel's; ENOENT when there is none.
pub(super) fn delete(map: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    let mut attr = ElementAttr {
        map_fd: map.as_raw_fd().unsigned_abs(),
        _pad: 0,
        key: std::ptr::from_ref(&index) as u64,
        value: 0,
        flags: 0,
    };
    bpf(BPF_MAP_DELETE_ELEM, &mut attr).map(drop)
}

/// Room for the value of an image map, from which the kernel copies. What lies behind the image is
/// never written, so it takes no memory of its own; and since the room is kept, those pages, thousands
/// of them, are not brought in anew for each image.
pub(super) struct Staging {
    words: NonNull<u32>,
    length: usize,
    /// Words of the image that was here last.
    used: usize,
}

// SAFETY: it owns its memory, and lends it by reference only.
unsafe impl Send for Staging {}

impl Staging {
    /// For `length` words.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn new(length: usize) -> io::Result<Self> {
        // SAFETY: a mapping of our own, at an address that the kernel chooses.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length.max(1) * size_of::<u32>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            words,
            length,
            used: 0,
        })
    }

    /// The image, with zeros up to the end; `None` when it is too long.
    pub(super) fn fill(&mut self, image: &[u32]) -> Option<&[u32]> {
        // SAFETY: the mapping is this long and aligned to a page, any bits are a `u32`, and it is
        // borrowed as `self` is.
        let words = unsafe { std::slice::from_raw_parts_mut(self.words.as_ptr(), self.length) };
        let (head, rest) = words.split_at_mut_checked(image.len())?;
        head.copy_from_slice(image);
        let old = self.used.saturating_sub(image.len()).min(rest.len());
        rest.get_mut(..old)?.fill(0);
        self.used = image.len();
        Some(words)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; nobody borrows it any more.
        unsafe {
            libc::munmap(
                self.words.as_ptr().cast(),
                self.length.max(1) * size_of::<u32>(),
            );
        }
    }
}

/// The first `count` elements of a per-CPU array of `u64`, each summed over CPUs, by one system
/// call (Linux 5.13). `cpus` is the number of possible CPUs.
///
/// # Errors
/// The kernel's.
pub(super) fn sums(map: BorrowedFd<'_>, count: u32, cpus: usize) -> io::Result<Vec<u64>> {
    let elements = count as usize;
    let mut keys = vec![0u32; elements];
    let mut values = vec![0u64; elements * cpus];
    let mut next = 0u32;
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: std::ptr::from_mut(&mut next) as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count,
        map_fd: map.as_raw_fd().unsigned_abs(),
        elem_flags: 0,
        flags: 0,
    };
    match bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) {
        Ok(_) => {}
        // The whole map was read: there is no next batch.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        Err(error) => return Err(error),
    }
    let mut sums = vec![0u64; elements];
    let read = attr.count as usize;
    for (key, values) in keys.iter().zip(values.chunks(cpus)).take(read) {
        if let Some(sum) = sums.get_mut(*key as usize) {
            *sum = values.iter().fold(0, |sum, v| sum.wrapping_add(*v));
        }
    }
    Ok(sums)
}

/// All `count` elements of an array map, of `words` words each (an even number), by few system
/// calls.
///
/// # Errors
/// The kernel's.
pub(super) fn array(map: BorrowedFd<'_>, count: u32, words: usize) -> io::Result<Vec<u32>> {
    array_part(map, 0, count, words)
}

/// The same of `count` elements behind the first `start`.
///
/// # Errors
/// The kernel's.
pub(super) fn array_part(
    map: BorrowedFd<'_>,
    start: u32,
    count: u32,
    words: usize,
) -> io::Result<Vec<u32>> {
    let mut keys = vec![0u32; count as usize];
    let mut values = vec![0u32; count as usize * words];
    let mut read = 0;
    // Where the kernel's last batch ended; it begins without one.
    let mut next = start.wrapping_sub(1);
    while read < count {
        let before = next;
        let mut attr = BatchAttr {
            in_batch: if start == 0 && read == 0 {
                0
            } else {
                std::ptr::from_ref(&before) as u64
            },
            out_batch: std::ptr::from_mut(&mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values
                .get_mut(read as usize * words..)
                .unwrap_or_default()
                .as_mut_ptr() as u64,
            count: count - read,
            map_fd: map.as_raw_fd().unsigned_abs(),
            elem_flags: 0,
            flags: 0,
        };
        match bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) {
            Ok(_) if attr.count != 0 => {}
            Ok(_) => break,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                read += attr.count;
                break;
            }
            Err(error) => return Err(error),
        }
        read += attr.count;
    }
    values.truncate(read as usize * words);
    Ok(values)
}

/// Makes a map read-only for user space as well, for good.
///
/// # Errors
/// The kernel's.
pub(super) fn freeze(map: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = FreezeAttr {
        map_fd: map.as_raw_fd().unsigned_abs(),
    };
    bpf(BPF_MAP_FREEZE, &mut attr).map(drop)
}

/// `SO_NETNS_COOKIE` of this thread's network namespace (Linux 5.14).
///
/// # Errors
/// The kernel's; ENOPROTOOPT on older ones.
pub(super) fn netns_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = std::net::UdpSocket::bind(("127.0.0.1", 0)).or_else(|_| {
        // Loopback may be down: any socket will do.
        std::os::unix::net::UnixDatagram::unbound().map(|s| {
            // SAFETY: ownership of the descriptor moves over; only getsockopt is called on it.
            unsafe { std::net::UdpSocket::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(s)) }
        })
    })?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` and `length` are live and of the sizes passed.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &mut length,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `SO_PEERGROUPS`: the supplementary groups of the process at the other end of a Unix socket, as
/// they were when it connected.
///
/// # Errors
/// The kernel's.
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    /// NGROUPS_MAX.
    const MOST: usize = 1 << 16;
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut bytes =
            libc::socklen_t::try_from(size_of_val(&groups[..])).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `bytes` bytes, which is the length of the vector.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let needed = bytes as usize / size_of::<libc::gid_t>();
        if result == 0 {
            groups.truncate(needed);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || groups.len() >= MOST {
            return Err(error);
        }
        groups.resize(needed.clamp(groups.len() + 1, MOST), 0);
    }
}

/// Whether something keeps the wall clock right, as the kernel was told by it.
///
/// # Errors
/// The kernel's.
pub fn clock_is_kept() -> io::Result<bool> {
    // SAFETY: numbers alone, of which zeros are valid: nothing is to be changed.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `state` is live and exclusive.
    let result = unsafe { libc::adjtimex(&raw mut state) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(state.status & libc::STA_UNSYNC == 0),
    }
}

/// Gives freed memory back to the system: a compiler at work leaves hundreds of MiB behind, which
/// the allocator would keep.
#[cfg(target_env = "gnu")]
pub fn release_memory() {
    // SAFETY: it takes no pointers, and other threads may allocate meanwhile.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Other allocators give it back by themselves.
#[cfg(not(target_env = "gnu"))]
pub fn release_memory() {}

/// Each thread that compiles would have a heap of its own, and leave holes in it.
#[cfg(target_env = "gnu")]
pub fn share_heaps() {
    // SAFETY: it takes no pointers.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Other allocators have their own ways.
#[cfg(not(target_env = "gnu"))]
pub fn share_heaps() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shorter_image_leaves_nothing_of_the_longer_one() {
        let mut staging = Staging::new(5000).unwrap();
        let mut expected = vec![0; 5000];
        for (length, word) in [(4000, 1), (10, 2), (0, 3), (5000, 4), (4999, 5), (1, 6)] {
            let image = vec![word; length];
            expected.fill(0);
            expected[..length].copy_from_slice(&image);
            assert_eq!(staging.fill(&image), Some(&expected[..]));
        }
        assert_eq!(staging.fill(&[7; 5001]), None);
        assert_eq!(staging.fill(&[]), Some(&[0; 5000][..]));
    }
}
