//! Floods of new flows: what becomes of established ones, and of honest newcomers.

use enforcer_tests::{line_rate::report::Report, load::flood};

/// Floods for half a minute, or for a few seconds.
pub fn run(options: &crate::Options, report: &mut Report) {
    let mut flooding = if options.quick {
        flood::Options::quick()
    } else {
        flood::Options::full()
    };
    flooding.real_time = std::env::var_os("ENFORCER_BENCH_REAL_TIME").is_some();
    let outcome = flood::run(&flooding);
    let group = "A flood of 65 536 new flows a second, shares of";
    for (seconds, share) in &outcome.alive {
        let name = format!("packets of established flows that found them, one each {seconds} s");
        report.figure(group, &name, "", *share);
    }
    let shares = [
        ("handshakes completed", outcome.handshakes),
        (
            "handshakes completed while one source completes its own",
            outcome.others,
        ),
        (
            "packets that found their flow then, one each second",
            outcome.others_alive,
        ),
    ];
    for (name, share) in shares {
        report.figure(group, name, "", share);
    }
    report.figure(group, "flows without an entry", "", outcome.refused as f64);
    report.ratio("flood_established_alive", outcome.worst_alive(), 0.0);
    report.ratio("flood_handshakes", outcome.handshakes, 0.0);
    report.ratio("flood_others", outcome.others, 0.0);
    if !flooding.real_time {
        report.note(format!(
            "flood: {} new flows a second while established ones were watched, so a second of \
             theirs was {:.2} s; handshakes at {:.0} and {:.0} a second",
            outcome.rate as u64,
            flood::RATE as f64 / outcome.rate,
            outcome.paced[0],
            outcome.paced[1],
        ));
    }
    for rate in outcome.paced {
        if rate < 0.95 * flood::RATE as f64 {
            report.note(format!(
                "flood: this machine kept up with {rate:.0} new flows a second only"
            ));
        }
    }
}
