//! Tiles and forms: what fits a chip's memory, and of that what should be fastest.

use super::backward::{Gives, Kernel};
use super::text::Element;
use super::{Backward, Generation, Spec, TpuError, forward};
use crate::problem::{Layout, Shape};
use crate::vjp::Dlogits;
use std::fmt::{self, Display};

/// A tile of logits: so many tokens by so many vocab ids, both multiples of 128.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Tokens.
    pub tokens: usize,
    /// Vocab ids.
    pub vocab: usize,
}

/// How a backward goes about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Three products; dQ stays in VMEM, for `at_once` tokens at a time.
    OnePass {
        /// Tokens that a kernel takes, a multiple of the tile's; dK is summed from one kernel to the next.
        at_once: usize,
        /// Cores that the vocabulary is split over: 1, or as many as the device has.
        cores: usize,
    },
    /// Four products: logits are made once for dQ and once for dK.
    TwoKernels {
        /// Cores that the vocabulary is split over for dK: 1, or as many as the device has.
        cores: usize,
    },
}

/// How a backward is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackwardPlan {
    /// Of its kernels.
    pub tile: Tile,
    /// Of its program.
    pub form: Form,
}

impl Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a tile of {} tokens by {} vocab ids", self.tokens, self.vocab)
    }
}

impl Display for BackwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.form {
            Form::OnePass { at_once, .. } => write!(f, "one pass over {at_once} tokens at once with {}", self.tile),
            Form::TwoKernels { .. } => write!(f, "two kernels with {}", self.tile),
        }
    }
}

/// Tokens of a tile, when they are chosen.
const TOKENS: [usize; 5] = [128, 256, 512, 768, 1024];
/// The most vocab ids of a tile that is chosen.
const MOST_VOCAB: usize = 2048;
/// The most multiplications of a product of tiles, in the forward and in the backward, which has three: the program grows with them,
/// and with it the time to compile it.
const MOST: [usize; 2] = [1 << 31, 3 << 29];
/// Cycles that a step of the grid takes besides its work.
const STEP: f64 = 500.0;
/// The fewest tokens of a chunk, if there are several: below, moving dK costs more than a fourth product.
const FEWEST: usize = 1024;
/// The most chunks, each of which is a kernel of its own.
const MOST_CHUNKS: usize = 64;
/// Products of bfloat16 that one of float32 takes.
const PASSES_OF_F32: f64 = 6.0;

impl Generation {
    /// What a kernel may use: XLA keeps a little of VMEM to itself.
    pub(super) fn available(self) -> usize {
        self.vmem_bytes() / 64 * 63
    }
}

impl Tile {
    fn validate(self) -> Result<(), TpuError> {
        let fits = |size: usize| size > 0 && size.is_multiple_of(128);
        if fits(self.tokens) && fits(self.vocab) { Ok(()) } else { Err(TpuError::Tile(self)) }
    }

    /// Those to choose from, for `tokens` and `vocab` of a problem.
    fn choices(spec: &Spec, most: usize) -> impl Iterator<Item = Tile> {
        let [tokens, vocab] = [spec.shape.tokens, spec.shape.vocab].map(|size| size.next_multiple_of(128));
        let d = spec.shape.hidden;
        let tiles = (128..=MOST_VOCAB).step_by(128).flat_map(|vocab| TOKENS.map(|tokens| Tile { tokens, vocab }));
        let wide = move |size: usize, of: usize| size <= of.max(128);
        tiles.filter(move |tile| wide(tile.tokens, tokens) && wide(tile.vocab, vocab) && tile.tokens * tile.vocab * d <= most)
    }
}

/// Bytes of VMEM that the forward takes: its windows and scratch, and what the compiler copies and spills beside them. That is at
/// most the operands of a product, or the parts that float32 is multiplied in, and the results of a few products, and what options
/// make of one.
fn forward_vmem(spec: &Spec, tile: Tile) -> usize {
    let rows = forward::at_once(tile);
    let results = 4 + usize::from(spec.options.logit_softcap.is_some()) + usize::from(spec.options.label_smoothing > 0.0);
    let results = results * rows * tile.tokens * size_of::<f32>();
    let copies = copies(spec, tile.tokens + rows, 16) + transposed(spec, tile);
    with_margin(forward::frame(spec, tile).vmem_bytes() + results + copies)
}

/// Of so many rows of Q and K, whose products take so many bytes of each float32.
fn copies(spec: &Spec, rows: usize, of_f32: usize) -> usize {
    rows * spec.shape.hidden.next_multiple_of(128) * if spec.operand() == Element::F32 { of_f32 } else { 2 }
}

/// Of K's tile, where it lies the other way round: before and after.
fn transposed(spec: &Spec, tile: Tile) -> usize {
    let of_one = tile.vocab * spec.shape.hidden.next_multiple_of(128) * spec.elements()[1].bytes();
    if spec.layout == Layout::Dv { 2 * of_one } else { 0 }
}

/// For what else the compiler spills.
fn with_margin(bytes: usize) -> usize {
    bytes + bytes / 16 + (1 << 18)
}

/// Bytes of VMEM that the largest kernel of a backward takes.
fn backward_vmem(backward: &Backward, plan: BackwardPlan) -> usize {
    let (spec, tile) = (&backward.spec, plan.tile);
    let vmem = |kernel: &Kernel| {
        let both = matches!(kernel.gives, Gives::Both(_));
        let all = copies(spec, tile.tokens + tile.vocab, if both { 16 } else { 8 });
        // Of tiles as small as this less is copied.
        let smallest = !both && [tile.tokens, tile.vocab] == [128; 2];
        let copies = if smallest { all / 8 * 5 } else { all } + transposed(spec, tile);
        // Of each of the logits: itself, its slope under a cap, and the parts that its gradient is multiplied in.
        let of_dlogits = match backward.dlogits() {
            Dlogits::Bf16 => 0,
            Dlogits::Bf16x2 => 4,
            Dlogits::F32 => 14,
        };
        let of_logits = 4 + if spec.options.logit_softcap.is_some() { 4 } else { 0 } + of_dlogits;
        with_margin(kernel.frame().vmem_bytes() + copies + of_logits * tile.tokens * tile.vocab)
    };
    backward.kernels(plan).iter().map(vmem).max().expect("at least one kernel")
}

/// What a pass does, for the model of its time.
struct Work {
    /// Of bfloat16 multiplications.
    operations: f64,
    /// To and from HBM.
    bytes: f64,
    steps: f64,
    /// Registers that a step adds to a sum in VMEM.
    sums: f64,
    cores: f64,
}

impl Work {
    fn cycles(&self, generation: Generation) -> f64 {
        let bytes = generation.hbm_cycles(self.bytes) / self.cores;
        let work = generation.mxu_cycles(self.operations) + self.steps * (STEP + self.sums / 2.0);
        bytes.max(work / self.cores)
    }
}

/// Tokens and vocab ids in whole tiles, or pieces of tiles, and D, of a spec.
fn padded(spec: &Spec, [tokens, vocab]: [usize; 2], n: usize) -> [f64; 3] {
    [n.next_multiple_of(tokens), spec.shape.vocab.next_multiple_of(vocab), spec.shape.hidden].map(|size| size as f64)
}

fn passes(operand: Element) -> f64 {
    if operand == Element::F32 { PASSES_OF_F32 } else { 1.0 }
}

fn forward_cycles(spec: &Spec, generation: Generation, tile: Tile) -> f64 {
    let [n, v, d] = padded(spec, [tile.tokens, forward::at_once(tile)], spec.shape.tokens);
    let [of_q, of_k] = spec.elements().map(|element| element.bytes() as f64);
    let n_tiles = n / tile.tokens as f64;
    let cores = generation.cores() as f64;
    let work = Work {
        operations: 2.0 * n * v * d * passes(spec.operand()),
        bytes: d * (of_q * n + of_k * v * n_tiles),
        steps: n_tiles * (v / tile.vocab as f64).ceil(),
        sums: 0.0,
        cores: n_tiles / (n_tiles / cores).ceil(),
    };
    work.cycles(generation)
}

fn backward_cycles(backward: &Backward, generation: Generation, plan: BackwardPlan) -> f64 {
    backward.kernels(plan).iter().map(|kernel| kernel_cycles(kernel, generation)).sum()
}

fn kernel_cycles(kernel: &Kernel, generation: Generation) -> f64 {
    let (spec, tile) = (&kernel.of.spec, kernel.tile);
    let [n, v, d] = padded(spec, [tile.tokens, tile.vocab], kernel.tokens);
    let [of_q, of_k] = spec.elements().map(|element| element.bytes() as f64);
    let [n_tiles, v_tiles] = [n / tile.tokens as f64, v / tile.vocab as f64];
    let (parts, operand) = match kernel.of.dlogits() {
        Dlogits::Bf16 => (1.0, Element::Bf16),
        Dlogits::Bf16x2 => (2.0, Element::Bf16),
        Dlogits::F32 => (1.0, Element::F32),
    };
    let of_f32 = size_of::<f32>() as f64;
    let (products, summed, rows, cores) = match kernel.gives {
        Gives::Hidden => (1.0, tile.tokens, of_k * v * n_tiles + 2.0 * of_q * n, generation.cores().min(n_tiles as usize)),
        Gives::Unembedding(dk) | Gives::Both(dk) => {
            let both = matches!(kernel.gives, Gives::Both(_));
            let (products, summed) = if both { (2.0, tile.tokens + tile.vocab) } else { (1.0, tile.vocab) };
            let of_dk = if dk.adds { 2.0 * of_f32 } else { of_f32 };
            (products, summed, of_q * n * v_tiles + (of_k + of_dk) * v, dk.cores)
        }
    };
    let wasted = |size: usize| size.next_multiple_of(generation.mxu_width()) as f64 / size as f64;
    let done = 2.0 * n * v * d * wasted(tile.tokens) * wasted(tile.vocab) * wasted(spec.shape.hidden);
    let work = Work {
        operations: done * (passes(spec.operand()) + products * parts * passes(operand)),
        bytes: rows * d,
        steps: n_tiles * v_tiles,
        sums: summed as f64 * d / 1024.0,
        cores: cores as f64,
    };
    work.cycles(generation)
}

/// What fits where this D does not.
fn smaller(hidden: usize, fits: impl Fn(usize) -> bool) -> String {
    let most = (1..=hidden / 128).rev().map(|blocks| blocks * 128).find(|&d| d < hidden && fits(d));
    match most {
        Some(d) => format!("D up to {d} fits, or bfloat16 inputs if these are float32"),
        None => "no D fits with these types".to_owned(),
    }
}

impl Spec {
    fn fitting(&self, generation: Generation) -> Option<Tile> {
        let fits = |tile: &Tile| forward_vmem(self, *tile) <= generation.available();
        let cycles = |tile: &Tile| forward_cycles(self, generation, *tile);
        let full = |tile: &Tile| tile.vocab == 128 || forward::at_once(*tile) == forward::AT_ONCE;
        Tile::choices(self, MOST[0]).filter(full).filter(fits).min_by(|x, y| cycles(x).total_cmp(&cycles(y)))
    }

    /// The forward's tile for this chip: of those that fit, the one that a model of its time finds fastest.
    ///
    /// # Errors
    /// Sizes, types or options that no kernel is made for; no tile fits: says what would.
    pub fn plan(&self, generation: Generation) -> Result<Tile, TpuError> {
        self.validate()?;
        self.fitting(generation).ok_or_else(|| {
            let tile = Tile { tokens: 128, vocab: 128 };
            let with = |hidden| Spec { shape: Shape { hidden, ..self.shape }, ..*self };
            let fits = |hidden| with(hidden).fitting(generation).is_some();
            vmem_error(format!("the forward with {tile}"), forward_vmem(self, tile), generation, smaller(self.shape.hidden, fits))
        })
    }

    /// Bytes of VMEM that the forward takes with this tile.
    pub(super) fn fits(&self, generation: Generation, tile: Tile) -> Result<usize, TpuError> {
        tile.validate()?;
        let needed = forward_vmem(self, tile);
        if needed <= generation.available() {
            return Ok(needed);
        }
        let chosen = self.plan(generation)?;
        Err(vmem_error(format!("the forward with {tile}"), needed, generation, format!("{chosen} fits")))
    }
}

impl Backward {
    fn kernels(&self, plan: BackwardPlan) -> Vec<Kernel<'_>> {
        match plan.form {
            Form::OnePass { at_once, cores } => self.chunks(plan.tile, at_once, cores),
            Form::TwoKernels { cores } => self.apart(plan.tile, cores).to_vec(),
        }
    }

    fn choices(&self, generation: Generation) -> impl Iterator<Item = BackwardPlan> {
        let (n, cores) = (self.spec.shape.tokens, generation.cores());
        Tile::choices(&self.spec, MOST[1]).flat_map(move |tile| {
            let whole = n.next_multiple_of(tile.tokens);
            let chunks = (1..).map(move |parts: usize| whole.div_ceil(parts).next_multiple_of(tile.tokens));
            let chunks = chunks.take_while(move |&at_once| at_once == whole || at_once >= FEWEST).take(MOST_CHUNKS);
            let one_pass = chunks.map(move |at_once| Form::OnePass { at_once, cores });
            one_pass.chain([Form::TwoKernels { cores }]).map(move |form| BackwardPlan { tile, form })
        })
    }

    fn fitting(&self, generation: Generation) -> Option<BackwardPlan> {
        let fits = |plan: &BackwardPlan| backward_vmem(self, *plan) <= generation.available();
        let cycles = |plan: &BackwardPlan| backward_cycles(self, generation, *plan);
        self.choices(generation).filter(fits).min_by(|x, y| cycles(x).total_cmp(&cycles(y)))
    }

    /// How to cut the backward for this chip: of what fits, what a model of its time finds fastest.
    ///
    /// # Errors
    /// Sizes, types or options that no kernel is made for; nothing fits: says what would.
    pub fn plan(&self, generation: Generation) -> Result<BackwardPlan, TpuError> {
        self.validate()?;
        self.fitting(generation).ok_or_else(|| {
            let plan = BackwardPlan { tile: Tile { tokens: 128, vocab: 128 }, form: Form::TwoKernels { cores: 1 } };
            let with = |hidden| Spec { shape: Shape { hidden, ..self.spec.shape }, ..self.spec };
            let fits = |hidden| Backward { spec: with(hidden), ..*self }.fitting(generation).is_some();
            let remedy = smaller(self.spec.shape.hidden, fits);
            vmem_error(format!("the backward, {plan},"), backward_vmem(self, plan), generation, remedy)
        })
    }

    /// Bytes of VMEM that the largest kernel takes.
    pub(super) fn fits(&self, generation: Generation, plan: BackwardPlan) -> Result<usize, TpuError> {
        plan.tile.validate()?;
        if let Form::OnePass { at_once, .. } = plan.form
            && (at_once == 0 || !at_once.is_multiple_of(plan.tile.tokens))
        {
            return Err(TpuError::Chunk { found: at_once, tile: plan.tile.tokens });
        }
        let (Form::OnePass { cores, .. } | Form::TwoKernels { cores }) = plan.form;
        if ![1, generation.cores()].contains(&cores) {
            return Err(TpuError::Cores { found: cores, generation });
        }
        let needed = backward_vmem(self, plan);
        if needed <= generation.available() {
            return Ok(needed);
        }
        let chosen = self.plan(generation)?;
        Err(vmem_error(format!("the backward, {plan},"), needed, generation, format!("{chosen} fits")))
    }
}

fn vmem_error(what: String, needed: usize, generation: Generation, remedy: String) -> TpuError {
    TpuError::Vmem { what, needed, available: generation.available(), generation, remedy }
}
