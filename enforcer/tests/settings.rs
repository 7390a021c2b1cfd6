//! Broken settings and what is said about them, as `enforcer check --config` prints it; the manual
//! and the example say what is built. Review changed snapshots with `cargo insta review`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{collections::BTreeSet, fs, path::Path};

use enforcer::{
    policy::{Diagnostic, SourceFile, diag::render_all},
    settings::{ESSENTIALS, ETHERTYPES, Settings, parse},
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

fn file(name: &str, text: String) -> SourceFile {
    SourceFile {
        name: name.to_owned(),
        text,
    }
}

fn clean(file: &SourceFile) -> Settings {
    let said = |found: &[Diagnostic]| render_all(found, std::slice::from_ref(file), false);
    let (settings, warnings) = parse(file).unwrap_or_else(|found| panic!("{}", said(&found)));
    assert!(warnings.is_empty(), "{}", said(&warnings));
    settings
}

#[test]
fn broken_files() {
    let mut seen = 0;
    for entry in fs::read_dir(root().join("tests/settings")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "yaml") {
            continue;
        }
        seen += 1;
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let file = file("enforcer.yaml", fs::read_to_string(&path).unwrap());
        let found = match parse(&file) {
            Ok((_, warnings)) => warnings,
            Err(errors) => errors,
        };
        assert!(!found.is_empty(), "{stem} is fine");
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_path(root().join("tests/settings/snapshots"));
        settings.set_prepend_module_to_snapshot(false);
        settings.set_omit_expression(true);
        settings.bind(|| {
            insta::assert_snapshot!(stem, render_all(&found, std::slice::from_ref(&file), false));
        });
    }
    assert_eq!(seen, 5);
}

/// `E05xx` and `W05xx`, wherever they stand.
fn codes(text: &str) -> BTreeSet<String> {
    let chars: Vec<char> = text.chars().collect();
    chars
        .windows(5)
        .filter(|w| matches!(w, ['E' | 'W', '0', '5', a, b] if a.is_ascii_digit() && b.is_ascii_digit()))
        .map(|w| w.iter().collect())
        .collect()
}

#[test]
fn every_code_is_documented_and_shown_by_an_example() {
    let built = codes(&text("src/settings/parse.rs"));
    assert_eq!(built, codes(&text("../docs/settings.md")));
    let mut examples = String::new();
    for entry in fs::read_dir(root().join("tests/settings/snapshots")).unwrap() {
        examples += &fs::read_to_string(entry.unwrap().path()).unwrap();
    }
    assert_eq!(built, codes(&examples));
}

#[test]
fn the_manual_names_what_there_is() {
    let manual = text("../docs/settings.md");
    for (name, _) in ESSENTIALS {
        assert!(manual.contains(&format!("\n| `{name}` | ")), "{name}");
    }
    for (name, numbers) in ETHERTYPES {
        let list: Vec<String> = numbers.iter().map(|n| format!("{n:#06x}")).collect();
        let row = match name {
            "llc" => "\n| `llc` | ".to_owned(),
            _ => format!("\n| `{name}` | {} |", list.join(", ")),
        };
        assert!(manual.contains(&row), "{row}");
    }
}

#[test]
fn the_examples_are_clean() {
    let manual = text("../docs/settings.md");
    let example = manual.split("```yaml\n").nth(1).unwrap();
    let example = example.split("```").next().unwrap().to_owned();
    assert_eq!(clean(&file("manual", example)).failsafes.len(), 2);
    let deployed = clean(&file("deploy", text("../deploy/enforcer.yaml")));
    assert_eq!(deployed.failsafes.len(), 1);
}
