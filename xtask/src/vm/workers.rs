//! The workers: each has a guest, and takes test binaries from the queue.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::guest::{News, Outcome, Transcript};
use super::initramfs;
use super::kernels::{self, Kernel, Unpacked};
use super::qemu::{Accel, Guest};
use super::queue::{End, Queue};
use super::suite::Suite;
use super::{Run, missing};
use crate::{env, ui};

/// Two: per-CPU maps must not hide behind a single processor.
const CPUS: usize = 2;
const MEMORY_MIB: u32 = 3072;

/// How many guests run at a time: as many as there are kernels, and more where there are processors
/// to spare.
fn workers() -> usize {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    (processors / CPUS).clamp(Kernel::ALL.len(), 4)
}

/// How long things may take.
struct Limits {
    /// A test binary.
    binary: Duration,
    /// A guest.
    total: Duration,
}

impl Limits {
    fn of(accel: Accel) -> Self {
        let minutes = |count: u64| Duration::from_secs(60 * count);
        match accel {
            Accel::Kvm => Self {
                binary: minutes(5),
                total: minutes(15),
            },
            Accel::Tcg => Self {
                // Of the longest, each start of the daemon takes the verifier ten seconds.
                binary: minutes(20),
                // Ten minutes on two idle processors; others may be at work here.
                total: minutes(60),
            },
        }
    }
}

/// Workers boot guests until all binaries of all kernels have run.
pub fn run(suites: &[(Kernel, Suite)], accel: Accel) -> Result<Vec<Run>> {
    let directory = env::target_dir()?.join("vm/guests");
    fs::create_dir_all(&directory)?;
    let places = suites
        .iter()
        .map(|(kernel, suite)| Place::new(*kernel, suite, accel, &directory))
        .collect::<Result<Vec<_>>>()?;
    let queue = Queue::new(
        suites
            .iter()
            .map(|(kernel, suite)| (*kernel, suite.order())),
    );
    let work = || -> Result<()> {
        while let Some(kernel) = queue.kernel() {
            let place = places.iter().find(|place| place.kernel == kernel);
            place
                .context("a kernel that nobody asked for")?
                .run(&queue)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..workers()).map(|_| scope.spawn(work)).collect();
        let mut joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.try_for_each(|result| result)
    })?;
    Ok(places.into_iter().map(Place::end).collect())
}

/// A kernel, and what its guests share.
struct Place<'a> {
    kernel: Kernel,
    accel: Accel,
    suite: &'a Suite,
    unpacked: Unpacked,
    /// Written by the first guest.
    initramfs: OnceLock<Result<Initramfs, String>>,
    /// Where guests leave their files.
    directory: &'a Path,
    told: Mutex<Told>,
}

/// What guests have told so far.
#[derive(Default)]
struct Told {
    guests: usize,
    transcript: Transcript,
    /// When the first was started, and the last ended.
    span: Option<(Instant, Instant)>,
}

/// A file that is large, and made anew each time.
struct Initramfs(PathBuf);

impl Drop for Initramfs {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl<'a> Place<'a> {
    fn new(kernel: Kernel, suite: &'a Suite, accel: Accel, directory: &'a Path) -> Result<Self> {
        Ok(Self {
            kernel,
            accel,
            suite,
            unpacked: kernels::get(kernel)?,
            initramfs: OnceLock::new(),
            directory,
            told: Mutex::default(),
        })
    }

    fn told<T>(&self, change: impl FnOnce(&mut Told) -> T) -> T {
        change(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn initramfs(&self, limits: &Limits) -> Result<&Path> {
        let write = || -> Result<Initramfs> {
            let mut environment = vec![
                ("NO_COLOR", "1".to_owned()),
                ("INSTA_UPDATE", "no".to_owned()),
                // libtest's JSON is not stable; the runner is the toolchain's that built it.
                ("RUSTC_BOOTSTRAP", "1".to_owned()),
            ];
            if self.accel == Accel::Tcg {
                environment.push(("ENFORCER_TEST_SCALE", "small".to_owned()));
            }
            let plan = initramfs::Plan {
                environment: &environment,
                seconds: limits.binary.as_secs(),
            };
            // Somebody else may be at it, too.
            let own = format!("{}-{}.cpio", self.kernel.name(), std::process::id());
            let file = Initramfs(self.directory.join(own));
            initramfs::write(&file.0, &self.unpacked, self.suite, &plan)?;
            Ok(file)
        };
        let written = self
            .initramfs
            .get_or_init(|| write().map_err(|error| format!("{error:#}")));
        match written {
            Ok(file) => Ok(&file.0),
            Err(error) => bail!("no file system for {}: {error}", self.kernel.name()),
        }
    }

    /// Runs one guest until the queue is empty, or it breaks off.
    fn run(&self, queue: &Queue) -> Result<()> {
        let limits = Limits::of(self.accel);
        let number = self.told(|told| {
            told.guests += 1;
            told.guests
        });
        let name = self.kernel.name();
        // The console's last words stay under a name that is known.
        let known = match number {
            1 => format!("{name}.console"),
            _ => format!("{name}-{number}.console"),
        };
        let console = format!("{name}-{}-{number}.console", std::process::id());
        let (console, known) = (self.directory.join(console), self.directory.join(known));
        let guest = Guest {
            accel: self.accel,
            kernel: self.unpacked.image.clone(),
            initramfs: self.initramfs(&limits)?.to_owned(),
            console: console.clone(),
            cpus: CPUS,
            memory_mib: MEMORY_MIB,
            silence: limits.binary + Duration::from_secs(60),
            total: limits.total,
        };
        let start = Instant::now();
        let mut progress = Progress::new(name, start);
        let mut asked = false;
        let next = || {
            asked = true;
            queue.binary(self.kernel)
        };
        let transcript = guest.run(next, |news, transcript| progress.tell(news, transcript))?;
        let _ = fs::rename(&console, &known);
        let how = match (transcript.done, asked) {
            (true, _) => End::Done,
            (false, true) => End::BrokeOff,
            (false, false) => End::NeverUp,
        };
        if !queue.ended(self.kernel, how) {
            ui::note(&format!("{name}: given up"));
        }
        self.told(|told| {
            told.transcript.join(transcript);
            let began = told.span.map_or(start, |(began, _)| began.min(start));
            told.span = Some((began, Instant::now()));
        });
        Ok(())
    }

    fn end(self) -> Run {
        let told = self
            .told
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        Run {
            kernel: self.kernel,
            accel: self.accel,
            missing: missing(self.suite.names(), &told.transcript),
            transcript: told.transcript,
            took: told.span.map_or(Duration::ZERO, |(began, end)| end - began),
        }
    }
}

/// Says how a guest comes along.
struct Progress {
    name: &'static str,
    start: Instant,
    /// When the binary at work was started.
    before: Instant,
    /// Tests told of.
    tests: usize,
}

impl Progress {
    fn new(name: &'static str, start: Instant) -> Self {
        Self {
            name,
            start,
            before: start,
            tests: 0,
        }
    }

    fn tell(&mut self, news: &News, transcript: &Transcript) {
        let name = self.name;
        match news {
            News::Booted(release) => {
                ui::note(&format!(
                    "{name}: {release} is up ({})",
                    ui::took(self.start)
                ));
            }
            News::Started(_) => self.before = Instant::now(),
            News::Ended(binary, code) => {
                ui::note(&format!(
                    "{name}: {binary}: {} tests{} ({})",
                    transcript.tests.len() - self.tests,
                    if *code == 0 { "" } else { ", FAILED" },
                    ui::took(self.before)
                ));
                for test in &transcript.tests[self.tests..] {
                    if let Outcome::Failed(output) = &test.outcome {
                        println!("\n---- {name}: {} FAILED ----\n{output}", test.name);
                    }
                }
                self.tests = transcript.tests.len();
            }
            News::Asks | News::AsksAgain | News::Done => {}
        }
    }
}
