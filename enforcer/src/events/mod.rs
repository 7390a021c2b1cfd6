//! Denied packets, from the kernel's records to lines with names.
//!
//! [`reader`] drains the ring buffer and scans the running counts; [`tally`] turns cumulative
//! totals into numbers of packets; [`enrich`] adds names, lines and processes; [`store`] keeps
//! the last records and hands them to followers.
//!
//! Must not know: HTTP, the command line.

pub mod cgroups;
pub mod detail;
pub mod enrich;
pub mod generations;
pub mod reader;
pub mod rehearsal;
pub mod store;
pub mod tally;

pub use generations::Generations;
pub use store::Store;
