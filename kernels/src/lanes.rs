//! What happens to a panel of logits, [columns, NR], with a token in each lane: sums down the lanes, and dlogits.
//!
//! Loops run along the lanes, which vectorises, with one state per lane.

use crate::cpu::{Isa, Vectorized};
use crate::elementwise::{exp, tanh};
use crate::panels::Pack;
use crate::problem::{LossOptions, Problem};
use crate::shard::{Share, TokenPartial};
use crate::vjp::Cotangents;

/// Columns whose exponentials are added up before they join the sum: two short sums err less than a long one.
const SHORT: usize = 16;
/// Lanes of the widest panel.
pub(crate) const MOST_LANES: usize = 64;

/// A value for each lane.
pub(crate) type Lanes = [f32; MOST_LANES];

/// The largest logit of each lane; NaN is passed over.
#[inline(always)]
fn maxima<I: Isa>(z: &[f32]) -> Lanes {
    let mut max = [f32::NEG_INFINITY; MOST_LANES];
    for row in z.chunks_exact(I::NR) {
        for lane in 0..I::NR {
            max[lane] = if row[lane] > max[lane] { row[lane] } else { max[lane] };
        }
    }
    max
}

/// Where exponentials are taken from: the maximum, but 0 where all logits are −∞, for exponentials of 0 and not of −∞ − −∞.
#[inline(always)]
fn origins(max: &Lanes) -> Lanes {
    max.map(|max| if max == f32::NEG_INFINITY { 0.0 } else { max })
}

/// Σ f(z, lane's own value) of each lane.
#[inline(always)]
fn sums<I: Isa>(z: &[f32], of_lane: &Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    let mut sums = [0.0; MOST_LANES];
    for rows in z.chunks(SHORT * I::NR) {
        let mut short = [0.0; MOST_LANES];
        for row in rows.chunks_exact(I::NR) {
            for lane in 0..I::NR {
                short[lane] += f(row[lane], of_lane[lane]);
            }
        }
        for lane in 0..I::NR {
            sums[lane] += short[lane];
        }
    }
    sums
}

/// What the loss needs to know of a panel's logits, but the label's.
pub(crate) struct Partials<'a> {
    pub z: &'a [f32],
    /// Whether Σ z is wanted.
    pub smoothing: bool,
    pub out: &'a mut [TokenPartial],
}

impl<I: Isa> Vectorized<I, ()> for Partials<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { z, smoothing, out } = self;
        let max = maxima::<I>(z);
        let sum = sums::<I>(z, &origins(&max), |z, origin| exp::<I>(z - origin));
        let logit_sum = if smoothing { sums::<I>(z, &max, |z, _| z) } else { [0.0; MOST_LANES] };
        for (lane, out) in out.iter_mut().enumerate() {
            *out = TokenPartial { max: max[lane], sum: sum[lane], logit_sum: logit_sum[lane], label_logit: 0.0 };
        }
    }
}

/// What prediction needs to know of a token's logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prediction {
    max: f32,
    argmax: u32,
    /// Σ exp(z − max) and Σ exp(z − max)·(z − max).
    sum: f32,
    weighted: f32,
}

impl Default for Prediction {
    fn default() -> Self {
        Self { max: f32::NEG_INFINITY, argmax: 0, sum: 0.0, weighted: 0.0 }
    }
}

impl Prediction {
    /// The vocab id of the largest logit, the lowest of equals, and −Σ P ln P.
    pub fn finish(&self) -> (u32, f32) {
        let sum = f64::from(self.sum);
        (self.argmax, (sum.ln() - f64::from(self.weighted) / sum) as f32)
    }
}

impl Share for Prediction {
    fn merged(shares: impl Iterator<Item = Self> + Clone) -> Self {
        let best = shares.clone().fold(Self::default(), |best, share| if share.max > best.max { share } else { best });
        let (mut sum, mut weighted) = (0.0, 0.0);
        for share in shares {
            // With z − max = (z − share's max) + below. 0·(−∞) is 0 here.
            let below = if share.max == best.max { 0.0 } else { f64::from(share.max) - f64::from(best.max) };
            let factor = below.exp();
            if factor != 0.0 {
                sum += factor * f64::from(share.sum);
                weighted += factor * (f64::from(share.weighted) + below * f64::from(share.sum));
            }
        }
        Self { sum: sum as f32, weighted: weighted as f32, ..best }
    }
}

/// What prediction needs to know of a panel's logits.
pub(crate) struct Predictions<'a> {
    pub z: &'a [f32],
    /// The first column.
    pub first: usize,
    pub out: &'a mut [Prediction],
}

impl<I: Isa> Vectorized<I, ()> for Predictions<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { z, first, out } = self;
        let max = maxima::<I>(z);
        let origin = origins(&max);
        let sum = sums::<I>(z, &origin, |z, origin| exp::<I>(z - origin));
        let weighted = sums::<I>(z, &origin, |z, origin| {
            let e = exp::<I>(z - origin);
            // 0·(−∞) is 0 here.
            if e == 0.0 { 0.0 } else { e * (z - origin) }
        });
        for (lane, out) in out.iter_mut().enumerate() {
            let row = z.iter().skip(lane).step_by(I::NR).position(|&z| z == max[lane]).unwrap_or(0);
            *out = Prediction { max: max[lane], argmax: (first + row) as u32, sum: sum[lane], weighted: weighted[lane] };
        }
    }
}

/// Scale and cap.
pub(crate) struct FinishLogits<'a> {
    pub options: &'a LossOptions,
    pub z: &'a mut [f32],
}

impl<I: Isa> Vectorized<I, ()> for FinishLogits<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { options, z } = self;
        let scale = options.logit_scale as f32;
        if let Some(cap) = options.logit_softcap {
            let (inner, cap) = ((options.logit_scale / cap) as f32, cap as f32);
            for z in z {
                *z = cap * tanh::<I>(*z * inner);
            }
        } else if scale != 1.0 {
            for z in z {
                *z *= scale;
            }
        }
    }
}

/// What multiplies P, the constant 1 and the onehot in ∂/∂z of each lane's token, and its lse. Lanes without a token have 0.
#[derive(Clone, Debug)]
pub(crate) struct PanelCotangent {
    lse: Lanes,
    p: Lanes,
    constant: Lanes,
    onehot: Lanes,
}

impl PanelCotangent {
    /// The largest dlogits that a filter calls small.
    pub fn limits(&self, threshold: f32, scale: f64) -> Lanes {
        std::array::from_fn(|lane| threshold * scale.abs() as f32 * self.p[lane].abs().max(self.onehot[lane].abs()))
    }

    pub fn new(problem: &Problem, cotangents: Cotangents, tokens: &[usize], lse: &[f32]) -> Self {
        let zero = [0.0; MOST_LANES];
        let mut out = Self { lse: zero, p: zero, constant: zero, onehot: zero };
        let LossOptions { z_loss, label_smoothing, .. } = *problem.options();
        for (lane, (&n, &lse)) in tokens.iter().zip(lse).enumerate() {
            let at = |c: Option<&[f32]>| c.map_or(0.0, |c| f64::from(c[n]));
            let (g, h, u) = (at(cotangents.loss), at(cotangents.lse), at(cotangents.label_logits));
            out.lse[lane] = lse;
            out.p[lane] = (g * (1.0 + 2.0 * z_loss * f64::from(lse)) + h) as f32;
            out.constant[lane] = (-g * label_smoothing / problem.valid_total() as f64) as f32;
            out.onehot[lane] = (u - g * (1.0 - label_smoothing)) as f32;
        }
        out
    }
}

/// dlogits of a panel of logits.
pub(crate) struct Dlogits<'a> {
    pub cotangent: &'a PanelCotangent,
    pub options: &'a LossOptions,
    pub z: &'a [f32],
    /// Lanes and the columns of their labels, and the first column here.
    pub labels: &'a [(usize, usize)],
    pub first: usize,
    pub out: &'a mut [f32],
}

impl<I: Isa> Vectorized<I, ()> for Dlogits<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { cotangent, options, z, labels, first, out } = self;
        let PanelCotangent { lse, p, constant, onehot } = cotangent;
        let scale = options.logit_scale as f32;
        let slope = |z: f32, cap: f32| scale * ((1.0 - z / cap) * (1.0 + z / cap));
        let cap = options.logit_softcap.map(|cap| cap as f32);
        for (out, z) in out.chunks_exact_mut(I::NR).zip(z.chunks_exact(I::NR)) {
            match cap {
                None => {
                    for lane in 0..I::NR {
                        out[lane] = scale * I::mul_add(p[lane], exp::<I>(z[lane] - lse[lane]), constant[lane]);
                    }
                }
                Some(cap) => {
                    for lane in 0..I::NR {
                        let e = exp::<I>(z[lane] - lse[lane]);
                        out[lane] = I::mul_add(p[lane], e, constant[lane]) * slope(z[lane], cap);
                    }
                }
            }
        }
        // The label's term is joined to its column in float32.
        for &(lane, column) in labels {
            if !(first..first + z.len() / I::NR).contains(&column) {
                continue;
            }
            let column = column - first;
            let z = z[column * I::NR + lane];
            let term = I::mul_add(p[lane], exp::<I>(z - lse[lane]), constant[lane] + onehot[lane]);
            out[column * I::NR + lane] = term * cap.map_or(scale, |cap| slope(z, cap));
        }
    }
}

/// Packs a part of dlogits, [columns, NR], as left operand of dQ: [word][part][NR][KU], in words of columns.
pub(crate) struct PackByToken<'a, P> {
    pub dlogits: &'a [f32],
    pub part: usize,
    pub parts: usize,
    pub out: &'a mut [P],
}

impl<I: Isa> Vectorized<I, ()> for PackByToken<'_, I::Packed> {
    #[inline(always)]
    fn run(self) {
        let word = I::NR * I::KU;
        for (out, columns) in self.out.chunks_exact_mut(word * self.parts).zip(self.dlogits.chunks_exact(word)) {
            let out = &mut out[self.part * word..][..word];
            match I::KU {
                1 => I::pack_row(columns, out),
                2 => I::pack_pairs(&columns[..I::NR], &columns[I::NR..], out),
                _ => {
                    for (u, column) in columns.chunks_exact(I::NR).enumerate() {
                        for lane in 0..I::NR {
                            out[lane * I::KU + u] = Pack::pack(column[lane]);
                        }
                    }
                }
            }
        }
    }
}

/// Packs dlogits, [columns, NR], as left operand of dK: [column][token], in words of tokens.
pub(crate) struct PackByColumn<'a, P> {
    pub dlogits: &'a [f32],
    /// How many of the lanes.
    pub tokens: usize,
    /// From column to column.
    pub stride: usize,
    pub out: &'a mut [P],
}

impl<I: Isa> Vectorized<I, ()> for PackByColumn<'_, I::Packed> {
    #[inline(always)]
    fn run(self) {
        for (out, column) in self.out.chunks_mut(self.stride).zip(self.dlogits.chunks_exact(I::NR)) {
            // The length of a whole panel is known when this is compiled.
            if self.tokens == I::NR {
                I::pack_row(&column[..I::NR], out);
            } else {
                I::pack_row(&column[..self.tokens], out);
            }
        }
    }
}

/// Leaves of each value what packing it loses.
pub(crate) struct Residual<'a>(pub &'a mut [f32]);

impl<I: Isa> Vectorized<I, ()> for Residual<'_> {
    #[inline(always)]
    fn run(self) {
        for x in self.0 {
            let packed: f32 = I::Packed::pack(*x).into();
            *x -= packed;
        }
    }
}
