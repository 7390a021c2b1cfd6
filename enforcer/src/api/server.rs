//! The daemon's side of the control sockets: who may, how much, how long. What is answered is in
//! [`super::routes`].

use std::{
    convert::Infallible,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderValue, Request, StatusCode, header},
    response::Response,
};
use http_body_util::{BodyExt as _, Limited};
use hyper::{
    body::{Body as _, Incoming},
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{interval, sleep, timeout},
};

use super::{
    DEFAULT_SOCKET,
    bounds::{self, Bounded, Connections, Kind, Place, Seldom},
    peer::{Authority, Groups, Peer, group_id},
    routes::{self, Context, Route, refuse},
    socket::{Socket, SocketError},
    types::{Refusal, RefusalCode},
};
use crate::{
    daemon::{acts::Ask, state::Shared},
    settings::Access,
};

/// How often it is asked who the groups are: they may be made while the daemon runs.
const LOOK: Duration = Duration::from_secs(1);
/// After an accept that failed, for want of descriptors perhaps.
const PAUSE: Duration = Duration::from_millis(100);

struct Server {
    shared: Arc<Shared>,
    routes: Vec<Route>,
    service: TowerToHyperService<Router>,
    connections: Arc<Connections>,
    refusals: Seldom,
    groups: RwLock<(Access, Groups)>,
}

/// The server, to be spawned. Must be called on a tokio runtime.
///
/// # Errors
/// When a socket cannot be polled.
pub fn serve(
    sockets: Arc<Vec<Socket>>,
    shared: Arc<Shared>,
    asks: mpsc::Sender<Ask>,
) -> Result<impl Future<Output = ()> + Send + use<>, SocketError> {
    let (routes, router) = routes::all();
    let context = Context::new(Arc::clone(&shared), asks);
    let server = Arc::new(Server {
        shared,
        routes,
        service: TowerToHyperService::new(router.with_state(context)),
        connections: Arc::default(),
        refusals: Seldom::default(),
        groups: RwLock::default(),
    });
    let mut listeners = Vec::new();
    for socket in sockets.iter() {
        listeners.push((socket.listener()?, socket.grants()));
    }
    // Before the first client: it finds the sockets as they are to be.
    server.look(&sockets, true);
    Ok(async move {
        let mut accepting = JoinSet::new();
        for (listener, grants) in listeners {
            accepting.spawn(accept(Arc::clone(&server), listener, grants));
        }
        let mut look = interval(LOOK);
        loop {
            tokio::select! {
                _ = look.tick() => {
                    server.look(&sockets, false);
                    server.shared.serving.beat();
                }
                // Never, but for a panic.
                Some(_) = accepting.join_next() => return,
            }
        }
    })
}

async fn accept(server: Arc<Server>, listener: UnixListener, grants: Authority) {
    let troubles = Seldom::default();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // A client that is gone already needs no answer.
                if let Ok(peer) = Peer::of(&stream) {
                    // Counted here, and not when its task gets to it: accepting may be faster.
                    let place = server.connections.arrived(peer.uid);
                    let server = Arc::clone(&server);
                    tokio::spawn(server.converse(stream, Arc::new(peer), grants, place));
                }
            }
            Err(error) => {
                if let Some(unsaid) = troubles.due(0) {
                    tracing::warn!(%error, unsaid, "cannot accept on the control socket");
                }
                sleep(PAUSE).await;
            }
        }
    }
}

impl Server {
    /// Looks who the groups are, and lets them in.
    fn look(&self, sockets: &[Socket], first: bool) {
        let access = self.shared.live().settings.access.clone();
        let groups = Groups {
            change: group_id(&access.change),
            view: group_id(&access.view),
        };
        let new = (access, groups);
        let before = std::mem::replace(
            &mut *self.groups.write().unwrap_or_else(PoisonError::into_inner),
            new.clone(),
        );
        if before == new && !first {
            return;
        }
        let (access, groups) = new;
        for socket in sockets {
            let (name, group) = match socket.grants() {
                Authority::Change => (&access.change, groups.change),
                Authority::View | Authority::Nothing => (&access.view, groups.view),
            };
            give(socket, name, group);
        }
    }

    /// One request, one answer.
    async fn converse(
        self: Arc<Self>,
        stream: UnixStream,
        peer: Arc<Peer>,
        grants: Authority,
        (place, end): (Place, oneshot::Receiver<()>),
    ) {
        let patient = Arc::new(AtomicBool::new(false));
        let io = TokioIo::new(Bounded::new(stream, bounds::TAKE, Arc::clone(&patient)));
        let service = service_fn(async |request| {
            let answer = self.answer(request, &peer, grants, &place, &patient).await;
            Ok::<_, Infallible>(answer)
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(bounds::SEND)
            .max_headers(bounds::HEADER_LINES)
            .max_buf_size(bounds::HEADER)
            .keep_alive(false)
            .serve_connection(io, service);
        tokio::select! {
            // The client knows better than the log what went wrong.
            _ = connection => {}
            _ = end => {}
        }
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
        peer: &Arc<Peer>,
        grants: Authority,
        place: &Place,
        patient: &AtomicBool,
    ) -> Response {
        let (mut parts, body) = request.into_parts();
        let path = parts.uri.path();
        let route = self.routes.iter().find(|route| route.path == path);
        // What there is, a stranger need not know.
        let needs = route.map_or(Authority::View, |route| route.needs);
        if let Some(refusal) = self.forbids(peer, grants, needs) {
            if let Some(unsaid) = self.refusals.due(peer.uid) {
                let (peer, request) = (peer.named(), format!("{} {path}", parts.method));
                tracing::warn!(%peer, request, unsaid, "refused a caller on the control socket");
            }
            return routes::refusal(StatusCode::FORBIDDEN, refusal);
        }
        let Some(route) = route else {
            let status = StatusCode::NOT_FOUND;
            return refuse(status, RefusalCode::NotFound, "no such request");
        };
        if parts.method != route.method {
            let status = StatusCode::METHOD_NOT_ALLOWED;
            let error = format!("{path} takes {} only", route.method);
            let mut answer = refuse(status, RefusalCode::MethodNotAllowed, error);
            if let Ok(method) = HeaderValue::from_str(route.method.as_str()) {
                answer.headers_mut().insert(header::ALLOW, method);
            }
            return answer;
        }
        let body = match whole(body).await {
            Ok(body) => body,
            Err(answer) => return answer,
        };
        let kind = route.kind();
        if !place.answer(kind) {
            let error = "too many requests of this user are being answered; try again later";
            return refuse(StatusCode::SERVICE_UNAVAILABLE, RefusalCode::Busy, error);
        }
        patient.store(kind == Kind::Stream, Ordering::Relaxed);
        if route.needs == Authority::Change {
            let by = Arc::new(peer.named());
            tracing::info!(%by, request = route.path, "a change is asked for");
            parts.extensions.insert(by);
        }
        let request = Request::from_parts(parts, body);
        match self.service.call(request).await {
            Ok(answer) => answer,
            Err(never) => match never {},
        }
    }

    /// Why this peer may not do it, if so.
    fn forbids(&self, peer: &Peer, grants: Authority, needs: Authority) -> Option<Refusal> {
        let groups = self.groups.read().unwrap_or_else(PoisonError::into_inner);
        let (access, groups) = &*groups;
        let (group, id) = match needs {
            Authority::Change => (&access.change, groups.change),
            Authority::View | Authority::Nothing => (&access.view, groups.view),
        };
        let error = if groups.authority(peer) < needs {
            let missing = match id {
                Some(_) => "",
                None => ", which this host does not have",
            };
            format!(
                "uid {} may not do this: it takes root or a member of group {group}{missing}",
                peer.uid
            )
        } else if grants < needs {
            format!(
                "this socket is for asking only; changes go to the control socket ({DEFAULT_SOCKET})"
            )
        } else {
            return None;
        };
        Some(Refusal {
            diagnostics: Vec::new(),
            error,
            code: RefusalCode::Forbidden,
            group: Some(group.clone()),
        })
    }
}

fn give(socket: &Socket, name: &str, group: Option<u32>) {
    let path = socket.path().display();
    if let Err(error) = socket.give(group) {
        let help = "give the daemon CAP_CHOWN, or run it as a member of the group";
        tracing::warn!(%path, group = name, %error, help, "only root may use the socket");
        return;
    }
    match group {
        None => {
            let help = format!("to let a group in: groupadd --system {name}");
            tracing::info!(%path, help, "only root may use the socket: no group {name}");
        }
        Some(id) => match socket.closed_to(id) {
            Some(closed) => tracing::warn!(%path, group = name, "{closed}"),
            None => tracing::info!(%path, group = name, "the group may use the socket"),
        },
    }
}

/// The whole body, if it is short and comes soon.
async fn whole(body: Incoming) -> Result<Body, Response> {
    let too_large = || {
        let error = format!("a request has {} bytes at most", bounds::BODY);
        refuse(StatusCode::PAYLOAD_TOO_LARGE, RefusalCode::TooLarge, error)
    };
    // What says so itself need not be read.
    if body.size_hint().lower() > bounds::BODY as u64 {
        return Err(too_large());
    }
    match timeout(bounds::SEND, Limited::new(body, bounds::BODY).collect()).await {
        Ok(Ok(body)) => Ok(Body::from(body.to_bytes())),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(refuse(
            StatusCode::BAD_REQUEST,
            RefusalCode::BadRequest,
            error.to_string(),
        )),
        Err(_) => {
            let error = "the body did not come in time";
            Err(refuse(
                StatusCode::REQUEST_TIMEOUT,
                RefusalCode::TooSlow,
                error,
            ))
        }
    }
}
