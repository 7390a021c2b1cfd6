//! The machine, as it says itself.

use std::fs;

use serde_json::{Value, json};

/// Processor, caches, memory and kernel.
pub fn describe() -> Value {
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let field = |text: &str, name: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        let found = lines.find(|(key, _)| key.trim() == name);
        found.map_or_else(String::new, |(_, value)| value.trim().to_owned())
    };
    let cpus = cpu.lines().filter(|line| line.starts_with("processor"));
    let caches: Vec<String> = (0..8)
        .filter_map(|index| {
            let of = |name: &str| {
                let file = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{name}");
                fs::read_to_string(file).ok()
            };
            let (level, kind, size) = (of("level")?, of("type")?, of("size")?);
            let kind = match kind.trim() {
                "Data" => "d",
                "Instruction" => "i",
                _ => "",
            };
            Some(format!("L{}{kind} {}", level.trim(), size.trim()))
        })
        .collect();
    let kernel = nix::sys::utsname::uname().map(|name| {
        let part = |part: &std::ffi::OsStr| part.to_string_lossy().into_owned();
        (part(name.release()), part(name.machine()))
    });
    let (release, machine) = kernel.unwrap_or_default();
    json!({
        "processor": field(&cpu, "model name"),
        "family": field(&cpu, "cpu family"),
        "model": field(&cpu, "model"),
        "mhz": field(&cpu, "cpu MHz"),
        "cpus": cpus.count(),
        "caches": caches,
        "memory": field(&read("/proc/meminfo"), "MemTotal"),
        "kernel": release,
        "architecture": machine,
        "load": read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "),
    })
}
