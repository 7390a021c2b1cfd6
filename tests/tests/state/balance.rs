//! Counters of several CPUs at once: they only grow, and their sum is what was sent.

use std::{
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use aya::programs::ProgramFd;
use enforcer::dataplane::Counters;
use enforcer_common::verdict::{Outcome, Reason};
use enforcer_tests::{
    frame::{ACK, SYN},
    netns::Family,
    scale,
};

use crate::common::*;

const RULE: &str = "  - { name: web, from: [a], to: [b], services: [tcp/8080] }";

/// `bpf_attr` of BPF_PROG_TEST_RUN (linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    rest: [u64; 5],
}

/// Runs a program on whatever CPU the thread is on: its action.
fn run(program: &ProgramFd, frame: &[u8]) -> i32 {
    use std::os::fd::{AsFd as _, AsRawFd as _};
    const PROG_TEST_RUN: libc::c_long = 10;
    let mut attr = TestRun {
        prog_fd: program.as_fd().as_raw_fd().cast_unsigned(),
        data_size_in: u32::try_from(frame.len()).unwrap(),
        data_in: frame.as_ptr() as u64,
        ..TestRun::default()
    };
    // SAFETY: the frame is alive, its length is stated, and the kernel writes to `attr` alone.
    let done = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_TEST_RUN,
            &raw mut attr,
            size_of::<TestRun>(),
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    attr.retval.cast_signed()
}

fn at(counters: &Counters, what: (Outcome, Reason)) -> u64 {
    let of = counters.packets.iter();
    let of = of.filter(|c| c.hook == INGRESS && (c.outcome, c.reason) == what);
    of.map(|c| c.packets).sum()
}

/// The CPUs that this process may use.
fn cpus() -> Vec<usize> {
    let set = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
    (0..nix::sched::CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap())
        .collect()
}

#[test]
fn counters_sum_over_all_cpus_and_only_grow() {
    let rounds = scale::rounds(20_000, 1_000) as u64;
    // Before this thread is kept on one of them.
    let cpus = cpus();
    let mut programs = programs(&policy(RULE));
    let (a, b) = ends(Family::V4);
    establish(&mut programs, (a, 4000), (b, 8080));
    let frames = [
        (tcp((a, 4000), (b, 8080), ACK), ESTABLISHED, -1),
        (tcp((a, 4000), (b, 5555), SYN), DENIED, 2),
        (tcp((b, 1), (a, 1), SYN | ACK), NO_FLOW, 2),
    ];
    let program = programs.dataplane.program(INGRESS.name()).unwrap();
    let program = program.fd().unwrap().try_clone().unwrap();
    let before = programs.counters();
    let (stop, start) = (AtomicBool::new(false), Barrier::new(cpus.len() * 2));
    let mut looks = 0;
    thread::scope(|scope| {
        let (frames, program, start) = (&frames, &program, &start);
        // Two on each CPU: they interrupt each other.
        let senders: Vec<_> = cpus
            .iter()
            .flat_map(|cpu| [*cpu; 2])
            .map(|cpu| {
                scope.spawn(move || {
                    let mut set = nix::sched::CpuSet::new();
                    set.set(cpu).unwrap();
                    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
                    start.wait();
                    for _ in 0..rounds {
                        for (frame, _, action) in frames {
                            assert_eq!(run(program, frame), *action);
                        }
                    }
                })
            })
            .collect();
        let (programs, stop) = (&programs.dataplane, &stop);
        scope.spawn(move || {
            for sender in senders {
                sender.join().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        use enforcer::dataplane::Dataplane as _;
        let mut last = before.clone();
        while !stop.load(Ordering::Relaxed) {
            let now = programs.counters().unwrap();
            for (_, what, _) in frames {
                assert!(at(&now, *what) >= at(&last, *what), "{what:?}");
            }
            for (new, old) in now.records.iter().zip(&last.records) {
                assert!(new.emitted >= old.emitted && new.suppressed >= old.suppressed);
                assert!(new.lost >= old.lost && new.displaced >= old.displaced);
            }
            last = now;
            looks += 1;
        }
    });
    let after = programs.counters();
    let sent = rounds * cpus.len() as u64 * 2;
    for (_, what, _) in &frames {
        assert_eq!(at(&after, *what) - at(&before, *what), sent, "{what:?}");
    }
    assert!(looks > 0);
    programs.settle();
    programs.records(INGRESS);
    programs.drain();
    println!("{} CPUs, looked at {looks} times", cpus.len());
}
