//! Policies of growing size: what a verdict costs, one pair of addresses and random ones, beside
//! the kernel's LPM trie with the same prefixes.

use std::time::Instant;

use anyhow::Result;
use enforcer::compile::Image;
use enforcer_common::verdict::Reason;

use super::{
    Bench, TABLE, allows,
    frames::Family,
    group, names,
    policies::Size,
    prologue::Prologue,
    rounds::{Runner, measure},
    subject::{Subject, image},
    units,
};

/// Members of the policies that differ in rules: a segment is never empty.
const MEMBERS: usize = 1_000;

/// An axis: what grows, from what on, and what it is called.
struct Axis<'a> {
    group: &'a str,
    base: Size,
    sizes: &'a [Size],
    name: fn(Size, &str) -> String,
    /// The ratio of the last size.
    ratio: Option<(&'a str, Size)>,
}

/// Measures both axes.
pub fn run(bench: &mut Bench<'_>, base: &mut Subject) -> Result<()> {
    let rules: &[usize] = bench.pick(&[10, 1_000, 100_000], &[10, 100, 1_000, 10_000, 100_000]);
    let members: &[usize] = bench.pick(&[10, 100_000, 1_000_000], &[10, 1_000, 100_000, 1_000_000]);
    let of_rules = |rules| Size {
        rules,
        members: MEMBERS,
        v6: false,
    };
    let of_members = |members, v6| Size {
        members,
        v6,
        ..Size::BASE
    };
    let mut others: Vec<Subject> = vec![];
    let sizes: Vec<Size> = rules.iter().map(|rules| of_rules(*rules)).collect();
    let axis = Axis {
        group: group::RULES,
        base: of_rules(10),
        sizes: &sizes,
        name: |size, what| names::rules(size.rules as u32, what),
        ratio: Some(("decide_100k_rules_vs_10", of_rules(100_000))),
    };
    axis.run(bench, base, &mut others)?;
    let sizes: Vec<Size> = members.iter().map(|m| of_members(*m, false)).collect();
    let axis = Axis {
        group: group::MEMBERS,
        base: Size::BASE,
        sizes: &sizes,
        name: |size, what| names::members("IPv4", size.members as u32, what),
        ratio: Some(("decide_1m_members_vs_10", of_members(1_000_000, false))),
    };
    axis.run(bench, base, &mut others)?;
    if bench.options.quick {
        return Ok(());
    }
    let sizes: Vec<Size> = members.iter().map(|m| of_members(*m, true)).collect();
    let axis = Axis {
        group: group::MEMBERS,
        base: of_members(10, true),
        sizes: &sizes,
        name: |size, what| names::members("IPv6", size.members as u32, what),
        ratio: None,
    };
    axis.run(bench, base, &mut others)
}

impl Axis<'_> {
    fn run(
        &self,
        bench: &mut Bench<'_>,
        base: &mut Subject,
        others: &mut Vec<Subject>,
    ) -> Result<()> {
        base.apply(&image(self.base)?)?;
        let mut last: Option<(Size, f64)> = None;
        for size in self.sizes {
            // By the one before, if that took long enough to judge by: a policy that takes longer
            // than a run has is left out.
            let expected = last.filter(|(_, seconds)| *seconds > 0.1);
            let expected = expected.map_or(0.0, |(smaller, seconds)| {
                let more = |by: fn(Size) -> usize| by(*size) as f64 / by(smaller) as f64;
                seconds * more(|s| s.rules).max(more(|s| s.members))
            });
            let patience = bench.pick(15.0, 600.0);
            if expected > patience {
                let name = (self.name)(*size, "left out");
                bench.report.note(format!(
                    "{name}: compiling would take about {expected:.0} s here"
                ));
                continue;
            }
            let start = Instant::now();
            let image = match image(*size) {
                Ok(image) => image,
                Err(error) => {
                    let name = (self.name)(*size, "left out");
                    bench.report.note(format!("{name}: {error}"));
                    continue;
                }
            };
            let words = image.words().len();
            anyhow::ensure!(
                words >= size.members / 2,
                "{size:?} in {words} words: the members have a pattern"
            );
            last = Some((*size, start.elapsed().as_secs_f64()));
            let other = subject(&image, others)?;
            other.apply(&image)?;
            self.size(bench, *size, base, other)?;
        }
        Ok(())
    }

    fn size(
        &self,
        bench: &mut Bench<'_>,
        size: Size,
        base: &Subject,
        subject: &Subject,
    ) -> Result<()> {
        let family = if size.v6 { Family::V6 } else { Family::V4 };
        let message = family.message_of_members();
        let request = family.between_members();
        let members = family.members(size.members);
        let new = family.new_members(size.members);
        let denied = family.denied_between_members();
        for frame in [&request, &family.reply_between_members()] {
            subject.program.run(frame, 1)?;
        }
        let whole = Prologue::new(&message, &members, &subject.program)?;
        let any = Prologue::new(&request, &members, &subject.verdict)?;
        let any_base = Prologue::new(&request, &members, &bench.empty)?;
        let opens = Prologue::new(&request, &new, &subject.program)?;
        let opens_base = Prologue::new(&request, &new, &bench.empty)?;
        let checks = [
            (base, &base.program, &message, Reason::RuleAllow),
            (subject, &subject.program, &message, Reason::RuleAllow),
            (subject, &whole.program, &message, Reason::RuleAllow),
            (subject, &subject.program, &request, Reason::Established),
            (subject, &subject.program, &denied, Reason::DefaultDeny),
        ];
        for (of, program, frame, reason) in checks {
            let what = (self.name)(size, reason.name());
            if !bench.holds(&what, of, reason, program, frame, 2_000)? {
                return Ok(());
            }
        }
        for program in [&base.verdict, &subject.verdict, &any.program] {
            allows(program, &request)?;
        }
        // Few members have not enough pairs and ports for ever new flows.
        let what = (self.name)(size, names::OPENS);
        let opening = size.members >= 1_000
            && bench.holds(
                &what,
                subject,
                Reason::RuleAllow,
                &opens.program,
                &request,
                2_000,
            )?;
        let lpm = units::lpm(size)?;
        let packets = bench.packets;
        let run = |program| Runner::new(program, &request, packets);
        opens.program.run(&request, TABLE)?;
        let [
            established,
            refused,
            empty,
            from,
            here,
            any,
            any_base,
            opens,
            opens_base,
            lpm,
            lpm_base,
        ] = measure(
            bench.rounds,
            [
                run(&subject.program),
                Runner::new(&subject.program, &denied, packets),
                run(&bench.empty),
                run(&base.verdict),
                run(&subject.verdict),
                run(&any.program),
                run(&any_base.program),
                run(&opens.program),
                run(&opens_base.program),
                run(&lpm.subject),
                run(&lpm.baseline),
            ],
        )?;
        let established = established.minus(&empty);
        let refused = refused.minus(&empty);
        let from = from.minus(&empty);
        let hot = here.minus(&empty);
        let random = any.minus(&any_base);
        let opens = opens.minus(&opens_base);
        let lpm = lpm.minus(&lpm_base);
        let lines = [
            ("established, one flow", &established),
            ("denied, one flow", &refused),
            (names::ONE, &hot),
            (names::ANY, &random),
            (names::OPENS, &opens),
            (names::LPM, &lpm),
        ];
        for (what, series) in lines {
            if what == names::OPENS && !opening {
                continue;
            }
            bench.nanoseconds(self.group, &(self.name)(size, what), series);
        }
        if let Some((ratio, of)) = self.ratio
            && of == size
        {
            bench.ratio(ratio, &hot, &from);
        }
        // The largest that was taken stands.
        if self.group == group::MEMBERS && !size.v6 {
            bench.ratio("decide_random_vs_lpm", &random, &lpm);
        }
        Ok(())
    }
}

/// The programs of the size class that the image needs, loaded once.
fn subject<'a>(image: &Image, others: &'a mut Vec<Subject>) -> Result<&'a mut Subject> {
    let words = image.words().len();
    let fresh = Subject::class(words);
    let at = others.iter().position(|other| other.room() == fresh);
    let at = match at {
        Some(at) => at,
        None => {
            others.push(Subject::load(words, TABLE)?);
            others.len() - 1
        }
    };
    Ok(&mut others[at])
}
