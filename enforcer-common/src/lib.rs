//! What kernel and userspace share. One source, two targets: the functions here run inside the
//! eBPF programs and inside the daemon, the command line and the tests.
//!
//! - [`verdict`]: outcomes, reasons, hooks and counter indices
//! - [`packet`]: frame → [`packet::Packet`], or the reason why it cannot be read
//! - [`image`]: the policy image, a flat array of words, and how to look things up in it
//! - [`decide`]: image × flow → [`decide::Decision`]
//! - [`flow`]: what an entry of the flow table means
//! - [`judge`]: the judgement of a packet: flow table, then image
//! - [`swift`]: its short way for packets of established flows
//! - [`case`]: a packet and its verdict, as records have them
//! - [`opening`]: its middle way for packets that open one
//! - [`table`]: the flow table, in whatever memory
//! - [`shadow`]: where a candidate policy says something else
//! - [`wire`]: map values and event records, byte for byte
//!
//! Must not know: any I/O, any clock (time is an argument), tokio, aya's programs, YAML.
#![no_std]
#![cfg_attr(not(feature = "user"), forbid(unsafe_code))]
#![deny(unsafe_code)] // with `user`, pod.rs alone opts out: aya's Pod is an unsafe trait

pub mod case;
mod conclude;
pub mod decide;
pub mod flow;
pub mod image;
pub mod judge;
pub mod opening;
pub mod packet;
#[cfg(feature = "user")]
mod pod;
pub mod shadow;
pub mod swift;
pub mod table;
pub mod verdict;
pub mod wire;

/// Version of everything that crosses the boundary between kernel and userspace: map values,
/// event records, the image format, counter indices. Raised by any change to them; a mismatch at
/// load time is refused.
pub const ABI_VERSION: u32 = 3;
