//! The error of a gradient along its parts, which needs nothing recorded but the gradient.
//!
//! A row of dQ is a·(lse part) + b·(label part) with a = b = 1. A wrong lse, or a wrong cotangent of it, makes another a; a
//! wrong cotangent of the label's logit another b; a wrong g both alike. Each row's error is fitted by its parts with least
//! squares, and the share of the squared error that a fit takes, of all that is above the floor, says which of them it is.

use crate::report::substitution::{Along, AlongPart};
use ndarray::{Array2, ArrayView1};

/// Features from which a fit of two numbers to a row says anything.
const FEATURES: usize = 8;

/// A factor on each row of the lse part and of the label part.
pub(super) type Factors = Vec<[f64; 2]>;

/// How the error lies along the parts, and the factors of the fit that tells most; `floor` is the expected squared error of
/// each row. `None` where there is no second part, or no error above the floor.
pub(super) fn along(error: &Array2<f64>, parts: [&Array2<f64>; 2], floor: &[f64]) -> Option<(Along, Factors)> {
    let [lse, label] = parts;
    let features = error.ncols();
    let fits: Vec<Fit> =
        error.outer_iter().zip(lse.outer_iter().zip(label.outer_iter())).map(|(e, (a, b))| Fit::new(e, a, b)).collect();
    let all: f64 = fits.iter().map(|fit| fit.all).sum();
    let honest: f64 = floor.iter().sum();
    let there_are = |part: &Array2<f64>| part.iter().any(|&x| x != 0.0);
    if features < FEATURES || all <= honest || !all.is_finite() || !there_are(lse) || !there_are(label) {
        return None;
    }
    let share = |taken: f64, numbers: f64| {
        let left = all - taken - honest * (1.0 - numbers / features as f64);
        1.0 - (left / (all - honest)).clamp(0.0, 1.0)
    };
    let of_part = |which: usize| {
        let taken = fits.iter().map(|fit| fit.taken[which]).sum();
        let (product, squared): (f64, f64) =
            fits.iter().fold((0.0, 0.0), |(p, s), fit| (p + fit.products[which], s + fit.squares[which]));
        let of_one = if squared > 0.0 { product * product / squared } else { 0.0 };
        let off = fits.iter().zip(floor).filter(|(fit, floor)| fit.taken[which] > 4.0 * *floor);
        let mut factors: Vec<f64> = off.map(|(fit, _)| 1.0 + fit.products[which] / fit.squares[which]).collect();
        factors.sort_by(f64::total_cmp);
        let at = |share: f64| factors.get((share * factors.len() as f64) as usize).copied().unwrap_or(1.0);
        AlongPart { share: share(taken, 1.0), share_of_one: share(of_one, 0.0), factors: [at(0.05), at(0.95)] }
    };
    let [lse, label, gradient] = [0, 1, 2].map(of_part);
    let both = share(fits.iter().map(|fit| fit.both).sum(), 2.0);
    let best = [lse.share, label.share, gradient.share];
    let which = (0..3).max_by(|&a, &b| best[a].total_cmp(&best[b])).unwrap_or(0);
    let factors = fits.iter().map(|fit| fit.factors(which)).collect();
    Some((Along { lse, label, gradient, both, as_in_d_hidden: None }, factors))
}

/// A row's error e, fitted by its lse part, its label part and their sum.
struct Fit {
    /// ‖e‖².
    all: f64,
    /// ⟨e, part⟩, ‖part‖², and what the part takes of ‖e‖².
    products: [f64; 3],
    squares: [f64; 3],
    taken: [f64; 3],
    /// What both parts take, each with a factor.
    both: f64,
}

impl Fit {
    fn new(error: ArrayView1<f64>, lse: ArrayView1<f64>, label: ArrayView1<f64>) -> Self {
        let sum = &lse + &label;
        let parts = [lse, label, sum.view()];
        let products = parts.map(|part| part.dot(&error));
        let squares = parts.map(|part| part.dot(&part));
        let taken = [0, 1, 2].map(|i| if squares[i] > 0.0 { products[i] * products[i] / squares[i] } else { 0.0 });
        let inner = lse.dot(&label);
        let determinant = squares[0] * squares[1] - inner * inner;
        let single = taken.into_iter().fold(0.0, f64::max);
        let both = if determinant > 1e-9 * squares[0] * squares[1] {
            let [a, b] = [products[0], products[1]];
            (squares[1] * a * a - 2.0 * inner * a * b + squares[0] * b * b) / determinant
        } else {
            single
        };
        Self { all: error.dot(&error), products, squares, taken, both: both.max(single) }
    }

    /// What the fit by one of the three takes each part times.
    fn factors(&self, which: usize) -> [f64; 2] {
        let factor = if self.squares[which] > 0.0 { self.products[which] / self.squares[which] } else { 0.0 };
        [if which == 1 { 0.0 } else { factor }, if which == 0 { 0.0 } else { factor }]
    }
}
