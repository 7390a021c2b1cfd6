//! What daemon and clients say to each other. The JSON is the contract; fields are only added.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::changes::{Origin, TrialStatus};
use crate::policy::{Diagnostic, Severity};

/// A moment, written as RFC 3339 in UTC with milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub jiff::Timestamp);

impl Time {
    /// The present.
    pub fn now() -> Self {
        Self(jiff::Timestamp::now())
    }

    /// So much later than now; for ever is not.
    pub fn after(duration: std::time::Duration) -> Self {
        let now = jiff::Timestamp::now();
        Self(now.saturating_add(duration).unwrap_or(now))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}", self.0)
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(de::Error::custom)
    }
}

/// Whether and how well the host is enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// All that was asked for is enforced, and what runs is what is written.
    Enforcing,
    /// Something is enforced, but not all, or not as written: see [`Status::problems`].
    Degraded,
    /// No interface is enforced.
    NotEnforcing,
}

impl State {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Enforcing => "enforcing",
            Self::Degraded => "degraded",
            Self::NotEnforcing => "not_enforcing",
        }
    }
}

/// The policy that judges packets now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PolicyStatus {
    /// Directory or file it was read from.
    pub path: String,
    /// Number of segments.
    pub segments: usize,
    /// Number of rules.
    pub rules: usize,
    /// Content hash of the image, 16 hex digits; equal for equal meaning.
    pub hash: String,
    /// When it took effect.
    pub loaded_at: Time,
    /// Why the files as they are now are not what runs; `None` when they are.
    pub last_error: Option<String>,
    /// Where it came from.
    #[serde(default)]
    pub origin: Option<Origin>,
}

/// What becomes of the packets of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum InterfaceState {
    /// They are judged here.
    Enforced,
    /// They need not be judged here, or are not to be: the reason says why.
    Exempt,
    /// They pass.
    Unprotected,
    /// They are to be judged here, and are not: the error says why.
    Failed,
}

impl InterfaceState {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Enforced => "enforced",
            Self::Exempt => "exempt",
            Self::Unprotected => "unprotected",
            Self::Failed => "failed",
        }
    }
}

/// An interface of the host, or one that should be there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct InterfaceStatus {
    /// Name.
    pub name: String,
    /// Kernel index; 0 when the interface does not exist.
    pub ifindex: u32,
    /// Programs attached to it.
    pub hooks: Vec<String>,
    /// What becomes of its packets.
    pub state: InterfaceState,
    /// Why it is enforced (what asked for it), exempt, or unprotected.
    pub reason: Option<String>,
    /// Whether its packets are judged.
    pub enforced: bool,
    /// Why not, though they should be.
    pub error: Option<String>,
    /// Number by which `interfaces:` in policies and failsafes know it; 0: unknown to them.
    #[serde(default)]
    pub slot: u32,
    /// `vlan`, `bridge`, `bond`, `veth`, … as the kernel says; `None` for hardware.
    #[serde(default)]
    pub kind: Option<String>,
    /// What it is for: `vlan 20 on eth0`, `port of br0`.
    #[serde(default)]
    pub description: Option<String>,
}

impl InterfaceStatus {
    /// Whether somebody wants it enforced.
    pub fn is_asked_for(&self) -> bool {
        matches!(
            self.state,
            InterfaceState::Enforced | InterfaceState::Failed
        )
    }
}

/// What nothing in the policy cuts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct FailsafeStatus {
    /// Its name.
    pub name: String,
    /// Prefixes that it lets in.
    pub sources: Vec<String>,
    /// Ports of this host: `tcp/22`.
    pub ports: Vec<String>,
    /// Interfaces that it holds at; empty: any.
    pub interfaces: Vec<String>,
}

/// What passes before the policy is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct SettingsStatus {
    /// The file; `None` when there is none and the defaults hold.
    pub path: Option<String>,
    /// Flows that nothing in the policy cuts.
    pub failsafes: Vec<FailsafeStatus>,
    /// Essential protocols that are switched off.
    pub essentials_off: Vec<String>,
    /// Ethertypes that pass besides IP.
    pub ethertypes: Vec<String>,
}

/// A packet counter. Socket hooks count calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CounterStatus {
    /// `tc_ingress`, `tc_egress`, `connect`, `sendmsg`.
    pub hook: String,
    /// `allowed`, `denied`, `would_deny`, `off`.
    pub outcome: String,
    /// `default_deny`, `rule_allow`, ….
    pub reason: String,
    /// How many.
    pub packets: u64,
}

/// What became of the records of denied packets: the sum is the number of such packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct EventStatus {
    /// Packets with a record of their own.
    pub emitted: u64,
    /// Packets in the count of another record.
    pub suppressed: u64,
    /// Packets that are in the counters alone.
    pub lost: u64,
}

/// [`EventStatus`] of one hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct RecordStatus {
    /// `tc_ingress`, `tc_egress`, `connect`, `sendmsg`.
    pub hook: String,
    /// What became of its records.
    #[serde(flatten)]
    pub events: EventStatus,
}

/// The flow table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct FlowTableStatus {
    /// How many flows of each family it has room for.
    pub capacity: u32,
    /// Packets that passed and should have been noted as a flow, but found no place, since the
    /// programs were loaded: answers to them may be denied.
    pub refused: u64,
}

/// A candidate policy in short; all of it is in the answer to `GET /v1/shadow`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ShadowStatus {
    /// Where it was read.
    pub path: String,
    /// Packets and calls that would have fared otherwise, as of a second ago.
    pub differing: u64,
    /// Why it is not asked as it should be.
    pub problem: Option<String>,
}

/// The answer to `GET /v1/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Status {
    /// In a word.
    pub state: State,
    /// Why the state is not [`State::Enforcing`]; one sentence each.
    pub problems: Vec<String>,
    /// What is not wrong, but not as somebody may think.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Generation of the policy.
    pub generation: u32,
    /// The policy.
    pub policy: PolicyStatus,
    /// The trial that it is on.
    #[serde(default)]
    pub trial: Option<TrialStatus>,
    /// The candidate that is asked beside it, and never obeyed.
    #[serde(default)]
    pub shadow: Option<ShadowStatus>,
    /// What passes before it is asked.
    #[serde(default)]
    pub settings: SettingsStatus,
    /// Every interface: those that are enforced or should be, then the unprotected, then the
    /// exempt.
    pub interfaces: Vec<InterfaceStatus>,
    /// What the socket hooks do: `refuse`, `observe`, `off`.
    pub socket_hooks: String,
    /// Why they only observe when they were to refuse.
    #[serde(default)]
    pub socket_hooks_reason: Option<String>,
    /// Those above zero.
    pub counters: Vec<CounterStatus>,
    /// Sums over all hooks.
    pub events: EventStatus,
    /// The same per hook: `emitted + suppressed + lost` is the number of its packets (socket
    /// hooks: calls) that were denied or would have been.
    #[serde(default)]
    pub records: Vec<RecordStatus>,
    /// The flow table.
    #[serde(default)]
    pub flows: FlowTableStatus,
    /// Version of the daemon.
    pub version: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Where programs, maps and links are pinned; `None`: they go with the daemon.
    #[serde(default)]
    pub pins: Option<String>,
    /// When the daemon started.
    pub started_at: Time,
}

/// What happened to a recorded packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Verdict {
    /// Dropped or refused.
    Denied,
    /// Passed; `mode: enforce` would have dropped it.
    WouldDeny,
}

impl Verdict {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Denied => "DENIED",
            Self::WouldDeny => "WOULD_DENY",
        }
    }
}

/// The default that denied. In JSON a string: `guest-wifi (both)`, `unsegmented`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Default {
    /// A segment's default deny.
    Segment {
        /// Its name.
        name: Arc<str>,
        /// What it protects: `both`, `inbound`, `outbound`.
        protects: &'static str,
    },
    /// `defaults.unsegmented: deny`.
    Unsegmented,
    /// A policy that is no longer in memory.
    Gone(String),
}

const PROTECTS: [&str; 3] = ["both", "inbound", "outbound"];

impl fmt::Display for Default {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment { name, protects } => write!(f, "{name} ({protects})"),
            Self::Unsegmented => f.write_str("unsegmented"),
            Self::Gone(text) => f.write_str(text),
        }
    }
}

impl Serialize for Default {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Default {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == "unsegmented" {
            return Ok(Self::Unsegmented);
        }
        for protects in PROTECTS {
            let name = text
                .strip_suffix(')')
                .and_then(|t| t.strip_suffix(protects))
                .and_then(|t| t.strip_suffix(" ("));
            if let Some(name) = name {
                let name = name.into();
                return Ok(Self::Segment { name, protects });
            }
        }
        Ok(Self::Gone(text))
    }
}

/// Who sent a packet or made a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ProcessInfo {
    /// Process id, as the host sees it.
    pub pid: u32,
    /// Command name.
    pub comm: String,
    /// User id, as the host sees it.
    pub uid: u32,
    /// Path below the cgroup v2 root; `id N` when it is gone.
    pub cgroup: String,
}

/// One or more packets (or calls) of one flow that were denied or would have been.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Denial {
    /// Time of the last of them, to within a second when there are several.
    pub time: Time,
    /// What happened.
    pub verdict: Verdict,
    /// Why: `default_deny`, `rule_deny`, `revoked`, `malformed`, ….
    pub reason: String,
    /// The deny rule.
    pub rule: Option<Arc<str>>,
    /// The default deny; for denials of form the default that gives them their strength.
    pub default: Option<Default>,
    /// What the reason means for this packet, in words, where other fields do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Where the rule or the segment is written.
    pub file: Option<Arc<str>>,
    /// 1-based.
    pub line: Option<u32>,
    /// Every segment of the source.
    pub from_segments: Arc<[Arc<str>]>,
    /// Every segment of the destination.
    pub to_segments: Arc<[Arc<str>]>,
    /// Source; `None` when the packet could not be read that far.
    pub src: Option<IpAddr>,
    /// Destination.
    pub dst: Option<IpAddr>,
    /// Source port.
    pub src_port: Option<u16>,
    /// Destination port.
    pub dst_port: Option<u16>,
    /// `tcp`, `udp`, `icmp`, `proto/99`, `ethertype/0x88cc`, ….
    pub protocol: String,
    /// TCP flags of the last packet, `SYN,ACK`.
    pub tcp_flags: Option<String>,
    /// ICMP type.
    pub icmp_type: Option<u8>,
    /// ICMP code.
    pub icmp_code: Option<u8>,
    /// `ingress`, `egress`, `connect`, `sendmsg`.
    pub direction: String,
    /// Interface; `None` for the socket hooks.
    pub interface: Option<Arc<str>>,
    /// The process, where the host knows it.
    pub process: Option<ProcessInfo>,
    /// How many packets this record stands for.
    pub packets: u64,
    /// Generation of the policy that judged.
    pub generation: u32,
}

/// Denied packets that no [`Denial`] describes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Lost {
    /// When it was noticed.
    pub time: Time,
    /// Always `LOST`: tells these lines from denials.
    pub verdict: LostVerdict,
    /// Where they were lost.
    pub cause: LostCause,
    /// How many packets, of any filter.
    pub events: u64,
}

/// The verdict of [`Lost`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum LostVerdict {
    /// `LOST`.
    #[serde(rename = "LOST")]
    Lost,
}

/// Where records were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum LostCause {
    /// Between kernel and daemon. The packets are in the counters.
    RingBufferFull,
    /// This reader was too slow; others were not affected.
    SlowReader,
    /// The daemon keeps the last records only; these were older.
    Store,
}

/// Something that the daemon had put into the kernel was not as it had been left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Tampered {
    /// When it was noticed.
    pub time: Time,
    /// Always `TAMPER`: tells these lines from denials.
    pub verdict: TamperVerdict,
    /// A program on an interface, a pin, an image.
    pub target: String,
    /// What was wrong with it.
    pub what: String,
    /// Whether it is as it was again.
    pub repaired: bool,
}

/// The verdict of [`Tampered`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum TamperVerdict {
    /// `TAMPER`.
    #[serde(rename = "TAMPER")]
    Tamper,
}

/// A line of `GET /v1/denials`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum Record {
    /// Denied packets.
    Denial(Box<Denial>),
    /// A gap.
    Lost(Lost),
    /// Somebody changed what enforces.
    Tampered(Tampered),
}

/// One end of a denial, as a filter names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// This address.
    Address(IpAddr),
    /// Any address of this segment.
    Segment(String),
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(ip) = text.parse() {
            return Ok(Self::Address(ip));
        }
        let named = text.len() <= 63
            && !text.starts_with('-')
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if named && !text.is_empty() {
            Ok(Self::Segment(text.to_owned()))
        } else {
            Err(format!(
                "`{}` is neither an IP address nor a segment name",
                text.escape_debug()
            ))
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(ip) => write!(f, "{ip}"),
            Self::Segment(name) => f.write_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for Peer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// Query of `GET /v1/denials`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct DenialsRequest {
    /// At most so many of those that are kept; all when missing.
    pub last: Option<usize>,
    /// Source.
    pub from: Option<Peer>,
    /// Destination.
    pub to: Option<Peer>,
    /// Stay and send what comes.
    #[serde(default)]
    pub follow: bool,
}

/// Body of `POST /v1/explain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ExplainRequest {
    /// Who opens the flow.
    pub from: IpAddr,
    /// To whom.
    pub to: IpAddr,
    /// `tcp/5432`, `icmp/echo-request`, `postgresql`.
    pub service: String,
}

/// Why a flow is allowed or denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Explanation {
    /// The flow that was asked about.
    #[serde(flatten)]
    pub flow: ExplainRequest,
    /// `ALLOWED`, `DENIED`, `WOULD_DENY`, `OFF` (judged denied, passes unrecorded).
    pub verdict: String,
    /// Mode behind a judged denial: `enforce`, `observe`, `off`.
    pub strength: Option<String>,
    /// `rule_allow`, `rule_deny`, `default_deny`, `unsegmented`.
    pub reason: String,
    /// The rule that decided.
    pub rule: Option<Arc<str>>,
    /// The default that decided.
    pub default: Option<Default>,
    /// Where the rule or the guarding segment is written.
    pub file: Option<Arc<str>>,
    /// 1-based.
    pub line: Option<u32>,
    /// Every segment of the source.
    pub from_segments: Vec<String>,
    /// Every segment of the destination.
    pub to_segments: Vec<String>,
    /// Generation of the image asked; `None` when it is not a running one.
    pub generation: Option<u32>,
    /// Where that policy was read.
    pub policy: String,
}

/// The answer to `POST /v1/reload`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Reloaded {
    /// Whether a new image took over; `false`: the files mean what runs already.
    pub changed: bool,
    /// Generation that judges now.
    pub generation: u32,
}

/// Body of `POST /v1/plan`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PlanRequest {
    /// Whole path of the directory or file to compare with what is in force. Missing: where the
    /// daemon reads its policy.
    #[serde(default)]
    pub path: Option<String>,
}

pub use crate::plan::types::{
    Because, ChangedFlow, End, Example, FlowChanges, Flows, Item, Items, LiveFlow, Outcome, Plan,
    ReachChange, ReachChanges, ReachGroup, Sign, TextChanges,
};

/// Query of `GET /v1/flows`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct FlowsRequest {
    /// Who opened the flow.
    pub from: Option<Peer>,
    /// To whom.
    pub to: Option<Peer>,
    /// A segment that either end is in.
    pub segment: Option<String>,
    /// At most so many, those with most bytes; 1 000 when missing, 10 000 at most.
    pub limit: Option<usize>,
}

/// A mistake in a policy or in settings, as `enforcer check -o json` writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Finding {
    /// Stable code: `E…` for errors, `W…` for warnings.
    pub code: String,
    /// `error` or `warning`.
    pub severity: String,
    /// Name of the file.
    pub file: String,
    /// 1-based line.
    pub line: u32,
    /// 1-based column, in characters.
    pub column: u32,
    /// 1-based column after the last character meant.
    pub end_column: u32,
    /// What is wrong, one line.
    pub message: String,
    /// What to do about it, if anything can be said.
    pub help: Option<String>,
    /// Facts that bear on it.
    pub notes: Vec<String>,
}

impl From<&Diagnostic> for Finding {
    fn from(diagnostic: &Diagnostic) -> Self {
        let severity = match diagnostic.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        Self {
            code: diagnostic.code.to_owned(),
            severity: severity.to_owned(),
            file: diagnostic.file.clone(),
            line: diagnostic.line,
            column: diagnostic.column,
            end_column: diagnostic.end_column,
            message: diagnostic.message.clone(),
            help: diagnostic.help.clone(),
            notes: diagnostic.notes.clone(),
        }
    }
}

/// Any answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Refusal {
    /// What went wrong, for a person; may have several lines.
    pub error: String,
    /// The same for programs.
    #[serde(default)]
    pub code: RefusalCode,
    /// Of `forbidden`: the group whose members may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Of `rejected`: the mistakes one by one, the first hundred.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub diagnostics: Vec<Finding>,
}

/// Kinds of [`Refusal`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// The caller, or any caller on this socket, may not do this.
    Forbidden,
    /// No such path.
    NotFound,
    /// Not with this method.
    MethodNotAllowed,
    /// The request names what is not there, or cannot be read.
    BadRequest,
    /// More bytes than a request may have.
    TooLarge,
    /// The body did not come in time.
    TooSlow,
    /// Too many requests or streams of this user are being answered: try again.
    Busy,
    /// The files were read and cannot be used; what was in force stays.
    Rejected,
    /// Another change is in the way: above all, a policy on trial.
    Conflict,
    /// The daemon is about to end.
    Stopping,
    /// A mistake of the daemon's own.
    #[default]
    Internal,
}
