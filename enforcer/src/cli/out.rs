//! Data for stdout.

use std::{
    io::{self, BufWriter, IsTerminal, StdoutLock, Write},
    time::{Duration, Instant},
};

use serde::Serialize;

use super::Color;
use crate::daemon::progress::{Progress, QUIET, Stage, watched};

/// Colours, by what they are for.
#[derive(Clone, Copy, Debug)]
pub enum Hue {
    /// Fine.
    Good,
    /// Look at it.
    Warn,
    /// Wrong, or denied.
    Bad,
    /// Labels.
    Dim,
    /// What matters most.
    Strong,
}

/// Stdout, locked and buffered. Errors go up; see `Failure`.
pub struct Out {
    writer: BufWriter<StdoutLock<'static>>,
    /// Whether to colour.
    pub color: bool,
}

impl Out {
    /// Locks stdout for good.
    pub fn new(color: Color) -> Self {
        let stdout = io::stdout();
        Self {
            color: wanted(color, stdout.is_terminal()),
            writer: BufWriter::new(stdout.lock()),
        }
    }

    /// `text` in a colour, if there are colours.
    pub fn paint(&self, hue: Hue, text: &str) -> String {
        let code = match hue {
            Hue::Good => "32",
            Hue::Warn => "33",
            Hue::Bad => "1;31",
            Hue::Dim => "2",
            Hue::Strong => "1",
        };
        if self.color {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// A line.
    ///
    /// # Errors
    /// What the system says.
    pub fn line(&mut self, text: impl AsRef<str>) -> io::Result<()> {
        writeln!(self.writer, "{}", text.as_ref())
    }

    /// Text that has its newlines.
    ///
    /// # Errors
    /// What the system says.
    pub fn text(&mut self, text: &str) -> io::Result<()> {
        self.writer.write_all(text.as_bytes())
    }

    /// A value on one line.
    ///
    /// # Errors
    /// What the system says.
    pub fn json_line(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.writer, value)?;
        self.writer.write_all(b"\n")
    }

    /// A value over several lines.
    ///
    /// # Errors
    /// What the system says.
    pub fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut self.writer, value)?;
        self.writer.write_all(b"\n")
    }

    /// Hands over what is buffered.
    ///
    /// # Errors
    /// What the system says.
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

/// Does what may take long; says so on stderr, if somebody looks at it.
pub fn progress<T>(work: impl FnOnce(&Progress) -> T) -> T {
    let stderr = io::stderr();
    if !stderr.is_terminal() {
        return work(&Progress::default());
    }
    let tell = |stage: Stage, elapsed: Duration| {
        // One line that is written over.
        let _ = write!(io::stderr(), "\r\x1b[K{stage} ({} s)", elapsed.as_secs());
    };
    let start = Instant::now();
    let result = watched(tell, work);
    if start.elapsed() > QUIET {
        let _ = write!(io::stderr(), "\r\x1b[K");
    }
    result
}

/// Whether to colour a stream.
pub fn wanted(color: Color, terminal: bool) -> bool {
    match color {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
    }
}

/// Text from elsewhere (process names, paths) without what a terminal would obey.
pub fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// `1 rule`, `2 rules`.
pub fn count(number: usize, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}
