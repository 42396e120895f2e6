//! Mosaic as text: typed values, one operation a line, in the stable form that old and new compilers take.
//!
//! Version 3 of the form: what libtpu has taken since March 2025. A body is generic MLIR whose operations carry the prefix
//! `stable_mosaic.`; attributes stand in plain braces (properties, `<{…}>`, are lost on the way).

use std::fmt::{self, Display, Write};

/// The version of the stable form.
const VERSION: u32 = 3;

/// An element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    F32,
    Bf16,
    I32,
    I1,
    Index,
}

impl Element {
    pub fn bytes(self) -> usize {
        if self == Element::Bf16 { 2 } else { 4 }
    }
}

impl Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Element::F32 => "f32",
            Element::Bf16 => "bf16",
            Element::I32 => "i32",
            Element::I1 => "i1",
            Element::Index => "index",
        })
    }
}

/// A scalar (no dimensions) or a vector, or a piece of VMEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Type {
    pub dims: Vec<usize>,
    pub element: Element,
    memory: bool,
}

impl Type {
    pub fn scalar(element: Element) -> Self {
        Self::vector(&[], element)
    }

    pub fn vector(dims: &[usize], element: Element) -> Self {
        Self { dims: dims.to_vec(), element, memory: false }
    }

    pub fn memory(dims: [usize; 2], element: Element) -> Self {
        Self { dims: dims.to_vec(), element, memory: true }
    }

    fn with_element(&self, element: Element) -> Self {
        Self { element, ..self.clone() }
    }
}

impl Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.dims.is_empty() {
            return write!(f, "{}", self.element);
        }
        f.write_str(if self.memory { "memref<" } else { "vector<" })?;
        self.dims.iter().try_for_each(|dim| write!(f, "{dim}x"))?;
        write!(f, "{}{}>", self.element, if self.memory { ", #tpu.memory_space<vmem>" } else { "" })
    }
}

/// The name and type of an argument, or of what an operation makes.
#[derive(Clone, Debug)]
pub(super) struct Value {
    name: String,
    pub ty: Type,
}

impl Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

/// Which dimension of each operand a product sums over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Product {
    /// (m, k) · (k, n).
    Nn,
    /// (m, k) · (n, k)ᵀ.
    Nt,
    /// (k, m)ᵀ · (k, n).
    Tn,
}

/// How two integers compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Is {
    Equal = 0,
    Less = 2,
    Greater = 4,
    AtLeast = 5,
}

/// The operations of a function, in order.
#[derive(Debug, Default)]
pub(super) struct Body {
    text: String,
    names: usize,
    depth: usize,
}

impl Body {
    fn line(&mut self, line: &str) {
        let _ = writeln!(self.text, "{:1$}{line}", "", 2 * self.depth);
    }

    fn call(name: &str, operands: &[&Value], attributes: &str) -> (String, String) {
        let braces = if attributes.is_empty() { String::new() } else { format!(" {{{attributes}}}") };
        let types = list(operands.iter().map(|v| &v.ty));
        (format!("\"stable_mosaic.{name}\"({}){braces}", list(operands)), types)
    }

    fn push(&mut self, name: &str, operands: &[&Value], attributes: &str, ty: Type) -> Value {
        let value = Value { name: format!("%{}", self.names), ty };
        self.names += 1;
        let (call, types) = Self::call(name, operands, attributes);
        self.line(&format!("{value} = {call} : ({types}) -> {}", value.ty));
        value
    }

    fn run(&mut self, name: &str, operands: &[&Value], attributes: &str) {
        let (call, types) = Self::call(name, operands, attributes);
        self.line(&format!("{call} : ({types}) -> ()"));
    }

    /// An integer, i32 or index.
    pub fn integer(&mut self, x: i64, element: Element) -> Value {
        self.push("arith.constant", &[], &format!("value = {x} : {element}"), Type::scalar(element))
    }

    /// A vector of i32 that has `x` everywhere.
    pub fn integers(&mut self, x: i64, dims: &[usize]) -> Value {
        let ty = Type::vector(dims, Element::I32);
        self.push("arith.constant", &[], &format!("value = dense<{x}> : {ty}"), ty)
    }

    /// A vector that has `x` everywhere, rounded to float32; as bfloat16 only 0.
    pub fn floats(&mut self, x: f64, dims: &[usize], element: Element) -> Value {
        let x = x as f32;
        assert!(element == Element::F32 || x == 0.0, "other constants are float32");
        let decimal = format!("{x:?}");
        let exact = if decimal.contains(['e', 'i', 'N']) { format!("0x{:08X}", x.to_bits()) } else { decimal };
        let ty = Type::vector(dims, element);
        self.push("arith.constant", &[], &format!("value = dense<{exact}> : {ty}"), ty)
    }

    /// `math.exp`, `math.log`, `math.tanh`.
    pub fn unary(&mut self, operation: &str, x: &Value) -> Value {
        self.push(operation, &[x], "", x.ty.clone())
    }

    /// `arith.addf`, `arith.subf`, `arith.mulf`, `arith.maximumf`, `arith.addi`, `arith.subi`, `arith.muli`, `arith.minsi`, `arith.andi`.
    pub fn binary(&mut self, operation: &str, x: &Value, y: &Value) -> Value {
        assert_eq!(x.ty, y.ty, "{operation}");
        self.push(operation, &[x, y], "", x.ty.clone())
    }

    /// A vector of float32 with a number.
    pub fn with(&mut self, operation: &str, x: &Value, number: f64) -> Value {
        let number = self.floats(number, &x.ty.dims.clone(), x.ty.element);
        self.binary(operation, x, &number)
    }

    /// An i32 with a number.
    pub fn with_integer(&mut self, operation: &str, x: &Value, number: usize) -> Value {
        let number = self.integer(number as i64, x.ty.element);
        self.binary(operation, x, &number)
    }

    pub fn compare(&mut self, x: &Value, is: Is, y: &Value) -> Value {
        assert_eq!(x.ty, y.ty, "{is:?}");
        self.push("arith.cmpi", &[x, y], &format!("predicate = {} : i64", is as i64), x.ty.with_element(Element::I1))
    }

    /// i32, scalar or vector, with a number.
    pub fn compare_with(&mut self, x: &Value, is: Is, number: usize) -> Value {
        let number = if x.ty.dims.is_empty() {
            self.integer(number as i64, Element::I32)
        } else {
            self.integers(number as i64, &x.ty.dims.clone())
        };
        self.compare(x, is, &number)
    }

    pub fn select(&mut self, which: &Value, x: &Value, y: &Value) -> Value {
        assert_eq!(x.ty, y.ty, "select");
        assert_eq!(which.ty, x.ty.with_element(Element::I1), "select");
        self.push("arith.select", &[which, x, y], "", x.ty.clone())
    }

    /// x where `which` holds, else 0.
    pub fn keep(&mut self, which: &Value, x: &Value) -> Value {
        let zero = self.floats(0.0, &x.ty.dims.clone(), x.ty.element);
        self.select(which, x, &zero)
    }

    /// Between float32 and bfloat16; rounds to nearest, ties to even.
    pub fn convert(&mut self, x: &Value, element: Element) -> Value {
        if x.ty.element == element {
            return x.clone();
        }
        let operation = if element == Element::Bf16 { "arith.truncf" } else { "arith.extf" };
        self.push(operation, &[x], "", x.ty.with_element(element))
    }

    /// A scalar, or a vector with a dimension of 1, as `dims`.
    pub fn broadcast(&mut self, x: &Value, dims: &[usize]) -> Value {
        if x.ty.dims == dims {
            return x.clone();
        }
        self.push("vector.broadcast", &[x], "", Type::vector(dims, x.ty.element))
    }

    /// 0, 1, 2, … down the rows.
    pub fn row_numbers(&mut self, dims: [usize; 2]) -> Value {
        self.push("tpu.iota", &[], "dimension = 0 : i32", Type::vector(&dims, Element::I32))
    }

    /// 0, 1, 2, … along the columns.
    pub fn column_numbers(&mut self, dims: [usize; 2]) -> Value {
        self.push("tpu.iota", &[], "dimension = 1 : i32", Type::vector(&dims, Element::I32))
    }

    /// `rows` rows of x from `start` on.
    pub fn rows(&mut self, x: &Value, start: usize, rows: usize) -> Value {
        let [_, columns] = x.ty.dims[..] else { panic!("a matrix") };
        let attributes = format!("offsets = [{start}, 0], sizes = [{rows}, {columns}], strides = [1, 1]");
        self.push("vector.extract_strided_slice", &[x], &attributes, Type::vector(&[rows, columns], x.ty.element))
    }

    /// `add` or `maximumf` over the rows, from `start` on: (r, c) to (1, c).
    pub fn reduce_rows(&mut self, kind: &str, x: &Value, start: f64) -> Value {
        let [_, columns] = x.ty.dims[..] else { panic!("a matrix") };
        let init = self.floats(start, &[columns], x.ty.element);
        let attributes = format!("kind = #vector.kind<{kind}>, reduction_dims = array<i64: 0>");
        let reduced = self.push("vector.multi_reduction", &[x, &init], &attributes, init.ty.clone());
        self.push("vector.shape_cast", &[&reduced], "", Type::vector(&[1, columns], x.ty.element))
    }

    pub fn transpose(&mut self, x: &Value) -> Value {
        let [rows, columns] = x.ty.dims[..] else { panic!("a matrix") };
        self.push("vector.transpose", &[x], "permutation = array<i64: 1, 0>", Type::vector(&[columns, rows], x.ty.element))
    }

    /// A product in float32: of bfloat16 exactly, of float32 with as much precision as the device offers.
    pub fn product(&mut self, kind: Product, x: &Value, y: &Value) -> Value {
        assert_eq!(x.ty.element, y.ty.element, "product");
        let dims = |v: &Value| [v.ty.dims[0], v.ty.dims[1]];
        let ([x0, x1], [y0, y1]) = (dims(x), dims(y));
        let (numbers, sums, of) = match kind {
            Product::Nn => ("[1], [0], [0], [1], [0, 0, 1, 1]", [x1, y0], [x0, y1]),
            Product::Nt => ("[1], [1], [0], [0], [0, 0, 1, 0]", [x1, y1], [x0, y0]),
            Product::Tn => ("[0], [0], [1], [1], [0, 1, 1, 1]", [x0, y0], [x1, y1]),
        };
        assert_eq!(sums[0], sums[1], "{kind:?}");
        let precision = if x.ty.element == Element::F32 { ", precision = #tpu.contract_precision<fp32>" } else { "" };
        let attributes = format!("dimension_numbers = #tpu.dot_dimension_numbers<{numbers}, [], []>{precision}");
        let zero = self.floats(0.0, &of, Element::F32);
        self.push("tpu.matmul", &[x, y, &zero], &attributes, zero.ty.clone())
    }

    /// All of a memory, or `rows` of its rows from `start` on.
    pub fn load(&mut self, memory: &Value, start: Option<&Value>, rows: usize) -> Value {
        let zero = self.integer(0, Element::Index);
        let ty = Type::vector(&[rows, memory.ty.dims[1]], memory.ty.element);
        self.push("vector.load", &[memory, start.unwrap_or(&zero), &zero], "", ty)
    }

    /// All of a memory.
    pub fn load_all(&mut self, memory: &Value) -> Value {
        self.load(memory, None, memory.ty.dims[0])
    }

    /// Writes `x` into the rows of a memory from `start` on.
    pub fn store(&mut self, x: &Value, memory: &Value, start: Option<&Value>) {
        assert_eq!((x.ty.dims[1], x.ty.element), (memory.ty.dims[1], memory.ty.element), "store");
        let zero = self.integer(0, Element::Index);
        let attributes = "operandSegmentSizes = array<i32: 1, 1, 2, 0>, strides = array<i32>";
        self.run("tpu.vector_store", &[x, memory, start.unwrap_or(&zero), &zero], attributes);
    }

    /// An i32 that is a multiple of `of`, as an index.
    pub fn index(&mut self, x: &Value, of: usize) -> Value {
        let x = self.push("tpu.assume_multiple", &[x], &format!("multiple = {of} : i32"), x.ty.clone());
        self.push("arith.index_cast", &[&x], "", Type::scalar(Element::Index))
    }

    /// Does what `then` does where `condition` holds.
    pub fn only_if(&mut self, condition: &Value, then: impl FnOnce(&mut Self)) {
        self.line(&format!("\"stable_mosaic.scf.if\"({condition}) ({{"));
        self.depth += 1;
        then(self);
        self.run("scf.yield", &[], "");
        self.depth -= 1;
        self.line("}, {");
        self.depth += 1;
        self.run("scf.yield", &[], "");
        self.depth -= 1;
        self.line("}) : (i1) -> ()");
    }
}

/// What a window shows, and where.
#[derive(Clone, Debug)]
pub(super) struct Window {
    /// Rows and columns of a block.
    pub block: [usize; 2],
    pub element: Element,
    /// The block's place, along rows and along columns.
    pub place: [At; 2],
    /// One buffer, where a second to fetch or to write ahead would be of no use.
    pub single: bool,
}

/// A block's place along one dimension, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    /// The first.
    Start,
    /// The number of the step along this dimension of the grid.
    Step(usize),
    /// `per` times the first dimension's step plus the second's, and no later than `last`.
    Shared { per: usize, last: usize },
}

/// A kernel: its grid, its windows (operands first, then results), its scratch memory.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    /// Steps along each dimension, and whether they may be taken in any order, on several cores.
    pub grid: Vec<(usize, bool)>,
    pub windows: Vec<Window>,
    pub scratch: Vec<([usize; 2], Element)>,
}

impl Frame {
    /// The body of the kernel that at each step does what `build` does, given the step's numbers, the windows and the scratch.
    pub fn body(&self, build: impl FnOnce(&mut Body, &[Value], &[Value], &[Value])) -> String {
        let named = |prefix: &str, types: Vec<Type>| -> Vec<Value> {
            types.into_iter().enumerate().map(|(i, ty)| Value { name: format!("%{prefix}{i}"), ty }).collect()
        };
        let steps = named("step", vec![Type::scalar(Element::I32); self.grid.len()]);
        let windows = named("window", self.windows.iter().map(|w| Type::memory(w.block, w.element)).collect());
        let scratch = named("scratch", self.scratch.iter().map(|&(dims, element)| Type::memory(dims, element)).collect());
        let mut text = String::from("\"builtin.module\"() ({\n");
        let arguments: Vec<Value> = [&steps[..], &windows, &scratch].concat();
        let mut body = Body { depth: 2, ..Body::default() };
        build(&mut body, &steps, &windows, &scratch);
        body.run("func.return", &[], "");
        function(&mut text, &arguments, &body.text, &[], &format!("{}, sym_name = \"main\"", self.attributes()));
        for (i, window) in self.windows.iter().enumerate() {
            let mut body = Body { depth: 2, ..Body::default() };
            let place = window.place.map(|at| at.emit(&mut body, &steps));
            body.run("func.return", &[&place[0], &place[1]], "");
            let types = [Type::scalar(Element::I32), Type::scalar(Element::I32)];
            function(&mut text, &steps, &body.text, &types, &format!("sym_name = \"place{i}\""));
        }
        let _ = writeln!(text, "}}) {{stable_mosaic.version = {VERSION} : i64}} : () -> ()");
        text
    }

    fn attributes(&self) -> String {
        let semantics =
            list(self.grid.iter().map(|(_, any_order)| {
                format!("#tpu.dimension_semantics<{}>", if *any_order { "parallel" } else { "arbitrary" })
            }));
        let windows = list(self.windows.iter().enumerate().map(|(i, w)| {
            let single = if w.single { "pipeline_mode = #tpu.pipeline_mode<synchronous>, " } else { "" };
            format!("{{{single}transform_indices = @place{i}, window_bounds = array<i64: {}>}}", list(w.block))
        }));
        format!(
            "dimension_semantics = [{semantics}], iteration_bounds = array<i64: {}>, scalar_prefetch = 0 : i64, \
             scratch_operands = {} : i64, tpu.core_type = #tpu.core_type<tc>, window_params = [{windows}]",
            list(self.grid.iter().map(|(steps, _)| steps)),
            self.scratch.len()
        )
    }

    /// Bytes of VMEM that the windows and the scratch take, each padded to whole registers. A window has two buffers, to fetch or
    /// to write one while the other is used, but for one that stays where it is.
    pub fn vmem_bytes(&self) -> usize {
        let moves_along = |dimension: usize| self.grid[dimension].0 > 1;
        let moves = |at: At| match at {
            At::Start => false,
            At::Step(dimension) => moves_along(dimension),
            At::Shared { .. } => moves_along(0) || moves_along(1),
        };
        let buffers = |w: &Window| if w.single || !w.place.into_iter().any(moves) { 1 } else { 2 };
        let windows = self.windows.iter().map(|w| buffers(w) * padded_bytes(w.block, w.element));
        windows.chain(self.scratch.iter().map(|&(dims, element)| padded_bytes(dims, element))).sum()
    }
}

/// In registers of 8 rows (16 of bfloat16) by 128 columns.
fn padded_bytes([rows, columns]: [usize; 2], element: Element) -> usize {
    let bytes = element.bytes();
    rows.next_multiple_of(32 / bytes) * columns.next_multiple_of(128) * bytes
}

impl At {
    fn emit(self, body: &mut Body, steps: &[Value]) -> Value {
        match self {
            At::Start => body.integer(0, Element::I32),
            At::Step(dimension) => steps[dimension].clone(),
            At::Shared { per, last } => shared_step(body, steps, per, Some(last)),
        }
    }
}

/// `per` times the first step plus the second, no later than `last`.
pub(super) fn shared_step(body: &mut Body, steps: &[Value], per: usize, last: Option<usize>) -> Value {
    let before = body.with_integer("arith.muli", &steps[0], per);
    let step = body.binary("arith.addi", &before, &steps[1]);
    last.map_or(step.clone(), |last| body.with_integer("arith.minsi", &step, last))
}

fn function(text: &mut String, arguments: &[Value], body: &str, results: &[Type], attributes: &str) {
    let typed = list(arguments.iter().map(|v| format!("{v}: {}", v.ty)));
    let types = list(arguments.iter().map(|v| &v.ty));
    let _ = writeln!(
        text,
        "  \"stable_mosaic.func.func\"() ({{\n  ^bb0({typed}):\n{body}  }}) {{function_type = ({types}) -> ({}), {attributes}}} : () -> ()",
        list(results)
    );
}
