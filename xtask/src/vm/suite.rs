//! What runs in the guests: static test binaries, and the tests that the host knows of.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::kernels::Kernel;
use crate::{bench, build, env, ui};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROFILE: &str = "vm";
const PACKAGE: &str = "enforcer-tests";

/// Test binaries that stay out of the guests, and why.
const NOT_IN_GUESTS: [(&str, &str); 0] = [];

/// Test binaries that `cargo xtask test` runs on the oldest kernel alone, beside the host's, and why.
/// What is not here runs on each; with `cargo xtask vm` everything does.
const ON_THE_OLDEST: [(&str, &str); 24] = [
    ("conformance", FORMS),
    ("conformance_table", HOST),
    ("control_socket", USERSPACE),
    ("disguise", DEVICES),
    ("flow", HOST),
    ("flow_keys", HOST),
    ("flows_on_the_wire", FORMS),
    ("forwarding", DEVICES),
    ("fuzz_corpus", HOST),
    ("fuzz_in_kernel", FORMS),
    ("hostile", HOST),
    ("keep_working", FORMS),
    ("kubernetes", FORMS),
    ("load", "what a measurement rests on"),
    ("multipoint", DEVICES),
    ("opposite_rules", HOST),
    ("path_mtu", DEVICES),
    ("policy_files", USERSPACE),
    ("receiver_oracle", FORMS),
    ("stacked", DEVICES),
    ("state", FORMS),
    ("tcp_on_the_wire", FORMS),
    ("timed_on_the_wire", FORMS),
    ("tunnels", DEVICES),
];
const HOST: &str = "nothing of a kernel is in it";
const USERSPACE: &str = "files and sockets, which the kernels have long had";
const FORMS: &str = "what the programs make of packets: that they run alike on each kernel is \
    three_way's, tables' and host_equals_kernel's to show";
const DEVICES: &str = "the kernel's devices and routing, on the oldest and the host's";

/// The longest, begun first, so that no guest is at one of them when the others have ended.
const LONGEST: [&str; 5] = [
    "keep_working",
    "conformance",
    "kubernetes",
    "receiver_oracle",
    "state",
];

/// A test binary and those of its tests that are to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binary {
    /// The file's name under `tests/tests`, or the crate's for its unit tests.
    pub name: String,
    pub path: PathBuf,
    pub tests: Vec<String>,
    /// Some tests of the binary are filtered out.
    pub partial: bool,
}

/// All that is sent into a guest.
#[derive(Clone, Debug)]
pub struct Suite {
    pub binaries: Vec<Binary>,
    /// The enforcer that the tests start.
    pub enforcer: PathBuf,
}

impl Suite {
    /// How many tests will run.
    pub fn count(&self) -> usize {
        self.binaries.iter().map(|binary| binary.tests.len()).sum()
    }

    /// Full names of all tests that will run.
    pub fn names(&self) -> impl Iterator<Item = String> {
        self.binaries
            .iter()
            .flat_map(|binary| binary.tests.iter().map(|t| format!("{}::{t}", binary.name)))
    }
}

impl Suite {
    /// What of it a kernel runs: all, or of a newer one, if it is to be `quick`, not what is on the
    /// oldest alone.
    pub fn on(&self, kernel: Kernel, quick: bool) -> Self {
        let stays = |name: &str| {
            !quick
                || kernel == Kernel::ALL[0]
                || !ON_THE_OLDEST.iter().any(|(only, _)| *only == name)
        };
        Self {
            binaries: self
                .binaries
                .iter()
                .filter(|binary| stays(&binary.name))
                .cloned()
                .collect(),
            enforcer: self.enforcer.clone(),
        }
    }

    /// Names of the binaries in the order in which they are to run.
    pub fn order(&self) -> Vec<String> {
        let mut names: Vec<_> = self.binaries.iter().map(|b| b.name.clone()).collect();
        // Stable: the others stay as they are.
        names.sort_by_key(|name| {
            LONGEST
                .iter()
                .position(|long| long == name)
                .unwrap_or(LONGEST.len())
        });
        names
    }
}

/// Builds the suite; with a filter, only tests whose `binary::name` contains it are to run.
pub fn build(filter: Option<&str>) -> Result<Suite> {
    build::objects()?;
    let start = Instant::now();
    ui::step("Building the suite for the guests: static, small");
    let built = test_binaries()?;
    let enforcer = enforcer()?;
    let mut binaries = Vec::new();
    for (name, path) in built {
        if let Some((_, why)) = NOT_IN_GUESTS.iter().find(|(out, _)| *out == name) {
            ui::note(&format!("{name} does not run in guests: {why}"));
            continue;
        }
        let all = list(&path)?;
        let tests: Vec<String> = all
            .iter()
            .filter(|test| filter.is_none_or(|part| format!("{name}::{test}").contains(part)))
            .cloned()
            .collect();
        if !tests.is_empty() {
            binaries.push(Binary {
                partial: tests.len() < all.len(),
                name,
                path,
                tests,
            });
        }
    }
    let suite = Suite { binaries, enforcer };
    ui::note(&format!(
        "{} tests in {} binaries ({})",
        suite.count(),
        suite.binaries.len(),
        ui::took(start)
    ));
    Ok(suite)
}

/// A directory of its own: other flags and another profile would undo the host's build.
fn target_dir() -> Result<PathBuf> {
    Ok(env::target_dir()?.join("vm"))
}

/// Cargo for static binaries. Naming the target keeps the flag away from build scripts.
fn cargo(verb: &str) -> Result<Command> {
    let mut cargo = env::cargo();
    cargo
        .args([verb, "--profile", PROFILE, "--target", TARGET])
        .args(["--package", PACKAGE])
        .arg("--target-dir")
        .arg(target_dir()?)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("ENFORCER_BPF_DIR", build::objects_dir()?)
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    Ok(cargo)
}

/// The bench and the enforcer, of what the suite is made of.
pub fn bench() -> Result<bench::Built> {
    ui::step("Building the bench as the guests' suite is built");
    Ok(bench::Built {
        bench: bench::executable(&mut cargo("build")?)?,
        enforcer: enforcer()?,
    })
}

fn test_binaries() -> Result<BTreeMap<String, PathBuf>> {
    let mut cargo = cargo("test")?;
    cargo.args(["--no-run", "--message-format=json-render-diagnostics"]);
    let mut child = cargo
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", ui::describe(&cargo)))?;
    let stdout = child.stdout.take().context("cargo has no output")?;
    let mut binaries = BTreeMap::new();
    for line in BufReader::new(stdout).lines() {
        binaries.extend(test_binary(&line?));
    }
    if !child.wait()?.success() {
        bail!("{} failed", ui::describe(&cargo));
    }
    Ok(binaries)
}

/// The test binary that a message of cargo announces.
fn test_binary(message: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(message).ok()?;
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return None;
    }
    let path = message["executable"].as_str()?;
    Some((message["target"]["name"].as_str()?.to_owned(), path.into()))
}

fn enforcer() -> Result<PathBuf> {
    // Both packages, so that the library is the one that the tests were built with.
    let mut cargo = cargo("build")?;
    cargo.args(["--package", "enforcer", "--bin", "enforcer"]);
    ui::run(&mut cargo)?;
    let path = target_dir()?.join(TARGET).join(PROFILE).join("enforcer");
    ensure!(path.is_file(), "cargo left no {}", path.display());
    Ok(path)
}

/// The tests of a binary, as it lists them on this machine.
fn list(binary: &Path) -> Result<Vec<String>> {
    let output = env::clean(binary)
        .args(["--list", "--format", "terse"])
        .output()
        .with_context(|| format!("cannot run {}", binary.display()))?;
    ensure!(
        output.status.success(),
        "{} --list failed",
        binary.display()
    );
    Ok(listed(&String::from_utf8_lossy(&output.stdout)))
}

fn listed(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_binaries_are_told_from_other_artifacts() {
        let message = |test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"name":"flow"}},
                    "profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        let want = Some(("flow".to_owned(), PathBuf::from("/t/flow-1")));
        assert_eq!(test_binary(&message(true, "\"/t/flow-1\"")), want);
        assert_eq!(test_binary(&message(false, "\"/t/flow-1\"")), None);
        assert_eq!(test_binary(&message(true, "null")), None);
        assert_eq!(test_binary("   Compiling x"), None);
    }

    #[test]
    fn lists_name_tests_only() {
        let text = "a::b: test\nc: benchmark\nd: test\n\n2 tests, 1 benchmarks\n";
        assert_eq!(listed(text), ["a::b", "d"]);
    }

    #[test]
    fn what_is_said_of_binaries_is_said_of_those_that_exist() {
        let tables = NOT_IN_GUESTS.iter().chain(&ON_THE_OLDEST);
        for (name, why) in tables {
            assert!(!why.is_empty(), "{name}");
        }
        let tables = NOT_IN_GUESTS
            .iter()
            .chain(&ON_THE_OLDEST)
            .map(|(name, _)| name);
        for name in tables.chain(&LONGEST) {
            let tests = env::root().join("tests/tests");
            let is_there = [format!("{name}.rs"), format!("{name}/main.rs")]
                .iter()
                .any(|file| tests.join(file).is_file());
            assert!(is_there, "{name}");
        }
    }

    fn suite(names: &[&str]) -> Suite {
        let binary = |name: &&str| Binary {
            name: (*name).to_owned(),
            path: PathBuf::new(),
            tests: vec!["a".to_owned()],
            partial: false,
        };
        Suite {
            binaries: names.iter().map(binary).collect(),
            enforcer: PathBuf::new(),
        }
    }

    #[test]
    fn the_oldest_kernel_runs_everything_and_so_do_all_when_asked() {
        let (only, _) = ON_THE_OLDEST[0];
        let all = suite(&["new", only]);
        for (kernel, quick, count) in [
            (Kernel::V6_1, true, 2),
            (Kernel::V6_1, false, 2),
            (Kernel::V6_12, true, 1),
            (Kernel::V6_12, false, 2),
        ] {
            let names: Vec<_> = all.on(kernel, quick).names().collect();
            assert_eq!(names.len(), count, "{kernel:?} {quick}");
            assert_eq!(names[0], "new::a");
        }
    }

    #[test]
    fn the_longest_come_first_and_the_others_stay_in_order() {
        let last = LONGEST[LONGEST.len() - 1];
        let order = suite(&["b", "a", last, LONGEST[0]]).order();
        assert_eq!(order, [LONGEST[0], last, "b", "a"]);
    }
}
