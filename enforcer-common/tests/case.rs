//! Which packets count as one denial.

use enforcer_common::{
    case::Case,
    packet::{Kind, Tuple},
    verdict::Hook,
    wire::{DeniedSlot, Event, Process},
};

fn tuple(v6: bool) -> Tuple {
    let upper = if v6 { [1, 2, 3] } else { [0; 3] };
    let address = |last| [upper[0], upper[1], upper[2], last];
    Tuple {
        source: address(0x0a01_0002),
        destination: address(0x0a02_0003),
        source_port: 40_000,
        destination_port: 5_432,
        protocol: 6,
        v6,
        kind: Kind::Tcp,
        tcp_flags: 2,
        selector: 5_432,
    }
}

fn case(tuple: &Tuple) -> Case {
    let (ethertype, family) = if tuple.v6 { (0x86dd, 6) } else { (0x0800, 4) };
    let mut case = Case::new(tuple, ethertype, family, Hook::TcIngress, 7);
    case.generation = 11;
    case.ifindex = 12;
    case
}

/// The slot that counts packets like this one.
fn slot(case: &Case) -> DeniedSlot {
    DeniedSlot {
        epoch: 1,
        epoch_end: 1,
        emitted_at: 7,
        pending: 0,
        pending_lost: 0,
        event: Event {
            time: 1,
            total: 1,
            cookie: 0,
            process: Process {
                cgroup: 0,
                pid: 0,
                uid: 0,
                comm: [0; 16],
            },
            source: case.source,
            destination: case.destination,
            rule: 1,
            segment: 2,
            generation: case.generation,
            ifindex: case.ifindex,
            slot: 3,
            cpu: 0,
            epoch: 1,
            source_port: case.source_port(),
            destination_port: case.destination_port(),
            selector: case.selector(),
            ethertype: case.ethertype(),
            protocol: case.protocol(),
            family: case.family(),
            hook: case.hook as u8,
            outcome: 0,
            reason: 0,
            tcp_flags: case.tcp_flags(),
            lasting: 1,
            reserved: [0; 5],
        },
    }
}

#[test]
fn a_packet_is_counted_with_its_like_alone() {
    for v6 in [false, true] {
        let here = tuple(v6);
        let packet = case(&here);
        let counted = slot(&packet);
        assert!(packet.is_in(&counted));
        let mut others = vec![];
        let mut other = |change: &dyn Fn(&mut Tuple)| {
            let mut tuple = here;
            change(&mut tuple);
            others.push(case(&tuple));
        };
        for word in if v6 { 0..4 } else { 3..4 } {
            other(&|t| t.source[word] ^= 1 << 31);
            other(&|t| t.destination[word] ^= 1);
        }
        other(&|t| (t.source, t.destination) = (t.destination, t.source));
        other(&|t| t.source_port += 1);
        other(&|t| t.destination_port += 1);
        other(&|t| {
            (t.source_port, t.destination_port) = (t.destination_port, t.source_port);
        });
        other(&|t| t.selector += 1);
        other(&|t| t.protocol = 17);
        let changes: [fn(&mut Case); 5] = [
            |c| c.generation += 1,
            |c| c.ifindex += 1,
            |c| c.hook = Hook::TcEgress as u32,
            |c| c.shape ^= 1 << 16,
            |c| c.shape ^= 2 << 8,
        ];
        for change in changes {
            let mut other = packet;
            change(&mut other);
            others.push(other);
        }
        for other in others {
            assert!(!other.is_in(&counted), "{other:?}");
        }
        let unused = DeniedSlot {
            epoch_end: 0,
            ..counted
        };
        assert!(!packet.is_in(&unused));
    }
}
