//! The control API: HTTP and JSON on Unix sockets. `docs/control.md` is for its users,
//! `docs/openapi.json` describes every request and answer.
//!
//! | Request | Answer | Who |
//! |---|---|---|
//! | `GET /v1/status` | [`types::Status`] | viewers |
//! | `GET /v1/denials?last=&from=&to=&follow=` | [`types::Record`]s, one JSON object a line | viewers |
//! | `POST /v1/explain` with [`types::ExplainRequest`] | [`types::Explanation`] | viewers |
//! | `GET /v1/flows?from=&to=&segment=&limit=` | [`types::Flows`] | viewers |
//! | `POST /v1/plan` with [`types::PlanRequest`] | [`types::Plan`] | those who may change |
//! | `POST /v1/reload` | [`types::Reloaded`] | those who may change |
//! | `POST /v1/apply` with [`changes::ApplyRequest`] | [`changes::Changed`] | those who may change |
//! | `POST /v1/confirm` | [`changes::Changed`] | those who may change |
//! | `POST /v1/rollback` with [`changes::RollbackRequest`] | [`changes::Changed`] | those who may change |
//! | `GET /v1/history` | [`changes::History`] | viewers |
//! | `GET /v1/openapi.json` | the description | viewers |
//!
//! Errors are [`types::Refusal`] with a 4xx or 5xx status.

mod bounds;
pub mod changes;
pub mod client;
#[cfg(test)]
pub(crate) mod openapi;
pub mod peer;
mod routes;
pub mod server;
pub mod socket;
pub mod types;

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/enforcer/control.sock";
/// Where it listens for those who only ask. Not in the same directory: that is closed to them, and
/// whoever is given this one in a container has not been given the other.
pub const DEFAULT_VIEW_SOCKET: &str = "/run/enforcer-view/view.sock";
/// What `GET /v1/openapi.json` answers; a test holds it to routes and types.
pub const OPENAPI: &str = include_str!("../../../docs/openapi.json");
