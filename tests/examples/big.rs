//! Parses and compiles a large policy, or writes it to a directory:
//! `big SEGMENTS RULES MEMBERS [DIRECTORY]`. Times and memory go to standard output.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a tool for measuring"
)]

use std::{fs, path::Path, sync::Arc, time::Instant};

use enforcer::{
    compile::{self, Options},
    policy::{Cache, model::Environment},
};
use enforcer_tests::big::{self, Shape};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments[at].parse().unwrap();
    let shape = Shape {
        segments: number(0),
        rules: number(1),
        members: number(2),
    };
    let files = big::policy(shape);
    let bytes: usize = files.iter().map(|file| file.text.len()).sum();
    println!("{} files, {bytes} bytes", files.len());
    if let Some(directory) = arguments.get(3) {
        fs::create_dir_all(directory).unwrap();
        for file in &files {
            fs::write(Path::new(directory).join(&file.name), &file.text).unwrap();
        }
        return;
    }
    let mut files = Arc::new(files);
    let mut cache = Cache::default();
    for round in 0..3 {
        let start = Instant::now();
        let policy = cache
            .parse(&files)
            .unwrap_or_else(|e| panic!("{e:?}"))
            .policy;
        let parsed = start.elapsed();
        println!("parse {parsed:?}; {}", memory());
        let image = compile::compile(&policy, &Environment::default(), &Options::default());
        println!("compile {:?}; {}", start.elapsed() - parsed, memory());
        match image {
            Ok(image) => println!("{:?} hash {:016x}", image.stats(), image.hash()),
            Err(error) => println!("{error}"),
        }
        // One file is another one.
        let mut changed = (*files).clone();
        changed[0].text += &format!("# {round}\n");
        files = Arc::new(changed);
    }
}

fn memory() -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = |key: &str| status.lines().find(|line| line.starts_with(key));
    let words = ["VmRSS", "VmHWM"].map(|key| line(key).unwrap_or_default().replace('\t', " "));
    words.join(", ")
}
