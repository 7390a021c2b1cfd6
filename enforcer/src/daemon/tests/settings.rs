//! Settings beside the policy: read with it, refused with it.

use super::*;
use crate::{api::types::FailsafeStatus, daemon::files::SettingsPath};

const SETTINGS: &str = "\
version: 1
essentials: {off: [lldp, stp]}
ethertypes: [0x88b5, mpls]
failsafe:
  - {name: admin-ssh, sources: [10.0.0.0/24, \"fd00::/64\"], ports: [ssh, udp/161], interfaces: [\"eth*\"]}
";

async fn start(required: bool, text: Option<&str>) -> (Daemon, PathBuf) {
    let mut path = PathBuf::new();
    let daemon = Daemon::start_with(POLICY, |mut config| {
        path = config.segments.parent().unwrap().join("enforcer.yaml");
        if let Some(text) = text {
            fs::write(&path, text).unwrap();
        }
        config.settings = Some(SettingsPath {
            path: path.clone(),
            required,
        });
        config
    })
    .await;
    (daemon, path)
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_are_in_the_status_and_a_broken_file_changes_nothing() {
    let (daemon, path) = start(true, Some(SETTINGS)).await;
    let settings = daemon.status().await.settings;
    assert_eq!(settings.path.as_deref(), path.to_str());
    assert_eq!(settings.essentials_off, ["lldp", "stp"]);
    assert_eq!(
        settings.ethertypes,
        ["mpls (0x8847)", "mpls (0x8848)", "0x88b5"]
    );
    let expected = FailsafeStatus {
        name: "admin-ssh".to_owned(),
        sources: vec!["10.0.0.0/24".to_owned(), "fd00::/64".to_owned()],
        ports: vec!["tcp/22".to_owned(), "udp/161".to_owned()],
        interfaces: vec!["eth*".to_owned()],
    };
    assert_eq!(settings.failsafes, [expected]);

    fs::write(&path, SETTINGS.replace("stp]", "slow]")).unwrap();
    daemon
        .until("the new settings", async || {
            daemon.status().await.settings.essentials_off == ["lldp", "slow"]
        })
        .await;
    let good = daemon.status().await;
    assert_eq!((good.generation, good.state), (2, State::Enforcing));

    fs::write(&path, SETTINGS.replace("stp]", "slwo]")).unwrap();
    daemon
        .until("the error", async || {
            daemon.status().await.policy.last_error.is_some()
        })
        .await;
    let broken = daemon.status().await;
    assert_eq!(broken.state, State::Degraded);
    assert_eq!(
        (broken.generation, &broken.settings),
        (2, &good.settings),
        "{broken:?}"
    );
    let error = broken.policy.last_error.unwrap();
    let place = format!("{}:2: `slwo`", path.display());
    assert!(error.starts_with(&place), "{error}");
    // A good policy does not come without its settings.
    fs::write(daemon.file(), POLICY.replace("tcp/5432", "tcp/5433")).unwrap();
    let refused = daemon.client.reload().await.unwrap_err().to_string();
    assert!(refused.contains("did you mean `slow`?"), "{refused}");
    assert_eq!(daemon.status().await.generation, 2);

    // Without the file that somebody named nobody knows what they wanted.
    fs::remove_file(&path).unwrap();
    let refused = daemon.client.reload().await.unwrap_err().to_string();
    assert!(refused.contains("No such file"), "{refused}");
    assert_eq!(daemon.status().await.settings, good.settings);
    fs::write(&path, SETTINGS).unwrap();
    daemon.hangup.send(()).await.unwrap();
    daemon
        .until("all well", async || {
            let status = daemon.status().await;
            status.state == State::Enforcing && status.generation == 3
        })
        .await;
    assert_eq!(daemon.status().await.settings, settings);
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_default_file_may_come_and_go() {
    let (daemon, path) = start(false, None).await;
    let none = daemon.status().await.settings;
    assert_eq!((&none.path, none.failsafes.len()), (&None, 0));
    fs::write(&path, SETTINGS).unwrap();
    daemon
        .until("the settings", async || {
            daemon.status().await.settings.failsafes.len() == 1
        })
        .await;
    fs::remove_file(&path).unwrap();
    daemon
        .until("the defaults", async || {
            daemon.status().await.settings == none
        })
        .await;
    assert_eq!(daemon.status().await.state, State::Enforcing);
    daemon.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_settings_do_not_start() {
    let dir = policy_dir(POLICY);
    let path = dir.path().join("enforcer.yaml");
    fs::write(&path, "version: 1\nfailsafes: []\n").unwrap();
    let fake = Handle::default();
    let settings = Some(SettingsPath {
        path,
        required: false,
    });
    let config = Config {
        settings,
        ..config(dir.path())
    };
    let (_hangup, _stop, task) = spawn(config, &fake);
    let error = task.await.unwrap().unwrap_err().to_string();
    assert!(error.starts_with("the settings were refused: "), "{error}");
    assert!(fake.lock().applied.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kernel_knows_the_time_before_anything_is_attached() {
    let daemon = Daemon::start().await;
    let told = daemon.fake.lock().clock.unwrap();
    let sample = crate::clock::Sample::now().unwrap();
    let difference = i128::from(told.boot_unix_ns) - sample.boot_unix;
    assert!(difference.abs() < 1_000_000_000, "{difference}");
    assert_eq!(told.unix_floor, 0);
    assert!(daemon.status().await.warnings.is_empty());
    daemon.stop().await.unwrap();
}
