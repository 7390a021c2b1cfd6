//! What the control task is asked for by people.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::oneshot;

use crate::api::{
    changes::{Changed, Detached},
    peer::Named,
    types::{RefusalCode, Reloaded},
};

/// Why it was not done, for a person and for a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Kind.
    pub code: RefusalCode,
    /// May have several lines.
    pub error: String,
}

impl Refused {
    /// Another change is in the way.
    pub fn conflict(error: impl Into<String>) -> Self {
        Self {
            code: RefusalCode::Conflict,
            error: error.into(),
        }
    }

    /// The policy cannot be used.
    pub fn rejected(error: impl Into<String>) -> Self {
        Self {
            code: RefusalCode::Rejected,
            error: error.into(),
        }
    }
}

/// Where the answer goes.
pub type Answer<T> = oneshot::Sender<Result<T, Refused>>;

/// A request for a change.
pub enum Ask {
    /// Read the watched files again.
    Reload {
        /// Who asks.
        by: Arc<Named>,
        /// Where the answer goes.
        answer: Answer<Reloaded>,
    },
    /// Put something else in force.
    Propose {
        /// What.
        proposal: Box<Proposal>,
        /// Where the answer goes.
        answer: Answer<Changed>,
    },
    /// Take the programs off.
    Detach {
        /// Who asks.
        by: Arc<Named>,
        /// Where the answer goes.
        answer: Answer<Detached>,
    },
    /// What is on trial is to stay.
    Confirm {
        /// Who asks.
        by: Arc<Named>,
        /// Where the answer goes.
        answer: Answer<Changed>,
    },
}

/// What somebody wants in force.
#[derive(Clone, Debug)]
pub struct Proposal {
    /// Where it comes from.
    pub what: What,
    /// On trial for so long.
    pub within: Option<Duration>,
    /// For the history.
    pub message: Option<String>,
    /// Who asks.
    pub by: Arc<Named>,
    /// What the files must say, as [`Changed::content`] has it.
    pub content: Option<String>,
    /// Nothing is to be changed.
    pub dry_run: bool,
}

/// Where a proposal comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A directory or a file.
    Path(PathBuf),
    /// The state that this change has put in force; without a number, the one before.
    State(Option<u64>),
}
