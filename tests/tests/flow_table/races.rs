//! Two CPUs at the loaded programs' smallest table: one fills it without end, the other looks for
//! flows that must be there and for some that must not.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv6Addr},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use aya::{
    maps::{Array, Map},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use enforcer_common::{
    image::SIZE_CLASSES,
    table::{self, SLOTS, WORDS4, WORDS6},
    wire::FlowKey,
};
use enforcer_tests::{
    frame::{self, ACK, FIN, SYN},
    host::image,
    kernel::Programs,
    netns::Family,
    scale,
    two::policy,
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

use crate::loaded::{INGRESS, RULES, protected, tcp};

/// Flows of the table: the fewest with which each has two buckets.
const FLOWS: u32 = 1 << 11;
/// Flows that must be there, of as many hosts.
const STAY: u8 = 40;

/// The CPUs that this process may use.
fn cpus() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let all = 0..CpuSet::count();
    all.filter(|cpu| set.is_set(*cpu).unwrap()).collect()
}

fn pin_to(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

/// Whether a frame passes.
fn passes(program: &SchedClassifier, frame: &[u8]) -> bool {
    let options = TestRunOptions {
        data_in: Some(frame),
        ..TestRunOptions::new()
    };
    let result = program.test_run(options).expect("the kernel runs it");
    result.return_value.cast_signed() == -1
}

fn udp(from: (IpAddr, u16), to: (IpAddr, u16)) -> Vec<u8> {
    frame::frame(from.0, to.0, 17, &frame::udp(from.1, to.1))
}

/// Hosts and ports of flows that come and go.
fn coming(family: Family, number: usize) -> (IpAddr, u16) {
    // Two openers' protected entries leave room in every bucket.
    let host = 100 + (number / 701 % 2) as u8;
    (family.address(1, host), (number % 701) as u16)
}

/// Opens flows that the policy allows, answers some, and closes some, round and round. Half of the
/// words of one's key and half of another's are often the key of a flow that is denied.
fn churn(program: &SchedClassifier, family: Family, rounds: usize) {
    let b = family.address(2, 2);
    for number in 0..rounds {
        let a = coming(family, number / 2);
        if number % 2 == 0 {
            assert!(passes(program, &udp(a, (b, 7000))));
        } else {
            let b = (b, 8080);
            assert!(passes(program, &tcp(a, b, SYN)));
            if number % 3 != 0 {
                // Its entry may be another's already.
                passes(program, &tcp(b, a, SYN | ACK));
            }
            if number % 3 == 2 {
                passes(program, &tcp(a, b, FIN | ACK));
            }
        }
    }
}

/// What the other CPU saw.
#[derive(Debug, Default)]
struct Seen {
    sent: usize,
    missed: usize,
    let_in: usize,
}

/// Answers of flows that stay, which nothing else allows, and packets of flows that nothing does.
fn look(program: &SchedClassifier, family: Family, done: &AtomicBool) -> Seen {
    let b = family.address(2, 2);
    let stay: Vec<_> = (0..STAY).map(|host| answer(family, host)).collect();
    let denied: Vec<_> = (0..100)
        .flat_map(|number| {
            let a = coming(family, number);
            // Allowed with the other's protocol.
            [udp(a, (b, 8080)), tcp(a, (b, 7000), ACK)]
        })
        .collect();
    let mut seen = Seen::default();
    while !done.load(Ordering::Relaxed) {
        for (stays, not) in stay.iter().zip(denied.iter().cycle().skip(seen.sent % 200)) {
            seen.sent += 1;
            seen.missed += usize::from(!passes(program, stays));
            seen.let_in += usize::from(passes(program, not));
        }
    }
    seen
}

fn answer(family: Family, host: u8) -> Vec<u8> {
    udp(
        (family.address(2, 2), 7000),
        (family.address(1, 10 + host), 4000),
    )
}

#[test]
fn two_cpus_at_one_table_neither_mix_flows_nor_lose_them() {
    let cpus = cpus();
    let [one, other, ..] = cpus.as_slice() else {
        println!("SKIPPED: one CPU");
        return;
    };
    let rounds = scale::rounds(150_000, 4_000);
    let mut programs = Programs::load_for(SIZE_CLASSES[0] as usize, FLOWS);
    programs.apply(&image(&policy(RULES)));
    for family in [Family::V4, Family::V6] {
        programs.forget_flows();
        let program = programs.dataplane.program(INGRESS.name()).unwrap();
        for host in 0..STAY {
            let (a, b) = (family.address(1, 10 + host), family.address(2, 2));
            assert!(!passes(program, &answer(family, host)), "nothing allows it");
            assert!(passes(program, &udp((a, 4000), (b, 7000))));
            assert!(passes(program, &answer(family, host)));
        }
        let keys = |programs: &mut Programs| -> HashSet<_> {
            let flows = programs.dataplane.flows().unwrap();
            let stay = flows.into_iter().filter(|flow| flow.packets > 0);
            stay.map(|flow| flow.key).collect()
        };
        let before = keys(&mut programs);
        assert_eq!(before.len(), usize::from(STAY));
        let program = programs.dataplane.program(INGRESS.name()).unwrap();
        let done = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            let looking = scope.spawn(|| {
                pin_to(*one);
                look(program, family, &done)
            });
            let churning = scope.spawn(|| {
                pin_to(*other);
                churn(program, family, rounds);
            });
            let churned = churning.join();
            done.store(true, Ordering::Relaxed);
            churned.unwrap();
            looking.join().unwrap()
        });
        println!("{family:?}: {seen:?}");
        assert_eq!(seen.let_in, 0, "{seen:?}");
        assert!(seen.sent > 0);
        // A test run may be interrupted with a lock in its hands, which a packet never is.
        assert!(seen.missed * 1000 <= seen.sent, "{seen:?}");
        let (v4, v6) = programs.flows();
        let after = if family == Family::V4 { v4 } else { v6 };
        assert!(before.iter().all(|key| after.contains_key(key)));
        assert!(after.len() > FLOWS as usize * 2 / 3, "{}", after.len());
        protected(&mut programs);
    }
}

/// Flows of this many hosts each, of which none has more than its share.
const HOSTS: u8 = 24;
const EACH: u16 = 100;

/// Where each flow that `ours` names is, by its bucket.
fn places(programs: &mut Programs, v6: bool, ours: &HashSet<FlowKey>) -> HashMap<FlowKey, u32> {
    fn read<const WORDS: usize>(map: &mut Map) -> Vec<Vec<u32>> {
        let buckets: Array<_, [u32; WORDS]> = map.try_into().unwrap();
        buckets
            .iter()
            .map(|words| words.unwrap().to_vec())
            .collect()
    }
    let map = if v6 { "FLOWS6" } else { "FLOWS4" };
    let map = programs.dataplane.map_mut(map).unwrap();
    let (buckets, slot) = if v6 {
        (read::<{ (SLOTS * WORDS6) as usize }>(map), WORDS6)
    } else {
        (read::<{ (SLOTS * WORDS4) as usize }>(map), WORDS4)
    };
    let mut places = HashMap::new();
    for (index, words) in (0..).zip(buckets) {
        let flows = words.chunks_exact(slot as usize).filter_map(table::flow);
        for flow in flows.filter(|flow| ours.contains(&flow.key)) {
            assert_eq!(places.insert(flow.key, index), None, "in two slots");
        }
    }
    places
}

/// One CPU opens flows and answers them until the table is full of them, and answered ones have to
/// move; the other looks all the time for those that were there first.
#[test]
fn flows_that_move_are_found_by_another_cpu() {
    let cpus = cpus();
    let [one, other, ..] = cpus.as_slice() else {
        println!("SKIPPED: one CPU");
        return;
    };
    let rounds = scale::rounds(20, 2);
    let mut programs = Programs::load_for(SIZE_CLASSES[0] as usize, FLOWS);
    programs.apply(&image(&policy(RULES).replace("fd01::/64", "fd01::/32")));
    for family in [Family::V4, Family::V6] {
        let v6 = family == Family::V6;
        let b = family.address(2, 2);
        let (mut moved, mut sum) = (0, Seen::default());
        for round in 0..rounds as u16 {
            programs.forget_flows();
            let program = programs.dataplane.program(INGRESS.name()).unwrap();
            let opening = |host: u8, number: u16| {
                let port = 1000 + round * EACH + number;
                let a = client(family, host);
                (udp((a, port), (b, 7000)), udp((b, 7000), (a, port)))
            };
            let mut answers = Vec::new();
            for host in 0..HOSTS {
                for number in 0..EACH / 5 {
                    let (opens, answer) = opening(host, number);
                    assert!(passes(program, &opens));
                    assert!(passes(program, &answer));
                    answers.push(answer);
                }
            }
            let flows = programs.dataplane.flows().unwrap();
            let ours: HashSet<_> = flows.iter().map(|flow| flow.key).collect();
            assert_eq!(ours.len(), answers.len());
            let before = places(&mut programs, v6, &ours);
            let program = programs.dataplane.program(INGRESS.name()).unwrap();
            let done = AtomicBool::new(false);
            let seen = std::thread::scope(|scope| {
                let looking = scope.spawn(|| {
                    pin_to(*one);
                    let mut seen = Seen::default();
                    while !done.load(Ordering::Relaxed) {
                        for answer in &answers {
                            seen.sent += 1;
                            seen.missed += usize::from(!passes(program, answer));
                        }
                    }
                    seen
                });
                let crowding = scope.spawn(|| {
                    pin_to(*other);
                    for number in EACH / 5..EACH {
                        for host in 0..HOSTS {
                            let (opens, answer) = opening(host, number);
                            assert!(passes(program, &opens));
                            // Those that found no room have none.
                            passes(program, &answer);
                        }
                    }
                });
                let crowded = crowding.join();
                done.store(true, Ordering::Relaxed);
                crowded.unwrap();
                looking.join().unwrap()
            });
            sum.sent += seen.sent;
            sum.missed += seen.missed;
            let after = places(&mut programs, v6, &ours);
            assert_eq!(after.len(), before.len(), "one is gone");
            moved += after
                .iter()
                .filter(|(key, at)| before[*key] != **at)
                .count();
            let all = protected(&mut programs);
            assert!(all > FLOWS * 9 / 10, "{all} of {FLOWS}");
        }
        println!("{family:?}: {moved} moved, {sum:?}");
        assert!(moved >= 10 * rounds, "{moved} moved in {rounds} rounds");
        // A test run may be interrupted with a lock in its hands, which a packet never is.
        assert!(sum.missed * 1000 <= sum.sent, "{sum:?}");
    }
}

/// A host of the clients' segment; in IPv6 each in a /64 of its own, for a /64 has one share.
fn client(family: Family, host: u8) -> IpAddr {
    match family {
        Family::V4 => family.address(1, 10 + host),
        Family::V6 => Ipv6Addr::new(0xfd01, 0, 0, host.into(), 0, 0, 0, 10).into(),
    }
}

/// Lets two threads go on at the same moment.
struct Start(AtomicUsize);

impl Start {
    fn together(&self) {
        let turn = self.0.fetch_add(1, Ordering::AcqRel) / 2;
        let begun = std::time::Instant::now();
        while self.0.load(Ordering::Acquire) < 2 * (turn + 1) {
            // The other may have to wait for a CPU that others use.
            if begun.elapsed() > Duration::from_micros(50) {
                std::thread::yield_now();
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "left alone");
        }
    }
}

/// Opens flows and answers them, as the other thread does at the same moment; the packets that
/// did not pass.
fn twice(program: &SchedClassifier, family: Family, start: &Start, rounds: usize) -> usize {
    let b = family.address(2, 2);
    let mut missed = 0;
    for number in 0..rounds {
        let a = coming(family, number);
        let (web, names) = ((b, 8080), (b, 7000));
        let frames = if number % 4 == 0 {
            [
                tcp(a, web, SYN),
                tcp(web, a, SYN | ACK),
                tcp(a, web, FIN | ACK),
            ]
        } else {
            [udp(a, names), udp(names, a), udp(names, a)]
        };
        for frame in frames {
            start.together();
            missed += usize::from(!passes(program, &frame));
        }
    }
    missed
}

/// Each packet on both CPUs at once: the openings take one slot, one answer's change hides the
/// flow from the other nowhere, and what is counted is counted once.
#[test]
fn the_same_packets_on_two_cpus_are_one_flow() {
    let cpus = cpus();
    let [one, other, ..] = cpus.as_slice() else {
        println!("SKIPPED: one CPU");
        return;
    };
    let rounds = scale::rounds(20_000, 700);
    let mut programs = Programs::load_for(SIZE_CLASSES[0] as usize, FLOWS);
    programs.apply(&image(&policy(RULES)));
    for family in [Family::V4, Family::V6] {
        programs.forget_flows();
        let program = programs.dataplane.program(INGRESS.name()).unwrap();
        let start = &Start(AtomicUsize::new(0));
        let missed: usize = std::thread::scope(|scope| {
            let both = [*one, *other].map(|cpu| {
                scope.spawn(move || {
                    pin_to(cpu);
                    twice(program, family, start, rounds)
                })
            });
            both.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        println!("{family:?}: {missed} missed");
        // A test run may be interrupted with a lock in its hands, which a packet never is.
        assert!(missed <= rounds / 1000 + 3, "{missed} of {rounds} flows");
        // No key is in two slots.
        let (v4, v6) = programs.flows();
        assert!(v4.len() + v6.len() > rounds.min(FLOWS as usize) / 2);
        assert!(protected(&mut programs) > 0);
    }
}
