//! `enforcer denials`

use std::net::IpAddr;

use jiff::{civil::Date, tz::TimeZone};

use crate::api::{
    client::{Client, ClientError, DenialsQuery},
    types::{
        Default as DenyDefault, Denial, Lost, LostCause, Peer, Record, Tampered, Time, Verdict,
    },
};
use crate::poll::Closed;

use super::{
    Exit, Failure, Format, Globals, block_on,
    out::{Hue, Out, clean},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Go on with what comes. Alone, it shows only what comes.
    #[arg(short, long)]
    follow: bool,
    /// Show at most so many of the kept ones (default: all, up to 10 000).
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// Only from this segment (`unsegmented`: none) or address.
    #[arg(long, value_name = "SEGMENT|IP")]
    from: Option<Peer>,
    /// Only to this segment or address.
    #[arg(long, value_name = "SEGMENT|IP")]
    to: Option<Peer>,
    /// Form of the output; JSON is one object a line.
    #[arg(short, long, default_value = "text")]
    output: Format,
}

pub fn run(args: &Args, globals: &Globals, out: &mut Out) -> Result<Exit, Failure> {
    let client = Client::new(&globals.socket);
    let query = DenialsQuery {
        last: args.last.or(args.follow.then_some(0)),
        from: args.from.clone(),
        to: args.to.clone(),
        follow: args.follow,
    };
    block_on(async {
        let mut records = client.denials(&query).await?;
        let zone = TimeZone::system();
        let closed = Closed::new(&std::io::stdout());
        loop {
            let next = tokio::select! {
                next = records.next() => next,
                // `denials -f | head -1` must not wait for a second denial.
                () = closed.wait() => return Ok(Exit::Fine),
            };
            let record = match next {
                Ok(Some(record)) => record,
                Ok(None) => break,
                // It does not say good-bye to followers.
                Err(ClientError::Broken(_)) if args.follow => break,
                Err(error) => return Err(error.into()),
            };
            match args.output {
                Format::Json => out.json_line(&record)?,
                Format::Text => {
                    let today = jiff::Timestamp::now().to_zoned(zone.clone()).date();
                    let line = line(&record, out, &zone, today);
                    out.line(line)?;
                }
            }
            // Waiting for more must not hold back what is here.
            if !records.is_ready() {
                out.flush()?;
            }
        }
        if args.follow {
            return Err(Failure::new(Exit::NotEnforcing, "the enforcer has stopped"));
        }
        Ok(Exit::Fine)
    })
}

fn line(record: &Record, out: &Out, zone: &TimeZone, today: Date) -> String {
    match record {
        Record::Denial(denial) => denied(denial, out, zone, today),
        Record::Lost(lost) => gap(lost, out, zone, today),
        Record::Tampered(tampered) => changed(tampered, out, zone, today),
    }
}

fn gap(lost: &Lost, out: &Out, zone: &TimeZone, today: Date) -> String {
    let what = match lost.cause {
        LostCause::RingBufferFull => "(ring buffer full); the packets are counted: enforcer status",
        LostCause::SlowReader => "(this reader was too slow)",
        LostCause::Store => "(older than what the daemon keeps)",
    };
    let time = clock(lost.time, zone, today);
    let word = out.paint(Hue::Warn, "LOST");
    format!("{time} {word}  {} events {what}", lost.events)
}

fn changed(tampered: &Tampered, out: &Out, zone: &TimeZone, today: Date) -> String {
    let time = clock(tampered.time, zone, today);
    let (hue, end) = match tampered.repaired {
        true => (Hue::Warn, "; it is as it was again"),
        false => (Hue::Bad, ", and cannot be put right"),
    };
    let word = out.paint(hue, "TAMPER");
    format!("{time} {word}  {} {}{end}", tampered.target, tampered.what)
}

fn denied(denial: &Denial, out: &Out, zone: &TimeZone, today: Date) -> String {
    let hue = match denial.verdict {
        Verdict::Denied => Hue::Bad,
        Verdict::WouldDeny => Hue::Warn,
    };
    let mut line = format!(
        "{} {}  {}",
        clock(denial.time, zone, today),
        out.paint(hue, denial.verdict.name()),
        flow(denial),
    );
    line.push_str("  ");
    line.push_str(&denial.direction);
    if let Some(interface) = &denial.interface {
        line.push(' ');
        line.push_str(&clean(interface));
    }
    line.push_str("  ");
    line.push_str(&because(denial));
    if let (Some(file), Some(number)) = (&denial.file, denial.line) {
        line.push_str(&format!("  {}:{number}", clean(file)));
    }
    if let Some(process) = &denial.process {
        line.push_str(&format!(
            "  pid {} ({}) uid {} {}",
            process.pid,
            clean(&process.comm),
            process.uid,
            clean(&process.cgroup),
        ));
    }
    if denial.packets > 1 {
        line.push_str(&format!("  ×{}", denial.packets));
    }
    line
}

/// The date is shown when it is not today's.
fn clock(time: Time, zone: &TimeZone, today: Date) -> String {
    let local = time.0.to_zoned(zone.clone());
    let format = if local.date() == today {
        "%H:%M:%S%.3f"
    } else {
        "%Y-%m-%d %H:%M:%S%.3f"
    };
    local.strftime(format).to_string()
}

fn flow(denial: &Denial) -> String {
    let mut flow = match (denial.src, denial.dst) {
        (Some(src), Some(dst)) => format!(
            "{} -> {} {}",
            end(&denial.from_segments, src, denial.src_port),
            end(&denial.to_segments, dst, denial.dst_port),
            denial.protocol
        ),
        _ => denial.protocol.clone(),
    };
    if let Some(flags) = &denial.tcp_flags {
        flow.push(' ');
        flow.push_str(flags);
    }
    match (denial.icmp_type, denial.icmp_code) {
        (Some(kind), Some(0) | None) => flow.push_str(&format!(" type {kind}")),
        (Some(kind), Some(code)) => flow.push_str(&format!(" type {kind} code {code}")),
        (None, _) => {}
    }
    flow
}

fn end(segments: &[std::sync::Arc<str>], ip: IpAddr, port: Option<u16>) -> String {
    let address = match (ip, port) {
        (ip, None) => ip.to_string(),
        (IpAddr::V4(ip), Some(port)) => format!("{ip}:{port}"),
        (IpAddr::V6(ip), Some(port)) => format!("[{ip}]:{port}"),
    };
    if segments.is_empty() {
        return address;
    }
    format!("{} {address}", segments.join(","))
}

fn because(denial: &Denial) -> String {
    let guard = match &denial.default {
        Some(DenyDefault::Segment { name, protects }) => format!("({name} protects {protects})"),
        Some(DenyDefault::Unsegmented) => "(unsegmented)".to_owned(),
        Some(DenyDefault::Gone(text)) => format!("({})", clean(text)),
        None => String::new(),
    };
    let judged = match &denial.rule {
        Some(rule) => format!("rule {} (deny)", clean(rule)),
        None => format!("default deny {guard}").trim_end().to_owned(),
    };
    match denial.reason.as_str() {
        // No SYN was seen, so nobody knows who opened the session: an operator who writes a rule
        // from this line must not take the sender for the client.
        "default_deny" | "rule_deny" | "unsegmented" if mid_stream(denial) => {
            format!("{judged} (mid-stream: either end may have opened it)")
        }
        "default_deny" | "rule_deny" | "unsegmented" => judged,
        "revoked" => format!("revoked: {judged}"),
        form => {
            let form = form.replace('_', " ");
            let what = match &denial.detail {
                Some(detail) => format!("{form}: {}", clean(detail)),
                None => form,
            };
            format!("{what} {guard}").trim_end().to_owned()
        }
    }
}

/// Whether the packet belongs to a session that was running before it was judged.
fn mid_stream(denial: &Denial) -> bool {
    let flags = denial.tcp_flags.as_deref().unwrap_or_default();
    flags.contains("ACK") && !flags.contains("SYN")
}

#[cfg(test)]
mod tests {
    use enforcer_common::{image::EMPTY, verdict::Reason, wire::Event};

    use super::*;
    use crate::{
        api::types::LostVerdict,
        cli::Color,
        events::enrich::tests::{denial, event},
    };

    fn text(record: &Record) -> String {
        let time = jiff::civil::date(2026, 3, 4).at(12, 4, 31, 207_000_000);
        let mut record = record.clone();
        let at = Time(time.to_zoned(TimeZone::UTC).unwrap().timestamp());
        match &mut record {
            Record::Denial(denial) => denial.time = at,
            Record::Lost(lost) => lost.time = at,
            Record::Tampered(tampered) => tampered.time = at,
        }
        let out = Out::new(Color::Never);
        line(&record, &out, &TimeZone::UTC, time.date())
    }

    fn denied_text(event: &Event) -> String {
        text(&Record::Denial(Box::new(denial(event))))
    }

    #[test]
    fn a_line_says_it_all() {
        assert_eq!(
            denied_text(&event()),
            "12:04:31.207 DENIED  guest-wifi 10.99.3.4:51514 -> ehr-db 10.10.1.5:5432 tcp SYN  \
             ingress gw-guest  default deny (ehr-db protects inbound)  hospital.yaml:8  ×14"
        );
    }

    #[test]
    fn reasons_read_as_sentences() {
        let revoked = denied_text(&Event {
            rule: 0,
            segment: EMPTY,
            reason: Reason::Revoked as u8,
            ..event()
        });
        assert!(revoked.contains("  revoked: rule guests-out (deny)  hospital.yaml:20  "));
        let running = denied_text(&Event {
            tcp_flags: 0x18,
            ..event()
        });
        assert!(
            running
                .contains("(ehr-db protects inbound) (mid-stream: either end may have opened it)"),
            "{running}"
        );
        let form = denied_text(&Event {
            reason: Reason::NoFlow as u8,
            ..event()
        });
        assert!(form.contains("  no flow (ehr-db protects inbound)  hospital.yaml:8"));
        let unread = denied_text(&Event {
            family: 0,
            ethertype: 0x88cc,
            tcp_flags: 0,
            protocol: 0,
            segment: EMPTY,
            reason: Reason::Ethertype as u8,
            ..event()
        });
        assert!(unread.ends_with("DENIED  ethertype/0x88cc  ingress gw-guest  ethertype  ×14"));
    }

    #[test]
    fn a_reason_that_needs_words_has_them() {
        let said = |reason: &str, detail: Option<&str>| {
            text(&Record::Denial(Box::new(Denial {
                reason: reason.to_owned(),
                detail: detail.map(str::to_owned),
                ..denial(&event())
            })))
        };
        let spoofed = said("spoofed", Some("source belongs to segment lab-devices"));
        assert!(
            spoofed.contains(
                "  spoofed: source belongs to segment lab-devices (ehr-db protects inbound)  "
            ),
            "{spoofed}"
        );
        let unknown = said("of_tomorrow", None);
        assert!(
            unknown.contains("  of tomorrow (ehr-db protects inbound)  "),
            "{unknown}"
        );
    }

    #[test]
    fn names_of_processes_cannot_drive_the_terminal() {
        let mut comm = [0; 16];
        comm[..5].copy_from_slice(b"\x1b[2Jx");
        let line = denied_text(&Event {
            process: enforcer_common::wire::Process {
                pid: 7,
                comm,
                ..Default::default()
            },
            ..event()
        });
        assert!(line.contains("pid 7 (\u{fffd}[2Jx) uid 0 id 0"), "{line}");
    }

    #[test]
    fn gaps_are_lines_too() {
        let lost = Record::Lost(Lost {
            time: Time::now(),
            verdict: LostVerdict::Lost,
            cause: LostCause::RingBufferFull,
            events: 312,
        });
        assert!(text(&lost).starts_with("12:04:31.207 LOST  312 events (ring buffer full)"));
        let evicted = Record::Lost(Lost {
            time: Time::now(),
            verdict: LostVerdict::Lost,
            cause: LostCause::Store,
            events: 5,
        });
        assert!(text(&evicted).ends_with("LOST  5 events (older than what the daemon keeps)"));
    }
}
