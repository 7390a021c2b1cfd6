//! The enforcer: policy, compiler, dataplane, daemon and command line.
//!
//! Layers, lowest first; each may use those before it and none after it:
//! `policy` → `compile` → `settings` → `plan` → `dataplane` → `daemon` (with `events` and `api`) → `cli`.
//! See `docs/ARCHITECTURE.md`.

pub mod api;
pub mod cli;
mod clock;
pub mod compile;
pub mod daemon;
pub mod dataplane;
pub mod events;
pub mod plan;
pub mod policy;
mod poll;
mod pulse;
pub mod settings;
