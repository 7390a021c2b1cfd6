//! What is asked and answered on the control sockets.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    body::{Body, Bytes},
    extract::{Query, State, rejection::QueryRejection},
    http::{Method, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use futures_util::stream::{self, Stream, StreamExt};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::spawn_blocking,
};

use super::{
    bounds::{AT_WORK, Kind},
    changes::{ApplyRequest, LONGEST_MESSAGE, LONGEST_TRIAL, RollbackRequest, SHORTEST_TRIAL},
    peer::{Authority, Named},
    types::{
        DenialsRequest, ExplainRequest, FlowsRequest, Peer as End, PlanRequest, Record, Refusal,
        RefusalCode,
    },
};
use crate::{
    daemon::{
        acts::{Answer, Ask, Proposal, Refused, What},
        plan::PlanError,
        state::Shared,
    },
    events::rehearsal::{ShadowRequest, Shadowing},
    events::store::{Filter, Follower, UNSEGMENTED},
};

/// What the answers are made of.
#[derive(Clone)]
pub struct Context {
    shared: Arc<Shared>,
    asks: mpsc::Sender<Ask>,
    work: Arc<Semaphore>,
    /// One plan at a time.
    planning: Arc<Semaphore>,
}

impl Context {
    /// `asks` go to the control task.
    pub fn new(shared: Arc<Shared>, asks: mpsc::Sender<Ask>) -> Self {
        Self {
            shared,
            asks,
            work: Arc::new(Semaphore::new(AT_WORK)),
            planning: Arc::new(Semaphore::new(1)),
        }
    }
}

/// A request that there is. `docs/openapi.json` describes each.
#[derive(Clone, Debug)]
pub struct Route {
    /// Its one method.
    pub method: Method,
    /// Path, without variables.
    pub path: &'static str,
    /// Who may.
    pub needs: Authority,
    /// Whether the answer is a stream.
    pub streams: bool,
}

impl Route {
    /// What the answer is to its connection.
    pub fn kind(&self) -> Kind {
        if self.streams {
            Kind::Stream
        } else {
            Kind::Request
        }
    }
}

/// Every request.
pub fn all() -> (Vec<Route>, Router<Context>) {
    let mut routes = Vec::new();
    let mut router = Router::new();
    let mut add = |method: Method, path, needs, streams, handler: MethodRouter<Context>| {
        router = std::mem::take(&mut router).route(path, handler);
        routes.push(Route {
            method,
            path,
            needs,
            streams,
        });
    };
    let (ask, tell) = (Method::GET, Method::POST);
    let (view, change) = (Authority::View, Authority::Change);
    add(ask.clone(), "/v1/status", view, false, get(status));
    add(ask.clone(), "/v1/denials", view, true, get(denials));
    add(ask.clone(), "/v1/flows", view, false, get(flows));
    // It reads what its caller names.
    add(tell.clone(), "/v1/plan", change, false, post(plan));
    add(tell.clone(), "/v1/explain", view, false, post(explain));
    add(tell.clone(), "/v1/reload", change, false, post(reload));
    add(tell.clone(), "/v1/apply", change, false, post(apply));
    add(tell.clone(), "/v1/confirm", change, false, post(confirm));
    add(tell.clone(), "/v1/rollback", change, false, post(rollback));
    let (begin, end) = (post(begin_shadow), post(end_shadow));
    add(tell.clone(), "/v1/shadow/begin", change, false, begin);
    add(tell.clone(), "/v1/shadow/end", change, false, end);
    add(tell, "/v1/detach", change, false, post(detach));
    add(ask.clone(), "/v1/history", view, false, get(history));
    add(ask.clone(), "/v1/shadow", view, false, get(shadow));
    add(ask, "/v1/openapi.json", view, false, get(openapi));
    (routes, router)
}

/// An answer that is not a success.
pub fn refuse(status: StatusCode, code: RefusalCode, error: impl Into<String>) -> Response {
    let error = error.into();
    let group = None;
    let diagnostics = Vec::new();
    let all = Refusal {
        error,
        code,
        group,
        diagnostics,
    };
    refusal(status, all)
}

/// The same, with more to say.
pub fn refusal(status: StatusCode, refusal: Refusal) -> Response {
    (status, Json(refusal)).into_response()
}

fn stopping() -> Response {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    refuse(status, RefusalCode::Stopping, "the daemon is stopping")
}

fn bad(error: impl Into<String>) -> Response {
    refuse(StatusCode::BAD_REQUEST, RefusalCode::BadRequest, error)
}

fn parsed<T: DeserializeOwned>(body: &Bytes) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| format!("the body is no such request: {error}"))
}

/// Work that takes a moment of a processor, or waits for the kernel, when it is its turn.
async fn work<T: Send + 'static>(
    context: Context,
    work: impl FnOnce(&Shared) -> T + Send + 'static,
) -> Result<T, Response> {
    let Ok(turn) = Arc::clone(&context.work).acquire_owned().await else {
        return Err(stopping());
    };
    let shared = context.shared;
    let done = spawn_blocking(move || {
        let done = work(&shared);
        drop(turn);
        done
    });
    done.await.map_err(|error| internal(error.to_string()))
}

async fn status(State(context): State<Context>) -> Response {
    match work(context, Shared::status).await {
        Ok(status) => Json(status).into_response(),
        Err(answer) => answer,
    }
}

async fn explain(State(context): State<Context>, body: Bytes) -> Response {
    let request: ExplainRequest = match parsed(&body) {
        Ok(request) => request,
        Err(error) => return bad(error),
    };
    match work(context, move |shared| shared.explain(&request)).await {
        Ok(Ok(explanation)) => Json(explanation).into_response(),
        Ok(Err(error)) => bad(error),
        Err(answer) => answer,
    }
}

/// Asks the control task.
async fn asked<T: Serialize>(
    context: &Context,
    ask: impl FnOnce(Answer<T>) -> Ask,
) -> Result<T, Response> {
    let (sender, receiver) = oneshot::channel();
    if context.asks.send(ask(sender)).await.is_err() {
        return Err(stopping());
    }
    match receiver.await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(Refused { code, error })) => {
            let status = match code {
                RefusalCode::Conflict => StatusCode::CONFLICT,
                RefusalCode::BadRequest => StatusCode::BAD_REQUEST,
                RefusalCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
                RefusalCode::Rejected
                | RefusalCode::Forbidden
                | RefusalCode::NotFound
                | RefusalCode::MethodNotAllowed
                | RefusalCode::TooLarge
                | RefusalCode::TooSlow
                | RefusalCode::Busy
                | RefusalCode::Stopping => StatusCode::UNPROCESSABLE_ENTITY,
            };
            Err(refuse(status, code, error))
        }
        Err(_) => Err(stopping()),
    }
}

async fn reload(State(context): State<Context>, Extension(by): Extension<Arc<Named>>) -> Response {
    let ask = |answer| Ask::Reload {
        by: Arc::clone(&by),
        answer,
    };
    match asked(&context, ask).await {
        Ok(reloaded) => {
            let (generation, changed) = (reloaded.generation, reloaded.changed);
            tracing::info!(%by, generation, changed, "reloaded");
            Json(reloaded).into_response()
        }
        Err(refused) => {
            tracing::warn!(%by, "the reload was refused");
            refused
        }
    }
}

async fn apply(
    State(context): State<Context>,
    Extension(by): Extension<Arc<Named>>,
    body: Bytes,
) -> Response {
    let request: ApplyRequest = match parsed(&body) {
        Ok(request) => request,
        Err(error) => return bad(error),
    };
    if !request.path.is_absolute() {
        return bad("the path must be absolute: the daemon is elsewhere");
    }
    let proposal = Proposal {
        what: What::Path(request.path),
        within: request.confirm_within.map(Duration::from_secs),
        message: request.message,
        by,
        content: request.content,
        dry_run: request.dry_run,
    };
    propose(&context, proposal).await
}

async fn rollback(
    State(context): State<Context>,
    Extension(by): Extension<Arc<Named>>,
    body: Bytes,
) -> Response {
    let request = if body.is_empty() {
        Ok(RollbackRequest::default())
    } else {
        parsed(&body)
    };
    let request = match request {
        Ok(request) => request,
        Err(error) => return bad(error),
    };
    let proposal = Proposal {
        what: What::State(request.to),
        within: request.confirm_within.map(Duration::from_secs),
        message: request.message,
        by,
        content: request.content,
        dry_run: request.dry_run,
    };
    propose(&context, proposal).await
}

async fn propose(context: &Context, proposal: Proposal) -> Response {
    let seconds = proposal
        .within
        .map_or(LONGEST_TRIAL, |within| within.as_secs());
    if !(SHORTEST_TRIAL..=LONGEST_TRIAL).contains(&seconds) {
        return bad(format!(
            "a trial takes {SHORTEST_TRIAL} to {LONGEST_TRIAL} seconds: it cannot be confirmed in its last second"
        ));
    }
    let message = proposal.message.as_deref().unwrap_or_default();
    if message.chars().count() > LONGEST_MESSAGE {
        return bad(format!(
            "a message has {LONGEST_MESSAGE} characters at most"
        ));
    }
    let proposal = Box::new(proposal);
    match asked(context, |answer| Ask::Propose { proposal, answer }).await {
        Ok(changed) => Json(changed).into_response(),
        Err(refused) => refused,
    }
}

async fn confirm(State(context): State<Context>, Extension(by): Extension<Arc<Named>>) -> Response {
    match asked(&context, |answer| Ask::Confirm { by, answer }).await {
        Ok(changed) => Json(changed).into_response(),
        Err(refused) => refused,
    }
}

async fn detach(State(context): State<Context>, Extension(by): Extension<Arc<Named>>) -> Response {
    match asked(&context, |answer| Ask::Detach { by, answer }).await {
        Ok(detached) => Json(detached).into_response(),
        Err(refused) => refused,
    }
}

async fn history(State(context): State<Context>) -> Response {
    match work(context, |shared| shared.changes.history()).await {
        Ok(history) => Json(history).into_response(),
        Err(answer) => answer,
    }
}

/// Work that reads and compiles what may be large: one at a time, beside all others.
async fn alone<T: Send + 'static>(
    context: &Context,
    work: impl FnOnce(&Shared) -> T + Send + 'static,
) -> Result<T, Response> {
    let Ok(turn) = Arc::clone(&context.planning).try_acquire_owned() else {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let error = "another plan is being made: try again";
        return Err(refuse(status, RefusalCode::Busy, error));
    };
    let shared = Arc::clone(&context.shared);
    let done = spawn_blocking(move || {
        let done = work(&shared);
        // The client may have left; the next one waits for the work, not for the answer.
        drop(turn);
        done
    });
    done.await.map_err(|error| internal(error.to_string()))
}

async fn plan(
    State(context): State<Context>,
    Extension(by): Extension<Arc<Named>>,
    body: Bytes,
) -> Response {
    let request: PlanRequest = match parsed(&body) {
        Ok(request) => request,
        Err(error) => return bad(error),
    };
    let plan = move |shared: &Shared| crate::daemon::plan::plan(shared, &request);
    match alone(&context, plan).await {
        Ok(Ok(plan)) => {
            tracing::info!(%by, path = plan.path, summary = plan.summary, "made a plan");
            Json(plan).into_response()
        }
        Ok(Err(error)) => {
            tracing::info!(%by, "made no plan");
            no_plan(error)
        }
        Err(answer) => answer,
    }
}

async fn begin_shadow(
    State(context): State<Context>,
    Extension(by): Extension<Arc<Named>>,
    body: Bytes,
) -> Response {
    let request: ShadowRequest = match parsed(&body) {
        Ok(request) => request,
        Err(error) => return bad(error),
    };
    let (who, path) = (Arc::clone(&by), request.path.clone());
    let begin = move |shared: &Shared| crate::daemon::shadow::begin(shared, request.path, &who);
    let mut begun = alone(&context, begin).await;
    kept(&context.shared, &mut begun).await;
    rehearsed(begun, &by, "a shadow begins", &path)
}

async fn end_shadow(
    State(context): State<Context>,
    Extension(by): Extension<Arc<Named>>,
) -> Response {
    let shared = Arc::clone(&context.shared);
    let mut ended = work(context, crate::daemon::shadow::end).await;
    kept(&shared, &mut ended).await;
    rehearsed(ended, &by, "the shadow ends", "")
}

/// What is answered is on disk, or the answer says why not.
async fn kept(shared: &Shared, done: &mut Result<Result<Shadowing, PlanError>, Response>) {
    if let Ok(Ok(shadowing)) = done
        && let Some(unkept) = shared.changes.persist().await
        && let Some(rehearsal) = &mut shadowing.shadow
    {
        rehearsal.problem.get_or_insert(unkept);
    }
}

async fn shadow(State(context): State<Context>) -> Response {
    match work(context, crate::daemon::shadow::report).await {
        Ok(Ok(shadowing)) => Json(shadowing).into_response(),
        Ok(Err(error)) => no_plan(error),
        Err(answer) => answer,
    }
}

fn rehearsed(
    result: Result<Result<Shadowing, PlanError>, Response>,
    by: &Named,
    what: &str,
    path: &str,
) -> Response {
    match result {
        Ok(Ok(shadowing)) => {
            tracing::info!(%by, path, "{what}");
            Json(shadowing).into_response()
        }
        Ok(Err(error)) => {
            tracing::info!(%by, path, "refused: {what}");
            no_plan(error)
        }
        Err(answer) => answer,
    }
}

fn internal(error: impl Into<String>) -> Response {
    let status = StatusCode::INTERNAL_SERVER_ERROR;
    refuse(status, RefusalCode::Internal, error)
}

fn no_plan(error: PlanError) -> Response {
    match error {
        PlanError::Bad(error) => bad(error),
        PlanError::Rejected(refused) => refusal(StatusCode::UNPROCESSABLE_ENTITY, refused),
        PlanError::Dataplane(error) => internal(error.to_string()),
    }
}

async fn flows(
    State(context): State<Context>,
    query: Result<Query<FlowsRequest>, QueryRejection>,
) -> Response {
    let request = match query {
        Ok(Query(request)) => request,
        Err(error) => return bad(error.body_text()),
    };
    let list = move |shared: &Shared| crate::daemon::plan::flows(shared, &request);
    match work(context, list).await {
        Ok(Ok(flows)) => Json(flows).into_response(),
        Ok(Err(error)) => no_plan(error),
        Err(answer) => answer,
    }
}

async fn openapi() -> Response {
    let json = [(header::CONTENT_TYPE, "application/json")];
    (json, super::OPENAPI).into_response()
}

async fn denials(
    State(context): State<Context>,
    query: Result<Query<DenialsRequest>, QueryRejection>,
) -> Response {
    let request = match query {
        Ok(Query(request)) => request,
        Err(error) => return bad(error.body_text()),
    };
    if let Some(error) = [&request.from, &request.to]
        .into_iter()
        .flatten()
        .find_map(|peer| unknown_segment(&context.shared, peer))
    {
        return bad(error);
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
fn unknown_segment(shared: &Shared, peer: &End) -> Option<String> {
    let End::Segment(name) = peer else {
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
