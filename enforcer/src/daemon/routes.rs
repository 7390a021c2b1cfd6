//! Default routes, of any table: a tunnel's or a second uplink's are default routes as well.

use std::{collections::BTreeSet, io};

use super::netlink::{Message, attributes, dump, undisturbed, word};

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
/// `struct rtmsg`.
const ROUTE: usize = 12;
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;
/// `struct rtnexthop`: u16 length, flags, hops, and the interface.
const HOP: usize = 8;
const RTN_UNICAST: u8 = 1;
/// RTM_F_CLONED: learned, not set.
const CLONED: u32 = 0x200;

/// Whether a message is about a default route.
pub fn is_default(kind: u16, body: &[u8]) -> bool {
    matches!(kind, RTM_NEWROUTE | RTM_DELROUTE) && body.get(1) == Some(&0)
}

/// Interfaces that a default route of IPv4 or IPv6 leads to, whatever its metric: what stands by
/// is enforced before it takes over.
///
/// # Errors
/// What the socket calls or the kernel say.
pub fn interfaces() -> io::Result<BTreeSet<u32>> {
    let (found, _) = undisturbed(|found: &mut BTreeSet<u32>| {
        dump(RTM_GETROUTE, ROUTE, |message| found.extend(hops(message)))
    })?;
    Ok(found)
}

/// The interfaces of a default route.
fn hops(message: &Message<'_>) -> Vec<u32> {
    let body = message.body;
    let leads_on = message.kind == RTM_NEWROUTE
        && is_default(message.kind, body)
        && body.get(7) == Some(&RTN_UNICAST)
        && word(body, 8).is_some_and(|flags| flags & CLONED == 0);
    let mut found = Vec::new();
    if !leads_on {
        return found;
    }
    for (kind, value) in attributes(body.get(ROUTE..).unwrap_or_default()) {
        match kind {
            RTA_OIF => found.extend(word(value, 0)),
            RTA_MULTIPATH => {
                let mut rest = value;
                while let (Some(length), Some(ifindex)) = (rest.get(..2), word(rest, 4)) {
                    found.push(ifindex);
                    let length = usize::from(u16::from_ne_bytes([length[0], length[1]]));
                    let next = length.max(HOP).next_multiple_of(4);
                    rest = rest.get(next..).unwrap_or_default();
                }
            }
            _ => {}
        }
    }
    found
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

    fn found(kind: u16, length: u8, route: u8, flags: u32, attributes: &[Vec<u8>]) -> Vec<u32> {
        let mut body = vec![2, length, 0, 0, 254, 3, 0, route];
        body.extend(flags.to_ne_bytes());
        body.extend(attributes.concat());
        hops(&Message::new(kind, &body))
    }

    #[test]
    fn default_routes_and_no_others() {
        let to = |ifindex: u32| attribute(RTA_OIF, &ifindex.to_ne_bytes());
        assert_eq!(found(RTM_NEWROUTE, 0, 1, 0, &[to(7)]), [7]);
        assert!(found(RTM_DELROUTE, 0, 1, 0, &[to(7)]).is_empty());
        assert!(found(RTM_NEWROUTE, 24, 1, 0, &[to(7)]).is_empty());
        // Unreachable; learned.
        assert!(found(RTM_NEWROUTE, 0, 7, 0, &[to(1)]).is_empty());
        assert!(found(RTM_NEWROUTE, 0, 1, CLONED, &[to(7)]).is_empty());
        let hop = |ifindex: u32, more: &[u8]| {
            let mut bytes = ((HOP + more.len()) as u16).to_ne_bytes().to_vec();
            bytes.extend([0, 0]);
            bytes.extend(ifindex.to_ne_bytes());
            bytes.extend(more);
            bytes
        };
        let gateway = attribute(5, &[10, 0, 0, 1]);
        let hops = [hop(3, &gateway), hop(9, &[])].concat();
        let multipath = attribute(RTA_MULTIPATH, &hops);
        assert_eq!(found(RTM_NEWROUTE, 0, 1, 0, &[multipath]), [3, 9]);
        // Cut off.
        let cut = attribute(RTA_MULTIPATH, &hops[..10]);
        assert_eq!(found(RTM_NEWROUTE, 0, 1, 0, &[cut]), [3]);
        assert!(is_default(RTM_DELROUTE, &[2, 0]) && !is_default(RTM_DELROUTE, &[2, 8]));
        assert!(!is_default(16, &[0, 0]) && !is_default(RTM_NEWROUTE, &[]));
        interfaces().unwrap();
    }
}
