//! What a plan says. The JSON of the control socket: fields are only added.

use std::{net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};

/// The difference between a policy and the one in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Plan {
    /// Whether there is any.
    pub changed: bool,
    /// Directory or file that was compared.
    pub path: String,
    /// Content hash of its image, 16 hex digits.
    pub hash: String,
    /// Where the policy in force was read.
    pub live_path: String,
    /// Its hash.
    pub live_hash: String,
    /// Its generation.
    pub generation: u32,
    /// What its author should look at: warnings as `enforcer check` writes them.
    pub warnings: Vec<String>,
    /// What is written differently.
    pub text: TextChanges,
    /// Who reaches whom differently.
    pub reach: ReachChanges,
    /// Live flows that do not go on as they do now.
    pub flows: FlowChanges,
    /// The summary, in one line.
    pub summary: String,
}

/// Whether a thing is there before, after, or both and not the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Sign {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// It says something else.
    Changed,
}

/// A thing that is written differently.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Item {
    /// What became of it.
    pub sign: Sign,
    /// Its name.
    pub name: String,
    /// Where it is written; where it was, if it is gone. `None`: the built-in default.
    pub file: Option<Arc<str>>,
    /// 1-based.
    pub line: Option<u32>,
    /// What it says, or what is different about it: `mode: observe -> enforce`. A bounded list.
    pub details: Vec<String>,
    /// Details that were left out.
    pub more: usize,
}

/// What is written differently, in the order of the files; what is gone comes last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TextChanges {
    /// `defaults:` and the order of rules.
    pub policy: Items,
    /// Segments and their members.
    pub segments: Items,
    /// Groups.
    pub groups: Items,
    /// Rules.
    pub rules: Items,
    /// The daemon's settings.
    pub settings: Items,
}

/// A bounded list, and how many there are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Items {
    /// All that are new.
    pub added: usize,
    /// All that are gone.
    pub removed: usize,
    /// All that are not the same.
    pub changed: usize,
    /// The first of them.
    pub items: Vec<Item>,
}

/// What happens to a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Dropped and recorded.
    Denied,
    /// It passes.
    Allowed,
    /// Judged denied, `mode: observe`: it passes and is recorded.
    WouldDeny,
    /// Judged denied, `mode: off`: it passes.
    Off,
}

impl Outcome {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Allowed => "allowed",
            Self::WouldDeny => "observed",
            Self::Off => "off",
        }
    }

    /// Whether the flow goes on.
    pub fn passes(self) -> bool {
        self != Self::Denied
    }
}

impl From<enforcer_common::verdict::Outcome> for Outcome {
    fn from(outcome: enforcer_common::verdict::Outcome) -> Self {
        use enforcer_common::verdict::Outcome as Common;
        match outcome {
            Common::Denied => Self::Denied,
            Common::Allowed => Self::Allowed,
            Common::WouldDeny => Self::WouldDeny,
            Common::Off => Self::Off,
        }
    }
}

/// Who decided about a flow.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Because {
    /// What happens.
    pub outcome: Outcome,
    /// `rule_allow`, `rule_deny`, `default_deny`, `unsegmented`, `failsafe`, `spoofed`, ….
    pub reason: String,
    /// The rule.
    pub rule: Option<Arc<str>>,
    /// The segment whose default deny it is.
    pub segment: Option<Arc<str>>,
    /// Where the rule or the segment is written.
    pub file: Option<Arc<str>>,
    /// 1-based.
    pub line: Option<u32>,
}

/// Addresses that are in the same segments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct End {
    /// The segments that they are in by the new policy, `unsegmented` if in none; `host` and
    /// `multicast` stand for such addresses.
    pub after: Vec<String>,
    /// Those that they are in now, where these are others.
    pub before: Option<Vec<String>>,
}

/// Services that change in the same way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ReachChange {
    /// What happens now.
    pub before: Outcome,
    /// What will happen.
    pub after: Outcome,
    /// To which services: `tcp/5432`, `any but tcp/80`. A bounded list.
    pub services: Vec<String>,
    /// Services that were left out.
    pub more: usize,
    /// A flow to which it happens.
    pub example: Example,
}

/// A flow to ask `enforcer explain` about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Example {
    /// Who opens it.
    pub from: IpAddr,
    /// To whom.
    pub to: IpAddr,
    /// What.
    pub service: String,
    /// Who decides now.
    pub before: Because,
    /// Who will decide.
    pub after: Because,
}

/// The same change between each of `from` and each of `to`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ReachGroup {
    /// Who opens flows. A bounded list.
    pub from: Vec<End>,
    /// Those that were left out.
    pub more_from: usize,
    /// To whom. A bounded list.
    pub to: Vec<End>,
    /// Those that were left out.
    pub more_to: usize,
    /// Pairs of them.
    pub pairs: u64,
    /// What changes.
    pub changes: Vec<ReachChange>,
}

/// Who reaches whom differently, now; by rules alone, without what the settings let pass.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ReachChanges {
    /// Pairs of which some service passes now and will be denied.
    pub lost: u64,
    /// Pairs of which some service is denied now and will pass.
    pub gained: u64,
    /// Pairs of which some service passes as before, but is recorded or not.
    pub regarded: u64,
    /// What changes; the first of them.
    pub groups: Vec<ReachGroup>,
    /// Groups that were left out.
    pub more: usize,
    /// Why the comparison is not complete; empty when it is.
    pub cut: Vec<String>,
}

/// A live flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct LiveFlow {
    /// Who opened it.
    pub from: IpAddr,
    /// Source port; `None` where there are none.
    pub from_port: Option<u16>,
    /// To whom.
    pub to: IpAddr,
    /// Destination port; `None` where there are none.
    pub to_port: Option<u16>,
    /// `tcp`, `udp`, `icmp`, `proto/47`, ….
    pub protocol: String,
    /// As a rule names it: `tcp/5432`, `icmp/echo-request`.
    pub service: String,
    /// The interface of link-local addresses.
    pub ifindex: Option<u32>,
    /// `one_way`: nobody answered yet; `answered`; `closing`: FIN or RST was seen.
    pub state: String,
    /// Generation of the policy that admitted it.
    pub generation: u32,
    /// Seconds since its last packet, as far as known.
    pub idle: Option<u32>,
    /// Packets, modulo 2³².
    pub packets: u32,
    /// Bytes of the packets after the first.
    pub bytes: u64,
    /// Every segment of `from`, by the policy in force.
    pub from_segments: Vec<String>,
    /// Every segment of `to`.
    pub to_segments: Vec<String>,
    /// What the policy in force says of its opener's next packet.
    pub now: Because,
}

/// A live flow that does not go on as it does now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ChangedFlow {
    /// The flow.
    #[serde(flatten)]
    pub flow: LiveFlow,
    /// What the new policy will say of its next packet.
    pub then: Because,
}

/// Live flows that do not go on as they do now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct FlowChanges {
    /// Live flows that were judged.
    pub judged: u64,
    /// Those that would be cut.
    pub cut: u64,
    /// Those that would go on and be recorded as WOULD_DENY, and are not yet.
    pub would_deny: u64,
    /// Flows that would be cut, those with most bytes first.
    pub cut_flows: Vec<ChangedFlow>,
    /// Flows that would be recorded, likewise.
    pub would_deny_flows: Vec<ChangedFlow>,
    /// Why the flows could not be judged.
    pub error: Option<String>,
}

/// The answer to `GET /v1/flows`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Flows {
    /// Generation of the policy in force.
    pub generation: u32,
    /// Live flows in all.
    pub total: u64,
    /// Those that the filter lets through.
    pub matched: u64,
    /// Of those the ones with most bytes, as many as were asked for.
    pub flows: Vec<LiveFlow>,
}
