//! The kernel's atomic instructions (since 5.12) on 64-bit words of map values.
//!
//! `core::sync::atomic` offers only loads and stores on this target, and the compiler's own intrinsics change between
//! nightlies; the assembler's syntax does not.

use core::arch::asm;

/// Adds without looking at the result.
///
/// # Safety
/// `word` points into a map value and is aligned.
#[inline(always)]
pub unsafe fn add(word: *mut u64, value: u64) {
    // SAFETY: one instruction on the caller's word.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) word, in(reg) value) }
}

/// Adds and returns what was there before.
///
/// # Safety
/// As for [`add`].
#[inline(always)]
pub unsafe fn fetch_add(word: *mut u64, mut value: u64) -> u64 {
    // SAFETY: as in `add`.
    unsafe { asm!("{1} = atomic_fetch_add((u64 *)({0} + 0), {1})", in(reg) word, inout(reg) value) }
    value
}

/// Sets bits without looking at the result.
///
/// # Safety
/// As for [`add`].
#[inline(always)]
pub unsafe fn or(word: *mut u64, bits: u64) {
    // SAFETY: as in `add`.
    unsafe { asm!("lock *(u64 *)({0} + 0) |= {1}", in(reg) word, in(reg) bits) }
}

/// Replaces `expected` by `value`; returns what was there before.
///
/// # Safety
/// As for [`add`].
#[inline(always)]
pub unsafe fn replace(word: *mut u64, expected: u64, value: u64) -> u64 {
    let mut held = expected;
    // SAFETY: as in `add`; the instruction compares with r0 and leaves what it found there.
    unsafe { asm!("r0 = cmpxchg_64({0} + 0, r0, {1})", in(reg) word, in(reg) value, inout("r0") held) }
    held
}

/// Reads.
///
/// # Safety
/// As for [`add`].
#[inline(always)]
pub unsafe fn load(word: *const u64) -> u64 {
    // SAFETY: an aligned word is read in one piece.
    unsafe { word.read_volatile() }
}

/// Writes.
///
/// # Safety
/// As for [`add`].
#[inline(always)]
pub unsafe fn store(word: *mut u64, value: u64) {
    // SAFETY: an aligned word is written in one piece.
    unsafe { word.write_volatile(value) }
}

/// Hides from the compiler what it knows about a number, so that it leaves in the comparison that the verifier needs.
#[inline(always)]
pub fn opaque(mut number: u64) -> u64 {
    // SAFETY: one move of a register to itself; without an instruction the line information would be refused.
    unsafe { asm!("{0} = {0}", inout(reg) number) }
    number
}
