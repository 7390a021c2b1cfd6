//! The daemon as it is deployed: start, memory, and a change of one member.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use enforcer::policy::SourceFile;
use enforcer_tests::{
    big,
    daemon::{Daemon, Setup},
    line_rate::{report::Report, stats::Series},
    netns::{Family, Routed},
    traffic,
};

use super::{compiling::hospital, shapes};
use crate::Options;

const PORT: u16 = 7001;
/// Between two datagrams of the probe.
const EACH: Duration = Duration::from_micros(500);
/// Beyond what a loaded machine takes for the largest policy.
const LONG: Duration = Duration::from_secs(120);

/// A segment that one host may reach as soon as it is a member of another.
const PROBE: &str = "version: 1
segments:
  probe-b: { members: [{cidr: \"fd02::/64\"}] }
  probe-a:
    members:
      - cidr: \"fd03::/64\"
rules:
  - {name: probe, from: [probe-a], to: [probe-b], services: [udp/7001]}
";
const MEMBER: &str = "      - cidr: \"fd01::2/128\"\n";

pub fn run(options: &Options, report: &mut Report) -> Result<()> {
    let rounds = if options.quick { 3 } else { 9 };
    let small = measure("segments/hospital.yaml", &hospital(), rounds, report)?;
    report.ratio("rss_small_mib", small.resident, 0.0);
    for (name, shape) in shapes(options) {
        let measured = measure(name, &big::policy(shape), rounds, report)?;
        let summary = measured.change.summary();
        if shape == big::MEDIUM {
            report.ratio("member_change_ms", summary.median, summary.spread);
        }
        if shape == big::LARGE {
            report.ratio("rss_large_mib", measured.resident, 0.0);
            report.ratio("member_change_large_ms", summary.median, summary.spread);
        }
    }
    Ok(())
}

struct Measured {
    /// MiB.
    resident: f64,
    /// Milliseconds.
    change: Series,
}

fn measure(
    name: &str,
    files: &[SourceFile],
    rounds: usize,
    report: &mut Report,
) -> Result<Measured> {
    let net = Routed::new();
    let to = SocketAddr::from((Family::V6.address(2, 2), PORT));
    let receiver = traffic::udp(&net.b, to, Duration::from_millis(20));
    let any = SocketAddr::from((traffic::unspecified(to.ip()), 0));
    let sender = traffic::udp(&net.a, any, LONG);
    let setup = Setup::new(&net.gateway, "gw-*", PROBE);
    for file in files {
        fs::write(setup.segments().join(&file.name), &file.text)?;
    }
    let stop = AtomicBool::new(false);
    let seen = Seen {
        origin: Instant::now(),
        last: AtomicU64::new(0),
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut bytes = [0; 16];
            while !stop.load(Ordering::Relaxed) {
                if receiver.recv(&mut bytes).is_ok() {
                    seen.note();
                }
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Errors about earlier ones come back here.
                let _ = sender.send_to(b"probe", to);
                thread::sleep(EACH);
            }
        });
        let measured = probed(name, setup, &seen, rounds, report);
        stop.store(true, Ordering::Relaxed);
        measured
    })
}

fn probed(
    name: &str,
    setup: Setup<'_>,
    seen: &Seen,
    rounds: usize,
    report: &mut Report,
) -> Result<Measured> {
    seen.after(seen.origin).context("before the start")?;
    let start = Instant::now();
    let daemon = setup.start();
    let up = start.elapsed();
    let silent = seen.until(start)?;
    let group = "Daemon";
    report.figure(
        group,
        &format!("{name}: start to first verdict"),
        "ms",
        silent * 1e3,
    );
    report.figure(
        group,
        &format!("{name}: start to all enforced"),
        "ms",
        up.as_secs_f64() * 1e3,
    );
    let process = process(&daemon)?;
    let resident = resident(&process)?;
    report.figure(group, &format!("{name}: resident"), "MiB", resident);
    report.figure(
        group,
        &format!("{name}: kernel's maps but the image"),
        "MiB",
        maps(&process)?,
    );

    let mut changes = Vec::new();
    for _ in 0..rounds {
        let with = PROBE.replace("fd03::/64\"\n", &format!("fd03::/64\"\n{MEMBER}"));
        let edited = Instant::now();
        daemon.setup.write(&with);
        changes.push(seen.after(edited)?.duration_since(edited).as_secs_f64() * 1e3);
        let edited = Instant::now();
        daemon.setup.write(PROBE);
        seen.until(edited)?;
    }
    let change = Series::new(changes);
    report.measured(
        group,
        &format!("{name}: a member to effect"),
        "ms",
        change.summary(),
    );
    let after = self::resident(&process)?;
    report.figure(
        group,
        &format!("{name}: resident after changes"),
        "MiB",
        after,
    );
    Ok(Measured { resident, change })
}

/// When the last datagram came.
struct Seen {
    origin: Instant,
    /// Nanoseconds.
    last: AtomicU64,
}

impl Seen {
    fn note(&self) {
        let now = u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    fn last(&self) -> Instant {
        self.origin + Duration::from_nanos(self.last.load(Ordering::Relaxed))
    }

    /// When one has come after `start`: the first, as far as two are [`EACH`] apart.
    fn after(&self, start: Instant) -> Result<Instant> {
        while start.elapsed() < LONG {
            let last = self.last();
            if last > start {
                return Ok(last);
            }
            thread::sleep(EACH / 4);
        }
        bail!("nothing came")
    }

    /// Seconds from `start` to the last one, once a fifth of a second has passed without any.
    fn until(&self, start: Instant) -> Result<f64> {
        while self.last().max(start).elapsed() < Duration::from_millis(200) {
            if start.elapsed() > LONG {
                bail!("datagrams go on");
            }
            thread::sleep(EACH);
        }
        Ok(self.last().saturating_duration_since(start).as_secs_f64())
    }
}

/// The daemon's directory in /proc.
fn process(daemon: &Daemon<'_>) -> Result<String> {
    let pid = daemon.status()["pid"].as_u64().context("no pid")?;
    Ok(format!("/proc/{pid}"))
}

fn resident(process: &str) -> Result<f64> {
    let status = fs::read_to_string(Path::new(process).join("status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    let kib: f64 = kib.context("no VmRSS")?.parse()?;
    Ok(kib / 1024.0)
}

/// Memory of the maps that the daemon holds, as the kernel counts it. The image is held by another
/// map alone; it takes its size class, and twice that while it is swapped.
fn maps(process: &str) -> Result<f64> {
    let mut seen = std::collections::BTreeMap::new();
    for entry in fs::read_dir(Path::new(process).join("fdinfo"))? {
        // Closed meanwhile.
        let Ok(text) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        let value = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key))?;
            line.trim().parse::<u64>().ok()
        };
        if let (Some(id), Some(bytes)) = (value("map_id:"), value("memlock:")) {
            seen.insert(id, bytes);
        }
    }
    let bytes: u64 = seen.values().sum();
    Ok(bytes as f64 / f64::from(1 << 20))
}
