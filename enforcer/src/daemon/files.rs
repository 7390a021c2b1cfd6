//! Files of the policy and of the settings on disk.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::policy::SourceFile;

/// Where policy and settings are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// Policy: a directory or one file.
    pub segments: PathBuf,
    /// Settings, if there may be any.
    pub settings: Option<SettingsPath>,
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
    let settings = sources.settings.as_ref();
    Ok(Texts {
        policy: load(&sources.segments)?.into(),
        settings: settings.map(load_settings).transpose()?.flatten(),
    })
}

/// Reads settings; `None` when there are none and need not be. Their name is the whole path: a
/// policy may have a file of the same name.
///
/// # Errors
/// [`FilesError`].
pub fn load_settings(settings: &SettingsPath) -> Result<Option<SourceFile>, FilesError> {
    match read(&settings.path) {
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
}

/// Reads a policy: every `*.yaml` and `*.yml` directly inside a directory, in lexical order of
/// names, or one file. Names are relative to the directory, so that diagnostics read the same
/// wherever the directory is.
///
/// # Errors
/// [`FilesError`]; all or nothing.
pub fn load(path: &Path) -> Result<Vec<SourceFile>, FilesError> {
    let failed = |source| FilesError::Read {
        path: path.to_owned(),
        source,
    };
    if !fs::metadata(path).map_err(failed)?.is_dir() {
        let name = path.file_name().unwrap_or(path.as_os_str());
        return Ok(vec![SourceFile {
            name: name.to_string_lossy().into_owned(),
            text: read(path)?,
        }]);
    }
    let mut paths = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)? {
        let found = entry.map_err(failed)?.path();
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
    paths
        .iter()
        .map(|path| {
            Ok(SourceFile {
                name: path
                    .file_name()
                    .map(|n| n.to_string_lossy().into_owned())
                    .unwrap_or_default(),
                text: read(path)?,
            })
        })
        .collect()
}

/// Hidden files are left out: editors keep their swap files under such names.
pub(super) fn is_policy_name(path: &Path) -> bool {
    let hidden = path
        .file_name()
        .is_none_or(|name| name.to_string_lossy().starts_with('.'));
    !hidden && path.extension().is_some_and(|e| e == "yaml" || e == "yml")
}

/// Looks at the opened file, not at the path: what is checked is what is read. A link is followed
/// (mounted Kubernetes ConfigMaps consist of links); a FIFO neither blocks nor passes.
fn read(path: &Path) -> Result<String, FilesError> {
    let failed = |source| FilesError::Read {
        path: path.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open(path)
        .map_err(failed)?;
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
    use std::os::unix::fs::symlink;

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
        let files = load(dir.path()).unwrap();
        let names: Vec<_> = files.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["a.yaml", "b.yml", "link.yaml"]);
        assert_eq!(files[2].text, "b.yml");
        let one = load(&dir.path().join("a.yaml")).unwrap();
        assert_eq!((one.len(), one[0].name.as_str()), (1, "a.yaml"));
    }

    #[test]
    fn what_cannot_be_a_policy_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let error = |path: &Path| load(path).unwrap_err().to_string();
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
        assert_eq!(load_settings(&settings).unwrap(), None);
        settings.required = true;
        let error = load_settings(&settings).unwrap_err().to_string();
        assert!(error.contains("No such file"), "{error}");
        fs::write(&settings.path, "version: 1").unwrap();
        let file = load_settings(&settings).unwrap().unwrap();
        assert_eq!(file.name, settings.path.display().to_string());
        // One that is there and cannot be read is no missing one.
        fs::remove_file(&settings.path).unwrap();
        fs::create_dir(&settings.path).unwrap();
        settings.required = false;
        assert!(load_settings(&settings).is_err());
    }
}
