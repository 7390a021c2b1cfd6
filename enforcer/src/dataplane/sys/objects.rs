//! Pins of the BPF file system, and links: what keeps programs at work while no daemon lives.
#![expect(unsafe_code, reason = "system calls that take structures by address")]

use std::{
    ffi::{CString, c_int},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use super::bpf;

const BPF_OBJ_PIN: libc::c_long = 6;
pub(super) const BPF_OBJ_GET: libc::c_long = 7;
pub(super) const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
pub(super) const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
pub(super) const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;
/// At the head of a hook's programs.
const BPF_F_BEFORE: u32 = 1 << 3;

/// Where a program can be attached (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(in crate::dataplane) enum AttachType {
    /// `connect(2)` on IPv4 sockets.
    Connect4 = 10,
    /// `connect(2)` on IPv6 sockets.
    Connect6 = 11,
    /// `sendmsg(2)` on IPv4 datagram sockets.
    Sendmsg4 = 14,
    /// `sendmsg(2)` on IPv6 datagram sockets.
    Sendmsg6 = 15,
    /// Packets coming in (Linux 6.6).
    TcxIngress = 46,
    /// Packets going out (Linux 6.6).
    TcxEgress = 47,
}

/// What the kernel knows of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::dataplane) struct LinkInfo {
    /// Of the program behind it.
    pub(in crate::dataplane) program: u32,
    /// tcx: the interface, 0 when it is gone.
    pub(in crate::dataplane) ifindex: u32,
    /// The cgroup's id, 0 when the link was detached.
    pub(in crate::dataplane) cgroup: u64,
}

/// `bpf_attr` of BPF_OBJ_PIN and BPF_OBJ_GET.
#[repr(C)]
struct PathAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// `bpf_attr` of BPF_LINK_CREATE for tcx and cgroups.
#[repr(C)]
struct LinkAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    _pad: u32,
    revision: u64,
}

/// `bpf_attr` of BPF_LINK_UPDATE.
#[repr(C)]
struct UpdateAttr {
    link: u32,
    program: u32,
    flags: u32,
    old: u32,
}

/// `bpf_attr` of BPF_OBJ_GET_INFO_BY_FD.
#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

/// The front of `bpf_link_info`.
#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    _pad: u32,
    /// tcx: the ifindex and the attach type; cgroup: the id's halves.
    target: u32,
    attach_type: u32,
    _rest: [u64; 8],
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// A descriptor that the kernel just made.
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: just made for us; nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn terminated(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Pins a program, map or link.
///
/// # Errors
/// The kernel's: EEXIST, EPERM where the path is not in a BPF file system, ENOSPC.
pub(in crate::dataplane) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = terminated(path)?;
    let mut attr = PathAttr {
        path: path.as_ptr() as u64,
        fd: number(object),
        flags: 0,
    };
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Opens what is pinned.
///
/// # Errors
/// The kernel's: ENOENT.
pub(in crate::dataplane) fn get(path: &Path) -> io::Result<OwnedFd> {
    let path = terminated(path)?;
    let mut attr = PathAttr {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    bpf(BPF_OBJ_GET, &mut attr).map(owned)
}

fn link(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: AttachType,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkAttr {
        program: number(program),
        target,
        attach_type: attach_type as u32,
        flags,
        relative: 0,
        _pad: 0,
        revision: 0,
    };
    bpf(BPF_LINK_CREATE, &mut attr).map(owned)
}

/// Attaches a program to an interface, before all others there: none may accept a packet on our
/// behalf.
///
/// # Errors
/// The kernel's: ENODEV, ERANGE when there is no room for another program.
pub(in crate::dataplane) fn link_interface(
    program: BorrowedFd<'_>,
    ifindex: u32,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    link(program, ifindex, attach_type, BPF_F_BEFORE)
}

/// Attaches a program to a cgroup; as the only one there, and below.
///
/// # Errors
/// The kernel's: EPERM when another program is there.
pub(in crate::dataplane) fn link_cgroup(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    link(program, number(cgroup), attach_type, 0)
}

/// Puts another program behind a link, in one step.
///
/// # Errors
/// The kernel's: ENOLINK when what it was attached to is gone.
pub(in crate::dataplane) fn update_link(
    link: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
) -> io::Result<()> {
    let mut attr = UpdateAttr {
        link: number(link),
        program: number(program),
        flags: 0,
        old: 0,
    };
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Takes the program off; the link is of no more use.
///
/// # Errors
/// The kernel's.
pub(in crate::dataplane) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = number(link);
    bpf(BPF_LINK_DETACH, &mut attr).map(drop)
}

/// What the kernel knows of a link.
///
/// # Errors
/// The kernel's.
pub(in crate::dataplane) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = RawLinkInfo::default();
    get_info(link, &mut info)?;
    Ok(LinkInfo {
        program: info.program,
        ifindex: info.target,
        cgroup: u64::from(info.target) | u64::from(info.attach_type) << 32,
    })
}

/// The id of a program or map.
///
/// # Errors
/// The kernel's.
pub(in crate::dataplane) fn id(object: BorrowedFd<'_>) -> io::Result<u32> {
    /// The front of `bpf_prog_info` and of `bpf_map_info`.
    #[repr(C)]
    #[derive(Default)]
    struct Front {
        kind: u32,
        id: u32,
    }
    let mut front = Front::default();
    get_info(object, &mut front)?;
    Ok(front.id)
}

/// Words of the elements of an array map; `None` when it is none.
///
/// # Errors
/// The kernel's.
pub(in crate::dataplane) fn array_words(object: BorrowedFd<'_>) -> io::Result<Option<usize>> {
    /// The front of `bpf_map_info`.
    #[repr(C)]
    #[derive(Default)]
    struct Front {
        kind: u32,
        id: u32,
        key_size: u32,
        value_size: u32,
    }
    const BPF_MAP_TYPE_ARRAY: u32 = 2;
    let mut front = Front::default();
    get_info(object, &mut front)?;
    let is_array = front.kind == BPF_MAP_TYPE_ARRAY && front.key_size == 4;
    Ok(is_array.then_some(front.value_size as usize / 4))
}

/// The name of a program. Needs CAP_SYS_ADMIN.
///
/// # Errors
/// The kernel's: EPERM, ENOENT.
pub(in crate::dataplane) fn program_name(id: u32) -> io::Result<String> {
    /// `bpf_attr` of BPF_PROG_GET_FD_BY_ID.
    #[repr(C)]
    struct IdAttr {
        id: u32,
        next: u32,
        flags: u32,
    }
    /// `bpf_prog_info` up to the name.
    #[repr(C)]
    #[derive(Default)]
    struct Front {
        before: [u64; 8],
        name: [u8; 16],
    }
    let mut attr = IdAttr {
        id,
        next: 0,
        flags: 0,
    };
    let program = bpf(BPF_PROG_GET_FD_BY_ID, &mut attr).map(owned)?;
    let mut front = Front::default();
    get_info(program.as_fd(), &mut front)?;
    let name = front.name.split(|byte| *byte == 0).next();
    Ok(String::from_utf8_lossy(name.unwrap_or_default()).into_owned())
}

/// Ids of the programs on a tcx hook, in the order in which they are asked.
///
/// # Errors
/// The kernel's: ENODEV.
pub(in crate::dataplane) fn programs_on(
    ifindex: u32,
    attach_type: AttachType,
) -> io::Result<Vec<u32>> {
    /// `bpf_attr` of BPF_PROG_QUERY.
    #[repr(C)]
    struct QueryAttr {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        _pad: u32,
        _more: [u64; 4],
    }
    /// The kernel has at most so many (`BPF_MPROG_MAX`).
    const MOST: usize = 64;
    let mut ids = vec![0u32; MOST];
    let mut attr = QueryAttr {
        target: ifindex,
        attach_type: attach_type as u32,
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: MOST as u32,
        _pad: 0,
        _more: [0; 4],
    };
    match bpf(BPF_PROG_QUERY, &mut attr) {
        Ok(_) => ids.truncate(attr.count as usize),
        // The kernel's word for none at all.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => ids.clear(),
        Err(error) => return Err(error),
    }
    Ok(ids)
}

fn get_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let length = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let mut attr = InfoAttr {
        fd: number(object),
        length,
        info: std::ptr::from_mut(info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// A BPF file system that is mounted nowhere: it goes, and all pins with it, when the descriptor
/// does. Needs CAP_SYS_ADMIN.
///
/// # Errors
/// The kernel's.
pub(in crate::dataplane) fn private_bpffs() -> io::Result<OwnedFd> {
    const FSOPEN_CLOEXEC: c_int = 1;
    const FSCONFIG_CMD_CREATE: c_int = 6;
    const FSMOUNT_CLOEXEC: c_int = 1;
    let call = |result: libc::c_long| {
        RawFd::try_from(result)
            .ok()
            .filter(|result| *result >= 0)
            .ok_or_else(io::Error::last_os_error)
    };
    // SAFETY: a string that lives on, and a number.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, c"bpf".as_ptr(), FSOPEN_CLOEXEC) };
    let context = owned(call(context)?);
    // SAFETY: the command takes no key and no value.
    let made = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            std::ptr::null::<u8>(),
            std::ptr::null::<u8>(),
            0,
        )
    };
    call(made)?;
    // SAFETY: numbers alone.
    let mount =
        unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) };
    call(mount).map(owned)
}

/// Puts one directory in the other's place, in one step (Linux 5.17 for BPF file systems).
///
/// # Errors
/// The kernel's.
pub(in crate::dataplane) fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    let (one, other) = (terminated(one)?, terminated(other)?);
    super::faults::step(|| {
        // SAFETY: two strings that live on, and numbers.
        let result = unsafe {
            libc::renameat2(
                libc::AT_FDCWD,
                one.as_ptr(),
                libc::AT_FDCWD,
                other.as_ptr(),
                libc::RENAME_EXCHANGE,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    })
}
