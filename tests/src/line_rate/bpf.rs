//! The few bpf() calls of the bench, raw: programs and maps that no object holds.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    time::Duration,
};

const MAP_CREATE: libc::c_long = 0;
const MAP_LOOKUP: libc::c_long = 1;
const MAP_UPDATE: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const PROG_TEST_RUN: libc::c_long = 10;
const MAP_UPDATE_BATCH: libc::c_long = 26;
const PROG_TYPE_SCHED_CLS: u64 = 3;

/// Kinds of map, by their numbers (linux/bpf.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    Array = 2,
    ProgArray = 3,
    LruHash = 9,
    LpmTrie = 11,
}

/// `BPF_F_NO_PREALLOC`, which LPM tries want.
const NO_PREALLOC: u64 = 1;

/// `union bpf_attr`: as many words as the longest of these calls has.
type Attr = [u64; 16];

fn bpf(command: libc::c_long, attr: &mut Attr) -> io::Result<RawFd> {
    // SAFETY: the attribute is as large as said, zero where unused, and its pointers are to
    // buffers that the caller borrows across the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of::<Attr>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as RawFd)
}

fn halves(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// A map.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    value_size: u32,
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Map {
    /// Makes one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(kind: MapKind, key_size: u32, value_size: u32, entries: u32) -> io::Result<Self> {
        let flags = if kind == MapKind::LpmTrie {
            NO_PREALLOC
        } else {
            0
        };
        let mut attr = Attr::default();
        attr[0] = halves(kind as u32, key_size);
        attr[1] = halves(value_size, entries);
        attr[2] = flags;
        let fd = bpf(MAP_CREATE, &mut attr)?;
        Ok(Self {
            // SAFETY: the kernel gave it to us just now.
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
            value_size,
        })
    }

    /// Writes an element.
    ///
    /// # Errors
    /// The kernel's.
    pub fn update(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        assert_eq!(value.len(), self.value_size as usize);
        let mut attr = Attr::default();
        attr[0] = halves(number(self.as_fd()), 0);
        attr[1] = key.as_ptr() as u64;
        attr[2] = value.as_ptr() as u64;
        bpf(MAP_UPDATE, &mut attr).map(drop)
    }

    /// Writes many elements, one after another in `keys` and `values`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn update_all(&self, keys: &[u8], values: &[u8], count: u32) -> io::Result<()> {
        assert_eq!(values.len(), (self.value_size * count) as usize);
        let mut attr = Attr::default();
        attr[2] = keys.as_ptr() as u64;
        attr[3] = values.as_ptr() as u64;
        attr[4] = halves(count, number(self.as_fd()));
        bpf(MAP_UPDATE_BATCH, &mut attr).map(drop)
    }

    /// Reads a value of at most 8 bytes of an array.
    ///
    /// # Errors
    /// The kernel's.
    pub fn word(&self, index: u32) -> io::Result<u64> {
        assert!(self.value_size <= 8);
        let mut value = 0u64;
        let mut attr = Attr::default();
        attr[0] = halves(number(self.as_fd()), 0);
        attr[1] = (&raw const index) as u64;
        attr[2] = (&raw mut value) as u64;
        bpf(MAP_LOOKUP, &mut attr)?;
        Ok(value)
    }
}

/// A program for TC.
#[derive(Debug)]
pub struct Program(OwnedFd);

/// What runs came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ran {
    /// What the last one returned.
    pub action: i32,
    /// CPU time of one, in nanoseconds.
    pub ns: f64,
}

impl Program {
    /// Loads one, of instructions.
    ///
    /// # Errors
    /// The kernel's, with the verifier's log.
    pub fn load(code: &[u64]) -> io::Result<Self> {
        let mut log = vec![0u8; 1 << 16];
        let licence = c"GPL";
        let mut attr = Attr::default();
        attr[0] = PROG_TYPE_SCHED_CLS | (code.len() as u64) << 32;
        attr[1] = code.as_ptr() as u64;
        attr[2] = licence.as_ptr() as u64;
        attr[3] = halves(1, log.len() as u32);
        attr[4] = log.as_mut_ptr() as u64;
        match bpf(PROG_LOAD, &mut attr) {
            // SAFETY: the kernel gave it to us just now.
            Ok(fd) => Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) })),
            Err(error) => {
                let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
                let log = String::from_utf8_lossy(&log[..end]);
                Err(io::Error::new(error.kind(), format!("{error}: {log}")))
            }
        }
    }

    /// A program that somebody else loaded.
    pub fn of(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The same program.
    ///
    /// # Errors
    /// The kernel's.
    pub fn again(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Runs it `times` times on one frame; each finds the frame as the one before left it.
    ///
    /// The time is what this thread had of the CPU: the kernel's own measure is rounded to whole
    /// nanoseconds, and clocks on the wall go on while others have the CPU.
    ///
    /// # Errors
    /// The kernel's.
    pub fn run(&self, frame: &[u8], times: u32) -> io::Result<Ran> {
        let mut attr = self.attr(frame, times);
        let before = cpu_time()?;
        bpf(PROG_TEST_RUN, &mut attr)?;
        let took = cpu_time()?.saturating_sub(before);
        Ok(Ran {
            action: ((attr[0] >> 32) as u32).cast_signed(),
            ns: took.as_nanos() as f64 / f64::from(times),
        })
    }

    /// Runs it once, and returns the frame as it left it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn rewrite(&self, frame: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = vec![0u8; frame.len()];
        let mut attr = self.attr(frame, 1);
        attr[1] = halves(frame.len() as u32, out.len() as u32);
        attr[3] = out.as_mut_ptr() as u64;
        bpf(PROG_TEST_RUN, &mut attr)?;
        Ok(out)
    }

    fn attr(&self, frame: &[u8], times: u32) -> Attr {
        let mut attr = Attr::default();
        attr[0] = halves(number(self.as_fd()), 0);
        attr[1] = halves(frame.len() as u32, 0);
        attr[2] = frame.as_ptr() as u64;
        attr[4] = halves(times, 0);
        attr
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What this thread has had of the CPU.
fn cpu_time() -> io::Result<Duration> {
    let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
    Ok(nix::time::clock_gettime(clock)?.into())
}
