//! `enforcer flows`

use crate::api::{
    client::Client,
    types::{Flows, FlowsRequest, LiveFlow, Peer},
};

use super::{
    Exit, Failure, Format, Globals, block_on,
    out::{Hue, Out, clean},
    plan::{because, facts, tuple},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only flows that this address, or any of this segment, opened.
    #[arg(long, value_name = "IP|SEGMENT")]
    from: Option<Peer>,
    /// Only flows to this address, or to any of this segment.
    #[arg(long, value_name = "IP|SEGMENT")]
    to: Option<Peer>,
    /// Only flows of which either end is in this segment.
    #[arg(long, value_name = "SEGMENT", value_parser = segment)]
    segment: Option<String>,
    /// At most so many, those with most bytes.
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    limit: usize,
    /// Form of the output.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

fn segment(text: &str) -> Result<String, String> {
    match text.parse()? {
        Peer::Segment(name) => Ok(name),
        Peer::Address(ip) => Err(format!("{ip} is an address: use --from or --to")),
    }
}

pub fn run(args: &Args, globals: &Globals, out: &mut Out) -> Result<Exit, Failure> {
    let request = FlowsRequest {
        from: args.from.clone(),
        to: args.to.clone(),
        segment: args.segment.clone(),
        limit: Some(args.limit),
    };
    let client = Client::new(&globals.socket);
    let flows = block_on(async { Ok(client.flows(&request).await?) })?;
    match args.output {
        Format::Json => out.json(&flows)?,
        Format::Text => text(&flows, out)?,
    }
    Ok(Exit::Fine)
}

fn text(flows: &Flows, out: &mut Out) -> Result<(), Failure> {
    for flow in &flows.flows {
        let tuple = out.paint(Hue::Strong, &tuple(flow));
        out.line(format!("{tuple}  {}", facts(flow)))?;
        let hue = if flow.now.outcome.passes() {
            Hue::Dim
        } else {
            Hue::Bad
        };
        let why = out.paint(hue, &because(&flow.now));
        let names = format!(
            "{} -> {}",
            names(&flow.from_segments),
            names(&flow.to_segments)
        );
        let generation = generation(flow, flows.generation);
        out.line(format!("    {names}: {why}{generation}"))?;
    }
    let shown = flows.flows.len() as u64;
    let mut summary = match flows.total {
        1 => "1 live flow".to_owned(),
        total => format!("{total} live flows"),
    };
    if flows.matched != flows.total {
        summary.push_str(&format!(", {} of them as asked for", flows.matched));
    }
    if shown < flows.matched {
        summary.push_str(&format!("; the {shown} with most bytes are shown"));
    }
    Ok(out.line(summary)?)
}

/// Of one that no packet was judged of since the policy changed.
fn generation(flow: &LiveFlow, live: u32) -> String {
    if flow.generation == live {
        return String::new();
    }
    format!(", admitted by generation {}", flow.generation)
}

fn names(names: &[String]) -> String {
    if names.is_empty() {
        return "unsegmented".to_owned();
    }
    clean(&names.join("+"))
}
