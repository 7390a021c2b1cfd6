//! The policy language: YAML to a checked [`model::Policy`], with diagnostics.
//!
//! Pure: text comes in as strings, nothing here opens a file, reads a clock or knows the kernel.

pub mod model;
