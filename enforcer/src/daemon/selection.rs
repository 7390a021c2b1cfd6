//! Which interfaces are asked for: what `--interface` and `--exempt` say. Pure.

use std::{collections::BTreeSet, fmt, str::FromStr};

use crate::policy::{diag::shown, parse::names::closest, pattern::Pattern};

use super::environment::{Host, Link};

/// The word for whatever holds the default route.
const DEFAULT_ROUTE: &str = "default-route";
const KIND: &str = "kind:";
/// What rtnetlink calls hardware: nothing.
const PHYSICAL: &str = "physical";

/// Kinds that can be asked for, as `ip -details link` shows them. Not `vrf`: its packets are judged
/// on its members.
pub const KINDS: [&str; 39] = [
    "amt",
    "bareudp",
    "batadv",
    "bond",
    "bridge",
    "can",
    "dummy",
    "erspan",
    "geneve",
    "gre",
    "gretap",
    "gtp",
    "hsr",
    "ifb",
    "ip6erspan",
    "ip6gre",
    "ip6gretap",
    "ip6tnl",
    "ipip",
    "ipoib",
    "ipvlan",
    "ipvtap",
    "macsec",
    "macvlan",
    "macvtap",
    "netdevsim",
    "netkit",
    "openvswitch",
    "ovpn",
    PHYSICAL,
    "ppp",
    "sit",
    "team",
    "tun",
    "veth",
    "vlan",
    "vxlan",
    "wireguard",
    "xfrm",
];

/// One word of `--interface`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// By name, perhaps with globs.
    Name(Pattern),
    /// Whatever holds an IPv4 or IPv6 default route.
    DefaultRoute,
    /// By what the kernel says it is, or `physical`.
    Kind(String),
}

impl Selector {
    /// The name, if it can mean one interface only.
    pub fn literal(&self) -> Option<&str> {
        match self {
            Self::Name(pattern) if pattern.is_literal() => Some(pattern.as_str()),
            Self::Name(_) | Self::DefaultRoute | Self::Kind(_) => None,
        }
    }

    /// Whether `link` is meant. A loopback or a VRF, and a link that carries no IP, only by its
    /// name: nobody wants `*` to cut a host off from itself.
    fn means(&self, host: &Host, link: &Link) -> bool {
        let usual = !link.is_local() && link.carries_ip();
        match self {
            Self::Name(pattern) => pattern.matches(&link.name) && (pattern.is_literal() || usual),
            Self::DefaultRoute => usual && host.default_routes.contains(&link.ifindex),
            Self::Kind(kind) => usual && kind == kind_of(link),
        }
    }
}

/// As [`Selector::Kind`] has it.
fn kind_of(link: &Link) -> &str {
    match link.device.as_str() {
        "" => PHYSICAL,
        device => device,
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(pattern) => f.write_str(pattern.as_str()),
            Self::DefaultRoute => f.write_str(DEFAULT_ROUTE),
            Self::Kind(kind) => write!(f, "{KIND}{kind}"),
        }
    }
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == DEFAULT_ROUTE {
            return Ok(Self::DefaultRoute);
        }
        if let Some(kind) = text.strip_prefix(KIND) {
            return match KINDS.contains(&kind) {
                true => Ok(Self::Kind(kind.to_owned())),
                false => Err(unknown_kind(kind)),
            };
        }
        let pattern = text.parse::<Pattern>().map_err(|error| {
            let (word, _) = text.split_once(':').unwrap_or_default();
            let kind = closest(word, ["kind"]).is_some();
            match closest(text, [DEFAULT_ROUTE]) {
                Some(near) => format!("{error}; did you mean `{near}`?"),
                None if kind => format!("{error}; kinds are written `kind:veth`"),
                None => error,
            }
        })?;
        // A name that nobody gives to an interface, and likely a slip.
        match closest(text, [DEFAULT_ROUTE]) {
            Some(near) => Err(format!("did you mean `{near}`?")),
            None => Ok(Self::Name(pattern)),
        }
    }
}

fn unknown_kind(kind: &str) -> String {
    let shown = shown(kind);
    match closest(kind, KINDS) {
        Some(near) => {
            format!("no kind of interface is called {shown}; did you mean `{KIND}{near}`?")
        }
        None => format!(
            "no kind of interface is called {shown}; there are {}",
            KINDS.join(", ")
        ),
    }
}

/// A word of `--exempt`.
///
/// # Errors
/// As for [`Selector`]; and an exemption does not follow a route, which whoever can set one could
/// move.
pub fn exemption(text: &str) -> Result<Selector, String> {
    match text.parse()? {
        Selector::DefaultRoute => {
            Err("an exemption does not follow the default route: name the interface".to_owned())
        }
        selector @ (Selector::Name(_) | Selector::Kind(_)) => Ok(selector),
    }
}

/// What is asked for and what is exempt.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// `--interface`
    pub wanted: Vec<Selector>,
    /// `--exempt`, which goes before.
    pub exempt: Vec<Selector>,
}

/// What is to become of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// It is to be enforced, because of this.
    Enforce(String),
    /// Somebody exempted it, with this.
    Exempt(String),
    /// Nobody speaks of it.
    Open,
}

impl Selection {
    /// What is to become of `link`. `held` are interfaces that held a default route once: they stay
    /// enforced, since flows may still go through them, and a route is not what ends enforcement.
    pub fn judge(&self, host: &Host, link: &Link, held: &BTreeSet<u32>) -> Judgement {
        let means = |selector: &&Selector| selector.means(host, link);
        if let Some(exempt) = self.exempt.iter().find(means) {
            return Judgement::Exempt(format!("--exempt {exempt}"));
        }
        if let Some(wanted) = self.wanted.iter().find(means) {
            return Judgement::Enforce(wanted.to_string());
        }
        if held.contains(&link.ifindex) {
            return Judgement::Enforce(format!(
                "{DEFAULT_ROUTE}, which it held before; it stays enforced until the daemon starts anew"
            ));
        }
        Judgement::Open
    }

    /// Whether default routes must be known.
    pub fn follows_default_route(&self) -> bool {
        self.wanted.contains(&Selector::DefaultRoute)
    }

    /// Names that are asked for as such.
    pub fn literals(&self) -> impl Iterator<Item = &str> {
        self.wanted.iter().filter_map(Selector::literal)
    }

    /// A name that is asked for and exempt at once.
    pub fn contradiction(&self) -> Option<(&str, &Selector)> {
        self.literals().find_map(|name| {
            let exempt = |selector: &&Selector| match selector {
                Selector::Name(pattern) => pattern.matches(name),
                Selector::DefaultRoute | Selector::Kind(_) => false,
            };
            Some((name, self.exempt.iter().find(exempt)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(ifindex: u32, name: &str, device: &str) -> Link {
        Link {
            ifindex,
            name: name.to_owned(),
            kind: if name == "can0" { 280 } else { 1 },
            up: true,
            loopback: name == "lo",
            device: device.to_owned(),
            master: None,
            vlan: None,
        }
    }

    fn host() -> Host {
        Host {
            links: vec![
                link(1, "lo", ""),
                link(2, "eth0", ""),
                link(3, "veth7", "veth"),
                link(4, "br0", "bridge"),
                link(5, "red", "vrf"),
                link(6, "can0", ""),
                link(7, "eth1", ""),
            ],
            default_routes: [1, 7].into(),
            ..Host::default()
        }
    }

    fn selection(wanted: &[&str], exempt: &[&str]) -> Selection {
        Selection {
            wanted: wanted.iter().map(|w| w.parse().unwrap()).collect(),
            exempt: exempt.iter().map(|e| exemption(e).unwrap()).collect(),
        }
    }

    fn enforced(wanted: &[&str], exempt: &[&str], held: &[u32]) -> Vec<u32> {
        let (host, held) = (host(), held.iter().copied().collect());
        let selection = selection(wanted, exempt);
        let links = host
            .links
            .iter()
            .filter(|link| matches!(selection.judge(&host, link, &held), Judgement::Enforce(_)));
        links.map(|link| link.ifindex).collect()
    }

    #[test]
    fn names_globs_kinds_and_the_default_route() {
        for (wanted, expected) in [
            (&["eth0"][..], &[2][..]),
            (&["eth*"], &[2, 7]),
            // Neither the loopback, nor a VRF, nor what carries no IP.
            (&["*"], &[2, 3, 4, 7]),
            (&["lo", "can0"], &[1, 6]),
            (&["kind:physical"], &[2, 7]),
            (&["kind:veth", "kind:bridge"], &[3, 4]),
            // A route of the loopback is none.
            (&["default-route"], &[7]),
            (&["kind:wireguard"], &[]),
        ] {
            assert_eq!(enforced(wanted, &[], &[]), expected, "{wanted:?}");
        }
    }

    #[test]
    fn an_exemption_goes_before_and_a_default_route_that_moved_stays() {
        assert_eq!(enforced(&["*"], &["br*"], &[]), [2, 3, 7]);
        assert_eq!(enforced(&["*"], &["kind:physical"], &[]), [3, 4]);
        assert_eq!(enforced(&["default-route"], &[], &[2]), [2, 7]);
        assert_eq!(enforced(&["default-route"], &["eth0"], &[2]), [7]);
        let (host, selection) = (host(), selection(&["eth*"], &["eth1", "kind:vlan"]));
        let judged = |at: usize| selection.judge(&host, &host.links[at], &BTreeSet::from([3]));
        assert_eq!(judged(1), Judgement::Enforce("eth*".to_owned()));
        assert_eq!(judged(6), Judgement::Exempt("--exempt eth1".to_owned()));
        assert!(matches!(judged(2), Judgement::Enforce(why) if why.contains("before")));
        assert_eq!(judged(3), Judgement::Open);
    }

    #[test]
    fn slips_are_told_with_what_was_meant() {
        let error = |text: &str| text.parse::<Selector>().unwrap_err();
        assert!(error("kind:vteh").contains("did you mean `kind:veth`?"));
        assert!(error("kind:wiregard").contains("`kind:wireguard`"));
        assert!(error("kind:quux").contains("there are amt, "));
        assert!(error("kind:").contains("no kind"));
        assert!(error("default_route").contains("did you mean `default-route`?"));
        assert!(error("defaultroute").contains("`default-route`"));
        assert!(error("default-rotue").contains("`default-route`"));
        assert!(error("knd:veth").contains("`kind:veth`"));
        assert!(error("eth0:1").contains("eth0:1"));
        assert!(error("").contains("cannot be the name"));
        for good in [
            "eth0",
            "default",
            "kind",
            "veth*",
            "kind:physical",
            "default-route",
        ] {
            assert_eq!(good.parse::<Selector>().unwrap().to_string(), good);
        }
        assert!(
            exemption("default-route")
                .unwrap_err()
                .contains("name the interface")
        );
        assert!(KINDS.is_sorted());
    }

    #[test]
    fn a_name_cannot_be_asked_for_and_exempt() {
        let both = selection(&["eth*", "eth0"], &["veth*", "eth?"]);
        let (name, exempt) = both.contradiction().unwrap();
        assert_eq!((name, exempt.to_string().as_str()), ("eth0", "eth?"));
        assert!(selection(&["eth*"], &["eth0"]).contradiction().is_none());
    }
}
