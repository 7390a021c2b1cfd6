//! Cases that change something between rounds of probes, and what every network plugin is tried on.

use super::{
    cases::{Case, Step, TCP, UDP, base, base_with, case, dns, named, port, rule, selecting, step},
    model::{Action, NetworkPolicy, Operator, Peer, Protocol, Rule, Selector},
};

pub fn action() -> Vec<Case> {
    let start = || step(vec![Action::Create(base())]);
    let labelled = |peer: Peer| {
        let policy = base_with("ingress", |rule| rule.peers = vec![peer]);
        step(vec![Action::Create(policy)])
    };
    let then = |action: Action| step(vec![action]);
    let udp = base_with("ingress", |rule| {
        rule.ports = vec![named(UDP, "serve-81-udp")];
    });
    let new_label = Peer::Pods {
        pods: Some(Selector::of("new-label=abc")),
        namespaces: Some(Selector::expression("ns", Operator::In, &["y", "z"])),
    };
    let delete = Action::Delete {
        namespace: "x",
        name: "base",
    };
    let cases = vec![
        ("a policy goes", vec![start(), then(delete)]),
        ("a policy changes", vec![start(), then(Action::Update(udp))]),
        (
            "a namespace comes and goes",
            vec![
                start(),
                step(vec![
                    Action::CreateNamespace("y-2", "ns=y"),
                    Action::CreatePod("y-2", "a", "pod=a"),
                    Action::CreatePod("y-2", "b", "pod=b"),
                ]),
                then(Action::DeleteNamespace("y-2")),
            ],
        ),
        (
            "a namespace's labels change, and back",
            vec![
                labelled(selecting(None, Some("new-ns=qrs"))),
                then(Action::LabelNamespace("y", "ns=y,new-ns=qrs")),
                then(Action::LabelNamespace("y", "ns=y")),
            ],
        ),
        (
            "a pod comes and goes",
            vec![
                start(),
                then(Action::CreatePod("x", "d", "pod=d")),
                then(Action::DeletePod("x", "d")),
            ],
        ),
        (
            "a pod's labels change, and back",
            vec![
                labelled(new_label),
                then(Action::LabelPod("y", "b", "pod=b,new-label=abc")),
                then(Action::LabelPod("y", "b", "pod=b")),
            ],
        ),
    ];
    cases
        .into_iter()
        .map(|(name, steps)| case("action", name, steps))
        .collect()
}

/// Ingress to these pods of x.
fn ingress(name: &'static str, pods: &str, rules: Vec<Rule>) -> NetworkPolicy {
    NetworkPolicy {
        namespace: "x",
        name,
        pods: Selector::of(pods),
        ingress: Some(rules),
        egress: None,
    }
}

pub fn example() -> Vec<Case> {
    let by_name = vec![rule(&[named(None, "serve-81-tcp")], &[])];
    let steps = vec![
        step(vec![Action::Create(ingress("allow", "", by_name))]),
        step(vec![
            Action::CreateNamespace("w", "ns=w"),
            Action::CreatePod("w", "a", "pod=a"),
        ]),
        step(vec![Action::DeletePod("w", "a")]),
        step(vec![Action::DeleteNamespace("w")]),
        step(vec![]),
        one_port(vec![]),
        one_port(vec![]),
    ];
    vec![case("example", "a named port, and pods around it", steps)]
}

/// A round on TCP 81 alone.
fn one_port(actions: Vec<Action>) -> Step {
    Step {
        actions,
        probes: vec![(Protocol::Tcp, 81)],
    }
}

/// What Kubernetes tests of every network plugin.
pub fn scenario() -> Vec<Case> {
    let create = |policy| step(vec![Action::Create(policy)]);
    let again = || step(vec![]);
    let from = |peer: Peer| vec![rule(&[], &[peer])];
    let from_y = |number| vec![rule(&[port(TCP, number)], &[selecting(None, Some("ns=y"))])];
    let all = || vec![Rule::default()];
    let both = |name, ingress, egress| NetworkPolicy {
        namespace: "x",
        name,
        pods: Selector::everything(),
        ingress: Some(ingress),
        egress: Some(egress),
    };
    let by_name = vec![rule(&[named(None, "serve-81-tcp")], &[])];
    let elsewhere = Peer::Pods {
        pods: Some(Selector::expression("pod", Operator::In, &["b", "c"])),
        namespaces: Some(Selector::expression("ns", Operator::NotIn, &["x"])),
    };
    let from_b = NetworkPolicy {
        pods: Selector::of("pod=a"),
        ..both(
            "from-b",
            from(selecting(Some("pod=b"), None)),
            vec![rule(&[port(None, 80), port(UDP, 53)], &[])],
        )
    };
    let to_y_a = NetworkPolicy {
        ingress: None,
        pods: Selector::of("pod=a"),
        ..both(
            "to-y-a",
            vec![],
            vec![rule(&[], &[selecting(Some("pod=a"), Some("ns=y"))]), dns()],
        )
    };
    let from_x_a = |name, pods| NetworkPolicy {
        namespace: "y",
        ..ingress(name, pods, from(selecting(Some("pod=a"), Some("ns=x"))))
    };
    let gone = Action::Delete {
        namespace: "x",
        name: "deny",
    };
    let cases = vec![
        (
            "deny all ingress",
            vec![create(ingress("deny", "", vec![]))],
        ),
        (
            "deny all but DNS",
            vec![create(both("deny", vec![], vec![dns()]))],
        ),
        (
            "pods and namespaces by expression",
            vec![create(ingress("some", "pod=a", from(elsewhere)))],
        ),
        (
            "policies add up",
            vec![
                create(ingress("81", "pod=a", from_y(81))),
                again(),
                create(ingress("80", "pod=a", from_y(80))),
            ],
        ),
        (
            "allow all",
            vec![create(ingress("all", "", all())), again()],
        ),
        (
            "a named port",
            vec![
                one_port(vec![Action::Create(ingress("name", "", by_name))]),
                again(),
            ],
        ),
        (
            "allow all becomes deny all",
            vec![
                create(ingress("one", "", all())),
                step(vec![Action::Update(ingress("one", "", vec![]))]),
            ],
        ),
        (
            "a namespace gets the label",
            vec![
                create(ingress(
                    "label",
                    "pod=a",
                    from(selecting(None, Some("ns2=updated"))),
                )),
                step(vec![Action::LabelNamespace("y", "ns=y,ns2=updated")]),
            ],
        ),
        (
            "a pod gets the label",
            vec![
                create(ingress(
                    "label",
                    "pod=a",
                    from(selecting(Some("pod=b,pod2=updated"), None)),
                )),
                step(vec![Action::LabelPod("x", "b", "pod=b,pod2=updated")]),
            ],
        ),
        (
            "a pod becomes isolated",
            vec![
                create(ingress("isolated", "target=isolated", vec![])),
                step(vec![Action::LabelPod("x", "a", "target=isolated")]),
            ],
        ),
        ("ingress and egress in one", vec![create(from_b), again()]),
        (
            "the client's side denies what the server's allows",
            vec![step(vec![
                Action::Create(to_y_a),
                Action::Create(from_x_a("from-x-a-to-a", "pod=a")),
                Action::Create(from_x_a("from-x-a-to-b", "pod=b")),
            ])],
        ),
        (
            "deny all goes",
            vec![create(both("deny", vec![], vec![])), step(vec![gone])],
        ),
    ];
    cases
        .into_iter()
        .map(|(name, steps)| case("scenario", name, steps))
        .collect()
}
