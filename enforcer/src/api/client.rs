//! The command line's side of the control socket.

use std::{
    io,
    path::{Path, PathBuf},
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, body::Bytes, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{
    DEFAULT_SOCKET, DEFAULT_VIEW_SOCKET,
    changes::{ApplyRequest, Changed, Detached, History, RollbackRequest},
    types::{
        ExplainRequest, Explanation, Flows, FlowsRequest, Peer, Plan, PlanRequest, Record, Refusal,
        RefusalCode, Reloaded, Status,
    },
};
use crate::events::rehearsal::{ShadowRequest, Shadowing};

/// Bytes of an answer that is not a stream.
const LARGEST: usize = 16 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no enforcer answers at {}: {source}\n  help: is `enforcer run` (or enforcer.service) running?",
        path.display()
    )]
    Unreachable {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket is not for this user.
    #[error(
        "may not use {}\n  help: run this as root, or as a member of the group enforcer \
         (enforcer-view to ask only)",
        .0.display()
    )]
    Forbidden(PathBuf),
    /// The daemon knows this user, and says no.
    #[error("{0}")]
    NotAllowed(String),
    /// The daemon said no.
    #[error("{0}")]
    Refused(String),
    /// The daemon wanted to, and the kernel or the machine did not let it.
    #[error("{0}")]
    Failed(String),
    /// Another change is in the way.
    #[error("{0}")]
    Conflict(String),
    /// The daemon has too much to do.
    #[error("{0}")]
    Busy(String),
    /// The daemon read the policy, or what it has of an earlier state, and cannot use it.
    #[error("{}", .0.error.trim_end())]
    Rejected(Box<Refusal>),
    /// Something broke on the way.
    #[error("the enforcer's answer broke off: {0}")]
    Broken(String),
}

fn broken(error: impl std::fmt::Display) -> ClientError {
    ClientError::Broken(error.to_string())
}

/// A daemon behind a socket. Each request has a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

/// What `denials` asks for.
#[derive(Clone, Debug, Default)]
pub struct DenialsQuery {
    /// At most so many of the kept ones.
    pub last: Option<usize>,
    /// Source.
    pub from: Option<Peer>,
    /// Destination.
    pub to: Option<Peer>,
    /// Go on with what comes.
    pub follow: bool,
}

impl Client {
    /// Nothing is connected yet.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// The daemon's status.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.json(Method::GET, "/v1/status", Vec::new()).await
    }

    /// What can be asked, as OpenAPI describes it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn openapi(&self) -> Result<serde_json::Value, ClientError> {
        self.json(Method::GET, "/v1/openapi.json", Vec::new()).await
    }

    /// Asks about a flow.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn explain(&self, request: &ExplainRequest) -> Result<Explanation, ClientError> {
        let body = serde_json::to_vec(request).map_err(broken)?;
        self.json(Method::POST, "/v1/explain", body).await
    }

    /// What would change if the policy in a directory took over.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn plan(&self, request: &PlanRequest) -> Result<Plan, ClientError> {
        let body = serde_json::to_vec(request).map_err(broken)?;
        self.json(Method::POST, "/v1/plan", body).await
    }

    /// Live flows.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn flows(&self, request: &FlowsRequest) -> Result<Flows, ClientError> {
        // As for denials: nothing to escape.
        let from = request.from.as_ref().map(ToString::to_string);
        let to = request.to.as_ref().map(ToString::to_string);
        let limit = request.limit.map(|limit| limit.to_string());
        let parameters = [
            ("from", from),
            ("to", to),
            ("segment", request.segment.clone()),
            ("limit", limit),
        ];
        let parameters = parameters
            .into_iter()
            .filter_map(|(name, value)| Some(format!("{name}={}", value?)));
        let query = Vec::from_iter(parameters).join("&");
        let uri = format!("/v1/flows?{query}");
        self.json(Method::GET, &uri, Vec::new()).await
    }

    /// Reads the policy again.
    ///
    /// # Errors
    /// [`ClientError`]; the policy in force has not changed then.
    pub async fn reload(&self) -> Result<Reloaded, ClientError> {
        self.json(Method::POST, "/v1/reload", Vec::new()).await
    }

    /// Puts what is in a directory or file in force.
    ///
    /// # Errors
    /// [`ClientError`]; what was in force has not changed then.
    pub async fn apply(&self, request: &ApplyRequest) -> Result<Changed, ClientError> {
        let body = serde_json::to_vec(request).map_err(broken)?;
        self.json(Method::POST, "/v1/apply", body).await
    }

    /// What is on trial is to stay.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn confirm(&self) -> Result<Changed, ClientError> {
        self.json(Method::POST, "/v1/confirm", Vec::new()).await
    }

    /// The candidate policy, and where it differs from the one in force.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn shadow(&self) -> Result<Shadowing, ClientError> {
        self.json(Method::GET, "/v1/shadow", Vec::new()).await
    }

    /// Has a candidate policy asked beside the one in force.
    ///
    /// # Errors
    /// [`ClientError`]; the last candidate, if any, stays.
    pub async fn begin_shadow(&self, request: &ShadowRequest) -> Result<Shadowing, ClientError> {
        let body = serde_json::to_vec(request).map_err(broken)?;
        self.json(Method::POST, "/v1/shadow/begin", body).await
    }

    /// Ends that; answers with what came of it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn end_shadow(&self) -> Result<Shadowing, ClientError> {
        self.json(Method::POST, "/v1/shadow/end", Vec::new()).await
    }

    /// Takes the programs off. The daemon ends then.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn detach(&self) -> Result<Detached, ClientError> {
        self.json(Method::POST, "/v1/detach", Vec::new()).await
    }

    /// Puts an earlier state in force again.
    ///
    /// # Errors
    /// [`ClientError`]; what was in force has not changed then.
    pub async fn rollback(&self, request: &RollbackRequest) -> Result<Changed, ClientError> {
        let body = serde_json::to_vec(request).map_err(broken)?;
        self.json(Method::POST, "/v1/rollback", body).await
    }

    /// What was changed.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn history(&self) -> Result<History, ClientError> {
        self.json(Method::GET, "/v1/history", Vec::new()).await
    }

    /// Kept denials, and those to come when the query follows.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn denials(&self, query: &DenialsQuery) -> Result<Records, ClientError> {
        // Numbers, addresses and names: nothing that a query string would have to escape.
        let mut uri = format!("/v1/denials?follow={}", query.follow);
        if let Some(last) = query.last {
            uri.push_str(&format!("&last={last}"));
        }
        for (name, peer) in [("from", &query.from), ("to", &query.to)] {
            if let Some(peer) = peer {
                uri.push_str(&format!("&{name}={peer}"));
            }
        }
        let body = self.request(Method::GET, &uri, Vec::new()).await?;
        Ok(Records {
            body,
            buffer: Vec::new(),
        })
    }

    async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        uri: &str,
        body: Vec<u8>,
    ) -> Result<T, ClientError> {
        let body = self.request(method, uri, body).await?;
        let bytes = Limited::new(body, LARGEST).collect().await;
        let bytes = bytes.map_err(broken)?.to_bytes();
        serde_json::from_slice(&bytes).map_err(broken)
    }

    async fn request(
        &self,
        method: Method,
        uri: &str,
        body: Vec<u8>,
    ) -> Result<Incoming, ClientError> {
        let mut connected = UnixStream::connect(&self.path).await;
        // Who may only ask has a socket of their own.
        let denied = |e: &io::Error| e.kind() == io::ErrorKind::PermissionDenied;
        if self.path == Path::new(DEFAULT_SOCKET) && connected.as_ref().is_err_and(denied) {
            let other = UnixStream::connect(DEFAULT_VIEW_SOCKET).await;
            connected = other.or(connected);
        }
        let stream = connected.map_err(|source| {
            if source.kind() == io::ErrorKind::PermissionDenied {
                return ClientError::Forbidden(self.path.clone());
            }
            ClientError::Unreachable {
                path: self.path.clone(),
                source,
            }
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        // Its error shows up in the answer, too.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header("host", "enforcer")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(broken)?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let body = response.into_body();
        if status.is_success() {
            return Ok(body);
        }
        let bytes = Limited::new(body, LARGEST).collect().await;
        let bytes = bytes.map_err(broken)?.to_bytes();
        let refusal = serde_json::from_slice::<Refusal>(&bytes);
        let refusal = match refusal {
            Ok(refusal) if refusal.code == RefusalCode::Rejected => {
                return Err(ClientError::Rejected(Box::new(refusal)));
            }
            Ok(refusal) if refusal.code == RefusalCode::Busy => {
                return Err(ClientError::Busy(refusal.error));
            }
            Ok(refusal) if refusal.code == RefusalCode::Internal => {
                return Err(ClientError::Failed(refusal.error));
            }
            other => other,
        };
        let said = refusal.map_or_else(
            |_| format!("{status}: {}", String::from_utf8_lossy(&bytes).trim_end()),
            |refusal| refusal.error,
        );
        Err(match status {
            StatusCode::FORBIDDEN => ClientError::NotAllowed(said),
            StatusCode::CONFLICT => ClientError::Conflict(said),
            _ => ClientError::Refused(said),
        })
    }
}

/// Records as they arrive.
#[derive(Debug)]
pub struct Records {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Records {
    /// The next record; `None` at the end.
    ///
    /// # Errors
    /// [`ClientError::Broken`] when the daemon goes away in the middle.
    pub async fn next(&mut self) -> Result<Option<Record>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line).map(Some).map_err(broken);
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(broken(error)),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
            }
        }
    }

    /// Whether a record is here already: what is to come may take its time.
    pub fn is_ready(&self) -> bool {
        self.buffer.contains(&b'\n')
    }
}
