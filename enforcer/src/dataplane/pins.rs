//! What keeps enforcing while no daemon lives: programs, maps, links and images, pinned in a BPF
//! file system.
//!
//! ```text
//! ROOT/current/meta              what the rest is, see [`Meta`]
//! ROOT/current/maps/NAME         what the programs share
//! ROOT/current/programs/NAME
//! ROOT/current/images/GENERATION what is in the slots of POLICY
//! ROOT/next/…                    the same, while other programs take over
//! ROOT/aside-N/…                 a `next` that was left half-way
//! ROOT/links/PROGRAM[-IFINDEX]   which hooks they hang on
//! ```
//!
//! Every step leaves behind what the next start can go on from: a link that names a program of `next`
//! is led back, an image in no slot is forgotten. A set of programs goes when no hook leads there any
//! more, and not before: unpinned, they find those that go on (`STEPS`) no longer, and deny.

mod ours;

use std::{
    fs::{self, DirBuilder, File, Metadata},
    io::{self, ErrorKind},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use enforcer_common::{ABI_VERSION, table::SECRETS};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::statfs::{BPF_FS_MAGIC, statfs},
    unistd::geteuid,
};

use super::{
    DataplaneError,
    errors::syscall,
    sys::{self, faults, objects},
};

pub(super) use ours::programs;

/// Where pins are unless told otherwise.
pub const DEFAULT_PINS: &str = "/sys/fs/bpf/enforcer";
/// "enforcer" in ASCII.
const MAGIC: u64 = 0x656e_666f_7263_6572;
/// Of what is shared by programs of different builds: map layouts, [`Meta`], names of pins.
/// Another number, another enforcer: it is refused, not misread.
pub(super) const LAYOUT: u32 = 1;

/// Where what is loaded is to be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Pinned in this directory of a BPF file system: it outlives the daemon.
    Pinned(PathBuf),
    /// Nowhere: it goes with the process.
    Ephemeral,
}

/// What the pins belong to. Up to the network namespace every layout has the same fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Meta {
    magic: u64,
    layout: u32,
    /// [`ABI_VERSION`] of images.
    abi: u32,
    /// Of the object that the programs are from.
    pub(super) object: u64,
    /// Words of an image.
    pub(super) image_words: u32,
    /// Buckets of each flow table.
    pub(super) buckets: u32,
    /// The network namespace whose interfaces the programs are on.
    pub(super) netns_cookie: u64,
    /// The largest generation that ever judged: none is used twice.
    pub(super) generation: u32,
    reserved: u32,
    /// Of the flow table's hash.
    pub(super) secrets: [u64; SECRETS],
}

const META_WORDS: usize = size_of::<Meta>() / 4;

impl Meta {
    pub(super) fn new(
        object: u64,
        image_words: u32,
        buckets: u32,
        netns_cookie: u64,
        secrets: [u64; SECRETS],
    ) -> Self {
        Self {
            magic: MAGIC,
            layout: LAYOUT,
            abi: ABI_VERSION,
            object,
            image_words,
            buckets,
            netns_cookie,
            generation: 0,
            reserved: 0,
            secrets,
        }
    }

    /// The same, of another object and other sizes.
    pub(super) fn with(self, object: u64, image_words: u32, buckets: u32) -> Self {
        Self {
            object,
            image_words,
            buckets,
            ..self
        }
    }

    fn words(&self) -> [u32; META_WORDS] {
        let mut words = [0; META_WORDS];
        let numbers = [
            self.magic,
            pair(self.layout, self.abi),
            self.object,
            pair(self.image_words, self.buckets),
            self.netns_cookie,
            pair(self.generation, self.reserved),
        ];
        let all = numbers.into_iter().chain(self.secrets);
        for (to, from) in words.chunks_exact_mut(2).zip(all) {
            to.copy_from_slice(&[from as u32, (from >> 32) as u32]);
        }
        words
    }

    fn from_words(words: &[u32; META_WORDS]) -> Self {
        let mut numbers = words.chunks_exact(2).map(|pair| {
            pair.iter()
                .rev()
                .fold(0, |all, w| all << 32 | u64::from(*w))
        });
        let mut next = || numbers.next().unwrap_or(0);
        let (magic, layout_abi, object, sizes) = (next(), next(), next(), next());
        let (netns_cookie, generation) = (next(), next());
        let mut secrets = [0; SECRETS];
        secrets.fill_with(next);
        Self {
            magic,
            layout: layout_abi as u32,
            abi: (layout_abi >> 32) as u32,
            object,
            image_words: sizes as u32,
            buckets: (sizes >> 32) as u32,
            netns_cookie,
            generation: generation as u32,
            reserved: 0,
            secrets,
        }
    }
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// A root directory of pins, of this process alone.
#[derive(Debug)]
pub(super) struct Pins {
    root: PathBuf,
    /// What is opened once stays there: `ROOT` may be under a mount that goes.
    _mount: Option<OwnedFd>,
    _lock: Option<Flock<File>>,
    kept: bool,
}

impl Pins {
    /// Takes hold of the directory, which is made if need be.
    ///
    /// # Errors
    /// [`DataplaneError::Environment`] where there is no BPF file system, it cannot be written, or
    /// another enforcer has the directory.
    pub(super) fn open(keep: &Keep) -> Result<Self, DataplaneError> {
        match keep {
            Keep::Ephemeral => Self::ephemeral(),
            Keep::Pinned(root) => Self::pinned(root),
        }
    }

    fn ephemeral() -> Result<Self, DataplaneError> {
        let mount = objects::private_bpffs().map_err(|error| DataplaneError::Environment {
            what: format!("cannot make a BPF file system of our own: {error}"),
            help:
                "programs that go with the daemon need CAP_SYS_ADMIN; without it, let it pin them \
                   (--pins)"
                    .to_owned(),
        })?;
        Ok(Self {
            root: format!("/proc/self/fd/{}", mount.as_raw_fd()).into(),
            _mount: Some(mount),
            _lock: None,
            kept: false,
        })
    }

    fn pinned(root: &Path) -> Result<Self, DataplaneError> {
        let made = !root.exists();
        directory(root).map_err(|error| cannot_pin(root, &error))?;
        let kind = statfs(root).map_err(|error| cannot_pin(root, &error.into()))?;
        if kind.filesystem_type() != BPF_FS_MAGIC {
            if made {
                let _ = fs::remove_dir(root);
            }
            let error = io::Error::other("it is not in a BPF file system");
            return Err(cannot_pin(root, &error));
        }
        let opened = File::open(root).map_err(|error| cannot_pin(root, &error))?;
        nobody_elses(root, &opened)?;
        let lock = Flock::lock(opened, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
            DataplaneError::Environment {
                what: format!(
                    "cannot have {} for ourselves: {}",
                    root.display(),
                    io::Error::from(error)
                ),
                help: "another enforcer is at work there: stop it, or give this one another \
                       directory (--pins)"
                    .to_owned(),
            }
        })?;
        Ok(Self {
            root: root.to_owned(),
            _mount: None,
            _lock: Some(lock),
            kept: true,
        })
    }

    /// Makes directories anew that somebody removed.
    ///
    /// # Errors
    /// As [`Pins::open`].
    pub(super) fn restore(&mut self) -> Result<(), DataplaneError> {
        if self.kept && !self.root.exists() {
            *self = Self::pinned(&self.root.clone())?;
        }
        let links = self.root.join("links");
        directory(&links).map_err(|error| cannot_pin(&links, &error))
    }

    /// Programs and maps that are in use, or are about to be.
    pub(super) fn set(&self, next: bool) -> Set {
        Set {
            path: self.root.join(if next { "next" } else { "current" }),
        }
    }

    /// Makes room for programs that are to take over. Where an earlier start was left half-way, hooks
    /// may lead to what it has loaded, so that is kept for now.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn make_next(&self) -> io::Result<Set> {
        let next = self.set(true);
        if next.described() {
            let mut aside = (0u32..).map(|number| self.root.join(format!("{ASIDE}{number}")));
            if let Some(path) = aside.find(|path| !path.exists()) {
                faults::step(|| fs::rename(&next.path, path))?;
            }
        }
        next.remove()?;
        next.make()?;
        Ok(next)
    }

    /// Removes all sets but the one in use: no hook leads there any more.
    ///
    /// # Errors
    /// The first of the kernel's; the rest is attempted all the same.
    pub(super) fn forget_others(&self) -> io::Result<()> {
        let mut result = self.set(true).remove();
        for path in asides(&self.root)? {
            result = result.and(Set { path }.remove());
        }
        result
    }

    /// Where what is pinned outlives this process.
    pub(super) fn place(&self) -> Option<&Path> {
        self.kept.then_some(&*self.root)
    }

    /// What is pinned in `current`, if anything is. What is for interfaces of another network
    /// namespace that are all gone enforces nothing, and is removed.
    ///
    /// # Errors
    /// [`DataplaneError::Environment`] when another kind of enforcer made it, or for another network
    /// namespace.
    pub(super) fn meta(&self, netns_cookie: u64) -> Result<Option<Meta>, DataplaneError> {
        let Some(meta) = self.described_by()? else {
            return Ok(None);
        };
        let elsewhere = meta.netns_cookie != netns_cookie;
        if elsewhere && self.is_abandoned().map_err(syscall("read a pinned link"))? {
            tracing::warn!(
                pins = %self.root.display(),
                "what is pinned is on no interface any more, and was for another network \
                 namespace: it is removed, and this enforcer begins anew"
            );
            self.clear().map_err(syscall("remove abandoned pins"))?;
            return Ok(None);
        }
        let root = self.root.display();
        if (meta.layout, meta.abi) != (LAYOUT, ABI_VERSION) {
            let made = if (meta.layout, meta.abi) > (LAYOUT, ABI_VERSION) {
                "a newer"
            } else {
                "an older"
            };
            let what = format!(
                "was made by {made} enforcer (layout {}.{}, this one has {LAYOUT}.{ABI_VERSION})",
                meta.layout, meta.abi
            );
            let help = format!(
                "it goes on enforcing; to replace it, start the enforcer that made it, or take it \
                 off with `enforcer detach --pins {root}` (nothing is enforced from then on) and \
                 start this one"
            );
            return Err(self.foreign(&what, help));
        }
        if elsewhere {
            let help = format!(
                "it goes on enforcing there; give each its own directory (--pins), or take it off \
                 with `enforcer detach --pins {root}` (nothing is enforced there from then on)"
            );
            let what = "is for the interfaces of another network namespace, which are there";
            return Err(self.foreign(what, help));
        }
        Ok(Some(meta))
    }

    fn foreign(&self, what: &str, help: String) -> DataplaneError {
        DataplaneError::Environment {
            what: format!("what is pinned in {} {what}", self.root.display()),
            help,
        }
    }

    /// The description of `current`, whichever enforcer made it.
    fn described_by(&self) -> Result<Option<Meta>, DataplaneError> {
        match ours::description(&self.set(false).path.join("meta")) {
            Ok(Some(meta)) => Ok(Some(meta)),
            Ok(None) => Err(self.foreign(
                "is not an enforcer's",
                "name another directory with --pins".to_owned(),
            )),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(syscall("open the pinned description")(error)),
        }
    }

    /// For which network namespace it is, if anything is pinned.
    ///
    /// # Errors
    /// [`DataplaneError`], when it is not an enforcer's.
    pub(super) fn netns(&self) -> Result<Option<u64>, DataplaneError> {
        Ok(self.described_by()?.map(|meta| meta.netns_cookie))
    }

    /// Whether a start has got as far as making directories.
    pub(super) fn is_begun(&self) -> bool {
        self.set(true).path.exists() || self.set(false).path.exists()
    }

    /// What is in `next` becomes what is in use; what was, goes.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn commit(&self) -> io::Result<()> {
        let (current, next) = (self.set(false), self.set(true));
        match faults::step(|| fs::rename(&next.path, &current.path)) {
            // An empty directory may be replaced; ours has something in it.
            Err(error) if current.path.exists() => {
                objects::exchange(&next.path, &current.path).map_err(|_| error)?;
            }
            moved => moved?,
        }
        // It is done: what is left goes with the next change.
        if let Err(error) = next.remove() {
            tracing::warn!(%error, "cannot remove the programs of before");
        }
        Ok(())
    }

    /// Pins a link, in the place of an old one.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn pin_link(
        &self,
        program: &str,
        ifindex: Option<u32>,
        link: BorrowedFd<'_>,
    ) -> io::Result<()> {
        directory(&self.root.join("links"))?;
        repin(link, &self.link(program, ifindex))
    }

    /// # Errors
    /// The kernel's.
    pub(super) fn forget_link(&self, program: &str, ifindex: Option<u32>) -> io::Result<()> {
        gone(unlink(self.link(program, ifindex)))
    }

    /// Where a link is.
    pub(super) fn link(&self, program: &str, ifindex: Option<u32>) -> PathBuf {
        let links = self.root.join("links");
        match ifindex {
            None => links.join(program),
            Some(ifindex) => links.join(format!("{program}-{ifindex}")),
        }
    }

    /// Takes everything off: links first. What is not an enforcer's stays.
    ///
    /// # Errors
    /// The first of the kernel's; the rest is attempted all the same.
    pub(super) fn remove(&self) -> io::Result<()> {
        let result = self.clear();
        match self.kept {
            true => result.and(ours::unless_filled(fs::remove_dir(&self.root))),
            false => result,
        }
    }

    fn clear(&self) -> io::Result<()> {
        let links = self.remove_links();
        let (others, current) = (self.forget_others(), self.set(false).remove());
        links.and(others).and(current)
    }
}

/// The network namespace that the pins in a directory are for, if an enforcer made them.
pub(super) fn netns_of(root: &Path) -> Option<u64> {
    let meta = ours::description(&root.join("current/meta")).ok()??;
    Some(meta.netns_cookie)
}

/// Programs of one build, and their maps.
#[derive(Clone, Debug)]
pub(super) struct Set {
    path: PathBuf,
}

impl Set {
    /// Makes its directories.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn make(&self) -> io::Result<()> {
        for path in ["", "images", "maps", "programs"] {
            directory(&self.path.join(path))?;
        }
        Ok(())
    }

    /// Where a map is. The file system reserves dots.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        let name = name.trim_start_matches('.').replace('.', "-");
        self.path.join("maps").join(name)
    }

    /// Where a program is.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.path.join("programs").join(name)
    }

    /// Pinned images, by their generations.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn images(&self) -> io::Result<Vec<(u32, OwnedFd)>> {
        let mut images = Vec::new();
        for name in names(&self.path.join("images"))? {
            if let Ok(generation) = name.parse() {
                images.push((generation, objects::get(&self.image(generation))?));
            }
        }
        Ok(images)
    }

    /// Pins an image, in the place of another one of its generation.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn pin_image(&self, generation: u32, image: BorrowedFd<'_>) -> io::Result<()> {
        let path = self.image(generation);
        // It stays pinned at any moment.
        if let Ok(pinned) = objects::get(&path)
            && objects::id(pinned.as_fd())? == objects::id(image)?
        {
            return Ok(());
        }
        repin(image, &path)
    }

    /// # Errors
    /// The kernel's.
    pub(super) fn forget_image(&self, generation: u32) -> io::Result<()> {
        gone(unlink(self.image(generation)))
    }

    /// Where an image is.
    pub(super) fn image(&self, generation: u32) -> PathBuf {
        self.path.join("images").join(generation.to_string())
    }

    /// Writes what the set is: last, for without it there is none.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn describe(&self, meta: &Meta) -> io::Result<()> {
        let map = sys::create_array("enforcer_meta", META_WORDS as u32, 0)?;
        sys::update_words(map.as_fd(), 0, &meta.words())?;
        repin(map.as_fd(), &self.path.join("meta"))
    }

    /// Whether it is known what the set is.
    pub(super) fn described(&self) -> bool {
        self.path.join("meta").exists()
    }

    /// Writes the description anew.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn update(&self, meta: &Meta) -> io::Result<()> {
        let map = objects::get(&self.path.join("meta"))?;
        sys::update_words(map.as_fd(), 0, &meta.words())
    }

    /// # Errors
    /// The kernel's.
    pub(super) fn remove(&self) -> io::Result<()> {
        gone(unlink(self.path.join("meta")))?;
        for path in ["programs", "images", "maps"] {
            clear(&self.path.join(path))?;
        }
        gone(fs::remove_dir(&self.path))
    }
}

fn cannot_pin(root: &Path, error: &io::Error) -> DataplaneError {
    let kind = error.kind();
    let help = if kind == ErrorKind::ReadOnlyFilesystem {
        "mount it for writing: mount -o remount,rw /sys/fs/bpf"
    } else if kind == ErrorKind::PermissionDenied {
        "run as root, or let the directory belong to this user"
    } else if kind == ErrorKind::StorageFull {
        "remove what others have pinned there"
    } else {
        "mount one: mount -t bpf bpf /sys/fs/bpf (`ip netns exec` hides it: enter the namespace \
         with `nsenter --net=…` instead); or name a directory in one with --pins"
    };
    DataplaneError::Environment {
        what: format!("cannot pin anything in {}: {error}", root.display()),
        help: help.to_owned(),
    }
}

/// Makes a directory that only root may enter, if it is not there.
fn directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// The kernel lets everybody make directories where BPF file systems are mounted: who owns one can
/// take links away, and others' programs with them.
fn nobody_elses(root: &Path, opened: &File) -> Result<(), DataplaneError> {
    let failed = |error: io::Error| cannot_pin(root, &error);
    let (name, directory) = (
        fs::symlink_metadata(root).map_err(failed)?,
        opened.metadata().map_err(failed)?,
    );
    let ours = |metadata: &Metadata| [0, geteuid().as_raw()].contains(&metadata.uid());
    if ours(&name) && ours(&directory) && directory.mode() & 0o022 == 0 {
        return Ok(());
    }
    let root = root.display();
    Err(DataplaneError::Environment {
        what: format!("others than root can change what is pinned in {root}"),
        help: format!(
            "find out who made it, then remove it, or: chown root {root}; chmod 0700 {root}"
        ),
    })
}

fn repin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    match objects::pin(object, path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            unlink(path)?;
            objects::pin(object, path)
        }
        pinned => pinned,
    }
}

/// What the names of sets begin with that were left half-way.
const ASIDE: &str = "aside-";

/// Those sets.
fn asides(root: &Path) -> io::Result<Vec<PathBuf>> {
    let names = names(root)?.into_iter();
    let number = |name: &str| name.strip_prefix(ASIDE)?.parse::<u32>().ok();
    let ours = names.filter(|name| number(name).is_some());
    Ok(ours.map(|name| root.join(name)).collect())
}

/// Names in a directory; none where there is no directory.
fn names(path: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

/// Removes a directory of pins.
fn clear(path: &Path) -> io::Result<()> {
    for name in names(path)? {
        gone(unlink(path.join(name)))?;
    }
    gone(fs::remove_dir(path))
}

fn unlink(path: impl AsRef<Path>) -> io::Result<()> {
    faults::step(|| fs::remove_file(path))
}

/// What is gone already is fine.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_is_read_as_it_was_written() {
        let secrets = std::array::from_fn(|at| 1 << (at + 40) | at as u64);
        let mut meta = Meta::new(u64::MAX - 5, 1 << 18, 1 << 15, 77, secrets);
        meta.generation = 9;
        assert_eq!(Meta::from_words(&meta.words()), meta);
    }
}
