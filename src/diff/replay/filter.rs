//! Tiles of dlogits that a backward skips because all in them is small.

use super::counterfactual::Filter;
use super::token::{Replay, Token};
use ndarray::{Array2, ArrayView1, Axis};

/// Which vocab tiles are skipped for each of some tokens.
pub(super) struct Skipped {
    ids: usize,
    /// [tokens, vocab tiles].
    tiles: Array2<bool>,
}

impl Skipped {
    /// `largest` holds the largest |dlogits/g| of each tile, and `row` says in which of its rows each of the tokens is.
    pub fn new(filter: Filter, largest: &Array2<f64>, rows: impl Iterator<Item = usize>) -> Self {
        let rows: Vec<usize> = rows.collect();
        Self { ids: filter.ids, tiles: largest.select(Axis(0), &rows).mapv(|largest| largest < filter.eps) }
    }

    /// Whether vocab id `v` is skipped for token number `i` of these.
    pub fn at(&self, i: usize, v: usize) -> bool {
        self.tiles[[i, v / self.ids]]
    }

    /// Takes the label's term from tokens where its tile is skipped.
    pub fn drop_labels(&self, tokens: &mut [Token]) {
        for (i, token) in tokens.iter_mut().enumerate() {
            token.label.column = token.label.column.filter(|&c| !self.at(i, c));
        }
    }
}

impl Replay<'_> {
    /// The largest |dlogits/g| in each tile of the vocab ids from `start` on, which begin with a tile, whose logits are `z`.
    pub fn largest_of_tiles(&self, filter: Filter, token: &Token, start: usize, z: ArrayView1<f64>) -> Vec<f64> {
        let (token, g) = self.seen_by(filter, token);
        let size = |v: usize, z: f64| {
            let label = if token.label.column == Some(v) { token.label.value } else { 0.0 };
            (self.dlogits(&token, v, z) + label).abs()
        };
        let tile = |(i, z): (usize, ArrayView1<f64>)| {
            let sizes = z.iter().enumerate().map(|(j, &z)| size(start + i * filter.ids + j, z));
            if g == 0.0 { 0.0 } else { sizes.fold(0.0, f64::max) / g }
        };
        z.axis_chunks_iter(Axis(0), filter.ids).enumerate().map(tile).collect()
    }
}

/// The largest of each tile of so many tokens, from those of each token.
pub(super) fn by_token_tile(filter: Filter, of_tokens: Vec<Vec<f64>>) -> Array2<f64> {
    let tiles = of_tokens.first().map_or(0, Vec::len);
    let mut out = Array2::zeros((of_tokens.len().div_ceil(filter.tokens), tiles));
    for (n, of_token) in of_tokens.into_iter().enumerate() {
        let mut row = out.row_mut(n / filter.tokens);
        row.iter_mut().zip(of_token).for_each(|(largest, of_token): (&mut f64, f64)| *largest = largest.max(of_token));
    }
    out
}
