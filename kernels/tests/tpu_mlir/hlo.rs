//! A program on the arrays of the suite: by MLIR, and to see that both executors agree to the bit, by the interpreter.

use super::array::{Array, Data, Element, Type};
use super::kernel::Tensor;
use super::{interpreter, program};
use half::bf16;

/// Runs `@main` of a program on its arguments.
pub fn run(text: &str, arguments: &[Array]) -> Vec<Array> {
    let results: Vec<Array> = program::run(text, arguments.iter().map(tensor).collect()).iter().map(array).collect();
    let interpreted = interpreter::run(text, arguments);
    assert_eq!(results.len(), interpreted.len(), "results");
    for (result, (one, other)) in results.iter().zip(&interpreted).enumerate() {
        assert_eq!(one.ty, other.ty, "result {result}");
        let (one, other) = (one.as_floats(), other.as_floats());
        let differ = |i: &usize| one[*i].to_bits() != other[*i].to_bits() && !(one[*i].is_nan() && other[*i].is_nan());
        let different = (0..one.len()).find(differ);
        let values = different.map(|i| (one[i], other[i]));
        assert_eq!(different, None, "result {result}: MLIR and the interpreter differ, {values:?}");
    }
    results
}

fn tensor(array: &Array) -> Tensor {
    let (element, bytes): (_, Vec<u8>) = match (&array.data, array.ty.element) {
        (Data::Integers(x), _) => ("i32", x.iter().flat_map(|x| x.to_le_bytes()).collect()),
        (Data::Floats(x), Element::Bf16) => ("bf16", x.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()),
        (Data::Floats(x), _) => ("f32", x.iter().flat_map(|x| x.to_le_bytes()).collect()),
    };
    Tensor { dims: array.ty.dims.clone(), element: element.to_owned(), bytes }
}

fn array(tensor: &Tensor) -> Array {
    let element = if tensor.element == "bf16" { Element::Bf16 } else { Element::F32 };
    Array::floats(Type { dims: tensor.dims.clone(), element }, program::floats(tensor).collect())
}
