//! `enforcer detach`

use std::{
    fs,
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::{
    api::{
        changes::Detached,
        client::{Client, ClientError},
        types::{InterfaceState, Status},
    },
    daemon::expedite::Expedite,
    dataplane::kernel::{DEFAULT_PINS, TakenOff, take_off},
};

use super::{
    DEFAULT_STATE, Exit, Failure, Format, Globals, block_on,
    out::{Hue, Out, clean, count},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Do not ask.
    #[arg(short, long)]
    yes: bool,
    /// Where programs are pinned: those of the daemon that answers, or others, which no daemon may be
    /// at work with (default: the daemon's; without one /sys/fs/bpf/enforcer).
    #[arg(long, value_name = "DIR")]
    pins: Option<PathBuf>,
    /// Form of the output.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

pub fn run(args: &Args, globals: &Globals, out: &mut Out) -> Result<Exit, Failure> {
    let client = Client::new(&globals.socket);
    let status = block_on(async {
        match client.status().await {
            Ok(status) => Ok(Some(status)),
            Err(ClientError::Unreachable { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    })?;
    let daemons = |status: &Status| {
        let own = status.pins.as_deref().map(Path::new);
        args.pins
            .as_deref()
            .is_none_or(|named| own.is_some_and(|own| same(own, named)))
    };
    let pins = args.pins.as_deref().unwrap_or(Path::new(DEFAULT_PINS));
    let at = clean(&pins.display().to_string());
    let what = match &status {
        Some(status) if daemons(status) => {
            let enforced = status.interfaces.iter();
            let enforced = enforced.filter(|i| i.state == InterfaceState::Enforced);
            let names: Vec<_> = enforced.map(|i| clean(&i.name)).collect();
            format!("unprotected from then on: {}", list(&names))
        }
        Some(_) => format!("not the daemon's, which enforces on; what is pinned in {at}"),
        None => format!("no daemon answers; what is pinned in {at}"),
    };
    if !args.yes && !agreed(&what)? {
        return Err(Failure::new(Exit::Policy, "nothing was changed"));
    }
    let beside = status.as_ref().is_some_and(|status| !daemons(status));
    let interfaces = if status.is_some() && !beside {
        let Detached { interfaces } = block_on(async { Ok(client.detach().await?) })?;
        interfaces
    } else {
        let state = Some(Path::new(DEFAULT_STATE)).filter(|state| state.is_dir());
        let expedite = Expedite::of_kernel(state, &globals.socket);
        let short = expedite.begin();
        let enforced = status.iter().flat_map(|status| &status.interfaces);
        let enforced = enforced.filter(|i| i.enforced).map(|i| i.ifindex);
        let taken = take_off(pins, &enforced.collect());
        drop(short);
        let taken = taken.map_err(|error| Failure::new(Exit::Environment, error.to_string()))?;
        let taken = taken.ok_or_else(|| {
            Failure::new(Exit::NotEnforcing, format!("nothing is pinned in {at}"))
        })?;
        say(&taken)?;
        taken.interfaces
    };
    match args.output {
        Format::Json => out.json(&Detached { interfaces })?,
        Format::Text => {
            let word = out.paint(Hue::Bad, "not enforced");
            let names: Vec<_> = interfaces.iter().map(|name| clean(name)).collect();
            let number = count(interfaces.len(), "interface");
            let names = list(&names);
            out.line(if beside {
                format!("{word} any more by what was pinned in {at}: {number}, {names}; the daemon enforces on")
            } else {
                format!("{word} any more: {number}, {names}; `enforcer run` enforces again")
            })?;
        }
    }
    Ok(Exit::Fine)
}

/// Whether both name one directory.
fn same(one: &Path, other: &Path) -> bool {
    let id = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    match (id(one), id(other)) {
        (Some(one), Some(other)) => one == other,
        _ => std::path::absolute(other).is_ok_and(|other| one == other),
    }
}

/// Tells what stays.
fn say(taken: &TakenOff) -> Result<(), Failure> {
    let mut stderr = io::stderr();
    for left in &taken.left {
        let left = clean(&left.display().to_string());
        writeln!(
            stderr,
            "warning: {left} is no enforcer's, and was left alone"
        )?;
    }
    if taken.unreached {
        let said = "the filters are in another network namespace: if it is still there they let \
                    established flows pass and deny everything else, until an enforcer starts there";
        writeln!(stderr, "warning: {said}")?;
    }
    Ok(())
}

fn list(names: &[String]) -> String {
    match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    }
}

fn agreed(what: &str) -> Result<bool, Failure> {
    let mut stderr = io::stderr();
    if !io::stdin().is_terminal() || !stderr.is_terminal() {
        return Err(Failure::new(
            Exit::Usage,
            format!("{what}\n  help: nobody can be asked here: --yes takes the programs off"),
        ));
    }
    let _ = write!(stderr, "{what}\nTake the programs off? [y/N] ");
    let _ = stderr.flush();
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
