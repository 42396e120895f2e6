//! StableHLO as text: values with their types, one operation a line.

use std::fmt::{self, Display, Write};

/// An element type and its dimensions: `tensor<4x8xf32>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Type {
    /// The dimensions; none for a scalar.
    pub dims: Vec<usize>,
    /// `f32`, `bf16`, `f16`, `i32` or `i1`.
    pub element: &'static str,
}

impl Type {
    pub(crate) fn new(dims: &[usize], element: &'static str) -> Self {
        Self { dims: dims.to_vec(), element }
    }

    fn with_element(&self, element: &'static str) -> Self {
        Self { element, ..self.clone() }
    }
}

impl Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tensor<")?;
        self.dims.iter().try_for_each(|dim| write!(f, "{dim}x"))?;
        write!(f, "{}>", self.element)
    }
}

/// The name and type of what an operation makes.
#[derive(Clone, Debug)]
pub(crate) struct Value {
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

/// The operations of a function, in order.
#[derive(Debug, Default)]
pub(crate) struct Body {
    text: String,
    names: usize,
    depth: usize,
}

impl Body {
    /// A function `@main` of these arguments, named, that returns what `build` does, under these names.
    pub fn function(
        arguments: &[(&str, Type)],
        build: impl FnOnce(&mut Body, &[Value]) -> Vec<(&'static str, Value)>,
    ) -> (String, Vec<(&'static str, Type)>) {
        Self::function_taking_over(arguments, None, build)
    }

    /// The same, where a result may take over the memory of an argument: (argument, result).
    pub fn function_taking_over(
        arguments: &[(&str, Type)],
        donated: Option<(usize, usize)>,
        build: impl FnOnce(&mut Body, &[Value]) -> Vec<(&'static str, Value)>,
    ) -> (String, Vec<(&'static str, Type)>) {
        let mut body = Body { depth: 2, ..Body::default() };
        let values: Vec<Value> = arguments.iter().map(|(name, ty)| Value { name: format!("%{name}"), ty: ty.clone() }).collect();
        let results = build(&mut body, &values);
        let arguments = list(values.iter().enumerate().map(|(i, v)| match donated {
            Some((argument, result)) if argument == i => format!("{v}: {} {{tf.aliasing_output = {result} : i32}}", v.ty),
            _ => format!("{v}: {}", v.ty),
        }));
        let types = list(results.iter().map(|(name, v)| format!("{} {{jax.result_info = \"{name}\"}}", v.ty)));
        let returned = list(results.iter().map(|(_, v)| v));
        let returned_types = list(results.iter().map(|(_, v)| &v.ty));
        let text = format!(
            "module @fused_xent {{\n  func.func public @main({arguments}) -> ({types}) {{\n{}    return {returned} : {returned_types}\n  }}\n}}\n",
            body.text
        );
        (text, results.into_iter().map(|(name, value)| (name, value.ty)).collect())
    }

    fn line(&mut self, line: &str) {
        let _ = writeln!(self.text, "{:1$}{line}", "", 2 * self.depth);
    }

    fn name(&mut self) -> String {
        self.names += 1;
        format!("%{}", self.names - 1)
    }

    fn push(&mut self, ty: Type, operation: &str) -> Value {
        let name = self.name();
        self.line(&format!("{name} = stablehlo.{operation}"));
        Value { name, ty }
    }

    /// A tensor that has `x` everywhere, rounded to float32.
    pub fn float(&mut self, x: f64, dims: &[usize]) -> Value {
        let x = x as f32;
        let decimal = format!("{x:?}");
        let exact = if decimal.contains(['e', 'i', 'N']) { format!("0x{:08X}", x.to_bits()) } else { decimal };
        let ty = Type::new(dims, "f32");
        let operation = format!("constant dense<{exact}> : {ty}");
        self.push(ty, &operation)
    }

    /// A tensor that has `x` everywhere.
    pub fn integer(&mut self, x: i64, dims: &[usize]) -> Value {
        let ty = Type::new(dims, "i32");
        let operation = format!("constant dense<{x}> : {ty}");
        self.push(ty, &operation)
    }

    /// `exponential`, `log`, `tanh`, `negate`.
    pub fn unary(&mut self, operation: &str, x: &Value) -> Value {
        self.push(x.ty.clone(), &format!("{operation} {x} : {}", x.ty))
    }

    /// `add`, `subtract`, `multiply`, `divide`, `maximum`, `minimum`, `and`.
    pub fn binary(&mut self, operation: &str, x: &Value, y: &Value) -> Value {
        assert_eq!(x.ty, y.ty, "{operation}");
        self.push(x.ty.clone(), &format!("{operation} {x}, {y} : {}", x.ty))
    }

    /// x with a number.
    pub fn with(&mut self, operation: &str, x: &Value, number: f64) -> Value {
        let number = self.float(number, &x.ty.dims.clone());
        self.binary(operation, x, &number)
    }

    pub fn compare(&mut self, how: &str, x: &Value, y: &Value) -> Value {
        assert_eq!(x.ty, y.ty, "{how}");
        let kind = if x.ty.element == "i32" { "SIGNED" } else { "FLOAT" };
        let ty = x.ty.with_element("i1");
        self.push(ty.clone(), &format!("compare {how}, {x}, {y}, {kind} : ({}, {}) -> {ty}", x.ty, y.ty))
    }

    pub fn select(&mut self, which: &Value, x: &Value, y: &Value) -> Value {
        assert_eq!(x.ty, y.ty, "select");
        self.push(x.ty.clone(), &format!("select {which}, {x}, {y} : {}, {}", which.ty, x.ty))
    }

    /// x where `which` holds, else 0.
    pub fn keep(&mut self, which: &Value, x: &Value) -> Value {
        let zero = self.float(0.0, &x.ty.dims.clone());
        let zero = self.convert(&zero, x.ty.element);
        self.select(which, x, &zero)
    }

    pub fn convert(&mut self, x: &Value, element: &'static str) -> Value {
        if x.ty.element == element {
            return x.clone();
        }
        let ty = x.ty.with_element(element);
        self.push(ty.clone(), &format!("convert {x} : ({}) -> {ty}", x.ty))
    }

    /// float32 rounded to bfloat16, and kept in float32: no compiler may leave that out.
    pub fn round_to_bf16(&mut self, x: &Value) -> Value {
        self.push(x.ty.clone(), &format!("reduce_precision {x}, format = e8m7 : {}", x.ty))
    }

    /// x along its own dimensions, which are `dims` of the result's.
    pub fn broadcast(&mut self, x: &Value, dims: &[usize], to: &[usize]) -> Value {
        let ty = Type::new(to, x.ty.element);
        self.push(ty.clone(), &format!("broadcast_in_dim {x}, dims = [{}] : ({}) -> {ty}", list(dims), x.ty))
    }

    /// 0, 1, 2, … along a dimension.
    pub fn iota(&mut self, dim: usize, dims: &[usize]) -> Value {
        let ty = Type::new(dims, "i32");
        self.push(ty.clone(), &format!("iota dim = {dim} : {ty}"))
    }

    /// `add` or `maximum` over a dimension, from `start` on.
    pub fn reduce(&mut self, operation: &str, x: &Value, dim: usize, start: f64) -> Value {
        let init = self.float(start, &[]);
        let mut dims = x.ty.dims.clone();
        dims.remove(dim);
        let ty = Type::new(&dims, x.ty.element);
        let types = format!("({}, {}) -> {ty}", x.ty, init.ty);
        self.push(ty, &format!("reduce({x} init: {init}) applies stablehlo.{operation} across dimensions = [{dim}] : {types}"))
    }

    /// Σ over dimension `over[0]` of x and `over[1]` of y, in float32 with as much precision as there is.
    pub fn dot(&mut self, x: &Value, y: &Value, over: [usize; 2]) -> Value {
        assert_eq!(x.ty.element, y.ty.element, "dot_general");
        let rest = |v: &Value, over: usize| v.ty.dims[1 - over];
        let ty = Type::new(&[rest(x, over[0]), rest(y, over[1])], "f32");
        let types = format!("({}, {}) -> {ty}", x.ty, y.ty);
        let [i, j] = over;
        self.push(
            ty,
            &format!("dot_general {x}, {y}, contracting_dims = [{i}] x [{j}], precision = [HIGHEST, HIGHEST] : {types}"),
        )
    }

    /// x in other dimensions, its elements in the same order.
    pub fn reshape(&mut self, x: &Value, to: &[usize]) -> Value {
        let ty = Type::new(to, x.ty.element);
        self.push(ty.clone(), &format!("reshape {x} : ({}) -> {ty}", x.ty))
    }

    /// `rows` of x from `start` on, along its first dimension.
    pub fn slice_rows(&mut self, x: &Value, start: usize, rows: usize) -> Value {
        if rows == x.ty.dims[0] {
            return x.clone();
        }
        let ty = Type::new(&[&[rows], &x.ty.dims[1..]].concat(), x.ty.element);
        let first = format!("{start}:{}", start + rows);
        let ranges = list(std::iter::once(first).chain(x.ty.dims[1..].iter().map(|dim| format!("0:{dim}"))));
        self.push(ty.clone(), &format!("slice {x} [{ranges}] : ({}) -> {ty}", x.ty))
    }

    /// All of `parts`, one after the other along their first dimension.
    pub fn concatenate_rows(&mut self, parts: &[Value]) -> Value {
        if let [only] = parts {
            return only.clone();
        }
        let mut ty = parts[0].ty.clone();
        ty.dims[0] = parts.iter().map(|part| part.ty.dims[0]).sum();
        let types = list(parts.iter().map(|part| &part.ty));
        self.push(ty.clone(), &format!("concatenate {}, dim = 0 : ({types}) -> {ty}", list(parts)))
    }

    /// Calls a kernel that the device's compiler knows.
    pub fn custom_call(&mut self, target: &str, operands: &[Value], attributes: &str, results: &[Type]) -> Vec<Value> {
        let name = self.name();
        let types = list(operands.iter().map(|v| &v.ty));
        let (names, of_results): (Vec<String>, String) = match results {
            [only] => (vec![name.clone()], only.to_string()),
            _ => ((0..results.len()).map(|i| format!("{name}#{i}")).collect(), format!("({})", list(results))),
        };
        let count = if results.len() == 1 { String::new() } else { format!(":{}", results.len()) };
        let operands = list(operands);
        self.line(&format!(
            "{name}{count} = stablehlo.custom_call @{target}({operands}) {{{attributes}}} : ({types}) -> {of_results}"
        ));
        names.into_iter().zip(results).map(|(name, ty)| Value { name, ty: ty.clone() }).collect()
    }

    /// x with zeros after it.
    pub fn pad(&mut self, x: &Value, to: &[usize]) -> Value {
        if x.ty.dims == to {
            return x.clone();
        }
        let zero = self.float(0.0, &[]);
        let zero = self.convert(&zero, x.ty.element);
        let ty = Type::new(to, x.ty.element);
        let high = list(to.iter().zip(&x.ty.dims).map(|(to, from)| to - from));
        let none = list(to.iter().map(|_| 0));
        let types = format!("({}, {}) -> {ty}", x.ty, zero.ty);
        self.push(ty, &format!("pad {x}, {zero}, low = [{none}], high = [{high}], interior = [{none}] : {types}"))
    }

    /// `sizes` of x from `starts` on.
    pub fn dynamic_slice(&mut self, x: &Value, starts: &[Value], sizes: &[usize]) -> Value {
        let ty = Type::new(sizes, x.ty.element);
        let types = list(std::iter::once(&x.ty).chain(starts.iter().map(|s| &s.ty)));
        self.push(ty.clone(), &format!("dynamic_slice {x}, {}, sizes = [{}] : ({types}) -> {ty}", list(starts), list(sizes)))
    }

    /// x with `update` in it, from `starts` on.
    pub fn dynamic_update_slice(&mut self, x: &Value, update: &Value, starts: &[Value]) -> Value {
        let types = list([&x.ty, &update.ty].into_iter().chain(starts.iter().map(|s| &s.ty)));
        let ty = x.ty.clone();
        self.push(ty.clone(), &format!("dynamic_update_slice {x}, {update}, {} : ({types}) -> {ty}", list(starts)))
    }

    /// What `step` makes of `state`, `times` times over; it is told how many times it has run.
    pub fn repeat(
        &mut self,
        times: usize,
        state: Vec<Value>,
        step: impl FnOnce(&mut Body, &Value, &[Value]) -> Vec<Value>,
    ) -> Vec<Value> {
        let count = self.integer(0, &[]);
        if times == 1 {
            return step(self, &count, &state);
        }
        let state: Vec<Value> = std::iter::once(count).chain(state).collect();
        let inner: Vec<Value> = state.iter().map(|v| Value { name: self.name(), ty: v.ty.clone() }).collect();
        let name = self.name();
        let types = list(state.iter().map(|v| &v.ty));
        let arguments = list(inner.iter().zip(&state).map(|(inner, outer)| format!("{inner} = {outer}")));
        self.line(&format!("{name}:{} = stablehlo.while({arguments}) : {types}", state.len()));
        self.line("cond {");
        self.depth += 1;
        let limit = self.integer(times as i64, &[]);
        let goes_on = self.compare("LT", &inner[0], &limit);
        self.line(&format!("stablehlo.return {goes_on} : {}", goes_on.ty));
        self.depth -= 1;
        self.line("} do {");
        self.depth += 1;
        let made = step(self, &inner[0], &inner[1..]);
        let one = self.integer(1, &[]);
        let next = self.binary("add", &inner[0], &one);
        let made: Vec<Value> = std::iter::once(next).chain(made).collect();
        assert!(made.iter().map(|v| &v.ty).eq(state.iter().map(|v| &v.ty)), "a loop keeps the types of its state");
        self.line(&format!("stablehlo.return {} : {types}", list(&made)));
        self.depth -= 1;
        self.line("}");
        state.iter().enumerate().skip(1).map(|(i, v)| Value { name: format!("{name}#{i}"), ty: v.ty.clone() }).collect()
    }
}
