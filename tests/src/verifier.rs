//! What the verifier says about a program that it takes: the statistics of its log, which aya
//! keeps only for programs that are refused.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::CStr,
    io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use aya::{EbpfLoader, maps::Map};
use aya_obj::{
    Function, Object, ProgramSection, btf::BtfFeatures, generated::bpf_insn,
    programs::CgroupSockAddrAttachType,
};

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_BTF_LOAD: libc::c_long = 18;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
/// `BPF_LOG_STATS`: the sums only.
const LOG_STATS: u32 = 4;

/// The verifier's work on a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cost {
    pub program: String,
    /// Instructions it went through; no program may take over a million.
    pub instructions: u32,
    /// Bytes of the deepest chain of calls; no program may have over 512.
    pub stack: u32,
}

/// `bpf_attr` of BPF_PROG_LOAD, up to the attach type (linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    reserved: u32,
}

/// Has the verifier go through every program of an object.
pub fn costs(object: &[u8]) -> Vec<Cost> {
    // The maps, and no programs: those are loaded here.
    let ebpf = EbpfLoader::new().load(object).unwrap();
    let mut parsed = Object::parse(object).unwrap();
    let mut fds: HashMap<String, RawFd> = HashMap::new();
    for (name, map) in ebpf.maps() {
        fds.insert(name.to_owned(), fd(map));
    }
    let maps = std::mem::take(&mut parsed.maps);
    let sections = parsed.functions.keys().map(|(section, _)| *section);
    let sections = sections.collect();
    // Every kernel under test knows all of these. Without types, functions that the verifier
    // goes through once each would count as part of each of their callers.
    let features = BtfFeatures::new(true, true, true, true, true, true, true, true);
    let types = parsed.fixup_and_sanitize_btf(&features).unwrap();
    let types = load_btf(&types.expect("objects have types").to_bytes()).unwrap();
    let known = maps.iter().filter_map(|(name, map)| {
        let fd = fds.get(name)?;
        Some((name.as_str(), *fd, map))
    });
    parsed.relocate_maps(known, &sections).unwrap();
    parsed.relocate_calls(&sections).unwrap();
    let mut costs: Vec<Cost> = parsed
        .programs
        .iter()
        .map(|(name, program)| {
            let function = &parsed.functions[&program.function_key()];
            let (kind, attach) = kind(&program.section);
            let log = load(kind, attach, &program.license, function, &types)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            cost(name, &log, &calls(&function.instructions))
                .unwrap_or_else(|| panic!("{name}: {log}"))
        })
        .collect();
    costs.sort_by(|a, b| a.program.cmp(&b.program));
    costs
}

/// Program and attach type (linux/bpf.h).
fn kind(section: &ProgramSection) -> (u32, u32) {
    use CgroupSockAddrAttachType as Attach;
    match section {
        ProgramSection::SchedClassifier => (BPF_PROG_TYPE_SCHED_CLS, 0),
        ProgramSection::CgroupSockAddr { attach_type } => {
            let attach = match attach_type {
                Attach::Bind4 => 8,
                Attach::Bind6 => 9,
                Attach::Connect4 => 10,
                Attach::Connect6 => 11,
                Attach::UDPSendMsg4 => 14,
                Attach::UDPSendMsg6 => 15,
                Attach::UDPRecvMsg4 => 19,
                Attach::UDPRecvMsg6 => 20,
                other => panic!("a program at {other:?}"),
            };
            (BPF_PROG_TYPE_CGROUP_SOCK_ADDR, attach)
        }
        other => panic!("a program of section {other:?}"),
    }
}

fn fd(map: &Map) -> RawFd {
    match map {
        Map::Array(data)
        | Map::ArrayOfMaps(data)
        | Map::HashMap(data)
        | Map::HashOfMaps(data)
        | Map::LpmTrie(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::PerCpuHashMap(data)
        | Map::PerCpuLruHashMap(data)
        | Map::PerfEventArray(data)
        | Map::ProgramArray(data)
        | Map::RingBuf(data)
        | Map::SkStorage(data)
        | Map::Unsupported(data) => data.fd().as_fd().as_raw_fd(),
        other => panic!("a map of another kind: {other:?}"),
    }
}

/// Loads the object's types.
fn load_btf(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut attr = [0u64; 4];
    attr[0] = bytes.as_ptr() as u64;
    attr[2] = bytes.len() as u64;
    // SAFETY: `btf`, no log, `btf_size`: the kernel reads as many bytes as there are.
    let fd = unsafe {
        let size = size_of_val(&attr);
        libc::syscall(libc::SYS_bpf, BPF_BTF_LOAD, &raw mut attr, size)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel gave it to us just now.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Loads a program, throws it away, and returns the verifier's log.
fn load(
    kind: u32,
    attach: u32,
    license: &CStr,
    function: &Function,
    types: &OwnedFd,
) -> io::Result<String> {
    let instructions = &function.instructions;
    let functions = &function.func_info.func_info;
    let mut log = vec![0u8; 1 << 16];
    let mut attr = LoadAttr {
        prog_type: kind,
        insn_cnt: instructions.len() as u32,
        insns: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: LOG_STATS,
        log_size: log.len() as u32,
        log_buf: log.as_mut_ptr() as u64,
        expected_attach_type: attach,
        prog_btf_fd: types.as_raw_fd() as u32,
        func_info_rec_size: function.func_info_rec_size as u32,
        func_info: functions.as_ptr() as u64,
        func_info_cnt: functions.len() as u32,
        ..LoadAttr::default()
    };
    // SAFETY: all addresses in `attr` are of live buffers of the lengths it states, and the
    // kernel writes to the log alone.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw mut attr,
            size_of::<LoadAttr>(),
        )
    };
    let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
    let text = String::from_utf8_lossy(&log[..end]).into_owned();
    if fd < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::other(format!("{error}: {text}")));
    }
    // SAFETY: the kernel gave it to us just now.
    drop(unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
    Ok(text)
}

/// Reads `processed N insns …` and `stack depth A+B+…`, the depths of the program and of each of
/// its subprograms.
fn cost(program: &str, log: &str, calls: &Calls) -> Option<Cost> {
    let after = |words: &str| log.split_once(words).map(|(_, rest)| rest);
    let instructions = after("processed ")?.split(' ').next()?.parse().ok()?;
    let depths = after("stack depth ")?.lines().next()?;
    let depths: Vec<u32> = depths
        .trim()
        .split('+')
        .map(|depth| depth.parse().ok())
        .collect::<Option<_>>()?;
    (depths.len() == calls.len()).then(|| Cost {
        program: program.to_owned(),
        instructions,
        stack: deepest(0, &depths, calls),
    })
}

/// Which subprograms each subprogram calls, in the order of their places.
type Calls = Vec<BTreeSet<usize>>;

fn calls(instructions: &[bpf_insn]) -> Calls {
    const CALL: u8 = 0x85;
    const LOAD_ADDRESS: u8 = 0x18;
    const PSEUDO_CALL: u8 = 1;
    const PSEUDO_FUNC: u8 = 4;
    let targets = instructions.iter().enumerate().filter_map(|(at, i)| {
        let is_call = matches!(
            (i.code, i.src_reg()),
            (CALL, PSEUDO_CALL) | (LOAD_ADDRESS, PSEUDO_FUNC)
        );
        let target = i64::try_from(at).ok()? + 1 + i64::from(i.imm);
        is_call.then_some((at, usize::try_from(target).ok()?))
    });
    let targets: Vec<(usize, usize)> = targets.collect();
    let starts: BTreeSet<usize> = targets.iter().map(|(_, to)| *to).chain([0]).collect();
    let number = |at: usize| starts.range(..=at).count() - 1;
    let mut calls = vec![BTreeSet::new(); starts.len()];
    for (at, to) in targets {
        calls[number(at)].insert(number(to));
    }
    calls
}

/// Bytes of the deepest chain of calls from a subprogram, each rounded as Linux 6.1 does.
fn deepest(subprogram: usize, depths: &[u32], calls: &Calls) -> u32 {
    let called = calls[subprogram].iter();
    let below = called.map(|to| deepest(*to, depths, calls)).max();
    depths[subprogram].max(1).next_multiple_of(32) + below.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_read() {
        let log = "verification time 4711 usec\nstack depth 96+0+40\nprocessed 1234 insns (limit \
                   1000000) max_states_per_insn 4 total_states 90 peak_states 90 mark_read 3\n";
        let none = BTreeSet::new;
        // One calls both; or the first calls the second, which calls the third.
        let both = vec![BTreeSet::from([1, 2]), none(), none()];
        let chain = vec![BTreeSet::from([1]), BTreeSet::from([2]), none()];
        for (calls, stack) in [(both, 96 + 64), (chain, 96 + 32 + 64)] {
            let got = cost("p", log, &calls).unwrap();
            assert_eq!((got.instructions, got.stack), (1234, stack));
        }
        assert!(cost("p", log, &vec![none()]).is_none(), "another program");
        assert!(cost("p", "", &vec![none()]).is_none());
    }

    #[test]
    fn calls_are_found_in_the_code() {
        let call = |imm| {
            let mut i = bpf_insn {
                code: 0x85,
                _bitfield_align_1: [],
                _bitfield_1: bpf_insn::new_bitfield_1(0, 1),
                off: 0,
                imm,
            };
            i.set_src_reg(1);
            i
        };
        let mut exit = call(0);
        exit.code = 0x95;
        // 0: call 3, 1: call 4, 2: exit, 3: call 4, 4: exit
        let code = [call(2), call(2), exit, call(0), exit];
        let want = vec![BTreeSet::from([1, 2]), BTreeSet::from([2]), BTreeSet::new()];
        assert_eq!(calls(&code), want);
    }
}
