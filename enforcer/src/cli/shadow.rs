//! `enforcer shadow`

use std::path::{Path, PathBuf};

use crate::{
    api::client::{Client, ClientError},
    events::rehearsal::{DifferenceCount, Sample, ShadowRequest, Shadowing},
};

use super::{
    Exit, Failure, Format, Globals, block_on,
    out::{Hue, Out, clean},
    plan::{because, flow_changes, show_refusal},
};

/// Differences that are shown as text.
const SHOWN: usize = 50;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "A directory that is named like one of the two words: ./off, ./status.\n\
    Exit codes: 0 no difference, 2 there are differences, 1 the policy is no good."
)]
pub struct Args {
    /// The policy to ask from now on, a directory or one file; `off`: ask none any more; `status`:
    /// show what came of it.
    #[arg(value_name = "DIR|off|status", default_value = "status")]
    what: PathBuf,
    /// Form of the output.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

pub fn run(args: &Args, globals: &Globals, out: &mut Out) -> Result<Exit, Failure> {
    let client = Client::new(&globals.socket);
    let (what, path) = match args.what.to_str() {
        Some(word @ ("off" | "status")) => (word, None),
        _ => ("begin", Some(args.what.as_path())),
    };
    // The daemon is in another directory.
    let whole = path.map(std::path::absolute).transpose();
    let whole =
        whole.map_err(|error| Failure::new(Exit::Usage, format!("no such path: {error}")))?;
    let answer = block_on(async {
        let answer = match (what, whole) {
            ("off", _) => client.end_shadow().await,
            (_, Some(path)) => {
                let path = path.to_string_lossy().into_owned();
                client.begin_shadow(&ShadowRequest { path }).await
            }
            _ => client.shadow().await,
        };
        match answer {
            Err(ClientError::Rejected(refusal)) => Ok(Err(refusal)),
            answer => Ok(Ok(answer?)),
        }
    })?;
    let shadowing = match (answer, args.output) {
        (Ok(shadowing), _) => shadowing,
        (Err(refusal), Format::Json) => {
            out.json(&refusal)?;
            return Ok(Exit::Policy);
        }
        (Err(refusal), Format::Text) => {
            show_refusal(&refusal, path, out)?;
            return Ok(Exit::Policy);
        }
    };
    match args.output {
        Format::Json => out.json(&shadowing)?,
        Format::Text => text(&shadowing, what, path, out)?,
    }
    Ok(match shadowing.shadow {
        Some(rehearsal) if rehearsal.differs => Exit::Changes,
        _ => Exit::Fine,
    })
}

fn text(
    shadowing: &Shadowing,
    what: &str,
    path: Option<&Path>,
    out: &mut Out,
) -> Result<(), Failure> {
    let Some(rehearsal) = &shadowing.shadow else {
        return Ok(out.line("no shadow: no candidate policy is asked")?);
    };
    let since = rehearsal.since;
    let asked = match what {
        "off" => "was asked, and is not any more",
        _ => "is asked beside the policy in force, and not obeyed",
    };
    let head = format!(
        "{} {asked}; since {since}, by {}",
        clean(&rehearsal.path),
        rehearsal.by
    );
    out.line(out.paint(Hue::Strong, &head))?;
    if let Some(problem) = &rehearsal.problem {
        let problem = clean(problem);
        out.line(out.paint(Hue::Bad, &format!("not as it should be: {problem}")))?;
    }
    for difference in rehearsal.differences.iter().take(SHOWN) {
        show(difference, out)?;
    }
    let more = rehearsal.differences.len().saturating_sub(SHOWN);
    if more > 0 {
        out.line(format!(
            "  … and {more} more differences (-o json shows all)"
        ))?;
    }
    flow_changes(&rehearsal.flows, out)?;
    if let Some(path) = path.filter(|_| what == "begin") {
        let path = clean(&path.display().to_string());
        out.line(format!(
            "see `enforcer shadow status`; when it is as wanted: `enforcer apply {path}`"
        ))?;
    }
    Ok(out.line(clean(&rehearsal.summary))?)
}

fn show(difference: &DifferenceCount, out: &mut Out) -> Result<(), Failure> {
    let hue = if difference.then.outcome.passes() {
        Hue::Good
    } else {
        Hue::Bad
    };
    let (now, then) = (because(&difference.now), because(&difference.then));
    out.line(format!(
        "  {} x {}: {now} -> {}",
        difference.packets,
        difference.hook,
        out.paint(hue, &then)
    ))?;
    for sample in &difference.examples {
        out.line(out.paint(Hue::Dim, &format!("      {}", example(sample))))?;
    }
    Ok(())
}

fn example(sample: &Sample) -> String {
    let end = |ip: Option<std::net::IpAddr>, port: Option<u16>, segments: &[String]| {
        let Some(ip) = ip else {
            return "?".to_owned();
        };
        let address = match port {
            Some(port) => std::net::SocketAddr::new(ip, port).to_string(),
            None => ip.to_string(),
        };
        let names = if segments.is_empty() {
            "unsegmented".to_owned()
        } else {
            clean(&segments.join("+"))
        };
        format!("{address} ({names})")
    };
    let mut text = format!(
        "{} -> {} {}",
        end(sample.from, sample.from_port, &sample.from_segments),
        end(sample.to, sample.to_port, &sample.to_segments),
        clean(&sample.service)
    );
    if let Some(interface) = &sample.interface {
        text.push_str(&format!(" on {}", clean(interface)));
    }
    text
}
