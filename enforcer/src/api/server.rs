//! The daemon's side of the control socket.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, MetadataExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, Query, Request, State, connect_info::Connected},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::IncomingStream,
};
use futures_util::stream::{self, Stream, StreamExt};
use tokio::sync::{mpsc, oneshot};

use super::types::{DenialsRequest, ExplainRequest, Peer, Record, Refusal};
use crate::{
    daemon::{reload::Ask, state::Shared},
    events::store::{Filter, Follower, UNSEGMENTED},
};

/// Why the control socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error(
        "another enforcer answers at {}\n  help: stop it first, or choose another --socket",
        .0.display()
    )]
    Taken(PathBuf),
    /// Something else is there.
    #[error("{} is there and is no socket\n  help: remove it, or choose another --socket", .0.display())]
    NotASocket(PathBuf),
    /// A system call failed.
    #[error("cannot listen at {}: {source}", path.display())]
    System {
        /// Where.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A listening socket: mode 0600 from its first moment; its file goes when it is dropped.
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Socket {
    /// Makes the directory (0750) if it is missing, and takes the place of a socket that nobody
    /// listens on.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let system = |source| SocketError::System {
            path: path.to_owned(),
            source,
        };
        if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o750);
            builder.create(parent).map_err(system)?;
        }
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            Ok(_) => match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(system)?;
                }
                Ok(_) => return Err(SocketError::Taken(path.to_owned())),
                Err(error) => return Err(system(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(system(error)),
        }
        // The mode of a socket's file is that of its making: a chmod would come too late. Other
        // threads can only make files that are stricter than meant, for a moment.
        let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(path);
        nix::sys::stat::umask(before);
        let listener = listener.map_err(system)?;
        listener.set_nonblocking(true).map_err(system)?;
        let inode = fs::symlink_metadata(path).map_err(system)?.ino();
        Ok(Self {
            listener,
            path: path.to_owned(),
            inode,
        })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Not that of a successor.
        if fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            // Nothing to do about a failure: the next start copes.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Who is at the other end.
#[derive(Clone, Copy, Debug)]
struct Caller {
    uid: Option<u32>,
}

impl Connected<IncomingStream<'_, tokio::net::UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, tokio::net::UnixListener>) -> Self {
        Self {
            uid: stream.io().peer_cred().ok().map(|cred| cred.uid()),
        }
    }
}

#[derive(Clone)]
struct Context {
    shared: Arc<Shared>,
    asks: mpsc::Sender<Ask>,
}

/// The server, to be spawned. Must be called on a tokio runtime.
///
/// # Errors
/// When the socket cannot be polled.
pub fn serve(
    socket: &Socket,
    shared: Arc<Shared>,
    asks: mpsc::Sender<Ask>,
) -> Result<impl Future<Output = ()> + Send + use<>, SocketError> {
    let listener = socket
        .listener
        .try_clone()
        .and_then(tokio::net::UnixListener::from_std)
        .map_err(|source| SocketError::System {
            path: socket.path.clone(),
            source,
        })?;
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/denials", get(denials))
        .route("/v1/explain", post(explain))
        .route("/v1/reload", post(reload))
        .fallback(async || refuse(StatusCode::NOT_FOUND, "no such request"))
        .layer(middleware::from_fn(authorize))
        .with_state(Context { shared, asks });
    let service = router.into_make_service_with_connect_info::<Caller>();
    Ok(async move {
        if let Err(error) = axum::serve(listener, service).await {
            tracing::error!(%error, "the control socket is closed");
        }
    })
}

/// Root, or whoever the daemon runs as: file modes say the same, but a directory may be moved.
async fn authorize(
    ConnectInfo(caller): ConnectInfo<Caller>,
    request: Request,
    next: Next,
) -> Response {
    let own = nix::unistd::geteuid().as_raw();
    match caller.uid {
        Some(uid) if uid == 0 || uid == own => next.run(request).await,
        _ => {
            tracing::warn!(uid = caller.uid, "refused a caller on the control socket");
            refuse(StatusCode::FORBIDDEN, "only root may do this")
        }
    }
}

fn refuse(status: StatusCode, error: impl Into<String>) -> Response {
    let error = error.into();
    (status, Json(Refusal { error })).into_response()
}

async fn status(State(context): State<Context>) -> Response {
    let shared = context.shared;
    match tokio::task::spawn_blocking(move || shared.status()).await {
        Ok(status) => Json(status).into_response(),
        Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

async fn explain(State(context): State<Context>, Json(request): Json<ExplainRequest>) -> Response {
    match context.shared.explain(&request) {
        Ok(explanation) => Json(explanation).into_response(),
        Err(error) => refuse(StatusCode::BAD_REQUEST, error),
    }
}

async fn reload(State(context): State<Context>) -> Response {
    let (sender, receiver) = oneshot::channel();
    if context.asks.send(sender).await.is_err() {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping");
    }
    match receiver.await {
        Ok(Ok(reloaded)) => Json(reloaded).into_response(),
        Ok(Err(error)) => refuse(StatusCode::UNPROCESSABLE_ENTITY, error),
        Err(_) => refuse(StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping"),
    }
}

async fn denials(
    State(context): State<Context>,
    Query(request): Query<DenialsRequest>,
) -> Response {
    if let Some(error) = [&request.from, &request.to]
        .into_iter()
        .flatten()
        .find_map(|peer| unknown_segment(&context.shared, peer))
    {
        return refuse(StatusCode::BAD_REQUEST, error);
    }
    let filter = Filter {
        from: request.from,
        to: request.to,
    };
    let last = request.last.unwrap_or(usize::MAX);
    let store = &context.shared.store;
    let body = if request.follow {
        let (records, follower) = store.follow(last, &filter);
        Body::from_stream(lines(records).chain(follow(follower)))
    } else {
        Body::from_stream(lines(store.last(last, &filter)))
    };
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// A name that no recent policy has is a slip of the keyboard, not a filter.
fn unknown_segment(shared: &Shared, peer: &Peer) -> Option<String> {
    let Peer::Segment(name) = peer else {
        return None;
    };
    let known = shared.generations.segment_names();
    if name == UNSEGMENTED || known.contains(name) {
        return None;
    }
    let near = known
        .iter()
        .map(|k| (strsim::damerau_levenshtein(k, name), k))
        .filter(|(distance, _)| *distance <= 3)
        .min();
    let hint = near.map(|(_, near)| format!("; did you mean `{near}`?"));
    Some(format!(
        "no segment is named `{name}`{}",
        hint.unwrap_or_default()
    ))
}

type Line = Result<Bytes, Infallible>;

fn line(record: &Record) -> Line {
    // Strings, numbers and lists of strings: this cannot fail.
    let mut json = serde_json::to_vec(record).unwrap_or_default();
    json.push(b'\n');
    Ok(json.into())
}

fn lines(records: Vec<Arc<Record>>) -> impl Stream<Item = Line> + Send {
    stream::iter(records).map(|record| line(&record))
}

fn follow(follower: Follower) -> impl Stream<Item = Line> + Send {
    stream::unfold(follower, async |mut follower| {
        let record = follower.next().await?;
        Some((line(&record), follower))
    })
}
