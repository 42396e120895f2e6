//! The two sums of the backward: dQ over vocab ids, dK over tokens, in as high or as low a precision as a counterfactual says.

use super::counterfactual::{Bf16Sum, LabelSum, ProcessesAdded, ScatterOnto, bf16};
use super::token::{Replay, Token, TokenLabel};
use fused_xent_kernels::product::general_mat_mul;
use fused_xent_kernels::reference::{self, Parts};
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, CowArray, Ix2, s};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Vocab ids of one piece of work.
const IDS: usize = 2048;

/// Adds a chunk's sum to a running sum in bf16.
fn add_rounded(sum: Bf16Sum, mut total: ArrayViewMut2<f64>, part: ArrayView2<f64>) {
    total.zip_mut_with(&part, |total, &part| *total = bf16(*total + if sum.parts_rounded { bf16(part) } else { part }));
}

impl Replay<'_> {
    /// dQ of some tokens, whose dlogits of a range of vocab ids are `dlogits`, [tokens, ids], the label's term apart.
    pub fn d_hidden<'z>(&self, tokens: &[Token], dlogits: impl Fn(Range<usize>) -> CowArray<'z, f64, Ix2> + Sync) -> Parts {
        let how = self.how;
        let Range { start, end } = self.dq_vocab();
        let mut lse = Array2::zeros((tokens.len(), self.problem.shape().hidden));
        let width = how.dq_sum.map_or(IDS, |sum| sum.chunks.width(self.problem.shape().vocab));
        let tiles: Vec<Range<usize>> = (start..end).step_by(width).map(|v| v..(v + width).min(end)).collect();
        for some in tiles.chunks(4 * rayon::current_num_threads()) {
            let product = |tile: &Range<usize>| {
                let k = reference::unembedding_rows(self.problem, tile.clone());
                let mut part = Array2::zeros((tokens.len(), k.ncols()));
                general_mat_mul(1.0, &dlogits(tile.clone()), &k, 0.0, &mut part);
                if how.dq_sum.is_some() {
                    for (mut row, label) in part.outer_iter_mut().zip(tokens.iter().map(|t| t.label)) {
                        if let Some(c) = label.column.filter(|c| tile.contains(c)) {
                            row.scaled_add(label.value * how.label_counts[0], &k.row(c - tile.start));
                        }
                    }
                }
                part
            };
            let parts: Vec<Array2<f64>> = some.par_iter().map(product).collect();
            for part in &parts {
                match how.dq_sum {
                    None => lse += part,
                    Some(sum) => add_rounded(sum, lse.view_mut(), part.view()),
                }
            }
        }
        self.with_labels(tokens, lse)
    }

    /// The vocab ids that dQ takes in.
    fn dq_vocab(&self) -> Range<usize> {
        let all = self.problem.shape().vocab;
        self.how.dq_shard.map_or(0..all, |(split, shard)| split.range(shard, all))
    }

    /// Σ_v P·slope·K of tokens whose logits are `z`, [tokens, V].
    pub fn lse_part_for_one(&self, z: &Array2<f64>, lse: &[f64]) -> Array2<f64> {
        let tokens: Vec<Token> = lse.iter().map(|&lse| self.token_of_one(lse)).collect();
        let dlogits = |ids: Range<usize>| {
            let dlogits = |(i, v)| self.dlogits(&tokens[i], ids.start + v, z[[i, ids.start + v]]);
            Array2::from_shape_fn((tokens.len(), ids.len()), dlogits).into()
        };
        self.d_hidden(&tokens, dlogits).lse
    }

    /// dQ of some tokens, given its lse part but for constant factors.
    pub fn with_labels(&self, tokens: &[Token], lse: Array2<f64>) -> Parts {
        let how = self.how;
        let Range { start, end } = self.dq_vocab();
        let mut out = Parts { label: Array2::zeros(lse.dim()), lse };
        if how.dq_sum.is_none() {
            for (mut row, label) in out.label.outer_iter_mut().zip(tokens.iter().map(|t| t.label)) {
                if let Some(c) = label.column.filter(|c| (start..end).contains(c)) {
                    let k = reference::unembedding_rows(self.problem, c..c + 1);
                    row.scaled_add(label.value * how.label_counts[0], &k.row(0));
                }
            }
        }
        for part in [&mut out.lse, &mut out.label] {
            for (mut row, token) in part.outer_iter_mut().zip(tokens) {
                row *= how.dq_factor * if how.dq_without_g && token.g != 0.0 { 1.0 / token.g } else { 1.0 };
            }
        }
        out
    }
}

/// dK of some vocab ids, while tokens come in, in order.
pub(super) struct UnembeddingSum<'a> {
    replay: &'a Replay<'a>,
    /// Sorted; `None` is all.
    ids: Option<&'a [usize]>,
    parts: Parts,
    /// The chunk of tokens that is being summed, if the sum over chunks is kept in bf16.
    chunk: Option<Array2<f64>>,
    /// The labels of the tokens since `first`, with which the process whose tokens these are begins.
    labels: Vec<TokenLabel>,
    first: usize,
    /// The sum over the processes before it.
    of_processes: Option<Parts>,
}

impl<'a> UnembeddingSum<'a> {
    pub fn new(replay: &'a Replay<'a>, ids: Option<&'a [usize]>) -> Self {
        let shape = replay.problem.shape();
        let zeros = || Array2::zeros((ids.map_or(shape.vocab, <[usize]>::len), shape.hidden));
        let chunk = replay.how.dk_sum.map(|_| zeros());
        Self { replay, ids, parts: Parts { lse: zeros(), label: zeros() }, chunk, labels: vec![], first: 0, of_processes: None }
    }

    /// Adds the tokens `rows`, which come after those before, with dlogits [ids, rows], the label's term apart.
    pub fn add(&mut self, rows: Range<usize>, tokens: &[Token], dlogits: ArrayView2<f64>) {
        let all = self.replay.problem.shape().tokens;
        let ends: Vec<usize> = self.replay.how.dk_processes.map_or(vec![], |sum| sum.ends(all).collect());
        let mut start = rows.start;
        while start < rows.end {
            let end = ends.iter().copied().find(|&end| end > start).unwrap_or(all);
            let some = start..end.min(rows.end);
            let places = some.start - rows.start..some.end - rows.start;
            self.add_of_process(some.clone(), end, &tokens[places.clone()], dlogits.slice(s![.., places]));
            if some.end == end && end < all {
                let parts = self.finish_process();
                self.add_process(parts);
                self.first = end;
            }
            start = some.end;
        }
    }

    /// Takes the parts of a process whose tokens are all there, and begins anew.
    fn finish_process(&mut self) -> Parts {
        let fresh = Self::new(self.replay, self.ids);
        let done = std::mem::replace(self, fresh);
        self.of_processes = done.of_processes.clone();
        done.finished()
    }

    fn add_process(&mut self, mut parts: Parts) {
        let narrow = self.processes_added() == ProcessesAdded::Bf16;
        if narrow {
            parts.lse = parts.sum().mapv_into(bf16);
            parts.label.fill(0.0);
        }
        self.of_processes = Some(match self.of_processes.take() {
            None => parts,
            Some(sum) => Parts { lse: &sum.lse + &parts.lse, label: &sum.label + &parts.label },
        });
        if let Some(sum) = self.of_processes.as_mut().filter(|_| narrow) {
            sum.lse.mapv_inplace(bf16);
        }
    }

    /// `end` is where the process's tokens end.
    fn add_of_process(&mut self, rows: Range<usize>, end: usize, tokens: &[Token], dlogits: ArrayView2<f64>) {
        let how = self.replay.how;
        let label = |token: &Token| {
            let column = token.label.column.and_then(|c| self.ids.map_or(Some(c), |ids| ids.binary_search(&c).ok()));
            let g = if how.dk_without_g && token.g != 0.0 { token.g } else { 1.0 };
            TokenLabel { column, value: token.label.value * how.label_counts[1] / g }
        };
        let labels: Vec<TokenLabel> = tokens.iter().map(label).collect();
        let q = reference::hidden_rows(self.replay.problem, rows.clone());
        let (left, right) = self.operands(&rows, tokens, &q, dlogits);
        let (pieces, width) = (self.cuts(&rows), self.chunk_width());
        let first = self.first;
        let chunks = match &mut self.chunk {
            Some(chunk) => chunk.axis_chunks_iter_mut(Axis(0), IDS).map(Some).collect(),
            None => vec![],
        };
        let chunks = chunks.into_iter().chain(std::iter::repeat_with(|| None));
        let sums = self.parts.lse.axis_chunks_iter_mut(Axis(0), IDS).zip(chunks);
        let sums: Vec<_> = sums.zip(left.axis_chunks_iter(Axis(0), IDS)).enumerate().collect();
        sums.into_par_iter().for_each(|(i, ((mut sum, chunk), left))| {
            let Some(mut chunk) = chunk else {
                pieces.iter().for_each(|piece| multiply_add(&left, &right, piece, &rows, &mut sum));
                return;
            };
            let kept = how.dk_sum.expect("there is a chunk");
            for piece in &pieces {
                multiply_add(&left, &right, piece, &rows, &mut chunk);
                for n in piece.clone() {
                    let label = labels[n - rows.start];
                    if let Some(place) = label.column.filter(|place| place / IDS == i) {
                        add_label(how.label_sum, chunk.row_mut(place % IDS), &(&q.row(n - rows.start) * label.value));
                    }
                }
                if (piece.end - first).is_multiple_of(width) || piece.end == end {
                    add_rounded(kept, sum.view_mut(), chunk.view());
                    chunk.fill(0.0);
                }
            }
        });
        if self.chunk.is_none() {
            for piece in pieces {
                for n in piece {
                    let label = labels[n - rows.start];
                    if let Some(place) = label.column {
                        add_label(how.label_sum, self.parts.label.row_mut(place), &(&q.row(n - rows.start) * label.value));
                    }
                }
            }
        }
        self.labels.extend(labels);
    }

    /// Both operands of the product over tokens: dlogits [ids, rows] and rows of Q, or of g·Q.
    fn operands<'z>(
        &self,
        rows: &Range<usize>,
        tokens: &[Token],
        q: &'z Array2<f64>,
        dlogits: ArrayView2<'z, f64>,
    ) -> (CowArray<'z, f64, Ix2>, Cow<'z, Array2<f64>>) {
        let how = self.replay.how;
        if !how.gq_bf16 && !how.dk_without_g {
            return (dlogits.into(), Cow::Borrowed(q));
        }
        let (mut dlogits, mut q) = (dlogits.to_owned(), q.clone());
        for (i, token) in (0..rows.len()).zip(tokens).filter(|(_, token)| token.g != 0.0) {
            let mut column = dlogits.column_mut(i);
            column /= token.g;
            if !how.dk_without_g {
                q.row_mut(i).mapv_inplace(|q| bf16(token.g * q));
            }
        }
        (dlogits.into(), Cow::Owned(q))
    }

    /// The tokens of `rows` that dK takes in, cut where a chunk ends.
    fn cuts(&self, rows: &Range<usize>) -> Vec<Range<usize>> {
        let how = self.replay.how;
        let dk_tokens = self.dk_tokens();
        let used = rows.start.max(dk_tokens.start)..rows.end.min(dk_tokens.end);
        let first = self.first;
        let mut cuts = vec![rows.start, rows.end, used.start.min(rows.end), used.end.max(rows.start)];
        let width = how.dk_sum.map(|_| self.chunk_width());
        cuts.extend(width.into_iter().flat_map(|width| rows.clone().filter(move |n| (n - first).is_multiple_of(width))));
        cuts.sort_unstable();
        cuts.dedup();
        let pieces = cuts.windows(2).map(|w| w[0]..w[1]);
        pieces.map(|piece| if used.contains(&piece.start) { piece } else { piece.end..piece.end }).collect()
    }

    /// The tokens that dK takes in.
    fn dk_tokens(&self) -> Range<usize> {
        let all = self.replay.problem.shape().tokens;
        self.replay.how.dk_shard.map_or(0..all, |(split, shard)| split.range(shard, all))
    }

    /// Tokens of a chunk, where the sum over chunks is kept in bf16: of a process's, where each sums its own.
    fn chunk_width(&self) -> usize {
        let how = self.replay.how;
        let own = self.replay.problem.shape().tokens.div_ceil(how.dk_processes.map_or(1, |sum| sum.processes));
        how.dk_sum.map_or(1, |sum| sum.chunks.width(own))
    }

    /// dK after the last token.
    pub fn finish(mut self) -> Parts {
        if self.of_processes.is_none() {
            return self.finished();
        }
        let parts = self.finish_process();
        self.add_process(parts);
        let mut sum = self.of_processes.take().expect("a process was added");
        if self.processes_added() == ProcessesAdded::F32ThenBf16 {
            if matches!(self.replay.how.label_sum, LabelSum::Bf16 { onto: ScatterOnto::Zeros, .. }) {
                sum.label.mapv_inplace(bf16);
            } else {
                sum = Parts { lse: sum.sum().mapv_into(bf16), label: Array2::zeros(sum.label.dim()) };
            }
        }
        sum
    }

    fn processes_added(&self) -> ProcessesAdded {
        self.replay.how.dk_processes.map_or(ProcessesAdded::F32, |sum| sum.added)
    }

    /// The parts of one process.
    fn finished(mut self) -> Parts {
        let how = self.replay.how;
        let scatter = if let LabelSum::Bf16 { onto, .. } = how.label_sum { Some(onto) } else { None };
        if how.dk_parts_bf16 || matches!(scatter, Some(ScatterOnto::ZerosThenBf16 | ScatterOnto::LsePart)) {
            self.parts.lse.mapv_inplace(bf16);
        }
        if how.dk_parts_bf16 {
            self.parts.label.mapv_inplace(bf16);
        }
        if scatter == Some(ScatterOnto::LsePart) {
            self.scatter_onto_lse_part();
        }
        self.parts.lse *= how.dk_factor;
        self.parts.label *= how.dk_factor;
        self.parts
    }

    fn scatter_onto_lse_part(&mut self) {
        let how = self.replay.how;
        let dk_tokens = self.dk_tokens();
        let mut sum = self.parts.lse.clone();
        for (n, label) in (self.first..).zip(&self.labels).filter(|(n, _)| dk_tokens.contains(n)) {
            if let Some(place) = label.column {
                let q = reference::hidden_rows(self.replay.problem, n..n + 1);
                add_label(how.label_sum, sum.row_mut(place), &(&q.row(0) * label.value));
            }
        }
        self.parts.label = sum - &self.parts.lse;
    }
}

/// out += left[.., piece]·right[piece, ..], whose tokens are those of `rows`.
fn multiply_add(
    left: &ArrayView2<f64>,
    right: &Array2<f64>,
    piece: &Range<usize>,
    rows: &Range<usize>,
    out: &mut ArrayViewMut2<f64>,
) {
    if piece.is_empty() {
        return;
    }
    let piece = piece.start - rows.start..piece.end - rows.start;
    general_mat_mul(1.0, &left.slice(s![.., piece.clone()]), &right.slice(s![piece, ..]), 1.0, out);
}

fn add_label(label_sum: LabelSum, mut row: ndarray::ArrayViewMut1<f64>, contribution: &Array1<f64>) {
    match label_sum {
        LabelSum::Exact => row += contribution,
        LabelSum::EachRounded => row += &contribution.mapv(bf16),
        LabelSum::Bf16 { hits_rounded, .. } => {
            row.zip_mut_with(contribution, |sum, &x| *sum = bf16(*sum + if hits_rounded { bf16(x) } else { x }));
        }
    }
}
