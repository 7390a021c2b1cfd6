//! What a daemon has in the kernel: entries of its maps, links of its programs; and what it takes.

use std::{collections::BTreeSet, fs};

use aya::{
    maps::{Array, HashMap, Map, MapData},
    programs::{SchedClassifier, TcAttachType, loaded_links},
};
use enforcer_common::wire::Interface;

use crate::netns::Netns;

/// A process that holds maps.
#[derive(Clone, Copy, Debug)]
pub struct Inside(pub u32);

impl Inside {
    /// The map of this name that the process has open.
    fn map(self, name: &str) -> MapData {
        let files = fs::read_dir(format!("/proc/{}/fdinfo", self.0)).unwrap();
        let numbers: BTreeSet<u32> = files
            // Others are closed while this looks.
            .filter_map(|file| fs::read_to_string(file.unwrap().path()).ok())
            .filter_map(|text| {
                let number = text.lines().find_map(|l| l.strip_prefix("map_id:"))?;
                number.trim().parse().ok()
            })
            .collect();
        let mut maps = numbers
            .into_iter()
            .filter_map(|number| MapData::from_id(number).ok());
        let named = maps.find(|map| map.info().unwrap().name_as_str() == Some(name));
        named.unwrap_or_else(|| panic!("no map {name}"))
    }

    /// Numbers of interfaces that the programs know: by `INTERFACES`, and by `ETHERNET`.
    pub fn interfaces(self) -> [BTreeSet<u32>; 2] {
        let map = Map::HashMap(self.map("INTERFACES"));
        let all: HashMap<_, u32, Interface> = map.try_into().unwrap();
        let map = Map::Array(self.map("ETHERNET"));
        let ethernet: Array<_, [u32; 2]> = map.try_into().unwrap();
        let quick = ethernet.iter().map(|element| element.unwrap()[0]);
        [
            all.keys().map(Result::unwrap).collect(),
            quick.filter(|ifindex| *ifindex != 0).collect(),
        ]
    }

    /// Number of tags that are left to VLAN devices.
    pub fn tags(self) -> usize {
        let map = Map::HashMap(self.map("VLANS"));
        let all: HashMap<_, u64, u32> = map.try_into().unwrap();
        all.keys().map(Result::unwrap).count()
    }

    /// Open descriptors.
    pub fn descriptors(self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.0))
            .unwrap()
            .count()
    }

    /// Memory in KiB.
    pub fn memory(self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0)).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let number = line.unwrap().trim().trim_end_matches(" kB");
        number.parse().unwrap()
    }
}

/// Programs on the tcx hooks of an interface, by number.
pub fn hanging(namespace: &Netns, interface: &str) -> [Vec<u32>; 2] {
    [TcAttachType::Ingress, TcAttachType::Egress].map(|direction| {
        namespace.enter(|| {
            let (_, programs) = SchedClassifier::query_tcx(interface, direction).unwrap();
            programs
                .iter()
                .map(aya::programs::ProgramInfo::id)
                .collect()
        })
    })
}

/// How many links of these programs there are, wherever they lead.
pub fn links_of(programs: &BTreeSet<u32>) -> usize {
    loaded_links()
        // Others end while this looks.
        .filter_map(Result::ok)
        .filter(|link| programs.contains(&link.program_id()))
        .count()
}
