//! What the kernel's own maps cost for the same number of keys: the units of the ratios.

use std::io;
use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result};
use enforcer_tests::line_rate::{
    asm::{Asm, Helper, Op, Reg, Size},
    bpf::{Map, MapKind, Program},
};

use super::{
    policies,
    prologue::{Index, number},
};

/// Bytes of the LRU hash's values: what a flow needs.
const VALUE: u32 = 40;

/// A program that does something with a map, and the same one without it.
pub struct Unit {
    pub subject: Program,
    pub baseline: Program,
    _maps: Vec<Map>,
}

/// What a program does with the key that it has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Nothing,
    Look,
    Insert,
}

/// Where the key of an LRU hash comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keys {
    Index(Index),
    /// 64 random bits: never seen before.
    New,
}

/// How many elements an LRU hash gets for `keys` keys: an eighth more, for it begins to evict
/// before it is full, and as many as its hash table has heads.
fn capacity(keys: u32) -> u32 {
    (keys + keys / 8).next_power_of_two().max(1024)
}

/// A hit in an LRU hash among `keys` keys of `key_size` bytes (16 or 40), drawn at random.
pub fn lru_hit(key_size: u32, keys: u32) -> Result<Unit> {
    let map = Map::new(MapKind::LruHash, key_size, VALUE, capacity(keys)).context("an LRU hash")?;
    let (fill, _turn) = lru(key_size, Keys::Index(Index::Turn(keys)), Act::Insert, &map)?;
    fill.run(&[0; 64], keys)?;
    let random = Keys::Index(Index::Random(keys));
    let (subject, _) = lru(key_size, random, Act::Look, &map)?;
    let (baseline, _) = lru(key_size, random, Act::Nothing, &map)?;
    // The program says whether it found its key; half of the keys would make half the unit.
    for _ in 0..64 {
        anyhow::ensure!(subject.run(&[0; 64], 1)?.action == 1, "a key is missing");
    }
    Ok(Unit {
        subject,
        baseline,
        _maps: vec![map],
    })
}

/// An insertion of a new key into a full LRU hash of so many elements.
pub fn lru_insert(key_size: u32, elements: u32) -> Result<Unit> {
    let map = Map::new(MapKind::LruHash, key_size, VALUE, elements).context("an LRU hash")?;
    let (subject, _) = lru(key_size, Keys::New, Act::Insert, &map)?;
    let (baseline, _) = lru(key_size, Keys::New, Act::Nothing, &map)?;
    subject.run(&[0; 64], elements * 2)?;
    Ok(Unit {
        subject,
        baseline,
        _maps: vec![map],
    })
}

fn lru(key_size: u32, keys: Keys, act: Act, map: &Map) -> io::Result<(Program, Option<Map>)> {
    let mut asm = Asm::default();
    let turn = match keys {
        Keys::Index(index) => number(&mut asm, index)?,
        Keys::New => {
            asm.call(Helper::Random);
            asm.reg(Op::Mov, Reg::R9, Reg::R0);
            asm.imm(Op::Shl, Reg::R9, 32);
            asm.call(Helper::Random);
            asm.lower_half(Reg::R0);
            asm.reg(Op::Or, Reg::R9, Reg::R0);
            None
        }
    };
    // The key at the top of the stack, the value below.
    let key = -(key_size as i16);
    let value = key - VALUE as i16;
    asm.reg(Op::Mov, Reg::R1, Reg::R9);
    asm.set(Reg::R2, 0x9e37_79b9_7f4a_7c15);
    asm.reg(Op::Mul, Reg::R1, Reg::R2);
    asm.store(Size::B8, Reg::Fp, key, Reg::R9);
    asm.store(Size::B8, Reg::Fp, key + 8, Reg::R1);
    for at in (key + 16..0).step_by(8) {
        asm.store_imm(Size::B8, Reg::Fp, at, 7);
    }
    for at in (value..key).step_by(8) {
        asm.store_imm(Size::B8, Reg::Fp, at, 1);
    }
    asm.imm(Op::Mov, Reg::R0, 0);
    if act != Act::Nothing {
        asm.map(Reg::R1, map.as_fd());
        asm.reg(Op::Mov, Reg::R2, Reg::Fp);
        asm.imm(Op::Add, Reg::R2, i32::from(key));
        if act == Act::Insert {
            asm.reg(Op::Mov, Reg::R3, Reg::Fp);
            asm.imm(Op::Add, Reg::R3, i32::from(value));
            asm.imm(Op::Mov, Reg::R4, 0);
            asm.call(Helper::MapUpdate);
        } else {
            asm.call(Helper::MapLookup);
            let missing = asm.if_zero(Reg::R0);
            asm.exit_with(1);
            asm.land(missing);
        }
    }
    asm.exit();
    Ok((Program::load(&asm.finish())?, turn))
}

/// Two look-ups, of a source and a destination, in an LPM trie of a policy's members.
pub fn lpm(size: policies::Size) -> Result<Unit> {
    let key_size = if size.v6 { 20 } else { 8 };
    let map =
        Map::new(MapKind::LpmTrie, key_size, 8, size.members as u32).context("an LPM trie")?;
    let mut keys = vec![];
    for index in 0..size.members {
        let host = !policies::is_prefix(index);
        let length: u32 = match (size.v6, host) {
            (false, true) => 32,
            (false, false) => 24,
            (true, true) => 128,
            (true, false) => 64,
        };
        keys.extend(length.to_ne_bytes());
        if size.v6 {
            keys.extend(policies::member6(index).octets());
        } else {
            keys.extend(policies::member4(index).octets());
        }
    }
    let values = vec![1; size.members * 8];
    map.update_all(&keys, &values, size.members as u32)
        .context("fill an LPM trie")?;
    let subject = lpm_program(size, Some(&map))?;
    let baseline = lpm_program(size, None)?;
    for _ in 0..64 {
        anyhow::ensure!(subject.run(&[0; 64], 1)?.action == 1, "a prefix is missing");
    }
    Ok(Unit {
        subject,
        baseline,
        _maps: vec![map],
    })
}

fn lpm_program(size: policies::Size, map: Option<&Map>) -> io::Result<Program> {
    let mut asm = Asm::default();
    let key: i16 = if size.v6 { -24 } else { -8 };
    let mut missing = vec![];
    for _ in 0..2 {
        number(&mut asm, Index::Random(size.members as u32))?;
        asm.imm(Op::Mul, Reg::R9, policies::STEP.cast_signed());
        asm.store_imm(Size::B4, Reg::Fp, key, if size.v6 { 128 } else { 32 });
        if size.v6 {
            asm.set(Reg::R2, policies::MEMBERS6);
            asm.reg(Op::Add, Reg::R9, Reg::R2);
            asm.to_network(Reg::R9, Size::B8);
            // An odd place for eight bytes.
            asm.store(Size::B4, Reg::Fp, key + 4, Reg::R9);
            asm.imm(Op::Shr, Reg::R9, 32);
            asm.store(Size::B4, Reg::Fp, key + 8, Reg::R9);
            asm.store_imm(Size::B4, Reg::Fp, key + 12, 0);
            asm.store_imm(Size::B4, Reg::Fp, key + 16, 5u32.to_be().cast_signed());
        } else {
            asm.imm(Op::Add, Reg::R9, policies::MEMBERS4.cast_signed());
            asm.to_network(Reg::R9, Size::B4);
            asm.store(Size::B4, Reg::Fp, key + 4, Reg::R9);
        }
        if let Some(map) = map {
            asm.map(Reg::R1, map.as_fd());
            asm.reg(Op::Mov, Reg::R2, Reg::Fp);
            asm.imm(Op::Add, Reg::R2, i32::from(key));
            asm.call(Helper::MapLookup);
            missing.push(asm.if_zero(Reg::R0));
        }
    }
    asm.exit_with(1);
    if !missing.is_empty() {
        for jump in missing {
            asm.land(jump);
        }
        asm.exit_with(0);
    }
    Program::load(&asm.finish())
}

/// A program that does nothing.
pub fn empty() -> io::Result<Program> {
    let mut asm = Asm::default();
    asm.exit_with(0);
    Program::load(&asm.finish())
}
