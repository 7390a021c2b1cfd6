//! The control API: HTTP and JSON on a Unix socket, for root alone.
//!
//! | Request | Answer |
//! |---|---|
//! | `GET /v1/status` | [`types::Status`] |
//! | `GET /v1/denials?last=&from=&to=&follow=` | [`types::Record`]s, one JSON object a line |
//! | `POST /v1/explain` with [`types::ExplainRequest`] | [`types::Explanation`] |
//! | `POST /v1/reload` | [`types::Reloaded`] |
//!
//! Errors are [`types::Refusal`] with a 4xx or 5xx status.

pub mod client;
pub mod server;
pub mod types;

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/enforcer/control.sock";
