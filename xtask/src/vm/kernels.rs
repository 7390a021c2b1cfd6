//! Debian's stock kernels: fetched once into the toolchain cache, found there without a network.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{env, toolchain, ui};

/// A kernel that the suite runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Kernel {
    /// Debian 12's own: no tcx, programs are attached through clsact
    #[value(name = "6.1")]
    V6_1,
    /// Debian 12's newer one: tcx
    #[value(name = "6.12")]
    V6_12,
}

impl Kernel {
    /// Both, the oldest first.
    pub const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    /// As it is asked for.
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }
}

/// A kernel as unpacked from its package.
#[derive(Clone, Debug)]
pub struct Unpacked {
    /// The bootable image.
    pub image: PathBuf,
    /// `lib/modules/RELEASE`, with the files of depmod.
    pub modules: PathBuf,
    /// What `uname -r` says.
    pub release: String,
}

fn cache(kernel: Kernel) -> Result<PathBuf> {
    Ok(toolchain::cache_dir()?.join(format!("kernel-{}", kernel.name())))
}

/// The kernel in the cache, if it is there.
pub fn find(kernel: Kernel) -> Result<Option<Unpacked>> {
    read(&cache(kernel)?)
}

/// The kernel in the cache.
pub fn get(kernel: Kernel) -> Result<Unpacked> {
    find(kernel)?.with_context(|| format!("kernel {} is not installed", kernel.name()))
}

/// Reads an unpacked package.
fn read(root: &Path) -> Result<Option<Unpacked>> {
    let Ok(entries) = fs::read_dir(root.join("boot")) else {
        return Ok(None);
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(release) = name.strip_prefix("vmlinuz-") {
            let modules = root.join("lib/modules").join(release);
            // depmod is the last step of an installation.
            return Ok(modules.join("modules.dep.bin").is_file().then(|| Unpacked {
                image: entry.path(),
                release: release.to_owned(),
                modules,
            }));
        }
    }
    Ok(None)
}

/// Fetches and unpacks a kernel. Takes no root.
pub fn install(kernel: Kernel) -> Result<Unpacked> {
    ui::step(&format!("Fetching Debian's kernel {}", kernel.name()));
    let target = cache(kernel)?;
    let partial = target.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    let root = partial.join("root");
    fs::create_dir_all(&root)?;
    let deb = download(kernel, &partial)?;
    ui::run(
        env::clean("dpkg")
            .arg("-x")
            .arg(partial.join(deb))
            .arg(&root),
    )?;
    let releases: Vec<_> = fs::read_dir(root.join("lib/modules"))?.collect::<Result<_, _>>()?;
    let [release] = &releases[..] else {
        bail!("the package has {} sets of modules", releases.len());
    };
    let depmod = env::find_program("depmod").context("depmod, of package kmod, is missing")?;
    ui::run(
        env::clean(depmod)
            .arg("-b")
            .arg(&root)
            .arg(release.file_name()),
    )?;
    if target.exists() {
        fs::remove_dir_all(&target)?;
    }
    fs::rename(&root, &target)?;
    fs::remove_dir_all(&partial)?;
    let found = find(kernel)?.context("the package has no kernel in boot/")?;
    ui::note(&format!("{} in {}", found.release, target.display()));
    Ok(found)
}

/// Downloads the newest package of a kernel into `directory`; returns the file's name.
fn download(kernel: Kernel, directory: &Path) -> Result<String> {
    let own = Apt::of_this_machine(directory);
    match own.fetch(kernel) {
        Ok(file) => return Ok(file),
        Err(error) => ui::note(&format!("not from this machine's package lists: {error:#}")),
    }
    // Lists of our own: the machine's may be missing, old, or without backports, and changing
    // them would take root.
    let ours = Apt::with_own_lists(directory)?;
    ui::run_quietly(
        "apt-get update (into the cache)",
        &mut ours.get(&["update"]),
    )?;
    ours.fetch(kernel)
        .with_context(|| format!("no package of kernel {} could be had", kernel.name()))
}

/// apt, with the machine's lists or with ours.
struct Apt {
    directory: PathBuf,
    options: Vec<String>,
}

impl Apt {
    fn of_this_machine(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            options: Vec::new(),
        }
    }

    fn with_own_lists(directory: &Path) -> Result<Self> {
        let state = directory.join("apt");
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(state.join(name))?;
        }
        let sources = state.join("sources.list");
        fs::write(&sources, sources_list(&configured_sources()))?;
        fs::write(state.join("status"), "")?;
        let state = state.display();
        let options = [
            format!("Dir::Etc::SourceList={state}/sources.list"),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={state}/lists"),
            format!("Dir::State::status={state}/status"),
            format!("Dir::Cache={state}/cache"),
            "APT::Sandbox::User=".to_owned(),
        ];
        Ok(Self {
            directory: directory.to_owned(),
            options: options.into(),
        })
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = env::clean(program);
        command.current_dir(&self.directory).arg("-q");
        for option in &self.options {
            command.args(["-o", option]);
        }
        command.args(arguments);
        command
    }

    fn get(&self, arguments: &[&str]) -> Command {
        self.command("apt-get", arguments)
    }

    /// Downloads the newest package of a kernel; returns the file's name.
    fn fetch(&self, kernel: Kernel) -> Result<String> {
        let output = self
            .command("apt-cache", &["pkgnames", "linux-image-6."])
            .output()?;
        let names = String::from_utf8_lossy(&output.stdout);
        let package = newest(kernel, names.lines())
            .with_context(|| format!("they name no cloud kernel {}", kernel.name()))?;
        ui::run_quietly(
            &format!("apt-get download {package}"),
            &mut self.get(&["download", package]),
        )?;
        let mut files = fs::read_dir(&self.directory)?
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.ends_with(".deb"));
        let file = files.next().context("apt-get download left no file")?;
        ensure!(files.next().is_none(), "more than one package came");
        Ok(file)
    }
}

/// The newest package of a kernel among these names.
fn newest<'a>(kernel: Kernel, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // As in linux-image-6.1.0-56-cloud-amd64, linux-image-6.12.117+deb12-cloud-amd64 and
    // linux-image-6.12.9+bpo-cloud-amd64.
    let prefix = format!("linux-image-{}.", kernel.name());
    names
        .map(str::trim)
        .filter(|name| name.starts_with(&prefix) && name.ends_with("-cloud-amd64"))
        .max_by(|a, b| by_numbers(a, b))
}

/// Compares by the numbers in the names.
fn by_numbers(a: &str, b: &str) -> Ordering {
    let numbers = |text: &str| -> Vec<u64> {
        text.split(|c: char| !c.is_ascii_digit())
            .filter_map(|digits| digits.parse().ok())
            .collect()
    };
    numbers(a).cmp(&numbers(b))
}

/// All of apt's sources on this machine.
fn configured_sources() -> String {
    let parts = fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten();
    let files = parts.flatten().map(|entry| entry.path());
    std::iter::once(PathBuf::from("/etc/apt/sources.list"))
        .chain(files)
        .filter_map(|file| fs::read_to_string(file).ok())
        .collect()
}

/// Debian 12's suites, from the mirrors that `configured` uses for them.
fn sources_list(configured: &str) -> String {
    let mirror = |of: &str, default: &str| {
        let words = configured
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'))
            .flat_map(str::split_whitespace);
        words
            .filter(|word| word.starts_with("http://") || word.starts_with("https://"))
            .map(|word| word.trim_end_matches('/'))
            .find(|word| word.ends_with(of))
            .unwrap_or(default)
            .to_owned()
    };
    let main = mirror("/debian", "http://deb.debian.org/debian");
    let security = mirror("/debian-security", "http://deb.debian.org/debian-security");
    format!(
        "deb {main} bookworm main\n\
         deb {main} bookworm-backports main\n\
         deb {security} bookworm-security main\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_package_by_number() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-57-cloud-amd64-dbg",
            "linux-image-6.1.0-58-amd64",
            "linux-image-6.12.9+bpo-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12-cloud-amd64",
        ];
        let newest = |kernel| newest(kernel, names.into_iter()).unwrap();
        assert_eq!(newest(Kernel::V6_1), names[1]);
        assert_eq!(newest(Kernel::V6_12), names[5]);
    }

    #[test]
    fn mirrors_are_those_of_the_machine() {
        let list =
            sources_list("# deb http://old/debian x\nURIs: https://mirror.example/debian/\n");
        assert_eq!(
            list,
            "deb https://mirror.example/debian bookworm main\n\
             deb https://mirror.example/debian bookworm-backports main\n\
             deb http://deb.debian.org/debian-security bookworm-security main\n"
        );
    }

    #[test]
    fn a_kernel_is_there_only_when_complete() {
        let root = tempfile::tempdir().unwrap();
        assert!(read(root.path()).unwrap().is_none());
        fs::create_dir_all(root.path().join("boot")).unwrap();
        fs::write(root.path().join("boot/vmlinuz-6.1.0"), "").unwrap();
        assert!(read(root.path()).unwrap().is_none());
        let modules = root.path().join("lib/modules/6.1.0");
        fs::create_dir_all(&modules).unwrap();
        fs::write(modules.join("modules.dep.bin"), "").unwrap();
        assert_eq!(read(root.path()).unwrap().unwrap().release, "6.1.0");
    }
}
