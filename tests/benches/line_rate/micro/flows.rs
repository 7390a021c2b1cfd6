//! Many flows in random order, and flows that nobody has seen before: what caches do not hold.

use std::cell::RefCell;

use anyhow::Result;
use enforcer_common::verdict::Reason;
use enforcer_tests::line_rate::{bpf::Program, report::whole};

use super::{
    Bench, TABLE,
    frames::{End, Family},
    group, names,
    policies::Size,
    prologue::{Draw, Index, Prologue},
    rounds::{Runner, measure},
    subject::{Subject, image},
    units,
};

/// Flows, and the ratio that they are for.
const COUNTS: [(u32, Option<&str>); 4] = [
    (1, None),
    (1_000, None),
    (32_000, Some("established_32k_vs_lru")),
    (512_000, Some("established_512k_vs_lru")),
];

/// Records that surely have room in the ring, in one run.
const RECORDS: u32 = 4_000;

/// Measures both families.
pub fn run(bench: &mut Bench<'_>, subject: &mut Subject) -> Result<()> {
    for (count, ratio) in COUNTS {
        // As many slots as a quarter of them holds.
        let mut large;
        let subject = if count > TABLE {
            large = Subject::load(0, count.next_power_of_two() * 4)?;
            large.apply(&image(Size::BASE)?)?;
            &large
        } else {
            &*subject
        };
        for family in Family::BOTH {
            established(bench, subject, family, count, ratio)?;
        }
    }
    for family in Family::BOTH {
        new(bench, subject, family)?;
        denied(bench, subject, family)?;
    }
    Ok(())
}

/// The same prologue in front of the program, and in front of an empty one.
fn pair(
    bench: &Bench<'_>,
    subject: &Subject,
    frame: &[u8],
    draws: &[Draw],
) -> Result<[Prologue; 2]> {
    let before = |target: &Program| Prologue::new(frame, draws, target);
    Ok([before(&subject.program)?, before(&bench.empty)?])
}

fn established(
    bench: &mut Bench<'_>,
    subject: &Subject,
    family: Family,
    count: u32,
    ratio: Option<&str>,
) -> Result<()> {
    let name = names::established(family.name(), count);
    let request = family.request();
    let reply = family.reply();
    // Each once from its opener, and once answered.
    let turn = Index::Turn(count);
    let [open, _] = pair(bench, subject, &request, &family.flows(End::Source, turn))?;
    open.program.run(&request, count)?;
    let answers = family.flows(End::Destination, turn);
    let [answer, _] = pair(bench, subject, &reply, &answers)?;
    answer.program.run(&reply, count)?;
    let draws = family.flows(End::Source, Index::Random(count));
    let [program, base] = pair(bench, subject, &request, &draws)?;
    let holds = bench.holds(
        &name,
        subject,
        Reason::Established,
        &program.program,
        &request,
        count.max(10_000),
    )?;
    // One length of key beside each family, so that both are measured.
    let key = if family == Family::V4 { 40 } else { 16 };
    let unit = units::lru_hit(key, count)?;
    // Small tables are in the caches when they are in use, and evicted by the others' turns.
    let warm = count.min(bench.packets);
    let packets = bench.packets;
    let run = |program| Runner::new(program, &request, packets).warm(warm);
    let [program, base, hit, unit_base] = measure(
        bench.rounds,
        [
            run(&program.program),
            run(&base.program),
            run(&unit.subject),
            run(&unit.baseline),
        ],
    )?;
    let cost = program.minus(&base);
    let hit = hit.minus(&unit_base);
    bench.nanoseconds(group::FLOWS, &names::lru_hit(key, count), &hit);
    if holds {
        bench.nanoseconds(group::FLOWS, &name, &cost);
        if family == Family::V4
            && let Some(ratio) = ratio
        {
            bench.ratio(ratio, &cost, &hit);
        }
    }
    Ok(())
}

fn new(bench: &mut Bench<'_>, subject: &Subject, family: Family) -> Result<()> {
    let name = format!("{}: new flow", family.name());
    let request = family.request();
    let [program, base] = pair(bench, subject, &request, &family.new_clients())?;
    program.program.run(&request, TABLE * 2)?;
    if !bench.holds(
        &name,
        subject,
        Reason::RuleAllow,
        &program.program,
        &request,
        10_000,
    )? {
        return Ok(());
    }
    let unit = units::lru_insert(40, TABLE)?;
    let packets = bench.packets;
    let run = |program| Runner::new(program, &request, packets);
    let [program, base, insert, unit_base] = measure(
        bench.rounds,
        [
            run(&program.program),
            run(&base.program),
            run(&unit.subject),
            run(&unit.baseline),
        ],
    )?;
    let cost = program.minus(&base);
    let insert = insert.minus(&unit_base);
    bench.nanoseconds(group::NEW, &name, &cost);
    if family == Family::V4 {
        let name = format!("LRU hash insert, full, {} keys", whole(TABLE.into()));
        bench.nanoseconds(group::NEW, &name, &insert);
        bench.ratio("new_flow_vs_lru_insert", &cost, &insert);
    }
    Ok(())
}

/// Each packet makes a record, which is read: a full ring would make it cheaper.
fn denied(bench: &mut Bench<'_>, subject: &mut Subject, family: Family) -> Result<()> {
    let name = format!("{}: denied, ever new", family.name());
    let frame = family.denied();
    let [program, base] = pair(bench, subject, &frame, &family.new_clients())?;
    if !bench.holds(
        &name,
        subject,
        Reason::DefaultDeny,
        &program.program,
        &frame,
        1_000,
    )? {
        return Ok(());
    }
    let unit = units::lru_insert(40, TABLE)?;
    let records = RefCell::new(0);
    let runs = bench.pick(5, 20);
    let packets = runs * RECORDS;
    let [program, base, insert, unit_base] = measure(
        bench.rounds,
        [
            Runner::new(&program.program, &frame, packets)
                .warm(RECORDS)
                .between(runs, || *records.borrow_mut() += subject.drain()),
            Runner::new(&base.program, &frame, packets),
            Runner::new(&unit.subject, &frame, packets),
            Runner::new(&unit.baseline, &frame, packets),
        ],
    )?;
    let judged = packets as usize * bench.rounds;
    if *records.borrow() + RECORDS as usize * 2 < judged {
        let note = format!("{name}: {} records of {judged} packets", records.borrow());
        bench.report.note(note);
    }
    let cost = program.minus(&base);
    let insert = insert.minus(&unit_base);
    bench.nanoseconds(group::NEW, &name, &cost);
    if family == Family::V4 {
        bench.ratio("denied_new_vs_lru_insert", &cost, &insert);
    }
    Ok(())
}
