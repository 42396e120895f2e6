//! Operands of a product, packed: converted to the instruction set's element, with the [`Isa::KU`] terms of a word side by side.
//!
//! ```text
//! right panel  [word][NR columns][KU]     Q and K, by columns; one panel after the other
//! left, rows   [row][word][KU]            where the terms of a row lie side by side in the source
//! left, steps  [word][row][KU]            where the rows do
//! ```
//! What fills the last word, the last panel and the last rows is zero: it adds nothing, and its own sums are dropped.

use crate::cpu::{Isa, Vectorized};
use crate::problem::Floats;
use half::{bf16, f16};
use std::ops::Range;

/// How an operand's index becomes an offset: `stride` times the index, or times what a list has at that index.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Axis<'a> {
    pub stride: usize,
    pub gather: Option<&'a [usize]>,
}

impl Axis<'_> {
    #[inline(always)]
    fn offset(&self, i: usize) -> usize {
        self.stride * self.gather.map_or(i, |list| list[i])
    }

    fn is_contiguous(&self) -> bool {
        self.stride == 1 && self.gather.is_none()
    }
}

/// A matrix to multiply: element (i, p) lies at `outer(i) + depth(p)`. One of the two axes is contiguous.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand<'a> {
    pub data: Floats<'a>,
    pub outer: Axis<'a>,
    pub depth: Axis<'a>,
}

/// How the rows of a left operand lie in a buffer, in elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Strides {
    /// From row to row.
    pub row: usize,
    /// From word to word.
    pub step: usize,
}

/// Elements between rows, beyond their own, so that rows of 4096 bytes do not compete for the same cache lines.
pub(crate) const APART: usize = 32;

/// Packs `outer` × `terms` as a left operand, its rows filled up to a multiple of MR. Returns how it lies in `out`.
pub(crate) struct PackLeft<'a, P> {
    pub x: &'a Operand<'a>,
    pub outer: Range<usize>,
    pub terms: Range<usize>,
    pub out: &'a mut Vec<P>,
}

impl<I: Isa> Vectorized<I, Strides> for PackLeft<'_, I::Packed> {
    #[inline(always)]
    fn run(self) -> Strides {
        let Self { x, outer, terms, out } = self;
        let rows = outer.len().next_multiple_of(I::MR);
        let words = terms.len().div_ceil(I::KU);
        if x.outer.is_contiguous() {
            pack_words::<I, I::Packed>(x, outer, terms, rows, grow(out, words * rows * I::KU));
            return Strides { row: I::KU, step: rows * I::KU };
        }
        let strides = Strides { row: words * I::KU + APART, step: I::KU };
        pack_rows::<I, I::Packed>(x, outer, terms, rows, strides, grow(out, rows * strides.row));
        strides
    }
}

/// Packs `outer` × `terms` as right panels, one after the other, each of [`right_len`] elements.
pub(crate) struct PackRight<'a, P> {
    pub x: &'a Operand<'a>,
    pub outer: Range<usize>,
    pub terms: Range<usize>,
    pub out: &'a mut [P],
}

impl<I: Isa> Vectorized<I, ()> for PackRight<'_, I::Packed> {
    #[inline(always)]
    fn run(self) {
        let Self { x, outer, terms, out } = self;
        let panel = right_len::<I>(terms.len());
        let strides = Strides { row: I::KU, step: I::NR * I::KU };
        if x.outer.is_contiguous() {
            return pack_words::<I, I::Packed>(x, outer, terms, I::NR, out);
        }
        let end = outer.end;
        for (i, out) in outer.step_by(I::NR).zip(out.chunks_exact_mut(panel)) {
            pack_rows::<I, I::Packed>(x, i..(i + I::NR).min(end), terms.clone(), I::NR, strides, out);
        }
    }
}

/// The first `len` elements of a buffer that grows to hold them.
pub(crate) fn grow<P: Copy + Default>(buffer: &mut Vec<P>, len: usize) -> &mut [P] {
    if buffer.len() < len {
        buffer.resize(len, P::default());
    }
    &mut buffer[..len]
}

/// Panels of `width` columns of a source whose outer indices lie side by side, as columns do in a word's share of a panel: word by
/// word, across all panels, so that long pieces of the source are read.
#[inline(always)]
fn pack_words<I: Isa, P: Packed>(x: &Operand, outer: Range<usize>, terms: Range<usize>, width: usize, out: &mut [P]) {
    match x.data {
        Floats::Bf16(s) => pack_words_from::<I, P, bf16>(s, x, outer, terms, width, out),
        Floats::F16(s) => pack_words_from::<I, P, f16>(s, x, outer, terms, width, out),
        Floats::F32(s) => pack_words_from::<I, P, f32>(s, x, outer, terms, width, out),
    }
}

#[inline(always)]
fn pack_words_from<I: Isa, P: Packed + Pack<E>, E: Copy>(
    data: &[E],
    x: &Operand,
    outer: Range<usize>,
    terms: Range<usize>,
    width: usize,
    out: &mut [P],
) {
    let panel = terms.len().div_ceil(I::KU) * I::KU * width;
    if !terms.len().is_multiple_of(I::KU) {
        out.fill(P::default());
    } else if !outer.len().is_multiple_of(width) {
        out[outer.len() / width * panel..].fill(P::default());
    }
    for (p, word) in terms.clone().step_by(I::KU).enumerate() {
        let source = |u: usize| {
            let start = outer.start + x.depth.offset(word + u);
            &data[start..start + outer.len()]
        };
        if I::KU == 2 && word + 1 < terms.end {
            for (j, (even, odd)) in source(0).chunks(width).zip(source(1).chunks(width)).enumerate() {
                let out = &mut out[j * panel + p * width * 2..][..width * 2];
                // The length of a whole panel is known when this is compiled.
                if even.len() == I::NR {
                    pack_pairs(&even[..I::NR], &odd[..I::NR], &mut out[..2 * I::NR]);
                } else {
                    pack_pairs(even, odd, out);
                }
            }
            continue;
        }
        for u in 0..I::KU.min(terms.end - word) {
            for (j, row) in source(u).chunks(width).enumerate() {
                let out = &mut out[j * panel + p * width * I::KU..][..width * I::KU];
                for (i, &x) in row.iter().enumerate() {
                    out[i * I::KU + u] = P::pack(x);
                }
            }
        }
    }
}

/// out[2i] = even[i] and out[2i + 1] = odd[i].
#[inline(always)]
pub(crate) fn pack_pairs<P: Pack<E>, E: Copy>(even: &[E], odd: &[E], out: &mut [P]) {
    let (odd, out) = (&odd[..even.len()], &mut out[..2 * even.len()]);
    for i in 0..even.len() {
        out[2 * i] = P::pack(even[i]);
        out[2 * i + 1] = P::pack(odd[i]);
    }
}

/// Elements of a right panel of so many terms.
pub(crate) const fn right_len<I: Isa>(terms: usize) -> usize {
    terms.div_ceil(I::KU) * I::KU * I::NR
}

/// One panel, or left operand, of a source whose terms lie side by side, filled up to `rows` rows.
#[inline(always)]
fn pack_rows<I: Isa, P: Packed>(
    x: &Operand,
    outer: Range<usize>,
    terms: Range<usize>,
    rows: usize,
    strides: Strides,
    out: &mut [P],
) {
    if outer.len() < rows || !terms.len().is_multiple_of(I::KU) {
        out.fill(P::default());
    }
    match x.data {
        Floats::Bf16(s) => pack_rows_from::<I, P, bf16>(s, x, outer, terms, strides, out),
        Floats::F16(s) => pack_rows_from::<I, P, f16>(s, x, outer, terms, strides, out),
        Floats::F32(s) => pack_rows_from::<I, P, f32>(s, x, outer, terms, strides, out),
    }
}

#[inline(always)]
fn pack_rows_from<I: Isa, P: Packed + Pack<E>, E: Copy>(
    data: &[E],
    x: &Operand,
    outer: Range<usize>,
    terms: Range<usize>,
    strides: Strides,
    out: &mut [P],
) {
    debug_assert!(x.depth.is_contiguous());
    let source = |i: usize| {
        let start = x.outer.offset(i);
        &data[start + terms.start..start + terms.end]
    };
    if strides.step == I::KU {
        for (i, out) in outer.zip(out.chunks_exact_mut(strides.row)) {
            for (out, &a) in out.iter_mut().zip(source(i)) {
                *out = Pack::pack(a);
            }
        }
        return;
    }
    let mut i = outer.start;
    while i < outer.end {
        let at = (i - outer.start) * I::KU;
        i += match outer.end - i {
            8.. => interleave::<I, P, E, 8>(std::array::from_fn(|r| source(i + r)), at, strides.step, out),
            4.. => interleave::<I, P, E, 4>(std::array::from_fn(|r| source(i + r)), at, strides.step, out),
            _ => interleave::<I, P, E, 1>([source(i)], at, strides.step, out),
        };
    }
}

/// Packs `R` rows of words, from element `at` of each step on, and returns R. Several at a time: they lie side by side there.
#[inline(always)]
fn interleave<I: Isa, P: Packed + Pack<E>, E: Copy, const R: usize>(
    rows: [&[E]; R],
    at: usize,
    step: usize,
    out: &mut [P],
) -> usize {
    let terms = rows[0].len();
    let rows = rows.map(|row| &row[..terms]);
    for (p, out) in (0..terms).step_by(I::KU).zip(out.chunks_exact_mut(step)) {
        let out = &mut out[at..][..R * I::KU];
        for u in 0..I::KU.min(terms - p) {
            for r in 0..R {
                out[r * I::KU + u] = Pack::pack(rows[r][p + u]);
            }
        }
    }
    R
}

/// A float of one type made from one of another, with one rounding to nearest even where it needs one.
pub(crate) trait Pack<E> {
    fn pack(x: E) -> Self;
}

/// Element of a packed operand.
pub(crate) trait Packed: Copy + Default + Send + Sync + Pack<f32> + Pack<bf16> + Pack<f16> + Into<f32> + 'static {}

impl Packed for f32 {}

impl Packed for bf16 {}

impl Pack<f32> for f32 {
    #[inline(always)]
    fn pack(x: f32) -> f32 {
        x
    }
}

impl Pack<bf16> for f32 {
    #[inline(always)]
    fn pack(x: bf16) -> f32 {
        f32::from_bits(u32::from(x.to_bits()) << 16)
    }
}

impl Pack<f16> for f32 {
    #[inline(always)]
    fn pack(x: f16) -> f32 {
        let bits = u32::from(x.to_bits());
        // The 15 bits without the sign, read as a float, are the number times 2⁻¹¹², subnormal or not.
        let scaled = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
        let infinite_or_nan = if bits & 0x7c00 == 0x7c00 { 0xff << 23 } else { 0 };
        f32::from_bits(scaled.to_bits() | infinite_or_nan | (bits & 0x8000) << 16)
    }
}

impl Pack<f32> for bf16 {
    #[inline(always)]
    fn pack(x: f32) -> bf16 {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        // A NaN stays one, whatever its payload.
        bf16::from_bits(if x.is_nan() { bits >> 16 | 0x40 } else { rounded } as u16)
    }
}

impl Pack<bf16> for bf16 {
    #[inline(always)]
    fn pack(x: bf16) -> bf16 {
        x
    }
}

impl Pack<f16> for bf16 {
    #[inline(always)]
    fn pack(x: f16) -> bf16 {
        Pack::<f32>::pack(f32::pack(x))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_float_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            assert!(same(f32::pack(h), h.to_f32()), "{h:?}");
            assert!(same(f32::pack(b), b.to_f32()), "{b:?}");
        }
    }

    #[test]
    fn floats_round_to_nearest_even() {
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(upper) << 16 | lower);
                let (rounded, expected) = (bf16::pack(x), bf16::from_f32(x));
                assert!(rounded == expected || x.is_nan() && rounded.is_nan(), "{x:?}: {rounded:?} for {expected:?}");
            }
        }
    }
}
