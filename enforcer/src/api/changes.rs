//! Changes of what is in force: asked for, on trial, remembered. Also the form in which the state
//! directory keeps them: fields are only added.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{peer::Named, types::Time};

/// Characters of a message.
pub const LONGEST_MESSAGE: usize = 1_000;
/// Seconds that a trial takes at least: in the last one it cannot be confirmed.
pub const SHORTEST_TRIAL: u64 = 3;
/// … and at most.
pub const LONGEST_TRIAL: u64 = 86_400;

/// Answer to `POST /v1/detach`. Nothing is enforced any more, and the daemon ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Detached {
    /// Interfaces that were enforced.
    pub interfaces: Vec<String>,
}

/// What somebody, or the daemon, did or tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// The daemon began.
    Start,
    /// The watched files changed, or were read again at somebody's word.
    Reload,
    /// A policy was applied.
    Apply,
    /// The policy on trial was confirmed.
    Confirm,
    /// The policy on trial was taken back.
    Revert,
    /// An earlier state was put in force again.
    Rollback,
    /// The programs were taken off.
    Detach,
}

impl ChangeKind {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Reload => "reload",
            Self::Apply => "apply",
            Self::Confirm => "confirm",
            Self::Revert => "revert",
            Self::Rollback => "rollback",
            Self::Detach => "detach",
        }
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ChangeOutcome {
    /// It is in force, for good.
    InForce,
    /// It is in force until its deadline.
    OnTrial,
    /// It was on trial, and stayed.
    Confirmed,
    /// It was on trial, and what was in force before came back.
    Reverted,
    /// What was in force before stayed.
    Refused,
    /// Nothing judges packets any more.
    NotEnforcing,
}

impl ChangeOutcome {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::InForce => "in force",
            Self::OnTrial => "on trial",
            Self::Confirmed => "confirmed",
            Self::Reverted => "reverted",
            Self::Refused => "refused",
            Self::NotEnforcing => "not enforcing",
        }
    }
}

/// A line of the history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Change {
    /// Counts from 1, and never twice.
    pub number: u64,
    /// When.
    pub time: Time,
    /// What was done.
    pub kind: ChangeKind,
    /// Who asked for it; `None`: the daemon, see `cause`.
    pub by: Option<Named>,
    /// Why, where nobody asked: `files changed`, `SIGHUP`, `the deadline passed`.
    pub cause: Option<String>,
    /// What came of it.
    pub outcome: ChangeOutcome,
    /// Where the policy was read.
    pub path: String,
    /// Content hash of its image, as in the status.
    pub hash: Option<String>,
    /// Its segments.
    pub segments: Option<usize>,
    /// Its rules.
    pub rules: Option<usize>,
    /// Generation of the image.
    pub generation: Option<u32>,
    /// The state that it put in force, by the number of the change that made it; `rollback` takes it.
    pub state: Option<u64>,
    /// Whether that state can still be put in force again.
    #[serde(default)]
    pub kept: bool,
    /// Of a trial: seconds until it was to end. Of its end: see `of`.
    pub confirm_within: Option<u64>,
    /// The trial that this ended, by its number.
    pub of: Option<u64>,
    /// What the person had to say.
    pub message: Option<String>,
    /// Why it was refused, or why it is not what was asked for.
    pub error: Option<String>,
}

/// The answer to `GET /v1/history`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct History {
    /// Oldest first.
    pub changes: Vec<Change>,
    /// Older ones that are not kept any more.
    pub dropped: u64,
    /// The state in force; `None` when nothing ever was, but on trial.
    pub in_force: Option<u64>,
    /// The state that `rollback` without a number goes back to.
    pub before: Option<u64>,
    /// Where it is kept; `None`: in memory, until the daemon ends.
    pub directory: Option<String>,
    /// Why it may not be kept across a restart.
    pub problem: Option<String>,
}

/// How the policy in force came to be so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum OriginKind {
    /// Read from the watched files.
    #[default]
    Watched,
    /// Somebody applied another directory: a copy of it is kept.
    Applied,
    /// Somebody went back to an earlier state.
    RolledBack,
    /// The watched files cannot be used: the last good policy.
    LastGood,
    /// Built in: everything passes. What a first trial goes back to.
    PassAll,
}

/// Where the policy in force came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Origin {
    /// In a word.
    pub kind: OriginKind,
    /// Directory or file that it was read from.
    pub path: String,
    /// The change that put it in force.
    pub change: Option<u64>,
    /// The state that it is; `rollback` takes it.
    pub state: Option<u64>,
    /// Who did so; `None`: the daemon.
    pub by: Option<Named>,
    /// When.
    pub at: Time,
    /// Whether the watched files say something else; `None`: not known.
    pub differs: Option<bool>,
}

/// A policy that is in force until its deadline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TrialStatus {
    /// Number of the change.
    pub change: u64,
    /// What is on trial.
    pub path: String,
    /// Who began it; `None`: the daemon, at its start.
    pub by: Option<Named>,
    /// When.
    pub since: Time,
    /// When the kernel goes back to `previous`, unless it is confirmed.
    pub deadline: Time,
    /// The same in milliseconds from now; 0: it is going back.
    pub remaining_ms: u64,
    /// What comes back then.
    pub previous: String,
}

/// Body of `POST /v1/apply`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ApplyRequest {
    /// Absolute path of a directory or a file, which the daemon reads; it must be safe from others.
    pub path: PathBuf,
    /// Seconds within which the change must be confirmed; without: it is for good.
    #[serde(default)]
    pub confirm_within: Option<u64>,
    /// For the history.
    #[serde(default)]
    pub message: Option<String>,
    /// Say what would come of it, and change nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// Refuse if the files are not those of an earlier answer with this `content`.
    #[serde(default)]
    pub content: Option<String>,
}

/// Body of `POST /v1/rollback`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RollbackRequest {
    /// Number of a change: the state that it put in force. Without: the state before the one in
    /// force; during a trial, the end of it.
    #[serde(default)]
    pub to: Option<u64>,
    /// Seconds within which the change must be confirmed; without: it is for good.
    #[serde(default)]
    pub confirm_within: Option<u64>,
    /// For the history.
    #[serde(default)]
    pub message: Option<String>,
    /// Say what would come of it, and change nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// Refuse if the files are not those of an earlier answer with this `content`.
    #[serde(default)]
    pub content: Option<String>,
}

/// The answer to `POST /v1/apply`, `/v1/confirm` and `/v1/rollback`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Changed {
    /// Number in the history; `None` of a dry run.
    pub change: Option<u64>,
    /// Whether another image judges packets than before, or would.
    pub changed: bool,
    /// Generation that judges now.
    pub generation: u32,
    /// Where the policy was read.
    pub path: String,
    /// Content hash of the image, as in the status.
    pub hash: String,
    /// Its segments.
    pub segments: usize,
    /// Its rules.
    pub rules: usize,
    /// What the files say, as a hash.
    pub content: String,
    /// Whether nothing was changed, as was asked for.
    pub dry_run: bool,
    /// The trial that began.
    pub trial: Option<TrialStatus>,
    /// What somebody should look at: in the policy, or about its being kept.
    pub warnings: Vec<String>,
}
