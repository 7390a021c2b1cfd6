//! The policies whose verdicts may still arrive: names for rule and segment numbers.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Arc, PoisonError, RwLock},
};

use crate::policy::model::Policy;

/// Policies kept; records of older ones keep their numbers only.
const KEPT: usize = 8;

/// The last policies by generation, newest last.
#[derive(Debug, Default)]
pub struct Generations {
    kept: RwLock<VecDeque<(u32, Arc<Policy>)>>,
}

impl Generations {
    /// Adds the policy of a generation, or replaces it (same image, other names or lines).
    pub fn insert(&self, generation: u32, policy: Arc<Policy>) {
        let mut kept = self.kept.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = kept.iter_mut().find(|(g, _)| *g == generation) {
            entry.1 = policy;
            return;
        }
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back((generation, policy));
    }

    /// Drops a generation that never judged a packet.
    pub fn remove(&self, generation: u32) {
        let mut kept = self.kept.write().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(g, _)| *g != generation);
    }

    /// The policy of a generation, if it is still kept.
    pub fn get(&self, generation: u32) -> Option<Arc<Policy>> {
        let kept = self.kept.read().unwrap_or_else(PoisonError::into_inner);
        kept.iter()
            .find(|(g, _)| *g == generation)
            .map(|(_, policy)| Arc::clone(policy))
    }

    /// Names of all segments of all kept policies.
    pub fn segment_names(&self) -> BTreeSet<String> {
        let kept = self.kept.read().unwrap_or_else(PoisonError::into_inner);
        kept.iter()
            .flat_map(|(_, policy)| policy.segments.iter().map(|s| s.name.clone()))
            .collect()
    }
}
