//! Rules of the code base that neither rustc nor clippy can check.
//!
//! The pure modules decide what is allowed, so their tests must see all there is: they do no
//! I/O, read no clock and know neither tokio nor aya.

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Result, bail};

use crate::{env, ui};

/// The modules that must stay pure.
const PURE: [&str; 5] = [
    "enforcer-common/src",
    "enforcer/src/policy",
    "enforcer/src/settings",
    "enforcer/src/compile",
    "enforcer/src/plan",
];

/// The one file that may name aya: it implements its `Pod` trait, for userspace only.
const POD: &str = "enforcer-common/src/pod.rs";

/// Paths that no pure module names, with what they would bring in.
///
/// Threads that end with the call are fine: what is computed must not depend on their number.
const FORBIDDEN: [(&str, &str); 16] = [
    ("aya", "the kernel"),
    ("tokio", "an event loop"),
    ("std::env", "the environment"),
    ("std::fs", "I/O"),
    ("std::net::TcpListener", "I/O"),
    ("std::net::TcpStream", "I/O"),
    ("std::net::ToSocketAddrs", "name resolution"),
    ("std::net::UdpSocket", "I/O"),
    ("std::os::unix::net", "I/O"),
    ("std::process", "other processes"),
    ("std::thread::spawn", "threads that outlive a call"),
    ("std::thread::sleep", "a clock"),
    ("std::time::Instant", "a clock"),
    ("std::time::SystemTime", "a clock"),
    ("nix", "the kernel"),
    ("libc", "the kernel"),
];

/// Checks every rule; lists all breaches.
pub fn run() -> Result<()> {
    let mut breaches = Vec::new();
    for dir in PURE {
        for file in rust_files(&env::root().join(dir))? {
            let name = file
                .strip_prefix(env::root())
                .unwrap_or(&file)
                .display()
                .to_string();
            let text = fs::read_to_string(&file)?;
            for breach in impure_paths(&text) {
                if name == POD && breach.path.starts_with("aya") {
                    continue;
                }
                breaches.push(format!(
                    "{name}:{}: `{}` brings {} into a pure module",
                    breach.line, breach.path, breach.brings
                ));
            }
        }
    }
    if breaches.is_empty() {
        return Ok(());
    }
    for breach in &breaches {
        ui::note(breach);
    }
    bail!(
        "{} breaches of purity (see docs/ARCHITECTURE.md)",
        breaches.len()
    )
}

fn rust_files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    if !dir.is_dir() {
        return Ok(files);
    }
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && path.file_name().is_some_and(|name| name != "tests.rs")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[derive(Debug, PartialEq)]
struct Breach {
    line: usize,
    path: String,
    brings: &'static str,
}

/// The forbidden paths that `source` names, in `use` trees and inline, outside of its tests.
fn impure_paths(source: &str) -> Vec<Breach> {
    let tokens = without_tests(tokens(source));
    let mut breaches = Vec::new();
    let mut prefixes: Vec<String> = Vec::new();
    let mut path = String::new();
    let mut in_use = false;
    let mut at = 0;
    let mut flush = |path: &mut String, prefixes: &[String], line: usize| {
        let full: String = prefixes.concat() + path;
        path.clear();
        let full = full
            .trim_start_matches("::")
            .trim_end_matches("::")
            .replace("::self", "");
        for (forbidden, brings) in FORBIDDEN {
            let inside = full.strip_prefix(forbidden);
            if inside.is_some_and(|rest| rest.is_empty() || rest.starts_with("::")) {
                breaches.push(Breach {
                    line,
                    path: full.clone(),
                    brings,
                });
            }
        }
    };
    while let Some((line, token)) = tokens.get(at) {
        let word = token.starts_with(|c: char| c.is_alphanumeric() || c == '_');
        match token.as_str() {
            "use" => in_use = true,
            "::" => path.push_str("::"),
            "{" if in_use => {
                prefixes.push(std::mem::take(&mut path));
            }
            "}" if in_use => {
                flush(&mut path, &prefixes, *line);
                prefixes.pop();
            }
            ";" => {
                if in_use || path.contains("::") {
                    flush(&mut path, &prefixes, *line);
                }
                path.clear();
                in_use = false;
            }
            _ if word && (path.is_empty() || path.ends_with("::")) => {
                path.push_str(token);
            }
            _ => {
                // A lone word in code is a name of its own; only in a `use` is it a path.
                if in_use || path.contains("::") {
                    flush(&mut path, &prefixes, *line);
                }
                path.clear();
                if word {
                    path.push_str(token);
                }
            }
        }
        at += 1;
    }
    breaches
}

/// Words, `::` and single signs with their lines; comments, strings and characters left out.
fn tokens(source: &str) -> Vec<(usize, String)> {
    let chars: Vec<char> = source.chars().collect();
    let peek = |at: usize| chars.get(at).copied().unwrap_or('\0');
    let (mut at, mut line) = (0, 1);
    let mut tokens = Vec::new();
    while at < chars.len() {
        let start = at;
        match peek(at) {
            '/' if peek(at + 1) == '/' => at = skip_until(&chars, at, |c| c == '\n'),
            '/' if peek(at + 1) == '*' => {
                while at < chars.len() && !(peek(at) == '*' && peek(at + 1) == '/') {
                    at += 1;
                }
                at += 2;
            }
            'r' if peek(at + 1) == '#' && matches!(peek(at + 2), '#' | '"') => {
                at = skip_raw_string(&chars, at + 1);
            }
            'r' if peek(at + 1) == '"' => at = skip_raw_string(&chars, at + 1),
            '"' => {
                at += 1;
                while at < chars.len() && peek(at) != '"' {
                    at += if peek(at) == '\\' { 2 } else { 1 };
                }
                at += 1;
            }
            // A character and not a lifetime: closed at once, or escaped.
            '\'' if peek(at + 1) == '\\' => {
                at = skip_until(&chars, at + 3, |c| c == '\'') + 1;
            }
            '\'' if peek(at + 2) == '\'' => at += 3,
            ':' if peek(at + 1) == ':' => {
                tokens.push((line, "::".into()));
                at += 2;
            }
            c if c.is_alphanumeric() || c == '_' => {
                at = skip_until(&chars, at, |c| !(c.is_alphanumeric() || c == '_'));
                tokens.push((line, chars[start..at].iter().collect()));
            }
            c => {
                if !c.is_whitespace() {
                    tokens.push((line, c.to_string()));
                }
                at += 1;
            }
        }
        let end = at.min(chars.len());
        line += chars[start..end].iter().filter(|c| **c == '\n').count();
    }
    tokens
}

fn skip_until(chars: &[char], from: usize, stop: impl Fn(char) -> bool) -> usize {
    (from..chars.len())
        .find(|at| stop(chars[*at]))
        .unwrap_or(chars.len())
}

/// From the first `#` or quote of a raw string to behind its end.
fn skip_raw_string(chars: &[char], from: usize) -> usize {
    let open = skip_until(chars, from, |c| c == '"');
    let hashes = open - from;
    (open + 1..chars.len())
        .find(|at| {
            chars[*at] == '"'
                && chars.len() > at + hashes
                && chars[at + 1..=at + hashes].iter().all(|c| *c == '#')
        })
        .map_or(chars.len(), |at| at + hashes + 1)
}

/// Leaves out every item under `#[cfg(test)]`: tests may read files.
fn without_tests(tokens: Vec<(usize, String)>) -> Vec<(usize, String)> {
    const ATTRIBUTE: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let rest = &tokens[at..];
        if rest
            .iter()
            .map(|(_, token)| token.as_str())
            .take(7)
            .eq(ATTRIBUTE)
        {
            let mut depth = 0;
            at += ATTRIBUTE.len();
            while let Some((_, token)) = tokens.get(at) {
                at += 1;
                match token.as_str() {
                    "{" => depth += 1,
                    "}" if depth == 1 => break,
                    "}" => depth -= 1,
                    ";" if depth == 0 => break,
                    _ => {}
                }
            }
        } else {
            kept.push(tokens[at].clone());
            at += 1;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(source: &str) -> Vec<String> {
        impure_paths(source)
            .into_iter()
            .map(|breach| breach.path)
            .collect()
    }

    #[test]
    fn impure_uses_are_found_in_trees_and_inline() {
        for (source, found) in [
            ("use std::fs;", "std::fs"),
            ("use ::std::fs::File as F;", "std::fs::File"),
            (
                "use std::{collections::BTreeMap, fs::{self, File}};",
                "std::fs",
            ),
            (
                "use std::{\n    net::{IpAddr, UdpSocket},\n};",
                "std::net::UdpSocket",
            ),
            ("use tokio::net::TcpStream;", "tokio::net::TcpStream"),
            ("pub(crate) use aya;", "aya"),
            (
                "fn f() { let t = std::time::Instant::now(); }",
                "std::time::Instant::now",
            ),
            ("unsafe impl aya::Pod for A {}", "aya::Pod"),
            (
                "use std::io;\nuse std::time::{Duration, SystemTime};",
                "std::time::SystemTime",
            ),
        ] {
            assert!(
                paths(source).contains(&found.to_owned()),
                "{source}: {:?}",
                paths(source)
            );
        }
    }

    #[test]
    fn pure_code_passes() {
        for source in [
            "use std::net::{IpAddr, Ipv4Addr};\nuse std::time::Duration;",
            "// use std::fs;\n/* tokio::spawn */\nlet s = \"std::fs::read\";",
            "let s = r#\"a \" std::fs::read\"#; let c = '\"'; let l: &'static str = x;",
            "let tokio = 1; struct S { aya: u8 } fn f(libc: u8) { libc; }",
            "fn a() {}\n#[cfg(test)]\nmod tests { use std::fs; fn f() { fs::read(); } }",
            "#[cfg(test)]\nuse std::fs;\nfn f() {}",
            "use crate::tokio_like::aya::X; use std::ayatana;",
        ] {
            assert_eq!(paths(source), Vec::<String>::new(), "{source}");
        }
    }

    #[test]
    fn a_breach_names_its_line() {
        let source = "//! Doc.\n\n/* two\nlines */\nuse std::fs;\n";
        let lines: Vec<usize> = impure_paths(source)
            .iter()
            .map(|breach| breach.line)
            .collect();
        assert_eq!(lines, [5]);
    }

    #[test]
    fn code_after_the_tests_is_checked() {
        let source = "#[cfg(test)]\nmod tests { fn f() {} }\nuse std::fs;";
        assert_eq!(paths(source), ["std::fs"]);
    }
}
