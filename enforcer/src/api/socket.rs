//! Files of the control sockets: made, owned, taken away.

use std::{
    fs, io,
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, chown, lchown},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use super::{DEFAULT_SOCKET, DEFAULT_VIEW_SOCKET, peer::Authority};

/// Why the control socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error(
        "another enforcer answers at {}\n  help: stop it first, or choose another --socket",
        .0.display()
    )]
    Taken(PathBuf),
    /// Something else is there.
    #[error("{} is there and is no socket\n  help: remove it, or choose another --socket", .0.display())]
    NotASocket(PathBuf),
    /// A system call failed.
    #[error("cannot listen at {}: {source}", path.display())]
    System {
        /// Where.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A listening socket: mode 0600 from its first moment; its file goes when it is dropped.
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
    grants: Authority,
    /// Nobody else has a say about the directory.
    own_directory: bool,
}

impl Socket {
    /// Makes the directory if it is missing, and takes the place of a socket that nobody listens
    /// on. Only root gets in before [`Socket::give`]. Nobody may do more through it than `grants`.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn bind(path: &Path, grants: Authority) -> Result<Self, SocketError> {
        let system = |source| SocketError::System {
            path: path.to_owned(),
            source,
        };
        let mut own_directory = false;
        if let Some(parent) = directory(path) {
            let default = [DEFAULT_SOCKET, DEFAULT_VIEW_SOCKET];
            own_directory = default
                .iter()
                .any(|d| Path::new(d).parent() == Some(parent));
            if !parent.is_dir() {
                own_directory = true;
                if let Some(above) = parent.parent() {
                    let mut builder = fs::DirBuilder::new();
                    builder.recursive(true).mode(0o755);
                    builder.create(above).map_err(system)?;
                }
                let mut builder = fs::DirBuilder::new();
                builder.recursive(true).mode(0o700);
                builder.create(parent).map_err(system)?;
            }
        }
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            Ok(_) => match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(system)?;
                }
                Ok(_) => return Err(SocketError::Taken(path.to_owned())),
                Err(error) => return Err(system(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(system(error)),
        }
        // The mode of a socket's file is that of its making: a chmod would come too late. Other
        // threads can only make files that are stricter than meant, for a moment.
        let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(path);
        nix::sys::stat::umask(before);
        let listener = listener.map_err(system)?;
        listener.set_nonblocking(true).map_err(system)?;
        let inode = fs::symlink_metadata(path).map_err(system)?.ino();
        Ok(Self {
            listener,
            path: path.to_owned(),
            inode,
            grants,
            own_directory,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What peers may do through it at most.
    pub fn grants(&self) -> Authority {
        self.grants
    }

    /// For a runtime to accept from.
    ///
    /// # Errors
    /// When it cannot be polled.
    pub fn listener(&self) -> Result<tokio::net::UnixListener, SocketError> {
        let listener = self.listener.try_clone();
        listener
            .and_then(tokio::net::UnixListener::from_std)
            .map_err(|source| SocketError::System {
                path: self.path.clone(),
                source,
            })
    }

    /// Lets a group in: `0660` in `0750`; `None`: only root, `0600` in `0700`. A directory that
    /// was there before, and is not the enforcer's by its name, stays as it is.
    ///
    /// # Errors
    /// What the system says; nobody has got in then who was not in before, but root has.
    pub fn give(&self, group: Option<u32>) -> io::Result<()> {
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
        // Closed first: there is no moment when the wrong group is in.
        mode(&self.path, 0o600)?;
        let own = self.directory();
        if let Some(directory) = own {
            mode(directory, 0o700)?;
        }
        let Some(group) = group else {
            return Ok(());
        };
        lchown(&self.path, None, Some(group))?;
        if let Some(directory) = own {
            chown(directory, None, Some(group))?;
            mode(directory, 0o750)?;
        }
        mode(&self.path, 0o660)
    }

    fn directory(&self) -> Option<&Path> {
        directory(&self.path).filter(|_| self.own_directory)
    }

    /// Why members of `group` do not get to the socket though they may use it.
    pub fn closed_to(&self, group: u32) -> Option<String> {
        let directory = directory(&self.path)?;
        let metadata = fs::metadata(directory).ok()?;
        let mode = metadata.permissions().mode();
        let open = mode & 0o001 != 0 || (mode & 0o010 != 0 && metadata.gid() == group);
        (!open).then(|| {
            format!(
                "{} is closed to group {group}; to mend it: chgrp {group} {0} && chmod 750 {0}",
                directory.display()
            )
        })
    }
}

fn directory(path: &Path) -> Option<&Path> {
    path.parent().filter(|p| !p.as_os_str().is_empty())
}

impl Socket {
    /// Takes its file away.
    pub fn remove(&self) {
        // Not that of a successor.
        if fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            // Nothing to do about a failure: the next start copes.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.remove();
    }
}
