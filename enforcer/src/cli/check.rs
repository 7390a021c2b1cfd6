//! `enforcer check`

use std::path::PathBuf;

use serde::Serialize;

use crate::{
    daemon::{
        environment::Host,
        load::{self, Loaded, Rejected},
    },
    policy::{Diagnostic, diag, model::Environment},
};

use super::{
    DEFAULT_SEGMENTS, Exit, Failure, Format,
    out::{Hue, Out, count},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Policy: a directory or one file.
    #[arg(default_value = DEFAULT_SEGMENTS)]
    path: PathBuf,
    /// Form of the output.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

#[derive(Serialize)]
struct Report<'a> {
    ok: bool,
    path: String,
    diagnostics: &'a [Diagnostic],
    /// What is wrong beside the diagnostics: no file, too large.
    error: Option<String>,
    summary: Option<Summary>,
}

#[derive(Serialize)]
struct Summary {
    segments: usize,
    rules: usize,
    tests: usize,
    hash: String,
    image_bytes: usize,
    image_limit_bytes: usize,
    address_classes: u32,
    service_classes: u32,
    rows: u32,
}

impl Summary {
    fn of(loaded: &Loaded) -> Self {
        let stats = loaded.image.stats();
        Self {
            segments: loaded.policy.segments.len(),
            rules: loaded.policy.rules.len(),
            tests: loaded.policy.tests.len(),
            hash: format!("{:016x}", loaded.image.hash()),
            image_bytes: size_of_val(loaded.image.words()),
            image_limit_bytes: enforcer_common::image::SIZE_CLASSES
                .into_iter()
                .max()
                .map_or(0, |words| words as usize * size_of::<u32>()),
            address_classes: stats.classes,
            service_classes: stats.service_classes,
            rows: stats.rows,
        }
    }
}

/// `host` in policies and their tests means this host, as it would when enforced here. No
/// addresses at all, should they not be readable: checking needs no privilege.
pub fn environment() -> Environment {
    Host::read().unwrap_or_default().environment
}

pub fn run(args: &Args, out: &mut Out) -> Result<Exit, Failure> {
    let result = load::load(&args.path, &environment());
    match args.output {
        Format::Json => json(args, &result, out)?,
        Format::Text => text(args, &result, out)?,
    }
    Ok(if result.is_ok() {
        Exit::Fine
    } else {
        Exit::Policy
    })
}

fn json(args: &Args, result: &Result<Loaded, Rejected>, out: &mut Out) -> Result<(), Failure> {
    let path = args.path.display().to_string();
    let report = match result {
        Ok(loaded) => Report {
            ok: true,
            path,
            diagnostics: &loaded.warnings,
            error: None,
            summary: Some(Summary::of(loaded)),
        },
        Err(rejected) => {
            let (diagnostics, error) = match rejected {
                Rejected::Policy { diagnostics, .. } => (&diagnostics[..], None),
                Rejected::Files(_) | Rejected::Compile(_) => (&[][..], Some(rejected.summary())),
            };
            Report {
                ok: false,
                path,
                diagnostics,
                error,
                summary: None,
            }
        }
    };
    Ok(out.json(&report)?)
}

fn text(args: &Args, result: &Result<Loaded, Rejected>, out: &mut Out) -> Result<(), Failure> {
    let loaded = match result {
        Ok(loaded) => loaded,
        Err(rejected) => {
            out.text(&rejected.render(out.color))?;
            if let Rejected::Policy { diagnostics, .. } = rejected {
                let errors = diagnostics
                    .iter()
                    .filter(|d| d.severity == crate::policy::Severity::Error)
                    .count();
                let verdict = out.paint(Hue::Bad, &count(errors, "error"));
                out.line(format!("\n{}: {verdict}", args.path.display()))?;
            }
            return Ok(());
        }
    };
    if !loaded.warnings.is_empty() {
        out.text(&diag::render_all(
            &loaded.warnings,
            &loaded.files,
            out.color,
        ))?;
        out.line("")?;
    }
    let summary = Summary::of(loaded);
    let ok = out.paint(Hue::Good, "ok");
    out.line(format!("{}: {ok}", args.path.display()))?;
    let tests = match summary.tests {
        0 => "no tests".to_owned(),
        n => format!("{} passed", count(n, "test")),
    };
    out.line(format!(
        "  {}, {}, {tests}",
        count(summary.segments, "segment"),
        count(summary.rules, "rule"),
    ))?;
    out.line(format!(
        "  image {} KiB (limit {} MiB): {}, {}, {}",
        summary.image_bytes.div_ceil(1024),
        summary.image_limit_bytes >> 20,
        count(summary.address_classes as usize, "kind") + " of address",
        count(summary.service_classes as usize, "kind") + " of service",
        count(summary.rows as usize, "row"),
    ))?;
    Ok(())
}
