//! What `deploy/daemonset.yaml` hands to the container is what the enforcer needs, and no more.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{collections::BTreeSet, fs, path::Path};

fn manifest() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::read_to_string(root.join("../deploy/daemonset.yaml")).unwrap()
}

/// What follows `key`, up to the end of the value.
fn values<'a>(text: &'a str, key: &str) -> BTreeSet<&'a str> {
    let lines = text.lines().map(str::trim);
    lines
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(key))
        .map(|(_, rest)| rest.split([',', '}']).next().unwrap().trim())
        .collect()
}

#[test]
fn the_container_gets_what_it_needs_of_the_node_and_no_token() {
    let text = manifest();
    assert_eq!(
        values(&text, "hostPath: { path:"),
        BTreeSet::from([
            "/run/enforcer",
            "/sys/fs/bpf",
            "/sys/fs/cgroup",
            "/var/lib/enforcer"
        ])
    );
    for mounted in text.lines().filter(|line| line.contains("mountPath:")) {
        let changes = ["/run/enforcer", "/var/lib/enforcer", "/sys/fs/bpf"];
        let mine = changes.iter().any(|path| mounted.contains(path));
        assert!(mine || mounted.contains("readOnly: true"), "{mounted}");
    }
    let kinds = BTreeSet::from(["ConfigMap", "DaemonSet", "Namespace", "ServiceAccount"]);
    assert_eq!(values(&text, "kind: "), kinds, "nothing is granted");
    assert_eq!(
        values(&text, "automountServiceAccountToken:"),
        BTreeSet::from(["false"])
    );
    assert_eq!(
        text.matches("automountServiceAccountToken: false").count(),
        2
    );
    assert!(text.contains("drop: [ALL]\n"));
    assert!(text.contains("add: [BPF, NET_ADMIN, PERFMON]\n"));
    assert!(text.contains("allowPrivilegeEscalation: false\n"));
    assert!(text.contains("readOnlyRootFilesystem: true\n"));
    for given in ["privileged: true", "hostPID: true", "hostIPC: true"] {
        assert!(!text.contains(given), "{given}");
    }
}
