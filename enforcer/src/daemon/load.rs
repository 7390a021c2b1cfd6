//! From a path to a policy and its image: read, parse, run the policy's own tests, compile.

use std::path::Path;

use crate::{
    compile::{self, CompileError, Image},
    policy::{
        self, Diagnostic, SourceFile, diag,
        model::{Environment, Policy},
        reference,
    },
};

use super::files::{self, FilesError};

/// A policy that may judge packets.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// What was read.
    pub files: Vec<SourceFile>,
    /// What it means.
    pub policy: Policy,
    /// What its author should look at.
    pub warnings: Vec<Diagnostic>,
    /// Generation 1; see [`Image::with_generation`].
    pub image: Image,
}

/// Why a path gives no such policy.
#[derive(Debug)]
pub enum Rejected {
    /// Nothing to parse.
    Files(FilesError),
    /// Mistakes, or failing tests.
    Policy {
        /// What was read.
        files: Vec<SourceFile>,
        /// Errors, and warnings beside them.
        diagnostics: Vec<Diagnostic>,
    },
    /// Too large.
    Compile(CompileError),
}

impl Rejected {
    /// For a terminal; ends with a newline.
    pub fn render(&self, color: bool) -> String {
        match self {
            Self::Files(error) => format!("error: {error}\n"),
            Self::Policy { files, diagnostics } => diag::render_all(diagnostics, files, color),
            Self::Compile(error) => format!("error: {error}\n"),
        }
    }

    /// One line, for a log or a list.
    pub fn summary(&self) -> String {
        match self {
            Self::Files(error) => error.to_string(),
            Self::Policy { diagnostics, .. } => {
                let errors: Vec<_> = diagnostics
                    .iter()
                    .filter(|d| d.severity == policy::Severity::Error)
                    .collect();
                let Some(first) = errors.first() else {
                    return "the policy has no errors".to_owned();
                };
                let more = match errors.len() - 1 {
                    0 => String::new(),
                    n => format!(" (and {n} more)"),
                };
                format!("{}:{}: {}{more}", first.file, first.line, first.message)
            }
            Self::Compile(error) => error.to_string(),
        }
    }
}

/// Reads and compiles the policy at `path`.
///
/// # Errors
/// [`Rejected`].
pub fn load(path: &Path, environment: &Environment) -> Result<Loaded, Rejected> {
    compile(files::load(path).map_err(Rejected::Files)?, environment)
}

/// Compiles files that are read already.
///
/// # Errors
/// [`Rejected`], but [`Rejected::Files`].
pub fn compile(files: Vec<SourceFile>, environment: &Environment) -> Result<Loaded, Rejected> {
    let outcome = match policy::parse_with_warnings(&files) {
        Ok(outcome) => outcome,
        Err(diagnostics) => return Err(Rejected::Policy { files, diagnostics }),
    };
    // A policy is good or not wherever it is checked: its tests know no host's addresses.
    let failures = reference::run_tests(&outcome.policy, &Environment::default());
    if !failures.is_empty() {
        let diagnostics = [outcome.warnings, failures].concat();
        return Err(Rejected::Policy { files, diagnostics });
    }
    let image = compile::compile(&outcome.policy, environment, &compile::Options::default())
        .map_err(Rejected::Compile)?;
    Ok(Loaded {
        files,
        policy: outcome.policy,
        warnings: outcome.warnings,
        image,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_of_a_policy_know_no_host() {
        let text = "\
version: 1
segments:
  db: { members: [{cidr: 10.10.1.0/24}] }
rules:
  - {name: from-here, from: [host], to: [db], services: [tcp/5432]}
tests:
  - {from: 192.0.2.7, to: 10.10.1.5, service: tcp/5432, expect: deny}
";
        let files = || {
            vec![SourceFile {
                name: "p.yaml".to_owned(),
                text: text.to_owned(),
            }]
        };
        let here = Environment {
            host_addresses: ["192.0.2.7".parse().unwrap()].into(),
            ..Environment::default()
        };
        let elsewhere = compile(files(), &Environment::default()).unwrap();
        let here = compile(files(), &here).unwrap();
        assert_ne!(elsewhere.image.hash(), here.image.hash());
    }
}
