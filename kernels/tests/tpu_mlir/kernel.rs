//! A kernel's grid: what is around the compiled step.
//!
//! As unkind as the language allows: fresh memory, and what overhangs an array, is NaN (labels: ids that exist); parallel steps are
//! taken backwards, each with memory of its own; the next step's operands are read before a step runs; results are
//! written back when the next step shows another block. No block may be written twice, none may lie outside of its array.

use super::compile::{Compiled, compile};
use super::translate::{Piece, Translated, end, translate, width};
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

/// An array in HBM.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub dims: Vec<usize>,
    pub element: String,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn fresh(dims: &[usize], element: &str) -> Self {
        let mut bytes = vec![0; dims.iter().product::<usize>() * width(element)];
        spoil(&mut bytes, element);
        Self { dims: dims.to_vec(), element: element.to_owned(), bytes }
    }
}

/// Fills memory with what nobody has written.
fn spoil(bytes: &mut [u8], element: &str) {
    if element == "i32" {
        bytes.chunks_mut(4).enumerate().for_each(|(i, id)| id.copy_from_slice(&((i % 3) as i32).to_le_bytes()));
    } else {
        bytes.fill(0xff);
    }
}

/// Of the memory of a core, in bytes.
const ALIGNED: usize = 64;

struct Kernel {
    compiled: Arc<Compiled>,
    grid: Vec<(usize, bool)>,
    /// Of each window, the function that says where its block lies.
    places: Vec<String>,
    pieces: Vec<Piece>,
}

impl Kernel {
    fn new(mosaic: &str) -> Self {
        let Translated { text, attributes, pieces } = translate(mosaic);
        let after = |key: &str| attributes.split_once(key).unwrap_or_else(|| panic!("a kernel without {key}")).1;
        let bounds = after("iteration_bounds = array<i64: ").split('>').next().unwrap_or_default();
        let orders = after("dimension_semantics = [").split(']').next().unwrap_or_default();
        let grid = bounds.split(", ").zip(orders.split(", "));
        let grid = grid.map(|(steps, order)| (steps.parse().expect("steps"), order.contains("<parallel>"))).collect();
        let windows: Vec<&str> = after("window_params = [").split("transform_indices = @").skip(1).collect();
        for (window, piece) in windows.iter().zip(&pieces) {
            let bounds = format!("window_bounds = array<i64: {}, {}>", piece.dims[0], piece.dims[1]);
            assert!(window.contains(&bounds), "{window} is not {bounds}");
        }
        let places = windows.iter().map(|window| window.split([',', '}']).next().unwrap_or_default().to_owned()).collect();
        Self { compiled: compile(&text), grid, places, pieces }
    }

    /// Where each window's block starts, in elements.
    fn starts(&self, steps: &[i32]) -> Vec<[usize; 2]> {
        let start = |(name, piece): (&String, &Piece)| {
            let mut place = [-1i32; 2];
            self.compiled.call(name, steps, &mut place);
            [0, 1].map(|i| usize::try_from(place[i]).expect("a place that exists") * piece.dims[i])
        };
        self.places.iter().zip(&self.pieces).map(start).collect()
    }
}

/// The memory of a core, in which the pieces lie.
struct Memory<'a> {
    bytes: Vec<u8>,
    aligned: usize,
    pieces: &'a [Piece],
}

impl<'a> Memory<'a> {
    fn fresh(pieces: &'a [Piece]) -> Self {
        let bytes = vec![0; end(pieces) + ALIGNED];
        let aligned = bytes.as_ptr().align_offset(ALIGNED);
        let mut memory = Self { bytes, aligned, pieces };
        (0..pieces.len()).for_each(|piece| memory.spoil(piece));
        memory
    }

    fn all(&mut self) -> &mut [u8] {
        &mut self.bytes[self.aligned..]
    }

    fn piece(&mut self, piece: usize) -> &mut [u8] {
        let Piece { start, .. } = self.pieces[piece];
        let bytes = self.pieces[piece].bytes();
        &mut self.all()[start..][..bytes]
    }

    fn spoil(&mut self, piece: usize) {
        let element = &self.pieces[piece].element;
        spoil(self.piece(piece), element);
    }
}

/// The bytes of each row of a block that lies in its array: there, and in the block.
fn rows(array: &Tensor, piece: &Piece, [row, column]: [usize; 2]) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + use<> {
    let [all_rows, all_columns] = array.dims[..] else { panic!("a window of a matrix") };
    assert_eq!(array.element, piece.element, "a window of another type than its array");
    assert!(row < all_rows && column < all_columns, "a block at {row}, {column} of {all_rows} by {all_columns}");
    let [rows, columns] = piece.dims;
    let width = width(&piece.element);
    let bytes = width * columns.min(all_columns - column);
    (0..rows.min(all_rows - row)).map(move |r| {
        let (there, here) = (width * ((row + r) * all_columns + column), width * r * columns);
        (there..there + bytes, here..here + bytes)
    })
}

/// What a kernel makes of its operands; `aliases` are pairs of an operand and the result that takes its memory over.
pub fn run(mosaic: &str, operands: Vec<Tensor>, results: Vec<Tensor>, aliases: &[(usize, usize)]) -> Vec<Tensor> {
    let kernel = Kernel::new(mosaic);
    let (read, windows) = (operands.len(), kernel.places.len());
    assert_eq!(windows, read + results.len(), "a window for each operand and result");
    let mut arrays: Vec<Tensor> = operands.into_iter().chain(results).collect();
    let of = |window: usize| aliases.iter().find(|(_, result)| window == read + result).map_or(window, |(operand, _)| *operand);
    let fetched = |arrays: &[Tensor], window: usize, start: [usize; 2]| {
        let piece = &kernel.pieces[window];
        let mut block = Tensor::fresh(&piece.dims, &piece.element).bytes;
        rows(&arrays[window], piece, start).for_each(|(there, here)| block[here].copy_from_slice(&arrays[window].bytes[there]));
        block
    };
    let outer = kernel.grid.iter().take_while(|(_, parallel)| *parallel).count();
    let (of_cores, of_steps) = kernel.grid.split_at(outer);
    assert!(of_steps.iter().all(|(_, parallel)| !parallel), "parallel dimensions come first");
    let mut written = HashSet::new();
    for core in steps(of_cores).iter().rev() {
        let steps: Vec<Vec<i32>> = steps(of_steps).iter().map(|step| [&core[..], step].concat()).collect();
        let starts: Vec<Vec<[usize; 2]>> = steps.iter().map(|step| kernel.starts(step)).collect();
        let mut memory = Memory::fresh(&kernel.pieces);
        (0..read).for_each(|window| memory.piece(window).copy_from_slice(&fetched(&arrays, window, starts[0][window])));
        for (i, step) in steps.iter().enumerate() {
            let next = starts.get(i + 1);
            let moves = |window: &usize| next.is_none_or(|next| next[*window] != starts[i][*window]);
            let ahead: Vec<(usize, Vec<u8>)> = next.map_or(Vec::new(), |next| {
                (0..read).filter(moves).map(|window| (window, fetched(&arrays, window, next[window]))).collect()
            });
            kernel.compiled.call("main", step, memory.all());
            for window in (read..windows).filter(moves) {
                let (array, start) = (&mut arrays[of(window)], starts[i][window]);
                assert!(written.insert((window, start)), "window {window} writes the block at {start:?} twice");
                for (there, here) in rows(array, &kernel.pieces[window], start) {
                    array.bytes[there].copy_from_slice(&memory.piece(window)[here]);
                }
                memory.spoil(window);
            }
            for (window, block) in ahead {
                memory.piece(window).copy_from_slice(&block);
            }
        }
    }
    (read..windows).map(|window| arrays[of(window)].clone()).collect()
}

/// All steps along these dimensions, the last dimension's innermost.
fn steps(grid: &[(usize, bool)]) -> Vec<Vec<i32>> {
    grid.iter().fold(vec![Vec::new()], |before: Vec<Vec<i32>>, (steps, _)| {
        let longer = |step: &Vec<i32>| (0..*steps as i32).map(|i| [&step[..], &[i]].concat()).collect::<Vec<_>>();
        before.iter().flat_map(longer).collect()
    })
}
