//! The host's own addresses, for the socket hooks.

use std::{collections::BTreeMap, net::IpAddr};

use enforcer_common::image::{self as layout, header};

use crate::policy::model::Environment;

use super::{
    quarters, word,
    writer::{Full, Writer},
};

/// Writes the addresses and their classes. It asks the image's own tables, so it comes after them.
/// `sources` is each class's behaviour as source.
pub(super) fn write(env: &Environment, sources: &[u32], writer: &mut Writer) -> Result<(), Full> {
    let mut v4 = Vec::new();
    let mut v6 = Vec::new();
    // Loopback never meets TC, and the hooks know it by its prefix.
    for address in env.host_addresses.iter().filter(|ip| !ip.is_loopback()) {
        match address {
            IpAddr::V4(ip) => v4.push(ip.to_bits()),
            IpAddr::V6(ip) => v6.extend(quarters(ip.to_bits())),
        }
    }
    for (words, each, at, count) in [
        (v4, 1, header::LOCAL4, header::LOCAL4_COUNT),
        (v6, 4, header::LOCAL6, header::LOCAL6_COUNT),
    ] {
        let number = word(words.len() / each);
        if number > layout::MAX_LOCAL {
            writer.set(count, layout::LOCAL_UNKNOWN);
        } else if number > 0 {
            let offset = writer.append(&words)?;
            writer.set(at, offset);
            writer.set(count, number);
        }
    }
    classes(env, sources, writer)
}

/// The distinct classes of the addresses but loopback. Of classes that are judged alike as sources,
/// one: the hooks cannot tell them apart, and go through few.
fn classes(env: &Environment, sources: &[u32], writer: &mut Writer) -> Result<(), Full> {
    for (v6, at, count) in [
        (false, header::LOCAL4_CLASSES, header::LOCAL4_CLASSES_COUNT),
        (true, header::LOCAL6_CLASSES, header::LOCAL6_CLASSES_COUNT),
    ] {
        let mut classes: BTreeMap<u32, u32> = BTreeMap::new();
        let addresses = env.host_addresses.iter();
        for ip in addresses.filter(|ip| ip.is_ipv6() == v6 && !ip.is_loopback()) {
            let class = layout::address_class(writer.words(), &(*ip).into());
            let source = sources.get(class as usize).copied().unwrap_or(0);
            classes.entry(source).or_insert(class);
        }
        let words: Vec<u32> = classes.into_values().collect();
        let number = word(words.len());
        if number > layout::MAX_LOCAL_CLASSES {
            writer.set(count, layout::LOCAL_UNKNOWN);
        } else if number > 0 {
            let offset = writer.append(&words)?;
            writer.set(at, offset);
            writer.set(count, number);
        }
    }
    Ok(())
}
