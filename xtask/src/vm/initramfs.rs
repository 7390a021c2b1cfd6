//! The guest's whole file system: tools, modules, tests, and the sources that tests read.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::archive::Archive;
use super::kernels::Unpacked;
use super::suite::Suite;
use crate::env;

/// Programs of this machine that go along with their libraries: path in the guest, name here,
/// Debian package.
const TOOLS: [(&str, &str, &str); 5] = [
    ("/bin/busybox", "busybox", "busybox-static"),
    ("/sbin/modprobe", "modprobe", "kmod"),
    ("/usr/sbin/ip", "ip", "iproute2"),
    ("/usr/sbin/tc", "tc", "iproute2"),
    ("/usr/sbin/nft", "nft", "nftables"),
];

/// Settings of this machine that the tools look for.
const SETTINGS: [&str; 4] = [
    "/etc/protocols",
    "/etc/services",
    "/etc/iproute2/rt_tables",
    "/etc/iproute2/rt_protos",
];

/// Directories of modules that tests may ask for, below `kernel/`.
const MODULES: [&str; 10] = [
    "arch",
    "crypto",
    "drivers/net/bonding",
    "drivers/net/ipvlan",
    "drivers/net/team",
    "drivers/net/vxlan",
    "drivers/net/wireguard",
    "fs/fuse",
    "lib",
    "net",
];
/// The one whose own files are taken, but not all that is below it.
const FLAT: &str = "drivers/net/";

/// Debian packages of tools that this machine lacks.
pub fn missing_packages() -> BTreeSet<&'static str> {
    TOOLS
        .iter()
        .filter(|(_, name, _)| env::find_program(name).is_none())
        .map(|(_, _, package)| *package)
        .collect()
}

/// How the guest runs the suite.
pub struct Plan<'a> {
    /// Variables for the tests.
    pub environment: &'a [(&'a str, String)],
    /// How long a test binary may run.
    pub seconds: u64,
}

/// Writes the archive.
pub fn write(path: &Path, kernel: &Unpacked, suite: &Suite, plan: &Plan<'_>) -> Result<()> {
    let mut archive = Archive::create(path)?;
    for directory in ["/proc", "/sys", "/run", "/tmp", "/root", "/var/tmp"] {
        archive.directory(directory)?;
    }
    archive.device("/dev/console", 5, 1)?;
    archive.device("/dev/null", 1, 3)?;
    archive.contents("/init", include_bytes!("init.sh"), 0o755)?;
    archive.contents("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n", 0o644)?;
    archive.contents("/etc/group", b"root:x:0:\n", 0o644)?;
    for file in SETTINGS {
        if Path::new(file).is_file() {
            archive.file(file, Path::new(file))?;
        }
    }
    for (inside, name, package) in TOOLS {
        let tool = env::find_program(name)
            .with_context(|| format!("{name}, of package {package}, is missing"))?;
        archive.file(inside, &tool)?;
        for library in libraries(&tool)? {
            archive.file(&library.to_string_lossy(), &library)?;
        }
    }
    add_modules(&mut archive, kernel)?;
    // Tests find files of the source tree by the path it has here.
    let root = env::root();
    let target = env::target_dir()?;
    let skip = |path: &Path| {
        path == target
            || path.parent() == Some(root) && path.ends_with(".git")
            || path.ends_with("target")
            || path.ends_with("dist")
    };
    archive.tree(&root.to_string_lossy(), root, &skip)?;

    archive.file("/usr/sbin/enforcer", &suite.enforcer)?;
    let mut environment = "export ENFORCER_BIN=/usr/sbin/enforcer\n".to_owned();
    for (name, value) in plan.environment {
        environment += &format!("export {name}={value}\n");
    }
    archive.contents("/etc/suite/environment", environment.as_bytes(), 0o644)?;
    let mut lines = String::new();
    for binary in &suite.binaries {
        archive.file(&format!("/suite/{}", binary.name), &binary.path)?;
        lines += &format!(
            "{} {} -Z unstable-options --format json --report-time --show-output",
            binary.name, plan.seconds
        );
        if binary.partial {
            lines += &format!(" --exact {}", binary.tests.join(" "));
        }
        lines += "\n";
    }
    archive.contents("/etc/suite/plan", lines.as_bytes(), 0o644)?;
    archive.finish()?;
    Ok(())
}

/// The shared libraries of a program, and its dynamic linker.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = env::clean("ldd")
        .arg(program)
        .output()
        .context("cannot run ldd, of package libc-bin")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        !text.contains("not found"),
        "{} lacks a library:\n{text}",
        program.display()
    );
    // It fails for a static program, which needs none.
    Ok(loaded(&text))
}

/// The files that `ldd` names.
fn loaded(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            line.split_whitespace()
                .find(|word| word.starts_with('/') && !word.ends_with(':'))
        })
        .map(PathBuf::from)
        .collect()
}

/// Adds modules with those they need, and the files by which modprobe finds them.
fn add_modules(archive: &mut Archive<impl std::io::Write>, kernel: &Unpacked) -> Result<()> {
    let inside = format!("/lib/modules/{}", kernel.release);
    let dependencies = fs::read_to_string(kernel.modules.join("modules.dep"))?;
    for module in wanted(&dependencies) {
        archive.file(&format!("{inside}/{module}"), &kernel.modules.join(module))?;
    }
    for entry in fs::read_dir(&kernel.modules)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            let name = entry.file_name();
            archive.file(
                &format!("{inside}/{}", name.to_string_lossy()),
                &entry.path(),
            )?;
        }
    }
    Ok(())
}

/// The modules of [`MODULES`] and all that they need, of lines `MODULE: MODULE…`.
fn wanted(dependencies: &str) -> BTreeSet<&str> {
    let is_wanted = |module: &str| {
        let Some(path) = module.strip_prefix("kernel/") else {
            return false;
        };
        let flat = path.strip_prefix(FLAT).is_some_and(|f| !f.contains('/'));
        flat || MODULES.iter().any(|dir| {
            path.strip_prefix(dir)
                .is_some_and(|rest| rest.starts_with('/'))
        })
    };
    dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        // depmod lists what a module needs in full, not only the next step.
        .filter(|(module, _)| is_wanted(module))
        .flat_map(|(module, needs)| std::iter::once(module).chain(needs.split_whitespace()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007f)\n\
                    \tlibmnl.so.0 => /lib/x86_64-linux-gnu/libmnl.so.0 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let want = [
            "/lib/x86_64-linux-gnu/libmnl.so.0",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(loaded(text), want.map(PathBuf::from));
        assert!(loaded("\tnot a dynamic executable\n").is_empty());
        assert!(loaded("\tstatically linked\n").is_empty());
    }

    #[test]
    fn modules_come_with_what_they_need() {
        let text = "kernel/drivers/net/veth.ko:\n\
                    kernel/drivers/net/vxlan/vxlan.ko: kernel/drivers/a/b.ko kernel/c.ko\n\
                    kernel/drivers/net/ethernet/e.ko: kernel/d.ko\n\
                    kernel/network/n.ko:\n";
        let want = [
            "kernel/c.ko",
            "kernel/drivers/a/b.ko",
            "kernel/drivers/net/veth.ko",
            "kernel/drivers/net/vxlan/vxlan.ko",
        ];
        assert_eq!(wanted(text), BTreeSet::from(want));
    }
}
