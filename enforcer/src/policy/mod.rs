//! The policy language: YAML to a checked [`model::Policy`], with diagnostics.
//!
//! Pure: text comes in as strings, nothing here opens a file, reads a clock or knows the kernel.
//!
//! - [`mod@parse`]: text → [`model::Policy`], every mistake reported in one run.
//! - [`diag`]: what a mistake looks like, as text and as JSON.
//! - [`mod@reference`]: the meaning of a policy, written to be obvious; the oracle of the compiler.
//! - `arbitrary` (feature `testing`): random policies and queries for property tests.

#[cfg(any(test, feature = "testing"))]
pub mod arbitrary;
pub mod diag;
pub mod model;
pub mod parse;
pub mod pattern;
pub mod reference;

pub use diag::{Diagnostic, Severity};
pub use parse::{Cache, ParseOutcome, SourceFile, parse, parse_with_warnings};
