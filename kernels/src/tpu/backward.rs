//! The backward: dQ and dK for cotangents of loss, lse and label logits, from the lse alone.
//!
//! Numeric contract: z as in the forward; s = dlogits in float32, its label term in it, then rounded as [`Dlogits`] says: to
//! bfloat16, to a pair of them (two products each), or not at all; products as in the forward; sums in float32 over all
//! tokens and vocab ids of a call, dK over all calls; one rounding where a gradient is bfloat16. No scatter, no gather.
//!
//! ```text
//! per token:  p = scale·(g·(1 + 2·z_loss·lse) + h)    o = scale·(u − g·(1−ε))    c = scale·g·ε/V        all [1, n]
//! s = (exp(z − lse)·p + [v = label]·o − c)·(1 − (z/cap)²)                         [v, n]; 0 where v is padding
//! dK += s·Q  over all tiles of tokens n           dQ += sᵀ·K  over all tiles of vocab ids v
//!
//! one pass:    for each v (split over the cores), for each n:  both; dK is kept for one v, dQ for all n
//! two kernels: for each n (any order), for each v: dQ;   for each v (split over the cores), for each n: dK
//! ```
//! Rows of K that are padding or overhang are 0 ahead of dQ, since s·K would bring in NaN through 0·NaN. So must be the
//! rows of Q that take no part: the program sees to that ahead of the kernel, and pads Q to whole tiles; of a token that takes no
//! part p, o, c and lse are set to 0. Where K is [D, V], a tile of it is transposed as it arrives, and one of dK as it leaves.

use super::call::{Aliased, Call};
use super::logits::{takes_part, without_smoothing};
use super::text::{At, Body, Element, Frame, Is, Product, Value, Window, shared_step};
use super::{Backward, Tile, element};
use crate::problem::{DType, Layout, LossOptions};
use crate::stablehlo::Type;
use crate::vjp::Dlogits;

/// One kernel of a backward.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel<'a> {
    pub of: &'a Backward,
    pub tile: Tile,
    /// Of this call: some or all of N.
    pub tokens: usize,
    pub gives: Gives,
}

/// Which gradients a kernel gives, and what that means for its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gives {
    /// dQ: vocab tiles in the inner loop.
    Hidden,
    /// dK, tokens in the inner loop.
    Unembedding(Unembedding),
    /// Both, tokens in the inner loop. With several cores each gives its share of dQ, in float32.
    Both(Unembedding),
}

/// How dK is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unembedding {
    /// Cores that the vocab tiles are split over.
    pub cores: usize,
    /// Added to what the last operand holds.
    pub adds: bool,
    /// What leaves the kernel.
    pub dtype: DType,
}

impl<'a> Kernel<'a> {
    fn unembedding(&self) -> Option<Unembedding> {
        match self.gives {
            Gives::Hidden => None,
            Gives::Unembedding(unembedding) | Gives::Both(unembedding) => Some(unembedding),
        }
    }

    fn gives_hidden(&self) -> bool {
        !matches!(self.gives, Gives::Unembedding(_))
    }

    /// Tiles of tokens and of vocab ids. Without dK there is nothing to do where all is padding.
    fn tiles(&self) -> [usize; 2] {
        let spec = &self.of.spec;
        let columns = if self.unembedding().is_some() { spec.shape.vocab } else { spec.valid_columns() };
        [self.tokens.div_ceil(self.tile.tokens), columns.div_ceil(self.tile.vocab)]
    }

    /// Vocab tiles of each core; the last core may have fewer.
    fn per_core(&self) -> usize {
        self.tiles()[1].div_ceil(self.unembedding().map_or(1, |unembedding| unembedding.cores))
    }

    /// Cores that have a tile.
    fn cores(&self) -> usize {
        self.tiles()[1].div_ceil(self.per_core())
    }

    /// Tokens, in whole tiles.
    pub fn padded_tokens(&self) -> usize {
        self.tiles()[0] * self.tile.tokens
    }

    /// Each core's share of dQ is summed outside.
    pub fn shares(&self) -> bool {
        self.gives_hidden() && self.cores() > 1
    }

    fn hidden_element(&self) -> Element {
        if self.shares() { Element::F32 } else { element(self.of.gradients[0]) }
    }

    /// The type in which gradient products are made.
    fn operand(&self) -> Element {
        if self.of.dlogits() == Dlogits::F32 { Element::F32 } else { Element::Bf16 }
    }

    /// Whether a tile holds rows that are no vocab ids.
    fn ragged(&self) -> bool {
        self.tiles()[1] * self.tile.vocab > self.of.spec.valid_columns()
    }

    /// Whether what K's tile holds beyond the vocab ids is replaced: in dQ, and there alone, it would meet the other rows.
    fn masks(&self) -> bool {
        self.gives_hidden() && self.ragged()
    }

    /// Whether K's tile is prepared once, for all tiles of tokens.
    fn prepares(&self) -> bool {
        self.unembedding().is_some() && (self.masks() || self.of.spec.layout == Layout::Dv)
    }

    /// The places of a tile of tokens and of a tile of vocab ids.
    fn places(&self) -> [At; 2] {
        if self.unembedding().is_none() {
            return [At::Step(0), At::Step(1)];
        }
        [At::Step(2), At::Shared { per: self.per_core(), last: self.tiles()[1] - 1 }]
    }

    pub fn frame(&self) -> Frame {
        let (spec, tile, d) = (&self.of.spec, self.tile, self.of.spec.shape.hidden);
        let [of_q, of_k] = spec.elements();
        let [n, v] = self.places();
        let [n_tiles, v_tiles] = self.tiles();
        let window = |block, element, place| Window { block, element, place, single: false };
        let per_token = |element| window([1, tile.tokens], element, [At::Start, n]);
        let of_vocab = |element| window(spec.unembedding_block(tile.vocab), element, spec.unembedding_place(v));
        // Two kernels are for where VMEM is short: what each keeps through its inner loop has one buffer there.
        let [keeps_tokens, keeps_vocab] = [self.gives == Gives::Hidden, matches!(self.gives, Gives::Unembedding(_))];
        let mut windows = vec![
            Window { single: keeps_tokens, ..window([tile.tokens, d], of_q, [n, At::Start]) },
            Window { single: keeps_vocab, ..of_vocab(of_k) },
            per_token(Element::I32),
            per_token(Element::F32),
        ];
        windows.extend(self.of.cotangents.names().map(|_| per_token(Element::F32)));
        let mut scratch = Vec::new();
        let mut results = Vec::new();
        if self.gives_hidden() {
            let (rows, place) = if keeps_tokens { (tile.tokens, n) } else { (self.padded_tokens(), At::Step(0)) };
            let element = self.hidden_element();
            results.push(Window { block: [rows, d], element, place: [place, At::Start], single: true });
            if element != Element::F32 {
                scratch.push(([rows, d], Element::F32));
            }
        }
        if let Some(unembedding) = self.unembedding() {
            if unembedding.adds {
                windows.push(Window { single: keeps_vocab, ..of_vocab(Element::F32) });
            }
            results.push(Window { single: keeps_vocab, ..of_vocab(element(unembedding.dtype)) });
            if !self.sums_in_window(unembedding) {
                scratch.push(([tile.vocab, d], Element::F32));
            }
            if self.prepares() {
                scratch.push(([tile.vocab, d], of_k));
            }
        }
        windows.extend(results);
        let grid = match self.gives {
            Gives::Hidden => vec![(n_tiles, true), (v_tiles, false)],
            _ => vec![(self.cores(), true), (self.per_core(), false), (n_tiles, false)],
        };
        Frame { grid, windows, scratch }
    }

    fn sums_in_window(&self, unembedding: Unembedding) -> bool {
        unembedding.dtype == DType::F32 && !unembedding.adds && self.of.spec.layout == Layout::Vd
    }

    pub fn call(&self) -> Call {
        let body = self.frame().body(|body, steps, windows, scratch| Pass::new(self, steps, windows, scratch).emit(body));
        let spec = &self.of.spec;
        let d = spec.shape.hidden;
        let mut results = Vec::new();
        if self.gives_hidden() {
            let rows = if self.shares() { self.cores() * self.padded_tokens() } else { self.tokens };
            results.push(Type::new(&[rows, d], name(self.hidden_element())));
        }
        let mut adds_to = None;
        if let Some(unembedding) = self.unembedding() {
            if unembedding.adds && unembedding.dtype == DType::F32 {
                adds_to = Some(Aliased { operand: 4 + self.of.cotangents.names().count(), result: results.len() });
            }
            results.push(Type::new(&spec.unembedding_block(spec.shape.vocab), name(element(unembedding.dtype))));
        }
        let products = 1 + results.len() as u64 * if self.of.dlogits() == Dlogits::Bf16x2 { 2 } else { 1 };
        let n_v = self.tokens as u64 * spec.shape.vocab as u64;
        let name = match self.gives {
            Gives::Hidden => "fused_xent_d_hidden",
            Gives::Unembedding(_) => "fused_xent_d_unembedding",
            Gives::Both(_) => "fused_xent_backward",
        };
        Call { name, body, results, adds_to, flops: 2 * products * n_v * d as u64, exps: n_v }
    }
}

fn name(element: Element) -> &'static str {
    if element == Element::Bf16 { "bf16" } else { "f32" }
}

/// A step of a kernel: what it works on.
struct Pass<'a> {
    kernel: &'a Kernel<'a>,
    steps: &'a [Value],
    q: &'a Value,
    k: &'a Value,
    labels: &'a Value,
    lse: &'a Value,
    /// Of loss, lse and label logits.
    cotangents: [Option<&'a Value>; 3],
    /// The caller's dK.
    before: Option<&'a Value>,
    d_hidden: Option<Sum<'a>>,
    d_unembedding: Option<Sum<'a>>,
    /// K's tile, prepared.
    prepared: Option<&'a Value>,
}

/// Where a gradient is summed in float32, and where it leaves, if that is another place.
#[derive(Clone, Copy)]
struct Sum<'a> {
    sum: &'a Value,
    result: Option<&'a Value>,
}

impl<'a> Pass<'a> {
    fn new(kernel: &'a Kernel<'a>, steps: &'a [Value], windows: &'a [Value], scratch: &'a [Value]) -> Self {
        let mut windows = windows.iter();
        let mut scratch = scratch.iter();
        let mut next = || windows.next().expect("a window for each operand and result");
        let [q, k, labels, lse] = std::array::from_fn(|_| next());
        let cotangents = kernel.of.cotangents.given().map(|given| given.then(&mut next));
        let before = kernel.unembedding().filter(|unembedding| unembedding.adds).map(|_| next());
        let mut sum = |result: &'a Value, in_window: bool| {
            if in_window {
                return Sum { sum: result, result: None };
            }
            Sum { sum: scratch.next().expect("scratch for each sum"), result: Some(result) }
        };
        let d_hidden = kernel.gives_hidden().then(|| sum(next(), kernel.hidden_element() == Element::F32));
        let d_unembedding = kernel.unembedding().map(|unembedding| sum(next(), kernel.sums_in_window(unembedding)));
        let prepared = kernel.prepares().then(|| scratch.next().expect("scratch for K"));
        Self { kernel, steps, q, k, labels, lse, cotangents, before, d_hidden, d_unembedding, prepared }
    }

    fn emit(&self, body: &mut Body) {
        let [n_tiles, v_tiles] = self.kernel.tiles();
        let (n, v) = match self.kernel.gives {
            Gives::Hidden => (self.steps[0].clone(), self.steps[1].clone()),
            _ => (self.steps[2].clone(), shared_step(body, self.steps, self.kernel.per_core(), None)),
        };
        let rows = matches!(self.kernel.gives, Gives::Both(_)).then(|| {
            let start = body.with_integer("arith.muli", &n, self.kernel.tile.tokens);
            body.index(&start, self.kernel.tile.tokens)
        });
        if let Some(d_hidden) = self.d_hidden {
            let first = body.compare_with(&self.steps[1], Is::Equal, 0);
            body.only_if(&first, |body| clear(body, d_hidden.sum, rows.as_ref(), self.kernel.tile.tokens));
        }
        if self.kernel.per_core() * self.kernel.cores() == v_tiles {
            self.tile(body, &n, &v, rows.as_ref(), n_tiles);
        } else {
            let exists = body.compare_with(&v, Is::Less, v_tiles);
            body.only_if(&exists, |body| self.tile(body, &n, &v, rows.as_ref(), n_tiles));
        }
        if let Some(Sum { sum, result: Some(result) }) = self.d_hidden {
            let last = body.compare_with(&self.steps[1], Is::Equal, self.kernel.per_core() - 1);
            body.only_if(&last, |body| {
                let sum = body.load(sum, rows.as_ref(), self.kernel.tile.tokens);
                let rounded = body.convert(&sum, result.ty.element);
                body.store(&rounded, result, rows.as_ref());
            });
        }
    }

    /// What a tile of tokens and one of vocab ids give each other.
    fn tile(&self, body: &mut Body, n: &Value, v: &Value, rows: Option<&Value>, n_tiles: usize) {
        let Tile { tokens, vocab } = self.kernel.tile;
        let columns_before = body.with_integer("arith.muli", v, vocab);
        let left = self.kernel.ragged().then(|| {
            let valid = body.integer(self.kernel.of.spec.valid_columns() as i64, Element::I32);
            body.binary("arith.subi", &valid, &columns_before)
        });
        let first = body.compare_with(n, Is::Equal, 0);
        if self.d_unembedding.is_some() || self.prepared.is_some() {
            body.only_if(&first, |body| {
                if let Some(d_unembedding) = self.d_unembedding {
                    clear(body, d_unembedding.sum, None, vocab);
                }
                if let Some(prepared) = self.prepared {
                    let k = self.prepare(body, left.as_ref());
                    body.store(&k, prepared, None);
                }
            });
        }
        let k = match self.prepared {
            Some(prepared) => body.load_all(prepared),
            None => self.prepare(body, left.as_ref()),
        };
        let q = body.load_all(self.q);
        let dlogits = self.dlogits(body, n, &columns_before, left.as_ref(), &k, &q);
        let parts = self.parts(body, &dlogits);
        let operand = self.kernel.operand();
        if let Some(d_unembedding) = self.d_unembedding {
            let q = body.convert(&q, operand);
            add_products(body, Product::Nn, &parts, &q, d_unembedding.sum, None, vocab);
        }
        if let Some(d_hidden) = self.d_hidden {
            let k = body.convert(&k, operand);
            add_products(body, Product::Tn, &parts, &k, d_hidden.sum, rows, tokens);
        }
        // Last, so that nothing parts the products: the compiler does not move work past a condition.
        if let Some(Sum { sum, result: Some(result) }) = self.d_unembedding {
            let last = body.compare_with(n, Is::Equal, n_tiles - 1);
            body.only_if(&last, |body| self.give_unembedding(body, sum, result));
        }
    }

    /// K's tile as [vocab ids, D], 0 from `left` rows on where that matters.
    fn prepare(&self, body: &mut Body, left: Option<&Value>) -> Value {
        let k = self.kernel.of.spec.unembedding_rows(body, self.k);
        let Some(left) = left.filter(|_| self.kernel.masks()) else { return k };
        let [rows, columns] = k.ty.dims[..] else { unreachable!("a matrix") };
        let row = body.row_numbers([rows, columns]);
        let left = body.broadcast(left, &[rows, columns]);
        let valid = body.compare(&row, Is::Less, &left);
        body.keep(&valid, &k)
    }

    /// s, [vocab ids, tokens] in float32.
    fn dlogits(&self, body: &mut Body, n: &Value, columns_before: &Value, left: Option<&Value>, k: &Value, q: &Value) -> Value {
        let Tile { tokens, vocab } = self.kernel.tile;
        let spec = &self.kernel.of.spec;
        let tile = [vocab, tokens];
        let labels = body.load_all(self.labels);
        let takes_part = self.takes_part(body, n, &labels);
        let lse = body.load_all(self.lse);
        let lse = body.keep(&takes_part, &lse);
        let Factors { p, onehot, everywhere } = self.factors(body, &lse, &takes_part);

        let (z, of_cap) = spec.logits(body, k, q);
        let row = body.row_numbers(tile);
        let mut s = match p {
            Some(p) => {
                let lse = body.broadcast(&lse, &tile);
                let x = body.binary("arith.subf", &z, &lse);
                let x = body.unary("math.exp", &x);
                let p = body.broadcast(&p, &tile);
                body.binary("arith.mulf", &x, &p)
            }
            None => body.floats(0.0, &tile, Element::F32),
        };
        if let Some(onehot) = onehot {
            let from = body.broadcast(columns_before, &[1, tokens]);
            let label = body.binary("arith.subi", &labels, &from);
            let label = body.broadcast(&label, &tile);
            let is_label = body.compare(&row, Is::Equal, &label);
            let onehot = body.broadcast(&onehot, &tile);
            let onehot = body.keep(&is_label, &onehot);
            s = body.binary("arith.addf", &s, &onehot);
        }
        if let Some(everywhere) = everywhere {
            let everywhere = body.broadcast(&everywhere, &tile);
            s = body.binary("arith.subf", &s, &everywhere);
        }
        if let Some(of_cap) = of_cap {
            let one = body.floats(1.0, &tile, Element::F32);
            let (less, more) = (body.binary("arith.subf", &one, &of_cap), body.binary("arith.addf", &one, &of_cap));
            let slope = body.binary("arith.mulf", &less, &more);
            s = body.binary("arith.mulf", &s, &slope);
        }
        if let Some(left) = left {
            let left = body.broadcast(left, &tile);
            let valid = body.compare(&row, Is::Less, &left);
            s = body.keep(&valid, &s);
        }
        s
    }

    /// Which tokens of the tile take part, [1, tokens].
    fn takes_part(&self, body: &mut Body, n: &Value, labels: &Value) -> Value {
        let tokens = self.kernel.tile.tokens;
        let labelled = takes_part(body, labels);
        if self.kernel.tokens.is_multiple_of(tokens) {
            return labelled;
        }
        let before = body.with_integer("arith.muli", n, tokens);
        let all = body.integer(self.kernel.tokens as i64, Element::I32);
        let left = body.binary("arith.subi", &all, &before);
        let left = body.broadcast(&left, &[1, tokens]);
        let column = body.column_numbers([1, tokens]);
        let exists = body.compare(&column, Is::Less, &left);
        body.binary("arith.andi", &labelled, &exists)
    }

    fn factors(&self, body: &mut Body, lse: &Value, takes_part: &Value) -> Factors {
        let LossOptions { logit_scale, z_loss, label_smoothing, .. } = self.kernel.of.spec.options;
        let [g, h, u] = self.cotangents.map(|cotangent| cotangent.map(|c| body.load_all(c)));
        let mut p = g.clone();
        if let (Some(g), true) = (&g, z_loss != 0.0) {
            let more = body.with("arith.mulf", lse, 2.0 * z_loss);
            let more = body.with("arith.addf", &more, 1.0);
            p = Some(body.binary("arith.mulf", g, &more));
        }
        if let Some(h) = h {
            p = Some(p.map_or(h.clone(), |p| body.binary("arith.addf", &p, &h)));
        }
        let mut onehot = u;
        if let Some(g) = &g {
            let g = without_smoothing(body, label_smoothing, g);
            let zero = body.floats(0.0, &g.ty.dims, Element::F32);
            let from = onehot.unwrap_or(zero);
            onehot = Some(body.binary("arith.subf", &from, &g));
        }
        let everywhere = g.filter(|_| label_smoothing > 0.0);
        let everywhere =
            everywhere.map(|g| body.with("arith.mulf", &g, label_smoothing / self.kernel.of.spec.valid_columns() as f64));
        let [p, onehot, everywhere] = [p, onehot, everywhere].map(|factor| {
            let factor = factor?;
            let factor = if logit_scale == 1.0 { factor } else { body.with("arith.mulf", &factor, logit_scale) };
            Some(body.keep(takes_part, &factor))
        });
        Factors { p, onehot, everywhere }
    }

    /// s, rounded to what the products take, as one value or as two.
    fn parts(&self, body: &mut Body, s: &Value) -> Vec<Value> {
        match self.kernel.of.dlogits() {
            Dlogits::F32 => vec![s.clone()],
            Dlogits::Bf16 => vec![body.convert(s, Element::Bf16)],
            Dlogits::Bf16x2 => {
                let high = body.convert(s, Element::Bf16);
                let of_high = body.convert(&high, Element::F32);
                let rest = body.binary("arith.subf", s, &of_high);
                vec![high, body.convert(&rest, Element::Bf16)]
            }
        }
    }

    fn give_unembedding(&self, body: &mut Body, sum: &Value, result: &Value) {
        let mut sum = body.load_all(sum);
        if self.kernel.of.spec.layout == Layout::Dv {
            sum = body.transpose(&sum);
        }
        if let Some(before) = self.before {
            let before = body.load_all(before);
            sum = body.binary("arith.addf", &before, &sum);
        }
        let rounded = body.convert(&sum, result.ty.element);
        body.store(&rounded, result, None);
    }
}

/// What multiplies P, the onehot and all of a token's row, [1, tokens] each; `None` is 0.
struct Factors {
    p: Option<Value>,
    onehot: Option<Value>,
    everywhere: Option<Value>,
}

fn clear(body: &mut Body, memory: &Value, start: Option<&Value>, rows: usize) {
    let zero = body.floats(0.0, &[rows, memory.ty.dims[1]], Element::F32);
    body.store(&zero, memory, start);
}

/// Adds the products of each of `parts` with x to some rows of `sum`.
fn add_products(body: &mut Body, kind: Product, parts: &[Value], x: &Value, sum: &Value, start: Option<&Value>, rows: usize) {
    let mut total = body.load(sum, start, rows);
    for part in parts.iter().rev() {
        let product = body.product(kind, part, x);
        total = body.binary("arith.addf", &total, &product);
    }
    body.store(&total, sum, start);
}
