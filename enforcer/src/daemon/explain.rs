//! Asks an image about one flow: the same `decide()` that the kernel runs.

use std::net::IpAddr;

use enforcer_common::{
    decide::{Query, decide},
    verdict::Outcome,
};

use crate::{
    api::types::{ExplainRequest, Explanation, Time},
    compile::Image,
    events::enrich::because,
    policy::{model::Policy, parse},
};

/// Whether a packet can have both addresses.
///
/// # Errors
/// In words, when none can.
pub fn one_flow(request: &ExplainRequest) -> Result<(), String> {
    let (from, to) = (request.from, request.to);
    if from.is_ipv4() != to.is_ipv4() {
        return Err(format!(
            "{from} and {to} are of different families: no packet has both"
        ));
    }
    for ip in [from, to] {
        if let IpAddr::V6(v6) = ip
            && let Some(v4) = v6.to_ipv4_mapped()
        {
            return Err(format!("{ip} is on no wire: write {v4}"));
        }
    }
    Ok(())
}

/// The present in Unix seconds.
pub fn now() -> u64 {
    u64::try_from(Time::now().0.as_second()).unwrap_or(0)
}

/// What `image`, compiled from `policy`, says about a flow at `unix`, in Unix seconds.
///
/// # Errors
/// In words, when the request does not name one flow.
pub fn explain(
    policy: &Policy,
    image: &Image,
    request: &ExplainRequest,
    unix: u64,
) -> Result<Explanation, String> {
    one_flow(request)?;
    let (from, to) = (request.from, request.to);
    let (protocol, selector) = parse::parse_point(&request.service, to)?;
    let decision = decide(
        image.words(),
        &Query {
            source: from.into(),
            destination: to.into(),
            protocol,
            selector,
        },
        unix,
    );
    let why = because(policy, decision.reason, decision.rule, decision.segment);
    let (verdict, strength) = match decision.outcome {
        Outcome::Allowed => ("ALLOWED", None),
        Outcome::Denied => ("DENIED", Some("enforce")),
        Outcome::WouldDeny => ("WOULD_DENY", Some("observe")),
        Outcome::Off => ("OFF", Some("off")),
    };
    let names = |ip| -> Vec<String> {
        let segments = policy.segments_of(ip).into_iter();
        segments
            .filter_map(|id| policy.segment(id))
            .map(|segment| segment.name.clone())
            .collect()
    };
    Ok(Explanation {
        flow: request.clone(),
        verdict: verdict.to_owned(),
        strength: strength.map(str::to_owned),
        reason: decision.reason.name().to_owned(),
        rule: why.rule,
        default: why.default,
        file: why.file,
        line: why.line,
        from_segments: names(from),
        to_segments: names(to),
        generation: None,
        policy: String::new(),
    })
}
