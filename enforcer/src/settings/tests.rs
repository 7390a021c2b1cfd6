use enforcer_common::image::essential;

use super::*;
use crate::policy::{
    Diagnostic, SourceFile,
    diag::render_all,
    model::Transport::{Tcp, Udp},
};

fn read(text: &str) -> Result<(Settings, Vec<Diagnostic>), String> {
    let file = SourceFile {
        name: "enforcer.yaml".to_owned(),
        text: text.to_owned(),
    };
    parse(&file).map_err(|found| {
        assert!(!found.is_empty());
        render_all(&found, &[file], false)
    })
}

fn fine(text: &str) -> Settings {
    let (settings, warnings) = read(text).unwrap();
    assert!(warnings.is_empty(), "{warnings:?}");
    settings
}

fn codes(text: &str) -> Vec<&'static str> {
    let file = SourceFile {
        name: "enforcer.yaml".to_owned(),
        text: text.to_owned(),
    };
    match parse(&file) {
        Ok((_, warnings)) => warnings.iter().map(|d| d.code).collect(),
        Err(errors) => errors.iter().map(|d| d.code).collect(),
    }
}

#[test]
fn a_whole_file() {
    let settings = fine(
        "\
version: 1
essentials: { off: [lldp, stp] }
ethertypes: [0x88b5, mpls, pppoe, llc, 35003]
failsafe:
  - { name: admin-ssh, sources: [10.0.0.0/24, \"fd00::/64\"], ports: [tcp/22, udp/161], interfaces: [eth0] }
  - { name: nodes, sources: [10.1.0.0/16], ports: [https, tcp/6443-6445] }
",
    );
    assert_eq!(
        settings.essentials,
        essential::ALL & !(essential::LLDP | essential::STP)
    );
    assert_eq!(essentials_off(settings.essentials), ["lldp", "stp"]);
    assert_eq!(
        settings.ethertypes,
        [1, 0x8847, 0x8848, 0x8863, 0x8864, 0x88b5, 0x88bb]
    );
    let [ssh, nodes] = &settings.failsafes[..] else {
        panic!("two");
    };
    assert_eq!(ssh.name, "admin-ssh");
    assert_eq!(ssh.passes.ports, [(Tcp, 22, 22), (Udp, 161, 161)]);
    assert_eq!(ssh.passes.sources.len(), 2);
    assert_eq!(ssh.passes.interfaces[0].as_str(), "eth0");
    assert_eq!(nodes.ports()[1..], ["tcp/6443-6445"]);
    assert!(settings.names_interfaces());
    let options = settings.options();
    assert_eq!(options.failsafes[0], ssh.passes);
    assert_eq!(
        (options.essentials, options.ethertypes),
        (settings.essentials, settings.ethertypes)
    );
}

#[test]
fn nothing_but_the_version_is_the_default() {
    assert_eq!(fine("version: 1\n"), Settings::default());
    assert!(!Settings::default().names_interfaces());
    assert_eq!(Settings::default().options(), Options::default());
}

#[test]
fn every_essential_can_be_switched_off() {
    let all = ESSENTIALS.map(|(name, _)| name).join(", ");
    let settings = fine(&format!("version: 1\nessentials: {{off: [{all}]}}\n"));
    assert_eq!(settings.essentials, 0);
    let bits: u32 = ESSENTIALS.iter().map(|(_, bit)| bit).sum();
    assert_eq!(bits, essential::ALL);
}

#[test]
fn names_of_ethertypes() {
    assert!(ETHERTYPES.windows(2).all(|w| w[0].0 < w[1].0));
    assert_eq!(ethertype_name(1), "llc");
    assert_eq!(ethertype_name(0x8848), "mpls (0x8848)");
    assert_eq!(ethertype_name(0x88b5), "0x88b5");
    for (name, numbers) in ETHERTYPES {
        let settings = fine(&format!("version: 1\nethertypes: [{name}]\n"));
        assert_eq!(settings.ethertypes, numbers);
    }
}

#[test]
fn what_may_not_be_listed() {
    let of = |item: &str| codes(&format!("version: 1\nethertypes: [{item}]\n"));
    for (item, code) in [
        ("0x0800", "E0503"),
        ("0x86dd", "E0503"),
        ("0x8100", "E0503"),
        ("0x88a8", "E0503"),
        ("34984", "E0503"),
        ("0x05ff", "E0503"),
        ("1", "E0503"),
        ("0x10000", "E0502"),
        ("65536", "E0502"),
        ("88b5", "E0502"),
        ("0x", "E0502"),
        ("-1", "E0502"),
        ("arp", "E0502"),
        ("mlps", "E0502"),
        ("true", "E0104"),
        ("0x0806", "W0502"),
        ("mpls, 0x8847", "W0503"),
    ] {
        assert_eq!(of(item), [code], "{item}");
    }
    let many = |n: u32| {
        let list: Vec<String> = (0..n).map(|i| (0x9500 + i).to_string()).collect();
        of(&list.join(", "))
    };
    assert!(many(16).is_empty());
    assert_eq!(many(17), ["E0504"]);
    assert_eq!(many(40), ["E0504"]);
}

#[test]
fn failsafes_that_are_none() {
    let of = |body: &str| codes(&format!("version: 1\nfailsafe: [{{{body}}}]\n"));
    let rest = "name: a, sources: [10.0.0.0/8]";
    for (body, code) in [
        ("sources: [10.0.0.0/8], ports: [tcp/1]", "E0103"),
        ("name: a, ports: [tcp/1]", "E0103"),
        ("name: a, sources: [10.0.0.0/8]", "E0103"),
        ("name: a, sources: [], ports: [tcp/1]", "E0105"),
        ("name: A, sources: [10.0.0.0/8], ports: [tcp/1]", "E0111"),
        ("name: a, sources: [10.0.0.1], ports: [tcp/1]", "E0201"),
        ("name: a, sources: [10.0.0.1/8], ports: [tcp/1]", "E0202"),
        ("name: a, sources: [0.0.0.0/0], ports: [tcp/1]", "W0501"),
        ("name: a, sources: [\"::/0\"], ports: [tcp/1]", "W0501"),
        (&format!("{rest}, ports: [any]"), "E0505"),
        (&format!("{rest}, ports: [ping]"), "E0505"),
        (&format!("{rest}, ports: [sctp/1]"), "E0505"),
        (&format!("{rest}, ports: [22]"), "E0108"),
        (&format!("{rest}, ports: [tcp/70000]"), "E0301"),
        (
            &format!("{rest}, ports: [tcp/1], interfaces: [a/b]"),
            "E0506",
        ),
        (&format!("{rest}, ports: [tcp/1], interfaces: []"), "E0105"),
        (&format!("{rest}, ports: [tcp/1], interface: [x]"), "E0101"),
    ] {
        assert_eq!(of(body), [code], "{body}");
    }
    let many = |n: u32| {
        let one = |i| format!("{{name: n{i}, sources: [10.0.0.0/8], ports: [tcp/1]}}");
        let list: Vec<String> = (0..n).map(one).collect();
        codes(&format!("version: 1\nfailsafe: [{}]\n", list.join(", ")))
    };
    assert!(many(16).is_empty());
    assert_eq!(many(17), ["E0504"]);
}

#[test]
fn random_text_never_panics() {
    use proptest::prelude::*;
    proptest!(ProptestConfig::with_cases(400), |(text in "[a-z0-9:{}\\[\\],\"\n -]{0,80}")| {
        let _ = read(&format!("version: 1\n{text}"));
    });
}

#[test]
fn groups_of_the_control_sockets() {
    assert_eq!(fine("version: 1\n").access, Access::default());
    let settings = fine("version: 1\ncontrol: { change: netops, view: 4711 }\n");
    assert_eq!(settings.access.change, "netops");
    assert_eq!(settings.access.view, "4711");
    let settings = fine("version: 1\ncontrol: { view: \"Domain.Users\" }\n");
    assert_eq!(settings.access.change, "enforcer");
    for bad in ["\"\"", "a:b", ".x", "[a]", "-1"] {
        let text = format!("version: 1\ncontrol: {{ change: {bad} }}\n");
        assert!(read(&text).is_err(), "{bad}");
    }
}
