//! The processes of the demo: servers, the enforcer, its `denials -f`; and their end.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::{Pid, setsid};

use super::session::wait;
use super::topology::{self, GATEWAY};

/// Everything the demo keeps outside of its namespaces. Fixed, so that a later run finds it.
pub const DIR: &str = "/run/enforcer-demo";

/// The control socket of the demo's daemon.
pub fn socket() -> PathBuf {
    Path::new(DIR).join("control.sock")
}

/// The daemon's own log.
pub fn log() -> PathBuf {
    Path::new(DIR).join("daemon.log")
}

/// The copy of the policy that the daemon enforces.
pub fn segments() -> PathBuf {
    Path::new(DIR).join("segments")
}

/// An `enforcer` command that talks to the demo's daemon.
pub fn enforcer(binary: &Path, verb: &str) -> Command {
    let mut command = Command::new(binary);
    command
        .arg(verb)
        .arg("--socket")
        .arg(socket())
        .stdin(Stdio::null());
    command
}

/// Starts the servers and waits until they listen.
pub fn start_servers(keep: bool) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["demo", "--serve"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    // Not ours: kept servers would hold the pipe open that someone reads us through.
    command.stderr(fs::File::create(Path::new(DIR).join("servers.log"))?);
    let mut child = start(&mut command, None, keep)?;
    let stdout = child.stdout.take().context("the servers have no output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    if line.trim() != super::servers::READY {
        bail!("the servers did not start");
    }
    Ok(())
}

/// Starts the daemon on the gateway and waits until it says that it enforces.
pub fn start_enforcer(binary: &Path, keep: bool) -> Result<()> {
    let log_file = fs::File::create(log())?;
    let mut command = enforcer(binary, "run");
    command
        .arg("--segments")
        .arg(segments())
        .args(["--interface", "gw-*", "--ephemeral"]);
    command.stdout(log_file.try_clone()?).stderr(log_file);
    let mut child = start(&mut command, Some(GATEWAY), keep)?;
    let mut ended = None;
    let enforcing = wait(Duration::from_secs(20), || {
        ended = child.try_wait().ok().flatten();
        ended.is_some() || is_enforcing(binary)
    });
    match ended {
        Some(status) => bail!(
            "the enforcer ended at once ({status}); it said:\n{}",
            said()
        ),
        None if enforcing => Ok(()),
        None => bail!(
            "the enforcer did not begin to enforce; it said:\n{}",
            said()
        ),
    }
}

fn is_enforcing(binary: &Path) -> bool {
    let Ok(output) = enforcer(binary, "status").args(["-o", "json"]).output() else {
        return false;
    };
    serde_json::from_slice::<serde_json::Value>(&output.stdout)
        .is_ok_and(|status| status["state"] == "enforcing")
}

/// The end of the daemon's log.
pub fn said() -> String {
    let text = fs::read_to_string(log()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// `enforcer denials -f`, running, and the lines it printed so far.
pub struct Denials {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Denials {
    /// Begins to follow.
    pub fn follow(binary: &Path) -> Result<Self> {
        let mut command = enforcer(binary, "denials");
        command
            .args(["-f", "-o", "text", "--color", "never"])
            .stdout(Stdio::piped());
        // What it says of a daemon that goes away is no part of the demo.
        command.stderr(fs::File::create(Path::new(DIR).join("denials.log"))?);
        let mut child = start(&mut command, None, false)?;
        let stdout = child.stdout.take().context("denials -f has no output")?;
        let lines = Arc::new(Mutex::new(Vec::new()));
        let collected = Arc::clone(&lines);
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                collected
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(line);
            }
        });
        // Nothing says that it is connected; what comes too early would not be followed.
        thread::sleep(Duration::from_millis(300));
        if let Some(status) = child.try_wait()? {
            bail!("enforcer denials -f ended at once ({status})");
        }
        Ok(Self { child, lines })
    }

    /// What was printed so far.
    pub fn lines(&self) -> Vec<String> {
        self.lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for Denials {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a process in a namespace and remembers it for [`stop_all`].
///
/// It has a session of its own, so Ctrl-C reaches only xtask, which then ends it in order; and
/// unless it is to be kept, it ends when xtask is killed.
fn start(command: &mut Command, namespace: Option<&str>, keep: bool) -> Result<Child> {
    let namespace = namespace.map(topology::open).transpose()?;
    let setup = move || {
        setsid()?;
        // We block the signals that we wait for; a child would inherit that and be deaf to them.
        SigSet::empty().thread_set_mask()?;
        if !keep {
            prctl::set_pdeathsig(Signal::SIGTERM)?;
        }
        if let Some(namespace) = &namespace {
            // Only the network: mounts stay as they are, so bpffs and cgroups are in sight.
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes plain system calls on a file that was
    // opened before; it neither allocates nor locks.
    unsafe {
        command.pre_exec(setup);
    }
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run {}", crate::ui::describe(command)))?;
    if let Err(error) = remember(child.id()) {
        // What is not written down would outlive a crash.
        let _ = child.kill();
        return Err(error);
    }
    Ok(child)
}

fn pid_dir() -> PathBuf {
    Path::new(DIR).join("pids")
}

/// Writes a process down as a file named by its id that holds its start time: together they
/// name one process for good, even after the id is given to another.
fn remember(pid: u32) -> Result<()> {
    fs::create_dir_all(pid_dir())?;
    let started = start_time(pid).context("the process is gone already")?;
    fs::write(pid_dir().join(pid.to_string()), started)?;
    Ok(())
}

/// Field 22 of `/proc/PID/stat`; the name in field 2 may hold blanks and brackets.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18).map(str::to_owned)
}

/// Ends every process that this run, or one before it, started. Returns how many there were.
pub fn stop_all() -> Result<usize> {
    let Ok(entries) = fs::read_dir(pid_dir()) else {
        return Ok(0);
    };
    let mut alive = Vec::new();
    for entry in entries.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let started = fs::read_to_string(entry.path()).ok();
        if started.is_some() && start_time(pid) == started {
            alive.push((pid, started));
        }
    }
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let left = || {
            alive
                .iter()
                .filter(|(pid, started)| start_time(*pid) == *started)
        };
        for (pid, _) in left() {
            // It may end between the look and the signal.
            let _ = kill(Pid::from_raw(i32::try_from(*pid)?), signal);
        }
        if wait(Duration::from_secs(5), || left().next().is_none()) {
            break;
        }
    }
    Ok(alive.len())
}
