use std::{collections::BTreeMap, path::PathBuf};

use super::*;
use crate::{daemon::fake::Handle, events::Generations, policy::SourceFile};

const POLICY: &str = "version: 1\nsegments: {a: {members: [{cidr: 10.0.0.0/8}]}}\n";

fn reloads(settings: &str) -> Reloads {
    let file = |name: &str, text: &str| SourceFile {
        name: name.to_owned(),
        text: text.to_owned(),
    };
    let texts = Texts {
        policy: vec![file("p.yaml", POLICY)].into(),
        settings: Some(file("enforcer.yaml", settings)),
    };
    let loaded = load::compile(texts.clone(), &Environment::default()).unwrap();
    let mut dataplane = Handle::default().open(0);
    dataplane.apply(&loaded.image).unwrap();
    let live = Live {
        path: PathBuf::from("p.yaml"),
        policy: Arc::new(loaded.policy),
        known: true,
        settings: Arc::new(loaded.settings),
        settings_path: None,
        image: loaded.image,
        loaded_at: Time::now(),
    };
    let dataplane = Arc::new(Mutex::new(dataplane));
    let changes = Arc::new(crate::daemon::store::Store::open(None));
    let shared = Shared::new(dataplane, Arc::new(Generations::default()), changes, live);
    let sources = Sources {
        segments: PathBuf::from("p.yaml"),
        settings: None,
        trust: crate::daemon::guard::Trust::Anyone,
    };
    let origin = Origin {
        kind: OriginKind::Watched,
        path: "p.yaml".to_owned(),
        change: None,
        state: None,
        by: None,
        at: Time::now(),
        differs: None,
    };
    let begun = Begun {
        watched: Some(texts.clone()),
        texts,
        origin,
        memory: Memory::default(),
        environment: Environment::default(),
        generation: 1,
        previous: None,
    };
    Reloads::new(sources, Arc::new(shared), begun)
}

fn host(interfaces: &[(u32, &str)], addresses: &[&str]) -> Environment {
    Environment {
        host_addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        interfaces: interfaces
            .iter()
            .map(|(slot, name)| (*slot, (*name).to_owned()))
            .collect(),
    }
}

/// Whether the host as it is makes work; it is done then.
async fn works(reloads: &mut Reloads, now: &Environment) -> bool {
    reloads.step(now);
    if let Some(due) = reloads.rests_until() {
        assert!(reloads.running.is_none());
        tokio::time::sleep_until(due.into()).await;
        reloads.step(now);
    }
    let works = reloads.running.is_some();
    if works {
        let done = reloads.done().await;
        reloads.finish(done).await;
    }
    works
}

#[tokio::test]
async fn interfaces_matter_to_those_who_name_them() {
    let mut plain =
        reloads("version: 1\nfailsafe: [{name: a, sources: [10.0.0.0/8], ports: [tcp/22]}]\n");
    assert!(!works(&mut plain, &host(&[(1, "eth0")], &[])).await);
    assert!(plain.slots().is_empty());
    assert!(works(&mut plain, &host(&[(1, "eth0")], &["10.0.0.1"])).await);
    assert!(!works(&mut plain, &host(&[(2, "eth1")], &["10.0.0.1"])).await);

    let mut named = reloads(
        "version: 1\nfailsafe: [{name: a, sources: [10.0.0.0/8], ports: [tcp/22], interfaces: [eth0]}]\n",
    );
    let one = host(&[(1, "eth0")], &[]);
    assert!(works(&mut named, &one).await);
    assert!(!works(&mut named, &one).await);
    assert_eq!(named.slots(), BTreeSet::from([1]));
    // Another name, and a slot less.
    assert!(works(&mut named, &host(&[(1, "eth1")], &[])).await);
    // The slot is taken while an image may come that means it.
    named.rest = Rest::default();
    named.step(&host(&[(2, "eth0")], &[]));
    assert_eq!(named.slots(), BTreeSet::from([1, 2]));
    let done = named.done().await;
    named.finish(done).await;
    assert_eq!(named.slots(), BTreeSet::from([2]));
    assert_eq!(
        named.environment.interfaces,
        BTreeMap::from([(2, "eth0".to_owned())])
    );
}

#[tokio::test]
async fn file_by_file_the_live_image_is_that_of_a_fresh_start() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let text = format!("version: 1\n{text}\n");
        std::fs::write(dir.path().join(name), text).unwrap();
    };
    write("a.yaml", "segments: {a: {members: [{cidr: 10.0.0.1/32}]}}");
    write(
        "b.yaml",
        "segments: {b: {members: [{cidr: \"fd01::/64\"}, {cidr: 10.9.0.0/16}]}}",
    );
    write(
        "r.yaml",
        "rules: [{name: r, from: [a], to: [b], services: [tcp/80]}]",
    );
    let mut reloads = reloads("version: 1\n");
    reloads.sources.segments = dir.path().to_owned();
    let sources = reloads.sources.clone();
    let host = Environment::default();
    let steps = [
        ("a.yaml", "", true),
        (
            "a.yaml",
            "segments: {a: {members: [{cidr: 10.0.0.1/32}, {cidr: 10.9.0.7/32}]}}",
            true,
        ),
        (
            "a.yaml",
            "segments: {a: {members: [{cidr: 10.0.0.1/8}]}}",
            false,
        ),
        (
            "a.yaml",
            "\nsegments: {a: {members: [{cidr: \"fd00::1/128\"}]}, c: {members: [{cidr: \"fd00::2/128\"}]}}",
            true,
        ),
        (
            "r.yaml",
            "rules: [{name: r, from: [c], to: [a, b], services: [tcp/80]}]",
            true,
        ),
        (
            "b.yaml",
            "segments: {b: {members: [{cidr: 10.9.0.0/16}]}}",
            true,
        ),
        (
            "a.yaml",
            "segments: {a: {members: [{cidr: 10.9.0.7/32}]}}",
            false,
        ),
        (
            "r.yaml",
            "rules: [{name: r, from: [a], to: [b], services: [tcp/80]}]",
            true,
        ),
    ];
    let mut before = reloads.shared.live().image.hash();
    for (name, text, good) in steps {
        if !text.is_empty() {
            write(name, text);
        }
        reloads.files_changed();
        assert!(works(&mut reloads, &host).await);
        let live = reloads.shared.live().image.hash();
        let fresh = load::load(&sources, &host, &progress::Progress::default());
        assert_eq!(fresh.is_ok(), good, "{text}");
        assert_eq!(live, fresh.map_or(before, |loaded| loaded.image.hash()));
        assert_eq!(live != before, good, "{text}");
        before = live;
    }
}

#[tokio::test]
async fn other_interfaces_do_not_make_the_addresses_stale() {
    let mut named = reloads(
        "version: 1\nfailsafe: [{name: a, sources: [10.0.0.0/8], ports: [tcp/22], interfaces: [eth0]}]\n",
    );
    named.step(&host(&[(1, "eth0")], &[]));
    assert!(named.stale.is_none());
    named.step(&host(&[(1, "eth0")], &["10.0.0.1"]));
    assert!(named.stale.is_some());
}
