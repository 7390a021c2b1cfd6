//! Guarantee 3, step by step: whatever call the daemon dies at, or the kernel refuses, one whole
//! policy is in force, and the next daemon goes on from there. Every step is tried, none is skipped.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, and a child tells its parent"
)]

use std::{
    net::IpAddr,
    os::fd::AsFd as _,
    os::unix::process::ExitStatusExt as _,
    process::Command,
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use aya::{
    maps::MapData,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use enforcer::{
    compile::Image,
    dataplane::{
        Dataplane as _, DataplaneError,
        faults::{self, Fault},
        kernel::{Keep, KernelDataplane, LoadOptions},
    },
    policy::{SourceFile, model::Environment, parse},
};
use enforcer_common::{image::SIZE_CLASSES, wire::slot};
use enforcer_tests::{daemon::wait_for, frame, kernel, pins::Pins, rival, scale};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Allowed by both policies, by the first, by the second.
const BOTH: u16 = 7001;
const FIRST: u16 = 7002;
const SECOND: u16 = 7003;
/// Longer than a test.
const LATER: Duration = Duration::from_secs(3600);

/// What a daemon may be at when it dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Apply,
    Trial,
    FirstTrial,
    Confirm,
    Revert,
    ApplyBoth,
    Grow,
    Replace,
}

const ACTS: [Act; 8] = [
    Act::Apply,
    Act::Trial,
    Act::FirstTrial,
    Act::Confirm,
    Act::Revert,
    Act::ApplyBoth,
    Act::Grow,
    Act::Replace,
];

fn image(port: u16, generation: u32, large: bool) -> Image {
    let mut text = "version: 1\nsegments:\n  a: { members: [{cidr: 10.1.0.0/16}] }\n".to_owned();
    if large {
        // 600 kinds of address: 360 000 pairs of them.
        for i in 0..600 {
            let address = format!("10.9.{}.{}", i / 250, i % 250);
            text += &format!("  s{i}: {{ members: [{{cidr: {address}/32}}] }}\n");
        }
    }
    text += &format!(
        "rules:\n  - {{ name: r, from: [a], to: [a], services: [udp/{BOTH}, udp/{port}] }}\n"
    );
    let name = "p.yaml".to_owned();
    let policy = parse(&[SourceFile { name, text }]).unwrap();
    kernel::compile(&policy, &Environment::default()).with_generation(generation)
}

fn open(pins: &std::path::Path, anew: bool) -> KernelDataplane {
    open_for(pins, SIZE_CLASSES[0], anew)
}

fn open_for(pins: &std::path::Path, image_words: u32, anew: bool) -> KernelDataplane {
    KernelDataplane::load(&LoadOptions {
        image_words: image_words as usize,
        debug: false,
        flows: kernel::FLOWS,
        keep: Keep::Pinned(pins.to_owned()),
        anew,
        extra: &[],
    })
    .unwrap()
}

/// A generation that none has had.
fn next(dataplane: &KernelDataplane) -> u32 {
    dataplane.adopted().unwrap().map_or(0, |a| a.generation) + 1
}

/// What the child does, and the parent does before.
fn act(
    act: Act,
    dataplane: &mut KernelDataplane,
) -> Result<(), enforcer::dataplane::DataplaneError> {
    let generation = next(dataplane);
    match act {
        Act::Apply => dataplane.apply(&image(SECOND, generation, false)),
        Act::Trial => dataplane.trial(&image(SECOND, generation, false), None, LATER),
        Act::FirstTrial => {
            let before = image(FIRST, generation, false);
            let after = image(SECOND, generation + 1, false);
            dataplane.trial(&after, Some(&before), LATER)
        }
        Act::Confirm => dataplane.confirm(),
        Act::Revert => dataplane.revert(),
        Act::ApplyBoth => {
            let (before, after) = (
                image(FIRST, generation, false),
                image(SECOND, generation + 1, false),
            );
            dataplane.apply_both(&before, &after)
        }
        Act::Grow => dataplane.apply(&image(SECOND, generation, true)),
        Act::Replace => unreachable!("a start of its own"),
    }
}

/// The child's part: does it, and says whether it could and in how many steps.
#[test]
fn a_daemon_that_dies() {
    let Ok(asked) = std::env::var("ENFORCER_TEST_DIES") else {
        return; // Not a child.
    };
    let mut words = asked.split(' ');
    let mut word = || words.next().unwrap();
    let (pins, which, fault, at) = (word(), word(), word(), word());
    let which = ACTS[which.parse::<usize>().unwrap()];
    let fault = match fault {
        "crash" => Fault::Crash,
        _ => Fault::Refusal,
    };
    let at = at.parse().unwrap();
    let pins = std::path::Path::new(pins);
    let done = if which == Act::Replace {
        faults::set(fault, at);
        std::panic::catch_unwind(|| open(pins, true)).is_ok()
    } else {
        let mut dataplane = open(pins, false);
        faults::set(fault, at);
        act(which, &mut dataplane).is_ok()
    };
    println!("DONE {done} {}", faults::steps());
}

/// What became of a child.
enum Fate {
    Died,
    Done(bool, u32),
}

fn child(pins: &Pins, which: usize, fault: &str, at: u32) -> Fate {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_daemon_that_dies", "--nocapture"])
        .env(
            "ENFORCER_TEST_DIES",
            format!("{} {which} {fault} {at}", pins.path().display()),
        )
        .output()
        .unwrap();
    if output.status.signal() == Some(libc::SIGABRT) {
        return Fate::Died;
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let Some((_, told)) = said.split_once("DONE ") else {
        panic!(
            "{}: {said}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    };
    let mut words = told.split_whitespace();
    let done = words.next() == Some("true");
    Fate::Done(done, words.next().unwrap().parse().unwrap())
}

/// The program of this set that hooks lead to.
fn ingress(pins: &Pins, set: &str) -> SchedClassifier {
    let program = pins.path().join(set).join("programs/tc_ingress");
    SchedClassifier::from_pin(program).unwrap()
}

/// Whether a datagram of a new flow passes.
fn passes(program: &SchedClassifier, port: u16) -> bool {
    static PORT: AtomicU16 = AtomicU16::new(1024);
    let (a, b): (IpAddr, IpAddr) = ([10, 1, 0, 1].into(), [10, 1, 0, 2].into());
    let own = PORT.fetch_add(1, Ordering::Relaxed) | 1024;
    let bytes = frame::frame(a, b, 17, &frame::udp(own, port));
    let mut out = [0; 256];
    let options = TestRunOptions {
        data_in: Some(&bytes),
        data_out: Some(&mut out),
        ..TestRunOptions::new()
    };
    program.test_run(options).unwrap().return_value != 2
}

/// Which of the two policies judges, by the pinned program.
fn judging(pins: &Pins) -> u16 {
    let program = ingress(pins, "current");
    let passes = |port| passes(&program, port);
    assert!(passes(BOTH), "neither policy is in force");
    match (passes(FIRST), passes(SECOND)) {
        (true, false) => FIRST,
        (false, true) => SECOND,
        both => panic!("a mix: {both:?}"),
    }
}

/// Brings the pins to where the act begins: the first policy in force, or the second on trial.
fn prepare(pins: &Pins, which: Act) {
    let mut dataplane = open(pins.path(), false);
    if dataplane.on_trial().unwrap().is_some() {
        dataplane.revert().unwrap();
    }
    let generation = next(&dataplane);
    dataplane.apply(&image(FIRST, generation, false)).unwrap();
    if matches!(which, Act::Confirm | Act::Revert | Act::ApplyBoth) {
        act(Act::Trial, &mut dataplane).unwrap();
    }
}

/// What the next daemon finds is what judges, and it can go on.
fn goes_on(pins: &Pins, judged: u16) {
    let mut dataplane = open(pins.path(), false);
    let live = dataplane.adopted().unwrap().unwrap().live.unwrap();
    assert_eq!(judging(pins), judged, "adopting changes nothing");
    let trial = dataplane.on_trial().unwrap();
    if let Some(trial) = trial {
        assert_eq!(trial.live, live.generation());
        assert!(trial.remaining > LATER / 2);
        dataplane.revert().unwrap();
        assert_eq!(judging(pins), FIRST, "what was in force before");
    }
    assert_eq!(dataplane.on_trial().unwrap(), None);
    let generation = next(&dataplane);
    dataplane.apply(&image(SECOND, generation, false)).unwrap();
    assert_eq!(judging(pins), SECOND);
    assert_eq!(dataplane.inspect().unwrap(), []);
    let list = pins.list();
    let images = list.iter().filter(|path| path.contains("images/"));
    assert_eq!(images.count(), 1, "{list:?}");
    one_set_alone(pins);
}

fn one_set_alone(pins: &Pins) {
    let list = pins.list();
    let other = |path: &String| path.starts_with("next/") || path.starts_with("aside-");
    assert!(!list.iter().any(other), "{list:?}");
}

fn every_step(which: Act, fault: &str) {
    let mut pins = Pins::default();
    let number = ACTS.iter().position(|act| *act == which).unwrap();
    drop(open(pins.path(), false));
    let mut seen = std::collections::BTreeSet::new();
    let mut at = 1;
    loop {
        if which == Act::Grow {
            // The one before has grown.
            pins = Pins::default();
            drop(open(pins.path(), false));
        }
        prepare(&pins, which);
        let before = judging(&pins);
        let mut said = false;
        match child(&pins, number, fault, at) {
            Fate::Died => {}
            Fate::Done(done, steps) if steps < at => {
                assert!(done, "{which:?} without a fault");
                break;
            }
            Fate::Done(done, _) => {
                said = done;
                let now = judging(&pins);
                let changes = !matches!(which, Act::Confirm | Act::ApplyBoth | Act::Replace);
                if !done && changes && which != Act::Revert {
                    assert_eq!(now, before, "{which:?}: refused at step {at}, and changed");
                }
            }
        }
        let judged = judging(&pins);
        if which == Act::Confirm && fault == "refuse" {
            // What was not confirmed can be again.
            let mut dataplane = open(pins.path(), false);
            assert_eq!(judged, SECOND);
            assert_eq!(
                dataplane.on_trial().unwrap().is_some(),
                !said,
                "at step {at}"
            );
            if !said {
                dataplane.confirm().unwrap();
            }
            assert_eq!(dataplane.on_trial().unwrap(), None);
        }
        seen.insert(judged);
        goes_on(&pins, judged);
        at += 1;
    }
    assert!(at > 3, "{which:?} has more than {} steps", at - 1);
    println!("{which:?} {fault}: {} steps, then {seen:?}", at - 1);
}

/// Each round of some loads the programs anew, which takes seconds: only a thorough run does these.
/// Where every instruction is emulated each start takes long.
fn now(which: Act) -> bool {
    let loads = matches!(which, Act::Grow | Act::Replace);
    let few = matches!(which, Act::Apply | Act::Trial);
    scale::thorough() || (!loads && (few || scale::rounds(2, 1) == 2))
}

/// A start that died had led some hooks to what it has loaded, and the next ones fail as well: those
/// hooks must not be cut off.
#[test]
fn what_a_dead_start_has_loaded_judges_until_another_one_is_done() {
    if scale::rounds(2, 1) == 1 {
        return; // Each load takes long there, and what is pinned does not depend on the kernel.
    }
    let pins = Pins::default();
    drop(open(pins.path(), false));
    prepare(&pins, Act::Replace);
    let replace = ACTS.iter().position(|act| *act == Act::Replace).unwrap();
    let described = || pins.path().join("next/meta").exists();
    let dies = |at| matches!(child(&pins, replace, "crash", at), Fate::Died);
    assert!((1..).take_while(|at| dies(*at)).any(|_| described()));
    // As a hook holds it: the program, and none of its pins.
    let held = ingress(&pins, "next");
    assert!(passes(&held, BOTH));
    child(&pins, replace, "crash", 1);
    child(&pins, replace, "refuse", 1);
    child(&pins, replace, "refuse", 2);
    assert!(passes(&held, BOTH), "cut off: {:?}", pins.list());
    drop(open(pins.path(), true));
    one_set_alone(&pins);
    assert!(passes(&ingress(&pins, "current"), BOTH));
    // Nobody keeps its programs any more.
    wait_for("an empty table", Duration::from_secs(10), || {
        (!passes(&held, BOTH)).then_some(())
    });
}

#[test]
fn programs_whose_others_were_unpinned_are_replaced_by_the_next_start() {
    let pins = Pins::default();
    drop(open(pins.path(), false));
    prepare(&pins, Act::Replace);
    let held = ingress(&pins, "current");
    std::fs::remove_file(pins.path().join("current/maps/STEPS")).unwrap();
    wait_for("an empty table", Duration::from_secs(10), || {
        (!passes(&held, BOTH)).then_some(())
    });
    let dataplane = open(pins.path(), false);
    assert_eq!(judging(&pins), FIRST);
    one_set_alone(&pins);
    drop(dataplane);
    assert_eq!(judging(&pins), FIRST);
}

#[test]
fn a_daemon_that_dies_at_any_step_of_a_change_leaves_one_whole_policy() {
    for which in ACTS {
        if now(which) {
            every_step(which, "crash");
        }
    }
}

#[test]
fn a_step_that_the_kernel_refuses_changes_nothing_or_is_made_up_for() {
    for which in ACTS {
        if now(which) {
            every_step(which, "refuse");
        }
    }
}

#[test]
fn a_trial_of_images_of_two_sizes_grows_before_it_writes_either() {
    let pins = Pins::default();
    let mut dataplane = open(pins.path(), false);
    dataplane.apply(&image(FIRST, 1, false)).unwrap();
    let before = image(FIRST, 2, true);
    let begun = dataplane.trial(&image(SECOND, 3, false), Some(&before), LATER);
    begun.unwrap();
    assert_eq!(judging(&pins), SECOND);
    dataplane.revert().unwrap();
    assert_eq!(judging(&pins), FIRST);
    assert_eq!(dataplane.inspect().unwrap(), []);
}

#[test]
fn an_image_to_go_back_to_that_somebody_unpinned_is_left_where_it_is() {
    let pins = Pins::default();
    let mut dataplane = open(pins.path(), false);
    dataplane.apply(&image(FIRST, 1, false)).unwrap();
    let soon = Duration::from_secs(5);
    dataplane
        .trial(&image(SECOND, 2, false), None, soon)
        .unwrap();
    drop(dataplane);
    std::fs::remove_file(pins.path().join("current/images/1")).unwrap();
    let mut dataplane = open(pins.path(), false);
    dataplane.inspect().unwrap();
    wait_for("the programs to go back", soon * 2, || {
        (judging(&pins) == FIRST).then_some(())
    });
    let error = dataplane.revert().unwrap_err();
    assert!(matches!(error, DataplaneError::LostPrevious), "{error}");
    assert_eq!(judging(&pins), FIRST);
    // A trial that brings its own way back ends it, as any image that is applied does.
    let before = image(FIRST, 4, false);
    let second = image(SECOND, 3, false);
    dataplane.trial(&second, Some(&before), LATER).unwrap();
    assert_eq!(judging(&pins), SECOND);
    dataplane.revert().unwrap();
    assert_eq!(judging(&pins), FIRST);
    assert_eq!(dataplane.inspect().unwrap(), []);
}

/// Of a trial that was taken back half-way: the live image is the one before.
#[test]
fn one_image_in_two_slots_is_one_in_larger_programs_as_well() {
    let pins = Pins::default();
    let mut dataplane = open(pins.path(), false);
    dataplane.apply(&image(FIRST, 1, false)).unwrap();
    let second = image(SECOND, 2, false);
    dataplane.trial(&second, None, LATER).unwrap();
    drop(dataplane);
    let map = |name: &str| MapData::from_pin(pins.path().join("current").join(name)).unwrap();
    let (policy, before) = (map("maps/POLICY"), map("images/1"));
    rival::fill_slot(&policy.fd().as_fd(), slot::LIVE, &before.fd().as_fd());
    drop(policy);
    drop(open_for(pins.path(), SIZE_CLASSES[1], false));
    for time in ["grown", "and once more"] {
        let mut dataplane = open(pins.path(), false);
        let live = dataplane.adopted().unwrap().unwrap().live;
        assert_eq!(live.expect(time).generation(), 1);
        assert_eq!(dataplane.inspect().unwrap(), [], "{time}");
        assert_eq!(judging(&pins), FIRST, "{time}");
    }
    let mut dataplane = open(pins.path(), false);
    dataplane.revert().unwrap();
    assert_eq!(judging(&pins), FIRST);
}

/// A directory that something is mounted on cannot be put in another's place.
#[test]
fn programs_that_cannot_be_put_in_their_place_are_not_at_work() {
    let pins = Pins::default();
    let work = || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        let none = None::<&str>;
        mount(none, "/", none, private, none).unwrap();
        let mut dataplane = open(pins.path(), false);
        dataplane.apply(&image(FIRST, 1, false)).unwrap();
        let current = pins.path().join("current");
        mount(Some(&current), &current, none, MsFlags::MS_BIND, none).unwrap();
        let error = dataplane.apply(&image(SECOND, 2, true)).unwrap_err();
        assert!(error.to_string().contains("in their place"), "{error}");
        assert_eq!(judging(&pins), FIRST);
        // It goes on as before.
        assert_eq!(dataplane.image_words(), SIZE_CLASSES[0]);
        dataplane.apply(&image(SECOND, 3, false)).unwrap();
        assert_eq!(dataplane.inspect().unwrap(), []);
    };
    // Mounts are this thread's.
    std::thread::scope(|scope| scope.spawn(work).join().unwrap());
    goes_on(&pins, SECOND);
}
