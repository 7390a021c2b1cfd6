//! Who runs what: a few workers, each with a guest, take test binaries from one queue per kernel.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::kernels::Kernel;

/// Guests of a kernel that may break off, or not come up, before it is given up: each may have hung for as long as a
/// test binary may take.
const BROKEN: usize = 3;

/// What is left to do, by kernel.
pub struct Queue(Mutex<BTreeMap<Kernel, Left>>);

struct Left {
    /// Names of binaries, the next one first.
    binaries: Vec<String>,
    /// Guests at work on it.
    guests: usize,
    broken: usize,
}

impl Queue {
    /// `plans` has the binaries of each kernel in the order in which they are to run.
    pub fn new(plans: impl IntoIterator<Item = (Kernel, Vec<String>)>) -> Self {
        let left = |(kernel, binaries)| {
            let left = Left {
                binaries,
                guests: 0,
                broken: 0,
            };
            (kernel, left)
        };
        Self(Mutex::new(plans.into_iter().map(left).collect()))
    }

    fn with<T>(&self, change: impl FnOnce(&mut BTreeMap<Kernel, Left>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The kernel that a worker without a guest is to boot: one that has none, or else the one with
    /// most to do for each guest; none when all is done, or under way.
    pub fn kernel(&self) -> Option<Kernel> {
        self.with(|kernels| {
            let (kernel, left) = kernels
                .iter_mut()
                .filter(|(_, left)| !left.binaries.is_empty())
                // Of equals the oldest: it has more to do.
                .rev()
                .max_by_key(|(_, left)| {
                    let share = left.binaries.len() / (left.guests + 1);
                    (left.guests == 0, share)
                })?;
            left.guests += 1;
            Some(*kernel)
        })
    }

    /// The binary that a guest of this kernel is to run next.
    pub fn binary(&self, kernel: Kernel) -> Option<String> {
        self.with(|kernels| {
            let binaries = &mut kernels.get_mut(&kernel)?.binaries;
            (!binaries.is_empty()).then(|| binaries.remove(0))
        })
    }

    /// A guest has ended. Some that broke off, or never came up, end the work on their kernel; false
    /// then. What is left is missing in the end, and said to be.
    pub fn ended(&self, kernel: Kernel, how: End) -> bool {
        self.with(|kernels| {
            let Some(left) = kernels.get_mut(&kernel) else {
                return true;
            };
            left.guests = left.guests.saturating_sub(1);
            left.broken += usize::from(how != End::Done);
            let goes_on = left.broken < BROKEN;
            if !goes_on {
                left.binaries.clear();
            }
            goes_on
        })
    }
}

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// There was nothing left to do.
    Done,
    /// While it had something to do.
    BrokeOff,
    /// Before it asked for anything.
    NeverUp,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn queue() -> Queue {
        Queue::new([
            (Kernel::V6_1, names(&["a", "b", "c"])),
            (Kernel::V6_12, names(&["a"])),
        ])
    }

    #[test]
    fn a_worker_that_is_done_with_its_kernel_helps_with_the_other() {
        let queue = queue();
        assert_eq!(queue.kernel(), Some(Kernel::V6_1));
        assert_eq!(queue.binary(Kernel::V6_1).as_deref(), Some("a"));
        assert_eq!(queue.kernel(), Some(Kernel::V6_12));
        assert_eq!(queue.binary(Kernel::V6_12).as_deref(), Some("a"));
        assert_eq!(queue.binary(Kernel::V6_12), None);
        assert!(queue.ended(Kernel::V6_12, End::Done));
        assert_eq!(queue.kernel(), Some(Kernel::V6_1));
        assert_eq!(queue.binary(Kernel::V6_1).as_deref(), Some("b"));
        assert_eq!(queue.binary(Kernel::V6_1).as_deref(), Some("c"));
        assert_eq!(queue.kernel(), None);
    }

    #[test]
    fn every_binary_runs_once_whoever_takes_it() {
        let queue = queue();
        let mut ran = Vec::new();
        while let Some(kernel) = queue.kernel() {
            // A guest that breaks off after one binary.
            ran.extend(queue.binary(kernel).map(|name| (kernel, name)));
            queue.ended(kernel, End::Done);
        }
        ran.sort();
        let all = [
            (Kernel::V6_1, "a"),
            (Kernel::V6_1, "b"),
            (Kernel::V6_1, "c"),
            (Kernel::V6_12, "a"),
        ];
        assert_eq!(ran, all.map(|(kernel, name)| (kernel, name.to_owned())));
    }

    #[test]
    fn a_kernel_that_does_not_boot_or_keeps_breaking_is_given_up() {
        let queue = queue();
        for _ in 1..BROKEN {
            assert!(queue.ended(Kernel::V6_1, End::NeverUp));
        }
        assert!(!queue.ended(Kernel::V6_1, End::NeverUp));
        assert_eq!(queue.kernel(), Some(Kernel::V6_12), "the other goes on");
        let queue = Queue::new([(Kernel::V6_1, names(&["a", "b", "c", "d"]))]);
        for _ in 1..BROKEN {
            assert_eq!(queue.kernel(), Some(Kernel::V6_1));
            assert!(queue.ended(Kernel::V6_1, End::BrokeOff));
        }
        assert!(!queue.ended(Kernel::V6_1, End::BrokeOff));
        assert_eq!(queue.kernel(), None);
        assert_eq!(queue.binary(Kernel::V6_1), None);
    }
}
