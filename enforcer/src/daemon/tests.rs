//! The whole daemon on a fake dataplane, through its real socket.

mod settings;
mod shadow;
mod site;
mod trial;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use enforcer_common::{
    verdict::{Hook, Outcome, Reason},
    wire::Event,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};

use super::{Config, Ended, RunError, ViewSocket, fake::Handle, guard::Trust, run};
use crate::{
    api::{
        changes::RollbackRequest,
        client::{Client, ClientError, DenialsQuery, Records},
        openapi,
        types::{
            Denial, ExplainRequest, FlowsRequest, LostCause, PlanRequest, Record, State, Status,
        },
    },
    dataplane::{Adopted, Counters, PacketCount, RecordCount, SocketHooks, WallClock},
    events::enrich::tests::event,
};

const POLICY: &str = "\
version: 1
segments:
  ehr-db:
    members: [{cidr: 10.10.1.0/24}]
    protect: inbound
  guest-wifi:
    members: [{cidr: 10.99.0.0/16}]
rules:
  - {name: app-to-db, from: [any], to: [ehr-db], services: [tcp/5432]}
tests:
  - {from: 10.99.3.4, to: 10.10.1.5, service: tcp/22, expect: deny}
";

struct Daemon {
    dir: tempfile::TempDir,
    fake: Handle,
    client: Client,
    hangup: mpsc::Sender<()>,
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<Ended, RunError>>,
}

fn config(dir: &Path) -> Config {
    Config {
        segments: dir.join("segments"),
        settings: None,
        trust: Trust::Owner { links: false },
        interfaces: super::Selection {
            wanted: vec!["lo".parse().unwrap()],
            exempt: Vec::new(),
        },
        socket: dir.join("run/control.sock"),
        view_socket: Some(ViewSocket {
            path: dir.join("view/view.sock"),
            required: true,
        }),
        socket_hooks: SocketHooks::Observe,
        state_dir: Some(dir.join("state")),
        confirm_within: None,
    }
}

fn policy_dir(text: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("segments")).unwrap();
    fs::write(dir.path().join("segments/hospital.yaml"), text).unwrap();
    dir
}

fn spawn(
    config: Config,
    fake: &Handle,
) -> (
    mpsc::Sender<()>,
    watch::Sender<bool>,
    JoinHandle<Result<Ended, RunError>>,
) {
    let (hangup, hangups) = mpsc::channel(1);
    let (stop, stops) = watch::channel(false);
    let fake = fake.clone();
    let task = tokio::spawn(run(
        config,
        move |words| Ok(fake.open_or_adopt(words)),
        hangups,
        stops,
    ));
    (hangup, stop, task)
}

impl Daemon {
    async fn start() -> Self {
        Self::start_with(POLICY, |config| config).await
    }

    async fn start_with(text: &str, change: impl FnOnce(Config) -> Config) -> Self {
        let dir = policy_dir(text);
        let fake = Handle::default();
        let config = change(config(dir.path()));
        let client = Client::new(&config.socket);
        let (hangup, stop, task) = spawn(config, &fake);
        let this = Self {
            dir,
            fake,
            client,
            hangup,
            stop,
            task,
        };
        this.until("it answers", async || this.client.status().await.is_ok())
            .await;
        this
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("segments/hospital.yaml")
    }

    async fn status(&self) -> Status {
        self.client.status().await.unwrap()
    }

    async fn until(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !holds().await {
            assert!(Instant::now() < deadline, "never: {what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn stop(self) -> Result<Ended, RunError> {
        self.stop.send_replace(true);
        let result = timeout(Duration::from_secs(5), self.task).await;
        assert!(self.fake.lock().detached_all);
        assert!(!self.dir.path().join("run/control.sock").exists());
        result.unwrap().unwrap()
    }
}

async fn all(client: &Client, query: DenialsQuery) -> Vec<Record> {
    let mut records = client.denials(&query).await.unwrap();
    let mut all = Vec::new();
    while let Some(record) = records.next().await.unwrap() {
        all.push(record);
    }
    all
}

async fn next_denial(records: &mut Records) -> Denial {
    let next = timeout(Duration::from_secs(3), records.next()).await;
    match next.expect("a denial in time").unwrap() {
        Some(Record::Denial(denial)) => *denial,
        other => panic!("no denial: {other:?}"),
    }
}

fn follow() -> DenialsQuery {
    DenialsQuery {
        last: Some(0),
        follow: true,
        ..DenialsQuery::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn status_says_what_is_enforced_and_stopping_takes_it_off() {
    let daemon = Daemon::start().await;
    daemon.fake.lock().counters = Counters {
        packets: vec![PacketCount {
            hook: Hook::TcIngress,
            outcome: Outcome::Denied,
            reason: Reason::DefaultDeny,
            packets: 17,
        }],
        records: vec![RecordCount {
            hook: Hook::TcIngress,
            emitted: 3,
            suppressed: 12,
            lost: 2,
            displaced: 0,
            flow_insert_failed: 5,
        }],
        flows: 2048,
    };
    let status = daemon.status().await;
    assert_eq!(status.state, State::Enforcing);
    assert_eq!(
        (
            status.generation,
            status.policy.segments,
            status.policy.rules
        ),
        (1, 2, 1)
    );
    assert_eq!(status.policy.last_error, None);
    let lo = &status.interfaces[0];
    assert_eq!((lo.name.as_str(), lo.enforced), ("lo", true));
    assert_eq!(lo.hooks, ["tc_ingress", "tc_egress"]);
    assert_eq!(
        (
            status.counters[0].packets,
            status.counters[0].reason.as_str()
        ),
        (17, "default_deny")
    );
    assert_eq!(
        (
            status.events.emitted,
            status.events.suppressed,
            status.events.lost
        ),
        (3, 12, 2)
    );
    assert_eq!((status.flows.capacity, status.flows.refused), (2048, 5));
    {
        let fake = daemon.fake.lock();
        assert_eq!(fake.hooks, Some(SocketHooks::Observe));
        assert_eq!(fake.attached.len(), 1);
        assert_eq!(fake.size_class, 1 << 18);
    }
    let mode = |path: &str| {
        let metadata = fs::metadata(daemon.dir.path().join(path)).unwrap();
        metadata.permissions().mode() & 0o777
    };
    assert_eq!((mode("run/control.sock"), mode("run")), (0o600, 0o700));
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_file_takes_over_and_a_broken_one_changes_nothing() {
    let daemon = Daemon::start().await;
    fs::write(daemon.file(), POLICY.replace("tcp/5432", "tcp/5433")).unwrap();
    daemon
        .until("the new policy", async || {
            daemon.status().await.generation == 2
        })
        .await;
    let good = daemon.status().await;

    fs::write(
        daemon.file(),
        POLICY.replace("[ehr-db], serv", "[ehr-bd], serv"),
    )
    .unwrap();
    daemon
        .until("the error", async || {
            daemon.status().await.policy.last_error.is_some()
        })
        .await;
    let broken = daemon.status().await;
    let error = broken.policy.last_error.unwrap();
    assert!(error.starts_with("hospital.yaml:9: "), "{error}");
    assert!(error.contains("ehr-bd"), "{error}");
    assert_eq!(
        (broken.generation, &broken.policy.hash),
        (2, &good.policy.hash)
    );
    assert_eq!(broken.state, State::Degraded);
    let refused = daemon.client.reload().await.unwrap_err().to_string();
    assert!(refused.contains("did you mean"), "{refused}");

    // A failing test of the policy blocks it as well.
    fs::write(
        daemon.file(),
        POLICY.replace("expect: deny", "expect: allow"),
    )
    .unwrap();
    let refused = daemon.client.reload().await.unwrap_err().to_string();
    assert!(refused.contains("the test expects allow"), "{refused}");
    assert_eq!(daemon.fake.lock().applied.len(), 2);

    // Back to what runs: nothing to swap, and the error is gone. By rename, as editors save.
    let other = daemon.dir.path().join("segments/.new");
    fs::write(&other, POLICY.replace("tcp/5432", "tcp/5433")).unwrap();
    fs::rename(&other, daemon.file()).unwrap();
    daemon
        .until("no error", async || {
            daemon.status().await.policy.last_error.is_none()
        })
        .await;
    assert_eq!(daemon.status().await.generation, 2);
    assert!(!daemon.client.reload().await.unwrap().changed);
    assert_eq!(daemon.fake.lock().applied.len(), 2);
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_reloads_and_a_refused_image_keeps_the_old_one() {
    let daemon = Daemon::start().await;
    daemon.fake.lock().refuse_apply = true;
    fs::write(daemon.file(), POLICY.replace("tcp/5432", "tcp/5433")).unwrap();
    daemon
        .until("the error", async || {
            daemon.status().await.policy.last_error.is_some()
        })
        .await;
    assert_eq!(daemon.status().await.generation, 1);
    daemon.fake.lock().refuse_apply = false;
    daemon.hangup.send(()).await.unwrap();
    daemon
        .until("the new policy", async || {
            daemon.status().await.generation > 1
        })
        .await;
    // A number that was tried is not used again.
    let applied = daemon.fake.lock().applied.clone();
    assert!(applied.len() == 2 && applied[1].0 > 2, "{applied:?}");
    assert_eq!(daemon.status().await.policy.last_error, None);
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn denials_are_followed_within_100_ms_filtered_and_counted() {
    let daemon = Daemon::start().await;
    let mut live = daemon.client.denials(&follow()).await.unwrap();
    let (mut took, mut denial) = (Duration::MAX, None);
    // The best of three: a busy machine is no reason to fail, polling is.
    for _ in 0..3 {
        let before = Instant::now();
        let socket_call = Event {
            slot: u32::MAX,
            ..event()
        };
        daemon.fake.emit(&[socket_call]);
        denial = Some(next_denial(&mut live).await);
        took = took.min(before.elapsed());
    }
    assert!(took < Duration::from_millis(100), "{took:?}");
    let denial = denial.unwrap();
    assert_eq!(&*denial.to_segments[0], "ehr-db");
    assert_eq!(
        (denial.file.as_deref(), denial.line),
        (Some("hospital.yaml"), Some(3))
    );
    assert_eq!(denial.packets, 1);

    daemon.fake.emit(&[event()]);
    assert_eq!(next_denial(&mut live).await.packets, 1);
    // 14 more of the flow, then the slot is taken by another flow with its own epoch.
    let other = Event {
        source: [0, 0, 0, 0x0a63_0305],
        epoch: 2,
        total: 1,
        ..event()
    };
    daemon.fake.emit(&[
        Event {
            total: 15,
            ..event()
        },
        other,
    ]);
    assert_eq!(next_denial(&mut live).await.packets, 14);
    assert_eq!(next_denial(&mut live).await.packets, 1);
    // The rest is found by the scan, once.
    daemon.fake.lock().running = vec![Event { total: 9, ..other }];
    let tail = next_denial(&mut live).await;
    assert_eq!((tail.packets, tail.src), (8, "10.99.3.5".parse().ok()));

    let only = async |from: &str| {
        let query = DenialsQuery {
            from: Some(from.parse().unwrap()),
            ..DenialsQuery::default()
        };
        all(&daemon.client, query).await.len()
    };
    assert_eq!(only("guest-wifi").await, 7);
    assert_eq!(only("10.99.3.4").await, 5);
    assert_eq!(only("ehr-db").await, 0);
    assert_eq!(only("unsegmented").await, 0);
    let last = DenialsQuery {
        last: Some(1),
        ..DenialsQuery::default()
    };
    let last = all(&daemon.client, last).await;
    assert!(matches!(&last[..], [Record::Denial(d)] if d.packets == 8));
    let typo = DenialsQuery {
        to: Some("ehr-bd".parse().unwrap()),
        ..DenialsQuery::default()
    };
    let error = daemon.client.denials(&typo).await.unwrap_err().to_string();
    assert_eq!(
        error,
        "no segment is named `ehr-bd`; did you mean `ehr-db`?"
    );
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_flows_are_swept() {
    let daemon = Daemon::start().await;
    daemon
        .until("it sweeps", async || daemon.fake.lock().sweeps > 0)
        .await;
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn losses_show_in_the_stream() {
    let daemon = Daemon::start().await;
    let mut live = daemon.client.denials(&follow()).await.unwrap();
    daemon.fake.lock().counters.records = vec![RecordCount {
        hook: Hook::TcEgress,
        emitted: 0,
        suppressed: 0,
        lost: 311,
        displaced: 1,
        flow_insert_failed: 0,
    }];
    let next = timeout(Duration::from_secs(3), live.next()).await;
    let record = next.unwrap().unwrap();
    assert!(
        matches!(&record, Some(Record::Lost(lost))
            if lost.events == 312 && lost.cause == LostCause::RingBufferFull),
        "{record:?}"
    );
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_ends_shows_in_the_status() {
    let daemon = Daemon::start().await;
    daemon.fake.lock().poisoned = true;
    daemon.fake.emit(&[event()]);
    daemon
        .until("degraded", async || {
            daemon.status().await.state == State::Degraded
        })
        .await;
    let problems = daemon.status().await.problems;
    assert!(problems[0].starts_with("the reader of denials has ended"));
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_asks_the_live_image() {
    let daemon = Daemon::start().await;
    let ask = async |service: &str| {
        let request = ExplainRequest {
            from: "10.99.3.4".parse().unwrap(),
            to: "10.10.1.5".parse().unwrap(),
            service: service.to_owned(),
        };
        daemon.client.explain(&request).await
    };
    let allowed = ask("postgresql").await.unwrap();
    assert_eq!(
        (allowed.verdict.as_str(), allowed.rule.as_deref()),
        ("ALLOWED", Some("app-to-db"))
    );
    assert_eq!((allowed.line, allowed.generation), (Some(9), Some(1)));
    let denied = ask("tcp/22").await.unwrap();
    assert_eq!(
        (denied.verdict.as_str(), denied.strength.as_deref()),
        ("DENIED", Some("enforce"))
    );
    assert_eq!(
        denied.default.map(|d| d.to_string()).as_deref(),
        Some("ehr-db (inbound)")
    );
    assert_eq!(denied.from_segments, ["guest-wifi"]);
    assert_eq!(denied.to_segments, ["ehr-db"]);
    assert!(matches!(
        ask("tcp/nothing").await,
        Err(ClientError::Refused(_))
    ));
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_policy_or_a_taken_socket_does_not_start() {
    let daemon = Daemon::start().await;
    let second = Handle::default();
    let (_hangup, _stop, task) = spawn(config(daemon.dir.path()), &second);
    let error = task.await.unwrap().unwrap_err();
    assert!(matches!(error, RunError::Socket(_)), "{error}");
    assert!(second.lock().applied.is_empty());
    assert_eq!(daemon.status().await.state, State::Enforcing);
    daemon.stop().await.unwrap();

    let dir = policy_dir("version: 1\nsegmnts: {}\n");
    let (_hangup, _stop, task) = spawn(config(dir.path()), &second);
    let error = task.await.unwrap().unwrap_err();
    assert!(matches!(error, RunError::Policy(_)), "{error}");
    assert!(second.lock().applied.is_empty());
    assert!(!dir.path().join("run/control.sock").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_takes_everything_off_and_a_stale_socket_is_replaced() {
    let dir = policy_dir(POLICY);
    let config = config(dir.path());
    fs::create_dir(dir.path().join("run")).unwrap();
    // A socket file that nobody listens on any more.
    drop(std::os::unix::net::UnixListener::bind(&config.socket).unwrap());
    let fake = Handle::default();
    fake.lock().refuse_attach = true;
    let (_hangup, _stop, task) = spawn(config, &fake);
    let error = task.await.unwrap().unwrap_err();
    assert!(matches!(error, RunError::Interface { .. }), "{error}");
    assert!(fake.lock().detached_all);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_interface_degrades() {
    let daemon = Daemon::start_with(POLICY, |mut config| {
        config.interfaces.wanted.push("nosuchif0".parse().unwrap());
        config
    })
    .await;
    let status = daemon.status().await;
    assert_eq!(status.state, State::Degraded);
    assert!(status.problems[0].contains("nosuchif0 is not enforced: no such interface"));
    daemon.stop().await.unwrap();

    let daemon = Daemon::start_with(POLICY, |mut config| {
        config.interfaces.wanted = vec!["nosuch*".parse().unwrap()];
        config
    })
    .await;
    assert_eq!(daemon.status().await.state, State::NotEnforcing);
    daemon.stop().await.unwrap();
}

fn value(answer: &impl serde::Serialize) -> serde_json::Value {
    serde_json::to_value(answer).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_as_openapi_describes_them() {
    let daemon = Daemon::start().await;
    daemon.fake.emit(&[event()]);
    daemon
        .until("a denial", async || {
            !all(&daemon.client, DenialsQuery::default())
                .await
                .is_empty()
        })
        .await;
    let description = daemon.client.openapi().await.unwrap();
    let check = |path: &str, answer: serde_json::Value| {
        openapi::check(&description, path, &answer).unwrap_or_else(|e| panic!("{path}: {e}"));
    };
    check("/v1/status", value(&daemon.status().await));
    for record in all(&daemon.client, DenialsQuery::default()).await {
        check("/v1/denials", value(&record));
    }
    let request = ExplainRequest {
        from: "10.99.3.4".parse().unwrap(),
        to: "10.10.1.5".parse().unwrap(),
        service: "tcp/22".to_owned(),
    };
    check(
        "/v1/explain",
        value(&daemon.client.explain(&request).await.unwrap()),
    );
    check("/v1/reload", value(&daemon.client.reload().await.unwrap()));
    let back = RollbackRequest {
        to: Some(1),
        confirm_within: Some(60),
        ..RollbackRequest::default()
    };
    check(
        "/v1/rollback",
        value(&daemon.client.rollback(&back).await.unwrap()),
    );
    check("/v1/status", value(&daemon.status().await));
    check(
        "/v1/history",
        value(&daemon.client.history().await.unwrap()),
    );
    let other = policy_dir(&POLICY.replace("tcp/5432", "tcp/5433"));
    let request = PlanRequest {
        path: Some(other.path().join("segments").display().to_string()),
    };
    let plan = daemon.client.plan(&request).await.unwrap();
    assert!(plan.changed && !plan.reach.groups.is_empty() && plan.text.rules.changed == 1);
    check("/v1/plan", value(&plan));
    let flows = daemon.client.flows(&FlowsRequest::default()).await;
    check("/v1/flows", value(&flows.unwrap()));
    let wrong = serde_json::json!({ "generation": 1 });
    assert!(openapi::check(&description, "/v1/reload", &wrong).is_err());
    daemon.stop().await.unwrap();
}

#[tokio::test]
async fn plans_are_made_one_at_a_time_and_hold_up_nobody() {
    let daemon = Daemon::start().await;
    let before = daemon.status().await;
    let mut large = POLICY.to_owned();
    let (head, tests) = large.split_once("tests:").unwrap();
    let rules: String = (1..4_000)
        .map(|port| {
            format!("  - {{name: r{port}, from: [any], to: [ehr-db], services: [udp/{port}]}}\n")
        })
        .collect();
    large = format!("{head}{rules}tests:{tests}");
    let other = policy_dir(&large);
    let request = PlanRequest {
        path: Some(other.path().join("segments").display().to_string()),
    };
    let plan = || daemon.client.plan(&request);
    let meanwhile = async {
        let status = daemon.status().await;
        (status, std::time::Instant::now())
    };
    let made = async {
        let plans = tokio::join!(plan(), plan());
        (plans, std::time::Instant::now())
    };
    let (((one, other), end), (_, answered)) = tokio::join!(made, meanwhile);
    assert!(answered < end, "the status waited for the plan");
    let (plan, refused) = if one.is_ok() {
        (one, other)
    } else {
        (other, one)
    };
    assert!(matches!(refused, Err(ClientError::Busy(_))), "{refused:?}");
    let plan = plan.unwrap();
    assert_eq!(plan.text.rules.added, 3_999);
    assert!(plan.text.rules.items.len() < 3_999);
    // What was only asked about is not in force, and no reason to worry.
    let after = daemon.status().await;
    assert_eq!(
        (before.generation, before.policy, before.problems),
        (after.generation, after.policy, after.problems)
    );
    assert_eq!(daemon.fake.lock().applied.len(), 1);
    let request = PlanRequest {
        path: Some("segments".to_owned()),
    };
    let relative = daemon.client.plan(&request).await;
    assert!(
        matches!(relative, Err(ClientError::Refused(_))),
        "{relative:?}"
    );
    // Where the daemon reads its own, there is nothing new.
    let own = daemon.client.plan(&PlanRequest::default()).await.unwrap();
    assert!(!own.changed, "{own:?}");
    daemon.stop().await.unwrap();
}

#[tokio::test]
async fn a_clock_that_was_set_back_while_no_daemon_lived_raises_the_floor() {
    const HOUR: u64 = 3_600;
    let (dir, fake) = (policy_dir(POLICY), Handle::default());
    let now = crate::clock::Sample::now().unwrap();
    let boot = u64::try_from(now.boot_unix).unwrap();
    let told = WallClock {
        unix_floor: 5,
        boot_unix_ns: boot + HOUR * 1_000_000_000,
    };
    fake.lock().adopted = Some(Adopted {
        clock: Some(told),
        ..Adopted::default()
    });
    let (_hangup, stop, task) = spawn(config(dir.path()), &fake);
    let reached = (boot + now.boottime) / 1_000_000_000 + HOUR;
    let deadline = Instant::now() + Duration::from_secs(5);
    while fake.lock().clock.is_none_or(|c| c.unix_floor < reached) {
        assert!(Instant::now() < deadline, "{:?}", fake.lock().clock);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    stop.send_replace(true);
    assert_eq!(task.await.unwrap().unwrap(), Ended::Stopped);
}
