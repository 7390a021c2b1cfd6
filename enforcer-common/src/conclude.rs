//! What follows from the image's answer: the verdict, and what becomes of the flow's entry.
//!
//! Third step of the judgement, see [`crate::judge`]. Must not know: the image.

use crate::{
    decide::{Decision, RENEWED, Time},
    flow::{Change, FlowSlot as _, FlowTable, SESSION, TIMED},
    image::{VERDICT_SESSION, VERDICT_TIMELINE},
    judge::{Judgement, MIDSTREAM, OPEN, PASS, Plan, REJUDGE, REJUDGE_RELATED, Scene},
    verdict::{Outcome, Reason},
    wire::FlowEntry,
};

#[inline(always)]
fn decided(plan: &Plan) -> Decision {
    if plan.step == PASS {
        return Decision {
            rule: plan.rule,
            ..Decision::pass(Reason::from_bits(plan.reason))
        };
    }
    Decision::unpack(plan.words)
}

/// How an entry depends on time that these verdict words admit.
#[inline(always)]
const fn timing(words: u64) -> u32 {
    let word = words as u32;
    if word & VERDICT_SESSION != 0 {
        TIMED | SESSION
    } else if word & VERDICT_TIMELINE != 0 {
        TIMED
    } else {
        0
    }
}

/// Enters a flow that `words` admit.
#[inline(always)]
fn enter<F: FlowTable, T: Time>(table: &F, scene: &Scene<T>, plan: &Plan, reversed: bool) -> bool {
    let (words, flags, selector) = if reversed {
        (
            plan.reverse_words,
            plan.reverse_flags,
            plan.reverse.selector(),
        )
    } else {
        (plan.words, plan.flags, plan.ask.selector())
    };
    let timing = timing(words);
    let boot = if timing != 0 { scene.time.boot() } else { 0 };
    let arrived = if plan.side != 0 {
        [0, plan.ifindex]
    } else {
        [plan.ifindex, 0]
    };
    let entry = FlowEntry {
        last_seen: scene.clock.now,
        generation: plan.generation,
        rule: Decision::unpack(words).rule,
        flags: flags | timing,
        selector,
        opened: boot,
        checked: boot,
        arrived,
    };
    table.insert(&plan.key, &entry)
}

/// The verdict on a flow that was admitted before.
#[inline(always)]
fn judged_again(plan: &Plan) -> Decision {
    let mut decision = Decision::unpack(plan.words);
    if aside(&decision) {
        return decision;
    }
    if !decision.outcome.passes() {
        if plan.stale != 0 {
            decision.reason = Reason::Revoked;
        } else if plan.due != 0 {
            decision.reason = Reason::Expired;
        }
        return decision;
    }
    if plan.step == REJUDGE_RELATED {
        // The error itself, from whatever router, must not be spoofed.
        let error = Decision::unpack(plan.reverse_words);
        if !error.outcome.passes() {
            return error;
        }
    }
    decision
}

/// Who sent this packet is another matter than whether the flow may go on; also where it passes
/// because it is only observed, it says nothing of the flow.
#[inline(always)]
fn aside(decision: &Decision) -> bool {
    matches!(decision.reason, Reason::Spoofed | Reason::Martian)
}

/// The verdict on a flow that was admitted before, and its entry brought up to date.
#[inline(always)]
fn go_on<F: FlowTable, T: Time>(table: &F, scene: &Scene<T>, plan: &Plan) -> Decision {
    let mut decision = judged_again(plan);
    if !decision.outcome.passes() || aside(&decision) {
        return decision;
    }
    let timing = timing(plan.words);
    // An error about a session is no sign of life of its ends.
    let related = plan.step == REJUDGE_RELATED && timing & SESSION != 0;
    if !related && let Some(slot) = table.find(&plan.key) {
        let goes_on = plan.step == REJUDGE;
        slot.change(&Change {
            flags: if goes_on { plan.flags } else { 0 },
            admits: 1,
            generation: plan.generation,
            rule: decision.rule,
            timing,
            boot: if timing != 0 { scene.time.boot() } else { 0 },
            begins: u32::from(plan.found & SESSION == 0 || plan.words as u32 & RENEWED != 0),
            side: if goes_on && plan.ifindex != 0 {
                plan.side
            } else {
                u32::MAX
            },
            ifindex: plan.ifindex,
        });
        if goes_on {
            slot.touch(scene.clock.now, plan.bytes);
        }
    }
    let settled = plan.stale == 0 && plan.due == 0;
    if decision.reason == Reason::Failsafe {
        return decision;
    }
    if settled {
        // The judgement stands, whatever it was; only the packet had to be looked at.
        decision = Decision {
            rule: plan.rule,
            ..Decision::pass(Reason::Established)
        };
    }
    if plan.step == REJUDGE_RELATED && decision.outcome == Outcome::Allowed {
        decision.reason = Reason::Related;
    }
    decision
}

/// The verdict on a packet that no entry speaks for, and whether it is the one on the far end as
/// the opener.
#[inline(always)]
fn either(plan: &Plan, decision: Decision) -> (Decision, bool) {
    if plan.step == MIDSTREAM && decision.outcome != Outcome::Allowed {
        // Whichever end may have opened the flow; a clear "allowed" in either direction goes before
        // a pass that would be recorded. Not for a packet that is not what it says: then nothing
        // about the flow matters.
        let reverse = Decision::unpack(plan.reverse_words);
        if !aside(&decision)
            && (reverse.outcome == Outcome::Allowed
                || (!decision.outcome.passes() && reverse.outcome.passes()))
        {
            return (reverse, true);
        }
    }
    (decision, false)
}

/// The far end's own right to a flow that may not go on by its opener's, if it has one.
#[inline(always)]
fn own_right(plan: &Plan, decision: &Decision) -> Option<Decision> {
    let own = Decision::unpack(plan.reverse_words);
    let asked = plan.step == REJUDGE && plan.has_reverse != 0;
    (!decision.outcome.passes() && asked && own.outcome.passes()).then_some(own)
}

/// The verdict that [`conclude`] would come to, for who has no entry to change: of a policy that
/// does not judge. Only the reason may be another, where the entry speaks for itself.
#[inline(always)]
pub fn verdict(plan: &Plan) -> Decision {
    let decision = decided(plan);
    match plan.step {
        OPEN | MIDSTREAM => either(plan, decision).0,
        REJUDGE | REJUDGE_RELATED => {
            let decision = judged_again(plan);
            own_right(plan, &decision).unwrap_or(decision)
        }
        _ => decision,
    }
}

/// What follows from the answer: the verdict, and what becomes of the flow's entry.
#[inline(always)]
pub fn conclude<F: FlowTable, T: Time>(table: &F, scene: &Scene<T>, plan: &Plan) -> Judgement {
    let mut insert_failed = false;
    let mut decision = decided(plan);
    match plan.step {
        OPEN | MIDSTREAM => {
            let reversed;
            (decision, reversed) = either(plan, decision);
            // What is essential needs no entry. The reply of a failsafe's flow gets none either: it
            // would make its sender the opener, whom the next policy need not let go on.
            let reply = decision.reason == Reason::Failsafe && plan.ifindex == 0;
            let entered = decision.reason != Reason::Essential && !reply;
            if decision.outcome.passes() && entered {
                insert_failed = !enter(table, scene, plan, reversed);
            }
        }
        REJUDGE | REJUDGE_RELATED => {
            decision = go_on(table, scene, plan);
            if let Some(own) = own_right(plan, &decision) {
                insert_failed = !enter(table, scene, plan, true);
                decision = own;
            }
        }
        _ => {}
    }
    if plan.has_fragments != 0 && decision.outcome.passes() {
        insert_failed |= !table.insert_fragment(&plan.fragment_key, &plan.fragment);
    }
    Judgement {
        decision,
        insert_failed,
    }
}
