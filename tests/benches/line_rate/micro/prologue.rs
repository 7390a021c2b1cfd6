//! Programs that rewrite the packet and go on into another program: that is how a deployed program
//! sees many flows in one BPF_PROG_TEST_RUN, which repeats one frame.
//!
//! A tail call, so the program behind it is the very one that is deployed. Checksums are left
//! wrong: nothing behind reads them.

use std::{collections::BTreeSet, io, os::fd::AsFd as _};

use enforcer_tests::line_rate::{
    asm::{Asm, Helper, Op, Reg, Size},
    bpf::{Map, MapKind, Program},
};

/// Where numbers come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Index {
    /// Any below this.
    Random(u32),
    /// Each below this in turn, again and again.
    Turn(u32),
}

/// A field of the packet that follows a number.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Offset in the frame.
    pub at: i16,
    /// How many bytes, in network order.
    pub size: Size,
    /// The value of number 0.
    pub base: u64,
    /// Low bits of the number that are left out.
    pub shift: i32,
    /// Of what is then left, the bits that count.
    pub mask: u32,
    /// What each one adds.
    pub step: i32,
}

/// A number, and the fields that follow it.
#[derive(Clone, Debug)]
pub struct Draw {
    pub index: Index,
    pub fields: Vec<Field>,
}

/// What a prologue returns when it could not call on.
const NOT_CALLED: i32 = -99;

/// `struct __sk_buff`.
const DATA: i16 = 76;
const DATA_END: i16 = 80;

/// A prologue and what it needs.
pub struct Prologue {
    pub program: Program,
    _maps: Vec<Map>,
}

impl Prologue {
    /// One for a frame, in front of `target`.
    ///
    /// # Errors
    /// Also when it does not do what it is for.
    pub fn new(frame: &[u8], draws: &[Draw], target: &Program) -> anyhow::Result<Self> {
        let targets = Map::new(MapKind::ProgArray, 4, 4, 1)?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&target.as_fd());
        targets.update(&0u32.to_ne_bytes(), &fd.to_ne_bytes())?;
        let mut maps = vec![];
        let mut asm = Asm::default();
        asm.reg(Op::Mov, Reg::R6, Reg::R1);
        asm.load(Size::B4, Reg::R7, Reg::R6, DATA);
        asm.load(Size::B4, Reg::R8, Reg::R6, DATA_END);
        asm.reg(Op::Mov, Reg::R1, Reg::R7);
        asm.imm(Op::Add, Reg::R1, frame.len() as i32);
        let short = asm.if_above(Reg::R1, Reg::R8);
        for draw in draws {
            maps.extend(number(&mut asm, draw.index)?);
            for field in &draw.fields {
                asm.reg(Op::Mov, Reg::R1, Reg::R9);
                asm.imm(Op::Shr, Reg::R1, field.shift);
                asm.imm(Op::And, Reg::R1, field.mask.cast_signed());
                asm.imm(Op::Mul, Reg::R1, field.step);
                asm.set(Reg::R2, field.base);
                asm.reg(Op::Add, Reg::R1, Reg::R2);
                asm.to_network(Reg::R1, field.size);
                asm.store(field.size, Reg::R7, field.at, Reg::R1);
            }
        }
        asm.reg(Op::Mov, Reg::R1, Reg::R6);
        asm.map(Reg::R2, targets.as_fd());
        asm.imm(Op::Mov, Reg::R3, 0);
        asm.call(Helper::TailCall);
        asm.land(short);
        asm.exit_with(NOT_CALLED);
        maps.push(targets);
        let this = Self {
            program: Program::load(&asm.finish())?,
            _maps: maps,
        };
        this.check(frame, draws)?;
        Ok(this)
    }

    /// It calls on, and the packets differ: else a hot flow would be taken for many.
    fn check(&self, frame: &[u8], draws: &[Draw]) -> anyhow::Result<()> {
        const RUNS: usize = 16;
        let action = self.program.run(frame, 1)?.action;
        anyhow::ensure!(action != NOT_CALLED, "a prologue did not call on");
        let seen: io::Result<BTreeSet<_>> =
            (0..RUNS).map(|_| self.program.rewrite(frame)).collect();
        let widest = draws.iter().map(|draw| match draw.index {
            Index::Random(below) | Index::Turn(below) => below,
        });
        // Sixteen draws of ten numbers are never all the same, and of a thousand mostly differ.
        let least = match widest.max() {
            Some(1_000..) => RUNS / 2,
            Some(10..) => 2,
            Some(_) | None => 1,
        };
        let seen = seen?.len();
        anyhow::ensure!(seen >= least, "a prologue makes {seen} packets of {RUNS}");
        Ok(())
    }
}

/// Puts a number into R9, and returns the map that it needs. Spoils R0 to R5.
pub fn number(asm: &mut Asm, index: Index) -> io::Result<Option<Map>> {
    match index {
        Index::Random(below) => {
            asm.call(Helper::Random);
            asm.reg(Op::Mov, Reg::R9, Reg::R0);
            asm.lower_half(Reg::R9);
            // The upper half of the product, and no division.
            asm.imm(Op::Mul, Reg::R9, below.cast_signed());
            asm.imm(Op::Shr, Reg::R9, 32);
            Ok(None)
        }
        Index::Turn(below) => {
            let map = Map::new(MapKind::Array, 4, 8, 1)?;
            asm.store_imm(Size::B4, Reg::Fp, -4, 0);
            asm.map(Reg::R1, map.as_fd());
            asm.reg(Op::Mov, Reg::R2, Reg::Fp);
            asm.imm(Op::Add, Reg::R2, -4);
            asm.call(Helper::MapLookup);
            asm.imm(Op::Mov, Reg::R9, 0);
            let none = asm.if_zero(Reg::R0);
            asm.load(Size::B8, Reg::R9, Reg::R0, 0);
            asm.reg(Op::Mov, Reg::R1, Reg::R9);
            asm.imm(Op::Add, Reg::R1, 1);
            asm.store(Size::B8, Reg::R0, 0, Reg::R1);
            asm.imm(Op::Mod, Reg::R9, below.cast_signed());
            asm.land(none);
            Ok(Some(map))
        }
    }
}
