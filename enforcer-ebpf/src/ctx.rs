//! Reads from a packet: the only place that touches packet bytes.

use core::mem::MaybeUninit;

use aya_ebpf::{
    helpers::generated::{bpf_skb_load_bytes, bpf_skb_load_bytes_relative},
    programs::TcContext,
};
use enforcer_common::{
    packet::{Bytes, Link},
    swift::Window,
    wire::{INTERFACE_L3, vlan_key},
};

use crate::maps;

/// A packet at a TC hook.
pub struct Skb(pub TcContext);

impl Bytes for Skb {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes exactly N bytes or fails; it reads fragments of non-linear
        // packets as well, so headers need not be in the linear part.
        let status = unsafe {
            bpf_skb_load_bytes(
                self.0.skb.skb.cast(),
                offset,
                bytes.as_mut_ptr().cast(),
                N as u32,
            )
        };
        if status == 0 {
            // SAFETY: the helper succeeded, so all N bytes are written.
            Some(unsafe { bytes.assume_init() })
        } else {
            None
        }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.0.skb.len()
    }
}

/// The linear part of a frame that begins with an Ethernet header.
pub struct Front {
    data: *const u8,
    end: *const u8,
    length: u32,
}

impl Front {
    /// `None` where the frame has a tag in its metadata, or is the host's own, looped back.
    #[inline(always)]
    pub fn of(ctx: &TcContext) -> Option<Self> {
        let skb = ctx.skb.skb;
        // SAFETY: loads from the context, which the verifier checks field by field.
        let (tagged, kind, length) = unsafe { ((*skb).vlan_present, (*skb).pkt_type, (*skb).len) };
        if tagged != 0 || kind == PACKET_LOOPBACK {
            return None;
        }
        Some(Self {
            data: ctx.data() as *const u8,
            end: ctx.data_end() as *const u8,
            length,
        })
    }
}

/// A load at any alignment: the kernel takes the program only where the processor can.
macro_rules! load {
    ($size:literal, $from:expr) => {{
        let value: u64;
        // SAFETY: within what `holds` has checked, or the verifier refuses the program.
        unsafe {
            core::arch::asm!(
                concat!("{value} = *(", $size, " *)({from} + 0)"),
                value = lateout(reg) value,
                from = in(reg) $from,
                options(pure, readonly),
            );
        }
        value
    }};
}

impl Window for Front {
    #[inline(always)]
    fn holds(&self, bytes: u32) -> bool {
        // SAFETY: no access; the verifier follows this comparison.
        unsafe { self.data.add(bytes as usize) <= self.end }
    }

    #[inline(always)]
    fn byte(&self, at: u32) -> u8 {
        load!("u8", self.data.wrapping_add(at as usize)) as u8
    }

    #[inline(always)]
    fn half(&self, at: u32) -> u16 {
        u16::from_be(load!("u16", self.data.wrapping_add(at as usize)) as u16)
    }

    #[inline(always)]
    fn word(&self, at: u32) -> u32 {
        u32::from_be(load!("u32", self.data.wrapping_add(at as usize)) as u32)
    }

    #[inline(always)]
    fn long(&self, at: u32) -> u64 {
        u64::from_be(load!("u64", self.data.wrapping_add(at as usize)))
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.length
    }
}

/// `skb->pkt_type` of the host's own multicast, looped back (linux/if_packet.h).
const PACKET_LOOPBACK: u32 = 5;

/// Writes what the metadata says of the packet. Whether it is judged on its VLAN device instead.
#[inline(always)]
pub fn link(ctx: &TcContext, ingress: bool, link: &mut Link) -> bool {
    let skb = ctx.skb.skb;
    // SAFETY: loads from the context, which the verifier checks field by field.
    let (ifindex, protocol, tagged, tci, tag, gso, kind) = unsafe {
        (
            (*skb).ifindex,
            (*skb).protocol,
            (*skb).vlan_present,
            (*skb).vlan_tci,
            (*skb).vlan_proto,
            (*skb).gso_size,
            (*skb).pkt_type,
        )
    };
    let interface = maps::interface(ifindex);
    let service_tag = u16::from_be(tag as u16) == 0x88a8;
    // The copy goes back before it gets a link header (`dev_loopback_xmit`).
    let looped = ingress && kind == PACKET_LOOPBACK;
    let elsewhere =
        tagged != 0 && maps::judged_on_vlan_device(vlan_key(ifindex, service_tag, tci as u16));
    *link = Link {
        ethernet: interface.flags & INTERFACE_L3 == 0 && !looped,
        protocol: u16::from_be(protocol as u16),
        vlan: if tagged != 0 { Some(tci as u16) } else { None },
        ingress,
        ifindex,
        slot: interface.slot,
        gso: gso != 0,
        looped,
    };
    elsewhere
}

/// `BPF_HDR_START_NET` (linux/bpf.h).
const FROM_NETWORK_HEADER: u32 = 1;

/// Whether a packet of a link without Ethernet header begins elsewhere than with its network
/// header: multipoint GRE leaves the outer header in front, XFRM interfaces an Ethernet header.
/// What would be read there is not what is delivered.
#[inline(always)]
pub fn misplaced(ctx: &TcContext) -> bool {
    let mut network = [0u8; 20];
    // SAFETY: the helper writes 20 bytes or zeroes them all and fails.
    let status = unsafe {
        bpf_skb_load_bytes_relative(
            ctx.skb.skb.cast(),
            0,
            network.as_mut_ptr().cast(),
            20,
            FROM_NETWORK_HEADER,
        )
    };
    let start: Option<[u8; 20]> = Skb(TcContext::new(ctx.skb.skb)).read(0);
    // Too short for IP: the parser says so.
    status == 0 && start.is_some_and(|start| start != network)
}
