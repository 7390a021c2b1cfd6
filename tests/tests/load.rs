//! What the measurements of load rest on.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use enforcer_tests::load::{
    measure::{CASES, Fresh, Stage, median, packets},
    policy::Shape,
    sender,
    subject::{Empty, Enforcer, Nftables, Nothing, Subject},
};

#[test]
fn experiment() {
    sender::settle();
    let segments: u32 = std::env::var("SEG").unwrap().parse().unwrap();
    let rounds: usize = std::env::var("ROUNDS").unwrap().parse().unwrap();
    let only = std::env::var("CASE").unwrap_or_default();
    let shape = Shape::new(segments);
    let policy = shape.policy();
    let subjects: Vec<Box<dyn Subject>> = vec![
        Box::new(Nothing),
        Box::new(Nothing),
        Box::new(Empty::load()),
        Box::new(Enforcer::load(&policy)),
        Box::new(Nftables::new(&policy)),
    ];
    let stages: Vec<Stage> = subjects.into_iter().map(Stage::new).collect();
    let mut fresh = Fresh::new();
    for case in CASES {
        if !case.name.contains(&only) {
            continue;
        }
        let start = std::time::Instant::now();
        let samples = packets(&stages, shape, case, rounds, &mut fresh);
        println!("{} {:?}", case.name, start.elapsed());
        for (stage, mine) in stages.iter().zip(&samples) {
            let mut ns: Vec<f64> = mine.iter().map(|s| s.ns).collect();
            let mut share: Vec<f64> = samples[0]
                .iter()
                .zip(mine)
                .map(|(n, m)| n.ns / m.ns)
                .collect();
            let delivered = mine.iter().map(|s| s.delivered).sum::<f64>() / rounds as f64;
            let middle = median(&mut share);
            println!(
                "  {:10} {:8.1} ns min {:.0}; share {middle:.3} ({:.3}-{:.3}) delivered {delivered:.4}",
                stage.name,
                median(&mut ns),
                ns[0],
                share[rounds / 4],
                share[rounds * 3 / 4]
            );
        }
    }
}

#[test]
fn flood_experiment() {
    let options = if std::env::var("FULL").is_ok() {
        enforcer_tests::load::flood::Options::full()
    } else {
        enforcer_tests::load::flood::Options::quick()
    };
    let start = std::time::Instant::now();
    println!(
        "{:?} {:?}",
        enforcer_tests::load::flood::run(&options),
        start.elapsed()
    );
}
