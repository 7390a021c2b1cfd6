//! What the machine must have before anything is loaded.

use std::{fs, path::Path};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::dataplane::{DataplaneError, SocketHooks, cgroup::cgroup2_root};

const BPFFS: &str = "/sys/fs/bpf";
const BTF: &str = "/sys/kernel/btf/vmlinux";

/// linux/capability.h.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// Checks privileges, BTF, bpffs (mounting it if it can) and cgroup v2. Every missing thing is
/// reported, not only the first.
///
/// # Errors
/// [`DataplaneError::Environment`]s; never empty.
pub fn preflight(hooks: SocketHooks) -> Result<(), Vec<DataplaneError>> {
    let cgroup = match hooks {
        SocketHooks::Off => Ok(()),
        SocketHooks::Refuse | SocketHooks::Observe => cgroup2_root().map(drop),
    };
    let missing: Vec<_> = [privileges(), btf(), bpffs(), cgroup]
        .into_iter()
        .filter_map(Result::err)
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(missing)
    }
}

fn environment(what: impl Into<String>, help: &str) -> DataplaneError {
    DataplaneError::Environment {
        what: what.into(),
        help: help.to_owned(),
    }
}

fn privileges() -> Result<(), DataplaneError> {
    let status = fs::read_to_string("/proc/self/status").map_err(|source| {
        let call = "read /proc/self/status".to_owned();
        DataplaneError::Syscall { call, source }
    })?;
    let effective = effective(&status).unwrap_or(0);
    let missing = lacking(effective);
    if missing.is_empty() {
        return Ok(());
    }
    let help = if nix::unistd::geteuid().is_root() {
        "the process runs as root without them: add them to the container or to the service \
         (CapabilityBoundingSet=)"
    } else {
        "run it as root: sudo enforcer run …"
    };
    let what = format!("missing capabilities: {}", missing.join(", "));
    Err(environment(what, help))
}

/// The effective capabilities in a `/proc/PID/status`.
pub(super) fn effective(status: &str) -> Option<u64> {
    let field = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
    u64::from_str_radix(field.trim(), 16).ok()
}

/// Those that the daemon needs and that are not among them.
pub(super) fn lacking(effective: u64) -> Vec<&'static str> {
    let has = |capability: u32| effective >> capability & 1 == 1;
    let mut missing = Vec::new();
    if !has(CAP_BPF) && !has(CAP_SYS_ADMIN) {
        missing.push("CAP_BPF");
    }
    if !has(CAP_NET_ADMIN) {
        missing.push("CAP_NET_ADMIN");
    }
    if !has(CAP_PERFMON) && !has(CAP_SYS_ADMIN) {
        missing.push("CAP_PERFMON (or CAP_SYS_ADMIN)");
    }
    missing
}

pub(super) fn btf() -> Result<(), DataplaneError> {
    if Path::new(BTF).exists() {
        return Ok(());
    }
    Err(environment(
        format!("the kernel has no BTF ({BTF} is missing)"),
        "use a kernel built with CONFIG_DEBUG_INFO_BTF=y, as those of Debian, Ubuntu, Fedora and \
         RHEL are; in a container, mount /sys",
    ))
}

/// Whether bpffs is where it is looked for.
pub(super) fn is_bpffs() -> bool {
    statfs(BPFFS).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

fn bpffs() -> Result<(), DataplaneError> {
    if is_bpffs() {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let mounted = mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=700"));
    match mounted {
        Ok(()) if is_bpffs() => {
            tracing::info!(at = BPFFS, "mounted bpffs");
            Ok(())
        }
        Ok(()) => Err(environment(
            format!("bpffs is not mounted at {BPFFS}"),
            "mount it: mount -t bpf bpf /sys/fs/bpf",
        )),
        Err(error) => Err(environment(
            format!("bpffs is not mounted at {BPFFS}, and mounting it failed: {error}"),
            "mount it on the host: mount -t bpf bpf /sys/fs/bpf; in a container, mount the \
             host's /sys/fs/bpf; a kernel without CONFIG_BPF_SYSCALL has none",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_named() {
        assert_eq!(
            effective("Name:\tx\nCapEff:\t000001ffffffffff\n"),
            Some(0x1ff_ffff_ffff)
        );
        assert!(lacking(0x1ff_ffff_ffff).is_empty());
        assert!(lacking(1 << CAP_SYS_ADMIN | 1 << CAP_NET_ADMIN).is_empty());
        assert!(lacking(1 << CAP_BPF | 1 << CAP_NET_ADMIN | 1 << CAP_PERFMON).is_empty());
        assert_eq!(lacking(1 << CAP_BPF | 1 << CAP_PERFMON), ["CAP_NET_ADMIN"]);
        assert_eq!(lacking(0).len(), 3);
    }
}
