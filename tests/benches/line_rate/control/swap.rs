//! From the update call to the last packet under the old policy.

use std::{
    os::fd::AsFd as _,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use enforcer::{
    compile::{self, Image, Options as Settings},
    policy::{SourceFile, model::Environment, parse},
};
use enforcer_common::image::SIZE_CLASSES;
use enforcer_tests::{
    big, frame,
    kernel::{Programs, generation},
    line_rate::{bpf::Program, report::Report, stats::Series},
    netns::Family,
};

use super::{compiling::hospital, shapes};
use crate::Options;

const PORT: u16 = 7001;

/// The policy with a host beside it that one other host may reach, or may not.
fn image(files: &[SourceFile], open: bool) -> Result<Image> {
    let port = if open { PORT } else { PORT + 1 };
    let text = format!(
        "version: 1\nsegments:\n  probe-a: {{ members: [{{cidr: \"fd01::2/128\"}}] }}\n  \
         probe-b: {{ members: [{{cidr: \"fd02::2/128\"}}] }}\n\
         rules:\n  - {{name: probe, from: [probe-a], to: [probe-b], services: [udp/{port}]}}\n"
    );
    let name = "probe.yaml".to_owned();
    let files = [files, &[SourceFile { name, text }]].concat();
    let policy = parse(&files).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    let settings = Settings {
        generation: generation(),
        ..Settings::default()
    };
    Ok(compile::compile(
        &policy,
        &Environment::default(),
        &settings,
    )?)
}

pub fn run(options: &Options, report: &mut Report) -> Result<()> {
    let rounds = if options.quick { 10 } else { 40 };
    measure("segments/hospital.yaml", &hospital(), rounds, report)?;
    for (name, shape) in shapes(options) {
        let longest = measure(name, &big::policy(shape), rounds, report)?;
        if shape == big::LARGE {
            report.ratio("swap_large_ms", longest, 0.0);
        }
    }
    Ok(())
}

/// Milliseconds until the last packet under the old policy, in the longest of all swaps.
fn measure(name: &str, files: &[SourceFile], rounds: usize, report: &mut Report) -> Result<f64> {
    let images = [image(files, true)?, image(files, false)?];
    let words = images[0].words().len().saturating_mul(2);
    let class = SIZE_CLASSES
        .into_iter()
        .find(|class| *class as usize >= words);
    let class = class.unwrap_or_else(|| images[0].size_class());
    let mut programs = Programs::load(class as usize);
    let program = programs
        .dataplane
        .program("tc_ingress")
        .context("no tc_ingress")?;
    let program = Program::of(program.fd()?.as_fd().try_clone_to_owned()?);
    let probe = frame::frame(
        Family::V6.address(1, 2),
        Family::V6.address(2, 2),
        17,
        &frame::udp(1024, PORT),
    );
    programs.apply(&images[0]);
    let open = program.run(&probe, 1)?.action;
    programs.apply(&images[1]);
    let shut = program.run(&probe, 1)?.action;
    ensure!(open != shut, "the probe is not judged");

    let (mut writes, mut swaps) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let (image, old) = if round % 2 == 0 {
            (&images[0], shut)
        } else {
            (&images[1], open)
        };
        let image = image.clone().with_generation(generation());
        let start = Instant::now();
        let written = programs.dataplane.write_image(&image)?;
        writes.push(start.elapsed().as_secs_f64() * 1e3);
        let (stop, last) = (AtomicBool::new(false), Mutex::new(Ok(Instant::now())));
        let begun = AtomicBool::new(false);
        let call = thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let ran = program.run(&probe, 1);
                    begun.store(true, Ordering::Relaxed);
                    let seen = match ran {
                        Ok(ran) if ran.action == old => Ok(Instant::now()),
                        Ok(_) => continue,
                        Err(error) => Err(error),
                    };
                    *last.lock().unwrap_or_else(|e| e.into_inner()) = seen;
                }
            });
            while !begun.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            let call = Instant::now();
            let live = programs.dataplane.make_live(&written);
            stop.store(true, Ordering::Relaxed);
            live.map(|()| call)
        })?;
        let last = last.into_inner().unwrap_or_else(|e| e.into_inner())?;
        swaps.push(last.saturating_duration_since(call).as_secs_f64() * 1e3);
    }
    let group = "Swap";
    let longest = swaps.iter().copied().fold(0.0, f64::max);
    report.measured(
        group,
        &format!("{name}: written"),
        "ms",
        Series::new(writes).summary(),
    );
    report.figure(
        group,
        &format!("{name}: last packet under the old policy"),
        "ms",
        longest,
    );
    Ok(longest)
}
