//! Builds and runs the fuzzers of `tests/fuzz`: libFuzzer, with coverage counted by the stable
//! compiler.
//!
//! rustc passes LLVM's own coverage sanitizer through (`-Cpasses`, `-Cllvm-args`), so it takes no
//! nightly. Without AddressSanitizer: the code under test is safe Rust, its panics are findings.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use std::{fs, io};

use anyhow::{Context, Result, bail};

use crate::{build, env, setup, ui};

/// What `cargo xtask fuzz` was asked for.
#[derive(clap::Args)]
pub struct Options {
    /// Fuzz for so many seconds, all targets together
    #[arg(long, value_name = "N", default_value_t = 60)]
    pub seconds: u64,
    /// Only this target
    #[arg(long, value_parser = TARGETS.map(|target| target.name))]
    pub target: Option<String>,
    /// Only run the committed inputs
    #[arg(long)]
    pub replay: bool,
    /// Only run this input, as after a finding
    #[arg(long, value_name = "FILE", requires = "target")]
    pub input: Option<PathBuf>,
    /// At the end, write what was found worth keeping over the committed inputs, minimised
    #[arg(long)]
    pub keep: bool,
}

impl Options {
    /// What every run of the tests does: a minute, over all targets.
    pub fn of_tests() -> Self {
        Self {
            seconds: 60,
            target: None,
            replay: false,
            input: None,
            keep: false,
        }
    }
}

struct Target {
    name: &'static str,
    /// Longer inputs find nothing new and take longer.
    longest: u32,
}

const TARGETS: [Target; 3] = [
    Target {
        name: "packets",
        longest: 2048,
    },
    Target {
        name: "policy",
        longest: 4096,
    },
    Target {
        name: "events",
        longest: 1360,
    },
];

/// What makes rustc count coverage as libFuzzer reads it.
const COVERAGE: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Lines of a fuzzer's output that are shown when it ends badly.
const TAIL: usize = 60;

/// Builds the fuzzers and runs them one after the other; goes on to the next after a finding.
pub fn run(options: &Options) -> Result<()> {
    build::objects()?;
    setup::ensure_cpp()?;
    let start = Instant::now();
    let chosen: Vec<&Target> = TARGETS
        .iter()
        .filter(|target| {
            options
                .target
                .as_deref()
                .is_none_or(|name| name == target.name)
        })
        .collect();
    let each = (options.seconds / chosen.len().max(1) as u64).max(1);
    let binaries = build()?;
    let mut failed = Vec::new();
    for target in chosen {
        let fuzzer = Fuzzer::new(target, &binaries)?;
        if let Err(error) = fuzzer.work(options, each) {
            ui::note(&format!("{error:#}"));
            failed.push(target.name);
        }
    }
    if !failed.is_empty() {
        bail!("fuzzing failed: {}", failed.join(", "));
    }
    ui::note(&format!("nothing found ({})", ui::took(start)));
    Ok(())
}

/// Builds all fuzzers, in a target directory of their own; where they are.
fn build() -> Result<PathBuf> {
    let start = Instant::now();
    ui::step("Building the fuzzers");
    let triple = host()?;
    let dir = env::target_dir()?.join("fuzz");
    let mut cargo = env::cargo();
    cargo
        .args(["build", "--locked", "--package", "enforcer-fuzz", "--bins"])
        .args(["--features", "libfuzzer", "--profile", "fuzz"])
        // Named, or build scripts and macros would get the flags as well, and no fuzzer to link.
        .args(["--target", &triple])
        .arg("--target-dir")
        .arg(&dir)
        .env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\x1f"))
        .env("CARGO_TERM_PROGRESS_WHEN", "never");
    ui::run_quietly("cargo build (a few minutes the first time)", &mut cargo)?;
    ui::note(&format!("{} ({})", dir.display(), ui::took(start)));
    Ok(dir.join(triple).join("fuzz"))
}

/// The compiler's name for this machine.
fn host() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .current_dir(env::root())
        .arg("-vV")
        .output()
        .context("cannot run rustc")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(line.context("rustc -vV: no host")?.to_owned())
}

struct Fuzzer<'a> {
    target: &'a Target,
    binary: PathBuf,
    /// The committed inputs.
    corpus: PathBuf,
    /// What this machine has found so far.
    grown: PathBuf,
    seeds: PathBuf,
    findings: PathBuf,
}

impl<'a> Fuzzer<'a> {
    fn new(target: &'a Target, binaries: &Path) -> Result<Self> {
        let work = env::target_dir()?.join("fuzz");
        let this = Self {
            target,
            binary: binaries.join(format!("fuzz-{}", target.name)),
            corpus: env::root().join("tests/fuzz/corpus").join(target.name),
            grown: work.join("grown").join(target.name),
            seeds: work.join("seeds").join(target.name),
            findings: work.join("findings").join(target.name),
        };
        for dir in [&this.corpus, &this.grown, &this.seeds, &this.findings] {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(this)
    }

    fn work(&self, options: &Options, seconds: u64) -> Result<()> {
        let name = self.target.name;
        if let Some(input) = &options.input {
            ui::step(&format!("Running one input of {name}"));
            let input = std::path::absolute(input)?;
            return self.run(self.command().arg(input)).map(drop);
        }
        if options.replay {
            ui::step(&format!("Running the inputs of {name}"));
            let said = self.run(self.command().arg("-runs=0").arg(&self.corpus))?;
            ui::note(&said.to_string());
            return Ok(());
        }
        ui::step(&format!("Fuzzing {name} for {seconds} s"));
        let said = self.run(
            self.command()
                .arg(format!("-max_total_time={seconds}"))
                .args([&self.grown, &self.corpus, &self.seeds]),
        )?;
        ui::note(&said.to_string());
        if options.keep { self.keep() } else { Ok(()) }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        let dictionary = env::root().join(format!("tests/fuzz/{}.dict", self.target.name));
        command
            .current_dir(env::root())
            .env("ENFORCER_FUZZ_SEEDS", &self.seeds)
            // A hang is a finding; a loaded machine is none.
            .args(["-timeout=60", "-print_final_stats=0"])
            .arg(format!("-max_len={}", self.target.longest))
            .arg(format!("-artifact_prefix={}/", self.findings.display()));
        if dictionary.is_file() {
            command.arg(format!("-dict={}", dictionary.display()));
        }
        command
    }

    /// Runs the fuzzer to its end. On a finding the error says how to see it again.
    fn run(&self, command: &mut Command) -> Result<Said> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", ui::describe(command)))?;
        let mut said = Said::default();
        let mut tail = VecDeque::new();
        if let Some(stderr) = child.stderr.take() {
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                said.read(&line);
                if tail.len() == TAIL {
                    tail.pop_front();
                }
                tail.push_back(line);
            }
        }
        let status = child.wait()?;
        if status.success() {
            if said.edges == Some(0) {
                bail!("{}: the compiler counted no coverage", self.target.name);
            }
            return Ok(said);
        }
        for line in &tail {
            ui::note(&format!("  {line}"));
        }
        match &said.artifact {
            Some(path) => bail!(
                "{}: {status}. To see it again:\n      cargo xtask fuzz --target {} --input {path}",
                self.target.name,
                self.target.name,
            ),
            None => bail!("{}: {status}", self.target.name),
        }
    }

    /// Replaces the committed inputs by the fewest that reach all that is reached so far.
    fn keep(&self) -> Result<()> {
        let new = self.grown.with_extension("new");
        remove_all(&new)?;
        fs::create_dir_all(&new)?;
        // For all edges; how often each is taken, the grown inputs remember.
        self.run(
            self.command()
                .args(["-set_cover_merge=1", "-use_counters=0"])
                .args([&new, &self.corpus, &self.seeds, &self.grown]),
        )?;
        remove_all(&self.corpus)?;
        fs::create_dir_all(&self.corpus)?;
        let mut count = 0;
        for entry in fs::read_dir(&new)? {
            let path = entry?.path();
            let Some(name) = path.file_name() else {
                continue;
            };
            fs::copy(&path, self.corpus.join(name))?;
            count += 1;
        }
        remove_all(&new)?;
        ui::note(&format!("{count} inputs in {}", self.corpus.display()));
        Ok(())
    }
}

fn remove_all(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What a fuzzer's output says of its run.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    runs: u64,
    /// Edges reached by the inputs it began with.
    began: Option<u64>,
    /// Edges reached in the end.
    edges: Option<u64>,
    artifact: Option<String>,
}

impl Said {
    /// Reads a line like `#512 NEW cov: 41 ft: 90 corp: 7/90b …`, or where a finding was written.
    fn read(&mut self, line: &str) {
        if let Some((_, path)) = line.split_once("Test unit written to ") {
            self.artifact = Some(path.trim().to_owned());
        }
        let mut words = line.split_whitespace();
        let Some(Ok(runs)) = words
            .next()
            .and_then(|w| w.strip_prefix('#'))
            .map(str::parse)
        else {
            return;
        };
        while let Some(word) = words.next() {
            if word == "cov:" {
                self.runs = runs;
                self.edges = words.next().and_then(|number| number.parse().ok());
                if line.contains("INITED") {
                    self.began = self.edges;
                }
            }
        }
    }
}

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let edges = self.edges.unwrap_or(0);
        let more = edges - self.began.unwrap_or(0).min(edges);
        write!(f, "{} runs, {edges} edges ({more} of them new)", self.runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_fuzzer_says_is_read() {
        let mut said = Said::default();
        said.read("INFO: Loaded 1 modules   (110 inline 8-bit counters)");
        said.read("#2\tINITED cov: 7 ft: 9 corp: 1/1b exec/s: 0 rss: 27Mb");
        said.read("#9700\tNEW    cov: 9 ft: 9 corp: 3/79b lim: 98 exec/s: 0 rss: 27Mb");
        assert_eq!(said.to_string(), "9700 runs, 9 edges (2 of them new)");
        said.read("artifact_prefix='x/'; Test unit written to x/crash-0a");
        assert_eq!(said.artifact.as_deref(), Some("x/crash-0a"));
    }

    #[test]
    fn every_target_has_its_program_and_its_inputs() {
        let fuzz = env::root().join("tests/fuzz");
        for target in TARGETS {
            assert!(
                fuzz.join("src")
                    .join(format!("{}.rs", target.name))
                    .is_file()
            );
            assert!(fuzz.join("corpus").join(target.name).is_dir());
        }
    }
}
