//! How an error lies over a tensor: everywhere, as a factor, in some rows, in tiles, in one process's share.
//!
//! What counts in a row is its squared error over its floor, so that rows of large gradients do not hide the others. The rows
//! that hold nearly all of that are matched with one shape after the other, the most telling first.

use super::compare::{Context, RATIO_LIMIT, Rows};
use super::tiling::{self, Fold};
use super::truth::RowsAre;
use crate::report::model::{BadInput, MicrobatchReport, Pattern, TensorReport, Verdict};
use fused_xent_kernels::floor::Tolerance;
use fused_xent_kernels::problem::{Floats, Layout, Problem};
use ndarray::{Array2, ArrayView2, Axis};
use std::collections::BTreeSet;

/// A share of the squared error that counts as all of it.
const NEARLY_ALL: f64 = 0.98;
/// Where the squared error over the floor ends to matter for the shape of the second look: a factor of ten.
const CAP: f64 = 100.0;
/// Row ranges that a report lists at most.
const MAX_RANGES: usize = 16;
/// Columns from which a factor of their row says something.
const TELLING_COLUMNS: usize = 4;

/// The pattern of a tensor that diverges and is finite.
pub(super) fn pattern(context: &Context, rows: &Rows, candidate: ArrayView2<f64>, reference: ArrayView2<f64>) -> Pattern {
    let profile = Profile::new(context, rows, reference.ncols());
    profile
        .factor()
        .or_else(|| profile.silent())
        .or_else(|| profile.shape(&profile.weight))
        .or_else(|| profile.shape(&profile.weight.iter().map(|w| w.min(CAP)).collect::<Vec<_>>()))
        .or_else(|| profile.row_factors())
        .or_else(|| profile.few_rows())
        .or_else(|| profile.growth())
        .or_else(|| columns(rows, candidate, reference))
        .unwrap_or_else(|| Pattern { share: 1.0, ..kind("uniform") })
}

/// The pattern of a tensor with elements that are not finite, in the candidate or in the reference.
pub(super) fn nonfinite(context: &Context, candidate: ArrayView2<f64>, reference: ArrayView2<f64>) -> Pattern {
    let bad = |(c, r): (&f64, &f64)| !(c.is_finite() && r.is_finite());
    let rows: Vec<usize> =
        (0..candidate.nrows()).filter(|&row| candidate.row(row).iter().zip(reference.row(row)).any(bad)).collect();
    let first = rows.first().map(|&row| {
        let column = candidate.row(row).iter().zip(reference.row(row)).position(bad);
        [context.row(row), column.expect("the row has one")]
    });
    Pattern { share: 1.0, rows: shown(context, &rows), first, origin: Some("good_in_bad_out"), ..kind("nonfinite") }
}

/// Tells "bad in" from "good in, bad out": names the first element of the inputs of `problem` that is not finite.
pub(super) fn blame_input<'a>(tensor: &mut TensorReport, problems: impl Iterator<Item = &'a Problem<'a>>) {
    let Some(pattern) = tensor.pattern.as_mut().filter(|_| tensor.nonfinite > 0) else { return };
    if let Some(input) = problems.filter_map(bad_input).next() {
        tensor.reason = Some(format!("{} elements are not finite, and an input is not", tensor.nonfinite));
        pattern.origin = Some("bad_in");
        pattern.input = Some(input);
    }
}

fn bad_input(problem: &Problem) -> Option<BadInput> {
    let (shape, layout) = (problem.shape(), problem.layout());
    let find = |tensor, floats: Floats, width: usize, transposed: bool| {
        let place = (0..floats.len()).find(|&i| !floats.get(i).is_finite())?;
        let [row, column] = [place / width, place % width];
        let index = if transposed { [column, row] } else { [row, column] };
        Some(BadInput { tensor, index, value: floats.get(place).to_string() })
    };
    let columns = if layout == Layout::Dv { shape.vocab } else { shape.hidden };
    find("hidden", problem.hidden(), shape.hidden, false)
        .or_else(|| find("unembedding", problem.unembedding(), columns, layout == Layout::Dv))
}

/// Where the gradients of a stage carry one factor within each microbatch but not the same in all: a factor per microbatch.
pub(super) fn over_microbatches(microbatches: &mut [MicrobatchReport]) {
    let stages = microbatches.iter().map(|m| m.tensors.len()).min().filter(|_| microbatches.len() > 1).unwrap_or(0);
    for stage in 0..stages {
        let tensors: Vec<&TensorReport> = microbatches.iter().map(|m| &m.tensors[stage]).collect();
        let factor = |t: &TensorReport| t.pattern.as_ref().map_or(t.verdict == Verdict::Agree, |p| p.kind == "scale");
        let (Some(alphas), true) =
            (tensors.iter().map(|t| t.scale).collect::<Option<Vec<f64>>>(), tensors.iter().all(|t| factor(t)))
        else {
            continue;
        };
        let (low, high) = extent(alphas.iter().copied());
        let noise = tensors.iter().map(|t| t.noise_floor.unwrap_or(0.0)).fold(0.0, f64::max);
        if tensors.iter().all(|t| t.verdict == Verdict::Agree) || high - low <= noise * high.abs().max(low.abs()) {
            continue;
        }
        for pattern in microbatches.iter_mut().filter_map(|m| m.tensors[stage].pattern.as_mut()) {
            pattern.kind = "microbatch_scale".into();
            pattern.per_microbatch.clone_from(&alphas);
        }
    }
}

/// Rows of a tensor of `of` rows that are enough to fit a few factors.
pub(super) fn some_rows(of: usize) -> Vec<usize> {
    const ENOUGH: usize = 2048;
    (0..of).step_by(of.div_ceil(ENOUGH).max(1)).collect()
}

/// What is accumulated over the step as a sum of the microbatches' gradients, each with a factor of its own: these factors, if
/// they leave no more than the floor. `parts` are the microbatches' own, in these `rows`.
pub(super) fn factors_of_microbatches(
    tensor: &mut TensorReport,
    tolerance: &Tolerance,
    candidate: ArrayView2<f64>,
    rows: &[usize],
    parts: &[Array2<f64>],
) {
    const MOST: usize = 64;
    let Some(pattern) = tensor.pattern.as_mut() else { return };
    if tensor.nonfinite > 0 || !(2..=MOST).contains(&parts.len()) || pattern.kind == "scale" {
        return;
    }
    let inner = |a: ArrayView2<f64>, b: ArrayView2<f64>| a.outer_iter().zip(b.outer_iter()).map(|(a, b)| a.dot(&b)).sum::<f64>();
    let gram: Vec<Vec<f64>> = parts.iter().map(|a| parts.iter().map(|b| inner(a.view(), b.view())).collect()).collect();
    let mut rest = candidate.select(Axis(0), rows);
    let products = parts.iter().map(|part| inner(part.view(), rest.view())).collect();
    let Some(alphas) = solve(gram, products) else { return };
    let mut deviation = rest.clone();
    for (part, alpha) in parts.iter().zip(&alphas) {
        rest.scaled_add(-alpha, part);
        deviation -= part;
    }
    let (left, all) = (inner(rest.view(), rest.view()), inner(deviation.view(), deviation.view()));
    let floor: f64 = rows.iter().map(|&row| tolerance.l2(row..row + 1).powi(2)).sum();
    let grown = alphas.iter().fold(1.0, |most: f64, a| most.max(a.abs()));
    let (low, high) = extent(alphas.iter().copied());
    if left <= (RATIO_LIMIT * grown).powi(2) * floor && high - low > 1e-3 {
        *pattern = Pattern { share: 1.0 - left / all, per_microbatch: alphas, ..kind("microbatch_scale") };
    }
}

/// Gaussian elimination of a symmetric positive matrix; `None` if it is (nearly) singular.
pub(super) fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Option<Vec<f64>> {
    let n = b.len();
    let diagonal: Vec<f64> = (0..n).map(|i| a[i][i]).collect();
    for i in 0..n {
        if a[i][i] <= 1e-9 * diagonal[i] || diagonal[i] == 0.0 {
            return None;
        }
        let (above, below) = a.split_at_mut(i + 1);
        for (row, value) in below.iter_mut().zip(i + 1..n) {
            let factor = row[i] / above[i][i];
            row[i..].iter_mut().zip(&above[i][i..]).for_each(|(x, pivot)| *x -= factor * pivot);
            b[value] -= factor * b[i];
        }
    }
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|column| a[i][column] * b[column]).sum();
        b[i] = (b[i] - known) / a[i][i];
    }
    Some(b)
}

fn kind(kind: &str) -> Pattern {
    Pattern { kind: kind.into(), ..Pattern::default() }
}

fn extent(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
}

/// The error row by row, against the floor.
struct Profile<'a> {
    context: &'a Context<'a>,
    rows: &'a Rows,
    columns: usize,
    /// Squared floor.
    floor: Vec<f64>,
    /// Squared error above the floor; 0 in rows at the floor.
    excess: Vec<f64>,
    /// Squared error over the squared floor; 0 in rows at the floor.
    weight: Vec<f64>,
    /// Rows in which an error could show.
    live: Vec<usize>,
}

impl<'a> Profile<'a> {
    fn new(context: &'a Context<'a>, rows: &'a Rows, columns: usize) -> Self {
        let count = rows.deviation.len();
        let floor: Vec<f64> = (0..count).map(|row| context.tolerance.l2(row..row + 1).powi(2)).collect();
        let mean = floor.iter().sum::<f64>() / count.max(1) as f64;
        // A row that is 0 by right has no floor of its own.
        let own = |row: usize| if rows.reference[row] > 0.0 { floor[row] } else { mean.max(f64::MIN_POSITIVE) };
        let bad = |row: usize| rows.deviation[row] > RATIO_LIMIT * RATIO_LIMIT * own(row);
        let excess = (0..count).map(|row| if bad(row) { rows.deviation[row] - floor[row] } else { 0.0 }).collect();
        let weight = (0..count).map(|row| if bad(row) { rows.deviation[row] / own(row) } else { 0.0 }).collect();
        let live = (0..count).filter(|&row| rows.reference[row] > 0.0 || rows.deviation[row] > 0.0).collect();
        Self { context, rows, columns, floor, excess, weight, live }
    }

    fn bad(&self, row: usize) -> bool {
        self.weight[row] > 0.0
    }

    fn bad_rows(&self, of: impl Fn(usize) -> bool) -> Vec<usize> {
        self.live.iter().copied().filter(|&row| self.bad(row) && of(row)).collect()
    }

    /// The share of the squared error above the floor that these rows hold.
    fn share(&self, rows: &[usize]) -> f64 {
        let total: f64 = self.excess.iter().sum();
        if total == 0.0 { 0.0 } else { rows.iter().map(|&row| self.excess[row]).sum::<f64>() / total }
    }

    fn in_rows(&self, name: &str, rows: &[usize]) -> Pattern {
        let mut pattern = Pattern { share: self.share(rows), rows: shown(self.context, rows), ..kind(name) };
        (pattern.alpha, pattern.alpha_range) = self.factors(rows);
        pattern
    }

    /// One factor on the whole tensor.
    fn factor(&self) -> Option<Pattern> {
        let all: Vec<usize> = (0..self.floor.len()).collect();
        let alpha = self.common_factor(&all)?;
        let share = 1.0 - self.rows.residual(alpha).sum() / self.rows.deviation.sum();
        Some(Pattern { share, alpha: Some(alpha), ..kind("scale") })
    }

    /// The factor on these rows, if it leaves (nearly) nothing above the floor.
    fn common_factor(&self, rows: &[usize]) -> Option<f64> {
        let sum = |of: &ndarray::Array1<f64>| rows.iter().map(|&row| of[row]).sum::<f64>();
        let (norm, total) = (sum(&self.rows.reference), sum(&self.rows.deviation));
        let alpha = Some(sum(&self.rows.product) / norm).filter(|alpha| alpha.is_finite())?;
        let left = sum(&self.rows.residual(alpha));
        let floor: f64 = rows.iter().map(|&row| self.floor[row]).sum();
        let at_floor = left <= (RATIO_LIMIT * alpha.abs().max(1.0)).powi(2) * floor;
        let telling = rows.len() * self.columns >= TELLING_COLUMNS;
        (telling && (left <= (1.0 - NEARLY_ALL) * total || at_floor && left < 0.5 * total)).then_some(alpha)
    }

    /// A factor common to these rows, or the range of factors if each has its own.
    fn factors(&self, rows: &[usize]) -> (Option<f64>, Option<[f64; 2]>) {
        if let Some(alpha) = self.common_factor(rows) {
            return (Some(alpha), None);
        }
        if self.columns < TELLING_COLUMNS {
            return (None, None);
        }
        let of = |row: usize| {
            let reference = self.rows.reference[row];
            if reference > 0.0 { self.rows.product[row] / reference } else { 1.0 }
        };
        let fits = |&&row: &&usize| {
            let alpha = of(row);
            let left = self.rows.candidate[row] - alpha * self.rows.product[row];
            left <= (1.0 - NEARLY_ALL) * self.rows.deviation[row]
                || left <= (RATIO_LIMIT * alpha.abs().max(1.0)).powi(2) * self.floor[row]
        };
        let fitting = rows.iter().filter(fits).count();
        (None, (fitting * 10 >= rows.len() * 9).then(|| extent(rows.iter().map(|&row| of(row))).into()))
    }

    /// Rows in which the candidate has nothing.
    fn silent(&self) -> Option<Pattern> {
        let zero: Vec<usize> = (0..self.floor.len()).filter(|&row| self.rows.silent(row)).collect();
        if self.share(&zero) <= 0.5 {
            return None;
        }
        let tail = self.rows.zero_tail(self.context);
        let mut pattern = self.shape_of(&zero).unwrap_or_default();
        pattern.kind = "zero_rows".into();
        pattern.first_bad = tail.map(|[from, _]| from);
        Some(Pattern { share: self.share(&zero), rows: shown(self.context, &zero), ..pattern })
    }

    /// The shape of the rows that hold nearly all of `weight`.
    fn shape(&self, weight: &[f64]) -> Option<Pattern> {
        let held = rows_that_hold(weight);
        let few = !held.is_empty() && 4 * held.len() <= 3 * self.live.len();
        few.then(|| self.shape_of(&held)).flatten().filter(|pattern| pattern.share > 0.5)
    }

    fn shape_of(&self, held: &[usize]) -> Option<Pattern> {
        self.masked(held)
            .or_else(|| self.process(held))
            .or_else(|| self.label_rows(held))
            .or_else(|| self.range(held))
            .or_else(|| self.tiles(held))
            .or_else(|| self.label_tiles(held))
    }

    /// Whether a row is as bad as these, within a factor of ten: where all rows are above the floor, a shape shows by its size.
    fn as_bad_as(&self, held: &[usize]) -> impl Fn(usize) -> bool {
        let mut weights: Vec<f64> = held.iter().map(|&row| self.weight[row]).collect();
        let middle = weights.len() / 2;
        let median = *weights.select_nth_unstable_by(middle, f64::total_cmp).1;
        move |row| self.bad(row) && self.weight[row] * CAP >= median
    }

    /// Rows of masked tokens.
    fn masked(&self, held: &[usize]) -> Option<Pattern> {
        let context = self.context;
        let masked = |row: &usize| context.labels.get(context.row(*row)).is_some_and(Option::is_none);
        let all = context.stage.rows_are() == RowsAre::Tokens && held.iter().all(masked);
        all.then(|| self.in_rows("masked_rows", &self.bad_rows(|row| masked(&row))))
    }

    /// What one of several processes holds, from its first row to its last.
    fn process(&self, held: &[usize]) -> Option<Pattern> {
        let context = self.context;
        let mut owned: Vec<(Vec<usize>, usize)> = Vec::new();
        for &row in &self.live {
            let owner = context.owner(row)?;
            match owned.iter_mut().find(|(_, process)| *process == owner) {
                Some((rows, _)) => rows.push(row),
                None => owned.push((vec![row], owner)),
            }
        }
        if owned.len() < 2 {
            return None;
        }
        let first = context.owner(held[0])?;
        let (rows, process) = owned.into_iter().find(|(_, process)| *process == first)?;
        let bad = self.as_bad_as(held);
        let at_edge = rows.len().div_ceil(100);
        let whole = rows[..at_edge].iter().any(|&row| bad(row)) && rows[rows.len() - at_edge..].iter().any(|&row| bad(row));
        let inside = rows.iter().filter(|&&row| bad(row)).count();
        let all = self.live.iter().filter(|&&row| bad(row)).count();
        if !(whole && inside * 2 >= rows.len() && (all - inside) * 100 <= inside) {
            return None;
        }
        Some(Pattern { process: Some(process), ..self.in_rows("process", &rows) })
    }

    /// Rows of vocab ids that are labels, with most of the hits.
    fn label_rows(&self, held: &[usize]) -> Option<Pattern> {
        if self.context.stage.rows_are() != RowsAre::VocabIds {
            return None;
        }
        let hits = self.context.hits();
        let of = |row: usize| hits.get(&self.context.row(row)).copied().unwrap_or(0);
        let labels = self.live.iter().filter(|&&row| of(row) > 0).count();
        let covered: usize = held.iter().map(|&row| of(row)).sum();
        let all: usize = self.live.iter().map(|&row| of(row)).sum();
        if held.iter().any(|&row| of(row) == 0) || 2 * labels >= self.live.len() || 2 * covered < all {
            return None;
        }
        Some(Pattern { slope: self.slope(), ..self.in_rows("label_rows", &self.bad_rows(|row| of(row) > 0)) })
    }

    /// A run of rows: up to the end, one tile, or neither.
    fn range(&self, held: &[usize]) -> Option<Pattern> {
        let place = |row: usize| self.live.binary_search(&row).ok();
        let (mut from, mut to) = (place(held[0])?, place(*held.last()?)?);
        let bad = self.as_bad_as(held);
        while from > 0 && bad(self.live[from - 1]) {
            from -= 1;
        }
        while to + 1 < self.live.len() && bad(self.live[to + 1]) {
            to += 1;
        }
        let run = &self.live[from..=to];
        let filled = run.iter().filter(|&&row| bad(row)).count();
        if run.len() < 2 || filled * 10 < run.len() * 9 || run.len() * 4 > self.live.len() * 3 {
            return None;
        }
        // Rows that are 0 by right, or not compared, may belong to the run or not.
        let row = |place: usize| self.context.row(self.live[place]);
        let starts = from.checked_sub(1).map_or(0, |before| row(before) + 1)..=row(from);
        let to_end = to + 1 == self.live.len();
        let ends = row(to) + 1..=if to_end { self.context.of } else { row(to + 1) };
        let tiles = tiling::one_tile(starts, ends, to_end, self.context.of);
        let first_bad = to_end.then(|| row(from));
        let name = match (to_end, tiles.first()) {
            (true, _) => "tail",
            (false, Some(_)) => self.tile_name(),
            (false, None) => "rows",
        };
        let tile = tiles.first().copied();
        let tile_candidates = if tiles.len() > 1 { tiles } else { vec![] };
        Some(Pattern { first_bad, tile, tile_candidates, ..self.in_rows(name, run) })
    }

    /// The same rows of every tile, or every so many tiles.
    fn tiles(&self, held: &[usize]) -> Option<Pattern> {
        let weighed: Vec<(usize, f64)> = held.iter().map(|&row| (self.context.row(row), self.weight[row].min(CAP))).collect();
        let fold = tiling::periodic(&weighed, self.context.of)?;
        let within = self.bad_rows(|row| fold.contains(self.context.row(row)));
        Some(in_fold(fold, self.in_rows(self.tile_name(), &within)))
    }

    /// Tokens whose labels lie in the same place of every vocab tile.
    fn label_tiles(&self, held: &[usize]) -> Option<Pattern> {
        if self.context.stage.rows_are() != RowsAre::Tokens {
            return None;
        }
        let label = |row: usize| self.context.labels.get(self.context.row(row)).copied().flatten();
        let labels: BTreeSet<usize> = held.iter().filter_map(|&row| label(row)).collect();
        let vocab = 1 + self.context.labels.iter().flatten().max()?;
        let fold = tiling::periodic(&labels.into_iter().map(|label| (label, 1.0)).collect::<Vec<_>>(), vocab)?;
        let within = self.bad_rows(|row| label(row).is_some_and(|label| fold.contains(label)));
        Some(in_fold(fold, self.in_rows("label_tile", &within)))
    }

    fn tile_name(&self) -> &'static str {
        match self.context.stage.rows_are() {
            RowsAre::VocabIds => "vocab_tile",
            RowsAre::Tokens => "token_tile",
        }
    }

    /// A factor per row.
    fn row_factors(&self) -> Option<Pattern> {
        let bad = self.bad_rows(|_| true);
        let pattern = self.in_rows("row_scale", &bad);
        (bad.len() > 1 && (pattern.alpha.is_some() || pattern.alpha_range.is_some())).then_some(pattern)
    }

    /// Few rows without a shape.
    fn few_rows(&self) -> Option<Pattern> {
        let held = rows_that_hold(&self.weight);
        let few = !held.is_empty() && held.len() * 4 < self.live.len();
        few.then(|| self.in_rows("rows", &held)).filter(|pattern| pattern.share > 0.5)
    }

    /// An error that grows with the hits of a label's row.
    fn growth(&self) -> Option<Pattern> {
        const GROWS: f64 = 0.15;
        if self.context.stage.rows_are() != RowsAre::VocabIds {
            return None;
        }
        let hits = self.context.hits();
        let labels: Vec<usize> = self.live.iter().copied().filter(|&row| hits.contains_key(&self.context.row(row))).collect();
        let slope = self.slope().filter(|slope| *slope > GROWS && self.share(&labels) > 0.9)?;
        Some(Pattern { slope: Some(slope), ..self.in_rows("hits", &labels) })
    }

    /// How the log of a row's relative error grows with the log of its hits; `None` where that cannot be told.
    fn slope(&self) -> Option<f64> {
        const FEWEST: f64 = 8.0;
        const SURE: f64 = 3.0;
        let hits = self.context.hits();
        let points: Vec<[f64; 2]> = self
            .live
            .iter()
            .filter(|&&row| self.rows.deviation[row] > 0.0 && self.rows.reference[row] > 0.0)
            .filter_map(|&row| {
                let hits = *hits.get(&self.context.row(row))? as f64;
                Some([hits.ln(), 0.5 * (self.rows.deviation[row] / self.rows.reference[row]).ln()])
            })
            .collect();
        let n = points.len() as f64;
        let mean = |i: usize| points.iter().map(|p| p[i]).sum::<f64>() / n;
        let (x, y) = (mean(0), mean(1));
        let moment = |i: usize, j: usize| points.iter().map(|p| (p[i] - [x, y][i]) * (p[j] - [x, y][j])).sum::<f64>();
        let (xx, xy, yy) = (moment(0, 0), moment(0, 1), moment(1, 1));
        let slope = xy / xx;
        let error = ((yy - slope * xy).max(0.0) / ((n - 2.0) * xx)).sqrt();
        (n >= FEWEST && xx > 0.0 && SURE * error < slope.abs().max(0.25)).then_some(slope)
    }
}

/// `pattern` with the tile that `fold` shows.
fn in_fold(Fold { period, window }: Fold, pattern: Pattern) -> Pattern {
    let length = window.len();
    if length >= tiling::SMALLEST && period.is_multiple_of(length) && window.start.is_multiple_of(length) {
        return Pattern { tile: Some(length), every: Some([period / length, window.start / length]), ..pattern };
    }
    Pattern { tile: Some(period), offset: Some([window.start, window.end]), ..pattern }
}

/// An error in few columns, whatever the row.
fn columns(rows: &Rows, candidate: ArrayView2<f64>, reference: ArrayView2<f64>) -> Option<Pattern> {
    const FEWEST: usize = 8;
    if candidate.ncols() < FEWEST || rows.deviation.sum() == 0.0 {
        return None;
    }
    let squared = (&candidate - &reference).mapv_into(|x| x * x);
    let (error, size) = (squared.sum_axis(Axis(0)), reference.map_axis(Axis(0), |column| column.dot(&column)));
    // A column that is 0 by right has no size of its own.
    let mean = size.mean()?;
    let weight: Vec<f64> = error.iter().zip(&size).map(|(e, s)| e / if *s > 0.0 { *s } else { mean }).collect();
    let held = rows_that_hold(&weight);
    let share = held.iter().map(|&column| error[column]).sum::<f64>() / error.sum();
    (held.len() * 4 < weight.len()).then(|| Pattern { share, columns: ranges(held.iter().copied()), ..kind("columns") })
}

/// The fewest rows that hold nearly all of the total, in order.
fn rows_that_hold(weight: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weight.len()).filter(|&row| weight[row] > 0.0).collect();
    order.sort_by(|&a, &b| weight[b].total_cmp(&weight[a]));
    let wanted = NEARLY_ALL * weight.iter().sum::<f64>();
    let mut held = 0.0;
    let mut count = 0;
    while count < order.len() && held < wanted {
        held += weight[order[count]];
        count += 1;
    }
    order.truncate(count);
    order.sort_unstable();
    order
}

/// Sorted rows as [start, end) ranges of the whole tensor's, as many as a report lists.
fn shown(context: &Context, rows: &[usize]) -> Vec<[usize; 2]> {
    ranges(rows.iter().map(|&row| context.row(row)))
}

fn ranges(sorted: impl Iterator<Item = usize>) -> Vec<[usize; 2]> {
    let mut out: Vec<[usize; 2]> = Vec::new();
    for row in sorted {
        match out.last_mut() {
            Some(last) if last[1] == row => last[1] += 1,
            _ => out.push([row, row + 1]),
        }
    }
    out.truncate(MAX_RANGES);
    out
}
