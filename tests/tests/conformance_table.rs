//! `docs/conformance.md` names every number once, and tests that exist.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests and their helpers"
)]

use std::{collections::BTreeSet, fs, path::Path};

/// Every `fn name(` under a directory, with the binary it is part of.
fn functions(directory: &Path, binary: Option<&str>, found: &mut BTreeSet<(String, String)>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let binary = binary.unwrap_or(stem);
        if path.is_dir() {
            functions(&path, Some(binary), found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let lines = text.lines().map(str::trim);
            let lines = lines.map(|line| line.strip_prefix("async ").unwrap_or(line));
            for line in lines.filter_map(|line| line.strip_prefix("fn ")) {
                let name = line.split(['(', '<']).next().unwrap();
                found.insert((binary.to_owned(), name.to_owned()));
            }
        }
    }
}

#[test]
fn the_table_names_every_number_and_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeSet::new();
    functions(&root.join("tests"), None, &mut found);
    let mut crates = BTreeSet::new();
    functions(&root.join("../enforcer/src"), None, &mut crates);
    functions(&root.join("../enforcer/tests"), None, &mut crates);
    let in_crate = |test: &str| {
        crates
            .iter()
            .any(|(file, name)| file == test || name == test)
    };
    let binaries: BTreeSet<&str> = found.iter().map(|(binary, _)| binary.as_str()).collect();
    let text = fs::read_to_string(root.join("../docs/conformance.md")).unwrap();
    let mut numbers = BTreeSet::new();
    for row in text.lines().filter(|line| line.starts_with("| ")).skip(1) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        assert!(numbers.insert(cells[1]), "twice: {row}");
        let tests: Vec<&str> = cells[3].split('`').skip(1).step_by(2).collect();
        assert!(!tests.is_empty(), "no test: {row}");
        for test in tests {
            if let Some(test) = test.strip_suffix(" (enforcer)") {
                assert!(in_crate(test), "there is no test {test}: {row}");
                continue;
            }
            let binary = test.split("::").next().unwrap();
            let name = test.rsplit("::").next().unwrap();
            let known = binaries.contains(binary)
                && (name == "*" || found.contains(&(binary.to_owned(), name.to_owned())));
            assert!(known, "there is no test {test}: {row}");
        }
        for outcome in &cells[4..7] {
            assert!(!outcome.contains("FAILED"), "{row}");
        }
    }
    for number in 1..=104 {
        assert!(numbers.contains(format!("T{number}").as_str()), "T{number}");
    }
}
