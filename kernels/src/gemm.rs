//! The product inside everything: C += A·B on packed panels, C in float32.
//!
//! A (m × k) is packed in panels of `MR` rows, B (k × n) in panels of `NR` columns, both k-major, zero-padded to whole panels,
//! in the instruction set's own operand type. A micro-tile of C is summed in registers over at most [`KC`] terms and then
//! added to C in memory, always in the same order: a result does not depend on who computes it, or with how many threads.

use crate::problem::Floats;
use half::{bf16, f16};
use std::ops::Range;

/// Terms summed in registers before they are added to C. A panel of B this deep stays in the first-level cache.
pub(crate) const KC: usize = 256;

/// Largest micro-tile of any instruction set, in elements of C.
pub(crate) const MAX_TILE: usize = 512;

/// What an instruction set brings to the algorithm. A value is the proof that this machine has it.
pub(crate) trait Isa: Copy + Send + Sync {
    /// Operand type of the product: what inputs and dlogits are rounded to when they are packed.
    type Operand: Copy + Default + Send + Sync;
    /// Rows of a micro-tile.
    const MR: usize;
    /// Columns of a micro-tile.
    const NR: usize;
    /// How many consecutive k of one row or column lie together in a packed panel.
    const K_UNIT: usize;

    /// An element as operand.
    fn operand(x: f32) -> Self::Operand;

    /// acc (MR × NR, row-major) = the product of a packed panel of A and one of B over `a.len() / MR` terms.
    fn micro_tile(self, a: &[Self::Operand], b: &[Self::Operand], acc: &mut [f32; MAX_TILE]);

    /// Runs `work` compiled for this instruction set.
    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R;
}

/// A strided matrix of any input dtype: element (i, j) is `data[offset + i·row_stride + j·column_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub data: Floats<'a>,
    pub offset: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major float32 matrix with `stride` elements from row to row.
    pub fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data: Floats::F32(data), offset: 0, row_stride: stride, column_stride: 1 }
    }

    /// The same elements with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    /// The same matrix without its first rows and columns.
    pub fn from(self, row: usize, column: usize) -> Self {
        Self { offset: self.offset + row * self.row_stride + column * self.column_stride, ..self }
    }
}

/// Converts exactly to float32, in a way that vectorises.
trait Widen: Copy {
    fn widen(self) -> f32;
}

impl Widen for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Widen for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Widen for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

/// Copies elements `range` of `data` to `out` as float32.
pub(crate) fn widen_into(data: Floats, range: Range<usize>, out: &mut [f32]) {
    fn copy<T: Widen>(from: &[T], out: &mut [f32]) {
        out.iter_mut().zip(from).for_each(|(out, x)| *out = x.widen());
    }
    match data {
        Floats::Bf16(s) => copy(&s[range], out),
        Floats::F16(s) => copy(&s[range], out),
        Floats::F32(s) => copy(&s[range], out),
    }
}

/// `lines` rows of A, or columns of B, packed in panels.
pub(crate) struct Packed<T> {
    data: Vec<T>,
    lines: usize,
    depth: usize,
}

impl<T: Copy + Default> Packed<T> {
    pub fn new() -> Self {
        Self { data: Vec::new(), lines: 0, depth: 0 }
    }

    /// Packs the first `lines` rows of `matrix`, `depth` elements each, in panels of `width`.
    #[inline(always)]
    pub fn pack<I: Isa<Operand = T>>(&mut self, matrix: Matrix, lines: usize, depth: usize, width: usize) {
        (self.lines, self.depth) = (lines, depth.next_multiple_of(I::K_UNIT));
        self.data.resize(lines.div_ceil(width) * width * self.depth, T::default());
        match matrix.data {
            Floats::Bf16(s) => pack_elements::<I, bf16>(s, matrix, lines, depth, width, &mut self.data),
            Floats::F16(s) => pack_elements::<I, f16>(s, matrix, lines, depth, width, &mut self.data),
            Floats::F32(s) => pack_elements::<I, f32>(s, matrix, lines, depth, width, &mut self.data),
        }
    }

    fn panel(&self, index: usize, width: usize, depth: Range<usize>) -> &[T] {
        let start = index * width * self.depth;
        &self.data[start + depth.start * width..start + depth.end * width]
    }
}

#[inline(always)]
fn pack_elements<I: Isa, T: Widen>(data: &[T], matrix: Matrix, lines: usize, depth: usize, width: usize, out: &mut [I::Operand]) {
    let Matrix { offset, row_stride, column_stride, .. } = matrix;
    let padded = depth.next_multiple_of(I::K_UNIT);
    for (panel, first) in out.chunks_exact_mut(width * padded).zip((0..lines).step_by(width)) {
        let used = width.min(lines - first);
        if used < width || padded > depth {
            panel.fill(I::Operand::default());
        }
        let at = |line: usize, k: usize| (k / I::K_UNIT * width + line) * I::K_UNIT + k % I::K_UNIT;
        if row_stride == 1 {
            for k in 0..depth {
                let from = &data[offset + first + k * column_stride..][..used];
                from.iter().enumerate().for_each(|(line, x)| panel[at(line, k)] = I::operand(x.widen()));
            }
        } else {
            for line in 0..used {
                let start = offset + (first + line) * row_stride;
                if column_stride == 1 {
                    let from = &data[start..start + depth];
                    from.iter().enumerate().for_each(|(k, x)| panel[at(line, k)] = I::operand(x.widen()));
                } else {
                    (0..depth).for_each(|k| panel[at(line, k)] = I::operand(data[start + k * column_stride].widen()));
                }
            }
        }
    }
}

/// What becomes of C.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    /// C = A·B.
    Overwrite,
    /// C += A·B.
    Add,
}

/// C (row-major, `stride` from row to row, as many rows as `rows` of A and columns as B) is set to or takes up A·B.
#[inline(always)]
pub(crate) fn multiply<I: Isa>(
    isa: I,
    a: &Packed<I::Operand>,
    rows: Range<usize>,
    b: &Packed<I::Operand>,
    c: &mut [f32],
    stride: usize,
    store: Store,
) {
    debug_assert_eq!(a.depth, b.depth);
    debug_assert_eq!(rows.start % I::MR, 0, "rows begin at a panel");
    let mut acc = [0.0f32; MAX_TILE];
    let kc = KC.next_multiple_of(I::K_UNIT);
    for start in (0..a.depth).step_by(kc) {
        let depth = start..(start + kc).min(a.depth);
        for first_column in (0..b.lines).step_by(I::NR) {
            let b_panel = b.panel(first_column / I::NR, I::NR, depth.clone());
            let columns = I::NR.min(b.lines - first_column);
            for first_row in rows.clone().step_by(I::MR) {
                let a_panel = a.panel(first_row / I::MR, I::MR, depth.clone());
                isa.micro_tile(a_panel, b_panel, &mut acc);
                for row in first_row..(first_row + I::MR).min(rows.end) {
                    let out = &mut c[(row - rows.start) * stride + first_column..][..columns];
                    let sums = &acc[(row - first_row) * I::NR..][..columns];
                    if store == Store::Overwrite && start == 0 {
                        out.copy_from_slice(sums);
                    } else {
                        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::portable::Portable;

    fn check(m: usize, n: usize, k: usize) {
        let value = |i: usize| ((i * 2_654_435_761) % 17) as f32 - 8.0;
        let a: Vec<f32> = (0..m * k).map(value).collect();
        let b: Vec<f32> = (0..n * k).map(|i| value(i + 5)).collect();
        let (mut packed_a, mut packed_b) = (Packed::new(), Packed::new());
        packed_a.pack::<Portable>(Matrix::rows(&a, k), m, k, Portable::MR);
        // B is stored k × n here, and its columns are packed.
        packed_b.pack::<Portable>(Matrix::rows(&b, n).transposed(), n, k, Portable::NR);
        let mut c = vec![1.0; m * n];
        multiply(Portable, &packed_a, 0..m, &packed_b, &mut c, n, Store::Add);
        for i in 0..m {
            for j in 0..n {
                let expected: f32 = 1.0 + (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum::<f32>();
                assert_eq!(c[i * n + j], expected, "{m} {n} {k} at {i} {j}: small integers are exact in any order");
            }
        }
        multiply(Portable, &packed_a, 0..m, &packed_b, &mut c, n, Store::Overwrite);
        assert_eq!(c[m * n - 1], (0..k).map(|l| a[(m - 1) * k + l] * b[l * n + n - 1]).sum::<f32>());
    }

    #[test]
    fn products_of_ragged_shapes_are_exact() {
        for (m, n, k) in [(1, 1, 1), (7, 9, 3), (6, 8, 256), (13, 33, 257), (64, 5, 700), (3, 17, 2)] {
            check(m, n, k);
        }
    }
}
