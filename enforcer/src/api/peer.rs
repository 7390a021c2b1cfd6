//! Who is at the other end of the control socket, and what they may do.

use std::{fmt, fs, io, os::fd::AsFd as _};

use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::dataplane::peer_groups;

/// A process that has connected, as the kernel knew it at that moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Effective user.
    pub uid: u32,
    /// Effective group and supplementary ones.
    pub groups: Vec<u32>,
    /// Process; `None` when it lives in a namespace that this one does not see.
    pub pid: Option<u32>,
}

impl Peer {
    /// Asks the kernel.
    ///
    /// # Errors
    /// What it says.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        // Not as `/etc/group` has them: the same that decided whether it might open the socket.
        let mut groups = peer_groups(stream.as_fd())?;
        groups.push(credentials.gid());
        Ok(Self {
            uid: credentials.uid(),
            groups,
            pid: credentials
                .pid()
                .and_then(|pid| u32::try_from(pid).ok())
                .filter(|pid| *pid != 0),
        })
    }

    /// With names, for logs and the history of changes. Reads `/etc/passwd` and `/proc`.
    pub fn named(&self) -> Named {
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let name = |uid: u32| first_named(&passwd, uid);
        let login = self.pid.and_then(login_uid);
        Named {
            uid: self.uid,
            user: name(self.uid),
            pid: self.pid,
            login: login
                .filter(|uid| *uid != self.uid)
                .map(|uid| name(uid).unwrap_or_else(|| format!("uid {uid}"))),
        }
    }
}

/// A [`Peer`] as people know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Named {
    /// Effective user.
    pub uid: u32,
    /// Its name.
    pub user: Option<String>,
    /// Process.
    pub pid: Option<u32>,
    /// Who had logged in before they became that user (`sudo`), where the kernel keeps record.
    pub login: Option<String>,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.user {
            Some(user) => write!(f, "{user} (uid {}", self.uid)?,
            None => write!(f, "uid {} (no name", self.uid)?,
        }
        if let Some(login) = &self.login {
            write!(f, ", logged in as {login}")?;
        }
        match self.pid {
            Some(pid) => write!(f, ", pid {pid})"),
            None => f.write_str(", pid unknown)"),
        }
    }
}

/// Who had logged in, as the kernel's audit keeps it.
fn login_uid(pid: u32) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/loginuid")).ok()?;
    text.trim().parse().ok().filter(|uid| *uid != u32::MAX)
}

/// The name of the first line `name:x:id:…` with this id.
fn first_named(file: &str, id: u32) -> Option<String> {
    file.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let found: u32 = fields.nth(1)?.parse().ok()?;
        (found == id).then(|| name.chars().filter(|c| !c.is_control()).collect())
    })
}

/// Files rather than the resolver: a static binary has none, and a directory service that hangs
/// must not decide whether an administrator gets in.
const GROUPS: &str = "/etc/group";

/// The id of a group, by its name in `/etc/group` or as a number.
pub fn group_id(group: &str) -> Option<u32> {
    if let Ok(id) = group.parse() {
        return Some(id);
    }
    let file = fs::read_to_string(GROUPS).ok()?;
    file.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let id = fields.nth(1)?.parse().ok()?;
        (name == group).then_some(id)
    })
}

/// What a peer may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Authority {
    /// Nothing.
    Nothing,
    /// Ask.
    View,
    /// Ask, and change what is enforced.
    Change,
}

/// Ids of the groups that have a say; `None`: there is no such group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    /// Its members may change what is enforced.
    pub change: Option<u32>,
    /// Its members may ask.
    pub view: Option<u32>,
}

impl Groups {
    /// Root, and whoever the daemon runs as, may do everything.
    pub fn authority(&self, peer: &Peer) -> Authority {
        let member = |group: Option<u32>| group.is_some_and(|id| peer.groups.contains(&id));
        let own = nix::unistd::geteuid().as_raw();
        if peer.uid == 0 || peer.uid == own || member(self.change) {
            Authority::Change
        } else if member(self.view) {
            Authority::View
        } else {
            Authority::Nothing
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_the_groups_have_their_authority() {
        let groups = Groups {
            change: Some(500),
            view: Some(501),
        };
        let peer = |uid, groups: &[u32]| Peer {
            uid,
            groups: groups.to_vec(),
            pid: None,
        };
        let authority = |uid, ids: &[u32]| groups.authority(&peer(uid, ids));
        assert_eq!(authority(0, &[]), Authority::Change);
        assert_eq!(authority(77, &[1, 500]), Authority::Change);
        assert_eq!(authority(77, &[501, 500]), Authority::Change);
        assert_eq!(authority(77, &[501]), Authority::View);
        assert_eq!(authority(77, &[0, 502]), Authority::Nothing);
        // No group is not group 0.
        let none = Groups::default();
        assert_eq!(none.authority(&peer(77, &[0])), Authority::Nothing);
    }

    #[tokio::test]
    async fn the_kernel_says_who_has_connected() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&one).unwrap();
        assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(peer.pid, Some(std::process::id()));
        assert!(peer.groups.contains(&nix::unistd::getegid().as_raw()));
        for group in nix::unistd::getgroups().unwrap() {
            assert!(peer.groups.contains(&group.as_raw()));
        }
    }

    #[test]
    fn names_come_from_files() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbad\n\nalice:x:1000:1000::/:/bin/sh\n";
        assert_eq!(first_named(passwd, 1000).as_deref(), Some("alice"));
        assert_eq!(first_named(passwd, 7), None);
        assert_eq!(group_id("61234"), Some(61234));
        assert_eq!(group_id("root"), Some(0));
        assert_eq!(group_id("no-such-group-here"), None);
        let named = Named {
            uid: 0,
            user: Some("root".to_owned()),
            pid: Some(12),
            login: Some("alice".to_owned()),
        };
        assert_eq!(
            named.to_string(),
            "root (uid 0, logged in as alice, pid 12)"
        );
    }
}
