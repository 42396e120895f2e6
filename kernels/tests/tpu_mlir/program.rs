//! A program: the StableHLO around the kernels, on bytes.

use super::kernel::{self, Tensor};
use super::translate::width;
use half::bf16;
use std::collections::HashMap;

/// Runs `@main` of a program on its arguments.
pub fn run(program: &str, arguments: Vec<Tensor>) -> Vec<Tensor> {
    let (_, main) = program.split_once("@main(").expect("a main function");
    let (signature, body) = main.split_once(" {\n").expect("a body");
    let names = signature.split(") -> (").next().unwrap_or_default().split(": tensor<").filter_map(|part| part.rsplit_once('%'));
    let mut values: HashMap<String, Tensor> = names.map(|(_, name)| format!("%{name}")).zip(arguments).collect();
    for line in body.lines().map(str::trim) {
        if let Some(returned) = line.strip_prefix("return ") {
            let names = returned.split(" : ").next().unwrap_or_default();
            return names.split(", ").map(|name| values[name].clone()).collect();
        }
        let (names, operation) = line.split_once(" = stablehlo.").unwrap_or_else(|| panic!("an operation: {line}"));
        let made = Operation::new(operation, &values).run();
        match names.split_once(':') {
            None => values.extend(made.into_iter().map(|value| (names.to_owned(), value))),
            Some((name, _)) => values.extend(made.into_iter().enumerate().map(|(i, value)| (format!("{name}#{i}"), value))),
        }
    }
    panic!("a program that returns nothing")
}

struct Operation<'a> {
    name: &'a str,
    text: &'a str,
    operands: Vec<&'a Tensor>,
    /// What it makes, not yet filled.
    results: Vec<Tensor>,
}

impl<'a> Operation<'a> {
    fn new(operation: &'a str, values: &'a HashMap<String, Tensor>) -> Self {
        let (name, text) = operation.split_once(' ').expect("an operation's name");
        let (before, types) = text.rsplit_once(" : ").expect("types");
        let before = before.split(" {").next().unwrap_or_default();
        let words = before.split([' ', ',', '(', ')']).filter(|word| word.starts_with('%'));
        let operands = words.map(|word| values.get(word).unwrap_or_else(|| panic!("{word} is not defined"))).collect();
        // Where no arrow says what is made, it is of the last type named.
        let made: Vec<&str> = match types.split_once(" -> ") {
            Some((_, made)) => made.split("tensor<").skip(1).collect(),
            None => types.rsplit("tensor<").take(1).collect(),
        };
        Self { name, text, operands, results: made.into_iter().map(fresh).collect() }
    }

    fn run(&self) -> Vec<Tensor> {
        if self.name == "custom_call" {
            return self.kernel();
        }
        let mut made = self.results[0].clone();
        let bytes = |i: usize| &self.operands[i].bytes[..];
        made.bytes = match self.name {
            "constant" => {
                assert!(self.text.starts_with("dense<0>") || self.text.starts_with("dense<0.0>"), "constant {}", self.text);
                vec![0; made.bytes.len()]
            }
            "reshape" => bytes(0).to_vec(),
            "convert" => floats(self.operands[0]).flat_map(|x| encoded(x, &made.element)).collect(),
            "compare" => {
                assert!(self.text.starts_with("GE, ") && self.text.contains("SIGNED"), "compare {}", self.text);
                let numbers = |i: usize| bytes(i).chunks(4).map(|x| i32::from_le_bytes(x.try_into().unwrap()));
                numbers(0).zip(numbers(1)).map(|(x, y)| u8::from(x >= y)).collect()
            }
            "broadcast_in_dim" => {
                assert!(self.text.contains("dims = [0]") && made.element == "i1", "broadcast {}", self.text);
                bytes(0).iter().flat_map(|&x| std::iter::repeat_n(x, made.dims[1])).collect()
            }
            "select" => {
                let width = width(&made.element);
                let either = bytes(1).chunks(width).zip(bytes(2).chunks(width));
                bytes(0).iter().zip(either).flat_map(|(&which, (x, y))| if which != 0 { x } else { y }).copied().collect()
            }
            "pad" => {
                assert!(self.text.contains("low = [0, 0]") && self.text.contains(", 0], interior = [0, 0]"), "pad {}", self.text);
                let more = made.bytes.len() - bytes(0).len();
                [bytes(0), &bytes(1).repeat(more / bytes(1).len())].concat()
            }
            "slice" => {
                let start = self.text.split_once('[').and_then(|(_, ranges)| ranges.split(':').next()).expect("ranges");
                let row = made.bytes.len() / made.dims[0];
                bytes(0)[start.parse::<usize>().expect("a start") * row..][..made.bytes.len()].to_vec()
            }
            "concatenate" => {
                assert!(self.text.contains(", dim = 0 "), "concatenate {}", self.text);
                self.operands.iter().flat_map(|part| &part.bytes).copied().collect()
            }
            "add" => {
                let sums = floats(self.operands[0]).zip(floats(self.operands[1])).map(|(x, y)| x + y);
                sums.flat_map(|x| encoded(x, &made.element)).collect()
            }
            other => panic!("stablehlo.{other}"),
        };
        assert_eq!(made.bytes.len(), self.results[0].bytes.len(), "{} {}", self.name, self.text);
        vec![made]
    }

    fn kernel(&self) -> Vec<Tensor> {
        assert!(self.text.starts_with("@tpu_custom_call("), "{:.60}", self.text);
        let after = |key: &str, end: &[char]| {
            let (_, rest) = self.text.split_once(key)?;
            rest.split(end).next()
        };
        let body = from_base64(after("\\22body\\22: \\22", &['\\']).expect("a body"));
        let alias = after("operand_index = ", &[',']).map(|operand| {
            let result = after("output_tuple_indices = [", &[']']).unwrap_or_default();
            (operand.parse().expect("an operand"), if result.is_empty() { 0 } else { result.parse().expect("a result") })
        });
        let operands = self.operands.iter().map(|&operand| operand.clone()).collect();
        kernel::run(&String::from_utf8(body).expect("text"), operands, self.results.clone(), alias.as_slice())
    }
}

/// `4x5xf32>…`, or `f32>…`.
fn fresh(ty: &str) -> Tensor {
    let inner = ty.split('>').next().unwrap_or_default();
    let (dims, element) = inner.rsplit_once('x').unwrap_or(("", inner));
    let dims: Vec<usize> = dims.split('x').filter(|dim| !dim.is_empty()).map(|dim| dim.parse().expect("a dimension")).collect();
    Tensor::fresh(&dims, element)
}

pub fn floats(x: &Tensor) -> impl Iterator<Item = f32> + use<'_> {
    x.bytes.chunks(width(&x.element)).map(|x| match *x {
        [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        _ => panic!("no float"),
    })
}

fn encoded(x: f32, element: &str) -> Vec<u8> {
    match element {
        "f32" => x.to_le_bytes().to_vec(),
        "bf16" => bf16::from_f32(x).to_le_bytes().to_vec(),
        other => panic!("a float as {other}"),
    }
}

fn from_base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.trim_end_matches('=').bytes();
    let mut bytes = Vec::with_capacity(text.len());
    let (mut bits, mut held) = (0u32, 0);
    for digit in digits {
        let value = DIGITS.iter().position(|&d| d == digit).expect("a base64 digit");
        (bits, held) = (bits << 6 | value as u32, held + 6);
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    bytes
}
