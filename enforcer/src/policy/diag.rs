//! Diagnostics: what is wrong with a policy, where, and what to write instead.
//!
//! Codes are stable: once released a code keeps its meaning. `docs/policy.md` lists them.

use std::fmt::Write as _;

use serde::Serialize;

use super::parse::SourceFile;

/// Characters of a source line shown around a caret before the line is cropped.
const SHOWN_WIDTH: usize = 140;
/// Characters kept in front of the caret when a line is cropped.
const SHOWN_BEFORE: usize = 60;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The policy is not loaded.
    Error,
    /// The policy is loaded; it may not say what its author meant.
    Warning,
}

/// A place in a source text: one line, columns in characters, all 1-based.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// Line.
    pub line: u32,
    /// First column.
    pub column: u32,
    /// Column after the last one; always greater than `column`.
    pub end_column: u32,
}

impl Span {
    /// The first character of a text: for what concerns a file as a whole.
    pub const START: Self = Self {
        line: 1,
        column: 1,
        end_column: 2,
    };
}

/// One finding. Serializes to
/// `{code, severity, file, line, column, end_column, message, help, notes}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// Stable code: `E…` for errors, `W…` for warnings.
    pub code: &'static str,
    /// Error or warning.
    pub severity: Severity,
    /// Name of the file as given in [`SourceFile::name`].
    pub file: String,
    /// 1-based line.
    pub line: u32,
    /// 1-based column, in characters.
    pub column: u32,
    /// 1-based column after the last character meant.
    pub end_column: u32,
    /// What is wrong, one line.
    pub message: String,
    /// What to do about it, if anything can be said.
    pub help: Option<String>,
    /// Facts that bear on it, such as where something was first defined.
    pub notes: Vec<String>,
}

impl Diagnostic {
    /// An error at `span` of `file`.
    pub fn error(code: &'static str, file: &str, span: Span, message: String) -> Self {
        Self::new(Severity::Error, code, file, span, message)
    }

    /// A warning at `span` of `file`.
    pub fn warning(code: &'static str, file: &str, span: Span, message: String) -> Self {
        Self::new(Severity::Warning, code, file, span, message)
    }

    fn new(
        severity: Severity,
        code: &'static str,
        file: &str,
        span: Span,
        message: String,
    ) -> Self {
        Self {
            code,
            severity,
            file: file.to_owned(),
            line: span.line,
            column: span.column,
            end_column: span.end_column,
            message,
            help: None,
            notes: Vec::new(),
        }
    }

    /// Adds the help line.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Adds a note.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// Text for a terminal: message, place, the source line with the token underlined, notes and
    /// help; ends with a newline. Without the file among `files` the source line is left out.
    pub fn render(&self, files: &[SourceFile], color: bool) -> String {
        let paint = Paint { on: color };
        let (word, hue) = match self.severity {
            Severity::Error => ("error", "1;31"),
            Severity::Warning => ("warning", "1;33"),
        };
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{}{} {}",
            paint.with(hue, &format!("{word}[{}]", self.code)),
            paint.with("1", ":"),
            paint.with("1", &self.message),
        );
        let number = self.line.to_string();
        let pad = " ".repeat(number.len());
        let _ = writeln!(
            out,
            "{pad}{} {}:{}:{}",
            paint.with("1;34", "-->"),
            self.file,
            self.line,
            self.column
        );
        let bar = paint.with("1;34", "|");
        let source = files
            .iter()
            .find(|f| f.name == self.file)
            .and_then(|f| f.text.lines().nth(to_usize(self.line).saturating_sub(1)));
        if let Some(source) = source {
            let (text, carets) = snippet(source, self.column, self.end_column);
            let _ = writeln!(out, "{pad} {bar}");
            let _ = writeln!(out, "{} {bar} {}", paint.with("1;34", &number), text);
            let _ = writeln!(
                out,
                "{pad} {bar} {}{}",
                " ".repeat(carets.0),
                paint.with(hue, &"^".repeat(carets.1))
            );
        }
        for note in &self.notes {
            let _ = writeln!(
                out,
                "{pad} {} {} {note}",
                paint.with("1;34", "="),
                paint.with("1", "note:")
            );
        }
        if let Some(help) = &self.help {
            let _ = writeln!(
                out,
                "{pad} {} {} {help}",
                paint.with("1;34", "="),
                paint.with("1", "help:")
            );
        }
        out
    }
}

/// Every diagnostic as text, an empty line between them.
pub fn render_all(diagnostics: &[Diagnostic], files: &[SourceFile], color: bool) -> String {
    let texts: Vec<String> = diagnostics.iter().map(|d| d.render(files, color)).collect();
    texts.join("\n")
}

/// A value as a message quotes it: control characters escaped, long text cut.
pub(crate) fn shown(text: &str) -> String {
    const LONGEST: usize = 80;
    let mut out = String::from("`");
    for (count, c) in text.chars().enumerate() {
        if count == LONGEST {
            out.push('…');
            break;
        }
        if is_unprintable(c) {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    out.push('`');
    out
}

/// Characters that would move a terminal's cursor or reorder what it shows.
pub(crate) fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// The visible part of a source line, and (blanks before, number of) carets.
fn snippet(source: &str, column: u32, end_column: u32) -> (String, (usize, usize)) {
    let chars: Vec<char> = source
        .chars()
        .map(|c| if is_unprintable(c) { ' ' } else { c })
        .collect();
    let start = to_usize(column).saturating_sub(1).min(chars.len());
    let width = to_usize(end_column.saturating_sub(column))
        .min(chars.len() - start)
        .max(1);
    let crop = if chars.len() > SHOWN_WIDTH {
        start.saturating_sub(SHOWN_BEFORE)
    } else {
        0
    };
    let end = chars.len().min(crop + SHOWN_WIDTH);
    let mut text = String::new();
    let mut blanks = start - crop;
    if crop > 0 {
        text.push('…');
        blanks += 1;
    }
    text.extend(chars.get(crop..end).unwrap_or_default());
    if end < chars.len() {
        text.push('…');
    }
    (
        text.trim_end().to_owned(),
        (blanks, width.min(SHOWN_WIDTH - SHOWN_BEFORE)),
    )
}

fn to_usize(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

struct Paint {
    on: bool,
}

impl Paint {
    fn with(&self, code: &str, text: &str) -> String {
        if self.on {
            format!("\u{1b}[{code}m{text}\u{1b}[0m")
        } else {
            text.to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> SourceFile {
        SourceFile {
            name: "a.yaml".to_owned(),
            text: text.to_owned(),
        }
    }

    fn at(line: u32, column: u32, end_column: u32) -> Diagnostic {
        Diagnostic::error(
            "E0107",
            "a.yaml",
            Span {
                line,
                column,
                end_column,
            },
            "no".to_owned(),
        )
    }

    #[test]
    fn carets_count_characters_not_bytes() {
        let text = at(2, 4, 6).render(&[file("x\nñö: äb\n")], false);
        assert_eq!(
            text,
            "error[E0107]: no\n --> a.yaml:2:4\n  |\n2 | ñö: äb\n  |    ^^\n"
        );
    }

    #[test]
    fn a_long_line_is_cropped_around_the_caret() {
        let line = format!("{}TOKEN{}", "a".repeat(5_000), "b".repeat(5_000));
        let text = at(1, 5_001, 5_006).render(&[file(&line)], false);
        let lines: Vec<&str> = text.lines().collect();
        let caret = lines[4].find('^').unwrap();
        // Both lines start with a prefix of the same width; one character of it is the `…`.
        let under: String = lines[3].chars().skip(caret).take(5).collect();
        assert_eq!(under, "TOKEN");
        assert!(lines.iter().all(|l| l.chars().count() < 160));
    }

    #[test]
    fn colour_only_when_asked_and_without_source_no_snippet() {
        let d = at(1, 1, 2).help("h");
        assert!(!d.render(&[], false).contains('\u{1b}'));
        assert!(d.render(&[], true).contains("\u{1b}[1;31m"));
        assert_eq!(
            d.render(&[], false),
            "error[E0107]: no\n --> a.yaml:1:1\n  = help: h\n"
        );
    }

    #[test]
    fn a_hostile_line_cannot_move_the_cursor() {
        let d = at(1, 1, 2).render(&[file("\u{1b}[2J\u{202e}x")], false);
        assert!(!d.contains('\u{1b}') && !d.contains('\u{202e}'));
        assert_eq!(shown("a\u{1b}b"), "`a\\u{1b}b`");
    }

    #[test]
    fn json_has_the_documented_keys() {
        let value = serde_json::to_value(at(3, 4, 9).help("try x")).unwrap();
        assert_eq!(
            value,
            serde_json::json!({
                "code": "E0107", "severity": "error", "file": "a.yaml", "line": 3, "column": 4,
                "end_column": 9, "message": "no", "help": "try x", "notes": []
            })
        );
    }
}
