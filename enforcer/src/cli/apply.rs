//! `enforcer apply`, `confirm` and `rollback`

use std::{
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    path::PathBuf,
    time::Duration,
};

use tokio::time::sleep;

use crate::api::{
    changes::{
        ApplyRequest, Changed, LONGEST_TRIAL, OriginKind, RollbackRequest, SHORTEST_TRIAL,
        TrialStatus,
    },
    client::Client,
    types::Status,
};

use super::{
    Exit, Failure, Format, Globals, block_on,
    out::{Hue, Out, clean, count},
};

const APPLY_HELP: &str = "The daemon reads DIR, and keeps a copy: a later edit of the directory that it \
watches is a newer change, and takes effect as ever. On a terminal the change is shown and confirmed; \
elsewhere -y is needed.

With --confirm-within the kernel itself goes back to what was in force before, unless `enforcer confirm` \
comes in time; a killed daemon or a cut connection does not stop it. Confirm from a new session: that \
shows that one can still be had. Ctrl-C during the countdown leaves the trial running.";

#[derive(Debug, clap::Args)]
#[command(after_help = APPLY_HELP)]
pub struct Args {
    /// Policy: a directory or one file.
    path: PathBuf,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Go back unless it is confirmed within this time: `60s`, `5m`.
    #[arg(long, value_name = "TIME", value_parser = trial_time)]
    confirm_within: Option<Duration>,
    /// Do not ask.
    #[arg(short = 'y', long)]
    yes: bool,
    /// Why, for the history.
    #[arg(long, value_name = "TEXT")]
    message: Option<String>,
    /// Say what would come of it, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Do not wait for the end of the trial.
    #[arg(long)]
    no_wait: bool,
    /// Form of the output.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

#[derive(Debug, clap::Args)]
pub struct Confirm {
    /// Form of the output.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

#[derive(Debug, clap::Args)]
pub struct Rollback {
    /// Number of a change in the history; without it the state before the one in force. During a
    /// trial `rollback` without a number ends it at once, and does not ask.
    change: Option<u64>,
    #[command(flatten)]
    options: Options,
}

/// `60s`, `5m`, `1h`, `90`.
pub fn trial_time(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3_600,
        _ => return Err("a number with s, m or h".to_owned()),
    };
    let seconds = digits.parse().ok().and_then(|n: u64| n.checked_mul(unit));
    let seconds = seconds.filter(|s| (SHORTEST_TRIAL..=LONGEST_TRIAL).contains(s));
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| format!("{SHORTEST_TRIAL}s to {}h", LONGEST_TRIAL / 3_600))
}

/// What is asked of the daemon.
enum Request {
    Apply(ApplyRequest),
    Rollback(RollbackRequest),
}

impl Request {
    async fn send(&self, client: &Client) -> Result<Changed, Failure> {
        Ok(match self {
            Self::Apply(request) => client.apply(request).await,
            Self::Rollback(request) => client.rollback(request).await,
        }?)
    }

    /// The same for a look, or for true.
    fn with(&self, look: bool, seen: Option<String>) -> Self {
        match self {
            Self::Apply(request) => Self::Apply(ApplyRequest {
                dry_run: look,
                content: seen,
                ..request.clone()
            }),
            Self::Rollback(request) => Self::Rollback(RollbackRequest {
                dry_run: look,
                content: seen,
                ..request.clone()
            }),
        }
    }
}

pub fn run(args: &Args, globals: &Globals, out: &mut Out) -> Result<Exit, Failure> {
    let path = std::path::absolute(&args.path);
    let path = path.map_err(|e| Failure::new(Exit::Usage, e.to_string()))?;
    let options = &args.options;
    let request = Request::Apply(ApplyRequest {
        path,
        confirm_within: options.confirm_within.map(|within| within.as_secs()),
        message: options.message.clone(),
        dry_run: false,
        content: None,
    });
    change(&request, options, globals, out)
}

pub fn rollback(args: &Rollback, globals: &Globals, out: &mut Out) -> Result<Exit, Failure> {
    let options = &args.options;
    let request = RollbackRequest {
        to: args.change,
        confirm_within: options.confirm_within.map(|within| within.as_secs()),
        message: options.message.clone(),
        dry_run: false,
        content: None,
    };
    let plain = args.change.is_none() && options.confirm_within.is_none() && !options.dry_run;
    if plain {
        let client = Client::new(&globals.socket);
        let status = block_on(async { Ok(client.status().await?) })?;
        if status.trial.is_some() {
            let request = Request::Rollback(request);
            let changed = block_on(request.send(&client))?;
            return ended(&changed, "the trial is over", options.output, out);
        }
    }
    change(&Request::Rollback(request), options, globals, out)
}

pub fn confirm(args: &Confirm, globals: &Globals, out: &mut Out) -> Result<Exit, Failure> {
    let client = Client::new(&globals.socket);
    let changed = block_on(async { Ok(client.confirm().await?) })?;
    ended(&changed, "confirmed", args.output, out)
}

fn ended(changed: &Changed, what: &str, output: Format, out: &mut Out) -> Result<Exit, Failure> {
    if output == Format::Json {
        out.json(changed)?;
        return Ok(Exit::Fine);
    }
    let path = clean(&changed.path);
    out.line(format!(
        "{what}: {path} is in force, generation {}",
        changed.generation
    ))?;
    warn(changed);
    Ok(Exit::Fine)
}

/// Looks, shows, asks, changes, and waits.
fn change(
    request: &Request,
    options: &Options,
    globals: &Globals,
    out: &mut Out,
) -> Result<Exit, Failure> {
    let client = Client::new(&globals.socket);
    let terminal = io::stdin().is_terminal() && io::stderr().is_terminal();
    if !options.yes && !options.dry_run && !terminal {
        return Err(Failure::new(
            Exit::Usage,
            "nobody can be asked: standard input is no terminal\n  help: -y applies without asking, \
             --dry-run only looks",
        ));
    }
    let mut seen = None;
    if !options.yes || options.dry_run {
        let look = block_on(request.with(true, None).send(&client))?;
        if options.dry_run && options.output == Format::Json {
            out.json(&look)?;
            return Ok(Exit::Fine);
        }
        preview(&look, out)?;
        if options.dry_run {
            return Ok(Exit::Fine);
        }
        out.flush()?;
        if !agreed()? {
            return Err(Failure::new(Exit::Policy, "nothing was changed"));
        }
        seen = Some(look.content);
    }
    let changed = block_on(request.with(false, seen).send(&client))?;
    if options.output == Format::Json {
        out.json(&changed)?;
    } else {
        done(&changed, out)?;
    }
    out.flush()?;
    match &changed.trial {
        Some(trial) if terminal && !options.no_wait => block_on(countdown(&client, trial)),
        Some(_) | None => Ok(Exit::Fine),
    }
}

/// What the change would be. The plan belongs here as well.
fn preview(look: &Changed, out: &mut Out) -> Result<(), Failure> {
    let contents = format!(
        "{}, {}, hash {}",
        count(look.segments, "segment"),
        count(look.rules, "rule"),
        look.hash
    );
    let path = out.paint(Hue::Strong, &clean(&look.path));
    out.line(format!("{path}: {contents}"))?;
    if !look.changed {
        out.line("  judges every packet as the policy in force does")?;
    }
    warn(look);
    Ok(())
}

fn warn(changed: &Changed) {
    for warning in &changed.warnings {
        let _ = writeln!(io::stderr(), "warning: {}", clean(warning));
    }
}

fn agreed() -> Result<bool, Failure> {
    let mut stderr = io::stderr();
    let _ = write!(stderr, "Put it in force? [y/N] ");
    let _ = stderr.flush();
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn done(changed: &Changed, out: &mut Out) -> Result<(), Failure> {
    let path = clean(&changed.path);
    let number = changed
        .change
        .map_or(String::new(), |n| format!(" (change {n})"));
    match &changed.trial {
        None if changed.changed => out.line(format!(
            "in force: {path}, generation {}{number}",
            changed.generation
        ))?,
        None => out.line(format!("in force: {path}{number}; no verdict changes"))?,
        Some(trial) => {
            let word = out.paint(Hue::Warn, "on trial");
            out.line(format!(
                "{word}: {path}, generation {}{number}",
                changed.generation
            ))?;
            let deadline = trial.deadline.0.to_zoned(jiff::tz::TimeZone::system());
            out.line(format!(
                "  at {} the kernel goes back to {}, unless `enforcer confirm` comes first",
                deadline.strftime("%H:%M:%S %Z"),
                clean(&trial.previous)
            ))?;
        }
    }
    warn(changed);
    Ok(())
}

/// Shows what is left until the trial has ended, and says how.
async fn countdown(client: &Client, trial: &TrialStatus) -> Result<Exit, Failure> {
    let mut stderr = io::stderr();
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    loop {
        let status = client.status().await;
        let left = match &status {
            Ok(status) => match &status.trial {
                Some(now) if now.change == trial.change => Some(now.remaining_ms.div_ceil(1_000)),
                Some(_) | None => {
                    let _ = write!(stderr, "\r\x1b[K");
                    return outcome(client, status, trial.change).await;
                }
            },
            // It may be beginning anew; the kernel counts on.
            Err(_) => None,
        };
        let left = left.map_or("the daemon does not answer".to_owned(), |s| {
            format!("{s} s left")
        });
        let _ = write!(stderr, "\r\x1b[K  {left}; Ctrl-C leaves the trial running ");
        let _ = stderr.flush();
        tokio::select! {
            _ = &mut interrupted => {
                let _ = writeln!(stderr, "\nthe trial goes on: `enforcer confirm` keeps it, `enforcer rollback` ends it");
                return Ok(Exit::Fine);
            }
            () = sleep(Duration::from_secs(1)) => {}
        }
    }
}

async fn outcome(client: &Client, status: &Status, change: u64) -> Result<Exit, Failure> {
    use crate::api::changes::ChangeOutcome;
    let history = client.history().await?;
    let trial = history.changes.iter().find(|c| c.number == change);
    let confirmed = trial.is_some_and(|trial| trial.outcome == ChangeOutcome::Confirmed);
    let by = history.changes.iter().find(|c| c.of == Some(change));
    let by = by.and_then(|c| c.by.as_ref()).map(|by| format!(" by {by}"));
    let by = by.unwrap_or_default();
    if confirmed {
        let _ = writeln!(io::stderr(), "confirmed{by}: it stays");
        return Ok(Exit::Fine);
    }
    let origin = status.policy.origin.as_ref();
    let open = origin.is_some_and(|origin| origin.kind == OriginKind::PassAll);
    let what = if open {
        "everything passes"
    } else {
        status.policy.path.as_str()
    };
    Err(Failure::new(
        Exit::Policy,
        format!("not confirmed, taken back{by}: {} is in force", clean(what)),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_trials() {
        let seconds = |text: &str| trial_time(text).map(|time| time.as_secs());
        assert_eq!(seconds("60s"), Ok(60));
        assert_eq!(seconds("90"), Ok(90));
        assert_eq!(seconds("5m"), Ok(300));
        assert_eq!(seconds("24h"), Ok(86_400));
        for wrong in [
            "",
            "s",
            "2s",
            "25h",
            "-5s",
            "5x",
            "99999999999999999999h",
            "9e9h",
        ] {
            assert!(trial_time(wrong).is_err(), "{wrong}");
        }
    }
}
