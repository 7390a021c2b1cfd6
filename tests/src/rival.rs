//! Programs of somebody else on the enforcer's hooks: each says one thing about everything.

use std::{
    fs::{self, File},
    io,
    os::fd::{FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use nix::errno::Errno;

/// Where a program hangs: numbers of the kernel's `bpf.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    Connect4 = 10,
    Sendmsg4 = 14,
    Xdp = 37,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// How a program joins those of the parents of its cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Attach {
    Alone = 0,
    Override = 1,
    Multi = 2,
}

/// Before or after those that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Place {
    /// XDP has one place: the generic one, which every driver has.
    Generic = 1 << 1,
    First = 1 << 3,
    Last = 1 << 4,
}

const MAP_CREATE: i64 = 0;
const MAP_UPDATE: i64 = 2;
const MAP_DELETE: i64 = 3;
const PROG_LOAD: i64 = 5;
const OBJ_PIN: i64 = 6;
const OBJ_GET: i64 = 7;
const PROG_ATTACH: i64 = 8;
const LINK_CREATE: i64 = 28;
const LINK_DETACH: i64 = 34;

fn bpf(command: i64, attributes: &[u32]) -> nix::Result<i32> {
    let size = size_of_val(attributes);
    // SAFETY: attributes of this size, whose pointers the callers keep alive.
    let said = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size) };
    Errno::result(said).map(|fd| i32::try_from(fd).unwrap())
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: just made, and nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn number(fd: &impl std::os::fd::AsRawFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// A pointer as two words.
fn words<T>(pointer: *const T) -> [u32; 2] {
    let number = pointer as usize as u64;
    [number as u32, (number >> 32) as u32]
}

const EXIT: u64 = 0x95;

/// The instruction that writes a number into a register.
fn set(register: u64, number: u32) -> u64 {
    0xb7 | (register << 8) | (u64::from(number) << 32)
}

/// Loads a program that returns `verdict`.
pub fn program(hook: Hook, verdict: i32) -> nix::Result<OwnedFd> {
    load(hook, &[set(0, verdict.cast_unsigned()), EXIT])
}

/// Puts a map into an element of an array of maps.
pub fn fill_slot(map: &impl std::os::fd::AsRawFd, index: u32, inner: &impl std::os::fd::AsRawFd) {
    let inner = number(inner);
    let ([key, key_high], [value, value_high]) = (words(&raw const index), words(&raw const inner));
    let attributes = [number(map), 0, key, key_high, value, value_high, 0, 0];
    bpf(MAP_UPDATE, &attributes).unwrap();
}

/// An array map of one element of so many bytes.
pub fn array(bytes: u32) -> nix::Result<OwnedFd> {
    const ARRAY: u32 = 2;
    bpf(MAP_CREATE, &[ARRAY, 4, bytes, 1, 0]).map(owned)
}

/// Pins anything.
pub fn pin(object: &OwnedFd, path: &Path) -> nix::Result<()> {
    let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let [low, high] = words(path.as_ptr());
    bpf(OBJ_PIN, &[low, high, number(object), 0]).map(drop)
}

/// Takes off what a pinned link has attached.
pub fn detach_pinned(link: &Path) -> nix::Result<()> {
    let path = std::ffi::CString::new(link.to_str().unwrap()).unwrap();
    let [low, high] = words(path.as_ptr());
    let link = owned(bpf(OBJ_GET, &[low, high, 0, 0])?);
    bpf(LINK_DETACH, &[number(&link)]).map(drop)
}

/// Takes the map out of an element of an array of maps.
pub fn empty_slot(map: &impl std::os::fd::AsRawFd, index: u32) {
    let [low, high] = words(&raw const index);
    bpf(MAP_DELETE, &[number(map), 0, low, high, 0, 0]).unwrap();
}

/// Loads a program that sends each packet out of an interface of the calling thread's namespace.
pub fn redirect(hook: Hook, interface: &str) -> nix::Result<OwnedFd> {
    const CALL_REDIRECT: u64 = 0x85 | (23 << 32);
    let ifindex = nix::net::if_::if_nametoindex(interface)?;
    load(hook, &[set(1, ifindex), set(2, 0), CALL_REDIRECT, EXIT])
}

fn load(hook: Hook, code: &[u64]) -> nix::Result<OwnedFd> {
    let kind = match hook {
        Hook::Connect4 | Hook::Sendmsg4 => 18,
        Hook::TcxIngress | Hook::TcxEgress => 3,
        Hook::Xdp => 6,
    };
    let expected = match hook {
        Hook::Connect4 | Hook::Sendmsg4 => hook as u32,
        Hook::TcxIngress | Hook::TcxEgress | Hook::Xdp => 0,
    };
    let mut attributes = [0u32; 18];
    attributes[0] = kind;
    attributes[1] = u32::try_from(code.len()).unwrap();
    attributes[2..4].copy_from_slice(&words(code.as_ptr()));
    attributes[4..6].copy_from_slice(&words(c"GPL".as_ptr()));
    attributes[17] = expected;
    bpf(PROG_LOAD, &attributes).map(owned)
}

/// Attaches a program to an interface of the calling thread's namespace, until it is dropped.
pub fn on_interface(
    program: &OwnedFd,
    hook: Hook,
    interface: &str,
    place: Place,
) -> nix::Result<OwnedFd> {
    let ifindex = nix::net::if_::if_nametoindex(interface)?;
    let attributes = [
        number(program),
        ifindex,
        hook as u32,
        place as u32,
        0,
        0,
        0,
        0,
    ];
    bpf(LINK_CREATE, &attributes).map(owned)
}

/// A cgroup for a test's processes, gone with them.
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Below the root of version 2, wherever that is mounted.
    pub fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let root = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|words| words[2] == "cgroup2")
            .map(|words| words[1].to_owned())
            .expect("a cgroup2 file system is mounted");
        let name = format!("enft-{}-{name}", std::process::id());
        let path = Path::new(&root).join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// As the enforcer names it.
    pub fn name(&self) -> String {
        format!("/{}", self.0.file_name().unwrap().to_str().unwrap())
    }

    /// Takes a process in.
    pub fn take(&self, pid: nix::unistd::Pid) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    /// Attaches a program to it, until it is gone.
    pub fn attach(&self, program: &OwnedFd, hook: Hook, how: Attach) -> nix::Result<()> {
        let directory = File::open(&self.0).unwrap();
        let attributes = [number(&directory), number(program), hook as u32, how as u32];
        bpf(PROG_ATTACH, &attributes).map(drop)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that has just ended leaves a little later.
        for _ in 0..100 {
            match fs::remove_dir(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                _ => return,
            }
        }
    }
}
