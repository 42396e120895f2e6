//! Products of packed operands: C = or += left · right, micro-tile by micro-tile.
//!
//! Every element of C is one sum, taken in the order of its words by one micro-tile: what the tiles' borders are does not change it.

use crate::cpu::Isa;
use crate::panels::Strides;
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
    let (data, Strides { row, step }) = left;
    let last = (c.rows.next_multiple_of(I::MR) - 1) * row + (words - 1) * step;
    let panel = words * I::NR * I::KU;
    assert!(last + I::KU <= data.len() && c.columns.div_ceil(I::NR) * panel <= right.len(), "the operands are whole");
    let micro_tile = |i: usize, j: usize, next: [usize; 2]| {
        // SAFETY: `last` is where the last row ends, and the last panel ends within `right`.
        let (left, right) =
            unsafe { (Left { data: data.as_ptr().add(i * row), row, step }, right.as_ptr().add(j / I::NR * panel)) };
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
        for (a, b) in (0..columns).flat_map(|b| (0..rows).map(move |a| (a, b))) {
            // SAFETY: the element lies in the matrix, and nobody else uses it.
            let c = unsafe { &mut *c.pointer.add((i + a) * c.row + (j + b) * c.column) };
            let sum = scratch[a * I::NR + b];
            *c = if write == Write::Set { sum } else { *c + sum };
        }
    };
    match sweep {
        Sweep::Rows => {
            for i in (0..c.rows).step_by(I::MR) {
                for j in (0..c.columns).step_by(I::NR) {
                    micro_tile(i, j, if j + I::NR < c.columns { [i, j + I::NR] } else { [i + I::MR, 0] });
                }
            }
        }
        Sweep::Panels => {
            for j in (0..c.columns).step_by(I::NR) {
                for i in (0..c.rows).step_by(I::MR) {
                    micro_tile(i, j, if i + I::MR < c.rows { [i + I::MR, j] } else { [0, j + I::NR] });
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
