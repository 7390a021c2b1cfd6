use std::{fs, os::unix::fs::PermissionsExt as _, sync::Arc};

use super::*;
use crate::{
    api::{
        changes::{ChangeKind, ChangeOutcome, OriginKind},
        types::Time,
    },
    daemon::load,
    policy::SourceFile,
};

fn texts(port: u16) -> Texts {
    let text = format!(
        "version: 1\nsegments: {{a: {{members: [{{cidr: 10.0.0.0/8}}]}}}}\n\
         rules: [{{name: one, from: [any], to: [a], services: [tcp/{port}]}}]\n"
    );
    let file = SourceFile {
        name: "p.yaml".to_owned(),
        text,
    };
    Texts {
        policy: vec![file].into(),
        settings: None,
    }
}

fn note(kind: ChangeKind) -> Note {
    Note {
        kind,
        by: None,
        cause: None,
        path: "/p".to_owned(),
        message: None,
        error: None,
        meaning: None,
        confirm_within: None,
    }
}

fn take(journal: &mut Journal, texts: &Texts) -> Option<u64> {
    let (kind, material) = (OriginKind::Applied, Material::Texts(texts));
    journal
        .take(note(ChangeKind::Apply), kind, material, None)
        .1
}

fn saved(texts: &Texts, state: u64) -> SavedImage {
    let loaded = load::compile(texts.clone(), &Environment::default()).unwrap();
    SavedImage {
        image: loaded.image.with_generation(7),
        state,
        environment: Environment {
            host_addresses: ["10.0.0.1".parse().unwrap()].into(),
            interfaces: [(3, "eth0".to_owned())].into(),
        },
    }
}

/// What is to be on disk, one after the other: as daemons write it.
fn acts() -> Vec<(Journal, BTreeMap<u64, Texts>, Option<SavedImage>)> {
    let mut acts = Vec::new();
    let mut journal = Journal::default();
    let mut step = |journal: &Journal, new: &[(u64, Texts)], image| {
        acts.push((journal.clone(), new.iter().cloned().collect(), image));
    };
    for port in 1..=3 {
        let state = take(&mut journal, &texts(port)).unwrap();
        let image = Some(saved(&texts(port), state));
        step(&journal, &[(state, texts(port))], image);
    }
    let begun = |journal: &mut Journal, port| {
        let texts = texts(port);
        let (kind, material) = (OriginKind::Applied, Material::Texts(&texts));
        let note = note(ChangeKind::Apply);
        journal
            .begin(note, kind, material, None, Time::now())
            .1
            .unwrap()
    };
    let state = begun(&mut journal, 4);
    step(&journal, &[(state, texts(4))], None);
    journal.revert(None, None);
    step(&journal, &[], None);
    let state = begun(&mut journal, 5);
    step(&journal, &[(state, texts(5))], None);
    journal.confirm(None);
    step(&journal, &[], Some(saved(&texts(5), state)));
    acts
}

/// On disk, times have milliseconds.
fn rounded(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap()
}

/// Every point at which a process may end while it writes: what is found is what was before or what
/// was to be, with its texts.
#[test]
fn after_a_crash_at_any_step_the_old_or_the_new_is_there() {
    let acts = acts();
    let mut crashes = 0;
    for fuse in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let disk = Disk::open(&path).unwrap();
        disk.fuse.set(Some(fuse));
        let mut at = None;
        for (step, (journal, texts, image)) in acts.iter().enumerate() {
            if write(&disk, journal, texts, image.as_ref()).is_err() {
                at = Some(step);
                break;
            }
        }
        drop(disk);
        let mut troubles = Vec::new();
        let (found, image) = read(&Disk::open(&path).unwrap(), &mut troubles);
        assert_eq!(troubles, [""; 0], "fuse {fuse}");
        let leftover = fs::read_dir(&path).unwrap().flatten();
        let unfinished = leftover.filter(|e| e.file_name().to_string_lossy().contains(".new-"));
        assert_eq!(unfinished.count(), 0);
        let old = at.map_or(acts.len() - 1, |at| at.wrapping_sub(1));
        let old = acts
            .get(old)
            .map(|(journal, ..)| journal.clone())
            .unwrap_or_default();
        let new = at.map(|at| acts[at].0.clone());
        let found_now = Some(rounded(&found));
        let allowed = [Some(rounded(&old)), new.as_ref().map(rounded)];
        assert!(
            allowed.contains(&found_now),
            "fuse {fuse}: {found_now:?}\n{allowed:#?}"
        );
        let force = found.force().map(|force| force.state);
        let store = Store::open(Some(&path));
        for state in force
            .into_iter()
            .chain(found.trial().map(|t| t.force.state))
        {
            let kept = store.texts(state).unwrap();
            assert_eq!(Content::of(&kept), found.states()[&state].content);
        }
        // An image to begin with is that of what is in force.
        if let Some(image) = image {
            assert_eq!(Some(image.state), force);
            let texts = store.texts(image.state).unwrap();
            assert_eq!(image, saved(&texts, image.state));
        }
        if at.is_none() {
            break;
        }
        crashes += 1;
    }
    assert!(crashes > 50, "{crashes} points");
}

#[tokio::test]
async fn what_is_changed_is_there_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/state");
    let store = Store::open(Some(&path));
    for port in 1..=2 {
        store.keep(&texts(port), |journal| ((), take(journal, &texts(port))));
    }
    let image = saved(&texts(2), 2);
    store.save_image(&image.image, &image.environment);
    assert_eq!(store.persist().await, None);
    let before = store.history();
    drop(store);
    let store = Store::open(Some(&path));
    assert_eq!(rounded(&store.history()), rounded(&before));
    assert_eq!((before.in_force, before.before), (Some(2), Some(1)));
    assert_eq!(store.saved_image().as_deref(), Some(&image));
    assert_eq!(store.texts(1).unwrap(), texts(1));
    assert_eq!(store.read(|journal| journal.generation), 7);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    assert_eq!(mode(&path.join("journal")), 0o600);
}

/// One byte anywhere, the end cut off, another format, a stranger's file: set aside and said.
#[test]
fn what_is_damaged_is_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let (journal, texts, image) = acts().swap_remove(0);
    let write_again = || {
        write(
            &Disk::open(&path).unwrap(),
            &journal,
            &texts,
            image.as_ref(),
        )
        .unwrap()
    };
    write_again();
    for name in ["journal", "image", "state-1"] {
        let file = path.join(name);
        let good = fs::read(&file).unwrap();
        let damage = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            bytes
        };
        let stranger = b"#!/bin/sh\n".to_vec();
        let last = good.len() - 1;
        for bad in [
            damage(0),
            damage(9),
            damage(13),
            damage(21),
            damage(last),
            good[..last].to_vec(),
            Vec::new(),
            stranger,
        ] {
            fs::write(&file, &bad).unwrap();
            let store = Store::open(Some(&path));
            assert_eq!(store.problems().len(), 1, "{name}: {:?}", store.problems());
            assert!(store.saved_image().is_none(), "{name}");
            assert_eq!(
                fs::read(path.join(format!("{name}.set-aside"))).unwrap(),
                bad
            );
            // It works as ever.
            store.change(|journal| journal.refuse(note(ChangeKind::Apply)));
            drop(store);
            write_again();
        }
        let store = Store::open(Some(&path));
        assert!(store.saved_image().is_some() && store.problems().is_empty());
    }
}

#[test]
fn a_directory_of_others_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o770)).unwrap();
    let store = Store::open(Some(&path));
    assert!(
        store.problems()[0].contains("chmod go-w"),
        "{:?}",
        store.problems()
    );
    // Readable for others, as systemd makes it, is closed.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let store = Store::open(Some(&path));
    assert!(store.problems().is_empty());
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    // A second daemon.
    let second = Store::open(Some(&path));
    assert!(
        second.problems()[0].contains("another daemon's"),
        "{:?}",
        second.problems()
    );
    drop(store);
}

#[tokio::test]
async fn a_disk_that_fails_is_a_problem_until_it_works() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let store = Store::open(Some(&path));
    // Nothing can be renamed over a directory that is not empty.
    fs::create_dir_all(path.join("journal/x")).unwrap();
    store.keep(&texts(1), |journal| ((), take(journal, &texts(1))));
    let said = store.persist().await.unwrap();
    assert!(said.contains("changes cannot be kept in"), "{said}");
    assert_eq!(store.problems().len(), 1);
    assert_eq!(store.texts(1).unwrap(), texts(1));
    fs::remove_dir_all(path.join("journal")).unwrap();
    store.change(|journal| journal.refuse(note(ChangeKind::Apply)));
    assert_eq!(store.persist().await, None);
    assert!(store.problems().is_empty());
    drop(store);
    assert_eq!(Store::open(Some(&path)).history().changes.len(), 2);
}

#[test]
fn history_and_states_are_bounded_but_not_what_may_judge() {
    let mut journal = Journal::default();
    let first = take(&mut journal, &texts(1)).unwrap();
    let on_trial = texts(2);
    let material = Material::Texts(&on_trial);
    journal.begin(
        note(ChangeKind::Apply),
        OriginKind::Applied,
        material,
        None,
        Time::now(),
    );
    let trial = journal.trial().unwrap().force.state;
    for _ in 0..600 {
        journal.refuse(note(ChangeKind::Reload));
    }
    assert_eq!((journal.changes().len(), journal.dropped()), (500, 102));
    assert_eq!(journal.force().unwrap().state, first);
    journal.confirm(None);
    for port in 10..40 {
        take(&mut journal, &texts(port));
        assert!(journal.states().len() <= 20);
    }
    assert!(!journal.states().contains_key(&trial) && journal.before().is_some());
    let long = Note {
        error: Some("é".repeat(100_000)),
        ..note(ChangeKind::Apply)
    };
    for _ in 0..300 {
        journal.refuse(long.clone());
    }
    let bytes = serde_json::to_vec(&journal.changes()).unwrap().len();
    assert!(bytes < 600 << 10, "{bytes}");
    let number = journal.changes().last().unwrap().number;
    assert_eq!(
        number as usize,
        journal.changes().len() + journal.dropped() as usize
    );
}

#[test]
fn one_without_texts_is_no_state() {
    let mut journal = Journal::default();
    take(&mut journal, &texts(1));
    take(&mut journal, &texts(2));
    journal.retain(|state| state == 1);
    assert!(journal.force().is_none() && journal.before().is_none());
    assert_eq!(journal.state_of(2), None);
    assert_eq!(journal.state_of(1), Some(1));
    let outcomes: Vec<_> = journal
        .changes()
        .iter()
        .map(|c| (c.outcome, c.kept))
        .collect();
    let in_force = ChangeOutcome::InForce;
    assert_eq!(outcomes, [(in_force, true), (in_force, false)]);
}

#[test]
fn the_same_texts_are_the_same_state() {
    let mut journal = Journal::default();
    assert_eq!(take(&mut journal, &texts(1)), Some(1));
    assert_eq!(take(&mut journal, &texts(1)), None);
    assert_eq!(journal.force().unwrap().state, 1);
    assert_eq!(take(&mut journal, &texts(2)), Some(3));
    let saved = Arc::new(saved(&texts(2), 3));
    assert_eq!(format::read_image(&format::image(&saved)).unwrap(), *saved);
}
