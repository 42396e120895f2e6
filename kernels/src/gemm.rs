//! Products of packed operands: C = or += left · right, micro-tile by micro-tile.
//!
//! Every element of C is one sum, taken in the order of its words by one micro-tile: what the tiles' borders are does not change it.

use crate::cpu::Isa;
use crate::filter::Kept;
use crate::panels::{self, Strides};
use std::marker::PhantomData;
use std::ops::Range;

/// Whether a product replaces C or adds to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Write {
    Set,
    Add,
}

/// A packed left operand: word p of row i begins at `data + i·row + p·step`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left<P> {
    pub data: *const P,
    pub row: usize,
    pub step: usize,
}

impl<P: Copy> Left<P> {
    /// Element p of the first MR rows, for operands whose words are single elements.
    ///
    /// # Safety
    /// They exist.
    #[inline(always)]
    pub unsafe fn word<const MR: usize>(&self, p: usize) -> [P; MR] {
        // SAFETY: the caller promises that the elements exist.
        std::array::from_fn(|i| unsafe { *self.data.add(i * self.row + p * self.step) })
    }
}

/// The matrix to write: element (i, j) lies at `i·row + j·column`; one of the two is 1.
///
/// Several workers write parts of one matrix, so that it is shared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output<'a> {
    pointer: *mut f32,
    rows: usize,
    columns: usize,
    row: usize,
    column: usize,
    _borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a borrow of a slice of floats, which may be sent.
unsafe impl Send for Output<'_> {}
// SAFETY: a shared reference to it gives no access but through `product`, whose contract forbids overlap.
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

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The part of it from (`rows.start`, `columns.start`) on.
    pub fn part(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && columns.end <= self.columns, "a part lies within the whole");
        // SAFETY: the part's first element lies in the slice, or the part is empty and the offset is not used.
        let pointer = unsafe { self.pointer.add(rows.start * self.row + columns.start * self.column) };
        Self { pointer, rows: rows.len(), columns: columns.len(), ..self }
    }
}

/// C = or += left · right panels, of so many words each.
///
/// The right panels of [`Sweep::Rows`] should fit the second-level cache together; of [`Sweep::Panels`], each for itself.
///
/// # Safety
/// Nobody else uses C meanwhile.
#[inline(always)]
pub(crate) unsafe fn product<I: Isa>(
    isa: I,
    sweep: Sweep,
    words: usize,
    left: (&[I::Packed], Strides),
    right: &[I::Packed],
    c: Output,
    write: Write,
) {
    if c.rows == 0 || c.columns == 0 || words == 0 {
        return;
    }
    let panel = check::<I>(words, left, right, c);
    let (data, Strides { row, step }) = left;
    sweep.tiles::<I>(c, |i, j, next| {
        // SAFETY: the operands are whole, and nobody else uses C.
        unsafe {
            let left = Left { data: data.as_ptr().add(i * row), row, step };
            micro_tile(isa, words, left, right.as_ptr().add(j / I::NR * panel), c, [i, j], write, next);
        }
    });
}

/// What [`product_of`] gathers the words of its operands in.
#[derive(Debug)]
pub(crate) struct Gathered<P> {
    left: Vec<P>,
    right: Vec<P>,
    /// Of all groups, one after the other.
    words: Vec<usize>,
    /// Where those of each group begin.
    starts: Vec<usize>,
}

impl<P> Default for Gathered<P> {
    fn default() -> Self {
        Self { left: Vec::new(), right: Vec::new(), words: Vec::new(), starts: Vec::new() }
    }
}

/// As [`product`], of the words that are kept; of all, if nothing says which.
///
/// # Safety
/// Nobody else uses C meanwhile.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
pub(crate) unsafe fn product_of<I: Isa>(
    kept: Option<Kept>,
    isa: I,
    sweep: Sweep,
    words: usize,
    left: (&[I::Packed], Strides),
    right: &[I::Packed],
    c: Output,
    write: Write,
    gathered: &mut Gathered<I::Packed>,
) {
    let Some(kept) = kept else {
        // SAFETY: the caller's promise.
        return unsafe { product(isa, sweep, words, left, right, c, write) };
    };
    if c.rows == 0 || c.columns == 0 || words == 0 {
        return;
    }
    let panel = check::<I>(words, left, right, c);
    let (data, Strides { row, step }) = left;
    // Groups that take all their words are left where they lie.
    gathered.words.clear();
    gathered.starts.clear();
    for group in 0..c.rows.div_ceil(I::MR) {
        gathered.starts.push(gathered.words.len());
        if kept.count(group, words) < words {
            gathered.words.extend(kept.words(group));
        }
    }
    gathered.starts.push(gathered.words.len());
    let word = I::MR * I::KU;
    let out = panels::grow(&mut gathered.left, gathered.words.len() * word);
    for (group, bounds) in gathered.starts.windows(2).enumerate() {
        for (&p, out) in gathered.words[bounds[0]..bounds[1]].iter().zip(out[bounds[0] * word..].chunks_exact_mut(word)) {
            for (a, out) in out.chunks_exact_mut(I::KU).enumerate() {
                out.copy_from_slice(&data[(group * I::MR + a) * row + p * step..][..I::KU]);
            }
        }
    }
    let width = I::NR * I::KU;
    panels::grow(&mut gathered.right, words * width);
    sweep.tiles::<I>(c, |i, j, next| {
        let right = &right[j / I::NR * panel..][..panel];
        let (start, end) = (gathered.starts[i / I::MR], gathered.starts[i / I::MR + 1]);
        match kept.count(i / I::MR, words) {
            0 if write == Write::Add => {}
            // SAFETY: the operands are whole, and nobody else uses C.
            all if all == words => unsafe {
                let left = Left { data: data.as_ptr().add(i * row), row, step };
                micro_tile(isa, words, left, right.as_ptr(), c, [i, j], write, next);
            },
            _ => {
                for (&p, out) in gathered.words[start..end].iter().zip(gathered.right.chunks_exact_mut(width)) {
                    out.copy_from_slice(&right[p * width..][..width]);
                }
                let left = Left { data: gathered.left[start * word..].as_ptr(), row: I::KU, step: word };
                // SAFETY: so many words have been gathered of both, and nobody else uses C.
                unsafe { micro_tile(isa, end - start, left, gathered.right.as_ptr(), c, [i, j], write, next) };
            }
        }
    });
}

/// That the operands hold what C needs; returns the elements of a right panel.
#[inline(always)]
fn check<I: Isa>(words: usize, (data, Strides { row, step }): (&[I::Packed], Strides), right: &[I::Packed], c: Output) -> usize {
    let last = (c.rows.next_multiple_of(I::MR) - 1) * row + (words - 1) * step;
    let panel = words * I::NR * I::KU;
    assert!(last + I::KU <= data.len() && c.columns.div_ceil(I::NR) * panel <= right.len(), "the operands are whole");
    panel
}

/// The micro-tile of C at `place`; that at `next` is brought nearer meanwhile.
///
/// # Safety
/// The left operand has MR rows of so many words, and the right panel as many words; `place` lies in C, which nobody else uses.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
unsafe fn micro_tile<I: Isa>(
    isa: I,
    words: usize,
    left: Left<I::Packed>,
    right: *const I::Packed,
    c: Output,
    [i, j]: [usize; 2],
    write: Write,
    next: [usize; 2],
) {
    let (rows, columns) = (I::MR.min(c.rows - i), I::NR.min(c.columns - j));
    let vectors = columns.div_ceil(I::LANES);
    if c.column == 1 && rows == I::MR && columns == vectors * I::LANES {
        let next = c.pointer.wrapping_add(next[0] * c.row + next[1]);
        // SAFETY: the operands are whole, and so is the micro-tile of C, which lies in the matrix.
        unsafe { isa.product(words, left, right, c.pointer.add(i * c.row + j), c.row, vectors, write, next) };
        return;
    }
    let mut scratch = [0.0f32; SCRATCH];
    let tile = scratch.as_mut_ptr();
    // SAFETY: the operands are whole, and the scratch is as large as any micro-tile.
    unsafe { isa.product(words, left, right, tile, I::NR, vectors, Write::Set, tile) };
    for b in 0..columns {
        let column = c.pointer.wrapping_add(i * c.row + (j + b) * c.column);
        let put = |a: usize| {
            // SAFETY: the element lies in the matrix, and nobody else uses it.
            let c = unsafe { &mut *column.add(a * c.row) };
            let sum = scratch[a * I::NR + b];
            *c = if write == Write::Set { sum } else { *c + sum };
        };
        // The number of rows of a whole micro-tile is known when this is compiled.
        if rows == I::MR { (0..I::MR).for_each(put) } else { (0..rows).for_each(put) }
    }
}

impl Sweep {
    /// Calls `tile` with where each micro-tile of C begins, and where the next does.
    #[inline(always)]
    fn tiles<I: Isa>(self, c: Output, mut tile: impl FnMut(usize, usize, [usize; 2])) {
        match self {
            Sweep::Rows => {
                for i in (0..c.rows).step_by(I::MR) {
                    for j in (0..c.columns).step_by(I::NR) {
                        tile(i, j, if j + I::NR < c.columns { [i, j + I::NR] } else { [i + I::MR, 0] });
                    }
                }
            }
            Sweep::Panels => {
                for j in (0..c.columns).step_by(I::NR) {
                    for i in (0..c.rows).step_by(I::MR) {
                        tile(i, j, if i + I::MR < c.rows { [i + I::MR, j] } else { [0, j + I::NR] });
                    }
                }
            }
        }
    }
}

/// The order of the micro-tiles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Sweep {
    /// Row by row of the left operand, across all panels.
    Rows,
    /// Panel by panel of the right operand, along all rows.
    Panels,
}

/// Floats of the largest micro-tile.
const SCRATCH: usize = 512;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cpu::Vectorized;
    use crate::cpu::portable::Portable;
    use crate::panels::{Axis, Operand, Pack, PackLeft, PackRight, right_len};
    use crate::problem::Floats;

    /// Small panels of a shape that no machine has, three terms in a word, and a multiply-add of one rounding.
    #[derive(Clone, Copy, Debug)]
    pub struct Threes;

    impl Isa for Threes {
        const MR: usize = 3;
        const NR: usize = 6;
        const LANES: usize = 2;
        const KU: usize = 3;
        type Packed = f32;

        fn mul_add(a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }

        unsafe fn product(
            self,
            steps: usize,
            left: Left<f32>,
            right: *const f32,
            c: *mut f32,
            stride: usize,
            vectors: usize,
            write: Write,
            _next: *const f32,
        ) {
            for (i, j) in (0..Self::MR).flat_map(|i| (0..vectors * Self::LANES).map(move |j| (i, j))) {
                // SAFETY: the caller promises operands of so many steps of words, and C.
                unsafe {
                    let term = |p: usize, u: usize| {
                        *left.data.add(i * left.row + p * left.step + u) * *right.add((p * Self::NR + j) * Self::KU + u)
                    };
                    let sum: f32 = (0..steps).flat_map(|p| (0..Self::KU).map(move |u| (p, u))).map(|(p, u)| term(p, u)).sum();
                    let c = c.add(i * stride + j);
                    *c = if write == Write::Set { sum } else { *c + sum };
                }
            }
        }

        fn vectorize<R>(self, work: impl Vectorized<Self, R>) -> R {
            work.run()
        }
    }

    /// Small integers, so that every order of summation gives the same sum.
    fn integers(count: usize, salt: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + salt * 31) % 11) as f32 - 5.0).collect()
    }

    /// Both orientations of both operands and of C, in both orders, whole and ragged in each direction.
    pub fn products_are_right<I: Isa>(isa: I) {
        for (m, n, k) in [(1, 1, 1), (14, 6, 256), (13, 35, 257), (96, 144, 40), (50, 131, 515), (2, 700, 3)] {
            let (a, b) = (integers(2 * m * k, 1), integers(n * k, 2));
            // Every second row of A, the last one first.
            let rows: Vec<usize> = (0..m).map(|i| 2 * (m - 1 - i)).collect();
            let expected = |i: usize, j: usize| (0..k).map(|p| a[rows[i] * k + p] * b[j * k + p]).sum::<f32>();
            let a_columns: Vec<f32> = (0..k).flat_map(|p| rows.iter().map(move |r| (p, r))).map(|(p, r)| a[r * k + p]).collect();
            let b_columns: Vec<f32> = (0..k).flat_map(|p| (0..n).map(move |j| (p, j))).map(|(p, j)| b[j * k + p]).collect();
            let in_order: Vec<usize> = (0..k).collect();
            let (one, along) = (Axis { stride: 1, gather: None }, |stride| Axis { stride, gather: None });
            let lefts = [
                Operand { data: Floats::F32(&a), outer: Axis { stride: k, gather: Some(&rows) }, depth: one },
                Operand { data: Floats::F32(&a_columns), outer: one, depth: Axis { stride: m, gather: Some(&in_order) } },
            ];
            let rights = [
                Operand { data: Floats::F32(&b), outer: along(k), depth: one },
                Operand { data: Floats::F32(&b_columns), outer: one, depth: along(n) },
            ];
            for (left, right) in lefts.iter().flat_map(|l| rights.iter().map(move |r| (l, r))) {
                // What an earlier, larger operand left behind is garbage.
                let mut packed = vec![Pack::pack(f32::NAN); 64];
                let strides = isa.vectorize(PackLeft { x: left, outer: 0..m, terms: 0..k, out: &mut packed });
                let mut panels = vec![Pack::pack(f32::NAN); n.div_ceil(I::NR) * right_len::<I>(k)];
                isa.vectorize(PackRight { x: right, outer: 0..n, terms: 0..k, out: &mut panels });
                for (write, sweep, [row, column]) in [
                    (Write::Set, Sweep::Rows, [n, 1]),
                    (Write::Add, Sweep::Panels, [n, 1]),
                    (Write::Set, Sweep::Panels, [1, m]),
                    (Write::Add, Sweep::Rows, [1, m]),
                ] {
                    let mut c = vec![1000.0; m * n];
                    let output = Output::new(&mut c, [m, n], [row, column]);
                    // SAFETY: C is this test's own.
                    unsafe { product(isa, sweep, k.div_ceil(I::KU), (&packed, strides), &panels, output, write) };
                    let before = if write == Write::Add { 1000.0 } else { 0.0 };
                    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                        assert_eq!(c[i * row + j * column], before + expected(i, j), "{isa:?}, {m} × {n} × {k} at {i}, {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn portable_products_are_right() {
        products_are_right(Portable);
        products_are_right(Threes);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn products_of_this_machine_are_right() {
        use crate::cpu::{avx2::Avx2, avx512::Avx512, avx512_bf16::Avx512Bf16};
        let skipped = |name: &str| println!("SKIPPED {name}: this machine has it not");
        Avx2::get().map_or_else(|| skipped("AVX2"), |&isa| products_are_right(isa));
        Avx512::get().map_or_else(|| skipped("AVX-512"), |&isa| products_are_right(isa));
        Avx512Bf16::get().map_or_else(|| skipped("AVX-512 BF16"), |&isa| products_are_right(isa));
    }
}
