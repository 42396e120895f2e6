//! The few StableHLO operations that stand around the kernels, and the kernels, run on tensors.

use super::array::{Array, Data, Element, Type};
use super::machine;
use std::collections::HashMap;

/// Runs `@main` of a program on its arguments.
pub fn run(program: &str, arguments: &[Array]) -> Vec<Array> {
    let mut values: HashMap<String, Array> = HashMap::new();
    for line in program.lines().map(str::trim) {
        if let Some(signature) = line.strip_prefix("func.func public @main(") {
            let names = signature.split("%").skip(1).map(|part| format!("%{}", part.split(':').next().unwrap()));
            values.extend(names.zip(arguments.iter().cloned()));
        } else if let Some(returned) = line.strip_prefix("return ") {
            let names = returned.split(':').next().unwrap().split(',');
            return names.map(|name| values[name.trim()].clone()).collect();
        } else if let Some((names, operation)) = line.split_once(" = stablehlo.") {
            let name = names.split(':').next().unwrap();
            let mut results = Line::new(operation, &values).run();
            if results.len() == 1 {
                values.insert(name.to_owned(), results.remove(0));
            } else {
                values.extend(results.into_iter().enumerate().map(|(i, result)| (format!("{name}#{i}"), result)));
            }
        }
    }
    panic!("a program that returns nothing")
}

struct Line<'a> {
    name: &'a str,
    text: &'a str,
    operands: Vec<&'a Array>,
    results: Vec<Type>,
}

impl<'a> Line<'a> {
    fn new(operation: &'a str, values: &'a HashMap<String, Array>) -> Self {
        let (name, text) = operation.split_once(' ').expect("operands");
        let (before, types) = operation.rsplit_once(" : ").expect("types");
        let named = before.split(" {").next().unwrap();
        let names = named.split(['(', ')', ',', ' ']).filter(|word| word.starts_with('%'));
        let operands = names.map(|name| values.get(name).unwrap_or_else(|| panic!("{name} is not defined"))).collect();
        let results = types.rsplit("->").next().unwrap();
        let mut results: Vec<Type> = results.split("tensor<").skip(1).map(Type::parse).collect();
        // `select c, x, y : type of c, type`.
        if name == "select" {
            results.remove(0);
        }
        Self { name, text, operands, results }
    }

    /// The integers between `key` and the closing bracket.
    fn integers(&self, key: &str) -> Vec<usize> {
        let inner = self.text.split_once(key).unwrap_or_else(|| panic!("no {key} in {}", self.text)).1.split(']').next().unwrap();
        inner.split(',').filter(|n| !n.trim().is_empty()).map(|n| n.trim().parse().expect("an integer")).collect()
    }

    fn run(&self) -> Vec<Array> {
        if self.name == "custom_call" {
            return self.kernel();
        }
        let ty = &self.results[0];
        let operand = |i: usize| self.operands[i];
        let array = match self.name {
            "constant" => {
                let number = self.text.split(['<', '>']).nth(1).unwrap();
                match ty.element {
                    Element::Integer => Array::integers(ty.clone(), vec![number.parse().unwrap(); ty.len()]),
                    _ => Array::floats(ty.clone(), vec![number.parse().unwrap(); ty.len()]),
                }
            }
            "reshape" => Array { ty: ty.clone(), data: operand(0).data.clone() },
            "convert" => Array::floats(ty.clone(), operand(0).as_floats().iter().map(|&x| ty.element.round(x)).collect()),
            "compare" => {
                assert!(self.text.starts_with("GE,"), "compare {}", self.text);
                let pairs = operand(0).as_integers().iter().zip(operand(1).as_integers());
                Array::integers(ty.clone(), pairs.map(|(x, y)| i32::from(x >= y)).collect())
            }
            "broadcast_in_dim" => {
                assert_eq!((self.integers("dims = ["), operand(0).ty.dims.len()), (vec![0], 1));
                let inner = ty.dims[1];
                operand(0).gather(&ty.dims, |i| i / inner)
            }
            "select" => {
                let (x, y) = (operand(1).as_floats(), operand(2).as_floats());
                let chosen = |(i, which): (usize, &i32)| if *which != 0 { x[i] } else { y[i] };
                Array::floats(ty.clone(), operand(0).as_integers().iter().enumerate().map(chosen).collect())
            }
            "pad" => {
                assert_eq!(self.integers("low = ["), [0, 0]);
                let mut out = Array::floats(ty.clone(), vec![operand(1).as_floats()[0]; ty.len()]);
                out.put([0, 0], operand(0));
                out
            }
            "slice" => {
                let first = self.text.split_once('[').unwrap().1;
                let start: usize = first.split(':').next().unwrap().parse().unwrap();
                let inner: usize = ty.dims[1..].iter().product();
                operand(0).gather(&ty.dims, |i| i + start * inner)
            }
            "concatenate" => {
                let parts = self.operands.iter().flat_map(|part| part.as_floats()).copied().collect();
                Array { ty: ty.clone(), data: Data::Floats(parts) }
            }
            "add" => {
                let pairs = operand(0).as_floats().iter().zip(operand(1).as_floats());
                Array::floats(ty.clone(), pairs.map(|(x, y)| ty.element.round(x + y)).collect())
            }
            name => panic!("stablehlo.{name}"),
        };
        assert_eq!(&array.ty, ty, "{}", self.name);
        vec![array]
    }

    fn kernel(&self) -> Vec<Array> {
        assert!(self.text.starts_with("@tpu_custom_call("), "{:.60}", self.text);
        let config = self.text.split_once("backend_config = \"").unwrap().1.split('"').next().unwrap().replace("\\22", "\"");
        let body = config.split_once("\"body\": \"").unwrap().1.split('"').next().unwrap();
        let body = String::from_utf8(from_base64(body)).expect("text");
        let operands: Vec<Array> = self.operands.iter().map(|&x| x.clone()).collect();
        let alias = self.text.split_once("output_tuple_indices = [").map(|(_, rest)| {
            let result: Option<usize> = rest.split(']').next().unwrap().parse().ok();
            let operand = rest.split_once("operand_index = ").unwrap().1.split(',').next().unwrap().parse().unwrap();
            (operand, result.unwrap_or(0))
        });
        machine::run(&body, &operands, &self.results, &alias.into_iter().collect::<Vec<_>>())
    }
}

fn from_base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        other => panic!("base64 digit {other}"),
    };
    let mut bytes = Vec::new();
    for four in text.as_bytes().chunks(4) {
        let digits: Vec<u8> = four.iter().filter(|&&c| c != b'=').map(|&c| digit(c)).collect();
        let word = digits.iter().enumerate().fold(0u32, |word, (i, &digit)| word | u32::from(digit) << (18 - 6 * i));
        bytes.extend((1..digits.len()).map(|i| (word >> (24 - 8 * i)) as u8));
    }
    bytes
}
