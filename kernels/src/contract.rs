//! Numeric contracts: which value is rounded to what, and where. Every kernel declares its own.
//!
//! A kernel is judged against the error that its declared roundings make on the very data at hand, never against a constant.

use crate::problem::DType;

/// The precision in which a value is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// float64: no rounding that matters here.
    F64,
    /// float32.
    F32,
    /// A pair of bfloat16, high and low: 16 bits of significand.
    Bf16x2,
    /// float16.
    F16,
    /// bfloat16.
    Bf16,
}

impl Precision {
    /// `x` rounded once to this precision.
    pub fn round(self, x: f64) -> f64 {
        match self {
            Precision::F64 => x,
            Precision::F32 => DType::F32.round(x),
            Precision::F16 => DType::F16.round(x),
            Precision::Bf16 => DType::Bf16.round(x),
            Precision::Bf16x2 => {
                let high = DType::Bf16.round(x);
                high + DType::Bf16.round(x - high)
            }
        }
    }

    /// Unit roundoff: no rounding of a normal number is off by more, relatively.
    pub fn unit_roundoff(self) -> f64 {
        match self {
            Precision::F64 => 2f64.powi(-53),
            Precision::F32 => DType::F32.unit_roundoff(),
            Precision::F16 => DType::F16.unit_roundoff(),
            Precision::Bf16 => DType::Bf16.unit_roundoff(),
            Precision::Bf16x2 => 2f64.powi(-16),
        }
    }

    /// Whether rounding to this precision shows at the scale of 16-bit outputs.
    pub fn is_16_bit(self) -> bool {
        self.unit_roundoff() > Precision::Bf16x2.unit_roundoff()
    }

    /// Every precision, the widest first.
    pub const ALL: [Precision; 5] = [Precision::F64, Precision::F32, Precision::Bf16x2, Precision::F16, Precision::Bf16];

    /// The precision of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.name() == name)
    }

    /// The name used in manifests and reports.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F64 => "f64",
            Precision::F32 => "f32",
            Precision::Bf16x2 => "bf16x2",
            Precision::F16 => "f16",
            Precision::Bf16 => "bf16",
        }
    }
}

impl From<DType> for Precision {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::Bf16 => Precision::Bf16,
            DType::F16 => Precision::F16,
            DType::F32 => Precision::F32,
        }
    }
}

/// How the onehot enters dlogits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LabelTerm {
    /// P − onehot is formed first, and rounded as one.
    Joint,
    /// The label part is added to the gradients apart, exact in f32; only P is rounded to the precision of dlogits.
    Apart,
}

/// Which value of the computation is rounded to what. Inputs are exact; products of two inputs are exact or f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contract {
    /// z, between the product Q·Kᵀ and exp.
    pub logits: Precision,
    /// dlogits, before the gradient products.
    pub dlogits: Precision,
    /// Whether that rounding takes the label part in.
    pub label: LabelTerm,
    /// All sums: over D in the logits, over V in lse and dQ, over N in dK.
    pub accumulate: Precision,
    /// The one final rounding of dQ.
    pub d_hidden: Precision,
    /// The one final rounding of dK.
    pub d_unembedding: Precision,
}

impl Contract {
    /// Float32 throughout: what a kernel promises that rounds nothing but its outputs.
    pub const F32: Contract = Contract {
        logits: Precision::F32,
        dlogits: Precision::F32,
        label: LabelTerm::Joint,
        accumulate: Precision::F32,
        d_hidden: Precision::F32,
        d_unembedding: Precision::F32,
    };
}
