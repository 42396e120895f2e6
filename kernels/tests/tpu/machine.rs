//! A TensorCore, as far as the kernels' text goes: executes every step of the grid on windows that it fetches and writes back.
//!
//! It is as unkind as the language allows. Fresh memory, and the part of a window that overhangs its array, is NaN. Parallel steps
//! are taken backwards, each with memory of its own. The next step's windows are fetched before a step runs, and a
//! result's window is written back when the next step shows another. What has bfloat16 in the text is rounded to it; products
//! of float32 without `contract_precision<fp32>` take their operands as bfloat16, as the hardware does.

use super::array::{Array, Data, Element, Type, round_to_bf16};
use super::parse::{Function, Operation, Region, Slot, integers, module};
use rayon::prelude::*;
use std::collections::HashSet;
use std::rc::Rc;

#[derive(Clone, Debug)]
enum Value {
    Scalar(i64),
    Vector(Rc<Array>),
    /// Which of the memories.
    Memory(usize),
}

/// Runs a kernel on its operands; `aliases` are pairs of an operand and the result that takes its memory over.
pub fn run(text: &str, operands: &[Array], results: &[Type], aliases: &[(usize, usize)]) -> Vec<Array> {
    let functions = module(text);
    let main = functions.iter().find(|f| f.attributes["sym_name"] == "\"main\"").expect("a main function");
    let grid = integers(&main.attributes["iteration_bounds"]);
    let parallel: Vec<bool> = main.attributes["dimension_semantics"].split(',').map(|s| s.contains("<parallel>")).collect();
    let windows: Vec<Window> = windows(main, &functions);
    assert_eq!(windows.len(), operands.len() + results.len(), "a window for each operand and result");
    let scratch = integers(&main.attributes["scratch_operands"])[0] as usize;
    assert_eq!(main.region.arguments.len(), grid.len() + windows.len() + scratch, "arguments");

    let mut arrays: Vec<Array> = operands.to_vec();
    arrays.extend(results.iter().map(|ty| Array::fresh(ty.clone())));
    let arrays_of: Vec<usize> = (0..arrays.len())
        .map(|i| {
            let taken = aliases.iter().find(|(_, result)| i == operands.len() + result);
            taken.map_or(i, |&(operand, _)| operand)
        })
        .collect();
    let mut core =
        Core { main, grid: &grid, windows: &windows, operands: operands.len(), arrays, arrays_of, written: HashSet::new() };
    let outer = parallel.iter().take_while(|parallel| **parallel).count();
    assert!(parallel[outer..].iter().all(|parallel| !parallel), "parallel dimensions come first");
    let steps = |bounds: &[i64]| -> Vec<Vec<i64>> {
        let count: i64 = bounds.iter().product();
        let step = |i: i64| {
            let mut rest = i;
            let mut step: Vec<i64> = bounds.iter().rev().map(|bound| (rest % bound, rest /= bound).0).collect();
            step.reverse();
            step
        };
        (0..count).map(step).collect()
    };
    for first in steps(&grid[..outer]).into_iter().rev() {
        let of_core: Vec<Vec<i64>> = steps(&grid[outer..]).iter().map(|inner| [&first[..], inner].concat()).collect();
        core.run(&of_core);
    }
    (0..results.len()).map(|i| core.arrays[core.arrays_of[operands.len() + i]].clone()).collect()
}

struct Window<'a> {
    block: [usize; 2],
    place: &'a Function,
}

fn windows<'a>(main: &Function, functions: &'a [Function]) -> Vec<Window<'a>> {
    let params = main.attributes["window_params"].split("{").skip(1);
    params
        .map(|param| {
            let after = |key: &str| param.split_once(key).unwrap_or_else(|| panic!("no {key} in {param}")).1;
            let name = after("transform_indices = @").split([',', '}']).next().unwrap();
            let block = after("window_bounds = ").split('>').next().unwrap();
            let place = functions.iter().find(|f| f.attributes["sym_name"] == format!("{name:?}"));
            let block: Vec<usize> = integers(block).into_iter().map(|b| b as usize).collect();
            Window { block: block.try_into().expect("two dimensions"), place: place.expect("the window's transform") }
        })
        .collect()
}

struct Core<'a> {
    main: &'a Function,
    grid: &'a [i64],
    windows: &'a [Window<'a>],
    operands: usize,
    arrays: Vec<Array>,
    /// The array of each window.
    arrays_of: Vec<usize>,
    /// The blocks of results that have been written back.
    written: HashSet<(usize, [usize; 2])>,
}

impl Core<'_> {
    fn run(&mut self, steps: &[Vec<i64>]) {
        let arguments = &self.main.region.arguments[self.grid.len()..];
        let mut memories: Vec<Array> = arguments.iter().map(|(_, ty)| Array::fresh(ty.clone())).collect();
        let mut places: Vec<[usize; 2]> = self.places(&steps[0]);
        for window in 0..self.operands {
            memories[window] = self.fetch(window, places[window]);
        }
        for (i, step) in steps.iter().enumerate() {
            let next = steps.get(i + 1).map(|next| self.places(next));
            let moves = |window: usize| next.as_ref().filter(|next| next[window] != places[window]).map(|next| next[window]);
            let fetched: Vec<Option<Array>> =
                (0..self.operands).map(|window| moves(window).map(|place| self.fetch(window, place))).collect();
            let mut values: Vec<Option<Value>> = vec![None; self.main.slots];
            let numbers = step.iter().map(|&i| Value::Scalar(i));
            let all = numbers.chain((0..memories.len()).map(Value::Memory));
            for ((slot, _), value) in self.main.region.arguments.iter().zip(all) {
                values[*slot] = Some(value);
            }
            Frame { values: &mut values, memories: &mut memories }.run(&self.main.region);
            for window in self.operands..self.windows.len() {
                if next.is_none() || moves(window).is_some() {
                    self.write_back(window, places[window], &memories[window]);
                    memories[window] = Array::fresh(memories[window].ty.clone());
                }
            }
            for (window, fetched) in fetched.into_iter().enumerate() {
                if let Some(fetched) = fetched {
                    memories[window] = fetched;
                }
            }
            places = next.unwrap_or(places);
        }
    }

    /// Where each window lies in its array at a step, in elements.
    fn places(&self, step: &[i64]) -> Vec<[usize; 2]> {
        let place = |window: &Window| {
            let mut values: Vec<Option<Value>> = vec![None; window.place.slots];
            for ((slot, _), number) in window.place.region.arguments.iter().zip(step) {
                values[*slot] = Some(Value::Scalar(*number));
            }
            let mut frame = Frame { values: &mut values, memories: &mut [] };
            let returned = frame.run(&window.place.region);
            let place: Vec<usize> =
                returned.iter().zip(window.block).map(|(&slot, bound)| frame.scalar(slot) as usize * bound).collect();
            <[usize; 2]>::try_from(place).expect("rows and columns")
        };
        self.windows.iter().map(place).collect()
    }

    fn check(&self, window: usize, place: [usize; 2]) {
        let dims = self.arrays[self.arrays_of[window]].ty.matrix();
        assert!(place[0] < dims[0] && place[1] < dims[1], "window {window} at {place:?} lies outside of {dims:?}");
    }

    fn fetch(&self, window: usize, place: [usize; 2]) -> Array {
        self.check(window, place);
        self.arrays[self.arrays_of[window]].block(place, self.windows[window].block)
    }

    fn write_back(&mut self, window: usize, place: [usize; 2], block: &Array) {
        self.check(window, place);
        assert!(self.written.insert((window, place)), "window {window} writes the block at {place:?} twice");
        self.arrays[self.arrays_of[window]].put(place, block);
    }
}

/// A function's values while it runs.
struct Frame<'a> {
    values: &'a mut [Option<Value>],
    memories: &'a mut [Array],
}

impl Frame<'_> {
    fn value(&self, slot: Slot) -> &Value {
        self.values[slot].as_ref().expect("made before it is used")
    }

    fn scalar(&self, slot: Slot) -> i64 {
        let Value::Scalar(x) = self.value(slot) else { panic!("a scalar") };
        *x
    }

    fn vector(&self, slot: Slot) -> Rc<Array> {
        let Value::Vector(x) = self.value(slot) else { panic!("a vector") };
        x.clone()
    }

    fn memory(&self, slot: Slot) -> usize {
        let Value::Memory(i) = self.value(slot) else { panic!("a memory") };
        *i
    }

    /// Runs to the end; what is returned.
    fn run(&mut self, region: &Region) -> Vec<Slot> {
        for operation in &region.operations {
            match operation.name.as_str() {
                "func.return" | "scf.yield" => return operation.operands.clone(),
                "scf.if" => {
                    let taken = usize::from(self.scalar(operation.operands[0]) == 0);
                    self.run(&operation.regions[taken]);
                }
                "tpu.vector_store" => self.store(operation),
                _ => {
                    let value = self.evaluate(operation);
                    self.values[operation.result.expect("a result")] = Some(value);
                }
            }
        }
        panic!("a region without an end")
    }

    fn start(&self, operation: &Operation, first: usize) -> [usize; 2] {
        [0, 1].map(|i| self.scalar(operation.operands[first + i]) as usize)
    }

    fn store(&mut self, operation: &Operation) {
        assert_eq!(operation.attributes["operandSegmentSizes"], "array<i32: 1, 1, 2, 0>");
        let (x, memory, start) =
            (self.vector(operation.operands[0]), self.memory(operation.operands[1]), self.start(operation, 2));
        let memory = &mut self.memories[memory];
        within(start, x.ty.matrix(), memory.ty.matrix());
        memory.put(start, &x);
    }

    fn evaluate(&mut self, operation: &Operation) -> Value {
        let ty = &operation.result_types[0];
        let attribute = |name: &str| operation.attributes.get(name).map(String::as_str);
        let operand = |i: usize| operation.operands[i];
        if ty.dims.is_empty() {
            return Value::Scalar(self.evaluate_scalar(operation));
        }
        let array = match operation.name.as_str() {
            "arith.constant" => constant(attribute("value").expect("a value"), ty),
            "vector.load" => {
                let start = self.start(operation, 1);
                let memory = &self.memories[self.memory(operand(0))];
                within(start, ty.matrix(), memory.ty.matrix());
                memory.block(start, ty.matrix())
            }
            "vector.broadcast" => match self.value(operand(0)) {
                Value::Scalar(x) => Array::integers(ty.clone(), vec![i32::try_from(*x).unwrap(); ty.len()]),
                _ => broadcast(&self.vector(operand(0)), ty),
            },
            "tpu.iota" => {
                let [_, columns] = ty.matrix();
                let along: usize = attribute("dimension").unwrap().trim_end_matches(" : i32").parse().unwrap();
                let number = |i: usize| (if along == 0 { i / columns } else { i % columns }) as i32;
                Array::integers(ty.clone(), (0..ty.len()).map(number).collect())
            }
            "vector.extract_strided_slice" => {
                let start: Vec<usize> = integers(attribute("offsets").unwrap()).into_iter().map(|i| i as usize).collect();
                assert_eq!(integers(attribute("sizes").unwrap()), ty.dims.iter().map(|&d| d as i64).collect::<Vec<_>>());
                let x = self.vector(operand(0));
                let start = [start[0], start[1]];
                within(start, ty.matrix(), x.ty.matrix());
                x.block(start, ty.matrix())
            }
            "vector.shape_cast" => Array { ty: ty.clone(), data: self.vector(operand(0)).data.clone() },
            "vector.transpose" => {
                let x = self.vector(operand(0));
                let [rows, columns] = x.ty.matrix();
                assert_eq!(ty.matrix(), [columns, rows]);
                x.gather(&ty.dims, |i| i % rows * columns + i / rows)
            }
            "vector.multi_reduction" => self.reduce(operation),
            "tpu.matmul" => product(
                &self.vector(operand(0)),
                &self.vector(operand(1)),
                &self.vector(operand(2)),
                attribute("dimension_numbers").unwrap(),
                attribute("precision"),
                ty,
            ),
            "arith.truncf" => {
                let x = self.vector(operand(0));
                assert_eq!((x.ty.element, ty.element), (Element::F32, Element::Bf16), "truncf");
                Array::floats(ty.clone(), x.as_floats().iter().map(|&x| round_to_bf16(x)).collect())
            }
            "arith.extf" => {
                let x = self.vector(operand(0));
                assert_eq!((x.ty.element, ty.element), (Element::Bf16, Element::F32), "extf");
                Array::floats(ty.clone(), x.as_floats().to_vec())
            }
            "arith.cmpi" => {
                let (x, y) = (self.vector(operand(0)), self.vector(operand(1)));
                let compare =
                    |(x, y): (&i32, &i32)| i32::from(holds(attribute("predicate").unwrap(), i64::from(*x), i64::from(*y)));
                Array::integers(ty.clone(), x.as_integers().iter().zip(y.as_integers()).map(compare).collect())
            }
            "arith.select" => {
                let [which, x, y] = [0, 1, 2].map(|i| self.vector(operand(i)));
                assert!(x.ty == *ty && y.ty == *ty && which.ty.dims == ty.dims, "select");
                let chosen = |(i, which): (usize, &i32)| if *which != 0 { x.as_floats()[i] } else { y.as_floats()[i] };
                Array::floats(ty.clone(), which.as_integers().iter().enumerate().map(chosen).collect())
            }
            "math.exp" | "math.log" | "math.tanh" => {
                let x = self.vector(operand(0));
                let function = match operation.name.as_str() {
                    "math.exp" => f32::exp,
                    "math.log" => f32::ln,
                    _ => f32::tanh,
                };
                Array::floats(ty.clone(), x.as_floats().iter().map(|&x| ty.element.round(function(x))).collect())
            }
            name => elementwise(name, &self.vector(operand(0)), &self.vector(operand(1)), ty),
        };
        assert_eq!(&array.ty, ty, "{}", operation.name);
        Value::Vector(Rc::new(array))
    }

    fn evaluate_scalar(&self, operation: &Operation) -> i64 {
        let operand = |i: usize| self.scalar(operation.operands[i]);
        match operation.name.as_str() {
            "arith.constant" => operation.attributes["value"].split(' ').next().unwrap().parse().expect("an integer"),
            "arith.addi" => operand(0) + operand(1),
            "arith.subi" => operand(0) - operand(1),
            "arith.muli" => operand(0) * operand(1),
            "arith.minsi" => operand(0).min(operand(1)),
            "arith.cmpi" => i64::from(holds(&operation.attributes["predicate"], operand(0), operand(1))),
            "arith.index_cast" => operand(0),
            "tpu.assume_multiple" => {
                let of: i64 = operation.attributes["multiple"].trim_end_matches(" : i32").parse().unwrap();
                assert_eq!(operand(0) % of, 0, "assumed to be a multiple of {of}");
                operand(0)
            }
            name => panic!("operation {name} on scalars"),
        }
    }

    /// Over the rows.
    fn reduce(&self, operation: &Operation) -> Array {
        assert_eq!(operation.attributes["reduction_dims"], "array<i64: 0>");
        let (x, init) = (self.vector(operation.operands[0]), self.vector(operation.operands[1]));
        let [_, columns] = x.ty.matrix();
        let mut out = init.as_floats().to_vec();
        for row in x.as_floats().chunks(columns) {
            for (out, x) in out.iter_mut().zip(row) {
                *out = match operation.attributes["kind"].as_str() {
                    "#vector.kind<add>" => *out + x,
                    "#vector.kind<maximumf>" => maximum(*out, *x),
                    kind => panic!("reduction {kind}"),
                };
            }
        }
        Array::floats(operation.result_types[0].clone(), out)
    }
}

fn within(start: [usize; 2], dims: [usize; 2], of: [usize; 2]) {
    assert!(start[0] + dims[0] <= of[0] && start[1] + dims[1] <= of[1], "{dims:?} from {start:?} on of {of:?}");
}

fn holds(predicate: &str, x: i64, y: i64) -> bool {
    match predicate.trim_end_matches(" : i64") {
        "0" => x == y,
        "1" => x != y,
        "2" => x < y,
        "3" => x <= y,
        "4" => x > y,
        "5" => x >= y,
        other => panic!("predicate {other}"),
    }
}

/// NaN if either is.
fn maximum(x: f32, y: f32) -> f32 {
    if x.is_nan() || y.is_nan() { f32::NAN } else { x.max(y) }
}

fn constant(value: &str, ty: &Type) -> Array {
    let number = value.strip_prefix("dense<").and_then(|v| v.split('>').next()).expect("one number for all elements");
    if ty.element == Element::Integer {
        return Array::integers(ty.clone(), vec![number.parse().expect("an integer"); ty.len()]);
    }
    let number = match number.strip_prefix("0x") {
        Some(bits) => f32::from_bits(u32::from_str_radix(bits, 16).unwrap()),
        None => number.parse().expect("a float"),
    };
    Array::floats(ty.clone(), vec![ty.element.round(number); ty.len()])
}

fn broadcast(x: &Array, to: &Type) -> Array {
    let ([rows, columns], [to_rows, to_columns]) = (x.ty.matrix(), to.matrix());
    assert!((rows == 1 || rows == to_rows) && (columns == 1 || columns == to_columns), "broadcast");
    x.gather(&to.dims, |i| {
        let (row, column) = (i / to_columns, i % to_columns);
        (if rows == 1 { 0 } else { row }) * columns + if columns == 1 { 0 } else { column }
    })
}

fn elementwise(name: &str, x: &Array, y: &Array, ty: &Type) -> Array {
    assert!(x.ty == *ty && y.ty == *ty, "{name}");
    match (&x.data, &y.data) {
        (Data::Floats(x), Data::Floats(y)) => {
            let function = match name {
                "arith.addf" => |x: f32, y: f32| x + y,
                "arith.subf" => |x: f32, y: f32| x - y,
                "arith.mulf" => |x: f32, y: f32| x * y,
                "arith.maximumf" => maximum,
                _ => panic!("operation {name} on floats"),
            };
            Array::floats(ty.clone(), x.iter().zip(y).map(|(&x, &y)| ty.element.round(function(x, y))).collect())
        }
        (Data::Integers(x), Data::Integers(y)) => {
            let function = match name {
                "arith.addi" => |x: i32, y: i32| x.wrapping_add(y),
                "arith.subi" => |x: i32, y: i32| x.wrapping_sub(y),
                "arith.muli" => |x: i32, y: i32| x.wrapping_mul(y),
                "arith.andi" => |x: i32, y: i32| x & y,
                _ => panic!("operation {name} on integers"),
            };
            Array::integers(ty.clone(), x.iter().zip(y).map(|(&x, &y)| function(x, y)).collect())
        }
        _ => panic!("{name} of floats and integers"),
    }
}

/// x·y + before, each element summed in the result's precision.
fn product(x: &Array, y: &Array, before: &Array, numbers: &str, precision: Option<&str>, ty: &Type) -> Array {
    assert_eq!(x.ty.element, y.ty.element, "operands of one type");
    assert_eq!(&before.ty, ty, "matmul");
    let sums: Vec<i64> = integers(numbers).into_iter().take(2).collect();
    let exact = x.ty.element == Element::Bf16 || precision == Some("#tpu.contract_precision<fp32>");
    let operand = |x: &Array, transposed: bool| {
        let [rows, columns] = x.ty.matrix();
        let x = if transposed { x.gather(&[columns, rows], |i| i % rows * columns + i / rows) } else { x.clone() };
        let values: Vec<f32> = x.as_floats().iter().map(|&x| if exact { x } else { round_to_bf16(x) }).collect();
        (values, x.ty.matrix())
    };
    let (x, [m, k]) = operand(x, sums[0] == 0);
    let (y, [k_of_y, n]) = operand(y, sums[1] == 1);
    assert_eq!((k, vec![m, n]), (k_of_y, ty.dims.clone()), "matmul {numbers}");
    let mut out = before.as_floats().to_vec();
    out.par_chunks_mut(n).zip(x.par_chunks(k)).for_each(|(out, x)| {
        let mut sum = vec![0.0f32; n];
        for (x, y) in x.iter().zip(y.chunks(n)) {
            if ty.element == Element::F32 {
                sum.iter_mut().zip(y).for_each(|(sum, y)| *sum += x * y);
            } else {
                sum.iter_mut().zip(y).for_each(|(sum, y)| *sum = round_to_bf16(*sum + x * y));
            }
        }
        out.iter_mut().zip(sum).for_each(|(out, sum)| *out = ty.element.round(*out + sum));
    });
    Array::floats(ty.clone(), out)
}
