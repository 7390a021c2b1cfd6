//! Programs of others on the interfaces' hooks, for the doctor: tcx as the kernel tells bpf(2),
//! filters of clsact and XDP as it tells rtnetlink.

use std::io;

use nix::net::if_::if_nametoindex;

use super::{
    doctor::{Check, Health, not, ok},
    netlink::{attributes, dump, dump_of, text, word},
};
use crate::dataplane::hanging;

const NAME: &str = "interfaces";

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWTFILTER: u16 = 44;
const RTM_GETTFILTER: u16 = 46;
/// `struct ifinfomsg`.
const INFO: usize = 16;
/// `struct tcmsg`: ifindex at 4, handle at 8, parent at 12, priority in the upper half at 16.
const FILTER: usize = 20;
/// Of clsact: TC_H_CLSACT with TC_H_MIN_INGRESS, TC_H_MIN_EGRESS.
const PARENTS: [(&str, u32); 2] = [("tc_ingress", 0xffff_fff2), ("tc_egress", 0xffff_fff3)];
/// What is 0 in the handle of a table of `u32`.
const U32_KEY: u32 = 0xf_ffff;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_ID: u16 = 11;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_PROG_ID: u16 = 4;
/// IFLA_XDP_DRV_PROG_ID to IFLA_XDP_HW_PROG_ID: where there are several.
const IFLA_XDP_PROG_IDS: std::ops::RangeInclusive<u16> = 5..=7;

/// Hook, id and name of a program or filter.
type Program = (&'static str, u32, String);

/// What is to be said of an interface.
pub(super) fn checks(interface: &str, tcx: bool) -> Vec<Check> {
    let mut checks = vec![hooks(interface, tcx)];
    checks.extend(xdp_check(interface));
    checks
}

/// Those that see packets beside the enforcer's programs.
fn hooks(interface: &str, tcx: bool) -> Check {
    let cannot = |error: &dyn std::fmt::Display| {
        not(
            Health::Warn,
            NAME,
            format!("{interface}: {error}"),
            "run it as root",
        )
    };
    let filters = match filters(interface) {
        Ok(filters) => filters,
        Err(error) => return cannot(&error),
    };
    let (before, after) = if tcx {
        let hanging = match hanging(interface) {
            Ok(hanging) => hanging,
            Err(error) => return cannot(&error),
        };
        let (before, mut after) = others(&hanging.programs);
        // The kernel asks all of tcx before the first filter.
        after.extend(others(&filters).1);
        after.extend(others(&filters).0);
        (before, after)
    } else {
        others(&filters)
    };
    let list = |programs: &[String]| programs.join(", ");
    if before.is_empty() && after.is_empty() {
        return ok(NAME, format!("{interface}: no program of anybody else's"));
    }
    if before.is_empty() {
        let said = format!("{interface}: asked after the enforcer: {}", list(&after));
        return ok(NAME, said);
    }
    let said = format!(
        "{interface}: asked before the enforcer, and can pass what it would deny: {}",
        list(&before)
    );
    let mend = if tcx {
        "find whose it is (bpftool net), take it off, or have it attach after the enforcer"
    } else {
        "find whose it is (tc filter show dev INTERFACE ingress, or egress), take it off, or have it \
         attach with a higher priority number"
    };
    not(Health::Fail, NAME, said, mend)
}

/// Programs that are not ours, by whether one of ours is asked after them. Where none of ours hangs
/// they are behind it: it will be put first.
fn others(programs: &[Program]) -> (Vec<String>, Vec<String>) {
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for (hook, _) in PARENTS {
        let chain: Vec<_> = programs.iter().filter(|(at, ..)| *at == hook).collect();
        let ours = chain.iter().position(|(_, _, name)| name == hook);
        for (position, (_, id, name)) in chain.iter().enumerate() {
            if name == hook {
                continue;
            }
            let said = format!("{hook} {id} {name}").trim_end().to_owned();
            if ours.is_some_and(|ours| position < ours) {
                before.push(said);
            } else {
                after.push(said);
            }
        }
    }
    (before, after)
}

/// XDP comes before every other hook. What it passes the enforcer judges; what it redirects nobody
/// does.
fn xdp_check(interface: &str) -> Option<Check> {
    match xdp(interface) {
        Ok(ids) if ids.is_empty() => None,
        Ok(ids) => {
            let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
            let said = format!(
                "{interface}: an XDP program (id {}) has packets before the enforcer, and can send \
                 them past it",
                ids.join(", ")
            );
            let mend =
                "find whose it is (bpftool net); if nobody's: ip link set dev INTERFACE xdp off";
            Some(not(Health::Warn, NAME, said, mend))
        }
        Err(error) => {
            let said = format!("{interface}: XDP programs cannot be listed: {error}");
            Some(not(Health::Warn, NAME, said, "run it as root"))
        }
    }
}

fn index(interface: &str) -> io::Result<u32> {
    Ok(if_nametoindex(interface)?)
}

/// Filters of both directions, in the order in which they are asked. None where there is no clsact.
fn filters(interface: &str) -> io::Result<Vec<Program>> {
    let ifindex = index(interface)?;
    let mut filters = Vec::new();
    for (hook, parent) in PARENTS {
        let mut request = [0; FILTER];
        request[4..8].copy_from_slice(&ifindex.to_ne_bytes());
        request[12..16].copy_from_slice(&parent.to_ne_bytes());
        // One that came or went meanwhile changes nothing about the others' order.
        dump_of(RTM_GETTFILTER, &request, &mut |message| {
            if message.kind == RTM_NEWTFILTER {
                filters.extend(filter(hook, message.body));
            }
        })?;
    }
    Ok(filters)
}

/// A filter from the body of RTM_NEWTFILTER. The head of a priority, and of a table of `u32`, is not
/// one.
fn filter(hook: &'static str, body: &[u8]) -> Option<Program> {
    let (mut kind, mut options) = (String::new(), None);
    for (number, value) in attributes(body.get(FILTER..)?) {
        match number {
            TCA_KIND => kind = text(value),
            TCA_OPTIONS => options = Some(value),
            _ => {}
        }
    }
    let (handle, priority) = (word(body, 8)?, word(body, 16)? >> 16);
    let is_table = kind == "u32" && handle & U32_KEY == 0;
    let options = options.filter(|_| handle != 0 && !is_table)?;
    if kind != "bpf" {
        return Some((hook, priority, format!("({kind} filter)")));
    }
    let (mut name, mut id) = (None, 0);
    for (number, value) in attributes(options) {
        match number {
            TCA_BPF_NAME => name = Some(text(value)),
            TCA_BPF_ID => id = word(value, 0)?,
            _ => {}
        }
    }
    Some((hook, id, name.unwrap_or_default()))
}

/// Ids of the XDP programs of an interface.
fn xdp(interface: &str) -> io::Result<Vec<u32>> {
    let ifindex = index(interface)?;
    let mut ids = Vec::new();
    dump(RTM_GETLINK, INFO, |message| {
        if message.kind == RTM_NEWLINK && word(message.body, 4) == Some(ifindex) {
            ids = xdp_ids(message.body);
        }
    })?;
    Ok(ids)
}

fn xdp_ids(body: &[u8]) -> Vec<u32> {
    let mut ids = Vec::new();
    let all = attributes(body.get(INFO..).unwrap_or_default());
    for (_, value) in all.filter(|(number, _)| *number == IFLA_XDP) {
        for (number, value) in attributes(value) {
            if number == IFLA_XDP_PROG_ID || IFLA_XDP_PROG_IDS.contains(&number) {
                ids.extend(word(value, 0).filter(|id| *id != 0));
            }
        }
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn body(handle: u32, priority: u32, kind: &[u8], options: Option<&[Vec<u8>]>) -> Vec<u8> {
        let mut body = vec![0; FILTER];
        body[8..12].copy_from_slice(&handle.to_ne_bytes());
        body[16..20].copy_from_slice(&(priority << 16).to_ne_bytes());
        body.extend(attribute(TCA_KIND, kind));
        if let Some(options) = options {
            body.extend(attribute(TCA_OPTIONS, &options.concat()));
        }
        body
    }

    #[test]
    fn filters_are_told_from_the_heads_of_their_lists() {
        let named = [
            attribute(TCA_BPF_NAME, b"rival\0"),
            attribute(TCA_BPF_ID, &7u32.to_ne_bytes()),
        ];
        let read = |body: &[u8]| filter("tc_ingress", body);
        assert_eq!(read(&body(0, 1, b"bpf\0", None)), None);
        assert_eq!(
            read(&body(1, 1, b"bpf\0", Some(&named))),
            Some(("tc_ingress", 7, "rival".to_owned()))
        );
        assert_eq!(
            read(&body(1, 9, b"matchall\0", Some(&[]))),
            Some(("tc_ingress", 9, "(matchall filter)".to_owned()))
        );
        assert_eq!(read(&body(0x8000_0000, 9, b"u32\0", Some(&[]))), None);
        assert!(read(&body(0x8000_0800, 9, b"u32\0", Some(&[]))).is_some());
        assert_eq!(read(&[0; 8]), None);
    }

    #[test]
    fn what_is_before_ours_is_told_from_what_is_after() {
        let program = |hook, id, name: &str| (hook, id, name.to_owned());
        let chain = [
            program("tc_ingress", 1, "first"),
            program("tc_ingress", 2, "tc_ingress"),
            program("tc_ingress", 3, ""),
            program("tc_egress", 4, "alone"),
        ];
        let (before, after) = others(&chain);
        assert_eq!(before, ["tc_ingress 1 first"]);
        assert_eq!(after, ["tc_ingress 3", "tc_egress 4 alone"]);
    }

    #[test]
    fn each_xdp_program_is_listed_once() {
        let id = |kind, id: u32| attribute(kind, &id.to_ne_bytes());
        let of = |attributes: &[Vec<u8>]| {
            xdp_ids(&[vec![0; INFO], attribute(IFLA_XDP, &attributes.concat())].concat())
        };
        assert_eq!(of(&[attribute(2, &[2]), id(4, 12), id(6, 12)]), [12]);
        assert_eq!(of(&[attribute(2, &[4]), id(5, 3), id(6, 2)]), [2, 3]);
        assert!(of(&[attribute(2, &[0])]).is_empty());
        assert!(xdp_ids(&[]).is_empty());
    }
}
