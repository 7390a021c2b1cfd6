//! Packets through the gateway, subject by subject in turn: nanoseconds a packet, of one CPU that
//! does everything from the sender's system call to the receiver's interface.

use super::{
    policy::{Flow, Shape},
    router::Router,
    subject::Subject,
};
use crate::netns::Family;

/// Packets timed together: some two milliseconds, so that most windows meet no other task.
const WINDOW: u64 = 1_000;
/// Packets before them.
const WARM_UP: u64 = 500;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Traffic {
    /// Flows that are established, in turn.
    Established(u64),
    /// An allowed flow with each packet, never seen before.
    New,
    /// Flows that no rule allows, in turn.
    DeniedAgain(u64),
    /// A flow with each packet that no rule allows, never seen before.
    DeniedNew,
}

/// A thing to measure.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub name: &'static str,
    pub family: Family,
    pub traffic: Traffic,
}

const fn case(name: &'static str, family: Family, traffic: Traffic) -> Case {
    Case {
        name,
        family,
        traffic,
    }
}

/// All of them.
pub const CASES: [Case; 7] = [
    case("1", Family::V4, Traffic::Established(1)),
    case("1k", Family::V4, Traffic::Established(1_000)),
    case("1k_v6", Family::V6, Traffic::Established(1_000)),
    case("newflow", Family::V4, Traffic::New),
    case("newflow_v6", Family::V6, Traffic::New),
    case("denied_1k", Family::V4, Traffic::DeniedAgain(1_000)),
    case("denied_new", Family::V4, Traffic::DeniedNew),
];

/// A subject, and a wire of its own.
pub struct Stage {
    pub name: &'static str,
    router: Router,
    subject: Box<dyn Subject>,
}

impl Stage {
    pub fn new(mut subject: Box<dyn Subject>) -> Self {
        let router = Router::new();
        subject.on(&router.wire.gateway);
        Self {
            name: subject.name(),
            router,
            subject,
        }
    }

    pub fn router(&self) -> &Router {
        &self.router
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.subject.off(&self.router.wire.gateway);
    }
}

/// One window of one subject.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Nanoseconds a packet offered.
    pub ns: f64,
    /// Share of packets that came out.
    pub delivered: f64,
}

/// Numbers of flows that were not used yet.
pub struct Fresh(u64);

impl Fresh {
    pub fn new() -> Self {
        Self(1 << 20)
    }

    fn take(&mut self, count: u64) -> std::ops::Range<u64> {
        let first = self.0;
        self.0 += count;
        first..self.0
    }
}

impl Default for Fresh {
    fn default() -> Self {
        Self::new()
    }
}

/// Windows of each subject in turn, `rounds` times, beginning with another each time: one list for
/// each stage, in which equal places are of the same moment.
pub fn packets(
    stages: &[Stage],
    shape: Shape,
    case: Case,
    rounds: usize,
    fresh: &mut Fresh,
) -> Vec<Vec<Sample>> {
    let mut samples = vec![Vec::new(); stages.len()];
    for round in 0..rounds {
        // The same flows for all.
        let numbers = fresh.take(WARM_UP + WINDOW);
        for turn in 0..stages.len() {
            let at = (turn + round) % stages.len();
            let sample = sample(&stages[at].router, shape, case, numbers.clone());
            samples[at].push(sample);
        }
    }
    samples
}

fn sample(router: &Router, shape: Shape, case: Case, numbers: std::ops::Range<u64>) -> Sample {
    let allowed = |number| shape.allowed(case.family, number);
    let denied = |number| shape.denied(case.family, number);
    let (warm, fresh) = (
        numbers.start..numbers.start + WARM_UP,
        numbers.start + WARM_UP..numbers.end,
    );
    let again = |count, flow: &dyn Fn(u64) -> Flow| {
        let numbers = (0..count).cycle().take(usize::try_from(WINDOW).unwrap());
        router.frames(numbers.map(flow))
    };
    // What was in the caches before is other subjects'.
    let mut frames = match case.traffic {
        Traffic::Established(count) => {
            // Both ends speak, or conntrack calls none of it established.
            router.forth(&mut router.frames((0..count).map(allowed)));
            let answered = router.back(&mut router.answers((0..count).map(allowed)));
            assert!(answered >= count, "{answered} of {count} answers came");
            again(count, &allowed)
        }
        Traffic::DeniedAgain(count) => {
            router.forth(&mut router.frames((0..count).map(denied)));
            again(count, &denied)
        }
        Traffic::New => {
            router.forth(&mut router.frames(warm.map(allowed)));
            router.frames(fresh.map(allowed))
        }
        Traffic::DeniedNew => {
            router.forth(&mut router.frames(warm.map(denied)));
            router.frames(fresh.map(denied))
        }
    };
    let (ns, came) = router.forth(&mut frames);
    Sample {
        ns,
        delivered: came as f64 / frames.len() as f64,
    }
}
