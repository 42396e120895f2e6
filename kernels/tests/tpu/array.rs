//! Dense tensors, and the types that both texts name.

use half::bf16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    F32,
    Bf16,
    /// i32, index and i1.
    Integer,
}

/// What a vector, a piece of VMEM or an array in HBM holds; bfloat16 as the float32 of its value.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    Floats(Vec<f32>),
    Integers(Vec<i32>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub ty: Type,
    pub data: Data,
}

/// Scalars have no dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Type {
    pub dims: Vec<usize>,
    pub element: Element,
}

impl Type {
    /// `f32`, `vector<8x128xf32>`, `memref<8x128xbf16, #tpu.memory_space<vmem>>`, `tensor<4xi32>`.
    pub fn parse(text: &str) -> Self {
        let inner = ["vector<", "memref<", "tensor<"].into_iter().find_map(|start| text.strip_prefix(start)).unwrap_or(text);
        let inner = inner.split([',', '>']).next().unwrap();
        let mut dims: Vec<&str> = inner.split('x').collect();
        // `index` ends in x, so it splits in two.
        let element = if inner.ends_with("index") {
            dims.truncate(dims.len() - 1);
            "index"
        } else {
            dims.pop().unwrap()
        };
        let dims = dims.into_iter().filter(|dim| *dim != "inde").map(|dim| dim.parse().unwrap_or_else(|_| panic!("type {text}")));
        let element = match element {
            "f32" => Element::F32,
            "bf16" => Element::Bf16,
            "i32" | "i1" | "index" => Element::Integer,
            other => panic!("element type {other} in {text}"),
        };
        Self { dims: dims.collect(), element }
    }

    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Rows and columns.
    pub fn matrix(&self) -> [usize; 2] {
        self.dims[..].try_into().unwrap_or_else(|_| panic!("{:?} is no matrix", self.dims))
    }
}

pub fn round_to_bf16(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

impl Element {
    /// A float as this type holds it.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Element::F32 => x,
            Element::Bf16 => round_to_bf16(x),
            Element::Integer => panic!("a float in an integer"),
        }
    }
}

impl Array {
    pub fn floats(ty: Type, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), ty.len(), "{:?}", ty.dims);
        Self { data: Data::Floats(data), ty }
    }

    pub fn integers(ty: Type, data: Vec<i32>) -> Self {
        assert_eq!((data.len(), ty.element), (ty.len(), Element::Integer), "{:?}", ty.dims);
        Self { data: Data::Integers(data), ty }
    }

    /// What memory holds that nobody has written: NaN, and integers that look like labels.
    pub fn fresh(ty: Type) -> Self {
        let data = match ty.element {
            Element::Integer => Data::Integers((0..ty.len()).map(|i| (i % 3) as i32).collect()),
            _ => Data::Floats(vec![f32::NAN; ty.len()]),
        };
        Self { ty, data }
    }

    pub fn as_floats(&self) -> &[f32] {
        let Data::Floats(x) = &self.data else { panic!("floats wanted") };
        x
    }

    pub fn as_integers(&self) -> &[i32] {
        let Data::Integers(x) = &self.data else { panic!("integers wanted") };
        x
    }

    /// The block of these dimensions from `start` on; what lies outside is fresh.
    pub fn block(&self, start: [usize; 2], dims: [usize; 2]) -> Self {
        let mut out = Self::fresh(Type { dims: dims.to_vec(), element: self.ty.element });
        let [rows, columns] = self.ty.matrix();
        copy(&mut out, [0, 0], self, start, [dims[0].min(rows - start[0]), dims[1].min(columns - start[1])]);
        out
    }

    /// Writes a block at `start`; what lies outside is left out.
    pub fn put(&mut self, start: [usize; 2], block: &Array) {
        let [rows, columns] = self.ty.matrix();
        let [r, c] = block.ty.matrix();
        copy(self, start, block, [0, 0], [r.min(rows - start[0]), c.min(columns - start[1])]);
    }

    /// Each element of `dims` from the one of `self` that `index` gives.
    pub fn gather(&self, dims: &[usize], index: impl Fn(usize) -> usize) -> Self {
        let ty = Type { dims: dims.to_vec(), element: self.ty.element };
        let indices = 0..ty.len();
        let data = match &self.data {
            Data::Floats(x) => Data::Floats(indices.map(|i| x[index(i)]).collect()),
            Data::Integers(x) => Data::Integers(indices.map(|i| x[index(i)]).collect()),
        };
        Self { ty, data }
    }
}

fn copy(to: &mut Array, to_start: [usize; 2], from: &Array, from_start: [usize; 2], size: [usize; 2]) {
    assert_eq!(to.ty.element, from.ty.element);
    let [to_columns, from_columns] = [&to.ty, &from.ty].map(|ty| ty.matrix()[1]);
    for row in 0..size[0] {
        let at = |start: [usize; 2], columns: usize| {
            let first = (start[0] + row) * columns + start[1];
            first..first + size[1]
        };
        let (to_range, from_range) = (at(to_start, to_columns), at(from_start, from_columns));
        match (&mut to.data, &from.data) {
            (Data::Floats(to), Data::Floats(from)) => to[to_range].copy_from_slice(&from[from_range]),
            (Data::Integers(to), Data::Integers(from)) => to[to_range].copy_from_slice(&from[from_range]),
            _ => unreachable!("of one element type"),
        }
    }
}
