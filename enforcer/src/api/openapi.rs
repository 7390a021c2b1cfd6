//! Holds `docs/openapi.json` to routes and types: it is made from them here, and must be what is
//! committed. `ENFORCER_WRITE_DOCS=1 cargo test -p enforcer openapi` writes it.

use std::{borrow::Cow, collections::BTreeSet, fs, path::Path};

use schemars::{
    JsonSchema, Schema, SchemaGenerator,
    generate::{Contract, SchemaSettings},
    json_schema,
};
use serde_json::{Map, Value, json};

use super::{
    OPENAPI,
    changes::{ApplyRequest, Changed, Detached, History, RollbackRequest},
    peer::Authority,
    routes::{self, Route},
    types::{
        Default as DenyDefault, DenialsRequest, ExplainRequest, Explanation, Flows, FlowsRequest,
        Peer, Plan, PlanRequest, Record, Refusal, Reloaded, Status, Time,
    },
};
use crate::events::rehearsal::{ShadowRequest, Shadowing};

impl JsonSchema for Time {
    fn schema_name() -> Cow<'static, str> {
        "Time".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "format": "date-time",
            "description": "RFC 3339, UTC, with milliseconds.",
        })
    }
}

impl JsonSchema for DenyDefault {
    fn schema_name() -> Cow<'static, str> {
        "DenyDefault".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "The default that denied: `guest-wifi (both)`, `unsegmented`.",
        })
    }
}

impl JsonSchema for Peer {
    fn schema_name() -> Cow<'static, str> {
        "Peer".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "description": "An address, or the name of a segment." })
    }
}

fn generator(contract: Contract) -> SchemaGenerator {
    SchemaSettings::draft2020_12()
        .with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
            settings.contract = contract;
        })
        .into_generator()
}

fn content(kind: &str, schema: &Schema) -> Value {
    json!({ kind: { "schema": schema } })
}

/// What the routes' table does not say.
fn operation(route: &Route, asked: &mut SchemaGenerator, told: &mut SchemaGenerator) -> Value {
    let (summary, kind, answer) = match route.path {
        "/v1/status" => (
            "Whether and how well the host is enforced.",
            "application/json",
            told.subschema_for::<Status>(),
        ),
        "/v1/denials" => (
            "Denied packets, oldest first: one JSON object a line, each a Record.",
            "application/x-ndjson",
            told.subschema_for::<Record>(),
        ),
        "/v1/explain" => (
            "Why a flow is allowed or denied by the policy in force.",
            "application/json",
            told.subschema_for::<Explanation>(),
        ),
        "/v1/reload" => (
            "Read policy and settings again, and answer when that is over.",
            "application/json",
            told.subschema_for::<Reloaded>(),
        ),
        "/v1/apply" | "/v1/confirm" | "/v1/rollback" => (
            match route.path {
                "/v1/apply" => "Put the policy of a directory or file in force, or on trial.",
                "/v1/confirm" => "What is on trial is to stay.",
                _ => "Put an earlier state in force again; during a trial, end it.",
            },
            "application/json",
            told.subschema_for::<Changed>(),
        ),
        "/v1/detach" => (
            "Take the programs off: nothing is enforced any more, and the daemon ends.",
            "application/json",
            told.subschema_for::<Detached>(),
        ),
        "/v1/history" => (
            "What was changed, by whom, and what came of it.",
            "application/json",
            told.subschema_for::<History>(),
        ),
        "/v1/plan" => (
            "What would change if the policy in a directory took over; nothing does.",
            "application/json",
            told.subschema_for::<Plan>(),
        ),
        "/v1/flows" => (
            "Live flows, and what the policy in force says of them.",
            "application/json",
            told.subschema_for::<Flows>(),
        ),
        "/v1/shadow" | "/v1/shadow/begin" | "/v1/shadow/end" => (
            match route.path {
                "/v1/shadow" => "The candidate policy, and where it differs from the one in force.",
                "/v1/shadow/begin" => "Ask a candidate policy beside the one in force.",
                _ => "Ask it no more; the answer is what came of it.",
            },
            "application/json",
            told.subschema_for::<Shadowing>(),
        ),
        "/v1/openapi.json" => (
            "This description.",
            "application/json",
            json_schema!({ "type": "object" }),
        ),
        other => panic!("{other} is not described"),
    };
    let who = match route.needs {
        Authority::Change => "Root and members of the group that may change.",
        Authority::View => "Root and members of both groups.",
        Authority::Nothing => "Everybody.",
    };
    let refusal = json!({
        "description": "The request was refused; nothing has changed.",
        "content": content("application/json", &told.subschema_for::<Refusal>()),
    });
    let mut operation = json!({
        "operationId": route.path.trim_start_matches("/v1/").replace(['.', '/'], "_"),
        "summary": summary,
        "description": who,
        "responses": {
            "200": { "description": "The answer.", "content": content(kind, &answer) },
            "default": refusal,
        },
    });
    let body = match route.path {
        "/v1/explain" => Some(asked.subschema_for::<ExplainRequest>()),
        "/v1/plan" => Some(asked.subschema_for::<PlanRequest>()),
        "/v1/apply" => Some(asked.subschema_for::<ApplyRequest>()),
        "/v1/rollback" => Some(asked.subschema_for::<RollbackRequest>()),
        "/v1/shadow/begin" => Some(asked.subschema_for::<ShadowRequest>()),
        _ => None,
    };
    if let Some(schema) = body {
        // Going back to the state before takes no words.
        let required = route.path != "/v1/rollback";
        operation["requestBody"] =
            json!({ "required": required, "content": content("application/json", &schema) });
    }
    if matches!(route.path, "/v1/denials" | "/v1/flows") {
        let schema = if route.path == "/v1/flows" {
            asked.root_schema_for::<FlowsRequest>()
        } else {
            asked.root_schema_for::<DenialsRequest>()
        };
        let fields = schema.get("properties").and_then(Value::as_object).unwrap();
        let parameters = fields.iter().map(|(name, schema)| {
            json!({ "name": name, "in": "query", "required": false, "schema": schema })
        });
        operation["parameters"] = parameters.collect();
    }
    operation
}

/// Links of rustdoc's are none elsewhere.
fn plain(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(text)) = fields.get_mut("description") {
                *text = text
                    .replace("[`", "`")
                    .replace("`]", "`")
                    .replace('\n', " ");
            }
            fields.values_mut().for_each(plain);
        }
        Value::Array(items) => items.iter_mut().for_each(plain),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn document() -> Value {
    let mut asked = generator(Contract::Deserialize);
    let mut told = generator(Contract::Serialize);
    let mut paths = Map::new();
    for route in routes::all().0 {
        let method = route.method.as_str().to_lowercase();
        let operation = operation(&route, &mut asked, &mut told);
        paths.insert(route.path.to_owned(), json!({ method: operation }));
    }
    let mut schemas = told.take_definitions(true);
    schemas.extend(asked.take_definitions(true));
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "enforcer",
            "version": "1",
            "description": "The control API: HTTP/1.1 on Unix sockets, one request a connection. \
                Fields are only added within a version. docs/control.md says who may ask.",
            "license": { "name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0" },
        },
        "servers": [{ "url": "http://enforcer" }],
        "paths": paths,
        "components": { "schemas": schemas },
    });
    plain(&mut document);
    document
}

#[test]
fn openapi_is_what_routes_and_types_say() {
    let text = serde_json::to_string_pretty(&document()).unwrap() + "\n";
    if std::env::var_os("ENFORCER_WRITE_DOCS").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
        fs::write(path, text).unwrap();
        return;
    }
    assert!(
        text == OPENAPI,
        "docs/openapi.json is old: ENFORCER_WRITE_DOCS=1 cargo test -p enforcer openapi"
    );
}

#[test]
fn openapi_has_no_dangling_reference() {
    fn references(value: &Value, into: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::String(to)) = fields.get("$ref") {
                    into.insert(to.clone());
                }
                fields.values().for_each(|value| references(value, into));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, into)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    let document: Value = serde_json::from_str(OPENAPI).unwrap();
    let mut all = BTreeSet::new();
    references(&document, &mut all);
    assert!(all.len() > 10, "{all:?}");
    for reference in all {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference}");
    }
}

/// Whether a true answer is as described: `openapi.json`'s `200` of a request.
pub(crate) fn check(document: &Value, path: &str, answer: &Value) -> Result<(), String> {
    let pointer = path.replace('/', "~1");
    let operation = document.pointer(&format!("/paths/{pointer}"));
    let operation = operation.and_then(Value::as_object);
    let operation = operation.and_then(|methods| methods.values().next());
    let content = operation.and_then(|o| o.pointer("/responses/200/content"));
    let content = content.and_then(Value::as_object);
    let schema = content.and_then(|kinds| kinds.values().next()?.get("schema"));
    let schema = schema.ok_or_else(|| format!("{path} is not described"))?;
    fits(document, schema, answer)
}

fn fits(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let failed = || Err(format!("{value} is not {schema}"));
    if let Some(Value::String(to)) = schema.get("$ref") {
        let schema = document.pointer(to.trim_start_matches('#')).unwrap();
        return fits(document, schema, value);
    }
    for key in ["anyOf", "oneOf"] {
        if let Some(Value::Array(options)) = schema.get(key)
            && !options.iter().any(|one| fits(document, one, value).is_ok())
        {
            return failed();
        }
    }
    let is = |kind: &Value| match kind.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_u64() || value.is_i64(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        _ => false,
    };
    let fine = match schema.get("type") {
        Some(Value::Array(kinds)) => kinds.iter().any(is),
        Some(kind) => is(kind),
        None => true,
    };
    let listed = match schema.get("enum") {
        Some(Value::Array(words)) => words.contains(value),
        _ => true,
    };
    let constant = schema.get("const").is_none_or(|word| word == value);
    if !(fine && listed && constant) {
        return failed();
    }
    if let (Some(items), Value::Array(values)) = (schema.get("items"), value) {
        for value in values {
            fits(document, items, value)?;
        }
    }
    let Value::Object(fields) = value else {
        return Ok(());
    };
    let Some(Value::Object(known)) = schema.get("properties") else {
        return Ok(());
    };
    for (name, value) in fields {
        let Some(schema) = known.get(name) else {
            return Err(format!("{name} is not described"));
        };
        fits(document, schema, value)?;
    }
    let required = schema.get("required").and_then(Value::as_array);
    for name in required.into_iter().flatten().filter_map(Value::as_str) {
        if !fields.contains_key(name) {
            return Err(format!("{name} is missing"));
        }
    }
    Ok(())
}
