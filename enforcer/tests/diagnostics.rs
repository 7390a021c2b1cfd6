//! Broken policies and what is said about them: every `diagnostics/*.yaml` is a policy of one file,
//! every directory in `diagnostics/multi/` one of several. The snapshots beside them hold the
//! diagnostics as `enforcer check` prints them; review changes with `cargo insta review`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{fs, path::Path};

use enforcer::policy::{
    SourceFile, diag::render_all, model::Environment, parse_with_warnings, reference::run_tests,
};

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/diagnostics"))
}

/// The YAML files directly in `dir`, in lexical order.
fn yaml_files(dir: &Path) -> Vec<SourceFile> {
    let mut files: Vec<SourceFile> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .map(|path| SourceFile {
            name: path.file_name().unwrap().to_str().unwrap().to_owned(),
            text: fs::read_to_string(&path).unwrap(),
        })
        .collect();
    files.sort_by(|a, b| a.name.cmp(&b.name));
    files
}

/// What `check` says: errors, or warnings and failing tests.
fn findings(files: &[SourceFile]) -> String {
    let found = match parse_with_warnings(files) {
        Err(errors) => errors,
        Ok(outcome) => {
            let mut found = outcome.warnings;
            found.extend(run_tests(&outcome.policy, &Environment::default()));
            found
        }
    };
    assert!(!found.is_empty(), "an example of a broken policy is fine");
    render_all(&found, files, false)
}

fn snapshot(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(root().join("snapshots"));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

#[test]
fn single_files() {
    let files = yaml_files(root());
    assert!(files.len() >= 49);
    for file in files {
        let name = file.name.trim_end_matches(".yaml").to_owned();
        snapshot(&name, &findings(std::slice::from_ref(&file)));
    }
}

#[test]
fn several_files() {
    for entry in fs::read_dir(root().join("multi")).unwrap() {
        let dir = entry.unwrap().path();
        let name = dir.file_name().unwrap().to_str().unwrap();
        snapshot(&format!("multi-{name}"), &findings(&yaml_files(&dir)));
    }
}

#[test]
fn no_file_at_all() {
    insta::assert_snapshot!(findings(&[]), @r"
    error[E0006]: there is no policy file
     --> (no file):1:1
      = help: a policy is one or more files named `*.yaml` or `*.yml`
    ");
}

/// The example in the repository is free of findings, and its own tests hold.
#[test]
fn the_hospital_is_clean() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../segments");
    let files = yaml_files(&dir);
    let outcome = parse_with_warnings(&files)
        .unwrap_or_else(|found| panic!("{}", render_all(&found, &files, false)));
    let failed = run_tests(&outcome.policy, &Environment::default());
    let said: Vec<_> = outcome.warnings.into_iter().chain(failed).collect();
    assert!(said.is_empty(), "{}", render_all(&said, &files, false));
    assert!(outcome.policy.tests.len() >= 20);
}
