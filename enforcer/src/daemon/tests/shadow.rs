//! A candidate beside the policy in force: begun, gone on with, ended.

use enforcer_common::{
    decide::Decision,
    shadow::{Difference, DifferenceKey, Example, Said},
    verdict::{Hook, Outcome, Reason},
};

use super::{site::Site, *};
use crate::events::rehearsal::{Rehearsal, ShadowRequest};

fn said(outcome: Outcome, reason: Reason, generation: u32) -> Said {
    let rule = if reason == Reason::RuleAllow {
        0
    } else {
        u32::MAX
    };
    let segment = if reason == Reason::DefaultDeny {
        0
    } else {
        u32::MAX
    };
    Said::of(
        &Decision {
            outcome,
            reason,
            rule,
            segment,
        },
        generation,
    )
}

/// The kernel has counted packets that the candidate would drop.
fn count(site: &Site, live: u32, packets: u64) {
    let mut fake = site.fake.lock();
    let candidate = fake.shadow.as_ref().unwrap().generation();
    let key = DifferenceKey {
        live: said(Outcome::Allowed, Reason::RuleAllow, live),
        shadow: said(Outcome::Denied, Reason::DefaultDeny, candidate),
        hook: Hook::TcIngress as u32,
    };
    let counted = Difference {
        packets,
        time: 1,
        first: Example::NONE,
        last: Example::NONE,
    };
    fake.differences.insert(key, counted);
}

async fn begin(site: &Site, path: &std::path::Path) -> Result<Option<Rehearsal>, String> {
    let path = path.display().to_string();
    let begun = site.client.begin_shadow(&ShadowRequest { path }).await;
    begun.map(|s| s.shadow).map_err(|error| error.to_string())
}

async fn now(site: &Site) -> Option<Rehearsal> {
    site.client.shadow().await.unwrap().shadow
}

async fn resumed(site: &Site) -> Rehearsal {
    site.until("the shadow goes on", async || now(site).await.is_some())
        .await;
    now(site).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shadow_goes_on_over_restarts_and_reboots() {
    let mut site = Site::started().await;
    assert_eq!(now(&site).await, None);
    let other = site.other("other", &POLICY.replace("tcp/5432", "tcp/5433"));
    let begun = begin(&site, &other).await.unwrap().unwrap();
    assert_eq!((begun.differing, begun.rules), (0, 1));
    let generation = site.fake.lock().shadow.as_ref().unwrap().generation();
    assert!(generation >= 1 << 31 && site.fake.lock().applied.len() == 1);
    count(&site, 1, 7);
    let report = now(&site).await.unwrap();
    assert_eq!((report.differing, report.newly_denied), (7, 7));
    let rule = report.differences[0].now.rule.as_deref();
    assert!(rule.is_some() && report.differences[0].then.segment.is_some());

    // The kernel goes on counting while nobody looks; the directory need not be there any more.
    fs::remove_dir_all(&other).unwrap();
    site.kill().await;
    count(&site, 1, 9);
    site.start().await;
    assert_eq!(resumed(&site).await.differing, 9);
    let kept = site.fake.lock().shadow.as_ref().unwrap().generation();
    assert_eq!(kept, generation, "the same image");

    // A kernel that knows nothing begins at nought, the report does not.
    site.until("the counts are on disk", async || {
        let saved = fs::read(site.dir.path().join("state/shadow-counts")).unwrap_or_default();
        String::from_utf8_lossy(&saved).contains("\"packets\":9")
    })
    .await;
    site.kill().await;
    site.reboot();
    site.start().await;
    assert_eq!(resumed(&site).await.differing, 9);
    count(&site, 2, 4);
    assert_eq!(now(&site).await.unwrap().differing, 13);

    // Another policy is in force, and those counts are moved: counted once, whenever it dies.
    let third = site.other("third", &POLICY.replace("tcp/5432", "tcp/5434"));
    site.apply(&third, None).await.unwrap();
    site.until("the old ones are moved", async || {
        let saved = fs::read(site.dir.path().join("state/shadow-counts")).unwrap_or_default();
        !String::from_utf8_lossy(&saved).contains("\"moved\":[]")
    })
    .await;
    site.kill().await;
    count(&site, 2, 4);
    site.start().await;
    assert_eq!(resumed(&site).await.differing, 13);
    site.until("the kernel has forgotten them", async || {
        assert_eq!(now(&site).await.unwrap().differing, 13);
        site.fake.lock().differences.is_empty()
    })
    .await;
    site.restart().await;
    assert_eq!(resumed(&site).await.differing, 13);

    // A kernel that does not take it costs no count that is kept.
    site.kill().await;
    site.reboot();
    site.fake.lock().refuse_shadow = true;
    site.start().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(now(&site).await, None);
    site.kill().await;
    site.fake.lock().refuse_shadow = false;
    site.start().await;
    assert_eq!(resumed(&site).await.differing, 13);

    let last = site.client.end_shadow().await.unwrap().shadow.unwrap();
    assert_eq!(last.differing, 13);
    assert!(site.fake.lock().shadow.is_none());
    site.restart().await;
    assert_eq!(now(&site).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_rehearsed_changes_nothing() {
    let site = Site::started().await;
    let good = site.other("good", POLICY);
    begin(&site, &good).await.unwrap();
    let bad = site.other("bad", &POLICY.replace("tcp/5432", "tcp/x"));
    let refused = begin(&site, &bad).await.unwrap_err();
    assert!(refused.contains("tcp/x"), "{refused}");
    let nowhere = begin(&site, std::path::Path::new("/nowhere/at/all")).await;
    assert!(nowhere.unwrap_err().contains("No such file"));
    assert_eq!(now(&site).await.unwrap().path, good.display().to_string());
    site.fake.lock().refuse_shadow = true;
    let other = site.other("other", &POLICY.replace("tcp/5432", "tcp/5433"));
    assert!(begin(&site, &other).await.is_err());
    assert_eq!(now(&site).await.unwrap().path, good.display().to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_candidate_that_nobody_knows_is_not_asked_any_more() {
    let mut site = Site::started().await;
    let other = site.other("other", POLICY);
    begin(&site, &other).await.unwrap();
    site.kill().await;
    fs::remove_file(site.dir.path().join("state/shadow")).unwrap();
    site.start().await;
    site.until("it is taken out", async || {
        site.fake.lock().shadow.is_none()
    })
    .await;
    assert!(now(&site).await.is_none());
}
