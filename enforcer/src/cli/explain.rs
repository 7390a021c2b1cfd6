//! `enforcer explain`

use std::{io::Write, net::IpAddr, path::PathBuf};

use crate::{
    api::{
        client::Client,
        types::{Default as DenyDefault, ExplainRequest, Explanation},
    },
    daemon::{
        explain::{explain, now, one_flow},
        files::Sources,
        guard::Trust,
        load,
    },
};

use super::{
    Exit, Failure, Format, Globals, block_on,
    check::environment,
    out::{Hue, Out, clean, progress},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Who opens the flow.
    #[arg(long, value_name = "IP")]
    from: IpAddr,
    /// To whom.
    #[arg(long, value_name = "IP")]
    to: IpAddr,
    /// What: tcp/5432, udp/53, icmp/echo-request, proto/gre, postgresql.
    #[arg(long)]
    service: String,
    /// Ask this policy (directory or file) instead of the running one.
    #[arg(long, value_name = "PATH")]
    segments: Option<PathBuf>,
    /// Form of the output.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

pub fn run(args: &Args, globals: &Globals, out: &mut Out) -> Result<Exit, Failure> {
    let request = ExplainRequest {
        from: args.from,
        to: args.to,
        service: args.service.clone(),
    };
    // Wrong whatever the policy says, and whether a daemon runs or not.
    one_flow(&request).map_err(|e| Failure::new(Exit::Usage, e))?;
    let explanation = match &args.segments {
        Some(path) => {
            // Rules are asked, and settings pass packets before them.
            let sources = Sources {
                segments: path.clone(),
                settings: None,
                trust: Trust::Anyone,
            };
            let loaded = progress(|progress| load::load(&sources, &environment(), progress))
                .map_err(|rejected| {
                    let text = rejected.render(out.color);
                    let _ = std::io::stderr().write_all(text.as_bytes());
                    Failure::new(Exit::Policy, format!("{} was refused", path.display()))
                })?;
            let answer = explain(&loaded.policy, &loaded.image, &request, now());
            let mut explanation = answer.map_err(|e| Failure::new(Exit::Usage, e))?;
            explanation.policy = path.display().to_string();
            explanation
        }
        None => {
            let client = Client::new(&globals.socket);
            block_on(async { Ok(client.explain(&request).await?) })?
        }
    };
    match args.output {
        Format::Json => out.json(&explanation)?,
        Format::Text => text(&explanation, out)?,
    }
    Ok(Exit::Fine)
}

fn text(e: &Explanation, out: &mut Out) -> Result<(), Failure> {
    let hue = match e.verdict.as_str() {
        "ALLOWED" => Hue::Good,
        "DENIED" => Hue::Bad,
        _ => Hue::Warn,
    };
    let passes = match e.verdict.as_str() {
        "WOULD_DENY" => "  (judged denied; mode observe lets it pass and records it)",
        "OFF" => "  (judged denied; mode off lets it pass)",
        _ => "",
    };
    let verdict = out.paint(hue, &e.verdict);
    let flow = format!(
        "{} -> {} {}",
        e.flow.from,
        e.flow.to,
        clean(&e.flow.service)
    );
    out.line(format!("{verdict}  {flow}{passes}"))?;
    let place = match (&e.file, e.line) {
        (Some(file), Some(line)) => format!("  {}:{line}", clean(file)),
        _ => String::new(),
    };
    let strength = e.strength.as_deref();
    let strength = strength.map_or_else(String::new, |s| format!(", mode {s}"));
    let because = format!("{}{strength}{place}", because(e));
    let policy = match e.generation {
        Some(generation) => format!("{} (running, generation {generation})", clean(&e.policy)),
        None => format!("{} (not the running one)", clean(&e.policy)),
    };
    for (label, value) in [
        ("because", because),
        ("from", segments(&e.from_segments)),
        ("to", segments(&e.to_segments)),
        ("policy", policy),
    ] {
        let label = out.paint(Hue::Dim, &format!("{label:<8}"));
        out.line(format!("  {label} {value}"))?;
    }
    Ok(())
}

fn because(e: &Explanation) -> String {
    if let Some(rule) = &e.rule {
        let action = if e.reason == "rule_deny" {
            "deny"
        } else {
            "allow"
        };
        return format!("rule {rule} ({action})");
    }
    match &e.default {
        Some(DenyDefault::Segment { name, protects }) => {
            format!("no rule allows it, and {name} protects {protects}")
        }
        Some(DenyDefault::Unsegmented) => {
            let word = if e.strength.is_some() {
                "deny"
            } else {
                "allow"
            };
            format!("no segment guards it, and defaults.unsegmented is {word}")
        }
        Some(DenyDefault::Gone(text)) => text.clone(),
        None => e.reason.replace('_', " "),
    }
}

fn segments(names: &[String]) -> String {
    if names.is_empty() {
        return "no segment".to_owned();
    }
    names.join(", ")
}
