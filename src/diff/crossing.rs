//! Where in the logits the error of the gradients comes from.
//!
//! Gradients do not hold dlogits, but they are sums over them: dQ[n] = Σ_j c[n, j] with c[n, j] = Σ_{v in vocab tile j}
//! dlogits[n, v]·K[v], and dK[v] likewise over token tiles. The error of dQ in the tokens of a tile is fitted by Σ_j β_j c[n, j]:
//! β_j is the share of vocab tile j's honest contribution that is too much there, −1 where it is missing. A vocab tile that
//! dQ lacks, or a token tile that dK does, so shows by itself, as far as contributions differ in direction. A few tokens of
//! each token tile, and a few ids of each vocab tile, are looked at.

use super::candidate::Values;
use super::step::Step;
use super::truth::{Stage, Truth};
use crate::report::plots::{Crossing, CrossingMap};
use fused_xent_kernels::problem::{Label, Problem};
use fused_xent_kernels::reference::{self, Cotangents};
use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;

/// Tiles along an axis at most.
const TILES: usize = 24;
/// Multiplications that a product may take.
const WORK: usize = 1 << 29;

/// The maps of microbatch `m`, for a candidate that has `stages` of it, all rows of them, with these floors of dQ and dK.
pub(super) fn crossing(
    step: &Step,
    m: usize,
    truth: &Truth,
    stages: &BTreeMap<Stage, Values>,
    floors: [Option<f64>; 2],
) -> Crossing {
    let problem = &step.microbatches[m].problem;
    let shape = problem.shape();
    let of = [shape.tokens, problem.valid_columns()];
    let tile = of.map(|of| of.div_ceil(TILES).next_power_of_two());
    let tiles = [0, 1].map(|axis| spans(of[axis], tile[axis]));
    let tracing =
        Tracing { problem, lse: &truth.outcome.forward.lse, cotangents: Cotangents::weighted(problem, step.own_factor(m)) };
    let mut maps = Vec::new();
    for (axis, stage) in [Stage::DHidden, Stage::DUnembedding].into_iter().enumerate() {
        let (Some(values), Some(floor)) = (stages.get(&stage), floors[axis].filter(|floor| *floor > 0.0)) else { continue };
        let exact = truth.outcome.stage(stage);
        let mut ratio = vec![0.0; tiles[0].len() * tiles[1].len()];
        let (mut left, mut all) = (0.0, 0.0);
        let each = (WORK / (of[1 - axis] * shape.hidden * tiles[axis].len()).max(1)).clamp(1, 64);
        let chosen: Vec<Vec<usize>> = tiles[axis].iter().map(|span| tracing.some(axis, span, each)).collect();
        let contributions = tracing.contributions(axis, &chosen.concat(), &tiles[1 - axis]);
        let mut first = 0;
        for (place, rows) in chosen.iter().enumerate() {
            let own = first..first + rows.len();
            first = own.end;
            let (values, exact) = (values.values.select(Axis(0), rows), exact.select(Axis(0), rows));
            let (size, error) = (exact.iter().map(|x| x * x).sum::<f64>().sqrt(), values - exact);
            let parts: Vec<ArrayView2<f64>> = contributions.iter().map(|part| part.slice(s![own.clone(), ..])).collect();
            let Some(fit) = fit(&parts, &error) else { continue };
            let mut rest = error.clone();
            parts.iter().zip(&fit).for_each(|(part, beta)| rest.scaled_add(-beta, part));
            left += rest.iter().map(|x| x * x).sum::<f64>();
            all += error.iter().map(|x| x * x).sum::<f64>();
            for (other, (part, beta)) in parts.iter().zip(&fit).enumerate() {
                let norm = beta.abs() * part.iter().map(|x| x * x).sum::<f64>().sqrt();
                let cell = if axis == 0 { place * tiles[1].len() + other } else { other * tiles[1].len() + place };
                ratio[cell] = if size > 0.0 { (norm / (floor * size)) as f32 } else { 0.0 };
            }
        }
        let explained = 1.0 - left / all;
        if explained.is_finite() {
            maps.push(CrossingMap { stage: stage.name(), ratio, explained });
        }
    }
    Crossing { microbatch: step.microbatches[m].index, tile, of, maps }
}

fn spans(of: usize, tile: usize) -> Vec<Range<usize>> {
    (0..of).step_by(tile).map(|from| from..(from + tile).min(of)).collect()
}

struct Tracing<'a> {
    problem: &'a Problem<'a>,
    lse: &'a [f64],
    cotangents: Cotangents,
}

impl Tracing<'_> {
    /// Up to `count` tokens (axis 0) or vocab ids (axis 1) of a tile: unmasked ones, and labels, before others.
    fn some(&self, axis: usize, span: &Range<usize>, count: usize) -> Vec<usize> {
        let labels = self.problem.labels();
        let mut telling = vec![false; span.len()];
        for (token, label) in labels.iter().enumerate() {
            let place = match label {
                Label::Column(id) if axis == 1 => *id as usize,
                Label::Column(_) => token,
                _ => continue,
            };
            if span.contains(&place) {
                telling[place - span.start] = true;
            }
        }
        let (first, second): (Vec<usize>, Vec<usize>) = span.clone().partition(|row| telling[row - span.start]);
        let spread = |rows: Vec<usize>, count: usize| {
            let step = rows.len().div_ceil(count.max(1)).max(1);
            rows.into_iter().step_by(step).take(count).collect::<Vec<_>>()
        };
        let mut rows = spread(first, count);
        let others = count - rows.len();
        rows.extend(spread(second, others));
        rows.sort_unstable();
        rows
    }

    /// What each of `tiles` along the other axis contributes to these rows of a gradient, [rows, D] each.
    fn contributions(&self, axis: usize, rows: &[usize], tiles: &[Range<usize>]) -> Vec<Array2<f64>> {
        let gather = |of: fn(&Problem, Range<usize>) -> Array2<f64>| {
            let rows: Vec<Array2<f64>> = rows.iter().map(|&row| of(self.problem, row..row + 1)).collect();
            concatenate(Axis(0), &rows.iter().map(|row| row.view()).collect::<Vec<_>>()).expect("rows of one length")
        };
        let tile = |tile: &Range<usize>| match axis {
            0 => self
                .dlogits(&gather(reference::hidden_rows), rows, tile.clone())
                .dot(&reference::unembedding_rows(self.problem, tile.clone())),
            _ => {
                let (hidden, tokens) = (reference::hidden_rows(self.problem, tile.clone()), tile.clone().collect::<Vec<_>>());
                let mut out = Array2::zeros((rows.len(), hidden.ncols()));
                for (place, &id) in rows.iter().enumerate() {
                    let column = self.dlogits(&hidden, &tokens, id..id + 1);
                    out.slice_mut(s![place, ..]).assign(&hidden.t().dot(&column.column(0)));
                }
                out
            }
        };
        tiles.par_iter().map(tile).collect()
    }

    /// dlogits of tokens, whose rows of Q are `hidden`, at valid vocab ids, with the derivative of scale and cap.
    fn dlogits(&self, hidden: &Array2<f64>, tokens: &[usize], ids: Range<usize>) -> Array2<f64> {
        let mut z = reference::logit_tile(self.problem, hidden, ids.clone());
        for (mut row, &n) in z.outer_iter_mut().zip(tokens) {
            let label = self.problem.labels()[n];
            let cotangent = self.cotangents.row(self.problem, n, self.lse[n]);
            let masked = matches!(label, Label::Masked);
            for (z, id) in row.iter_mut().zip(ids.clone()) {
                let at_label = label.column() == Some(id);
                let own =
                    cotangent.p * (*z - self.lse[n]).exp() + if at_label { cotangent.onehot } else { 0.0 } + cotangent.constant;
                *z = if masked { 0.0 } else { own * reference::chain(self.problem.options(), *z) };
            }
        }
        z
    }
}

/// The factors β with the least ‖error − Σ β·part‖, drawn a little to 0 where the parts do not tell them apart.
fn fit(parts: &[ArrayView2<f64>], error: &Array2<f64>) -> Option<Vec<f64>> {
    const RIDGE: f64 = 1e-6;
    let flatten = |x: ArrayView2<f64>| -> Array1<f64> { x.iter().copied().collect() };
    let (flat, error): (Vec<Array1<f64>>, Array1<f64>) =
        (parts.iter().map(|part| flatten(*part)).collect(), flatten(error.view()));
    let mut gram: Vec<Vec<f64>> = flat.iter().map(|a| flat.iter().map(|b| a.dot(b)).collect()).collect();
    let most = (0..gram.len()).map(|i| gram[i][i]).fold(0.0, f64::max);
    (0..gram.len()).for_each(|i| gram[i][i] += RIDGE * most);
    super::pattern::solve(gram, flat.iter().map(|part| part.dot(&error)).collect())
}
