//! A tensor read from a dump: elements in row-major order, straight from the mapped file where they lie so.

use super::names::ElementType;
use super::shards::{Region, elements, for_each_run};
use super::write::Elements;
use fused_xent_kernels::problem::{Floats, Layout, Targets};
use half::{bf16, f16};
use memmap2::Mmap;
use std::ops::Range;
use std::sync::Arc;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A dense tensor in row-major order, in the dtype that its manifest gives.
#[derive(Clone, Debug)]
pub struct Tensor {
    dtype: ElementType,
    shape: Vec<usize>,
    layout: Layout,
    data: Data,
}

/// Elements in the machine's byte order, aligned for any element type.
#[derive(Clone, Debug)]
pub(crate) enum Data {
    Mapped(Arc<Mmap>, Range<usize>),
    Owned(Buffer),
}

impl Data {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Data::Mapped(map, range) => &map[range.clone()],
            Data::Owned(buffer) => buffer.bytes(),
        }
    }
}

/// Bytes on the heap, aligned for any element type.
#[derive(Clone, Debug)]
pub(crate) struct Buffer {
    words: Vec<u64>,
    length: usize,
}

impl Buffer {
    /// `length` zero bytes; `None` if memory cannot hold them.
    pub fn zeroed(length: usize) -> Option<Self> {
        let mut words = Vec::new();
        words.try_reserve_exact(length.div_ceil(8)).ok()?;
        words.resize(length.div_ceil(8), 0);
        Some(Self { words, length })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.words.as_bytes()[..self.length]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.words.as_mut_bytes()[..self.length]
    }
}

impl Tensor {
    /// `data` holds the elements of `shape`, aligned.
    pub(crate) fn new(dtype: ElementType, shape: Vec<usize>, layout: Layout, data: Data) -> Self {
        debug_assert_eq!(elements(&shape).map(|n| n * dtype.bytes()), Some(data.bytes().len()));
        Self { dtype, shape, layout, data }
    }

    /// The element type.
    pub fn dtype(&self) -> ElementType {
        self.dtype
    }

    /// The extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How an unembedding or its gradient lies in memory; [`Layout::Vd`] for all else.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes().len() / self.dtype.bytes()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements' bytes, in the machine's order.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.data.bytes()
    }

    /// Whether the elements lie in the mapped file, nothing copied.
    pub fn is_mapped(&self) -> bool {
        matches!(self.data, Data::Mapped(..))
    }

    fn slice<T: FromBytes + Immutable + KnownLayout>(&self) -> &[T] {
        <[T]>::ref_from_bytes(self.bytes()).expect("data are whole elements, aligned for any element type")
    }

    /// The elements as the kernels' floats; `None` for integers and float64.
    pub fn floats(&self) -> Option<Floats<'_>> {
        Some(match self.dtype {
            ElementType::Bf16 => Floats::Bf16(self.slice()),
            ElementType::F16 => Floats::F16(self.slice()),
            ElementType::F32 => Floats::F32(self.slice()),
            _ => return None,
        })
    }

    /// The elements as label ids; `None` for floats.
    pub fn targets(&self) -> Option<Targets<'_>> {
        Some(match self.dtype {
            ElementType::I32 => Targets::I32(self.slice()),
            ElementType::I64 => Targets::I64(self.slice()),
            ElementType::U32 => Targets::U32(self.slice()),
            _ => return None,
        })
    }

    /// The elements of a float32 tensor; `None` for any other.
    pub fn f32_slice(&self) -> Option<&[f32]> {
        (self.dtype == ElementType::F32).then(|| self.slice())
    }

    /// The elements as a writer takes them.
    pub fn elements(&self) -> Elements<'_> {
        match self.dtype {
            ElementType::Bf16 => Elements::Bf16(self.slice()),
            ElementType::F16 => Elements::F16(self.slice()),
            ElementType::F32 => Elements::F32(self.slice()),
            ElementType::F64 => Elements::F64(self.slice()),
            ElementType::I32 => Elements::I32(self.slice()),
            ElementType::I64 => Elements::I64(self.slice()),
            ElementType::U32 => Elements::U32(self.slice()),
        }
    }

    /// These of its rows, where it is taken as `of` rows of equal length; the rest of its shape is `row`. `None` if memory
    /// cannot hold them.
    ///
    /// # Panics
    /// If a row is not below `of`.
    pub(crate) fn rows(&self, of: usize, rows: &[usize], row: &[usize]) -> Option<Tensor> {
        let width = self.bytes().len() / of;
        let mut buffer = Buffer::zeroed(rows.len() * width)?;
        if width > 0 {
            for (to, &n) in buffer.bytes_mut().chunks_exact_mut(width).zip(rows) {
                to.copy_from_slice(&self.bytes()[n * width..][..width]);
            }
        }
        let shape = std::iter::once(rows.len()).chain(row.iter().copied()).collect();
        Some(Tensor::new(self.dtype, shape, self.layout, Data::Owned(buffer)))
    }

    /// Every element as f64: exact for all types but int64, whose numbers beyond 2⁵³ are rounded.
    pub fn to_f64(&self) -> Vec<f64> {
        match self.dtype {
            ElementType::Bf16 => self.slice::<bf16>().iter().map(|x| x.to_f64()).collect(),
            ElementType::F16 => self.slice::<f16>().iter().map(|x| x.to_f64()).collect(),
            ElementType::F32 => self.slice::<f32>().iter().map(|&x| x.into()).collect(),
            ElementType::F64 => self.slice::<f64>().to_vec(),
            ElementType::I32 => self.slice::<i32>().iter().map(|&x| x.into()).collect(),
            ElementType::I64 => self.slice::<i64>().iter().map(|&x| x as f64).collect(),
            ElementType::U32 => self.slice::<u32>().iter().map(|&x| x.into()).collect(),
        }
    }
}

/// What was recorded under one name.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The tensor, assembled from the shards of replica 0.
    pub tensor: Tensor,
    /// Copies of regions of a recorded output that differ bitwise from `tensor` there. Copies of inputs never differ.
    pub copies: Vec<ReplicaCopy>,
}

impl Recorded {
    /// The tensor as `process` has it, its copies in place. `None` if memory cannot hold it.
    pub(crate) fn of_process(&self, process: usize) -> Option<Tensor> {
        let (shape, width) = (self.tensor.shape(), self.tensor.dtype().bytes());
        let mut buffer = Buffer::zeroed(self.tensor.bytes().len())?;
        let whole = buffer.bytes_mut();
        whole.copy_from_slice(self.tensor.bytes());
        for copy in self.copies.iter().filter(|copy| copy.process == process) {
            for_each_run(shape, &copy.region, |at, first, run| {
                whole[at * width..][..run * width].copy_from_slice(&copy.data.bytes()[first * width..][..run * width]);
                None::<()>
            });
        }
        Some(Tensor::new(self.tensor.dtype(), shape.to_vec(), self.tensor.layout(), Data::Owned(buffer)))
    }
}

/// A copy of a region that says something else than the first copy does.
#[derive(Clone, Debug)]
pub struct ReplicaCopy {
    /// The process that recorded it.
    pub process: usize,
    /// Its replica number, above 0.
    pub replica: usize,
    /// Where it lies in the tensor.
    pub region: Region,
    /// Its elements, of the region's shape.
    pub data: Tensor,
}
