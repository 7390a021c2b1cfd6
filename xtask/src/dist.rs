//! The binary that is handed out: static, so that it runs on any Linux of its architecture.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::{build, env, ui};

/// Builds `dist/enforcer` and checks that it asks for no dynamic linker.
pub fn run() -> Result<()> {
    build::objects()?;
    let start = Instant::now();
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    ui::step(&format!("Building a static enforcer for {triple}"));
    let mut cargo = env::cargo();
    // Naming the target keeps the flag away from build scripts and proc macros.
    cargo.args([
        "build",
        "--release",
        "--package",
        "enforcer",
        "--target",
        &triple,
    ]);
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
    cargo.env_remove("CARGO_ENCODED_RUSTFLAGS");
    ui::run(&mut cargo)?;

    let built = env::target_dir()?.join(&triple).join("release/enforcer");
    let image = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    if let Some(interpreter) = interpreter(&image)? {
        bail!(
            "{} is not static: it asks for {interpreter}",
            built.display()
        );
    }
    let dist = env::root().join("dist");
    fs::create_dir_all(&dist)?;
    let binary = dist.join("enforcer");
    fs::copy(&built, &binary)?;
    run_once(&binary)?;
    ui::note(&format!(
        "{}: static, {:.1} MiB ({})",
        binary.display(),
        image.len() as f64 / f64::from(1 << 20),
        ui::took(start)
    ));
    Ok(())
}

fn run_once(binary: &Path) -> Result<()> {
    let output = env::clean(binary).arg("--help").env_clear().output()?;
    ensure!(
        output.status.success(),
        "{} --help failed",
        binary.display()
    );
    Ok(())
}

/// The dynamic linker that a 64-bit little-endian ELF file asks for, if any.
fn interpreter(image: &[u8]) -> Result<Option<String>> {
    const PT_INTERP: u64 = 3;
    ensure!(
        image.starts_with(b"\x7fELF\x02\x01"),
        "not a 64-bit little-endian ELF file"
    );
    let number = |at: usize, width: usize| -> Result<u64> {
        let bytes = image
            .get(at..at + width)
            .context("the ELF file is cut short")?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    let headers = usize::try_from(number(0x20, 8)?)?;
    let size = usize::try_from(number(0x36, 2)?)?;
    let count = usize::try_from(number(0x38, 2)?)?;
    for header in (0..count).map(|index| headers + index * size) {
        if number(header, 4)? == PT_INTERP {
            let from = usize::try_from(number(header + 0x08, 8)?)?;
            let length = usize::try_from(number(header + 0x20, 8)?)?;
            let name = image
                .get(from..from + length)
                .context("the ELF file is cut short")?;
            let name = String::from_utf8_lossy(name)
                .trim_end_matches('\0')
                .to_owned();
            return Ok(Some(name));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_binary_is_told_from_other_files() {
        // The test itself is an ordinary dynamic executable.
        let image = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(interpreter(&image).unwrap().unwrap().contains("ld-linux"));
        assert!(interpreter(b"#!/bin/sh\n").is_err());
        assert!(interpreter(&image[..70]).is_err());
    }
}
