//! Collecting diagnostics, and reading mappings, lists and words without stopping at the first
//! mistake.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    address::Problem,
    names::closest,
    raw::{Key, Node, Value},
};
use crate::policy::{
    diag::{Diagnostic, Severity, Span, shown},
    model::Origin,
};

/// Errors, and warnings, shown in one run; a file of another kind altogether would make thousands.
const MAX_SHOWN: usize = 200;

/// Entries of a mapping that are compared with one another.
const SHORT: usize = 16;

/// A file of the policy: its name, and its place among the others.
#[derive(Clone, Debug)]
pub(crate) struct File {
    pub index: usize,
    pub name: Arc<str>,
}

impl File {
    pub fn error(&self, code: &'static str, span: Span, message: impl Into<String>) -> Diagnostic {
        Diagnostic::error(code, &self.name, span, message.into())
    }

    pub fn warning(
        &self,
        code: &'static str,
        span: Span,
        message: impl Into<String>,
    ) -> Diagnostic {
        Diagnostic::warning(code, &self.name, span, message.into())
    }

    pub fn origin(&self, span: Span) -> Origin {
        Origin {
            file: Arc::clone(&self.name),
            line: span.line,
            column: span.column,
        }
    }
}

/// What was found so far.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    list: Vec<(usize, Diagnostic)>,
    errors: usize,
    warnings: usize,
}

impl Findings {
    pub fn push(&mut self, file: &File, diagnostic: Diagnostic) {
        let count = match diagnostic.severity {
            Severity::Error => &mut self.errors,
            Severity::Warning => &mut self.warnings,
        };
        *count += 1;
        if *count <= MAX_SHOWN {
            self.list.push((file.index, diagnostic));
        }
    }

    /// Takes in what was found in a part of the file.
    pub fn absorb(&mut self, file: &File, part: &Self) {
        let (errors, warnings) = (self.errors + part.errors, self.warnings + part.warnings);
        for (_, found) in &part.list {
            self.push(file, found.clone());
        }
        (self.errors, self.warnings) = (errors, warnings);
    }

    /// Errors and warnings so far, shown or not.
    pub fn count(&self) -> usize {
        self.errors + self.warnings
    }

    /// Whether more errors would not be shown, so that help for them is wasted effort.
    pub fn is_full(&self) -> bool {
        self.errors >= MAX_SHOWN
    }

    pub fn problem(&mut self, file: &File, span: Span, (code, message, help): Problem) {
        let mut diagnostic = file.error(code, span, message);
        diagnostic.help = help;
        self.push(file, diagnostic);
    }

    /// The warnings, or else the errors alone: what depends on a broken part is not worth a warning.
    pub fn finish(mut self) -> Result<Vec<Diagnostic>, Vec<Diagnostic>> {
        let failed = self.errors > 0;
        self.list
            .retain(|(_, d)| !failed || d.severity == Severity::Error);
        self.list.sort_by_key(|(file, d)| (*file, d.line, d.column));
        let mut sorted: Vec<Diagnostic> = self.list.into_iter().map(|(_, d)| d).collect();
        let (count, kind) = if failed {
            (self.errors, "errors")
        } else {
            (self.warnings, "warnings")
        };
        let hidden = count.saturating_sub(MAX_SHOWN);
        if let (true, Some(last)) = (hidden > 0, sorted.last_mut()) {
            last.notes
                .push(format!("{hidden} more {kind} are not shown"));
        }
        if failed { Err(sorted) } else { Ok(sorted) }
    }

    /// The entries of a mapping with duplicates reported and dropped; `None` if it is none.
    pub fn entries<'a>(
        &mut self,
        file: &File,
        node: &'a Node,
        what: &str,
    ) -> Option<Vec<(&'a Key, &'a Node)>> {
        let Value::Map(entries) = &node.value else {
            let message = format!("expected a mapping for {what}, found {}", node.found());
            let mut found = file.error("E0104", node.span, message);
            if let (Value::Scalar { text, .. }, "a member") = (&node.value, what) {
                found.help = Some(format!("write {}", shown(&format!("{{cidr: {text}}}"))));
            }
            self.push(file, found);
            return None;
        };
        let mut seen: BTreeMap<&str, Span> = BTreeMap::new();
        let mut unique: Vec<(&Key, &Node)> = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            // Most mappings are short, and there may be a hundred thousand of them.
            let first = if entries.len() <= SHORT {
                let same = unique.iter().find(|(known, _)| known.text == key.text);
                same.map(|(known, _)| known.span)
            } else {
                let first = seen.get(&*key.text).copied();
                if first.is_none() {
                    seen.insert(&key.text, key.span);
                }
                first
            };
            if let Some(first) = first {
                let message = format!("{} is written twice", shown(&key.text));
                let note = format!("first written at {}:{}", file.name, first.line);
                self.push(file, file.error("E0102", key.span, message).note(note));
                continue;
            }
            unique.push((key, value));
        }
        Some(unique)
    }

    /// A mapping whose keys are known. `later` are keys of the language that are not built yet.
    pub fn fields<'a>(
        &mut self,
        file: &File,
        node: &'a Node,
        what: &'static str,
        known: &[&'static str],
        later: &[&'static str],
    ) -> Option<Fields<'a>> {
        let mut fields = Fields {
            span: node.span,
            what,
            entries: Vec::with_capacity(known.len()),
            meant: Vec::new(),
        };
        for (key, value) in self.entries(file, node, what)? {
            let text = &*key.text;
            if known.contains(&text) {
                fields.entries.push((text, value));
            } else if later.contains(&text) {
                let message = format!("`{text}` is not supported yet");
                let help =
                    "remove it: a policy that was only half enforced would be worse than none";
                self.push(file, file.error("E0106", key.span, message).help(help));
            } else {
                let message = format!("unknown key {} in {what}", shown(text));
                let near = closest(text, known.iter().copied());
                let near = known.iter().copied().find(|key| Some(*key) == near);
                fields.meant.extend(near);
                let help = match near {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("the keys of {what} are: {}", known.join(", ")),
                };
                self.push(file, file.error("E0101", key.span, message).help(help));
            }
        }
        Some(fields)
    }

    /// A key that must be there.
    pub fn required<'a>(
        &mut self,
        file: &File,
        fields: &Fields<'a>,
        key: &'static str,
    ) -> Option<&'a Node> {
        let node = fields.get(key);
        if node.is_none() && !fields.meant.contains(&key) {
            let message = format!("{} needs the key `{key}`", fields.what);
            self.push(file, file.error("E0103", fields.span, message));
        }
        node
    }

    /// A list with at least one entry.
    pub fn list<'a>(&mut self, file: &File, node: &'a Node, what: &str) -> Option<&'a [Node]> {
        let Value::Seq(items) = &node.value else {
            let message = format!("expected a list for {what}, found {}", node.found());
            let mut found = file.error("E0104", node.span, message);
            if let (Value::Scalar { text, .. }, false) = (&node.value, node.is_null()) {
                let item = if what == "`members`" {
                    format!("{{cidr: {text}}}")
                } else {
                    text.to_string()
                };
                found.help = Some(format!("write {}", shown(&format!("[{item}]"))));
            }
            self.push(file, found);
            return None;
        };
        if items.is_empty() {
            self.empty(file, node.span, what);
            return None;
        }
        Some(items)
    }

    /// Reports an empty list or mapping.
    pub fn empty(&mut self, file: &File, span: Span, what: &str) {
        let found = file.error("E0105", span, format!("{what} is empty"));
        let help = "an empty list never means \"everything\" or \"nothing\": fill it, or remove what it belongs to";
        self.push(file, found.help(help));
    }

    /// A word or a number, quoted or not.
    pub fn text<'a>(&mut self, file: &File, node: &'a Node, what: &str) -> Option<&'a str> {
        if let Value::Scalar { text, .. } = &node.value
            && !node.is_null()
            && !node.is_bool()
        {
            return Some(text);
        }
        let message = format!("expected {what}, found {}", node.found());
        self.push(file, file.error("E0104", node.span, message));
        None
    }

    /// One of a few words.
    pub fn choice<T: Copy>(
        &mut self,
        file: &File,
        node: &Node,
        key: &str,
        words: &[(&str, T)],
    ) -> Option<T> {
        let text = self.text(file, node, &format!("a word for `{key}`"))?;
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let list: Vec<String> = words.iter().map(|(word, _)| format!("`{word}`")).collect();
        let message = format!(
            "{} is not a value of `{key}`: expected {}",
            shown(text),
            list.join(" or ")
        );
        let mut found = file.error("E0109", node.span, message);
        found.help = closest(text, words.iter().map(|(word, _)| *word))
            .map(|near| format!("did you mean `{near}`?"));
        self.push(file, found);
        None
    }
}

/// The known keys of a mapping.
pub(crate) struct Fields<'a> {
    /// Where the mapping starts.
    pub span: Span,
    what: &'static str,
    entries: Vec<(&'a str, &'a Node)>,
    /// Keys that a misspelt one probably stands for: they are not missing.
    meant: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    pub fn get(&self, key: &str) -> Option<&'a Node> {
        let entry = self.entries.iter().find(|(known, _)| *known == key);
        entry.map(|(_, node)| *node)
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}
