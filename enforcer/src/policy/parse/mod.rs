//! Text to [`super::model::Policy`], every mistake reported in one run.
//!
//! `raw` reads YAML into a tree with spans; `lower` and its parts give the tree its meaning. A file
//! that is not YAML is left out and reported; the others are still checked. `docs/policy.md` is the
//! language as users read it.

pub(crate) mod address;
mod catalogue;
pub(crate) mod context;
mod groups;
mod lower;
pub(crate) mod names;
mod overlap;
pub(crate) mod raw;
mod read;
mod reuse;
mod rules;
mod segments;
pub(crate) mod services;
mod time;

pub use catalogue::{CATALOGUE, describe};
pub use read::Cache;
pub use services::parse_point;

use super::{diag::Diagnostic, model::Policy};

/// One policy file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Name as the user would write it; diagnostics and origins show it.
    pub name: String,
    /// The whole text.
    pub text: String,
}

/// A policy that can be used, and what its author may want to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseOutcome {
    /// The policy.
    pub policy: Policy,
    /// In the order of the files, then of lines. No errors.
    pub warnings: Vec<Diagnostic>,
}

/// Parses and checks the files of one policy, given in lexical order of their names. `tests:` are
/// read, not run: see [`super::reference::run_tests`].
///
/// # Errors
/// Every mistake found, in the order of the files, then of lines; never empty. Nothing of the
/// policy may be used then.
pub fn parse_with_warnings(files: &[SourceFile]) -> Result<ParseOutcome, Vec<Diagnostic>> {
    let readings = read::read(files, |_| None);
    lower::lower(&readings, &reuse::Kept::default()).map(|(outcome, _)| outcome)
}

/// [`parse_with_warnings`] for callers that have no use for warnings.
///
/// # Errors
/// As [`parse_with_warnings`].
pub fn parse(files: &[SourceFile]) -> Result<Policy, Vec<Diagnostic>> {
    parse_with_warnings(files).map(|outcome| outcome.policy)
}

#[cfg(test)]
mod tests;
