//! Changes of what is in force: applied, on trial, confirmed, taken back, and all that again after
//! a restart.

use std::path::Path;

use super::{site::Site, *};
use crate::api::{
    changes::{ApplyRequest, ChangeKind, ChangeOutcome, OriginKind, RollbackRequest},
    client::ClientError,
};

/// A policy that differs from others by its port.
fn port(port: u16) -> String {
    POLICY.replace("tcp/5432", &format!("tcp/{port}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_act_wins_across_restarts() {
    let mut site = Site::started().await;
    site.only(5432).await;
    assert_eq!(site.origin().await, OriginKind::Watched);
    let other = site.other("other", &port(5433));
    let applied = site.apply(&other, None).await.unwrap();
    assert!(applied.changed && applied.trial.is_none(), "{applied:?}");
    site.only(5433).await;
    let origin = site.status().await.policy.origin.unwrap();
    assert_eq!(origin.kind, OriginKind::Applied);
    assert_eq!(
        (origin.differs, origin.change),
        (Some(true), applied.change)
    );
    assert!(
        origin
            .by
            .is_some_and(|by| by.pid == Some(std::process::id()))
    );

    // A copy was taken: what becomes of the directory changes nothing.
    fs::remove_dir_all(&other).unwrap();
    site.restart().await;
    site.only(5433).await;
    let again = site.status().await.policy.origin.unwrap();
    assert_eq!(
        (again.kind, again.change),
        (OriginKind::Applied, applied.change)
    );

    // An edit is newer, with a daemon and without.
    site.edit(&port(5434));
    site.until("the edit", async || {
        site.origin().await == OriginKind::Watched
    })
    .await;
    site.only(5434).await;
    let other = site.other("other", &port(5433));
    site.apply(&other, None).await.unwrap();
    site.kill().await;
    site.edit(&port(5435));
    site.start().await;
    site.only(5435).await;
    assert_eq!(site.origin().await, OriginKind::Watched);
    let kinds: Vec<_> = site.history().await.iter().map(|c| c.kind).collect();
    use ChangeKind::{Apply, Reload, Start};
    assert_eq!(kinds, [Start, Apply, Start, Reload, Apply, Start]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unconfirmed_trial_goes_back_and_a_confirmed_one_stays() {
    let site = Site::started().await;
    let other = site.other("other", &port(5433));
    let applied = site.apply(&other, Some(4)).await.unwrap();
    let trial = applied.trial.unwrap();
    assert!(
        trial.remaining_ms <= 4_000 && trial.remaining_ms > 2_500,
        "{trial:?}"
    );
    site.only(5433).await;
    let status = site.status().await;
    assert_eq!(status.trial.unwrap().change, trial.change);

    // Nothing else is put in force meanwhile, and says why.
    let third = site.other("third", &port(5435));
    for refused in [
        site.apply(&third, None).await.unwrap_err(),
        site.apply(&third, Some(60)).await.unwrap_err(),
        site.rollback(Some(1)).await.unwrap_err(),
        site.client.reload().await.map(drop).unwrap_err(),
    ] {
        let ClientError::Conflict(said) = refused else {
            panic!("{refused}");
        };
        assert!(
            said.contains("is on trial since") && said.contains("enforcer confirm"),
            "{said}"
        );
        assert!(
            said.contains(&format!("pid {}", std::process::id())),
            "{said}"
        );
    }
    // A look is no change.
    let look = ApplyRequest {
        path: third.clone(),
        confirm_within: None,
        message: None,
        dry_run: true,
        content: None,
    };
    assert!(site.client.apply(&look).await.unwrap().dry_run);
    // An edit waits.
    site.edit(&port(5434));
    let deadline = Instant::now() + Duration::from_millis(trial.remaining_ms);
    site.until("the kernel goes back", async || {
        let generation = site.status().await.generation;
        let on = site.fake.lock().trial.is_some();
        assert!(!on || generation == 2, "the edit did not wait");
        !on
    })
    .await;
    assert!(
        Instant::now() < deadline + Duration::from_secs(1),
        "a second is enough"
    );
    site.until("the edit", async || site.status().await.generation > 2)
        .await;
    site.only(5434).await;
    let history = site.history().await;
    let outcomes: Vec<_> = history.iter().map(|c| (c.kind, c.outcome)).collect();
    let mut applies = history.iter().filter(|c| c.kind == ChangeKind::Apply);
    assert_eq!(
        applies.next().unwrap().outcome,
        ChangeOutcome::Reverted,
        "{outcomes:?}"
    );
    let revert = history
        .iter()
        .find(|c| c.kind == ChangeKind::Revert)
        .unwrap();
    assert_eq!((revert.of, revert.state), (Some(trial.change), Some(1)));
    assert_eq!(revert.cause.as_deref(), Some("the deadline passed"));
    let said = site.status().await.warnings.join("\n");
    assert!(said.contains("was not confirmed in time"), "{said}");

    let trial = site.apply(&other, Some(60)).await.unwrap().trial.unwrap();
    site.only(5433).await;
    // One that the kernel refuses can be said again.
    site.fake.lock().refuse_confirm = true;
    match site.client.confirm().await {
        Err(ClientError::Failed(said)) => assert!(said.contains("stays on trial"), "{said}"),
        other => panic!("{other:?}"),
    }
    assert!(site.status().await.trial.is_some());
    site.client.confirm().await.unwrap();
    assert!(site.fake.lock().trial.is_none());
    site.only(5433).await;
    let confirm = site.last().await;
    assert_eq!(
        (confirm.kind, confirm.of),
        (ChangeKind::Confirm, Some(trial.change))
    );
    let none = site.client.confirm().await.unwrap_err();
    assert!(matches!(none, ClientError::Conflict(_)), "{none}");
    assert!(
        !site
            .status()
            .await
            .warnings
            .join("\n")
            .contains("not confirmed")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn rollback_ends_a_trial_at_once() {
    let site = Site::started().await;
    let other = site.other("other", &port(5433));
    site.apply(&other, Some(60)).await.unwrap();
    site.rollback(None).await.unwrap();
    site.only(5432).await;
    assert!(site.fake.lock().trial.is_none());
    assert_eq!(site.origin().await, OriginKind::Watched);
    let last = site.last().await;
    assert!(
        last.kind == ChangeKind::Revert && last.by.is_some(),
        "{last:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn confirming_too_late_is_refused() {
    let site = Site::started().await;
    let other = site.other("other", &port(5433));
    site.apply(&other, Some(3)).await.unwrap();
    site.until("the last second", async || {
        let trial = site.status().await.trial;
        trial.is_some_and(|trial| trial.remaining_ms < 900)
    })
    .await;
    let late = site.client.confirm().await.unwrap_err();
    assert!(matches!(late, ClientError::Conflict(_)), "{late}");
    site.until("it goes back", async || site.status().await.trial.is_none())
        .await;
    site.only(5432).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_finds_its_trial_again() {
    let mut site = Site::started().await;
    let other = site.other("other", &port(5433));
    let trial = site.apply(&other, Some(60)).await.unwrap().trial.unwrap();
    site.restart().await;
    // It goes on, and the kernel's deadline is the same.
    let status = site.status().await;
    let now = status.trial.unwrap();
    assert_eq!((now.change, now.deadline), (trial.change, trial.deadline));
    assert!(now.remaining_ms < 60_000 && now.by.is_some(), "{now:?}");
    site.only(5433).await;
    site.client.confirm().await.unwrap();
    site.restart().await;
    site.only(5433).await;
    assert_eq!(site.origin().await, OriginKind::Applied);

    // It goes on, and passes.
    let third = site.other("third", &port(5434));
    site.apply(&third, Some(4)).await.unwrap();
    site.restart().await;
    assert!(site.status().await.trial.is_some());
    site.until("it goes back", async || site.status().await.trial.is_none())
        .await;
    site.only(5433).await;
    assert_eq!(site.last().await.kind, ChangeKind::Revert);

    // It passes without a daemon.
    let trial = site.apply(&third, Some(3)).await.unwrap().trial.unwrap();
    site.kill().await;
    site.until("the deadline", async || {
        let fake = site.fake.lock();
        fake.trial
            .as_ref()
            .is_some_and(|(_, end)| *end < Instant::now())
    })
    .await;
    site.start().await;
    assert!(site.status().await.trial.is_none());
    site.only(5433).await;
    let history = site.history().await;
    let ended = history.iter().find(|c| c.number == trial.change).unwrap();
    assert_eq!(ended.outcome, ChangeOutcome::Reverted);

    // The host itself began anew: nothing that was not confirmed comes back.
    site.apply(&third, Some(60)).await.unwrap();
    site.kill().await;
    site.reboot();
    site.start().await;
    site.only(5433).await;
    assert!(site.status().await.trial.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_policy_goes_back_to_letting_everything_pass() {
    let mut site = Site::new();
    site.within = Some(Duration::from_secs(4));
    site.start().await;
    site.only(5432).await;
    assert!(site.status().await.trial.is_some());
    // The kernel has what lets everything pass in reserve, also while nobody looks.
    let open = site.fake.lock().trial.as_ref().unwrap().0.clone();
    assert_eq!((open.stats().segments, open.stats().rules), (0, 0));
    site.restart().await;
    assert!(site.status().await.trial.is_some());
    site.until("it goes back", async || site.status().await.trial.is_none())
        .await;
    let status = site.status().await;
    assert_eq!(site.origin().await, OriginKind::PassAll);
    assert_eq!((status.policy.segments, status.state), (0, State::Degraded));
    assert_eq!(site.fake.lock().judges(), open.hash());

    // Somebody starts it again: another trial, that is confirmed this time, and never again.
    site.within = Some(Duration::from_secs(60));
    site.restart().await;
    assert!(site.status().await.trial.is_some());
    site.client.confirm().await.unwrap();
    site.restart().await;
    assert!(site.status().await.trial.is_none());
    site.only(5432).await;
    // An edit without a daemon is new, and on trial; before it was the policy before.
    site.kill().await;
    site.edit(&port(5433));
    site.start().await;
    assert!(site.status().await.trial.is_some());
    site.rollback(None).await.unwrap();
    site.only(5432).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rollback_goes_the_way_back_and_to_any_number() {
    let mut site = Site::started().await;
    let refused = site.rollback(None).await.unwrap_err();
    assert!(refused.to_string().contains("no state before"), "{refused}");
    for (name, open) in [("b", 5433), ("c", 5434)] {
        let path = site.other(name, &port(open));
        site.apply(&path, None).await.unwrap();
    }
    site.restart().await;
    let applies: Vec<_> = site.history().await;
    let of = |open: u16| {
        let name = if open == 5433 { "/b" } else { "/c" };
        applies
            .iter()
            .find(|c| c.path.ends_with(name))
            .unwrap()
            .number
    };
    site.rollback(None).await.unwrap();
    site.only(5433).await;
    assert_eq!(site.origin().await, OriginKind::RolledBack);
    site.rollback(None).await.unwrap();
    site.only(5432).await;
    site.rollback(Some(of(5434))).await.unwrap();
    site.only(5434).await;
    site.restart().await;
    site.only(5434).await;
    site.rollback(None).await.unwrap();
    site.only(5432).await;
    let missing = site.rollback(Some(77)).await.unwrap_err();
    assert!(
        missing.to_string().contains("enforcer history"),
        "{missing}"
    );
    // On trial, too.
    let request = RollbackRequest {
        to: Some(of(5433)),
        confirm_within: Some(60),
        ..RollbackRequest::default()
    };
    let trial = site.client.rollback(&request).await.unwrap().trial;
    assert!(trial.is_some());
    site.only(5433).await;
    site.rollback(None).await.unwrap();
    site.only(5432).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_changes_nothing_and_is_remembered() {
    let site = Site::started().await;
    let broken = site.other(
        "broken",
        &POLICY.replace("[ehr-db], serv", "[ehr-bd], serv"),
    );
    let refused = site.apply(&broken, None).await.unwrap_err();
    let ClientError::Rejected(said) = refused else {
        panic!("{refused}");
    };
    assert!(
        said.error.contains("p.yaml:9:") && said.error.contains("ehr-bd"),
        "{}",
        said.error
    );
    // Not every file that root may read is a policy.
    let said = site.apply(Path::new("/etc/passwd"), None).await;
    assert!(said.unwrap_err().to_string().contains("*.yaml"));
    // Others could have written it.
    let open = site.other("open", &port(5433));
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let said = site.apply(&open, Some(60)).await.unwrap_err().to_string();
    assert!(said.contains("chmod go-w"), "{said}");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
    // The kernel says no.
    site.fake.lock().refuse_trial = true;
    let said = site.apply(&open, Some(60)).await.unwrap_err().to_string();
    assert!(said.contains("trial"), "{said}");
    site.fake.lock().refuse_trial = false;
    site.fake.lock().refuse_apply = true;
    site.apply(&open, None).await.unwrap_err();
    site.fake.lock().refuse_apply = false;
    site.only(5432).await;
    let outcomes: Vec<_> = site.history().await.iter().map(|c| c.outcome).collect();
    assert_eq!(outcomes[0], ChangeOutcome::InForce);
    assert_eq!(outcomes[1..], [ChangeOutcome::Refused; 5]);
    let last = site.last().await;
    assert_eq!(last.message.as_deref(), Some("because"));
    assert!(last.error.is_some() && last.by.is_some(), "{last:?}");

    // A look changes nothing, and what was looked at is what is applied.
    let mut request = ApplyRequest {
        path: open.clone(),
        confirm_within: None,
        message: None,
        dry_run: true,
        content: None,
    };
    let look = site.client.apply(&request).await.unwrap();
    assert!(look.changed && look.change.is_none(), "{look:?}");
    site.only(5432).await;
    assert_eq!(site.history().await.len(), 6);
    request.dry_run = false;
    request.content = Some(look.content);
    fs::write(open.join("p.yaml"), port(5435)).unwrap();
    let refused = site.client.apply(&request).await.unwrap_err();
    assert!(matches!(refused, ClientError::Conflict(_)), "{refused}");
    fs::write(open.join("p.yaml"), port(5433)).unwrap();
    site.client.apply(&request).await.unwrap();
    site.only(5433).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revert_that_the_kernel_refuses_is_tried_again() {
    let site = Site::started().await;
    let other = site.other("other", &port(5433));
    site.apply(&other, Some(3)).await.unwrap();
    site.fake.lock().refuse_revert = true;
    site.until("it says so", async || {
        let problems = site.status().await.problems.join("\n");
        problems.contains("the trial is over, but cannot be tidied up")
    })
    .await;
    // The programs judge by the previous image all the same, and so do names.
    site.only(5432).await;
    site.fake.lock().refuse_revert = false;
    site.until("it is tidied up", async || {
        site.status().await.trial.is_none()
    })
    .await;
    site.only(5432).await;
    assert_eq!(site.status().await.state, State::Enforcing);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_good_last_is_in_force_when_the_files_are_not() {
    let mut site = Site::started().await;
    site.kill().await;
    site.edit("version: 1\nsegmnts: {}\n");
    site.reboot();
    site.start().await;
    let status = site.status().await;
    assert_eq!((status.state, status.generation), (State::Degraded, 1));
    // The image came before any text was parsed, with its number, and was the right one.
    assert_eq!(site.fake.lock().applied.len(), 1);
    let problems = status.problems.join("\n");
    assert!(
        problems.contains("the last good policy is in force"),
        "{problems}"
    );
    site.only(5432).await;
    site.kill().await;
    fs::remove_dir_all(site.dir.path().join("segments")).unwrap();
    site.start().await;
    site.only(5432).await;
    assert_eq!(site.origin().await, OriginKind::LastGood);
    // Mended, it takes over.
    fs::create_dir(site.dir.path().join("segments")).unwrap();
    site.edit(&port(5433));
    site.until("the mended one", async || {
        site.status().await.policy.rules == 1 && site.origin().await == OriginKind::Watched
    })
    .await;
    site.only(5433).await;
    assert_eq!(site.status().await.state, State::Enforcing);
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_are_newer_than_what_was_applied_and_leave_it_in_force() {
    let mut site = Site::new();
    let settings = site.dir.path().join("enforcer.yaml");
    let mut config = config(site.dir.path());
    config.settings = Some(crate::daemon::files::SettingsPath {
        path: settings.clone(),
        required: false,
    });
    site.start_as(config).await;
    let other = site.other("other", &port(5433));
    site.apply(&other, None).await.unwrap();
    fs::write(&settings, "version: 1\nessentials: {off: [arp]}\n").unwrap();
    site.until("the settings", async || {
        site.status().await.settings.essentials_off == ["arp"]
    })
    .await;
    site.only(5433).await;
    assert_eq!(site.origin().await, OriginKind::Applied);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_cannot_be_kept_is_a_problem_and_no_more() {
    let mut site = Site::new();
    let state = site.dir.path().join("state");
    fs::write(&state, "no directory").unwrap();
    site.start().await;
    let status = site.status().await;
    assert_eq!(status.state, State::Degraded);
    assert!(
        status.problems[0].contains("the state directory"),
        "{:?}",
        status.problems
    );
    let other = site.other("other", &port(5433));
    site.apply(&other, Some(60)).await.unwrap();
    site.client.confirm().await.unwrap();
    site.only(5433).await;
    site.rollback(None).await.unwrap();
    site.only(5432).await;
    let history = site.client.history().await.unwrap();
    assert!(history.directory.is_none() && history.problem.is_some());
}

/// Before and after each change of the kernel: what was answered holds, what was not is done or is
/// not, and everything agrees about it.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_may_be_killed_at_any_step_of_a_change() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    /// Ports that may be open after so many answers.
    const MAY: [&[u16]; 4] = [&[5432, 5433], &[5433], &[5433, 5434], &[5434, 5433]];
    let mut steps = 0;
    loop {
        let mut site = Site::started().await;
        let (b, c) = (site.other("b", &port(5433)), site.other("c", &port(5434)));
        site.fake.lock().halt = Some(steps);
        let answers = AtomicUsize::new(0);
        let answered = || answers.fetch_add(1, Ordering::Relaxed);
        let acts = async {
            site.apply(&b, Some(60)).await.unwrap();
            answered();
            site.client.confirm().await.unwrap();
            answered();
            site.apply(&c, None).await.unwrap();
            answered();
            site.rollback(None).await.unwrap();
        };
        let killed = tokio::select! {
            () = acts => false,
            () = site.until("the step", async || site.fake.lock().halted) => true,
        };
        if !killed {
            break;
        }
        // The thread that is held up in the kernel is one of it.
        let (runtime, _stop) = site.running.take().unwrap();
        let end = move || runtime.shutdown_timeout(Duration::from_millis(300));
        tokio::task::spawn_blocking(end).await.unwrap();
        site.start().await;
        site.fake.lock().over = true;
        let status = site.status().await;
        let on = site.fake.lock().trial.is_some();
        assert_eq!(status.trial.is_some(), on, "step {steps}");
        let open = status.policy.origin.as_ref().unwrap().path.clone();
        let open = match open.rsplit('/').next().unwrap() {
            "b" => 5433,
            "c" => 5434,
            _ => 5432,
        };
        site.only(open).await;
        let may = MAY[answers.load(Ordering::Relaxed)];
        assert!(may.contains(&open), "step {steps}: {open}, not {may:?}");
        // And it goes on as ever.
        if on {
            site.client.confirm().await.unwrap();
        }
        site.apply(&c, None).await.unwrap();
        site.only(5434).await;
        steps += 1;
    }
    assert_eq!(steps, 8, "four changes, before and after each");
}
