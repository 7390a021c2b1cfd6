//! Installs what the kernel side needs and a bare machine lacks.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::toolchain::{self, LINKER_VERSION, Rust};
use crate::{env, ui, vm};

/// A complete kernel-side toolchain.
pub struct Toolchain {
    /// The compiler.
    pub rust: Rust,
    /// Path of bpf-linker.
    pub linker: PathBuf,
}

/// Debian packages of the compiler and its linter (clippy has no BPF target of its own).
const RUST_PACKAGES: [&str; 4] = [
    "rustc-web",
    "cargo-web",
    "libstd-rust-web-dev-bpf",
    "rust-web-clippy",
];

/// What the demo and the tests run, and the Debian packages that have it.
const TOOLS: [(&str, &str); 2] = [("ip", "iproute2"), ("nft", "nftables")];

/// Finds the toolchain, installing what is missing; says nothing when all is there.
pub fn ensure() -> Result<Toolchain> {
    let missing = missing_tools();
    if !missing.is_empty() {
        ui::step(&format!(
            "Installing {} (the demo and the tests make network namespaces)",
            missing.join(", ")
        ));
        debian_install(&missing)?;
    }
    let rust = match Rust::find() {
        Some(rust) => rust,
        None => {
            ui::step("Installing a Rust compiler for BPF (Debian's rustc-web, beside rustup's)");
            debian_install(&RUST_PACKAGES)?;
            Rust::find().context(
                "the packages are installed, but /usr/bin/rustc still has no core library for \
                 bpfel-unknown-none: is libstd-rust-web-dev-bpf of the same version as rustc-web?",
            )?
        }
    };
    let llvm = rust.llvm()?;
    let linker = match toolchain::find_linker(llvm)? {
        Some(linker) => linker,
        None => install_linker(rust, llvm)?,
    };
    Ok(Toolchain { rust, linker })
}

/// Finds a C++ compiler, which libFuzzer takes, or installs one.
pub fn ensure_cpp() -> Result<()> {
    if env::find_program("c++").is_some() {
        return Ok(());
    }
    ui::step("Installing g++ (libFuzzer is C++)");
    debian_install(&["g++"])
}

/// The `setup` verb: [`ensure`], with a word at the end.
pub fn run() -> Result<()> {
    let start = Instant::now();
    let tools = ensure()?;
    ensure_cpp()?;
    if vm::is_possible() {
        vm::ensure_installed()?;
    }
    ui::step(&format!("Toolchain complete ({})", ui::took(start)));
    ui::note(&format!(
        "compiler: {} (LLVM {})",
        tools.rust.name(),
        tools.rust.llvm()?
    ));
    ui::note(&format!("linker:   {}", tools.linker.display()));
    if vm::is_possible() {
        ui::note(&format!("guests:   Linux {}", vm::installed()?.join(", ")));
    }
    Ok(())
}

/// Packages of the programs that the demo and the tests run, where they are not there.
fn missing_tools() -> Vec<&'static str> {
    TOOLS
        .iter()
        .filter(|(program, _)| env::find_program(program).is_none())
        .map(|(_, package)| *package)
        .collect()
}

/// Installs bpf-linker from crates.io against the LLVM that `rust` was built with.
fn install_linker(rust: Rust, llvm: u32) -> Result<PathBuf> {
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    let config = prefix.join("bin/llvm-config");
    let polly = prefix.join("lib/libPolly.a");
    if !config.is_file() || !polly.is_file() || env::find_program("c++").is_none() {
        ui::step(&format!(
            "Installing LLVM {llvm} (bpf-linker links against it)"
        ));
        let packages = [format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev")];
        debian_install(&[&packages[0], &packages[1], "g++"])?;
    }
    let root = toolchain::linker_root(llvm)?;
    ui::step(&format!(
        "Installing bpf-linker {LINKER_VERSION} into {}",
        root.display()
    ));
    ui::note(&format!(
        "it must read the bitcode of {}, so it is built here",
        rust.name()
    ));
    let build_dir = env::target_dir()?.join("bpf/linker");
    // A clean environment, but the cargo that runs us: a host build on the stable toolchain.
    let mut cargo = env::clean(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args([
            "install",
            "bpf-linker",
            "--locked",
            "--version",
            LINKER_VERSION,
            "--root",
        ])
        .arg(&root)
        .args([
            "--no-default-features",
            "--features",
            &format!("llvm-{llvm}"),
        ])
        .arg("--target-dir")
        .arg(&build_dir)
        // One for llvm-sys, the other for bpf-linker's own search.
        .env(format!("LLVM_SYS_{llvm}1_PREFIX"), &prefix)
        .env("LLVM_PREFIX", &prefix)
        .env("CARGO_TERM_PROGRESS_WHEN", "never");
    ui::run_quietly("cargo install bpf-linker (about a minute)", &mut cargo)?;
    // Only a cache of a finished build.
    let _ = std::fs::remove_dir_all(&build_dir);
    toolchain::find_linker(llvm)?.context("cargo installed bpf-linker, but it is not there")
}

/// Installs Debian packages as root, after a refresh of the package lists where it takes one.
pub fn debian_install(packages: &[&str]) -> Result<()> {
    let by_hand = by_hand(packages);
    if let Err(reason) = is_known_debian() {
        bail!(
            "cannot install {} by myself: {reason}\n{by_hand}",
            packages.join(", ")
        );
    }
    let apt = |args: &[&str]| -> Result<Command> {
        let mut command = env::as_root("apt-get", "/usr/bin/env")?;
        command
            .args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"])
            .args(args);
        Ok(command)
    };
    let mut install = vec!["install", "-y", "--no-install-recommends"];
    install.extend(packages);
    // The lists may be missing, or older than the versions that fit together.
    let simulate = [&install[..], &["--simulate"]].concat();
    let listed = apt(&simulate)
        .context(by_hand.clone())?
        .output()?
        .status
        .success();
    if !listed || lists_are_old() {
        ui::run_quietly("apt-get update", &mut apt(&["update"])?).context(by_hand.clone())?;
    }
    ui::run_quietly(
        &format!("apt-get install {}", packages.join(" ")),
        &mut apt(&install)?,
    )
    .context(by_hand)
}

/// True when the package lists were fetched more than a day ago.
fn lists_are_old() -> bool {
    const DAY: u64 = 24 * 60 * 60;
    std::fs::metadata("/var/lib/apt/lists")
        .and_then(|lists| lists.modified())
        .ok()
        .and_then(|modified| modified.elapsed().ok())
        .is_none_or(|age| age.as_secs() > DAY)
}

fn is_known_debian() -> Result<(), String> {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        release
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"').to_owned())
            .unwrap_or_default()
    };
    let (id, version) = (field("ID"), field("VERSION_ID"));
    if !Path::new("/usr/bin/apt-get").is_file() {
        return Err("there is no apt-get here".into());
    }
    if id != "debian" || version != "12" {
        return Err(format!(
            "this is {id} {version}, and only Debian 12 is known to have them"
        ));
    }
    Ok(())
}

fn by_hand(packages: &[&str]) -> String {
    format!(
        "By hand, on Debian 12, as root:\n  apt-get update && apt-get install {}\n\
         Anywhere else, a nightly with its sources and a bpf-linker in PATH do as well:\n  \
         rustup toolchain install nightly --component rust-src --component clippy\n  \
         cargo install bpf-linker --version {LINKER_VERSION}\n\
         and `ip` from iproute2, `nft` from nftables. Then run the same command again.",
        packages.join(" ")
    )
}
