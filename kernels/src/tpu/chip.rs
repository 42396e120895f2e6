//! What the kernels need to know of a chip.

use std::fmt::{self, Display};

/// A generation of TPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Generation {
    /// TPU v4.
    V4,
    /// TPU v5e.
    V5e,
    /// TPU v5p.
    V5p,
    /// TPU v6e.
    V6e,
    /// TPU7x.
    V7x,
}

impl Generation {
    /// All, the oldest first.
    pub const ALL: [Generation; 5] = [Self::V4, Self::V5e, Self::V5p, Self::V6e, Self::V7x];

    /// The generation of that name: `v4`, `v5e`, `v5p`, `v6e`, `v7x`.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|generation| generation.name() == name)
    }

    /// The generation of a device that calls itself so: `TPU v4`, `TPU v5` (v5p), `TPU v5 lite` (v5e), `TPU v6 lite` (v6e), `TPU7x`.
    pub fn by_kind(kind: &str) -> Option<Self> {
        Some(match kind {
            "TPU v4" => Self::V4,
            "TPU v5 lite" | "TPU v5e" => Self::V5e,
            "TPU v5" | "TPU v5p" => Self::V5p,
            "TPU v6 lite" | "TPU v6e" => Self::V6e,
            "TPU7x" | "TPU v7x" => Self::V7x,
            _ => return None,
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V5e => "v5e",
            Self::V5p => "v5p",
            Self::V6e => "v6e",
            Self::V7x => "v7x",
        }
    }

    /// What libtpu calls one chip of it, as a topology to compile ahead for; v4 has its two cores in one device only with the
    /// option `chip_config_name=megacore`.
    pub fn topology(self) -> &'static str {
        match self {
            Self::V4 => "v4:1x1x1",
            Self::V5e => "v5e:1x1",
            Self::V5p => "v5p:1x1x1",
            Self::V6e => "v6e:1x1",
            Self::V7x => "tpu7x:1x1x1",
        }
    }

    /// Bytes of VMEM of a core.
    pub fn vmem_bytes(self) -> usize {
        let mib = match self {
            Self::V4 => 16,
            Self::V5e | Self::V6e => 128,
            Self::V5p | Self::V7x => 64,
        };
        mib << 20
    }

    /// Cores that one device has, between which XLA splits a kernel's parallel steps.
    pub fn cores(self) -> usize {
        match self {
            Self::V4 | Self::V5p => 2,
            Self::V5e | Self::V6e | Self::V7x => 1,
        }
    }

    /// Rows and columns of a matrix unit: of a product whose sizes are no multiples of it a part is done in vain.
    pub fn mxu_width(self) -> usize {
        match self {
            Self::V4 | Self::V5e | Self::V5p => 128,
            Self::V6e | Self::V7x => 256,
        }
    }

    /// Cycles of a core that `operations` of bfloat16 products take at least.
    pub fn mxu_cycles(self, operations: f64) -> f64 {
        operations
            / match self {
                Self::V4 | Self::V5e | Self::V5p => 131_072.0,
                Self::V6e | Self::V7x => 524_288.0,
            }
    }

    /// Cycles of a core in a second.
    pub fn clock(self) -> f64 {
        match self {
            Self::V4 => 1.05e9,
            Self::V5e => 1.5e9,
            Self::V5p | Self::V6e => 1.75e9,
            Self::V7x => 2.2e9,
        }
    }

    /// Cycles of a core that moving `bytes` between HBM and VMEM takes at least: its share of the chip's bandwidth.
    pub fn hbm_cycles(self, bytes: f64) -> f64 {
        let bytes_per_second = match self {
            Self::V4 => 1.228e12 / 2.0,
            Self::V5e => 0.819e12,
            Self::V5p => 2.765e12 / 2.0,
            Self::V6e => 1.64e12,
            Self::V7x => 7.4e12 / 2.0,
        };
        bytes * self.clock() / bytes_per_second
    }
}

impl Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
