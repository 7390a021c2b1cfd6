//! From a record's numbers to names, file and line, process and wall-clock time.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use enforcer_common::{
    image::EMPTY,
    verdict::{Hook, Outcome, Reason},
    wire::{Event, Process},
};

use super::{
    Generations,
    cgroups::Cgroups,
    detail::{Seen, detail},
};
use crate::{
    api::types::{Default as DenyDefault, Denial, ProcessInfo, Time, Verdict},
    clock::Sample,
    policy::model::{Origin, Policy, Protect, RuleId, SegmentId},
};

/// Addresses whose segments are remembered, per generation: a flood repeats few of them.
const CACHED_ADDRESSES: usize = 16_384;

/// Sorted names of the segments of an address.
pub type Names = Arc<[Arc<str>]>;

/// Wall-clock time beside time since boot. Sampled anew for each batch: the wall clock may step.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Sample);

impl Clock {
    /// Both now.
    ///
    /// # Errors
    /// What `clock_gettime` says.
    pub fn sample() -> std::io::Result<Self> {
        Sample::now().map(Self)
    }

    /// Nanoseconds since boot when it was sampled.
    pub fn boottime(self) -> u64 {
        self.0.boottime
    }

    /// Nanoseconds since boot as wall-clock time.
    pub fn wall(self, boottime: u64) -> Time {
        let nanos = self.0.unix(boottime);
        jiff::Timestamp::from_nanosecond(nanos).map_or_else(|_| Time::now(), Time)
    }
}

/// What stands behind a verdict, in names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Because {
    /// The rule.
    pub rule: Option<Arc<str>>,
    /// The default.
    pub default: Option<DenyDefault>,
    /// File of the rule or the guarding segment.
    pub file: Option<Arc<str>>,
    /// Line in it.
    pub line: Option<u32>,
}

/// Looks up rule and segment of a verdict of `policy`; [`EMPTY`] means none.
pub fn because(policy: &Policy, reason: Reason, rule: u32, segment: u32) -> Because {
    let at = |origin: &Origin| (Some(Arc::clone(&origin.file)), Some(origin.line));
    if let Some(rule) = policy.rule(RuleId(rule)) {
        let (file, line) = at(&rule.origin);
        return Because {
            rule: Some(rule.name.as_str().into()),
            default: None,
            file,
            line,
        };
    }
    if let Some(segment) = policy.segment(SegmentId(segment)) {
        let (file, line) = at(&segment.origin);
        return Because {
            rule: None,
            default: Some(DenyDefault::Segment {
                name: segment.name.as_str().into(),
                protects: protects(segment.protect),
            }),
            file,
            line,
        };
    }
    Because {
        default: (reason == Reason::Unsegmented).then_some(DenyDefault::Unsegmented),
        ..Because::default()
    }
}

/// As written in policies.
pub fn protects(protect: Protect) -> &'static str {
    match protect {
        Protect::Both => "both",
        Protect::Inbound => "inbound",
        Protect::Outbound => "outbound",
    }
}

fn because_gone(generation: u32, rule: u32, segment: u32) -> Because {
    let numbered = |kind, number| format!("{kind} {number} of generation {generation} (gone)");
    if rule != EMPTY {
        let rule = Some(numbered("rule", rule).into());
        return Because {
            rule,
            ..Because::default()
        };
    }
    let text = if segment == EMPTY {
        format!("generation {generation} (gone)")
    } else {
        numbered("segment", segment)
    };
    Because {
        default: Some(DenyDefault::Gone(text)),
        ..Because::default()
    }
}

/// What records leave to be looked up on this host.
pub trait Local: Send + Sync {
    /// The name of an interface.
    fn interface_name(&self, ifindex: u32) -> Option<Arc<str>>;
    /// This host's addresses.
    fn addresses(&self) -> BTreeSet<IpAddr>;
}

/// Turns records into [`Denial`]s.
pub struct Enricher {
    generations: Arc<Generations>,
    local: Arc<dyn Local>,
    cgroups: Cgroups,
    names: HashMap<IpAddr, Names>,
    names_of: Option<Arc<Policy>>,
}

impl Enricher {
    /// Nothing is looked up yet.
    pub fn new(generations: Arc<Generations>, local: Arc<dyn Local>, cgroups: Cgroups) -> Self {
        Self {
            generations,
            local,
            cgroups,
            names: HashMap::new(),
            names_of: None,
        }
    }

    /// The denial of `packets` packets.
    pub fn denial(&mut self, event: &Event, packets: u64, clock: Clock) -> Denial {
        let addresses = addresses(event);
        let policy = self.generations.get(event.generation);
        let why = match &policy {
            Some(policy) => because(policy, event.reason(), event.rule, event.segment),
            None => because_gone(event.generation, event.rule, event.segment),
        };
        let mut names = |ip: Option<IpAddr>| match (&policy, ip) {
            (Some(policy), Some(ip)) if ip.is_unspecified() => self.local_names(policy, ip),
            (Some(policy), Some(ip)) => self.names(policy, ip),
            _ => Names::from([]),
        };
        let from_segments = names(addresses.map(|(source, _)| source));
        let to_segments = names(addresses.map(|(_, destination)| destination));
        let time = clock.wall(event.time);
        let seen = Seen {
            rule: event.rule,
            source: addresses.map(|(source, _)| source),
            unix: time.0.as_second(),
        };
        let own = |ip| self.local.addresses().contains(&ip);
        let detail = policy
            .as_ref()
            .and_then(|policy| detail(policy, event.reason(), &seen, own));
        let transport = matches!(event.protocol, 6 | 17 | 132) && addresses.is_some();
        let port = |port: u16| transport.then_some(port);
        let icmp = matches!(event.protocol, 1 | 58) && addresses.is_some();
        let [icmp_type, icmp_code] = event.selector.to_be_bytes();
        Denial {
            time,
            verdict: match event.outcome() {
                Outcome::Denied => Verdict::Denied,
                // The other two are not recorded.
                Outcome::WouldDeny | Outcome::Allowed | Outcome::Off => Verdict::WouldDeny,
            },
            reason: event.reason().name().to_owned(),
            rule: why.rule,
            default: why.default,
            detail,
            file: why.file,
            line: why.line,
            from_segments,
            to_segments,
            src: addresses.map(|(source, _)| source),
            dst: addresses.map(|(_, destination)| destination),
            src_port: port(event.source_port).filter(|port| *port != 0),
            dst_port: port(event.destination_port),
            protocol: protocol(event),
            tcp_flags: (event.protocol == 6 && event.tcp_flags != 0)
                .then(|| tcp_flags(event.tcp_flags)),
            icmp_type: icmp.then_some(icmp_type),
            icmp_code: icmp.then_some(icmp_code),
            direction: direction(event).to_owned(),
            interface: self.interface(event.ifindex),
            process: self.process(&event.process),
            packets,
            generation: event.generation,
        }
    }

    fn names(&mut self, policy: &Arc<Policy>, ip: IpAddr) -> Names {
        let same = self
            .names_of
            .as_ref()
            .is_some_and(|of| Arc::ptr_eq(of, policy));
        if !same || self.names.len() >= CACHED_ADDRESSES {
            self.names.clear();
            self.names_of = Some(Arc::clone(policy));
        }
        let names = self.names.entry(ip).or_insert_with(|| {
            let segments = policy.segments_of(ip);
            segments
                .into_iter()
                .filter_map(|id| policy.segment(id))
                .map(|segment| segment.name.as_str().into())
                .collect()
        });
        Arc::clone(names)
    }

    /// A socket that is not bound yet may take any address of this host: the names of all of
    /// them. Not cached, since addresses come and go.
    fn local_names(&mut self, policy: &Arc<Policy>, unspecified: IpAddr) -> Names {
        let addresses = self.local.addresses().into_iter();
        let segments: BTreeSet<SegmentId> = addresses
            .filter(|ip| ip.is_ipv4() == unspecified.is_ipv4() && !ip.is_loopback())
            .flat_map(|ip| policy.segments_of(ip))
            .collect();
        segments
            .into_iter()
            .filter_map(|id| policy.segment(id))
            .map(|segment| segment.name.as_str().into())
            .collect()
    }

    fn interface(&self, ifindex: u32) -> Option<Arc<str>> {
        if ifindex == 0 {
            return None;
        }
        let name = self.local.interface_name(ifindex);
        Some(name.unwrap_or_else(|| format!("ifindex {ifindex}").into()))
    }

    fn process(&mut self, process: &Process) -> Option<ProcessInfo> {
        if process.pid == 0 {
            return None;
        }
        let comm = process.comm.split(|b| *b == 0).next().unwrap_or_default();
        Some(ProcessInfo {
            pid: process.pid,
            comm: printable(&String::from_utf8_lossy(comm)),
            uid: process.uid,
            cgroup: printable(&self.cgroups.path(process.cgroup)),
        })
    }
}

/// What a process chose, without what a terminal would obey: JSON leaves DEL and U+0080 to U+009F
/// as they are.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

fn addresses(event: &Event) -> Option<(IpAddr, IpAddr)> {
    let [.., v4_source] = event.source;
    let [.., v4_destination] = event.destination;
    match event.family {
        4 => Some((
            Ipv4Addr::from(v4_source).into(),
            Ipv4Addr::from(v4_destination).into(),
        )),
        6 => Some((v6(event.source).into(), v6(event.destination).into())),
        _ => None,
    }
}

fn v6(words: [u32; 4]) -> Ipv6Addr {
    let bits = words
        .into_iter()
        .fold(0u128, |bits, word| bits << 32 | u128::from(word));
    Ipv6Addr::from(bits)
}

fn direction(event: &Event) -> &'static str {
    match event.hook() {
        Some(Hook::TcIngress) => "ingress",
        Some(Hook::TcEgress) => "egress",
        Some(Hook::Connect) => "connect",
        Some(Hook::Sendmsg) => "sendmsg",
        None => "unknown",
    }
}

fn protocol(event: &Event) -> String {
    if event.family == 0 {
        return match event.ethertype {
            0 => "unread".to_owned(),
            ethertype => format!("ethertype/{ethertype:#06x}"),
        };
    }
    let name = match event.protocol {
        1 => "icmp",
        2 => "igmp",
        4 => "ipip",
        6 => "tcp",
        17 => "udp",
        41 => "6in4",
        47 => "gre",
        50 => "esp",
        51 => "ah",
        58 => "icmpv6",
        89 => "ospf",
        112 => "vrrp",
        132 => "sctp",
        136 => "udplite",
        number => return format!("proto/{number}"),
    };
    name.to_owned()
}

fn tcp_flags(flags: u8) -> String {
    const NAMES: [&str; 8] = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];
    let set: Vec<_> = NAMES
        .into_iter()
        .enumerate()
        .filter(|(bit, _)| flags >> bit & 1 == 1)
        .map(|(_, name)| name)
        .collect();
    set.join(",")
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::policy::model::{
        Action, AddrRange, Defaults, Endpoints, Member, Mode, Rule, Segment, Service, Unsegmented,
    };

    /// tcp 10.99.3.4:51514 → 10.10.1.5:5432, denied by default by segment 0 of generation 1.
    pub(crate) fn event() -> Event {
        Event {
            time: 0,
            total: 1,
            cookie: 0,
            process: Process::default(),
            source: [0, 0, 0, 0x0a63_0304],
            destination: [0, 0, 0, 0x0a0a_0105],
            rule: EMPTY,
            segment: 0,
            generation: 1,
            ifindex: 3,
            slot: 1,
            cpu: 0,
            epoch: 1,
            source_port: 51514,
            destination_port: 5432,
            selector: 5432,
            ethertype: 0x0800,
            protocol: 6,
            family: 4,
            hook: Hook::TcIngress as u8,
            outcome: Outcome::Denied as u8,
            reason: Reason::DefaultDeny as u8,
            tcp_flags: 2,
            lasting: 0,
            reserved: [0; 5],
        }
    }

    fn origin(line: u32) -> Origin {
        Origin {
            file: "hospital.yaml".into(),
            line,
            column: 3,
        }
    }

    fn segment(name: &str, net: &str, protect: Protect, line: u32) -> Segment {
        let net: ipnet::IpNet = net.parse().unwrap();
        Segment {
            name: name.to_owned(),
            description: String::new(),
            members: vec![Member {
                range: AddrRange::from(net),
                except: Vec::new(),
                origin: origin(line),
            }]
            .into(),
            mode: Mode::Enforce,
            protect,
            interfaces: vec![],
            origin: origin(line),
        }
    }

    /// Segments ehr-db (inbound, line 8) and guest-wifi (both, line 10); rule guests-out.
    pub(crate) fn policy() -> Policy {
        Policy {
            defaults: Defaults {
                mode: Mode::Enforce,
                unsegmented: Unsegmented::Allow,
            },
            segments: vec![
                segment("ehr-db", "10.10.1.0/24", Protect::Inbound, 8),
                segment("guest-wifi", "10.99.0.0/16", Protect::Both, 10),
            ],
            groups: Vec::new(),
            rules: vec![Rule {
                name: "guests-out".to_owned(),
                from: Endpoints::default(),
                to: Endpoints::default(),
                services: vec![Service::Any],
                action: Action::Deny,
                expires: None,
                session: None,
                origin: origin(20),
            }]
            .into(),
            tests: Vec::new(),
        }
    }

    struct Here;

    impl Local for Here {
        fn interface_name(&self, ifindex: u32) -> Option<Arc<str>> {
            (ifindex == 3).then(|| "gw-guest".into())
        }

        fn addresses(&self) -> BTreeSet<IpAddr> {
            ["127.0.0.1", "10.99.0.1", "::1"]
                .iter()
                .map(|ip| ip.parse().unwrap())
                .collect()
        }
    }

    fn enricher() -> Enricher {
        let generations = Arc::new(Generations::default());
        generations.insert(1, Arc::new(policy()));
        Enricher::new(generations, Arc::new(Here), Cgroups::new(None))
    }

    pub(crate) fn denial(event: &Event) -> Denial {
        enricher().denial(event, 14, Clock::sample().unwrap())
    }

    #[test]
    fn a_default_deny_has_names_and_lines() {
        let denial = denial(&event());
        let json = serde_json::to_value(&denial).unwrap();
        let expected = serde_json::json!({
            "time": denial.time.to_string(), "verdict": "DENIED", "reason": "default_deny",
            "rule": null, "default": "ehr-db (inbound)", "file": "hospital.yaml", "line": 8,
            "from_segments": ["guest-wifi"], "to_segments": ["ehr-db"],
            "src": "10.99.3.4", "dst": "10.10.1.5", "src_port": 51514, "dst_port": 5432,
            "protocol": "tcp", "tcp_flags": "SYN", "icmp_type": null, "icmp_code": null,
            "direction": "ingress", "interface": "gw-guest", "process": null,
            "packets": 14, "generation": 1,
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn times_are_right_after_the_clock_was_set() {
        let at = |boot_unix: i128| {
            let clock = Clock(Sample {
                boottime: 7_000_000_000,
                boot_unix,
            });
            let event = Event {
                time: 5_000_000_000,
                ..event()
            };
            enricher().denial(&event, 1, clock).time.to_string()
        };
        let year = 365 * 86_400 * 1_000_000_000;
        assert_eq!(at(0), "1970-01-01T00:00:05.000Z");
        assert_eq!(at(year), "1971-01-01T00:00:05.000Z");
        assert_eq!(at(-year), "1969-01-01T00:00:05.000Z");
    }

    #[test]
    fn json_round_trips() {
        let mut denial = denial(&event());
        denial.time = denial.time.to_string().parse().map(Time).unwrap();
        let record = crate::api::types::Record::Denial(Box::new(denial));
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(
            serde_json::from_str::<crate::api::types::Record>(&json).unwrap(),
            record
        );
    }

    #[test]
    fn a_rule_goes_before_the_segment_and_an_old_generation_says_so() {
        let by_rule = denial(&Event {
            rule: 0,
            segment: EMPTY,
            reason: Reason::RuleDeny as u8,
            ..event()
        });
        assert_eq!(by_rule.rule.as_deref(), Some("guests-out"));
        assert_eq!((by_rule.default, by_rule.line), (None, Some(20)));

        let gone = denial(&Event {
            generation: 9,
            ifindex: 4,
            ..event()
        });
        let text = gone.default.map(|d| d.to_string());
        assert_eq!(text.as_deref(), Some("segment 0 of generation 9 (gone)"));
        assert_eq!(gone.interface.as_deref(), Some("ifindex 4"));
        assert!(gone.from_segments.is_empty());
    }

    #[test]
    fn what_was_not_read_is_left_out() {
        let unread = denial(&Event {
            family: 0,
            ethertype: 0x88cc,
            protocol: 0,
            segment: EMPTY,
            reason: Reason::Ethertype as u8,
            ..event()
        });
        assert_eq!(unread.protocol, "ethertype/0x88cc");
        assert_eq!((unread.src, unread.dst_port), (None, None));
        assert_eq!(unread.default, None);
    }

    #[test]
    fn a_process_is_named_and_ipv6_read() {
        let mut comm = [0; 16];
        comm[..10].copy_from_slice("\u{9b}31m\u{7f}x\n\u{1b}c".as_bytes());
        let sly = denial(&Event {
            process: Process {
                pid: 7,
                comm,
                ..event().process
            },
            ..event()
        });
        let words = "\u{fffd}31m\u{fffd}x\u{fffd}\u{fffd}c";
        assert_eq!(sly.process.unwrap().comm, words);
        let mut comm = [0; 16];
        comm[..4].copy_from_slice(b"curl");
        let named = denial(&Event {
            family: 6,
            source: [0xfd00_0010, 0x0099_0000, 0, 4],
            hook: Hook::Connect as u8,
            source_port: 0,
            process: Process {
                cgroup: 42,
                pid: 7,
                uid: 1000,
                comm,
            },
            ..event()
        });
        let process = named.process.unwrap();
        assert_eq!((process.comm.as_str(), process.pid), ("curl", 7));
        assert_eq!(process.cgroup, "id 42");
        assert_eq!(named.src, "fd00:10:99::4".parse::<IpAddr>().ok());
        assert_eq!(
            (named.direction.as_str(), named.src_port),
            ("connect", None)
        );

        let unbound = denial(&Event {
            source: [0; 4],
            hook: Hook::Connect as u8,
            ..event()
        });
        assert_eq!(&*unbound.from_segments, ["guest-wifi".into()]);
    }
}
