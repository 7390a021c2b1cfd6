//! An assembler for small BPF programs: as much of one as the programs need that the bench compares
//! with, or puts in front of the deployed ones.

use std::os::fd::{AsRawFd as _, BorrowedFd};

/// A register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    /// The frame pointer; the stack is below.
    Fp,
}

/// How many bytes a load or store moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    B2,
    B4,
    B8,
}

impl Size {
    fn bits(self) -> u8 {
        match self {
            Self::B4 => 0x00,
            Self::B2 => 0x08,
            Self::B8 => 0x18,
        }
    }
}

/// 64-bit arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Add = 0x00,
    Mul = 0x20,
    Or = 0x40,
    And = 0x50,
    Shl = 0x60,
    Shr = 0x70,
    Mod = 0x90,
    Xor = 0xa0,
    Mov = 0xb0,
}

/// Helpers of the kernel, by their numbers (linux/bpf.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Helper {
    MapLookup = 1,
    MapUpdate = 2,
    Random = 7,
    TailCall = 12,
}

/// A place to jump to that is not written yet.
#[derive(Debug)]
#[must_use = "a jump without a landing is no program"]
pub struct Jump(usize);

/// A program in the making.
#[derive(Debug, Default)]
pub struct Asm {
    code: Vec<u64>,
}

impl Asm {
    /// The instructions.
    pub fn finish(self) -> Vec<u64> {
        self.code
    }

    fn push(&mut self, code: u8, dst: Reg, src: u8, offset: i16, imm: i32) {
        let word = u64::from(code)
            | (dst as u64) << 8
            | u64::from(src) << 12
            | u64::from(offset.cast_unsigned()) << 16
            | u64::from(imm.cast_unsigned()) << 32;
        self.code.push(word);
    }

    /// `dst op= src`.
    pub fn reg(&mut self, op: Op, dst: Reg, src: Reg) {
        self.push(op as u8 | 0x0f, dst, src as u8, 0, 0);
    }

    /// `dst op= imm`, sign-extended.
    pub fn imm(&mut self, op: Op, dst: Reg, imm: i32) {
        self.push(op as u8 | 0x07, dst, 0, 0, imm);
    }

    /// The lower half of `dst` alone.
    pub fn lower_half(&mut self, dst: Reg) {
        self.push(0xbc, dst, dst as u8, 0, 0);
    }

    /// `dst = value`.
    pub fn set(&mut self, dst: Reg, value: u64) {
        self.push(0x18, dst, 0, 0, (value as u32).cast_signed());
        self.push(0, Reg::R0, 0, 0, ((value >> 32) as u32).cast_signed());
    }

    /// `dst = the map`.
    pub fn map(&mut self, dst: Reg, map: BorrowedFd<'_>) {
        const PSEUDO_MAP_FD: u8 = 1;
        self.push(0x18, dst, PSEUDO_MAP_FD, 0, map.as_raw_fd());
        self.push(0, Reg::R0, 0, 0, 0);
    }

    /// The lowest bits of `dst` in network order.
    pub fn to_network(&mut self, dst: Reg, size: Size) {
        let bits = match size {
            Size::B2 => 16,
            Size::B4 => 32,
            Size::B8 => 64,
        };
        self.push(0xdc, dst, 0, 0, bits);
    }

    /// `dst = *(src + offset)`.
    pub fn load(&mut self, size: Size, dst: Reg, src: Reg, offset: i16) {
        self.push(0x61 | size.bits(), dst, src as u8, offset, 0);
    }

    /// `*(dst + offset) = src`.
    pub fn store(&mut self, size: Size, dst: Reg, offset: i16, src: Reg) {
        self.push(0x63 | size.bits(), dst, src as u8, offset, 0);
    }

    /// `*(dst + offset) = imm`.
    pub fn store_imm(&mut self, size: Size, dst: Reg, offset: i16, imm: i32) {
        self.push(0x62 | size.bits(), dst, 0, offset, imm);
    }

    /// Calls a helper: arguments in R1 to R5, the result in R0.
    pub fn call(&mut self, helper: Helper) {
        self.push(0x85, Reg::R0, 0, 0, helper as i32);
    }

    /// Jumps if `dst == 0`.
    pub fn if_zero(&mut self, dst: Reg) -> Jump {
        self.push(0x15, dst, 0, 0, 0);
        Jump(self.code.len() - 1)
    }

    /// Jumps if `dst > src`.
    pub fn if_above(&mut self, dst: Reg, src: Reg) -> Jump {
        self.push(0x2d, dst, src as u8, 0, 0);
        Jump(self.code.len() - 1)
    }

    /// Where the jump goes: here.
    pub fn land(&mut self, jump: Jump) {
        let distance = self.code.len() - jump.0 - 1;
        let distance = i16::try_from(distance).expect("programs here are short");
        self.code[jump.0] |= u64::from(distance.cast_unsigned()) << 16;
    }

    /// Ends the program with R0.
    pub fn exit(&mut self) {
        self.push(0x95, Reg::R0, 0, 0, 0);
    }

    /// Ends the program with a number.
    pub fn exit_with(&mut self, result: i32) {
        self.imm(Op::Mov, Reg::R0, result);
        self.exit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_as_the_kernel_reads_them() {
        let mut asm = Asm::default();
        asm.imm(Op::Mov, Reg::R0, -1);
        let jump = asm.if_zero(Reg::R0);
        asm.store(Size::B4, Reg::R7, 26, Reg::R1);
        asm.land(jump);
        asm.exit();
        let bytes: Vec<[u8; 8]> = asm.finish().into_iter().map(u64::to_le_bytes).collect();
        let want = [
            [0xb7, 0x00, 0, 0, 0xff, 0xff, 0xff, 0xff],
            [0x15, 0x00, 1, 0, 0, 0, 0, 0],
            [0x63, 0x17, 26, 0, 0, 0, 0, 0],
            [0x95, 0, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!(bytes, want);
    }
}
