//! `enforcer history`

use crate::api::{
    changes::{Change, ChangeOutcome, History},
    client::Client,
};

use super::{
    Exit, Failure, Format, Globals, block_on,
    out::{Hue, Out, clean, count},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The last N changes only.
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// Form of the output.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

pub fn run(args: &Args, globals: &Globals, out: &mut Out) -> Result<Exit, Failure> {
    let client = Client::new(&globals.socket);
    let mut history = block_on(async { Ok(client.history().await?) })?;
    let skipped = history
        .changes
        .len()
        .saturating_sub(args.last.unwrap_or(usize::MAX));
    history.changes.drain(..skipped);
    match args.output {
        Format::Json => out.json(&history)?,
        Format::Text => text(&history, out)?,
    }
    Ok(Exit::Fine)
}

fn text(history: &History, out: &mut Out) -> Result<(), Failure> {
    if history.dropped > 0 {
        let dropped = usize::try_from(history.dropped).unwrap_or(usize::MAX);
        let dropped = count(dropped, "older change");
        out.line(out.paint(Hue::Dim, &format!("{dropped} not kept any more")))?;
    }
    for change in &history.changes {
        line(change, history, out)?;
    }
    match &history.directory {
        Some(directory) => {
            let kept = format!(
                "kept in {}; * can be put in force again by number",
                clean(directory)
            );
            out.line(out.paint(Hue::Dim, &kept))?;
        }
        None => out.line(out.paint(Hue::Warn, "kept in memory until the daemon ends"))?,
    }
    if let Some(problem) = &history.problem {
        out.line(out.paint(Hue::Bad, &clean(problem)))?;
    }
    Ok(())
}

fn line(change: &Change, history: &History, out: &mut Out) -> Result<(), Failure> {
    let time = change.time.0.to_zoned(jiff::tz::TimeZone::system());
    let hue = match change.outcome {
        ChangeOutcome::InForce | ChangeOutcome::Confirmed => Hue::Good,
        ChangeOutcome::OnTrial | ChangeOutcome::Reverted => Hue::Warn,
        ChangeOutcome::Refused | ChangeOutcome::NotEnforcing => Hue::Bad,
    };
    let mark = if change.kept { '*' } else { ' ' };
    let mut kind = change.kind.name().to_owned();
    if change.confirm_within.is_some() {
        kind.push_str(", trial");
    }
    let mut text = format!(
        "{:>5}{mark} {}  {kind:<14} {}  {}",
        change.number,
        time.strftime("%Y-%m-%d %H:%M:%S"),
        out.paint(hue, &format!("{:<10}", change.outcome.name())),
        clean(&change.path)
    );
    if let (Some(hash), Some(rules)) = (&change.hash, change.rules) {
        text.push_str(&format!("  {}, {hash}", count(rules, "rule")));
    }
    if let Some(state) = change.state.filter(|state| *state != change.number) {
        text.push_str(&format!("  state {state}"));
    }
    if change.state.is_some() && change.state == history.in_force {
        text.push_str("  (in force)");
    }
    out.line(text)?;
    let by = change.by.as_ref().map(ToString::to_string);
    let who = by.or_else(|| change.cause.clone());
    for detail in [who, change.message.clone(), change.error.clone()]
        .into_iter()
        .flatten()
    {
        for part in detail.lines() {
            out.line(out.paint(Hue::Dim, &format!("       {}", clean(part))))?;
        }
    }
    Ok(())
}
