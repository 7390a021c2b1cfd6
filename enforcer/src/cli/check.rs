//! `enforcer check`

use std::{path::PathBuf, sync::Arc};

use serde::Serialize;

use crate::{
    daemon::{
        environment::Host,
        files::{self, SettingsPath, Sources, Texts},
        guard::Trust,
        load::{self, Loaded, Rejected},
    },
    policy::{Diagnostic, diag, model::Environment},
    settings::{Settings, essentials_off},
};

use super::{
    DEFAULT_SEGMENTS, Exit, Failure, Format,
    out::{Hue, Out, count, progress},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Policy: a directory or one file (default: /etc/enforcer/segments).
    path: Option<PathBuf>,
    /// The daemon's settings, enforcer.yaml, to check as well; without a policy, alone.
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Form of the output.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

#[derive(Serialize)]
struct Report<'a> {
    ok: bool,
    path: String,
    diagnostics: &'a [Diagnostic],
    settings: Option<&'a SettingsSummary>,
    /// What is wrong beside the diagnostics: no file, too large.
    error: Option<String>,
    summary: Option<&'a Summary>,
}

#[derive(Serialize)]
struct SettingsSummary {
    path: String,
    failsafes: usize,
    essentials_off: Vec<&'static str>,
    ethertypes: usize,
}

impl SettingsSummary {
    fn of(path: Option<&PathBuf>, settings: &Settings) -> Option<Self> {
        Some(Self {
            path: path?.display().to_string(),
            failsafes: settings.failsafes.len(),
            essentials_off: essentials_off(settings.essentials),
            ethertypes: settings.ethertypes.len(),
        })
    }
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

/// What was checked, and is good.
struct Checked {
    texts: Texts,
    warnings: Vec<Diagnostic>,
    policy: Option<Summary>,
    settings: Option<SettingsSummary>,
}

fn check(args: &Args) -> Result<Checked, Rejected> {
    let settings = args.config.clone().map(|path| SettingsPath {
        path,
        required: true,
    });
    let segments = match (&args.path, settings) {
        (None, Some(settings)) => return check_settings(&settings),
        (None, None) => (PathBuf::from(DEFAULT_SEGMENTS), None),
        (Some(path), settings) => (path.clone(), settings),
    };
    let (segments, settings) = segments;
    let sources = Sources {
        segments,
        settings,
        trust: Trust::Anyone,
    };
    let loaded = progress(|progress| load::load(&sources, &environment(), progress))?;
    Ok(Checked {
        policy: Some(Summary::of(&loaded)),
        settings: SettingsSummary::of(args.config.as_ref(), &loaded.settings),
        texts: loaded.texts,
        warnings: loaded.warnings,
    })
}

fn check_settings(path: &SettingsPath) -> Result<Checked, Rejected> {
    let texts = Texts {
        policy: Arc::default(),
        settings: files::load_settings(path, Trust::Anyone).map_err(Rejected::Files)?,
    };
    let (settings, warnings) =
        load::settings(&texts).map_err(|diagnostics| Rejected::Settings {
            files: texts.all(),
            diagnostics,
        })?;
    Ok(Checked {
        texts,
        warnings,
        policy: None,
        settings: SettingsSummary::of(Some(&path.path), &settings),
    })
}

/// What is named in the output.
fn subject(args: &Args) -> String {
    let path = match (&args.path, &args.config) {
        (Some(path), _) | (None, Some(path)) => path.display().to_string(),
        (None, None) => DEFAULT_SEGMENTS.to_owned(),
    };
    match (&args.path, &args.config) {
        (Some(_), Some(config)) => format!("{path}, {}", config.display()),
        _ => path,
    }
}

pub fn run(args: &Args, out: &mut Out) -> Result<Exit, Failure> {
    let result = check(args);
    let exit = if result.is_ok() {
        Exit::Fine
    } else {
        Exit::Policy
    };
    match args.output {
        Format::Json => json(args, result, out)?,
        Format::Text => text(args, result, out)?,
    }
    Ok(exit)
}

fn json(args: &Args, result: Result<Checked, Rejected>, out: &mut Out) -> Result<(), Failure> {
    let path = subject(args);
    let report = match &result {
        Ok(checked) => Report {
            ok: true,
            path,
            diagnostics: &checked.warnings,
            settings: checked.settings.as_ref(),
            error: None,
            summary: checked.policy.as_ref(),
        },
        Err(rejected) => Report {
            ok: false,
            path,
            diagnostics: rejected.diagnostics(),
            settings: None,
            // What diagnostics say need not be said twice.
            error: Some(rejected.summary()).filter(|_| rejected.diagnostics().is_empty()),
            summary: None,
        },
    };
    Ok(out.json(&report)?)
}

fn text(args: &Args, result: Result<Checked, Rejected>, out: &mut Out) -> Result<(), Failure> {
    let checked = match result {
        Ok(checked) => checked,
        Err(rejected) => {
            out.text(&rejected.render(out.color))?;
            let errors = rejected.diagnostics().iter();
            let errors = errors
                .filter(|d| d.severity == crate::policy::Severity::Error)
                .count();
            if errors > 0 {
                let verdict = out.paint(Hue::Bad, &count(errors, "error"));
                out.line(format!("\n{}: {verdict}", subject(args)))?;
            }
            return Ok(());
        }
    };
    if !checked.warnings.is_empty() {
        let all = checked.texts.all();
        out.text(&diag::render_all(&checked.warnings, &all, out.color))?;
        out.line("")?;
    }
    let ok = out.paint(Hue::Good, "ok");
    out.line(format!("{}: {ok}", subject(args)))?;
    if let Some(summary) = &checked.policy {
        policy(summary, out)?;
    }
    if let Some(settings) = &checked.settings {
        let off = match &settings.essentials_off[..] {
            [] => "every essential on".to_owned(),
            off => format!("essentials off: {}", off.join(", ")),
        };
        out.line(format!(
            "  settings: {}, {}, {off}",
            count(settings.failsafes, "failsafe"),
            count(settings.ethertypes, "ethertype"),
        ))?;
    }
    Ok(())
}

fn policy(summary: &Summary, out: &mut Out) -> Result<(), Failure> {
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
