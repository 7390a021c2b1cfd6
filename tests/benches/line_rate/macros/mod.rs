//! Part of the bench; see the top of `main.rs`. Packets through a gateway between two hosts, with
//! nothing, an empty program, the enforcer or nftables in the way; connections; floods.
//!
//! One CPU does all the work, from the sender's system call to the receiver's interface, which
//! drops what comes: a packet's time is the whole path's, and rates are rates of one CPU.

mod flood;

use std::{thread, time::Duration};

use anyhow::{Result, anyhow};
use enforcer_tests::{
    line_rate::{
        report::Report,
        stats::{Series, Summary},
    },
    load::{
        connection,
        measure::{CASES, Case, Fresh, Stage, Traffic, packets},
        policy::Shape,
        sender,
        subject::{Empty, Enforcer, Nftables, Nothing, Subject},
    },
    netns::Family,
};

use crate::Options;

/// Segments of the policies: the ratios are of the larger one.
const SMALL: u32 = 10;
const LARGE: u32 = 1_000;

/// The places of the subjects in a round.
const NOTHING: usize = 0;
const EMPTY: usize = 1;
const ENFORCER: usize = 2;
const NFTABLES: usize = 3;

/// Measures both policies, connections and floods.
pub fn run(options: &Options, report: &mut Report) -> Result<()> {
    // On a thread of its own: it keeps to one CPU, and before others.
    thread::scope(|scope| {
        let work = scope.spawn(|| {
            sender::settle();
            if !options.quick {
                wires(options, report, SMALL);
            }
            wires(options, report, LARGE);
            flood::run(options, report);
        });
        work.join()
            .map_err(|_| anyhow!("a step of the measurement failed, as said above"))
    })
}

fn wires(options: &Options, report: &mut Report, segments: u32) {
    let shape = Shape::new(segments);
    let policy = shape.policy();
    let subjects: [Box<dyn Subject>; 4] = [
        Box::new(Nothing),
        Box::new(Empty::load()),
        Box::new(Enforcer::load(&policy)),
        Box::new(Nftables::new(&policy)),
    ];
    let stages = subjects.map(Stage::new);
    let mut fresh = Fresh::new();
    for case in CASES {
        one_case(options, report, segments, &stages, shape, case, &mut fresh);
    }
    connections(options, report, segments, &stages);
}

fn one_case(
    options: &Options,
    report: &mut Report,
    segments: u32,
    stages: &[Stage],
    shape: Shape,
    case: Case,
    fresh: &mut Fresh,
) {
    let (rounds, windows) = if options.quick { (9, 6) } else { (21, 20) };
    // A round's value is the quicker quartile of some windows: nothing makes a packet cheaper than
    // it is, and others on the machine make many dearer.
    let mut times = vec![Vec::new(); stages.len()];
    let mut delivered = vec![Vec::new(); stages.len()];
    for _ in 0..rounds {
        let samples = packets(stages, shape, case, windows, fresh);
        for (at, mine) in samples.iter().enumerate() {
            let mut ns: Vec<f64> = mine.iter().map(|sample| sample.ns).collect();
            ns.sort_by(f64::total_cmp);
            times[at].push(ns[ns.len() / 4]);
            let came: f64 = mine.iter().map(|sample| sample.delivered).sum();
            delivered[at].push(came / mine.len() as f64);
        }
    }
    let series =
        |values: &[Vec<f64>]| -> Vec<Series> { values.iter().cloned().map(Series::new).collect() };
    let (times, delivered) = (series(&times), series(&delivered));
    let forwards = matches!(case.traffic, Traffic::Established(_) | Traffic::New);
    // Packets a second that came through, or that were dealt with, over another subject's.
    let over = |subject: usize, unit: usize| {
        let share = times[unit].over(&times[subject]);
        if forwards {
            share.times(&delivered[subject].over(&delivered[unit]))
        } else {
            share
        }
    };
    let added = |at: usize| times[at].minus(&times[NOTHING]);
    let title = title(case);
    let mut tell = |what: &str, unit: &str, subject: usize, summary: Summary| {
        let group = format!("{segments} segments: {what}");
        let name = format!("{}: {title}", stages[subject].name);
        report.measured(&group, &name, unit, summary);
    };
    for (subject, time) in times.iter().enumerate() {
        // In millions a second, of those that came through or were dealt with.
        let rate = Series::new(vec![1e3; rounds]).over(time);
        let rate = if forwards {
            rate.times(&delivered[subject])
        } else {
            rate
        };
        tell("packets", "M/s", subject, rate.summary());
        if subject != NOTHING {
            let share = over(subject, NOTHING).summary();
            tell("share of the packets with nothing", "share", subject, share);
            let added = added(subject).summary();
            tell("time of a packet above nothing", "ns", subject, added);
        }
    }
    let ratio = |report: &mut Report, name: &str, summary: Summary| {
        let small = if segments == LARGE { "" } else { "_small" };
        let name = format!("veth_{}{name}{small}", case.name);
        report.ratio(&name, summary.median, summary.spread);
    };
    ratio(report, "_vs_empty", over(ENFORCER, EMPTY).summary());
    ratio(report, "_vs_nft", over(ENFORCER, NFTABLES).summary());
    let added = added(ENFORCER).over(&added(NFTABLES)).summary();
    ratio(report, "_added_vs_nft", added);
    if (case.name, segments) == ("1k", LARGE) {
        report.ratio("veth_added_vs_nft", added.median, added.spread);
    }
    // Losses would make a subject look fast, and passes would make it look thorough.
    for (stage, delivered) in stages.iter().zip(&delivered) {
        let share = delivered.median();
        let passes = forwards || matches!(stage.name, "nothing" | "empty");
        let expected = if passes { 1.0 } else { 0.0 };
        if (share - expected).abs() > 0.001 {
            report.note(format!(
                "{segments} segments, {title}: {} delivered {share:.3} of the packets, not {expected}",
                stage.name
            ));
        }
    }
}

fn title(case: Case) -> String {
    let family = match case.family {
        Family::V4 => "",
        Family::V6 => ", IPv6",
    };
    let traffic = match case.traffic {
        Traffic::Established(1) => "one flow".to_owned(),
        Traffic::Established(count) => format!("{count} flows"),
        Traffic::New => "ever new flows".to_owned(),
        Traffic::DeniedAgain(count) => format!("{count} denied flows"),
        Traffic::DeniedNew => "ever new denied flows".to_owned(),
    };
    traffic + family
}

fn connections(options: &Options, report: &mut Report, segments: u32, stages: &[Stage]) {
    let (rounds, time) = if options.quick {
        (3, Duration::from_millis(150))
    } else {
        (7, Duration::from_millis(700))
    };
    let mut rates = vec![Vec::new(); stages.len()];
    for round in 0..rounds {
        for turn in 0..stages.len() {
            let at = (turn + round) % stages.len();
            let router = stages[at].router();
            rates[at].push(connection::throughput(router, Family::V4, time));
        }
    }
    let rates: Vec<Series> = rates.into_iter().map(Series::new).collect();
    for (at, stage) in stages.iter().enumerate() {
        let name = format!("{}: {segments} segments", stage.name);
        report.measured("One TCP connection", &name, "Gbit/s", rates[at].summary());
        if at != NOTHING {
            let share = rates[at].over(&rates[NOTHING]).summary();
            let group = "One TCP connection: share of the throughput with nothing";
            report.measured(group, &name, "share", share);
        }
    }
}
