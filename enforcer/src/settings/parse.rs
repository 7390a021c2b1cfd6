//! Text to [`Settings`], every mistake reported in one run.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use enforcer_common::image::{LLC, MAX_ETHERTYPES, MAX_FAILSAFES, essential};
use ipnet::IpNet;

use super::{
    Access, Failsafe, Settings,
    names::{ESSENTIAL_ETHERTYPES, ESSENTIALS, ETHERTYPES, ethertype_name},
};
use crate::{
    compile,
    policy::{
        diag::{Diagnostic, Span, shown},
        model::{Service, Transport},
        parse::{
            SourceFile, address,
            context::{Fields, File, Findings},
            names::{self, closest},
            raw::{self, Node, Value},
            services,
        },
        pattern::Pattern,
    },
};

const TOP: [&str; 5] = ["version", "essentials", "ethertypes", "failsafe", "control"];
const CONTROL: [&str; 2] = ["change", "view"];
const FAILSAFE: [&str; 4] = ["name", "sources", "ports", "interfaces"];
/// Sources of one failsafe, and its interfaces.
const MAX_SOURCES: usize = 256;
/// Ports and ranges of one failsafe.
const MAX_PORTS: usize = 64;
/// Smallest ethertype; what is below is a length.
const SMALLEST: u16 = 0x0600;

/// Settings that can be used, and what their author may want to look at.
pub type Parsed = (Settings, Vec<Diagnostic>);

/// Parses and checks the text of `enforcer.yaml`.
///
/// # Errors
/// Every mistake found, in the order of the lines; never empty. Nothing of the settings may be
/// used then.
pub fn parse(source: &SourceFile) -> Result<Parsed, Vec<Diagnostic>> {
    let file = File {
        index: 0,
        name: Arc::from(source.name.as_str()),
    };
    let tree = match raw::read(source) {
        Ok(Some(tree)) => tree,
        Ok(None) => {
            let empty = file.error("E0006", Span::START, "the file is empty");
            let help = "it starts with `version: 1`; without the file the defaults hold";
            return Err(vec![empty.help(help)]);
        }
        Err(broken) => {
            let note = "the rest of this file was not checked";
            return Err(vec![(*broken).note(note)]);
        }
    };
    let mut parser = Parser {
        file,
        findings: Findings::default(),
    };
    let settings = parser.settings(&tree);
    Ok((settings, parser.findings.finish()?))
}

/// As groupadd(8) takes them, capitals and dots too, which some directories use.
fn is_group(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
    (1..=32).contains(&text.len()) && !text.starts_with(['-', '.']) && text.bytes().all(plain)
}

struct Parser {
    file: File,
    findings: Findings,
}

impl Parser {
    fn error(&mut self, code: &'static str, span: Span, message: String, help: Option<String>) {
        let mut found = self.file.error(code, span, message);
        found.help = help;
        self.findings.push(&self.file, found);
    }

    fn warning(&mut self, code: &'static str, span: Span, message: String, help: &str) {
        let found = self.file.warning(code, span, message).help(help);
        self.findings.push(&self.file, found);
    }

    fn settings(&mut self, tree: &Node) -> Settings {
        let mut settings = Settings::default();
        let what = "the settings";
        let top = self.findings.fields(&self.file, tree, what, &TOP, &[]);
        let Some(top) = top else {
            return settings;
        };
        self.version(&top);
        if let Some(node) = top.get("essentials") {
            settings.essentials = self.essentials(node);
        }
        if let Some(node) = top.get("ethertypes") {
            settings.ethertypes = self.ethertypes(node, settings.essentials);
        }
        if let Some(node) = top.get("failsafe") {
            settings.failsafes = self.failsafes(node);
        }
        if let Some(node) = top.get("control") {
            settings.access = self.access(node);
        }
        settings
    }

    fn access(&mut self, node: &Node) -> Access {
        let mut access = Access::default();
        let what = "`control`";
        let fields = self.findings.fields(&self.file, node, what, &CONTROL, &[]);
        let Some(fields) = fields else {
            return access;
        };
        for (key, group) in [("change", &mut access.change), ("view", &mut access.view)] {
            let Some(node) = fields.get(key) else {
                continue;
            };
            let Some(text) = self.findings.text(&self.file, node, "a group") else {
                continue;
            };
            if is_group(text) {
                text.clone_into(group);
            } else {
                let message = format!("{} is not the name of a group", shown(text));
                let help = "letters, digits, `_`, `-` and `.`, up to 32 of them; or a number";
                self.error("E0508", node.span, message, Some(help.to_owned()));
            }
        }
        access
    }

    fn version(&mut self, top: &Fields<'_>) {
        let Some(node) = self.findings.required(&self.file, top, "version") else {
            return;
        };
        if !matches!(&node.value, Value::Scalar { text, plain: true } if &**text == "1") {
            let message = "this version of the enforcer reads `version: 1` only".to_owned();
            let help = Some("write `version: 1`".to_owned());
            self.error("E0110", node.span, message, help);
        }
    }

    /// The entries of a list with at most `limit`, as text.
    fn texts<'a>(
        &mut self,
        node: &'a Node,
        key: &str,
        item: &str,
        limit: usize,
    ) -> Vec<(Span, &'a str)> {
        let what = format!("`{key}`");
        let items = self.findings.list(&self.file, node, &what);
        let items = items.unwrap_or_default();
        self.at_most(items, limit, &what);
        items
            .iter()
            .filter_map(|node| {
                let text = self.findings.text(&self.file, node, item)?;
                Some((node.span, text))
            })
            .collect()
    }

    fn at_most(&mut self, items: &[Node], limit: usize, what: &str) {
        if let Some(first) = items.get(limit) {
            let message = format!(
                "{what} has {} entries; the limit is {limit}, and this is the first too many",
                items.len()
            );
            self.error("E0504", first.span, message, None);
        }
    }

    fn essentials(&mut self, node: &Node) -> u32 {
        let mut on = essential::ALL;
        let what = "`essentials`";
        let fields = self.findings.fields(&self.file, node, what, &["off"], &[]);
        let off = fields.and_then(|fields| self.findings.required(&self.file, &fields, "off"));
        let Some(off) = off else {
            return on;
        };
        for (span, text) in self.texts(off, "off", "an essential protocol", usize::MAX) {
            match ESSENTIALS.iter().find(|(name, _)| *name == text) {
                Some((name, bit)) if on & bit == 0 => {
                    let message = format!("`{name}` is switched off twice");
                    self.warning("W0503", span, message, "remove one of the two");
                }
                Some((_, bit)) => on &= !bit,
                None => {
                    let all = ESSENTIALS.map(|(name, _)| name);
                    let help = match closest(text, all) {
                        _ if text == "lacp" => "LACP is one of the slow protocols: `slow`".into(),
                        _ if matches!(text, "igmp" | "mld") => {
                            "write `multicast-membership`".into()
                        }
                        Some(near) => format!("did you mean `{near}`?"),
                        None => format!("the essential protocols are: {}", all.join(", ")),
                    };
                    let message = format!("{} is no essential protocol", shown(text));
                    self.error("E0501", span, message, Some(help));
                }
            }
        }
        on
    }

    fn ethertypes(&mut self, node: &Node, essentials: u32) -> Vec<u16> {
        let limit = MAX_ETHERTYPES as usize;
        let mut listed: BTreeSet<u16> = BTreeSet::new();
        let mut full = false;
        for (span, text) in self.texts(node, "ethertypes", "an ethertype", usize::MAX) {
            let named = ETHERTYPES.iter().find(|(name, _)| *name == text);
            let numbers = match (named, number(text)) {
                (Some((_, numbers)), _) => numbers.to_vec(),
                (None, Some(number)) if self.may_be_listed(span, text, number) => vec![number],
                (None, Some(_)) => continue,
                (None, None) => {
                    self.not_an_ethertype(span, text);
                    continue;
                }
            };
            for number in numbers {
                self.essential_ethertype(span, number, essentials);
                if !listed.insert(number) {
                    let message = format!("{} is listed twice", ethertype_name(number));
                    self.warning("W0503", span, message, "remove one of the two");
                }
            }
            if listed.len() > limit && !full {
                full = true;
                let message = format!("more than {limit} ethertypes are listed");
                let note = "some names stand for two ethertypes".to_owned();
                self.error("E0504", span, message, Some(note));
            }
        }
        listed.into_iter().collect()
    }

    /// Listing what is judged otherwise would be without effect, or a hole.
    fn may_be_listed(&mut self, span: Span, text: &str, number: u16) -> bool {
        let (message, help) = match number {
            0..SMALLEST => (
                format!("{} is a length, not an ethertype", shown(text)),
                "ethertypes start at 0x0600; for frames with a length write `llc`",
            ),
            0x0800 | 0x86dd => (
                format!("{} is IP, which the policy judges", shown(text)),
                "write a rule for what is to pass",
            ),
            0x8100 | 0x88a8 | 0x9100 | 0x9200 | 0x9300 => (
                format!("{} is a VLAN tag", shown(text)),
                "list what is inside: up to two tags (0x8100, 0x88a8) are looked through",
            ),
            _ => return true,
        };
        self.error("E0503", span, message, Some(help.to_owned()));
        false
    }

    fn not_an_ethertype(&mut self, span: Span, text: &str) {
        let all = ETHERTYPES.map(|(name, _)| name);
        let essential = ESSENTIALS.iter().any(|(name, _)| *name == text);
        let help = match closest(text, all) {
            _ if essential => {
                "essential protocols pass unless `essentials: {off: […]}` names them".to_owned()
            }
            Some(near) => format!("did you mean `{near}`?"),
            None => format!(
                "write a number from 0x0600 to 0xffff, or one of: {}",
                all.join(", ")
            ),
        };
        let message = format!("{} is not an ethertype", shown(text));
        self.error("E0502", span, message, Some(help));
    }

    fn essential_ethertype(&mut self, span: Span, number: u16, essentials: u32) {
        let found = ESSENTIAL_ETHERTYPES.iter().find(|(_, n)| *n == number);
        let Some((bit, _)) = found else {
            return;
        };
        let name = ESSENTIALS.iter().find(|(_, b)| b == bit);
        let name = name.map_or("", |(name, _)| name);
        let (message, help) = if essentials & bit != 0 {
            (
                format!("{number:#06x} is `{name}`, which passes as an essential already"),
                "remove it here",
            )
        } else {
            (
                format!("{number:#06x} is `{name}`, which `essentials` switches off"),
                "it passes, since it is listed here: remove one of the two",
            )
        };
        self.warning("W0502", span, message, help);
    }

    fn failsafes(&mut self, node: &Node) -> Vec<Failsafe> {
        let what = "`failsafe`";
        let items = self.findings.list(&self.file, node, what);
        let items = items.unwrap_or_default();
        self.at_most(items, MAX_FAILSAFES as usize, what);
        let mut names: BTreeMap<&str, Span> = BTreeMap::new();
        items
            .iter()
            .filter_map(|item| self.failsafe(item, &mut names))
            .collect()
    }

    fn failsafe<'a>(
        &mut self,
        node: &'a Node,
        names: &mut BTreeMap<&'a str, Span>,
    ) -> Option<Failsafe> {
        let what = "a failsafe";
        let fields = self
            .findings
            .fields(&self.file, node, what, &FAILSAFE, &[])?;
        let name = self.findings.required(&self.file, &fields, "name");
        let name = name.and_then(|node| self.name(node, names));
        let sources = self.findings.required(&self.file, &fields, "sources");
        let sources = sources.map_or_else(Vec::new, |node| self.sources(node));
        let ports = self.findings.required(&self.file, &fields, "ports");
        let ports = ports.map_or_else(Vec::new, |node| self.ports(node));
        let interfaces = fields.get("interfaces");
        let interfaces = interfaces.map_or_else(Vec::new, |node| self.interfaces(node));
        Some(Failsafe {
            name: name?,
            passes: compile::Failsafe {
                sources,
                ports,
                interfaces,
            },
        })
    }

    fn name<'a>(&mut self, node: &'a Node, names: &mut BTreeMap<&'a str, Span>) -> Option<String> {
        let text = self.findings.text(&self.file, node, "a name")?;
        if let Err(problem) = names::check(text) {
            self.findings.problem(&self.file, node.span, problem);
        } else if let Some(first) = names.insert(text, node.span) {
            let message = format!("a second failsafe is named {}", shown(text));
            let note = format!("the first is at {}:{}", self.file.name, first.line);
            let found = self.file.error("E0507", node.span, message).note(note);
            self.findings.push(&self.file, found);
        }
        Some(text.to_owned())
    }

    fn sources(&mut self, node: &Node) -> Vec<IpNet> {
        let mut sources = Vec::new();
        for (span, text) in self.texts(node, "sources", "a prefix", MAX_SOURCES) {
            if let Err(problem) = address::prefix(text) {
                self.findings.problem(&self.file, span, problem);
                continue;
            }
            let Ok(net) = text.parse::<IpNet>() else {
                continue;
            };
            if net.prefix_len() == 0 {
                let family = if net.addr().is_ipv4() { "IPv4" } else { "IPv6" };
                let message = format!("this failsafe is open to every {family} address");
                let help = "no policy can close it: name the networks of the administrators";
                self.warning("W0501", span, message, help);
            }
            sources.push(net);
        }
        sources
    }

    fn ports(&mut self, node: &Node) -> Vec<(Transport, u16, u16)> {
        let mut ports = Vec::new();
        for (span, text) in self.texts(node, "ports", "a port", MAX_PORTS) {
            let services = match services::literal_or_catalogue(text) {
                Ok(Some(services)) => services,
                Ok(None) => {
                    let help = services::unknown_name_help(text, []);
                    let message = format!("unknown service {}", shown(text));
                    self.error("E0108", span, message, help);
                    continue;
                }
                Err(problem) => {
                    self.findings.problem(&self.file, span, problem);
                    continue;
                }
            };
            for service in services {
                match service {
                    Service::Ports {
                        transport: transport @ (Transport::Tcp | Transport::Udp),
                        first,
                        last,
                    } => ports.push((transport, first, last)),
                    Service::Ports { .. }
                    | Service::Any
                    | Service::Icmp { .. }
                    | Service::Icmpv6 { .. }
                    | Service::Protocol(_) => {
                        let message = format!("{} is not a TCP or UDP port", shown(text));
                        let help = "a failsafe opens ports of this host, such as `tcp/22`";
                        self.error("E0505", span, message, Some(help.to_owned()));
                        break;
                    }
                }
            }
        }
        ports
    }

    fn interfaces(&mut self, node: &Node) -> Vec<Pattern> {
        let mut patterns = Vec::new();
        for (span, text) in self.texts(node, "interfaces", "an interface", MAX_SOURCES) {
            match text.parse() {
                Ok(pattern) => patterns.push(pattern),
                Err(message) => self.error("E0506", span, message, None),
            }
        }
        patterns
    }
}

/// `0x88b5` or decimal. The word for LLC is no number.
fn number(text: &str) -> Option<u16> {
    let digits = |text: &str, radix: u32| {
        (!text.is_empty() && text.chars().all(|c| c.is_digit(radix)))
            .then(|| u16::from_str_radix(text, radix).ok())
            .flatten()
    };
    match text.strip_prefix("0x") {
        Some(hex) => digits(hex, 16),
        None => digits(text, 10),
    }
}

const _: () = assert!(LLC < SMALLEST as u32);
