//! What systemd is told (`sd_notify(3)`): that everything is enforced, that a reload begins and
//! ends, that the daemon is alive, that it stops. Without `NOTIFY_SOCKET` nobody is told anything.
//!
//! Written here and not taken from a crate: one datagram for each message, over a socket that is
//! opened once.

use std::{
    env,
    ffi::{OsStr, OsString},
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::time::{ClockId, clock_gettime};

use super::state::{Board, Live, problems};

/// A service manager that does not read holds nobody up for longer.
const PATIENCE: Duration = Duration::from_secs(1);
/// More interfaces than this are counted, not named.
const NAMED: usize = 4;

/// The service manager, if there is one.
#[derive(Debug, Default)]
pub struct Notify {
    manager: Option<Manager>,
    /// How long systemd waits for a sign of life.
    watchdog: Option<Duration>,
    said: Mutex<Said>,
}

#[derive(Debug)]
struct Manager {
    socket: UnixDatagram,
    address: SocketAddr,
}

#[derive(Debug, Default)]
struct Said {
    ready: bool,
    reloading: bool,
    status: String,
    alive: Option<Instant>,
    /// Why no sign of life was given, when it was not.
    silent: Option<String>,
    failed: bool,
}

impl Notify {
    /// As the environment says: `NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID`. The daemon starts
    /// no programs that would inherit them.
    pub fn from_env() -> Self {
        let own =
            env::var("WATCHDOG_PID").map_or(true, |pid| pid == std::process::id().to_string());
        let watchdog = env::var_os("WATCHDOG_USEC").filter(|_| own);
        Self::new(env::var_os("NOTIFY_SOCKET"), watchdog)
    }

    fn new(socket: Option<OsString>, watchdog: Option<OsString>) -> Self {
        let manager = socket.filter(|s| !s.is_empty()).and_then(|socket| {
            Manager::at(&socket)
                .inspect_err(|error| {
                    let socket = socket.to_string_lossy();
                    tracing::warn!(%error, %socket, "cannot tell the service manager anything");
                })
                .ok()
        });
        let watchdog = watchdog.and_then(|usec| {
            let usec = usec.to_str()?.parse().ok()?;
            (usec > 0).then_some(Duration::from_micros(usec))
        });
        Self {
            watchdog: watchdog.filter(|_| manager.is_some()),
            manager,
            said: Mutex::default(),
        }
    }

    /// Says what the daemon is at.
    pub fn status(&self, status: &str) {
        let mut said = self.said();
        if said.status != status {
            status.clone_into(&mut said.status);
            self.send(&mut said, &format!("STATUS={status}"));
        }
    }

    /// Says how things are. `serves`: the start is over, and the control socket answers; from then
    /// on the daemon is ready as soon as no interface that exists is without its programs. One that
    /// does not exist is not waited for: nothing passes through it, and the network that makes it
    /// may itself wait for the daemon.
    pub fn report(&self, board: &Board, live: &Live, serves: bool) {
        let status = summary(board, live);
        let is_open = |i: &crate::api::types::InterfaceStatus| !i.enforced && i.ifindex != 0;
        let mut said = self.said();
        if serves && !said.ready && !board.interfaces.iter().any(is_open) {
            said.ready = true;
            said.status.clone_from(&status);
            self.send(&mut said, &format!("STATUS={status}\nREADY=1"));
            return;
        }
        drop(said);
        self.status(&status);
    }

    /// Somebody has asked for a reload.
    pub fn reloading(&self) {
        let mut said = self.said();
        if !said.ready {
            return;
        }
        said.reloading = true;
        // systemd tells by it which of several requests this is about.
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from);
        let now = now.unwrap_or_default().as_micros();
        self.send(&mut said, &format!("RELOADING=1\nMONOTONIC_USEC={now}"));
    }

    /// What was asked for is done, for better or worse: the status says which.
    pub fn reloaded(&self, board: &Board, live: &Live) {
        let mut said = self.said();
        if std::mem::take(&mut said.reloading) {
            said.status = summary(board, live);
            let message = format!("STATUS={}\nREADY=1", said.status);
            self.send(&mut said, &message);
        }
    }

    /// The daemon is about to end.
    pub fn stopping(&self) {
        let mut said = self.said();
        self.send(&mut said, "STOPPING=1\nSTATUS=stopping");
    }

    /// Gives a sign of life when one is due, unless `wrong` finds a reason not to. It is told in which
    /// time others must have given theirs. Called by the task that must not hang, and by nobody else.
    pub fn alive(&self, wrong: impl FnOnce(Duration) -> Option<String>) {
        let Some(watchdog) = self.watchdog else {
            return;
        };
        let mut said = self.said();
        if said.alive.is_some_and(|at| at.elapsed() < watchdog / 3) {
            return;
        }
        let wrong = wrong(watchdog / 2);
        match &wrong {
            None => {
                said.alive = Some(Instant::now());
                self.send(&mut said, "WATCHDOG=1");
            }
            Some(why) if said.silent.as_ref() != Some(why) => {
                tracing::error!("no sign of life to the watchdog: {why}");
            }
            Some(_) => {}
        }
        said.silent = wrong;
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, said: &mut Said, message: &str) {
        let Some(manager) = &self.manager else {
            return;
        };
        let sent = manager
            .socket
            .send_to_addr(message.as_bytes(), &manager.address);
        if let Err(error) = &sent
            && !said.failed
        {
            tracing::warn!(%error, "cannot tell the service manager");
        }
        said.failed = sent.is_err();
    }
}

impl Manager {
    /// A path, or `@` and a name.
    fn at(socket: &OsStr) -> io::Result<Self> {
        let address = match socket.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(socket)?,
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket, address })
    }
}

/// One line about everything.
fn summary(board: &Board, live: &Live) -> String {
    let enforced: Vec<&str> = board
        .interfaces
        .iter()
        .filter(|i| i.enforced)
        .map(|i| i.name.as_str())
        .collect();
    let places = match enforced.len() {
        0 => "nothing".to_owned(),
        count if count > NAMED => format!("{count} interfaces"),
        _ => enforced.join(", "),
    };
    let (policy, generation) = (&live.policy, live.image.generation());
    let what = if live.known {
        let (segments, rules) = (policy.segments.len(), policy.rules.len());
        format!("{segments} segments, {rules} rules, generation {generation}")
    } else {
        format!("generation {generation}, of an earlier start")
    };
    let mut summary = format!("enforcing on {places}: {what}");
    let problems = problems(board);
    if let Some(first) = problems.first() {
        summary += &format!("; {first}");
    }
    if problems.len() > 1 {
        summary += &format!("; and {} more, see enforcer status", problems.len() - 1);
    }
    // A line is a message.
    summary.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(watchdog: Option<&str>) -> (UnixDatagram, Notify, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_nonblocking(true).unwrap();
        let notify = Notify::new(Some(path.into()), watchdog.map(Into::into));
        (manager, notify, directory)
    }

    fn heard(manager: &UnixDatagram) -> Option<String> {
        let mut buffer = [0; 4096];
        let length = manager.recv(&mut buffer).ok()?;
        Some(String::from_utf8(buffer[..length].to_vec()).unwrap())
    }

    #[test]
    fn a_status_is_said_once() {
        let (manager, notify, _directory) = pair(None);
        notify.status("loading");
        notify.status("loading");
        assert_eq!(heard(&manager).as_deref(), Some("STATUS=loading"));
        assert_eq!(heard(&manager), None);
        notify.stopping();
        assert_eq!(heard(&manager).unwrap(), "STOPPING=1\nSTATUS=stopping");
    }

    #[test]
    fn abstract_sockets_are_names_and_others_are_refused() {
        let name = format!("enforcer-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        Notify::new(Some(format!("@{name}").into()), None).status("x");
        assert_eq!(heard(&manager).as_deref(), Some("STATUS=x"));
        let none = Notify::new(Some("vsock:2:1".into()), Some("1000".into()));
        assert!(none.manager.is_none() && none.watchdog.is_none());
        none.status("nobody hears this");
    }

    #[test]
    fn signs_of_life_come_when_due_and_never_against_the_evidence() {
        let (manager, notify, _directory) = pair(Some("300000"));
        notify.alive(|_| Some("the reader hangs".to_owned()));
        assert_eq!(heard(&manager), None);
        notify.alive(|within| {
            assert_eq!(within, Duration::from_millis(150));
            None
        });
        assert_eq!(heard(&manager).as_deref(), Some("WATCHDOG=1"));
        notify.alive(|_| panic!("not due, so nobody is asked"));
        let start = Instant::now();
        while heard(&manager).is_none() {
            assert!(start.elapsed() < Duration::from_secs(10));
            notify.alive(|_| None);
        }
        assert!(start.elapsed() > Duration::from_millis(50));
        let (manager, notify, _directory) = pair(None);
        notify.alive(|_| panic!("nobody watches"));
        assert_eq!(heard(&manager), None);
    }

    #[test]
    fn no_reload_ends_that_was_not_begun() {
        let (manager, notify, _directory) = pair(None);
        // Before the daemon is ready systemd would take READY=1 for the start's end.
        notify.reloading();
        assert_eq!(heard(&manager), None);
    }
}
