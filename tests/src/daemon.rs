//! The daemon under test: the real binary, in a namespace, with its files and clients.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::{net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::{
        prctl,
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    netns::{self, Netns},
    scale,
};

/// Beyond what a loaded machine takes for anything.
pub const LONG: Duration = Duration::from_secs(60);

/// Polls until `look` finds something.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let (start, limit) = (Instant::now(), scale::within(limit));
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The binary under test: `ENFORCER_BIN`, else the one beside this test's `deps`.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("ENFORCER_BIN") {
        return path.into();
    }
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.push("enforcer");
    assert!(
        path.exists(),
        "{} is missing: build it, or name one in ENFORCER_BIN",
        path.display()
    );
    path
}

/// A command that enters a namespace (its network, not its mounts) and ends with its parent.
fn command(namespace: Option<&Netns>) -> Command {
    let mut command = Command::new(binary());
    command.stdin(Stdio::null()).env_remove("ENFORCER_SOCKET");
    let namespace = namespace.map(Netns::file);
    let setup = move || {
        prctl::set_pdeathsig(Signal::SIGTERM)?;
        if let Some(namespace) = &namespace {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls, on a file opened before.
    unsafe {
        command.pre_exec(setup);
    }
    command
}

/// Runs a verb that needs no daemon.
pub fn enforcer(arguments: &[&str]) -> Output {
    command(None).args(arguments).output().unwrap()
}

/// Files of a daemon and how to start it.
pub struct Setup<'a> {
    namespace: &'a Netns,
    directory: tempfile::TempDir,
    interface: String,
    pins: Option<PathBuf>,
    more: Vec<String>,
}

impl<'a> Setup<'a> {
    pub fn new(namespace: &'a Netns, interface: &str, policy: &str) -> Self {
        let directory = netns::directory();
        fs::create_dir(directory.path().join("segments")).unwrap();
        let this = Self {
            namespace,
            directory,
            interface: interface.to_owned(),
            pins: None,
            more: Vec::new(),
        };
        this.write(policy);
        this
    }

    /// Adds arguments of `run`.
    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.more.extend(arguments.iter().map(|a| (*a).to_owned()));
        self
    }

    /// On other interfaces.
    pub fn on(mut self, interface: &str) -> Self {
        interface.clone_into(&mut self.interface);
        self
    }

    /// Pinned here, so that it enforces on when the daemon ends.
    pub fn pinned(mut self, pins: &Path) -> Self {
        self.pins = Some(pins.to_owned());
        self
    }

    /// With these settings.
    pub fn with_settings(self, settings: &str) -> Self {
        self.write_settings(settings);
        let path = self.settings();
        self.with(&["--config", path.to_str().unwrap()])
    }

    /// The file of the daemon's settings.
    pub fn settings(&self) -> PathBuf {
        self.directory.path().join("enforcer.yaml")
    }

    /// Replaces the settings at once.
    pub fn write_settings(&self, settings: &str) {
        let new = self.directory.path().join("new-settings");
        fs::write(&new, settings).unwrap();
        fs::rename(new, self.settings()).unwrap();
    }

    /// Directory of the policy.
    pub fn segments(&self) -> PathBuf {
        self.directory.path().join("segments")
    }

    /// The policy's one file.
    pub fn policy(&self) -> PathBuf {
        self.segments().join("policy.yaml")
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("control.sock")
    }

    /// Replaces the policy's file at once, as editors do.
    pub fn write(&self, policy: &str) {
        let new = self.directory.path().join("new");
        fs::write(&new, policy).unwrap();
        fs::rename(new, self.policy()).unwrap();
    }

    /// `enforcer run` for this setup.
    pub fn command(&self) -> Command {
        let mut command = command(Some(self.namespace));
        command
            .arg("run")
            .arg("--socket")
            .arg(self.socket())
            .arg("--segments")
            .arg(self.segments())
            .args(["--interface", &self.interface])
            .args(&self.more);
        match &self.pins {
            Some(pins) => command.arg("--pins").arg(pins),
            None => command.arg("--ephemeral"),
        };
        command
    }

    /// Starts, and does not wait.
    pub fn spawn(self) -> Daemon<'a> {
        self.spawn_with(|_| {})
    }

    /// Starts after a last change, and does not wait.
    pub fn spawn_with(self, change: impl FnOnce(&mut Command)) -> Daemon<'a> {
        let path = self.directory.path().join("log");
        let log = fs::File::create(&path).unwrap();
        let mut command = self.command();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        change(&mut command);
        let child = command.spawn().unwrap();
        Daemon {
            process: Process(child),
            setup: self,
        }
    }

    /// Starts, and waits until all is enforced.
    pub fn start(self) -> Daemon<'a> {
        let mut daemon = self.spawn();
        daemon.wait_enforcing();
        daemon
    }
}

/// A child that ends when this is dropped.
struct Process(Child);

impl Process {
    fn signal(&self, signal: Signal) {
        // Not reaped yet, so the id is still its own.
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            self.signal(Signal::SIGTERM);
            let start = Instant::now();
            while let Ok(None) = self.0.try_wait() {
                if start.elapsed() > LONG {
                    let _ = self.0.kill();
                    let _ = self.0.wait();
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// A running daemon; stopped when dropped.
pub struct Daemon<'a> {
    process: Process,
    pub setup: Setup<'a>,
}

impl<'a> Daemon<'a> {
    fn wait_enforcing(&mut self) {
        wait_for("the daemon to enforce", LONG * 2, || {
            if let Some(status) = self.process.0.try_wait().unwrap() {
                panic!("the daemon ended ({status}):\n{}", self.log());
            }
            let status = self.try_status()?;
            (status["state"] == "enforcing").then_some(())
        });
    }

    /// What it said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.setup.directory.path().join("log")).unwrap_or_default()
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.process.0.try_wait().unwrap().is_some()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the daemon to end", LONG, || {
            self.process.0.try_wait().unwrap()
        })
    }

    /// SIGTERM, and the end. Its files stay.
    pub fn stop(mut self) -> (Setup<'a>, ExitStatus) {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        (self.setup, status)
    }

    /// SIGKILL. Its files stay.
    pub fn kill(mut self) -> Setup<'a> {
        self.signal(Signal::SIGKILL);
        self.wait();
        self.setup
    }

    /// Waits for its end with this code: its files, and what it said.
    pub fn refused(mut self, code: i32) -> (Setup<'a>, String) {
        let (status, log) = (self.wait(), self.log());
        assert_eq!(status.code(), Some(code), "{log}");
        (self.setup, log)
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// A verb that talks to this daemon.
    fn client(&self, verb: &str, arguments: &[&str]) -> Command {
        let mut command = command(None);
        command
            .arg(verb)
            .arg("--socket")
            .arg(self.setup.socket())
            .args(arguments);
        command
    }

    /// Runs a verb that talks to this daemon.
    pub fn ask(&self, verb: &str, arguments: &[&str]) -> Output {
        self.client(verb, arguments).output().unwrap()
    }

    /// `status -o json`, if there is somebody who answers.
    pub fn try_status(&self) -> Option<Value> {
        let output = self.ask("status", &["-o", "json"]);
        serde_json::from_slice(&output.stdout).ok()
    }

    /// `status -o json`.
    pub fn status(&self) -> Value {
        let output = self.ask("status", &["-o", "json"]);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            let said = String::from_utf8_lossy(&output.stderr);
            panic!("{error}: {said}\n{}", self.log())
        })
    }

    /// Generation of the policy in force.
    pub fn generation(&self) -> u64 {
        self.status()["generation"].as_u64().unwrap()
    }

    /// Replaces the policy and waits until the new one is in force.
    pub fn swap(&self, policy: &str) {
        let before = self.generation();
        self.setup.write(policy);
        self.wait_swapped(before);
    }

    /// Waits until another generation than `before` is in force.
    pub fn wait_swapped(&self, before: u64) {
        wait_for("the new policy", LONG, || {
            let status = self.status();
            (status["generation"] != before).then_some(())
        });
    }

    /// Sum of the packets of the counters that match; an empty word matches all.
    pub fn counted(&self, hook: &str, outcome: &str, reason: &str) -> u64 {
        let is = |word: &str, value: &Value| word.is_empty() || value == word;
        let status = self.status();
        let counters = status["counters"].as_array().unwrap();
        counters
            .iter()
            .filter(|c| {
                is(hook, &c["hook"]) && is(outcome, &c["outcome"]) && is(reason, &c["reason"])
            })
            .map(|c| c["packets"].as_u64().unwrap())
            .sum()
    }

    /// `denials -o json` with these arguments.
    pub fn denials(&self, arguments: &[&str]) -> Vec<Value> {
        let output = self.ask("denials", &[&["-o", "json"], arguments].concat());
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// `POST /v1/reload`: the status code and the answer, when the reload is over.
    pub fn reload(&self) -> (u16, Value) {
        let mut stream = UnixStream::connect(self.setup.socket()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
            .write_all(b"POST /v1/reload HTTP/1.1\r\nHost: enforcer\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let code = head.split(' ').nth(1).unwrap().parse().unwrap();
        (code, serde_json::from_str(body).unwrap())
    }

    /// Runs `denials -f -o json`. It is known to listen once it shows what `probe` causes.
    pub fn follow(&self, mut probe: impl FnMut()) -> Follow {
        let mut child = self
            .client("denials", &["-f", "-o", "json"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // Nobody listens any more when the test is over.
                let _ = sender.send((Instant::now(), line));
            }
        });
        let follow = Follow {
            _process: Process(child),
            lines,
        };
        wait_for("denials -f to listen", LONG, || {
            probe();
            follow.next(Duration::from_millis(50))
        });
        follow
    }
}

/// `denials -f -o json`, and when its lines came.
pub struct Follow {
    _process: Process,
    lines: mpsc::Receiver<(Instant, String)>,
}

impl Follow {
    /// The next line.
    pub fn next(&self, limit: Duration) -> Option<(Instant, Value)> {
        let (at, line) = self.lines.recv_timeout(limit).ok()?;
        Some((at, serde_json::from_str(&line).unwrap()))
    }

    /// The next line of which `is` is true.
    pub fn find(&self, is: impl Fn(&Value) -> bool) -> (Instant, Value) {
        let start = Instant::now();
        let mut others = Vec::new();
        while start.elapsed() < LONG {
            match self.next(Duration::from_millis(50)) {
                Some((at, line)) if is(&line) => return (at, line),
                Some((_, line)) => others.push(line),
                None => {}
            }
        }
        panic!("no such denial within {LONG:?}, but {others:#?}");
    }
}

/// The 1-based line of `text` that contains `part`.
pub fn line_of(text: &str, part: &str) -> usize {
    text.lines().position(|line| line.contains(part)).unwrap() + 1
}

/// Every broken example of the diagnostics tests, in order.
pub fn broken_examples() -> Vec<PathBuf> {
    // Policies with warnings only are taken.
    const TAKEN: [&str; 3] = [
        "interfaces-overlap.yaml",
        "no-segments.yaml",
        "warnings.yaml",
    ];
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../enforcer/tests/diagnostics");
    let mut files: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .filter(|path| !TAKEN.iter().any(|taken| path.ends_with(taken)))
        .collect();
    files.sort();
    files
}
