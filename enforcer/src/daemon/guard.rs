//! Opens files of the policy so that only root, or whoever the daemon runs as, can have written
//! them: from `/` downwards, each directory and link looked at on the way.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, openat, readlinkat},
    sys::{
        stat::{FileStat, Mode, SFlag, fstat, fstatat},
        statvfs::{FsFlags, fstatvfs},
    },
    unistd::geteuid,
};

use super::files::FilesError;

/// Links on one path, as in the kernel.
const MOST_LINKS: usize = 40;

/// What is asked of files beside that they can be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// Nothing: who checks their own files may read what they like.
    #[default]
    Anyone,
    /// That nobody but root and the daemon's own user can have written or placed them.
    Owner {
        /// Whether a file may be a link that one of them owns; else it must not be a link.
        links: bool,
    },
}

/// Why a file is refused, and what mends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The file, or a directory above it.
    pub path: PathBuf,
    /// What is wrong.
    pub what: String,
    /// What to do, or which command to run.
    pub mend: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, what, mend } = self;
        write!(f, "{}: {what}; to mend it: {mend}", path.display())
    }
}

/// Opens a file or directory for reading.
///
/// # Errors
/// [`FilesError::Read`] and [`FilesError::NotAFile`], and [`FilesError::Unsafe`] with the first
/// fault on the way.
pub fn open(path: &Path, links: bool) -> Result<File, FilesError> {
    Walk {
        path,
        links,
        followed: 0,
        here: PathBuf::from("/"),
        pending: VecDeque::new(),
    }
    .open()
}

struct Walk<'a> {
    /// As asked for.
    path: &'a Path,
    links: bool,
    followed: usize,
    /// The directory that was reached.
    here: PathBuf,
    /// What is to be looked up from there.
    pending: VecDeque<OsString>,
}

impl Walk<'_> {
    fn failed(&self, errno: Errno) -> FilesError {
        FilesError::Read {
            path: self.path.to_owned(),
            source: errno.into(),
        }
    }

    fn open(mut self) -> Result<File, FilesError> {
        let absolute = std::path::absolute(self.path).map_err(|source| FilesError::Read {
            path: self.path.to_owned(),
            source,
        })?;
        self.push(&absolute);
        let way = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = || openat(AT_FDCWD, "/", way, Mode::empty());
        let mut directory = root().map_err(|e| self.failed(e))?;
        while let Some(name) = self.pending.pop_front() {
            let last = self.pending.is_empty();
            let seen = fstatat(&directory, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
                .map_err(|e| self.failed(e))?;
            let path = self.here.join(&name);
            let kind = kind(&seen);
            // Whoever may rename in a directory chooses what is found there. In a sticky one that is
            // the owner of the entry, who is looked at next; but nobody else may add to the place
            // of a file.
            examine(&directory, &self.here, kind != SFlag::S_IFDIR && last)?;
            match kind {
                SFlag::S_IFLNK => {
                    if self.follow(&directory, &name, &path, &seen, last)? {
                        directory = root().map_err(|e| self.failed(e))?;
                    }
                }
                SFlag::S_IFDIR if !last => {
                    let next = openat(
                        &directory,
                        name.as_os_str(),
                        way | OFlag::O_NOFOLLOW,
                        Mode::empty(),
                    );
                    directory = next.map_err(|e| self.failed(e))?;
                    self.here = path;
                }
                SFlag::S_IFDIR | SFlag::S_IFREG if last => {
                    return self.last(&directory, &name, &path);
                }
                _ if last => {
                    return Err(FilesError::NotAFile { path });
                }
                _ => return Err(self.failed(Errno::ENOTDIR)),
            }
        }
        // Only `/` has no name.
        Err(FilesError::NotAFile {
            path: self.path.to_owned(),
        })
    }

    /// Puts the parts of `path` in front of what is left.
    fn push(&mut self, path: &Path) {
        for part in path.components().rev() {
            match part {
                Component::Normal(name) => self.pending.push_front(name.to_owned()),
                Component::ParentDir => self.pending.push_front("..".into()),
                Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
            }
        }
    }

    /// Goes on where a link leads; whether that is from `/`.
    fn follow(
        &mut self,
        directory: &OwnedFd,
        name: &OsStr,
        path: &Path,
        seen: &FileStat,
        last: bool,
    ) -> Result<bool, FilesError> {
        if last && !self.links {
            return Err(fault(
                path,
                "a symbolic link".to_owned(),
                "put the file itself there, or run with --follow-links".to_owned(),
            ));
        }
        if !trusted(seen) {
            let what = format!("a symbolic link of uid {}, not of root", seen.st_uid);
            let mend = format!("chown --no-dereference root {}", quoted(path));
            return Err(fault(path, what, mend));
        }
        self.followed += 1;
        if self.followed > MOST_LINKS {
            return Err(self.failed(Errno::ELOOP));
        }
        let target = readlinkat(directory, name).map_err(|e| self.failed(e))?;
        let target = PathBuf::from(target);
        self.push(&target);
        if target.is_absolute() {
            self.here = PathBuf::from("/");
        }
        Ok(target.is_absolute())
    }

    /// What was opened is looked at again: that, and nothing else, is read.
    fn last(&self, directory: &OwnedFd, name: &OsStr, path: &Path) -> Result<File, FilesError> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let opened =
            openat(directory, name, flags, Mode::empty()).map_err(|errno| FilesError::Read {
                path: path.to_owned(),
                source: errno.into(),
            })?;
        let seen = fstat(&opened).map_err(|e| self.failed(e))?;
        if !matches!(kind(&seen), SFlag::S_IFDIR | SFlag::S_IFREG) {
            return Err(FilesError::NotAFile {
                path: path.to_owned(),
            });
        }
        examine(&opened, path, true)?;
        Ok(opened.into())
    }
}

fn kind(seen: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(seen.st_mode) & SFlag::S_IFMT
}

fn trusted(seen: &FileStat) -> bool {
    seen.st_uid == 0 || seen.st_uid == geteuid().as_raw()
}

fn examine(file: impl AsFd, path: &Path, strict: bool) -> Result<(), FilesError> {
    let failed = |errno: Errno| FilesError::Read {
        path: path.to_owned(),
        source: io::Error::from(errno),
    };
    let seen = fstat(&file).map_err(failed)?;
    let others = Mode::S_IWGRP | Mode::S_IWOTH;
    let mode = Mode::from_bits_truncate(seen.st_mode);
    let sticky = mode.contains(Mode::S_ISVTX) && !strict;
    // As Kubernetes mounts what it has written itself: nobody can write here.
    let read_only = || fstatvfs(&file).is_ok_and(|fs| fs.flags().contains(FsFlags::ST_RDONLY));
    let writable = mode.intersects(others) && !sticky && !read_only();
    let mut wrong = Vec::new();
    let mut mend = Vec::new();
    let shown = quoted(path);
    if !trusted(&seen) {
        wrong.push(format!("owned by uid {}, not by root", seen.st_uid));
        mend.push(format!("chown root {shown}"));
    }
    if writable {
        let who = if mode.contains(Mode::S_IWOTH) {
            "everybody".to_owned()
        } else {
            format!("group {}", seen.st_gid)
        };
        wrong.push(format!("{who} may write it (mode {:04o})", mode.bits()));
        mend.push(format!("chmod go-w {shown}"));
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(fault(path, wrong.join(", "), mend.join(" && ")))
}

fn fault(path: &Path, what: String, mend: String) -> FilesError {
    FilesError::Unsafe(vec![Fault {
        path: path.to_owned(),
        what,
        mend,
    }])
}

/// As a shell takes it.
pub fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-+@:=".contains(&b);
    if !text.is_empty() && text.bytes().all(plain) && !text.starts_with('-') {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, lchown, symlink},
    };

    use super::*;

    fn refused(path: &Path, links: bool) -> String {
        open(path, links).unwrap_err().to_string()
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_file_that_others_may_write_is_refused_with_the_command_that_mends_it() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("a b");
        let file = place.join("p.yaml");
        fs::create_dir(&place).unwrap();
        fs::write(&file, "x").unwrap();
        chmod(&place, 0o755);
        chmod(&file, 0o644);
        open(&file, false).unwrap();
        open(&place, false).unwrap();
        for (path, mode) in [(&file, 0o664), (&file, 0o646), (&place, 0o775)] {
            let before = fs::metadata(path).unwrap().permissions();
            chmod(path, mode);
            let said = refused(&file, false);
            let command = format!("to mend it: chmod go-w '{}'", path.display());
            assert!(said.contains(&command), "{said}");
            assert!(said.contains(&format!("mode {mode:04o}")), "{said}");
            fs::set_permissions(path, before).unwrap();
        }
        // A sticky directory is a way, and no place.
        chmod(&place, 0o1777);
        assert!(refused(&file, false).contains("everybody may write it (mode 1777)"));
        let inner = place.join("inner");
        fs::create_dir(&inner).unwrap();
        chmod(&inner, 0o755);
        fs::rename(&file, inner.join("p.yaml")).unwrap();
        open(&inner.join("p.yaml"), false).unwrap();
        // A directory above all that may be renamed.
        chmod(&place, 0o777);
        let said = refused(&inner.join("p.yaml"), false);
        assert!(
            said.contains("everybody may write it (mode 0777)"),
            "{said}"
        );
    }

    #[test]
    fn links_are_followed_on_the_way_and_at_the_end_only_when_told() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("..1")).unwrap();
        chmod(&at("..1"), 0o755);
        fs::write(at("..1/p.yaml"), "x").unwrap();
        chmod(&at("..1/p.yaml"), 0o644);
        // As Kubernetes mounts a ConfigMap.
        symlink("..1", at("..data")).unwrap();
        symlink("..data/p.yaml", at("p.yaml")).unwrap();
        open(&at("..data/p.yaml"), false).unwrap();
        open(&at("..data/../..1/p.yaml"), false).unwrap();
        let said = refused(&at("p.yaml"), false);
        assert!(
            said.contains("a symbolic link; to mend it: put the file"),
            "{said}"
        );
        assert!(refused(&at("..data"), false).contains("a symbolic link"));
        open(&at("p.yaml"), true).unwrap();
        symlink(at("p.yaml"), at("absolute.yaml")).unwrap();
        open(&at("absolute.yaml"), true).unwrap();
        // Where it leads must be as good.
        chmod(&at("..1"), 0o777);
        let said = refused(&at("p.yaml"), true);
        assert!(said.contains("..1: everybody may write it"), "{said}");
        symlink("loop", at("loop")).unwrap();
        assert!(refused(&at("loop"), true).contains("symbolic links"));
    }

    #[test]
    fn files_and_links_of_others_are_refused() {
        if !geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.yaml");
        let link = dir.path().join("l.yaml");
        fs::write(&file, "x").unwrap();
        chmod(&file, 0o664);
        symlink("p.yaml", &link).unwrap();
        open(&link, true).unwrap_err();
        chmod(&file, 0o644);
        open(&link, true).unwrap();
        lchown(&link, Some(1234), None).unwrap();
        let said = refused(&link, true);
        assert!(said.contains("link of uid 1234"), "{said}");
        assert!(said.contains("chown --no-dereference root"), "{said}");
        lchown(&file, Some(1234), Some(1234)).unwrap();
        chmod(&file, 0o664);
        let said = refused(&file, true);
        let what = "owned by uid 1234, not by root, group 1234 may write it (mode 0664)";
        assert!(said.contains(what), "{said}");
        let shown = quoted(&file);
        let mend = format!("chown root {shown} && chmod go-w {shown}");
        assert!(said.ends_with(&mend), "{said}");
    }

    /// As Kubernetes mounts a ConfigMap: for all to write, and read-only.
    #[test]
    fn modes_do_not_count_where_nobody_can_write() {
        if !geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().to_owned();
        let mount = |kind: Option<&str>, at: &Path, flags| {
            nix::mount::mount(kind, at, kind, flags, None::<&str>).unwrap();
        };
        // The mounts are this thread's alone, and go with it.
        let work = move || {
            use nix::mount::MsFlags;
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            mount(None, Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE);
            mount(Some("tmpfs"), &place, MsFlags::empty());
            let file = place.join("p.yaml");
            fs::write(&file, "x").unwrap();
            chmod(&place, 0o777);
            chmod(&file, 0o644);
            assert!(refused(&file, false).contains("everybody may write it"));
            mount(None, &place, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY);
            open(&file, false).unwrap();
        };
        std::thread::spawn(work).join().unwrap();
    }

    #[test]
    fn what_is_no_file_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("f.yaml");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        assert!(refused(&fifo, true).contains("not a regular file"));
        assert!(refused(&fifo.join("x"), true).contains("Not a directory"));
        assert!(refused(&dir.path().join("none"), true).contains("No such file"));
        assert!(refused(Path::new("/"), true).contains("not a regular file"));
    }
}
