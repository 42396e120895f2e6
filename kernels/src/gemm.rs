//! One packed, blocked matrix product: C[i, j] += Σ_p A(i, p)·B(j, p), over operands of any float type and either layout.
//!
//! C is cut into tiles whose size depends on its shape alone. One task computes one tile: it walks the sum in blocks of
//! [`DEPTH`] terms, packs the two operands' share into panels (converting to the instruction set's element), and adds each
//! block's product to C. So every element is summed by one task in one order, whatever the number of threads.
//!
//! Panels at the border of a tile are filled up with zeros, and what those produce is dropped. Zero, since a panel that is
//! filled up in the depth must add nothing; dropped, since 0·NaN would add something.

use crate::cpu::Isa;
use crate::problem::Floats;
use half::{bf16, f16};
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// Terms of the sum that are packed at a time: a pair of panels stays in the first-level cache.
pub(crate) const DEPTH: usize = 256;
/// Rows of the left operand that are packed at a time: they stay in the second-level cache.
const LEFT_ROWS: usize = 256;
/// A tile of C is cut no smaller than this in either direction.
const LEAST_TILE: usize = 128;
/// Nor left any larger than this.
const GREATEST_TILE: usize = 1024;
/// As many tiles as keep the cores of a large machine busy.
const ENOUGH_TILES: usize = 16;

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

/// A matrix to multiply: element (i, p) lies at `base + outer(i) + depth(p)`. One of the two axes is contiguous.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand<'a> {
    pub data: Floats<'a>,
    pub base: usize,
    pub outer: Axis<'a>,
    pub depth: Axis<'a>,
}

/// The matrix to add to: element (i, j) lies at `i·row + j·column`; one of the two is 1.
pub(crate) struct Output<'a> {
    pointer: *mut f32,
    rows: usize,
    columns: usize,
    row: usize,
    column: usize,
    _borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is an exclusive borrow of a slice of floats, which may be sent.
unsafe impl Send for Output<'_> {}
// SAFETY: a shared reference to it gives no access but through `row_mut`, whose contract forbids overlap.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// The `rows` × `columns` matrix whose element (i, j) is `data[i·row + j·column]`.
    pub fn new(data: &'a mut [f32], [rows, columns]: [usize; 2], [row, column]: [usize; 2]) -> Self {
        assert!(row == 1 || column == 1, "one direction is contiguous");
        if rows > 0 && columns > 0 {
            assert!((rows - 1) * row + (columns - 1) * column < data.len(), "the matrix lies in its slice");
        }
        Self { pointer: data.as_mut_ptr(), rows, columns, row, column, _borrow: PhantomData }
    }

    fn transpose(&mut self) {
        std::mem::swap(&mut self.rows, &mut self.columns);
        std::mem::swap(&mut self.row, &mut self.column);
    }

    /// # Safety
    /// The range lies in the matrix, `column` is 1, and no other part of it that is in use overlaps.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row_mut(&self, i: usize, columns: Range<usize>) -> &mut [f32] {
        debug_assert!(self.column == 1 && i < self.rows && columns.end <= self.columns);
        // SAFETY: `new` checked that the last element lies in the slice, so this part does; the caller rules out overlap.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(i * self.row + columns.start), columns.len()) }
    }
}

/// Whether a product replaces C or adds to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Write {
    Set,
    Add,
}

/// C = Σ_p A(i, p)·B(j, p) over p in 0..`depth`, or C += that.
pub(crate) fn product<I: Isa>(isa: I, left: Operand, right: Operand, depth: usize, mut c: Output, write: Write) {
    let (mut left, mut right) = (left, right);
    if c.column != 1 {
        std::mem::swap(&mut left, &mut right);
        c.transpose();
    }
    let [height, width] = tile_shape(c.rows, c.columns);
    let (down, across) = (c.rows.div_ceil(height), c.columns.div_ceil(width));
    (0..down * across).into_par_iter().for_each_init(Panels::<I>::default, |panels, tile| {
        let (i, j) = (tile % down * height, tile / down * width);
        let rows = i..(i + height).min(c.rows);
        let columns = j..(j + width).min(c.columns);
        // SAFETY: the tiles are disjoint, and each is computed once.
        isa.vectorize(|| unsafe { one_tile(isa, panels, &left, &right, depth, &c, rows, columns, write) });
    });
}

/// The tiles of a `rows` × `columns` matrix: large, for the sake of packing, but enough of them.
fn tile_shape(rows: usize, columns: usize) -> [usize; 2] {
    let [mut height, mut width] = [rows, columns].map(|n| n.next_power_of_two().clamp(LEAST_TILE, GREATEST_TILE));
    while rows.div_ceil(height) * columns.div_ceil(width) < ENOUGH_TILES && height.max(width) > LEAST_TILE {
        let larger = if height > width { &mut height } else { &mut width };
        *larger /= 2;
    }
    [height, width]
}

/// Scratch of one task.
struct Panels<I: Isa> {
    left: Vec<I::Packed>,
    right: Vec<I::Packed>,
    acc: Vec<f32>,
}

impl<I: Isa> Default for Panels<I> {
    fn default() -> Self {
        Self { left: Vec::new(), right: Vec::new(), acc: vec![0.0; I::MR * I::NR] }
    }
}

/// # Safety
/// `rows` and `columns` lie in `c`, whose `column` is 1, and nobody else uses that part of it meanwhile.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn one_tile<I: Isa>(
    isa: I,
    panels: &mut Panels<I>,
    left: &Operand,
    right: &Operand,
    depth: usize,
    c: &Output,
    rows: Range<usize>,
    columns: Range<usize>,
    write: Write,
) {
    for start in (0..depth).step_by(DEPTH) {
        let terms = start..(start + DEPTH).min(depth);
        let packed_terms = terms.len().next_multiple_of(I::KU);
        let set = start == 0 && write == Write::Set;
        pack::<I>(right, columns.clone(), terms.clone(), I::NR, &mut panels.right);
        for first in rows.clone().step_by(LEFT_ROWS) {
            let block = first..(first + LEFT_ROWS).min(rows.end);
            pack::<I>(left, block.clone(), terms.clone(), I::MR, &mut panels.left);
            for (r, j) in panels.right.chunks_exact(packed_terms * I::NR).zip(columns.clone().step_by(I::NR)) {
                let across = j..(j + I::NR).min(columns.end);
                for (l, i) in panels.left.chunks_exact(packed_terms * I::MR).zip(block.clone().step_by(I::MR)) {
                    isa.product(l, r, &mut panels.acc);
                    for (i, acc) in (i..block.end).zip(panels.acc.chunks_exact(I::NR)) {
                        // SAFETY: `across` lies in `columns` and i in `rows`.
                        let c = unsafe { c.row_mut(i, across.clone()) };
                        // The length of a whole panel is known when this is compiled.
                        if c.len() == I::NR { put(&mut c[..I::NR], acc, set) } else { put(c, acc, set) }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn put(c: &mut [f32], acc: &[f32], set: bool) {
    let terms = c.iter_mut().zip(acc);
    if set { terms.for_each(|(c, acc)| *c = *acc) } else { terms.for_each(|(c, acc)| *c += acc) }
}

/// Packs `outer` × `terms` of `x` into panels of `width` outer indices each, terms outermost within a panel.
#[inline(always)]
fn pack<I: Isa>(x: &Operand, outer: Range<usize>, terms: Range<usize>, width: usize, out: &mut Vec<I::Packed>) {
    let panel = terms.len().next_multiple_of(I::KU) * width;
    out.resize(outer.len().div_ceil(width) * panel, I::Packed::default());
    if !outer.len().is_multiple_of(width) || !terms.len().is_multiple_of(I::KU) {
        out.fill(I::Packed::default());
    }
    match x.data {
        Floats::Bf16(s) => pack_from::<I, bf16>(s, x, outer, terms, width, out, panel),
        Floats::F16(s) => pack_from::<I, f16>(s, x, outer, terms, width, out, panel),
        Floats::F32(s) => pack_from::<I, f32>(s, x, outer, terms, width, out, panel),
    }
}

#[inline(always)]
fn pack_from<I: Isa, E: Element>(
    data: &[E],
    x: &Operand,
    outer: Range<usize>,
    terms: Range<usize>,
    width: usize,
    out: &mut [I::Packed],
    panel: usize,
) {
    if x.outer.is_contiguous() {
        for (out, first) in out.chunks_exact_mut(panel).zip(outer.clone().step_by(width)) {
            let count = width.min(outer.end - first);
            for (p, term) in terms.clone().enumerate() {
                let start = x.base + first + x.depth.offset(term);
                let group = &mut out[p / I::KU * width * I::KU + p % I::KU..];
                // The length of a whole panel is known when this is compiled.
                if count == width {
                    let source = &data[start..start + width];
                    (0..width).for_each(|i| group[i * I::KU] = I::pack(source[i].widen()));
                } else {
                    let source = &data[start..start + count];
                    source.iter().enumerate().for_each(|(i, value)| group[i * I::KU] = I::pack(value.widen()));
                }
            }
        }
        return;
    }
    debug_assert!(x.depth.is_contiguous());
    for (out, first) in out.chunks_exact_mut(panel).zip(outer.clone().step_by(width)) {
        let row = |i: usize| {
            let start = x.base + x.outer.offset(first + i);
            &data[start + terms.start..start + terms.end]
        };
        let count = width.min(outer.end - first);
        let mut i = 0;
        while i < count {
            i += match count - i {
                4.. => interleave::<I, E, 4>(std::array::from_fn(|r| row(i + r)), i, width, out),
                2.. => interleave::<I, E, 2>(std::array::from_fn(|r| row(i + r)), i, width, out),
                _ => interleave::<I, E, 1>([row(i)], i, width, out),
            };
        }
    }
}

/// Packs `R` rows, from the panel's row `i` on, and returns R. Several at a time: their elements lie side by side there.
#[inline(always)]
fn interleave<I: Isa, E: Element, const R: usize>(rows: [&[E]; R], i: usize, width: usize, out: &mut [I::Packed]) -> usize {
    let terms = rows[0].len();
    let rows = rows.map(|row| &row[..terms]);
    for (p, group) in (0..terms).step_by(I::KU).zip(out.chunks_exact_mut(width * I::KU)) {
        let group = &mut group[i * I::KU..][..R * I::KU];
        for q in 0..I::KU.min(terms - p) {
            for r in 0..R {
                group[r * I::KU + q] = I::pack(rows[r][p + q].widen());
            }
        }
    }
    R
}

/// A float that widens to f32 without a rounding, in few instructions that vectorise.
trait Element: Copy {
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        // The 15 bits without the sign, read as a float, are the number times 2⁻¹¹², subnormal or not.
        let scaled = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
        let infinite_or_nan = if bits & 0x7c00 == 0x7c00 { 0xff << 23 } else { 0 };
        f32::from_bits(scaled.to_bits() | infinite_or_nan | (bits & 0x8000) << 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::Precision;
    use crate::cpu::portable::Portable;

    /// Panels of odd sizes, and terms in pairs.
    #[derive(Clone, Copy, Debug)]
    struct Pairs;

    impl Isa for Pairs {
        const NAME: &'static str = "pairs";
        const DLOGITS: Precision = Precision::F32;
        const MR: usize = 7;
        const NR: usize = 3;
        const KU: usize = 2;
        type Packed = f64;

        fn pack(x: f32) -> f64 {
            x.into()
        }

        fn mul_add(a: f32, b: f32, c: f32) -> f32 {
            a * b + c
        }

        fn product(self, left: &[f64], right: &[f64], acc: &mut [f32]) {
            assert_eq!(left.len() / 14, right.len() / 6);
            acc.fill(0.0);
            for (l, r) in left.chunks_exact(14).zip(right.chunks_exact(6)) {
                for (i, l) in l.chunks_exact(2).enumerate() {
                    for (j, r) in r.chunks_exact(2).enumerate() {
                        acc[i * 3 + j] += (l[0] * r[0] + l[1] * r[1]) as f32;
                    }
                }
            }
        }

        fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
            f()
        }
    }

    /// Small integers, so that every order of summation gives the same sum.
    fn integers(count: usize, salt: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + salt * 31) % 11) as f32 - 5.0).collect()
    }

    /// Every orientation of both operands and of C, whole and ragged in each direction, with and without a gather.
    fn products_are_right(isa: impl Isa) {
        for (m, n, k) in [(1, 1, 1), (14, 6, 256), (13, 35, 257), (150, 130, 40), (300, 31, 515), (2, 1100, 3)] {
            let (a, b) = (integers(2 * m * k, 1), integers(n * k, 2));
            // Every second row of A, last one first.
            let rows: Vec<usize> = (0..m).map(|i| 2 * (m - 1 - i)).collect();
            let expected = |i: usize, j: usize| (0..k).map(|p| a[rows[i] * k + p] * b[j * k + p]).sum::<f32>();
            let transposed = |x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
                (0..rows * columns).map(|at| x[at % rows * columns + at / rows]).collect()
            };
            // A gathered by its terms, as dK gathers Q: its outer index is contiguous.
            let (a_columns, b_columns) = (transposed(&a, 2 * m, k), transposed(&b, n, k));
            let gathered: Vec<f32> =
                (0..k).flat_map(|p| rows.iter().map(move |r| (p, *r))).map(|(p, r)| a_columns[p * 2 * m + r]).collect();
            let plain = |stride| Axis { stride, gather: None };
            let in_order: Vec<usize> = (0..k).collect();
            let lefts = [
                Operand { data: Floats::F32(&a), base: 0, outer: Axis { stride: k, gather: Some(&rows) }, depth: plain(1) },
                Operand {
                    data: Floats::F32(&gathered),
                    base: 0,
                    outer: plain(1),
                    depth: Axis { stride: m, gather: Some(&in_order) },
                },
            ];
            let rights = [
                Operand { data: Floats::F32(&b), base: 0, outer: plain(k), depth: plain(1) },
                Operand { data: Floats::F32(&b_columns), base: 0, outer: plain(1), depth: plain(n) },
            ];
            for (left, right) in lefts.iter().flat_map(|l| rights.iter().map(move |r| (*l, *r))) {
                for (write, strides) in [(Write::Set, [n, 1]), (Write::Add, [n, 1]), (Write::Set, [1, m]), (Write::Add, [1, m])] {
                    let mut c = vec![1000.0; m * n];
                    product(isa, left, right, k, Output::new(&mut c, [m, n], strides), write);
                    let before = if write == Write::Add { 1000.0 } else { 0.0 };
                    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                        assert_eq!(c[i * strides[0] + j * strides[1]], before + expected(i, j), "{m} × {n} × {k} at {i}, {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn portable_products_are_right() {
        products_are_right(Portable);
    }

    #[test]
    fn products_of_odd_panels_are_right() {
        products_are_right(Pairs);
    }

    #[test]
    fn every_half_float_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            assert!(same(h.widen(), h.to_f32()), "{h:?}");
            assert!(same(b.widen(), b.to_f32()), "{b:?}");
        }
    }
}
