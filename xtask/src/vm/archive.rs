//! A cpio archive of the kind the kernel unpacks at boot ("newc"), written without root.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written. Paths are absolute; parents are added as needed.
pub struct Archive<W> {
    out: W,
    inode: u32,
    present: HashSet<PathBuf>,
}

impl Archive<BufWriter<File>> {
    /// Starts an archive in a new file.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self::new(BufWriter::with_capacity(1 << 20, file)))
    }
}

impl<W: Write> Archive<W> {
    fn new(out: W) -> Self {
        Self {
            out,
            inode: 0,
            present: HashSet::new(),
        }
    }

    /// Adds a directory and its parents.
    pub fn directory(&mut self, path: &str) -> Result<()> {
        self.parents(&Path::new(path).join("x"))
    }

    /// Adds a file with these contents; one that is there already stays.
    pub fn contents(&mut self, path: &str, contents: &[u8], mode: u32) -> Result<()> {
        if self.is_new(Path::new(path))? {
            self.entry(path, REGULAR | mode, (0, 0), contents)?;
        }
        Ok(())
    }

    /// Adds a copy of a file of this machine under another path, with its permissions.
    pub fn file(&mut self, path: &str, source: &Path) -> Result<()> {
        if !self.is_new(Path::new(path))? {
            return Ok(());
        }
        let read = || -> io::Result<(Vec<u8>, u32)> {
            let mut file = File::open(source)?;
            let mode = file.metadata()?.permissions().mode() & 0o777;
            let mut contents = Vec::new();
            file.read_to_end(&mut contents)?;
            Ok((contents, mode))
        };
        let (contents, mode) =
            read().with_context(|| format!("cannot read {}", source.display()))?;
        self.entry(path, REGULAR | mode, (0, 0), &contents)
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        if self.is_new(Path::new(path))? {
            self.entry(path, CHARACTER | 0o600, (major, minor), &[])?;
        }
        Ok(())
    }

    /// Adds all files below a directory of this machine, but those that `skip` names.
    pub fn tree(&mut self, path: &str, source: &Path, skip: &dyn Fn(&Path) -> bool) -> Result<()> {
        let entries =
            fs::read_dir(source).with_context(|| format!("cannot read {}", source.display()))?;
        for entry in entries {
            let entry = entry?;
            if skip(&entry.path()) {
                continue;
            }
            let inside = format!("{path}/{}", entry.file_name().to_string_lossy());
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.tree(&inside, &entry.path(), skip)?;
            } else if kind.is_file() {
                self.file(&inside, &entry.path())?;
            }
        }
        Ok(())
    }

    /// Writes the end; returns what was written to.
    pub fn finish(mut self) -> Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn is_new(&mut self, path: &Path) -> Result<bool> {
        self.parents(path)?;
        Ok(self.present.insert(path.to_owned()))
    }

    fn parents(&mut self, path: &Path) -> Result<()> {
        let mut above = PathBuf::from("/");
        for component in path.parent().into_iter().flat_map(Path::components) {
            let Component::Normal(name) = component else {
                continue;
            };
            above.push(name);
            if self.present.insert(above.clone()) {
                let name = above.to_string_lossy().into_owned();
                self.entry(&name, DIRECTORY | 0o755, (0, 0), &[])?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), contents: &[u8]) -> Result<()> {
        let name = path.trim_start_matches('/');
        self.inode += 1;
        let links = if mode & 0o170_000 == DIRECTORY { 2 } else { 1 };
        let size = u32::try_from(contents.len()).context("a file over 4 GiB")?;
        let length = u32::try_from(name.len() + 1)?;
        let fields = [
            self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, length, 0,
        ];
        let mut header = "070701".to_owned();
        for field in fields {
            header += &format!("{field:08X}");
        }
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(header.len() + name.len() + 1)?;
        self.out.write_all(contents)?;
        self.pad(contents.len())
    }

    /// Headers with names, and contents, each end on a multiple of four.
    fn pad(&mut self, written: usize) -> Result<()> {
        let missing = written.next_multiple_of(4) - written;
        Ok(self.out.write_all(&[0; 3][..missing])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_what_the_kernel_unpacks() {
        let mut archive = Archive::new(Vec::new());
        archive.contents("/a/b", b"hello", 0o644).unwrap();
        archive.contents("/a/b", b"again", 0o644).unwrap();
        archive.device("/dev/console", 5, 1).unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        // (name, mode, size) of each entry, walked as the format says.
        let number = |at: usize| {
            let digits = std::str::from_utf8(&bytes[at..at + 8]).unwrap();
            usize::from_str_radix(digits, 16).unwrap()
        };
        let mut at = 0;
        let mut seen = Vec::new();
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let (mode, size, name_size) = (number(at + 14), number(at + 54), number(at + 94));
            let name = String::from_utf8(bytes[at + 110..at + 109 + name_size].to_vec()).unwrap();
            let contents = (at + 110 + name_size).next_multiple_of(4);
            seen.push((name, mode, bytes[contents..contents + size].to_vec()));
            at = (contents + size).next_multiple_of(4);
        }
        let want = [
            ("a", 0o040_755, &b""[..]),
            ("a/b", 0o100_644, b"hello"),
            ("dev", 0o040_755, b""),
            ("dev/console", 0o020_600, b""),
            ("TRAILER!!!", 0, b""),
        ];
        let want: Vec<_> = want
            .map(|(name, mode, contents)| (name.to_owned(), mode, contents.to_vec()))
            .into();
        assert_eq!(seen, want);
    }
}
