//! Where cgroup v2 is mounted.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::DataplaneError;

/// Mount points in the order in which they are preferred when there are several.
const USUAL: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// The mount point of the cgroup v2 hierarchy, as this process sees it.
///
/// # Errors
/// [`DataplaneError::Environment`] when there is none.
pub fn cgroup2_root() -> Result<PathBuf, DataplaneError> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|source| {
        let call = "read /proc/self/mounts".to_owned();
        DataplaneError::Syscall { call, source }
    })?;
    find(&mounts).ok_or_else(|| DataplaneError::Environment {
        what: "cgroup v2 is not mounted".to_owned(),
        help: "mount it: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none \
               /sys/fs/cgroup/unified (`ip netns exec` hides it: enter the namespace with \
               `nsenter --net=…` instead); or run with --socket-hooks off"
            .to_owned(),
    })
}

fn find(mounts: &str) -> Option<PathBuf> {
    let points: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let point = fields.nth(1)?;
            (fields.next()? == "cgroup2").then(|| PathBuf::from(unescape(point)))
        })
        .collect();
    USUAL
        .iter()
        .find(|usual| points.iter().any(|p| p == Path::new(usual)))
        .map(PathBuf::from)
        .or_else(|| points.into_iter().next())
}

/// Undoes the kernel's octal escapes (`\040` for a space).
fn unescape(field: &str) -> String {
    let mut out = String::new();
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        let code = escape
            .get(1..4)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
            .filter(u8::is_ascii);
        if let (Some(code), Some(after)) = (code, escape.get(4..)) {
            out.push(char::from(code));
            rest = after;
        } else {
            out.push('\\');
            rest = escape.get(1..).unwrap_or("");
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefers_the_usual_place_and_unescapes() {
        let hybrid = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n\
                      cgroup2 /mnt/odd\\040place cgroup2 rw 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(find(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let odd = "cgroup2 /mnt/odd\\040place cgroup2 rw 0 0\n";
        assert_eq!(find(odd), Some("/mnt/odd place".into()));
        assert_eq!(find("cgroup2 /sys/fs/cgroup tmpfs rw 0 0\n"), None);
    }
}
