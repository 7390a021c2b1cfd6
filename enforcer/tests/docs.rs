//! `docs/policy.md` says what is built.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{collections::BTreeSet, fs, path::Path};

use enforcer::policy::{
    SourceFile,
    diag::render_all,
    model::{Environment, TUNNEL_PROTOCOLS},
    parse::{CATALOGUE, describe, parse_point},
    parse_with_warnings,
    reference::run_tests,
};

fn crate_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn manual() -> String {
    fs::read_to_string(crate_root().join("../docs/policy.md")).unwrap()
}

/// Four digits after an `E` or a `W`, wherever they stand.
fn codes(text: &str) -> BTreeSet<String> {
    let chars: Vec<char> = text.chars().collect();
    chars
        .windows(5)
        .filter(|w| matches!(w[0], 'E' | 'W') && w[1..].iter().all(char::is_ascii_digit))
        .map(|w| w.iter().collect())
        .collect()
}

fn sources(dir: &Path, into: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else {
            into.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn every_code_is_documented_and_shown_by_an_example() {
    let mut code = String::new();
    sources(&crate_root().join("src/policy"), &mut code);
    assert_eq!(codes(&code), codes(&manual()));
    let mut examples = String::new();
    sources(&crate_root().join("tests/diagnostics"), &mut examples);
    examples.push_str(&fs::read_to_string(crate_root().join("tests/diagnostics.rs")).unwrap());
    let missing: Vec<String> = codes(&code)
        .difference(&codes(&examples))
        .cloned()
        .collect();
    assert!(missing.is_empty(), "no broken example shows {missing:?}");
}

#[test]
fn the_catalogue_is_documented() {
    let manual = manual();
    let rows: Vec<&str> = manual
        .split("The catalogue:")
        .nth(1)
        .unwrap()
        .lines()
        .filter(|l| l.starts_with("| `"))
        .take_while(|l| !l.starts_with("| `from`"))
        .collect();
    let expected: Vec<String> = CATALOGUE
        .iter()
        .map(|(name, services)| {
            let list: Vec<String> = services
                .iter()
                .map(|s| format!("`{}`", describe(s)))
                .collect();
            format!("| `{name}` | {} |", list.join(", "))
        })
        .collect();
    assert_eq!(rows, expected, "expected:\n{}", expected.join("\n"));
}

#[test]
fn the_tunnels_are_documented() {
    let manual = manual();
    let ip = "10.0.0.1".parse().unwrap();
    let paragraph = manual
        .split("Tunnels carry")
        .nth(1)
        .unwrap()
        .split("In a deny")
        .next()
        .unwrap();
    let named: BTreeSet<u8> = paragraph
        .split('`')
        .skip(1)
        .step_by(2)
        .map(|w| parse_point(w, ip).unwrap().0)
        .collect();
    assert_eq!(named, BTreeSet::from(TUNNEL_PROTOCOLS));
}

#[test]
fn the_example_is_a_policy_whose_tests_hold() {
    let manual = manual();
    let text = manual
        .split("```yaml\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let files = [SourceFile {
        name: "manual".to_owned(),
        text: text.to_owned(),
    }];
    let outcome = parse_with_warnings(&files)
        .unwrap_or_else(|found| panic!("{}", render_all(&found, &files, false)));
    let failed = run_tests(&outcome.policy, &Environment::default());
    let said: Vec<_> = outcome.warnings.into_iter().chain(failed).collect();
    assert!(said.is_empty(), "{}", render_all(&said, &files, false));
}
