//! `enforcer status`

use serde_json::json;

use crate::api::{
    changes::{Origin, OriginKind},
    client::{Client, ClientError},
    types::{CounterStatus, InterfaceState, InterfaceStatus, SettingsStatus, State, Status, Time},
};

use super::{
    Exit, Failure, Format, Globals, block_on,
    out::{Hue, Out, clean, count},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Form of the output.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

pub fn run(args: &Args, globals: &Globals, out: &mut Out) -> Result<Exit, Failure> {
    let client = Client::new(&globals.socket);
    let answer = block_on(async { Ok(client.status().await) })?;
    let status = match answer {
        Ok(status) => status,
        Err(error @ (ClientError::Unreachable { .. } | ClientError::Broken(_))) => {
            if args.output == Format::Json {
                // Programs get their answer in any case.
                let state = State::NotEnforcing;
                out.json(&json!({ "state": state, "error": error.to_string() }))?;
            }
            return Err(error.into());
        }
        Err(error) => return Err(error.into()),
    };
    match args.output {
        Format::Json => out.json(&status)?,
        Format::Text => text(&status, out)?,
    }
    Ok(match status.state {
        State::Enforcing => Exit::Fine,
        State::Degraded => Exit::Degraded,
        State::NotEnforcing => Exit::NotEnforcing,
    })
}

fn text(status: &Status, out: &mut Out) -> Result<(), Failure> {
    let hue = match status.state {
        State::Enforcing => Hue::Good,
        State::Degraded => Hue::Warn,
        State::NotEnforcing => Hue::Bad,
    };
    let word = status.state.name().replace('_', " ").to_uppercase();
    let word = out.paint(hue, &word);
    out.line(format!("{word}  {}", census(&status.interfaces, out)))?;
    for problem in &status.problems {
        let mark = out.paint(hue, "!");
        out.line(format!("  {mark} {}", clean(problem)))?;
    }
    for warning in &status.warnings {
        let mark = out.paint(Hue::Warn, "-");
        out.line(format!("  {mark} {}", clean(warning)))?;
    }
    let policy = &status.policy;
    section(out, "policy", &clean(&policy.path))?;
    field(out, "generation", &status.generation.to_string())?;
    field(out, "in force since", &when(policy.loaded_at))?;
    let size = format!(
        "{}, {}",
        count(policy.segments, "segment"),
        count(policy.rules, "rule")
    );
    field(out, "contents", &format!("{size}, hash {}", policy.hash))?;
    if let Some(origin) = &policy.origin {
        field(out, "from", &origin_text(origin))?;
    }
    if let Some(trial) = &status.trial {
        let deadline = trial.deadline.0.to_zoned(jiff::tz::TimeZone::system());
        let text = format!(
            "until {} ({} s left), then {} is in force again; `enforcer confirm` keeps it",
            deadline.strftime("%H:%M:%S %Z"),
            trial.remaining_ms.div_ceil(1_000),
            clean(&trial.previous)
        );
        field(out, "on trial", &out.paint(Hue::Warn, &text))?;
    }
    if let Some(shadow) = &status.shadow {
        let text = format!(
            "{}: {} would have fared otherwise; see `enforcer shadow`",
            clean(&shadow.path),
            match shadow.differing {
                1 => "1 packet".to_owned(),
                packets => format!("{packets} packets"),
            }
        );
        field(out, "shadow", &text)?;
    }
    let error = policy.last_error.as_deref().map(clean);
    field(out, "last error", error.as_deref().unwrap_or("none"))?;

    settings(&status.settings, out)?;

    section(out, "interfaces", "")?;
    for interface in &status.interfaces {
        let line = self::interface(interface, out);
        field(out, &clean(&interface.name), &line)?;
    }
    let mut hooks = status.socket_hooks.clone();
    if let Some(why) = &status.socket_hooks_reason {
        hooks.push_str(&format!(", not refuse: {}", clean(why)));
    }
    field(out, "socket hooks", &hooks)?;

    let (calls, packets): (Vec<_>, Vec<_>) = status.counters.iter().partition(|c| is_call(&c.hook));
    section(out, "packets", "")?;
    if packets.is_empty() {
        out.line("  none yet")?;
    }
    counters(&packets, out)?;
    if !calls.is_empty() {
        // Not packets: what a call is allowed, TC judges.
        section(out, "socket calls", "")?;
        counters(&calls, out)?;
    }
    let events = &status.events;
    section(out, "records of denied packets", "")?;
    field(out, "emitted", &events.emitted.to_string())?;
    field(out, "in a count", &events.suppressed.to_string())?;
    let lost = events.lost.to_string();
    let lost = match events.lost {
        0 => lost,
        _ => out.paint(Hue::Warn, &format!("{lost} (counted above, not described)")),
    };
    field(out, "lost", &lost)?;
    section(out, "daemon", "")?;
    let daemon = format!("{}, pid {}", status.version, status.pid);
    field(out, "version", &daemon)?;
    let pins = status.pins.as_deref().map(clean);
    let pins = pins.unwrap_or_else(|| "nowhere: enforcement ends with the daemon".to_owned());
    field(out, "pinned in", &pins)?;
    field(out, "up since", &when(status.started_at))?;
    Ok(())
}

/// How many interfaces are what.
fn census(interfaces: &[InterfaceStatus], out: &Out) -> String {
    let of = |state: InterfaceState, name: &str, hue: Option<Hue>| {
        let number = interfaces.iter().filter(|i| i.state == state).count();
        let text = format!("{number} {name}");
        match hue {
            _ if number == 0 => None,
            Some(hue) => Some(out.paint(hue, &text)),
            None => Some(text),
        }
    };
    let counts = [
        of(InterfaceState::Enforced, "enforced", None),
        of(InterfaceState::Failed, "failed", Some(Hue::Bad)),
        of(InterfaceState::Unprotected, "unprotected", Some(Hue::Warn)),
        of(InterfaceState::Exempt, "exempt", None),
    ];
    let counts: Vec<String> = counts.into_iter().flatten().collect();
    format!("interfaces: {}", counts.join(", "))
}

/// What becomes of its packets, and why.
fn interface(interface: &InterfaceStatus, out: &Out) -> String {
    let mut line = match interface.state {
        InterfaceState::Enforced => "enforced".to_owned(),
        InterfaceState::Exempt => out.paint(Hue::Dim, "exempt"),
        InterfaceState::Unprotected => out.paint(Hue::Warn, "UNPROTECTED"),
        InterfaceState::Failed => out.paint(Hue::Bad, "NOT ENFORCED"),
    };
    let why = match interface.state {
        InterfaceState::Failed => interface.error.as_deref(),
        InterfaceState::Enforced | InterfaceState::Exempt | InterfaceState::Unprotected => {
            interface.reason.as_deref()
        }
    };
    if let Some(why) = why {
        let joint = match interface.state {
            InterfaceState::Enforced => " by",
            InterfaceState::Exempt | InterfaceState::Unprotected | InterfaceState::Failed => ":",
        };
        line.push_str(&format!("{joint} {}", clean(why)));
    }
    if let Some(description) = &interface.description {
        line.push_str(&format!("  ({})", clean(description)));
    }
    line
}

/// Where the policy in force came from.
fn origin_text(origin: &Origin) -> String {
    let by = origin
        .by
        .as_ref()
        .map(|by| format!(" by {}", clean(&by.to_string())));
    let by = by.unwrap_or_default();
    let state = origin
        .state
        .map_or(String::new(), |state| format!(" {state}"));
    let mut text = match origin.kind {
        OriginKind::Watched => "the watched files".to_owned(),
        OriginKind::Applied => format!("applied{by}, {}", when(origin.at)),
        OriginKind::RolledBack => format!("rolled back to state{state}{by}, {}", when(origin.at)),
        OriginKind::LastGood => "the last good state: the watched files cannot be used".to_owned(),
        OriginKind::PassAll => "built in: no policy was ever confirmed".to_owned(),
    };
    if let Some(change) = origin.change {
        text.push_str(&format!(" (change {change})"));
    }
    if origin.differs == Some(true) {
        text.push_str("; the watched files say something else");
    }
    text
}

/// The socket hooks count system calls.
fn is_call(hook: &str) -> bool {
    matches!(hook, "connect" | "sendmsg")
}

fn counters(counters: &[&CounterStatus], out: &mut Out) -> Result<(), Failure> {
    for counter in counters {
        let outcome = counter.outcome.replace('_', " ");
        let what = match counter.reason.as_str() {
            "deferred" => "left to the interfaces".to_owned(),
            reason => format!("{outcome} ({reason})"),
        };
        let line = format!(
            "  {:<12} {:<28} {:>14}",
            counter.hook, what, counter.packets
        );
        let hue = match counter.outcome.as_str() {
            "denied" => Hue::Bad,
            "would_deny" => Hue::Warn,
            _ => Hue::Strong,
        };
        out.line(if hue_matters(hue) {
            out.paint(hue, &line)
        } else {
            line
        })?;
    }
    Ok(())
}

fn settings(settings: &SettingsStatus, out: &mut Out) -> Result<(), Failure> {
    let path = settings.path.as_deref().map(clean);
    section(out, "settings", path.as_deref().unwrap_or("(defaults)"))?;
    if settings.failsafes.is_empty() {
        field(out, "failsafe", "none")?;
    }
    for failsafe in &settings.failsafes {
        let mut text = format!(
            "{}: {} from {}",
            clean(&failsafe.name),
            failsafe.ports.join(", "),
            failsafe.sources.join(", ")
        );
        if !failsafe.interfaces.is_empty() {
            let interfaces: Vec<_> = failsafe.interfaces.iter().map(|i| clean(i)).collect();
            text.push_str(&format!(" at {}", interfaces.join(", ")));
        }
        field(out, "failsafe", &text)?;
    }
    if !settings.essentials_off.is_empty() {
        let off = out.paint(Hue::Warn, &settings.essentials_off.join(", "));
        field(out, "essentials off", &off)?;
    }
    if !settings.ethertypes.is_empty() {
        field(out, "ethertypes", &settings.ethertypes.join(", "))?;
    }
    Ok(())
}

fn hue_matters(hue: Hue) -> bool {
    matches!(hue, Hue::Bad | Hue::Warn)
}

fn section(out: &mut Out, title: &str, rest: &str) -> std::io::Result<()> {
    let title = out.paint(Hue::Strong, title);
    let line = format!("{title} {rest}");
    out.line(line.trim_end())
}

fn field(out: &mut Out, label: &str, value: &str) -> std::io::Result<()> {
    let label = out.paint(Hue::Dim, &format!("{label:<15}"));
    out.line(format!("  {label} {value}"))
}

/// Local time, and how long ago: nobody subtracts at night.
fn when(time: Time) -> String {
    let seconds = jiff::Timestamp::now()
        .duration_since(time.0)
        .as_secs()
        .max(0);
    let ago = match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    };
    let local = time.0.to_zoned(jiff::tz::TimeZone::system());
    format!("{} ({ago} ago)", local.strftime("%Y-%m-%d %H:%M:%S %Z"))
}
