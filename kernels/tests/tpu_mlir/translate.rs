//! From Mosaic to what mlir-opt knows: `arith`, `math`, `scf`, and tensors where Mosaic has vectors.
//!
//! Most operations pass as they stand, without their prefix: what they mean is MLIR's business. Vectors become tensors, since MLIR
//! makes loops of tensors, quick to compile at any size, and unrolls vectors. What Mosaic has of its own (products, row
//! numbers, stores), and what MLIR has for vectors alone, becomes `linalg` or `tensor`.
//!
//! Each function takes two pointers. The kernel: its step's numbers, and all its memories one after the other. The transform of a
//! window: the step's numbers, and where to write the block's place.

use std::fmt::Write;

/// A piece of memory that the kernel is given: of a window, or scratch.
#[derive(Clone, Debug)]
pub struct Piece {
    pub dims: [usize; 2],
    pub element: String,
    /// Where it starts among all of them, in bytes.
    pub start: usize,
}

impl Piece {
    pub fn bytes(&self) -> usize {
        self.dims[0] * self.dims[1] * width(&self.element)
    }
}

/// A kernel, translated.
#[derive(Debug)]
pub struct Translated {
    /// The module. `@main` is the kernel, every other function the transform of a window.
    pub text: String,
    /// What the kernel says of itself, as it is written: its grid, its windows.
    pub attributes: String,
    pub pieces: Vec<Piece>,
}

/// Bytes of an element.
pub fn width(element: &str) -> usize {
    match element {
        "f32" | "i32" => 4,
        "bf16" => 2,
        "i1" => 1,
        other => panic!("elements of {other}"),
    }
}

/// The kernel of a module of the stable form.
pub fn translate(mosaic: &str) -> Translated {
    let plain = mosaic.replace("\"stable_mosaic.", "\"").replace(", #tpu.memory_space<vmem>", "").replace("vector<", "tensor<");
    let mut all = Translated { text: String::new(), attributes: String::new(), pieces: Vec::new() };
    for function in plain.split("\"func.func\"() ({\n").skip(1) {
        let (arguments, rest) =
            function.trim_start().strip_prefix("^bb0(").and_then(|f| f.split_once("):\n")).expect("arguments");
        let (body, own) = rest.split_once("\n  }) {").expect("the function's end");
        let own = own.lines().next().unwrap_or_default();
        let name = own.split_once("sym_name = \"").and_then(|(_, name)| name.split('"').next()).expect("a name");
        let arguments: Vec<(&str, &str)> = arguments.split(", ").map(|a| a.split_once(": ").expect("a type")).collect();
        let mut function = Function::default();
        let pieces = function.arguments(&arguments);
        body.lines().for_each(|line| function.line(line.trim()));
        let steps = arguments.len() - pieces.len();
        let second = if name == "main" { format!("memref<{}xi8>", end(&pieces)) } else { "memref<2xi32>".to_owned() };
        let _ = writeln!(all.text, "func.func @{name}(%steps: memref<{steps}xi32>, %second: {second}) {{\n{}}}", function.text);
        if name == "main" {
            (all.attributes, all.pieces) = (own.to_owned(), pieces);
        }
    }
    all
}

/// Bytes that the pieces take.
pub fn end(pieces: &[Piece]) -> usize {
    pieces.last().map_or(0, |last| (last.start + last.bytes()).next_multiple_of(64))
}

/// An operation that stands on one line.
struct Line<'a> {
    result: &'a str,
    name: &'a str,
    operands: Vec<&'a str>,
    attributes: &'a str,
    types: Vec<&'a str>,
    of_result: &'a str,
}

impl<'a> Line<'a> {
    fn new(line: &'a str) -> Self {
        let (result, call) = line.split_once(" = \"").unwrap_or(("", &line[1..]));
        let (name, call) = call.split_once("\"(").unwrap_or_else(|| panic!("an operation: {line}"));
        let (operands, rest) = call.split_once(')').expect("operands");
        let (attributes, types) = rest.rsplit_once(": (").expect("types");
        let (types, of_result) = types.split_once(") -> ").expect("a result's type");
        let list = |text: &'a str| text.split(", ").filter(|item| !item.is_empty()).collect();
        Self { result, name, operands: list(operands), attributes: attributes.trim(), types: list(types), of_result }
    }

    /// What stands between `key` and one of `ends`.
    fn attribute(&self, key: &str, ends: &[char]) -> &'a str {
        let rest = self.attributes.split_once(key).unwrap_or_else(|| panic!("{} without {key}", self.name)).1;
        rest.split(ends).next().unwrap_or_default()
    }
}

/// Rows, columns and element of `tensor<8x128xf32>`, or of a memref.
fn matrix(ty: &str) -> ([usize; 2], &str) {
    let inner = ty.split_once('<').map(|(_, inner)| inner.trim_end_matches('>')).unwrap_or_default();
    let [rows, columns, element] = inner.split('x').collect::<Vec<_>>()[..] else { panic!("{ty} is no matrix") };
    ([rows, columns].map(|dim| dim.parse().expect("a dimension")), element)
}

/// A function that is being translated.
#[derive(Default)]
struct Function {
    text: String,
    names: usize,
}

impl Function {
    fn push(&mut self, operation: &str) {
        let _ = writeln!(self.text, "  {operation}");
    }

    /// Names what an operation makes.
    fn named(&mut self, operation: &str) -> String {
        self.names += 1;
        let name = format!("%made{}", self.names);
        self.push(&format!("{name} = {operation}"));
        name
    }

    fn index(&mut self, i: usize) -> String {
        self.named(&format!("arith.constant {i} : index"))
    }

    /// Numbers and memories, from the two pointers.
    fn arguments(&mut self, arguments: &[(&str, &str)]) -> Vec<Piece> {
        let (steps, memories): (Vec<_>, Vec<_>) = arguments.iter().partition(|(_, ty)| *ty == "i32");
        for (i, (name, _)) in steps.iter().enumerate() {
            let at = self.index(i);
            self.push(&format!("{name} = memref.load %steps[{at}] : memref<{}xi32>", steps.len()));
        }
        let mut pieces: Vec<Piece> = Vec::new();
        for (_, ty) in &memories {
            let (dims, element) = matrix(ty);
            pieces.push(Piece { dims, element: element.to_owned(), start: end(&pieces) });
        }
        let all = end(&pieces);
        for ((name, ty), piece) in memories.iter().zip(&pieces) {
            let start = self.index(piece.start);
            self.push(&format!("{name} = memref.view %second[{start}][] : memref<{all}xi8> to {ty}"));
        }
        pieces
    }

    /// An operation, or the border of a region.
    fn line(&mut self, text: &str) {
        if text.starts_with('}') || text.ends_with("({") {
            return self.push(text);
        }
        let line = Line::new(text);
        match line.name {
            "arith.constant" if line.of_result.starts_with("tensor") => {
                let number = line.attribute("dense<", &['>']);
                let number = self.named(&format!("arith.constant {number} : {}", element(line.of_result)));
                self.splat(&line, &number);
            }
            "vector.broadcast" if line.types[0] == "i32" => self.splat(&line, line.operands[0]),
            "vector.broadcast" => self.broadcast(&line),
            "tpu.iota" => self.iota(&line),
            "vector.extract_strided_slice" => self.slice(&line),
            "vector.shape_cast" => {
                let ([one, columns], _) = matrix(line.of_result);
                assert_eq!(one, 1, "a row");
                self.push(&format!(
                    "{} = tensor.expand_shape {} [[0, 1]] output_shape [1, {columns}] : {} into {}",
                    line.result, line.operands[0], line.types[0], line.of_result
                ));
            }
            "vector.transpose" => self.transpose(&line),
            "vector.multi_reduction" => self.reduction(&line),
            "tpu.matmul" => self.product(&line),
            "vector.load" => self.load(&line),
            "tpu.vector_store" => self.store(&line),
            "tpu.assume_multiple" => {
                let of = self.named(&format!("arith.constant {} : i32", line.attribute("multiple = ", &[' '])));
                let rest = self.named(&format!("arith.remsi {}, {of} : i32", line.operands[0]));
                let zero = self.named("arith.constant 0 : i32");
                self.check("eq", &rest, &zero, "i32", "no multiple of what is assumed");
                self.push(&format!("{} = arith.addi {}, {zero} : i32", line.result, line.operands[0]));
            }
            "func.return" => {
                for (i, place) in line.operands.iter().enumerate() {
                    let at = self.index(i);
                    self.push(&format!("memref.store {place}, %second[{at}] : memref<2xi32>"));
                }
                self.push("return");
            }
            name => {
                let known = ["arith.", "math.", "scf."].iter().any(|dialect| name.starts_with(dialect));
                assert!(known, "operation {name}");
                self.push(text);
            }
        }
    }

    fn splat(&mut self, line: &Line, number: &str) {
        self.push(&format!("{} = tensor.splat {number} : {}", line.result, line.of_result));
    }

    fn empty(&mut self, ty: &str) -> String {
        self.named(&format!("tensor.empty() : {ty}"))
    }

    /// What `line` makes, by loops over elements.
    fn loops(&mut self, line: &Line, loops: &Loops) {
        let maps: Vec<String> = loops.maps.iter().map(|map| format!("affine_map<{map}>")).collect();
        let iterators: Vec<String> = loops.iterators.iter().map(|iterator| format!("{iterator:?}")).collect();
        let operands = &line.operands[..maps.len() - 1];
        let types = &line.types[..maps.len() - 1];
        let ins =
            if operands.is_empty() { String::new() } else { format!("ins({} : {})", operands.join(", "), types.join(", ")) };
        let arguments: String = types.iter().enumerate().map(|(i, ty)| format!("%in{i}: {}, ", element(ty))).collect();
        let (ty, of) = (line.of_result, element(line.of_result));
        let inside: String = loops.inside.iter().map(|operation| format!("    {operation}\n")).collect();
        self.push(&format!(
            "{} = linalg.generic {{indexing_maps = [{}], iterator_types = [{}]}} {ins} outs({} : {ty}) {{\n  \
             ^bb0({arguments}%out: {of}):\n{inside}    linalg.yield {} : {of}\n  }} -> {ty}",
            line.result,
            maps.join(", "),
            iterators.join(", "),
            loops.out,
            loops.gives,
        ));
    }

    fn broadcast(&mut self, line: &Line) {
        let ([rows, columns], _) = matrix(line.types[0]);
        let place = |of: usize, name: &'static str| if of == 1 { "0" } else { name };
        let from = format!("(i, j) -> ({}, {})", place(rows, "i"), place(columns, "j"));
        let out = self.empty(line.of_result);
        self.loops(line, &Loops { maps: &[&from, SAME], iterators: &ALL, out: &out, inside: &[], gives: "%in0" });
    }

    fn iota(&mut self, line: &Line) {
        let out = self.empty(line.of_result);
        let index = format!("%i = linalg.index {} : index", line.attribute("dimension = ", &[' ']));
        let inside = [&index, "%number = arith.index_cast %i : index to i32"];
        self.loops(line, &Loops { maps: &[SAME], iterators: &ALL, out: &out, inside: &inside, gives: "%number" });
    }

    fn slice(&mut self, line: &Line) {
        let [from, size, strides] = ["offsets", "sizes", "strides"].map(|key| line.attribute(&format!("{key} = ["), &[']']));
        let numbers = |list: &str| -> Vec<usize> { list.split(", ").map(|number| number.parse().expect("a number")).collect() };
        let (dims, _) = matrix(line.types[0]);
        let ends = numbers(from).into_iter().zip(numbers(size)).map(|(from, size)| from + size);
        assert!(ends.zip(dims).all(|(end, dim)| end <= dim), "a slice beyond {}: [{size}] from [{from}] on", line.types[0]);
        self.push(&format!(
            "{} = tensor.extract_slice {}[{from}] [{size}] [{strides}] : {} to {}",
            line.result, line.operands[0], line.types[0], line.of_result
        ));
    }

    fn transpose(&mut self, line: &Line) {
        assert_eq!(line.attribute("permutation = array<i64: ", &['>']), "1, 0");
        let out = self.empty(line.of_result);
        let maps = ["(i, j) -> (j, i)", SAME];
        self.loops(line, &Loops { maps: &maps, iterators: &ALL, out: &out, inside: &[], gives: "%in0" });
    }

    /// Over the rows; the second operand is what it starts with.
    fn reduction(&mut self, line: &Line) {
        assert_eq!(line.attribute("reduction_dims = array<i64: ", &['>']), "0");
        let operation = match line.attribute("kind = #vector.kind<", &['>']) {
            "add" => "addf",
            "maximumf" => "maximumf",
            kind => panic!("reduction {kind}"),
        };
        let with = format!("%with = arith.{operation} %out, %in0 : {}", element(line.of_result));
        let (maps, iterators) = (["(i, j) -> (i, j)", "(i, j) -> (j)"], ["reduction", "parallel"]);
        self.loops(line, &Loops { maps: &maps, iterators: &iterators, out: line.operands[1], inside: &[&with], gives: "%with" });
    }

    /// Exact products of the operands, summed in the type of the result. Without its precision, float32 is read as bfloat16.
    fn product(&mut self, line: &Line) {
        let numbers = line.attribute("dimension_numbers = #tpu.dot_dimension_numbers<", &['>']);
        let (of_x, of_y) = match numbers {
            "[1], [0], [0], [1], [0, 0, 1, 1], [], []" => ("(m, k)", "(k, n)"),
            "[1], [1], [0], [0], [0, 0, 1, 0], [], []" => ("(m, k)", "(n, k)"),
            "[0], [0], [1], [1], [0, 1, 1, 1], [], []" => ("(k, m)", "(k, n)"),
            other => panic!("product {other}"),
        };
        let maps = [of_x, of_y, "(m, n)"].map(|place| format!("(m, n, k) -> {place}"));
        assert_eq!(element(line.of_result), "f32", "sums");
        let as_bf16 = element(line.types[0]) == "f32" && !line.attributes.contains("precision = #tpu.contract_precision<fp32>");
        let mut inside: Vec<String> = Vec::new();
        let mut factor = |of: usize| {
            let mut name = format!("%in{of}");
            if as_bf16 {
                inside.push(format!("%narrow{of} = arith.truncf {name} : f32 to bf16"));
                name = format!("%narrow{of}");
            }
            if as_bf16 || element(line.types[of]) == "bf16" {
                inside.push(format!("%wide{of} = arith.extf {name} : bf16 to f32"));
                name = format!("%wide{of}");
            }
            name
        };
        let [x, y] = [factor(0), factor(1)];
        inside.push(format!("%product = arith.mulf {x}, {y} : f32"));
        inside.push("%sum = arith.addf %out, %product : f32".to_owned());
        let (maps, inside) = (maps.each_ref().map(String::as_str), inside.iter().map(String::as_str).collect::<Vec<_>>());
        let iterators = ["parallel", "parallel", "reduction"];
        self.loops(line, &Loops { maps: &maps, iterators: &iterators, out: line.operands[2], inside: &inside, gives: "%sum" });
    }

    /// Ends the process, saying so, where two numbers do not compare.
    fn check(&mut self, how: &str, x: &str, y: &str, ty: &str, message: &str) {
        let holds = self.named(&format!("arith.cmpi {how}, {x}, {y} : {ty}"));
        self.push(&format!("cf.assert {holds}, {message:?}"));
    }

    /// The part of a memory of the type of a tensor that starts at two indices; and that part's type.
    fn part(&mut self, memory: &str, ty: &str, start: &[&str], part: &str) -> (String, String) {
        let ((size, element), (dims, _)) = (matrix(part), matrix(ty));
        for (i, start) in start.iter().enumerate() {
            let last = self.index(dims[i].checked_sub(size[i]).unwrap_or_else(|| panic!("{part} is more than {ty}")));
            self.check("ule", start, &last, "index", "a part that lies beyond its memory");
        }
        let ([rows, columns], [_, stride]) = (size, dims);
        let strided = format!("memref<{rows}x{columns}x{element}, strided<[{stride}, 1], offset: ?>>");
        let view =
            self.named(&format!("memref.subview {memory}[{}] [{rows}, {columns}] [1, 1] : {ty} to {strided}", start.join(", ")));
        (view, strided)
    }

    /// A copy: what is stored later does not change what was loaded.
    fn load(&mut self, line: &Line) {
        let (part, strided) = self.part(line.operands[0], line.types[0], &line.operands[1..], line.of_result);
        let ty = line.of_result.replace("tensor<", "memref<");
        let copy = self.named(&format!("memref.alloc() : {ty}"));
        self.push(&format!("linalg.copy ins({part} : {strided}) outs({copy} : {ty})"));
        self.push(&format!("{} = bufferization.to_tensor {copy} restrict writable : {ty}", line.result));
    }

    fn store(&mut self, line: &Line) {
        let (part, strided) = self.part(line.operands[1], line.types[1], &line.operands[2..], line.types[0]);
        let ty = line.types[0].replace("tensor<", "memref<");
        let value = self.named(&format!("bufferization.to_memref {} read_only : {ty}", line.operands[0]));
        self.push(&format!("linalg.copy ins({value} : {ty}) outs({part} : {strided})"));
    }
}

const SAME: &str = "(i, j) -> (i, j)";
const ALL: [&str; 2] = ["parallel", "parallel"];

/// Loops over an operation's first operands and what it makes.
struct Loops<'a> {
    /// Where each operand's element lies, and then the result's.
    maps: &'a [&'a str],
    iterators: &'a [&'a str],
    /// What the result starts as.
    out: &'a str,
    /// From `%in0`, `%in1` and `%out`…
    inside: &'a [&'a str],
    /// … the element of the result.
    gives: &'a str,
}

fn element(ty: &str) -> &str {
    ty.trim_end_matches('>').rsplit('x').next().unwrap_or_default()
}
