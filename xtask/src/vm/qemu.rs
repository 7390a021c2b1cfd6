//! The emulator: what it can do here, and one run of a guest.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::prctl;
use nix::sys::signal::Signal;

use super::guest::{self, News, Transcript};
use crate::env;

/// The program.
pub const QEMU: &str = "qemu-system-x86_64";

/// Who executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Accel {
    /// The processor
    Kvm,
    /// QEMU, in software
    Tcg,
}

impl Accel {
    /// As QEMU calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// KVM where a kernel boots under it. The device may be missing, forbidden or broken, as under
    /// some hypervisors, where guests stand still.
    pub fn best(kernel: &Path) -> Self {
        if Path::new("/dev/kvm").exists() && boots(kernel).unwrap_or(false) {
            Self::Kvm
        } else {
            Self::Tcg
        }
    }

    fn arguments(self) -> [&'static str; 6] {
        let (accel, cpu) = match self {
            // Hypervisors that host this machine refuse to set the MSR of that feature.
            Self::Kvm => ("kvm", "host,-arch-capabilities"),
            // Without "fast strings": to clear or copy a page the kernel takes an instruction that
            // moves single bytes then, and each is emulated. 52 -> 29 s of processor time.
            Self::Tcg => ("tcg,thread=multi", "max,-erms,-fsrm"),
        };
        ["-machine", "pc", "-accel", accel, "-cpu", cpu]
    }
}

/// True when a kernel comes up under KVM as far as to miss its root file system.
fn boots(kernel: &Path) -> Result<bool> {
    const LONG_ENOUGH: Duration = Duration::from_secs(8);
    let mut command = command();
    command
        .args(Accel::Kvm.arguments())
        .args(["-m", "512", "-no-reboot", "-serial", "stdio", "-kernel"])
        .arg(kernel)
        .args(["-append", "console=ttyS0 panic=-1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut process = Process(command.spawn()?);
    let stdout = process.0.stdout.take().context("QEMU has no output")?;
    let lines = lines(stdout);
    let start = Instant::now();
    while let Ok(line) = lines.recv_timeout(LONG_ENOUGH.saturating_sub(start.elapsed())) {
        if line.contains("Kernel panic") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// QEMU with nothing of the user's settings and no devices.
fn command() -> Command {
    let mut command = env::clean(QEMU);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command
}

/// A guest to run.
pub struct Guest {
    pub accel: Accel,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// Where its console goes.
    pub console: PathBuf,
    pub cpus: usize,
    pub memory_mib: u32,
    /// How long it may be silent: what a test binary may take, and some.
    pub silence: Duration,
    /// How long it may take in all.
    pub total: Duration,
}

/// Ends the emulator, whatever happens here.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Gone already, as a rule.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Guest {
    fn command(&self) -> Command {
        let mut command = command();
        command
            .args(self.accel.arguments())
            .args(["-smp", &self.cpus.to_string()])
            .args(["-m", &self.memory_mib.to_string()])
            .args(["-no-reboot", "-serial"])
            .arg(format!("file:{}", self.console.display()))
            .args(["-chardev", "stdio,id=results,signal=off"])
            .args(["-serial", "chardev:results"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initramfs)
            // A sick kernel ends the run. The host may be slow: no watchdogs.
            .args([
                "-append",
                "console=ttyS0 loglevel=5 panic=-1 oops=panic nowatchdog no_timer_check \
                 rcupdate.rcu_cpu_stall_suppress=1 random.trust_cpu=on rdinit=/init",
            ]);
        command
    }

    /// Boots the guest and reads what it says until it ends; `news` hears of it as it comes. `next`
    /// names the test binary that the guest is to run when it asks, if there is one left.
    pub fn run(
        &self,
        mut next: impl FnMut() -> Option<String>,
        mut news: impl FnMut(&News, &Transcript),
    ) -> Result<Transcript> {
        let mut command = self.command();
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: between fork and exec only a system call.
        unsafe {
            command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        let mut process = Process(
            command
                .spawn()
                .with_context(|| format!("cannot run {QEMU}"))?,
        );
        let mut stdin = process.0.stdin.take().context("QEMU has no input")?;
        let stdout = process.0.stdout.take().context("QEMU has no output")?;
        let stderr = process.0.stderr.take().context("QEMU has no output")?;
        let complaints = thread::spawn(move || std::io::read_to_string(stderr).unwrap_or_default());
        let lines = lines(stdout);
        let start = Instant::now();
        let mut heard = start;
        let mut transcript = Transcript::default();
        let mut answer = String::new();
        loop {
            let left = self.total.saturating_sub(start.elapsed());
            match lines.recv_timeout(left.min(self.silence)) {
                Ok(line) => {
                    if let Some(new) = transcript.read(&line) {
                        heard = Instant::now();
                        if new == News::Asks {
                            answer = next().unwrap_or_default();
                        }
                        if matches!(new, News::Asks | News::AsksAgain) {
                            // A guest that is gone shows below.
                            let _ = writeln!(stdin, "{answer}");
                        }
                        news(&new, &transcript);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let why = if start.elapsed() >= self.total {
                format!("the guest did not end within {} s", self.total.as_secs())
            } else if heard.elapsed() >= self.silence {
                format!("the guest hung for {} s", heard.elapsed().as_secs())
            } else {
                continue;
            };
            transcript.broke_off(&why);
            break;
        }
        drop(process);
        let said = complaints.join().unwrap_or_default();
        let console = fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let sick = guest::complaints(&console);
        if !sick.is_empty() {
            transcript.broke_off(&format!("the kernel complained:\n  {}", sick.join("\n  ")));
        }
        if !transcript.done && transcript.crashes.is_empty() {
            let lines: Vec<_> = console.lines().collect();
            let tail = lines[lines.len().saturating_sub(15)..].join("\n  ");
            transcript.broke_off(&format!(
                "the guest stopped before the end: {said}\n  {tail}"
            ));
        }
        Ok(transcript)
    }
}

/// The lines of a pipe, as they come.
fn lines(pipe: ChildStdout) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            if sender
                .send(String::from_utf8_lossy(&line).into_owned())
                .is_err()
            {
                return;
            }
        }
    });
    receiver
}
