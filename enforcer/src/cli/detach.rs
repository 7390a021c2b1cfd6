//! `enforcer detach`

use std::{
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    path::PathBuf,
};

use crate::{
    api::{
        changes::Detached,
        client::{Client, ClientError},
        types::InterfaceState,
    },
    dataplane::kernel::{DEFAULT_PINS, take_off},
};

use super::{
    Exit, Failure, Format, Globals, block_on,
    out::{Hue, Out, clean, count},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Do not ask.
    #[arg(short, long)]
    yes: bool,
    /// Where programs are pinned, if no daemon answers.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_PINS)]
    pins: PathBuf,
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
    let what = match &status {
        Some(status) => {
            let enforced = status.interfaces.iter();
            let enforced = enforced.filter(|i| i.state == InterfaceState::Enforced);
            let names: Vec<_> = enforced.map(|i| clean(&i.name)).collect();
            format!("unprotected from then on: {}", list(&names))
        }
        None => format!(
            "no daemon answers; what is pinned in {}",
            args.pins.display()
        ),
    };
    if !args.yes && !agreed(&what)? {
        return Err(Failure::new(Exit::Policy, "nothing was changed"));
    }
    let interfaces = if status.is_some() {
        let Detached { interfaces } = block_on(async { Ok(client.detach().await?) })?;
        interfaces
    } else {
        let taken = take_off(&args.pins);
        let taken = taken.map_err(|error| Failure::new(Exit::Environment, error.to_string()))?;
        taken.ok_or_else(|| {
            let nothing = format!("nothing is pinned in {}", args.pins.display());
            Failure::new(Exit::NotEnforcing, nothing)
        })?
    };
    match args.output {
        Format::Json => out.json(&Detached { interfaces })?,
        Format::Text => {
            let word = out.paint(Hue::Bad, "not enforced");
            let names: Vec<_> = interfaces.iter().map(|name| clean(name)).collect();
            out.line(format!(
                "{word} any more: {}, {}; `enforcer run` enforces again",
                count(interfaces.len(), "interface"),
                list(&names)
            ))?;
        }
    }
    Ok(Exit::Fine)
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
