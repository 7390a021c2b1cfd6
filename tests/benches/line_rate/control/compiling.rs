//! From texts to an image.

use std::{sync::Arc, time::Instant};

use anyhow::{Result, ensure};
use enforcer::{
    compile::{self, Image, Options as Settings},
    daemon::{files::Texts, load},
    policy::{Cache, SourceFile, model::Environment},
};
use enforcer_tests::{
    big,
    line_rate::{report::Report, stats::Series},
};

use super::{HOSPITAL, shapes};
use crate::Options;

/// A policy of one file.
pub fn hospital() -> Vec<SourceFile> {
    vec![SourceFile {
        name: "hospital.yaml".to_owned(),
        text: HOSPITAL.to_owned(),
    }]
}

pub fn run(options: &Options, report: &mut Report) -> Result<()> {
    let rounds = if options.quick { 3 } else { 7 };
    measure("segments/hospital.yaml", hospital(), rounds, report)?;
    for (name, shape) in shapes(options) {
        let rounds = if shape == big::LARGE { 3 } else { rounds };
        let seconds = measure(name, big::policy(shape), rounds, report)?;
        if shape == big::LARGE {
            let summary = seconds.summary();
            report.ratio("compile_large_s", summary.median, summary.spread);
        }
    }
    Ok(())
}

/// Seconds for parsing, testing, compiling and validating: what `enforcer check` does.
fn measure(
    name: &str,
    files: Vec<SourceFile>,
    rounds: usize,
    report: &mut Report,
) -> Result<Series> {
    let files = Arc::new(files);
    let environment = Environment::default();
    let (mut parsing, mut compiling, mut validating) = (Vec::new(), Vec::new(), Vec::new());
    let mut whole = Vec::new();
    let mut words = 0;
    for _ in 0..rounds {
        let start = Instant::now();
        let texts = Texts {
            policy: Arc::clone(&files),
            settings: None,
        };
        let loaded =
            load::compile(texts, &environment).map_err(|e| anyhow::anyhow!(e.summary()))?;
        whole.push(start.elapsed().as_secs_f64());
        words = loaded.image.words().len();
        drop(loaded);

        let start = Instant::now();
        let outcome = Cache::default().parse(&files);
        let policy = outcome.map_err(|e| anyhow::anyhow!("{e:?}"))?.policy;
        parsing.push(start.elapsed().as_secs_f64() * 1e3);
        let start = Instant::now();
        let image: Image = compile::compile(&policy, &environment, &Settings::default())?;
        compiling.push(start.elapsed().as_secs_f64() * 1e3);
        let start = Instant::now();
        compile::validate(&policy, &environment, &image)?;
        validating.push(start.elapsed().as_secs_f64() * 1e3);
    }
    ensure!(words > 0, "no image");
    let group = "Compile";
    for (what, values) in [
        ("parse", parsing),
        ("compile", compiling),
        ("validate", validating),
    ] {
        let summary = Series::new(values).summary();
        report.measured(group, &format!("{name}: {what}"), "ms", summary);
    }
    let whole = Series::new(whole);
    report.measured(
        group,
        &format!("{name}: all of `check`"),
        "s",
        whole.summary(),
    );
    let mib = words as f64 * 4.0 / f64::from(1 << 20);
    report.figure(group, &format!("{name}: image"), "MiB", mib);
    Ok(whole)
}
