//! A hospital on one machine: real sockets, the real enforcer, and a policy that is edited live.

mod attempts;
mod daemon;
mod servers;
mod session;
mod topology;

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};

use self::attempts::{Outcome, TABLE, Verdict};
use self::daemon::Denials;
use self::session::Session;
use crate::ui::{self, Paint};
use crate::{build, env};

/// What `cargo xtask demo` was asked for.
#[derive(clap::Args)]
pub struct Options {
    /// Leave everything running at the end, and say how to look around
    #[arg(long)]
    keep: bool,
    /// No colour, even on a terminal
    #[arg(long)]
    no_color: bool,
    /// Only remove what an earlier run left behind or kept
    #[arg(long)]
    clean: bool,
    /// Run the servers (the demo starts itself with this)
    #[arg(long, hide = true)]
    serve: bool,
    /// An enforcer that was built already (the demo passes this through sudo)
    #[arg(long, hide = true)]
    binary: Option<PathBuf>,
}

/// Held while things are made or removed, so that Ctrl-C never removes half of a making.
static LIFE: Mutex<()> = Mutex::new(());

/// Runs the demo; an error when anything went another way than the policy says.
pub fn run(options: &Options) -> Result<()> {
    if options.serve {
        return servers::run();
    }
    let binary = match &options.binary {
        Some(binary) => binary.clone(),
        None if options.clean => PathBuf::new(),
        // As the user, before any sudo: nothing in the target directory becomes root's.
        None => {
            crate::setup::ensure()?;
            build::binary(false)?
        }
    };
    if !env::is_root() {
        return go_on_as_root(options, &binary);
    }

    let lock = File::create("/run/enforcer-demo.lock").context("cannot write below /run")?;
    if lock.try_lock().is_err() {
        bail!("another demo is running on this machine");
    }
    clean_on_signals()?;
    let found = clean()?;
    if options.clean {
        ui::step(if found {
            "Removed what was left of the demo"
        } else {
            "Nothing to remove"
        });
        return Ok(());
    }
    if found {
        ui::note("removed what an earlier run left behind");
    }

    let mut guard = CleanUp { keep: false };
    let paint = Paint::stdout(options.no_color);
    let result = play(&binary, options.keep, paint);
    if options.keep {
        guard.keep = true;
        look_around(&binary);
    }
    drop(guard);
    result
}

/// The demo itself, on a clean machine and as root.
fn play(binary: &Path, keep: bool, paint: Paint) -> Result<()> {
    ui::step("A hospital: database, application, lab, guest and internet around a gateway");
    {
        let _making = LIFE.lock().unwrap_or_else(PoisonError::into_inner);
        // Whatever the user's is: nobody else may write what is made here.
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
        fs::create_dir_all(daemon::DIR)?;
        copy_segments()?;
        topology::create()?;
        daemon::start_servers(keep)?;
    }
    try_without(paint)?;
    ui::step("The enforcer starts on the gateway, with segments/hospital.yaml");
    {
        let _making = LIFE.lock().unwrap_or_else(PoisonError::into_inner);
        daemon::start_enforcer(binary, keep)?;
    }
    let denials = Denials::follow(binary)?;
    let attempts = try_everything(&denials, paint)?;
    let revocation = revoke_live(binary, &denials, paint)?;
    println!();
    if attempts && revocation {
        println!("{}", paint.green("All of it went as the policy says."));
        return Ok(());
    }
    bail!("something went another way than the policy says (the lines marked ✗)")
}

/// Without the enforcer everything must get through, or silence later on would prove nothing.
fn try_without(paint: Paint) -> Result<()> {
    let open = TABLE.map(|attempt| attempts::Attempt {
        expected: Verdict::Allow,
        ..attempt
    });
    let outcomes = attempts::run(&open)?;
    for (attempt, outcome) in open.iter().zip(&outcomes) {
        if !attempt.went_as_expected(outcome) {
            bail!(
                "the network of the demo is broken: {} to {}, {} over {}: {outcome}",
                attempt.from,
                attempt.to.name,
                attempt.service,
                attempt.family
            );
        }
    }
    println!(
        "  {}  without the enforcer, all {} attempts get through",
        mark(true, paint),
        open.len()
    );
    Ok(())
}

/// The table of attempts, then the denials as `enforcer denials -f` printed them.
fn try_everything(denials: &Denials, paint: Paint) -> Result<bool> {
    ui::step(&format!("{} attempts with real sockets", TABLE.len()));
    let start = Instant::now();
    let outcomes = attempts::run(&TABLE)?;
    println!();
    let heading = format!(
        "     {:<13} {:<13} {:<5} {:<9} {:<7} {}",
        "who", "whom", "over", "service", "policy", "what happened"
    );
    println!("{}", paint.bold(&heading));
    let mut good = 0;
    for (attempt, outcome) in TABLE.iter().zip(&outcomes) {
        let ok = attempt.went_as_expected(outcome);
        good += usize::from(ok);
        let (verdict, mark) = (
            format!("{:<7}", attempt.expected.to_string()),
            mark(ok, paint),
        );
        let verdict = match attempt.expected {
            Verdict::Allow => paint.green(&verdict),
            Verdict::Deny => paint.red(&verdict),
        };
        println!(
            "  {mark}  {:<13} {:<13} {:<5} {:<9} {verdict} {outcome}",
            attempt.from, attempt.to.name, attempt.family, attempt.service
        );
    }
    println!(
        "\n  {good} of {} as the policy says, in {}",
        TABLE.len(),
        ui::took(start)
    );

    println!("\n{}", paint.bold("enforcer denials -f"));
    let denied: Vec<_> = TABLE
        .iter()
        .filter(|one| one.expected == Verdict::Deny)
        .collect();
    let reported = |lines: &[String]| -> Result<usize> {
        let mut count = 0;
        for attempt in &denied {
            for line in lines {
                if attempt.is_reported_by(line)? {
                    count += 1;
                    break;
                }
            }
        }
        Ok(count)
    };
    session::wait(Duration::from_secs(2), || {
        reported(&denials.lines()).is_ok_and(|count| count == denied.len())
    });
    let lines = denials.lines();
    for line in &lines {
        println!("  {line}");
    }
    let seen = reported(&lines)?;
    let ok = seen == denied.len();
    println!(
        "\n  {}  {seen} of {} denied attempts are reported",
        mark(ok, paint),
        denied.len()
    );
    let faults: Vec<_> = outcomes
        .iter()
        .filter(|outcome| matches!(outcome, Outcome::Failed(_)))
        .collect();
    if !faults.is_empty() {
        ui::note("attempts failed for reasons of their own: the network of the demo is broken");
    }
    Ok(good == TABLE.len() && ok)
}

/// Cuts a live session by an edit of the policy, then lets it go on.
fn revoke_live(binary: &Path, denials: &Denials, paint: Paint) -> Result<bool> {
    const LIMIT: Duration = Duration::from_secs(15);
    ui::step("A rule is revoked while a session that it admits is alive");
    let file = daemon::segments().join("hospital.yaml");
    let policy = fs::read_to_string(&file)?;
    let revoked = session::revoke(&policy).context("hospital.yaml has no rule app-to-db")?;

    let mut good = true;
    let mut say = |ok: bool, text: String| {
        good &= ok;
        println!("  {}  {text}", mark(ok, paint));
    };
    println!();
    let open = Instant::now();
    let live = Session::open();
    let Ok(live) = live else {
        say(
            false,
            "ehr-app could not open a session with ehr-db tcp/5432".into(),
        );
        return Ok(good);
    };
    std::thread::sleep(Duration::from_secs(1));
    let (last, answers) = live.last();
    say(
        last > open && answers > 1,
        format!("ehr-app talks to ehr-db: {answers} answers in 1 s"),
    );

    let before = denials.lines().len();
    let edit = Instant::now();
    replace(&file, &revoked)?;
    println!(
        "     {} is edited: the rule app-to-db is commented out",
        file.display()
    );
    let silent = live.falls_silent_within(LIMIT);
    let (last, _) = live.last();
    let after = last.saturating_duration_since(edit).as_millis();
    say(
        silent,
        if silent {
            format!("the session is cut: its last answer came {after} ms after the edit")
        } else {
            format!(
                "the session still talks {} s after the edit",
                LIMIT.as_secs()
            )
        },
    );
    let news = || {
        denials
            .lines()
            .into_iter()
            .skip(before)
            .find(|line| line.contains("revoked"))
    };
    session::wait(Duration::from_secs(3), || news().is_some());
    match news() {
        Some(line) => say(true, format!("reported: {line}")),
        None => say(false, "no denial says that it was revoked".into()),
    }
    if !silent {
        check_copy(binary);
    }

    let edit = Instant::now();
    replace(&file, &policy)?;
    println!("     the rule is put back");
    let resumed = live.answers_after(edit, LIMIT);
    let after = live.last().0.saturating_duration_since(edit).as_millis();
    say(
        resumed,
        if resumed {
            format!("the same session goes on, {after} ms after the edit (TCP sends again)")
        } else {
            "the session does not go on".into()
        },
    );
    Ok(good)
}

/// When an edit had no effect: what the enforcer says of the file.
fn check_copy(binary: &Path) {
    let output = std::process::Command::new(binary)
        .arg("check")
        .arg(daemon::segments())
        .output();
    if let Ok(output) = output
        && !output.status.success()
    {
        ui::note(&String::from_utf8_lossy(
            &[output.stdout, output.stderr].concat(),
        ));
    }
    ui::note(&daemon::said());
}

fn mark(ok: bool, paint: Paint) -> String {
    if ok {
        paint.green("✓")
    } else {
        paint.red("✗")
    }
}

/// Replaces by rename: a reader sees the old text or the new one.
fn replace(file: &Path, text: &str) -> Result<()> {
    let partial = file.with_extension("new");
    fs::write(&partial, text)?;
    fs::rename(&partial, file).with_context(|| format!("cannot write {}", file.display()))
}

fn copy_segments() -> Result<()> {
    let to = daemon::segments();
    fs::create_dir_all(&to)?;
    // That one file: others in the directory are examples of other places.
    let from = env::root().join("segments/hospital.yaml");
    // Its text, not its mode: the enforcer takes no file that others may write.
    let text = fs::read_to_string(&from);
    let text = text.with_context(|| format!("cannot read {}", from.display()))?;
    fs::write(to.join("hospital.yaml"), text)?;
    Ok(())
}

fn look_around(binary: &Path) {
    let (enforcer, socket) = (binary.display(), daemon::socket());
    let socket = socket.display();
    let guest = topology::path(topology::GUEST.name);
    println!(
        "\nLeft running. As root:\n  \
         {enforcer} status --socket {socket}\n  \
         {enforcer} denials -f --socket {socket}\n  \
         nsenter --net={} bash -c 'exec 3<>/dev/tcp/10.10.1.5/5432'   # the guest tries\n  \
         edit {}   # the daemon reloads\n  \
         tail -f {}\nStop it: cargo xtask demo --clean",
        guest.display(),
        daemon::segments().join("hospital.yaml").display(),
        daemon::log().display(),
    );
}

/// Removes processes, namespaces and files, of this run or an earlier one. True if any were there.
fn clean() -> Result<bool> {
    let _removing = LIFE.lock().unwrap_or_else(PoisonError::into_inner);
    let processes = daemon::stop_all()?;
    let namespaces = topology::delete()?;
    let files = Path::new(daemon::DIR).exists();
    if files {
        fs::remove_dir_all(daemon::DIR)?;
    }
    Ok(processes > 0 || namespaces > 0 || files)
}

/// Cleans up on every way out but a kill.
struct CleanUp {
    keep: bool,
}

impl Drop for CleanUp {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = clean()
        {
            ui::note(&format!(
                "could not clean up: {error:#}; try cargo xtask demo --clean"
            ));
        }
    }
}

/// Ctrl-C and the like: clean up, then end with the usual code.
fn clean_on_signals() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    // Before any thread exists: all inherit the mask, so the signal comes to the waiting thread.
    signals.thread_block()?;
    std::thread::spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        ui::note("stopping: cleaning up");
        if let Err(error) = clean() {
            ui::note(&format!(
                "could not clean up: {error:#}; try cargo xtask demo --clean"
            ));
        }
        std::process::exit(128 + signal as i32);
    });
    Ok(())
}

fn go_on_as_root(options: &Options, binary: &Path) -> Result<()> {
    let program = std::env::current_exe()?;
    let mut command = env::as_root("the demo", "/usr/bin/env")?;
    command.arg(program).arg("demo");
    if !options.clean {
        command.arg("--binary").arg(binary);
    }
    for (on, flag) in [
        (options.keep, "--keep"),
        (options.no_color, "--no-color"),
        (options.clean, "--clean"),
    ] {
        if on {
            command.arg(flag);
        }
    }
    Err(command.exec()).context("cannot run sudo")
}
