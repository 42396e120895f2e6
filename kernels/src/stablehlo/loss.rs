//! The program, tile by tile; one tile of all columns makes it the naive one.

use super::text::{Body, Value};
use super::{Spec, element};
use crate::problem::{Layout, LossOptions, Shape};

pub(super) struct Emitter<'a> {
    pub spec: Spec,
    pub body: &'a mut Body,
    /// Q, K, labels, g.
    pub arguments: &'a [Value],
}

/// What is computed once for all tiles.
struct Tokens {
    /// Q, 0 where masked.
    q: Value,
    /// Which tokens take part, [N].
    valid: Value,
    labels: Value,
    /// g, 0 where masked.
    g: Value,
}

/// The logits of a tile, [N, tile], and what is known of its columns.
struct Tile {
    z: Value,
    /// Which are the labels, [N, tile].
    onehot: Value,
    /// Which belong to this tile and no other, [N, tile]; `None` if all do.
    own: Option<Value>,
    /// The first column.
    start: Value,
    /// K's rows, [tile, D], or columns, [D, tile].
    k: Value,
}

impl Emitter<'_> {
    pub fn emit(mut self, tile: usize) -> Vec<(&'static str, Value)> {
        let Shape { tokens: n, hidden: d, vocab } = self.spec.shape;
        let valid_columns = self.spec.valid_columns();
        let tokens = self.tokens();
        let tiles = valid_columns.div_ceil(tile);

        // Max, Σ exp(z − max), Σ z and z_t over the tiles so far.
        let minus_infinity = self.body.float(f64::NEG_INFINITY, &[n]);
        let zero = self.body.float(0.0, &[n]);
        let state = vec![minus_infinity, zero.clone(), zero.clone(), zero.clone()];
        let (spec, arguments) = (self.spec, self.arguments);
        let state =
            self.body.repeat(tiles, state, |body, i, state| Emitter { spec, body, arguments }.forward(&tokens, i, tile, state));
        let [max, sum, logit_sum, label_logits] = &state[..] else { unreachable!("four of them") };
        let log = self.body.unary("log", sum);
        let lse = self.body.binary("add", max, &log);
        let loss = self.loss(&lse, logit_sum, label_logits);

        let dq = self.body.float(0.0, &[n, d]);
        let dk = self.body.float(0.0, &self.unembedding_dims(valid_columns));
        let gradients = self.body.repeat(tiles, vec![dq, dk], |body, i, state| {
            Emitter { spec, body, arguments }.backward(&tokens, &lse, i, tile, state)
        });
        let [dq, dk] = &gradients[..] else { unreachable!("two of them") };
        let dk = self.body.pad(dk, &self.unembedding_dims(vocab));
        let [of_q, of_k] = self.spec.gradients.map(element);
        let (dq, dk) = (self.body.convert(dq, of_q), self.body.convert(&dk, of_k));
        let mut masked = |x: &Value| self.body.keep(&tokens.valid, x);
        vec![
            ("loss", masked(&loss)),
            ("lse", masked(&lse)),
            ("label_logits", masked(label_logits)),
            ("d_hidden", dq),
            ("d_unembedding", dk),
        ]
    }

    fn unembedding_dims(&self, vocab: usize) -> [usize; 2] {
        let d = self.spec.shape.hidden;
        if self.spec.layout == Layout::Vd { [vocab, d] } else { [d, vocab] }
    }

    fn tokens(&mut self) -> Tokens {
        let Shape { tokens: n, hidden: d, .. } = self.spec.shape;
        let [q, _, labels, g] = self.arguments else { unreachable!("four of them") };
        let zero = self.body.integer(0, &[n]);
        let valid = self.body.compare("GE", labels, &zero);
        let of_row = self.body.broadcast(&valid, &[0], &[n, d]);
        Tokens { q: self.body.keep(&of_row, q), g: self.body.keep(&valid, g), labels: labels.clone(), valid }
    }

    /// Tile number `i`. The last one starts early enough to be whole.
    fn tile(&mut self, tokens: &Tokens, i: &Value, tile: usize) -> Tile {
        let Shape { tokens: n, hidden: d, .. } = self.spec.shape;
        let valid_columns = self.spec.valid_columns();
        let width = self.body.integer(tile as i64, &[]);
        let first = self.body.binary("multiply", i, &width);
        let last = self.body.integer((valid_columns - tile) as i64, &[]);
        let start = self.body.binary("minimum", &first, &last);

        let starts = self.starts(&start);
        let sizes = self.unembedding_dims(tile);
        let k = self.body.dynamic_slice(&self.arguments[1], &starts, &sizes);
        let (q, k_for_z) = self.same_element(&tokens.q, &k);
        let z = self.body.dot(&q, &k_for_z, [1, if self.spec.layout == Layout::Vd { 1 } else { 0 }]);
        let z = if self.spec.bf16_logits { self.body.round_to_bf16(&z) } else { z };
        let LossOptions { logit_scale, logit_softcap, .. } = self.spec.options;
        let z = match logit_softcap {
            Some(cap) => {
                let x = self.body.with("multiply", &z, logit_scale / cap);
                let x = self.body.unary("tanh", &x);
                self.body.with("multiply", &x, cap)
            }
            None if logit_scale != 1.0 => self.body.with("multiply", &z, logit_scale),
            None => z,
        };
        debug_assert_eq!(z.ty.dims, [n, tile], "of D = {d}");

        let columns = self.body.iota(1, &[n, tile]);
        let from = self.body.broadcast(&start, &[], &[n, tile]);
        let columns = self.body.binary("add", &columns, &from);
        let labels = self.body.broadcast(&tokens.labels, &[0], &[n, tile]);
        let onehot = self.body.compare("EQ", &columns, &labels);
        if valid_columns.is_multiple_of(tile) {
            return Tile { z, onehot, own: None, start, k };
        }
        let first = self.body.broadcast(&first, &[], &[n, tile]);
        let own = self.body.compare("GE", &columns, &first);
        let onehot = self.body.binary("and", &onehot, &own);
        Tile { z, onehot, own: Some(own), start, k }
    }

    fn starts(&mut self, vocab: &Value) -> [Value; 2] {
        let zero = self.body.integer(0, &[]);
        if self.spec.layout == Layout::Vd { [vocab.clone(), zero] } else { [zero, vocab.clone()] }
    }

    /// Both in float32, unless both are the same narrower type.
    fn same_element(&mut self, x: &Value, y: &Value) -> (Value, Value) {
        if x.ty.element == y.ty.element {
            return (x.clone(), y.clone());
        }
        (self.body.convert(x, "f32"), self.body.convert(y, "f32"))
    }

    fn forward(mut self, tokens: &Tokens, i: &Value, tile: usize, state: &[Value]) -> Vec<Value> {
        let [max, sum, logit_sum, label_logit] = state else { unreachable!("four of them") };
        let Tile { z, onehot, own, .. } = self.tile(tokens, i, tile);
        let dims = z.ty.dims.clone();
        let seen = match &own {
            Some(own) => {
                let minus_infinity = self.body.float(f64::NEG_INFINITY, &dims);
                self.body.select(own, &z, &minus_infinity)
            }
            None => z.clone(),
        };
        let of_tile = self.body.reduce("maximum", &seen, 1, f64::NEG_INFINITY);
        let new_max = self.body.binary("maximum", max, &of_tile);
        let origin = self.body.broadcast(&new_max, &[0], &dims);
        let x = self.body.binary("subtract", &seen, &origin);
        let x = self.body.unary("exponential", &x);
        let of_tile = self.body.reduce("add", &x, 1, 0.0);
        let below = self.body.binary("subtract", max, &new_max);
        let shrink = self.body.unary("exponential", &below);
        let sum = self.body.binary("multiply", sum, &shrink);
        let sum = self.body.binary("add", &sum, &of_tile);
        let at_label = self.body.keep(&onehot, &z);
        let at_label = self.body.reduce("add", &at_label, 1, 0.0);
        let label_logit = self.body.binary("add", label_logit, &at_label);
        let logit_sum = if self.spec.options.label_smoothing > 0.0 {
            let own = own.map_or(z.clone(), |own| self.body.keep(&own, &z));
            let of_tile = self.body.reduce("add", &own, 1, 0.0);
            self.body.binary("add", logit_sum, &of_tile)
        } else {
            logit_sum.clone()
        };
        vec![new_max, sum, logit_sum, label_logit]
    }

    /// ℓ = lse − (1 − ε)·z_t − ε·mean z + z_loss·lse².
    fn loss(&mut self, lse: &Value, logit_sum: &Value, label_logits: &Value) -> Value {
        let LossOptions { z_loss, label_smoothing, .. } = self.spec.options;
        let label = self.without_smoothing(label_logits);
        let mut loss = self.body.binary("subtract", lse, &label);
        if label_smoothing > 0.0 {
            let mean = self.body.with("multiply", logit_sum, label_smoothing / self.spec.valid_columns() as f64);
            loss = self.body.binary("subtract", &loss, &mean);
        }
        if z_loss != 0.0 {
            let square = self.body.binary("multiply", lse, lse);
            let term = self.body.with("multiply", &square, z_loss);
            loss = self.body.binary("add", &loss, &term);
        }
        loss
    }

    /// x·(1 − ε).
    fn without_smoothing(&mut self, x: &Value) -> Value {
        match self.spec.options.label_smoothing {
            0.0 => x.clone(),
            smoothing => self.body.with("multiply", x, 1.0 - smoothing),
        }
    }

    fn backward(mut self, tokens: &Tokens, lse: &Value, i: &Value, tile: usize, state: &[Value]) -> Vec<Value> {
        let [dq, dk] = state else { unreachable!("two of them") };
        let Tile { z, onehot, own, start, k } = self.tile(tokens, i, tile);
        let dlogits = self.dlogits(tokens, lse, &z, &onehot);
        let dlogits = own.map_or(dlogits.clone(), |own| self.body.keep(&own, &dlogits));
        let dlogits = if self.spec.bf16_dlogits { self.body.round_to_bf16(&dlogits) } else { dlogits };
        let vd = self.spec.layout == Layout::Vd;

        let (s, k) = self.factors(&dlogits, &k);
        let of_tile = self.body.dot(&s, &k, [1, usize::from(!vd)]);
        let dq = self.body.binary("add", dq, &of_tile);

        let (s, q) = self.factors(&dlogits, &tokens.q);
        let of_tile = if vd { self.body.dot(&s, &q, [0, 0]) } else { self.body.dot(&q, &s, [0, 0]) };
        // The last tile overlaps the one before, where its own dlogits are 0.
        let starts = self.starts(&start);
        let before = self.body.dynamic_slice(dk, &starts, &of_tile.ty.dims.clone());
        let sum = self.body.binary("add", &before, &of_tile);
        vec![dq, self.body.dynamic_update_slice(dk, &sum, &starts)]
    }

    /// dlogits, already rounded if they are to be, and what they multiply, in one type that holds both exactly.
    fn factors(&mut self, dlogits: &Value, x: &Value) -> (Value, Value) {
        let both = if self.spec.bf16_dlogits && x.ty.element == "bf16" { "bf16" } else { "f32" };
        (self.body.convert(dlogits, both), self.body.convert(x, both))
    }

    /// (P·g·(1 + 2·z_loss·lse) − onehot·g·(1 − ε) − g·ε/V) · scale · (1 − (z/cap)²).
    fn dlogits(&mut self, tokens: &Tokens, lse: &Value, z: &Value, onehot: &Value) -> Value {
        let LossOptions { z_loss, label_smoothing, logit_scale, logit_softcap, .. } = self.spec.options;
        let dims = z.ty.dims.clone();
        let origin = self.body.broadcast(lse, &[0], &dims);
        let p = self.body.binary("subtract", z, &origin);
        let p = self.body.unary("exponential", &p);
        let mut factor = tokens.g.clone();
        if z_loss != 0.0 {
            let more = self.body.with("multiply", lse, 2.0 * z_loss);
            let more = self.body.with("add", &more, 1.0);
            factor = self.body.binary("multiply", &factor, &more);
        }
        let factor = self.body.broadcast(&factor, &[0], &dims);
        let mut dlogits = self.body.binary("multiply", &p, &factor);
        let label = self.without_smoothing(&tokens.g);
        let label = self.body.broadcast(&label, &[0], &dims);
        let label = self.body.keep(onehot, &label);
        dlogits = self.body.binary("subtract", &dlogits, &label);
        if label_smoothing > 0.0 {
            let everywhere = self.body.with("multiply", &tokens.g, label_smoothing / self.spec.valid_columns() as f64);
            let everywhere = self.body.broadcast(&everywhere, &[0], &dims);
            dlogits = self.body.binary("subtract", &dlogits, &everywhere);
        }
        if let Some(cap) = logit_softcap {
            let of_cap = self.body.with("multiply", z, 1.0 / cap);
            let one = self.body.float(1.0, &dims);
            let (less, more) = (self.body.binary("subtract", &one, &of_cap), self.body.binary("add", &one, &of_cap));
            let slope = self.body.binary("multiply", &less, &more);
            dlogits = self.body.binary("multiply", &dlogits, &slope);
        }
        if logit_scale != 1.0 {
            dlogits = self.body.with("multiply", &dlogits, logit_scale);
        }
        dlogits
    }
}
