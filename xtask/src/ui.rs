//! What a person sees: steps, progress, durations and colour.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a long step says it is alive when the output is no terminal.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How much of a failed step's output is shown.
const TAIL: usize = 40;

/// Colours for one output stream; all empty when colour is off.
#[derive(Clone, Copy)]
pub struct Paint {
    on: bool,
}

impl Paint {
    /// Colour for stdout: on a terminal only, and never with `NO_COLOR` or `off`.
    pub fn stdout(off: bool) -> Self {
        Self {
            on: !off && no_color_unset() && std::io::stdout().is_terminal(),
        }
    }

    /// Colour for stderr, by the same rules.
    pub fn stderr() -> Self {
        Self {
            on: no_color_unset() && std::io::stderr().is_terminal(),
        }
    }

    pub fn green(self, text: &str) -> String {
        self.wrap("32", text)
    }

    pub fn red(self, text: &str) -> String {
        self.wrap("31", text)
    }

    pub fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.on {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

fn no_color_unset() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Announces a step on stderr.
pub fn step(text: &str) {
    eprintln!("{}", Paint::stderr().bold(&format!("==> {text}")));
}

/// Says something about the current step on stderr.
pub fn note(text: &str) {
    eprintln!("    {text}");
}

/// A duration as a person reads it.
pub fn took(since: Instant) -> String {
    let elapsed = since.elapsed();
    match elapsed.as_secs() {
        0 => format!("{} ms", elapsed.as_millis()),
        1..=119 => format!("{:.1} s", elapsed.as_secs_f32()),
        seconds => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

/// Runs a long command quietly: one moving line on a terminal, a sign of life now and then
/// elsewhere, and the end of its output when it fails.
pub fn run_quietly(what: &str, command: &mut Command) -> Result<()> {
    let start = Instant::now();
    let terminal = std::io::stderr().is_terminal();
    eprint!("    {what} …");
    if !terminal {
        eprintln!();
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;

    let (sender, lines) = mpsc::channel();
    let outputs: [Option<Box<dyn Read + Send>>; 2] = [
        child.stdout.take().map(|out| Box::new(out) as _),
        child.stderr.take().map(|out| Box::new(out) as _),
    ];
    for output in outputs.into_iter().flatten() {
        let sender = sender.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                // The receiver is gone only when this process is ending.
                let _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
        });
    }
    drop(sender);

    let mut tail = VecDeque::new();
    let mut spoken = Instant::now();
    for line in lines {
        if line.is_empty() {
            continue;
        }
        let short: String = line.trim().chars().take(60).collect();
        if terminal {
            eprint!("\r\x1b[2K    {what} … {short}");
            let _ = std::io::stderr().flush();
        } else if spoken.elapsed() > HEARTBEAT {
            note(&format!("  {} so far: {short}", took(start)));
            spoken = Instant::now();
        }
        if tail.len() == TAIL {
            tail.pop_front();
        }
        tail.push_back(line);
    }
    let status = child.wait()?;
    if terminal {
        eprint!("\r\x1b[2K");
    }
    if !status.success() {
        for line in &tail {
            eprintln!("      {line}");
        }
        bail!(
            "{what}: {} failed ({status})",
            command.get_program().display()
        );
    }
    note(&format!("{what}: done in {}", took(start)));
    Ok(())
}

/// Runs a command with its output passed on; an error names it.
pub fn run(command: &mut Command) -> Result<()> {
    if !succeeds(command)? {
        bail!("{} failed", describe(command));
    }
    Ok(())
}

/// Like [`run`], but a failure of the command is an answer and not an error.
pub fn succeeds(command: &mut Command) -> Result<bool> {
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", describe(command)))?;
    Ok(status.success())
}

/// Program and arguments on one line.
pub fn describe(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
