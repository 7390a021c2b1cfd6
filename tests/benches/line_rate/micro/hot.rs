//! One frame again and again: everything is in the caches.

use anyhow::Result;
use enforcer_common::verdict::Reason;

use super::{
    Bench, allows,
    frames::Family,
    group,
    rounds::{Runner, measure},
    subject::Subject,
    units,
};

/// Measures both families.
pub fn run(bench: &mut Bench<'_>, subject: &Subject) -> Result<()> {
    let lru40 = units::lru_hit(40, 1)?;
    let lru16 = units::lru_hit(16, 1)?;
    let empty = bench.empty.again()?;
    for family in Family::BOTH {
        let name = family.name();
        let request = family.request();
        let [first, later] = family.fragments();
        let denied = family.denied();
        let error = family.error();
        let message = family.message_of_client();
        for frame in [&request, &family.reply(), &first] {
            subject.program.run(frame, 1)?;
        }
        let packets = bench.packets;
        let cases = [
            ("established", Reason::Established, &request),
            ("later fragment", Reason::Established, &later),
            ("ICMP error about a flow", Reason::Related, &error),
            ("the long way, no flow", Reason::RuleAllow, &message),
            ("denied, repeated", Reason::DefaultDeny, &denied),
        ];
        let mut holds = vec![];
        for (what, reason, frame) in cases {
            let what = format!("{name}: {what}");
            holds.push(bench.holds(&what, subject, reason, &subject.program, frame, 1_000)?);
        }
        let run = |frame| Runner::new(&subject.program, frame, packets);
        let frames = cases.map(|(_, _, frame)| run(frame));
        let [a, b, c, d, e] = frames;
        allows(&subject.verdict, &request)?;
        let [base, verdict, a, b, c, d, e, hit40, base40, hit16, base16] = measure(
            bench.rounds,
            [
                Runner::new(&empty, &request, packets),
                Runner::new(&subject.verdict, &request, packets),
                a,
                b,
                c,
                d,
                e,
                Runner::new(&lru40.subject, &request, packets),
                Runner::new(&lru40.baseline, &request, packets),
                Runner::new(&lru16.subject, &request, packets),
                Runner::new(&lru16.baseline, &request, packets),
            ],
        )?;
        let costs = [a, b, c, d, e].map(|series| series.minus(&base));
        let verdict = verdict.minus(&base);
        bench.nanoseconds(group::HOT, &format!("{name}: verdict"), &verdict);
        for (((what, ..), cost), holds) in cases.iter().zip(&costs).zip(&holds) {
            if *holds {
                bench.nanoseconds(group::HOT, &format!("{name}: {what}"), cost);
            }
        }
        if holds.contains(&false) {
            continue;
        }
        let hit = hit40.minus(&base40);
        let [hot, .., denied] = costs;
        if family == Family::V4 {
            bench.nanoseconds(group::HOT, "LRU hash hit, 40-byte key", &hit);
            let hit16 = hit16.minus(&base16);
            bench.nanoseconds(group::HOT, "LRU hash hit, 16-byte key", &hit16);
            bench.ratio("established_hot_vs_lru", &hot, &hit);
            bench.ratio("denied_repeated_vs_lru", &denied, &hit);
            bench.ratio("decide_vs_lru", &verdict, &hit);
            let decide = verdict.summary();
            bench
                .report
                .ratio("decide_ns", decide.median, decide.spread);
        }
    }
    // Both families in the same rounds, for the ratio.
    let [v4, v6] = Family::BOTH.map(Family::request);
    let packets = bench.packets;
    let [base, v4, v6] = measure(
        bench.rounds,
        [
            Runner::new(&empty, &v4, packets),
            Runner::new(&subject.program, &v4, packets),
            Runner::new(&subject.program, &v6, packets),
        ],
    )?;
    bench.ratio(
        "ipv6_vs_ipv4_established",
        &v6.minus(&base),
        &v4.minus(&base),
    );
    Ok(())
}
