//! `enforcer run`

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::ValueEnum;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use tracing_subscriber::EnvFilter;

use crate::{
    api::{DEFAULT_SOCKET, DEFAULT_VIEW_SOCKET},
    daemon::{
        self, Config, Ended, RunError, ViewSocket,
        files::SettingsPath,
        guard::Trust,
        netlink,
        preflight::preflight,
        selection::{Selection, Selector, exemption},
    },
    dataplane::{
        SocketHooks,
        flows::DEFAULT_FLOWS,
        kernel::{DEFAULT_PINS, Keep},
    },
};

use super::{
    DEFAULT_SETTINGS, DEFAULT_STATE, Exit, Failure, Globals, Kernel, Open, apply::trial_time, out,
};

const CONFIG_HELP: &str = "Settings of the daemon: essentials, ethertypes, failsafes (default: \
/etc/enforcer/enforcer.yaml, if it exists)";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Policy: a directory (every *.yaml and *.yml in it) or one file.
    #[arg(long, value_name = "PATH")]
    segments: PathBuf,
    /// The daemon's own settings: essentials, ethertypes, failsafes.
    #[arg(long, value_name = "PATH", help = CONFIG_HELP)]
    config: Option<PathBuf>,
    /// Socket for those who may only ask (default: /run/enforcer-view/view.sock, unless --socket is
    /// given).
    #[arg(long, value_name = "PATH")]
    view_socket: Option<PathBuf>,
    /// Where the history, the last states and the image to begin with are kept (default:
    /// /var/lib/enforcer, unless --socket is given).
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Put a policy that was not in force before on trial: without `enforcer confirm` within this
    /// time the kernel goes back to what was, the first time to letting everything pass.
    #[arg(long, value_name = "TIME", value_parser = trial_time, overrides_with = "confirm_within")]
    confirm_within: Option<Duration>,
    /// Take files of policy and settings that are symbolic links, if root owns the links and where
    /// they lead is as safe: Kubernetes mounts ConfigMaps so.
    #[arg(long)]
    follow_links: bool,
    /// Interfaces to enforce on: names, with `*` and `?` as globs; `kind:veth` and other kinds;
    /// `default-route`. Those that appear later are enforced, too.
    #[arg(long, value_name = "IF", required = true, value_delimiter = ',')]
    pub interface: Vec<Selector>,
    /// Interfaces to leave alone though --interface means them: names, globs, kinds.
    #[arg(long, value_name = "IF", value_delimiter = ',', value_parser = exemption)]
    exempt: Vec<Selector>,
    /// Form of the log, which goes to stderr; ENFORCER_LOG sets its level.
    #[arg(long, value_name = "FORM", default_value = "text")]
    log_format: LogFormat,
    /// What connect(2) and sendmsg(2) meet when no local source address would pass.
    #[arg(long, value_name = "MODE", default_value = "refuse")]
    socket_hooks: Hooks,
    /// Flows that the kernel remembers, of IPv4 and of IPv6 each; rounded up to a power of two.
    /// 64 bytes each for IPv4, 128 for IPv6.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_FLOWS,
        value_parser = clap::value_parser!(u32).range(2048..=1 << 24))]
    flows: u32,
    /// Where programs, maps and links are pinned, in a BPF file system: they go on enforcing when the
    /// daemon ends, and the next one adopts them.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_PINS)]
    pins: PathBuf,
    /// Pin nothing: enforcement ends with the daemon, however that ends.
    #[arg(long, conflicts_with = "pins")]
    ephemeral: bool,
    /// Load the kernel programs anew even if the pinned ones are of this build.
    #[arg(long)]
    reload_programs: bool,
    /// Print the kernel programs' rare debug messages.
    #[arg(long)]
    kernel_debug: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Hooks {
    /// EPERM at once (if every interface is enforced; else as `observe`).
    Refuse,
    /// Nothing, but denials name the process.
    Observe,
    /// Nothing at all.
    Off,
}

pub fn run(args: &Args, globals: &Globals, open: Open) -> Result<Exit, Failure> {
    let color = out::wanted(globals.color, io::stderr().is_terminal());
    start_log(args.log_format, color);
    let socket_hooks = match args.socket_hooks {
        Hooks::Refuse => SocketHooks::Refuse,
        Hooks::Observe => SocketHooks::Observe,
        Hooks::Off => SocketHooks::Off,
    };
    let interfaces = Selection {
        wanted: args.interface.clone(),
        exempt: args.exempt.clone(),
    };
    refuse_loopback(&interfaces)?;
    if let Some((name, exempt)) = interfaces.contradiction() {
        return Err(Failure::new(
            Exit::Usage,
            format!(
                "--interface {name} and --exempt {exempt}: is it to be enforced or not?\n  \
                 help: leave one of them out"
            ),
        ));
    }
    preflight(socket_hooks).map_err(|missing| {
        let all: Vec<_> = missing.iter().map(ToString::to_string).collect();
        Failure::new(Exit::Environment, all.join("\nerror: "))
    })?;
    let config = Config {
        segments: args.segments.clone(),
        settings: Some(SettingsPath {
            path: args.config.clone().unwrap_or(DEFAULT_SETTINGS.into()),
            required: args.config.is_some(),
        }),
        trust: Trust::Owner {
            links: args.follow_links,
        },
        interfaces,
        socket: globals.socket.clone(),
        view_socket: view_socket(args, globals),
        socket_hooks,
        state_dir: state_dir(args, globals),
        confirm_within: args.confirm_within,
    };
    let kernel = Kernel {
        keep: if args.ephemeral {
            Keep::Ephemeral
        } else {
            Keep::Pinned(args.pins.clone())
        },
        flows: args.flows,
        debug: args.kernel_debug,
        anew: args.reload_programs,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Exit::Environment, format!("cannot start a runtime: {e}")))?;
    let result = runtime.block_on(async {
        let (reload, stop) = signals().map_err(|source| RunError::System {
            what: "cannot handle signals",
            source,
        })?;
        daemon::run(config, move |words| open(&kernel, words), reload, stop).await
    });
    // Not `drop`, which would wait for a compiler at work.
    runtime.shutdown_background();
    match result {
        Ok(Ended::Stopped) => Ok(Exit::Fine),
        // Not an end like others: a service manager must not start it again.
        Ok(Ended::Detached) => Ok(Exit::NotEnforcing),
        Err(RunError::Policy(rejected)) => {
            let _ = io::stderr().write_all(rejected.render(color).as_bytes());
            Err(Failure::new(
                Exit::Policy,
                format!("{}; nothing is enforced", rejected.headline()),
            ))
        }
        Err(
            error @ (RunError::Socket(_)
            | RunError::Dataplane(_)
            | RunError::Interface { .. }
            | RunError::System { .. }),
        ) => Err(Failure::new(Exit::Environment, error.to_string())),
    }
}

/// One that listens elsewhere, as in a test, must not meet another at the default place.
fn view_socket(args: &Args, globals: &Globals) -> Option<ViewSocket> {
    let default = globals.socket == Path::new(DEFAULT_SOCKET);
    let path = args.view_socket.clone();
    let path = path.or_else(|| default.then(|| DEFAULT_VIEW_SOCKET.into()))?;
    Some(ViewSocket {
        path,
        required: args.view_socket.is_some(),
    })
}

/// One that listens elsewhere, as in a test, must not meet another's history.
fn state_dir(args: &Args, globals: &Globals) -> Option<PathBuf> {
    let default = globals.socket == Path::new(DEFAULT_SOCKET);
    let directory = args.state_dir.clone();
    directory.or_else(|| default.then(|| DEFAULT_STATE.into()))
}

/// A host is not cut off from itself: what it says to itself is not judged.
fn refuse_loopback(interfaces: &Selection) -> Result<(), Failure> {
    // When links cannot be listed the daemon says so itself.
    let links = netlink::links().unwrap_or_default();
    let loopback = links
        .iter()
        .filter(|link| link.loopback)
        .find(|link| interfaces.literals().any(|name| name == link.name));
    match loopback {
        None => Ok(()),
        Some(link) => Err(Failure::new(
            Exit::Usage,
            format!(
                "--interface {}: this is the loopback; traffic of the host to itself is not judged\n  \
                 help: name the interfaces that lead to other hosts",
                link.name
            ),
        )),
    }
}

fn start_log(format: LogFormat, color: bool) {
    let filter = EnvFilter::try_from_env("ENFORCER_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Log)
        .log_internal_errors(false)
        .with_target(false)
        .with_ansi(color);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).with_ansi(false).init(),
    }
}

/// Standard error, whether anybody reads it or not: a closed terminal or a log collector that died
/// must not end enforcement.
struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// SIGHUP on one channel, SIGTERM and SIGINT on the other. Must be called on a runtime.
fn signals() -> io::Result<(mpsc::Receiver<()>, watch::Receiver<bool>)> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (reload, reloads) = mpsc::channel(1);
    let (stop, stops) = watch::channel(false);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = hangup.recv() => {
                    // Full: a reload is due anyway.
                    let _ = reload.try_send(());
                }
                _ = terminate.recv() => {
                    stop.send_replace(true);
                }
                _ = interrupt.recv() => {
                    stop.send_replace(true);
                }
            }
        }
    });
    Ok((reloads, stops))
}
