//! Runs the whole suite: what needs no privilege as we are, the rest as root.

use std::ffi::OsString;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{build, env, setup, ui};

/// What `cargo xtask test` was asked for.
pub struct Options {
    /// Leave out what needs root and the kernel.
    pub quick: bool,
    /// Run only tests whose name contains this.
    pub filter: Option<String>,
}

/// Prepares everything and runs the tests; both parts run even where the first one fails.
pub fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    let binary = build::binary(false)?;

    ui::step("Unit, property and documentation tests");
    let start = Instant::now();
    let mut cargo = env::cargo();
    cargo.args([
        "test",
        "--workspace",
        "--exclude",
        "enforcer-tests",
        "--no-fail-fast",
    ]);
    cargo.args(&options.filter).env("ENFORCER_BIN", &binary);
    let units = ui::succeeds(&mut cargo)?;
    ui::note(&format!(
        "{} in {}",
        if units { "passed" } else { "FAILED" },
        ui::took(start)
    ));
    if options.quick {
        return verdict(units, true);
    }

    ui::step("Kernel and namespace tests");
    mount_bpffs()?;
    let mut cargo = env::cargo();
    cargo.args(["test", "--package", "enforcer-tests", "--no-fail-fast"]);
    cargo.args(&options.filter).env("ENFORCER_BIN", &binary);
    let mut sudo = env::root_prefix("running the kernel tests")?;
    if !sudo.is_empty() {
        let mut pair = OsString::from("ENFORCER_BIN=");
        pair.push(&binary);
        sudo.push(pair);
        // Cargo itself stays with the user, so nothing in the target directory becomes root's.
        let words: Vec<String> = sudo
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        let value = toml_array(&words);
        cargo.args(["--config", &format!("target.'cfg(unix)'.runner={value}")]);
    }
    // Cargo's own summary closes the output: nothing is printed behind it when all is well.
    let kernel = ui::succeeds(&mut cargo)?;
    verdict(units, kernel)
}

fn verdict(units: bool, kernel: bool) -> Result<()> {
    match (units, kernel) {
        (true, true) => Ok(()),
        (false, true) => bail!("unit, property or documentation tests failed"),
        (true, false) => bail!("kernel or namespace tests failed"),
        (false, false) => bail!("tests failed in both parts"),
    }
}

/// Mounts bpffs where it is missing: containers and small images have none.
fn mount_bpffs() -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")?;
    let mounted = mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some("/sys/fs/bpf") && fields.next() == Some("bpf")
    });
    if mounted {
        return Ok(());
    }
    ui::note("mounting bpffs on /sys/fs/bpf");
    ui::run(env::as_root("mounting bpffs", "mount")?.args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))
}

fn toml_array(words: &[String]) -> String {
    let quoted: Vec<String> = words
        .iter()
        .map(|word| format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\"")))
        .collect();
    format!("[{}]", quoted.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_as_toml() {
        let words = ["sudo".to_owned(), "A=b \"c\\".to_owned()];
        assert_eq!(toml_array(&words), r#"["sudo","A=b \"c\\"]"#);
    }
}
