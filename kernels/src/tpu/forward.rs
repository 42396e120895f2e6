//! The forward: loss, lse and label logits in one pass over K.
//!
//! Numeric contract: products of bfloat16 are exact and summed in float32 (products of float32 have the precision that the
//! device offers for it, `contract_precision<fp32>`); everything after that is float32. No gather: the label logit is the
//! logit itself, taken where the vocab id equals the label.
//!
//! ```text
//! for each tile of tokens n (any order, all cores), for each tile of vocab ids v (in order):
//!     z = K·Qᵀ                                        [v, n], MXU; then scale and cap; −largest where v is padding
//!     m' = max(m, z of every eighth row)              m, l, t, s: [8, n], one running value per sublane and lane
//!     l = l·exp(m − m') + Σ exp(z − m')               over every eighth row
//!     t = z where v = label;  s = s + z               s for label smoothing alone
//! last v: M = max m, lse = M + log Σ l·exp(m − M), z_t = Σ t, ℓ = lse − (1−ε)·z_t − ε/V·Σ s + z_loss·lse²
//! ```
//! A tile's last block of z waits for the next tile, whose first product covers the work on it.
//! So all that crosses sublanes is done once per token, and what is kept between steps is eight registers for 1024 tokens.
//! Where the last tile of vocab ids overhangs, its rows hold whatever was there: they are not looked at. A row
//! never meets another, nor a token another token: what overhangs the tokens stays in lanes that are never written.

use super::call::Call;
use super::logits::{SUBLANES, takes_part, without_smoothing};
use super::text::{At, Body, Element, Frame, Is, Value, Window};
use super::{Spec, Tile};
use crate::problem::{Layout, LossOptions, Shape};
use crate::stablehlo::Type;

/// Vocab ids whose logits are made and used at a time, while the next ones' product fills the MXU. (More is slower, by the
/// compiler's static profile for v6e at D = 1024: 120 thousand cycles with 256 become 133 with 640; 128 take 229.)
pub(super) const AT_ONCE: usize = 256;

/// As many of them as a tile has whole blocks of.
pub(super) fn at_once(tile: Tile) -> usize {
    if tile.vocab.is_multiple_of(AT_ONCE) { AT_ONCE } else { 128 }
}

/// Stands for −∞ without its NaN: exp(LOWEST − m) is 0 for every m but itself.
const LOWEST: f64 = f32::MIN as f64;

pub(super) fn frame(spec: &Spec, tile: Tile) -> Frame {
    let Shape { tokens, hidden, .. } = spec.shape;
    let [of_q, of_k] = spec.elements();
    let (n, v) = (At::Step(0), At::Step(1));
    let per_token = |element| Window { block: [1, tile.tokens], element, place: [At::Start, n], single: false };
    let [running, carried] = [SUBLANES, at_once(tile)].map(|rows| ([rows, tile.tokens], Element::F32));
    Frame {
        grid: vec![(tokens.div_ceil(tile.tokens), true), (spec.valid_columns().div_ceil(tile.vocab), false)],
        windows: vec![
            Window { block: [tile.tokens, hidden], element: of_q, place: [n, At::Start], single: false },
            Window { block: spec.unembedding_block(tile.vocab), element: of_k, place: spec.unembedding_place(v), single: false },
            per_token(Element::I32),
            per_token(Element::F32),
            per_token(Element::F32),
            per_token(Element::F32),
        ],
        scratch: [vec![running; if spec.options.label_smoothing > 0.0 { 4 } else { 3 }], vec![carried]].concat(),
    }
}

pub(super) fn call(spec: &Spec, tile: Tile) -> Call {
    let frame = frame(spec, tile);
    let body = frame.body(|body, steps, windows, scratch| {
        let (carried, running) = scratch.split_last().expect("the last is for z");
        Pass { spec, tile, windows, running, carried }.emit(body, &steps[1]);
    });
    let per_token = Type::new(&[1, spec.shape.tokens], "f32");
    let [n, d, v] = spec.sizes();
    Call { name: "fused_xent_forward", body, results: vec![per_token; 3], adds_to: None, flops: 2 * n * d * v, exps: n * v }
}

struct Pass<'a> {
    spec: &'a Spec,
    tile: Tile,
    /// Q, K, labels; loss, lse, label logits.
    windows: &'a [Value],
    /// m, l, t and, for label smoothing, s.
    running: &'a [Value],
    /// z of a tile's last rows, until the next tile's first product hides what is left to do with them.
    carried: &'a Value,
}

/// Which rows of a block are vocab ids.
enum Valid<'a> {
    /// So many of the first.
    First(usize),
    /// All, where this holds, [8, n].
    If(&'a Value),
}

impl Pass<'_> {
    fn emit(&self, body: &mut Body, v: &Value) {
        let first = body.compare_with(v, Is::Equal, 0);
        body.only_if(&first, |body| {
            for (i, memory) in self.running.iter().enumerate() {
                let start = body.floats(if i == 0 { LOWEST } else { 0.0 }, &memory.ty.dims, Element::F32);
                body.store(&start, memory, None);
            }
        });
        let last = self.tiles() - 1;
        let start = body.with_integer("arith.muli", v, self.tile.vocab);
        if last > 0 {
            let more = body.compare_with(v, Is::Less, last);
            body.only_if(&more, |body| {
                let running = self.tile(body, &start, None);
                for (value, memory) in running.iter().zip(self.running) {
                    body.store(value, memory, None);
                }
            });
        }
        let is_last = body.compare_with(v, Is::Equal, last);
        body.only_if(&is_last, |body| {
            let running = self.tile(body, &start, Some(self.spec.valid_columns() - last * self.tile.vocab));
            self.finish(body, &running);
        });
    }

    fn tiles(&self) -> usize {
        self.spec.valid_columns().div_ceil(self.tile.vocab)
    }

    /// What runs, after the tile that begins at row `start`. Of the last tile so many rows are vocab ids, and all are added; of
    /// the others the last block is left for the next step.
    fn tile(&self, body: &mut Body, start: &Value, last: Option<usize>) -> Vec<Value> {
        let (spec, at_once) = (self.spec, at_once(self.tile));
        let [q, k, ..] = self.windows else { unreachable!("six windows") };
        let group = [SUBLANES, self.tile.tokens];
        let q = body.load_all(q);
        let whole = (spec.layout == Layout::Dv).then(|| spec.unembedding_rows(body, k));
        let mut running: Vec<Value> = self.running.iter().map(|memory| body.load_all(memory)).collect();
        if self.tiles() > 1 {
            let before = body.broadcast(start, &group);
            let exists = body.compare_with(&before, Is::Greater, 0);
            let before = body.with_integer("arith.subi", start, at_once);
            let label = self.label(body, &before);
            let z = body.load_all(self.carried);
            self.add(body, &mut running, &z, &label, &Valid::If(&exists));
        }
        let rows = last.unwrap_or(self.tile.vocab);
        for first in (0..rows).step_by(at_once) {
            let k = match &whole {
                Some(whole) => body.rows(whole, first, at_once),
                None => {
                    let first = body.integer(first as i64, Element::Index);
                    body.load(k, Some(&first), at_once)
                }
            };
            let (z, _) = spec.logits(body, &k, &q);
            if last.is_none() && first + at_once == rows {
                body.store(&z, self.carried, None);
            } else {
                let start = body.with_integer("arith.addi", start, first);
                let label = self.label(body, &start);
                self.add(body, &mut running, &z, &label, &Valid::First(rows - first));
            }
        }
        running
    }

    /// The label's row in the block that begins at row `start`, less the sublane: [8, n].
    fn label(&self, body: &mut Body, start: &Value) -> Value {
        let group = [SUBLANES, self.tile.tokens];
        let labels = body.load_all(&self.windows[2]);
        let start = body.broadcast(start, &labels.ty.dims);
        let label = body.binary("arith.subi", &labels, &start);
        let label = body.broadcast(&label, &group);
        let sublane = body.row_numbers(group);
        body.binary("arith.subi", &label, &sublane)
    }

    /// Adds to `running` the logits of a block.
    fn add(&self, body: &mut Body, running: &mut [Value], z: &Value, label: &Value, valid: &Valid) {
        let rows = match *valid {
            Valid::First(rows) => rows.min(z.ty.dims[0]),
            Valid::If(_) => z.ty.dims[0],
        };
        let groups = (0..rows).step_by(SUBLANES).map(|row| {
            let z = body.rows(z, row, SUBLANES);
            let is_label = body.compare_with(label, Is::Equal, row);
            let valid = match *valid {
                Valid::If(exists) => Some(exists.clone()),
                Valid::First(rows) if rows < row + SUBLANES => {
                    let sublane = body.row_numbers([SUBLANES, self.tile.tokens]);
                    Some(body.compare_with(&sublane, Is::Less, rows - row))
                }
                Valid::First(_) => None,
            };
            (z, is_label, valid)
        });
        let groups: Vec<_> = groups.collect();
        let lowest = body.floats(LOWEST, &[SUBLANES, self.tile.tokens], Element::F32);
        let mut seen = Vec::with_capacity(groups.len());
        let mut max = running[0].clone();
        for (z, is_label, valid) in &groups {
            running[2] = body.select(is_label, z, &running[2]);
            if let Some(sum) = running.get(3).cloned() {
                let z = valid.as_ref().map_or(z.clone(), |valid| body.keep(valid, z));
                running[3] = body.binary("arith.addf", &sum, &z);
            }
            let z = valid.as_ref().map_or(z.clone(), |valid| body.select(valid, z, &lowest));
            max = body.binary("arith.maximumf", &max, &z);
            seen.push(z);
        }
        let below = body.binary("arith.subf", &running[0], &max);
        let shrink = body.unary("math.exp", &below);
        let mut sum = body.binary("arith.mulf", &running[1], &shrink);
        for z in &seen {
            let x = body.binary("arith.subf", z, &max);
            let x = body.unary("math.exp", &x);
            sum = body.binary("arith.addf", &sum, &x);
        }
        (running[0], running[1]) = (max, sum);
    }

    fn finish(&self, body: &mut Body, running: &[Value]) {
        let (spec, tile) = (self.spec, self.tile);
        let [_, _, labels, results @ ..] = self.windows else { unreachable!("six windows") };
        let LossOptions { z_loss, label_smoothing, .. } = spec.options;
        let max = body.reduce_rows("maximumf", &running[0], f64::NEG_INFINITY);
        let of_all = body.broadcast(&max, &[SUBLANES, tile.tokens]);
        let below = body.binary("arith.subf", &running[0], &of_all);
        let shrink = body.unary("math.exp", &below);
        let sum = body.binary("arith.mulf", &running[1], &shrink);
        let sum = body.reduce_rows("add", &sum, 0.0);
        let log = body.unary("math.log", &sum);
        let lse = body.binary("arith.addf", &max, &log);
        let label_logits = body.reduce_rows("add", &running[2], 0.0);

        let label = without_smoothing(body, label_smoothing, &label_logits);
        let mut loss = body.binary("arith.subf", &lse, &label);
        if let Some(sum) = running.get(3) {
            let sum = body.reduce_rows("add", sum, 0.0);
            let mean = body.with("arith.mulf", &sum, label_smoothing / spec.valid_columns() as f64);
            loss = body.binary("arith.subf", &loss, &mean);
        }
        if z_loss != 0.0 {
            let square = body.binary("arith.mulf", &lse, &lse);
            let term = body.with("arith.mulf", &square, z_loss);
            loss = body.binary("arith.addf", &loss, &term);
        }
        let labels = body.load_all(labels);
        let takes_part = takes_part(body, &labels);
        for (value, memory) in [loss, lse, label_logits].iter().zip(results) {
            let value = body.keep(&takes_part, value);
            body.store(&value, memory, None);
        }
    }
}
