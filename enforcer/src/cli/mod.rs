//! The command line. One file a verb; what they share is here and in [`out`].

mod apply;
mod check;
mod completions;
mod denials;
mod detach;
mod doctor;
mod explain;
mod flows;
mod history;
mod out;
mod plan;
mod run;
mod shadow;
mod status;

use std::{io::Write, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum};

use crate::{
    api::{DEFAULT_SOCKET, client::ClientError},
    dataplane::{Dataplane, DataplaneError, kernel::Keep},
};

use out::Out;

/// Where policies are unless told otherwise.
const DEFAULT_SEGMENTS: &str = "/etc/enforcer/segments";
/// Where history and states are kept unless told otherwise.
const DEFAULT_STATE: &str = "/var/lib/enforcer";
/// Where the daemon's settings are unless told otherwise.
const DEFAULT_SETTINGS: &str = "/etc/enforcer/enforcer.yaml";

/// How the kernel side is to be.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Where it is pinned.
    pub keep: Keep,
    /// Flows of the table.
    pub flows: u32,
    /// Debug messages.
    pub debug: bool,
    /// Programs are loaded anew though they are of this build.
    pub anew: bool,
}

/// Adopts what is there; with a number, loads the programs for images of so many words.
pub type Open = fn(&Kernel, Option<u32>) -> Result<Option<Box<dyn Dataplane>>, DataplaneError>;

const EXIT_CODES: &str = "Exit codes: 0 fine, 1 the policy is no good, or doctor found a fault, 2 plan, shadow: there are changes, \
3 the machine lacks something, 4 degraded, 5 not enforcing, 64 usage.";

/// Microsegmentation for Linux: segments in YAML, enforced by eBPF.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Args)]
struct Globals {
    /// Control socket of the running enforcer.
    #[arg(long, global = true, value_name = "PATH", env = "ENFORCER_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Colour in the output; `auto` means on a terminal, unless NO_COLOR is set.
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    color: Color,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Enforce a policy until stopped.
    Run(run::Args),
    /// Say whether a policy is good; nothing is changed.
    Check(check::Args),
    /// Put the policy of a directory in force, for good or on trial.
    Apply(apply::Args),
    /// Keep the policy that is on trial.
    Confirm(apply::Confirm),
    /// Put an earlier policy in force again, or end a trial.
    Rollback(apply::Rollback),
    /// Show what was changed, by whom, and what came of it.
    History(history::Args),
    /// End enforcement: take the programs off. Says what becomes unprotected, and asks.
    Detach(detach::Args),
    /// Show denied packets.
    Denials(denials::Args),
    /// Say why a flow is allowed or denied.
    Explain(explain::Args),
    /// Show what another policy would change, and which live flows it would cut; nothing is changed.
    Plan(plan::Args),
    /// Ask another policy beside the one in force, without obeying it: count where they differ.
    Shadow(shadow::Args),
    /// Show live flows, and the rules that admit them.
    Flows(flows::Args),
    /// Show what is enforced, and how well.
    Status(status::Args),
    /// Say what this host lacks for being enforced, and how to mend it; nothing is changed.
    Doctor(doctor::Args),
    /// Print a completion script.
    Completions(completions::Args),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Color {
    Auto,
    Always,
    Never,
}

/// Form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Exit {
    Fine = 0,
    Policy = 1,
    Changes = 2,
    Environment = 3,
    Degraded = 4,
    NotEnforcing = 5,
    Usage = 64,
}

/// Why a verb ends early. An empty message says nothing.
#[derive(Debug)]
struct Failure {
    exit: Exit,
    message: String,
}

impl Failure {
    fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
        }
    }
}

impl From<std::io::Error> for Failure {
    /// Of a write to stdout. Whoever closes the pipe has seen enough.
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return Self::new(Exit::Fine, "");
        }
        Self::new(Exit::Environment, format!("cannot write: {error}"))
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let exit = match error {
            ClientError::Unreachable { .. } | ClientError::Broken(_) => Exit::NotEnforcing,
            ClientError::Forbidden(_)
            | ClientError::NotAllowed(_)
            | ClientError::Busy(_)
            | ClientError::Failed(_) => Exit::Environment,
            ClientError::Rejected(_) | ClientError::Conflict(_) => Exit::Policy,
            // The daemon understood, and does not know what was named.
            ClientError::Refused(_) => Exit::Usage,
        };
        Self::new(exit, error.to_string())
    }
}

/// Runs the command line of this process.
pub fn main(open: Open) -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are data: a closed pipe is fine.
            let _ = error.print();
            let exit = if error.use_stderr() {
                Exit::Usage
            } else {
                Exit::Fine
            };
            return code(exit);
        }
    };
    let mut out = Out::new(cli.globals.color);
    let result = match &cli.verb {
        Verb::Run(args) => run::run(args, &cli.globals, open),
        Verb::Check(args) => check::run(args, &mut out),
        Verb::Apply(args) => apply::run(args, &cli.globals, &mut out),
        Verb::Confirm(args) => apply::confirm(args, &cli.globals, &mut out),
        Verb::Rollback(args) => apply::rollback(args, &cli.globals, &mut out),
        Verb::History(args) => history::run(args, &cli.globals, &mut out),
        Verb::Detach(args) => detach::run(args, &cli.globals, &mut out),
        Verb::Denials(args) => denials::run(args, &cli.globals, &mut out),
        Verb::Explain(args) => explain::run(args, &cli.globals, &mut out),
        Verb::Plan(args) => plan::run(args, &cli.globals, &mut out),
        Verb::Shadow(args) => shadow::run(args, &cli.globals, &mut out),
        Verb::Flows(args) => flows::run(args, &cli.globals, &mut out),
        Verb::Status(args) => status::run(args, &cli.globals, &mut out),
        Verb::Doctor(args) => doctor::run(args, &cli.globals, &mut out),
        Verb::Completions(args) => completions::run(args, &mut out),
    };
    let result = result.and_then(|exit| {
        out.flush()?;
        Ok(exit)
    });
    match result {
        Ok(exit) => code(exit),
        Err(failure) => {
            // What was printed before belongs to the reader, pipe or not.
            let _ = out.flush();
            if !failure.message.is_empty() {
                let _ = writeln!(std::io::stderr(), "error: {}", failure.message.trim_end());
            }
            code(failure.exit)
        }
    }
}

fn code(exit: Exit) -> ExitCode {
    ExitCode::from(exit as u8)
}

/// A runtime for one request.
fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| {
        Failure::new(
            Exit::Environment,
            format!("cannot start a runtime: {error}"),
        )
    })?;
    runtime.block_on(work)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn interfaces_repeat_and_split() {
        let cli = Cli::try_parse_from([
            "enforcer",
            "run",
            "--segments",
            "s",
            "--interface",
            "eth0,veth*",
            "--interface",
            "br0",
        ]);
        let Verb::Run(args) = cli.unwrap().verb else {
            panic!("another verb");
        };
        let names: Vec<_> = args.interface.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["eth0", "veth*", "br0"]);
    }
}
