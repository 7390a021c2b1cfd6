//! What a host has and lacks for being enforced, and how to mend it. Nothing is changed.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::{net::if_::if_nametoindex, unistd::geteuid};
use serde::Serialize;

use super::{
    files::{self, FilesError, Sources},
    guard::quoted,
    load, netlink, preflight, rivals,
};
use crate::{
    api::{
        peer::group_id,
        types::{State, Status},
    },
    clock::Sample,
    dataplane::{DataplaneError, cgroup::cgroup2_root, clock_is_kept, elsewhere, enforcers_on},
    policy::pattern::Pattern,
    settings::{Access, Settings},
};

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// As it should be.
    Ok,
    /// It works, but somebody should look at it, or it cannot be told.
    Warn,
    /// It does not work, or is not safe.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it is.
    pub state: Health,
    /// In words.
    pub said: String,
    /// What mends it, unless it is fine.
    pub mend: Option<String>,
}

pub(super) fn ok(name: &'static str, said: impl Into<String>) -> Check {
    let (state, said) = (Health::Ok, said.into());
    Check {
        name,
        state,
        said,
        mend: None,
    }
}

pub(super) fn not(state: Health, name: &'static str, said: impl Into<String>, mend: &str) -> Check {
    Check {
        name,
        state,
        said: said.into(),
        mend: Some(mend.to_owned()),
    }
}

/// What is to be looked at.
#[derive(Clone, Debug)]
pub struct Patient {
    /// Files of the daemon, or of one to be.
    pub sources: Sources,
    /// Its control socket.
    pub socket: PathBuf,
    /// What it says; why it says nothing.
    pub status: Result<Status, String>,
    /// Where to look for other programs; none: where the daemon enforces.
    pub interfaces: Vec<Pattern>,
}

/// Looks at everything.
pub fn examine(patient: &Patient) -> Vec<Check> {
    let mut checks = Vec::new();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let version = version(&release);
    checks.push(kernel(release.trim(), version));
    checks.push(hook(version));
    checks.push(environment(
        "btf",
        preflight::btf(),
        "the kernel describes its types",
    ));
    checks.push(bpffs());
    let cgroup = cgroup2_root();
    let at = cgroup.as_ref().map(|at| format!("at {}", at.display()));
    let at = at.unwrap_or_default();
    checks.push(environment("cgroup v2", cgroup.map(drop), &at));
    checks.push(capabilities(patient.status.as_ref().ok()));
    checks.push(daemon(&patient.status));
    checks.extend(interfaces(patient, version));
    checks.push(clock());
    let (found, access) = sources(&patient.sources);
    checks.extend(found);
    checks.push(group(&access.change, "change what is enforced"));
    checks.push(group(&access.view, "ask"));
    checks.extend(socket(&patient.socket, &access));
    checks
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The oldest that the tests run on.
const OLDEST: (u32, u32) = (6, 1);
const TCX: (u32, u32) = (6, 6);

fn kernel(release: &str, version: Option<(u32, u32)>) -> Check {
    let said = format!("Linux {release}");
    if version >= Some(OLDEST) {
        return ok("kernel", said);
    }
    let said = format!("{said}: older than 6.1, the oldest that was tried");
    not(Health::Warn, "kernel", said, "use Linux 6.1 or later")
}

fn hook(version: Option<(u32, u32)>) -> Check {
    if version >= Some(TCX) {
        return ok("hooks", "tcx");
    }
    ok("hooks", "clsact: before Linux 6.6 there is no tcx")
}

fn environment(name: &'static str, result: Result<(), DataplaneError>, fine: &str) -> Check {
    match result {
        Ok(()) => ok(name, fine),
        Err(DataplaneError::Environment { what, help }) => not(Health::Fail, name, what, &help),
        Err(error) => not(Health::Fail, name, error.to_string(), "run it as root"),
    }
}

fn bpffs() -> Check {
    if preflight::is_bpffs() {
        return ok("bpffs", "mounted at /sys/fs/bpf");
    }
    let mend = "mount -t bpf bpf /sys/fs/bpf";
    not(Health::Fail, "bpffs", "not mounted at /sys/fs/bpf", mend)
}

/// Those of the daemon if one runs, else those that it would have if it were started from here.
fn capabilities(status: Option<&Status>) -> Check {
    let name = "capabilities";
    let (whose, path) = match status {
        Some(status) => ("the daemon", format!("/proc/{}/status", status.pid)),
        None => ("this process", "/proc/self/status".to_owned()),
    };
    let text = fs::read_to_string(path).unwrap_or_default();
    let Some(effective) = preflight::effective(&text) else {
        let mend = "run it in the process namespace of the daemon";
        return not(
            Health::Warn,
            name,
            format!("cannot read those of {whose}"),
            mend,
        );
    };
    let lacking = preflight::lacking(effective);
    if lacking.is_empty() {
        return ok(name, format!("{whose} has all that are needed"));
    }
    let said = format!("{whose} lacks {}", lacking.join(", "));
    if status.is_none() && !geteuid().is_root() {
        return not(
            Health::Warn,
            name,
            said,
            "run it as root: sudo enforcer doctor",
        );
    }
    let mend = "add them to the container, or to the service (CapabilityBoundingSet=)";
    not(Health::Fail, name, said, mend)
}

fn daemon(status: &Result<Status, String>) -> Check {
    let name = "daemon";
    let status = match status {
        Ok(status) => status,
        Err(error) => {
            let error = error.lines().next().unwrap_or_default();
            let mend = "systemctl enable --now enforcer";
            return not(Health::Warn, name, error, mend);
        }
    };
    let problems = status.problems.join("; ");
    match status.state {
        State::Enforcing => ok(name, format!("enforcing, version {}", status.version)),
        State::Degraded => not(Health::Warn, name, problems, "enforcer status says more"),
        State::NotEnforcing => {
            let said = format!("runs, and enforces nothing: {problems}");
            not(Health::Fail, name, said, "enforcer status says more")
        }
    }
}

/// Interfaces, and what else hangs on them.
fn interfaces(patient: &Patient, version: Option<(u32, u32)>) -> Vec<Check> {
    let name = "interfaces";
    let mut checks = Vec::new();
    let mut names = Vec::new();
    if !patient.interfaces.is_empty() {
        let links = match netlink::links() {
            Ok(links) => links,
            Err(error) => {
                let said = format!("cannot list interfaces: {error}");
                return vec![not(Health::Fail, name, said, "run it as root")];
            }
        };
        for pattern in &patient.interfaces {
            let before = names.len();
            let meant = links
                .iter()
                .filter(|l| !l.loopback && pattern.matches(&l.name));
            names.extend(meant.map(|link| link.name.clone()));
            if names.len() == before {
                let said = format!("none is named {}", pattern.as_str());
                checks.push(not(
                    Health::Warn,
                    name,
                    said,
                    "ip link shows those that there are",
                ));
            }
        }
    } else if let Ok(status) = &patient.status {
        for interface in &status.interfaces {
            match &interface.error {
                None if !interface.enforced => {}
                None => names.push(interface.name.clone()),
                Some(error) => {
                    let said = format!("{} is not enforced: {error}", interface.name);
                    checks.push(not(Health::Fail, name, said, "the daemon's log says more"));
                }
            }
        }
    }
    if names.is_empty() && checks.is_empty() {
        let mend = "name some: enforcer doctor --interface eth0";
        checks.push(not(Health::Warn, name, "none to look at", mend));
    }
    for interface in &names {
        checks.extend(rivals::checks(interface, version >= Some(TCX)));
    }
    checks.extend(enforcers(patient.status.as_ref().ok(), &names));
    checks
}

/// Other enforcers than the daemon, on the same hooks or in the same network namespace.
fn enforcers(status: Option<&Status>, interfaces: &[String]) -> Vec<Check> {
    let name = "enforcers";
    let pinned = elsewhere(None);
    // By what they are, not by their names.
    let own = status.and_then(|status| status.pins.as_deref().map(Path::new));
    let foreign = elsewhere(own);
    let mend = |others: &BTreeSet<&Path>| {
        let commands = others.iter().map(|pins| {
            let pins = quoted(pins);
            format!("end the one at {pins} if it runs, then: enforcer detach --pins {pins}")
        });
        let commands: Vec<_> = commands.collect();
        match commands.is_empty() {
            true => "end the enforcer that is not the service".to_owned(),
            false => commands.join("; "),
        }
    };
    let mut checks = Vec::new();
    for interface in interfaces {
        let Ok(ifindex) = if_nametoindex(interface.as_str()) else {
            continue;
        };
        let found = enforcers_on(ifindex, &pinned);
        let found = match found {
            Ok(found) if found.len() > 1 => found,
            Ok(_) => continue,
            Err(error) => {
                let said = format!("{interface}: {error}");
                checks.push(not(Health::Warn, name, said, "run it as root"));
                continue;
            }
        };
        let here = found.iter().flatten();
        let others = here.filter(|pins| foreign.iter().any(|place| place.root == **pins));
        let others: BTreeSet<_> = others.map(PathBuf::as_path).collect();
        let said = format!(
            "{interface}: {} enforcers judge here, each by its own policy",
            found.len()
        );
        checks.push(not(Health::Fail, name, said, &mend(&others)));
    }
    if checks.is_empty() && status.is_some() {
        checks.extend(foreign.iter().filter(|place| place.here).map(|place| {
            let said = format!(
                "what is pinned in {} is not the daemon's, and for this network namespace",
                place.root.display()
            );
            not(
                Health::Warn,
                name,
                said,
                &mend(&BTreeSet::from([&*place.root])),
            )
        }));
    }
    checks
}

/// A clock before this was never set: the first commit of this project is younger.
const PLAUSIBLE: i128 = 1_735_689_600;

fn clock() -> Check {
    let name = "clock";
    let now = Sample::now().map(|sample| sample.unix(sample.boottime) / 1_000_000_000);
    let mend = "rules with times need it: run chrony or systemd-timesyncd";
    match (now, clock_is_kept()) {
        (Ok(now), _) if now < PLAUSIBLE => not(Health::Fail, name, "was never set", mend),
        (_, Ok(true)) => ok(name, "kept right by a time service"),
        (_, Ok(false)) => not(Health::Warn, name, "nothing keeps it right", mend),
        (_, Err(error)) => not(Health::Warn, name, error.to_string(), mend),
    }
}

/// Files, and whom the settings let in.
fn sources(sources: &Sources) -> (Vec<Check>, Access) {
    let name = "files";
    let mut checks = Vec::new();
    let mut missing = |path: &Path, error: &FilesError| {
        let mend = if error.is_denied() {
            "run it as root".to_owned()
        } else {
            format!("install -d {}, and put *.yaml there", quoted(path))
        };
        checks.push(not(Health::Warn, name, error.to_string(), &mend));
    };
    let policy = files::load(&sources.segments, sources.trust);
    if let Err(error @ (FilesError::Read { .. } | FilesError::Empty { .. })) = &policy {
        missing(&sources.segments, error);
    }
    let settings = sources.settings.as_ref();
    let settings = settings.map(|path| files::load_settings(path, sources.trust));
    let mut access = Settings::default().access;
    let mut errors: Vec<FilesError> = Vec::new();
    match settings.transpose() {
        Ok(settings) => {
            let texts = files::Texts {
                settings: settings.flatten(),
                ..files::Texts::default()
            };
            match load::settings(&texts) {
                Ok((settings, _)) => access = settings.access,
                Err(_) => {
                    let mend = "enforcer check --config FILE says where";
                    checks.push(not(Health::Fail, name, "the settings have mistakes", mend));
                }
            }
        }
        Err(error) => errors.push(error),
    }
    match policy {
        Ok(policy) => {
            let number = policy.len();
            if errors.is_empty() {
                let said = format!("{number} of the policy, which only root can have written");
                checks.push(ok(name, said));
            }
        }
        Err(FilesError::Read { .. } | FilesError::Empty { .. }) => {}
        Err(error) => errors.push(error),
    }
    for error in errors {
        match error {
            FilesError::Unsafe(faults) => checks.extend(faults.iter().map(|fault| {
                let said = format!("{}: {}", fault.path.display(), fault.what);
                not(Health::Fail, name, said, &fault.mend)
            })),
            error @ (FilesError::Read { .. }
            | FilesError::Empty { .. }
            | FilesError::NotAFile { .. }
            | FilesError::TooLarge { .. }
            | FilesError::NotText { .. }) => {
                checks.push(not(
                    Health::Fail,
                    name,
                    error.to_string(),
                    "replace the file",
                ));
            }
        }
    }
    checks.dedup();
    (checks, access)
}

fn group(group: &str, may: &str) -> Check {
    let name = "groups";
    match group_id(group) {
        Some(id) => ok(name, format!("members of {group} ({id}) may {may}")),
        None => {
            let said = format!("there is no group {group}: only root may {may}");
            let mend = format!("to let others: groupadd --system {group}");
            not(Health::Warn, name, said, &mend)
        }
    }
}

/// What the daemon has made of its socket, and others since.
fn socket(path: &Path, access: &Access) -> Option<Check> {
    let name = "socket";
    let metadata = fs::symlink_metadata(path).ok()?;
    let mode = metadata.mode() & 0o777;
    let owner = metadata.uid();
    let at = path.display();
    if owner != 0 && owner != geteuid().as_raw() {
        let said = format!("{at} is owned by uid {owner}");
        let mend = "stop whatever has made it, and restart the daemon";
        return Some(not(Health::Fail, name, said, mend));
    }
    let group = group_id(&access.change).filter(|id| *id == metadata.gid());
    let most = if group.is_some() { 0o660 } else { 0o600 };
    if mode & !most != 0 {
        let said = format!("{at} has mode {mode:04o}; {most:04o} is enough");
        let mend = format!("chmod {most:04o} {}", quoted(path));
        return Some(not(Health::Warn, name, said, &mend));
    }
    Some(ok(name, format!("{at}, mode {mode:04o}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::guard::Trust;

    #[test]
    fn versions_are_read() {
        assert_eq!(version("6.12.43+deb13-cloud-amd64\n"), Some((6, 12)));
        assert_eq!(version("5.4"), Some((5, 4)));
        assert_eq!(version("x"), None);
        assert_eq!(kernel("5.10.0", Some((5, 10))).state, Health::Warn);
        assert_eq!(kernel("6.1.0", Some((6, 1))).state, Health::Ok);
    }

    #[test]
    fn files_that_are_unsafe_fail_and_missing_ones_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let patient = Sources {
            segments: dir.path().join("segments"),
            settings: Some(files::SettingsPath {
                path: dir.path().join("enforcer.yaml"),
                required: false,
            }),
            trust: Trust::Owner { links: false },
        };
        let states = |sources_: &Sources| -> Vec<_> {
            let found = sources(sources_).0;
            found.iter().map(|check| check.state).collect()
        };
        assert_eq!(states(&patient), [Health::Warn]);
        fs::create_dir(&patient.segments).unwrap();
        fs::write(patient.segments.join("p.yaml"), "version: 1\n").unwrap();
        assert_eq!(states(&patient), [Health::Ok]);
        let settings = dir.path().join("enforcer.yaml");
        fs::write(&settings, "version: 1\ncontrol: {view: 77}\n").unwrap();
        assert_eq!(sources(&patient).1.view, "77");
        fs::write(&settings, "version: 2\n").unwrap();
        assert!(states(&patient).contains(&Health::Fail));
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        fs::set_permissions(&settings, open).unwrap();
        let (checks, _) = sources(&patient);
        let mend = checks[0].mend.as_deref().unwrap();
        assert_eq!(mend, format!("chmod go-w {}", settings.display()));
    }
}
