//! The figures of one tensor that the report draws.

use super::compare::{Context, Rows, place};
use super::truth::RowsAre;
use crate::report::model::Worst;
use crate::report::plots::{HitsPoint, MagnitudeBin, Plots, ProcessCell, Span};
use ndarray::ArrayView2;
use std::collections::BTreeMap;

/// Pieces that a profile has at most.
const SPANS: usize = 256;
/// Rows of about the same hits that are drawn at most.
const OF_ONE_KIND: usize = 24;
/// Elements listed at most.
const WORST: usize = 6;

pub(super) fn plots(context: &Context, rows: &Rows, candidate: ArrayView2<f64>, reference: ArrayView2<f64>) -> Plots {
    let floor: Vec<f64> = (0..rows.deviation.len()).map(|row| context.tolerance.l2(row..row + 1).powi(2)).collect();
    let (magnitude, worst) = elements(context, candidate, reference);
    Plots {
        profile: profile(context, rows, &floor),
        hits: if context.stage.rows_are() == RowsAre::VocabIds { hits(context, rows, &floor) } else { vec![] },
        magnitude,
        processes: processes(context, rows, &floor),
        worst,
    }
}

/// The floor of rows that are 0 by right is that of a few subnormal numbers: what shows there is drawn as much, not as 10³⁰.
const MOST: f64 = 1e9;

fn ratio(deviation: f64, floor: f64) -> f64 {
    if deviation > 0.0 { (deviation / floor).sqrt().min(MOST) } else { 0.0 }
}

fn profile(context: &Context, rows: &Rows, floor: &[f64]) -> Vec<Span> {
    let step = floor.len().div_ceil(SPANS).max(1);
    let span = |from: usize| {
        let places = from..(from + step).min(floor.len());
        let sum = |x: &mut dyn Iterator<Item = f64>| x.sum::<f64>();
        let all = ratio(sum(&mut places.clone().map(|row| rows.deviation[row])), sum(&mut places.clone().map(|row| floor[row])));
        let worst = places.clone().map(|row| ratio(rows.deviation[row], floor[row])).fold(0.0, f64::max);
        let rows = [context.row(from), context.row(places.end - 1) + 1];
        Span { rows, ratio: all as f32, worst: worst as f32 }
    };
    (0..floor.len()).step_by(step).map(span).collect()
}

/// Some rows of each number of hits, those of similar numbers together.
fn hits(context: &Context, rows: &Rows, floor: &[f64]) -> Vec<HitsPoint> {
    let hits = context.hits();
    let mut kinds: BTreeMap<u32, Vec<HitsPoint>> = BTreeMap::new();
    for (row, floor) in floor.iter().enumerate().filter(|(row, _)| rows.reference[*row] > 0.0) {
        let hits = hits.get(&context.row(row)).copied().unwrap_or(0);
        let relative = |squared: f64| (squared / rows.reference[row]).sqrt() as f32;
        let kind = if hits == 0 { 0 } else { 1 + (4.0 * (hits as f64).log2()).round() as u32 };
        kinds.entry(kind).or_default().push(HitsPoint { hits, error: relative(rows.deviation[row]), floor: relative(*floor) });
    }
    let some = |points: Vec<HitsPoint>| {
        let step = points.len().div_ceil(OF_ONE_KIND);
        points.into_iter().step_by(step)
    };
    let mut points: Vec<HitsPoint> = kinds.into_values().flat_map(some).collect();
    points.sort_by_key(|point| point.hits);
    points
}

fn elements(context: &Context, candidate: ArrayView2<f64>, reference: ArrayView2<f64>) -> (Vec<MagnitudeBin>, Vec<Worst>) {
    let mut bins: BTreeMap<u64, MagnitudeBin> = BTreeMap::new();
    let mut worst: Vec<(f64, [usize; 2])> = Vec::new();
    for (row, (values, exact)) in candidate.outer_iter().zip(reference.outer_iter()).enumerate() {
        let mut largest = (0.0, [row, 0]);
        for (column, (&c, &r)) in values.iter().zip(exact).enumerate() {
            if !(c.is_finite() && r.is_finite()) {
                continue;
            }
            let error = (c - r).abs();
            if error > largest.0 {
                largest = (error, [row, column]);
            }
            if r == 0.0 {
                continue;
            }
            // The exponent alone, mantissa and sign cleared.
            let from = r.to_bits() & 0x7ff0_0000_0000_0000;
            let empty = MagnitudeBin { from: f64::from_bits(from), count: 0, rms: 0.0, largest: 0.0, bound: 0.0 };
            let bin = bins.entry(from).or_insert(empty);
            bin.count += 1;
            bin.rms += error * error;
            bin.largest = bin.largest.max(error);
            bin.bound += context.tolerance.bound(row, column, r);
        }
        if largest.0 > worst.last().map_or(0.0, |(least, _)| if worst.len() < WORST { 0.0 } else { *least }) {
            let at = worst.partition_point(|(error, _)| *error >= largest.0);
            worst.insert(at, largest);
            worst.truncate(WORST);
        }
    }
    let mean = |mut bin: MagnitudeBin| {
        bin.rms = (bin.rms / bin.count as f64).sqrt();
        bin.bound /= bin.count as f64;
        bin
    };
    let element = |(_, index): (f64, [usize; 2])| {
        let whole = [context.row(index[0]), index[1]];
        Worst { index: whole, place: place(context, whole), candidate: candidate[index], reference: reference[index] }
    };
    (bins.into_values().map(mean).collect(), worst.into_iter().map(element).collect())
}

fn processes(context: &Context, rows: &Rows, floor: &[f64]) -> Vec<ProcessCell> {
    let mut sums: BTreeMap<usize, [f64; 2]> = BTreeMap::new();
    for (row, floor) in floor.iter().enumerate() {
        if let Some(process) = context.owner(row) {
            let [deviation, own] = sums.entry(process).or_default();
            *deviation += rows.deviation[row];
            *own += floor;
        }
    }
    sums.into_iter().map(|(process, [deviation, floor])| ProcessCell { process, ratio: ratio(deviation, floor) }).collect()
}
