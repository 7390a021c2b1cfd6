//! `enforcer completions`

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, Exit, Failure, out::Out};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// For which shell.
    shell: Shell,
}

pub fn run(args: &Args, out: &mut Out) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "enforcer", &mut script);
    out.text(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Fine)
}
