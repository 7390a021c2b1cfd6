//! YAML text to a loose tree in which every node knows where it is written.
//!
//! Works on the parser's events rather than through serde: serde stops at the first mistake, loses
//! spans, and guesses types (`1e3`, `no`), none of which a policy can afford. What this layer
//! refuses stops its file, because nothing after it can be trusted.

use std::sync::Arc;

use serde_saphyr::granit_parser::{self, Event, Marker, Parser, ScalarStyle};

use super::{SourceFile, segments::Members};
use crate::policy::diag::{Diagnostic, Span, is_unprintable};

/// Largest file. The largest real policies are a few hundred KiB.
const MAX_BYTES: usize = 4 << 20;
/// Deepest nesting. The language itself needs six levels.
const MAX_DEPTH: usize = 16;
/// Most scalars, lists and mappings in a file.
const MAX_NODES: usize = 200_000;

/// A value and its place.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub span: Span,
    pub value: Value,
}

/// The shapes that YAML has.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// Text as written, escapes resolved. `plain` when not quoted.
    Scalar {
        text: Box<str>,
        plain: bool,
    },
    Seq(Box<[Node]>),
    /// In the order written, duplicates kept.
    Map(Box<[(Key, Node)]>),
    /// The `members` of a segment: a list that was given its meaning at once, because as nodes it
    /// takes several times the memory.
    Members(Arc<Members>),
}

/// A mapping's key.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    pub span: Span,
    pub text: Box<str>,
}

impl Node {
    /// Whether the node says "nothing" (`~`, `null` or no text at all).
    pub fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar { text, plain: true }
            if matches!(&**text, "" | "~" | "null" | "Null" | "NULL"))
    }

    /// Whether the node is an unquoted truth value.
    pub fn is_bool(&self) -> bool {
        matches!(&self.value, Value::Scalar { text, plain: true }
            if matches!(&**text, "true" | "True" | "TRUE" | "false" | "False" | "FALSE"))
    }

    /// What the node is, for "expected …, found …".
    pub fn found(&self) -> &'static str {
        match &self.value {
            Value::Seq(_) | Value::Members(_) => "a list",
            Value::Map(_) => "a mapping",
            Value::Scalar { .. } if self.is_null() => "nothing",
            Value::Scalar { .. } if self.is_bool() => "a truth value",
            Value::Scalar { .. } => "text",
        }
    }
}

/// Why a file cannot be read. Boxed, because it is rare and large.
pub(crate) type Refusal = Box<Diagnostic>;

/// Reads one file; `Ok(None)` when it holds nothing but comments.
pub(crate) fn read(file: &SourceFile) -> Result<Option<Node>, Refusal> {
    let lines: Vec<&str> = file.text.lines().collect();
    let widths = lines
        .iter()
        .map(|l| u32::try_from(l.chars().count()).unwrap_or(u32::MAX - 2));
    let reader = Reader {
        name: &file.name,
        widths: widths.collect(),
        lines,
    };
    reader.check_bytes(&file.text)?;
    reader.build(&file.text)
}

struct Reader<'a> {
    name: &'a str,
    lines: Vec<&'a str>,
    /// Characters of each line. Counted once: a file may be one line of 200 000 values.
    widths: Vec<u32>,
}

/// A collection whose end is still to come.
struct Open {
    span: Span,
    kind: OpenKind,
}

enum OpenKind {
    Seq(Vec<Node>),
    Map {
        entries: Vec<(Key, Node)>,
        key: Option<Key>,
    },
}

impl Reader<'_> {
    fn error(&self, code: &'static str, span: Span, message: impl Into<String>) -> Diagnostic {
        Diagnostic::error(code, self.name, span, message.into())
    }

    /// Size, byte order mark, and characters that would make a file look other than it is.
    fn check_bytes(&self, text: &str) -> Result<(), Refusal> {
        if text.len() > MAX_BYTES {
            let message = format!(
                "the file has {} bytes; the limit is {MAX_BYTES}",
                text.len()
            );
            return Err(self.error("E0002", Span::START, message).into());
        }
        for (line, number) in self.lines.iter().zip(1u32..) {
            for (c, column) in line.chars().zip(1u32..) {
                if c == '\t' || !is_unprintable(c) {
                    continue;
                }
                let span = Span {
                    line: number,
                    column,
                    end_column: column.saturating_add(1),
                };
                let what = if c == '\u{feff}' {
                    "a byte order mark".to_owned()
                } else {
                    format!("the invisible character U+{:04X}", u32::from(c))
                };
                let found = self.error("E0004", span, format!("{what} is not allowed"));
                return Err(found
                    .help("delete it, or write it as an escape in double quotes")
                    .into());
            }
        }
        Ok(())
    }

    fn build(&self, text: &str) -> Result<Option<Node>, Refusal> {
        let mut options = granit_parser::options! {
            disallow_directives: true,
            emit_unresolved_aliases: true,
            emit_anchor_events: true,
            flow_nesting_limit: 4 * MAX_DEPTH,
            block_nesting_limit: 4 * MAX_DEPTH,
        };
        options.set_emit_comments(false);
        let mut stack: Vec<Open> = Vec::new();
        let mut root = None;
        let (mut nodes, mut documents) = (0usize, 0usize);
        for event in Parser::new_from_str_with_options(text, options) {
            let (event, place) = event.map_err(|e| {
                let message = format!("not valid YAML: {}", e.info());
                Refusal::from(self.error("E0001", self.span(e.marker(), e.marker()), message))
            })?;
            let span = self.span(&place.start, &place.end);
            if event.is_node() {
                nodes += 1;
                if nodes > MAX_NODES {
                    let message = format!("the file has more than {MAX_NODES} values");
                    return Err(self.error("E0002", span, message).into());
                }
                if event.tag().is_some() {
                    let at = place
                        .tag_start()
                        .map_or(span, |m| self.word(self.span(&m, &m)));
                    return Err(self
                        .error("E0003", at, "YAML tags (`!…`) are not allowed")
                        .help("write the value without the tag")
                        .into());
                }
            }
            let done = match event {
                Event::DocumentStart(..) => {
                    documents += 1;
                    if documents > 1 {
                        return Err(self
                            .error("E0005", span, "a second YAML document starts here")
                            .help("put each document into a file of its own")
                            .into());
                    }
                    continue;
                }
                Event::Anchor(..) | Event::Alias(_) | Event::UnresolvedAlias(_) => {
                    return Err(self
                        .error("E0003", span, "YAML anchors and aliases are not allowed")
                        .help("write the value out, or name it once as a segment, group or service")
                        .into());
                }
                Event::SequenceStart(..) => {
                    self.open(&mut stack, span, OpenKind::Seq(Vec::new()))?;
                    continue;
                }
                Event::MappingStart(..) => {
                    let kind = OpenKind::Map {
                        entries: Vec::new(),
                        key: None,
                    };
                    self.open(&mut stack, span, kind)?;
                    continue;
                }
                Event::SequenceEnd | Event::MappingEnd => match stack.pop() {
                    Some(Open {
                        span,
                        kind: OpenKind::Seq(items),
                    }) => Node {
                        span,
                        value: Value::Seq(items.into()),
                    },
                    Some(Open {
                        span,
                        kind: OpenKind::Map { entries, .. },
                    }) => Node {
                        span,
                        value: Value::Map(entries.into()),
                    },
                    None => continue,
                },
                Event::Scalar(text, style, ..) => {
                    let plain = style == ScalarStyle::Plain;
                    Node {
                        span,
                        value: Value::Scalar {
                            text: text.into(),
                            plain,
                        },
                    }
                }
                Event::StreamStart | Event::StreamEnd | Event::DocumentEnd | Event::Comment(..) => {
                    continue;
                }
                // An event that a later parser may add must not slip by.
                _ => return Err(self.error("E0001", span, "unknown YAML construct").into()),
            };
            match stack.last_mut() {
                None => root = Some(done),
                Some(open) => self.attach(open, done)?,
            }
        }
        // A document of nothing but comments is one empty scalar, or no document at all.
        Ok(root.filter(|node| !node.is_null()))
    }

    fn open(&self, stack: &mut Vec<Open>, span: Span, kind: OpenKind) -> Result<(), Refusal> {
        let span = Span {
            end_column: span.column.saturating_add(1),
            ..span
        };
        if stack.len() >= MAX_DEPTH {
            let message = format!("values are nested more than {MAX_DEPTH} levels deep");
            return Err(self.error("E0002", span, message).into());
        }
        stack.push(Open { span, kind });
        Ok(())
    }

    fn attach(&self, open: &mut Open, node: Node) -> Result<(), Refusal> {
        match &mut open.kind {
            OpenKind::Seq(items) => items.push(node),
            OpenKind::Map { entries, key } => match key.take() {
                Some(key) => entries.push((key, node)),
                None => {
                    let Value::Scalar { text, plain } = node.value else {
                        let message = "a key must be a single word, not a list or a mapping";
                        return Err(self.error("E0104", node.span, message).into());
                    };
                    if &*text == "<<" && plain {
                        return Err(self
                            .error("E0003", node.span, "YAML merge keys (`<<`) are not allowed")
                            .help("write the keys out")
                            .into());
                    }
                    *key = Some(Key {
                        span: node.span,
                        text,
                    });
                }
            },
        }
        Ok(())
    }

    /// `span` extended to the next blank.
    fn word(&self, span: Span) -> Span {
        let line = usize::try_from(span.line - 1)
            .ok()
            .and_then(|i| self.lines.get(i));
        let skipped = usize::try_from(span.column - 1).unwrap_or(usize::MAX);
        let rest = line.into_iter().flat_map(|l| l.chars()).skip(skipped);
        let length = u32::try_from(rest.take_while(|c| !c.is_whitespace()).count()).unwrap_or(1);
        Span {
            end_column: span.column.saturating_add(length.max(1)),
            ..span
        }
    }

    /// A parser's range as a span of one line that exists, never empty.
    fn span(&self, start: &Marker, end: &Marker) -> Span {
        let last = u32::try_from(self.lines.len()).unwrap_or(u32::MAX).max(1);
        let mut line = u32::try_from(start.line()).unwrap_or(u32::MAX).max(1);
        let mut column = u32::try_from(start.col())
            .unwrap_or(u32::MAX - 2)
            .saturating_add(1);
        if line > last {
            // The end of the text: point behind its last character.
            line = last;
            column = u32::MAX - 1;
        }
        let width = usize::try_from(line - 1)
            .ok()
            .and_then(|i| self.widths.get(i));
        let after = width.copied().unwrap_or(0).saturating_add(1);
        column = column.min(after);
        let end_column = if end.line() == start.line() {
            u32::try_from(end.col())
                .unwrap_or(u32::MAX - 2)
                .saturating_add(1)
                .min(after)
        } else {
            after
        };
        Span {
            line,
            column,
            end_column: end_column.max(column.saturating_add(1)),
        }
    }
}
