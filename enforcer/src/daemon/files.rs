//! Files of the policy and of the settings on disk.

use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::{ffi::OsStrExt as _, fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::guard::{self, Fault, Trust};
use crate::policy::SourceFile;

/// Where policy and settings are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// Policy: a directory or one file.
    pub segments: PathBuf,
    /// Settings, if there may be any.
    pub settings: Option<SettingsPath>,
    /// What is asked of these files, and of the directories around them.
    pub trust: Trust,
}

/// The file of the daemon's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingsPath {
    /// Where.
    pub path: PathBuf,
    /// Somebody named it: without the file the defaults would not be what they want.
    pub required: bool,
}

/// All that was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Texts {
    /// Files of the policy.
    pub policy: Arc<Vec<SourceFile>>,
    /// The settings; `None`: the defaults hold.
    pub settings: Option<SourceFile>,
}

impl Texts {
    /// Whether nothing has changed. Mostly something has, and then lengths say so at once.
    pub fn same(&self, other: &Self) -> bool {
        let lengths = |texts: &Self| -> Vec<usize> {
            let files = texts.settings.iter().chain(&*texts.policy);
            files.map(|file| file.text.len()).collect()
        };
        lengths(self) == lengths(other) && self == other
    }

    /// For diagnostics to look lines up in.
    pub fn all(&self) -> Vec<SourceFile> {
        self.settings.iter().chain(&*self.policy).cloned().collect()
    }
}

/// Reads policy and settings.
///
/// # Errors
/// [`FilesError`]; all or nothing.
pub fn read_all(sources: &Sources) -> Result<Texts, FilesError> {
    let trust = sources.trust;
    let policy = load(&sources.segments, trust);
    let settings = sources.settings.as_ref();
    let settings = settings.map(|settings| load_settings(settings, trust));
    // All that is unsafe in one go: it is one person who mends it.
    if let (Err(FilesError::Unsafe(one)), Some(Err(FilesError::Unsafe(two)))) = (&policy, &settings)
    {
        return Err(FilesError::of([&one[..], two].concat()));
    }
    Ok(Texts {
        policy: policy?.into(),
        settings: settings.transpose()?.flatten(),
    })
}

/// Reads settings; `None` when there are none and need not be. Their name is the whole path: a
/// policy may have a file of the same name.
///
/// # Errors
/// [`FilesError`].
pub fn load_settings(
    settings: &SettingsPath,
    trust: Trust,
) -> Result<Option<SourceFile>, FilesError> {
    match open(&settings.path, trust).and_then(|file| read(file, &settings.path)) {
        Ok(text) => Ok(Some(SourceFile {
            name: settings.path.display().to_string(),
            text,
        })),
        Err(FilesError::Read { source, .. })
            if source.kind() == io::ErrorKind::NotFound && !settings.required =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Bytes of one policy file.
const LARGEST: u64 = 4 << 20;

/// Why no policy text could be read.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The path, or a file below it, cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory without policy files.
    #[error(
        "{}: no *.yaml or *.yml file in this directory (sub-directories are not read)",
        path.display()
    )]
    Empty {
        /// Which.
        path: PathBuf,
    },
    /// Something else than a file.
    #[error("{}: not a regular file", path.display())]
    NotAFile {
        /// Which.
        path: PathBuf,
    },
    /// A file over the limit.
    #[error("{}: larger than 4 MiB, the limit of a policy file", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
    },
    /// A file that is no text.
    #[error("{}: not UTF-8 (first bad byte at offset {offset})", path.display())]
    NotText {
        /// Which.
        path: PathBuf,
        /// Bytes before it.
        offset: usize,
    },
    /// Somebody else can have written them.
    #[error("{}", lines(.0))]
    Unsafe(Vec<Fault>),
}

impl FilesError {
    /// Each fault once: files share the directories above them.
    fn of(faults: Vec<Fault>) -> Self {
        let mut once: Vec<Fault> = Vec::new();
        for fault in faults {
            if !once.contains(&fault) {
                once.push(fault);
            }
        }
        Self::Unsafe(once)
    }

    /// Whether it is for want of a right.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Read { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
    }

    /// In one line.
    pub fn summary(&self) -> String {
        if let Self::Unsafe(faults) = self
            && let [first, _, ..] = &faults[..]
        {
            return format!("{first} (and {} more)", faults.len() - 1);
        }
        self.to_string()
    }
}

fn lines(faults: &[Fault]) -> String {
    let lines: Vec<_> = faults.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

/// Reads a policy: every `*.yaml` and `*.yml` directly inside a directory, in lexical order of
/// names, or one file. Names are relative to the directory, so that diagnostics read the same
/// wherever the directory is.
///
/// # Errors
/// [`FilesError`]; all or nothing.
pub fn load(path: &Path, trust: Trust) -> Result<Vec<SourceFile>, FilesError> {
    let failed = |source| FilesError::Read {
        path: path.to_owned(),
        source,
    };
    let opened = open(path, trust)?;
    if !opened.metadata().map_err(failed)?.is_dir() {
        let name = path.file_name().unwrap_or(path.as_os_str());
        return Ok(vec![SourceFile {
            name: name.to_string_lossy().into_owned(),
            text: read(opened, path)?,
        }]);
    }
    // The directory that was looked at, whatever its path means by now.
    let mut directory = nix::dir::Dir::from_fd(opened.into()).map_err(|e| failed(e.into()))?;
    let mut paths = Vec::new();
    for entry in directory.iter() {
        let entry = entry.map_err(|e| failed(e.into()))?;
        let found = path.join(OsStr::from_bytes(entry.file_name().to_bytes()));
        if is_policy_name(&found) {
            paths.push(found);
        }
    }
    paths.sort();
    if paths.is_empty() {
        return Err(FilesError::Empty {
            path: path.to_owned(),
        });
    }
    let mut files = Vec::new();
    let mut faults = Vec::new();
    for path in &paths {
        match open(path, trust) {
            Ok(file) => files.push(SourceFile {
                name: path
                    .file_name()
                    .map(|n| n.to_string_lossy().into_owned())
                    .unwrap_or_default(),
                text: read(file, path)?,
            }),
            Err(FilesError::Unsafe(found)) => faults.extend(found),
            Err(error) => return Err(error),
        }
    }
    if faults.is_empty() {
        Ok(files)
    } else {
        Err(FilesError::of(faults))
    }
}

/// What is wrong with a path that a client names. Others than root may ask, and diagnostics quote
/// what they are about: what is no policy by its name is not read.
pub(super) fn no_policy(path: &Path) -> Option<&'static str> {
    // What is not there is said by who tries to read it.
    let named = path.is_dir() || is_policy_name(path) || path.symlink_metadata().is_err();
    (!named).then_some("a policy is a directory, or a file *.yaml or *.yml")
}

/// Hidden files are left out: editors keep their swap files under such names.
pub(super) fn is_policy_name(path: &Path) -> bool {
    let hidden = path
        .file_name()
        .is_none_or(|name| name.to_string_lossy().starts_with('.'));
    !hidden && path.extension().is_some_and(|e| e == "yaml" || e == "yml")
}

/// Opens a file or a directory. A FIFO does not block.
fn open(path: &Path, trust: Trust) -> Result<File, FilesError> {
    match trust {
        Trust::Owner { links } => guard::open(path, links),
        Trust::Anyone => OpenOptions::new()
            .read(true)
            .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
            .open(path)
            .map_err(|source| FilesError::Read {
                path: path.to_owned(),
                source,
            }),
    }
}

/// Looks at the opened file, not at the path: what is checked is what is read.
fn read(file: File, path: &Path) -> Result<String, FilesError> {
    let failed = |source| FilesError::Read {
        path: path.to_owned(),
        source,
    };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(FilesError::NotAFile {
            path: path.to_owned(),
        });
    }
    let expected = metadata.len().min(LARGEST) + 1;
    let mut bytes = Vec::with_capacity(usize::try_from(expected).unwrap_or(0));
    // The limit holds for a file that grows while it is read, too.
    let length = file
        .take(LARGEST + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if length as u64 > LARGEST {
        return Err(FilesError::TooLarge {
            path: path.to_owned(),
        });
    }
    String::from_utf8(bytes).map_err(|error| FilesError::NotText {
        path: path.to_owned(),
        offset: error.utf8_error().valid_up_to(),
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn a_directory_is_read_in_lexical_order() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.yml", "a.yaml", ".a.yaml.swp.yaml", "notes.txt"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("sub/c.yaml"), "c").unwrap();
        symlink("b.yml", dir.path().join("link.yaml")).unwrap();
        let files = load(dir.path(), Trust::Anyone).unwrap();
        let names: Vec<_> = files.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["a.yaml", "b.yml", "link.yaml"]);
        assert_eq!(files[2].text, "b.yml");
        let one = load(&dir.path().join("a.yaml"), Trust::Anyone).unwrap();
        assert_eq!((one.len(), one[0].name.as_str()), (1, "a.yaml"));
    }

    #[test]
    fn what_cannot_be_a_policy_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let error = |path: &Path| load(path, Trust::Anyone).unwrap_err().to_string();
        assert!(error(dir.path()).contains("no *.yaml"));
        assert!(error(&dir.path().join("x.yaml")).contains("No such file"));

        let fifo = dir.path().join("fifo.yaml");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(error(dir.path()).contains("fifo.yaml: not a regular file"));
        fs::remove_file(&fifo).unwrap();

        let file = dir.path().join("big.yaml");
        fs::write(&file, vec![b' '; LARGEST as usize + 1]).unwrap();
        assert!(error(&file).contains("larger than 4 MiB"));
        fs::write(&file, b"a: \xff").unwrap();
        assert!(error(&file).contains("offset 3"));
    }

    #[test]
    fn settings_may_be_missing_unless_somebody_named_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = SettingsPath {
            path: dir.path().join("enforcer.yaml"),
            required: false,
        };
        assert_eq!(load_settings(&settings, Trust::Anyone).unwrap(), None);
        settings.required = true;
        let error = load_settings(&settings, Trust::Anyone)
            .unwrap_err()
            .to_string();
        assert!(error.contains("No such file"), "{error}");
        fs::write(&settings.path, "version: 1").unwrap();
        let file = load_settings(&settings, Trust::Anyone).unwrap().unwrap();
        assert_eq!(file.name, settings.path.display().to_string());
        // One that is there and cannot be read is no missing one.
        fs::remove_file(&settings.path).unwrap();
        fs::create_dir(&settings.path).unwrap();
        settings.required = false;
        assert!(load_settings(&settings, Trust::Anyone).is_err());
    }
}
