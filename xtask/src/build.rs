//! Builds the eBPF objects and the binary that embeds them.

use std::env::consts::ARCH;
use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{fs, io};

use anyhow::{Context, Result, bail};

use crate::toolchain::TARGET;
use crate::{env, setup, stamp, ui};

/// The kernel side's name as a cargo binary.
const BIN: &str = "enforcer";

/// Builds the objects where they are missing or stale.
pub fn objects() -> Result<()> {
    let dir = objects_dir()?;
    let hash = stamp::hash(env::root(), ARCH).context("cannot read the kernel-side sources")?;
    if stamp::is_current(&dir, &hash) {
        return Ok(());
    }
    if !env::root().join("enforcer-ebpf/Cargo.toml").is_file() {
        bail!("enforcer-ebpf/Cargo.toml is missing: is this a full check-out?");
    }
    let tools = setup::ensure()?;
    let start = Instant::now();
    ui::step(&format!(
        "Building the eBPF objects with {}",
        tools.rust.name()
    ));
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    // Until all are in place there must be no stamp that vouches for a mixture.
    remove_if_present(&dir.join(stamp::STAMP))?;
    let build_dir = dir.join("build");
    for class in stamp::CLASSES {
        let mut cargo = tools.rust.cargo("build", &tools.linker);
        cargo.args([
            "--locked",
            "--no-default-features",
            "--features",
            &stamp::features(class),
        ]);
        cargo.arg("--target-dir").arg(&build_dir);
        ui::run(&mut cargo)?;
        let built = build_dir.join(TARGET).join("release").join(BIN);
        install(&built, &dir.join(stamp::object_name(class)))?;
    }
    fs::write(dir.join(stamp::STAMP), format!("{hash}\n"))?;
    ui::note(&format!(
        "{} objects in {} ({})",
        stamp::CLASSES.len(),
        dir.display(),
        ui::took(start)
    ));
    Ok(())
}

/// Builds objects and binary; returns the binary's path.
pub fn binary(release: bool) -> Result<PathBuf> {
    objects()?;
    let start = Instant::now();
    ui::step("Building the enforcer");
    let mut cargo = env::cargo();
    cargo.args(["build", "--package", "enforcer"]);
    if release {
        cargo.arg("--release");
    }
    ui::run(&mut cargo)?;
    let profile = if release { "release" } else { "debug" };
    let binary = env::target_dir()?.join(profile).join("enforcer");
    ui::note(&format!("{} ({})", binary.display(), ui::took(start)));
    Ok(binary)
}

/// Where the objects and their stamp are: `target/bpf`.
pub fn objects_dir() -> Result<PathBuf> {
    Ok(env::target_dir()?.join("bpf"))
}

/// Copies by rename, so that a reader never sees half an object.
fn install(from: &Path, to: &Path) -> Result<()> {
    let partial = to.with_extension("partial");
    fs::copy(from, &partial).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::rename(&partial, to).with_context(|| format!("cannot write {}", to.display()))
}

fn remove_if_present(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stamp_follows_names_and_contents() {
        let root = tempfile::tempdir().unwrap();
        let src = root.path().join("enforcer-ebpf/src");
        fs::create_dir_all(&src).unwrap();
        fs::write(src.join("main.rs"), "a").unwrap();
        let first = stamp::hash(root.path(), ARCH).unwrap();
        assert_eq!(first, stamp::hash(root.path(), ARCH).unwrap());
        fs::write(src.join("main.rs"), "b").unwrap();
        let second = stamp::hash(root.path(), ARCH).unwrap();
        assert_ne!(first, second);
        assert_ne!(second, stamp::hash(root.path(), "another").unwrap());
        fs::rename(src.join("main.rs"), src.join("other.rs")).unwrap();
        assert_ne!(second, stamp::hash(root.path(), ARCH).unwrap());
    }

    #[test]
    fn objects_are_current_only_with_all_files_and_the_same_hash() {
        let dir = tempfile::tempdir().unwrap();
        for class in stamp::CLASSES {
            assert!(!stamp::is_current(dir.path(), "1"));
            fs::write(dir.path().join(stamp::object_name(class)), "").unwrap();
        }
        assert!(!stamp::is_current(dir.path(), "1"));
        fs::write(dir.path().join(stamp::STAMP), "1\n").unwrap();
        assert!(stamp::is_current(dir.path(), "1"));
        assert!(!stamp::is_current(dir.path(), "2"));
    }
}
