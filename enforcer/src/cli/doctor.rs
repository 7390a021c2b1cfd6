//! `enforcer doctor`

use std::path::PathBuf;

use serde::Serialize;

use crate::{
    api::client::Client,
    daemon::{
        doctor::{Check, Health, Patient, examine},
        files::{SettingsPath, Sources},
        guard::Trust,
    },
    policy::pattern::Pattern,
};

use super::{
    DEFAULT_SEGMENTS, DEFAULT_SETTINGS, Exit, Failure, Format, Globals, block_on,
    out::{Hue, Out, clean, count},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Policy of the daemon: a directory or one file.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SEGMENTS)]
    segments: PathBuf,
    /// Settings of the daemon.
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// The daemon runs with --follow-links.
    #[arg(long)]
    follow_links: bool,
    /// Interfaces to look at (default: those that the running daemon enforces).
    #[arg(long, value_name = "IF", value_delimiter = ',')]
    interface: Vec<Pattern>,
    /// Form of the output.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

#[derive(Serialize)]
struct Report<'a> {
    ok: bool,
    checks: &'a [Check],
}

pub fn run(args: &Args, globals: &Globals, out: &mut Out) -> Result<Exit, Failure> {
    let client = Client::new(&globals.socket);
    let status = block_on(async { Ok(client.status().await) })?;
    let checks = examine(&Patient {
        sources: Sources {
            segments: args.segments.clone(),
            settings: Some(SettingsPath {
                path: args.config.clone().unwrap_or(DEFAULT_SETTINGS.into()),
                required: args.config.is_some(),
            }),
            trust: Trust::Owner {
                links: args.follow_links,
            },
        },
        socket: globals.socket.clone(),
        status: status.map_err(|error| error.to_string()),
        interfaces: args.interface.clone(),
    });
    let failed = checks.iter().filter(|c| c.state == Health::Fail).count();
    let report = Report {
        ok: failed == 0,
        checks: &checks,
    };
    match args.output {
        Format::Json => out.json(&report)?,
        Format::Text => text(&checks, failed, out)?,
    }
    Ok(if failed == 0 {
        Exit::Fine
    } else {
        Exit::Policy
    })
}

fn text(checks: &[Check], failed: usize, out: &mut Out) -> Result<(), Failure> {
    for check in checks {
        let (hue, word) = match check.state {
            Health::Ok => (Hue::Good, "ok  "),
            Health::Warn => (Hue::Warn, "warn"),
            Health::Fail => (Hue::Bad, "fail"),
        };
        let word = out.paint(hue, word);
        let name = out.paint(Hue::Dim, &format!("{:<12}", check.name));
        out.line(format!("{word}  {name}  {}", clean(&check.said)))?;
        if let Some(mend) = &check.mend {
            out.line(format!("{:>20}{}", "", clean(mend)))?;
        }
    }
    let warned = checks.iter().filter(|c| c.state == Health::Warn).count();
    let verdict = match (failed, warned) {
        (0, 0) => "nothing is wrong".to_owned(),
        (0, warned) => count(warned, "warning"),
        (failed, warned) => format!("{failed} failed, {}", count(warned, "warning")),
    };
    out.line(format!("\n{verdict}"))?;
    Ok(())
}
